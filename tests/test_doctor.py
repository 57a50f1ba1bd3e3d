"""The doctor: what is broken is said, with its fix, in seconds, and a crash of the driver is an answer."""

import subprocess
import time

import pytest

from scripts import doctor


@pytest.fixture(autouse=True)
def forget_answers():
    doctor.check_renderer.cache_clear()
    yield
    doctor.check_renderer.cache_clear()


def test_this_machine(capsys):
    """Stops a report that passes where no picture can be made: it reads a pixel back. The answer is kept in memory."""
    assert doctor.main() == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "of float32's speed" in out and "physx_c" in out and "ok       primitive assets  25 objects" in out
    start = time.time()
    assert doctor.check_renderer(doctor.renderer_backend(), picture=True) in out
    assert time.time() - start < 0.1, "the answer is not kept in memory"


def test_missing_vulkan_names_value_rule_and_fix_in_seconds(monkeypatch):
    """Stops ten minutes of waiting that end in a bare `ErrorIncompatibleDriver`."""
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nowhere.json")
    monkeypatch.setenv("VK_DRIVER_FILES", "/nowhere.json")
    start = time.time()
    with pytest.raises(RuntimeError, match="'cpu'.*ErrorIncompatibleDriver.*driver must open.*mesa-vulkan-driver"):
        doctor.check_renderer("cpu")
    assert time.time() - start < 5


@pytest.mark.parametrize(
    "probe, why",
    [
        ("import os; os.kill(os.getpid(), 11)", "exit status -11: no message"),
        ("pass", "exit status 0"),  # ended early without an answer
        ("raise AssertionError('a red box was drawn black')", "drawn black"),
    ],
)
def test_a_crash_is_an_answer(monkeypatch, probe, why):
    """Stops a driver's segmentation fault from ending the caller, or a silent child from counting as success."""
    monkeypatch.setattr(doctor, "PROBE", probe)
    with pytest.raises(RuntimeError, match=why):
        doctor.check_renderer("cpu")


def test_gpu_simulation_without_its_library(monkeypatch, tmp_path):
    """Stops a download that nobody asked for, several ranks unpacking at once, and an error after the model is read."""
    monkeypatch.setattr(doctor, "check_renderer", lambda backend: backend)
    monkeypatch.setenv("HOME", str(tmp_path))
    doctor.check_simulator("cpu")
    with pytest.raises(RuntimeError, match="sim_device = 'cuda' needs SAPIEN's PhysX library.*p.enable_gpu"):
        doctor.check_simulator("cuda")
    (tmp_path / ".sapien/physx/105.1").mkdir(parents=True)
    (tmp_path / ".sapien/physx/105.1/libPhysXGpu_64.so").touch()
    doctor.check_simulator("cuda")


def test_a_hang_is_an_answer(monkeypatch):
    """Stops a driver that never returns from hanging the caller."""

    def run(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="no answer in 120 s"):
        doctor.check_renderer("cpu")


def test_unknown_backend():
    """Stops a typing error from being reported as a broken driver."""
    with pytest.raises(ValueError, match=r"'vulkan'.*\['cpu', 'gpu'\]"):
        doctor.check_renderer("vulkan")


def test_half_a_download_is_no_model(tmp_path):
    """Stops "ok" for weights of which only the configuration or some of the shards are here."""
    (tmp_path / "config.json").write_text("{}")
    for number in (1, 2):
        with pytest.raises(RuntimeError, match="only a part of it; get it"):
            doctor._weights(str(tmp_path), "get it")
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"")
    assert doctor._weights(str(tmp_path), "get it") == str(tmp_path)


def test_report_lists_everything_and_fails_only_for_what_the_demo_needs(monkeypatch, capsys):
    """Stops exit status 1 on a healthy machine that merely lacks optional weights, and 0 on a broken one."""
    monkeypatch.setattr(doctor, "CHECKS", [(name, lambda: "fine", needed) for name, _, needed in doctor.CHECKS])
    assert doctor.main() == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok"] * len(doctor.CHECKS)

    def broken():
        raise FileNotFoundError("no file; fetch it")

    names = [name for name, _, _ in doctor.CHECKS]
    assert "OpenVLA weights" in names and "bridge assets" in names
    monkeypatch.setattr(doctor, "CHECKS", [("primitive assets", broken, False), ("torch", lambda: "2.13", True)])
    assert doctor.main() == 0
    assert "optional primitive assets  no file; fetch it" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "CHECKS", [("torch", broken, True), ("room", lambda: "1 GB", False)])
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert out.startswith("MISSING  torch") and "ok       room" in out, "a failed check must not end the report"
