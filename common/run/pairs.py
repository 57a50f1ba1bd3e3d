"""Preference pairs of one round in one .npz: PNG frames, no pickle, written whole or not at all (docs/dpo_vla.md)."""

import io
import os
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import tyro
from PIL import Image

from common.run.evaluate import write_video
from common.simulation.demos import encode_image


def encode_frames(trajectories, num_steps):
    """S lists of T = num_steps images (H, W, 3) uint8 -> {"png": (bytes,) uint8, "png_sizes": (S, T)}; lossless."""
    files = [encode_image(image, "png") for images in trajectories for image in images]
    sizes = np.array([len(file) for file in files], dtype=np.int64).reshape(-1, num_steps)
    return {"png": np.concatenate([np.zeros(0, np.uint8), *files]), "png_sizes": sizes}


def decode_frames(data, rows=slice(None)):
    """The inverse, (S, T, H, W, 3) uint8; rows: of these trajectories only."""
    ends = data["png_sizes"].cumsum().reshape(data["png_sizes"].shape)
    spans = np.stack([ends - data["png_sizes"], ends], axis=-1)[rows]
    return np.stack([[np.asarray(Image.open(io.BytesIO(data["png"][a:b]))) for a, b in row] for row in spans])


def save_pairs(path, data):
    """data: dict of arrays; where a row is a trajectory, 2 n is the chosen and 2 n + 1 the rejected one of pair n."""
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, **data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def load_pairs(path):
    """What `save_pairs` wrote. Raises: FileNotFoundError; ValueError for a truncated or damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, EOFError, BadZipFile) as error:
        fix = "remove it and --resume the run: its round is collected again"
        raise ValueError(f"{path} is truncated or no file of pairs ({error}); {fix}") from error


def remove(directory, before, after):
    """Files of rounds up to `before` and from `after` + 1 on."""
    for path in Path(directory).glob("[0-9]*.npz"):
        if not before < int(path.stem) <= after:
            path.unlink()


def show_pair(path: Path, pair: int = 0):
    """Video of a pair beside the file: chosen left, rejected right, as the model sees them. Returns its path."""
    data = load_pairs(path)
    if not 0 <= pair < (most := len(data["returns"]) // 2):
        raise ValueError(f"pair = {pair}: {path} holds {most} pairs; use 0 to {most - 1}")
    rows, video = [2 * pair, 2 * pair + 1], path.with_name(f"{path.stem}-{pair}.mp4")
    text = "{}: {:.1f} > {:.1f}".format(data["instructions"][rows[0]], *data["returns"][rows])
    write_video(video, np.concatenate(list(decode_frames(data, rows)), axis=2), text)
    return video


if __name__ == "__main__":
    print(tyro.cli(show_pair))
