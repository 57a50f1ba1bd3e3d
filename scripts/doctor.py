"""What this machine can do, in seconds, with a fix for whatever is missing: `python -m scripts.doctor`."""

import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

PROBE = """
import sys, sapien
system = sapien.render.RenderSystem(sapien.Device("cuda" if sys.argv[1] == "gpu" else "cpu"))
if sys.argv[2] == "picture":  # a red box, drawn and read back
    scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), system])
    scene.create_actor_builder().add_box_visual(half_size=[0.5] * 3, material=[1, 0, 0]).build_static()
    scene.set_ambient_light([1, 1, 1])
    camera = scene.add_camera("camera", 8, 8, 1, 0.01, 10)
    camera.entity.set_pose(sapien.Pose([-2, 0, 0])), scene.update_render(), camera.take_picture()
    assert camera.get_picture("Color")[4, 4].round().tolist() == [1, 0, 0, 1], camera.get_picture("Color")[4, 4]
print("GPU:", system.device.name if system.device.is_cuda() else sapien.render.get_device_summary().split("GPU: ")[-1])
"""
FIXES = {  # by backend
    "cpu": "`make setup`, or install Mesa's software Vulkan >= 24.3 (Debian packages mesa-vulkan-drivers, libvulkan1)",
    "gpu": "install the NVIDIA driver's Vulkan part (container: NVIDIA_DRIVER_CAPABILITIES=all), or --sim-device cpu",
}
PHYSX = ".sapien/physx/*/libPhysXGpu_64.so"


@lru_cache
def check_renderer(backend: str = "cpu", picture: bool = False) -> str:
    """Open SAPIEN's renderer in a child process, where a crash of the Vulkan driver is an answer.

    Args: backend "cpu" (software Vulkan) or "gpu"; picture: draw and check one too (4 s, not 0.4 s).
    Returns the renderer's name; raises RuntimeError naming value, rule and fix.
    """
    if backend not in FIXES:
        raise ValueError(f"backend = {backend!r} is unknown; use one of {list(FIXES)}")
    command = [sys.executable, "-c", PROBE, backend, "picture" if picture else "device"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if child.returncode == 0 and "GPU: " in child.stdout:
            return child.stdout.split("GPU: ")[-1].splitlines()[0]
        why = f"exit status {child.returncode}: {(child.stderr.strip() or 'no message').splitlines()[-1]}"
    except subprocess.TimeoutExpired:
        why = "no answer in 120 s"
    raise RuntimeError(f"renderer {backend!r} fails here ({why}); a Vulkan driver must open it; {FIXES[backend]}")


def check_simulator(sim_device: str) -> None:
    """RuntimeError with the fix unless "cpu" or "cuda" simulation will start here; downloads nothing."""
    check_renderer("gpu" if sim_device == "cuda" else "cpu")
    if sim_device == "cuda" and not any(Path.home().glob(PHYSX)):
        fix = "fetch it once, before any torchrun: python -c 'import sapien.physx as p; p.enable_gpu()'"
        raise RuntimeError(f"sim_device = 'cuda' needs SAPIEN's PhysX library, ~/{PHYSX} is missing; {fix}")


def renderer_backend() -> str:
    """Return "gpu" when there is an NVIDIA GPU that can render, else "cpu"; says so when the GPU cannot."""
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        try:
            return check_renderer("gpu") and "gpu"
        except RuntimeError as error:
            print(error, file=sys.stderr)
    return "cpu"


def _torch() -> str:
    import torch

    from common.run.runs import bfloat16_speed

    device = f"cuda: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"
    speed = f"bfloat16 at {bfloat16_speed():.2g} of float32's speed in matmuls on the CPU"
    return f"{torch.__version__}, device {device}, {os.cpu_count()} cores, {speed}; {sys.executable}"


def _simulator() -> str:
    backend = renderer_backend()
    fetched = "" if any(Path.home().glob(PHYSX)) else " once SAPIEN's library is fetched: --sim-device cuda says how"
    physics = f"physx_cuda, one batched simulation{fetched}" if backend == "gpu" else "physx_cpu, worker processes"
    mesa = subprocess.getoutput("dpkg-query --show --showformat '${Version}' mesa-vulkan-drivers")
    return f"ManiSkill {version('mani_skill')}, {physics}; {check_renderer(backend, picture=True)}; Mesa {mesa}"


def _pack(name: str) -> str:
    from common.simulation.assets import load_pack

    return f"{len(load_pack(name).objects)} objects, robot {load_pack(name).robot_urdf}"


def _weights(name: str, fix: str) -> str:
    config = f"{name}/config.json" if os.path.isdir(name) else try_to_load_from_cache(name, "config.json")
    files = sorted(Path(config).parent.glob("model*.safetensors")) if isinstance(config, str) else []
    if files and len(files) == int((re.search(r"-of-(\d+)", files[0].name) or ["", 1])[1]):
        return str(files[0].parent)
    raise RuntimeError(f"no {name} here{', only a part of it' if isinstance(config, str) else ''}; {fix}")


def _room() -> str:
    available = next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    memory_gb, disk_gb = int(available.split()[1]) / 1e6, shutil.disk_usage(".").free / 1e9
    text = f"{memory_gb:.0f} GB of memory available, {disk_gb:.0f} GB of disk free"
    if memory_gb < 6 or disk_gb < 2:
        raise RuntimeError(f"{text}; 64 environments want 6 GB and a run 2 GB: free some, or use fewer --num-envs")
    return text


CHECKS = [  # name, check: returns what it found, or raises with the fix; does the default demo need it?
    ("torch", _torch, True),
    ("simulator", _simulator, True),
    ("primitive assets", lambda: _pack("primitive"), True),
    ("bridge assets", lambda: _pack("bridge"), False),
    ("tiny weights", lambda: _weights("checkpoints/tiny-warmup", "run this in the repository's root"), True),
    ("OpenVLA weights", lambda: _weights("openvla/openvla-7b", "`hf download` it (15 GB) for the 7B recipe"), False),
    ("OpenVLA warm-up", lambda: _weights("gen-robot/openvla-7b-rlvla-warmup", "`hf download` it (15 GB)"), False),
    ("room", _room, False),
]


def main(missing: int = 0) -> int:
    """Print one line per check; return 1 when something that the default demo needs is missing."""
    for name, check, needed in CHECKS:
        try:
            line = f"ok       {name:17} {check()}"
        except Exception as error:  # any failure of a check is a finding: say it with its fix and go on
            text, missing = str(error) or repr(error), missing | needed
            line = f"{'MISSING ' if needed else 'optional'} {name:17} {text}"
        print(line, flush=True)
    return missing


if __name__ == "__main__":
    sys.exit(main())
