"""The paper's generalisation benchmark for any policy: 16 tasks, in and out of distribution.

    python eval_ood.py --checkpoint runs/ppo runs/sft --output results/NAME
    python eval_ood.py --policy my_policy.py:act expert --output results/mine

The same command after a kill goes on with the next task. Departures from Liu et al. 2025:
1. Explicit episodes from --seed, the same for every policy (paired), never used in training.
2. Results in CPU simulation do not depend on --num-envs: every episode has a generator of its own,
   and the model always runs on the same blocks of 16 episodes.
3. Wilson intervals, exact McNemar tests between policies, more than success at the last step.
"""

import json
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common.model.checkpoints import choose_key, load_vla, locate
from common.run.args import check_values
from common.run.evaluate import run_episodes, write_video
from common.run.files import check, write_atomic
from common.run.ranks import setup_ranks
from common.simulation.env import SCENES, check_scene
from common.simulation.episodes import evaluation_ids
from common.simulation.tasks import REPORT_ROWS, TASKS
from common.simulation.vec_env import make_envs
from scripts.policies import KINDS, begin, identify, load_policy, name_policies
from scripts.provenance import find_model, fingerprint, machine, short_names, training_flags
from scripts.renderer import check_simulator
from scripts.report import OOD, make, read_results

BLOCK = 16  # episodes per call of the model; kernels round by it, so that it changes results
MEANS = ("success_at_end", "success_once", "grasped", "held", "return")


# --- args ---
@dataclass
class Args:
    checkpoint: tuple[str, ...] = ()  # models, or runs: their best, else latest checkpoint
    policy: tuple[str, ...] = ()  # others: random, zero, expert, FILE.py:NAME, NAME=ws://HOST:PORT
    tasks: str = "id,vision,semantics,execution"  # dimensions, rows, or training tasks (main)
    num_episodes: int = 192  # per task; a shorter list is the beginning of a longer one
    temperature: float = 0.6  # 0 = greedy; never compare results across temperatures
    seed: int = 0  # chooses the episodes and seeds the sampling
    output: str = "results/eval"  # directory; finished tasks found there are kept
    num_envs: int = 16  # a multiple of 16; in CPU simulation only speed and memory
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the model
    scene: Literal["small", "published"] | None = None  # None here and below = as in training
    sim_device: Literal["cpu", "cuda"] | None = None
    dtype: Literal["float32", "bfloat16", "nf4"] | None = None  # on a CPU None is float32
    unnorm_key: str | None = None  # action statistics


# --- what to evaluate ---
def plan_rows(tasks):
    """dict row of the report -> (dimension, task, split), of those that a --tasks value names."""
    rows = {task: ("training", task, "train") for task in TASKS}
    rows.update((row[0], row[1:4]) for row in REPORT_ROWS)
    wanted = set(tasks.split(","))
    known = ["id", *OOD, *rows]
    unknown = sorted(wanted - set(known))
    check(not unknown, f"tasks = {tasks}: {unknown} not known; use some of {', '.join(known)}")
    return {name: row for name, row in rows.items() if wanted & {name, row[0]}}


def plan_episodes(rows, num_episodes, seed, fidelity):
    """dict row -> its list of episode ids (E,) int64, without a repeat."""
    lists = {}
    for name, (_, task, split) in rows.items():
        # A run on `main` picks its best checkpoint by the list of seed 0, which must not judge it
        own = seed + 1 if task == "main" else seed
        lists[name] = evaluation_ids(task, split, num_episodes, own, fidelity)
        most = len(np.unique(lists[name]))
        fits = 0 < num_episodes == most
        check(fits, f"num_episodes = {num_episodes} must be > 0, and {name} has {most}; use fewer")
    return lists


def plan_policy(args, checkpoint, device, policy="model"):
    """All that changes a policy's results: a flag's value or, where it is None, training's."""
    model = find_model(checkpoint)
    settings = training_flags(model)
    if device.type == "cpu":
        settings["dtype"] = "float32"  # bfloat16 is slow on most CPUs
    for flag in ("scene", "sim_device", "dtype", "unnorm_key"):
        settings[flag] = getattr(args, flag) or settings[flag]
    for flag in ("num_episodes", "temperature", "seed"):
        settings[flag] = getattr(args, flag)
    check(settings["scene"], f"scene of {model} is not known: it has no args.json; add --scene")
    settings.update(identify(policy), checkpoint=model, device=device.type, policy=policy)
    if settings["sim_device"] == "cuda" or "sha256" in settings:
        settings["num_envs"] = args.num_envs  # all are in one world, or in one call of the policy
    if model:
        assets = SCENES[settings["scene"]]["assets"]
        choose_key(locate(model).norm_stats, settings["unnorm_key"], assets, model)  # or refused
    return settings


# --- evaluate ---
def make_policy(settings, model, envs, seeds, places):
    """policy(obs (M, H, W, 3) uint8, instructions, rows (M,) of the seeds) -> actions (M, 7).

    model: a VLA, or what `load_policy` gave; places: of these episodes in the task's list.
    """
    if settings["policy"] != "model":
        return begin(settings["policy"], model, envs, seeds, places)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def policy(obs, instructions, rows):
        # All episodes run in step, so that a block always has the same members
        actions = []
        for first in range(0, len(rows), BLOCK):
            part = slice(first, first + BLOCK)
            draws = [generators[row] for row in rows[part]]
            tokens, _, _ = model.act(obs[part], instructions[part], settings["temperature"], draws)
            actions.append(model.decode_actions(tokens))
        return np.concatenate(actions)

    return policy


def evaluate_row(settings, model, envs, row, episode_ids, stem):
    """Record of a policy's success in a row; videos of its first success and first failure."""
    start = time.monotonic()
    dimension, task, split = row
    envs.set_task(task, split)
    missing = {"success", "failure"}
    values = {key: [] for key in MEANS}
    for ids in np.split(episode_ids, range(envs.num_envs, len(episode_ids), envs.num_envs)):
        places = len(values["return"]) + np.arange(len(ids))
        seeds = [zlib.crc32(f"{settings['seed']} {task} {split} {i}".encode()) for i in ids]
        policy = make_policy(settings, model, envs, seeds, places)
        part = run_episodes(policy, envs, ids, record=len(ids) if missing else 0)
        for number, frames in part["frames"].items():
            outcome = "success" if part["success_at_end"][number] else "failure"
            if outcome in missing:
                missing.remove(outcome)
                write_video(f"{stem}-{outcome}.mp4", frames, part["instruction"][number])
        for key in MEANS:
            values[key].extend(part[key].tolist())

    record = {key: float(np.mean(values[key])) for key in MEANS}
    success = [int(value) for value in values["success_at_end"]]
    record.update(dimension=dimension, task=task, split=split, n=len(success), k=sum(success))
    record.update(machine(), success=success, episode_ids=episode_ids.tolist())
    return {**record, "minutes": (time.monotonic() - start) / 60}


def evaluate_policies(results, rows, lists, num_envs, path):
    """Run each policy on the rows that it misses; results.json is whole after every row."""
    envs = None
    for name, entry in results.items():
        settings, model = entry["arguments"], None
        todo = [row for row in rows if row not in entry["rows"]]
        if todo and settings["checkpoint"]:
            options = {key: settings[key] for key in ("unnorm_key", "dtype", "device")}
            model = load_vla(settings["checkpoint"], **options, trainable=False)
        elif todo:
            model = load_policy(settings)
        if todo and envs is None:
            envs = make_envs(num_envs, scene=settings["scene"], sim_device=settings["sim_device"])
        for row in tqdm(todo, name, unit="task"):
            stem = path.parent / "videos" / name / row
            record = evaluate_row(settings, model, envs, rows[row], lists[row], stem)
            entry["rows"][row] = record
            write_atomic(path, json.dumps({"policies": results}, indent=1))
    if envs:
        envs.close()


def main(args):
    # --- what to evaluate ---
    names = short_names(args.checkpoint)
    others = name_policies(args.policy, names)
    check(names or others, f"policy = {args.policy}: add --checkpoint, or one of {KINDS}")
    check(args.num_envs % BLOCK == 0, f"num_envs = {args.num_envs} must be a multiple of {BLOCK}")
    check_values(vars(args), vars(Args()), ("seed", "temperature"))
    rows = plan_rows(args.tasks)
    _, _, device = setup_ranks(args.device, args.seed)
    policies = {}
    for name, checkpoint in zip(names, args.checkpoint, strict=True):
        policies[name] = plan_policy(args, checkpoint, device)
    for name, policy in others.items():
        policies[name] = plan_policy(args, "", device, policy)
    worlds = {(settings["scene"], settings["sim_device"]) for settings in policies.values()}
    check(len(worlds) == 1, f"policies play in {worlds}; add --scene and --sim-device")
    scene, sim_device = worlds.pop()
    check_scene("main", "train", scene)
    check_simulator(sim_device)
    lists = plan_episodes(rows, args.num_episodes, args.seed, SCENES[scene]["fidelity"])

    # --- what is finished ---
    results = {}
    path = Path(args.output, "results.json")
    finished = read_results(path) if path.is_file() else {"policies": {}}
    write_atomic(path, json.dumps(finished, indent=1))  # what cannot be written shows now
    for name, settings in policies.items():
        if settings["checkpoint"]:
            settings["weights"] = fingerprint(settings["checkpoint"])  # minutes for 7B
        results[name] = {"arguments": settings, "rows": {}}
        print(f"{name}: {settings}")
    for name, entry in finished["policies"].items():
        was, done = entry.get("arguments"), entry["rows"].keys()
        fits = was == policies.get(name) and done <= rows.keys()
        check(fits, f"{path} has {name}: {was}, rows {[*done]}; choose another --output")
        results[name] = entry

    evaluate_policies(results, rows, lists, min(args.num_envs, args.num_episodes), path)
    make(args.output)


if __name__ == "__main__":
    main(tyro.cli(Args))
