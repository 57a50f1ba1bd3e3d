"""What a number is of: which model, trained how, on which machine."""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from common.model.checkpoints import locate
from common.run.files import read_json

NUMBER = 6 * "[0-9]"  # of a checkpoint; a user's copy beside it has another name and stays


def find_model(start):
    """Directory of a model; a training run stands for its best, else its latest checkpoint."""
    for kind in ("best", "checkpoint"):
        found = sorted(Path(start).glob(f"{kind}-{NUMBER}"))
        if found:
            return str(found[-1])
    return start


def training_flags(model):
    """Flags of a model's training, from its args.json, or their defaults; scene None: not known.

    model: directory, hub id, or "" for none.
    """
    flags = {"scene": None, "sim_device": "cpu", "dtype": "float32", "unnorm_key": ""}
    if not model or locate(model).config.get("stem"):
        flags["scene"] = "small"
    path = Path(model, "args.json")
    if path.is_file():
        for group in read_json(path).values():
            if isinstance(group, dict):
                flags.update((flag, group[flag]) for flag in flags if flag in group)
    return flags


def short_names(starts):
    """As few last parts of each path as tell them apart; a number goes with its run."""
    paths = [str(Path(start).resolve()) for start in starts]
    paths = [re.sub("/((best|checkpoint)-)", r"-\1", path) for path in paths]
    for depth in range(1, 100):
        names = ["-".join(path.split("/")[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"checkpoint = {' '.join(starts)}: give each one once")


def fingerprint(model):
    """sha256 over the files that fix what a model does, its adapter's and those of the base."""
    source = locate(model)
    files = set()
    for folder in (source.folder, source.adapter or source.folder):
        files.update(folder.glob("*.safetensors"), folder.glob("*.json"))
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.name != "args.json":
            digest.update(np.memmap(path, mode="r"))
    return digest.hexdigest()


def fast_dtype():
    """bfloat16 where the processor or a GPU computes in it, float32 where it is emulated."""
    path = Path("/proc/cpuinfo")
    known = path.read_text(encoding="utf-8").split() if path.exists() else ()
    fast = {"amx_bf16", "avx512_bf16"} & {*known} or torch.cuda.is_available()
    return "bfloat16" if fast else "float32"


FAST_DTYPE = fast_dtype()


def machine():
    """dict of script, commit, hardware and software."""
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = ""
    if shutil.which("git"):
        here = Path(__file__).parent
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            cpu = line.split(": ")[1] if line.startswith("model name") else cpu
    hardware = f"{os.cpu_count()} x {cpu}"
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.get_device_name()}"
    packages = ("torch", "mani_skill", "sapien", "numpy")
    software = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    script = Path(sys.argv[0]).name
    commit = commit.strip() or "unknown"
    return {"script": script, "commit": commit, "hardware": hardware, "software": software}
