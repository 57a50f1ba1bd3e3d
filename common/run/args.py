"""Groups of flags that the Args of all training scripts share; presets, --resume, checks."""

import importlib.util
import os
import shlex
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Literal, get_origin, get_type_hints

import tyro

from common.model.checkpoints import choose_key, locate
from common.run.files import check, check_types, naming, read_json
from common.simulation.env import SCENES, check_scene
from scripts.provenance import FAST_DTYPE
from scripts.renderer import check_simulator


@dataclass
class Run:
    preset: str = "default"  # the defaults of all other flags
    name: str = ""  # run directory runs/NAME; empty = SCRIPT-TASK-SEED-TIME
    resume: str = ""  # run directory to continue exactly; its flags become the defaults
    seed: int = 1  # of training episodes, sampling, minibatches and new weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the model
    track: bool = False  # log to Weights & Biases too
    keep_every: int = 0  # iterations between checkpoints that stay; 0 = only the latest stays
    eval_every: int = 10  # iterations between evaluations on held-out episodes; 0 = none
    eval_episodes: int = 64  # 64 episodes at 94 % success have the 95 % interval [85, 98]


@dataclass
class Scene:
    task: str = "main"  # a row of common/simulation/tasks.py
    scene: Literal["small", "published"] = "small"  # embedded bodies, or the paper's own assets
    sim_device: Literal["cpu", "cuda"] = "cpu"  # worker processes, or one batched GPU simulation


@dataclass
class Model:
    model: str = "checkpoints/tiny-warmup"  # model or LoRA directory, hub id, or tiny (random)
    unnorm_key: str = ""  # action statistics; empty = the model's only ones
    dtype: Literal["float32", "bfloat16", "nf4"] = FAST_DTYPE  # of matmuls; nf4: 4-bit weights, too
    lora_rank: int = 0  # 0 = train all weights
    freeze_vision: bool = False  # vision and projector are not trained
    activation_checkpointing: bool = False  # less memory, updates about 30 % slower


# What --resume must not change: rollouts, trained weights, and what the best checkpoint is best of.
FIXED = """preset name seed eval_episodes task scene sim_device model unnorm_key lora_rank
    freeze_vision critic num_envs num_steps group_size same_state num_trajectories num_updates
    batch_size demos num_demos val_demos drop_idle statistics""".split()
MAY_BE_ZERO = """seed keep_every eval_every eval_episodes lora_rank reset_after_success clip_low
    learning_rate value_learning_rate value_warmup_iterations vf_coef ent_coef gamma gae_lambda
    clip_coef clip_high filter_low filter_high num_demos warmup_updates""".split()
AT_MOST_ONE = "gamma gae_lambda filter_high noise_probability blunder_probability".split()


def parse_args(args_class, presets, argv=None):
    """`--preset NAME` or `--resume RUN_DIR` choose the defaults; other flags override them.
    args_class: the script's dataclass; presets: dict name -> instance; argv: list of str.
    ValueError: no run there, another script's, or a flag that it must not change."""
    argv = sys.argv[1:] if argv is None else list(argv)
    chooser = ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default="default", choices=presets)
    chooser.add_argument("--resume")
    chosen = chooser.parse_known_args(argv)[0]
    default = presets[chosen.preset]
    default.run.preset = chosen.preset
    if chosen.resume:
        default = saved_args(args_class, Path(chosen.resume) / "args.json")
    args = tyro.cli(tyro.conf.OmitArgPrefixes[args_class], default=default, args=argv)
    was, now = flat(default), flat(args)
    for name in FIXED if chosen.resume else ():
        old, new = was.get(name), now.get(name)
        check(old == new, f"{name} = {new!r}: --resume must not change {old!r}; start anew")
    return args


def saved_args(args_class, path, group=None):
    """Args of an earlier run from its args.json, or a group of them."""
    runs = sorted(str(found.parent) for found in Path("runs").glob("*/args.json"))
    check(path.is_file(), f"{path} is missing; give --resume the directory of a run: {runs}")
    saved, types = group or read_json(path), get_type_hints(args_class)
    differ = sorted(saved.keys() ^ types.keys())
    check(not differ, f"{path} is of another script or version: the flags {differ} differ")
    for name, value in saved.items():
        like = [str] if get_origin(types[name]) is tuple else types[name]
        with naming(path, "start anew"):
            check_types(value, dict if is_dataclass(like) else like, name)
        if is_dataclass(like):
            saved[name] = saved_args(like, path, value)
        elif isinstance(value, list):
            saved[name] = tuple(value)
    return args_class(**saved)


def flat(args):
    """dict of all flags by name, those of the groups too."""
    flags = {}
    for name, value in vars(args).items():
        flags.update(vars(value) if is_dataclass(value) else {name: value})
    return flags


def check_values(flags, defaults, may_be_zero=MAY_BE_ZERO):
    """Refuse numbers that are negative, huge, not finite, or a senseless 0."""
    for name, value in flags.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            most = 1 if name in AT_MOST_ONE else 2**32 - 1 if name == "seed" else 10**6
            right = 0 < value <= most or (value == 0 and name in may_be_zero)
            rule = f"{'>= 0' if name in may_be_zero else '> 0'} and <= {most}"
            check(right, f"{name} = {value} must be {rule}; the default is {defaults[name]}")


def check_args(args, presets, unused):
    """What all scripts refuse before a model or a simulator is loaded.
    unused: dict flag -> True where it does nothing and must keep its default; what it names
    (sim_device: the simulator, unnorm_key: the statistics) is not checked then."""
    flags, defaults, run = flat(args), flat(presets[args.run.preset]), args.run
    check_values(flags, defaults)
    check(flags.get("demos") != (), "demos is empty; give --demos a directory")
    for name, does_nothing in unused.items():
        given = flags[name] != defaults[name]
        check(not (given and does_nothing), f"{name} = {flags[name]} does nothing here; drop it")
    default = f"{Path(sys.argv[0]).stem}-{args.scene.task}-{run.seed}-%Y%m%d-%H%M%S"
    run.name = run.name or time.strftime(default)
    ranks, folder = int(os.environ.get("WORLD_SIZE", "1")), Path("runs", run.name)
    enough = not run.eval_every or run.eval_episodes >= ranks
    check(enough, f"eval_episodes = {run.eval_episodes} must be >= {ranks}; none: --eval-every 0")
    check(args.num_envs % ranks == 0, f"num_envs = {args.num_envs} must be a multiple of {ranks}")
    samples, parts = args.num_envs * flags.get("num_steps", 1), flags.get("num_minibatches", 1)
    check(parts <= samples, f"num_minibatches = {parts} must be <= the {samples} samples")
    right = os.path.split(os.path.normpath(folder)) == ("runs", run.name)
    check(right, f"name = {run.name!r} must be one folder in runs/: no slashes")
    right, again = run.resume or not any(folder.glob("checkpoint-*")), shlex.quote(str(folder))
    check(right, f"{folder} holds a run; use --resume {again}, or another --name")
    check(not run.track or importlib.util.find_spec("wandb"), "track = True: pip install wandb")
    if not unused.get("sim_device"):
        check_scene(args.scene.task, "train", args.scene.scene)
        check_simulator(args.scene.sim_device)
    if not run.resume:
        start, assets = args.model.model, SCENES[args.scene.scene]["assets"]
        norm_stats = locate(start).norm_stats
        if not unused.get("unnorm_key"):
            choose_key(norm_stats, args.model.unnorm_key, assets, start)
