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


def test_episodes_end_and_the_next_begin_in_the_same_step():
    """Stops timers and returns that go on in the next episode, and pay without an episode."""
    success = {1: (1, 2), 2: (3, 4), 3: (1, 3, 4), 4: (1,)}
    envs = ScriptedEnvs(2, success, max_episode_steps=4, reset_after_success=2)
    obs, infos = envs.reset([iter([1, 2, 4]), iter([3])])
    assert obs[:, 0, 0, 0].tolist() == [10, 30] and infos["instruction"] == ["put 1", "put 3"]
    seen, ends = [], []
    for _ in range(10):
        obs, rewards, terminated, truncated, infos = envs.step(np.zeros((2, 7)))
        seen.append((*obs[:, 0, 0, 0].tolist(), *rewards.tolist(), *infos["active"].tolist()))
        episode = infos["episode"]
        assert episode["env"].tolist() == np.flatnonzero(terminated | truncated).tolist()
        for k, env in enumerate(episode["env"]):
            names = "id length return success_at_end success_once success_steps grasped"
            record = [episode[name][k].item() for name in names.split()]
            ends.append([*map(int, record), int(terminated[env])])
            assert infos["final_obs"][k, 0, 0, 0] == 10 * record[0] + record[1]
    # The second stream is exhausted after three steps, the first one with the last step
    columns = [[11, 20, 21, 22, 23, 40, 41, 42, 43, 44], [31, 32, 33] + [34] * 7, [1] * 10]
    columns += [[1] * 4 + [0] * 6, [True] * 9 + [False], [True] * 3 + [False] * 7]
    assert [list(column) for column in zip(*seen, strict=True)] == columns
    # Episodes 1 and 3 have been in success for 2 steps, 2 too, at the step limit; 4 never so long
    assert ends[:2] == [[1, 2, 2, 1, 1, 2, 1, 1], [3, 4, 4, 1, 1, 2, 1, 1]]
    assert ends[2:] == [[2, 4, 4, 1, 1, 2, 0, 1], [4, 4, 4, 0, 1, 0, 0, 0]]


def test_actions_and_episodes_of_equal_length():
    """Stops ends by success where none are wanted, a .3 that opens the gripper, broadcasting."""
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
    with pytest.raises(ValueError, match=r"\(1, 7\)"):
        envs.step(np.zeros((1, 7)))
    with pytest.raises(ValueError, match="3"):
        envs.reset([iter([1])] * 3)


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
        ended = (infos["episode"][key] for key in ("id", "env", "return"))
        for i, env, total, last in zip(*ended, infos["final_obs"], strict=True):
            results[i] = (np.stack([*pictures[i], last]), np.stack(states[i]), total, texts[env])
    return results


@pytest.fixture(scope="module")
def both():
    """Three environments of one worker, four of three: started once for all tests of this file."""
    both = [CpuEnvs(n, SETTINGS, 0, True, num_workers) for n, num_workers in ((3, 1), (4, 3))]
    yield both
    for envs in both:
        envs.close()


def test_an_episode_is_a_function_of_its_id(both, monkeypatch):
    """Stops an episode that depends on environment, worker, predecessor or kind of simulation."""
    # One after another in this process: the batched simulation as a batch of one, on a CPU
    monkeypatch.setattr(vec_env, "make_env", lambda n, sim, render, **kwargs: make_env(n, **kwargs))
    envs = GpuEnvs(1, SETTINGS, 0, True)
    alone = play(envs)
    envs.close()
    for found in map(play, both):
        assert found.keys() == alone.keys()
        for i, (pictures, states, total, text) in found.items():
            np.testing.assert_array_equal(pictures, alone[i][0])
            np.testing.assert_array_equal(states, alone[i][1])
            assert (total, text) == (pytest.approx(alone[i][2]), alone[i][3])
    assert not np.array_equal(alone[3][0], alone[7][0]), "the check sees nothing"
    assert (alone[3][0][0] != alone[3][0][-1]).any() and (alone[3][1][0] != alone[3][1][-1]).any()


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


class Batch:  # stands for a batched environment on a GPU
    privileged_state, set_task, instructions, begun = None, None, list, []

    def reset(self, options):
        self.steps = -1
        self.begun.append(options["episode_ids"].tolist())
        return self.step(None)[::4]

    def step(self, actions):
        self.steps += 1
        info = dict.fromkeys(vec_env.SCALARS, torch.tensor(self.begun[-1]) % 2 == 0)
        info["elapsed_steps"] = torch.full((3,), self.steps)
        obs = {"sensor_data": {CAMERA: {"rgb": torch.zeros(3, 60, 80, 3)}}}
        return obs, torch.ones(3), None, None, info


def test_gpu_envs_begin_together_and_leave_out_what_is_exhausted(monkeypatch):
    """Stops a batch with a short last part from being dropped or from counting episodes twice."""
    monkeypatch.setattr(vec_env, "make_env", lambda *_, **__: Batch())
    envs = GpuEnvs(3, SETTINGS, 0, False)
    _, infos = envs.reset([iter([1, 4]), iter([2, 5]), iter([3])])
    counted = []
    while infos["active"].any():
        obs, _, _, _, infos = envs.step(np.zeros((3, 7)))
        ended = infos["episode"]
        counted += zip(ended["id"].tolist(), ended["success_at_end"].tolist(), strict=True)
    assert counted == [(1, False), (2, True), (3, False), (4, True), (5, False)]
    assert envs.env.begun[0] == [1, 2, 3] and envs.env.begun[1][:2] == [4, 5]
    for flags in (dict(num_envs=0), dict(num_envs=2, sim_device="cuda", reset_after_success=5)):
        with pytest.raises(ValueError, match=f"{[*flags][-1]} = "):
            make_envs(**flags)
