"""The pictures of docs/benchmark.md: the first frame of an evaluation episode of every row, one sheet per asset pack.

python benchmarks/gallery.py --assets primitive
"""

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.run.evaluate import evaluation_ids
from common.simulation.tasks import REPORT_ROWS, get_task
from common.simulation.vec_env import make_envs

COLUMNS, CAPTION = 4, 44  # tiles per row; pixels under a tile


def main(assets: Literal["primitive", "bridge"] = "primitive", episode: int = 0, output: str = "docs/images/benchmark"):
    """Render and write OUTPUT/ASSETS.jpg.

    Args:
        assets: embedded bodies, or the real ones under MS_ASSET_DIR.
        episode: place in the evaluation list of every row.
        output: directory.
    """
    envs = make_envs(num_envs=1, assets=assets, image_size=(640, 480), shader_pack="default", num_workers=1)
    tiles = []
    for row, _, task, split, *_ in REPORT_ROWS:
        envs.set_task(task, split)
        images, instructions = envs.reset(evaluation_ids(task, split, episode + 1)[-1:])
        tiles.append((images[0], f"{row}  ({task} {split})", instructions[0]))
        move_at = get_task(task).move_at[split == "test"]
        if move_at:  # show it after the move too; the arm stands still
            for _ in range(move_at + 1):
                images, *_ = envs.step(np.array([[0, 0, 0, 0, 0, 0, 1]], np.float32))
            tiles.append((images[0], f"{row}, after the move", f"step {move_at + 1}"))
    envs.close()

    width, height = 320, 240 + CAPTION
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(tiles) // COLUMNS) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (image, title, text) in enumerate(tiles):
        x, y = number % COLUMNS * width, number // COLUMNS * height
        sheet.paste(Image.fromarray(image).resize((width - 4, 237), Image.LANCZOS), (x, y))
        draw.text((x + 2, y + 239), title, "black", font)
        draw.text((x + 2, y + 257), text, "#0072B2", font)
    path = Path(output) / f"{assets}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=88)
    print(f"{path}: {len(tiles)} frames, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    tyro.cli(main)
