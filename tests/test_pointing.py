"""Pointing scenes and the pre-training on them, on the real simulator."""

import h5py
import numpy as np
import pytest
import torch

from common.model.checkpoints import load_vla
from common.simulation.assets import load_pack
from common.simulation.episodes import held_out
from demonstrations.reader import load_demos
from tiny import pointing, pretrain
from tiny.pointing import answer, places


# --- the answers ---
def q(degrees):
    return [np.cos(np.deg2rad(degrees) / 2), 0, 0, np.sin(np.deg2rad(degrees) / 2)]


def state_of(object_degrees, tcp=(1, 0, 0, 0), base=(0.0, 0.0)):
    """A bar of 8 by 2 cm in the middle, a plate beside it; base: x, degrees."""
    state = {
        "object_bbox": [[[-0.04, -0.01, -0.01], [0.04, 0.01, 0.01]]],
        "object_pose": [[0.0, 0.0, 0.9, *q(object_degrees)]],
        "plate_pose": [[0.0, 0.1, 0.9, 1, 0, 0, 0]],
        "tcp_pose": [[0.1, 0, 1.0, *tcp]],
        "base_pose": [[base[0], 0, 0.9, *q(base[1])]],
    }
    return {key: np.array(value, float) for key, value in state.items()}


@pytest.mark.parametrize(
    "degrees, lie", [(0, (-1, 0)), (90, (1, 0)), (45, (0, -1)), (-45, (0, 1)), (180, (-1, 0))]
)
def test_answers_by_hand(degrees, lie):
    """Stops a sine of the wrong sign, the long axis for the short one, corners of round objects."""
    state = state_of(degrees)
    want = [-0.1, 0, -0.1, -0.1, 0.1, 0.75 * lie[0], 0.75 * lie[1]]
    assert np.allclose(answer(places(state)), want, atol=1e-6)
    assert np.allclose(answer(np.stack([places(state)] * 2)), want, atol=1e-6), "as of one"
    state["object_bbox"][0, :, :2] = [[-0.02, -0.02], [0.02, 0.02]]
    assert np.allclose(answer(places(state))[5:], 0)


def test_the_arm_s_turn_turns_its_own_axis_and_nothing_else():
    """Stops an axis that is mistaken for the gripper's, and answers in another frame's axes."""
    before, after = (places(state_of(70, q(turn), base=(0.2, 30))) for turn in (50, 65))
    assert np.allclose(before[:10], after[:10], atol=1e-6)
    angles = [
        np.rad2deg(np.arctan2(x[1], x[0]) / 2) for x in (before[5:7], before[10:], after[10:])
    ]
    assert np.allclose(angles, [70 - 30 - 90, 50 - 30 - 90, 65 - 30 - 90], atol=1e-3)
    c, s = np.cos(np.deg2rad(30)), np.sin(np.deg2rad(30))
    assert np.allclose(answer(after)[:2], [-0.1 * c, 0.1 * s], atol=1e-6)


# --- the losses ---
def test_place_loss_counts_where_a_thing_is_shown():
    """Stops a place that is asked of tokens that do not show it, and another thing's numbers."""
    shown, right = torch.zeros(2, 4, 3, dtype=torch.bool), torch.zeros(2, 12)
    wrong = torch.full((2, 4, 12), 5.05)  # a loss of 5 in every number
    assert pretrain.place_loss(wrong, right, shown) == 0, "nothing is shown"
    for thing, numbers in enumerate(((0, 1, 2, 5, 6), (3, 4), (7, 8, 9, 10, 11))):
        one, guess = shown.clone(), wrong.clone()
        one[0, 1:3, thing] = True
        guess[0, 1:3, numbers] = 0
        assert pretrain.place_loss(guess, right, one) == 0
        found = pretrain.place_loss(wrong, right, one).item()
        assert found == pytest.approx(5.0 * len(numbers) / 24)


def test_spread_labels():
    """Stops a label distribution that is shifted against the token; by hand, 2 bins wide."""
    logprobs = torch.randn(4, 7, 256, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    bins = torch.tensor([0, 100, 200, 255])[:, None].expand(4, 7)
    weights = torch.exp(-0.125 * (torch.arange(256) - bins[..., None]).double() ** 2)
    by_hand = -(weights / weights.sum(-1, keepdim=True) * logprobs.double()).sum(-1)
    spread = pretrain.spread_cross_entropy(logprobs, bins, 2.0)
    assert torch.allclose(spread.double(), by_hand, atol=1e-5)


# --- on the simulator ---
@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pointing")
    for name, task in (("one", "main"), ("two", "multi_carrot")):
        pointing.main(pointing.Args(output=str(folder / name), num_scenes=4, task=task))
    return str(folder / "one"), str(folder / "two")


@pytest.mark.long
def test_answers_are_the_geometry_of_the_scene(paths):
    """Stops an object that stays in the hand for the next pose, one picture for all poses, and
    evaluation scenes in the data."""
    data = load_demos(paths[0])
    answers = data.actions
    assert 24 <= len(answers) <= 32 and np.isfinite(answers).all()
    assert not held_out("main", "train", data.episode_ids).any()
    between = answers[:, :2] - answers[:, 3:5]  # object - receptacle: the arm's pose drops out
    num_held = 0
    for number in range(4):
        mine = data.episodes == number
        away = np.linalg.norm(answers[mine, :3], axis=1) > 0.03
        moved = np.abs(between[mine] - between[mine][away][0]).max(1) > 1e-4
        assert not (moved & away).any()
        num_held += moved.sum()
        pictures = data.images[mine].astype(int)
        assert np.abs(np.diff(pictures, axis=0)).mean((1, 2, 3)).min() > 0.2
    assert 4 <= num_held <= 16


@pytest.mark.long
def test_classes_lie_where_the_model_sees_them(paths):
    """Stops labels that are shifted, transposed or of another cell than their image token, and a
    distractor that is labelled as table or as the object that is named."""
    names = [body.name for body in load_pack("primitive").objects]
    for path, num_objects in zip(paths, (1, 2), strict=True):
        data = pretrain.load(path, load_vla("tiny").vision_backbone)
        images, classes, shown = data["images"], data["classes"], data["shown"]
        assert images.shape[1:] == (80, 112, 3) and classes.shape[1:] == (35, 16)
        with h5py.File(f"{path}/trajectory.h5") as file:
            whole = np.concatenate([file[f"traj_{k}"]["classes"][:] for k in range(len(file))])
        # token 9: second row, third cell
        for token, row, column in ((0, 13, 8), (9, 13 + 8, 8 + 16), (34, 13 + 32, 8 + 48)):
            cell = whole[:, row : row + 8 : 2, column : column + 8 : 2]
            assert np.array_equal(classes[:, token].numpy(), cell.reshape(len(cell), 16))
        for row, text in enumerate(data["texts"]):
            named = next(k for k, name in enumerate(names) if f"put {name} on" in text)
            here = (classes[row] == pointing.OBJECTS + named).any(1)
            assert torch.equal(shown[row, :, 0], here)
        for scene in range(4):
            objects = classes[data["scenes"] == scene].unique()
            assert (objects >= pointing.OBJECTS).sum() == num_objects


@pytest.mark.long
def test_both_stages_learn_and_the_model_is_a_start(paths, tmp_path, capsys):
    """Stops a stage that trains nothing, and a model that does not load."""
    args = dict(demos=paths, batch_size=16, val_scenes=1, dtype="float32", seed=3)
    updates = dict(eyes_updates=250, pointing_updates=250)
    pretrain.main(pretrain.Args(output=str(tmp_path / "made"), **updates, **args))
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    eyes, point = (float(line.split("loss")[1]) for line in lines)
    assert eyes < 2.0 and point < 5.2, "untrained: 3.4 + 0.8, and ln 256 = 5.5 nats"
    made = load_vla(tmp_path / "made")
    random = dict(load_vla("tiny", seed=3).named_parameters())
    moved = {name for name, p in made.named_parameters() if not torch.equal(p, random[name])}
    assert any("convs" in name for name in moved) and any("layers.3" in name for name in moved)
    assert made.unnorm_key == "pointing"
    with pytest.raises(FileExistsError, match="never overwritten"):
        pretrain.main(pretrain.Args(output=str(tmp_path / "made"), **args))
