"""Pre-training of the small model on pointing scenes: its eyes by segmentation, then all of it.

    python -m tiny.pointing --output demos/pointing
    python -m tiny.pretrain --output runs/tiny-pretrained

OpenVLA starts from towers and a language model that have seen the web; the small model gets from
the simulator what it needs of that: which pixel shows what, what things are called, where they are
and how they lie, which of two is meant. No action is in it. Pointing alone is slow: until the whole
way from pixels to a place works, nothing is learned. The eyes' stage teaches the first part, at
every image token: which kind of thing each of its pixels shows, and where it is; which object and
which receptacle, by the language model's own words for it, as CLIP does; from the mean of all
tokens: where all of them are. In the second stage this lesson goes on, and the language model
learns to look up what is named: below its last layer a name already tells where its body is. The
heads are not kept.

The same command continues a run that was interrupted.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tabulate import tabulate

from common.model.checkpoints import load_vla, save_vla
from common.run.files import check
from common.run.ranks import setup_ranks, sum_gradients, sum_over_ranks
from demonstrations.reader import action_statistics
from scripts.provenance import FAST_DTYPE
from tiny.pointing import FINGERS, MODES, OBJECTS, RECEPTACLES, answer
from tiny.scenes import class_names

TOKEN = 16  # pixels of the side of a square that an image token sees first
PLACE_WEIGHT = 30  # with 1, places are 5 to 10 mm worse after 80,000 pictures
SHARPNESS = 16  # of the cosine between an image token and a name
EYES_WEIGHT = 0.1  # of the eyes' loss in the second stage
QUESTION = "where: "  # before half of the instructions: may outlive a fine-tuning on actions
KINDS = 5  # of pixels: all else, arm, fingers, receptacles, objects
# What a continued run must not change
FIXED = "model eyes_updates pointing_updates batch_size learning_rate label_std seed".split()


@dataclass
class Args:
    scenes: str = "demos/pointing"  # of tiny/pointing.py
    output: str = "runs/tiny-pretrained"  # a model directory, a start for sft_vla.py
    model: str = "tiny"  # a directory, or tiny (random weights)
    eyes_updates: int = 40_000  # optimizer steps of the eyes alone
    pointing_updates: int = 40_000  # of the whole model
    batch_size: int = 64  # over all ranks
    learning_rate: float = 2e-3  # AdamW; each stage ends with half a cosine
    label_std: float = 3.0  # bins; a label is a normal distribution, wider in the first half
    report_every: int = 500  # updates, after which errors are printed and the run is saved
    seed: int = 1
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = FAST_DTYPE  # of matmuls


def load(path):
    """Pictures of one file: dict of tensors, and "text", an array (B,).

    images, places, object, receptacle, third, overlay, mode: as in the file. bodies (B, tokens,
    pixels of a token at half the size) int16; shown (B, tokens, 3) bool: which tokens show the
    object that is meant, the receptacle, the fingers.
    """
    with h5py.File(path) as file:
        names = file.keys() - {"text", "bodies"}
        data = {name: torch.from_numpy(file[name][:]) for name in names}
        text = file["text"].asstr()[:]
        bodies = torch.from_numpy(file["bodies"][:].astype(np.int16))
    side = TOKEN // 2
    height, width = (-length % side for length in bodies.shape[1:])
    cells = F.pad(bodies, (0, width, 0, height))
    cells = cells.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    cells = cells.flatten(3).flatten(1, 2)
    meant = OBJECTS + data["object"], RECEPTACLES + data["receptacle"]
    things = [number[:, None, None] for number in meant] + [FINGERS]
    shown = torch.stack([(cells == thing).any(2) for thing in things], dim=2)
    return dict(data, text=text, bodies=cells, shown=shown)


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


def eyes_heads(stem, pixels, hidden_size):
    """Linear heads: kinds of an image token's pixels; places of what it shows; of what the picture
    shows; and of what a text token names."""
    sizes = (stem.width, pixels * KINDS), (stem.width, 12), (stem.width, 12), (hidden_size, 12)
    return torch.nn.ModuleList(torch.nn.Linear(*size) for size in sizes)


def count_words(model):
    """(C, V) float32: how often each token of the vocabulary stands in each name."""
    counts = torch.zeros(len(class_names()), model.config.text_config.vocab_size)
    for row, name in zip(counts, class_names(), strict=True):
        for token in model.tokenizer.encode(name, add_special_tokens=False).ids:
            row[token] += 1
    return counts.to(model.device)


def eyes_loss(features, named, heads, bodies, shown, places, third):
    """() sum of the cross-entropies of kinds, receptacles and objects, nats, and, PLACE_WEIGHT
    times, of `place_loss` at every token and of the mean of all tokens. named: (B, tokens, C)
    logits of `class_names`; places: scaled to a standard deviation of 1."""
    segment, point, overview, _ = heads
    bodies = bodies.long()
    firsts = torch.tensor([1, FINGERS, RECEPTACLES, OBJECTS], device=bodies.device)
    kinds = torch.bucketize(bodies, firsts, right=True)
    loss = F.cross_entropy(segment(features).float().view(-1, KINDS), kinds.flatten())
    both = named.float().flatten(0, 1).tensor_split([OBJECTS - RECEPTACLES], dim=1)
    for logits, kind, first in zip(both, (3, 4), (RECEPTACLES, OBJECTS), strict=True):
        which = torch.where(kinds == kind, bodies - first, -1).amax(2)  # (B, tokens), -1: none
        if (which >= 0).any():
            loss = loss + F.cross_entropy(logits, which.flatten(), ignore_index=-1)
    in_picture = shown.any(1, keepdim=True)  # (B, 1, 3)
    in_picture[third == 1, :, 0] = False  # which of two is meant, the text tells
    in_picture[third == 2, :, 1] = False
    told = place_loss(point(features).float(), places, shown)
    told = told + place_loss(overview(features.mean(1, True)).float(), places, in_picture)
    return loss + PLACE_WEIGHT * told


def named_tokens(ids, num_patches, names):
    """(N, num_patches + T, 3) bool: where in [BOS | patches | text] the name of the object, and of
    the receptacle, ends. ids: (N, T); names: N pairs of lists of token ids."""
    ends = torch.zeros(len(ids), num_patches + ids.shape[1], 3, dtype=torch.bool)
    for row, (text, pair) in enumerate(zip(ids.tolist(), names, strict=True)):
        for thing, name in enumerate(pair):
            for end in range(len(name), len(text) + 1):
                if text[end - len(name) : end] == name:
                    ends[row, num_patches + end - 1, thing] = True
    return ends


def spread_cross_entropy(logprobs, bins, std):
    """(M, 7) nats, of log-probs (M, 7, 256) and normal distributions `std` bins wide."""
    distance = torch.arange(logprobs.shape[-1], device=logprobs.device) - bins[..., None]
    return -(torch.softmax(-0.5 * (distance / std) ** 2, dim=-1) * logprobs).sum(-1)


@torch.no_grad()
def errors(model, data):
    """Rows (kind of scene, pictures, median error of the object in mm, share of more than 30 mm,
    the same of the receptacle) of greedy answers in a file's data."""
    rows = torch.nonzero(all_in_view(data["shown"])).flatten()
    tokens = []
    for part in rows.split(256):
        texts = [QUESTION + text for text in data["text"][part.numpy()]]
        tokens.append(model.act(data["images"][part], texts, temperature=0)[0].cpu())
    off = model.decode_actions(torch.cat(tokens)).numpy() - answer(data["places"][rows].numpy())
    thing, plate = (1000 * np.linalg.norm(off[:, k], axis=1) for k in ([0, 1], [3, 4]))
    mode, third, overlay, number, receptacle = (
        data[key][rows].numpy() for key in ("mode", "third", "overlay", "object", "receptacle")
    )
    alone = third == 0
    kinds = {f"one of each, gripper {MODES[k]}": alone & (mode == k) for k in range(len(MODES))}
    far = mode == 0  # the gripper is anywhere
    kinds["anywhere, no overlay"] = far & alone & (overlay == 0)
    kinds["anywhere, overlay"] = far & alone & (overlay > 0)
    kinds["anywhere, random bodies"] = far & alone & (number >= 25) & (receptacle >= 17)
    kinds["anywhere, two objects"] = far & (third == 1)
    kinds["anywhere, two receptacles"] = far & (third == 2)
    table = []
    for name, chosen in kinds.items():
        row = [name, int(chosen.sum())]
        for error in (thing[chosen], plate[chosen]):
            row += [round(float(np.median(error)), 1), round(float((error > 30).mean()), 2)]
        table.append(row)
    return table


def main(args):
    folder = Path(args.output)
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a model and is never overwritten; use another")
    rank, world_size, device = setup_ranks(args.device, args.seed)
    model = load_vla(args.model, dtype=args.dtype, seed=args.seed, device=device)
    stem = model.vision_backbone
    paths = sorted(Path(args.scenes).glob("scenes-*.h5"))
    if not paths:
        raise FileNotFoundError(f"{args.scenes} holds no scenes; run python -m tiny.pointing")
    data = {}
    for path in paths:
        for key, value in load(path).items():
            data.setdefault(key, []).append(value)
    texts = np.concatenate(data.pop("text"))
    data = {key: torch.cat(data.pop(key)) for key in list(data)}  # one by one: 8 GB in place of 13
    val = load(Path(args.scenes, "validation.h5"))
    answers = answer(data["places"].numpy())
    statistics = {"action": action_statistics(answers), "assets": "primitive"}
    model.set_statistics("pointing", statistics)
    tokens = model.encode_actions(answers).to(device)
    pointable = torch.nonzero(all_in_view(data["shown"])).flatten()
    scaled = (data["places"] - data["places"].mean(0)) / data["places"].std(0)
    names = ("images", "bodies", "shown", "third")
    images, bodies, shown, third = (data[name].to(device) for name in names)
    scaled = scaled.to(device)
    llama, below = model.language_model.model, {}
    heads = eyes_heads(stem, bodies.shape[2], llama.config.hidden_size).to(device)
    words, embedding = count_words(model), llama.embed_tokens
    encode = model.tokenizer.encode
    spelled = [encode(name, add_special_tokens=False).ids for name in class_names()]
    llama.layers[-2].register_forward_hook(lambda _, given, out: below.update(hidden=out))

    def look(rows):
        with model.autocast():
            features = stem(images[rows], model.recompute)
            seen = model.projector(features)
            names = F.normalize(words @ embedding.weight, dim=1)
            named = SHARPNESS * F.normalize(seen.float(), dim=2) @ names.T
            batch = bodies[rows], shown[rows], scaled[rows], third[rows]
            return seen, eyes_loss(features, named, heads, *batch)

    def loss_of_pointing(rows, number):
        seen, loss = look(rows)  # the eyes' own lesson goes on
        asked = [QUESTION * ((row + number) % 2) + texts[row] for row in rows.tolist()]
        logprobs, _ = model.bin_logprobs(seen, asked, tokens[rows])
        meant = data["object"][rows] + OBJECTS - RECEPTACLES, data["receptacle"][rows]
        names = [[spelled[name] for name in pair] for pair in zip(*meant, strict=True)]
        ends = named_tokens(model.tokenize(asked)[0], seen.shape[1], names).to(device)
        with model.autocast():
            told = heads[3](below["hidden"][:, : ends.shape[1]]).float()
        loss = loss + PLACE_WEIGHT * place_loss(told, scaled[rows], ends)
        # Roughly right is learned sooner
        std = args.label_std * max(1, 8 * (1 - 2 * number / args.pointing_updates))
        pointing = spread_cross_entropy(logprobs, tokens[rows] - model.bins.start, std).mean()
        return pointing + EYES_WEIGHT * loss

    all_pictures, eyes = torch.arange(len(images)), [stem, model.projector, embedding, heads]
    stages = (
        ("eyes", args.eyes_updates, eyes, lambda rows, _: look(rows)[1], all_pictures),
        ("pointing", args.pointing_updates, [model, heads], loss_of_pointing, pointable),
    )
    saved, state = folder.with_name(f"{folder.name}.training.pt"), None
    fixed = {name: getattr(args, name) for name in FIXED}
    if saved.exists():
        state = torch.load(saved, map_location=device, weights_only=True)
        same = state["fixed"] == fixed
        check(same, f"{saved} has {state['fixed']}, not {fixed}; remove it, or use its flags")
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
    start = time.monotonic()
    for name, num_updates, modules, loss_of, among in stages:
        if state and state["stage"] != name:
            continue  # this stage was finished before the interruption
        parameters = [p for module in modules for p in module.parameters()]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
        losses, first = [], 0
        if state:
            optimizer.load_state_dict(state["optimizer"])
            first, state = state["updates"], None
        for number in range(first, num_updates):
            fraction = number / num_updates
            lr = args.learning_rate * min(1, (number + 1) / 100)
            optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * fraction))
            rng = np.random.default_rng([args.seed, number])
            rows = among[rng.integers(len(among), size=args.batch_size)]
            optimizer.zero_grad()
            loss = loss_of(rows[rank::world_size], number) / world_size
            loss.backward()
            sum_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(sum_over_ranks(loss.detach()).item())
            done = number + 1 == num_updates
            if rank == 0 and (done or (number + 1) % args.report_every == 0):
                mean = np.mean(losses[-args.report_every :])
                left = (time.monotonic() - start) / len(losses) * (num_updates - number - 1) / 60
                print(f"{name} {number + 1}/{num_updates} | loss {mean:.3f} | {left:.0f} min left")
                if name == "pointing" and (done or (number + 1) % (4 * args.report_every) == 0):
                    headers = "scenes", "pictures", "object mm", "> 30", "receptacle mm", "> 30"
                    print(tabulate(errors(model, val), headers), flush=True)
                save_training(saved, model, heads, optimizer, name, number + 1, fixed)
        start = time.monotonic()
    if rank == 0:
        save_vla(model, folder)
        saved.unlink()


def save_training(path, model, heads, optimizer, stage, updates, fixed):
    """What a run needs to go on, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = dict(model=model, heads=heads, optimizer=optimizer)
    state = {name: part.state_dict() for name, part in parts.items()}
    state.update(stage=stage, updates=updates, fixed=fixed)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main(tyro.cli(Args))
