"""Episodes of the vector environment, the same ones for any number of workers that may fail."""

import os
import signal

import numpy as np
import pytest
import torch
from scripted_envs import ScriptedEnvs

from common.simulation import vec_env
from common.simulation.env import CAMERA, SCENES, make_env
from common.simulation.vec_env import CpuEnvs, GpuEnvs, make_envs

STEPS = 5
IDS = [3, 90001, 180_002, 7, 270_003]
SETTINGS = dict(SCENES["small"], task="main", split="train", max_episode_steps=STEPS)
NONE = np.zeros((2, 7), np.float32)


def test_episodes_end_and_the_next_begin_in_the_same_step():
    """Stops timers and returns that go on in the next episode, and pay without an episode."""
    success = {1: (1, 2), 2: (3, 4), 3: (1, 3, 4), 4: (1,)}
    envs = ScriptedEnvs(2, success, max_episode_steps=4, reset_after_success=2)
    obs, infos = envs.reset([iter([1, 2, 4]), iter([3])])
    assert obs[:, 0, 0, 0].tolist() == [10, 30] and infos["instruction"] == ["put 1", "put 3"]
    seen, ends = [], []
    for _ in range(10):
        obs, rewards, terminated, truncated, infos = envs.step(NONE)
        seen.append((*obs[:, 0, 0, 0].tolist(), *rewards.tolist(), *infos["active"].tolist()))
        episode = infos["episode"]
        assert episode["env"].tolist() == np.flatnonzero(terminated | truncated).tolist()
        for k in range(len(episode["id"])):
            names = "id length return success_at_end success_once success_steps grasped"
            record = [episode[name][k].item() for name in names.split()]
            ends.append((*record, terminated[episode["env"][k]].item()))
            assert infos["final_obs"][k, 0, 0, 0] == 10 * record[0] + record[1]
    # Episodes 1 and 3 have been in success for 2 steps, 2 too, at the step limit; 4 never so long
    assert [list(column) for column in zip(*seen, strict=True)] == [
        [11, 20, 21, 22, 23, 40, 41, 42, 43, 44],
        [31, 32, 33, 34, 34, 34, 34, 34, 34, 34],  # the stream is exhausted
        [1] * 10,
        [1] * 4 + [0] * 6,
        [True] * 9 + [False],
        [True] * 3 + [False] * 7,
    ]
    assert ends == [
        (1, 2, 2, True, True, 2, True, True),
        (3, 4, 4, True, True, 2, True, True),
        (2, 4, 4, True, True, 2, False, True),
        (4, 4, 4, False, True, 0, False, False),
    ]


def test_actions_and_episodes_of_equal_length():
    """Stops --reset-after-success 0 from ending episodes, and a .3 that opens the gripper."""
    envs = ScriptedEnvs(2, {1: (1, 2, 3)})
    envs.reset([iter([1, 2]), iter([2, 1])])
    for step, value in enumerate((0.3, 0.5, 0.51, 1.0, -1.0, 0.0), 1):
        actions = np.full((2, 7), value, np.float32)
        _, _, terminated, truncated, infos = envs.step(actions)
        assert not terminated.any() and truncated.all() == truncated.any() == (step % 3 == 0)
        assert (envs.actions[-1][:, 6] == (1 if value > 0.5 else -1)).all()
        assert (envs.actions[-1][:, :6] == actions[:, :6]).all() and len(np.unique(actions)) == 1
    assert infos["episode"]["success_at_end"].tolist() == [False, True]
    assert infos["success"].tolist() == [False, True], "of the step, not of what begins"


def test_bad_input_is_refused(monkeypatch):
    """Stops broadcasting over environments, and errors that come after the simulator's start."""
    envs = ScriptedEnvs(2, {})
    with pytest.raises(ValueError, match="3"):
        envs.reset([iter([1])] * 3)
    with pytest.raises(ValueError, match=r"\(1, 7\)"):
        envs.step(np.zeros((1, 7)))
    for name, value in dict(num_envs=0, task="no_task", scene="no_scene", split="no_split").items():
        with pytest.raises(ValueError, match=str(value)):
            make_envs(**{"num_envs": 2, name: value})
    with pytest.raises(ValueError, match="reset_after_success = 5"):
        make_envs(2, sim_device="cuda", reset_after_success=5)
    monkeypatch.setenv("MS_ASSET_DIR", "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_envs(2, scene="published")


ACTIONS = np.random.default_rng(0).uniform(-0.05, 0.05, (len(IDS), STEPS, 7)).astype("float32")
ACTIONS[..., 6] = 0


def play(envs):
    """Play IDS: dict id -> (pictures (STEPS + 1, H, W, 3), states, return, instruction)."""
    obs, infos = envs.reset([iter(IDS[n :: envs.num_envs]) for n in range(envs.num_envs)])
    pictures, states, results = {i: [] for i in IDS}, {i: [] for i in IDS}, {}
    while infos["active"].any():
        texts, commands = infos["instruction"], np.zeros((envs.num_envs, 7), np.float32)
        for env in np.flatnonzero(infos["active"]):
            i = envs.ids[env]
            commands[env] = ACTIONS[IDS.index(i), len(pictures[i])]
            pictures[i].append(obs[env])
            states[i].append(infos["state"][env])
        obs, _, _, _, infos = envs.step(commands)
        episode = infos["episode"]
        for k, i in enumerate(episode["id"]):
            shown, text = np.stack([*pictures[i], infos["final_obs"][k]]), texts[episode["env"][k]]
            results[i] = (shown, np.stack(states[i]), episode["return"][k], text)
    return results


@pytest.fixture(scope="module")
def both():
    """Three environments of one worker, four of three: started once for all tests of this file."""
    both = [CpuEnvs(n, SETTINGS, 0, True, num_workers) for n, num_workers in ((3, 1), (4, 3))]
    yield both
    for envs in both:
        envs.close()


@pytest.fixture(scope="module")
def alone():
    """IDS, played one after another in this process without a vector environment."""
    env = make_env(**SETTINGS)
    results = {}
    for i, actions in zip(IDS, ACTIONS, strict=True):
        obs, _ = env.reset(options={"episode_ids": [i]})
        pictures, states, total = [obs], [], 0.0
        for action in actions:
            states.append(env.state_features()[0])
            obs, reward, _, _, _ = env.step(np.append(action[:6], np.float32(-1)))
            pictures.append(obs)
            total += reward.item()
        shown = np.stack([obs["sensor_data"][CAMERA]["rgb"][0].numpy() for obs in pictures])
        results[i] = (shown, np.stack(states), total, env.instructions()[0])
    env.close()
    return results


def same(a, b):
    assert a.keys() == b.keys()
    for i in a:
        for ours, theirs in zip(a[i][:2], b[i][:2], strict=True):
            np.testing.assert_array_equal(ours, theirs, "pictures and states")
        assert a[i][2] == pytest.approx(b[i][2]) and a[i][3] == b[i][3]


def test_an_episode_is_a_function_of_its_id(both, alone):
    """Stops an episode from depending on the environment, the worker or the episode before it."""
    for envs in both:
        found = play(envs)
        same(found, alone)
    assert not np.array_equal(found[3][0], found[7][0]), "the check sees nothing"
    assert (found[3][0][0] != found[3][0][-1]).any() and (found[3][1][0] != found[3][1][-1]).any()


def test_state_and_task_of_each_environment(both):
    """Stops an expert with another environment's state, and a report on the first row's task."""
    (envs, others), first = both, []
    for task, split in (("main", "train"), ("plate", "test"), ("main", "train")):
        envs.set_task(task, split)
        first.append(envs.reset([iter([i]) for i in IDS[:3]])[0])
    assert np.array_equal(first[0], first[2]) and not np.array_equal(first[0], first[1])
    others.reset([iter([i]) for i in IDS[:4]])
    a, b = envs.privileged_state(), others.privileged_state()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key][:3])
    assert len(np.unique(a["object_pose"], axis=0)) == 3


def test_workers_that_fail_are_errors_that_say_so(both, monkeypatch):
    """Stops a run that waits for ever for a killed or hanging worker. Last: it leaves ruins."""
    envs = both[1]
    envs.reset([iter(IDS)] * 4)
    monkeypatch.setattr(vec_env, "TIMEOUT_S", 1)
    os.kill(envs.workers[2][0].pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match="worker 2 .*no answer"):
        envs.step(np.zeros((4, 7)))
    monkeypatch.undo()
    os.kill(envs.workers[1][0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker 1 .*-9"):
        envs.step(np.zeros((4, 7)))
    with pytest.raises(RuntimeError, match="(?s)worker 0 .*not finite"):
        envs.step(np.full((4, 7), np.nan))


def test_gpu_envs_are_the_same_episodes(alone, monkeypatch):
    """Stops the batched simulation from being read in another way: on a CPU, as a batch of one."""
    monkeypatch.setattr(vec_env, "make_env", lambda n, sim, render, **kwargs: make_env(n, **kwargs))
    envs = GpuEnvs(1, SETTINGS, 0, True)
    same(play(envs), alone)
    envs.close()


class Batch:
    """Stands for a batched environment on a GPU."""

    privileged_state = set_task = None

    def __init__(self, *_, **__):
        self.begun = []

    def reset(self, options):
        self.ids, self.steps = torch.as_tensor(options["episode_ids"]), -1
        self.begun.append(self.ids.tolist())
        obs, _, _, _, info = self.step(None)
        return obs, info

    def step(self, actions):
        self.steps += 1
        info = {name: self.ids % 2 == 0 for name in vec_env.SCALARS[1:]}
        info["elapsed_steps"] = torch.full((3,), self.steps)
        obs = {"sensor_data": {CAMERA: {"rgb": torch.zeros(3, 120, 160, 3)}}}
        return obs, torch.ones(3), None, None, info

    def instructions(self):
        return [f"put {i}" for i in self.ids.tolist()]


def test_gpu_envs_begin_together_and_leave_out_what_is_exhausted(monkeypatch):
    """Stops a batch with a short last part from being dropped or from counting episodes twice."""
    monkeypatch.setattr(vec_env, "make_env", Batch)
    envs = GpuEnvs(3, SETTINGS, 0, False)
    _, infos = envs.reset([iter([1, 4]), iter([2, 5]), iter([3])])
    counted = []
    while infos["active"].any():
        obs, _, _, _, infos = envs.step(np.zeros((3, 7)))
        episode = infos["episode"]
        counted += zip(episode["id"].tolist(), episode["success_at_end"].tolist(), strict=True)
    assert counted == [(1, False), (2, True), (3, False), (4, True), (5, False)]
    assert envs.env.begun[0] == [1, 2, 3] and envs.env.begun[1][:2] == [4, 5]
