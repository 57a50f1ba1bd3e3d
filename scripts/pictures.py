"""What a run shows: videos and curve.png."""

import json
import os
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.run.files import naming


def draw_curves(run_dir, *keys):
    """curve.png: these metrics of metrics.jsonl over the steps."""
    from matplotlib.figure import Figure  # here, since it is slow to import

    lines = Path(run_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="steps")
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=key)
            axes.legend()
    write_figure(Path(run_dir, "curve.png"), figure, dpi=120)


def write_figure(path, figure, dpi):
    temporary = path.with_name(f".{path.name}")  # a reader never meets half a file
    figure.savefig(temporary, dpi=dpi)
    os.replace(temporary, path)


def write_video(path, frames, instruction, fps=5):
    """H.264 video, 640 wide, of (H, W, 3) uint8 frames with the instruction on top."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp.mp4")
    upscale = max(1, 640 // frames[0].shape[1])
    font = ImageFont.load_default(18)
    options = dict(fps=fps, codec="libx264", macro_block_size=2)
    fix = "does ffmpeg run? `pip install imageio-ffmpeg`, or unset IMAGEIO_FFMPEG_EXE"
    with naming(path, fix), imageio.get_writer(temporary, **options) as writer:
        for frame in frames:
            picture = ImageOps.scale(Image.fromarray(frame), upscale, Image.NEAREST)
            draw = ImageDraw.Draw(picture)
            draw.rectangle((0, 0, picture.width, 28), fill="black")
            draw.text((8, 4), instruction, fill="white", font=font)
            writer.append_data(np.asarray(picture))
    with naming(path, fix):
        imageio.get_reader(temporary).close()  # where the disk is full, ffmpeg does not say so
    os.replace(temporary, path)
