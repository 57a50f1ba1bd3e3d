"""Mutated files for the readers of the project: a part of benchmarks/reliability.py.

A reader may accept a file, or refuse it by a ValueError or FileNotFoundError that names it. Nothing
else may be raised, no program started, no connection opened, no file changed outside the folder.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import save_file

import ppo_vla
from common.model.checkpoints import choose_key, locate
from common.run.args import saved_args
from common.run.experiment import read_state
from common.simulation.env import CAMERA
from demonstrations.reader import load_demos
from scripts.report import read_report

WARMUP = "checkpoints/tiny-warmup"
ODD = [None, True, -1, 0, 7, 10**30, 1e308, float("nan"), [], {}, [[]]]
ODD += ["", "x", "../x", "/etc/passwd", "base"]
STARTS = "subprocess.Popen os.system os.exec os.posix_spawn socket.connect".split()
CHANGES = "os.remove os.rename os.rmdir os.mkdir shutil.rmtree".split()
REFUSALS = (ValueError, FileNotFoundError)
READERS = {  # file: how many mutations, where it lies
    "config.json": (25_000, "model"),
    "dataset_statistics.json": (20_000, "model"),
    "adapter_config.json": (15_000, "adapter"),
    "adapter_model.safetensors": (15_000, "adapter"),
    "args.json": (15_000, "run"),
    "metrics.jsonl": (7_000, "run"),
    "checkpoint-000002/training_state.pt": (5_000, "run"),
    "results.json": (8_000, "results"),
    "trajectory.json": (6_000, "demos"),
    "trajectory.h5": (4_000, "demos"),
}


def read(name, folder):
    """Read a file as the scripts do."""
    if READERS[name][1] in ("model", "adapter"):
        source = locate(str(folder))
        choose_key(source.norm_stats, "cleanvla" if "cleanvla" in source.norm_stats else "")
    elif name == "args.json":
        saved_args(ppo_vla.Args, folder / name)
    elif name == "results.json":
        read_report(folder / name)
    elif name.startswith("trajectory"):
        load_demos(str(folder))
    else:
        read_state(folder)


def mutated(data, rng):
    """Bytes after a random change: of a value, where they are JSON, or of bytes."""
    data = bytearray(data)
    lines = data.splitlines(True) if data[:2] != b"{\n" else [data]
    if data[:1] == b"{" and rng.random() < 0.6:
        content = json.loads(lines[0])
        place, key = rng.choice(list(places(content)))
        if rng.random() < 0.3:
            del place[key]
        else:
            place[key] = rng.choice(ODD)
        return b"\n".join([json.dumps(content).encode(), *lines[1:]])
    start = rng.choice((rng.randrange(len(data)), min(len(data) - 1, int(rng.expovariate(0.005)))))
    end = start + rng.choice((1, 1, 4, 64, len(data)))
    if rng.random() < 0.5:
        data[start:end] = bytes(rng.randrange(256) for _ in data[start : min(end, start + 64)])
    elif rng.random() < 0.5:
        del data[start:end]
    else:
        data[start:start] = data[start:end]
    return bytes(data)


def places(content):
    """(container, key) of each value in JSON's lists and dicts."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield content, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def watch(folder, seen):
    """Note what a reader must not do: start programs, connect, or change files elsewhere."""

    def hook(event, arguments):
        if event in STARTS:
            seen.append(event)
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and folder not in os.path.abspath(str(arguments[0])):
            seen.append(f"{event} {arguments[0]}")

    sys.addaudithook(hook)


def fuzz_some(name, folder, seeds, pipe):
    """In a process of its own: read one mutation per seed; writes an outcome per line."""
    path, seen = folder / name, []
    whole = path.read_bytes()
    watch(str(folder), seen)
    for seed in seeds:
        signal.alarm(20)  # ends this process
        path.write_bytes(mutated(whole, random.Random(f"{name} {seed}")))
        error = None
        try:
            read(name, folder)
        except Exception as caught:
            error = caught
        kind = "accepted" if error is None else "refused"
        if error and not (type(error) in REFUSALS and str(folder) in str(error)):
            kind = f"unclear: {error!r:.300}"
        kind = f"unsafe: {seen}" if seen else kind
        seen.clear()
        pipe.write(json.dumps([seed, kind]) + "\n")
        pipe.flush()
    path.write_bytes(whole)


def fuzz(share):
    """Rows of counts per file."""
    make_fuzz_files()
    rows = []
    for name, (number, folder) in READERS.items():
        number, done, counts, examples = int(number * share), 0, Counter(), []
        while done < number:
            read_end, write_end = os.pipe()
            child = os.fork()
            if not child:
                with open(os.devnull, "wb") as null, os.fdopen(write_end, "w") as pipe:
                    os.dup2(null.fileno(), 2)
                    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
                    warnings.simplefilter("ignore")
                    fuzz_some(name, Path("fuzz", folder).absolute(), range(done, number), pipe)
                os._exit(0)
            os.close(write_end)
            with os.fdopen(read_end) as lines:
                for line in lines:
                    seed, kind = json.loads(line)
                    counts[kind.split(":")[0]] += 1
                    done = seed + 1
                    if ":" in kind and len(examples) < 20:
                        examples.append([seed, kind])
            _, status = os.waitpid(child, 0)
            if status:
                counts["crashed"] += 1
                examples.append([done, f"status {os.waitstatus_to_exitcode(status)}"])
                done += 1
        row = {"file": name, "mutations": number, **counts, "examples": examples}
        print(row, flush=True)
        rows.append(row)
    return rows


def make_fuzz_files():
    shutil.copytree(WARMUP, "fuzz/model")
    save_file({"w": torch.zeros(2)}, "fuzz/model/model.safetensors")
    config = json.loads(Path(WARMUP, "config.json").read_text(encoding="utf-8"))
    for folder in ("model", "adapter"):
        Path("fuzz", folder).mkdir(exist_ok=True)
        path = Path("fuzz", folder, "dataset_statistics.json")
        path.write_text(json.dumps(config["norm_stats"]), encoding="utf-8")
    tensors = {f"layer.{i}.lora_A.weight": torch.zeros(4, 8) for i in range(4)}
    save_file(tensors, "fuzz/adapter/adapter_model.safetensors")
    lora = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    lora["base_model_name_or_path"] = str(Path("fuzz/model").absolute())
    Path("fuzz/adapter/adapter_config.json").write_text(json.dumps(lora), encoding="utf-8")
    state = Path("fuzz/run/checkpoint-000002/training_state.pt")
    state.parent.mkdir(parents=True)
    adam = torch.optim.AdamW(torch.nn.Linear(4, 4).parameters()).state_dict()
    torch.save({"policy": adam, "iteration": 2, "seconds": 1.0, "evaluations": [0.5]}, state)
    for name in ("args.json", "metrics.jsonl"):
        shutil.copy(Path("runs/done", name), "fuzz/run")
    shutil.copytree("demos/ok", "fuzz/demos")
    header = json.loads(Path("fuzz/demos/trajectory.json").read_text(encoding="utf-8"))
    del header["episodes"][1:]
    header["episodes"][0]["elapsed_steps"] = 2
    Path("fuzz/demos/trajectory.json").write_text(json.dumps(header), encoding="utf-8")
    with (
        h5py.File("demos/ok/trajectory.h5") as old,
        h5py.File("fuzz/demos/trajectory.h5", "w") as new,
    ):
        new["traj_0/actions"] = old["traj_0/actions"][:2]
        key = f"traj_0/obs/sensor_data/{CAMERA}/rgb"
        new.create_dataset(key, data=old[key][:3], dtype=h5py.vlen_dtype(np.uint8))
    row = {
        "dimension": "vision",
        "success": [0, 1],
        "episode_ids": [5, 6],
        "hardware": "",
        "commit": "",
    }
    results = {name: {"arguments": {}, "rows": {"a": row, "b": row}} for name in ("one", "two")}
    Path("fuzz/results").mkdir()
    path = Path("fuzz/results/results.json")
    path.write_text(json.dumps({"policies": results}), encoding="utf-8")
