"""PPO: its functions on numbers worked by hand, its update on a bandit, the whole script in the real simulator."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_layout import write_small_hub_checkpoint
from safetensors.torch import load_file

import ppo_vla
from common.model import checkpoints, runs
from common.model.openvla import VLA, load_vla
from common.simulation.vec_env import make_envs
from ppo_vla import Args, gae, normalize, policy_loss, update, value_loss

ROOT = Path(__file__).parent.parent


# --- advantages ---
def direct_gae(rewards, values, dones, last_values, gamma, gae_lambda):
    """Eq. 16 term by term, O(T^2): A_t = sum over l of (gamma lambda)^l delta_(t+l), up to the end of the episode."""
    num_steps, num_envs = rewards.shape
    next_values = torch.cat([values[1:], last_values[None]])
    advantages = torch.zeros_like(rewards)
    for n in range(num_envs):
        for t in range(num_steps):
            for k in range(t, num_steps):
                delta = rewards[k, n] + gamma * next_values[k, n] * (1 - dones[k, n]) - values[k, n]
                advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
                if dones[k, n]:
                    break
    return advantages


def random_rollout(num_steps=12, num_envs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, num_steps, num_envs, generator=generator)
    dones = (torch.rand(num_steps, num_envs, generator=generator) < 0.3).float()
    return rewards, values, dones, torch.randn(num_envs, generator=generator)


def test_gae_is_the_sum_of_discounted_deltas():
    """Stops off-by-one errors: a value bootstrapped across an episode's end, or dones read as `starts with step t`."""
    rollout = random_rollout()
    advantages, returns = gae(*rollout, 0.99, 0.95)
    torch.testing.assert_close(advantages, direct_gae(*rollout, 0.99, 0.95))
    torch.testing.assert_close(returns, advantages + rollout[1])
    rewards, values, dones, last_values = rollout
    for wrong in (dones.roll(1, 0), 1 - dones, torch.zeros_like(dones)):  # negative controls
        assert not torch.allclose(advantages, direct_gae(rewards, values, wrong, last_values, 0.99, 0.95))
    assert not torch.allclose(advantages, direct_gae(rewards, values, dones, last_values * 0, 0.99, 0.95))


def test_gae_by_hand():
    """Stops a wrong discount: one episode of two steps, then the first step of the next."""
    rewards, values = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[0.5], [0.6], [0.2]])
    advantages, returns = gae(rewards, values, torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([0.4]), 0.9, 0.5)
    # deltas: 0 + 0.9 * 0.6 - 0.5 = 0.04;  1 - 0.6 = 0.4;  0.9 * 0.4 - 0.2 = 0.16
    assert np.allclose(advantages.flatten(), [0.04 + 0.45 * 0.4, 0.4, 0.16])
    assert np.allclose(returns.flatten(), [0.72, 1.0, 0.36])
    ones = gae(rewards, values, torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([0.4]), 1.0, 1.0)[1]
    assert np.allclose(ones.flatten(), [1.0, 1.0, 0.4]), "gamma = lambda = 1: undiscounted reward to go"


def test_gae_does_not_mix_environments():
    """Stops advantages of one environment from leaking into another."""
    rewards, values, dones, last_values = random_rollout()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = gae(rewards[:, order], values[:, order], dones[:, order], last_values[order], 0.99, 0.95)[0]
    assert torch.equal(permuted, gae(rewards, values, dones, last_values, 0.99, 0.95)[0][:, order])


def test_advantages_are_normalised_over_all_ranks():
    """Stops each rank from using statistics of its own, and a constant reward from moving anything."""
    advantages = torch.randn(6, 4)
    both = torch.cat([normalize(advantages[:, :2], advantages), normalize(advantages[:, 2:], advantages)], 1)
    torch.testing.assert_close(both, (advantages - advantages.mean()) / advantages.std())
    assert torch.equal(normalize(torch.full((6, 4), 0.1), torch.full((6, 4), 0.1)), torch.zeros(6, 4))


# --- loss ---
@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",  # slope = d loss / d logprob
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # good action, already far more likely: clipped at 1.2
        (0.5, 2.0, -1.0, -1.0),  # good action that became unlikely: not clipped
        (1.5, -2.0, 3.0, 3.0),  # bad action that became likely: not clipped
        (0.5, -2.0, 1.6, 0.0),  # bad action, already far less likely: clipped at 0.8
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, slope):
    """Stops a wrong sign, a min in place of the max, and a clip that also holds back corrections."""
    logprobs = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
    losses, ratios = policy_loss(logprobs, torch.tensor([-3.0]), torch.tensor([advantage]), 0.2)
    losses.sum().backward()
    assert np.allclose([losses.item(), ratios.item(), logprobs.grad.item()], [loss, ratio, slope], atol=1e-5)


def test_token_level_ratio_starts_with_the_same_gradient():
    """Stops --ratio-level token from silently changing the size of the update; later the clip acts on each token."""
    advantages, grads = torch.tensor([1.0, -2.0]), []
    for shape in ((2,), (2, 7)):
        shift = torch.zeros(2, requires_grad=True)
        logprobs = torch.full(shape, -1.0) + (shift if len(shape) == 1 else shift[:, None] / 7)
        losses, ratios = policy_loss(logprobs, torch.full(shape, -1.0), advantages, 0.2)
        losses.sum().backward()
        assert losses.shape == (2,) and ratios.shape == shape
        grads.append(shift.grad)
    torch.testing.assert_close(*grads)
    new = torch.zeros(1, 7)
    new[0, 0] = 1.0  # one token's ratio is e, the others 1: only that one is clipped
    assert np.isclose(policy_loss(new, torch.zeros(1, 7), torch.ones(1), 0.2)[0].item(), -(1.2 + 6))


def test_value_loss_by_hand():
    """Stops value clipping from taking the smaller loss, and Huber from being squared far out."""

    def loss(value, old, target, clip=0.2, delta=10.0):
        tensors = (torch.tensor([x], dtype=torch.float32) for x in (value, old, target))
        return value_loss(*tensors, clip, delta).item()

    assert np.isclose(loss(0.1, 0.0, 1.0), 0.5 * 0.9**2)  # within the clip: plain
    assert np.isclose(loss(0.9, 0.0, 1.0), 0.5 * 0.8**2)  # moved by 0.9: counts as if it stood at 0.2
    assert np.isclose(loss(0.9, 0.0, 1.0, clip=0), 0.5 * 0.1**2)  # no clipping
    assert np.isclose(loss(-0.5, 0.0, 1.0), 0.5 * 1.5**2)  # moved the wrong way: the larger, plain loss
    assert np.isclose(loss(3.0, 3.0, 0.0, delta=1.0), 1.0 * (3.0 - 0.5))  # Huber: linear beyond delta
    assert np.isclose(loss(0.5, 0.5, 0.0, delta=1.0), 0.125)


def test_wrong_shapes_and_types_are_refused():
    """Stops (N, 1) against (N,), transposed and half-precision tensors from giving a number."""
    rewards, values, dones, last_values = random_rollout()
    vector = torch.zeros(4)
    for call in (
        lambda: gae(rewards, values.T, dones, last_values, 0.99, 0.95),
        lambda: gae(rewards, values, dones.bool(), last_values, 0.99, 0.95),
        lambda: gae(rewards, values, dones, last_values[:, None], 0.99, 0.95),
        lambda: gae(rewards.bfloat16(), values, dones, last_values, 0.99, 0.95),
        lambda: policy_loss(vector, vector[:, None], vector, 0.2),
        lambda: policy_loss(vector, vector, vector[:, None], 0.2),
        lambda: policy_loss(vector.half(), vector.half(), vector, 0.2),
        lambda: value_loss(vector[:, None], vector, vector, 0.2, 10.0),
        lambda: value_loss(vector, vector, vector.bfloat16(), 0.2, 10.0),
    ):
        with pytest.raises(ValueError, match="it must be .* torch.float32"):
            call()


# --- update, on a contextual bandit: reward 1 for the action that has the context's number ---
class Bandit(torch.nn.Module):
    def __init__(self, contexts=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.logits, self.value = torch.nn.Linear(contexts, contexts), torch.nn.Linear(contexts, 1)

    def evaluate(self, images, instructions, action_tokens, temperature=1.0, return_token_logprobs=False):
        logp = (self.logits(images) / temperature).log_softmax(-1)
        logprobs = logp.gather(1, action_tokens)
        entropies = -(logp.exp() * logp).sum(1)
        return (logprobs if return_token_logprobs else logprobs.sum(1)), entropies, self.value(images).squeeze(1)


def bandit_batch(model, size=64, seed=0, sign=1.0, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(4, (size,), generator=generator)
    images = torch.eye(4)[contexts]
    with torch.no_grad():
        probabilities = (model.logits(images) / temperature).softmax(-1)
        tokens = torch.multinomial(probabilities, 1, generator=generator)
        logprobs, _, values = model.evaluate(images, None, tokens, temperature)
    rewards = (tokens[:, 0] == contexts).float()
    advantages, returns = gae(rewards[None], values[None], torch.ones(1, size), torch.zeros(size), 0.99, 0.95)
    advantages = sign * normalize(advantages, advantages)[0]
    batch = dict(images=images, instructions=[""] * size, action_tokens=tokens, logprobs=logprobs, values=values)
    return batch | dict(advantages=advantages, returns=returns[0], index=np.arange(size)), rewards.mean().item()


def bandit_run(iterations, sign=1.0, batch_change=None, rule=torch.optim.AdamW, **settings):
    """-> model, success per iteration, metrics per iteration."""
    args = Args(**dict(num_minibatches=4) | settings)
    model, successes, metrics = Bandit(), [], []
    optimizer = rule([{"params": part.parameters()} for part in (model.logits, model.value)], lr=0.1)
    for iteration in range(iterations):
        batch, success = bandit_batch(model, seed=iteration, sign=sign, temperature=args.temperature)
        batch |= batch_change(batch) if batch_change else {}
        metrics.append(update(model, optimizer, batch, args, np.random.default_rng(iteration), "."))
        successes.append(success)
    return model, successes, metrics


@pytest.mark.parametrize("settings", [{}, dict(ratio_level="token"), dict(update_epochs=2, ent_coef=0.001)])
def test_learns_a_bandit_and_the_sign_matters(settings):
    """Stops an update that does not learn: from chance (0.25) to more than 0.9, and to less with the sign flipped."""
    _, successes, _ = bandit_run(40, **settings)
    assert successes[0] < 0.5 and np.mean(successes[-5:]) > 0.9
    assert np.mean(bandit_run(40, sign=-1.0, **settings)[1][-5:]) < 0.1


def test_entropy_bonus_and_gradient_clip():
    """Stops a bonus that makes the policy less random, and a clip that clips nothing."""
    zero = dict(batch_change=lambda batch: {"advantages": torch.zeros(64)})
    rising = [metrics["losses/entropy"] for metrics in bandit_run(10, ent_coef=1.0, **zero)[2]]
    assert rising[-1] > rising[0]
    moved = bandit_run(1, num_minibatches=1, max_grad_norm=1e-3, rule=torch.optim.SGD)[0].logits.weight
    assert (moved - Bandit().logits.weight).norm() < 1.1e-3 * 0.1, "a step is lr times the clipped norm"


def test_constant_reward_moves_no_policy():
    """Stops a bias in the policy gradient: without advantages nothing moves."""
    start = Bandit().logits.weight.clone()
    zero = bandit_run(3, batch_change=lambda batch: {"advantages": torch.zeros(64)}, rule=torch.optim.SGD)[0]
    assert torch.equal(zero.logits.weight, start)
    assert not torch.equal(bandit_run(3, rule=torch.optim.SGD)[0].logits.weight, start)


def test_ratio_is_one_before_the_first_update():
    """Stops rollout and update from using different distributions: temperature, padding, kernels, train mode."""
    metrics = bandit_run(1, num_minibatches=1, temperature=0.7)[2][0]
    assert metrics["losses/first_ratio_gap"] < 1e-6 and abs(metrics["losses/approx_kl"]) < 1e-6
    assert metrics["losses/clipfrac"] == 0 and metrics["losses/num_updates"] == 1
    shifted = lambda batch: {"logprobs": batch["logprobs"] + 0.02}  # noqa: E731
    with pytest.raises(RuntimeError, match="before the first update, ratio_tolerance = 0.01:"):
        bandit_run(1, batch_change=shifted)
    bandit_run(1, batch_change=shifted, dtype="bfloat16")  # whose rounding alone can be as large
    with pytest.raises(RuntimeError, match="before the first update, ratio_tolerance = 0.001:"):
        bandit_run(1, batch_change=shifted, dtype="bfloat16", ratio_tolerance=0.001)
    recomputed = dict(recompute_logprobs=True, ratio_tolerance=1.0, num_minibatches=1)
    metrics = bandit_run(1, batch_change=lambda batch: {"logprobs": batch["logprobs"] + 0.5}, **recomputed)[2][0]
    assert abs(metrics["losses/approx_kl"]) < 1e-6, "the recomputed log-probs are not used"
    assert np.isclose(metrics["losses/first_ratio_gap"], 1 - math.exp(-0.5), atol=1e-3), "the gap must still be seen"


def test_accumulation_changes_nothing():
    """Stops micro-batches from being averaged with wrong weights, uneven ones included."""
    models = [bandit_run(2, num_minibatches=2, micro_batch_size=size)[0] for size in (32, 8, 1, 5)]
    for model in models[1:]:
        torch.testing.assert_close(model.state_dict(), models[0].state_dict(), rtol=1e-4, atol=1e-5)
    other = bandit_run(2, num_minibatches=4)[0].logits.weight
    assert not torch.allclose(other, models[0].logits.weight, rtol=1e-3), "the check sees nothing"


def test_kl_guard_drops_the_minibatch_before_its_step():
    """Stops a guard that acts after the damage: with SGD and one minibatch per epoch the second epoch is dropped."""
    free = dict(num_minibatches=1, update_epochs=3, rule=torch.optim.SGD)
    guarded, _, metrics = bandit_run(1, target_kl=1e-9, **free)
    once = bandit_run(1, **free | dict(update_epochs=1))[0]
    assert metrics[0]["losses/num_updates"] == 1
    assert torch.equal(guarded.logits.weight, once.logits.weight)
    unguarded = bandit_run(1, target_kl=10.0, **free)[2][0]
    assert unguarded["losses/num_updates"] == 3
    assert metrics[0]["losses/entropy"] > 0.9 * unguarded["losses/entropy"], "means are of what was scored, not of all"


def test_non_finite_loss_stops_with_the_batch_saved(tmp_path, monkeypatch):
    """Stops a NaN from being trained on, or from ending the run without evidence."""
    monkeypatch.chdir(tmp_path)
    poison = dict(returns=torch.full((64,), float("nan")))
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        bandit_run(1, batch_change=lambda batch: poison)
    assert len(torch.load(tmp_path / "nonfinite_batch-0.pt")["returns"]) == 16
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        bandit_run(1, vf_coef=1e30)  # the loss is finite, the squares of the gradient norm are not
    critic = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
    batch = {"states": torch.full((64, 3), float("nan")), "values": torch.zeros(64), "returns": torch.zeros(64)}
    batch["index"], optimizer = np.arange(64), torch.optim.AdamW(critic.parameters())
    with pytest.raises(FloatingPointError, match="the value loss is not finite"):
        ppo_vla.update_critic(critic, optimizer, batch, Args(num_minibatches=4), np.random.default_rng(0), ".")
    assert all(p.isfinite().all() for p in critic.parameters()), "a state critic must not be saved as NaN"


# --- args ---
def test_presets_parse_and_are_the_papers(monkeypatch, capsys):
    """Stops a preset from losing the paper's values, and a flag from being overridden by it."""
    paper = runs.parse_args(Args, ppo_vla.PRESETS, ["--preset", "paper", "--num-envs", "32"])
    assert (paper.preset, paper.num_envs, paper.lora_rank, paper.clip_coef, paper.gamma) == ("paper", 32, 32, 0.2, 0.99)
    assert paper.num_envs * 2 * paper.num_steps / paper.num_minibatches == 160
    ppo_vla.main(dataclasses.replace(paper, dry_run=True))  # needs neither weights nor assets
    plan = capsys.readouterr().out
    assert "model = gen-robot/openvla-7b-rlvla-warmup" in plan and "memory estimate" in plan and "109.1 M" in plan
    for num_envs in (1, 3, 64):
        ppo_vla.check_args(Args(num_envs=num_envs))
    monkeypatch.setattr(sys, "argv", ["ppo_vla.py", "--preset", "papper"])
    with pytest.raises(SystemExit):
        runs.parse_args(Args, ppo_vla.PRESETS)


def test_resume_keeps_what_the_run_is_made_of(tmp_path):
    """Stops half a run in another scene, and a best checkpoint among evaluations that measure different things."""
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(Args())))
    kept = "--seed 2,--num-envs 32,--num-steps 80,--task single,--split test,--assets bridge,--max-episode-steps 80"
    kept += ",--image-size 320 240,--sim-freq 500,--solver-iterations 15,--fidelity published,--shader-pack default"
    kept += (
        ",--sim-device cuda,--model tiny,--adapter a,--unnorm-key a,--lora-rank 2,--lora-targets llm,--episode-ids 1"
    )
    kept += ",--value-input h0,--separate-critic,--no-freeze-vision,--eval-episodes 9,--eval-temperature 1"
    for flag in kept.split(","):
        with pytest.raises(
            ValueError, match=f"{flag.split()[0][2:].replace('no-', '').replace('-', '_')} = .*is fixed"
        ):
            runs.parse_args(Args, ppo_vla.PRESETS, ["--resume", str(tmp_path), *flag.split()])
    free = ["--num-iterations", "9", "--learning-rate", "1e-5", "--reset-after-success", "0", "--device", "cpu"]
    assert runs.parse_args(Args, ppo_vla.PRESETS, ["--resume", str(tmp_path), *free]).num_iterations == 9


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_envs=0), "num_envs = 0"),
        (dict(num_minibatches=7), "not divisible by num_minibatches = 7"),
        (dict(num_steps=30), "multiple of max_episode_steps = 40"),
        (dict(temperature=0.0), "temperature = 0.0 must be > 0"),
        (dict(max_grad_norm=0.0), "max_grad_norm = 0.0 must be > 0"),
        (dict(huber_delta=0.0), "huber_delta = 0.0 must be > 0"),
        (dict(lora_rank=-1), "lora_rank = -1 must be >= 0"),
        (dict(task="no_such_task"), "no_such_task"),
        (dict(image_size=(161, 120)), "161x120"),
        (dict(assets="no_pack"), "no_pack"),
        (dict(model="no/such/model"), "no/such/model"),
        (dict(), "model 'checkpoints/tiny-warmup' is neither a directory in .* nor like the hub id"),
        (dict(model="tiny", unnorm_key="typo"), "unnorm_key = 'typo' is none of the model's 1 keys"),
        (dict(name="taken"), "runs/taken holds a run"),
        (dict(eval_episodes=0), "eval_episodes = 0 must be at least the number of ranks, 1; use 64, or --eval-every 0"),
        (dict(gamma=1.5), "gamma = 1.5 must be <= 1"),
        (dict(clip_coef=-0.2), "clip_coef = -0.2 must be >= 0"),
        (dict(target_kl=0.0), "target_kl = 0.0 would drop every minibatch"),
        (dict(episode_ids=(5, -1)), "episode_ids = .* must be >= 0"),
        (dict(separate_critic=True), "not 'state'; use 'h0'"),
        (dict(separate_critic=True, value_input="hn"), "not 'hn'; use 'h0'"),
        (dict(reset_after_success=-1), "reset_after_success = -1 must be >= 0"),
        (dict(reset_after_success=3, sim_device="cuda"), "reset_after_success needs .* use --sim-device cpu"),
    ],
)
def test_bad_args_are_refused_before_anything_is_loaded(settings, message, tmp_path, monkeypatch):
    """Stops ten minutes of waiting for an error that was certain at the start, and overwriting a finished run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/taken/checkpoint-000001").mkdir(parents=True)
    monkeypatch.setattr(ppo_vla, "make_envs", lambda *_, **__: pytest.fail("a simulator was started"))
    monkeypatch.setattr(checkpoints, "fill_backbone", lambda *_: pytest.fail("weights were read"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ppo_vla.main(Args(**settings))


# --- the whole script in the real simulator ---
SMALL = dict(
    model="tiny", num_envs=2, max_episode_steps=2, num_steps=4, num_minibatches=4, num_workers=1, torch_threads=1
)
SMALL |= dict(eval_episodes=3, eval_every=2, num_videos=1, value_warmup_iterations=0, anneal_lr=False)


@pytest.fixture(scope="module")
def simulator():
    envs = make_envs(num_envs=2, max_episode_steps=2, num_workers=1)
    yield envs
    envs.close()


@pytest.fixture
def train(simulator, tmp_path, monkeypatch):
    """train(**settings) -> run directory; one simulator serves all runs of this file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo_vla, "make_envs", lambda *_, **__: simulator)
    monkeypatch.setattr(simulator, "close", lambda: None)
    monkeypatch.setattr(runs, "stop_on_signals", lambda _: None)

    def run(name, **settings):
        ppo_vla.main(Args(**SMALL | dict(name=name) | settings))
        return tmp_path / "runs" / name

    return run


def metrics_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "system/", "charts/SPS"))} for row in rows]


def weights_of(run_dir):
    checkpoint = runs.find_checkpoint(run_dir)
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def optimizer_of(run_dir):
    return torch.load(runs.find_checkpoint(run_dir) / "training_state.pt", weights_only=True)["optimizer"]["state"]


def test_smoke_with_all_files(train, capsys, monkeypatch):
    """Stops a run that ends with unmoved weights, without metrics, curve or videos, or with nothing to load; and one
    that evaluates at another temperature than it says, or whose learning rate does not fall to 0."""
    temperatures, act = [], VLA.act
    monkeypatch.setattr(VLA, "act", lambda self, *inputs: (temperatures.append(inputs[2]), act(self, *inputs))[1])
    run_dir = train("smoke", num_iterations=2, anneal_lr=True)
    assert temperatures == [0.6] * 4 + [1.0] * 8 + [0.6] * 4
    out = capsys.readouterr().out
    assert "iter 002/2 | success" in out and "| eta " in out and "next" in out and "tiny on cpu, float32" in out
    rows = metrics_of(run_dir)
    assert [row["step"] for row in rows] == [0, 8, 16]
    assert [row["charts/learning_rate"] for row in rows[1:]] == pytest.approx([1e-4, 5e-5])
    assert {"eval/main/success_at_end", "eval/main/episodes"} <= rows[0].keys() & rows[2].keys() - rows[1].keys()
    expected = {f"losses/{key}" for key in (*ppo_vla.STATS, "grad_norm", "num_updates", "first_ratio_gap")}
    expected |= {f"train/{key}" for key in ppo_vla.EPISODE_METRICS} | {"charts/learning_rate"}
    assert expected <= rows[1].keys() and all(math.isfinite(rows[1][key]) for key in expected)
    assert rows[1]["losses/first_ratio_gap"] < 1e-4 and rows[1]["losses/num_updates"] == 4
    assert (run_dir / "curve.png").exists() and len(list((run_dir / "videos").glob("*.mp4"))) >= 2
    assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-000002"] and any(run_dir.glob("best-*"))
    start, trained = load_vla("tiny", seed=1, value_input="state"), load_vla(runs.find_checkpoint(run_dir))
    pairs = zip(start.named_parameters(), trained.parameters(), strict=True)
    moved = {name: not torch.equal(a, b) for (name, a), b in pairs}
    eyes = [name for name in moved if "vision_backbone" in name or "projector" in name]
    assert eyes and not any(moved.pop(name) for name in eyes), "freeze_vision: they must not move"
    assert np.mean(list(moved.values())) > 0.9, "most other weights must have moved"


@pytest.mark.parametrize(
    "settings",
    [
        dict(value_input="h0"),
        dict(value_input="hn"),
        dict(value_input="concat"),
        dict(value_input="h0", separate_critic=True),
        dict(ratio_level="token", update_epochs=2, anneal_lr=True),
        dict(gamma=1.0, gae_lambda=1.0, norm_adv=False, value_clip_coef=0.0, target_kl=0.03),
        dict(reset_after_success=1, recompute_logprobs=True, activation_checkpointing=True),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_ablations_run_one_iteration(train, settings):
    """Stops a flag of the study's ablations from failing only when someone needs it."""
    rows = metrics_of(train("ablation", num_iterations=1, eval_every=0, **settings))
    assert math.isfinite(rows[-1]["losses/policy_loss"]) and rows[-1]["losses/first_ratio_gap"] < 1e-3


@pytest.mark.parametrize("value_input", ["state", "h0"])
def test_success_ends_an_episode_of_one_environment(train, simulator, monkeypatch, value_input):
    """Stops --reset-after-success from resetting others too, from leaving clock or flags of the old episode, and the
    episode that the rollout's end cuts from being taken for a finished one. Episodes of 2 steps, success planted."""
    planted, rows, critics_see, ends = iter([[True, False], *[[False, False]] * 3] * 2), [], [], []
    reset, step, gae, features = simulator.reset, simulator.step, ppo_vla.gae, ppo_vla.state_features

    def planted_step(actions):
        images, reward, ended, infos = step(actions)
        return images, reward, ended, infos | {"success": np.array(next(planted))}

    monkeypatch.setattr(
        simulator, "reset", lambda ids, *some: (rows.append([list(x) for x in some]), reset(ids, *some))[1]
    )
    monkeypatch.setattr(simulator, "step", planted_step)
    monkeypatch.setattr(
        ppo_vla, "state_features", lambda *inputs: (critics_see.append(inputs[1:]), features(*inputs))[1]
    )
    monkeypatch.setattr(ppo_vla, "gae", lambda *inputs: (ends.append(inputs[2:4]), gae(*inputs))[1])
    run_dir = train("early", num_iterations=2, eval_every=0, reset_after_success=1, value_input=value_input)
    assert [row["train/success_at_end"] for row in metrics_of(run_dir)[1:]] == [0.25] * 2, "one of four, at its end"
    assert rows == [[], [[0]], [[1]], [[0]]] * 2
    for dones, _ in ends:
        assert dones.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert ends[-1][1][0] != 0, "the unfinished episode's value must be bootstrapped"
    if value_input == "state":
        clocks = [[0, 0], [0, 0.5], [0.5, 0], [0, 0.5], [0.5, 0]]  # before each step and after the last
        assert [clock.tolist() for _, clock in critics_see] == clocks * 2
        assert not any(flags[:, 2].any() for flags, _ in critics_see), "success of the episode that it ended"


def test_fixed_episodes(train, simulator, monkeypatch):
    """Stops the check on one configuration from training or evaluating on others."""
    seen, reset = set(), simulator.reset
    monkeypatch.setattr(simulator, "reset", lambda ids, *rows: (seen.update(map(int, ids)), reset(ids, *rows))[1])
    train("fixed", num_iterations=1, episode_ids=(549270,))
    assert seen == {549270}
    train("all", num_iterations=1)
    assert len(seen) > 4, "the check sees nothing"


def test_episodes_differ_between_iterations_and_seeds(train, simulator, monkeypatch):
    """Stops a run from training on the same few episodes for ever, and seeds from being repetitions."""
    seen, reset = [], simulator.reset
    monkeypatch.setattr(simulator, "reset", lambda ids, *rows: (seen.extend(map(int, ids)), reset(ids, *rows))[1])
    train("seed1", num_iterations=2, eval_every=0)
    train("seed2", num_iterations=2, eval_every=0, seed=2)
    assert len(seen) == len(set(seen)) == 16


def test_the_best_checkpoint_is_the_one_with_the_highest_success_at_end(train, monkeypatch):
    """Stops the worst, the last, or the one that succeeds once from being kept, and a resume from forgetting it."""
    planted = iter([0.2, 0.8, 0.5, 0.6])

    def evaluate(*_):
        end = next(planted)
        return {"eval/main/success_at_end": end, "eval/main/success_once": 1 - end}

    monkeypatch.setattr(ppo_vla, "evaluate", evaluate)
    run_dir = train("best", num_iterations=2, eval_every=1)
    assert [path.name for path in run_dir.glob("best-*")] == ["best-000001"]
    train("best", num_iterations=3, eval_every=1, resume=str(run_dir))
    assert [path.name for path in run_dir.glob("best-*")] == ["best-000001"]


def test_value_warmup_and_lora_move_only_their_weights(train):
    """Stops the warm-up of a random critic from damaging the policy, and LoRA from touching the frozen weights."""
    settings = dict(num_iterations=1, value_warmup_iterations=1, eval_every=0)
    warm = load_vla(runs.find_checkpoint(train("warm", value_input="h0", **settings)))
    start = load_vla("tiny", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(warm.backbone.parameters(), start.backbone.parameters(), strict=True))
    assert not torch.equal(warm.value_head.head_l1.weight, start.value_head.head_l1.weight)
    run_dir, first = train("state", **settings), load_vla("tiny", value_input="state", seed=1).value_head
    warm = load_vla(runs.find_checkpoint(run_dir))
    assert warm.value_input == "state" and not torch.equal(warm.value_head.layers[0].weight, first.layers[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(warm.backbone.parameters(), start.backbone.parameters(), strict=True))
    assert len(optimizer_of(run_dir)) == 6, "weights and biases of a state critic's three layers, and nothing else"
    lora = load_vla(runs.find_checkpoint(train("lora", num_iterations=1, lora_rank=4, eval_every=0)))
    frozen = {name: p for name, p in lora.backbone.named_parameters() if "lora_" not in name}
    same = dict(start.backbone.named_parameters())
    assert all(torch.equal(p, same[name.replace(".base_layer", "")]) for name, p in frozen.items())
    assert any(p.abs().max() > 0 for name, p in lora.backbone.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("settings", [{}, dict(freeze_vision=False, value_warmup_iterations=2)], ids=["", "eyes"])
def test_resume_is_exact(train, settings):
    """Stops a resumed run from being another experiment: 4 iterations = 2 + resume + 2, bit for bit."""
    straight = train("straight", num_iterations=4, **settings)
    parts = train("parts", num_iterations=2, **settings)
    train("parts", num_iterations=4, resume=str(parts), **settings)
    assert metrics_of(parts) == metrics_of(straight)
    a, b = weights_of(straight), weights_of(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    a, b = optimizer_of(straight), optimizer_of(parts)
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def command(*flags):
    small = Args(**SMALL | dict(eval_every=0))
    names = "model num_envs max_episode_steps num_steps num_minibatches num_workers torch_threads eval_every"
    names = [*names.split(), "value_warmup_iterations"]
    values = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(small, name)))]
    return [str(ROOT / "ppo_vla.py"), *values, "--no-anneal-lr", *flags]


def test_sigterm_leaves_a_run_that_continues_exactly(train, tmp_path):
    """Stops a preempted job from losing its run: the last line says how to go on, and going on changes nothing."""
    process = subprocess.Popen(
        [sys.executable, *command("--name", "stopped", "--num-iterations", "1000")],
        stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "runs/stopped/checkpoint-000001").exists():
        assert not any((tmp_path / "runs").glob("stopped/checkpoint-00001*")), "missed the first iteration"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    last_line = process.communicate(timeout=60)[0].strip().splitlines()[-1]
    assert process.returncode == 128 + signal.SIGTERM
    assert last_line.startswith("SIGTERM: the last checkpoint, if any, is kept")
    assert last_line.endswith("--resume runs/stopped")
    stopped = tmp_path / "runs/stopped"
    iterations = int(runs.find_checkpoint(stopped).name[-6:]) + 1
    train("stopped", num_iterations=iterations, resume=str(stopped), eval_every=0)
    straight = weights_of(train("straight", num_iterations=iterations, eval_every=0))
    resumed = weights_of(stopped)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_two_ranks_make_the_update_of_one(train, tmp_path):
    """Stops torchrun from being another algorithm: same total batch on 1 and 2 ranks, same weights, after an iteration
    of value warm-up, in which the policy has no gradient to sum, and one of both."""
    train("one", num_iterations=2, value_warmup_iterations=1, eval_every=0)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + command("--name", "two", "--num-iterations", "2", "--value-warmup-iterations", "1"),
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=550,
    )  # fmt: skip
    fresh = load_vla("tiny", seed=1, value_input="state")
    heads = {f"value_head.{key}": value for key, value in fresh.value_head.state_dict().items()}
    for start, moved in ((fresh.backbone.state_dict(), 1.2e-4), (heads, 1e-3)):  # at least, of some weight
        # Adam's first steps have size lr wherever the gradient is not exactly 0, so compare the update as a whole.
        found = weights_of(tmp_path / "runs/one"), weights_of(tmp_path / "runs/two"), start
        one, two, before = (torch.cat([w[key].flatten() for key in start]) for w in found)
        assert (one - before).abs().max() > moved, "the check sees nothing"
        assert (two - one).norm() < 2e-3 * (one - before).norm()
    a, b = metrics_of(tmp_path / "runs/one")[-1], metrics_of(tmp_path / "runs/two")[-1]
    assert a.keys() == b.keys()
    for key in a:
        # log-ratios of 1e-2 nats differ as much as the updates do, by 2e-3 of their size
        assert a[key] == b[key] or np.isclose(a[key], b[key], rtol=1e-3, atol=5e-5), key


@pytest.mark.bridge
def test_paper_preset_runs_one_iteration_on_a_small_hub_checkpoint(tmp_path, monkeypatch):
    """Stops the real recipe's path from disk to adapter from breaking unseen: hub layout, 224 pixels, LoRA, bfloat16,
    published scene and physics; only the model's size, the numbers of steps and environments and the devices differ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "stop_on_signals", lambda _: None)
    model = write_small_hub_checkpoint(tmp_path / "model")
    small = dict(num_envs=1, max_episode_steps=2, num_steps=2, num_minibatches=2, num_workers=1, torch_threads=1)
    small |= dict(model=str(model), unnorm_key="", device="cpu", sim_device="cpu", num_iterations=1, eval_every=0)
    ppo_vla.main(dataclasses.replace(ppo_vla.PRESETS["paper"], name="paper", **small))
    run_dir = tmp_path / "runs/paper"
    row = metrics_of(run_dir)[-1]
    assert math.isfinite(row["losses/policy_loss"]) and row["losses/first_ratio_gap"] < 0.5
    adapter = weights_of(run_dir)
    assert any("lora_B" in key and tensor.abs().max() > 0 for key, tensor in adapter.items())
    assert (runs.find_checkpoint(run_dir) / "adapter_config.json").exists()
    load_vla(runs.find_checkpoint(run_dir))
