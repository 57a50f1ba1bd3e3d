"""scripts/: what this machine can do, what a run will be, and the set-up of the system."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import doctor, renderer
from scripts.plan import plan


def test_doctor_with_and_without_vulkan(monkeypatch, capsys):
    """Stops a report that passes without a picture or ends early, and a bare, late driver error."""
    assert doctor.main() == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    assert "ManiSkill 3.0.1, pictures by " in lines[1] and lines[1].startswith("ok")
    renderer.check_renderer.cache_clear()
    for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES"):
        monkeypatch.setenv(name, "/nowhere.json")
    with pytest.raises(RuntimeError, match="(?s)'cpu'.*ErrorIncompatibleDriver.*mesa-vulkan"):
        renderer.check_simulator("cpu")
    assert doctor.main() == 1 and "MISSING  simulation" in capsys.readouterr().out


def test_a_crash_and_a_missing_library_are_answers(monkeypatch, tmp_path):
    """Stops a driver's crash from ending the caller, silence as success, PhysX that misses late."""
    for probe in ("import os; os.kill(os.getpid(), 11)", "pass"):
        monkeypatch.setattr(renderer, "PROBE", probe)
        with pytest.raises(RuntimeError, match="exit status"):
            renderer.check_renderer.__wrapped__("cpu")  # not the answer of an earlier test
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        with pytest.raises(RuntimeError, match=f"{platform}: only Linux .*Docker"):
            renderer.check_renderer.__wrapped__("cpu")
    monkeypatch.setattr(renderer, "check_renderer", lambda device: device)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="enable_gpu"):
        renderer.check_simulator("cuda")
    (tmp_path / ".sapien/physx/105.1/libPhysXGpu_64.so").mkdir(parents=True)
    renderer.check_simulator("cuda")


def test_plans_of_all_scripts():
    """Stops a plan of another model or update than the run's, a typing error planned as 7B."""
    large = plan("ppo_vla", ["--preset", "paper"])
    assert large["million weights"] == "7,607.3, trains 109.1"
    assert large["environment steps"] == "2,001,920, 5,120 per iteration"
    gb = [large[f"GB of {p}"] for p in ("weights", "activations in an update", "cache in acting")]
    assert gb == pytest.approx([15.43, 14.28, 10.17], abs=0.01)
    small = plan("ppo_vla", ["--num-envs", "32"])
    assert (small["million weights"], small["num_envs (default 64)"]) == ("1.4, trains 1.4", 32)
    for command, steps in {
        "ppo_vla --preset paper": "12,512, each of 160 samples",
        "grpo_vla.py --num-minibatches 5": "425, each of 2048 samples",
        "sft_vla --preset warmup": "2,000, each of 32 samples",
    }.items():
        script, *argv = command.split()
        assert plan(script, argv)["optimizer steps"] == steps
        with pytest.raises(FileNotFoundError, match="tiny-warmpu"):
            plan(script, ["--model", "checkpoints/tiny-warmpu"])


ROOT = Path(__file__).parent.parent
APT = ROOT / "tests/fixtures/apt"  # a machine's own entries, and what is added


@pytest.mark.parametrize("file, suite, added", [
    ("sources.list.d/debian.sources", "bookworm", ["cleanvla-backports.sources"]),
    ("sources.list", "bookworm", ["cleanvla-backports.list"]), ("sources.list", "trixie", []),
])  # fmt: skip
def test_backports_come_from_the_machines_own_source(tmp_path, file, suite, added):
    """Stops a copy of the wrong entry or one without its key, and a file where there is none."""
    own = (APT / Path(file).name).read_text().replace("bookworm", suite)
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / file).write_text(own)
    functions = (ROOT / "scripts/setup.sh").read_text().split("# --- nothing to do? ---")[0]
    functions = functions.replace("cd ", ": ").replace("APT=/etc/apt\n", f"APT={tmp_path}\n")
    call = "\napt_update() { :; }\nid() { echo 0; }\nadd_backports bookworm-backports bookworm"
    run = subprocess.run(["bash", "-c", functions + call], capture_output=True, text=True)
    found = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found.pop(Path(file).name) == own, "the machine's own entry is never changed"
    assert found == {name: (APT / name).read_text() for name in added}, run.stderr
    assert run.returncode == (not added)
