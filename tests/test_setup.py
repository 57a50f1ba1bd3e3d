"""scripts/setup.sh: the one step that writes into the system's configuration."""

import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parent.parent / "scripts/setup.sh"
DEB822 = """\
# a comment
Types: deb
URIs: http://host.example/security
Suites: bookworm-security
Components: main

Types: deb deb-src
# another
URIs: http://host.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /keys/debian.gpg
"""
ONE_LINE = """\
# deb http://host.example/old bookworm main
deb http://host.example/security bookworm-security main
deb\t[signed-by=/keys/debian.gpg arch=amd64] http://host.example/debian bookworm main contrib
"""


def add_backports(apt):
    """Run the script's own function on the folder `apt` in place of the system's."""
    functions = SETUP.read_text().split("# --- nothing to do? ---")[0]
    assert "\nAPT=/etc/apt\n" in functions and "add_backports() {" in functions
    functions = functions.replace("APT=/etc/apt\n", f"APT={apt}\n").replace('cd "$(dirname "$0")/.."\n', "")
    code = functions + "\napt_update() { :; }\nid() { echo 0; }\nadd_backports bookworm-backports bookworm"
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "name, text, added, expected",
    [
        (
            "sources.list.d/debian.sources",
            DEB822,
            "sources.list.d/cleanvla-backports.sources",
            "Types: deb\nURIs: http://host.example/debian\nSuites: bookworm-backports\nComponents: main\n"
            "Signed-By: /keys/debian.gpg\n",
        ),
        (
            "sources.list",
            ONE_LINE,
            "sources.list.d/cleanvla-backports.list",
            "deb [signed-by=/keys/debian.gpg arch=amd64] http://host.example/debian bookworm-backports main\n",
        ),
    ],
)
def test_backports_come_from_the_machines_own_source(tmp_path, name, text, added, expected):
    """Stops a copy of the security archive, of a comment, or of an entry without its key: apt would refuse them all."""
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / name).write_text(text)
    run = add_backports(tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / added).read_text() == expected
    assert (tmp_path / name).read_text() == text, "the machine's own entry is never changed"


def test_no_source_to_copy_is_an_error(tmp_path):
    """Stops an empty file in the system's configuration when the release is not found."""
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://host.example/debian trixie main\n")
    run = add_backports(tmp_path)
    assert run.returncode == 1 and "no apt source for bookworm" in run.stderr
    assert not list((tmp_path / "sources.list.d").iterdir())
