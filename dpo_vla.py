"""DPO fine-tuning of a vision-language-action model on whole trajectories (TPO), after Liu, Gao et al. 2025.

    python dpo_vla.py --num-envs 64                       # small model, embedded assets, any CPU
    python dpo_vla.py --preset paper --dry-run            # OpenVLA-7B: the plan, nothing is loaded
    torchrun --nproc-per-node 2 dpo_vla.py --num-envs 64  # the same update, states and pairs split over ranks
    python dpo_vla.py --resume runs/NAME                  # continues exactly
    python -m common.run.pairs --path runs/NAME/pairs/000085.npz --pair 3    # video: chosen left, rejected right

The paper takes GRAPE's loss (Zhang et al. 2024; DPO: Rafailov et al. 2023) for trajectories that share the first state:
    L = -log sigmoid(beta [log pi(tau_w)/pi_ref(tau_w) - log pi(tau_l)/pi_ref(tau_l)]), tau_w has the higher return.
Its code was never released. Our decisions, explained in docs/dpo_vla.md:
 1. Each iteration collects with the current policy, pairs and optimises; `--num-iterations 1` is offline DPO.
 2. The exact gradient of a whole trajectory's loss in micro-batches of steps, by two passes.
 3. No second model: the reference is the adapter turned off, or the start's weights put in place for one scoring pass.
 4. `--nll-coef` adds the chosen trajectory's negative log-prob per step, against both of a pair becoming unlikely.
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
from safetensors.torch import load_file, save_file

from common.run import logs, pairs, runs
from common.run.evaluate import evaluate, run_episodes, training_ids
from common.simulation.env import check_env_args
from common.simulation.vec_env import make_envs
from scripts.doctor import check_simulator


# --- args ---
@dataclass
class Args:
    """[P] the paper's code for PPO (RL4VLA), [G] GRAPE, [M] measured here (docs/log.md), [D] our decision."""

    # run
    preset: Literal["default", "paper"] = "default"  # defaults of all other flags: embedded small model, or OpenVLA-7B
    name: str = ""  # run directory runs/NAME; empty = dpo_vla-TASK-SEED-TIME
    resume: str = ""  # run directory to continue exactly; its Args become the defaults
    seed: int = 1  # weights of `--model tiny`, training episodes, sampling, minibatches
    device: str = "auto"  # of the model: cpu, cuda, or auto
    torch_threads: int = 2  # of the model on a CPU, over all ranks of a machine; more cores: more ranks (torchrun)
    track: bool = False  # log to Weights & Biases too
    dry_run: bool = False  # print the plan with a memory estimate, and leave
    # environment
    task: str = "main"  # a row of common/simulation/tasks.py; evaluation during training is on the same task
    split: Literal["train", "test"] = "train"  # its configurations
    assets: Literal["primitive", "bridge"] = "primitive"  # embedded bodies, or the real ones under MS_ASSET_DIR
    num_envs: int = 64  # over all ranks, a multiple of num_trajectories [P]
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
    keep_pairs: int = 3  # last iterations whose pairs stay on disk; 0 = all [D]
    # algorithm
    num_iterations: int = 85  # of collection and optimisation, as many as PPO; 1 = offline
    num_steps: int = 160  # control steps per environment and rollout, a multiple of max_episode_steps [M]; [P] 80
    num_trajectories: int = 8  # from each initial state, at least 2 [D]
    pairs_per_state: int = 4  # at most: best with worst, second best with second worst, ... [D]
    tie_break: Literal["drop", "length"] = "drop"  # equal returns: no pair, or earlier success is better [D]
    reference: Literal["start", "previous"] = "start"  # pi_ref: start of the run [P], or the policy that collected
    beta: float = 0.1  # per nat of a trajectory's summed log-ratio; per step: multiply it by the number of steps [G]
    nll_coef: float = 0.0  # of the chosen trajectory's negative log-prob per step (Pang et al. 2024: alpha) [D]
    window_steps: int = 0  # random windows of so many steps of both trajectories; 0 = whole trajectories; [G] 8
    learning_rate: float = 3e-5  # AdamW [M]; [G] 2e-5
    anneal_lr: bool = True  # linear to 0 over the run [M]; constant in [G]
    weight_decay: float = 0.01  # AdamW [P]
    update_epochs: int = 1  # passes over the pairs of an iteration [D]
    pairs_per_batch: int = 8  # per optimizer step, over all ranks [D]; [G] 1
    micro_batch_size: int = 40  # steps of one trajectory per forward; only memory and speed depend on it
    max_grad_norm: float = 10.0  # [P]
    margin_tolerance: float = 0.0  # largest |margin| of policy = reference; beyond it the run stops [D]


PRESETS = {
    "default": Args(),
    "paper": Args(
        preset="paper", assets="bridge", max_episode_steps=80, image_size=(640, 480), sim_freq=500,
        solver_iterations=15, fidelity="published", shader_pack="default", sim_device="cuda", micro_batch_size=8,
        model="gen-robot/openvla-7b-rlvla-warmup", unnorm_key="bridge_orig", dtype="bfloat16", lora_rank=32,
        freeze_vision=False, num_iterations=391, num_steps=80, learning_rate=2e-5, anneal_lr=False, pairs_per_batch=1,
    ),
}  # fmt: skip


def check_args(args):
    """What can be refused before a model or a simulator is loaded: ValueError with values, rule and fix."""
    positive = "num_iterations update_epochs pairs_per_batch pairs_per_state micro_batch_size checkpoint_every beta"
    positive = {k: getattr(args, k) for k in (*positive.split(), "torch_threads", "temperature", "max_grad_norm")}
    runs.check_rollout(args.num_envs, args.num_steps, args.max_episode_steps, 1, **positive)
    runs.check_run(args)
    k, n, t = args.num_trajectories, args.num_envs // int(os.environ.get("WORLD_SIZE", 1)), args.max_episode_steps
    if k < 2 or n % k:
        fix = f"use --num-envs {k * int(os.environ.get('WORLD_SIZE', 1))}, or a multiple" if k > 1 else "use 2"
        raise ValueError(f"num_trajectories = {k} must be >= 2 and divide the {n} environments of a rank; {fix}")
    if args.pairs_per_state > k // 2:  # no trajectory is in two pairs
        raise ValueError(f"pairs_per_state = {args.pairs_per_state} exceeds num_trajectories // 2; use {k // 2}")
    if args.nll_coef < 0:
        raise ValueError(f"nll_coef = {args.nll_coef} must be >= 0; use 0 (DPO alone) or 1")
    if args.window_steps < 0 or t % (args.window_steps or t):
        raise ValueError(f"window_steps = {args.window_steps} must be 0 or divide max_episode_steps = {t}; use 8")


# --- pairs ---
def trajectory_scores(returns, success_steps, tie_break):
    """What trajectories are ranked by, (N,): the return; with tie_break "length" also how early success began to last.

    Args: returns (N,) float; success_steps (N,) int: steps in success up to the end of the episode.
    """
    scores = returns.astype(np.float64).round(1)  # a stage is worth 0.1: rounding errors of sums must not make a pair
    return scores + (1e-6 * success_steps if tie_break == "length" else 0)


def make_pairs(scores, num_trajectories, pairs_per_state):
    """(P, 2) int64 places (chosen, rejected) in scores (N,), of which each `num_trajectories` in a row share a state.

    The k-th best of a state is paired with its k-th worst; equal scores make no pair. Nothing is in two pairs.
    """
    groups = scores.reshape(-1, num_trajectories)
    order = np.argsort(-groups, axis=1, kind="stable") + num_trajectories * np.arange(len(groups))[:, None]
    places = np.stack([order, order[:, ::-1]], axis=-1)[:, :pairs_per_state].reshape(-1, 2)
    return places[scores[places[:, 0]] > scores[places[:, 1]]]


EPISODE_METRICS = ("success_at_end", "success_once", "grasped", "return")


def collect(model, envs, args, iteration, unnorm_key):
    """Episodes of the current policy, `num_trajectories` from each state, paired; every rank returns those of all.

    Returns: dict of arrays with S = 2 P rows, row 2 n the chosen and 2 n + 1 the rejected trajectory of pair n: images
    as the model sees them (PNG), action_tokens (S, T, A), instructions, episode_ids, returns; train/KEY: means of all.
    """
    (rank, world_size), size, seed = runs.rank_and_world_size(), args.num_trajectories, (args.seed, iteration)
    num_states = args.num_envs * args.num_steps // args.max_episode_steps // size
    states = np.split(np.arange(num_states), world_size)[rank]
    rngs = [np.random.default_rng((*seed, state)) for state in states]
    ids = np.repeat([training_ids(args.task, args.split, 1, rng, args.fidelity)[0] for rng in rngs], size)
    rngs = [np.random.default_rng((*seed, state, 1 + k)) for state in states for k in range(size)]
    generators = [torch.Generator().manual_seed(int(rng.integers(2**62))) for rng in rngs]
    obs, tokens = [[] for _ in ids], [[] for _ in ids]

    def policy(images, instructions, rows):
        images = model.fit_images(images).cpu()
        if images.is_floating_point():  # the policy acts on exactly what is stored and scored later
            images = images.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        action_tokens = model.act(images, instructions, args.temperature, [generators[row] for row in rows])[0].cpu()
        for row, image, action in zip(rows, images.numpy(), action_tokens.numpy(), strict=True):
            obs[row].append(image)
            tokens[row].append(action)
        return model.actions_from_tokens(action_tokens, unnorm_key)

    results = run_episodes(policy, envs, ids)
    scores = trajectory_scores(results["return"], results["success_steps"], args.tie_break)
    rows = make_pairs(scores, size, args.pairs_per_state).flatten()
    part = pairs.encode_frames([obs[row] for row in rows], args.max_episode_steps)
    each = {"action_tokens": np.array(tokens), "instructions": results["instruction"], "episode_ids": ids}
    part |= {key: values[rows] for key, values in (each | {"returns": results["return"]}).items()}
    part |= {f"train/{name}": results[name] for name in EPISODE_METRICS}
    part |= {"train/frac_without_pair": ~np.isin(np.arange(len(states)), rows // size)}
    parts = runs.gather_over_ranks(part)  # in the order of states: any number of ranks makes the same pairs
    data = {key: np.concatenate([part[key] for part in parts]) for key in part}
    data |= {key: values.mean() for key, values in data.items() if key.startswith("train/")}
    if not len(data["returns"]):
        raise RuntimeError(
            f"iteration {iteration}: no pair, the {size} trajectories of each state end alike (success at end "
            f"{data['train/success_at_end']:.2f}); use another --temperature or start, or --tie-break length"
        )
    return data | {"train/num_pairs": np.array(len(data["returns"]) // 2)}


# --- loss ---
def dpo_loss(chosen_logratios, rejected_logratios, beta):
    """-log sigmoid(margin) per pair, margin = beta (chosen - rejected) (Rafailov et al. 2023, eq. 7).

    Args: chosen_logratios, rejected_logratios: (M,) float32 nats, log pi(tau) - log pi_ref(tau).
    Returns: losses (M,), margins (M,).
    """
    runs.require_float32(chosen_logratios.shape[:1], chosen=chosen_logratios, rejected=rejected_logratios)
    margins = beta * (chosen_logratios - rejected_logratios)
    return -F.logsigmoid(margins), margins


def score(model, data, row, start, stop, args):
    """Yields log pi (m,) of the steps start to stop of trajectory `row`, micro-batch by micro-batch.

    None spans trajectories or windows: policy and reference are scored in the same shapes, so that the same weights
    give the same numbers bit for bit, and the margin of policy = reference is 0, not 1e-6.
    """
    for first in range(start, stop, args.micro_batch_size):
        part = slice(first, min(first + args.micro_batch_size, stop))
        texts = [data["instructions"][row]] * (part.stop - first)
        yield model.evaluate(data["images"][row, part], texts, data["action_tokens"][row, part], args.temperature)[0]


@torch.no_grad()
def all_logprobs(model, data, args):
    """log pi (S, T) float32 of every step under the model as it is; ranks share the trajectories."""
    (rank, world_size), (num_rows, num_steps) = runs.rank_and_world_size(), data["action_tokens"].shape[:2]
    logprobs, window = torch.zeros(num_rows, num_steps, device=model.device), args.window_steps or num_steps
    for row in range(rank, num_rows, world_size):
        for start in range(0, num_steps, window):
            parts = score(model, data, row, start, start + window, args)
            logprobs[row, start : start + window] = torch.cat(list(parts))
    return runs.sum_over_ranks(logprobs)


# What stored pairs and their reference log-probs depend on, of the flags that may differ between attempts.
PAIRS_OF = """seed model adapter task split reference num_trajectories pairs_per_state tie_break temperature dtype
window_steps micro_batch_size"""
MEANS = ("losses/dpo_loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def update(model, optimizer, data, args, rng, run_dir, same):
    """DPO epochs over the pairs of one iteration. A minibatch of pairs is spread over all ranks.

    Args:
        data: rows as in `collect`: images (S, T, H, W, 3) uint8, instructions (list), action_tokens (S, T, A) int64,
            ref_logprobs (S, T) float32. rng: np.random.Generator, in the same state on every rank.
        same: True while policy and reference are one and the same, so that the first margins must be 0.
    Returns: dict of metrics, means over pairs. Raises: RuntimeError and FloatingPointError, see the guards.
    """
    (rank, world_size), (num_rows, num_steps) = runs.rank_and_world_size(), data["action_tokens"].shape[:2]
    parameters, window = optimizer.param_groups[0]["params"], args.window_steps or num_steps
    ref_logprobs, num_pairs = data["ref_logprobs"], num_rows // 2
    sums, grad_norms, first_margin = 0.0, [], 0.0
    for _ in range(args.update_epochs):
        starts = window * rng.integers(num_steps // window, size=num_pairs)  # the same phase of both trajectories
        for minibatch in np.array_split(rng.permutation(num_pairs), -(-num_pairs // args.pairs_per_batch)):
            mine = minibatch[rank::world_size]
            rows = torch.as_tensor(2 * mine[:, None] + np.arange(2)).flatten()  # chosen, rejected, chosen, ...
            windows = [(row, starts[row // 2], starts[row // 2] + window) for row in rows.tolist()]
            # First pass: log-ratios of whole windows, and the slope of the loss at each of them.
            logratios = torch.zeros(len(rows), device=ref_logprobs.device)
            with torch.no_grad():
                for k, (row, start, stop) in enumerate(windows):
                    logprobs = torch.cat(list(score(model, data, row, start, stop, args)))
                    logratios[k] = (logprobs - ref_logprobs[row, start:stop]).sum()
            chosen, rejected = logratios.requires_grad_().view(-1, 2).unbind(1)
            losses, margins = dpo_loss(chosen, rejected, args.beta)
            objectives = losses - args.nll_coef * chosen / window  # the reference's part of `chosen` has no gradient
            slopes = torch.autograd.grad(objectives.sum() / len(minibatch), logratios)[0].tolist()
            stats = losses, args.beta * chosen, args.beta * rejected, margins, (margins > 0).float()
            sums = sums + torch.stack([x.detach().sum() for x in stats])
            if same and not grad_norms:
                first_margin = max(runs.gather_over_ranks(max(margins.abs().tolist(), default=0.0)))
                if first_margin > args.margin_tolerance:
                    raise RuntimeError(
                        f"|margin| = {first_margin:.1e} of policy = reference exceeds margin_tolerance = "
                        f"{args.margin_tolerance}; after a resume elsewhere raise it, else the two are not scored alike"
                    )
            # Second pass: with these slopes the loss is linear in each step's log-prob, so any parts will do.
            optimizer.zero_grad(set_to_none=True)
            for (row, start, stop), slope in zip(windows, slopes, strict=True):
                for logprobs in score(model, data, row, start, stop, args):
                    (slope * logprobs.sum()).backward()
            runs.sum_gradients(parameters)
            grad_norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item())
            if not (np.isfinite(grad_norms[-1]) and losses.isfinite().all()):
                runs.stop_non_finite(run_dir, "loss or its gradient", data, rows)
            optimizer.step()
    means = (runs.sum_over_ranks(sums) / (num_pairs * args.update_epochs)).tolist()
    metrics = {"losses/grad_norm": np.mean(grad_norms), "losses/num_updates": len(grad_norms)}
    return dict(zip(MEANS, means, strict=True)) | metrics | {"losses/first_margin": first_margin}


def main(args: Args):
    # Shapes: T steps of an episode, A = 7 action tokens, S trajectories in P = S / 2 pairs, N environments.
    # --- setup ---
    check_args(args)
    model_name = args.model or "checkpoints/tiny-warmup"
    if args.dry_run:
        samples = 2 * args.pairs_per_batch * args.max_episode_steps  # of an update; if every trajectory is in a pair:
        known = {"num_minibatches": max(1, args.num_envs * args.num_steps // samples), "separate_critic": False}
        known["micro_batch_size"] = min(args.micro_batch_size, args.window_steps or args.max_episode_steps)
        return print(logs.plan(asdict(args) | known, asdict(PRESETS["default"]) | known, model_name))
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
    params = {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=args.learning_rate, weight_decay=args.weight_decay)
    progress = {"iteration": 0, "seconds": 0.0, "evaluations": []}  # evaluations: success at end on the paired list
    # A new adapter turned off is the start; what was trained before, a loaded adapter too, must be kept on disk.
    progress["start_is_base"] = args.lora_rank > 0 and model.source.adapter is None
    if checkpoint:
        state = runs.load_training_state(checkpoint)
        runs.load_optimizer(optimizer, state["optimizer"])
        progress = state["progress"]

    # --- environments, logger, checkpoints, evaluation ---
    envs = make_envs(
        args.task, args.split, args.num_envs // world_size, assets=args.assets, image_size=args.image_size,
        sim_freq=args.sim_freq, solver_iterations=args.solver_iterations, max_episode_steps=args.max_episode_steps,
        fidelity=args.fidelity, shader_pack=args.shader_pack, device=args.sim_device,
        num_workers=args.num_workers or max(1, len(os.sched_getaffinity(0)) // runs.ranks_here()),
    )  # fmt: skip
    batch_size = args.num_envs * args.num_steps  # of all ranks
    logger = logs.Logger(run_dir, asdict(args), args.track, progress["iteration"] * batch_size, enabled=rank == 0)
    if rank == 0:
        size = sum(p.numel() for p in params.values()) / 1e6
        print(f"{run_dir} | {checkpoint or model_name} on {device}, {args.dtype}, trains {size:.2f} M weights")
        print(f"{args.num_envs} environments {args.image_size}, {args.assets} pack, {args.sim_device} simulation")
        runs.stop_on_signals(f"the last checkpoint, if any, is kept: python {sys.argv[0]} --resume {run_dir}")

    def save(kind):
        if rank == 0:
            state = {"optimizer": optimizer.state_dict(), "progress": progress, "args": asdict(args)}
            runs.save_checkpoint(run_dir, kind, progress["iteration"], lambda path: save_vla(model, path), state)

    def evaluation():
        """The in-distribution list; the best checkpoint is chosen here and on nothing else."""
        inputs = args.task, args.split, args.eval_episodes, args.eval_temperature, unnorm_key
        metrics = evaluate(model, envs, *inputs, run_dir / "videos" / f"{progress['iteration']:06d}", args.num_videos)
        progress["evaluations"].append(metrics[f"eval/{args.task}/success_at_end"])
        if progress["evaluations"][-1] >= max(progress["evaluations"]):
            save("best")
        return metrics

    start_path = None if progress["start_is_base"] else run_dir / "reference.safetensors"
    if not checkpoint:
        if rank == 0 and start_path and args.reference == "start":
            save_file({name: p.detach() for name, p in params.items()}, start_path)
        logger.log(evaluation() if args.eval_every else {}, 0)
        save("checkpoint")
    elif start_path and args.reference == "start" and not start_path.exists():
        raise FileNotFoundError(f"{start_path} (weights of the reference) is missing; use --reference previous")

    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):
        # --- rollout ---
        start, path = time.time(), run_dir / "pairs" / f"{iteration:06d}.npz"
        if rank == 0:  # what an earlier attempt collected beyond this iteration need not be this policy's
            pairs.remove(path.parent, 0 if args.keep_pairs == 0 else iteration - args.keep_pairs, iteration)
        made_with = str([getattr(args, key) for key in PAIRS_OF.split()])
        data = pairs.load_pairs(path) if path.exists() else {}
        if data.get("made_with") != made_with:  # a new round, or one that was begun with other flags
            data = collect(model, envs, args, iteration, unnorm_key) | {"made_with": np.array(made_with)}
        batch = {"images": torch.from_numpy(pairs.decode_frames(data)), "instructions": data["instructions"].tolist()}
        batch["action_tokens"] = torch.from_numpy(data["action_tokens"])
        if "ref_logprobs" not in data:  # scored once, then stored
            weights = load_file(start_path) if start_path and args.reference == "start" else None
            with model.reference(weights) if args.reference == "start" else torch.no_grad():
                data["ref_logprobs"] = all_logprobs(model, batch, args).cpu().numpy()
            if rank == 0:
                pairs.save_pairs(path, data)
        batch["ref_logprobs"] = torch.from_numpy(data["ref_logprobs"]).to(device)
        rollout_s = time.time() - start

        # --- update ---
        rng = np.random.default_rng((args.seed, iteration, batch_size))  # beyond the numbers of states
        lr = args.learning_rate * (1 - (iteration - 1) / args.num_iterations if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = lr
        metrics = {key: value.item() for key, value in data.items() if key.startswith("train/")}
        metrics |= update(model, optimizer, batch, args, rng, run_dir, iteration == 1 or args.reference == "previous")
        update_s = time.time() - start - rollout_s

        # --- metrics ---
        sps = batch_size / (rollout_s + update_s)
        metrics |= {"charts/iteration": iteration, "charts/learning_rate": lr, "charts/SPS": sps, **logs.peak_memory()}
        metrics |= {"time/rollout_s": rollout_s, "time/update_s": update_s}

        # --- evaluation, log, checkpoint ---
        progress["iteration"], last = iteration, iteration == args.num_iterations
        if args.eval_every and (last or iteration % args.eval_every == 0):
            metrics |= evaluation()
        progress["seconds"] += time.time() - start
        logger.log(metrics, iteration * batch_size)
        status = logs.status_line(iteration, args.num_iterations, metrics, progress["seconds"] / iteration)
        logger.print(" | ".join([status, *(f"{key} {metrics[key]:.3f}" for key in MEANS)]))
        if last or iteration % args.checkpoint_every == 0:
            save("checkpoint")

    # --- summary ---
    envs.close()
    logger.close()
    panels = [["train/success_at_end", f"eval/{args.task}/success_at_end"], ["train/return"], ["rewards/margins"]]
    if rank == 0:
        done = run_dir, progress["iteration"] * batch_size, progress["seconds"], progress["evaluations"]
        print(logs.summary(*done, panels))


if __name__ == "__main__":
    main(runs.parse_args(Args, PRESETS))
