"""Two asset packs behind one interface: robot, 25 objects, 17 receptacles, 21 tables, 21 textures.
- primitive: embedded. Bodies are a few boxes, cylinders and spheres, tables are drawn by
  scripts/draw_tables.py, and the robot is the real WidowX with boxes in place of its meshes.
- bridge: the published files, which scripts/fetch_assets.py downloads, under MS_ASSET_DIR/data."""

import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np
import sapien
from PIL import Image
from sapien.physx import PhysxMaterial
from sapien.render import RenderMaterial

from common.run.files import check, naming, read_json
from scripts.asset_files import check_whole

FRICTION = (1.0, 1.0, 0.0)  # static, dynamic, restitution of objects and receptacles
FOLDER = Path(__file__).parent
FULL_VIEW = (0, 0, 640, 480)  # of the published camera: left, top, right, bottom


@dataclass(frozen=True)
class Body:
    name: str  # in the instruction
    density: float  # kg/m^3
    bbox_min: np.ndarray  # (3,) exact bounds of the collision shapes about the origin, m
    bbox_max: np.ndarray


@dataclass(frozen=True)
class AssetPack:
    robot_urdf: str
    objects: list[Body]  # 25
    plates: list[Body]  # 17
    mixes: list[float]  # 21 weights of the textures: 0 for the first, else 1
    add_body: Callable  # (builder, "object" or "plate", index): its shapes, on an actor builder
    build_table: Callable  # (builder): the same, top at z = 0.870 m, and its pose
    background: Callable  # (index, width, height, view): `picture` of a table alone
    texture: Callable  # the same of noise


@lru_cache(maxsize=256)
def picture(read, index, width, height, view=FULL_VIEW):
    """(height, width, 3) uint8, read-only: this view of the image that read(index) gives."""
    image = read(index)
    box = tuple(side * image.width / 640 for side in view)
    image = np.array(image.resize((width, height), Image.BILINEAR, box=box))
    image.setflags(write=False)
    return image


def load_pack(name):
    """The pack "primitive" or "bridge"; ValueError: another name, or files that are not whole."""
    check(name in ("primitive", "bridge"), f"assets = {name!r}: use primitive or bridge")
    root = Path(os.environ.get("MS_ASSET_DIR", "~/.maniskill")).expanduser()
    return primitive_pack() if name == "primitive" else _bridge_pack(root)


# --- primitive ---
# primitive_pack.json. Body: name, density, solid parts (they collide), seen parts. What would roll
#   collides as a box or an upright cylinder a little inside what is seen, so that it stays put.
#   Objects are at most 42 mm across the gripper, which opens to 52, and 24-42 mm high: the
#   fingertips reach 16 mm below the TCP, the palm is 22 mm above it.
# Part, in mm about the origin, z up: shape and long axis; size (box: x y z; others: diameter,
#   length over all); centre; colour; yaw in degrees.
@cache
def primitive_pack(text=None):
    """The pack that a JSON text like primitive_pack.json's describes; tables are the drawn ones."""
    rows = json.loads(text) if text else read_json(FOLDER / "primitive_pack.json")

    def add_body(builder, kind, index):
        _, density, solid, seen = rows[f"{kind}s"][index]
        surface = dict(material=PhysxMaterial(*FRICTION), density=density)
        for part in solid:
            shape, arguments, _, _ = _part(*part)
            getattr(builder, f"add_{shape}_collision")(**arguments, **surface)
        for part in seen:
            shape, arguments, color, _ = _part(*part)
            rgba = [*rows["colors"][color], 1]
            paint = RenderMaterial(base_color=rgba, roughness=0.6, specular=0.3)
            getattr(builder, f"add_{shape}_visual")(**arguments, material=paint)

    def build_table(builder):
        wood = RenderMaterial(base_color=[0.6, 0.5, 0.4, 1])
        builder.add_box_collision(half_size=[1.5, 1.5, 0.02])
        builder.add_box_visual(half_size=[1.5, 1.5, 0.02], material=wood)
        builder.initial_pose = sapien.Pose([0, 0, 0.85])

    def body(name, density, solid, seen):
        bounds = np.array([_part(*part)[3] for part in solid])
        return Body(name, density, bounds[:, 0].min(0), bounds[:, 1].max(0))

    def reader(file):  # of a sheet with 3 rows of 7 pictures
        sheet = np.array(Image.open(FOLDER / file)).reshape(3, 120, 7, 160, 3)
        return partial(picture, lambda index: Image.fromarray(sheet[index // 7, :, index % 7]))

    urdf = str(FOLDER / "primitive_widowx.urdf")
    mixes = [0.0] + [1.0] * 20
    objects = [body(*row) for row in rows["objects"]]
    plates = [body(*row) for row in rows["plates"]]
    pictures = reader("primitive_tables.png"), reader("primitive_textures.png")
    return AssetPack(urdf, objects, plates, mixes, add_body, build_table, *pictures)


def _part(shape, size, at=(0, 0, 0), color=None, yaw=0):
    """SAPIEN's name and arguments of a shape, its colour, and its bounds (2, 3) in metres."""
    kind, _, axis = shape.partition("_")
    half, center = np.array(size) / 2000, np.array(at) / 1000
    caps = half[0] if kind == "capsule" else 0
    arguments = {"half_size": half} if kind == "box" else {"radius": half[0]}
    if kind in ("cylinder", "capsule"):
        arguments["half_length"] = half[1] - caps
    c, s = np.cos(np.deg2rad(yaw) / 2), np.sin(np.deg2rad(yaw) / 2)
    upright = [0.5**0.5, 0, -(0.5**0.5), 0] if axis == "z" else [1, 0, 0, 0]  # SAPIEN's axis: x
    arguments["pose"] = sapien.Pose(center, [c, 0, 0, s]) * sapien.Pose(q=upright)
    reach = half[[0, 0, -1]]  # solid parts are boxes or stand upright
    if kind == "box":
        c, s = abs(c * c - s * s), abs(2 * c * s)
        reach = np.array([c * half[0] + s * half[1], s * half[0] + c * half[1], half[2]])
    return kind, arguments, color, np.array([center - reach, center + reach])


# --- bridge ---
FILES_IN = re.compile(rb'(?:filename="|<init_from>|\nmtllib |\nmap_Kd )([^"<\r\n]+\.\w+)')


@cache
def _bridge_pack(root):
    fix = f"run `python scripts/fetch_assets.py --dir {shlex.quote(str(root))}`, set MS_ASSET_DIR"

    def need(path, links=False):
        """The path of a whole file; with links=True those that it names are whole too."""
        with naming(path, fix):
            check_whole(path)
        names = FILES_IN.findall(path.read_bytes()) if links and path.suffix != ".glb" else []
        for name in names:
            need(path.parent / name.decode(), links)
        return str(path)

    urdf = need(root / "data/robots/widowx/wx250s.urdf", links=True)
    need(root / "data/robots/widowx/wx250s.srdf")  # which links may not collide
    stage = need(root / "data/tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb")
    bodies, files = {"object": [], "plate": []}, {"object": [], "plate": []}
    for kind, name in (("object", "more_carrot"), ("plate", "more_plate")):
        folder = root / "data/rl4vla" / name
        for key, row in read_json(folder / "model_db.json", fix).items():
            visuals = [folder / key / f"textured.{ending}" for ending in ("obj", "dae", "glb")]
            visual = need(next(filter(Path.exists, visuals), visuals[0]), links=True)
            files[kind].append((need(folder / key / "collision.obj"), visual))
            low, high = np.array(row["bbox"]["min"]), np.array(row["bbox"]["max"])
            bodies[kind].append(Body(row["name"], row["density"], low, high))
    folder = root / "data/rl4vla/more_table"
    tables = read_json(folder / "model_db.json", fix)
    photos = [need(folder / "imgs" / key) for key in tables]
    textures = [need(folder / "textures" / row["texture"]) for row in tables.values()]

    def add_body(builder, kind, index):
        # As published, every component of collision.obj is one convex hull
        surface = dict(material=PhysxMaterial(*FRICTION), density=bodies[kind][index].density)
        mesh, visual = files[kind][index]
        builder.add_multiple_convex_collisions_from_file(mesh, **surface)
        builder.add_visual_from_file(visual)

    def build_table(builder):
        upright = sapien.Pose(q=[0.707, 0.707, 0, 0])  # three digits, as published
        builder.add_nonconvex_collision_from_file(stage, pose=upright)
        builder.add_visual_from_file(stage, pose=upright)
        builder.initial_pose = sapien.Pose([2.0634, 2.8313, 0.0])

    def reader(paths):  # as published, an alpha channel is dropped, not blended
        return partial(picture, lambda index: Image.open(paths[index]).convert("RGB"))

    mixes = [float(row["mix"]) for row in tables.values()]
    functions = add_body, build_table, reader(photos), reader(textures)
    return AssetPack(urdf, bodies["object"], bodies["plate"], mixes, *functions)
