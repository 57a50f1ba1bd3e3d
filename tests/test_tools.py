"""scripts/: what this machine can do, what a run will be, and the set-up of the system."""

import subprocess
from pathlib import Path

import pytest

from common.simulation import renderer
from scripts import doctor
from scripts.plan import plan


@pytest.fixture(autouse=True)
def forget_answers():
    renderer.check_renderer.cache_clear()
    yield
    renderer.check_renderer.cache_clear()


def test_this_machine(capsys):
    """Stops a report that passes where no picture can be made, or ends at an optional part."""
    assert doctor.main() == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.CHECKS)
    assert "ManiSkill 3.0.1, pictures by " in lines[1] and lines[1].startswith("ok")


def test_missing_vulkan_names_the_fix(monkeypatch, capsys):
    """Stops ten minutes of waiting that end in a bare `ErrorIncompatibleDriver`."""
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere.json")
    monkeypatch.setenv("VK_DRIVER_FILES", "/nowhere.json")
    with pytest.raises(RuntimeError, match="(?s)'cpu'.*ErrorIncompatibleDriver.*mesa-vulkan"):
        renderer.check_simulator("cpu")
    assert doctor.main() == 1
    assert "MISSING  simulation" in capsys.readouterr().out


@pytest.mark.parametrize("probe", ["import os; os.kill(os.getpid(), 11)", "pass"])
def test_a_crash_is_an_answer(monkeypatch, probe):
    """Stops a driver's segmentation fault from ending the caller, and silence taken for success."""
    monkeypatch.setattr(renderer, "PROBE", probe)
    with pytest.raises(RuntimeError, match="exit status"):
        renderer.check_renderer("cpu")


def test_gpu_simulation_without_its_library(monkeypatch, tmp_path):
    """Stops several ranks that download it at once, and an error after the model is read."""
    monkeypatch.setattr(renderer, "check_renderer", lambda device: device)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="enable_gpu"):
        renderer.check_simulator("cuda")
    (tmp_path / ".sapien/physx/105.1").mkdir(parents=True)
    (tmp_path / ".sapien/physx/105.1/libPhysXGpu_64.so").touch()
    renderer.check_simulator("cuda")


def test_weights_steps_and_memory_of_both_sizes():
    """Stops a plan that is of another model or update than the run; 7B numbers are OpenVLA's."""
    small, large = plan("ppo_vla", ["--num-envs", "32"]), plan("ppo_vla", ["--preset", "paper"])
    assert small["million weights"] == "1.6, trains 0.9"
    assert small["optimizer steps"] == "1,700, each of 256 samples"
    assert small["num_envs (default 64)"] == 32
    assert large["million weights"] == "7,607.3, trains 109.1"
    assert large["optimizer steps"] == "12,512, each of 160 samples"
    assert large["environment steps"] == "2,001,920, 5,120 per iteration"
    assert large["GB of weights"] == pytest.approx(15.43, abs=0.01)
    assert large["GB of activations in an update"] == pytest.approx(14.28, abs=0.01)
    assert large["GB of cache in acting"] == pytest.approx(10.17, abs=0.01)


@pytest.mark.parametrize("command, steps", [
    ("grpo_vla.py --num-minibatches 5", "425, each of 2048 samples"),
    ("dpo_vla --preset paper", "12,512, each of 160 samples"),
    ("sft_vla --preset warmup", "2,000, each of 32 samples"),
])  # fmt: skip
def test_every_script_has_a_plan(command, steps):
    """Stops a script whose flags are not understood, and a typing error planned as OpenVLA-7B."""
    script, *argv = command.split()
    assert plan(script, argv)["optimizer steps"] == steps
    with pytest.raises(FileNotFoundError, match="tiny-warmpu"):
        plan(script, ["--model", "checkpoints/tiny-warmpu"])


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
ONE_LINE_ADDED = """\
deb [signed-by=/keys/debian.gpg] http://host.example/debian bookworm-backports main
"""


@pytest.mark.parametrize("file, text, added, expected", [
    ("sources.list.d/debian.sources", DEB822, "backports.sources", DEB822_ADDED),
    ("sources.list", ONE_LINE, "backports.list", ONE_LINE_ADDED),
    ("sources.list", ONE_LINE.replace("bookworm", "trixie"), None, None),
])  # fmt: skip
def test_backports_come_from_the_machines_own_source(tmp_path, file, text, added, expected):
    """Stops a copy of the wrong entry or one without its key, and a file where there is none."""
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
