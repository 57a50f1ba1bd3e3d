"""The expert, the files it is recorded to and their reader, on the real simulator."""

import json
import shutil

import h5py
import numpy as np
import pytest
from recorded_demos import ARGS, recorded_demos

from common.model.openvla import load_vla
from common.run.evaluate import evaluation_ids, held_out
from common.simulation.demos import Args, action_statistics, load_demos, moving_steps, record
from common.simulation.expert import STEP_M, STEP_RAD, Expert, grasp, quantise
from common.simulation.vec_env import make_envs


# --- expert ---
def test_quantise_never_overshoots_by_more_than_half_the_smallest_speed():
    """Stops back-and-forth steps, which would make the label of nearly equal images change sign."""
    error = np.array([0.0, 0.002, -0.003, 0.018, -0.039, 0.5])
    assert quantise(error, STEP_M).tolist() == [0.0, 0.0, -0.005, 0.02, -0.04, 0.04]
    errors = np.linspace(-0.2, 0.2, 999)
    assert np.all(np.abs(quantise(errors, STEP_M)) <= np.abs(errors) + STEP_M[0] / 2)


@pytest.mark.parametrize("yaw, turn", [(0, 90), (45, -45), (90, 0), (135, 45)])
def test_grasp_axis_is_the_short_one_and_the_turn_at_most_a_quarter(yaw, turn):
    """Stops grasps along the long side, which do not fit, and half turns of a symmetric gripper."""
    c, s = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
    rotation = np.array([[[c, -s, 0], [s, c, 0], [0, 0, 1]]])
    closing = np.array([[1.0, 0.0, 0.0]])
    # The box is long in its own x; its short axis lies at yaw + 90 degrees.
    assert np.rad2deg(grasp(rotation, np.array([[0.06, 0.015, 0.02]]), closing)) == pytest.approx([turn])
    # A cube is taken as it lies, with the smaller turn.
    assert abs(np.rad2deg(grasp(rotation, np.full((1, 3), 0.02), closing)))[0] <= 45 + 1e-6


@pytest.fixture(scope="module")
def envs():
    envs = make_envs(num_envs=10, num_workers=1, max_episode_steps=32)
    yield envs
    envs.close()


def run_expert(envs, ids):
    envs.reset(ids)
    expert = Expert(envs.num_envs)
    for _ in range(envs.max_episode_steps):
        actions = expert.act(envs.privileged_state())
        infos = envs.step(actions)[3]
    assert not actions[expert.done, :6].any(), "the arm must rest when all is done"
    return infos["success"].mean(), expert.done.mean()


@pytest.mark.parametrize("task", ["position_change", "ee_pose"])
def test_expert_succeeds(envs, task):
    """Stops an expert that fails where the object moves within the episode or the arm starts tilted."""
    envs.set_task(task, "test")
    success, done = run_expert(envs, evaluation_ids(task, "test", envs.num_envs))
    assert success >= 0.9 and done >= 0.9


@pytest.mark.bridge
def test_expert_succeeds_on_real_shapes():
    """Stops an expert that knows boxes only."""
    envs = make_envs(num_envs=4, assets="bridge", image_size=(64, 48), num_workers=1, max_episode_steps=36)
    try:
        assert run_expert(envs, evaluation_ids("main", "train", 4))[0] >= 0.75
    finally:
        envs.close()


# --- files ---
def test_recorded_episodes_succeed_and_are_for_training():
    """Stops failures, duplicates and evaluation episodes in the training data."""
    data = load_demos(recorded_demos())
    header = json.loads((recorded_demos() / "trajectory.json").read_text())
    assert len(set(data.episode_ids)) == len(data.instructions) == 10
    assert not held_out("main", "train", data.episode_ids).any()
    assert header["counts"]["rejected"] <= 0.2 * header["counts"]["attempted"]
    with h5py.File(recorded_demos() / "trajectory.h5") as file:
        assert len(file) == 10 and all(group["success"][-1] for group in file.values())
        assert all(
            len(group["obs/sensor_data/3rd_view_camera/rgb"]) == len(group["actions"]) + 1 for group in file.values()
        )
    assert data.images.shape == (len(data.actions), 120, 160, 3) and data.images.dtype == np.uint8
    assert data.images.std() > 20 and {text.split()[0] for text in data.instructions} == {"put"}


def values(actions):
    return set(np.abs(actions).astype(np.float64).round(5).flatten().tolist())


def test_actions_have_few_values_and_no_roll_or_pitch():
    """Stops noise in dimensions that carry nothing: each would cost the policy nats in every joint ratio."""
    actions = load_demos(recorded_demos()).actions
    assert not actions[:, 3:5].any()
    assert values(actions[:, :3]) <= {0.0, *STEP_M} and values(actions[:, 5]) <= {0.0, *STEP_RAD}
    assert set(actions[:, 6].tolist()) == {-1.0, 1.0}


def test_stored_actions_replay_to_success(envs):
    """Stops files whose actions, order of ids or simulator settings are not those of the recording."""
    data = load_demos(recorded_demos())
    envs.set_task("main", "train")
    first, _ = envs.reset(data.episode_ids)
    lengths = np.bincount(data.episodes)
    starts = np.cumsum([0, *lengths[:-1]])
    rest, success = np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32), np.zeros(10, dtype=bool)
    for t in range(lengths.max()):
        actions = np.stack([data.actions[s + t] if t < n else rest for s, n in zip(starts, lengths, strict=True)])
        infos = envs.step(actions)[3]
        success = np.where(t == lengths - 1, infos["success"], success)
    assert success.all()
    assert np.abs(first.astype(int) - data.images[starts]).mean() < 3, "images of other episodes"


def test_maniskill_replays_the_file(tmp_path):
    """Stops a format that only we can read: ManiSkill's own tool must replay it, from a copy."""
    from mani_skill.trajectory import replay_trajectory

    for name in ("trajectory.h5", "trajectory.json"):
        shutil.copy(recorded_demos() / name, tmp_path / name)
    flags = ["--traj-path", str(tmp_path / "trajectory.h5"), "--save-traj", "--count", "2"]
    replay_trajectory.main(replay_trajectory.parse_args([*flags, "--reward-mode", "dense"]))
    (replayed,) = tmp_path.glob("trajectory.*physx_cpu.h5")
    with h5py.File(replayed) as file:
        assert len(file) == 2 and all(group["success"][-1] for group in file.values())


def test_an_interrupted_recording_goes_on(tmp_path):
    """Stops lost or doubled episodes when the recorder or the merge of its parts is killed."""
    path = tmp_path / "main"
    shutil.copytree(recorded_demos(), path)
    parts = path / "parts"
    parts.mkdir()
    shutil.copy(path / "trajectory.h5", parts / "000002.h5")  # killed between the merge and its clean-up
    (parts / "000003.tmp").write_bytes(b"half a part")
    (path / "trajectory.json").unlink()
    record(Args(output=str(path), **ARGS | {"num_demos": 12}))
    old, new = load_demos(recorded_demos()), load_demos(path)
    assert new.episode_ids[:10] == old.episode_ids and len(set(new.episode_ids)) == 12
    assert np.array_equal(new.actions[: len(old.actions)], old.actions) and not parts.exists()
    (path / "trajectory.json").unlink()  # only the .h5 was copied: the command of the error's fix
    record(Args(output=str(path), **ARGS | {"num_demos": 12}))
    assert load_demos(path).episode_ids == new.episode_ids
    with pytest.raises(ValueError, match=r"seed = 0 there, 1 now"):
        record(Args(output=str(path), **ARGS | {"num_demos": 14}, seed=1))


def test_noise_is_executed_but_not_imitated(tmp_path):
    """Stops noisy labels: with action noise the stored label is the expert's clean answer to the disturbed state."""
    record(
        Args(output=str(tmp_path), **ARGS | {"num_demos": 2, "num_envs": 2}, action_noise=0.02, noise_probability=0.25)
    )
    labels = load_demos(tmp_path).actions
    with h5py.File(tmp_path / "trajectory.h5") as file:
        executed = np.concatenate([file[f"traj_{k}/actions"][:] for k in range(2)])
    assert values(labels[:, :3]) <= {0.0, *STEP_M}
    difference = executed - labels
    pushed = difference.any(axis=1)
    assert 0.05 < pushed.mean() < 0.5 and 0.01 < difference[pushed, :3].std() < 0.04
    assert not difference[:, [3, 4, 6]].any()


def test_blunders_last_four_steps_and_the_labels_show_the_way_out(tmp_path):
    """Stops labels that imitate a drop or a missed grasp, and blunders too short to drop or miss anything."""
    settings = ARGS | {"num_demos": 2, "num_envs": 2, "max_episode_steps": 60}
    record(Args(output=str(tmp_path), **settings, blunder_probability=0.05))
    labels = load_demos(tmp_path).actions
    with h5py.File(tmp_path / "trajectory.h5") as file:
        groups = [file[f"traj_{k}"] for k in range(2)]
        executed = np.concatenate([group["actions"][:] for group in groups])
        lengths = [len(group["actions"]) for group in groups]
        assert all(group["success"][-1] for group in groups)
    flipped = executed[:, 6] != labels[:, 6]
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], flipped[: lengths[0]], [0]]))))[::2]
    assert runs.max() >= 4 and (runs[:-1] >= 4).all(), "only the episode's end may cut a blunder"
    assert np.array_equal(executed[:, :6], labels[:, :6])
    assert set(labels[:, 6].tolist()) == {-1.0, 1.0} and max(lengths) > 26, "nothing had to be recovered from"


# --- statistics and tokens ---
def test_statistics_are_symmetric_with_floors():
    """Stops bins that have no zero, and dimensions whose whole range is rounding noise."""
    actions = np.zeros((1000, 7))
    actions[:, 0] = np.linspace(-0.02, 0.04, 1000)
    statistics = action_statistics(actions)
    assert statistics["q99"] == pytest.approx([0.0394, 0.01, 0.01, 0.05, 0.05, 0.05, 1.0])
    assert statistics["q01"] == pytest.approx([-0.0394, -0.01, -0.01, -0.05, -0.05, -0.05, -1.0])
    assert statistics["mask"] == [True] * 6 + [False]
    plain = action_statistics(actions, floors=None)  # of what never moves every token would decode to the same number
    assert plain["q01"][:4] == pytest.approx([-0.0194, -0.01, -0.01, -0.05])
    assert plain["q99"][:4] == pytest.approx([0.0394, 0.01, 0.01, 0.05])


def test_tokens_decode_to_the_expert_s_actions_within_half_a_bin():
    """Stops statistics and tokens that cannot express the data."""
    data, model = load_demos(recorded_demos()), load_vla("tiny")
    model.norm_stats["demos"] = {"action": data.statistics}
    decoded = model.actions_from_tokens(model.tokens_from_actions(data.actions, "demos"), "demos").numpy()
    bins = (np.array(data.statistics["q99"]) - np.array(data.statistics["q01"])) / 255
    assert np.all(np.abs(decoded - data.actions) <= bins / 2 + 1e-6)
    assert np.all(decoded[:, 3:5] == 0.0), "zero must be exactly a bin"
    assert np.array_equal(decoded[:, 6] > 0.5, data.actions[:, 6] > 0.5)


def test_idle_steps_follow_the_published_rule():
    """Stops a filter that drops the steps in which only the gripper acts."""
    actions = np.zeros((6, 7))
    actions[:, 6] = [1, 1, -1, -1, 1, 1]
    actions[1, 0], actions[3, 5] = 0.011, 0.05
    assert moving_steps(actions, "published").tolist() == [1, 2, 4]
    assert moving_steps(actions, "none").tolist() == [0, 1, 2, 3, 4, 5]


def test_still_steps_are_those_without_any_command():
    """Stops a filter that drops slow moves, the closing of the gripper, or all rest after success."""
    actions = np.zeros((9, 7))
    actions[:, 6] = [1, 1, -1, -1, -1, 1, 1, 1, 1]
    actions[1, 0], actions[4, 5] = 0.005, -0.05
    assert moving_steps(actions, "still").tolist() == [1, 2, 4, 5, 7, 8]


# --- bad input ---
def spoil_h5(path, function):
    with h5py.File(path / "trajectory.h5", "a") as file:
        function(file)


def spoil_json(path, function):
    header = json.loads((path / "trajectory.json").read_text())
    function(header)
    (path / "trajectory.json").write_text(json.dumps(header))


def truncate(path):
    whole = (path / "trajectory.h5").read_bytes()
    (path / "trajectory.h5").write_bytes(whole[: len(whole) // 2])


def other_actions(file):
    actions = file["traj_3/actions"][:, :6]
    del file["traj_3/actions"]
    file["traj_3/actions"] = actions


BAD = {
    "truncated": (truncate, r"trajectory\.h5 .*truncated"),
    "not hdf5": (lambda path: (path / "trajectory.h5").write_text("x"), r"trajectory\.h5 is not a readable HDF5"),
    "broken json": (lambda path: (path / "trajectory.json").write_text("{"), r"trajectory\.json is not valid JSON"),
    "no statistics": (
        lambda path: spoil_json(path, lambda header: header["statistics"]["action"].pop("q01")),
        r"trajectory\.json has no key 'q01'",
    ),
    "six dimensions": (lambda path: spoil_h5(path, other_actions), r"traj_3/actions is \(\d+, 6\), not \(\d+, 7\)"),
    "no images": (lambda path: spoil_h5(path, lambda file: file.__delitem__("traj_2/obs")), r"traj_2 cannot be read"),
    "no episode": (lambda path: spoil_h5(path, lambda file: file.__delitem__("traj_9")), r"traj_9 cannot be read"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named(what, tmp_path):
    """Stops a training on half a data set, and errors that do not say which file and key is wrong."""
    spoil, message = BAD[what]
    shutil.copytree(recorded_demos(), tmp_path / "main")
    spoil(tmp_path / "main")
    with pytest.raises(ValueError, match=message):
        load_demos(tmp_path / "main")


def test_missing_or_too_few_demos_are_named(tmp_path):
    """Stops silent use of fewer demonstrations than asked for."""
    with pytest.raises(FileNotFoundError, match="make it with: python -m common.simulation.demos"):
        load_demos(tmp_path)
    with pytest.raises(ValueError, match="num_demos = 11, but .* holds 10"):
        load_demos(recorded_demos(), num_demos=11)
    assert len(load_demos([recorded_demos()] * 2, num_demos=3).instructions) == 6


@pytest.mark.parametrize("wrong", [{"num_demos": 0}, {"hold_steps": -1}, {"noise_probability": 15.0}])
def test_numbers_that_make_no_recording_are_refused(wrong, tmp_path):
    """Stops percent taken for a share, and a call that records nothing and says so nowhere."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .* must be . to .*; use"):
        record(Args(output=str(tmp_path / "new"), **wrong))
    assert not (tmp_path / "new").exists()


def test_more_demonstrations_than_configurations_are_refused(tmp_path):
    """Stops hours of episodes that can only repeat what is recorded."""
    with pytest.raises(ValueError, match="num_demos = 4000 must be <= 2822, nine tenths of the configurations"):
        record(Args(output=str(tmp_path), task="single", num_demos=4000))
