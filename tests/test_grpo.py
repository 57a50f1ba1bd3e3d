"""GRPO: its functions on numbers worked by hand, its update on a bandit, the whole script in the real simulator."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_layout import write_small_hub_checkpoint
from safetensors.torch import load_file

import eval_ood
import grpo_vla
import ppo_vla
from common.model.openvla import load_vla, save_vla
from common.run import runs
from common.simulation.vec_env import make_envs
from grpo_vla import Args, group_advantages, kl_to_reference, policy_loss, sample_weights, update

ROOT = Path(__file__).parent.parent


# --- advantages ---
def one_group(*episodes):
    """Rewards of G episodes of L steps -> (1, L, 1, G) float32."""
    return torch.tensor(episodes).T[None, :, None]


def random_rewards(seed=0):
    """(2, 6, 3, 4): sparse rewards as the environment's, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 1.0, -1.0])
    return values[torch.randint(len(values), (2, 6, 3, 4), generator=generator)]


def test_outcome_advantages_by_hand():
    """Stops statistics over the whole batch or over episodes in succession, and another advantage at another step."""
    rewards = torch.cat([one_group([0.0, 1.0], [0.0, 0.0]), one_group([0.1, 0.0], [0.1, 1.0])], 2)  # K = 2
    rewards = torch.cat([rewards, one_group([0.0, 0.0], [1.0, 0.0]).repeat(1, 1, 2, 1)])  # E = 2
    advantages = group_advantages(rewards, stepwise=False)
    # Returns of each group are 1 apart: half of that is the standard deviation.
    expected = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]], [[-1.0, 1.0], [-1.0, 1.0]]])[:, None].expand(2, 2, 2, 2)
    torch.testing.assert_close(advantages, expected, atol=1e-4, rtol=0)
    three = group_advantages(one_group([1.2], [0.1], [0.1]), stepwise=False).flatten()  # mean 1.4 / 3, std 0.5185
    assert np.allclose(three, [1.41421, -0.70711, -0.70711], atol=1e-4)


def test_stepwise_advantages_by_hand():
    """Stops zeros from being shifted by the mean, which would reward every step, and a sum from the wrong end."""
    advantages = group_advantages(one_group([0.1, 0.0, 1.0], [0.0, 0.1, 0.0]), stepwise=True)[0, :, 0].T
    # Non-zero: 0.1 1.0 0.1, mean 0.4, std sqrt(0.18): normalised -0.7071 1.4142 -0.7071, then the sum to go.
    expected = [[0.70711, 1.41421, 1.41421], [-0.70711, -0.70711, 0.0]]
    assert np.allclose(advantages, expected, atol=1e-4)


def test_stepwise_advantages_are_the_published_ones():
    """Stops a departure from RL4VLA's arithmetic, here written out with NumPy for one batch that is the group."""
    rewards = random_rewards()[:1].reshape(1, 6, 1, 12)
    batch = rewards[0, :, 0].double().numpy()
    normal = np.where(batch != 0, (batch - batch[batch != 0].mean()) / (batch[batch != 0].std() + 1e-5), 0.0)
    expected = normal[::-1].cumsum(0)[::-1]
    assert np.allclose(group_advantages(rewards, stepwise=True)[0, :, 0], expected, atol=1e-5)
    shifted = ((batch - batch.mean()) / batch.std())[::-1].cumsum(0)[::-1]  # negative control: zeros normalised too
    assert not np.allclose(shifted, expected, atol=0.1)


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_group_without_differences_has_no_advantages(stepwise):
    """Stops NaN, and rounding that passes for a difference: the same outcome reached in another order of rewards."""
    first = np.diff(np.float32([0, 0.1, 0.2, 1.2]))  # grasped, held, success: differences of the potential, as rewarded
    second = np.diff(np.float32([0, 0.1, 1.1, 1.2]))
    assert first.sum(dtype=np.float64) != second.sum(dtype=np.float64)
    groups = {
        "nothing": one_group([0.0] * 3, [0.0] * 3),
        "equal": one_group([0.0, 1.0, 0.0], [0.0, 1.0, 0.0]),
    }
    if not stepwise:
        groups["another order"] = one_group(first.tolist(), second.tolist())
    else:
        groups["one reward"] = one_group([0.0, 1.0, 0.0], [0.0] * 3)
        groups["equal, at other steps"] = one_group([0.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    for name, rewards in groups.items():
        assert torch.equal(group_advantages(rewards, stepwise), torch.zeros_like(rewards)), name
    assert group_advantages(one_group([0.0, 0.1, 0.0], [0.0, 1.0, 0.0]), stepwise).abs().max() > 0.9, "sees nothing"


@pytest.mark.parametrize("stepwise", [False, True])
def test_members_are_exchangeable_and_groups_are_apart(stepwise):
    """Stops an advantage from depending on the number of an environment, or on what another group did."""
    rewards, order = random_rewards(), torch.tensor([2, 0, 3, 1])
    advantages = group_advantages(rewards, stepwise)
    torch.testing.assert_close(group_advantages(rewards[..., order], stepwise), advantages[..., order])
    changed = rewards.clone()
    changed[0, :, 1] = 5 * torch.rand(6, 4)
    same = torch.ones(2, 3, dtype=torch.bool)
    same[0, 1] = False
    other = group_advantages(changed, stepwise)
    assert torch.equal(other.transpose(1, 2)[same], advantages.transpose(1, 2)[same])
    assert not torch.allclose(other[0, :, 1], advantages[0, :, 1])


# --- weights ---
def episodes_with(rates, length=3, group_size=10):
    """successes (1, L, K, G): in group k the first rates[k] * G members succeed at the last step."""
    successes = torch.zeros(1, length, len(rates), group_size)
    for k, rate in enumerate(rates):
        successes[0, -1, k, : round(rate * group_size)] = 1
    return successes


def kept(weights):
    return (weights > 0).any(3).any(1).flatten().tolist()


def test_filter_by_success():
    """Stops a filter that drops its own bounds, counts success at another step, or keeps groups without a signal."""
    successes = episodes_with([0.0, 0.1, 0.5, 0.9, 1.0, 0.5])
    advantages = torch.ones_like(successes)
    advantages[:, :, 5] = 0
    weights = sample_weights(advantages, successes, (0.1, 0.9), False, True)
    assert kept(weights) == [False, True, True, True, False, False]
    assert torch.equal(weights.unique(), torch.tensor([0.0, 1.0])), "equal lengths must weigh exactly 1"
    assert kept(sample_weights(advantages, successes, (0.0, 1.0), False, True)) == [True] * 5 + [False]
    lost = successes.flip(1)  # solved at first, lost at the end: a success rate of 0
    assert kept(sample_weights(advantages, lost, (0.1, 1.0), False, True)) == [False] * 6
    none = sample_weights(torch.zeros_like(advantages), successes, (0.0, 1.0), True, True)
    assert torch.equal(none, torch.zeros_like(none)), "nothing left, yet no NaN"


def test_mask_after_success_and_length_norm_by_hand():
    """Stops the successful step itself from being masked, and episodes that count more for being longer."""
    successes = torch.zeros(1, 4, 2, 2)
    successes[0, 1, 0, 0] = 1  # solved after step 1, lost again: steps 2 and 3 are masked all the same
    advantages = torch.ones_like(successes)
    advantages[:, :, 1] = 0  # the second group is left out and must not enter the mean length
    masked = sample_weights(advantages, successes, (0.0, 1.0), True, False)
    assert masked[0, :, 0].T.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]] and masked[0, :, 1].sum() == 0
    # 2 and 4 steps are left, 3 on average: an episode's weights sum to 3.
    normed = sample_weights(advantages, successes, (0.0, 1.0), True, True)
    torch.testing.assert_close(normed[0, :, 0].T, torch.tensor([[1.5, 1.5, 0, 0], [0.75] * 4]))
    assert torch.equal(sample_weights(advantages, successes, (0.0, 1.0), False, True)[0, :, 0], torch.ones(4, 2))


# --- loss ---
@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",  # slope = d loss / d logprob
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),  # within the upper bound, beyond where 0.2 would clip
        (1.5, 2.0, -2.56, 0.0),  # good action, already far more likely: clipped at 1.28
        (0.5, 2.0, -1.0, -1.0),  # good action that became unlikely: not clipped
        (1.5, -2.0, 3.0, 3.0),  # bad action that became likely: not clipped
        (0.75, -2.0, 1.6, 0.0),  # bad action, already less likely: clipped at 0.8, not at 0.72
    ],
)
def test_asymmetric_clip_by_hand(ratio, advantage, loss, slope):
    """Stops exchanged bounds, a wrong sign, and a clip that also holds back corrections."""
    logprobs = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
    losses, ratios = policy_loss(logprobs, torch.tensor([-3.0]), torch.tensor([advantage]), 0.2, 0.28)
    losses.sum().backward()
    assert np.allclose([losses.item(), ratios.item(), logprobs.grad.item()], [loss, ratio, slope], atol=1e-5)


def test_kl_to_reference():
    """Stops the reverse divergence as value, and a penalty that pulls at the start: its mean is KL(policy || start)."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * kl_to_reference(policy, reference)).sum(), exact)
    assert (kl_to_reference(policy, reference) >= 0).all() and exact > 0.2
    start = policy.clone().requires_grad_()
    kl_to_reference(start, policy).sum().backward()
    assert torch.equal(kl_to_reference(policy, policy), torch.zeros(3)) and torch.equal(start.grad, torch.zeros(3))


def test_wrong_shapes_and_types_are_refused():
    """Stops ungrouped, broadcasting and half-precision tensors from giving a number."""
    rewards, vector = random_rewards(), torch.zeros(4)
    for call in (
        lambda: group_advantages(rewards[0], False),
        lambda: group_advantages(rewards.bfloat16(), True),
        lambda: sample_weights(rewards, rewards[..., :1], (0, 1), False, True),
        lambda: sample_weights(rewards, rewards != 0, (0, 1), False, True),
        lambda: policy_loss(vector, vector, vector[:, None], 0.2, 0.28),
        lambda: policy_loss(vector.half(), vector.half(), vector, 0.2, 0.28),
        lambda: kl_to_reference(vector[:, None], vector),
        lambda: kl_to_reference(vector, vector.double()),
    ):
        with pytest.raises(ValueError, match="it must be .* torch.float32"):
            call()


# --- update, on a contextual bandit: reward 1 for the action that has the context's number ---
class Bandit(torch.nn.Module):
    def __init__(self, contexts=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.logits = torch.nn.Linear(contexts, contexts)

    def evaluate(self, images, instructions, action_tokens, temperature=1.0, return_token_logprobs=False):
        logp = (self.logits(images) / temperature).log_softmax(-1)
        logprobs = logp.gather(1, action_tokens)
        entropies = -(logp.exp() * logp).sum(1)
        return (logprobs if return_token_logprobs else logprobs.sum(1)), entropies, torch.zeros(len(images))


def bandit_batch(model, seed=0, sign=1.0):
    """64 samples: 8 groups, each of one context and 8 members."""
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(4, (8,), generator=generator).repeat_interleave(8)
    images = torch.eye(4)[contexts]
    with torch.no_grad():
        tokens = torch.multinomial(model.logits(images).softmax(-1), 1, generator=generator)
        logprobs = model.evaluate(images, None, tokens)[0]
    rewards = (tokens[:, 0] == contexts).float()
    advantages = group_advantages(rewards.view(1, 1, 8, 8), stepwise=False)
    weights = sample_weights(advantages, rewards.view(1, 1, 8, 8), (0.1, 0.9), False, True).flatten()
    index = torch.where(weights > 0, (weights > 0).cumsum(0) - 1, -1).numpy()
    batch = dict(images=images, instructions=[""] * 64, action_tokens=tokens, logprobs=logprobs, index=index)
    batch |= dict(advantages=sign * advantages.flatten(), weights=weights, ref_logprobs=logprobs.clone())
    return batch, rewards.mean().item()


def bandit_run(iterations, sign=1.0, batch_change=None, rule=torch.optim.AdamW, **settings):
    """-> model, success per iteration, metrics per iteration."""
    args = Args(**dict(num_minibatches=4, num_envs=64, num_steps=1) | settings)
    model, successes, metrics = Bandit(), [], []
    optimizer = rule(model.parameters(), lr=0.1)
    for iteration in range(iterations):
        batch, success = bandit_batch(model, seed=iteration, sign=sign)
        batch |= batch_change(batch) if batch_change else {}
        if (batch["index"] >= 0).any():
            metrics.append(update(model, optimizer, batch, args, np.random.default_rng(iteration), "."))
        successes.append(success)
    return model, successes, metrics


@pytest.mark.parametrize("settings", [{}, dict(ratio_level="token"), dict(update_epochs=2, kl_coef=0.001)])
def test_learns_a_bandit_and_the_sign_matters(settings):
    """Stops an update that does not learn: from chance (0.25) to more than 0.9, and to less with the sign flipped."""
    _, successes, _ = bandit_run(60, **settings)
    assert successes[0] < 0.5 and np.mean(successes[-5:]) > 0.9
    assert np.mean(bandit_run(60, sign=-1.0, **settings)[1][-5:]) < 0.1


def test_what_is_left_out_does_not_count():
    """Stops dropped samples from entering the update by a mean, a minibatch or their number."""
    index = np.where(np.arange(64) < 8, -1, np.arange(64) - 8)  # the first group
    rows = torch.as_tensor(index >= 0)

    def poison(batch):
        change = {key: batch[key].clone() for key in ("advantages", "logprobs", "weights")}
        for tensor in change.values():
            tensor[~rows] = torch.nan
        return change | {"index": index}

    def compact(batch):
        alone = {key: value[rows] for key, value in batch.items() if isinstance(value, torch.Tensor)}
        return alone | dict(instructions=[""] * 56, index=np.arange(56))

    plain = bandit_run(1, batch_change=lambda batch: {"index": index})[0].logits.weight
    for change in (poison, compact):
        assert torch.equal(bandit_run(1, batch_change=change)[0].logits.weight, plain)
    half = np.where(np.arange(64) < 32, np.arange(64), -1)
    everything = bandit_run(1, batch_change=lambda batch: {"index": np.arange(64)})[2][0]
    dropped = bandit_run(1, batch_change=lambda batch: {"index": half})[2][0]
    assert everything["losses/num_updates"] == 4 and dropped["losses/num_updates"] == 2


def test_weights_scale_the_loss_and_accumulation_changes_nothing():
    """Stops weights that are ignored, and micro-batches that are averaged with wrong weights."""
    weights = dict(weights=torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5, index=np.arange(64))
    run = lambda **settings: bandit_run(2, batch_change=lambda batch: weights, num_minibatches=2, **settings)[0]  # noqa: E731
    models = [run(micro_batch_size=size) for size in (32, 8, 5)]
    for model in models[1:]:
        torch.testing.assert_close(model.state_dict(), models[0].state_dict(), rtol=1e-4, atol=1e-5)
    ones = bandit_run(2, batch_change=lambda batch: {"index": np.arange(64)}, num_minibatches=2)[0]
    assert not torch.allclose(ones.logits.weight, models[0].logits.weight, rtol=1e-3), "the check sees nothing"


def test_kl_penalty_holds_the_policy_at_the_start():
    """Stops a penalty that does nothing, is there at the start, or is reported without being asked for."""
    still = dict(rule=torch.optim.SGD, num_minibatches=1)
    assert "losses/ref_kl" in (metrics := bandit_run(1, kl_coef=1.0, **still)[2][0])
    assert abs(metrics["losses/ref_kl"]) < 1e-10
    moved = bandit_run(1, batch_change=lambda batch: dict(ref_logprobs=batch["logprobs"] - 0.5), kl_coef=1.0, **still)
    assert np.isclose(moved[2][0]["losses/ref_kl"], math.exp(-0.5) - 1 + 0.5, atol=1e-5)

    start = Bandit()

    def reference(batch):
        with torch.no_grad():
            return dict(ref_logprobs=start.evaluate(batch["images"], None, batch["action_tokens"])[0])

    free, held = (bandit_run(20, batch_change=reference, kl_coef=kl_coef)[0] for kl_coef in (1e-6, 10.0))
    distance = [(model.logits.weight - start.logits.weight).norm() for model in (free, held)]
    assert distance[1] < 0.5 * distance[0]


def test_entropy_bonus_and_coefficient_of_the_policy_loss():
    """Stops a bonus of the wrong sign, which removes entropy, and a pg_coef that is not used."""
    zero = lambda batch: {"advantages": torch.zeros(64), "index": np.arange(64)}  # noqa: E731
    rising = [metrics["losses/entropy"] for metrics in bandit_run(10, batch_change=zero, ent_coef=1.0)[2]]
    assert rising[-1] > rising[0] + 0.01
    plain = dict(rule=torch.optim.SGD, num_minibatches=1, max_grad_norm=math.inf)
    once, seven = (bandit_run(1, pg_coef=pg_coef, **plain)[0].logits.weight for pg_coef in (1.0, 7.0))
    start = Bandit().logits.weight
    torch.testing.assert_close(seven - start, 7 * (once - start), rtol=1e-3, atol=1e-6)
    assert (once - start).abs().max() > 1e-4


def test_guards(tmp_path, monkeypatch):
    """Stops rollout and update from disagreeing unseen, a KL guard after its step, and training on a NaN."""
    monkeypatch.chdir(tmp_path)
    metrics = bandit_run(1, num_minibatches=1)[2][0]
    assert metrics["losses/first_ratio_gap"] < 1e-6 and abs(metrics["losses/approx_kl"]) < 1e-6
    shifted = lambda batch: {"logprobs": batch["logprobs"] + 0.02}  # noqa: E731
    with pytest.raises(RuntimeError, match="before the first update, ratio_tolerance = 0.01:"):
        bandit_run(1, batch_change=shifted)
    bandit_run(1, batch_change=shifted, dtype="bfloat16")  # whose rounding alone can be as large
    with pytest.raises(RuntimeError, match="before the first update, ratio_tolerance = 0.001:"):
        bandit_run(1, batch_change=shifted, dtype="bfloat16", ratio_tolerance=0.001)
    recomputed = dict(recompute_logprobs=True, ratio_tolerance=1.0, num_minibatches=1)
    metrics = bandit_run(1, batch_change=lambda batch: {"logprobs": batch["logprobs"] + 0.5}, **recomputed)[2][0]
    assert abs(metrics["losses/approx_kl"]) < 1e-6 and metrics["losses/first_ratio_gap"] > 0.3
    free = dict(num_minibatches=1, update_epochs=3, rule=torch.optim.SGD)
    assert bandit_run(1, target_kl=1e-9, **free)[2][0]["losses/num_updates"] == 1
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        bandit_run(1, batch_change=lambda batch: dict(weights=batch["weights"] * torch.nan))


# --- args ---
def test_presets_parse_and_are_the_papers(capsys):
    """Stops a preset from losing the values of the paper's code, and `--group-size` without a value from passing."""
    paper = runs.parse_args(Args, grpo_vla.PRESETS, ["--preset", "paper", "--no-length-norm"])
    assert (paper.num_envs, paper.group_size, paper.same_state, paper.advantage) == (64, 64, False, "stepwise")
    assert (paper.clip_low, paper.clip_high, paper.kl_coef, paper.learning_rate) == (0.2, 0.2, 0.0, 1e-4)
    assert paper.num_envs * paper.num_steps / paper.num_minibatches == 160 and not paper.length_norm
    grpo_vla.main(dataclasses.replace(paper, dry_run=True))  # needs neither weights nor assets
    assert "model = gen-robot/openvla-7b-rlvla-warmup" in (plan := capsys.readouterr().out) and "109.1 M" in plan
    theirs, ours = (dataclasses.asdict(module.PRESETS["paper"]) for module in (ppo_vla, grpo_vla))
    differ = {key for key in theirs.keys() & ours.keys() if theirs[key] != ours[key]}
    assert not differ, "the paper's settings are the same in both scripts"
    with pytest.raises(SystemExit):
        runs.parse_args(Args, grpo_vla.PRESETS, ["--group-size"])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(group_size=5), "group_size = 5 must divide num_envs = 64 and be >= 2; use 64 or another"),
        (dict(group_size=1), "group_size = 1 must"),
        (dict(group_size=0), "group_size = 0 must"),
        (dict(num_envs=1), "group_size = 8 must divide num_envs = 1 and be >= 2; use --num-envs 8"),
        (dict(num_envs=4), "group_size = 8 must divide num_envs = 4"),
        (dict(filter_low=0.9, filter_high=0.1), "filter_low = 0.9 must be <= filter_high = 0.1"),
        (dict(kl_coef=-0.1), "kl_coef = -0.1 must be >= 0"),
        (dict(filter_high=90.0), "filter_high = 90.0, both in 0 to 1"),
        (dict(num_steps=30), "multiple of max_episode_steps = 40"),
        (dict(name="taken"), "runs/taken holds a run"),
    ],
)
def test_bad_args_are_refused_before_anything_is_loaded(settings, message, tmp_path, monkeypatch):
    """Stops ten minutes of waiting for an error that was certain at the start, and overwriting a finished run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/taken/checkpoint-000001").mkdir(parents=True)
    monkeypatch.setattr(grpo_vla, "make_envs", lambda *_, **__: pytest.fail("a simulator was started"))
    with pytest.raises(ValueError, match=message):
        grpo_vla.main(Args(**settings))


# --- the reference policy ---
def test_start_policy_is_the_start(tmp_path):
    """Stops the KL from being measured to another policy: to the base below an adapter that was already there, or to
    the model as it is now."""
    inputs = np.zeros((2, 64, 64, 3), np.uint8), ["put carrot on plate"] * 2
    tokens = load_vla("tiny", value_head=False).act(*inputs, generator=torch.Generator().manual_seed(0))[0]

    def change(model):
        with torch.no_grad():
            for parameter in model.trainable_parameters()["policy"]:
                parameter.add_(0.05)

    def logprobs_of(model):
        with torch.no_grad():
            return model.evaluate(*inputs, tokens)[0]

    adapted = load_vla("tiny", lora_rank=2, value_head=False)
    change(adapted)
    save_vla(adapted, tmp_path / "adapted")
    for name, rank, copied in (("tiny", 2, False), ("tiny", 0, True), (tmp_path / "adapted", 2, True)):
        model = load_vla(name, lora_rank=rank, value_head=False)
        expected, reference = logprobs_of(model), grpo_vla.start_policy(model, name)
        change(model)
        with reference() as start:
            assert (start is not model) == copied
            torch.testing.assert_close(logprobs_of(start), expected)
        assert (logprobs_of(model) - expected).abs().max() > 1e-3, "the check sees nothing"


# --- the whole script in the real simulator ---
SMALL = dict(
    model="tiny", num_envs=4, group_size=2, max_episode_steps=2, num_steps=4, num_minibatches=4, num_workers=1,
    torch_threads=1, eval_episodes=2, eval_every=0, num_videos=1, filter_low=0.0, filter_high=1.0, anneal_lr=False,
)  # fmt: skip


class Planted:
    """The real simulator with a reward that a random policy earns too: how far it moves along x; success: along y."""

    def __init__(self, envs):
        self.envs, self.first_images, self.first_instructions, self.actions = envs, [], [], []

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def reset(self, *ids):
        images, instructions = self.envs.reset(*ids)
        self.first_images.append(images.copy())
        self.first_instructions.append(list(instructions))
        return images, instructions

    def step(self, actions):
        self.actions.append(np.asarray(actions).copy())
        images, _, ended, infos = self.envs.step(actions)
        success = self.actions[-1][:, 1] > 0
        return images, 10 * self.actions[-1][:, 0].astype(np.float32), ended, infos | {"success": success}

    def close(self):
        pass


@pytest.fixture(scope="module")
def simulator():
    envs = make_envs(num_envs=4, max_episode_steps=2, num_workers=1)
    yield envs
    envs.close()


@pytest.fixture
def train(simulator, tmp_path, monkeypatch):
    """train(**settings) -> run directory; train.envs: the last run's simulator with planted rewards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "stop_on_signals", lambda _: None)

    def run(name, planted=True, **settings):
        run.envs = Planted(simulator)
        run.envs.step = run.envs.step if planted else simulator.step
        for module in (grpo_vla, ppo_vla):
            monkeypatch.setattr(module, "make_envs", lambda *_, **__: run.envs)
        grpo_vla.main(Args(**SMALL | dict(name=name) | settings))
        return tmp_path / "runs" / name

    return run


def metrics_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "system/", "charts/SPS"))} for row in rows]


def weights_of(run_dir):
    tensors = {}
    for file in sorted(runs.find_checkpoint(run_dir).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_a_group_shares_its_initial_states(train):
    """Stops a baseline over different problems: same first picture and instruction in a group, other ones in another
    group, in the next episode, and everywhere with --no-same-state; members act each for itself."""
    train("same", num_iterations=1)
    assert len(train.envs.first_images) == 2, "two episodes in a rollout"
    for images, texts in zip(train.envs.first_images, train.envs.first_instructions, strict=True):
        assert np.array_equal(images[0], images[1]) and np.array_equal(images[2], images[3])
        assert texts[0] == texts[1] and texts[2] == texts[3] and not np.array_equal(images[0], images[2])
    assert not np.array_equal(train.envs.first_images[0][0], train.envs.first_images[1][0])
    assert len(np.unique(train.envs.actions[0], axis=0)) == 4
    train("again", num_iterations=2)
    assert not np.array_equal(train.envs.first_images[0][0], train.envs.first_images[2][0]), "in the next iteration"
    train("other", num_iterations=1, same_state=False)
    for images in train.envs.first_images:
        assert len(np.unique(images, axis=0)) == 4


def test_update_gets_what_was_played(train, monkeypatch):
    """Stops advantages of the wrong sign, step, episode or member, noise that repeats in every iteration, and a
    reference that is scored at another temperature than the policy."""
    batches, update = [], grpo_vla.update
    monkeypatch.setattr(grpo_vla, "update", lambda *args: batches.append(args[2]) or update(*args))
    settings = dict(group_size=4, episode_ids=(32894,), learning_rate=1e-12)  # the same pictures to act on
    settings |= dict(kl_coef=0.1, temperature=0.5)
    train("played", num_iterations=2, **settings)
    rewards = 10 * np.stack(train.envs.actions)[:, :, 0].reshape(2, 2, 2, 4)  # iteration, episode, step, member
    for batch, played in zip(batches, rewards, strict=True):
        returns = np.broadcast_to(played.sum(1, keepdims=True), played.shape)
        expected = (returns - returns.mean(2, keepdims=True)) / returns.std(2, keepdims=True)
        np.testing.assert_allclose(batch["advantages"].reshape(2, 2, 4), expected, rtol=1e-2)
        torch.testing.assert_close(batch["ref_logprobs"], batch["logprobs"], rtol=0, atol=1e-4)
    assert np.array_equal(train.envs.first_images[0], train.envs.first_images[2])
    first, second = (batch["action_tokens"].view(4, 4, -1) for batch in batches)
    assert not (first[0] == second[0]).all(-1).any(), "in each iteration other draws, from the same pictures"


def test_smoke_with_all_files(train, capsys):
    """Stops a run that ends with unmoved weights, a value head, missing metrics, or with nothing to load."""
    run_dir = train("smoke", num_iterations=2, eval_every=2, anneal_lr=True)
    out = capsys.readouterr().out
    assert "iter 002/2 | success" in out and "| groups dropped 0.00 |" in out and "value" not in out.splitlines()[0]
    rows = metrics_of(run_dir)
    assert [row["step"] for row in rows] == [0, 16, 32] and "eval/main/success_at_end" in rows[0]
    expected = {f"losses/{key}" for key in (*grpo_vla.STATS, "grad_norm", "num_updates", "first_ratio_gap")}
    expected |= {"losses/frac_reward_zero_std", "losses/frac_groups_dropped", "charts/learning_rate"}
    expected |= {f"train/{key}" for key in grpo_vla.EPISODE_METRICS}
    assert expected <= rows[1].keys() and all(math.isfinite(rows[1][key]) for key in expected)
    assert rows[1]["losses/first_ratio_gap"] < 1e-4 and rows[1]["losses/num_updates"] == 4
    assert [row["charts/learning_rate"] for row in rows[1:]] == pytest.approx([1e-4, 5e-5])
    assert rows[1]["losses/ref_kl"] == 0 and rows[1]["losses/frac_groups_dropped"] == 0
    checkpoint = runs.find_checkpoint(run_dir)
    assert not (checkpoint / "value_head.safetensors").exists() and (run_dir / "curve.png").exists()
    assert eval_ood.find_model(str(run_dir))[1]["max_episode_steps"] == 2
    start, trained = load_vla("tiny", seed=1, value_head=False), load_vla(checkpoint, value_head=False)
    assert trained.value_head is None and not trained.trainable_parameters()["value"]
    pairs_of_weights = zip(start.named_parameters(), trained.parameters(), strict=True)
    moved = {name: not torch.equal(a, b) for (name, a), b in pairs_of_weights}
    eyes = [name for name in moved if "vision_backbone" in name or "projector" in name]
    assert eyes and not any(moved.pop(name) for name in eyes), "freeze_vision: they must not move"
    assert np.mean(list(moved.values())) > 0.9, "most other weights must have moved"


def test_checkpoints_go_to_ppo_and_come_from_it(train, tmp_path):
    """Stops the scripts from refusing each other's checkpoints: a value head that is missing, or one too many."""
    small = {key: value for key, value in SMALL.items() if key in ppo_vla.Args.__dataclass_fields__}
    common = dict(num_iterations=1, max_episode_steps=2, num_steps=2)
    start = runs.find_checkpoint(train("grpo", **common))
    settings = dict(name="ppo", model=str(start), value_input="h0", separate_critic=True)
    ppo_vla.main(ppo_vla.Args(**small | common | settings))
    start = runs.find_checkpoint(tmp_path / "runs/ppo")
    assert (start / "value_head.safetensors").exists()
    back = runs.find_checkpoint(train("back", model=str(start), **common))
    assert not (back / "value_head.safetensors").exists() and load_vla(back, value_head=False).critic is None


def test_without_a_signal_nothing_moves(train, capsys):
    """Stops weight decay and momentum from acting on nothing, and NaN from groups that all fail: a random policy in
    the real simulator earns nothing; the same when the filter leaves nothing."""
    for settings in (dict(planted=False), dict(filter_low=1.0, filter_high=1.0, seed=3)):
        run_dir = train(f"none-{len(settings)}", num_iterations=1, **settings)
        assert "| groups dropped 1.00 |" in capsys.readouterr().out
        row = metrics_of(run_dir)[-1]
        assert row["losses/num_updates"] == 0 and row["losses/frac_groups_dropped"] == 1
        assert row["losses/frac_reward_zero_std"] == (0 if settings.get("seed") else 1)
        start = load_vla("tiny", seed=settings.get("seed", 1), value_head=False).backbone.state_dict()
        assert all(torch.equal(start[key], value) for key, value in weights_of(run_dir).items())


@pytest.mark.parametrize(
    "settings",
    [
        dict(ratio_level="token", update_epochs=2, anneal_lr=True, lora_rank=2, kl_coef=0.1),
        dict(advantage="stepwise", group_size=4, same_state=False, target_kl=0.03),
        dict(mask_after_success=True, recompute_logprobs=True, activation_checkpointing=True, kl_coef=0.1),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_options_run_one_iteration(train, settings):
    """Stops an option from failing only when someone needs it."""
    row = metrics_of(train("option", num_iterations=1, **settings))[-1]
    assert math.isfinite(row["losses/policy_loss"]) and row["losses/first_ratio_gap"] < 1e-3
    assert ("kl_coef" in settings) == (row["losses/ref_kl"] > 0)


def test_resume_is_exact(train):
    """Stops a resumed run from being another experiment, its KL measured to the checkpoint: 2 = 1 + resume + 1."""
    settings = dict(kl_coef=0.1, mask_after_success=True)
    straight = train("straight", num_iterations=2, **settings)
    parts = train("parts", num_iterations=1, **settings)
    train("parts", num_iterations=2, resume=str(parts), **settings)
    assert metrics_of(parts) == metrics_of(straight)
    assert metrics_of(straight)[2]["losses/ref_kl"] > 1e-6, "the check sees nothing"
    a, b = weights_of(straight), weights_of(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


TWO_RANKS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
if __name__ == "__main__":  # the environments' processes import this file
    import grpo_vla, test_grpo
    make_envs = grpo_vla.make_envs
    grpo_vla.make_envs = lambda *args, **kwargs: test_grpo.Planted(make_envs(*args, **kwargs))
    grpo_vla.main(grpo_vla.Args(**test_grpo.SMALL | {settings} | dict(name="two")))
"""


def test_two_ranks_make_the_update_of_one(train, tmp_path):
    """Stops torchrun from being another algorithm, with a group on both ranks: same rollout, same weights."""
    settings = dict(num_iterations=1, mask_after_success=True, group_size=4)
    one = train("one", **settings)
    script = TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), settings=settings)
    (tmp_path / "two.py").write_text(script)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two.py"],
        cwd=tmp_path, env=os.environ, check=True, timeout=550,
    )  # fmt: skip
    two, start = weights_of(tmp_path / "runs/two"), load_vla("tiny", seed=1).backbone.state_dict()
    # Adam's first steps have size lr wherever the gradient is not exactly 0, so compare the update as a whole.
    one, two, start = (torch.cat([w[key].flatten() for key in start]) for w in (weights_of(one), two, start))
    assert (one - start).abs().max() > 3e-4, "the check sees nothing"
    assert (two - one).norm() < 2e-3 * (one - start).norm()
    a, b = metrics_of(tmp_path / "runs/one")[-1], metrics_of(tmp_path / "runs/two")[-1]
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == b[key] or np.isclose(a[key], b[key], rtol=1e-3, atol=1e-5), key


@pytest.mark.bridge
def test_paper_preset_runs_one_iteration_on_a_small_hub_checkpoint(tmp_path, monkeypatch):
    """Stops the real recipe's path from disk to adapter from breaking unseen: hub layout, 224 pixels, LoRA, bfloat16,
    published scene and physics; only the model's size, the numbers of steps and environments and the devices differ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "stop_on_signals", lambda _: None)
    monkeypatch.setattr(grpo_vla, "make_envs", lambda *args, **kwargs: Planted(make_envs(*args, **kwargs)))
    model = write_small_hub_checkpoint(tmp_path / "model")
    small = dict(num_envs=2, group_size=2, max_episode_steps=2, num_steps=2, num_minibatches=2, num_workers=1)
    small |= dict(model=str(model), unnorm_key="", device="cpu", sim_device="cpu", num_iterations=1, eval_every=0)
    paper = grpo_vla.PRESETS["paper"]
    grpo_vla.main(dataclasses.replace(paper, name="paper", torch_threads=1, kl_coef=0.01, **small))
    row = metrics_of(tmp_path / "runs/paper")[-1]
    assert math.isfinite(row["losses/policy_loss"]) and row["losses/first_ratio_gap"] < 0.5
    adapter = weights_of(tmp_path / "runs/paper")
    assert any("lora_B" in key and tensor.abs().max() > 0 for key, tensor in adapter.items())
    load_vla(runs.find_checkpoint(tmp_path / "runs/paper"))
