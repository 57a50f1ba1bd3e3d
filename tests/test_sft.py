"""Behaviour cloning: data, update, learning, checkpoints and resume, on demonstrations from the real simulator."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from recorded_demos import recorded_demos

import sft_vla
from common.model.openvla import load_vla
from common.simulation.demos import load_demos
from sft_vla import PRESETS, Args, augment, check_args, cross_entropy, load_data, main, minibatch, update, validate

KEYS = ("cross_entropy", "token_accuracy", "gripper_accuracy", "l1_xyz_mm", "l1_rotation_mrad")
METRICS = {f"{part}/{key}" for part in ("train", "val") for key in KEYS}
METRICS |= set("losses/cross_entropy losses/grad_norm charts/learning_rate time/update_s".split())


def small(**changes):
    args = Args(model="tiny", val_demos=2, batch_size=8, micro_batch_size=8, num_updates=2, eval_every=0)
    return replace(
        args,
        demos=(str(recorded_demos()),),
        warmup_updates=0,
        torch_threads=1,
        device="cpu",
        **dict(num_iterations=2) | changes,
    )


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- data ---
def test_validation_episodes_are_whole_and_never_trained_on():
    """Stops frames of one episode on both sides of the split, which would make validation meaningless."""
    model = load_vla("tiny", value_head=False)
    data, train, val, unnorm_key = load_data(small(), model)
    assert unnorm_key == "cleanvla" and list(model.norm_stats) == ["cleanvla"]
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(data["actions"])))
    assert 25 < len(val) < 70 and len(data["actions"]) > 180
    assert data["images"].dtype == torch.uint8 and len(data["images"]) == len(data["instructions"]) == len(
        data["actions"]
    )
    # Each episode ends with the same few resting steps; eight whole episodes are left.
    actions = data["actions"][train]
    assert int(((actions[1:, 6] - actions[:-1, 6]) < 0).sum()) == 8  # the gripper closes
    decoded = model.actions_from_tokens(data["action_tokens"], unnorm_key)
    assert (decoded - data["actions"]).abs().max() < 0.005


def test_validation_is_of_every_directory_and_its_scenes_are_not_trained_on(tmp_path):
    """Stops validation of the last directory alone, and on scenes that another recording of them teaches."""
    shutil.copytree(recorded_demos(), tmp_path / "again")
    header = json.loads((tmp_path / "again/trajectory.json").read_text())
    for entry in header["episodes"][:5]:  # other scenes; the other five are those of the first recording
        entry["reset_kwargs"]["options"]["episode_ids"] = [10**6 + entry["episode_id"]]
    (tmp_path / "again/trajectory.json").write_text(json.dumps(header))
    args, model = small(val_demos=3), load_vla("tiny", value_head=False)
    data, train, val, _ = load_data(replace(args, demos=(*args.demos, str(tmp_path / "again"))), model)
    episode = np.concatenate([first := load_demos(args.demos, drop_idle="still").episodes, first + 10])
    assert set(episode[val]) == {9, 19, 8} and set(episode[train]) == set(range(20)) - {9, 19, 8, 18}


def test_every_epoch_is_a_permutation():
    """Stops minibatches that see some samples twice and others never, and orders that depend on a resume."""
    rows = torch.cat([minibatch(number, 10, 3, seed=1) for number in range(3)])
    assert len(set(rows.tolist())) == 9
    assert not torch.equal(minibatch(0, 10, 3, seed=1), minibatch(3, 10, 3, seed=1))
    assert torch.equal(minibatch(7, 10, 3, seed=1), minibatch(7, 10, 3, seed=1))
    assert sorted(minibatch(0, 10, 99, seed=1).tolist()) == list(range(10))


def test_augmentation_keeps_the_picture():
    """Stops augmentations that move the scene by centimetres, leave the value range or depend on global state."""
    images = torch.randint(0, 256, (1, 8, 11, 3), dtype=torch.uint8).repeat_interleave(10, 1).repeat_interleave(10, 2)
    images = images.repeat(64, 1, 1, 1)
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == images.shape and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, other)
    blocks = images[:, 5::10, 5::10].float().flatten(1), first[:, 5::10, 5::10].float().flatten(1)
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(*blocks, strict=True)]
    assert min(correlations) > 0.6 and np.mean(correlations) > 0.9
    assert torch.unique(first.float().mean((1, 2, 3))).numel() > 50, "all images got the same change"


# --- update ---
def test_accumulation_gives_the_same_update():
    """Stops a loss whose scale depends on the micro-batch size."""
    weights = []
    for micro_batch_size in (8, 3):
        args = small(micro_batch_size=micro_batch_size, augment=True)
        model = load_vla("tiny", value_head=False)
        data, train, _, _ = load_data(args, model)
        optimizer = torch.optim.SGD(model.trainable_parameters()["policy"], lr=0.1)
        loss, _ = update(model, optimizer, data, train, 0, args, ".")
        weights.append(torch.cat([p.detach().flatten() for p in model.trainable_parameters()["policy"]]))
    assert torch.allclose(*weights, atol=1e-5)
    rows = train[minibatch(0, len(train), 8, args.seed)]
    fresh = load_vla("tiny", value_head=False)
    images = augment(data["images"][rows], torch.Generator().manual_seed(args.seed * 2**32))
    assert cross_entropy(fresh, data, rows, images).mean().item() == pytest.approx(loss, abs=1e-5)
    assert loss == pytest.approx(np.log(256), abs=1.5), "random weights are near uniform over 256 bins"


def test_gradients_are_summed_over_ranks(monkeypatch):
    """Stops ranks from drifting apart, each with the gradient of its own part: the parts add up to one rank's."""
    args, gradients = small(augment=True, max_grad_norm=1e9), []
    monkeypatch.setattr(
        sft_vla.runs, "sum_gradients", lambda params: gradients.append(torch.cat([p.grad.flatten() for p in params]))
    )
    model = load_vla("tiny", value_head=False)
    data, train, _, _ = load_data(args, model)
    optimizer = torch.optim.SGD(model.trainable_parameters()["policy"], lr=0.0)
    for rank in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(sft_vla.runs, "rank_and_world_size", lambda rank=rank: rank)
        update(model, optimizer, data, train, 0, args, ".")
    one, first, second = gradients
    torch.testing.assert_close(first + second, one, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(first, second, rtol=0.1), "the check sees nothing"


def test_statistics_that_the_presets_name():
    """Stops the 7B warm-up from replacing bridge_orig's statistics, and the baseline from symmetric ranges."""
    model = load_vla("tiny", value_head=False)
    model.norm_stats["bridge_orig"] = model.norm_stats.pop(next(iter(model.norm_stats)))
    before = json.dumps(model.norm_stats)
    assert load_data(small(statistics="model", unnorm_key="bridge_orig"), model)[3] == "bridge_orig"
    assert json.dumps(model.norm_stats) == before
    for statistics, symmetric in (("quantiles", False), ("symmetric", True)):
        load_data(small(statistics=statistics), model)
        ranges = model.norm_stats["cleanvla"]["action"]
        assert np.allclose(ranges["q01"][:6], -np.array(ranges["q99"][:6])) == symmetric
    with pytest.raises(ValueError, match="unnorm_key = 'brige_orig' is none of the model's"):
        load_data(small(statistics="model", unnorm_key="brige_orig"), model)


@pytest.mark.slow
def test_overfits_ten_demonstrations():
    """Stops a model, tokens or loss that cannot even memorise; with shuffled images it must not reach the same."""
    args = small(batch_size=64, micro_batch_size=64, val_demos=1)
    model = load_vla("tiny", value_head=False)
    data, train, _, unnorm_key = load_data(args, model)
    optimizer = torch.optim.AdamW(model.trainable_parameters()["policy"], lr=2e-3)
    for number in range(140):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (number + 1) / 20, 2 - number / 70)
        update(model, optimizer, data, train, number, args, ".")
    metrics = validate(model, data, train, unnorm_key, 64, 1024)
    assert metrics["token_accuracy"] > 0.95 and metrics["gripper_accuracy"] > 0.95 and metrics["l1_xyz_mm"] < 2
    shuffled = data | {"images": data["images"][torch.randperm(len(data["images"]), generator=torch.Generator())]}
    assert validate(model, shuffled, train, unnorm_key, 64, 1024)["token_accuracy"] < metrics["token_accuracy"] - 0.05


# --- runs ---
def test_run_writes_metrics_and_a_loadable_checkpoint(tmp_path, monkeypatch):
    """Stops runs whose checkpoint lacks the statistics, lack metrics, or train nothing or too much."""
    monkeypatch.chdir(tmp_path)
    main(small(name="run", lora_rank=2, eval_every=2, eval_episodes=2, num_envs=2, num_workers=1, num_videos=1))
    run = tmp_path / "runs" / "run"
    first, last = metrics_of(run)
    assert METRICS <= set(first) and all(value is not None for value in last.values())
    rates = [row["charts/learning_rate"] for row in (first, last)]  # of the second of two steps, no warm-up
    assert rates == pytest.approx([1e-3 * (0.5 + 0.5 * np.cos(np.pi * number / 4)) for number in (1, 3)])
    assert last["step"] == 4 and last["eval/main/episodes"] == 2 and (run / "curve.png").exists()
    assert len(list(run.glob("videos/*.mp4"))) == 1 and (run / "best-000002").is_dir()
    trained, start = load_vla(run / "checkpoint-000002"), load_vla("tiny", seed=1)
    assert list(trained.norm_stats) == ["cleanvla"]
    before, after = start.backbone.state_dict(), trained.backbone.state_dict()
    adapters = [key for key in after if "lora_B" in key]
    assert adapters and any(after[key].abs().sum() > 0 for key in adapters)
    frozen = {key.replace(".base_layer", ""): value for key, value in after.items() if "lora_" not in key}
    assert all(torch.equal(before[key], value) for key, value in frozen.items())


def test_resume_continues_exactly(tmp_path, monkeypatch):
    """Stops a resume that repeats samples, forgets Adam's state or draws another augmentation."""
    monkeypatch.chdir(tmp_path)
    args = small(num_iterations=4, checkpoint_every=1, augment=True)
    main(replace(args, name="whole"))
    stop = sft_vla.validate
    monkeypatch.setattr(sft_vla, "validate", lambda *a, **k: stop(*a, **k) if main.count > 0 else 1 / 0)
    main.count = 1

    def count_saves(run_dir, kind, number, *rest, save=sft_vla.runs.save_checkpoint):
        main.count -= number == 2
        return save(run_dir, kind, number, *rest)

    monkeypatch.setattr(sft_vla.runs, "save_checkpoint", count_saves)
    with pytest.raises(ZeroDivisionError):  # interrupted in iteration 3
        main(replace(args, name="parts"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    main(replace(args, name="parts", resume="runs/parts"))
    whole, parts = (load_vla(f"runs/{name}/checkpoint-000004").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole if "value_head" not in key)
    losses = [
        [line["losses/cross_entropy"] for line in metrics_of(tmp_path / "runs" / run)] for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    with pytest.raises(ValueError, match=r"give \[\d+, \d+, \d+\] samples, for validation, checksum, it had") as error:
        main(replace(args, name="parts", resume="runs/parts", num_iterations=5, num_demos=9))
    assert "--num-demos" in str(error.value)
    with pytest.raises(ValueError, match="--statistics"):  # as many samples, whose tokens mean other actions
        main(replace(args, name="parts", resume="runs/parts", num_iterations=5, statistics="quantiles"))


# --- bad input ---
@pytest.mark.parametrize("changes, message", [
    ({"batch_size": 0}, "batch_size = 0 must be > 0"),
    ({"val_demos": 0}, "val_demos = 0 must be > 0"),
    ({"num_updates": -1}, "num_updates = -1 must be > 0"),
    ({"eval_episodes": 0}, "eval_episodes = 0 must be at least the number of ranks, 1; use 64, or --eval-every 0"),
    ({"merge_adapter": True}, "merge_adapter = True needs the adapter that is merged"),
])  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_loaded(changes, message):
    """Stops a run that fails after minutes, with an error that does not name the value."""
    with pytest.raises(ValueError, match=message):
        check_args(replace(Args(), **changes))


def test_bad_data_are_refused(tmp_path, monkeypatch):
    """Stops training on other assets than those evaluated on, without training data, or over an old run."""
    model = load_vla("tiny", value_head=False)
    with pytest.raises(ValueError, match="val_demos = 10 leaves none of 10 episodes"):
        load_data(replace(small(), val_demos=10), model)
    with pytest.raises(ValueError, match="image_size = \\[160, 120\\], this run has \\[64, 48\\]"):
        check_args(replace(small(), image_size=(64, 48)))
    shutil.copytree(recorded_demos(), tmp_path / "bridge")
    header = json.loads((tmp_path / "bridge/trajectory.json").read_text())
    header["settings"]["assets"] = "bridge"
    (tmp_path / "bridge/trajectory.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="assets = bridge, this run has primitive"):
        check_args(replace(small(), demos=(str(tmp_path / "bridge"),)))
    assert "cleanvla" not in model.norm_stats, "refused data must not change the model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/old/checkpoint-000001").mkdir(parents=True)
    with pytest.raises(ValueError, match="runs/old holds a run"):
        check_args(replace(small(), name="old"))
    (tmp_path / "runs/kept/best-000080").mkdir(parents=True)
    (tmp_path / "runs/data/checkpoint-000001").mkdir(parents=True)
    for name in ("kept", "/data"):  # its best alone; a name with a slash is below runs/ all the same
        with pytest.raises(ValueError, match=f"runs/{name} holds a run"):
            check_args(replace(small(), name=name))


def test_ranks_must_read_the_same_demonstrations(tmp_path, monkeypatch):
    """Stops gradients of two tokenisations from being summed, where machines have demonstrations of their own."""
    monkeypatch.chdir(tmp_path)
    other = lambda mine: [mine, [*mine[:2], 0]] if isinstance(mine, list) else [mine]  # noqa: E731
    monkeypatch.setattr(sft_vla.runs, "gather_over_ranks", other)
    with pytest.raises(ValueError, match=r"ranks read other .*: \[\[\d+, \d+, \d+\], \[\d+, \d+, 0\]\] samples"):
        main(small(name="apart"))


def test_gripper_is_right_where_the_simulator_reads_it_so():
    """Stops a decoded .3, at which the hand closes, from counting as open."""
    model = load_vla("tiny", value_head=False)
    data, rows, _, key = load_data(small(), model)
    tokens = data["action_tokens"].clone()
    tokens[:, 6] = model.backbone.bins.stop - 1 - 165
    assert model.actions_from_tokens(tokens, key)[0, 6].item() == pytest.approx(0.3, abs=0.01)
    model.act = lambda images, texts, temperature: (tokens[: len(images)], None, None)
    data["actions"][:, 6] = torch.where(torch.arange(len(tokens)) % 4 == 0, 1.0, -1.0)
    accuracy = validate(model, data, torch.arange(8), key, 8, 8)["gripper_accuracy"]
    assert accuracy == 0.75, "right where the label is closed"


def test_presets_are_the_paper_s():
    """Stops the published hyper-parameters from changing with the embedded defaults."""
    for name, updates in (("warmup", 2000), ("baseline", 60000)):
        preset = asdict(PRESETS[name])
        assert preset["num_iterations"] * preset["num_updates"] == updates
        assert (preset["lora_rank"], preset["learning_rate"], preset["batch_size"]) == (32, 5e-4, 32)
        assert preset["lr_schedule"] == "constant"
    assert (PRESETS["warmup"].statistics, PRESETS["warmup"].unnorm_key) == ("model", "bridge_orig")
    assert PRESETS["baseline"].statistics == "quantiles"
    assert PRESETS["warmup"].augment and PRESETS["warmup"].drop_idle == "published"
    assert PRESETS["baseline"].drop_idle == "published" and not PRESETS["baseline"].augment
