"""Steps per second and memory of the vector environment on a CPU, beside ManiSkill's own way.

    python benchmarks/env_throughput.py
    python benchmarks/env_throughput.py --num-envs 16 --sides ours

Supports finding 2 of docs/findings.md and docs/dependencies.md (why the vector environment is our
own); results/env_throughput.json is of commit f16e33b. ManiSkill's CPU baselines use gymnasium's
AsyncVectorEnv, one process per environment: "maniskill" as it comes, "maniskill-1" with one thread
per process, as our workers have. All sides play the same episodes and actions and take turns, so
that other load on the machine hits all. The arm moves: at rest it falls asleep in PhysX.
"""

import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.simulation.env import ENV_ID  # noqa: E402
from common.simulation.vec_env import make_envs  # noqa: E402


@dataclass
class Args:
    num_envs: tuple[int, ...] = (8, 16)
    sides: tuple[str, ...] = ("ours", "maniskill", "maniskill-1")
    rounds: int = 3  # turns of each side; the table has the median
    num_steps: int = 20  # control steps of a turn; fewer than an episode has
    output: str = "runs/env_throughput.json"


class FixedEpisode(gym.Wrapper):
    """Resets to one episode id, as our environments do."""

    def __init__(self, env, episode_id):
        super().__init__(env)
        self.episode_id = episode_id

    def reset(self, **kwargs):
        return self.env.reset(options={"episode_ids": [self.episode_id]})


def maniskill_env(episode_id, one_thread):
    """One environment as ManiSkill's CPU baselines make it."""
    if one_thread:
        os.environ["LP_NUM_THREADS"] = "0"  # read when the renderer opens its device
    import torch

    if one_thread:
        torch.set_num_threads(1)
    return FixedEpisode(gym.make(ENV_ID, disable_env_checker=True), episode_id)


def open_side(side, episode_ids):
    """The environments of a side, and the arguments that reset them to these episodes."""
    if side == "ours":
        return make_envs(len(episode_ids)), ([itertools.repeat(i) for i in episode_ids],)
    makers = [partial(maniskill_env, i, side == "maniskill-1") for i in episode_ids]
    return gym.vector.AsyncVectorEnv(makers, context="forkserver"), ()


def children():
    """Ids of all processes that descend from this one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(
                path.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1]
            )
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    found, before = {os.getpid()}, set()
    while found != before:
        before = set(found)
        found |= {child for child, parent in parents.items() if parent in before}
    return found - {os.getpid()}


def memory_gb(pids):
    """Memory of processes; a page that several share counts in proportion (PSS)."""
    kilobytes = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                kilobytes += int(line.split()[1])
    return kilobytes / 1e6


def cpu_seconds(pids):
    """Processor time so far of these processes and of this one."""
    ticks = 0
    for pid in {*pids, os.getpid()}:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(num_envs, args):
    """One dict per side."""
    episode_ids = np.random.default_rng(1).integers(0, 100_000, num_envs).tolist()
    # Up to 1 cm and .05 rad per step, gripper open or closed
    actions = np.random.default_rng(0).uniform(-1, 1, (args.num_steps, num_envs, 7))
    actions = (actions * [0.01, 0.01, 0.01, 0.05, 0.05, 0.05, 1]).astype(np.float32)
    actions[..., 6] = np.sign(actions[..., 6])
    rows, envs, reset_to, pids = {}, {}, {}, {}
    for side in args.sides:
        before, start = children(), time.perf_counter()
        envs[side], reset_to[side] = open_side(side, episode_ids)
        envs[side].reset(*reset_to[side])
        envs[side].step(actions[0])  # the first pictures compile shaders
        rows[side] = {"num_envs": num_envs, "side": side, "start_s": time.perf_counter() - start}
        pids[side] = children() - before
        rows[side]["processes"] = len(pids[side])
        rows[side]["memory_gb"] = memory_gb(pids[side])
        rows[side].update(steps_per_s=[], cpu_ms_per_step=[])
    for side in args.sides * args.rounds:
        envs[side].reset(*reset_to[side])
        start, cpu_s = time.perf_counter(), cpu_seconds(pids[side])
        for action in actions:
            envs[side].step(action)
        steps = num_envs * args.num_steps
        rows[side]["steps_per_s"].append(steps / (time.perf_counter() - start))
        cpu_s = cpu_seconds(pids[side]) - cpu_s
        rows[side]["cpu_ms_per_step"].append(1000 * cpu_s / steps)
    for side in args.sides:
        envs[side].close()
    return list(rows.values())


def main(args: Args):
    columns = ("num_envs", "side", "processes", "start_s", "memory_gb")
    medians = ("steps_per_s", "cpu_ms_per_step")
    results = []
    print("|", " | ".join(columns + medians), "|\n" + "|---" * 7 + "|")
    for num_envs in args.num_envs:
        for row in measure(num_envs, args):
            results.append(row)
            cells = [row[name] for name in columns] + [np.median(row[name]) for name in medians]
            texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
            print("|", " | ".join(texts), "|", flush=True)
    content = {"args": asdict(args), "cores": os.cpu_count(), "results": results}
    Path(args.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
