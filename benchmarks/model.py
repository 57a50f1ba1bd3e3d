"""Times `act` and `evaluate` + backward of the model at any size and prints the peak memory.

On a CPU the figures are processor time of all threads, which other load hardly changes; on a GPU, wall time.

    python benchmarks/model.py                                             # tiny, one CPU thread
    python benchmarks/model.py --dtype bfloat16
    python benchmarks/model.py --model DIR --device cuda --dtype bfloat16 --lora-rank 32 --batch 8
    python benchmarks/model.py --model random-7b --device cuda --dtype bfloat16 --lora-rank 32 --batch 8
"""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from common.model import checkpoints  # noqa: E402
from common.model.openvla import VLA, Backbone, load_vla  # noqa: E402


@dataclass
class Args:
    model: str = "tiny"
    """"tiny", a directory, or "random-7b": the published shape with random weights"""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora_rank: int = 0
    """0 = full fine-tuning"""
    act_batch: int = 64
    """rows per act"""
    batch: int = 256
    """rows per evaluate + backward"""
    activation_checkpointing: bool = False
    repeats: int = 5
    """timed repetitions after two untimed ones; the median is printed"""
    num_threads: int = 1
    """CPU threads"""


def random_7b(device: str, dtype: torch.dtype, lora_rank: int) -> VLA:
    """The published model's shape with N(0, 0.02) weights; the prompt is longer in words, as long in tokens."""
    tiny = checkpoints.locate("tiny")
    config = {"image_sizes": [224, 224], "n_action_bins": 256, "pad_to_multiple_of": 64, "text_config": {}}
    config["norm_stats"] = tiny.config["norm_stats"]
    with torch.device("meta"):
        backbone = Backbone(config)
    checkpoints.cast_parameters(backbone, dtype)
    backbone.to_empty(device=device)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.02)
    checkpoints.restore_rotary(backbone, device)
    checkpoints.apply_lora(backbone, tiny, lora_rank, "all", merge=False)
    return VLA(backbone, Tokenizer.from_file(str(tiny.tokenizer)), config, dtype).to(device)


def median_s(step, repeats: int, device: str) -> float:
    """Median in seconds: processor time on a CPU, else wall time with the GPU's queue empty at both readings."""
    times, clock = [], time.process_time if device == "cpu" else time.perf_counter
    for i in range(repeats + 2):
        if device != "cpu":
            torch.cuda.synchronize()
        start = clock()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        times += [clock() - start] * (i >= 2)
    return float(np.median(times))


def main(args: Args) -> dict:
    """-> the printed figures."""
    torch.set_num_threads(args.num_threads)
    dtype = getattr(torch, args.dtype)
    if args.model == "random-7b":
        model = random_7b(args.device, dtype, args.lora_rank)
    else:
        model = load_vla(args.model, args.device, dtype, args.lora_rank)
    model.checkpoint_activations(args.activation_checkpointing)
    frames = np.random.default_rng(0).integers(0, 256, (max(args.act_batch, args.batch), 120, 160, 3), dtype=np.uint8)
    words = "put carrot on plate" + " on the plate" * (4 if args.model == "random-7b" else 0)
    images, instructions = model.fit_images(frames), [words] * len(frames)
    tokens = torch.cat(
        [model.act(images[i : i + args.act_batch], instructions[i : i + args.act_batch])[0]
         for i in range(0, args.batch, args.act_batch)]
    )[: args.batch]  # fmt: skip
    parameters = [p for group in model.trainable_parameters().values() for p in group]

    def act():
        model.act(frames[: args.act_batch], instructions[: args.act_batch])

    def update():
        logprobs, entropies, values = model.evaluate(images[: args.batch], instructions[: args.batch], tokens)
        (logprobs.mean() + entropies.mean() + values.square().mean()).backward()
        for p in parameters:
            p.grad = None

    act_s, update_s = (median_s(step, args.repeats, args.device) for step in (act, update))
    with torch.no_grad():
        rows = min(args.act_batch, args.batch)
        tokens, old, _ = model.act(images[:rows], instructions[:rows])
        gap = (model.evaluate(images[:rows], instructions[:rows], tokens)[0] - old).exp().sub(1).abs().max().item()
    if args.device == "cpu":
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    else:
        peak_gb = torch.cuda.max_memory_allocated() / 2**30
    total, trained = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in parameters)
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"CPU, {args.num_threads} thread(s)"
    attention = model.backbone.language_model.config._attn_implementation
    print(
        f"{args.model}: {total / 1e6:.2f} M weights, {trained / 1e6:.2f} M trained, {args.dtype}, {attention}, {where}"
    )
    print(f"act        {args.act_batch:4d} rows  {act_s * 1e3:9.1f} ms  {args.act_batch / act_s:9.1f} rows/s")
    print(f"evaluate+b {args.batch:4d} rows  {update_s * 1e3:9.1f} ms  {args.batch / update_s:9.1f} rows/s")
    print(f"largest |ratio - 1| between act and evaluate {gap:.1e}; peak memory {peak_gb:.2f} GB")
    return {"act_s": act_s, "update_s": update_s, "ratio_gap": gap, "peak_gb": peak_gb}


if __name__ == "__main__":
    main(tyro.cli(Args))
