"""DPO: loss and pairs worked by hand, the update on a bandit, reference, pairs on disk, the script in the simulator."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from hub_layout import write_small_hub_checkpoint
from safetensors.torch import load_file

import common.model.openvla
import dpo_vla
from common.model.openvla import load_vla, save_vla
from common.run import pairs, runs
from common.simulation.vec_env import make_envs
from dpo_vla import Args, all_logprobs, dpo_loss, make_pairs, score, trajectory_scores, update

ROOT = Path(__file__).parent.parent


# --- loss ---
def test_policy_equal_to_reference_gives_ln_2():
    """Stops a wrong sign or scale: at margin 0 the loss is ln 2, and descending raises chosen and lowers rejected."""
    chosen, rejected = torch.zeros(2, 3, requires_grad=True).unbind(0)
    losses, margins = dpo_loss(chosen, rejected, 0.1)
    slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert torch.allclose(losses, torch.full((3,), math.log(2))) and torch.equal(margins, torch.zeros(3))
    assert torch.allclose(slopes[0], torch.full((3,), -0.05)) and torch.allclose(slopes[1], torch.full((3,), 0.05))


@pytest.mark.parametrize(
    "chosen, rejected, beta, loss, slope",  # slope = d loss / d chosen = -beta sigmoid(-margin)
    [
        (3.0, -1.0, 0.5, math.log(1 + math.exp(-2.0)), -0.5 / (1 + math.exp(2.0))),  # right already: small
        (-1.0, 3.0, 0.5, math.log(1 + math.exp(2.0)), -0.5 / (1 + math.exp(-2.0))),  # wrong: nearly beta
        (-5.0, -7.0, 1.0, math.log(1 + math.exp(-2.0)), -1.0 / (1 + math.exp(2.0))),  # both fell: only the gap counts
        (200.0, -200.0, 1.0, 0.0, 0.0),
        (-200.0, 200.0, 1.0, 400.0, -1.0),  # no overflow
    ],
)
def test_loss_by_hand(chosen, rejected, beta, loss, slope):
    """Stops beta outside the sigmoid, chosen and rejected swapped, and overflow of exp."""
    logratios = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    losses, margins = dpo_loss(*logratios, beta)
    slopes = torch.autograd.grad(losses.sum(), logratios)
    assert np.isclose(losses.item(), loss, atol=1e-6) and np.isclose(margins.item(), beta * (chosen - rejected))
    assert np.isclose(slopes[0].item(), slope, atol=1e-6) and slopes[0] == -slopes[1]


def test_wrong_shapes_and_types_are_refused():
    """Stops (M, 1) against (M,) and half precision from giving a number."""
    vector = torch.zeros(4)
    for call in (
        lambda: dpo_loss(vector, vector[:, None], 0.1),
        lambda: dpo_loss(vector[:, None], vector[:, None], 0.1),
        lambda: dpo_loss(vector.half(), vector.half(), 0.1),
    ):
        with pytest.raises(ValueError, match="it must be .* torch.float32"):
            call()


# --- pairs ---
def test_best_is_paired_with_worst_of_the_same_state():
    """Stops pairs across states, losers that are chosen, ties that count as preferences, and repeated trajectories."""
    scores = np.array([0.1, 1.2, 0.0, 1.2, 0.0, 0.0, 0.0, 0.0, 1.2, 1.1, 0.2, 0.1])
    assert make_pairs(scores, 4, 2).tolist() == [[1, 2], [3, 0], [8, 11], [9, 10]]
    assert make_pairs(scores, 4, 1).tolist() == [[1, 2], [8, 11]]
    assert make_pairs(-scores, 4, 2).tolist() == [[2, 3], [0, 1], [11, 8], [10, 9]], "the sign must matter"
    odd = make_pairs(np.array([0.0, 1.0, 0.5]), 3, 1)  # the middle one of three stays alone
    assert odd.tolist() == [[1, 0]] and make_pairs(np.zeros(6), 3, 1).shape == (0, 2)
    scores = np.random.default_rng(0).choice([0.0, 0.2, 1.2], 80)
    found = make_pairs(scores, 8, 4)
    assert (found[:, 0] // 8 == found[:, 1] // 8).all() and len(np.unique(found)) == found.size > 20
    assert (scores[found[:, 0]] > scores[found[:, 1]]).all()


def test_scores_by_hand():
    """Stops rounding errors of summed rewards from making a pair, and the tie break from outranking a stage."""
    returns = np.array([0.1 + 0.2 - 0.3, 0.0, 1.2, 1.2000002, 1.1], np.float32)
    steps = np.array([0, 0, 3, 30, 40])
    drop, length = (trajectory_scores(returns, steps, how) for how in ("drop", "length"))
    assert drop[0] == drop[1] and drop[2] == drop[3] > drop[4]
    assert length[3] > length[2] > length[4] and length[0] == length[1]


# --- update, on a bandit of T steps: each step's right action has the number of its context ---
class Bandit(torch.nn.Module):
    device = torch.device("cpu")

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.logits = torch.nn.Linear(4, 4)

    def evaluate(self, images, instructions, action_tokens, temperature=1.0):
        assert len(images) == len(instructions) == len(action_tokens)
        logp = (self.logits(images) / temperature).log_softmax(-1)
        return logp.gather(1, action_tokens).sum(1), None, None


def bandit_data(model, args, num_states=8, num_steps=6, seed=0, sign=1.0, reference=None):
    """-> data for `update`, share of right actions. Four trajectories from each state, which fixes the contexts."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.eye(4)[torch.randint(4, (num_states, num_steps), generator=generator).repeat_interleave(4, 0)]
    with torch.no_grad():
        probabilities = (model.logits(images) / args.temperature).softmax(-1)
    tokens = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(-1, num_steps, 1)
    right = (tokens[..., 0] == images.argmax(-1)).float()
    rows = torch.as_tensor(make_pairs(sign * right.mean(1).double().numpy(), 4, 2)).flatten()
    data = dict(images=images[rows], action_tokens=tokens[rows], instructions=["put"] * len(rows))
    data["ref_logprobs"] = all_logprobs(reference or model, data, args)
    return data, right.mean().item()


def bandit_run(iterations, sign=1.0, change=None, rule=torch.optim.AdamW, lr=0.1, **settings):
    """-> model, share of right actions per iteration, metrics per iteration. The reference is the start."""
    args = Args(**dict(pairs_per_batch=4, beta=0.5) | settings)
    model, start, successes, metrics = Bandit(), Bandit(), [], []
    optimizer = rule(model.parameters(), lr=lr)
    for iteration in range(1, iterations + 1):
        data, success = bandit_data(model, args, seed=iteration, sign=sign, reference=start)
        data |= change(data) if change else {}
        successes.append(success)
        if len(data["images"]):  # when all are right there is nothing to prefer
            metrics.append(update(model, optimizer, data, args, np.random.default_rng(iteration), ".", iteration == 1))
    return model, successes, metrics


@pytest.mark.parametrize("settings", [{}, dict(window_steps=2), dict(update_epochs=3, pairs_per_batch=1, lr=0.02)])
def test_learns_a_bandit_and_the_sign_matters(settings):
    """Stops an update that does not learn: from chance (0.25) to more than 0.9, and to less with the sign flipped."""
    _, successes, metrics = bandit_run(40, **settings)
    assert successes[0] < 0.5 and np.mean(successes[-5:]) > 0.9
    assert np.isclose(metrics[0]["losses/first_margin"], 0) and metrics[5]["rewards/margins"] > 0
    assert np.mean(bandit_run(30, sign=-1.0, **settings)[1][-5:]) < 0.1


def direct_gradient(model, data, args, rows, start, stop):
    """Gradient of the mean loss over pairs, by autograd through everything at once."""
    model.zero_grad()
    sums = []
    for row in rows:
        steps = data["images"][row, start:stop], ["put"] * (stop - start), data["action_tokens"][row, start:stop]
        sums.append(model.evaluate(*steps, args.temperature)[0].sum())
    sums = torch.stack(sums)
    logratios = sums - data["ref_logprobs"][list(rows), start:stop].sum(1)
    losses = -torch.nn.functional.logsigmoid(args.beta * (logratios[0::2] - logratios[1::2]))
    (losses - args.nll_coef * sums[0::2] / (stop - start)).mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("micro_batch_size", "nll_coef"), [(1, 0.0), (4, 0.0), (100, 0.0), (4, 2.0)])
def test_two_passes_give_the_direct_gradient(micro_batch_size, nll_coef):
    """Stops accumulation over steps from being another loss, which a loss that is not linear in them invites."""
    args = Args(beta=0.7, micro_batch_size=micro_batch_size, pairs_per_batch=100, max_grad_norm=1e9, temperature=0.8)
    args.nll_coef = nll_coef
    model = Bandit(seed=3)  # not the reference: margins differ from pair to pair
    data, _ = bandit_data(model, args, reference=Bandit())
    wanted = direct_gradient(model, data, args, range(len(data["images"])), 0, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = update(model, optimizer, data, args, np.random.default_rng(0), ".", False)
    found = [p.grad for p in model.parameters()]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert np.isclose(metrics["losses/grad_norm"], torch.cat([g.flatten() for g in wanted]).norm())
    assert metrics["rewards/margins"] != 0 and metrics["losses/num_updates"] == 1
    # Negative control: losses per micro-batch, averaged, are another objective.
    halves = [direct_gradient(model, data, args, range(len(data["images"])), a, a + 3) for a in (0, 3)]
    assert not torch.allclose(sum(h[0] for h in halves) / 2, wanted[0], rtol=1e-2)


def test_windows_cut_both_trajectories_alike(monkeypatch):
    """Stops windows of different phases or lengths, a window across the end, and one that is always the first."""
    args, model, seen = Args(window_steps=2, pairs_per_batch=1, micro_batch_size=100), Bandit(), []
    data, _ = bandit_data(model, args)

    def recorded(model, data, row, start, stop, args):
        if torch.is_grad_enabled():
            seen.append((row, start, stop))
        return score(model, data, row, start, stop, args)

    monkeypatch.setattr(dpo_vla, "score", recorded)
    update(model, torch.optim.SGD(model.parameters(), lr=0.0), data, args, np.random.default_rng(0), ".", True)
    assert sorted(row for row, _, _ in seen) == list(range(len(data["images"])))
    assert all((row + 1, *window) == other for (row, *window), other in zip(seen[0::2], seen[1::2], strict=True))
    steps = data["action_tokens"].shape[1]
    assert {(start, stop - start) for _, start, stop in seen} <= {(start, 2) for start in range(0, steps, 2)}
    assert len({start for _, start, _ in seen}) > 1


def test_first_margin_is_exactly_zero_or_the_run_stops():
    """Stops a reference that is not the start, temperatures that differ, and log-probs of other steps."""
    metrics = bandit_run(1, pairs_per_batch=100)[2][0]
    assert metrics["losses/first_margin"] == 0.0 and metrics["rewards/margins"] == 0.0
    assert np.isclose(metrics["losses/dpo_loss"], math.log(2)) and metrics["rewards/accuracies"] == 0
    column = torch.tensor([[0.1], [0.0]]).repeat(100, 1)
    shifted = lambda data: {"ref_logprobs": data["ref_logprobs"] + column[: len(data["images"])]}  # noqa: E731
    with pytest.raises(RuntimeError, match="of policy = reference exceeds margin_tolerance = 0.0"):
        bandit_run(1, change=shifted)
    assert bandit_run(1, change=shifted, margin_tolerance=1.0)[2][0]["losses/first_margin"] > 0


def test_non_finite_loss_stops_with_the_batch_saved(tmp_path, monkeypatch):
    """Stops a NaN from being trained on, or from ending the run without evidence."""
    monkeypatch.chdir(tmp_path)
    poison = lambda data: {"ref_logprobs": data["ref_logprobs"] * float("nan")}  # noqa: E731
    with pytest.raises(FloatingPointError, match="the loss or its gradient is not finite"):
        bandit_run(1, change=poison, margin_tolerance=1.0)
    saved = torch.load(tmp_path / "nonfinite_batch-0.pt")
    assert len(saved["ref_logprobs"]) == len(saved["instructions"]) == 8


# --- reference ---
def random_data(model, num_rows=4, num_steps=3, seed=0):
    rng, (height, width) = np.random.default_rng(seed), model.backbone.vision_backbone.size
    images = torch.as_tensor(rng.integers(256, size=(num_rows, num_steps, height, width, 3), dtype=np.uint8))
    bins = model.backbone.bins
    tokens = torch.as_tensor(rng.integers(bins.start, bins.stop, size=(num_rows, num_steps, 7)))
    return dict(images=images, action_tokens=tokens, instructions=["put carrot on plate", "put cube on towel"] * 2)


def trained(model):
    return {name: p.detach().clone() for name, p in model.backbone.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["adapter off", "all weights", "loaded adapter"])
def test_reference_is_exactly_the_start(kind, tmp_path):
    """Stops a reference that drifts with training; with a loaded adapter, one that is the model below the adapter."""
    base = load_vla("tiny", value_head=False, seed=1)
    if kind == "loaded adapter":
        first = load_vla("tiny", value_head=False, seed=1, lora_rank=2)
        for name, p in first.backbone.named_parameters():
            p.data += 0.05 * torch.randn_like(p) * ("lora_" in name)
        save_vla(first, tmp_path / "first")
        model = load_vla(tmp_path / "first", value_head=False)
    else:
        model = load_vla("tiny", value_head=False, seed=1, lora_rank=2 if kind == "adapter off" else 0)
    args, data, start = Args(micro_batch_size=2), random_data(model), trained(model)
    wanted = all_logprobs(model, data, args)
    assert torch.equal(wanted, all_logprobs(base, data, args)) == (kind != "loaded adapter")
    optimizer = torch.optim.AdamW(model.trainable_parameters()["policy"], lr=1e-2)
    update(model, optimizer, data | {"ref_logprobs": wanted}, args, np.random.default_rng(0), ".", True)
    after, moved = trained(model), all_logprobs(model, data, args)
    with model.reference(None if kind == "adapter off" else start):
        assert torch.equal(all_logprobs(model, data, args), wanted)
    assert not torch.allclose(moved, wanted, atol=1e-3), "the check sees nothing"
    assert torch.equal(all_logprobs(model, data, args), moved)
    assert all(torch.equal(after[name], p) for name, p in trained(model).items()) and after.keys() == start.keys()
    before = {name: p.clone() for name, p in after.items()}
    update(model, optimizer, data | {"ref_logprobs": wanted}, args, np.random.default_rng(0), ".", False)
    assert any(not torch.equal(before[name], p) for name, p in trained(model).items()), "training must go on"


# --- pairs on disk ---
def pair_data():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(4, 3, 16, 24, 3), dtype=np.uint8)
    data = pairs.encode_frames([list(row) for row in images], 3) | {"returns": np.array([1.2, 0.1, 1.1, 0.0])}
    return images, data | {"instructions": np.array(["put a on b"] * 2 + ["put c on d"] * 2)}


def test_pairs_come_back_as_they_were(tmp_path):
    """Stops lossy images, which would train on other pixels than the policy saw, and pickles, which can run code."""
    images, data = pair_data()
    path = tmp_path / "pairs/000001.npz"
    pairs.save_pairs(path, data)
    loaded = pairs.load_pairs(path)
    assert loaded.keys() == data.keys() and all(np.array_equal(loaded[key], data[key]) for key in data)
    assert np.array_equal(pairs.decode_frames(loaded), images)
    assert np.array_equal(pairs.decode_frames(loaded, [2, 3]), images[2:])
    assert [file.name for file in path.parent.iterdir()] == ["000001.npz"]
    np.savez(tmp_path / "evil.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="evil.npz is .* no file of pairs .*allow_pickle"):
        pairs.load_pairs(tmp_path / "evil.npz")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_pairs_are_refused(tmp_path, keep):
    """Stops a file that a full disk cut short from being trained on, or from failing without saying which it is."""
    pairs.save_pairs(tmp_path / "000001.npz", pair_data()[1])
    content = (tmp_path / "000001.npz").read_bytes()
    (tmp_path / "000001.npz").write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=r"000001.npz is truncated .* remove it and --resume"):
        pairs.load_pairs(tmp_path / "000001.npz")


def test_video_shows_chosen_left_and_rejected_right(tmp_path):
    """Stops a video of the wrong pair, with the sides swapped, or a file that no player opens."""
    images, data = pair_data()
    images[2], images[3] = 230, 60  # the second pair: light chosen, dark rejected
    pairs.save_pairs(tmp_path / "000001.npz", data | pairs.encode_frames([list(row) for row in images], 3))
    run = subprocess.run(
        [sys.executable, "-m", "common.run.pairs", "--path", str(tmp_path / "000001.npz"), "--pair", "1"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    video = Path(run.stdout.strip())
    assert video == tmp_path / "000001-1.mp4"
    frames = np.stack([frame for frame in imageio.get_reader(video)])
    assert len(frames) == 3 and frames.shape[2] == 2 * 24 * (640 // 48)
    below, middle = frames[:, 40:], frames.shape[2] // 2
    assert below[:, :, : middle - 8].mean() > 200 and below[:, :, middle + 8 :].mean() < 90
    assert frames[:, :28].std() > 20, "the instruction is missing"
    with pytest.raises(ValueError, match="pair = 2: .* holds 2 pairs; use 0 to 1"):
        pairs.show_pair(tmp_path / "000001.npz", 2)


# --- args ---
def test_presets_parse_and_are_the_papers(capsys):
    """Stops a preset from losing the paper's values, and a flag from being overridden by it."""
    paper = runs.parse_args(Args, dpo_vla.PRESETS, ["--preset", "paper", "--num-envs", "32"])
    assert (paper.preset, paper.num_envs, paper.lora_rank, paper.beta, paper.learning_rate) == (
        "paper",
        32,
        32,
        0.1,
        2e-5,
    )
    dpo_vla.main(dataclasses.replace(paper, dry_run=True))  # needs neither weights nor assets
    plan = capsys.readouterr().out
    assert "model = gen-robot/openvla-7b-rlvla-warmup" in plan and "memory estimate" in plan and "109.1 M" in plan


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_trajectories=1), "num_trajectories = 1 must be >= 2"),
        (dict(num_trajectories=7), "num_trajectories = 7 must .* divide the 64 environments"),
        (dict(pairs_per_state=5), "pairs_per_state = 5 exceeds num_trajectories // 2; use 4"),
        (dict(window_steps=7), "window_steps = 7 must be 0 or divide max_episode_steps = 40"),
        (dict(window_steps=-8), "window_steps = -8"),
        (dict(nll_coef=-1.0), "nll_coef = -1.0 must be >= 0"),
        (dict(keep_pairs=-1), "keep_pairs = -1 must be >= 0"),
        (dict(beta=0.0), "beta = 0.0 must be > 0"),
        (dict(pairs_per_batch=0), "pairs_per_batch = 0"),
        (dict(num_steps=30), "multiple of max_episode_steps = 40"),
        (dict(task="no_such_task"), "no_such_task"),
        (dict(model="no/such/model"), "no/such/model"),
        (dict(name="taken"), "runs/taken holds a run"),
    ],
)
def test_bad_args_are_refused_before_anything_is_loaded(settings, message, tmp_path, monkeypatch):
    """Stops ten minutes of waiting for an error that was certain at the start, and overwriting a finished run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/taken/checkpoint-000001").mkdir(parents=True)
    monkeypatch.setattr(dpo_vla, "make_envs", lambda *_, **__: pytest.fail("a simulator was started"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dpo_vla.main(Args(**settings))


# --- the whole script in the real simulator ---
SMALL = dict(model="tiny", num_envs=4, max_episode_steps=2, num_steps=4, num_trajectories=2, pairs_per_state=1)
SMALL |= dict(pairs_per_batch=2, num_workers=1, torch_threads=1, learning_rate=1e-4, eval_every=0, num_videos=1)


def by_place(returns, success_steps, tie_break):
    """Two steps of a random policy never grasp anything: here the second trajectory of each state is the better one."""
    return np.arange(len(returns)) % 2.0


@pytest.fixture(scope="module")
def simulator():
    envs = make_envs(num_envs=4, max_episode_steps=2, num_workers=1)
    yield envs
    envs.close()


@pytest.fixture
def train(simulator, tmp_path, monkeypatch):
    """train(**settings) -> run directory; one simulator serves all runs of this file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dpo_vla, "make_envs", lambda *_, **__: simulator)
    monkeypatch.setattr(dpo_vla, "trajectory_scores", by_place)
    monkeypatch.setattr(simulator, "close", lambda: None)
    monkeypatch.setattr(runs, "stop_on_signals", lambda _: None)

    def run(name, **settings):
        dpo_vla.main(Args(**SMALL | dict(name=name) | settings))
        return tmp_path / "runs" / name

    return run


def metrics_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "system/", "charts/SPS"))} for row in rows]


def weights_of(run_dir):
    checkpoint, tensors = runs.find_checkpoint(run_dir), {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_smoke_with_all_files(train, simulator, capsys):
    """Stops a run that ends with unmoved weights or undocumented metrics, and pairs that do not share their start,
    whose images are not those of their actions, or that cannot be repeated in the simulator."""
    run_dir = train("smoke", num_iterations=2, eval_every=2, eval_episodes=3)
    out = capsys.readouterr().out
    assert "iter 002/2 | success" in out and "rewards/margins" in out and "tiny on cpu, float32" in out
    rows = metrics_of(run_dir)
    assert [row["step"] for row in rows] == [0, 16, 32], "environment steps, as for PPO"
    assert {"eval/main/success_at_end", "eval/main/episodes"} <= rows[0].keys() & rows[2].keys() - rows[1].keys()
    expected = {*dpo_vla.MEANS, "losses/grad_norm", "losses/num_updates", "losses/first_margin", "charts/learning_rate"}
    expected |= {f"train/{key}" for key in (*dpo_vla.EPISODE_METRICS, "frac_without_pair", "num_pairs")}
    assert expected <= rows[1].keys() and all(math.isfinite(rows[1][key]) for key in expected)
    assert (rows[1]["losses/first_margin"], rows[1]["losses/num_updates"], rows[1]["train/num_pairs"]) == (0, 2, 4)
    assert rows[1]["train/frac_without_pair"] == 0 and rows[2]["rewards/margins"] != 0
    assert (run_dir / "curve.png").exists() and len(list((run_dir / "videos").glob("*.mp4"))) >= 2
    start, after = load_vla("tiny", seed=1, value_head=False), load_vla(runs.find_checkpoint(run_dir), value_head=False)
    pairs_of_weights = zip(start.named_parameters(), after.parameters(), strict=True)
    moved = {name: not torch.equal(a, b) for (name, a), b in pairs_of_weights}
    eyes = [name for name in moved if "vision_backbone" in name or "projector" in name]
    assert eyes and not any(moved.pop(name) for name in eyes), "freeze_vision: they must not move"
    assert np.mean(list(moved.values())) > 0.9, "most other weights must have moved"

    data = pairs.load_pairs(run_dir / "pairs/000001.npz")
    frames = pairs.decode_frames(data)
    assert np.array_equal(data["episode_ids"][0::2], data["episode_ids"][1::2]) and len(set(data["episode_ids"])) == 4
    assert np.array_equal(frames[0::2, 0], frames[1::2, 0]) and not np.array_equal(frames[0::2, 1], frames[1::2, 1])
    assert not (data["action_tokens"][0::2] == data["action_tokens"][1::2]).all((1, 2)).any(), "samples must differ"
    args, batch = Args(**SMALL), {"images": torch.as_tensor(frames), "instructions": data["instructions"].tolist()}
    batch["action_tokens"] = torch.as_tensor(data["action_tokens"])
    assert np.array_equal(all_logprobs(start, batch, args), data["ref_logprobs"]), "the start is the reference"
    images, texts = simulator.reset(data["episode_ids"][:4])
    assert texts == data["instructions"][:4].tolist()
    for step in range(2):
        assert np.array_equal(start.fit_images(images), frames[:4, step])
        tokens = torch.as_tensor(data["action_tokens"][:4, step])
        images = simulator.step(start.actions_from_tokens(tokens, list(start.norm_stats)[0]))[0]


def test_the_better_trajectory_is_chosen(train, simulator, monkeypatch):
    """Stops sides that are swapped between the simulator's returns and the file, noise that repeats, and success that
    was lost again from breaking a tie: planted returns are the last move along x, success is lost again or late."""
    monkeypatch.setattr(dpo_vla, "trajectory_scores", trajectory_scores)
    step = simulator.step

    def planted(actions):
        images, rewards, ended, infos = step(actions)
        infos |= {"return": 1000 * actions[:, 0].astype(np.float32)}
        return images, rewards, ended, infos

    monkeypatch.setattr(simulator, "step", planted)
    monkeypatch.setattr(dpo_vla, "training_ids", lambda *_: np.array([32894]))
    run_dir = train("returns", num_iterations=2, learning_rate=1e-12)
    data, second = (pairs.load_pairs(run_dir / f"pairs/00000{iteration}.npz") for iteration in (1, 2))
    assert not np.array_equal(data["action_tokens"], second["action_tokens"]), "one noise for all iterations"
    model = load_vla("tiny", seed=1)
    (key,), late = model.norm_stats, []
    moves = model.actions_from_tokens(torch.as_tensor(data["action_tokens"][:, -1]), key)[:, 0]
    np.testing.assert_allclose(data["returns"], 1000 * moves, rtol=1e-5)
    assert len(moves) > 2 and (data["returns"][0::2] > data["returns"][1::2]).all()

    def lost_or_late(actions):
        images, rewards, ended, infos = step(actions)
        success = np.arange(4) % 2 == infos["elapsed_steps"] - 1
        late.extend(actions[success & ended, 0].tolist())
        return images, rewards, ended, infos | {"return": np.ones(4, np.float32), "success": success}

    monkeypatch.setattr(simulator, "step", lost_or_late)
    data = pairs.load_pairs(train("ties", num_iterations=1, tie_break="length") / "pairs/000001.npz")
    moves = model.actions_from_tokens(torch.as_tensor(data["action_tokens"][:, -1]), key)[:, 0]
    assert len(moves) == 8 and set(moves[0::2].tolist()) == set(late)


def test_lora_needs_no_second_model(train, monkeypatch):
    """Stops a frozen copy, which does not fit on one card beside a 7B model, and LoRA that touches frozen weights."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(load_vla(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(common.model.openvla, "load_vla", counted)
    run_dir = train("lora", num_iterations=2, lora_rank=2)
    monkeypatch.undo()
    assert len(calls) == 1 and calls[0].critic is None and calls[0].value_head is None
    assert not (run_dir / "reference.safetensors").exists(), "the adapter turned off is the start"
    start = dict(load_vla("tiny", seed=1).backbone.named_parameters())
    frozen = {name: p for name, p in calls[0].backbone.named_parameters() if "lora_" not in name}
    assert all(torch.equal(p, start[name.replace(".base_layer", "")]) for name, p in frozen.items())
    assert any(p.abs().max() > 0 for name, p in calls[0].backbone.named_parameters() if "lora_B" in name)
    data = pairs.load_pairs(run_dir / "pairs/000002.npz")  # of a policy that has moved
    batch = {"images": torch.as_tensor(pairs.decode_frames(data)), "instructions": data["instructions"].tolist()}
    batch["action_tokens"] = torch.as_tensor(data["action_tokens"])
    begin = load_vla("tiny", seed=1, value_head=False)
    assert np.array_equal(all_logprobs(begin, batch, Args(**SMALL)), data["ref_logprobs"])


def test_a_loaded_adapter_is_its_own_reference(train):
    """Stops --adapter from being compared with the model below it: the first margin would not be 0."""
    first = train("first", num_iterations=1, lora_rank=2, learning_rate=1e-2, freeze_vision=False)
    run_dir = train("next", num_iterations=2, adapter=str(runs.find_checkpoint(first)), freeze_vision=False)
    assert metrics_of(run_dir)[1]["losses/first_margin"] == 0
    start, kept = weights_of(first), load_file(run_dir / "reference.safetensors")
    assert len(start) == len(kept) and sum(x.abs().sum() for x in kept.values()) > 0
    (run_dir / "reference.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"reference.safetensors \(weights of the reference\) is missing"):
        train("next", num_iterations=3, resume=str(run_dir), freeze_vision=False)
    train("next", num_iterations=3, resume=str(run_dir), reference="previous", freeze_vision=False)
    assert metrics_of(run_dir)[-1]["losses/first_margin"] == 0


def test_resume_is_exact_and_collects_nothing_twice(train, monkeypatch):
    """Stops a resumed run from being another experiment, and from paying for a collected round again: one run is
    killed in iteration 3's update, after its pairs were written, with windows, epochs, a falling rate in play."""
    settings = dict(num_iterations=4, update_epochs=2, window_steps=1, keep_pairs=0, anneal_lr=True)
    straight = train("straight", **settings)
    collected, original = [], update
    count = lambda *a: collected.append(a[3]) or dpo_vla_collect(*a)  # noqa: E731
    dpo_vla_collect = dpo_vla.collect
    monkeypatch.setattr(dpo_vla, "collect", count)
    monkeypatch.setattr(dpo_vla, "update", lambda *a: 1 / 0 if collected[-1] == 3 else original(*a))
    with pytest.raises(ZeroDivisionError):
        train("parts", **settings)
    assert collected == [1, 2, 3]
    monkeypatch.setattr(dpo_vla, "update", original)
    train("parts", resume="runs/parts", **settings)
    parts = straight.parent / "parts"
    assert collected == [1, 2, 3, 4], "iteration 3 must not be collected again"
    assert metrics_of(parts) == metrics_of(straight) and same_weights(weights_of(parts), weights_of(straight))
    states = [
        torch.load(runs.find_checkpoint(run) / "training_state.pt")["optimizer"]["state"] for run in (straight, parts)
    ]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert len(list((parts / "pairs").glob("*"))) == 4
    rates = [row["charts/learning_rate"] for row in metrics_of(parts) if "charts/learning_rate" in row]
    assert rates == pytest.approx([1e-4, 7.5e-5, 5e-5, 2.5e-5])
    other = train("other", seed=2, **settings | dict(keep_pairs=1))
    assert [path.name for path in (other / "pairs").iterdir()] == ["000004.npz"]
    a, b = (set(pairs.load_pairs(run / "pairs/000004.npz")["episode_ids"]) for run in (parts, other))
    assert not a & b, "seeds must not be repetitions"


def test_pairs_of_an_abandoned_future_are_collected_anew(train):
    """Stops a run that goes back to an older checkpoint from training on pairs of a policy it never reached."""
    run_dir = train("run", num_iterations=1)
    future = run_dir / "pairs/000003.npz"
    future.write_bytes((run_dir / "pairs/000001.npz").read_bytes())
    train("run", num_iterations=3, resume=str(run_dir))
    a, b = (pairs.load_pairs(run_dir / f"pairs/00000{number}.npz")["episode_ids"] for number in (1, 3))
    assert not np.array_equal(a, b)


def test_pairs_made_with_other_flags_are_collected_anew(train, monkeypatch):
    """Stops a resumed run from scoring pairs at another temperature, or against another reference, than they were."""
    train("run", num_iterations=1)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(dpo_vla, "update", lambda *a: 1 / 0)  # killed after the pairs of iteration 2 were written
        train("run", num_iterations=2, resume="runs/run")
    run_dir = train("run", num_iterations=2, resume="runs/run", temperature=0.9, reference="previous")
    assert "0.9" in str(pairs.load_pairs(run_dir / "pairs/000002.npz")["made_with"])
    assert metrics_of(run_dir)[-1]["losses/first_margin"] == 0


def test_no_informative_pair_is_an_error(train, monkeypatch):
    """Stops an iteration without any preference from passing as an update."""
    monkeypatch.setattr(dpo_vla, "trajectory_scores", trajectory_scores)
    with pytest.raises(RuntimeError, match=r"iteration 1: no pair, the 2 trajectories of each state end alike .*0\.00"):
        train("none", num_iterations=1)


def test_two_ranks_make_the_update_of_one(train, tmp_path):
    """Stops torchrun from being another algorithm: the same pairs on 1 and 2 ranks, and nearly the same weights."""
    one = train("one", num_iterations=1)
    script = "import sys\nsys.path[:0] = %r\nimport dpo_vla, test_dpo\n" % [str(ROOT), str(ROOT / "tests")]
    script += "dpo_vla.trajectory_scores = test_dpo.by_place\nif __name__ == '__main__':\n"  # workers import it too
    script += "    dpo_vla.main(dpo_vla.Args(**test_dpo.SMALL, name='two', num_iterations=1))\n"
    (tmp_path / "ranked.py").write_text(script)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ranked.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=550,
    )  # fmt: skip
    two = tmp_path / "runs/two"
    a, b = (pairs.load_pairs(run / "pairs/000001.npz") for run in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        exact = a[key].dtype.kind not in "f"
        assert np.array_equal(a[key], b[key]) if exact else np.allclose(a[key], b[key], atol=1e-4), key
    start = load_vla("tiny", seed=1).backbone.state_dict()
    one_, two_, start = (torch.cat([w[k].flatten() for k in start]) for w in (weights_of(one), weights_of(two), start))
    assert (one_ - start).abs().max() > 1e-4, "the check sees nothing"
    assert (two_ - one_).norm() < 1e-2 * (one_ - start).norm()
    assert metrics_of(two)[-1].keys() == metrics_of(one)[-1].keys() and metrics_of(two)[-1]["losses/first_margin"] == 0


@pytest.mark.bridge
def test_paper_preset_runs_one_iteration_on_a_small_hub_checkpoint(tmp_path, monkeypatch):
    """Stops the real recipe's path from disk to adapter from breaking unseen: hub layout, 224 pixels, LoRA, bfloat16,
    published scene and physics; only the model's size, the numbers of steps and environments and the devices differ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "stop_on_signals", lambda _: None)
    monkeypatch.setattr(dpo_vla, "trajectory_scores", by_place)
    model = write_small_hub_checkpoint(tmp_path / "model")
    small = dict(num_envs=2, num_trajectories=2, pairs_per_state=1, max_episode_steps=2, num_steps=2, num_workers=1)
    small |= dict(model=str(model), unnorm_key="", device="cpu", sim_device="cpu", num_iterations=2, eval_every=0)
    dpo_vla.main(dataclasses.replace(dpo_vla.PRESETS["paper"], name="paper", torch_threads=1, **small))
    run_dir = tmp_path / "runs/paper"
    rows = metrics_of(run_dir)
    assert rows[1]["losses/first_margin"] == 0 and math.isfinite(rows[2]["losses/dpo_loss"])
    adapter = weights_of(run_dir)
    assert any("lora_B" in key and tensor.abs().max() > 0 for key, tensor in adapter.items())
    load_vla(runs.find_checkpoint(run_dir))
