"""Behaviour cloning: data, update, learning, statistics, on real demonstrations."""

import dataclasses

import numpy as np
import pytest
import running
import torch
from recorded_demos import recorded_demos
from test_checkpoints import refused

import sft_vla
from common.model.checkpoints import load_vla, trainable_parameters
from demonstrations.pictures import augment
from sft_vla import PRESETS, cross_entropy, load_data, minibatch, update_policy, validate


def args_of(flags="", **changes):
    return dataclasses.replace(running.parse("sft", flags)[1], **changes)


def start(args):
    """A random model, demonstrations, rows to train on and rows for validation."""
    model = load_vla("tiny", seed=1)
    return model, *load_data(args, model)


def one_update(args, **changes):
    """Weights after a step of plain gradient descent, and its metrics."""
    model, demos, rows, _ = start(args)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.0)
    args = dataclasses.replace(args, num_updates=1, learning_rate=0.1, **changes)
    metrics = update_policy(model, optimizer, demos, rows, 0, args)
    weights = torch.cat([p.detach().flatten() for p in trainable_parameters(model)])
    return weights, metrics


def test_validation_is_of_every_directory_and_its_scenes_are_not_trained_on():
    """Stops validation of the last directory alone, and on what training shows."""
    sources = np.array([0] * 10 + [1] * 6)
    assert sft_vla.validation_episodes(sources, 3).tolist() == [9, 15, 8]
    scenes = np.array(["a", "b", "c", "a", "d"])
    assert sft_vla.episodes_of_other_scenes(scenes, np.array([3])).tolist() == [1, 2, 4]
    path = str(recorded_demos())
    for demos, most, val in (((path,), 10, {8, 9}), ((path, path), 20, {9, 19, 8})):
        _, data, *rows = start(args_of(demos=demos, val_demos=len(val)))
        train, held_back = (set(data.episodes[part]) for part in rows)
        assert held_back == val and train == set(range(most)) - {8, 9, 18, 19}
        assert data.images.dtype == torch.uint8 and len(data.images) == len(data.actions)
        counts = [np.isin(data.episodes, list(episodes)).sum() for episodes in (train, val)]
        assert counts == [len(set(part.tolist())) for part in rows], "whole episodes"


def test_minibatches_and_learning_rates():
    """Stops samples seen twice, orders that depend on a resume, equal changes, an endless rise."""
    rows = torch.cat([minibatch(step, 10, 3, seed=1) for step in range(3)])
    assert len(set(rows.tolist())) == 9
    assert not torch.equal(minibatch(0, 10, 3, seed=1), minibatch(3, 10, 3, seed=1))
    assert sorted(minibatch(0, 10, 99, seed=1).tolist()) == list(range(10))
    # Augmentation does not move the scene by centimetres or depend on global state
    images = torch.randint(0, 256, (1, 8, 11, 3), dtype=torch.uint8)
    images = images.repeat_interleave(10, 1).repeat_interleave(10, 2).repeat(64, 1, 1, 1)
    first, again, other = [augment(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert first.shape == images.shape and first.dtype == torch.uint8
    assert first.equal(again) and not first.equal(other)
    before = images[:, 5::10, 5::10].float().flatten(1)
    after = first[:, 5::10, 5::10].float().flatten(1)
    alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(before, after, strict=True)]
    assert min(alike) > 0.6 and np.mean(alike) > 0.9
    assert torch.unique(first.float().mean((1, 2, 3))).numel() > 50, "all got the same change"
    args = args_of("--num-iterations 2 --num-updates 50 --learning-rate 1", warmup_updates=10)
    constant = dataclasses.replace(args, lr_schedule="constant")
    assert [sft_vla.scheduled_lr(step, constant) for step in (0, 4, 10)] == [0.1, 0.5, 1.0]
    assert sft_vla.scheduled_lr(50, args) == pytest.approx(0.5)
    assert sft_vla.scheduled_lr(99, args) == pytest.approx(0.000247, abs=1e-6)


def test_parts_and_ranks_give_the_same_update(monkeypatch):
    """Stops a scale that depends on micro-batches, ranks that drift apart, an unwanted clip."""
    args = args_of("--augment")
    whole, metrics = one_update(args)
    parts, _ = one_update(args, micro_batch_size=3)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
    model, demos, train, _ = start(args)
    rows = train[minibatch(0, len(train), 8, args.run.seed)]
    generator = torch.Generator().manual_seed(args.run.seed * 2**32)
    loss = cross_entropy(model, demos, rows, augment(demos.images[rows], generator)).mean().item()
    assert metrics["losses/cross_entropy"] == pytest.approx(loss, abs=1e-5)
    assert loss == pytest.approx(np.log(256), abs=1.5), "random weights are near uniform"
    moved = {}
    before, _ = one_update(args, max_grad_norm=1e-30)
    clipped, metrics = one_update(args, max_grad_norm=0.1)
    for place in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(sft_vla, "rank_and_world_size", lambda place=place: place)
        moved[place] = one_update(args, max_grad_norm=None)[0] - before
    norm, both = metrics["losses/grad_norm"], moved[0, 2] + moved[1, 2]
    assert norm > 0.1
    assert (clipped - before).norm().item() == pytest.approx(0.1 * 0.1, rel=0.01)
    assert moved[0, 1].norm().item() == pytest.approx(0.1 * norm, rel=0.01)
    torch.testing.assert_close(both, moved[0, 1], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(moved[0, 2], moved[1, 2], rtol=0.1), "the check sees nothing"


def test_learns_three_demonstrations_by_heart(monkeypatch):
    """Stops tokens, a loss or a measure that cannot even memorise; shuffled pictures are worse."""
    args = args_of("--batch-size 64 --num-demos 4 --val-demos 1 --num-updates 40")
    args = dataclasses.replace(args, micro_batch_size=64, learning_rate=2e-3, warmup_updates=15)
    model, demos, rows, _ = start(args)
    optimizer = torch.optim.AdamW(trainable_parameters(model))
    for first_step in (0, 40):
        update_policy(model, optimizer, demos, rows, first_step, args)
    learned = validate(model, demos, rows, 1024).means()
    assert learned["token_accuracy"] > 0.95 and learned["l1_xyz_mm"] < 2
    demos.images = demos.images[torch.randperm(len(demos.images))]
    shuffled = validate(model, demos, rows, 1024).means()
    assert shuffled["token_accuracy"] < learned["token_accuracy"] - 0.05
    # A decoded .3, at which the hand closes, does not count as open
    tokens = model.encode_actions(demos.actions[:8])
    tokens[:, 6] = model.bins.stop - 1 - 165
    assert model.decode_actions(tokens)[0, 6].item() == pytest.approx(0.3, abs=0.01)
    monkeypatch.setattr(model, "act", lambda *_, **__: (tokens, None, None))
    demos.actions[:8, 6] = [1, -1, -1, -1] * 2
    means = validate(model, demos, torch.arange(8), 8).means()
    assert means["gripper_accuracy"] == 0.75, "right where the label is closed"


def test_statistics_presets_and_bad_data(monkeypatch):
    """Stops a warm-up that replaces its statistics, other presets, no data, data of one rank."""
    kept, *_ = start(args_of("--statistics model"))
    assert kept.config.norm_stats == load_vla("tiny").config.norm_stats
    for statistics, symmetric in (("quantiles", False), ("symmetric", True)):
        model, *_ = start(args_of(f"--statistics {statistics}"))
        assert list(model.config.norm_stats) == [model.unnorm_key] == ["cleanvla"]
        ranges = model.config.norm_stats["cleanvla"]["action"]
        assert np.allclose(ranges["q01"][:6], -np.array(ranges["q99"][:6])) == symmetric
    assert [p.statistics for p in PRESETS.values()] == ["symmetric", "model", "quantiles"]
    refused("val_demos = 10", start, args_of("--val-demos 10"))
    refused("scene = small", sft_vla.main, args_of("--scene published --eval-every 0"))
    monkeypatch.setattr(sft_vla, "gather_over_ranks", lambda checksum: [checksum, 0])
    refused("differ between ranks", start, args_of())
