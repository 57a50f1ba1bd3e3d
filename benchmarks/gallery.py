"""The pictures of docs/benchmark.md: the first frame of an evaluation episode of every row.

python benchmarks/gallery.py                       # docs/images/benchmark/primitive.jpg
python benchmarks/gallery.py --scene published     # bridge.jpg; needs MS_ASSET_DIR
"""

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.simulation.env import SCENES  # noqa: E402
from common.simulation.episodes import evaluation_ids  # noqa: E402
from common.simulation.tasks import REPORT_ROWS, get_task  # noqa: E402
from common.simulation.vec_env import CpuEnvs  # noqa: E402

COLUMNS = 4  # tiles per line of the sheet
WIDTH, HEIGHT, CAPTION = 320, 237, 42  # of a tile, pixels
STAND_STILL = np.array([[0, 0, 0, 0, 0, 0, 1]], np.float32)


def tiles(envs):
    """(picture, title, text) of every row; of an object that moves, after the move too."""
    for row, _, task, split, *_ in REPORT_ROWS:
        envs.set_task(task, split)
        obs, infos = envs.reset([iter(evaluation_ids(task, split, 1))])
        yield obs[0], f"{row}  ({task} {split})", infos["instruction"][0]
        move_at = get_task(task).move_at[split == "test"]
        if move_at:
            for _ in range(move_at + 1):
                obs, *_ = envs.step(STAND_STILL)
            yield obs[0], f"{row}, after the move", f"step {move_at + 1}"


def tile(picture, title, text):
    """The picture, shrunk, with its title and text below."""
    image = Image.new("RGB", (WIDTH, HEIGHT + CAPTION), "white")
    image.paste(Image.fromarray(picture).resize((WIDTH - 4, HEIGHT)))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    draw.text((2, HEIGHT + 2), title, "black", font)
    draw.text((2, HEIGHT + 19), text, "#0072B2", font)
    return np.asarray(image)


def main(scene: Literal["small", "published"] = "small"):
    """Render 640 x 480 with the default shader, then shrink."""
    settings = dict(SCENES[scene], task="carrot", split="test")
    # With one fidelity an id has the same places in both packs
    settings.update(image_size=(640, 480), shader_pack="default", fidelity="fixed")
    envs = CpuEnvs(1, settings, reset_after_success=0, state=False)
    images = [tile(*parts) for parts in tiles(envs)]
    envs.close()
    while len(images) % COLUMNS:
        images.append(np.full_like(images[0], 255))
    lines = []
    for first in range(0, len(images), COLUMNS):
        line = images[first : first + COLUMNS]
        lines.append(np.hstack(line))
    sheet = Image.fromarray(np.vstack(lines))
    sheet.save(f"docs/images/benchmark/{settings['assets']}.jpg", quality=75, optimize=True)


if __name__ == "__main__":
    tyro.cli(main)
