"""Pointing scenes and the pre-training on them, on the real simulator."""

from dataclasses import replace
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch
from test_checkpoints import refused

from common.model.checkpoints import load_vla
from common.simulation.tasks import TEMPLATES, position_set
from tiny import pointing, pretrain, scenes
from tiny.pointing import OBJECTS, RECEPTACLES, answer, places


# --- the answers ---
def q(degrees):
    return [np.cos(np.deg2rad(degrees) / 2), 0, 0, np.sin(np.deg2rad(degrees) / 2)]


def state_of(object_degrees):
    """A bar of 8 by 2 cm in the middle, a plate beside it; the base is turned by 90 degrees."""
    state = {
        "object_bbox": [[[-0.04, -0.01, -0.01], [0.04, 0.01, 0.01]]],
        "object_pose": [[0.0, 0.0, 0.9, *q(object_degrees)]],
        "plate_pose": [[0.0, 0.1, 0.9, 1, 0, 0, 0]],
        "tcp_pose": [[0.1, 0, 1.0, *q(0)]],
        "base_pose": [[0.0, 0, 0.9, *q(90)]],
    }
    return {key: np.array(value, float) for key, value in state.items()}


@pytest.mark.parametrize("degrees, lie", [(0, (-1, 0)), (90, (1, 0)), (45, (0, -1)), (-45, (0, 1))])
def test_answers_by_hand(degrees, lie):
    """Stops a wrong sign or frame, the long axis for the short one, corners of round objects."""
    state = state_of(degrees)
    want = [0, 0.1, -0.1, 0.1, 0.1, -0.75 * lie[0], -0.75 * lie[1]]
    assert np.allclose(answer(np.stack([places(state)] * 2)), want, atol=1e-6)
    state["object_bbox"][0, :, :2] = [[-0.02, -0.02], [0.02, 0.02]]
    assert np.allclose(answer(places(state))[5:], 0)


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
        loss = pretrain.place_loss(wrong, right, one).item()
        assert loss == pytest.approx(5.0 * len(numbers) / 24)


def test_names_end_where_they_are_said():
    """Stops a place that is asked of another word, or of the first of two words."""
    texts, read = ("move red bar to teal dish", "red bar", "teal dish"), load_vla("tiny").tokenizer
    ids, *pair = (read.encode(text, add_special_tokens=False).ids for text in texts)
    ends = pretrain.named_tokens(torch.tensor([ids]), 20, [pair])
    assert ends.nonzero().tolist() == [[0, 22, 0], [0, 25, 1]]


def test_spread_labels():
    """Stops a label distribution that is shifted against the token; by hand, 2 bins wide."""
    logprobs = torch.randn(4, 7, 256, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    bins = torch.tensor([0, 100, 200, 255])[:, None].expand(4, 7)
    weights = torch.exp(-0.125 * (torch.arange(256) - bins[..., None]).double() ** 2)
    by_hand = -(weights / weights.sum(-1, keepdim=True) * logprobs.double()).sum(-1)
    spread = pretrain.spread_cross_entropy(logprobs, bins, 2.0)
    assert torch.allclose(spread.double(), by_hand, atol=1e-5)


# --- the scenes ---
def test_scenes_are_broad_and_none_of_the_benchmark():
    """Stops bodies inside each other, and the benchmark's places and unseen wordings."""
    rngs = [np.random.default_rng(k) for k in range(400)]
    episodes = [scenes.random_episode(rng, scenes.random_bodies(rng)) for rng in rngs]
    assert {e.third for e in episodes} == {"none", "object", "plate"}
    assert {e.composite for e in episodes} == {"plain", "texture", "whole"}
    tables = np.concatenate([e.table for e in episodes])
    assert (tables < 16).any() and (tables >= 21).any() and not np.isin(tables, range(16, 21)).any()
    assert min(e.texture[0] for e in episodes) >= 21, "the benchmark's are seen in its rows alone"
    for which, own in (("object", 25), ("plate", 17)):
        numbers = np.concatenate([getattr(e, which) for e in episodes])
        assert set(range(own)) < set(numbers.tolist()) and numbers.max() > own + 50
    for e in episodes:
        same = e.third in ("object", "plate") and e.third_index == getattr(e, e.third)
        assert not same and np.linalg.norm(e.object_xyz - e.plate_xyz) > 0.05
        gaps = np.linalg.norm(e.object_xyz[:, :2] - position_set("P")[:, 0, :2], axis=1)
        assert gaps.min() > 1e-5
    texts = {scenes.random_text(np.random.default_rng(k), "carrot", "plate") for k in range(400)}
    asked = {text.format(o="carrot", r="plate").lower() for text in TEMPLATES[1:]}
    assert len(texts) > 150 and not texts & asked
    words, read = set(" ".join(texts).split()), load_vla("tiny").tokenizer.encode
    assert {word for word in words if "<unk>" in read(word).tokens} <= {"now", "top"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pointing")
    pointing.main(pointing.Args(str(folder), num_scenes=8, scenes_per_file=4, val_scenes=4))
    return folder


@pytest.mark.long
def test_answers_are_the_geometry_of_the_scene(folder):
    """Stops an object that stays in the hand for the next picture, bodies that stay or overlap."""
    data = pretrain.load(folder / "scenes-000000.h5")
    place, free = data["places"].numpy(), data["mode"].numpy() != 2
    assert 24 <= len(np.unique(place[:, 3:5], axis=0)) == len(place) <= 32
    assert np.linalg.norm(place[free, :2] - place[free, 3:5], axis=1).min() > 0.05
    assert np.abs(place[free, 2] - 0.02).max() < 0.02, "on the table, whose top is at 0"
    assert np.linalg.norm(answer(place)[~free, :3], axis=1).max() < 0.05


@pytest.mark.long
def test_bodies_lie_where_the_model_sees_them(folder):
    """Stops labels that are shifted, transposed or of another cell, a distractor that is named."""
    tokens = load_vla("tiny").vision_backbone.pos_embed.shape[1]
    for path in sorted(folder.glob("*.h5")):
        data = pretrain.load(path)
        with h5py.File(path) as file:
            whole = file["bodies"][:]
        assert data["bodies"].shape[1:] == (tokens, 64) and whole.shape[1:] == (30, 40)
        for token, row, column in ((0, 0, 0), (7, 8, 16), (19, 24, 32)):
            cell = np.zeros((len(whole), 8, 8))
            part = whole[:, row : row + 8, column : column + 8]
            cell[:, : part.shape[1]] = part
            assert np.array_equal(data["bodies"][:, token].numpy(), cell.reshape(len(cell), 64))
        for thing, first in ((0, OBJECTS), (1, RECEPTACLES)):
            meant = first + data[("object", "receptacle")[thing]]
            here = (data["bodies"] == meant[:, None, None]).any(2)
            assert torch.equal(data["shown"][:, :, thing], here)


@pytest.mark.long
def test_both_stages_learn_resume_and_the_model_is_a_start(folder, tmp_path, capsys, monkeypatch):
    """Stops a stage that trains nothing (100 updates: 32 and 6.5), a resume that is another run."""
    args = dict(scenes=str(folder), batch_size=16, report_every=100, seed=3)
    args.update(eyes_updates=200, pointing_updates=200)
    pretrain.main(pretrain.Args(output=str(tmp_path / "whole"), **args))
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[1] < 16 and losses[3] < 4.5, losses
    made = dict(load_vla(tmp_path / "whole").named_parameters())
    half, save = pretrain.Args(output=str(tmp_path / "half"), **args), Mock()
    write = pretrain.save_training
    for kill in (1, 2):  # in either stage, after the state was saved
        save.side_effect = [None] * kill + [KeyboardInterrupt]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pretrain, "save_training", lambda *given: (save(), write(*given)))
            pretrain.main(half)
    refused("'seed': 3", pretrain.main, replace(half, seed=4))
    pretrain.main(half)
    again = dict(load_vla(tmp_path / "half").named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in made.items())
