"""Supervised fine-tuning (behaviour cloning) of a vision-language-action model, after Liu, Gao et al. 2025.

    python -m common.simulation.demos --num-demos 1000 --output demos/main    # expert demonstrations
    python sft_vla.py --demos demos/main                           # small model, embedded assets, any CPU
    python sft_vla.py --preset warmup --demos demos/bridge-single  # OpenVLA-7B, the start of PPO
    python sft_vla.py --preset baseline --demos demos/bridge-main --adapter runs/WARMUP/checkpoint-000020  # its rival
    torchrun --nproc-per-node 2 sft_vla.py --demos demos/main      # the same update, minibatches split over ranks
    python sft_vla.py --resume runs/NAME                           # continues exactly

Minimises the cross-entropy of the expert's action tokens given image and instruction. Its checkpoints are where
ppo_vla.py, grpo_vla.py and dpo_vla.py start. Departures from the paper, explained in docs/sft_vla.md:
 1. The loss is over the 256 action bins, the distribution that is sampled from later, not over the whole vocabulary.
 2. Action statistics are symmetric with a floor: zero is exactly a bin, idle dimensions keep a unit ([P]: quantiles).
 3. Trained weights and losses are float32; validation by whole episodes; success on paired held-out episodes.
Sibling: ppo_vla.py. Here is no rollout and no advantage; an iteration is `num_updates` optimizer steps.
"""

import os
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from common.run import logs, runs
from common.run.evaluate import evaluate
from common.simulation.demos import action_statistics, load_demos, read_header
from common.simulation.env import check_env_args
from common.simulation.vec_env import make_envs
from scripts.doctor import check_simulator


# --- args ---
@dataclass
class Args:
    """[P] the paper's code (RL4VLA), [M] measured here (docs/log.md), [D] our decision."""

    # run
    preset: Literal["default", "warmup", "baseline"] = "default"  # embedded small model, or OpenVLA-7B as in the paper
    name: str = ""  # run directory runs/NAME; empty = sft_vla-TASK-SEED-TIME
    resume: str = ""  # run directory to continue exactly; its Args become the defaults
    seed: int = 1  # weights of `--model tiny`, minibatches, augmentation
    device: str = "auto"  # of the model: cpu, cuda, or auto
    torch_threads: int = 2  # CPU threads of the model, over the ranks of a machine
    track: bool = False  # log to Weights & Biases too
    # environment: only for evaluations
    task: str = "main"  # a row of common/simulation/tasks.py
    split: Literal["train", "test"] = "train"  # its configurations
    assets: Literal["primitive", "bridge"] = "primitive"  # embedded bodies, or the real ones under MS_ASSET_DIR
    num_envs: int = 32  # over all ranks
    max_episode_steps: int = 40  # control steps of 0.2 s; the expert needs 20; [P] 80 [M]
    image_size: tuple[int, int] = (160, 120)  # camera pixels (width, height), those of the demonstrations; [P] 640 480
    sim_freq: int = 250  # physics Hz; [P] 500 [M]
    solver_iterations: int = 4  # of the contact solver; [P] 15 [M]
    fidelity: Literal["fixed", "published"] = "fixed"  # published = with the benchmark's known defects
    shader_pack: Literal["minimal", "default"] = "minimal"  # renderer quality; [P] default [M]
    sim_device: Literal["cpu", "cuda"] = "cpu"  # worker processes, or one batched GPU simulation [P] cuda
    num_workers: int = 0  # environment processes per rank; 0 = share the cores
    # model
    model: str = ""  # directory, hub id or tiny (random); empty = checkpoints/tiny-pretrained
    adapter: str = ""  # LoRA directory on top of model
    merge_adapter: bool = False  # add the adapter to the weights and train a new one [P baseline], or go on training it
    unnorm_key: str = "cleanvla"  # name of the action statistics in the checkpoint
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls and frozen weights; trained weights stay float32
    lora_rank: int = 0  # 0 = train all weights; [P] 32
    lora_targets: Literal["all", "llm"] = "all"  # linear layers with LoRA [P] all
    activation_checkpointing: bool = False  # less memory, about 30 % slower updates [D]
    # evaluation and checkpoints
    eval_every: int = 10  # iterations between evaluations in simulation, last included; 0 = none
    eval_episodes: int = 64  # of the paired list; 64 episodes at 94 % have the 95 % interval [85, 98] [P]
    eval_temperature: float = 0.6  # [P]
    num_videos: int = 2  # per evaluation
    checkpoint_every: int = 5  # iterations; an interruption loses at most so many
    # algorithm
    demos: tuple[str, ...] = ("demos/main",)  # directories of common/simulation/demos.py, mixed by their sizes
    num_demos: int = 0  # the first so many of each directory; 0 = all
    val_demos: int = 20  # episodes kept for validation, the last ones of each directory; [P] 16
    drop_idle: Literal["none", "still", "published"] = "still"  # steps left out [M]; [P] published
    statistics: Literal["symmetric", "quantiles", "model"] = "symmetric"  # of the data, or those of the model kept
    num_iterations: int = 10  # of num_updates optimizer steps each
    num_updates: int = 100  # per iteration: one line of metrics
    batch_size: int = 64  # over all ranks [M]; [P] 32
    micro_batch_size: int = 128  # samples per forward; only memory and speed depend on it
    learning_rate: float = 1e-3  # AdamW [M]; [P] 5e-4
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # to 0 over the run [M]; [P] constant
    warmup_updates: int = 100  # linear rise of the learning rate [D]; [P] 0
    weight_decay: float = 0.01  # AdamW [P]
    max_grad_norm: float = 1.0  # [D]; [P] none
    augment: bool = False  # random crop and colours [P warm-up]


PAPER = dict(
    assets="bridge", max_episode_steps=80, image_size=(640, 480), sim_freq=500, solver_iterations=15,
    fidelity="published", shader_pack="default", sim_device="cuda", model="openvla/openvla-7b", dtype="bfloat16",
    lora_rank=32, statistics="quantiles", batch_size=32, micro_batch_size=8, learning_rate=5e-4,
    lr_schedule="constant", warmup_updates=0, max_grad_norm=float("inf"), val_demos=16, drop_idle="published",
)  # fmt: skip
PRESETS = {
    "default": Args(),
    "warmup": Args(  # keeps the statistics of OpenVLA's training data, as published
        preset="warmup", **PAPER | {"statistics": "model", "val_demos": 5}, unnorm_key="bridge_orig", num_iterations=20,
        augment=True,
    ),
    "baseline": Args(  # checkpoints hold the merged weights too, 15 GB
        preset="baseline", **PAPER, num_iterations=600, eval_every=50, checkpoint_every=50, merge_adapter=True,
    ),
}  # fmt: skip


def check_args(args):
    """What can be refused before a model or data are loaded: ValueError with values, rule and fix."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    names = "num_iterations num_updates batch_size num_envs micro_batch_size checkpoint_every val_demos "
    for name in (names + "max_episode_steps max_grad_norm").split():
        if (value := getattr(args, name)) <= 0:
            raise ValueError(f"{name} = {value} must be > 0; use {getattr(Args, name)}")
        if name in ("batch_size", "num_envs") and value % ranks:
            raise ValueError(f"{name} = {value} must be a multiple of the {ranks} ranks; use {32 * ranks}")
    runs.check_run(args)
    if args.merge_adapter and not (args.adapter or args.resume or Path(args.model, "adapter_config.json").is_file()):
        raise ValueError("merge_adapter = True needs the adapter that is merged; use --adapter, or --no-merge-adapter")
    for path in args.demos:
        settings = read_header(path)["settings"]
        for key in ("assets", "image_size", "shader_pack"):
            here = list(args.image_size) if key == "image_size" else getattr(args, key)
            if settings[key] != here:
                raise ValueError(f"{path} was recorded with {key} = {settings[key]}, this run has {here}; change one")


def wanted_key(args):
    """Of kept statistics, whose name nobody gave, the only one; else the one of the flag."""
    return "" if (args.statistics, args.unnorm_key) == ("model", Args.unnorm_key) else args.unnorm_key


def load_data(args, model):
    """Samples, a dict of rows: images (uint8, as the model sees them), instructions, actions (float32), action_tokens;
    the rows of training and of validation, and the unnorm_key. Replaces the model's action statistics unless they are
    kept. Validation: whole episodes, the last of each directory; their configurations are not trained on."""

    def fit(images):  # (T, H, W, 3) uint8, any size -> (T, h, w, 3) uint8
        images = model.fit_images(images).cpu()
        return images if images.dtype == torch.uint8 else images.round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    demos = load_demos(args.demos, fit, args.num_demos or None, args.drop_idle)
    if args.val_demos >= (num_demos := len(demos.instructions)):
        raise ValueError(f"val_demos = {args.val_demos} leaves none of {num_demos} episodes; use fewer")
    if args.statistics != "model":
        statistics = demos.statistics if args.statistics == "symmetric" else action_statistics(demos.actions, None)
        model.norm_stats.clear()
        model.norm_stats[args.unnorm_key] = {"action": statistics, "assets": args.assets}
    unnorm_key = runs.choose_key(model.norm_stats, wanted_key(args), args.assets)
    data = {"images": demos.images, "actions": torch.as_tensor(demos.actions)}
    data["instructions"] = [demos.instructions[episode] for episode in demos.episodes]
    data["action_tokens"] = model.tokens_from_actions(demos.actions, unnorm_key)
    sources = [(settings["task"], settings["split"]) for settings in demos.settings]
    scenes = np.array([f"{sources[k]} {id}" for k, id in zip(demos.sources, demos.episode_ids, strict=True)])
    to_the_end = np.searchsorted(demos.sources, demos.sources, side="right") - np.arange(num_demos)
    val = np.argsort(to_the_end, kind="stable")[: args.val_demos]
    train = np.flatnonzero(~np.isin(scenes, scenes[val]))
    return data, *(torch.as_tensor(np.flatnonzero(np.isin(demos.episodes, part))) for part in (train, val)), unnorm_key


# --- loss ---
def augment(images, generator):
    """Random crop of 90 to 100 % of the area, then brightness, saturation and contrast each +-20 %, per image.

    Args: images (M, H, W, 3) uint8; generator: torch.Generator of the CPU. Returns: the same shape, uint8.
    """
    r = torch.rand(len(images), 6, generator=generator).to(images.device)
    side = (0.9 + 0.1 * r[:, 0]).sqrt()
    crop = torch.eye(2, 3, device=images.device) * side[:, None, None]
    crop[:, :, 2] = (2 * r[:, 1:3] - 1) * (1 - side)[:, None]
    x = images.permute(0, 3, 1, 2).float()
    x = F.grid_sample(x, F.affine_grid(crop, x.shape, align_corners=False), padding_mode="border", align_corners=False)
    brightness, saturation, contrast = (0.8 + 0.4 * r[:, 3:, None, None, None]).unbind(1)
    grey = brightness * x.mean(1, keepdim=True)
    x = grey + (brightness * x - grey) * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    return (mean + (x - mean) * contrast).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def minibatch(number, num_rows, batch_size, seed):
    """Rows of optimizer step `number`: each epoch is one permutation, its incomplete last minibatch is dropped."""
    batch_size = min(batch_size, num_rows)
    epoch, k = divmod(number, num_rows // batch_size)
    return torch.as_tensor(np.random.default_rng([seed, epoch]).permutation(num_rows)[k * batch_size :][:batch_size])


def cross_entropy(model, data, rows, images):
    """Cross-entropy (M,) of the expert's tokens in nats per token, for rows (M,) of data and their images."""
    texts, tokens = [data["instructions"][row] for row in rows], data["action_tokens"][rows]
    return -model.evaluate(images, texts, tokens, return_token_logprobs=True)[0].mean(1)


VALIDATION = ("cross_entropy", "token_accuracy", "gripper_accuracy", "l1_xyz_mm", "l1_rotation_mrad")


@torch.no_grad()
def validate(model, data, rows, unnorm_key, micro_batch_size, max_rows):
    """Means of at most `max_rows` evenly spread rows, shared out over ranks; tokens are greedy, as in an episode."""
    rows = rows[torch.linspace(0, len(rows) - 1, min(max_rows, len(rows))).long()]
    rank, world_size = runs.rank_and_world_size()
    sums = torch.zeros(len(VALIDATION), device=model.device)
    for part in filter(len, rows[rank::world_size].split(max(64, micro_batch_size))):  # no gradients: more fit
        images = data["images"][part]
        tokens = model.act(images, [data["instructions"][row] for row in part], temperature=0)[0].cpu()
        decoded, labels = model.actions_from_tokens(tokens, unnorm_key), data["actions"][part]
        error, gripper = (decoded - labels).abs(), (decoded[:, 6] > 0.5) == (labels[:, 6] > 0.5)  # as in simulation
        losses, right = cross_entropy(model, data, part, images).cpu(), tokens == data["action_tokens"][part]
        moves = 1000 * error[:, :3].mean(1), 1000 * error[:, 3:6].mean(1)
        values = losses, right.float().mean(1), gripper.float(), *moves
        sums += torch.stack([x.sum() for x in values]).to(model.device)
    return dict(zip(VALIDATION, (runs.sum_over_ranks(sums) / len(rows)).tolist(), strict=True))


def update(model, optimizer, data, rows, number, args, run_dir):
    """Optimizer step `number` on `rows`, a minibatch spread over all ranks. Returns: nats per token, gradient norm."""
    rank, world_size = runs.rank_and_world_size()
    rows = rows[minibatch(number, len(rows), args.batch_size, args.seed)]
    images = data["images"][rows]
    if args.augment:  # before the split, so that any number of ranks sees the same
        images = augment(images, torch.Generator().manual_seed(args.seed * 2**32 + number))
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=model.device)
    for mine in filter(len, torch.arange(len(rows))[rank::world_size].split(args.micro_batch_size)):
        loss = cross_entropy(model, data, rows[mine], images[mine]).sum() / len(rows)
        if not torch.isfinite(loss):
            runs.stop_non_finite(run_dir, "loss", data, rows[mine])
        loss.backward()
        total += loss.detach()
    parameters = optimizer.param_groups[0]["params"]
    runs.sum_gradients(parameters)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
    if not np.isfinite(grad_norm):
        runs.stop_non_finite(run_dir, "gradient", data, rows)
    optimizer.step()
    return runs.sum_over_ranks(total).item(), grad_norm


def main(args: Args):
    # Shapes: M samples of a minibatch over all ranks, A = 7 action tokens.
    # --- setup ---
    check_args(args)
    model_name = args.model or "checkpoints/tiny-pretrained"
    if args.eval_every:
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

    # --- model, data and optimizer ---
    adapter = None if checkpoint else args.adapter or None
    if args.statistics == "model":
        runs.find_key(checkpoint or model_name, adapter, wanted_key(args), args.assets)
    model = load_vla(
        checkpoint or model_name, device, getattr(torch, args.dtype), args.lora_rank, args.lora_targets,
        adapter=adapter, value_head=False, seed=args.seed,
        merge_adapter=args.merge_adapter and not checkpoint,
    )  # fmt: skip
    model.checkpoint_activations(args.activation_checkpointing)
    data, train_rows, val_rows, unnorm_key = load_data(args, model)
    params = model.trainable_parameters()["policy"]
    optimizer = torch.optim.AdamW(params, lr=args.learning_rate, weight_decay=args.weight_decay)
    progress = {"iteration": 0, "seconds": 0.0, "evaluations": []}  # evaluations: success at end on the paired list
    samples = [len(train_rows), len(val_rows), zlib.crc32(data["action_tokens"].numpy().tobytes())]
    if (of_ranks := runs.gather_over_ranks(samples)) != [samples] * world_size:
        fix = "the same files on every machine, no recording running"
        raise ValueError(f"ranks read other {args.demos}: {of_ranks} samples, for validation, checksum; use {fix}")
    progress["samples"] = samples
    if checkpoint:
        state = runs.load_training_state(checkpoint)
        runs.load_optimizer(optimizer, state["optimizer"])
        if samples != (then := state["progress"]["samples"]):
            fix = "give its --num-demos and --statistics, or start anew"
            raise ValueError(f"{args.demos} give {samples} samples, for validation, checksum, it had {then}; {fix}")
        progress = state["progress"]

    # --- environments, logger, checkpoints, evaluation ---
    envs = make_envs(
        args.task, args.split, args.num_envs // world_size, assets=args.assets, image_size=args.image_size,
        sim_freq=args.sim_freq, solver_iterations=args.solver_iterations, max_episode_steps=args.max_episode_steps,
        fidelity=args.fidelity, shader_pack=args.shader_pack, device=args.sim_device,
        num_workers=args.num_workers or max(1, len(os.sched_getaffinity(0)) // runs.ranks_here()),
    ) if args.eval_every else None  # fmt: skip
    logger = logs.Logger(run_dir, asdict(args), args.track, progress["iteration"] * args.num_updates, enabled=rank == 0)
    last_update = args.num_iterations * args.num_updates
    if rank == 0:
        print(f"{run_dir} | {checkpoint or model_name} on {device}, {args.dtype}, trains {len(params)} tensors")
        print(f"{len(train_rows)} samples, {len(val_rows)} for validation, {args.assets} assets")
        runs.stop_on_signals(f"the last checkpoint, if any, is kept: python {sys.argv[0]} --resume {run_dir}")

    shown = "losses/cross_entropy val/cross_entropy val/token_accuracy val/l1_xyz_mm".split()
    shown.append(f"eval/{args.task}/success_at_end")

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

    if not checkpoint:
        save("checkpoint")

    for iteration in range(progress["iteration"] + 1, args.num_iterations + 1):
        # --- update ---
        start, history = time.time(), []
        for number in range((iteration - 1) * args.num_updates, iteration * args.num_updates):
            decay = 0.5 + 0.5 * float(np.cos(np.pi * number / last_update)) if args.lr_schedule == "cosine" else 1.0
            lr = args.learning_rate * decay * min(1.0, (number + 1) / max(1, args.warmup_updates))
            optimizer.param_groups[0]["lr"] = lr
            history.append(update(model, optimizer, data, train_rows, number, args, run_dir))
        update_s = time.time() - start

        # --- metrics ---
        metrics = dict(zip(("losses/cross_entropy", "losses/grad_norm"), np.mean(history, axis=0), strict=True))
        for name, rows, most in (("train", train_rows, 256), ("val", val_rows, 1024)):
            measured = validate(model, data, rows, unnorm_key, args.micro_batch_size, most)
            metrics |= {f"{name}/{key}": value for key, value in measured.items()}
        metrics |= {"charts/iteration": iteration, "charts/learning_rate": lr, "time/update_s": update_s}
        metrics |= {"charts/samples_per_s": args.num_updates * args.batch_size / update_s, **logs.peak_memory()}

        # --- evaluation, log, checkpoint ---
        progress["iteration"], last = iteration, iteration == args.num_iterations
        if args.eval_every and (last or iteration % args.eval_every == 0):
            metrics |= evaluation()
        progress["seconds"] += time.time() - start
        logger.log(metrics, iteration * args.num_updates)
        text = " | ".join(f"{key} {metrics[key]:.3f}" for key in shown if key in metrics)
        status = logs.status_line(iteration, args.num_iterations, metrics, progress["seconds"] / iteration)
        logger.print(f"{status} | {text}")
        if last or iteration % args.checkpoint_every == 0:
            save("checkpoint")

    # --- summary ---
    if envs:
        envs.close()
    logger.close()
    panels = [["losses/cross_entropy", "val/cross_entropy"], ["train/token_accuracy", "val/token_accuracy"]]
    if rank == 0:
        done = run_dir, last_update, progress["seconds"], progress["evaluations"]
        print(logs.summary(*done, panels, "optimizer steps"))


if __name__ == "__main__":
    main(runs.parse_args(Args, PRESETS))
