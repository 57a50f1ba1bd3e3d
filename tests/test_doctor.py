"""What this machine can do: a broken driver is an answer, with its fix, before anything starts."""

import pytest

from common.simulation import renderer
from scripts import doctor


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
