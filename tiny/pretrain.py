"""Pre-training of the small model on pointing scenes: its eyes by segmentation, then all of it.

    python -m tiny.pointing --output demos/pointing
    python -m tiny.pointing --task multi_carrot --seed 1 --output demos/pointing-two
    torchrun --nproc-per-node 2 -m tiny.pretrain --output runs/tiny-pretrained

OpenVLA starts from towers and a language model that have seen the web; the small model gets from
the simulator what it needs of that: which pixel shows what, where things are and how they lie,
which of two objects is meant. No action is in it. Pointing alone is slow: until the whole way from
pixels to a place works, nothing is learned. The eyes' stage teaches the first part, at every image
token: which class its pixels have and where the things are that they show; from the mean of all
tokens: where all of them are. Its heads are not kept.
"""

import io
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image

from common.model.checkpoints import load_vla, save_vla
from common.run.ranks import setup_ranks, sum_gradients, sum_over_ranks
from common.simulation.assets import load_pack
from common.simulation.env import CAMERA
from demonstrations.reader import action_statistics
from tiny.pointing import FINGERS, OBJECTS, RECEPTACLE, answer

TOKEN = 16  # pixels of the side of a square that an image token sees first


@dataclass
class Args:
    demos: tuple[str, ...] = ("demos/pointing", "demos/pointing-two")  # of tiny/pointing.py
    output: str = "runs/tiny-pretrained"  # a new model directory, a start for sft_vla.py
    model: str = "tiny"  # a directory, or tiny (random weights)
    eyes_updates: int = 5000  # optimizer steps of the eyes alone; 0 = the model's are good
    pointing_updates: int = 4500  # of the whole model
    batch_size: int = 64  # over all ranks
    learning_rate: float = 2e-3  # AdamW; each stage ends with half a cosine
    label_std: float = 4.0  # bins; a label is a normal distribution, wider in the first half
    val_scenes: int = 100  # the last ones of each directory
    report_every: int = 250  # updates
    seed: int = 1
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = "bfloat16"  # of matmuls


def load(path, stem):
    """Pictures of one recording as the `stem` sees them: dict of tensors, texts is an array.

    images (B, h, w, 3) uint8; classes (B, tokens, pixels of a token at half the size, every second)
    uint8; shown (B, tokens, 3) bool: which tokens show the object that is named, the receptacle,
    the fingers; places (B, 12) float32; texts (B,) str; scenes (B,) int64.
    """
    images, classes, objects, places, texts, scenes = [], [], [], [], [], []
    with h5py.File(Path(path, "trajectory.h5")) as file:
        for number in range(len(file)):
            group = file[f"traj_{number}"]
            files = group[f"obs/sensor_data/{CAMERA}/rgb"][:-1]
            pictures = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in files])
            images.append(stem.fit(torch.from_numpy(pictures), None))
            classes.append(torch.from_numpy(group["classes"][:]))
            places.append(torch.from_numpy(group["places"][:]))
            objects += [OBJECTS + int(group.attrs["object"])] * len(files)
            texts += [group.attrs["instruction"]] * len(files)
            scenes += [number] * len(files)
    left, top, right, bottom = (edge // 2 for edge in stem.crop)
    cut = torch.cat(classes)[:, top:bottom, left:right][:, ::2, ::2]
    side = TOKEN // 4
    cells = cut.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    cells = cells.flatten(3).flatten(1, 2)
    things = (torch.tensor(objects)[:, None, None], RECEPTACLE, FINGERS)
    shown = torch.stack([(cells == thing).any(2) for thing in things], dim=2)
    return {
        "images": torch.cat(images), "classes": cells, "shown": shown,
        "places": torch.cat(places), "texts": np.array(texts), "scenes": torch.tensor(scenes),
    }  # fmt: skip


def all_in_view(shown):
    """(B,) bool: pictures of object, receptacle and fingers; in others nobody could point."""
    return shown.any(1).all(1)


def place_loss(guess, places, shown):
    """() mean loss of places (B, 12) guessed at tokens (B, tokens, 12): each counts where its
    thing is shown, shown (B, tokens, 3)."""
    thing, receptacle, fingers = (shown[..., [k]].float() for k in range(3))
    told = [thing.expand(-1, -1, 3), receptacle.expand(-1, -1, 2), thing.expand(-1, -1, 2)]
    told = torch.cat([*told, fingers.expand(-1, -1, 5)], dim=2)
    every = places[:, None].expand_as(guess)
    losses = F.smooth_l1_loss(guess, every, beta=0.1, reduction="none")
    return ((losses * told).sum(1) / told.sum(1).clamp(min=1)).mean()


def eyes_heads(stem, pixels):
    """Linear heads: classes of a token's pixels, places of what a token shows, of a picture."""
    num_classes = OBJECTS + len(load_pack("primitive").objects)
    return [torch.nn.Linear(stem.width, n) for n in (pixels * num_classes, 12, 12)]


def eyes_loss(stem, heads, images, classes, shown, places):
    """() cross-entropy of the pixels' classes, nats, + `place_loss` at every token + that of the
    mean of all tokens. places: scaled to a standard deviation of 1; the rest as in `load`."""
    features = stem(images, lambda block, x: block(x))
    segment, point, overview = heads
    logits, guess = segment(features).float(), point(features).float()
    summary = overview(features.mean(1, True)).float()
    num_classes = logits.shape[-1] // classes.shape[2]
    segmentation = F.cross_entropy(logits.view(-1, num_classes), classes.long().flatten())
    in_picture = shown.any(1, keepdim=True)  # (B, 1, 3)
    objects = [(classes == k).flatten(1).any(1) for k in range(OBJECTS, num_classes)]
    in_picture[torch.stack(objects).sum(0) > 1, :, 0] = False  # which is meant, the text tells
    return segmentation + place_loss(guess, places, shown) + place_loss(summary, places, in_picture)


def spread_cross_entropy(logprobs, bins, std):
    """(M, 7) nats, of log-probs (M, 7, 256) and normal distributions `std` bins wide."""
    distance = torch.arange(logprobs.shape[-1], device=logprobs.device) - bins[..., None]
    return -(torch.softmax(-0.5 * (distance / std) ** 2, dim=-1) * logprobs).sum(-1)


@torch.no_grad()
def errors(model, images, texts, answers):
    """Median error of greedy answers, mm: of the object, of the receptacle."""
    tokens = []
    for k in range(0, len(texts), 256):
        part = slice(k, k + 256)
        tokens.append(model.act(images[part], texts[part].tolist(), temperature=0)[0])
    off = 1000 * (model.decode_actions(torch.cat(tokens)).numpy() - answers)
    thing, plate = (np.median(np.linalg.norm(off[:, k], axis=1)) for k in ([0, 1], [3, 4]))
    return f"object {thing:.1f} mm, receptacle {plate:.1f} mm"


def main(args):
    if (Path(args.output) / "config.json").exists():
        raise FileExistsError(f"{args.output} holds a model and is never overwritten; use another")
    rank, world_size, device = setup_ranks(args.device, args.seed)
    model = load_vla(args.model, dtype=args.dtype, seed=args.seed, device=device)
    stem = model.vision_backbone
    data, val = {}, {}
    for path in args.demos:
        part = load(path, stem)
        last = part["scenes"] > part["scenes"].max() - args.val_scenes
        rows = torch.nonzero(last & all_in_view(part["shown"])).flatten()
        val[path] = [
            part["images"][rows],
            part["texts"][rows],
            answer(part["places"][rows].numpy()),
        ]
        for key, value in part.items():
            data.setdefault(key, []).append(value[(~last).numpy()])
    texts = np.concatenate(data.pop("texts"))
    data = {key: torch.cat(parts) for key, parts in data.items()}
    answers = answer(data["places"].numpy())
    statistics = {"action": action_statistics(answers), "assets": "primitive"}
    model.set_statistics("pointing", statistics)
    tokens = model.encode_actions(answers).to(device)
    pointable = torch.nonzero(all_in_view(data["shown"])).flatten()
    scaled = (data["places"] - data["places"].mean(0)) / data["places"].std(0)
    images, classes, shown = (data[key].to(device) for key in ("images", "classes", "shown"))
    scaled = scaled.to(device)
    heads = [head.to(device) for head in eyes_heads(stem, classes.shape[2])]

    def loss_of_eyes(rows, _):
        with model.autocast():
            return eyes_loss(stem, heads, images[rows], classes[rows], shown[rows], scaled[rows])

    def loss_of_pointing(rows, fraction):
        logprobs, _ = model.bin_logprobs(images[rows], texts[rows.numpy()].tolist(), tokens[rows])
        std = args.label_std * max(1, 8 * (1 - 2 * fraction))  # roughly right is learned sooner
        return spread_cross_entropy(logprobs, tokens[rows] - model.bins.start, std).mean()

    stages = (
        ("eyes", args.eyes_updates, (stem, *heads), loss_of_eyes, torch.arange(len(images))),
        ("pointing", args.pointing_updates, (model,), loss_of_pointing, pointable),
    )
    start = time.monotonic()
    for name, num_updates, modules, loss_of, among in stages:
        parameters = [p for module in modules for p in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
        losses = []
        for number in range(num_updates):
            fraction = number / num_updates
            lr = args.learning_rate * min(1, (number + 1) / 100)
            optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * np.cos(np.pi * fraction))
            rng = np.random.default_rng([args.seed, number])
            rows = among[rng.integers(len(among), size=args.batch_size)]
            optimizer.zero_grad()
            loss = loss_of(rows[rank::world_size], fraction) / world_size
            loss.backward()
            sum_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(sum_over_ranks(loss.detach()).item())
            if rank == 0 and (number + 1) % args.report_every == 0:
                mean = np.mean(losses[-args.report_every :])
                seconds = time.monotonic() - start
                print(f"{name} {number + 1}/{num_updates} | {seconds:.0f} s | loss {mean:.3f}")
                for path, part in val.items() if name == "pointing" else ():
                    print(f"  {path}: {errors(model, *part)}", flush=True)
    if rank == 0:
        save_vla(model, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args))
