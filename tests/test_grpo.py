"""GRPO's functions on numbers worked by hand, its update on a bandit, its loop in the simulator."""

import math

import numpy as np
import pytest
import test_ppo
import torch
from running import metrics_of, state_of

import grpo_vla
from common.run import ranks
from common.simulation.vec_env import CpuEnvs
from grpo_vla import Args, Batch, compare_groups, outcome_advantages
from grpo_vla import stepwise_advantages as stepwise

BOTH = pytest.mark.parametrize("advantages_of", [outcome_advantages, stepwise])


def group(*episodes):
    return torch.tensor(episodes).T  # (L, G)


def random_rewards(num_steps, num_envs):
    places = torch.randint(7, (num_steps, num_envs), generator=torch.Generator().manual_seed(0))
    return torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 1.0, -1.0])[places]


def test_advantages_by_hand():
    """Stops a sample's std, zeros that the mean shifts, which rewards every step, a wrong sum."""
    found = outcome_advantages(group([1.2, 0.0], [0.0, 0.1], [0.1, 0.0]))
    # Returns: 1.2 .1 .1, mean 1.4 / 3, std .5185
    assert np.allclose(found, [[1.41421, -0.70711, -0.70711]] * 2, atol=1e-4)
    # Non-zero: .1 1 .1, mean .4, std sqrt(.18): -.7071 1.4142 -.7071, then the sum to go
    found = stepwise(group([0.1, 0.0, 1.0], [0.0, 0.1, 0.0]))
    expected = group([0.70711, 1.41421, 1.41421], [-0.70711, -0.70711, 0.0])
    assert np.allclose(found, expected, atol=1e-4)


@BOTH
def test_a_group_without_differences_has_no_advantages(advantages_of):
    """Stops NaN, and rounding that passes for a difference: one outcome, rewards in two orders."""
    places = ([0, 0.1, 0.2, 1.2], [0, 0.1, 1.1, 1.2])
    orders = [np.diff(np.float32(x)).tolist() for x in places]
    assert sum(orders[0]) != sum(orders[1])
    never, late = [0.0] * 3, [0.0, 1.0, 0.0]
    groups = {outcome_advantages: [orders], stepwise: [(late, never), (late, [1.0, 0.0, 0.0])]}
    for members in ((never, never), (late, late), *groups[advantages_of]):
        assert torch.equal(advantages_of(group(*members)), torch.zeros(3, 2))
    assert advantages_of(group([0.0, 0.1, 0.0], late)).abs().max() > 0.9


@BOTH
def test_groups_are_apart_and_members_exchangeable(advantages_of):
    """Stops a baseline over the batch or other episodes, or one that depends on a number."""
    rewards, order = random_rewards(12, 12), [2, 0, 3, 1]
    name = "outcome" if advantages_of is outcome_advantages else "stepwise"
    args = Args(group_size=4, advantage=name, filter_high=1.0)
    found, _, _ = compare_groups(rewards, torch.ones(12, 12), 6, args)
    for t in (0, 6):
        for n in (0, 4, 8):
            block = rewards[t : t + 6, n : n + 4]
            assert torch.equal(found[t : t + 6, n : n + 4], advantages_of(block))
            assert torch.equal(advantages_of(block[:, order]), advantages_of(block)[:, order])


def test_filter_by_success():
    """Stops a filter that drops its bounds, keeps equal groups, or misnumbers samples."""
    successes, rewards = torch.zeros(3, 60), torch.rand(3, 60)
    for k, solved in enumerate([0, 1, 5, 9, 10, 5]):
        successes[-1, 10 * k : 10 * k + solved] = 1
    rewards[:, 50:] = 0.1  # the last group has no difference

    def kept(successes, **bounds):
        _, samples, metrics = compare_groups(rewards, successes, 3, Args(group_size=10, **bounds))
        groups = np.unique(samples % 60 // 10)
        members = np.flatnonzero(np.isin(np.arange(60) // 10, groups))
        assert samples.tolist() == [*members, *members + 60, *members + 120]
        assert metrics["losses/frac_groups_dropped"] == pytest.approx(1 - len(groups) / 6)
        return groups.tolist()

    assert kept(successes) == [1, 2, 3]
    assert kept(successes, filter_low=0.0, filter_high=1.0) == [0, 1, 2, 3, 4]
    assert kept(successes.flip(0)) == [], "solved at first, not at the end"


# --- update, on test_ppo's contextual bandit: an environment per sample, episodes of one step ---
def bandit_run(iterations, sign=1.0, rule=torch.optim.AdamW, change=None, **settings):
    """change(batch): fields to replace. Returns: weights, gradient, mean rewards per iteration."""
    settings = dict(dict(num_envs=64, num_steps=1, num_minibatches=4), **settings)
    args, model, means = Args(**settings), test_ppo.Bandit(), []
    optimizer = rule(model.parameters(), lr=0.1)
    for iteration in range(iterations):
        played, rewards = test_ppo.bandit_batch(model, test_ppo.Critic(4, 1), iteration)
        groups = compare_groups(rewards[None], rewards[None].round(), 1, args)
        fields = {name: getattr(played, name) for name in Batch._fields[:4]}
        batch = Batch(**fields, advantages=sign * groups[0][0], samples=groups[1])
        batch = batch._replace(**change(batch)) if change else batch
        grpo_vla.update_policy(model, optimizer, batch, args, np.random.default_rng(iteration))
        means.append(rewards.mean().item())
    return model.logits.weight.detach(), model.logits.weight.grad, means


ONE_STEP = dict(iterations=1, rule=torch.optim.SGD, num_minibatches=1, max_grad_norm=1e9)


@pytest.mark.parametrize("settings", [{}, dict(update_epochs=2, ent_coef=0.001)])
def test_learns_a_bandit_and_the_sign_matters(settings):
    """Stops an update that does not learn: from chance (.25) to .9; with the sign flipped to .1."""
    means = [bandit_run(40, sign, filter_low=0, filter_high=1, **settings)[2] for sign in (1, -1)]
    assert means[0][0] < 0.5 and np.mean(means[0][-5:]) > 0.9 and np.mean(means[1][-5:]) < 0.1


def test_what_is_left_out_does_not_count(monkeypatch):
    """Stops dropped samples from entering the update, and minibatches from becoming smaller."""
    numbers, split = [], grpo_vla.minibatches
    monkeypatch.setattr(grpo_vla, "minibatches", lambda *a: numbers.append(a[2]) or split(*a))

    def run(first, poison):
        def change(batch):
            batch.advantages[:16] += poison
            return {"samples": np.arange(first, 64)}

        return bandit_run(1, change=change)[0]

    assert torch.equal(run(16, math.nan), run(16, 0.0))
    assert not torch.allclose(run(0, 0.0), run(16, 0.0), rtol=1e-3), "the check sees nothing"
    assert numbers == [3, 3, 4, 3]


def test_accumulation_ranks_and_kl_guard(monkeypatch):
    """Stops micro-batches or ranks from being averaged, and a rank without a sample from ending."""
    samples = {"samples": np.arange(1, 33)}  # of two ranks, 31 of the first and 1 of the second
    whole = bandit_run(**ONE_STEP, change=lambda batch: samples)[1]
    parts = bandit_run(**ONE_STEP, change=lambda batch: samples, micro_batch_size=5)[1]
    torch.testing.assert_close(parts, whole)
    total = 0.0
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank_and_world_size", lambda rank=rank: (rank, 2))

        def ours(batch, rows=slice(32 * rank, 32 * rank + 32)):
            return dict({name: part[rows] for name, part in batch._asdict().items()}, **samples)

        total = total + bandit_run(**ONE_STEP, change=ours)[1]
    torch.testing.assert_close(total, whole)
    samples["samples"] = np.arange(32)
    assert bandit_run(**ONE_STEP, change=ours)[1] is None, "the second one has none"
    # The KL guard acts before the damage: of three epochs the second one is dropped
    monkeypatch.undo()
    guarded = bandit_run(**ONE_STEP, update_epochs=3, target_kl=1e-9)[0]
    assert torch.equal(guarded, bandit_run(**ONE_STEP)[0])


FLAGS = "--name run --num-steps 4 --num-iterations 1 --eval-every 0"


@pytest.mark.parametrize("same_state", [True, False])
def test_a_group_begins_alike(train, monkeypatch, same_state):
    """Stops a baseline over different problems, repeated episodes, a step on nothing, NaN."""
    ids, begin = [], CpuEnvs._begin
    monkeypatch.setattr(CpuEnvs, "_begin", lambda envs, new: (ids.append(new), begin(envs, new)))
    flags = f"{FLAGS} --num-iterations 2 --{'' if same_state else 'no-'}same-state"
    run_dir = train("grpo", flags, success=iter(np.zeros((8, 4), bool)))
    table = np.array([list(new.values()) for new in ids])  # successive episodes x environments
    assert table.shape == (4, 4) and len(np.unique(table)) == (8 if same_state else 16)
    assert (table[:, 0::2] == table[:, 1::2]).all() == same_state
    assert metrics_of(run_dir)[-1]["losses/frac_groups_dropped"] == 1
    assert not state_of(run_dir)["policy"]["state"], "AdamW has made a step"


def test_what_the_loop_learns_from(train, monkeypatch):
    """Stops advantages of the wrong sign, step, episode or member, of planted successes."""
    success = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], bool)
    batches = []
    monkeypatch.setattr(grpo_vla, "update_policy", lambda *args: batches.append(args[2]) or {})
    run_dir = train("grpo", FLAGS, success=iter(success))
    # Returns: 1 2 | 0 0 in the first episode, 0 0 | 1 3 in the second; equal ones are left out
    expected = torch.tensor([[-1.0, 1, 0, 0]] * 2 + [[0, 0, -1.0, 1]] * 2)
    torch.testing.assert_close(batches[0].advantages, expected.flatten(), atol=1e-4, rtol=0)
    assert batches[0].samples.tolist() == [0, 1, 4, 5, 10, 11, 14, 15]
    row = metrics_of(run_dir)[-1]
    assert row["losses/frac_groups_dropped"] == row["losses/frac_reward_zero_std"] == 0.5
