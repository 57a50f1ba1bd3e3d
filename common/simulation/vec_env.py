"""Many environments behind gymnasium's vector interface: processes on a CPU, one batch on a GPU.
The vector environment owns episodes: `reset` takes a stream of episode ids per environment, and
where an episode ends, the next one begins in the same step (AutoresetMode.SAME_STEP). On a CPU an
id alone fixes an episode: results do not depend on how many environments or workers there are."""

import ctypes
import multiprocessing
import os
import traceback
from contextlib import suppress
from multiprocessing.connection import wait

import numpy as np
import torch

from common.run.files import check
from common.run.ranks import cores_per_rank
from common.simulation.env import CAMERA, SCENES, STATE_SIZE, check_scene, make_env

TIMEOUT_S = 300  # of a worker's answer
# What an environment tells about a step; all but the reward are of the episode so far
SCALARS = ("reward", "success", "success_once", "grasped", "held", "elapsed_steps")


def make_envs(
    num_envs, task="main", split="train", scene="small", sim_device="cpu", reset_after_success=0,
    state=False):  # fmt: skip
    """A `VectorEnv`; ValueError or FileNotFoundError before anything slow starts.
    task, split: a row of common/simulation/tasks.py and its configurations, train or test.
    scene: "small" or "published", a row of SCENES. sim_device: "cpu" or "cuda".
    reset_after_success: an episode ends when success has lasted so many steps; 0 = never.
    state: infos["state"] has what a critic may see of the simulator."""
    check_scene(task, split, scene)
    check(num_envs >= 1, f"num_envs = {num_envs} must be >= 1; use 64")
    why = f"reset_after_success = {reset_after_success}: on a GPU all episodes end together; use 0"
    check(sim_device == "cpu" or not reset_after_success, why)
    make = GpuEnvs if sim_device == "cuda" else CpuEnvs
    return make(num_envs, dict(SCENES[scene], task=task, split=split), reset_after_success, state)


class VectorEnv:
    """Episodes of N environments, which `CpuEnvs` and `GpuEnvs` simulate.
    reset(streams) -> obs, infos; with whole_episodes=True success ends no episode (evaluations)
    step(actions (N, 7) float32) -> obs, rewards, terminations, truncations, infos
        actions: xyz delta (m) and Euler delta (rad) of the gripper; the last one > 0.5 opens it
        obs (N, H, W, 3) uint8; rewards (N,) float32; terminations (success has lasted) and
        truncations (step limit) (N,) bool
    infos: instruction: list of N str, and state (N, D) float32, D = 0 unless asked for: of obs
        success (N,) bool: of the step that was made
        active (N,) bool: False where the stream is exhausted; such an environment stands still
        episode: dict of (K,) arrays of the K episodes that ended: env, id, length, return,
            success_at_end, success_once, grasped, held, success_steps
        final_obs (K, H, W, 3): their last pictures, which obs no longer shows"""

    def __init__(self, num_envs, settings, reset_after_success, state):
        self.num_envs = num_envs
        self.max_episode_steps = settings["max_episode_steps"]
        self.fidelity = settings["fidelity"]
        self.reset_after_success, self.with_state = reset_after_success, state
        width, height = settings["image_size"]
        self.images = np.zeros((num_envs, height, width, 3), np.uint8)
        self.states = np.zeros((num_envs, STATE_SIZE if state else 0), np.float32)
        self.instructions = [""] * num_envs
        self.scalars = {name: np.zeros(num_envs, np.float32) for name in SCALARS}

    def reset(self, streams, whole_episodes=False):
        check(len(streams) == self.num_envs, f"{len(streams)} streams of ids, not {self.num_envs}")
        self.streams = streams
        never = whole_episodes or not self.reset_after_success
        self.most_success_steps = np.inf if never else self.reset_after_success
        self.active = np.ones(self.num_envs, bool)
        self.ids = np.zeros(self.num_envs, np.int64)
        self.returns = np.zeros(self.num_envs, np.float32)
        self.success_steps = np.zeros(self.num_envs, np.int64)
        self._begin_next(np.arange(self.num_envs))
        return self.images.copy(), self._infos()

    def step(self, actions):
        actions = np.asarray(actions, np.float32).copy()
        right = actions.shape == (self.num_envs, 7)
        check(right, f"actions are {actions.shape}, they must be ({self.num_envs}, 7)")
        # The published policy-side decode of the gripper: 1 opens, -1 closes
        actions[:, 6] = np.where(actions[:, 6] > 0.5, 1.0, -1.0)
        self._simulate(actions)
        now = {name: values.copy() for name, values in self.scalars.items()}
        now["reward"][~self.active] = 0.0
        finite = np.isfinite(now["reward"]).all() and np.isfinite(self.states).all()
        check(finite, "the simulator's reward or state is not finite; --resume, or another --seed")
        success = now["success"].astype(bool)
        self.returns += now["reward"]
        self.success_steps = np.where(success, self.success_steps + 1, 0)
        truncated = self.active & (now["elapsed_steps"] >= self.max_episode_steps)
        terminated = self.active & (self.success_steps >= self.most_success_steps)
        ended = np.flatnonzero(terminated | truncated)
        episode = {"env": ended, "id": self.ids[ended], "return": self.returns[ended]}
        episode["length"] = now["elapsed_steps"][ended].astype(np.int64)
        episode["success_at_end"] = success[ended]
        episode["success_steps"] = self.success_steps[ended]
        for name in ("success_once", "grasped", "held"):
            episode[name] = now[name][ended].astype(bool)
        final_obs = self.images[ended]
        self._begin_next(ended)
        infos = dict(self._infos(), success=success, episode=episode, final_obs=final_obs)
        return self.images.copy(), now["reward"], terminated, truncated, infos

    def _begin_next(self, envs):
        """Begin the next episode of the stream in each of these environments."""
        ids = {}
        for env in envs.tolist():
            episode_id = next(self.streams[env], None)
            self.active[env] = episode_id is not None
            if episode_id is not None:
                ids[env] = self.ids[env] = int(episode_id)
        self.returns[envs] = 0.0
        self.success_steps[envs] = 0
        if ids:
            self._begin(ids)

    def _infos(self):
        active, state = self.active.copy(), self.states.copy()
        return {"instruction": list(self.instructions), "state": state, "active": active}


class CpuEnvs(VectorEnv):
    """Environments in worker processes, by default as many as this rank has cores."""

    def __init__(self, num_envs, settings, reset_after_success, state, num_workers=None):
        super().__init__(num_envs, settings, reset_after_success, state)
        context = multiprocessing.get_context("spawn")  # Vulkan does not survive a fork
        # Pictures travel through shared memory, all else through pipes
        memory = context.RawArray(ctypes.c_uint8, self.images.size)
        self.images = np.frombuffer(memory, np.uint8).reshape(self.images.shape)
        self.workers = []
        num_workers = min(num_workers or cores_per_rank(), num_envs)
        for envs in np.array_split(np.arange(num_envs), num_workers):
            ours, theirs = context.Pipe()
            work = (theirs, memory, self.images.shape, envs.tolist(), settings, state)
            process = context.Process(target=_worker, args=work, daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours, envs))
        try:
            self._gather()
        except BaseException:
            self.close()
            raise

    def _begin(self, ids):
        self._read(self._command("begin", ids))

    def _simulate(self, actions):
        running = np.flatnonzero(self.active).tolist()
        self._read(self._command("step", {env: actions[env] for env in running}))

    def _read(self, answers):
        for env, (scalars, instruction, state) in answers.items():
            for name, value in zip(SCALARS, scalars, strict=True):
                self.scalars[name][env] = value
            self.instructions[env] = instruction
            self.states[env] = state

    def privileged_state(self):
        """dict of arrays (N, ...): poses (xyz + wxyz, world), boxes and indices of the bodies."""
        states = self._call("privileged_state")
        return {key: np.concatenate([state[key] for state in states]) for key in states[0]}

    def set_task(self, task, split):  # of the next episodes
        self._call("set_task", task, split)

    def close(self):
        for process, pipe, _ in self.workers:
            _send(pipe, ("close", {}))
            process.join(timeout=5)
            process.kill()
        self.workers = []

    def _call(self, *request):
        """What this method, with its arguments, of each environment returns."""
        return list(self._command("call", dict.fromkeys(range(self.num_envs), request)).values())

    def _command(self, name, requests):
        for _, pipe, _ in self.workers:
            _send(pipe, (name, requests))
        return self._gather()

    def _gather(self):
        """All workers' answers; one that died, raised or hangs is an error that says why."""
        answers = {}
        for number, (process, pipe, envs) in enumerate(self.workers):
            who = f"environment worker {number} (environments {envs[0]} to {envs[-1]})"
            # In slices: a run that was suspended loses one of them, not all
            if not any(wait([pipe, process.sentinel], TIMEOUT_S / 100) for _ in range(100)):
                process.kill()  # the end of this process would wait for it
                raise RuntimeError(f"{who}, process {process.pid}, gave no answer in {TIMEOUT_S} s")
            try:
                kind, answer = pipe.recv()
            except (EOFError, ConnectionResetError):
                process.join(5)
                hint = "-9 usually means out of memory: use fewer --num-envs"
                raise RuntimeError(f"{who} died, exit code {process.exitcode}; {hint}") from None
            if kind == "error":
                raise RuntimeError(f"{who} failed:\n{answer}")
            answers.update(answer)
        return answers


def _send(pipe, message):
    with suppress(OSError):  # the other side is dead; `_gather` says so
        pipe.send(message)


def _worker(pipe, memory, shape, numbers, settings, with_state):
    """Process main: owns some environments; answers ("ok", result) or ("error", traceback)."""
    os.environ.setdefault("LP_NUM_THREADS", "0")  # software Vulkan: no threads of its own
    torch.set_num_threads(1)
    images = np.frombuffer(memory, np.uint8).reshape(shape)

    def report(number, obs, reward, info):
        images[number] = obs["sensor_data"][CAMERA]["rgb"][0].numpy()
        scalars = (reward, *(info[name].item() for name in SCALARS[1:]))
        state = envs[number].state_features()[0] if with_state else ()
        return scalars, envs[number].instructions()[0], state

    def begin(number, episode_id):
        obs, info = envs[number].reset(options={"episode_ids": [episode_id]})
        return report(number, obs, 0.0, info)

    def step(number, action):
        obs, reward, _, _, info = envs[number].step(action)
        return report(number, obs, reward.item(), info)

    def call(number, request):
        return getattr(envs[number], request[0])(*request[1:])

    try:
        envs = {number: make_env(**settings) for number in numbers}
        commands = {"begin": begin, "step": step, "call": call}
        pipe.send(("ok", {}))
        while True:
            name, requests = pipe.recv()
            if name == "close":
                break
            ours = [number for number in numbers if number in requests]
            pipe.send(("ok", {number: commands[name](number, requests[number]) for number in ours}))
    except (EOFError, KeyboardInterrupt):
        pass  # the main process is gone or stops: leave without noise
    except Exception:
        _send(pipe, ("error", traceback.format_exc()))


class GpuEnvs(VectorEnv):
    """One batched GPU simulation. All episodes begin and end together."""

    def __init__(self, num_envs, settings, reset_after_success, state):
        super().__init__(num_envs, settings, reset_after_success, state)
        # Of torchrun's ranks: the GPU that `setup_ranks` gives the model
        gpu = int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count())
        self.env = make_env(num_envs, f"physx_cuda:{gpu}", f"gpu:{gpu}", **settings)
        self.privileged_state = self.env.privileged_state
        self.set_task = self.env.set_task

    def _begin(self, ids):
        check(len(ids) == self.active.sum(), f"{len(ids)} episodes: on a GPU all begin at once")
        # Where a stream is exhausted, another episode is repeated and not counted
        every = np.resize(list(ids.values()), self.num_envs)
        every[list(ids)] = list(ids.values())
        obs, info = self.env.reset(options={"episode_ids": every})
        self._read(obs, np.zeros(self.num_envs), info)
        self.instructions = self.env.instructions()

    def _simulate(self, actions):
        obs, rewards, _, _, info = self.env.step(actions)
        self._read(obs, rewards.cpu().numpy(), info)

    def _read(self, obs, rewards, info):
        self.images = obs["sensor_data"][CAMERA]["rgb"].cpu().numpy()
        self.scalars["reward"] = rewards.astype(np.float32)
        for name in SCALARS[1:]:
            self.scalars[name] = info[name].cpu().numpy().astype(np.float32)
        if self.with_state:
            self.states = self.env.state_features()

    def close(self):
        self.env.close()
        self.env = None  # holds the scene, with its buffers on the GPU
