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
import resource
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
    for left in run_dir.glob(".*.tmp*"):  # by a killed run
        shutil.rmtree(left)
    save_model(temporary)
    torch.save(state | {"rng": _rng_state()}, temporary / "training_state.pt")
    for path in temporary.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():  # the best of an iteration that is done a second time after a resume
        shutil.rmtree(final)
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


def stop_on_signals(message):
    """SIGINT and SIGTERM print the message as the last line and leave with exit code 128 + their number."""

    def stop(number, frame):
        print(f"\n{signal.Signals(number).name}: {message}", flush=True)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def stop_non_finite(run_dir, what, batch, rows):
    """Saves these rows of the batch (dict of tensors, arrays, lists) for inspection and raises FloatingPointError."""
    path = Path(run_dir) / "nonfinite_batch.pt"
    torch.save({key: [values[row] for row in rows.tolist()] for key, values in batch.items()}, path)
    raise FloatingPointError(f"the {what} is not finite; the batch is in {path}, the last checkpoint is not affected")


def only_key(norm_stats, unnorm_key):
    """unnorm_key, or the only key of norm_stats when it is empty; ValueError lists the known keys."""
    known = sorted(norm_stats)
    if unnorm_key in known or (not unnorm_key and len(known) == 1):
        return unnorm_key or known[0]
    raise ValueError(f"unnorm_key = {unnorm_key!r} must be one of the model's {len(known)} keys; use one of {known}")


# --- metrics ---
class Logger:
    """metrics.jsonl and TensorBoard always, Weights & Biases with track=True; with enabled=False nothing at all.

    config: dict of Args, kept in args.json. step: the one the run is resumed from; later lines are dropped.
    """

    def __init__(self, run_dir, config, track=False, step=0, enabled=True):
        self.enabled, self.wandb = enabled, None
        if not enabled:
            return
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        (Path(run_dir) / "args.json").write_text(json.dumps(config | {"resume": ""}, indent=1))
        path = Path(run_dir) / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
        self.file = path.open("a", buffering=1)
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(run_dir), purge_step=step + 1)
        if track:
            import wandb

            name = Path(run_dir).name
            self.wandb = wandb.init(project="cleanvla", name=name, id=name, resume="allow", config=config)

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

    def print(self, text):
        if self.enabled:
            print(text, flush=True)

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
    eta = hours((num_iterations - iteration) * seconds_per_iteration)
    return f"iter {iteration:03d}/{num_iterations}{text} | eta {eta}"


def peak_memory():
    """Metrics: most memory this process has used so far."""
    metrics = {"system/peak_ram_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        metrics["system/peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return metrics


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


# --- plan ---
def plan(settings, default, model_name):
    """Text of --dry-run: what differs from the default preset, the batches, parameters and memory.

    settings, default: dicts of Args. The model is built on the meta device: nothing is loaded or downloaded.
    """
    from common import checkpoints
    from common.vla import Backbone

    s = argparse.Namespace(**settings)
    local = model_name == "tiny" or Path(model_name).is_dir()
    openvla = {"text_config": {}, "image_sizes": [224], "n_action_bins": 256, "pad_to_multiple_of": 64}
    source = checkpoints.locate(model_name) if local else checkpoints.Source(model_name, openvla, Path())
    with torch.device("meta"):
        backbone = Backbone(source.config)
        checkpoints.apply_lora(backbone, source, s.lora_rank, s.lora_targets, False)
    total = sum(p.numel() for p in backbone.parameters())
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    copies = 2 if s.separate_critic else 1
    width = 4 if s.dtype == "float32" else 2  # bytes
    text = backbone.language_model.config
    pixels = (
        math.prod(getattr(backbone.vision_backbone, "size", (224, 224))) if "stem_channels" in source.config else 224**2
    )
    image_bytes = 3 * pixels * (1 if "stem_channels" in source.config else width)
    samples = s.num_envs * s.num_steps
    # 17 numbers per token, layer and channel (Korthikanti et al. 2022, eq. 2 without the attention matrix); 300 tokens
    tokens = 300 if "stem_channels" not in source.config else 180
    saved = 1 if s.activation_checkpointing else 17
    gigabytes = {
        "weights": copies * ((total - trained) * width + trained * 4),
        "gradients and Adam": copies * trained * 12,
        "activations of a micro-batch": copies
        * saved
        * width
        * s.micro_batch_size
        * tokens
        * text.hidden_size
        * text.num_hidden_layers,
        "rollout images (host)": samples * image_bytes,
    }
    minibatch = samples // s.num_minibatches
    lines = ["differs from the default preset:"]
    lines += [
        f"  {key} = {value}  (default {default[key]})" for key, value in settings.items() if value != default[key]
    ]
    lines += [
        f"rollout: {s.num_envs} environments x {s.num_steps} steps = {samples} samples, {samples // s.max_episode_steps} episodes",
        f"update: {s.update_epochs} x {s.num_minibatches} minibatches of {minibatch} = {-(-minibatch // s.micro_batch_size)}"
        f" micro-batches of <= {s.micro_batch_size}",
        f"run: {s.num_iterations} iterations = {s.num_iterations * samples:,} environment steps,"
        f" {s.num_iterations * s.update_epochs * s.num_minibatches:,} optimizer steps",
        f"model: {model_name}, {total / 1e6:,.1f} M parameters, {copies * trained / 1e6:,.1f} M trained, {s.dtype};"
        + (" local" if local else f" would be downloaded, about {total * 2 / 1e9:.0f} GB"),
        "memory estimate per rank: " + ", ".join(f"{key} {size / 1e9:.2f} GB" for key, size in gigabytes.items()),
    ]
    return "\n".join(lines)
