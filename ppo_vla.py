"""PPO fine-tuning of a vision-language-action model in simulation, after Liu, Gao et al. 2025 (arXiv 2505.19789).

    python ppo_vla.py --num-envs 64                       # small model, embedded assets, any CPU
    python ppo_vla.py --preset paper --dry-run            # OpenVLA-7B as in the paper: the plan, nothing is loaded
    torchrun --nproc-per-node 2 ppo_vla.py --num-envs 64  # the same update, environments split over ranks
    python ppo_vla.py --resume runs/NAME                  # continues exactly

An action of 7 tokens is one decision, its log-prob the sum over tokens. The paper's critic reads the actor's hidden
state h0 at the last prompt token. Departures from the paper's code, explained in docs/ppo_vla.md:
 1. Actions are sampled from exactly the distribution that is scored (the code samples with top_k 50, scores 256 bins).
 2. `pg_coef` is explicit; in the code a broadcast multiplies the policy loss by 7.
 3. Trained weights, log-probs, ratios and losses are float32 (the code: bfloat16).
 4. The ratio before the first update is measured and bounded in every iteration; old log-probs can be recomputed.
 5. Training and evaluation episodes are disjoint, and evaluation episodes are the same for every policy.
 6. The default's critic reads the simulator's state, not h0 (`--value-input`): a policy gradient of less noise.
 7. An environment's random stream depends on (seed, iteration, environment) alone: resume is exact, and any number of
    ranks or workers draws the same numbers (logits are rounded as the batch's shape has it).
Sibling: `diff ppo_vla.py grpo_vla.py` shows the algorithm and nothing else.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from common.model.critic import state_features
from common.run import logs, runs
from common.run.evaluate import evaluate, training_ids
from common.simulation.env import check_env_args
from common.simulation.vec_env import make_envs
from scripts.doctor import check_simulator


# --- args ---
@dataclass
class Args:
    """[P] the paper's code (RL4VLA), [C] CleanRL, [M] measured here (docs/log.md), [D] our decision; [P] 80: value."""

    # run
    preset: Literal["default", "paper"] = "default"  # defaults of all other flags: embedded small model, or OpenVLA-7B
    name: str = ""  # run directory runs/NAME; empty = ppo_vla-TASK-SEED-TIME
    resume: str = ""  # run directory to continue exactly; its Args become the defaults
    seed: int = 1  # weights of `--model tiny`, training episodes, sampling, minibatches [C]
    device: str = "auto"  # of the model: cpu, cuda, or auto
    torch_threads: int = 2  # of the model on a CPU, over all ranks of a machine; more cores: more ranks (torchrun)
    track: bool = False  # log to Weights & Biases too
    dry_run: bool = False  # print the plan with a memory estimate, and leave
    # environment
    task: str = "main"  # a row of common/simulation/tasks.py; evaluation during training is on the same task
    split: Literal["train", "test"] = "train"  # its configurations
    episode_ids: tuple[int, ...] = ()  # train and evaluate on these alone: a check of the algorithm; empty = all [D]
    assets: Literal["primitive", "bridge"] = "primitive"  # embedded bodies, or the real ones under MS_ASSET_DIR
    num_envs: int = 64  # over all ranks [P]
    max_episode_steps: int = 40  # control steps of 0.2 s; the expert needs 20; [P] 80 [M]
    image_size: tuple[int, int] = (160, 120)  # camera pixels (width, height); [P] 640 480 [M]
    sim_freq: int = 250  # physics Hz; [P] 500 [M]
    solver_iterations: int = 4  # of the contact solver; [P] 15 [M]
    fidelity: Literal["fixed", "published"] = "fixed"  # published = with the benchmark's known defects
    shader_pack: Literal["minimal", "default"] = "minimal"  # renderer quality; [P] default [M]
    sim_device: Literal["cpu", "cuda"] = "cpu"  # worker processes, or one batched GPU simulation [P] cuda
    num_workers: int = 0  # environment processes per rank; 0 = share the cores
    # model
    model: str = ""  # directory, hub id or tiny (random); empty = checkpoints/tiny-warmup
    adapter: str = ""  # LoRA directory on top of model that training continues
    unnorm_key: str = ""  # action statistics; empty = the model's only key
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls and frozen weights; trained weights stay float32
    lora_rank: int = 0  # 0 = train all weights; [P] 32
    lora_targets: Literal["all", "llm"] = "all"  # linear layers with LoRA [P] all
    freeze_vision: bool = True  # vision and projector are not trained [M]; [P] trained, by LoRA
    activation_checkpointing: bool = False  # less memory, about 30 % slower updates [D]
    temperature: float = 1.0  # of the policy in rollouts and updates, sampled from and scored alike [P]
    # evaluation and checkpoints
    eval_every: int = 10  # iterations between evaluations, first and last included; 0 = none
    eval_episodes: int = 64  # of the paired list; 64 episodes at 94 % have the 95 % interval [85, 98] [P]
    eval_temperature: float = 0.6  # [P]
    num_videos: int = 2  # per evaluation
    checkpoint_every: int = 1  # iterations; an interruption loses at most so many
    # algorithm
    num_iterations: int = 85  # rollouts; [P] 2 M steps = 391
    num_steps: int = 160  # control steps per environment and rollout, a multiple of max_episode_steps [M]; [P] 80
    reset_after_success: int = 5  # steps that success lasts until the episode ends [D]; 0 = never [P]; 1: RLinf
    learning_rate: float = 1e-4  # AdamW, policy [P]
    value_learning_rate: float = 1e-3  # AdamW, value head and a separate critic [D]; [P] 3e-3
    anneal_lr: bool = True  # linear to 0 over the run [D]; [P] constant
    weight_decay: float = 0.01  # AdamW [P]
    value_warmup_iterations: int = 3  # first iterations that train the value alone [D]; [P] 0
    value_input: Literal["state", "h0", "hn", "concat"] = "state"  # the simulator's [M], or a hidden state; [P] h0
    value_epochs: int = 4  # passes of a state critic over a rollout [D]
    separate_critic: bool = False  # critic with a backbone of its own [P]
    gamma: float = 0.99  # discount [P]
    gae_lambda: float = 0.8  # lower: less noise, more trust in the critic [M]; [P] 0.95
    update_epochs: int = 1  # passes over a rollout [P]
    num_minibatches: int = 20  # optimizer steps per epoch [D]; [P] 32 of 160 samples
    micro_batch_size: int = 128  # samples per forward; only memory and speed depend on it; [P] 8
    norm_adv: bool = True  # advantages to mean 0, std 1 once per rollout, over all ranks [P]
    clip_coef: float = 0.2  # of the ratio [P]
    value_clip_coef: float = 0.2  # of the value's move, 0 = no clipping; a state critic's is not clipped [P]
    huber_delta: float = 10.0  # of the value loss [P]
    pg_coef: float = 1.0  # of the policy loss; [P] 7 by a broadcast, 1 in the text
    vf_coef: float = 1.0  # of the value loss, where policy and value share weights [P]
    ent_coef: float = 0.0  # of the entropy bonus, nats per token [P]
    max_grad_norm: float = 10.0  # joint over policy and value, without a state critic's [P]
    target_kl: float | None = None  # a minibatch beyond it is dropped and ends the update; [P] none
    ratio_level: Literal["action", "token"] = "action"  # one ratio per step [P], or one per token
    recompute_logprobs: bool = False  # old log-probs by the update's own forward (bfloat16); always so at token level
    ratio_tolerance: float | None = None  # 99 % of |ratio - 1| must be below it; None: .01, in bfloat16 .05 [D]


PRESETS = {
    "default": Args(),
    "paper": Args(
        preset="paper", assets="bridge", max_episode_steps=80, image_size=(640, 480), sim_freq=500,
        solver_iterations=15, fidelity="published", shader_pack="default", sim_device="cuda",
        model="gen-robot/openvla-7b-rlvla-warmup", unnorm_key="bridge_orig", dtype="bfloat16", lora_rank=32,
        freeze_vision=False, num_iterations=391, num_steps=80, reset_after_success=0, value_input="h0",
        value_warmup_iterations=0, anneal_lr=False, value_learning_rate=3e-3, gae_lambda=0.95, num_minibatches=32,
        micro_batch_size=8, pg_coef=7.0, recompute_logprobs=True, ratio_tolerance=0.5,
    ),
}  # fmt: skip


def check_args(args):
    """What can be refused before a model or a simulator is loaded: ValueError with values, rule and fix."""
    names = """num_iterations update_epochs value_epochs micro_batch_size checkpoint_every torch_threads temperature
        huber_delta max_grad_norm"""
    positive = {name: getattr(args, name) for name in names.split()}
    runs.check_rollout(args.num_envs, args.num_steps, args.max_episode_steps, args.num_minibatches, **positive)
    runs.check_run(args)
    if args.separate_critic and args.value_input != "h0":
        raise ValueError(f"separate_critic = True reads 'h0' of its own backbone, not {args.value_input!r}; use 'h0'")
    if args.reset_after_success < 0:
        raise ValueError(f"reset_after_success = {args.reset_after_success} must be >= 0; use 0 (never) or 5")
    if args.reset_after_success and args.sim_device == "cuda":
        raise ValueError("reset_after_success needs resets of single environments; use --sim-device cpu, or 0")


# --- advantages ---
def gae(rewards, values, dones, last_values, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    Args:
        rewards, values, dones: (T, N) float32; dones[t] = 1: the episode ended with step t, so neither the value of the
            next state nor a later reward counts.
        last_values: (N,) float32, values of the states after step T - 1.
    Returns: advantages (T, N), not normalised, and returns = advantages + values (T, N), float32.
    """
    num_steps, num_envs = rewards.shape
    runs.require_float32((num_steps, num_envs), rewards=rewards, values=values, dones=dones)
    runs.require_float32((num_envs,), last_values=last_values)
    advantages = torch.zeros_like(rewards)
    next_values, lastgaelam = last_values, torch.zeros_like(last_values)
    for t in reversed(range(num_steps)):
        nonterminal = 1.0 - dones[t]
        delta = rewards[t] + gamma * next_values * nonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nonterminal * lastgaelam
        next_values = values[t]
    return advantages, advantages + values


def normalize(advantages, all_advantages):
    """(advantages - mean) / std with the statistics of all ranks, in float64: equal advantages become exactly 0."""
    population = all_advantages.double()
    return ((advantages.double() - population.mean()) / (population.std() + 1e-8)).float()


# --- loss ---
def policy_loss(logprobs, old_logprobs, advantages, clip_coef):
    """Clipped surrogate objective to minimise, per sample (Schulman et al. 2017, eq. 7).

    Args: logprobs, old_logprobs: (M,) float32 nats per action, or (M, A) per token; advantages: (M,) float32.
    Returns: losses (M,), a token-level loss summed over tokens so that both levels start with the same gradient;
        ratios (M,) or (M, A).
    """
    runs.require_float32(logprobs.shape, old_logprobs=old_logprobs, logprobs=logprobs)
    runs.require_float32(logprobs.shape[:1], advantages=advantages)
    ratios = (logprobs - old_logprobs).exp()
    advantages = advantages if logprobs.ndim == 1 else advantages[:, None]
    losses = torch.max(-advantages * ratios, -advantages * ratios.clamp(1 - clip_coef, 1 + clip_coef))
    return (losses if logprobs.ndim == 1 else losses.sum(1)), ratios


def value_loss(values, old_values, returns, value_clip_coef, huber_delta):
    """Huber loss per sample (M,), the larger of plain and clipped: a value may not move far from its rollout value.

    Args: values, old_values, returns: (M,) float32; value_clip_coef: largest move, 0 = no clipping.
    """
    runs.require_float32(values.shape[:1], values=values, old_values=old_values, returns=returns)
    losses = F.huber_loss(values, returns, reduction="none", delta=huber_delta)
    if value_clip_coef > 0:
        clipped = old_values + (values - old_values).clamp(-value_clip_coef, value_clip_coef)
        losses = torch.max(losses, F.huber_loss(clipped, returns, reduction="none", delta=huber_delta))
    return losses


STATS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
KL = STATS.index("approx_kl")


def update_critic(critic, optimizer, batch, args, rng, run_dir):
    """`value_epochs` passes of a state critic over one rollout; `batch`, `rng` and minibatches as in `update`.

    Returns: dict with losses/value_loss, the mean of the last pass.
    """
    minibatch_size = sum(runs.gather_over_ranks(len(batch["index"]))) // args.num_minibatches
    parameters = list(critic.parameters())
    for _ in range(args.value_epochs):
        history = []
        for rows in runs.minibatches(batch["index"], args.num_minibatches, rng):
            optimizer.zero_grad(set_to_none=True)  # no gradient: AdamW leaves the policy alone
            values, old_values, returns = critic(batch["states"][rows]), batch["values"][rows], batch["returns"][rows]
            loss = value_loss(values, old_values, returns, 0.0, args.huber_delta).sum() / minibatch_size
            loss.backward()
            runs.sum_gradients(parameters)
            history.append(runs.sum_over_ranks(loss.detach()).item())
            if not np.isfinite(history[-1]):
                runs.stop_non_finite(run_dir, "value loss", batch, rows)
            optimizer.step()
    return {"losses/value_loss": np.mean(history)}


def update(model, optimizer, batch, args, rng, run_dir):
    """PPO epochs over one rollout. A minibatch spans all ranks; each accumulates its part in micro-batches.

    Args:
        batch: this rank's B samples, one row each: images (as `model.rollout_inputs` gave them), instructions (list),
            action_tokens (B, A) int64, logprobs, values, advantages, returns (B,) float32, index (B,) int64: the
            sample's number among those of all ranks; states (B, D) float32 of a state critic, which `update_critic`
            trains: here its values are 0 and not learned.
        rng: np.random.Generator, in the same state on every rank: it draws the minibatches.
    Returns: dict of losses/*, means over minibatches. Raises: RuntimeError and FloatingPointError, see the guards.
    """
    token_level, num_rows = args.ratio_level == "token", len(batch["index"])
    minibatch_size = sum(runs.gather_over_ranks(num_rows)) // args.num_minibatches
    epochs = [runs.minibatches(batch["index"], args.num_minibatches, rng) for _ in range(args.update_epochs)]
    policy, value = (group["params"] for group in optimizer.param_groups)
    parameters = policy if "states" in batch else policy + value
    vf_coef = 0.0 if "states" in batch else args.vf_coef

    def score(rows):
        inputs = batch["images"][rows], [batch["instructions"][row] for row in rows], batch["action_tokens"][rows]
        return model.evaluate(*inputs, args.temperature, return_token_logprobs=token_level)

    old_logprobs = batch["logprobs"]
    if token_level or args.recompute_logprobs:
        with torch.no_grad():
            old_logprobs = torch.cat([score(rows)[0] for rows in torch.arange(num_rows).split(args.micro_batch_size)])

    history, grad_norms, gaps = [], [], []
    limit = {"float32": 0.01, "bfloat16": 0.05}[args.dtype] if args.ratio_tolerance is None else args.ratio_tolerance
    for number, mb_inds in enumerate(mb_inds for epoch in epochs for mb_inds in epoch):  # this rank's part of each
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(STATS) + 1, device=old_logprobs.device)  # the last one counts
        for start in range(0, len(mb_inds), args.micro_batch_size):
            rows = mb_inds[start : start + args.micro_batch_size]
            logprobs, entropies, values = score(rows)
            advantages, old_values, returns = (batch[key][rows] for key in ("advantages", "values", "returns"))
            pg_losses, ratios = policy_loss(logprobs, old_logprobs[rows], advantages, args.clip_coef)
            v_losses = value_loss(values, old_values, returns, args.value_clip_coef, args.huber_delta)
            losses = args.pg_coef * pg_losses + vf_coef * v_losses - args.ent_coef * entropies
            loss = losses.sum() / minibatch_size  # a mean over all ranks' micro-batches, whatever their sizes
            with torch.no_grad():
                r = ratios.reshape(len(rows), -1)
                kls = -r.log().sum(1), (r - 1 - r.log()).sum(1)  # Schulman 2020: k1 is unbiased, k3 is never negative
                clipped = ((r - 1).abs() > args.clip_coef).float().mean(1)
                stats = pg_losses, v_losses, entropies, *kls, clipped, torch.ones_like(clipped)
                sums += torch.stack([x.sum() for x in stats])
                joint = logprobs.sum(1) if token_level else logprobs
                gaps += ((joint - batch["logprobs"][rows]).exp() - 1).abs().tolist() if number == 0 else []
            if not torch.isfinite(loss):
                runs.stop_non_finite(run_dir, "loss", batch, rows)
            if args.target_kl is not None and sums[KL] / minibatch_size > args.target_kl:
                break  # the rest of the minibatch can only add to k3: no backward
            if loss.requires_grad:  # not in the value warm-up of a state critic
                loss.backward()
        sums = runs.sum_over_ranks(sums)
        history.append(sums[:-1] / sums[-1])  # of what was scored before the KL guard, mostly all
        if number == 0:
            gap = np.quantile(sum(runs.gather_over_ranks(gaps), []), 0.99)  # of |ratio - 1|, all ratios should be 1
            if gap > limit:
                raise RuntimeError(
                    f"1 % of |ratio - 1| exceed {gap:.1e} before the first update, ratio_tolerance = {limit}: act and "
                    "evaluate disagree; --resume in float32, or --recompute-logprobs and a higher --ratio-tolerance"
                )
        if args.target_kl is not None and sums[KL] / minibatch_size > args.target_kl:
            break  # the same sum on every rank; this minibatch is dropped
        if not any(p.requires_grad for p in parameters):
            break  # the value warm-up of a state critic: nothing steps, one minibatch has checked the ratio
        runs.sum_gradients(parameters)
        grad_norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item())
        if not np.isfinite(grad_norms[-1]):
            runs.stop_non_finite(run_dir, "gradient", batch, mb_inds)
        optimizer.step()
    means = dict(zip(STATS, torch.stack(history).mean(0).tolist(), strict=True))
    means |= {"grad_norm": np.mean(grad_norms or [np.nan]), "num_updates": len(grad_norms), "first_ratio_gap": gap}
    return {f"losses/{key}": value for key, value in means.items()}


# metric train/KEY: the environment's name for it
EPISODE_METRICS = {"success_at_end": "success"} | {key: key for key in ("success_once", "grasped", "return")}


def main(args: Args):
    # Shapes: T = num_steps, N = environments of this rank, A = 7 action tokens, B = T * N samples of this rank.
    # --- setup ---
    check_args(args)
    model_name = args.model or "checkpoints/tiny-warmup"
    if args.dry_run:
        return print(logs.plan(asdict(args), asdict(PRESETS["default"]), model_name))
    rendering = args.image_size, args.sim_freq, args.solver_iterations, args.fidelity
    check_env_args(args.task, args.split, args.assets, *rendering)
    check_simulator(args.sim_device)
    from common.model.openvla import (  # 4 s that bad input and the simulator's processes need not wait for
        load_vla,
        save_vla,
    )

    device = runs.setup_ranks(args.device, args.dtype)
    rank, world_size = runs.rank_and_world_size()
    torch.set_num_threads(max(1, args.torch_threads // runs.ranks_here()))
    runs.seed_everything(args.seed)
    name = args.name or time.strftime(f"{Path(__file__).stem}-{args.task}-{args.seed}-%Y%m%d-%H%M%S")
    run_dir = Path(runs.gather_over_ranks(args.resume or f"runs/{name}")[0])
    checkpoint = runs.find_checkpoint(run_dir) if args.resume else None

    # --- model and optimizer ---
    adapter = None if checkpoint else args.adapter or None
    unnorm_key = runs.find_key(checkpoint or model_name, adapter, args.unnorm_key, args.assets)
    model = load_vla(
        checkpoint or model_name, device, getattr(torch, args.dtype), args.lora_rank, args.lora_targets,
        adapter=adapter, value_input=args.value_input,
        separate_critic=args.separate_critic, seed=args.seed, freeze_vision=args.freeze_vision,
    )  # fmt: skip
    model.checkpoint_activations(args.activation_checkpointing)
    params = model.trainable_parameters()
    learning_rates = {"policy": args.learning_rate, "value": args.value_learning_rate}
    groups = [{"params": params[name], "lr": lr} for name, lr in learning_rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    progress = {"iteration": 0, "seconds": 0.0, "evaluations": []}  # evaluations: success at end on the paired list
    if checkpoint:
        state = runs.load_training_state(checkpoint)
        runs.load_optimizer(optimizer, state["optimizer"])
        progress = state["progress"]

    # --- environments, logger, checkpoints, evaluation ---
    num_envs = args.num_envs // world_size
    env_numbers = np.arange(rank * num_envs, (rank + 1) * num_envs)  # among the environments of all ranks
    envs = make_envs(
        args.task, args.split, num_envs, assets=args.assets, image_size=args.image_size,
        sim_freq=args.sim_freq, solver_iterations=args.solver_iterations, max_episode_steps=args.max_episode_steps,
        fidelity=args.fidelity, shader_pack=args.shader_pack, device=args.sim_device,
        num_workers=args.num_workers or max(1, len(os.sched_getaffinity(0)) // runs.ranks_here()),
    )  # fmt: skip
    batch_size = args.num_envs * args.num_steps  # of all ranks
    logger = logs.Logger(run_dir, asdict(args), args.track, progress["iteration"] * batch_size, enabled=rank == 0)
    if rank == 0:
        sizes = ", ".join(f"{sum(p.numel() for p in group) / 1e6:.2f} M {name}" for name, group in params.items())
        print(f"{run_dir} | {checkpoint or model_name} on {device}, {args.dtype}, trains {sizes} weights")
        print(f"{args.num_envs} environments {args.image_size}, {args.assets} pack, {args.sim_device} simulation")
        runs.stop_on_signals(f"the last checkpoint, if any, is kept: python {sys.argv[0]} --resume {run_dir}")

    def save(kind):
        if rank == 0:
            state = {"optimizer": optimizer.state_dict(), "progress": progress, "args": asdict(args)}
            runs.save_checkpoint(run_dir, kind, progress["iteration"], lambda path: save_vla(model, path), state)

    def evaluation():
        """The in-distribution list; the best checkpoint is chosen here and on nothing else."""
        inputs = args.task, args.split, args.eval_episodes, args.eval_temperature, unnorm_key
        video = run_dir / "videos" / f"{progress['iteration']:06d}"
        metrics = evaluate(model, envs, *inputs, video, args.num_videos, args.episode_ids)
        progress["evaluations"].append(metrics[f"eval/{args.task}/success_at_end"])
        if progress["evaluations"][-1] >= max(progress["evaluations"]):
            save("best")
        return metrics

    if not checkpoint:
        logger.log(evaluation() if args.eval_every else {}, 0)
        save("checkpoint")

    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):
        # --- rollout ---
        start = time.time()
        for parameter in params["policy"]:
            parameter.requires_grad_(iteration > args.value_warmup_iterations)
        rngs = [np.random.default_rng((args.seed, iteration, number)) for number in env_numbers]
        generators = [torch.Generator().manual_seed(int(rng.integers(2**62))) for rng in rngs]
        draw = lambda rng: training_ids(args.task, args.split, 1, rng, args.fidelity, args.episode_ids)  # noqa: E731
        images, instructions = envs.reset(np.concatenate([draw(rng) for rng in rngs]))
        obs, texts, tokens, states, episodes = [], [], [], [], []
        logprobs, values, rewards, dones = torch.zeros(4, args.num_steps, num_envs, device=device)  # each (T, N)
        critic = model.value_head if args.value_input == "state" else None
        lasted = np.zeros(num_envs, dtype=int)  # steps of success so far
        clock, flags = np.zeros(num_envs), np.zeros((num_envs, 3))  # of the running episodes
        for step in range(args.num_steps):
            inputs = model.rollout_inputs(images)
            action_tokens, logprobs[step], values[step] = model.act(inputs, instructions, args.temperature, generators)
            if critic:
                states.append(state_features(envs.privileged_state(), flags, clock / args.max_episode_steps).to(device))
                values[step] = critic(states[-1]).detach()
            obs.append(inputs.cpu())
            texts += instructions
            tokens.append(action_tokens)
            images, reward, ended, infos = envs.step(model.actions_from_tokens(action_tokens, unnorm_key))
            lasted = (lasted + 1) * infos["success"]
            ended = ended | (lasted >= args.reset_after_success) if args.reset_after_success else ended
            rewards[step], dones[step] = torch.as_tensor(reward), torch.as_tensor(ended)
            clock = (clock + 1) * ~ended
            flags = np.stack([infos[key] for key in ("grasped", "held", "success")], axis=1) * ~ended[:, None]
            episodes.append({name: infos[key][ended] for name, key in EPISODE_METRICS.items()})
            if ended.any() and step + 1 < args.num_steps:
                env_ids, lasted = np.flatnonzero(ended), lasted * ~ended
                images, instructions = envs.reset(np.concatenate([draw(rngs[env_id]) for env_id in env_ids]), env_ids)

        # --- advantages ---
        with torch.no_grad():  # episodes of full length end with the rollout: nothing to bootstrap
            if ended.all():
                last_values = torch.zeros(num_envs, device=device)
            elif critic:
                state = state_features(envs.privileged_state(), flags, clock / args.max_episode_steps)
                last_values = critic(state.to(device))
            else:
                last_values = model.value(images, instructions)
        advantages, returns = gae(rewards, values, dones, last_values, args.gamma, args.gae_lambda)
        all_advantages, all_values, all_returns = runs.gather_envs(advantages, values, returns)  # of all ranks
        advantages = normalize(advantages, all_advantages.to(device)) if args.norm_adv else advantages
        rollout_s = time.time() - start

        # --- update ---
        for group, lr in zip(optimizer.param_groups, learning_rates.values(), strict=True):
            group["lr"] = lr * (1 - (iteration - 1) / args.num_iterations) if args.anneal_lr else lr
        batch = {
            "images": torch.cat(obs),  # row t * N + n, as in all below
            "instructions": texts,
            "action_tokens": torch.cat(tokens),
            "logprobs": logprobs.flatten(),
            "values": values.flatten(),
            "advantages": advantages.flatten(),
            "returns": returns.flatten(),
            "index": (np.arange(args.num_steps)[:, None] * args.num_envs + env_numbers).flatten(),
        }
        rng = np.random.default_rng((args.seed, iteration, args.num_envs))  # beyond the environments' numbers
        batch |= {"states": torch.cat(states)} if critic else {}
        metrics = update(model, optimizer, batch, args, rng, run_dir)
        metrics |= update_critic(critic, optimizer, batch, args, rng, run_dir) if critic else {}  # its own value_loss
        update_s = time.time() - start - rollout_s

        # --- metrics ---
        parts = [part for rank_episodes in runs.gather_over_ranks(episodes) for part in rank_episodes]
        metrics |= {f"train/{name}": np.concatenate([part[name] for part in parts]).mean() for name in EPISODE_METRICS}
        metrics["losses/explained_variance"] = 1 - (all_returns - all_values).var() / all_returns.var()
        metrics |= {"charts/iteration": iteration, "charts/learning_rate": optimizer.param_groups[0]["lr"]}
        metrics |= {"charts/SPS": batch_size / (rollout_s + update_s), **logs.peak_memory()}
        metrics |= {"time/rollout_s": rollout_s, "time/update_s": update_s}

        # --- evaluation, log, checkpoint ---
        progress["iteration"], last = iteration, iteration == args.num_iterations
        if args.eval_every and (last or iteration % args.eval_every == 0):
            metrics |= evaluation()
        progress["seconds"] += time.time() - start
        logger.log(metrics, iteration * batch_size)
        logger.print(logs.status_line(iteration, args.num_iterations, metrics, progress["seconds"] / iteration))
        if last or iteration % args.checkpoint_every == 0:
            save("checkpoint")

    # --- summary ---
    envs.close()
    logger.close()
    panels = [["train/success_at_end", f"eval/{args.task}/success_at_end"], ["train/return"], ["losses/approx_kl"]]
    if rank == 0:
        done = run_dir, progress["iteration"] * batch_size, progress["seconds"], progress["evaluations"]
        print(logs.summary(*done, panels))


if __name__ == "__main__":
    main(runs.parse_args(Args, PRESETS))
