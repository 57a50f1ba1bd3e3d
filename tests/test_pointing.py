"""Pointing scenes, the small model's pre-training data, on the real simulator."""

import json
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from common.run.evaluate import held_out
from common.simulation.demos import load_demos
from tiny.pointing import Args, answer, noise_table, places, record, with_fillers

ARGS = dict(poses_per_scene=8, num_workers=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("pointing") / "main"
    record(Args(output=str(path), num_scenes=4, **ARGS))
    return path


def test_answers_are_the_geometry_of_the_scene(path):
    """Stops answers in another frame, an object that stays in the hand for the next pose, a held object elsewhere."""
    data = load_demos(path)
    answers = data.actions
    assert 24 <= len(answers) <= 32 and answers.shape[1] == 7 and np.isfinite(answers).all()
    between = answers[:, :2] - answers[:, 3:5]  # object - receptacle: the arm's pose drops out
    num_held = 0
    for number in range(4):
        mine = data.episodes == number
        away = np.linalg.norm(answers[mine, :3], axis=1) > 0.03
        rest = between[mine][away][0]
        moved = np.abs(between[mine] - rest).max(1) > 1e-4
        assert not (moved & away).any()
        assert np.ptp(np.linalg.norm(answers[mine, 5:], axis=1)) < 0.1, "the elongation is the object's alone"
        num_held += moved.sum()
    assert 4 <= num_held <= 16
    assert np.abs(answers[:, 5:]).max() <= 1.0 and np.ptp(answers[:, :2]) > 0.1


def test_lie_of_an_object_by_hand():
    """Stops a sine of the wrong sign, the long axis in place of the short one, and corners of round objects."""
    q = lambda degrees: [np.cos(np.deg2rad(degrees) / 2), 0, 0, np.sin(np.deg2rad(degrees) / 2)]  # noqa: E731
    down = [0.0, 1.0, 0.0, 0.0]  # half a turn about x: the closing axis y becomes -y
    state = {"object_bbox": [[[-0.04, -0.01, -0.01], [0.04, 0.01, 0.01]]], "plate_pose": [[0.0, 0.1, 0.9, 1, 0, 0, 0]]}
    state |= {"base_pose": [[0, 0, 0.9, 1, 0, 0, 0]], "tcp_pose": [[0.1, 0, 1.0, *down]]}
    state = {key: np.array(value, float) for key, value in state.items()}
    for degrees, lie in ((0, (-0.75, 0)), (90, (0.75, 0)), (45, (0, -0.75)), (-45, (0, 0.75)), (180, (-0.75, 0))):
        state["object_pose"] = np.array([[0.0, 0.0, 0.9, *q(degrees)]])
        assert np.allclose(answer(places(state)), [-0.1, 0, -0.1, -0.1, 0.1, *lie], atol=1e-6)
        assert np.allclose(places(state)[[0, 1, 2, 7, 8, 9]], [0, 0, 0, 0.1, 0, 0.1], atol=1e-6)
    assert np.allclose(answer(np.stack([places(state)] * 2)), answer(places(state))), "of many as of one"
    state["object_bbox"][0, :, :2] = [[-0.02, -0.02], [0.02, 0.02]]
    assert np.allclose(answer(places(state))[5:], 0)


def test_the_arm_s_turn_turns_its_own_axis_and_nothing_else():
    """Stops an axis that is mistaken for the gripper's, and a base that stands askew: answers are in its axes."""
    q = lambda degrees: [np.cos(np.deg2rad(degrees) / 2), 0, 0, np.sin(np.deg2rad(degrees) / 2)]  # noqa: E731
    state = {"object_bbox": [[[-0.04, -0.01, -0.01], [0.04, 0.01, 0.01]]], "plate_pose": [[0.0, 0.1, 0.9, 1, 0, 0, 0]]}
    state |= {"base_pose": [[0.2, 0, 0.9, *q(30)]], "tcp_pose": [[0.1, 0, 1.0, *q(50)]]}
    state |= {"object_pose": [[0.0, 0.0, 0.9, *q(70)]]}
    state = {key: np.array(value, float) for key, value in state.items()}
    before = places(state)
    state["tcp_pose"][0, 3:] = q(65)
    after = places(state)
    assert np.allclose(before[:10], after[:10], atol=1e-6)
    lie, *closing = np.rad2deg([np.arctan2(x[1], x[0]) / 2 for x in (before[5:7], before[10:], after[10:])])
    assert np.allclose([lie, *closing], [70 - 30 - 90, 50 - 30 - 90, 65 - 30 - 90], atol=1e-3)
    assert np.allclose(answer(before), answer(after))
    c, s = np.cos(np.deg2rad(30)), np.sin(np.deg2rad(30))
    assert np.allclose(answer(after)[:2], [-0.1 * c, 0.1 * s], atol=1e-6), "the world's -x in the base's axes"


def test_pictures_differ_and_scenes_are_for_training(path):
    """Stops one picture for all poses (a renderer that is not updated), and evaluation scenes in the data."""
    data = load_demos(path)
    pictures = data.images.reshape(len(data.images), -1).astype(int)
    first = np.flatnonzero(data.episodes == 0)
    assert min(np.abs(pictures[a] - pictures[b]).mean() for a, b in zip(first, first[1:], strict=False)) > 0.2
    assert not held_out("main", "train", data.episode_ids).any()
    assert json.loads((path / "trajectory.json").read_text())["settings"]["image_size"] == [160, 120]


def test_a_scene_depends_on_seed_and_number_alone(path, tmp_path):
    """Stops data that change with the workers or, but for redrawn ids, with num_scenes; and a call that overwrites."""
    with pytest.raises(FileExistsError, match="never overwritten"):
        record(Args(output=str(path), **ARGS))
    record(Args(output=str(tmp_path / "again"), num_scenes=2, **ARGS))
    again, data = load_demos(tmp_path / "again"), load_demos(path)
    assert np.array_equal(again.actions, data.actions[: len(again.actions)])
    assert np.array_equal(again.images, data.images[: len(again.images)])


def test_refused_before_anything_starts(tmp_path):
    """Stops an empty file after minutes of simulation."""
    with pytest.raises(ValueError, match="num_scenes = 0"):
        record(Args(output=str(tmp_path), num_scenes=0))


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    """Stops a recording without Vulkan, or one whose process was killed for memory, from waiting for ever."""
    monkeypatch.setenv("VK_DRIVER_FILES", str(tmp_path / "none.json"))
    monkeypatch.setenv("VK_ICD_FILENAMES", str(tmp_path / "none.json"))
    with pytest.raises(BrokenProcessPool):
        record(Args(output=str(tmp_path / "new"), num_scenes=2, **ARGS))
    assert not (tmp_path / "new/trajectory.h5").exists()


def test_variation():
    """Stops noise of one grain or colour only, and fillers that change the instruction itself."""
    rng = np.random.default_rng(0)
    tables = [noise_table(rng, 160, 120) for _ in range(20)]
    assert all(table.shape == (120, 160, 3) and table.dtype == np.uint8 for table in tables)
    assert np.std([table.mean() for table in tables]) > 10 and np.ptp([np.diff(t, axis=0).std() for t in tables]) > 5
    texts = [with_fillers("put carrot on plate", rng) for _ in range(50)]
    assert all(f" {text} ".count(" put carrot on plate ") == 1 and text == text.strip() for text in texts)
    assert len(set(texts)) > 20 and max(len(text.split()) for text in texts) <= 10
