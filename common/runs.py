"""What every run needs beside its algorithm: presets and resume, torch.distributed, checkpoints, logger, status line.

Everything takes plain values, so each script shows its own settings. Without torchrun there is one rank and all
functions over ranks return their input. A run is a directory: `args.json`, `metrics.jsonl`, TensorBoard's event file,
`checkpoint-000012/` (the latest), `best-000010/`, `videos/`, `curve.png`.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro


# --- command line ---
def parse_args(args_class, presets, argv=None):
    """`--preset NAME` or `--resume RUN_DIR` choose the defaults; every other flag given overrides them.

    Args: args_class: the script's dataclass; presets: dict name -> instance; argv: list[str], default the command line.
    Returns: an instance of args_class. Raises: FileNotFoundError when RUN_DIR holds no run.
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
        default = args_class(**{key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()})
    return tyro.cli(args_class, default=default, args=argv)


# --- ranks of torchrun ---
def setup_ranks(device):
    """Joins torchrun's process group when there is one; device "auto" | "cpu" | "cuda" -> this rank's torch.device."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device)


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_over_ranks(value):
    """list with every rank's picklable value, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters):
    """Replaces each gradient by its sum over ranks: one all-reduce of all gradients as one flat vector."""
    if not dist.is_initialized():
        return
    parameters = [p for p in parameters if p.requires_grad]
    # A rank may hold no sample of a minibatch; it contributes zeros.
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


# --- training checkpoints ---
def find_checkpoint(run_dir, kind="checkpoint"):
    """The complete checkpoint directory with the highest number."""
    found = sorted(Path(run_dir).glob(f"{kind}-[0-9]*"))
    if not found:
        raise FileNotFoundError(f"{run_dir} holds no {kind}-NNNNNN directory; nothing can be resumed, start a new run")
    return found[-1]


def save_checkpoint(run_dir, kind, number, save_model, state):
    """Writes run_dir/<kind>-<number>, whole or not at all, then removes older ones of this kind.

    All is written and flushed under a temporary name; the rename publishes it, so a kill at any time leaves the
    previous checkpoint in place.
    Args: save_model(directory) writes the weights; state: dict of tensors and plain values (optimizer, args, ...).
    Returns: its Path.
    """
    run_dir = Path(run_dir)
    final = run_dir / f"{kind}-{number:06d}"
    temporary = run_dir / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
    save_model(temporary)
    torch.save(state | {"rng": _rng_state()}, temporary / "training_state.pt")
    for path in temporary.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    os.rename(temporary, final)
    for older in sorted(run_dir.glob(f"{kind}-[0-9]*"))[:-1]:
        shutil.rmtree(older)
    return final


def load_training_state(directory, device):
    """The state given to `save_checkpoint`; also restores the global random number generators."""
    state = torch.load(Path(directory) / "training_state.pt", map_location=device, weights_only=True)
    rng = state.pop("rng")
    torch.set_rng_state(rng["torch"].cpu())
    if len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([cuda.cpu() for cuda in rng["cuda"]])
    np.random.set_state(rng["numpy"])
    random.setstate(rng["python"])
    return state


def _rng_state():
    numpy = tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def stop_on_signals():
    """SIGTERM and SIGINT both raise KeyboardInterrupt, so one `except` leaves cleanly; its args[0] is the number."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


# --- metrics ---
class Logger:
    """metrics.jsonl and TensorBoard always, Weights & Biases with track=True; with enabled=False nothing at all.

    step: the step that the run is resumed from; later lines of the interrupted run are dropped.
    """

    def __init__(self, run_dir, config, track=False, project="cleanvla", step=0, enabled=True):
        self.enabled, self.wandb = enabled, None
        if not enabled:
            return
        path = Path(run_dir) / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
        self.file = path.open("a", buffering=1)
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(run_dir), purge_step=step + 1)
        if track:
            import wandb

            name = Path(run_dir).name
            self.wandb = wandb.init(project=project, name=name, id=name, resume="allow", config=config)

    def log(self, metrics, step):
        """metrics: dict name -> number; step: environment steps so far. NaN is written as null."""
        if not self.enabled:
            return
        numbers = {key: float(value) for key, value in metrics.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        self.file.write(json.dumps({"step": step} | finite) + "\n")
        for key, value in numbers.items():
            self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def close(self):
        if self.enabled:
            self.file.close()
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


STATUS = (  # key, text; a script without the key shows nothing
    ("train/success_at_end", " | success {:.2f}"),
    ("train/success_once", " (once {:.2f})"),
    ("train/return", " | return {:.2f}"),
    ("losses/approx_kl", " | kl {:.4f}"),
    ("losses/clipfrac", " | clipfrac {:.2f}"),
    ("charts/SPS", " | {:.0f} steps/s"),
    ("time/rollout_s", " | rollout {:.0f}s"),
    ("time/update_s", " update {:.0f}s"),
    ("system/peak_gpu_gb", " | GPU {:.1f}GB"),
)


def status_line(iteration, num_iterations, metrics, seconds_per_iteration):
    """`iter 012/300 | success 0.31 (once 0.42) | return 0.40 | ... | eta 3h12m`"""
    text = "".join(text.format(metrics[key]) for key, text in STATUS if key in metrics)
    return f"iter {iteration:03d}/{num_iterations}{text} | eta {hours((num_iterations - iteration) * seconds_per_iteration)}"


def hours(seconds):
    minutes = round(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes else f"{seconds:.0f}s"


def plot_curves(run_dir, panels):
    """curve.png from metrics.jsonl. panels: list of lists of metric names, one small plot per list."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axis, keys in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", markersize=3, label=key)
        axis.set_xlabel("environment steps")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    path = Path(run_dir) / "curve.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
