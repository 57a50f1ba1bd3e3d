"""Download the published assets from their authors: `python scripts/fetch_assets.py --dir DIR`.

They go to DIR/data. Set MS_ASSET_DIR=DIR to use them (`--scene published`).
"""

import os
import shlex
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import tyro
from mani_skill.utils import download_asset
from mani_skill.utils.assets.data import DATA_SOURCES

from common.simulation.assets import load_pack

REPOSITORY, COMMIT = "https://github.com/gen-robot/RL4VLA", "55f966d"
FOLDER = "ManiSkill/mani_skill/assets/carrot"


def main(dir: Path):
    """Download the robot, the table and the bodies of the published benchmark.

    Args:
        dir: folder to set MS_ASSET_DIR to; the files go to its data/.
    """
    root = dir.expanduser().resolve()
    data = root / "data"
    for uid in ("bridge_v2_real2sim", "widowx250s"):
        source = replace(DATA_SOURCES[uid], output_dir=data)
        print(f"{source.url} -> {data / source.target_path}", flush=True)
        download_asset.download(source)
    print(f"{FOLDER} of {REPOSITORY} at {COMMIT} -> {data / 'rl4vla'}", flush=True)
    with tempfile.TemporaryDirectory() as clone:
        clone_options = ["--filter=blob:none", "--no-checkout"]
        subprocess.run(["git", "clone", *clone_options, REPOSITORY, clone], check=True)
        subprocess.run(["git", "-C", clone, "sparse-checkout", "set", FOLDER], check=True)
        subprocess.run(["git", "-C", clone, "checkout", "--quiet", COMMIT], check=True)
        for kind in ("more_carrot", "more_plate", "more_table"):
            copytree(Path(clone, FOLDER, kind), data / "rl4vla" / kind, dirs_exist_ok=True)
    os.environ["MS_ASSET_DIR"] = str(root)
    load_pack("bridge")  # says what is missing
    print(f"complete; use it with: export MS_ASSET_DIR={shlex.quote(str(root))}")


if __name__ == "__main__":
    tyro.cli(main)
