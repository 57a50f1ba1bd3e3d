"""Is a file of the published assets whole?"""

import re
from xml.etree import ElementTree

from PIL import Image

from common.run.files import check


def check_whole(path):
    """An error unless the file has the form of its kind. What SAPIEN cannot read it may leave out
    with only a log line, and a mesh that was cut is a smaller one to it."""
    data, kind, whole = path.read_bytes(), path.suffix, True
    if kind == ".png":
        Image.open(path).verify()  # checksums, 25 times as fast as a load
    elif kind in (".urdf", ".srdf", ".dae"):
        ElementTree.fromstring(data)
    elif kind == ".glb":
        whole = int.from_bytes(data[8:12], "little") == len(data)
    elif kind == ".stl":
        binary = 84 + 50 * int.from_bytes(data[80:84], "little")
        whole = binary == len(data) or b"endsolid" in data[-99:]
    elif kind == ".obj":  # all published meshes use each of their vertices
        corners = set(re.findall(rb" (\d+)", b"".join(re.findall(rb"\nf( .*)", data))))
        vertices = set(range(1, (b"\n" + data).count(b"\nv ") + 1))
        whole = vertices and set(map(int, corners)) == vertices and data.endswith(b"\n")
    check(whole and data[:7] not in (b"", b"version"), f"no whole {kind}: {len(data)} bytes")
