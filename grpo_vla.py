"""GRPO fine-tuning of a vision-language-action model in simulation (Shao et al. 2024; Liu, Gao et al. 2025).

    python grpo_vla.py --num-envs 64                       # small model, embedded assets, any CPU
    python grpo_vla.py --preset paper --dry-run            # OpenVLA-7B as in the paper: the plan, nothing is loaded
    torchrun --nproc-per-node 2 grpo_vla.py --num-envs 64  # the same update, environments split over ranks
    python grpo_vla.py --resume runs/NAME                  # continues exactly
    python grpo_vla.py --group-size 64 --advantage stepwise --clip-high 0.2  # GRPO (s); --no-same-state too: GRPO [P]

No critic: an episode's advantage is how much better it did than the others of its group, which began in the same state.
All else is ppo_vla.py, its departures from the paper's code too. What differs, explained in docs/grpo_vla.md:
 1. Advantages compare the returns of whole episodes (the paper's text) or the non-zero rewards of steps (its code).
 2. Groups without a difference, or that nearly always or never succeed, are left out of the update and counted.
 3. The clip is asymmetric, a KL penalty to the start optional; no value loss, discount or reset on success.
"""

import contextlib
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common.run import logs, runs
from common.run.evaluate import evaluate, training_ids
from common.simulation.env import check_env_args
from common.simulation.vec_env import make_envs
from scripts.doctor import check_simulator


# --- args ---
@dataclass
class Args:
    """[P] the paper's code (RL4VLA), [C] CleanRL, [R] RLinf, [M] measured here (docs/log.md), [D] our decision."""

    # run
    preset: Literal["default", "paper"] = "default"  # defaults of all other flags: embedded small model, or OpenVLA-7B
    name: str = ""  # run directory runs/NAME; empty = grpo_vla-TASK-SEED-TIME
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
    group_size: int = 8  # neighbouring environments that are compared [P's text]; its code: all 64
    same_state: bool = True  # a group shares initial states and instructions; False: the code's plain "GRPO"
    advantage: Literal["outcome", "stepwise"] = "outcome"  # of an episode's return [P's text], or of its steps [P]
    filter_low: float = 0.1  # outcome of same states: a group with less success is left out [R]; [P] 0
    filter_high: float = 0.9  # or with more [R]; [P] 1
    mask_after_success: bool = False  # steps after an episode's first success are left out [D]
    length_norm: bool = True  # every episode weighs the same, however many of its steps are left in [R]
    learning_rate: float = 1e-4  # AdamW, policy [P]
    anneal_lr: bool = True  # linear to 0 over the run [D]; [P] constant
    weight_decay: float = 0.01  # AdamW [P]
    update_epochs: int = 1  # passes over a rollout [P]
    num_minibatches: int = 20  # optimizer steps per epoch if no group is left out [D]; [P] 32 of 160 samples
    micro_batch_size: int = 128  # samples per forward; only memory and speed depend on it; [P] 8
    clip_low: float = 0.2  # the ratio is clipped at 1 - clip_low [P]
    clip_high: float = 0.28  # and at 1 + clip_high (DAPO) [R]; [P] 0.2
    pg_coef: float = 1.0  # of the policy loss; [P] 7 by a broadcast, 1 in the text
    kl_coef: float = 0.0  # of the KL to the start policy, nats per action; 0 = no reference policy [P]
    ent_coef: float = 0.0  # of the entropy bonus, nats per token [P]
    max_grad_norm: float = 10.0  # [P]
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
        freeze_vision=False, num_iterations=391, num_steps=80, group_size=64, same_state=False, advantage="stepwise",
        num_minibatches=32, anneal_lr=False, micro_batch_size=8, clip_high=0.2, pg_coef=7.0, recompute_logprobs=True,
        ratio_tolerance=0.5,
    ),
}  # fmt: skip


def check_args(args):
    """What can be refused before a model or a simulator is loaded: ValueError with values, rule and fix."""
    positive = "num_iterations update_epochs micro_batch_size checkpoint_every torch_threads temperature max_grad_norm"
    positive = {name: getattr(args, name) for name in positive.split()}
    runs.check_rollout(args.num_envs, args.num_steps, args.max_episode_steps, args.num_minibatches, **positive)
    runs.check_run(args)
    if args.group_size < 2 or args.num_envs % args.group_size:
        fix = f"use {args.num_envs} or another divisor of it" if args.num_envs > 1 else "use --num-envs 8"
        raise ValueError(f"group_size = {args.group_size} must divide num_envs = {args.num_envs} and be >= 2; {fix}")
    if not 0 <= (low := args.filter_low) <= (high := args.filter_high) <= 1:
        raise ValueError(f"filter_low = {low} must be <= filter_high = {high}, both in 0 to 1; use 0.1 and 0.9")


# --- advantages ---
def group_advantages(rewards, stepwise):
    """How much better than its group an episode did, (E, L, K, G) float32; exactly 0 where all of a group did the same.

    rewards: (E, L, K, G) float32: E successive episodes of L steps, K groups of G neighbouring environments. Of returns
    R, (R - mean) / std at every step (Shao et al. 2024, section 4.1.2); or stepwise (RL4VLA): the non-zero rewards are
    normalised so, and an advantage is their sum from this step on.
    """
    runs.require_float32((*rewards.shape[:3], rewards.shape[-1]), rewards=rewards)
    scores = rewards.double() if stepwise else rewards.double().sum(1, keepdim=True)
    compared = (scores != 0).double() if stepwise else torch.ones_like(scores)
    count = compared.sum((1, 3), keepdim=True).clamp(min=1)
    centred = (scores - scores.sum((1, 3), keepdim=True) / count) * compared
    std = (centred.square().sum((1, 3), keepdim=True) / count).sqrt()
    scores = torch.where(std > 1e-4, centred / (std + 1e-5), 0.0)  # rewards differ by 0.1, or by rounding
    return (scores.flip(1).cumsum(1).flip(1) if stepwise else scores).expand_as(rewards).float()


def sample_weights(advantages, successes, limits, mask_after_success, length_norm):
    """Weights of the samples in the loss, (E, L, K, G) float32; 0 = left out: masked, or its group teaches nothing.

    advantages, successes: (E, L, K, G) float32; successes = 1: solved after this step. limits: (low, high) of the share
    of episodes that end in success, other groups are left out. mask_after_success: so is what follows an episode's
    first success; length_norm: episodes then weigh the same.
    """
    runs.require_float32((*successes.shape[:3], successes.shape[-1]), advantages=advantages, successes=successes)
    rates, signal = successes[:, -1:].mean(3, keepdim=True), (advantages != 0).any(3, True).any(1, True)
    weights = (signal & (limits[0] <= rates) & (rates <= limits[1])).float().expand_as(successes).clone()
    if mask_after_success:
        weights[:, 1:] *= 1 - successes.cummax(1).values[:, :-1]
    lengths = weights.sum(1, keepdim=True)  # of the episodes that are left in
    return weights * (lengths[lengths > 0].mean() / lengths.clamp(min=1)).nan_to_num() if length_norm else weights


# --- loss ---
def policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """Clipped surrogate objective to minimise, per sample (Schulman et al. 2017, eq. 7), with two bounds (DAPO).

    Args: logprobs, old_logprobs: (M,) float32 nats per action, or (M, A) per token; advantages: (M,) float32.
    Returns: losses (M,), a token-level loss summed over tokens so that both levels start with the same gradient;
        ratios (M,) or (M, A).
    """
    runs.require_float32(logprobs.shape, old_logprobs=old_logprobs, logprobs=logprobs)
    runs.require_float32(logprobs.shape[:1], advantages=advantages)
    ratios = (logprobs - old_logprobs).exp()
    advantages = advantages if logprobs.ndim == 1 else advantages[:, None]
    losses = torch.max(-advantages * ratios, -advantages * ratios.clamp(1 - clip_low, 1 + clip_high))
    return (losses if logprobs.ndim == 1 else losses.sum(1)), ratios


def kl_to_reference(logprobs, ref_logprobs):
    """Estimate k3 of KL(policy || start) per action, (M,) float32 nats, from log-probs (M,) float32 (Schulman 2020)."""
    runs.require_float32(logprobs.shape[:1], logprobs=logprobs, ref_logprobs=ref_logprobs)
    return torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)


def start_policy(model, name_or_path, adapter=None, seed=0):
    """-> function that makes a context: the frozen policy that `load_vla` made of these before `model` was trained."""
    from common.model import checkpoints  # slow to import
    from common.model import openvla as vla

    if hasattr(model.backbone, "peft_config") and checkpoints.locate(name_or_path, adapter).adapter is None:
        return model.reference
    # All weights are trained, or the adapter was there before: only a copy is the start.
    settings = dict(adapter=adapter, seed=seed, value_head=False, trainable=False)
    frozen = vla.load_vla(name_or_path, model.device, model.dtype, **settings)
    return lambda: contextlib.nullcontext(frozen)


STATS = ("policy_loss", "ref_kl", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
KL = STATS.index("approx_kl")


def update(model, optimizer, batch, args, rng, run_dir):
    """Epochs over one rollout. A minibatch spans all ranks; each accumulates its part in micro-batches.

    Args:
        batch: this rank's B samples, one row each: images (as `model.rollout_inputs` gave them), instructions (list),
            action_tokens (B, A) int64, logprobs, ref_logprobs, advantages, weights (B,) float32, index (B,) int64: the
            sample's number among those of all ranks, -1 = left out.
        rng: np.random.Generator, in the same state on every rank: it draws the minibatches.
    Returns: dict of losses/*, means over minibatches. Raises: RuntimeError and FloatingPointError, see the guards.
    """
    token_level, num_rows = args.ratio_level == "token", len(batch["index"])
    kept = np.flatnonzero(batch["index"] >= 0)
    total = sum(runs.gather_over_ranks(len(kept)))
    num_minibatches = max(1, round(args.num_minibatches * total / (args.num_envs * args.num_steps)))
    row_of = np.full(total, -1)
    row_of[batch["index"][kept]] = kept
    epochs = [np.array_split(rng.permutation(total), num_minibatches) for _ in range(args.update_epochs)]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def score(rows):
        inputs = batch["images"][rows], [batch["instructions"][row] for row in rows], batch["action_tokens"][rows]
        return model.evaluate(*inputs, args.temperature, return_token_logprobs=token_level)

    old_logprobs = batch["logprobs"]
    if token_level or args.recompute_logprobs:
        with torch.no_grad():
            old_logprobs = torch.cat([score(rows)[0] for rows in torch.arange(num_rows).split(args.micro_batch_size)])

    history, grad_norms, gaps = [], [], []
    limit = {"float32": 0.01, "bfloat16": 0.05}[args.dtype] if args.ratio_tolerance is None else args.ratio_tolerance
    for number, mb_inds in enumerate(mb_inds for epoch in epochs for mb_inds in epoch):
        minibatch_size, mb_inds = len(mb_inds), row_of[mb_inds]
        mb_inds = torch.as_tensor(mb_inds[mb_inds >= 0])  # this rank's part
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(STATS) + 1, device=old_logprobs.device)  # the last one counts
        for start in range(0, len(mb_inds), args.micro_batch_size):
            rows = mb_inds[start : start + args.micro_batch_size]
            logprobs, entropies, _ = score(rows)
            joint = logprobs.sum(1) if token_level else logprobs
            advantages, weights = batch["advantages"][rows], batch["weights"][rows]
            pg_losses, ratios = policy_loss(logprobs, old_logprobs[rows], advantages, args.clip_low, args.clip_high)
            ref_kls = kl_to_reference(joint, batch["ref_logprobs"][rows]) if args.kl_coef else torch.zeros_like(joint)
            losses = args.pg_coef * pg_losses + args.kl_coef * ref_kls - args.ent_coef * entropies
            loss = (weights * losses).sum() / minibatch_size  # a mean over all ranks' micro-batches of any size
            with torch.no_grad():
                r = ratios.reshape(len(rows), -1)
                kls = -r.log().sum(1), (r - 1 - r.log()).sum(1)  # Schulman 2020: k1 is unbiased, k3 is never negative
                clipped = ((r < 1 - args.clip_low) | (r > 1 + args.clip_high)).float().mean(1)
                stats = weights * pg_losses, ref_kls, entropies, *kls, clipped, torch.ones_like(clipped)
                sums += torch.stack([x.sum() for x in stats])
                gaps += ((joint - batch["logprobs"][rows]).exp() - 1).abs().tolist() if number == 0 else []
            if not torch.isfinite(loss):
                runs.stop_non_finite(run_dir, "loss", batch, rows)
            if args.target_kl is not None and sums[KL] / minibatch_size > args.target_kl:
                break  # the rest of the minibatch can only add to k3: no backward
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
        adapter=adapter, value_head=False, seed=args.seed,
        freeze_vision=args.freeze_vision,
    )  # fmt: skip
    model.checkpoint_activations(args.activation_checkpointing)
    params = {"policy": model.trainable_parameters()["policy"]}
    learning_rates = {"policy": args.learning_rate}
    groups = [{"params": params[name], "lr": lr} for name, lr in learning_rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    progress = {"iteration": 0, "seconds": 0.0, "evaluations": []}  # evaluations: success at end on the paired list
    progress["start"] = model_name, args.adapter or None, args.seed  # the reference of a resumed run too
    if checkpoint:
        state = runs.load_training_state(checkpoint)
        runs.load_optimizer(optimizer, state["optimizer"])
        progress = state["progress"]
    reference = start_policy(model, *progress["start"]) if args.kl_coef > 0 else None

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
        rngs = [np.random.default_rng((args.seed, iteration, number)) for number in env_numbers]
        generators = [torch.Generator().manual_seed(int(rng.integers(2**62))) for rng in rngs]
        if args.same_state:  # members of a group draw the same episodes, each from a copy of the group's stream
            rngs = [np.random.default_rng((args.seed, iteration, n // args.group_size, 1)) for n in env_numbers]
        draw = lambda rng: training_ids(args.task, args.split, 1, rng, args.fidelity, args.episode_ids)  # noqa: E731
        images, instructions = envs.reset(np.concatenate([draw(rng) for rng in rngs]))
        obs, texts, tokens, episodes = [], [], [], []
        logprobs, ref_logprobs, rewards, successes = torch.zeros(4, args.num_steps, num_envs, device=device)  # (T, N)
        for step in range(args.num_steps):
            inputs = model.rollout_inputs(images)
            action_tokens, logprobs[step], _ = model.act(inputs, instructions, args.temperature, generators)
            if reference:
                with torch.no_grad(), reference() as start_model:
                    ref_logprobs[step] = start_model.evaluate(inputs, instructions, action_tokens, args.temperature)[0]
            obs.append(inputs.cpu())
            texts += instructions
            tokens.append(action_tokens)
            images, reward, ended, infos = envs.step(model.actions_from_tokens(action_tokens, unnorm_key))
            rewards[step], successes[step] = torch.as_tensor(reward), torch.as_tensor(infos["success"])
            episodes.append({name: infos[key][ended] for name, key in EPISODE_METRICS.items()})
            if ended.any() and step + 1 < args.num_steps:
                env_ids = np.flatnonzero(ended)
                images, instructions = envs.reset(np.concatenate([draw(rngs[env_id]) for env_id in env_ids]), env_ids)

        # --- advantages ---
        shape = -1, args.max_episode_steps, args.num_envs // args.group_size, args.group_size
        rewards, successes = (x.view(shape).to(device) for x in runs.gather_envs(rewards, successes))  # of all ranks
        advantages = group_advantages(rewards, args.advantage == "stepwise")
        limits = (args.filter_low, args.filter_high) if args.same_state and args.advantage == "outcome" else (0, 1)
        weights = sample_weights(advantages, successes, limits, args.mask_after_success, args.length_norm)
        kept, no_signal = (weights > 0).any(3).any(1), (advantages == 0).all(3).all(1)  # (E, K)
        index = torch.where(weights > 0, (weights > 0).flatten().cumsum(0).view(weights.shape) - 1, -1)
        advantages, weights, index = (x.view(args.num_steps, -1)[:, env_numbers] for x in (advantages, weights, index))
        rollout_s = time.time() - start

        # --- update ---
        for group, lr in zip(optimizer.param_groups, learning_rates.values(), strict=True):
            group["lr"] = lr * (1 - (iteration - 1) / args.num_iterations) if args.anneal_lr else lr
        batch = {
            "images": torch.cat(obs),  # row t * N + n, as in all below
            "instructions": texts,
            "action_tokens": torch.cat(tokens),
            "logprobs": logprobs.flatten(),
            "ref_logprobs": ref_logprobs.flatten(),
            "advantages": advantages.flatten(),
            "weights": weights.flatten(),
            "index": index.flatten().cpu().numpy(),
        }
        rng = np.random.default_rng((args.seed, iteration, args.num_envs))  # beyond the environments' numbers
        metrics = update(model, optimizer, batch, args, rng, run_dir) if kept.any() else {"losses/num_updates": 0}
        update_s = time.time() - start - rollout_s

        # --- metrics ---
        parts = [part for rank_episodes in runs.gather_over_ranks(episodes) for part in rank_episodes]
        metrics |= {f"train/{name}": np.concatenate([part[name] for part in parts]).mean() for name in EPISODE_METRICS}
        metrics["losses/frac_reward_zero_std"] = no_signal.float().mean()
        metrics["losses/frac_groups_dropped"] = 1 - kept.float().mean()
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
