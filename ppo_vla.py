"""PPO for a vision-language-action model in simulation (Schulman et al. 2017; Liu et al. 2025).

    python ppo_vla.py --num-envs 64               # small model, embedded scene, any CPU
    python ppo_vla.py --preset paper              # OpenVLA-7B, LoRA, published scene, 80 GB GPU
    torchrun --nproc-per-node 2 ppo_vla.py        # the same update on two GPUs or machines
    python ppo_vla.py --resume runs/NAME          # continues exactly

An action is 7 tokens and one decision: its log-prob is the sum over tokens, with one ratio.
What differs from the paper's code (docs/ppo_vla.md says why):
 1. Actions are sampled from exactly the distribution that is scored (theirs: top-k in sampling).
 2. The policy loss counts once (theirs: 7 times, by a broadcast; paper preset: vf_coef = 1/7).
 3. Trained weights, log-probs and losses are float32 (theirs: bfloat16).
 4. The critic reads the simulator's state (theirs, `--critic h0`: a hidden state of the policy).
 5. An episode ends when success has lasted 5 steps (theirs: never, `--reset-after-success 0`).
`diff ppo_vla.py grpo_vla.py` is GRPO.
"""

import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from common.model.checkpoints import trainable_parameters
from common.model.critic import make_critic
from common.run.args import Model, Run, Scene, check_args, parse_args
from common.run.experiment import Experiment, load_start
from common.run.metrics import Means, check_ratio, episode_metrics, explained_variance, normalize
from common.run.ranks import minibatches, setup_ranks, sum_gradients, sum_over_ranks
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
    reset_after_success: int = 5  # an episode ends when success lasted so long; 0 = never [P] 0
    # update of the policy
    learning_rate: float = 1e-4  # AdamW
    anneal_lr: bool = True  # linear to 0 over the run [P] False
    update_epochs: int = 1
    num_minibatches: int = 20  # optimizer steps per epoch [P] 32
    micro_batch_size: int = 128  # samples per forward: only memory and speed [P] 8
    clip_coef: float = 0.2  # of the ratio, and of the value's move
    ent_coef: float = 0.0
    max_grad_norm: float = 10.0  # [P] 10 of a loss that is 7 times as large
    target_kl: float | None = None  # a minibatch beyond it is dropped and ends the update
    # critic
    critic: Literal["state", "h0", "hn", "concat", "separate"] = "state"  # its input [P] h0
    value_learning_rate: float = 1e-3  # AdamW [P] 3e-3
    value_epochs: int = 4  # passes of a state critic over a rollout
    value_warmup_iterations: int = 3  # first iterations, which train the critic alone [P] 0
    vf_coef: float = 1.0  # of the value loss beside the policy's [P] 1/7
    gamma: float = 0.99
    gae_lambda: float = 0.8  # [P] 0.95


PRESETS = {
    "default": Args(),
    "paper": Args(
        scene=Scene(scene="published", sim_device="cuda"),
        model=Model("gen-robot/openvla-7b-rlvla-warmup", "bridge_orig", "bfloat16", lora_rank=32),
        num_steps=80, num_iterations=391, anneal_lr=False, num_minibatches=32, micro_batch_size=8,
        max_grad_norm=10 / 7, reset_after_success=0, critic="h0", vf_coef=1 / 7,
        value_learning_rate=3e-3, value_warmup_iterations=0, gae_lambda=0.95,
    ),
}  # fmt: skip


# --- advantages ---
def gae(rewards, values, dones, last_values, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    Args: rewards, values, dones: (T, N) float32; dones[t] = 1: an episode ended with step t, so
        that neither the next value nor a later reward counts. last_values: (N,) after step T - 1.
    Returns: advantages and returns = advantages + values, (T, N) float32 each.
    """
    assert rewards.shape == values.shape == dones.shape
    assert last_values.shape == rewards.shape[1:]
    advantages = torch.zeros_like(rewards)
    nextvalues = last_values
    lastgaelam = 0.0
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1.0 - dones[t]
        delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
        lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
        advantages[t] = lastgaelam
        nextvalues = values[t]
    return advantages, advantages + values


# --- loss ---
def policy_loss(ratio, advantages, clip_coef):
    """Clipped surrogate objective to minimise, per sample (M,) (Schulman et al. 2017, eq. 7)."""
    assert ratio.shape == advantages.shape
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * torch.clamp(ratio, 1 - clip_coef, 1 + clip_coef)
    return torch.max(pg_loss1, pg_loss2)


def value_loss(values, old_values, returns, clip_coef):
    """Half the squared error per sample (M,), of the value or of the clipped value: the larger.

    The paper's Huber loss with delta 10 is the same: returns are at most 1.2.
    """
    assert values.shape == old_values.shape == returns.shape
    v_clipped = old_values + torch.clamp(values - old_values, -clip_coef, clip_coef)
    v_loss_unclipped = (values - returns) ** 2
    v_loss_clipped = (v_clipped - returns) ** 2
    return 0.5 * torch.max(v_loss_unclipped, v_loss_clipped)


# --- update ---
class Batch(NamedTuple):
    """One rollout of this rank: B = T * N samples, row t * N + n is step t of environment n."""

    obs: torch.Tensor  # (B, ...) what the model sees: pixels, or image tokens of frozen eyes
    instructions: list[str]
    states: torch.Tensor  # (B, D) float32, the simulator's state: for a state critic only
    actions: torch.Tensor  # (B, 7) int64 tokens
    logprobs: torch.Tensor  # (B,) float32 nats per action
    values: torch.Tensor  # (B,) float32
    advantages: torch.Tensor  # (B,) float32
    returns: torch.Tensor  # (B,) float32


def score(model, batch, inds, temperature):
    """logprobs (M,), entropies (M,), hidden states of the actions taken, under the model now."""
    instructions = [batch.instructions[i] for i in inds]
    logprobs, entropy, hidden = model.evaluate_actions(
        batch.obs[inds], instructions, batch.actions[inds], temperature
    )
    return logprobs.sum(1), entropy, hidden


def update_policy(model, critic, optimizers, batch, args, rng):
    """PPO epochs over one rollout: of the policy, and of a critic that reads its hidden states.

    A minibatch spans all ranks; each adds the gradients of its own samples, in micro-batches.
    Returns: dict losses/* -> mean over samples.
    """
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    samples = np.arange(args.num_envs * args.num_steps)
    stats = Means()
    for _ in range(args.update_epochs):
        for mb_inds, mb_size in minibatches(samples, args.num_envs, args.num_minibatches, rng):
            mb_kl = torch.zeros(())
            for optimizer in optimizers:
                optimizer.zero_grad()
            for i in range(0, len(mb_inds), args.micro_batch_size):
                inds = mb_inds[i : i + args.micro_batch_size]
                newlogprob, entropy, hidden = score(model, batch, inds, args.temperature)
                logratio = newlogprob - batch.logprobs[inds]
                ratio = logratio.exp()

                # Policy loss
                pg_loss = policy_loss(ratio, batch.advantages[inds], args.clip_coef)
                loss = pg_loss - args.ent_coef * entropy

                # Value loss; a state critic shares no weights and is trained by update_critic
                if args.critic != "state":
                    instructions = [batch.instructions[i] for i in inds]
                    newvalue = critic(batch.obs[inds], instructions, hidden, None)
                    old_values, returns = batch.values[inds], batch.returns[inds]
                    v_loss = value_loss(newvalue, old_values, returns, args.clip_coef)
                    loss = loss + args.vf_coef * v_loss
                    stats.add("value_loss", v_loss)

                # Micro-batches and ranks add up to the mean over the minibatch
                (loss.sum() / mb_size).backward()

                # Both estimates of the KL: http://joschu.net/blog/kl-approx.html
                approx_kl = ((ratio - 1) - logratio).detach()
                mb_kl += approx_kl.sum().cpu()
                stats.add("approx_kl", approx_kl)
                stats.add("old_approx_kl", -logratio)
                stats.add("clipfrac", (ratio - 1).abs() > args.clip_coef)
                stats.add("policy_loss", pg_loss)
                stats.add("entropy", entropy)

            if args.target_kl is not None and sum_over_ranks(mb_kl) / mb_size > args.target_kl:
                return stats.means("losses/")  # before the step: this minibatch is dropped
            sum_gradients(parameters)
            norm = clip_grad_norm_(parameters, args.max_grad_norm, error_if_nonfinite=True)
            stats.add("grad_norm", norm)
            for optimizer in optimizers:
                optimizer.step()
    return stats.means("losses/")


def update_critic(critic, optimizer, batch, args, rng):
    """Passes of a state critic over one rollout. Returns: dict with losses/value_loss."""
    samples = np.arange(args.num_envs * args.num_steps)
    stats = Means()
    for _ in range(args.value_epochs):
        for mb_inds, mb_size in minibatches(samples, args.num_envs, args.num_minibatches, rng):
            newvalue = critic(None, None, None, batch.states[mb_inds])
            v_loss = 0.5 * (newvalue - batch.returns[mb_inds]) ** 2
            optimizer.zero_grad()
            (v_loss.sum() / mb_size).backward()
            sum_gradients(critic.parameters())
            optimizer.step()
            stats.add("value_loss", v_loss)
    return stats.means("losses/")


@torch.no_grad()
def ratio_gap(model, batch, args):
    """99th percentile of |ratio - 1| before the update: what acts and what is scored must agree."""
    inds = torch.arange(min(args.micro_batch_size, len(batch.logprobs)))
    newlogprob, _, _ = score(model, batch, inds, args.temperature)
    return check_ratio((newlogprob - batch.logprobs[inds]).exp(), args.model.dtype)


def main(args):
    # T = num_steps, N = environments of this rank, B = T * N samples
    # --- setup ---
    shared = args.critic != "state"  # the critic reads the policy's hidden states
    unused = {"vf_coef": not shared, "value_epochs": shared}
    check_args(args, PRESETS, unused)
    batch_size = args.num_envs * args.num_steps  # of all ranks
    rank, world_size, device = setup_ranks(args.run.device, args.run.seed)
    num_envs = args.num_envs // world_size
    env_numbers = np.arange(rank * num_envs, (rank + 1) * num_envs)

    model = load_start(args.run, args.model, device)
    critic = make_critic(args.critic, model, args.run.seed)
    policy_optimizer = torch.optim.AdamW(trainable_parameters(model), lr=args.learning_rate)
    value_optimizer = torch.optim.AdamW(trainable_parameters(critic), lr=args.value_learning_rate)
    envs = make_envs(
        num_envs, **vars(args.scene), reset_after_success=args.reset_after_success, state=not shared
    )
    state = {"critic": critic, "policy": policy_optimizer, "value": value_optimizer}
    experiment = Experiment(args, model, envs, state)

    # --- storage ---
    actions = torch.zeros(args.num_steps, num_envs, 7, dtype=torch.long, device=device)
    logprobs = torch.zeros(args.num_steps, num_envs, device=device)
    values = torch.zeros(args.num_steps, num_envs, device=device)
    rewards = torch.zeros(args.num_steps, num_envs, device=device)
    dones = torch.zeros(args.num_steps, num_envs, device=device)

    for iteration in range(experiment.iteration + 1, args.num_iterations + 1):
        # --- rollout ---
        start = time.monotonic()
        frac = 1.0 - (iteration - 1) / args.num_iterations if args.anneal_lr else 1.0
        policy_optimizer.param_groups[0]["lr"] = frac * args.learning_rate
        value_optimizer.param_groups[0]["lr"] = frac * args.value_learning_rate

        # An environment's random numbers depend on (seed, iteration, environment) alone
        rngs = [np.random.default_rng((args.run.seed, iteration, n)) for n in env_numbers]
        generators = [torch.Generator().manual_seed(int(rng.integers(2**62))) for rng in rngs]
        streams = [training_episodes(args.scene.task, rng, envs.fidelity) for rng in rngs]
        next_obs, infos = envs.reset(streams)
        obs, instructions, states, episodes = [], [], [], []
        for step in range(args.num_steps):
            texts = infos["instruction"]
            state = torch.as_tensor(infos["state"]).to(device)
            obs.append(model.preprocess(next_obs).cpu())
            instructions.extend(texts)
            states.append(state)

            # ALGO LOGIC: action logic
            with torch.no_grad():
                action, logprob, hidden = model.act(obs[step], texts, args.temperature, generators)
                values[step] = critic(obs[step], texts, hidden, state)
            actions[step] = action
            logprobs[step] = logprob

            # Where an episode ended, next_obs is of the one that begins
            next_obs, reward, terminated, truncated, infos = envs.step(model.decode_actions(action))
            rewards[step] = torch.as_tensor(reward)
            dones[step] = torch.as_tensor(terminated | truncated)
            episodes.append(infos["episode"])

        # --- advantages ---
        with torch.no_grad():
            state = torch.as_tensor(infos["state"]).to(device)
            hidden = None
            if shared:
                _, _, hidden = model.act(next_obs, infos["instruction"], temperature=0)
            next_value = critic(next_obs, infos["instruction"], hidden, state)
        advantages, returns = gae(rewards, values, dones, next_value, args.gamma, args.gae_lambda)
        rollout_s = time.monotonic() - start

        # --- update ---
        batch = Batch(
            obs=torch.cat(obs),
            instructions=instructions,
            states=torch.cat(states),
            actions=actions.flatten(0, 1),
            logprobs=logprobs.flatten(),
            values=values.flatten(),
            advantages=normalize(advantages).flatten(),
            returns=returns.flatten(),
        )
        # Every rank draws the same minibatches; environments' streams have smaller numbers
        rng = np.random.default_rng((args.run.seed, iteration, args.num_envs))
        metrics = {"losses/first_ratio_gap": ratio_gap(model, batch, args)}
        warming_up = iteration <= args.value_warmup_iterations
        if args.critic == "state":
            if not warming_up:
                metrics |= update_policy(model, critic, [policy_optimizer], batch, args, rng)
            metrics |= update_critic(critic, value_optimizer, batch, args, rng)
        else:
            optimizers = [value_optimizer] if warming_up else [policy_optimizer, value_optimizer]
            metrics |= update_policy(model, critic, optimizers, batch, args, rng)
        update_s = time.monotonic() - start - rollout_s

        # --- metrics ---
        metrics |= episode_metrics(episodes)
        variance = explained_variance(values, rewards, dones, args.gamma)
        metrics["losses/explained_variance"] = variance
        metrics["charts/learning_rate"] = policy_optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = batch_size / (rollout_s + update_s)
        metrics["time/rollout_s"] = rollout_s
        metrics["time/update_s"] = update_s

        # --- evaluation, log, checkpoint ---
        experiment.finish(iteration, metrics, step=iteration * batch_size)

    experiment.close()


if __name__ == "__main__":
    main(parse_args(Args, PRESETS))
