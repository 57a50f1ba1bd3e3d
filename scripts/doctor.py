"""Say what this machine can do, with a fix for what is missing: `python scripts/doctor.py`."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from timeit import timeit

import torch
from huggingface_hub import try_to_load_from_cache

from common.run.ranks import cores
from common.simulation.assets import load_pack
from scripts.renderer import check_renderer, check_simulator

# One step of the default scene, in a process of its own: a driver may crash
EPISODE = """
from common.simulation.env import CAMERA, SCENES, make_env
env = make_env(**SCENES["small"])
env.reset()
obs, *_ = env.step([[0.0] * 7])
assert obs["sensor_data"][CAMERA]["rgb"].float().std() > 10, "the picture is empty"
"""


def check_torch():
    float32, bfloat16 = (torch.ones(512, 512, dtype=t) for t in (torch.float32, torch.bfloat16))
    seconds = [timeit(lambda x=x: x @ x, number=3) for x in (float32, bfloat16)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    speed = f"bfloat16 at {seconds[0] / seconds[1]:.2g} of float32's speed on the CPU"
    return f"{torch.__version__}, {gpu}, {cores()} cores; {speed}"


def check_simulation():
    name = check_renderer("cpu")
    child = subprocess.run([sys.executable, "-c", EPISODE], capture_output=True, text=True)
    if child.returncode:
        error = (child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1]
        raise RuntimeError(f"{error}; run `make setup`")
    return f"ManiSkill {version('mani_skill')}, pictures by {name}"


def check_gpu():
    check_simulator("cuda")
    return "--sim-device cuda"


def check_assets(pack):
    return f"robot {load_pack(pack).robot_urdf}"


def check_weights(name):
    """All shards of a directory, or of a model of the hub that was downloaded."""
    config = f"{name}/config.json"
    if not os.path.isdir(name):
        config = try_to_load_from_cache(name, "config.json")
    files = []
    if isinstance(config, str):
        files = sorted(Path(config).parent.glob("model*.safetensors"))
    shards = re.search(r"-of-(\d+)", files[0].name) if files else None
    if not files or len(files) != int(shards[1] if shards else 1):
        raise RuntimeError(f"not here, or only a part of it; `hf download {name}`, 15 GB")
    return str(files[0].parent)


def check_disk():
    free_gb = shutil.disk_usage(".").free / 1e9
    if free_gb < 2:
        raise RuntimeError(f"{free_gb:.1f} GB of disk free; a run wants 2 GB")
    return f"{free_gb:.0f} GB free"


CHECKS = [  # name, what the default run needs, check
    ("torch", True, check_torch),
    ("simulation", True, check_simulation),
    ("tiny weights", True, lambda: check_weights("checkpoints/tiny-warmup")),
    ("disk", True, check_disk),
    ("GPU simulation", False, check_gpu),
    ("published assets", False, lambda: check_assets("bridge")),
    ("OpenVLA", False, lambda: check_weights("openvla/openvla-7b")),
    ("OpenVLA warm-up", False, lambda: check_weights("gen-robot/openvla-7b-rlvla-warmup")),
]


def main():
    """One line per check; returns 1 when something that the default run needs is missing."""
    missing = 0
    for name, needed, check in CHECKS:
        try:
            print(f"ok       {name:17} {check()}", flush=True)
        except Exception as error:  # whatever fails is a finding, and the report goes on
            missing |= needed
            word = "MISSING " if needed else "optional"
            print(f"{word} {name:17} {error or repr(error)}", flush=True)
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
