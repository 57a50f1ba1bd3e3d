"""Many environments on any machine behind one interface: worker processes on CPU, one batched simulation on CUDA.

CPU PhysX simulates one environment per scene, so each worker process holds several scenes and steps them in turn;
images and scalars travel through shared memory, commands through pipes. On CPU an episode id alone fixes an episode,
so results do not depend on how many environments or workers there are. N = num_envs.
"""

import ctypes
import multiprocessing
import os
import traceback
from multiprocessing.connection import wait

import numpy as np

from common.simulation.env import check_env_args

# One row per value an environment reports: name, dtype. Together with `images` this is the whole shared memory.
SCALARS = (
    ("rewards", np.float32),
    ("return", np.float32),
    ("elapsed_steps", np.int32),
    ("success", np.bool_),
    ("success_once", np.bool_),
    ("grasped", np.bool_),
    ("held", np.bool_),
)
INFO_KEYS = tuple(name for name, _ in SCALARS if name not in ("rewards", "return"))  # what an environment's info has
START_TIMEOUT_S, STEP_TIMEOUT_S = 300, 300


def make_envs(
    task="main",
    split="train",
    num_envs=64,
    *,
    assets="primitive",
    image_size=(160, 120),
    sim_freq=250,
    solver_iterations=4,
    max_episode_steps=40,
    fidelity="fixed",
    shader_pack="minimal",
    num_workers=0,
    device="cpu",
):
    """Environments with `reset`, `step`, `privileged_state`, `set_task`, `close`; see `CpuEnvs` for shapes.

    Args:
        task, split: a row of `common/simulation/tasks.py`; assets: "primitive" or "bridge" (`common/simulation/assets.py`).
        image_size: (W, H) pixels, 4:3. sim_freq: Hz. solver_iterations: PhysX position iterations.
        max_episode_steps: control steps of 0.2 s until `dones`. fidelity: "fixed" or "published".
        num_workers: CPU processes; 0 = one per core. device: "cpu", or "cuda" for the batched GPU simulation.
    Raises: ValueError / FileNotFoundError that name value, rule and fix, before anything slow starts.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs = {num_envs} must be >= 1; use 64 (default), or less on a small machine")
    if max_episode_steps < 1:
        raise ValueError(f"max_episode_steps = {max_episode_steps} must be >= 1; use 40 (embedded) or 80 (published)")
    if num_workers < 0:
        raise ValueError(f"num_workers = {num_workers} must be >= 0; use 0 for one per core")
    check_env_args(task, split, assets, image_size, sim_freq, solver_iterations, fidelity)
    kwargs = dict(task=task, split=split, assets=assets, image_size=tuple(image_size), sim_freq=sim_freq,
                  solver_iterations=solver_iterations, fidelity=fidelity, shader_pack=shader_pack)  # fmt: skip
    if device.startswith("cuda"):
        return GpuEnvs(num_envs, max_episode_steps, kwargs)
    return CpuEnvs(num_envs, max_episode_steps, kwargs, num_workers or len(os.sched_getaffinity(0)))


class CpuEnvs:
    """N environments in worker processes.

    reset(episode_ids (N,) or (len(env_ids),), env_ids=None) -> images (N, H, W, 3) uint8, instructions list[str] (N,)
    step(actions (N, 7) float32; gripper > 0.5 opens, else closes)
        -> images, rewards (N,) float32, dones (N,) bool: the step limit, infos: dict (N,) (`INFO_KEYS`, return)
    There is no auto-reset. All returned arrays are copies.
    """

    def __init__(self, num_envs, max_episode_steps, env_kwargs, num_workers):
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.image_size, self.fidelity = env_kwargs["image_size"], env_kwargs["fidelity"]
        width, height = self.image_size
        context = multiprocessing.get_context("spawn")  # Vulkan and torch threads do not survive a fork
        self._memory = {"images": context.RawArray(ctypes.c_uint8, num_envs * height * width * 3)}
        self._memory["actions"] = context.RawArray(ctypes.c_float, num_envs * 7)
        for name, dtype in SCALARS:
            self._memory[name] = context.RawArray(ctypes.c_uint8, num_envs * np.dtype(dtype).itemsize)
        self._views = _views(self._memory, num_envs, height, width)
        self._instructions = [""] * num_envs
        self._workers = []
        for rows in np.array_split(np.arange(num_envs), min(num_workers, num_envs)):
            ours, theirs = context.Pipe()
            args = (theirs, self._memory, rows.tolist(), num_envs, env_kwargs)
            process = context.Process(target=_worker, args=args, daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours, rows))
        try:
            self._gather(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def reset(self, episode_ids, env_ids=None):
        env_ids = np.arange(self.num_envs) if env_ids is None else np.asarray(env_ids, dtype=np.int64)
        episode_ids = np.asarray(episode_ids, dtype=np.int64)
        if episode_ids.shape != env_ids.shape:
            raise ValueError(f"episode_ids {episode_ids.shape} and env_ids {env_ids.shape} must have the same shape")
        ids = dict(zip(env_ids.tolist(), episode_ids.tolist(), strict=True))
        for _, pipe, rows in self._workers:
            self._send(pipe, ("reset", {row: ids[row] for row in rows.tolist() if row in ids}))
        for answer in self._gather():
            for row, text in answer.items():
                self._instructions[row] = text
        return self._views["images"].copy(), list(self._instructions)

    def step(self, actions):
        actions = np.asarray(actions, dtype=np.float32)
        if actions.shape != (self.num_envs, 7):
            raise ValueError(f"actions {actions.shape} must have shape ({self.num_envs}, 7)")
        self._views["actions"][:] = decode_gripper(actions)
        self._command("step")
        infos = {key: self._views[key].copy() for key in (*INFO_KEYS, "return")}
        dones = infos["elapsed_steps"] >= self.max_episode_steps
        return self._views["images"].copy(), self._views["rewards"].copy(), dones, infos

    def privileged_state(self):
        """dict of arrays (N, ...): poses (xyz + wxyz, world), boxes and indices; see `PutOnReceptacleEnv`."""
        states = [state for answer in self._command("privileged_state") for state in answer]
        return {key: np.concatenate([state[key] for state in states]) for key in states[0]}

    def set_task(self, task, split):
        """The next resets draw from this task of the same asset pack."""
        self._command("set_task", task, split)

    def close(self):
        for process, pipe, _ in self._workers:
            try:
                pipe.send(("close",))
            except (BrokenPipeError, OSError):
                pass  # already dead
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
        self._workers = []

    def _command(self, *message):
        for _, pipe, _ in self._workers:
            self._send(pipe, message)
        return self._gather()

    def _send(self, pipe, message):
        try:
            pipe.send(message)
        except (BrokenPipeError, OSError):
            pass  # `_gather` reports the dead worker with its exit code

    def _gather(self, timeout_s=STEP_TIMEOUT_S):
        """One answer per worker; a worker that died, raised or hangs is an error that says which and why."""
        answers = []
        for number, (process, pipe, rows) in enumerate(self._workers):
            who = f"environment worker {number} (environments {rows[0]} to {rows[-1]})"
            # in slices: a run that was stopped and goes on (Ctrl-Z, a suspended job) loses one of them, not all
            if not any(wait([pipe, process.sentinel], timeout_s / 100) for _ in range(100)):
                raise RuntimeError(f"{who} did not answer within {timeout_s} s; its process {process.pid} hangs")
            try:
                kind, answer = pipe.recv()
            except (EOFError, ConnectionResetError):
                process.join(5)
                code = process.exitcode
                why = f"killed by signal {-(code or 0)}; 9 usually means out of memory: use fewer --num-envs"
                why = why if code and code < 0 else ""
                raise RuntimeError(f"{who} died with exit code {code} {why}") from None
            if kind == "error":
                raise RuntimeError(f"{who} failed:\n{answer}")
            answers.append(answer)
        return answers


def decode_gripper(actions):
    """The published policy-side decode: gripper value > 0.5 becomes 1 (open), anything else -1 (closed)."""
    actions = actions.copy()
    actions[:, 6] = np.where(actions[:, 6] > 0.5, 1.0, -1.0)
    return actions


def _views(memory, num_envs, height, width):
    views = {name: np.frombuffer(memory[name], dtype=dtype) for name, dtype in SCALARS}
    views["images"] = np.frombuffer(memory["images"], dtype=np.uint8).reshape(num_envs, height, width, 3)
    views["actions"] = np.frombuffer(memory["actions"], dtype=np.float32).reshape(num_envs, 7)
    return views


def _worker(pipe, memory, rows, num_envs, env_kwargs):
    """Process main: owns the environments `rows`; answers ("ok", result) or ("error", traceback) to every message."""
    os.environ.setdefault("LP_NUM_THREADS", "0")  # software Vulkan: no threads of its own, the same pictures
    import torch

    torch.set_num_threads(1)
    try:
        from common.simulation.env import CAMERA, make_env

        width, height = env_kwargs["image_size"]
        views = _views(memory, num_envs, height, width)
        envs = {row: make_env(**env_kwargs) for row in rows}

        def write(row, obs, info, reward):
            views["images"][row] = obs["sensor_data"][CAMERA]["rgb"][0].numpy()
            views["rewards"][row] = reward
            views["return"][row] += reward
            for key in INFO_KEYS:
                views[key][row] = info[key].item()

        def reset(ids):
            for row, episode_id in ids.items():
                views["return"][row] = 0.0
                obs, info = envs[row].reset(options={"episode_ids": [episode_id]})
                write(row, obs, info, 0.0)
            return {row: envs[row].instructions()[0] for row in ids}

        def step():
            for row, env in envs.items():
                obs, reward, _, _, info = env.step(views["actions"][row])  # success does not end an episode
                write(row, obs, info, reward.item())

        def set_task(task, split):
            for env in envs.values():
                env.set_task(task, split)

        def privileged_state():
            return [env.privileged_state() for env in envs.values()]

        commands = {"reset": reset, "step": step, "set_task": set_task, "privileged_state": privileged_state}
        pipe.send(("ok", None))
        while True:
            name, *args = pipe.recv()
            if name == "close":
                break
            pipe.send(("ok", commands[name](*args)))
    except (EOFError, KeyboardInterrupt):
        pass  # the main process is gone or stops: leave without noise
    except Exception:
        pipe.send(("error", traceback.format_exc()))


class GpuEnvs:
    """The same interface on one batched GPU simulation; resets are for all environments at once."""

    def __init__(self, num_envs, max_episode_steps, env_kwargs):
        import torch

        from common.simulation.env import make_env

        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.image_size, self.fidelity = env_kwargs["image_size"], env_kwargs["fidelity"]
        # Of torchrun's ranks: the one that `runs.setup_ranks` gives the model, if that is on a GPU.
        gpu = int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count())
        self._env = make_env(num_envs, f"physx_cuda:{gpu}", f"gpu:{gpu}", **env_kwargs)

    def reset(self, episode_ids, env_ids=None):
        if env_ids is not None and list(env_ids) != list(range(self.num_envs)):
            raise ValueError(f"env_ids = {list(env_ids)} must be all {self.num_envs} in order: all settle together")
        obs, _ = self._env.reset(options={"episode_ids": np.asarray(episode_ids)})
        self._return = np.zeros(self.num_envs, np.float32)
        return self._images(obs), self._env.instructions()

    def step(self, actions):
        obs, rewards, _, _, info = self._env.step(decode_gripper(np.asarray(actions, dtype=np.float32)))
        rewards = rewards.cpu().numpy().astype(np.float32)
        self._return = self._return + rewards
        infos = {key: info[key].cpu().numpy() for key in INFO_KEYS} | {"return": self._return}
        return self._images(obs), rewards, infos["elapsed_steps"] >= self.max_episode_steps, infos

    def _images(self, obs):
        from common.simulation.env import CAMERA

        return obs["sensor_data"][CAMERA]["rgb"].cpu().numpy()

    def privileged_state(self):
        return self._env.privileged_state()

    def set_task(self, task, split):
        self._env.set_task(task, split)

    def close(self):
        self._env.close()
        self._env = None  # holds the scene, with its buffers on the GPU
