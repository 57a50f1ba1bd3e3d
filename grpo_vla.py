"""GRPO for a vision-language-action model in simulation (Shao et al. 2024; Liu et al. 2025).

    python grpo_vla.py --num-envs 64              # small model, embedded scene, any CPU
    python grpo_vla.py --preset paper             # OpenVLA-7B, LoRA, published scene, 80 GB GPU
    torchrun --nproc-per-node 2 grpo_vla.py       # the same update on two GPUs or machines
    python grpo_vla.py --resume runs/NAME         # continues exactly

An action is 7 tokens and one decision: its log-prob is the sum over tokens, with one ratio.
There is no critic: an episode is compared with the others of its group, which began alike.
What differs from the paper's code (docs/grpo_vla.md says why), beside 1, 2 and 3 of ppo_vla.py:
 4. A group is 8 episodes from one state (theirs, `--group-size 64 --no-same-state`: from any).
 5. Returns are compared, as in GRPO's text (theirs, `--advantage stepwise`: rewards of steps).
 6. Groups with less success than 0.1, or more than 0.9, are left out (theirs: none is).
 7. The ratio may rise further than it may fall (theirs, `--clip-high 0.2`: as far).
`diff ppo_vla.py grpo_vla.py` is GRPO.
"""

import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from common.model.checkpoints import trainable_parameters
from common.run.args import Model, Run, Scene, check, check_args, parse_args
from common.run.experiment import Experiment, load_start
from common.run.metrics import Means, check_ratio, episode_metrics
from common.run.ranks import gather_envs, minibatches, setup_ranks, sum_gradients, sum_over_ranks
from common.simulation.env import SCENES
from common.simulation.episodes import training_episodes
from common.simulation.vec_env import make_envs


# --- args ---
@dataclass
class Args:
    """[P] = the value of the paper's code, where the default is another one."""

    run: Run = field(default_factory=Run)  # name, seed, resume, device, evaluation
    scene: Scene = field(default_factory=Scene)  # task, small or published, cpu or cuda
    model: Model = field(default_factory=Model)  # start, dtype, LoRA, what is frozen
    # rollout
    num_envs: int = 64  # over all ranks
    num_steps: int = 160  # control steps per environment and iteration [P] 80
    num_iterations: int = 85  # [P] 391
    temperature: float = 1.0  # of sampling, and of the distribution that is scored
    # groups
    group_size: int = 8  # neighbouring environments whose episodes are compared [P] 64
    same_state: bool = True  # a group's members begin in the same state [P] False
    advantage: Literal["outcome", "stepwise"] = "outcome"  # of whole episodes or steps [P] stepwise
    filter_low: float = 0.1  # groups with less success at the end are left out [P] 0
    filter_high: float = 0.9  # and those with more [P] 1
    # update of the policy
    learning_rate: float = 1e-4  # AdamW
    anneal_lr: bool = True  # linear to 0 over the run [P] False
    update_epochs: int = 1
    num_minibatches: int = 20  # optimizer steps per epoch [P] 32
    micro_batch_size: int = 128  # samples per forward: only memory and speed [P] 8
    clip_low: float = 0.2  # the ratio is clipped at 1 - clip_low
    clip_high: float = 0.28  # and at 1 + clip_high [P] 0.2
    ent_coef: float = 0.0
    max_grad_norm: float = 10.0  # [P] 10 of a loss that is 7 times as large
    target_kl: float | None = None  # a minibatch beyond it is dropped and ends the update


PRESETS = {
    "default": Args(),
    "paper": Args(
        scene=Scene(scene="published", sim_device="cuda"),
        model=Model("gen-robot/openvla-7b-rlvla-warmup", "bridge_orig", "bfloat16", lora_rank=32),
        num_steps=80, num_iterations=391, anneal_lr=False, num_minibatches=32, micro_batch_size=8,
        max_grad_norm=10 / 7, group_size=64, same_state=False, advantage="stepwise",
        filter_low=0.0, filter_high=1.0, clip_high=0.2,
    ),
}  # fmt: skip


# --- advantages ---
def normalize(values):
    """(x - mean) / std in float64; exactly 0 where all are equal but for rounding errors."""
    centred = values.double() - values.double().mean()
    std = centred.square().mean().sqrt()
    # Different returns are at least 0.1 apart; equal ones may be sums in another order
    return torch.where(std > 1e-4, centred / (std + 1e-5), 0.0)


# Both take the rewards of one group, (L, G) float32 of L steps of G members, and return the same
def outcome_advantages(rewards):
    """How good an episode's return is in its group, at all steps (Shao et al. 2024, 4.1.2)."""
    assert rewards.ndim == 2
    returns = rewards.double().sum(0)
    return normalize(returns).float().expand_as(rewards)


def stepwise_advantages(rewards):
    """Sum of the rewards from each step on, the group's non-zero ones normalized (RL4VLA)."""
    assert rewards.ndim == 2
    advantages = rewards.double()
    rewarded = rewards != 0
    advantages[rewarded] = normalize(rewards[rewarded])
    return advantages.flip(0).cumsum(0).flip(0).float()


def compare_groups(rewards, successes, length, args):
    """Advantages of all environments, and which groups of them are kept.

    Args: rewards, successes: (T, num_envs) float32; successes = 1: solved after this step;
        length: steps of an episode. A group is one episode of `group_size` neighbours.
    Returns: advantages (T, num_envs) float32; samples (S,) int64, the numbers t * num_envs + n of
        what is kept: groups with a difference, and a success rate within the bounds; metrics.
    """
    assert rewards.shape == successes.shape
    compare = outcome_advantages if args.advantage == "outcome" else stepwise_advantages
    steps, envs = rewards.shape
    advantages = torch.zeros_like(rewards)
    kept = torch.zeros_like(rewards)
    stats = Means()
    for episode in torch.arange(steps).view(-1, length, 1):
        for members in torch.arange(envs).view(-1, args.group_size):
            group_advantages = compare(rewards[episode, members])
            differs = group_advantages.any()
            rate = successes[episode[-1], members].double().mean()
            keep = differs and args.filter_low <= rate <= args.filter_high
            advantages[episode, members] = group_advantages
            kept[episode, members] = float(keep)
            stats.add("frac_reward_zero_std", not differs)
            stats.add("frac_groups_dropped", not keep)
    return advantages, np.flatnonzero(kept), stats.means("losses/")


# --- loss ---
def policy_loss(ratio, advantages, clip_low, clip_high):
    """Clipped surrogate objective to minimise, per sample (M,) (Schulman et al. 2017, eq. 7)."""
    assert ratio.shape == advantages.shape
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    return torch.max(pg_loss1, pg_loss2)


# --- update ---
class Batch(NamedTuple):
    """One rollout of this rank: B = T * N samples, row t * N + n is step t of environment n."""

    obs: torch.Tensor  # (B, ...) what the model sees: pixels, or image tokens of frozen eyes
    instructions: list[str]
    actions: torch.Tensor  # (B, 7) int64 tokens
    logprobs: torch.Tensor  # (B,) float32 nats per action
    advantages: torch.Tensor  # (B,) float32
    samples: np.ndarray  # (S,) t * num_envs + n of what is kept, in the environments of all ranks


def score(model, batch, inds, temperature):
    """logprobs (M,) and entropies (M,) of the actions taken, under the model as it is now."""
    instructions = [batch.instructions[i] for i in inds]
    logprobs, entropy, hidden = model.evaluate_actions(
        batch.obs[inds], instructions, batch.actions[inds], temperature
    )
    return logprobs.sum(1), entropy


def update_policy(model, optimizer, batch, args, rng):
    """GRPO epochs over one rollout: over the samples of it that are kept.

    A minibatch spans all ranks; each adds the gradients of its own samples, in micro-batches.
    Returns: dict losses/* -> mean over samples.
    """
    parameters = optimizer.param_groups[0]["params"]
    # What is left out makes fewer minibatches, not smaller ones
    share = len(batch.samples) / (args.num_envs * args.num_steps)
    num_minibatches = max(1, round(share * args.num_minibatches))
    stats = Means()
    for _ in range(args.update_epochs):
        for mb_inds, mb_size in minibatches(batch.samples, args.num_envs, num_minibatches, rng):
            mb_kl = torch.zeros(())
            optimizer.zero_grad()
            for i in range(0, len(mb_inds), args.micro_batch_size):
                inds = mb_inds[i : i + args.micro_batch_size]
                newlogprob, entropy = score(model, batch, inds, args.temperature)
                logratio = newlogprob - batch.logprobs[inds]
                ratio = logratio.exp()

                # Policy loss
                pg_loss = policy_loss(ratio, batch.advantages[inds], args.clip_low, args.clip_high)
                loss = pg_loss - args.ent_coef * entropy

                # Micro-batches and ranks add up to the mean over the minibatch
                (loss.sum() / mb_size).backward()

                # Both estimates of the KL: http://joschu.net/blog/kl-approx.html
                approx_kl = ((ratio - 1) - logratio).detach()
                mb_kl += approx_kl.sum().cpu()
                stats.add("approx_kl", approx_kl)
                stats.add("old_approx_kl", -logratio)
                stats.add("clipfrac", (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high))
                stats.add("policy_loss", pg_loss)
                stats.add("entropy", entropy)

            if args.target_kl is not None and sum_over_ranks(mb_kl) / mb_size > args.target_kl:
                return stats.means("losses/")  # before the step: this minibatch is dropped
            sum_gradients(parameters)
            norm = clip_grad_norm_(parameters, args.max_grad_norm, error_if_nonfinite=True)
            stats.add("grad_norm", norm)
            optimizer.step()
    return stats.means("losses/")


@torch.no_grad()
def ratio_gap(model, batch, args):
    """99th percentile of |ratio - 1| before the update: what acts and what is scored must agree."""
    inds = torch.arange(min(args.micro_batch_size, len(batch.logprobs)))
    newlogprob, _ = score(model, batch, inds, args.temperature)
    return check_ratio((newlogprob - batch.logprobs[inds]).exp(), args.model.dtype)


def main(args):
    # T = num_steps, N = environments of this rank, B = T * N samples
    # --- setup ---
    check_args(args, PRESETS, {})
    right = args.group_size > 1 and args.num_envs % args.group_size == 0
    check(right, f"group_size = {args.group_size} must be > 1 and divide num_envs, {args.num_envs}")
    length = SCENES[args.scene.scene]["max_episode_steps"]
    right = args.num_steps % length == 0
    check(right, f"num_steps = {args.num_steps} must be a multiple of an episode's {length} steps")
    right = args.filter_low <= args.filter_high
    check(right, f"filter_low = {args.filter_low} must be <= filter_high = {args.filter_high}")
    batch_size = args.num_envs * args.num_steps  # of all ranks
    rank, world_size, device = setup_ranks(args.run.device, args.run.seed)
    num_envs = args.num_envs // world_size
    env_numbers = np.arange(rank * num_envs, (rank + 1) * num_envs)

    model = load_start(args.run, args.model, device)
    policy_optimizer = torch.optim.AdamW(trainable_parameters(model), lr=args.learning_rate)
    envs = make_envs(num_envs, **vars(args.scene))
    experiment = Experiment(args, model, envs, {"policy": policy_optimizer})

    # --- storage ---
    actions = torch.zeros(args.num_steps, num_envs, 7, dtype=torch.long, device=device)
    logprobs = torch.zeros(args.num_steps, num_envs, device=device)
    rewards = torch.zeros(args.num_steps, num_envs, device=device)
    successes = torch.zeros(args.num_steps, num_envs, device=device)

    for iteration in range(experiment.iteration + 1, args.num_iterations + 1):
        # --- rollout ---
        start = time.monotonic()
        frac = 1.0 - (iteration - 1) / args.num_iterations if args.anneal_lr else 1.0
        policy_optimizer.param_groups[0]["lr"] = frac * args.learning_rate

        # An environment's random numbers depend on (seed, iteration, environment) alone
        rngs = [np.random.default_rng((args.run.seed, iteration, n)) for n in env_numbers]
        generators = [torch.Generator().manual_seed(int(rng.integers(2**62))) for rng in rngs]
        if args.same_state:
            # Members draw the same episodes, each from a copy of the group's stream
            groups = env_numbers // args.group_size
            rngs = [np.random.default_rng((args.run.seed, iteration, k, 1)) for k in groups]
        streams = [training_episodes(args.scene.task, rng, envs.fidelity) for rng in rngs]
        # Whole episodes and no more: the environments stand still after the last one
        streams = [islice(stream, args.num_steps // length) for stream in streams]
        next_obs, infos = envs.reset(streams)
        obs, instructions, episodes = [], [], []
        for step in range(args.num_steps):
            texts = infos["instruction"]
            obs.append(model.preprocess(next_obs).cpu())
            instructions.extend(texts)

            # ALGO LOGIC: action logic
            with torch.no_grad():
                action, logprob, hidden = model.act(obs[step], texts, args.temperature, generators)
            actions[step] = action
            logprobs[step] = logprob

            # Where an episode ended, next_obs is of the one that begins
            next_obs, reward, terminated, truncated, infos = envs.step(model.decode_actions(action))
            rewards[step] = torch.as_tensor(reward)
            successes[step] = torch.as_tensor(infos["success"])
            episodes.append(infos["episode"])

        # --- advantages ---
        # A group may span ranks: its members are among the environments of all
        advantages, samples, group_metrics = compare_groups(
            gather_envs(rewards), gather_envs(successes), length, args
        )
        rollout_s = time.monotonic() - start

        # --- update ---
        batch = Batch(
            obs=torch.cat(obs),
            instructions=instructions,
            actions=actions.flatten(0, 1),
            logprobs=logprobs.flatten(),
            advantages=advantages[:, env_numbers].flatten().to(device),
            samples=samples,
        )
        # Every rank draws the same minibatches; environments' streams have smaller numbers
        rng = np.random.default_rng((args.run.seed, iteration, args.num_envs))
        metrics = {"losses/first_ratio_gap": ratio_gap(model, batch, args)}
        if len(samples):
            metrics |= update_policy(model, policy_optimizer, batch, args, rng)
        update_s = time.monotonic() - start - rollout_s

        # --- metrics ---
        metrics |= episode_metrics(episodes)
        metrics |= group_metrics
        metrics["charts/learning_rate"] = policy_optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = batch_size / (rollout_s + update_s)
        metrics["time/rollout_s"] = rollout_s
        metrics["time/update_s"] = update_s

        # --- evaluation, log, checkpoint ---
        experiment.finish(iteration, metrics, step=iteration * batch_size)

    experiment.close()


if __name__ == "__main__":
    main(parse_args(Args, PRESETS))
