"""Supervised fine-tuning (behaviour cloning) of a vision-language-action model (Liu et al. 2025).

    python sft_vla.py --demos demos/main      # small model, embedded scene, any CPU
    python sft_vla.py --preset warmup --demos demos/bridge-single --name warmup  # PPO's start
    python sft_vla.py --preset baseline --demos demos/bridge-main                # from runs/warmup
    torchrun --nproc-per-node 2 sft_vla.py    # the same update, minibatches split over ranks
    python sft_vla.py --resume runs/NAME      # continues exactly

The loss is the cross-entropy of the expert's action tokens given image and instruction. There is
no rollout and no advantage; an iteration is `num_updates` optimizer steps.
What differs from the paper's code (docs/sft_vla.md says why):
 1. The softmax is over the 256 action bins, as in sampling (theirs: over the whole vocabulary).
 2. Action statistics are symmetric, so that zero is exactly a bin (theirs: 1 % and 99 % quantiles).
 3. Trained weights and losses are float32 (theirs: bfloat16).
"""

import math
import time
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from common.model.checkpoints import trainable_parameters
from common.run.args import Model, Run, Scene, check, check_args, parse_args
from common.run.experiment import Experiment, load_start
from common.run.metrics import Means
from common.run.ranks import gather_over_ranks, rank_and_world_size, setup_ranks, sum_gradients
from common.simulation.env import SCENES
from common.simulation.vec_env import make_envs
from demonstrations.pictures import augment, fit_to_uint8
from demonstrations.reader import action_statistics, load_demos, read_header

# --- args ---
START = "checkpoints/tiny-pretrained"


@dataclass
class Args:
    """[P] = the value of the paper's code, where the default is another one."""

    run: Run = field(default_factory=Run)  # name, seed, resume, device, evaluation
    scene: Scene = field(default_factory=Scene)  # task, small or published, cpu or cuda
    model: Model = field(default_factory=lambda: Model(START))  # and LoRA
    # demonstrations
    demos: tuple[str, ...] = ("demos/main",)  # directories of demonstrations/record.py, mixed
    num_demos: int = 0  # the first so many of each directory; 0 = all
    val_demos: int = 20  # episodes for validation: the last ones of each directory [P] 16
    drop_idle: Literal["none", "still", "published"] = "still"  # steps left out [P] published
    statistics: Literal["symmetric", "quantiles", "model"] = "symmetric"  # model = the start's
    num_envs: int = 32  # over all ranks, for evaluation
    # update
    num_iterations: int = 10  # each is one line of metrics and a checkpoint
    num_updates: int = 100  # optimizer steps per iteration
    batch_size: int = 64  # over all ranks [P] 32
    micro_batch_size: int = 128  # samples per forward: only memory and speed [P] 8
    learning_rate: float = 1e-3  # AdamW [P] 5e-4
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # to 0 over the run [P] constant
    warmup_updates: int = 100  # linear rise of the learning rate [P] 0
    max_grad_norm: float | None = 1.0  # None = no clipping [P] None
    augment: bool = False  # random crop and colours [P] True in the warm-up
    merge_adapter: bool = False  # add the start's LoRA to its weights and train a new one


PAPER = {
    "scene": Scene(scene="published", sim_device="cuda"),
    "drop_idle": "published", "batch_size": 32, "micro_batch_size": 8, "learning_rate": 5e-4,
    "lr_schedule": "constant", "warmup_updates": 0, "max_grad_norm": None,
}  # fmt: skip
PRESETS = {
    "default": Args(),
    "warmup": Args(  # 2,000 updates; keeps the statistics of OpenVLA's training data
        **PAPER,
        model=Model("openvla/openvla-7b", "bridge_orig", "bfloat16", lora_rank=32),
        val_demos=5, statistics="model", num_iterations=20, augment=True,
    ),
    "baseline": Args(  # 60,000 updates; checkpoints hold the merged weights too, 15 GB
        **PAPER,
        run=Run(eval_every=5), num_iterations=60, num_updates=1000,
        model=Model("runs/warmup/checkpoint-000020", "", "bfloat16", lora_rank=32),
        val_demos=16, statistics="quantiles", merge_adapter=True,
    ),
}  # fmt: skip


# --- data ---
def validation_episodes(sources, num_episodes):
    """Numbers of the last episodes of each directory, in turn. sources: (E,) int, directories."""
    to_the_end = [np.sum(sources[place:] == source) for place, source in enumerate(sources)]
    return np.argsort(to_the_end, kind="stable")[:num_episodes]


def episodes_of_other_scenes(scenes, validation):
    """Numbers of the episodes that show no scene of the validation episodes, in any directory."""
    return np.flatnonzero(~np.isin(scenes, scenes[validation]))


def load_data(args, model):
    """Demonstrations as `model` sees them; replaces its action statistics unless they are kept.

    Returns: Demos; its steps to train on and its steps for validation, int64 tensors.
    """
    fit = partial(fit_to_uint8, model)
    demos = load_demos(args.demos, fit, args.num_demos or None, args.drop_idle)
    checksums = gather_over_ranks(zlib.crc32(demos.actions.tobytes()))
    same = len(set(checksums)) == 1
    check(same, f"demos = {args.demos} differ between ranks; copy the same files to all")
    left = len(demos.instructions) - args.val_demos
    check(left > 0, f"val_demos = {args.val_demos} leaves {left} episodes; use fewer")
    if args.statistics != "model":
        statistics = demos.statistics
        if args.statistics == "quantiles":
            statistics = action_statistics(demos.actions, floors=None)
        assets = SCENES[args.scene.scene]["assets"]
        model.set_statistics("cleanvla", {"action": statistics, "assets": assets})

    validation = validation_episodes(demos.sources, args.val_demos)
    training = episodes_of_other_scenes(demos.scenes, validation)
    train_rows = np.flatnonzero(np.isin(demos.episodes, training))
    val_rows = np.flatnonzero(np.isin(demos.episodes, validation))
    return demos, torch.as_tensor(train_rows), torch.as_tensor(val_rows)


def minibatch(step, num_rows, batch_size, seed):
    """Rows of an optimizer step: an epoch is one permutation, its incomplete end is dropped."""
    batch_size = min(batch_size, num_rows)
    epoch, k = divmod(step, num_rows // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    first = k * batch_size
    return torch.as_tensor(order[first : first + batch_size])


def instructions_of(demos, rows):
    return [demos.instructions[episode] for episode in demos.episodes[rows]]


# --- loss ---
def cross_entropy(model, demos, rows, images):
    """(M,) float32 nats per token of the expert's actions in rows (M,), seen as images (M, ...)."""
    tokens = model.encode_actions(demos.actions[rows])
    instructions = instructions_of(demos, rows)
    logprobs, _, _ = model.evaluate_actions(images, instructions, tokens)
    return -logprobs.mean(1)


# --- update ---
def scheduled_lr(step, args):
    """Learning rate of an optimizer step: linear rise, then constant or half a cosine to 0."""
    lr = args.learning_rate
    if args.lr_schedule == "cosine":
        progress = step / (args.num_iterations * args.num_updates)
        lr *= 0.5 + 0.5 * math.cos(math.pi * progress)
    if step < args.warmup_updates:
        lr *= (step + 1) / args.warmup_updates
    return lr


def update_policy(model, optimizer, demos, rows, first_step, args):
    """num_updates optimizer steps on the training rows; dict losses/* -> mean over samples.

    A minibatch spans all ranks; each adds the gradients of its own samples, in micro-batches.
    """
    rank, world_size = rank_and_world_size()
    parameters = optimizer.param_groups[0]["params"]
    max_norm = math.inf if args.max_grad_norm is None else args.max_grad_norm
    stats = Means()
    for step in range(first_step, first_step + args.num_updates):
        optimizer.param_groups[0]["lr"] = scheduled_lr(step, args)
        mb_rows = rows[minibatch(step, len(rows), args.batch_size, args.run.seed)]
        images = demos.images[mb_rows]
        if args.augment:
            # Before the split, so that any number of ranks sees the same
            generator = torch.Generator()
            generator.manual_seed(args.run.seed * 2**32 + step)
            images = augment(images, generator)
        optimizer.zero_grad()
        mine = torch.arange(len(mb_rows))[rank::world_size]
        for i in range(0, len(mine), args.micro_batch_size):
            inds = mine[i : i + args.micro_batch_size]
            loss = cross_entropy(model, demos, mb_rows[inds], images[inds])
            # Micro-batches and ranks add up to the mean over the minibatch
            (loss.sum() / len(mb_rows)).backward()
            stats.add("cross_entropy", loss)
        sum_gradients(parameters)
        norm = clip_grad_norm_(parameters, max_norm, error_if_nonfinite=True)
        stats.add("grad_norm", norm)
        optimizer.step()
    return stats.means("losses/")


@torch.no_grad()
def validate(model, demos, rows, max_rows):
    """Means over at most max_rows rows, evenly spread. Tokens are greedy, as in an episode."""
    rank, world_size = rank_and_world_size()
    count = min(max_rows, len(rows))
    spread = torch.linspace(0, len(rows) - 1, count).long()
    mine = rows[spread][rank::world_size]
    means = Means()
    for inds in mine.split(64):
        images = demos.images[inds]
        actions = torch.as_tensor(demos.actions[inds])
        instructions = instructions_of(demos, inds)
        tokens, _, _ = model.act(images, instructions, temperature=0)
        decoded = model.decode_actions(tokens)
        error = (decoded - actions).abs()
        # The simulator opens the gripper above 0.5
        opens = decoded[:, 6] > 0.5
        label = actions[:, 6] > 0.5
        means.add("cross_entropy", cross_entropy(model, demos, inds, images))
        means.add("token_accuracy", tokens.cpu() == model.encode_actions(actions))
        means.add("gripper_accuracy", opens == label)
        means.add("l1_xyz_mm", 1000 * error[:, :3])
        means.add("l1_rotation_mrad", 1000 * error[:, 3:6])
    return means


def main(args):
    # --- setup ---
    simulates = args.run.eval_every > 0
    unused = {"sim_device": not simulates, "unnorm_key": args.statistics != "model"}
    check_args(args, PRESETS, unused)
    for path in args.demos:
        seen = read_header(path)["settings"]["scene"]
        message = f"{path} shows scene = {seen}, this run has {args.scene.scene}; change one"
        check(seen == args.scene.scene, message)
    _, world_size, device = setup_ranks(args.run.device, args.run.seed)

    merge_adapter = args.merge_adapter and not args.run.resume
    model = load_start(args.run, args.model, device, merge_adapter=merge_adapter)
    demos, train_rows, val_rows = load_data(args, model)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=args.learning_rate)
    envs = None
    if simulates:
        envs = make_envs(args.num_envs // world_size, **vars(args.scene))
    experiment = Experiment(args, model, envs, {"policy": optimizer})

    for iteration in range(experiment.iteration + 1, args.num_iterations + 1):
        # --- update ---
        start = time.monotonic()
        first_step = (iteration - 1) * args.num_updates
        metrics = update_policy(model, optimizer, demos, train_rows, first_step, args)
        metrics["time/update_s"] = time.monotonic() - start

        # --- metrics ---
        metrics |= validate(model, demos, train_rows, 256).means("train/")
        metrics |= validate(model, demos, val_rows, 1024).means("val/")
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]

        # --- evaluation, log, checkpoint ---
        experiment.finish(iteration, metrics, step=iteration * args.num_updates)

    experiment.close(("losses/cross_entropy", "val/cross_entropy"))


if __name__ == "__main__":
    main(parse_args(Args, PRESETS))
