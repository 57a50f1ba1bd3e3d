"""Environment steps per second and memory on CPU: `common.simulation.vec_env.make_envs` beside ManiSkill's own way, in one run.

ManiSkill's way is what its CPU baselines do: gymnasium's AsyncVectorEnv, one process per environment, each a gym.make
of the same id with the same arguments, in CPUGymWrapper: once as it comes, once with one thread per process for torch
and for software Vulkan, as our workers have ("maniskill-1"). All get the same episodes, image size and actions, are
alive at once and take turns, so that other load on the machine hits all. The arm moves: an arm at rest falls asleep in
PhysX and looks fast. Memory is the processes' proportional share (PSS), ours measured with no other side present.
CPU ms/step is the processor time of all processes: it hardly depends on other load, while steps/s on a busy machine
favours the side with more processes, which gets more of the scheduler's turns.

    python benchmarks/env_throughput.py                              # 8 and 16 side by side, 64 ours alone
    python benchmarks/env_throughput.py --num-envs 16 --alone        # one row
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

from common.simulation.vec_env import make_envs  # noqa: E402


@dataclass
class Args:
    num_envs: tuple[int, ...] = (8, 16)  # both sides
    alone: tuple[int, ...] = (64,)  # ours only
    sides: tuple[str, ...] = ("cleanvla", "maniskill", "maniskill-1")
    rounds: int = 3  # turns of each side; the table has the median
    num_steps: int = 40  # control steps per turn, after a reset
    assets: str = "primitive"
    image_size: tuple[int, int] = (160, 120)  # width, height
    sim_freq: int = 250  # physics Hz
    solver_iterations: int = 4
    output: str = "runs/env_throughput.json"


class FixedEpisode(gym.Wrapper):
    """Reset to one episode id, as our environments are."""

    def __init__(self, env, episode_id):
        super().__init__(env)
        self.episode_id = episode_id

    def reset(self, **kwargs):
        return self.env.reset(options={"episode_ids": [self.episode_id]})


def maniskill_env(episode_id, one_thread, env_kwargs):
    """One environment as ManiSkill's CPU baselines make it."""
    if one_thread:
        os.environ["LP_NUM_THREADS"] = "0"  # read when the renderer opens its device
    import torch
    from mani_skill.utils.wrappers import CPUGymWrapper

    from common.simulation.env import ENV_ID

    if one_thread:
        torch.set_num_threads(1)
    env = gym.make(ENV_ID, sim_backend="physx_cpu", render_backend="cpu", max_episode_steps=10_000, **env_kwargs)
    return FixedEpisode(CPUGymWrapper(env, ignore_terminations=True), episode_id)


class ManiSkillEnvs:
    """AsyncVectorEnv with the three calls the benchmark needs."""

    def __init__(self, episode_ids, one_thread, env_kwargs):
        makers = [partial(maniskill_env, episode_id, one_thread, env_kwargs) for episode_id in episode_ids]
        self.envs = gym.vector.AsyncVectorEnv(makers, context="forkserver")
        self.reset = lambda episode_ids: self.envs.reset()
        self.step, self.close = self.envs.step, self.envs.close


def children():
    """Process ids of all descendants of this process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def pss_gb(pids):
    """Memory of the processes, each shared page counted in proportion, GB."""
    kilobytes = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        kilobytes += int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1])
    return kilobytes / 1e6


def cpu_seconds(pids):
    """Processor time of these processes and of this one so far."""
    ticks = 0
    for pid in {*pids, os.getpid()}:
        user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")


def random_actions(num_steps, num_envs):
    """(T, N, 7) float32: up to 1 cm and 0.05 rad per step, gripper open or closed; the arm is never at rest."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (num_steps, num_envs, 7)) * np.array([0.01] * 3 + [0.05] * 3 + [1.0])
    actions[..., 6] = np.sign(actions[..., 6])
    return actions.astype(np.float32)


def turn(envs, episode_ids, actions, pids=()):
    """Seconds of a reset of all environments, seconds of the steps after it, and processor seconds of the steps."""
    start = time.perf_counter()
    envs.reset(episode_ids)
    after_reset, cpu_s = time.perf_counter(), cpu_seconds(pids)
    for action in actions:
        envs.step(action)
    return after_reset - start, time.perf_counter() - after_reset, cpu_seconds(pids) - cpu_s


def measure(num_envs, kinds, args):
    """Rows of results for the kinds of environments (`Args.sides`) that take turns."""
    kwargs = dict(assets=args.assets, image_size=args.image_size, sim_freq=args.sim_freq,
                  solver_iterations=args.solver_iterations)  # fmt: skip
    episode_ids = np.random.default_rng(1).integers(0, 100_000, num_envs)
    actions = random_actions(args.num_steps, num_envs)
    rows, envs, pids = {}, {}, {}
    for kind in kinds:
        before, start = children(), time.perf_counter()
        if kind == "cleanvla":
            envs[kind] = make_envs(num_envs=num_envs, **kwargs)
        else:
            envs[kind] = ManiSkillEnvs(episode_ids.tolist(), kind == "maniskill-1", kwargs)
        envs[kind].reset(episode_ids)
        rows[kind] = {"num_envs": num_envs, "kind": kind, "start_s": time.perf_counter() - start}
        turn(envs[kind], episode_ids, actions[:5])  # the first pictures compile shaders
        pids[kind] = children() - before
        rows[kind]["processes"] = len(pids[kind])
        if kind == kinds[0]:
            rows[kind]["memory_gb"] = pss_gb(pids[kind])  # no other side is there yet
    seconds = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind in kinds:
            seconds[kind].append(turn(envs[kind], episode_ids, actions, pids[kind]))
    for kind in kinds:
        if kind != kinds[0]:
            rows[kind]["memory_gb"] = pss_gb(pids[kind])  # ours is gone
        envs[kind].close()
        reset_s, steps_s, cpu_s = np.array(seconds[kind]).T
        num_steps = num_envs * args.num_steps
        rows[kind]["steps_per_s"] = (num_steps / steps_s).tolist()
        rows[kind]["steps_per_s_with_reset"] = (num_steps / (steps_s + reset_s)).tolist()
        rows[kind]["reset_s"] = reset_s.tolist()
        rows[kind]["cpu_ms_per_step"] = (1000 * cpu_s / num_steps).tolist()
    return list(rows.values())


def main(args):
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = next(
        (x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), platform.machine()
    )
    machine = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0], "commit": commit}
    print(f"{cpu}, {machine['cores']} cores, load {machine['load_before']:.1f}, commit {commit}, {args.assets} assets")
    print(
        "envs  kind       processes  start s  reset s  memory GB  steps/s (min-max)  with reset  CPU ms/step",
        flush=True,
    )
    results = []
    sizes = [(n, args.sides) for n in args.num_envs] + [(n, ("cleanvla",)) for n in args.alone]
    for num_envs, kinds in sizes:
        rows = measure(num_envs, kinds, args)
        for row in rows:
            speed, median = row["steps_per_s"], {key: np.median(value) for key, value in row.items() if key != "kind"}
            text = f"{num_envs:4d}  {row['kind']:11}  {row['processes']:9d}  {row['start_s']:7.1f}  "
            text += f"{median['reset_s']:7.2f}  {row['memory_gb']:9.2f}  {median['steps_per_s']:7.1f} "
            text += f"({min(speed):3.0f}-{max(speed):3.0f})  {median['steps_per_s_with_reset']:10.1f}  "
            print(text + f"{median['cpu_ms_per_step']:11.2f}", flush=True)
        for row in rows[1:]:
            speed = np.median(rows[0]["steps_per_s"]) / np.median(row["steps_per_s"])
            cpu_ratio = np.median(row["cpu_ms_per_step"]) / np.median(rows[0]["cpu_ms_per_step"])
            print(
                f"      {num_envs} envs, ours against {row['kind']}: {speed:.2f}x steps/s, {cpu_ratio:.2f}x in CPU time"
            )
        results += rows
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": machine, "args": asdict(args), "results": results}, indent=1) + "\n")
    print(f"written: {output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
