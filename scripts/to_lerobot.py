"""Convert demonstrations to a LeRobotDataset v3: ACT, SmolVLA, pi0 and others learn from it.

    python scripts/to_lerobot.py demos/main --output datasets/main --repo-id USER/main

It runs in lerobot's environment, with h5py, and imports nothing of this project. docs/demos.md says
what the dataset holds.
"""

import argparse
import io
import json
import os
import tempfile
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

FPS = 5
CAMERA = "3rd_view_camera"
AXES = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
# Nothing of the arm is recorded, but lerobot's policies read a state: this one says nothing. It has
# two numbers, since lerobot gives a single one back without its axis, and ACT fails.
NO_STATE = np.zeros(2, np.float32)


def read_episodes(directory):
    """Yield (instruction, labels (T, 7) float32, pictures: T of (H, W, 3) uint8) per episode.

    Raises: ValueError that names the directory.
    """
    try:
        header = json.loads(Path(directory, "trajectory.json").read_text(encoding="utf-8"))
        header["env_info"]  # tiny/pointing.py writes none: its seven numbers are no actions
        with h5py.File(Path(directory, "trajectory.h5")) as file:
            for entry in header["episodes"]:
                group = file[f"traj_{entry['episode_id']}"]
                key = "expert_actions" if "expert_actions" in group else "actions"
                labels = group[key][:].astype(np.float32)
                # The picture after the last action has no label
                files = group[f"obs/sensor_data/{CAMERA}/rgb"][: len(labels)]
                pictures = [np.asarray(Image.open(io.BytesIO(picture))) for picture in files]
                yield entry["instruction"], labels, pictures
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "is it of demonstrations/record.py, and whole?"
        raise ValueError(f"{directory}: {type(error).__name__} {error}; {fix}") from error


def main(args):
    # Here, so that this file can be read and tested without lerobot
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if args.output.exists():
        raise FileExistsError(f"{args.output} exists and is never overwritten; use another")
    _, _, pictures = next(read_episodes(args.demos))  # what is no recording is refused here
    features = {
        "observation.images.camera": {
            "dtype": "image",
            "shape": pictures[0].shape,
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["empty_0", "empty_1"]},
        "action": {"dtype": "float32", "shape": (7,), "names": AXES},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # The output appears when all is written
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        root = Path(folder, "dataset")
        dataset = LeRobotDataset.create(
            args.repo_id, FPS, features, root, robot_type="widowx", use_videos=False
        )
        try:
            for instruction, labels, pictures in read_episodes(args.demos):
                for label, picture in zip(labels, pictures, strict=True):
                    frame = {"action": label, "observation.state": NO_STATE, "task": instruction}
                    dataset.add_frame(frame | {"observation.images.camera": picture})
                dataset.save_episode()
        finally:
            dataset.finalize()  # after an error too: its writer would bring the folder back
        os.replace(root, args.output)
    print(f"{args.output}: {dataset.num_episodes} episodes, {dataset.num_frames} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demos", type=Path, help="directory of demonstrations/record.py")
    parser.add_argument("--output", type=Path, required=True, help="a new directory")
    parser.add_argument("--repo-id", required=True, help="USER/NAME: its name on the hub")
    main(parser.parse_args())
