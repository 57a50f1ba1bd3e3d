"""Which eyes of the small model see most after equal CPU time? The first stage of its pre-training, for several shapes.

    python benchmarks/eyes.py --demos demos/pointing --seconds 120 --variants shipped wide

One core, one shape after another. Printed: how far off places are in scenes that were not trained on, read at the
tokens that show the thing, and what a picture costs forward, as a rollout pays it.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.model.checkpoints import locate
from common.model.vision import ConvStem
from tiny import pretrain

# changes of tiny/config.json; "half" sees every 2 x 2 pixels as one, with the same 35 tokens
VARIANTS = {
    "shipped": {},
    "narrow": {"stem": [[48, 4, 4], [96, 3, 2], [96, 3, 2]], "stem_blocks": [4, 192, 3]},
    "wide": {"stem": [[96, 4, 4], [192, 3, 2], [192, 3, 2]], "stem_blocks": [6, 384, 3]},
    "one block": {"stem_blocks": [4, 256, 1]},
    "five blocks": {"stem_blocks": [4, 256, 5]},
    "140 tokens": {"stem": [[64, 4, 4], [128, 3, 2]]},
    "half": {"stem": [[64, 2, 2], [128, 3, 2], [128, 3, 2]], "camera_size": [80, 60], "crop": [8, 13, 64, 53]},
}


@dataclass
class Args:
    demos: str = "demos/pointing"  # directory of tiny/pointing.py
    variants: tuple[str, ...] = tuple(VARIANTS)
    seconds: float = 120  # of processor time per variant, half a cosine of the learning rate
    batch_size: int = 32
    learning_rate: float = 2e-3
    val_scenes: int = 150  # the last ones
    dtype: str = "bfloat16"
    seed: int = 1


def main(args: Args):
    torch.set_num_threads(1)
    dtype, config = getattr(torch, args.dtype), locate("tiny").config
    if unknown := set(args.variants) - set(VARIANTS):
        raise ValueError(f"variants = {sorted(unknown)} are unknown; use some of {list(VARIANTS)}")
    columns = (
        "eyes, weights, updates, pictures/s, object far: mm (share > 30), near, receptacle, TCP, axis of long objects:"
    )
    columns = f"{columns} degrees (share > 20), fingers' axis, forward: ms per picture".split(", ")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in args.variants:
        torch.manual_seed(args.seed)
        half, stem = name == "half", ConvStem(config | VARIANTS[name])
        whole = ConvStem(config) if half else stem  # cuts pictures and classes; they have the tokens of the half ones
        images, classes, shown, places, _, scenes = pretrain.load(args.demos, whole)
        if half:
            images = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 2).permute(0, 2, 3, 1)
            images = images.round().to(torch.uint8).contiguous()
        cut = scenes.max() + 1 - args.val_scenes
        train, val = np.flatnonzero(scenes < cut), np.flatnonzero((scenes >= cut) & pretrain.all_in_view(shown).numpy())
        mean, std = places[train].mean(0), places[train].std(0)
        scaled = torch.from_numpy((places - mean) / std)
        heads = pretrain.eyes_heads(stem, classes.shape[2])
        parameters = [p for module in (stem, *heads) for p in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
        start, number = time.process_time(), 0
        while (fraction := (time.process_time() - start) / args.seconds) < 1:
            lr = args.learning_rate * min(1, (number + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * fraction))
            optimizer.param_groups[0]["lr"] = lr
            rows = train[np.random.default_rng([args.seed, number]).integers(len(train), size=args.batch_size)]
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = pretrain.eyes_loss(stem, heads, images[rows], classes[rows], shown[rows], scaled[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            number += 1

        found, start = [], time.process_time()
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            for rows in np.split(val, range(32, len(val), 32)):
                told = pretrain.told_at(shown[rows])
                guess = heads[1](stem(images[rows], lambda block, x: block(x))).float()
                found.append(((guess * told).sum(1) / told.sum(1)).numpy() * std + mean)
        forward = 1000 * (time.process_time() - start) / len(val)
        found, right = np.concatenate(found), places[val]
        off = [
            1000 * np.linalg.norm((found - right)[:, part], axis=1) for part in (slice(2), slice(3, 5), slice(7, 10))
        ]
        far, long = (np.linalg.norm(right[:, :2] - right[:, 7:9], axis=1) > 0.05, np.hypot(*right[:, 5:7].T) > 0.4)
        lie, closing = (pretrain.degrees_off(found[:, part], right[:, part]) for part in (slice(5, 7), slice(10, 12)))
        lie = lie[long]
        size, (away, near) = sum(p.numel() for p in stem.parameters()) / 1e6, (off[0][far], off[0][~far])
        cells = [name, f"{size:.2f} M", number, f"{number * args.batch_size / args.seconds:.0f}"]
        cells += [f"{np.median(away):.0f} ({(away > 30).mean():.2f})", f"{np.median(near):.0f}"]
        cells += [f"{np.median(distance):.0f}" for distance in off[1:]]
        cells += [f"{np.median(lie):.0f} ({(lie > 20).mean():.2f})", f"{np.median(closing):.0f}", f"{forward:.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
