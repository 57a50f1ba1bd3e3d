"""The study's generalisation benchmark as a stand-alone evaluator: any checkpoint, 16 tasks, either asset pack.

    python eval_ood.py --checkpoint runs/ppo runs/sft --num-episodes 192 --temperature 0.6 --output results/NAME
    python eval_ood.py --policy zero --num-episodes 4 --output results/zero      # a baseline needs no checkpoint

Writes results.json, report.md, figure.png and videos of one success and one failure per task. The same command after a
kill goes on with the next task. Departures from the published protocol (Liu et al. 2025), see docs/eval_ood.md:
1. Explicit episode ids from --seed, the same for every policy (paired), never used in training; published: random ones.
2. Every episode draws from a generator of its own, and the model always runs on blocks of --block-size episodes, each
   in a fixed row: in CPU simulation results depend neither on --num-envs nor on --num-workers.
3. Wilson 95 % intervals, exact McNemar tests between policies, and more than success at the last step.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common.model.checkpoints import locate
from common.model.openvla import load_vla
from common.run.evaluate import evaluation_ids, run_episodes, wilson, write_video
from common.run.report import compare, dimension_means, make
from common.run.runs import NUMBER, choose_device, choose_key, write_atomic
from common.simulation.assets import load_pack
from common.simulation.env import check_env_args
from common.simulation.expert import Expert
from common.simulation.tasks import REPORT_ROWS, decode, instruction
from common.simulation.vec_env import make_envs
from scripts.doctor import check_simulator

# What the environment is unless a flag or the checkpoint's training settings say otherwise: the small preset.
ENVIRONMENT = {"assets": "primitive", "image_size": (160, 120), "sim_freq": 250, "solver_iterations": 4,
               "max_episode_steps": 40, "fidelity": "fixed", "shader_pack": "minimal", "sim_device": "cpu",
               "dtype": "float32"}  # fmt: skip


# --- args ---
@dataclass
class Args:
    checkpoint: tuple[str, ...] = ()  # model directories, training runs (best, else latest checkpoint), tiny (random)
    policy: Literal["model", "random", "zero", "expert"] = "model"  # all but model are baselines without a checkpoint
    tasks: str = "all"  # or comma-separated rows (docs/benchmark.md) and dimensions: id,vision,semantics,execution
    num_episodes: int = 192  # per task; a shorter list is the beginning of a longer one
    temperature: float = 0.6  # of the action distribution, 0 = greedy; never compare results across temperatures
    seed: int = 0  # chooses the episodes and seeds the sampling
    output: str = "results/eval"  # directory; finished tasks found there are kept
    # environment; None = as the checkpoint was trained, without a checkpoint the small preset
    assets: Literal["primitive", "bridge"] | None = None  # embedded bodies, or the real ones under MS_ASSET_DIR
    image_size: tuple[int, int] | None = None  # camera pixels (width, height)
    sim_freq: int | None = None  # physics Hz
    solver_iterations: int | None = None  # of the contact solver
    max_episode_steps: int | None = None  # control steps of 0.2 s; success is read at the last one
    fidelity: Literal["fixed", "published"] | None = None  # published = with the benchmark's known defects
    shader_pack: Literal["minimal", "default"] | None = None  # renderer quality
    sim_device: Literal["cpu", "cuda"] | None = None  # worker processes, or one batched GPU simulation
    num_envs: int = 16  # in CPU simulation results do not depend on it, nor on num_workers
    num_workers: int = 0  # environment processes; 0 = one per core
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the model
    dtype: Literal["float32", "bfloat16"] | None = None  # of matmuls and weights; None = as trained, on a CPU float32
    block_size: int = 16  # rows of every model call; changes results a little: kernels round by batch size
    unnorm_key: str = ""  # action statistics; empty = the training settings' key, else the model's only one


# --- what to evaluate ---
def select_rows(tasks: str) -> list[tuple]:
    """The rows of the report, in its order, that a --tasks value names."""
    known = ["all", *dict.fromkeys(row[1] for row in REPORT_ROWS), *(row[0] for row in REPORT_ROWS)]
    if unknown := sorted(set(tasks.split(",")) - set(known)):
        raise ValueError(f"--tasks {','.join(unknown)}: not known; use one or more of {', '.join(known)}")
    return [row for row in REPORT_ROWS if {"all", row[0], row[1]} & set(tasks.split(","))]


def find_model(checkpoint: str) -> tuple[str, dict]:
    """(what load_vla takes, training settings or {}) of a model directory, a run directory or the name "tiny"."""
    path = Path(checkpoint)
    if path.is_dir() and not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        path = max(path.glob(f"best-{NUMBER}"), default=max(path.glob(f"checkpoint-{NUMBER}"), default=Path()))
    if checkpoint != "tiny" and not (path.is_dir() and path.name):
        fix = "of the hub: hf download ID --local-dir DIR"
        raise FileNotFoundError(f"--checkpoint {checkpoint}: not tiny, a model, or a run with best-N; {fix}")
    state = path / "training_state.pt"  # has them too, for a checkpoint that was copied out of its run
    for settings in (file for file in (path / "args.json", path.parent / "args.json") if file.is_file()):
        return str(path), json.loads(settings.read_text())
    saved = torch.load(state, "cpu", mmap=True) if state.is_file() else {}
    return str(path), json.loads(json.dumps(saved.get("args", {})))  # other code's states have none


def environment(args: Args, trained: list[dict]) -> dict:
    """Settings and dtype: the flag, else the checkpoints' (they must agree: episodes are paired), else ENVIRONMENT."""
    chosen = {}
    for key, default in ENVIRONMENT.items():
        values = [settings[key] for settings in trained if key in settings] or [default]
        if getattr(args, key) is None and any(value != values[0] for value in values):
            raise ValueError(f"checkpoints were trained with different {key}: {values}; set it by its flag")
        chosen[key] = values[0] if getattr(args, key) is None else getattr(args, key)
    return chosen | {"image_size": list(chosen["image_size"])}  # as JSON has it


def fingerprint(model: str) -> str:
    """sha256 over a model directory's weights, configuration, statistics and tokenizer, of an adapter's base too."""
    digest = hashlib.sha256()
    files = {*Path(model).rglob("*.safetensors"), *Path(model).rglob("*.json")} | set(locate(model).weights.values())
    for path in sorted(path for path in files if path.name != "args.json"):
        digest.update(np.memmap(path, mode="r"))
    return digest.hexdigest()


# --- policies: (images (M, H, W, 3) uint8, instructions, rows (M,): places in the list of ids) -> actions (M, 7) ---
def baseline(kind: str, envs, seeds: list[int]):
    """zero: stand still, gripper open; random: uniform in +-2 cm, +-0.1 rad; expert: that of the demonstrations."""
    still, scale = np.array([0, 0, 0, 0, 0, 0, 1], np.float32), np.array([0.02] * 3 + [0.1] * 3 + [1.0])
    rngs = [np.random.default_rng(seed) for seed in seeds]
    experts = {first: Expert(envs.num_envs) for first in range(0, len(seeds), envs.num_envs)}  # one per batch
    return {
        "zero": lambda images, instructions, rows: np.tile(still, (len(rows), 1)),
        "random": lambda images, instructions, rows: np.stack([rngs[row].uniform(-scale, scale) for row in rows]),
        "expert": lambda images, instructions, rows: experts[rows[0]].act(envs.privileged_state())[: len(rows)],
    }[kind]


def model_policy(model, unnorm_key, temperature, instructions, seeds, block_size):
    """Samples from `model`. Episode r is always row r % block_size of a batch that holds the instructions of its whole
    block, whoever else is running: rows whose episode is not running get a black image and a spare generator."""
    generators, spare = [torch.Generator().manual_seed(seed) for seed in seeds], torch.Generator()

    def policy(images, given, rows):
        if list(given) != (expected := [instructions[row] for row in rows]):
            raise RuntimeError(f"the environments ask for {given}, the task table for {expected}")
        actions = np.empty((len(rows), 7), np.float32)
        for block in np.unique(rows // block_size):
            here = np.flatnonzero(rows // block_size == block)
            slots = rows[here] % block_size
            batch, draws = np.zeros((block_size, *images.shape[1:]), np.uint8), [spare] * block_size
            batch[slots] = images[here]
            for slot, row in zip(slots, rows[here], strict=True):
                draws[slot] = generators[row]
            texts = [instructions[(block * block_size + i) % len(instructions)] for i in range(block_size)]
            tokens, _, _ = model.act(batch, texts, temperature, draws)
            actions[here] = model.actions_from_tokens(tokens, unnorm_key).numpy()[slots]
        return actions

    return policy


# --- one task ---
def run_task(policy, envs, ids: np.ndarray, stem: str, progress) -> dict[str, np.ndarray]:
    """Outcomes (E,) per episode, see `run_episodes`; videos of the first success and the first failure."""
    parts, missing = [], {"success": True, "failure": False}
    for first in range(0, len(ids), envs.num_envs):
        shifted = lambda images, texts, rows, first=first: policy(images, texts, rows + first)  # noqa: E731
        part = run_episodes(shifted, envs, ids[first : first + envs.num_envs], record=envs.num_envs if missing else 0)
        frames = part.pop("frames")
        for outcome in [key for key, wanted in missing.items() if (part["success_at_end"] == wanted).any()]:
            row = int(np.argmax(part["success_at_end"] == missing.pop(outcome)))
            write_video(f"{stem}-{outcome}.mp4", frames[row], part["instruction"][row])
        parts.append(part)
        progress(len(part["return"]))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def machine() -> dict[str, str]:
    """Commit, hardware and library versions, stored with every finished task."""
    commands, where = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"]), Path(__file__).parent
    git = [subprocess.run(["git", *c], cwd=where, capture_output=True, text=True).stdout.strip() for c in commands]
    cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.name == "posix" else None
    hardware = [f"{os.cpu_count()} x {cpu[1] if cpu else os.uname().machine}"]
    hardware += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    software = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "mani_skill", "sapien", "numpy")]
    commit = (git[0] or "unknown") + ("+changes" if git[1] else "")
    return {"commit": commit, "hardware": ", ".join(hardware), "software": ", ".join(software)}


def write_json(path: Path, value: dict) -> None:
    """Indented, lists of numbers on one line; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[[^][{}\"]*\]", lambda match: " ".join(match[0].split()), json.dumps(value, indent=1))
    write_atomic(path, lambda temporary: temporary.write_text(text + "\n"))


def main(args: Args) -> None:
    # --- setup ---
    rows, output = select_rows(args.tasks), Path(args.output)
    if (args.policy == "model") != bool(args.checkpoint):
        raise ValueError(f"--policy {args.policy}, {len(args.checkpoint)} checkpoints: model needs some, others none")
    for key, least in dict(num_episodes=1, num_envs=1, block_size=1, num_workers=0, temperature=0, seed=0).items():
        if (value := getattr(args, key)) < least:
            raise ValueError(f"{key} = {value} must be >= {least}; use {getattr(Args, key)}")
    names = [checkpoint.strip("./").replace("/", "_") for checkpoint in args.checkpoint] or [args.policy]
    if len(set(names)) < len(names):
        raise ValueError(f"{args.checkpoint} would be {names} in the report; give each once, or rename one")
    found = dict(zip(names, map(find_model, args.checkpoint), strict=False))
    device = choose_device(args.device, args.dtype)
    on_cpu = {} if device == "cuda" else {"dtype": "float32"}  # unless asked: bfloat16 is slow on most CPUs
    env_kwargs = environment(args, [trained | on_cpu for _, trained in found.values()])
    if (most := env_kwargs["max_episode_steps"]) < 1:
        raise ValueError(f"max_episode_steps = {most} must be >= 1; use 40 (embedded) or 80 (published)")
    checked = "assets", "image_size", "sim_freq", "solver_iterations", "fidelity"
    check_env_args("main", "train", *(env_kwargs[key] for key in checked))
    check_simulator(env_kwargs["sim_device"])
    dtype = env_kwargs.pop("dtype")
    chosen = {k: getattr(args, k) for k in ("num_episodes", "temperature", "seed", "block_size", "policy")}
    chosen |= {"num_envs": args.num_envs} if env_kwargs["sim_device"] == "cuda" else {}  # one world
    config, about = env_kwargs | chosen | {"dtype": dtype, "device": device}, machine()
    print("\n".join(f"{key:18} {value}" for key, value in (config | about).items()))
    arguments, keys = {name: dict(config) for name in names}, {}  # all that changes results
    for name, (path, trained) in found.items():
        model_config = locate(path).config
        norm_stats = model_config["norm_stats"]
        if not trained and "stem" not in model_config and args.assets is None:  # the small preset would give 0
            fix = "add --assets bridge --image-size 640 480 --sim-freq 500 --solver-iterations 15 --shader-pack default"
            fix += " --max-episode-steps 80 --fidelity published --sim-device cuda --dtype bfloat16, or what it had"
            raise ValueError(f"{path} is an OpenVLA without the args.json of its training, so its scene is open; {fix}")
        key = args.unnorm_key or "".join({trained.get("unnorm_key", "")} & set(norm_stats))
        keys[name] = choose_key(norm_stats, key, config["assets"])
    for name, (path, _) in found.items():  # reads all weights: minutes for 7B
        arguments[name] |= {"unnorm_key": args.unnorm_key, "weights": fingerprint(path)}
    pack, fidelity = load_pack(config["assets"]), config["fidelity"]
    lists = {row[0]: evaluation_ids(row[2], row[3], args.num_episodes, args.seed, fidelity) for row in rows}
    if few := [f"{row} {len(set(ids))}" for row, ids in lists.items() if len(set(ids)) < len(ids)]:
        raise ValueError(f"num_episodes = {args.num_episodes}: there are no more held-out ones than {', '.join(few)}")

    # --- what is finished: one file per policy and task ---
    files = {(name, row[0]): output / "tasks" / name / f"{row[0]}.json" for name in names for row in rows}
    todo = [(name, row) for name in names for row in rows if not files[name, row[0]].exists()]
    for (name, _), file in files.items():
        now, was = arguments[name], json.loads(file.read_text())["arguments"] if file.exists() else arguments[name]
        if differ := [f"{k} was {was.get(k)}, is {now.get(k)}" for k in was | now if was.get(k) != now.get(k)]:
            raise ValueError(f"{file}: {', '.join(differ)}; repeat its arguments or choose another --output")

    # --- evaluate ---
    num_done, loaded, envs = len(files) - len(todo), None, None
    bar = tqdm(total=len(files) * args.num_episodes, initial=num_done * args.num_episodes, unit="episode")
    for name, (row, dimension, task, split, sft, ppo) in todo:
        start = time.time()
        bar.set_description(f"{name} {row}")
        if args.policy == "model" and loaded != name:
            model = policy = None  # frees the one before, so that two need no more memory than one
            model = load_vla(found[name][0], device, getattr(torch, dtype), value_head=False, trainable=False)
            loaded = name
        if envs is None:  # after the model, whose errors come in seconds
            kwargs = env_kwargs | {"num_envs": min(args.num_envs, args.num_episodes), "num_workers": args.num_workers}
            envs = make_envs(task, split, device=kwargs.pop("sim_device"), **kwargs)
        envs.set_task(task, split)
        ids = lists[row]
        seeds = [zlib.crc32(f"{args.seed} {task} {split} {episode_id}".encode()) for episode_id in ids]
        if args.policy == "model":
            episodes = decode(task, split, ids, fidelity)
            digits = zip(episodes.template, episodes.object, episodes.plate, strict=True)
            texts = [instruction(t, pack.objects[o].name, pack.plates[p].name) for t, o, p in digits]
            policy = model_policy(model, keys[name], args.temperature, texts, seeds, args.block_size)
        else:
            policy = baseline(args.policy, envs, seeds)
        outcome = run_task(policy, envs, ids, f"{output}/videos/{name}/{row}", bar.update)
        n, k = len(ids), int(outcome["success_at_end"].sum())
        record = {"dimension": dimension, "task": task, "split": split, "n": n, "k": k, "wilson": wilson(k, n)}
        for key in ("success_at_end", "success_once", "grasped", "held", "return"):
            record[key] = float(outcome[key].mean(dtype=np.float64))
        record |= about | {"arguments": arguments[name], "minutes": (time.time() - start) / 60}
        record |= {"episode_ids": ids.tolist(), "success": outcome["success_at_end"].astype(int).tolist()}
        record["paper"] = {"sft": sft, "ppo": ppo} if config["assets"] == "bridge" else {}
        write_json(files[name, row], record)
    bar.close()
    if todo:
        envs.close()

    # --- results of all policies ---
    records = {name: {row[0]: json.loads(files[name, row[0]].read_text()) for row in rows} for name in names}
    policies = {name: {"checkpoint": found[name][0] if found else "", "rows": records[name]} for name in names}
    for name, policy in policies.items():
        policy["dimensions"] = means = dimension_means(records[name])
        print(f"{name}: success at end", *(f"{key} {mean['success_at_end']:.3f}" for key, mean in means.items()))
    tests = [{"a": names[0], "b": name, "tests": compare(records[names[0]], records[name])} for name in names[1:]]
    write_json(output / "results.json", {"config": config, "policies": policies, "comparisons": tests})
    make(output)
    print(f"wrote {output}/report.md, figure.png, results.json, videos/")


if __name__ == "__main__":
    main(tyro.cli(Args))
