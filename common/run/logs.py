"""What a run prints and writes: metrics, status line, last summary, plan of a dry run.

runs/NAME holds args.json, metrics.jsonl, TensorBoard's file, checkpoint-000012, best-000010, videos, curve.png.
"""

import argparse
import json
import math
import resource
from pathlib import Path

import torch

from common.run.runs import write_atomic


class Logger:
    """metrics.jsonl and TensorBoard always, Weights & Biases with track=True; with enabled=False nothing at all.

    config: dict of Args, kept in args.json. step: where a run is resumed: later lines are dropped, of a new run all.
    """

    def __init__(self, run_dir, config, track=False, step=0, enabled=True):
        self.enabled, self.wandb, path = enabled, None, Path(run_dir) / "metrics.jsonl"
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(config | {"resume": ""}, indent=1)
        write_atomic(path.parent / "args.json", lambda file: file.write_text(settings))
        lines = path.read_text().splitlines(keepends=True) if path.exists() and config.get("resume") else []
        kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
        write_atomic(path, lambda file: file.write_text(kept))
        self.file = path.open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(run_dir), purge_step=step + 1)
        if track:
            import wandb

            name = path.parent.name
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
    ("losses/frac_groups_dropped", " | groups dropped {:.2f}"),
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


def hours(seconds):
    minutes = round(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes else f"{seconds:.0f}s"


def peak_memory():
    """Metrics: most memory that this process has used so far."""
    metrics = {"system/peak_ram_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if torch.cuda.is_initialized():  # not where the model is on the CPU of a machine with a GPU
        metrics["system/peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return metrics


def summary(run_dir, steps, seconds, evaluations, panels, unit="environment steps"):
    """The last lines of a run of `steps`, counted in `unit`; draws curve.png, a plot per list of `panels` metrics."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, keys in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=key)
        axis.set_xlabel(unit)
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))  # 200k: six digits run into each other
        axis.legend(fontsize=8)
    figure.savefig(Path(run_dir) / "curve.png", dpi=120)
    plt.close(figure)
    dtype = json.loads((Path(run_dir) / "args.json").read_text())["dtype"]
    table = {
        unit: f"{steps:,} in {hours(seconds)}",
        "success at end": " -> ".join(f"{value:.3f}" for value in evaluations) or "not evaluated",
        "peak memory": ", ".join(f"{key.split('_')[1]} {size:.1f} GB" for key, size in peak_memory().items()),
        "files": f"{run_dir}: curve.png, videos/, metrics.jsonl, best and last checkpoint",
        "next": f"python eval_ood.py --checkpoint {run_dir} --dtype {dtype} --output {run_dir}/eval",
    }
    return "\n".join(f"{key:<18}| {value}" for key, value in table.items())


def plan(settings, default, model_name):
    """Text of --dry-run: what differs from the default preset, batches, parameters, memory.

    settings, default: dicts of Args. The model is built on the meta device: nothing is loaded or downloaded.
    """
    from common.model import checkpoints
    from common.model.openvla import Backbone

    s, local = argparse.Namespace(**settings), model_name == "tiny" or Path(model_name).is_dir()
    if not local:
        checkpoints.check_hub_id(model_name)
    openvla = {"text_config": {}, "image_sizes": [224], "n_action_bins": 256, "pad_to_multiple_of": 64}
    given = (s.adapter or None,) if local else (openvla, Path())
    source = (checkpoints.locate if local else checkpoints.Source)(model_name, *given)
    checkpoints.check_lora(source, s.lora_rank, s.lora_targets, False)
    with torch.device("meta"):
        backbone = Backbone(source.config)
        checkpoints.apply_lora(backbone, source, s.lora_rank, s.lora_targets, False)
    for part in (backbone.vision_backbone, backbone.projector) if settings.get("freeze_vision") else ():
        part.requires_grad_(False)
    sizes = [(p.numel(), p.requires_grad) for p in backbone.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    samples, width, text = s.num_envs * s.num_steps, 4 if s.dtype == "float32" else 2, backbone.language_model.config
    # 17 numbers per token, channel and layer of saved activations (Korthikanti et al. 2022, eq. 2), 40 tokens of text
    patches, blocks = source.config.get("image_tokens", 256), backbone.vision_backbone.modules()
    eyes = sum(b.norm1.weight.numel() for b in blocks if hasattr(b, "norm1")) * (not settings.get("freeze_vision"))
    places = text.num_hidden_layers * text.hidden_size * (patches + 40) + eyes * patches
    saved = (1 if s.activation_checkpointing else 17) * places
    left, top, right, bottom = source.config.get("crop", (0, 0, 224, 224))
    image_bytes = 3 * (right - left) * (bottom - top) * (1 if "crop" in source.config else width)
    gigabytes = {
        "weights": (total - trained) * width + 4 * trained,
        "gradients and Adam": 12 * trained,
        "activations, in the update": saved * min(s.micro_batch_size, samples // s.num_minibatches) * width,
        "cache, in the rollout": 2 * s.num_envs * text.num_hidden_layers * text.hidden_size * (patches + 47) * width,
        "rollout images (host)": samples * image_bytes,
    }
    minibatch, steps = samples // s.num_minibatches, s.num_iterations * samples
    return "\n".join(
        ["differs from the default preset (default in brackets):"]
        + [f"  {key} = {value} ({default[key]})" for key, value in settings.items() if value != default[key]]
        + [
            f"rollout: {s.num_envs} environments x {s.num_steps} steps = {samples} samples",
            f"update: {s.update_epochs} x {s.num_minibatches} minibatches of {minibatch}, "
            f"micro-batches of {min(s.micro_batch_size, minibatch)}",
            f"run: {s.num_iterations} iterations, {steps:,} environment steps, "
            f"{s.num_iterations * s.update_epochs * s.num_minibatches:,} optimizer steps",
            f"model: {model_name}, {'local' if local else f'downloads {total * 2 / 1e9:.0f} GB'}, {s.dtype}, "
            f"{total / 1e6:,.1f} M parameters, trains {trained / 1e6:,.1f} M",
            "memory estimate"
            + (", x 2 but the images for the separate critic: " if settings.get("separate_critic") else ": ")
            + ", ".join(f"{key} {size / 1e9:.2f} GB" for key, size in gigabytes.items()),
        ]
    )
