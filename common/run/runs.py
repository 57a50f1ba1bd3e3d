"""What a run needs beside its algorithm: presets and resume, ranks of torchrun, training checkpoints, guards.

Without torchrun there is one rank, and functions over ranks return their input.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import timeit
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro

# --- command line ---
# What --resume must not change: the rollouts, which weights train, and what the best checkpoint is the best of.
FIXED = """preset name model adapter unnorm_key seed num_envs num_steps num_updates lora_rank lora_targets freeze_vision
    value_input separate_critic task split episode_ids assets max_episode_steps image_size sim_freq solver_iterations
    fidelity shader_pack sim_device eval_episodes eval_temperature""".split()
NOT_NEGATIVE = """eval_every eval_temperature num_videos num_workers lora_rank weight_decay kl_coef keep_pairs gamma
    gae_lambda learning_rate value_learning_rate clip_coef clip_low clip_high value_clip_coef ratio_tolerance
    margin_tolerance num_demos""".split()


def parse_args(args_class, presets, argv=None):
    """`--preset NAME` or `--resume RUN_DIR` choose the defaults; every other flag given overrides them.

    Args: args_class: the script's dataclass; presets: dict name -> instance; argv: list[str], default the command line.
    Raises: FileNotFoundError when RUN_DIR holds no run; ValueError: another script's run, or what it must not change.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default="default")
    chooser.add_argument("--resume", default="")
    chosen = chooser.parse_known_args(argv)[0]
    default = presets.get(chosen.preset)  # an unknown name is refused by tyro, which lists the known ones
    if chosen.resume:
        path = Path(chosen.resume) / "args.json"
        if not path.is_file():
            known = ", ".join(str(found.parent) for found in sorted(Path("runs").glob("*/args.json"))) or "none"
            raise FileNotFoundError(f"--resume {chosen.resume}: no {path}; give the directory of a run (here: {known})")
        saved = json.loads(path.read_text())
        if differ := sorted(saved.keys() ^ vars(args_class()).keys()):
            raise ValueError(f"{path} is of another script or version, the flags {differ} differ; use the one it is of")
        default = args_class(**{key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()})
    args = tyro.cli(args_class, default=default, args=argv)
    for key in FIXED if chosen.resume else ():
        if (now := getattr(args, key, None)) != (was := getattr(default, key, None)):
            raise ValueError(f"{key} = {now!r}, the run to resume has {was!r}, which is fixed; start a new run from it")
    return args


def check_rollout(num_envs, num_steps, max_episode_steps, num_minibatches, **positive):
    """ValueError with values, rule and fix unless whole episodes split evenly over ranks and minibatches."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    for name, value in {"max_episode_steps": max_episode_steps, "num_minibatches": num_minibatches, **positive}.items():
        if value <= 0:
            raise ValueError(f"{name} = {value} must be > 0; use 1 or more, or leave it out for the default")
    if num_envs < 1 or num_envs % ranks:
        raise ValueError(f"num_envs = {num_envs} must be a positive multiple of the {ranks} ranks; use {64 * ranks}")
    if num_steps < 1 or num_steps % max_episode_steps:
        fix = f"use --num-steps {max(1, num_steps // max_episode_steps) * max_episode_steps}"
        rule = f"must be a multiple of max_episode_steps = {max_episode_steps}"
        raise ValueError(f"num_steps = {num_steps} {rule}; {fix}")
    samples = num_envs * num_steps
    if samples % num_minibatches:
        fix = max(n for n in range(1, num_minibatches) if samples % n == 0)
        rule = f"is not divisible by num_minibatches = {num_minibatches}; use --num-minibatches {fix}"
        raise ValueError(f"num_envs * num_steps = {samples} {rule}")


def check_run(args):
    """ValueError: a number is negative, runs/<name> holds another run, a rank has nothing to evaluate, no tracking."""
    name, ranks = args.name, int(os.environ.get("WORLD_SIZE", 1))
    for key in NOT_NEGATIVE:
        if (value := getattr(args, key, None) or 0) < 0:
            raise ValueError(f"{key} = {value} must be >= 0; leave it out for the default")
    for key in ("gamma", "gae_lambda"):
        if (value := getattr(args, key, 1)) > 1:
            raise ValueError(f"{key} = {value} must be <= 1; leave it out for the default")
    if (limit := getattr(args, "target_kl", None)) is not None and limit <= 0:
        raise ValueError(f"target_kl = {limit} would drop every minibatch; use 0.03, or leave it out for no limit")
    if min(getattr(args, "episode_ids", None) or [0]) < 0:
        raise ValueError(f"episode_ids = {args.episode_ids} must be >= 0; an id is a number of docs/benchmark.md")
    here = Path(f"runs/{name}")  # as the scripts have it: Path("runs", "/x") would be /x
    if name and not args.resume and [*here.glob("checkpoint-*"), *here.glob("best-*[1-9]*")]:
        fix = f"use --resume runs/{name} or another --name"
        raise ValueError(f"runs/{name} holds a run, which is never overwritten; {fix}")
    if args.eval_every and args.eval_episodes < ranks:
        fix = f"use {64 * ranks}, or --eval-every 0"
        raise ValueError(f"eval_episodes = {args.eval_episodes} must be at least the number of ranks, {ranks}; {fix}")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise ValueError("track = True needs the package wandb; pip install wandb, or leave --track out")


def choose_key(norm_stats, unnorm_key, assets=""):
    """unnorm_key, or the only key of norm_stats when it is empty; ValueError when its data show other assets."""
    known = sorted(norm_stats)
    if not (unnorm_key in known or (not unnorm_key and len(known) == 1)):
        raise ValueError(f"unnorm_key = {unnorm_key!r} is none of the model's {len(known)} keys; use one of {known}")
    key = unnorm_key or known[0]
    if (seen := norm_stats[key].get("assets", assets)) != assets:
        fix = f"use --assets {seen}, or another --model"
        raise ValueError(f"the model has seen assets = {seen} only, its success with {assets!r} would be 0; {fix}")
    return key


def find_key(model, adapter, unnorm_key, assets):
    """`choose_key` of a model that is not loaded yet: reads its configuration only."""
    from common.model.checkpoints import locate  # slow to import

    return choose_key(locate(str(model), adapter).config["norm_stats"], unnorm_key, assets)


# --- device and ranks ---
def bfloat16_speed():
    """Speed of bfloat16 matmuls on this CPU over that of float32 ones: about 0.1 where bfloat16 is emulated."""
    matrices = [torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    float32_s, bfloat16_s = (min(timeit.repeat(lambda x=x: x @ x.T, number=1, repeat=5)) for x in matrices)
    return float32_s / bfloat16_s


def choose_device(device, dtype):
    """device "auto" | "cpu" | "cuda" -> "cpu" | "cuda"; says so when dtype is a slow one there."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if (device, dtype, os.environ.get("RANK", "0")) == ("cpu", "bfloat16", "0") and (speed := bfloat16_speed()) < 0.5:
        print(f"bfloat16 matmuls take {1 / speed:.0f} times as long as float32 ones on this CPU; use --dtype float32")
    return device


def setup_ranks(device, dtype):
    """Joins torchrun's process group when there is one; arguments of `choose_device` -> this rank's torch.device."""
    device = choose_device(device, dtype)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        # NCCL's 10 minutes are too few where one machine downloads 15 GB, or rank 0 writes them.
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=1))
    return torch.device(device)


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def ranks_here():
    """How many ranks share the cores of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_over_ranks(value):
    """list with every rank's picklable value, in the order of ranks."""
    values = [value] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def gather_envs(*tensors):
    """Each (T, N) tensor joined with those of all ranks: (T, num_envs), on the CPU."""
    return [torch.cat(parts, dim=1) for parts in zip(*gather_over_ranks([x.cpu() for x in tensors]), strict=True)]


def minibatches(index, num_minibatches, rng):
    """This rank's rows in each minibatch of one epoch over the samples of all ranks: list of int64 tensors.

    index (B,) int64: the number of each of this rank's rows among all; rng: in the same state on every rank.
    """
    total = sum(gather_over_ranks(len(index)))
    row_of = np.full(total, -1)
    row_of[index] = np.arange(len(index))
    parts = (row_of[part] for part in np.split(rng.permutation(total), num_minibatches))
    return [torch.as_tensor(part[part >= 0]) for part in parts]


def sum_gradients(parameters):
    """Replaces each gradient by its sum over ranks: one all-reduce of all gradients as one flat vector."""
    parameters = [p for p in parameters if p.requires_grad]
    if not dist.is_initialized() or not parameters:  # none: the policy in the value warm-up
        return
    # A rank may hold no sample of a minibatch; it contributes zeros. What has no gradient on any rank keeps none.
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    flat = torch.cat([used, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters)])
    dist.all_reduce(flat)
    used, *gradients = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, count, gradient in zip(parameters, used.tolist(), gradients, strict=True):
        parameter.grad = gradient.view_as(parameter) if count else None


# --- files, training checkpoints ---
NUMBER = 6 * "[0-9]"  # of a checkpoint; a copy beside it with a longer name is not the run's: neither read nor removed


def write_atomic(path, write):
    """write(a temporary path beside it), then rename: neither a reader nor a kill ever meets half a file."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    write(temporary)
    os.replace(temporary, path)


def find_checkpoint(run_dir, kind="checkpoint"):
    """The complete checkpoint directory with the highest number."""
    found = sorted(Path(run_dir).glob(f"{kind}-{NUMBER}"))
    if not found:
        raise FileNotFoundError(f"{run_dir} holds no {kind}-NNNNNN, so nothing can be resumed; start a new run")
    return found[-1]


def save_checkpoint(run_dir, kind, number, save_model, state):
    """Writes run_dir/<kind>-<number>, whole or not at all, then removes all others of this kind.

    All is written and flushed under a temporary name and published by a rename, so a kill at any time leaves the
    previous checkpoint in place. Args: save_model(directory) writes the weights; state: dict of tensors, plain values.
    """
    run_dir = Path(run_dir)
    final = run_dir / f"{kind}-{number:06d}"
    temporary = run_dir / f".{final.name}.tmp"
    for left in run_dir.glob(".*.tmp*"):  # by a killed run
        shutil.rmtree(left)
    save_model(temporary)
    numpy = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]
    rng = {"torch": torch.get_rng_state(), "numpy": numpy, "python": random.getstate()}
    rng["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    torch.save(state | {"rng": rng}, temporary / "training_state.pt")
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():  # the best of an iteration that is done a second time after a resume
        os.rename(final, temporary.with_suffix(".tmp.old"))
    os.rename(temporary, final)
    for other in {*run_dir.glob(f"{kind}-{NUMBER}"), *run_dir.glob(".*.tmp*")} - {final}:
        shutil.rmtree(other)


def load_training_state(directory):
    """The state given to `save_checkpoint`, on the CPU; also restores the global random number generators."""
    state = torch.load(Path(directory) / "training_state.pt", map_location="cpu", weights_only=True)
    rng = state.pop("rng")
    torch.set_rng_state(rng["torch"])
    np.random.set_state(tuple(rng["numpy"]))
    random.setstate(rng["python"])
    if len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
    return state


def load_optimizer(optimizer, state):
    """Moments and step numbers of a saved `state_dict`; learning rate and weight decay stay those of the flags."""
    own = [{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- guards ---
def stop_on_signals(message):
    """SIGINT and SIGTERM print the message as the last line and leave with exit code 128 + their number."""

    def stop(number, frame):
        print(f"\n{signal.Signals(number).name}: {message}", flush=True)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def require_float32(shape, **tensors):
    """A (N, 1) beside a (N,) broadcasts to (N, N), and half precision rounds RL-sized steps away: refuse both."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; it must be {tuple(shape)} torch.float32")


def stop_non_finite(run_dir, what, batch, rows):
    """Saves these rows of the batch (dict of tensors, arrays, lists) for inspection and raises FloatingPointError."""
    path = Path(run_dir) / f"nonfinite_batch-{rank_and_world_size()[0]}.pt"  # several ranks may come here at once
    lists = {key: [values[row] for row in rows.tolist()] for key, values in batch.items() if isinstance(values, list)}
    torch.save({key: torch.as_tensor(batch[key])[rows] for key in batch.keys() - lists.keys()} | lists, path)
    raise FloatingPointError(f"the {what} is not finite; the batch is in {path}, the last checkpoint is not affected")
