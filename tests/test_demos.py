"""The expert, the files it is recorded to and their reader, on the real simulator."""

import fcntl
import itertools
import json
import os
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from mani_skill.trajectory import replay_trajectory
from recorded_demos import record, recorded_demos
from test_checkpoints import refused

from common.model.checkpoints import load_vla
from common.run.evaluate import run_episodes
from common.simulation.episodes import evaluation_ids, held_out
from demonstrations.expert import STEP_M, STEP_RAD, Expert, grasp, quantise
from demonstrations.reader import action_statistics, load_demos, moving_steps, read_header
from demonstrations.record import Args, check_args, write_episode
from scripts.to_lerobot import read_episodes


def test_speeds_and_grasps_of_the_expert():
    """Stops labels that change sign, grasps along the long side, and needless half turns."""
    error = np.array([0.0, 0.002, -0.003, 0.018, -0.039, 0.5])
    assert quantise(error, STEP_M).tolist() == [0.0, 0.0, -0.005, 0.02, -0.04, 0.04]
    errors = np.linspace(-0.2, 0.2, 999)
    assert np.all(np.abs(quantise(errors, STEP_M)) <= np.abs(errors) + STEP_M[0] / 2)
    closing, long_in_x = np.array([[1.0, 0.0, 0.0]]), np.array([[0.06, 0.015, 0.02]])
    for yaw, turn in ((0, 90), (45, -45), (90, 0), (135, 45)):
        c, s = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
        rotation = np.array([[[c, -s, 0], [s, c, 0], [0, 0, 1]]])
        assert np.rad2deg(grasp(rotation, long_in_x, closing)) == pytest.approx([turn])
        cube = np.full((1, 3), 0.02)  # is taken as it lies, with the smaller turn
        assert abs(np.rad2deg(grasp(rotation, cube, closing)))[0] <= 45 + 1e-6


def expert_success(envs, task, split, num_episodes):
    """Share of successes at the end, of one batch after the other."""
    envs.set_task(task, split)
    expert, steps = Expert(envs.num_envs), itertools.count()

    def policy(obs, instructions, rows):
        if next(steps) % envs.max_episode_steps == 0:
            expert.reset(rows % envs.num_envs)
        actions = expert.act(envs.privileged_state())
        assert not actions[expert.done, :6].any(), "the arm must rest when all is done"
        return actions

    ids = evaluation_ids(task, split, num_episodes, fidelity=envs.fidelity)
    return run_episodes(policy, envs, ids)["success_at_end"].mean()


@pytest.mark.parametrize("task, split, scene, num_steps, num_episodes, least", [
    ("position_change", "test", "small", 32, 10, 0.9),
    ("ee_pose", "test", "small", 32, 10, 0.9),
    pytest.param("main", "train", "published", 36, 5, 0.75, marks=pytest.mark.bridge),
])  # fmt: skip
def test_expert_succeeds(simulators, task, split, scene, num_steps, num_episodes, least):
    """Stops an expert that fails where the object moves, the arm is tilted, or shapes are real."""
    envs = simulators(num_envs=5, scene=scene)
    envs.max_episode_steps = num_steps
    assert expert_success(envs, task, split, num_episodes) >= least


def test_what_is_recorded_is_read(tmp_path):
    """Stops failures, duplicates, evaluation episodes, mixed up directories, lost old ones."""
    data = load_demos(recorded_demos())
    assert len(set(data.episode_ids)) == len(data.instructions) == 10
    assert not held_out("main", "train", data.episode_ids).any()
    assert data.scenes.tolist() == data.episode_ids, "main's own numbers"
    with h5py.File(recorded_demos() / "trajectory.h5") as file:
        assert len(file) == 10 and all(group["success"][-1] for group in file.values())
        for group in file.values():
            frames = group["obs/sensor_data/3rd_view_camera/rgb"]
            assert len(frames) == len(group["actions"]) + 1
    assert data.images.shape == (len(data.actions), 60, 80, 3)
    assert data.images.dtype == np.uint8 and data.images.std() > 20
    both = load_demos([recorded_demos()] * 2, num_demos=3)
    assert both.sources.tolist() == [0] * 3 + [1] * 3 and len(both.scenes) == 6
    one = load_demos(recorded_demos(), num_demos=3)
    assert both.episode_ids == one.episode_ids * 2
    np.testing.assert_array_equal(both.actions[both.episodes >= 3], one.actions)
    refused("num_demos = 11", load_demos, recorded_demos(), num_demos=11)
    shutil.copytree(recorded_demos(), tmp_path / "old")
    path = tmp_path / "old/trajectory.json"
    header = json.loads(path.read_text())
    header["settings"] = {"task": "main", "split": "train", "fidelity": "fixed"}
    for assets, size in (("bridge", [640, 480]), ("primitive", [160, 120])):
        header["settings"]["assets"] = assets
        header["env_info"]["env_kwargs"] = {"image_size": size}
        path.write_text(json.dumps(header))
        if assets == "bridge":
            assert read_header(path.parent)["settings"]["scene"] == "published"
    refused("160, 120", read_header, path.parent)


def test_a_policy_s_successes_are_recorded(tmp_path):
    """Stops failures among them, and the expert's actions in place of the policy's."""
    start = "checkpoints/tiny-warmup"
    record(tmp_path, checkpoint=start, num_demos=2, num_envs=16, max_episode_steps=40)
    model, actions = load_vla(start, trainable=False), load_demos(tmp_path).actions
    decoded = model.decode_actions(model.encode_actions(actions))
    assert np.allclose(decoded, actions, atol=1e-6) and np.ptp(actions[:, 6]) > 0.5
    with h5py.File(tmp_path / "trajectory.h5") as file:
        assert all(group["success"][-5:].all() for group in file.values())


def test_maniskill_replays_the_file(tmp_path):
    """Stops a format that only we can read: ManiSkill's own tool must replay it, from a copy."""
    for name in ("trajectory.h5", "trajectory.json"):
        shutil.copy(recorded_demos() / name, tmp_path / name)
    flags = ["--traj-path", str(tmp_path / "trajectory.h5"), "--save-traj", "--count", "2"]
    replay_trajectory.main(replay_trajectory.parse_args([*flags, "--reward-mode", "dense"]))
    (replayed,) = tmp_path.glob("trajectory.*physx_cpu.h5")
    with h5py.File(replayed) as file:
        assert len(file) == 2 and all(group["success"][-1] for group in file.values())


def test_mistakes_are_executed_but_not_imitated(tmp_path):
    """Stops labels with noise, which are the expert's clean answers, and blunders of no effect."""
    disturb = dict(action_noise=0.02, noise_probability=0.2, blunder_probability=0.04)
    record(tmp_path, num_demos=6, num_envs=6, max_episode_steps=60, **disturb)
    labels = (data := load_demos(tmp_path)).actions
    instructions, *parts = zip(*read_episodes(tmp_path), strict=True)  # lerobot gets the same
    assert list(instructions) == data.instructions
    assert all(map(np.array_equal, map(np.concatenate, parts), (labels, data.images)))
    with h5py.File(tmp_path / "trajectory.h5") as file:
        groups = [file[f"traj_{k}"] for k in range(6)]
        assert all(group["success"][-1] for group in groups)
        parts = [group["actions"][:] for group in groups]
    executed, lengths = np.concatenate(parts), [len(part) for part in parts]
    sizes = np.abs(labels).astype(np.float64).round(5)
    assert not sizes[:, 3:5].any() and set(sizes[:, 6]) == {1.0}
    assert set(sizes[:, :3].flat) <= {0.0, *STEP_M} and set(sizes[:, 5]) <= {0.0, *STEP_RAD}
    difference = (executed - labels)[:, :6]
    pushed = difference.any(axis=1)
    assert 0.05 < pushed.mean() < 0.4 and 0.01 < difference[pushed, :3].std() < 0.04
    assert not difference[:, [3, 4]].any()
    blunders = []
    for flipped in np.split(executed[:, 6] != labels[:, 6], np.cumsum(lengths)[:-1]):
        steps = [(on, len(list(group))) for on, group in itertools.groupby(flipped)]
        blunders += [length for on, length in steps[:-1] if on]  # the end may cut the last
    assert blunders and min(blunders) >= 4


def test_statistics_and_steps_that_are_left_out():
    """Stops bins without zero, ranges of rounding noise, dropped slow moves, rest or commands."""
    actions = np.zeros((1000, 7))
    actions[:, 0] = np.linspace(-0.02, 0.04, 1000)
    statistics = action_statistics(actions)
    high = [0.0394, 0.01, 0.01, 0.05, 0.05, 0.05, 1.0]
    assert statistics["q99"] == pytest.approx(high)
    assert statistics["q01"] == pytest.approx([-value for value in high])
    assert statistics["mask"] == [True] * 6 + [False]
    plain = action_statistics(actions, floors=None)  # floors only where nothing moves
    assert plain["q01"][:4] == pytest.approx([-0.0194, -0.01, -0.01, -0.05])
    assert plain["q99"][:4] == pytest.approx([0.0394, 0.01, 0.01, 0.05])
    actions = np.zeros((9, 7))
    actions[:, 6] = [1, 1, -1, -1, -1, 1, 1, 1, 1]
    actions[1, 0], actions[4, 5], actions[6, 1] = 0.005, -0.05, 0.011
    assert moving_steps(actions, "none").tolist() == list(range(9))
    assert moving_steps(actions, "published").tolist() == [2, 5, 6]
    assert moving_steps(actions, "still").tolist() == [1, 2, 4, 5, 6, 7, 8]


def edit(path, key, change=None):
    """Change an array of the file, or delete it or a group."""
    with h5py.File(path / "trajectory.h5", "a") as file:
        changed = change and change(file[key][:])
        del file[key]
        if change:
            file[key] = changed


BAD = {
    "trajectory.h5": lambda path: os.truncate(path / "trajectory.h5", 100_000),
    "trajectory.json": lambda path: (path / "trajectory.json").write_text("{"),
    "settings": lambda path: (path / "trajectory.json").write_text("{}"),
    r"traj_3.*actions is \(\d+, 6\)": lambda path: edit(path, "traj_3/actions", lambda a: a[:, :6]),
    "traj_3.*actions.*finite": lambda path: edit(path, "traj_3/actions", lambda a: a * np.nan),
    "traj_2": lambda path: edit(path, "traj_2/obs"),
    "traj_9": lambda path: edit(path, "traj_9"),
}


@pytest.mark.parametrize("named", BAD)
def test_bad_files_are_named(named, tmp_path):
    """Stops training on half a data set or NaN, and errors without the file and key at fault."""
    shutil.copytree(recorded_demos(), tmp_path / "main")
    BAD[named](tmp_path / "main")
    refused(named, load_demos, tmp_path / "main")


def test_a_recording_is_right_or_refused(tmp_path):
    """Stops half a recording, NaN, one that replaces another, and percent taken for a share."""
    refused("demonstrations.record --output", load_demos, tmp_path)
    path = recorded_demos() / "trajectory.h5"
    before = path.read_bytes()
    refused("another --output", record, recorded_demos(), num_demos=1)
    assert path.read_bytes() == before
    with path.open("rb") as file, pytest.raises(ValueError, match="trajectory.h5.*another process"):
        fcntl.flock(file, fcntl.LOCK_EX)
        load_demos(path.parent)  # whose fix is not to record them again
    file, episode = SimpleNamespace(filename="x.h5"), dict(id=7, actions=[np.nan])
    refused("x.h5: actions of episode 7", write_episode, file, episode, 1, 0)
    few = dict(task="single", num_demos=4000)  # hours of repetitions
    for wrong in (dict(num_demos=0), dict(noise_probability=15.0), dict(task="pour"), few):
        refused(str(list(wrong.values())[-1]), check_args, Args(**wrong))
