"""Which renderer and simulation this machine can open, found out before anything slow starts."""

import subprocess
import sys
from functools import cache
from pathlib import Path

# In a process of its own: a broken Vulkan driver may crash the one that opens it
PROBE = """
import sys, sapien
system = sapien.render.RenderSystem(sapien.Device(sys.argv[1]))
summary = sapien.render.get_device_summary().split("GPU: ")[-1]
print("GPU:", system.device.name if system.device.is_cuda() else summary)
"""
FIXES = {  # by SAPIEN's device
    "cpu": "run `make setup`, or install Mesa's software Vulkan >= 24.3 (mesa-vulkan-drivers)",
    "cuda": "install the Vulkan part of NVIDIA's driver, or use --sim-device cpu",
}


@cache
def check_renderer(device):
    """Name of what renders: "cuda", or any Vulkan ("cpu"). RuntimeError with the fix: none does."""
    if sys.platform != "linux":
        raise RuntimeError(f"sys.platform = {sys.platform}: only Linux is tested; use Docker")
    command = [sys.executable, "-c", PROBE, device]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if child.returncode or "GPU: " not in child.stdout:
        why = (child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1]
        raise RuntimeError(f"renderer {device!r} does not open: {why}; {FIXES[device]}")
    return child.stdout.split("GPU: ")[-1].splitlines()[0]


def check_simulator(sim_device):
    """RuntimeError with the fix unless "cpu" or "cuda" simulation can start; downloads nothing."""
    check_renderer(sim_device)
    path = ".sapien/physx/*/libPhysXGpu_64.so"  # in the home directory
    if sim_device == "cuda" and not any(Path.home().glob(path)):
        fix = "fetch it once: python -c 'import sapien.physx as p; p.enable_gpu()'"
        raise RuntimeError(f"sim_device = 'cuda' needs SAPIEN's library ~/{path}; {fix}")
