"""Pre-training of the small model, on pictures of the real simulator."""

import h5py
import numpy as np
import pytest
import torch

from common.model.openvla import load_vla
from common.simulation.assets import load_pack
from tiny import pointing, pretrain


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    for name, task in (("one", "main"), ("two", "multi_carrot")):
        pointing.record(pointing.Args(output=str(folder / name), num_scenes=4, task=task, num_workers=1))
    return str(folder / "one"), str(folder / "two")


def test_classes_lie_where_the_model_sees_them(paths):
    """Stops labels that are shifted, transposed or of another cell than their image token."""
    stem = load_vla("tiny").backbone.vision_backbone
    images, classes, shown, places, texts, scenes = pretrain.load(paths[0], stem)
    assert images.shape[1:] == (80, 112, 3) and classes.shape[1:] == (35, 16)
    assert len(images) == len(classes) == len(shown) == len(places) == len(texts) == len(scenes)
    seen = set(classes.unique().tolist())
    assert {0, pointing.ARM, pointing.FINGERS, pointing.RECEPTACLE} < seen and max(seen) >= pointing.OBJECTS
    with h5py.File(f"{paths[0]}/trajectory.h5") as file:
        whole = np.concatenate([file[f"traj_{k}"]["classes"][:] for k in range(len(file))])
    for token, row, column in (
        (0, 13, 8),
        (9, 13 + 8, 8 + 16),
        (34, 13 + 32, 8 + 48),
    ):  # token 9: second row, third cell
        cell = whole[:, row : row + 8 : 2, column : column + 8 : 2]
        assert np.array_equal(classes[:, token].numpy(), cell.reshape(len(cell), 16))
    # the arm is dark, the receptacle bright: the pixels under the labels say that they are the same picture
    labels = classes.view(-1, 5, 7, 4, 4).transpose(2, 3).reshape(-1, 20, 28)
    pixels = images[:, ::4, ::4].float().mean(-1)
    assert pixels[labels == pointing.ARM].mean() + 30 < pixels[labels == pointing.RECEPTACLE].mean()


def test_two_objects_have_two_classes(paths):
    """Stops a distractor that is labelled as table, or as the object that is named."""
    _, classes, *_, scenes = pretrain.load(paths[1], load_vla("tiny").backbone.vision_backbone)
    for scene in range(4):
        objects = classes[torch.from_numpy(scenes == scene)].unique()
        assert (objects >= pointing.OBJECTS).sum() == 2


def test_tokens_that_show_the_named_object(paths):
    """Stops eyes that are taught the place of the other object, or at tokens that do not show it."""
    names = [body.name for body in load_pack("primitive").objects]
    for path in paths:
        _, classes, shown, _, texts, _ = pretrain.load(path, load_vla("tiny").backbone.vision_backbone)
        for row, text in enumerate(texts):
            named = pointing.OBJECTS + next(k for k, name in enumerate(names) if f"put {name} on" in text)
            assert torch.equal(shown[row, :, 0], (classes[row] == named).any(1))
        assert torch.equal(shown[..., 2], (classes == pointing.FINGERS).any(2))
        assert 0 < pretrain.all_in_view(shown).float().mean() and shown[..., 0].any()


def test_place_loss_counts_where_a_thing_is_shown():
    """Stops a place that is asked of tokens that do not show it, and numbers that belong to another thing."""
    shown, places = torch.zeros(2, 4, 3, dtype=torch.bool), torch.zeros(2, 12)
    guess = torch.full((2, 4, 12), 5.05)  # a loss of 5 in every number
    assert pretrain.place_loss(guess, places, shown) == 0, "nothing is shown"
    for thing, numbers in enumerate(((0, 1, 2, 5, 6), (3, 4), (7, 8, 9, 10, 11))):
        one = shown.clone()
        one[0, 1:3, thing] = True
        right = guess.clone()
        right[0, 1:3, numbers] = 0
        assert pretrain.place_loss(right, places, one) == 0
        assert torch.isclose(pretrain.place_loss(guess, places, one), torch.tensor(5.0 * len(numbers) / 24))


def test_of_two_objects_the_overview_is_not_asked(paths):
    """Stops eyes that shall know which of two objects is meant, which only the text tells."""
    stem = load_vla("tiny").backbone.vision_backbone
    for path, alone in zip(paths, (True, False), strict=True):
        images, classes, shown, places, _, _ = pretrain.load(path, stem)
        both = torch.stack([(classes == k).flatten(1).any(1) for k in range(pointing.OBJECTS, 32)]).sum(0)
        rows = torch.nonzero(shown.any(1).all(1) & (both == (1 if alone else 2))).flatten()[:4]
        heads = pretrain.eyes_heads(stem, classes.shape[2])
        pretrain.eyes_loss(
            stem, heads, images[rows], classes[rows], shown[rows], torch.from_numpy(places[rows])
        ).backward()
        moved = heads[2].weight.grad.abs().sum(1) > 0
        of_object = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool)
        assert len(rows) and moved[~of_object].all() and (moved[of_object] == alone).all()
        assert (heads[1].weight.grad.abs().sum(1) > 0).all(), "at its own tokens the named one is asked for"


def test_both_stages_learn_and_the_model_is_a_start(paths, tmp_path, capsys):
    """Stops a stage that trains nothing, a model that does not load, and eyes that the second stage forgets."""
    args = dict(demos=paths, batch_size=16, val_scenes=1, dtype="float32", seed=3)
    pretrain.main(pretrain.Args(output=str(tmp_path / "made"), eyes_updates=250, pointing_updates=250, **args))
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    eyes, point = (float(line.split("loss")[1]) for line in lines)
    assert eyes < 2.0 and point < 5.2, "untrained: 3.4 + 0.8, and ln 256 = 5.5 nats"
    made, random = load_vla(tmp_path / "made"), load_vla("tiny", seed=3)
    moved = {n for (n, p), q in zip(made.named_parameters(), random.parameters(), strict=True) if not torch.equal(p, q)}
    assert any("convs" in n for n in moved) and any("layers.3" in n for n in moved)
    assert list(made.norm_stats) == ["pointing"] and made.norm_stats["pointing"]["assets"] == "primitive"


def test_degrees_between_axes():
    """Stops 180 degrees between an axis and itself, and an angle that is not halved again."""
    axis = lambda degrees: np.array([[np.cos(2 * np.deg2rad(degrees)), np.sin(2 * np.deg2rad(degrees))]])  # noqa: E731
    for found, right, off in ((10, 40, 30), (85, -85, 10), (0, 90, 90), (200, 20, 0)):
        assert np.allclose(pretrain.degrees_off(axis(found), 0.7 * axis(right)), off)


def test_spread_labels():
    """Stops a label distribution that is shifted against the token, and a small width that is not the plain loss."""
    logprobs = torch.randn(4, 7, 256, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    bins = torch.tensor([0, 100, 200, 255])[:, None].expand(4, 7)
    plain = -logprobs.gather(-1, bins[..., None])[..., 0]
    assert torch.allclose(pretrain.spread_cross_entropy(logprobs, bins, 0.05), plain, atol=1e-5)
    weights = torch.exp(-0.125 * (torch.arange(256) - bins[..., None]).double() ** 2)  # 2 bins wide, by hand
    by_hand = -(weights / weights.sum(-1, keepdim=True) * logprobs.double()).sum(-1)
    assert torch.allclose(pretrain.spread_cross_entropy(logprobs, bins, 2.0).double(), by_hand, atol=1e-5)


def test_bad_input_is_refused(paths, tmp_path):
    """Stops a long wait before a wrong value, a missing recording or an existing model is noticed."""
    good = dict(demos=paths, output=str(tmp_path / "new"))
    for change, error, words in (
        (dict(batch_size=0), ValueError, "batch_size = 0 must be >= 1"),
        (dict(label_std=99.0), ValueError, "label_std = 99"),
        (dict(demos=("demos/none",)), FileNotFoundError, "trajectory.h5 is missing; make it with"),
        (dict(output="checkpoints/tiny-warmup"), FileExistsError, "never overwritten"),
    ):
        with pytest.raises(error, match=words):
            pretrain.check_args(pretrain.Args(**good | change))


def test_old_recordings_are_refused(paths, tmp_path):
    """Stops a KeyError for a recording that was made before classes were stored."""
    (tmp_path / "old").mkdir()
    with h5py.File(f"{paths[0]}/trajectory.h5") as file, h5py.File(tmp_path / "old/trajectory.h5", "w") as old:
        file.copy("traj_0", old)
        del old["traj_0/classes"]
    with pytest.raises(ValueError, match="no pixel classes, places or object; record it again"):
        pretrain.load(str(tmp_path / "old"), load_vla("tiny").backbone.vision_backbone)
