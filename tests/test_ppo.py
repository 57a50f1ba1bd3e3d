"""PPO's functions on numbers worked by hand, its update on a bandit, its loop in the simulator."""

import math

import numpy as np
import pytest
import torch
from running import state_of, weights_of

import grpo_vla
import ppo_vla
from common.model.checkpoints import load_vla
from common.model.critic import make_critic
from common.run import ranks
from common.run.metrics import check_ratio, explained_variance, normalize
from ppo_vla import Args, Batch, gae, policy_loss, value_loss


def direct_gae(rewards, values, dones, last_values, gamma, gae_lambda):
    """Eq. 16 term by term, O(T^2): the sum of (gamma lambda)^l delta_(t+l) to the episode's end."""
    next_values = torch.cat([values[1:], last_values[None]])
    deltas = rewards + gamma * next_values * (1 - dones) - values
    advantages = torch.zeros_like(rewards)
    for t in range(len(rewards)):
        goes_on = torch.ones(rewards.shape[1])
        for k in range(t, len(rewards)):
            advantages[t] += (gamma * gae_lambda) ** (k - t) * deltas[k] * goes_on
            goes_on = goes_on * (1 - dones[k])
    return advantages


def test_gae_is_the_sum_of_discounted_deltas():
    """Stops a wrong sign, off-by-one errors, and values bootstrapped across an episode's end."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 12, 5, generator=generator)
    dones = (torch.rand(12, 5, generator=generator) < 0.3).float()
    last_values = torch.randn(5, generator=generator)
    given = dict(values=values, dones=dones, last_values=last_values, gamma=0.99, gae_lambda=0.95)
    advantages, returns = gae(rewards, **given)
    torch.testing.assert_close(advantages, direct_gae(rewards, **given))
    torch.testing.assert_close(returns, advantages + values)
    # Negative controls: each wrong reading gives other numbers
    for name, wrong in (
        ("dones", dones.roll(1, 0)), ("dones", dones * 0), ("last_values", last_values * 0),
        ("gae_lambda", 1.0), ("gamma", 1.0),
    ):  # fmt: skip
        changed = direct_gae(rewards, **{**given, name: wrong})
        assert not torch.allclose(advantages, changed, atol=1e-3), name


def test_explained_variance_is_of_returns_that_are_known():
    """Stops a critic that knows nothing but agrees with its own next value from looking good."""
    end, generator = [19, 39], torch.Generator().manual_seed(0)  # two episodes of 20 steps
    rewards, dones = torch.zeros(2, 40, 200)
    dones[end] = 1.0
    rewards[end] = (torch.rand(2, 200, generator=generator) < 0.4).float()
    discounts = 0.9 ** (19 - torch.arange(40) % 20)
    perfect = discounts[:, None] * rewards[end].repeat_interleave(20, 0)
    guess = torch.randn(2, 200, generator=generator).repeat_interleave(20, 0)  # one per episode
    assert explained_variance(perfect, rewards, dones, 0.9) == pytest.approx(1)
    assert explained_variance(0.2 + 0.3 * guess, rewards, dones, 0.9) < 0
    assert explained_variance(perfect * 0, rewards, dones, 0.9) == pytest.approx(0, abs=1e-5)
    # Steps of an episode that the rollout cuts do not count: its return is not known
    dones[39], perfect[20:] = 0.0, guess[20:]
    assert explained_variance(perfect, rewards, dones, 0.9) == pytest.approx(1)


@pytest.mark.parametrize("clip, ratio, advantage, loss, slope", [  # slope = d loss / d logprob
    ([0.2], 1.5, 2.0, -2.4, 0.0),  # good action, already far more likely: clipped at 1.2
    ([0.2], 0.5, 2.0, -1.0, -1.0),  # good action that became unlikely: not clipped
    ([0.2], 1.5, -2.0, 3.0, 3.0),  # bad action that became likely: not clipped
    ([0.2], 0.5, -2.0, 1.6, 0.0),  # bad action, already far less likely: clipped at 0.8
    ([0.2, 0.28], 1.25, 2.0, -2.5, -2.5),  # GRPO's upper bound: beyond where .2 would clip
    ([0.2, 0.28], 1.5, 2.0, -2.56, 0.0),
    ([0.2, 0.28], 0.5, 2.0, -1.0, -1.0),
    ([0.2, 0.28], 0.75, -2.0, 1.6, 0.0),  # clipped at .8, not at .72
])  # fmt: skip
def test_clipped_surrogate_by_hand(clip, ratio, advantage, loss, slope):
    """Stops a wrong sign, a min for the max, exchanged bounds, a clip that holds corrections."""
    function = policy_loss if len(clip) == 1 else grpo_vla.policy_loss
    logratio = torch.tensor([math.log(ratio)], requires_grad=True)
    losses = function(logratio.exp(), torch.tensor([advantage]), *clip)
    losses.sum().backward()
    assert np.allclose([losses.item(), logratio.grad.item()], [loss, slope], atol=1e-5)


def test_value_loss_by_hand_and_wrong_shapes():
    """Stops value clipping from taking the smaller loss, and (N, 1) from being broadcast."""
    # Within the clip; beyond it, where it counts as 0.2; the wrong way, where the plain one counts
    found = value_loss(torch.tensor([0.1, 0.9, -0.5]), torch.zeros(3), torch.ones(3), 0.2)
    torch.testing.assert_close(found, 0.5 * torch.tensor([0.9, 0.8, 1.5]) ** 2)
    rollout, row, column = torch.zeros(3, 4), torch.zeros(4), torch.zeros(4, 1)
    for function, *given in (
        (gae, rollout, rollout.T, rollout, row, 0.99, 0.95),
        (gae, rollout, rollout, rollout, column, 0.99, 0.95),
        (policy_loss, row, column, 0.2),
        (value_loss, column, row, row, 0.2),
        (value_loss, row, row, column, 0.2),
        (grpo_vla.outcome_advantages, row),
        (grpo_vla.compare_groups, rollout, rollout[:, :1], 3, grpo_vla.Args(group_size=4)),
        (grpo_vla.policy_loss, row, column, 0.2, 0.28),
    ):
        with pytest.raises(AssertionError):
            function(*given)


# --- update, on a contextual bandit: two tokens per action, each right if it names the context ---
class Bandit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.logits = torch.nn.Linear(4, 8)

    def logprobs(self, obs, temperature):
        return (self.logits(obs).view(-1, 2, 4) / temperature).log_softmax(-1)

    def evaluate_actions(self, obs, instructions, actions, temperature=1.0):
        assert len(obs), "a tokenizer has no longest text of none"
        logp = self.logprobs(obs, temperature)
        entropies = -(logp.exp() * logp).sum(-1).mean(-1)
        return logp.gather(-1, actions[..., None])[..., 0], entropies, obs[:, None]


class Critic(torch.nn.Linear):
    def forward(self, obs, instructions, hidden, state):
        return super().forward(hidden[:, 0] if state is None else state)[:, 0]


@torch.no_grad()
def bandit_batch(model, critic, seed=0, sign=1.0, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(4, (64,), generator=generator)
    obs = torch.eye(4)[contexts]
    probabilities = model.logprobs(obs, temperature).exp().flatten(0, 1)
    actions = torch.multinomial(probabilities, 1, generator=generator).view(64, 2)
    logprobs = model.evaluate_actions(obs, None, actions, temperature)[0].sum(1)
    values = critic(None, None, None, obs)
    rewards = (actions == contexts[:, None]).float().mean(1)
    advantages = sign * normalize((rewards - values)[None])[0]  # episodes of one step
    return Batch(obs, [""] * 64, obs, actions, logprobs, values, advantages, rewards), rewards


def bandit_run(iterations, sign=1.0, rule=torch.optim.AdamW, change=None, **settings):
    """change(batch): fields to replace. Returns: weights, the critic's, rewards and metrics."""
    args = Args(**{"num_envs": 64, "num_steps": 1, "num_minibatches": 4, **settings})
    model, critic, means, metrics = Bandit(), Critic(4, 1), [], []
    optimizers = [rule(part.parameters(), lr=0.1) for part in (model, critic)]
    for iteration in range(iterations):
        batch, rewards = bandit_batch(model, critic, iteration, sign, args.temperature)
        batch = batch._replace(**change(batch)) if change else batch
        rng = np.random.default_rng(iteration)
        metrics.append(ppo_vla.update_policy(model, critic, optimizers, batch, args, rng))
        means.append(rewards.mean().item())
    return model.logits.weight.detach(), critic.weight.detach(), means, metrics


ONE_STEP = dict(iterations=1, rule=torch.optim.SGD, num_minibatches=1)


@pytest.mark.parametrize("settings", [{}, dict(critic="h0", update_epochs=2, ent_coef=0.001)])
def test_learns_a_bandit_and_the_sign_matters(settings):
    """Stops an update that does not learn: from chance (.25) to .9; with the sign flipped to .1."""
    right, wrong = (bandit_run(40, sign=sign, **settings)[2] for sign in (1.0, -1.0))
    assert right[0] < 0.5 and np.mean(right[-5:]) > 0.9 and np.mean(wrong[-5:]) < 0.1


def test_coefficients_and_gradient_clip():
    """Stops a bonus for less entropy, no clip, and a value loss that moves the policy."""
    no_advantages = lambda batch: {"advantages": torch.zeros(64)}  # noqa: E731
    metrics = bandit_run(10, ent_coef=1.0, change=no_advantages)[3]
    assert metrics[-1]["losses/entropy"] > metrics[0]["losses/entropy"]
    begin = Bandit().logits.weight
    clipped, free = (bandit_run(**ONE_STEP, max_grad_norm=most)[0] for most in (1e-3, 1e9))
    assert (clipped - begin).norm() <= 0.1 * 1e-3 < (free - begin).norm()
    step = dict(ONE_STEP, critic="h0", max_grad_norm=1e9, change=no_advantages)
    runs = [bandit_run(**step, vf_coef=coefficient) for coefficient in (0.0, 1.0, 3.0)]
    start, one, three = [run[1] for run in runs]
    assert not torch.equal(one, start)
    torch.testing.assert_close(three - start, 3 * (one - start))
    assert all(torch.equal(run[0], begin) for run in runs)


def test_a_state_critic_learns_its_returns():
    """Stops update_critic from learning advantages, old values, or rows of other samples."""
    model, critic = Bandit(), Critic(4, 1)
    batch, _ = bandit_batch(model, critic)
    batch = batch._replace(returns=batch.states @ torch.tensor([1.0, -2.0, 0.5, 3.0]))
    args = Args(num_envs=64, num_steps=1, num_minibatches=4, value_epochs=60)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=0.1)
    ppo_vla.update_critic(critic, optimizer, batch, args, np.random.default_rng(0))
    assert (critic(None, None, None, batch.states) - batch.returns).abs().max() < 0.1


def test_ratio_is_one_before_the_first_update():
    """Stops two distributions (temperature, sum or mean of tokens), and a KL of wrong sign."""
    args = Args(num_envs=64, num_steps=1, temperature=0.7)
    model, critic = Bandit(), Critic(4, 1)
    batch, _ = bandit_batch(model, critic, temperature=0.7)
    assert ppo_vla.ratio_gap(model, batch, args) < 1e-5
    hot, _ = bandit_batch(model, critic, temperature=1.0)
    with pytest.raises(RuntimeError):
        ppo_vla.ratio_gap(model, hot, args)
    for ratio in (1.02, 0.98, math.nan):
        with pytest.raises(RuntimeError):
            check_ratio(torch.full((64,), ratio), "float32")
    check_ratio(torch.full((64,), 1.02), "bfloat16")  # its rounding alone can be as large
    metrics = bandit_run(**ONE_STEP, temperature=0.7)[3][0]
    assert abs(metrics["losses/approx_kl"]) < 1e-6 and metrics["losses/clipfrac"] == 0
    metrics = bandit_run(**ONE_STEP, change=lambda b: {"logprobs": b.logprobs - 0.5})[3][0]
    assert metrics["losses/old_approx_kl"] == pytest.approx(-0.5, abs=1e-5)
    assert metrics["losses/approx_kl"] == pytest.approx(math.exp(0.5) - 1 - 0.5, abs=1e-5)


def test_minibatches_and_what_ends_an_update(monkeypatch):
    """Stops weights of micro-batches, a KL guard after the step, NaN, an end without a sample."""
    whole, *parts = (bandit_run(2, num_minibatches=2, micro_batch_size=m)[0] for m in (32, 8, 1, 5))
    for weights in parts:
        torch.testing.assert_close(weights, whole, rtol=1e-4, atol=1e-5)
    other = bandit_run(2, num_minibatches=4)[0]
    assert not torch.allclose(other, whole, rtol=1e-3), "the check sees nothing"
    once = bandit_run(**ONE_STEP)[0]
    assert torch.equal(bandit_run(**ONE_STEP, update_epochs=3, target_kl=1e-9)[0], once)
    assert not torch.equal(bandit_run(**ONE_STEP, update_epochs=3, target_kl=10.0)[0], once)
    with pytest.raises(RuntimeError, match="finite"):
        bandit_run(1, change=lambda batch: {"advantages": torch.full((64,), math.nan)})
    monkeypatch.setattr(ranks, "rank_and_world_size", lambda: (0, 2))
    bandit_run(1, num_envs=128, num_minibatches=64)


@pytest.mark.parametrize("critic, warmup", [
    ("state", 1), ("h0", 1), ("h0", 0), ("hn", 0), ("concat", 0), ("separate", 0),
])  # fmt: skip
def test_critics_and_their_warmup(train, critic, warmup):
    """Stops a critic that does not learn, and a warm-up that trains the policy."""
    flags = f"--critic {critic} --value-warmup-iterations {warmup} --freeze-vision"
    run_dir = train("ppo", f"{flags} --name run --eval-every 0 --num-iterations 1")
    start = load_vla("tiny", freeze_vision=True, seed=1)
    before, after = start.state_dict(), weights_of(run_dir)
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert bool(moved) == (not warmup) and all("language_model" in name for name in moved)
    state = state_of(run_dir)
    assert bool(state["policy"]["state"]) == (not warmup), "of the policy's optimizer"
    start = make_critic(critic, start, seed=1).state_dict()
    assert any(not torch.equal(start[name], trained) for name, trained in state["critic"].items())


def test_what_the_loop_learns_from(train, monkeypatch):
    """Stops shifted `dones`, a dropped last value, returns of other rows."""
    success = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    dones = [[1, 0, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    seen, update = [], ppo_vla.update_policy

    def spy_gae(*inputs):
        seen.extend([*inputs[:4], *gae(*inputs)])
        return seen[4:]

    def spy_update(model, critic, optimizers, batch, *rest):
        seen.append(batch)
        return update(model, critic, optimizers, batch, *rest)

    monkeypatch.setattr(ppo_vla, "gae", spy_gae)
    monkeypatch.setattr(ppo_vla, "update_policy", spy_update)
    flags = "--name early --num-iterations 1 --eval-every 0 --reset-after-success 1"
    train("ppo", flags, success=iter(success.astype(bool)))
    rewards, values, seen_dones, last_values, advantages, returns, batch = seen
    assert seen_dones.tolist() == dones and rewards.tolist() == success.tolist()
    assert (last_values != 0).all() and len(values.unique()) == 16
    assert torch.equal(batch.returns, returns.flatten())
    assert torch.equal(batch.advantages, normalize(advantages).flatten())
