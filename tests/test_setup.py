"""scripts/setup.sh: the one step that writes into the system's configuration."""

import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parent.parent / "scripts/setup.sh"
DEB822 = """\
Types: deb
URIs: http://host.example/security
Suites: bookworm-security

Types: deb deb-src
# a comment
URIs: http://host.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /keys/debian.gpg
"""
ONE_LINE = """\
# deb http://host.example/old bookworm main
deb http://host.example/security bookworm-security main
deb\t[signed-by=/keys/debian.gpg] http://host.example/debian bookworm main contrib
"""
DEB822_ADDED = """\
Types: deb
URIs: http://host.example/debian
Suites: bookworm-backports
Components: main
Signed-By: /keys/debian.gpg
"""
ONE_LINE_ADDED = (
    "deb [signed-by=/keys/debian.gpg] http://host.example/debian bookworm-backports main\n"
)


@pytest.mark.parametrize(
    "file, text, added, expected",
    [
        ("sources.list.d/debian.sources", DEB822, "backports.sources", DEB822_ADDED),
        ("sources.list", ONE_LINE, "backports.list", ONE_LINE_ADDED),
        ("sources.list", ONE_LINE.replace("bookworm", "trixie"), None, None),
    ],
)
def test_backports_come_from_the_machines_own_source(tmp_path, file, text, added, expected):
    """Stops a copy of the security archive, of a comment, or of an entry without its key, which apt
    would refuse, and an empty file where the release is not found."""
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / file).write_text(text)
    functions = SETUP.read_text().split("# --- nothing to do? ---")[0].replace("cd ", ": ")
    functions = functions.replace("APT=/etc/apt\n", f"APT={tmp_path}\n")
    call = "\napt_update() { :; }\nid() { echo 0; }\nadd_backports bookworm-backports bookworm"
    run = subprocess.run(["bash", "-c", functions + call], capture_output=True, text=True)
    found = {path.name: path.read_text() for path in (tmp_path / "sources.list.d").iterdir()}
    found.pop(Path(file).name, None)
    assert found == ({f"cleanvla-{added}": expected} if added else {}), run.stderr
    assert run.returncode == (0 if added else 1)
    assert (tmp_path / file).read_text() == text, "the machine's own entry is never changed"
