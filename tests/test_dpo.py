"""DPO's loss and pairs worked by hand, its update on a bandit, its reference and its loop."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from running import metrics_of, state_of
from test_ppo import Bandit

import dpo_vla
from common.model.checkpoints import load_vla, save_vla
from common.run import ranks
from common.simulation.vec_env import CpuEnvs
from dpo_vla import Args, Batch, dpo_loss, make_pairs, trajectory_logprobs, update_policy


def pairs_of(returns, num_trajectories, pairs_per_state):
    """Those that are in the update, [[chosen, rejected], ..]."""
    pairs, differ = make_pairs(np.array(returns), num_trajectories, pairs_per_state)
    assert len(pairs) == len(returns) // num_trajectories * pairs_per_state
    return pairs[differ].tolist()


def test_best_is_paired_with_worst_of_the_same_state():
    """Stops pairs across states, chosen losers, ties and rounding that count as preferences."""
    returns = np.array([0.1, 1.2, 0.0, 1.2, 0.0, 0.0, 0.0, 0.0, 1.2, 1.1, 0.2, 0.1])
    assert pairs_of(returns, 4, 2) == [[1, 2], [3, 0], [8, 11], [9, 10]]
    assert pairs_of(returns, 4, 1) == [[1, 2], [8, 11]]
    assert pairs_of(-returns, 4, 2) == [[2, 3], [0, 1], [11, 8], [10, 9]], "the sign must matter"
    assert pairs_of([0.0, 1.0, 0.5], 3, 1) == [[1, 0]], "the middle one of three stays alone"
    assert pairs_of(np.float32([0.1 + 0.2 - 0.3, 0.0, 1.2, 1.2000002]), 2, 1) == []


@pytest.mark.parametrize("chosen, rejected, beta, loss, slope", [  # slope = d loss / d chosen
    (0.0, 0.0, 0.1, math.log(2), -0.05),  # policy = reference
    (3.0, -1.0, 0.5, math.log(1 + math.exp(-2)), -0.5 / (1 + math.exp(2))),  # right already: small
    (-1.0, 3.0, 0.5, math.log(1 + math.exp(2)), -0.5 / (1 + math.exp(-2))),  # wrong: nearly beta
    (-5.0, -7.0, 1.0, math.log(1 + math.exp(-2)), -1 / (1 + math.exp(2))),  # only the gap counts
    (200.0, -200.0, 1.0, 0.0, 0.0),
    (-200.0, 200.0, 1.0, 400.0, -1.0),  # no overflow
])  # fmt: skip
def test_loss_by_hand(chosen, rejected, beta, loss, slope):
    """Stops beta outside the sigmoid, a wrong sign, sides that are swapped, and overflow."""
    logratios = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    losses, margins = dpo_loss(*logratios, beta)
    slopes = torch.autograd.grad(losses.sum(), logratios)
    assert np.allclose([losses.item(), slopes[0].item()], [loss, slope], atol=1e-6)
    assert slopes[0] == -slopes[1] and np.isclose(margins.item(), beta * (chosen - rejected))
    with pytest.raises(AssertionError):  # (M, 1) against (M,)
        dpo_loss(torch.zeros(4), torch.zeros(4, 1), beta)


# --- update, on test_ppo's bandit in T = 6 steps: tokens are right that name a step's context ---
@torch.no_grad()
def bandit_batch(model, args, seed=0, sign=1.0):
    """Four trajectories from each of 8 states, which fix contexts; share of right tokens."""
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(4, (8, 6), generator=generator).repeat_interleave(4, 0)
    obs = torch.eye(4)[contexts]
    probabilities = model.logprobs(obs.flatten(0, 1), args.temperature).exp().flatten(0, 1)
    actions = torch.multinomial(probabilities, 1, generator=generator).view(32, 6, 2)
    right = (actions == contexts[..., None]).double().mean((1, 2))
    pairs, differ = make_pairs(sign * 20 * right.numpy(), 4, 2)  # counts, which no rounding equals
    return Batch(obs, [""] * 32, actions, torch.as_tensor(pairs), differ), right.mean().item()


def bandit_run(iterations, sign=1.0, lr=0.1, rule=torch.optim.AdamW, **settings):
    """The reference is the start. Returns: model, share of right tokens, metrics per iteration."""
    args = Args(**dict(dict(pairs_per_batch=4, beta=0.5), **settings))
    model, start, means, metrics = Bandit(), Bandit(), [], []
    optimizer = rule(model.parameters(), lr=lr)
    for iteration in range(iterations):
        batch, right = bandit_batch(model, args, iteration, sign)
        reference = trajectory_logprobs(start, batch, range(32), args)
        rng = np.random.default_rng(iteration)
        metrics.append(update_policy(model, optimizer, batch, reference, args, rng))
        means.append(right)
    return model, means, metrics


@pytest.mark.parametrize("settings", [{}, dict(update_epochs=3, pairs_per_batch=1, lr=0.02)])
def test_learns_a_bandit_and_the_sign_matters(settings):
    """Stops an update that does not learn: from chance (.25) to .9; with the sign flipped to .1."""
    _, right, metrics = bandit_run(40, **settings)
    assert right[0] < 0.5 and np.mean(right[-5:]) > 0.9 and metrics[5]["rewards/margins"] > 0
    assert np.mean(bandit_run(40, sign=-1.0, **settings)[1][-5:]) < 0.1


def direct_gradient(model, batch, reference, args):
    """Gradient of the mean loss over pairs, by autograd through everything at once."""
    chosen, rejected = batch.pairs[batch.differ].T
    logprobs = model.logprobs(batch.obs.flatten(0, 1), args.temperature)
    logprobs = logprobs.gather(-1, batch.actions.flatten(0, 1)[..., None]).view(32, -1)
    logratios = logprobs.sum(1) - reference
    margins = args.beta * (logratios[chosen] - logratios[rejected])
    return torch.autograd.grad(-margins.sigmoid().log().mean(), model.logits.weight)[0]


@pytest.mark.parametrize("micro_batch_size, world_size", [(1, 1), (4, 1), (100, 1), (4, 2)])
def test_two_passes_give_the_direct_gradient(monkeypatch, micro_batch_size, world_size):
    """Stops sums over steps or ranks from being another loss, as one that is not linear invites."""
    args = Args(beta=0.7, micro_batch_size=micro_batch_size, pairs_per_batch=100, temperature=0.8)
    args.max_grad_norm = 1e9
    model, reference = bandit_run(2)[0], torch.randn(32)  # margins differ from pair to pair
    batch, _ = bandit_batch(model, args)
    wanted, found = direct_gradient(model, batch, reference, args), 0.0
    here = 32 // world_size
    for rank in range(world_size):
        monkeypatch.setattr(ranks, "rank_and_world_size", lambda r=(rank, world_size): r)
        rows = slice(rank * here, (rank + 1) * here)
        pairs = batch.pairs[rank * here // 2 : (rank + 1) * here // 2] - rank * here
        ours = Batch(*(part[rows] for part in batch[:3]), pairs, batch.differ)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        update_policy(model, optimizer, ours, reference[rows], args, np.random.default_rng(0))
        found = found + model.logits.weight.grad
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    # Negative control: the loss of each half of a trajectory is another objective
    halves = [slice(0, 3), slice(3, 6)]
    halves = [batch._replace(obs=batch.obs[:, t], actions=batch.actions[:, t]) for t in halves]
    split = sum(direct_gradient(model, half, reference / 2, args) for half in halves)
    assert not torch.allclose(split, wanted, rtol=1e-2)


# --- the loop in the simulator: four states, two trajectories each, of two steps ---
FLAGS = "--name run --num-steps 4 --num-iterations 1 --eval-every 0"
# Step of the rollout x environment. In success the reward is the step's number: the returns of the
# trajectories are 1 2 | 0 0 | 0 0 | 3 0.
SUCCESS = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]], bool)


@pytest.fixture
def updates(monkeypatch):
    """List of (batch, reference's log-probs, args) of every update."""
    inputs = []

    def spy(model, optimizer, batch, ref_logprobs, args, rng):
        inputs.append((batch, ref_logprobs, args))
        return update_policy(model, optimizer, batch, ref_logprobs, args, rng)

    monkeypatch.setattr(dpo_vla, "update_policy", spy)
    return inputs


def test_what_the_loop_learns_from(train, updates, monkeypatch):
    """Stops trajectories that begin apart, act alike or repeat, rejected winners, another video."""
    ids, videos, results = [], [], []
    begin, run_episodes = CpuEnvs._begin, dpo_vla.run_episodes
    monkeypatch.setattr(CpuEnvs, "_begin", lambda envs, new: (ids.append(new), begin(envs, new)))
    monkeypatch.setattr(dpo_vla, "write_video", lambda *args: videos.append(args))
    spy = lambda *args: results.append(run_episodes(*args)) or results[-1]  # noqa: E731
    monkeypatch.setattr(dpo_vla, "run_episodes", spy)
    none = np.zeros((2, 4), bool)  # an evaluation before, one after
    success = iter([*none, *SUCCESS, *SUCCESS, *none])
    flags = f"{FLAGS} --num-iterations 2 --eval-every 2 --learning-rate 1e-12 --temperature 0.7"
    run_dir = train("dpo", flags, success=success)
    table = np.array([list(new.values()) for new in ids[1:5]])  # episodes x environments
    assert (table[:, 0::2] == table[:, 1::2]).all() and len(np.unique(table)) == 8
    batch, ref_logprobs, _ = updates[0]
    assert torch.equal(batch.obs[0::2, 0], batch.obs[1::2, 0])
    assert not (batch.actions[0::2] == batch.actions[1::2]).all(2).any(), "one noise for both"
    assert batch.pairs[[0, 3]].tolist() == [[1, 0], [6, 7]]
    assert batch.differ.tolist() == [True, False, False, True]
    assert (ref_logprobs != 0).tolist() == [True, True, *[False] * 4, True, True]
    row = metrics_of(run_dir)[1]
    assert row["train/frac_without_pair"] == 0.5 and row["train/num_pairs"] == 2
    assert row["losses/first_margin"] == row["rewards/margins"] == row["rewards/accuracies"] == 0
    assert row["losses/dpo_loss"] == pytest.approx(math.log(2))
    ((path, frames, _),) = videos
    assert path.name == "000002-pair.mp4" and not results[0]["frames"]
    for row, side in ((1, frames[:, :, :80]), (0, frames[:, :, 80:])):
        assert np.array_equal(side, results[1]["frames"][row])


def test_no_pair_no_step_and_no_reference_but_the_start(train, monkeypatch):
    """Stops AdamW from acting on nothing, NaN, policy and reference that are scored in two ways."""
    run_dir = train("dpo", FLAGS, success=iter(np.zeros((4, 4), bool)))
    assert not state_of(run_dir)["policy"]["state"], "AdamW has made a step"
    row = metrics_of(run_dir)[-1]
    assert row["train/frac_without_pair"] == 1 and row["train/num_pairs"] == 0
    load_start, seeds = dpo_vla.load_start, iter([1, 2])
    monkeypatch.setattr(dpo_vla, "load_start", lambda run, *rest: load_start(
        dataclasses.replace(run, seed=next(seeds)), *rest))  # fmt: skip
    with pytest.raises(ValueError, match="first margin"):
        train("dpo", f"{FLAGS} --name other", success=iter(SUCCESS))


@pytest.mark.parametrize("kind", ["all weights", "new adapter", "loaded adapter"])
def test_reference_is_the_start(train, updates, tmp_path, monkeypatch, kind):
    """Stops a reference that drifts, lacks the adapter or is lost, and a needless second model."""
    start, flags = "tiny", "--learning-rate 0.01"
    if kind == "loaded adapter":
        adapted = load_vla("tiny", lora_rank=2, seed=1)
        for name, weights in adapted.named_parameters():
            weights.data += 0.05 * torch.randn_like(weights) * ("lora_" in name)
        start = str(tmp_path / "adapted")
        save_vla(adapted, start)
    if kind == "new adapter":
        flags += " --lora-rank 2"
    loads, load_start = [], dpo_vla.load_start
    monkeypatch.setattr(dpo_vla, "load_start", lambda *a: loads.append(load_start(*a)) or loads[-1])
    flags = f"{FLAGS} --model {start} {flags} --num-iterations 2"
    run_dir = train("dpo", flags, success=iter([*SUCCESS, *SUCCESS]))
    assert len(loads) == 1 + (kind != "new adapter")
    assert metrics_of(run_dir)[1]["losses/first_margin"] == 0
    batch, ref_logprobs, args = updates[1]  # of a policy that has moved
    begun = load_vla(start, seed=1)
    rows = [0, 1, 6, 7]
    wanted, moved = (trajectory_logprobs(m, batch, rows, args) for m in (begun, loads[0]))
    assert torch.equal(ref_logprobs[rows], wanted) and not torch.allclose(moved, wanted, atol=1e-2)
    if kind == "loaded adapter":
        (tmp_path / "adapted").rename(tmp_path / "gone")
    train("dpo", f"{flags} --resume runs/run --num-iterations 3", success=iter(SUCCESS))
    batch, ref_logprobs, args = updates[2]
    assert torch.equal(ref_logprobs[rows], trajectory_logprobs(begun, batch, rows, args))
