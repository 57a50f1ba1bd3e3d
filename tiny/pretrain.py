"""Pre-training of the small model on pointing scenes: its eyes by segmentation, then all of it by pointing.

    python -m tiny.pointing --num-scenes 8000 --output demos/pointing
    python -m tiny.pointing --num-scenes 6000 --task multi_carrot --seed 1 --output demos/pointing-two
    torchrun --nproc-per-node 2 -m tiny.pretrain --output runs/tiny-pretrained

OpenVLA starts from vision towers and a language model that have seen the web; the small model gets from the simulator,
in minutes, what it needs of that: which pixel shows what, where things are and how they lie, which of two objects is
meant. No action is in it. Pointing alone is slow: the way from pixels to an object's place is long, and until all of it
works, nothing is learned. The eyes' stage teaches the first part of the way. At every image token: which class its
pixels have and, where they show the object, the receptacle or the fingers, where that is and how it lies; from the mean
of all tokens: where all of them are. Its heads are not kept.
"""

import functools
import io
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image

from common.run import runs
from common.simulation.assets import load_pack
from common.simulation.demos import action_statistics
from common.simulation.env import CAMERA
from tiny.pointing import FINGERS, OBJECTS, RECEPTACLE, answer


@dataclass
class Args:
    demos: tuple[str, ...] = ("demos/pointing", "demos/pointing-two")  # directories of tiny/pointing.py
    output: str = "runs/tiny-pretrained"  # model directory, a start for sft_vla.py
    model: str = "tiny"  # a directory, or tiny (random weights)
    eyes_updates: int = 5000  # optimizer steps of the eyes alone; 0 = the model's are good
    pointing_updates: int = 4500  # of the whole model
    batch_size: int = 64  # over all ranks; more, smaller updates find far objects sooner (docs/log.md)
    learning_rate: float = 2e-3  # AdamW; each stage ends with half a cosine
    label_std: float = 4.0  # bins; an answer's label is a normal distribution, in the first half a wider one
    val_scenes: int = 100  # the last ones of each directory
    report_every: int = 250  # updates
    seed: int = 1
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = "bfloat16"  # of matmuls; float32 on a processor without bfloat16 arithmetic
    torch_threads: int = 1  # per rank


def check_args(args):
    """ValueError, FileNotFoundError or FileExistsError with value, rule and fix, before anything is loaded."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    for name in "eyes_updates pointing_updates batch_size val_scenes report_every torch_threads".split():
        if (value := getattr(args, name)) < (least := 0 if name.endswith("updates") else 1):
            raise ValueError(f"{name} = {value} must be >= {least}; use {getattr(Args, name)}")
    if args.batch_size % ranks:
        raise ValueError(f"batch_size = {args.batch_size} must be a multiple of the {ranks} ranks; use {64 * ranks}")
    if not 0 < args.label_std < 64:
        raise ValueError(f"label_std = {args.label_std} must be in (0, 64) of 256 bins; use 4")
    if (Path(args.output) / "config.json").exists():
        raise FileExistsError(f"{args.output} holds a model, which is never overwritten; use another --output")
    for path in args.demos:
        if not (Path(path) / "trajectory.h5").is_file():
            fix = f"make it with: python -m tiny.pointing --output {path}"
            raise FileNotFoundError(f"{path}/trajectory.h5 is missing; {fix}")


def load(path, stem, run=map):
    """Pictures of one recording as the `stem` sees them: images (B, h, w, 3) uint8; classes (B, tokens, pixels of a
    token at a quarter of the size) uint8; shown (B, tokens, 3) bool: which tokens show the object that is named, the
    receptacle, the fingers; places (B, 12) float32; texts (B,) str; scenes (B,) int. run: `map`, or that of a pool."""
    with h5py.File(f"{path}/trajectory.h5") as file:
        if not {"classes", "places"} <= file["traj_0"].keys() or "object" not in file["traj_0"].attrs:
            text = "has no pixel classes, places or object"
            raise ValueError(f"{path} {text}; record it again with this version of tiny/pointing.py")
        parts = [range(start, min(start + 250, len(file))) for start in range(0, len(file), 250)]
    arrays = zip(*run(functools.partial(load_scenes, path, stem), parts), strict=True)
    images, classes, shown, places, texts, scenes = map(np.concatenate, arrays)
    return *map(torch.from_numpy, (images, classes, shown)), places, texts, scenes


def load_scenes(path, stem, numbers):
    """Those scenes of one recording, as arrays; see `load`."""
    grid = stem.grid
    images, classes, objects, places, texts, scenes = [], [], [], [], [], []
    with h5py.File(f"{path}/trajectory.h5") as file:
        for scene in numbers:
            group = file[f"traj_{scene}"]
            frames = group[f"obs/sensor_data/{CAMERA}/rgb"][:-1]
            pictures = np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in frames])
            images.append(stem.fit(torch.from_numpy(pictures), None))
            classes.append(group["classes"][:])
            objects += [OBJECTS + int(group.attrs["object"])] * len(frames)
            places.append(group["places"][:])
            texts += [json.loads(group.attrs["episode"])["instruction"]] * len(frames)
            scenes += [scene] * len(frames)
    half = lambda cut: slice(cut.start // 2, cut.stop // 2)  # noqa: E731
    classes = torch.from_numpy(np.concatenate(classes))[:, half(stem.window[1]), half(stem.window[2])][:, ::2, ::2]
    height, width = (n // g for n, g in zip(classes.shape[1:], grid, strict=True))
    classes = classes.view(-1, grid[0], height, grid[1], width).transpose(2, 3).flatten(3).flatten(1, 2)
    things = torch.tensor(objects)[:, None, None], RECEPTACLE, FINGERS
    shown = torch.stack([(classes == thing).any(2) for thing in things], dim=2)
    pictures = torch.cat(images), classes, shown
    return *(tensor.numpy() for tensor in pictures), np.concatenate(places), np.array(texts), np.array(scenes)


def all_in_view(shown):
    """(B,) bool: the pictures that show object, receptacle and fingers; in others nobody could point."""
    return shown.any(1).all(1)


def told_at(shown):
    """(B, tokens, 12) float32: 1 where a token shows the thing that a place is of."""
    return torch.cat([shown[..., [k] * n] for k, n in ((0, 3), (1, 2), (0, 2), (2, 5))], dim=2).float()


def place_loss(guess, places, shown):
    """() mean loss of places (B, 12) guessed at every token (B, tokens, 12): each counts where its thing is shown."""
    told = told_at(shown)
    losses = F.smooth_l1_loss(guess, places[:, None].expand_as(guess), beta=0.1, reduction="none")
    return ((losses * told).sum(1) / told.sum(1).clamp(min=1)).mean()


def eyes_heads(stem, pixels):
    """The linear heads of the eyes' stage: classes of a token's pixels, places of what a token shows, of a picture."""
    num_classes = OBJECTS + len(load_pack("primitive").objects)
    return [torch.nn.Linear(stem.width, n) for n in (pixels * num_classes, 12, 12)]


def eyes_loss(stem, heads, images, classes, shown, places):
    """() loss of the eyes' stage: cross-entropy of the pixels' classes, nats, + `place_loss` at every token + that of
    the mean of all tokens. heads: `eyes_heads`; places scaled to a standard deviation of 1; the rest: see `load`."""
    features = stem(images, lambda block, x: block(x))
    segment, point, overview = heads
    logits, guess, summary = (
        segment(features).float(),
        point(features).float(),
        overview(features.mean(1, True)).float(),
    )
    num_classes = logits.shape[-1] // classes.shape[2]
    segmentation = F.cross_entropy(logits.view(-1, num_classes), classes.long().flatten())
    in_picture = shown.any(1, keepdim=True)  # (B, 1, 3)
    objects = torch.stack([(classes == k).flatten(1).any(1) for k in range(OBJECTS, num_classes)]).sum(0)
    in_picture[objects > 1, :, 0] = False  # which of two is meant, only the text tells
    return segmentation + place_loss(guess, places, shown) + place_loss(summary, places, in_picture)


def spread_cross_entropy(logprobs, bins, std):
    """Cross-entropy (M, 7), nats, of log-probs (M, 7, 256) and normal distributions, `std` bins wide, of (M, 7)."""
    distance = torch.arange(logprobs.shape[-1], device=logprobs.device) - bins[..., None]
    return -(torch.softmax(-0.5 * (distance / std) ** 2, dim=-1) * logprobs).sum(-1)


def degrees_off(found, right):
    """(B,) degrees between axes, both given as (B, 2) cosine and sine of the doubled angle."""
    turn = np.arctan2(found[:, 1], found[:, 0]) - np.arctan2(right[:, 1], right[:, 0])
    return np.degrees(np.abs((turn + np.pi) % (2 * np.pi) - np.pi)) / 2


@torch.no_grad()
def errors(model, key, images, texts, answers):
    """Text: how far off greedy answers are, where the gripper is far from the object (5 cm) and where it is near."""
    tokens = torch.cat(
        [model.act(images[k : k + 256], texts[k : k + 256].tolist(), 0)[0] for k in range(0, len(texts), 256)]
    )
    found = model.actions_from_tokens(tokens, key).numpy()
    off = np.abs(found - answers)
    to_object, to_receptacle = (
        1000 * np.linalg.norm(off[:, part], axis=1) for part in (slice(0, 2), slice(3, 5))
    )  # mm
    far = np.linalg.norm(answers[:, :2], axis=1) > 0.05
    turn = degrees_off(found[:, 5:7], answers[:, 5:7])
    long = np.hypot(answers[:, 5], answers[:, 6]) > 0.4
    return (
        f"object, far: {np.median(to_object[far]):.1f} mm, more than 30 mm off {(to_object[far] > 30).mean():.2f}, "
        f"near: {np.median(to_object[~far]):.1f} mm | receptacle {np.median(to_receptacle):.1f} mm | "
        f"axis of long objects {np.median(turn[long]):.0f} degrees, more than 20 off {(turn[long] > 20).mean():.2f}"
    )


def main(args: Args):
    check_args(args)
    from common.model.openvla import load_vla, save_vla

    device = runs.setup_ranks(args.device, args.dtype)
    rank, world_size = runs.rank_and_world_size()
    torch.set_num_threads(args.torch_threads)
    runs.seed_everything(args.seed)
    model = load_vla(args.model, dtype=getattr(torch, args.dtype), value_head=False, seed=args.seed)
    stem, key = model.backbone.vision_backbone, "pointing"
    cores, spawn = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = [load(path, stem, pool.map) for path in args.demos]
    val = [np.flatnonzero((scenes >= scenes.max() + 1 - args.val_scenes) & all_in_view(shown).numpy())
           for _, _, shown, *_, scenes in parts]  # fmt: skip
    train = [np.flatnonzero(scenes < scenes.max() + 1 - args.val_scenes) for *_, scenes in parts]
    of_all = lambda i, join: join([part[i][rows] for part, rows in zip(parts, train, strict=True)])  # noqa: E731
    images, classes, shown = (of_all(i, torch.cat) for i in range(3))
    places, texts = (of_all(i, np.concatenate) for i in (3, 4))
    answers = answer(places)
    model.norm_stats.clear()
    model.norm_stats[key] = {"action": action_statistics(answers), "assets": "primitive"}
    tokens = model.tokens_from_actions(answers, key)
    pointable = torch.nonzero(all_in_view(shown)).flatten()
    scaled = torch.from_numpy((places - places.mean(0)) / places.std(0))
    model.to(device)
    heads = [head.to(device) for head in eyes_heads(stem, classes.shape[2])]
    images, classes, shown, scaled, tokens = (x.to(device) for x in (images, classes, shown, scaled, tokens))

    def loss_of_eyes(rows, _):
        with model.autocast():
            return eyes_loss(stem, heads, images[rows], classes[rows], shown[rows], scaled[rows])

    def loss_of_pointing(rows, fraction):
        logprobs, _ = model.bin_logprobs(images[rows], texts[rows.numpy()].tolist(), tokens[rows])  # (M, 7, 256)
        std = args.label_std * max(1, 8 * (1 - 2 * fraction))  # roughly right is learned sooner than exactly
        return spread_cross_entropy(logprobs, tokens[rows] - model.backbone.bins.start, std).mean()

    stages = (
        ("eyes", args.eyes_updates, (stem, *heads), loss_of_eyes, torch.arange(len(images))),
        ("pointing", args.pointing_updates, (model.backbone,), loss_of_pointing, pointable),
    )
    start = time.time()
    for name, num_updates, modules, loss_of, among in stages:
        parameters, losses = [p for module in modules for p in module.parameters()], []
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, fused=device.type == "cuda")
        for number in range(num_updates):
            fraction = number / num_updates
            lr = args.learning_rate * min(1, (number + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * fraction))
            optimizer.param_groups[0]["lr"] = lr
            rows = among[np.random.default_rng([args.seed, number]).integers(len(among), size=args.batch_size)]
            optimizer.zero_grad()
            loss = loss_of(rows[rank::world_size], fraction) / world_size
            loss.backward()
            runs.sum_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(runs.sum_over_ranks(loss.detach()))
            if rank == 0 and (number + 1) % args.report_every == 0:
                loss = torch.stack(losses[-args.report_every :]).mean().item()
                text = f"{name} {number + 1}/{num_updates} | {time.time() - start:.1f} s | loss {loss:.3f}"
                if name == "pointing":
                    for path, part, at in zip(args.demos, parts, val, strict=True):
                        text += f"\n  {path}: {errors(model, key, part[0][at], part[4][at], answer(part[3][at]))}"
                print(text, flush=True)
    if rank == 0:
        save_vla(model, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args))
