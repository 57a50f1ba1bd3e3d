"""Graded shifts between the benchmark's rows: weaker textures and noise, nearer positions.

    python benchmarks/levels.py --checkpoint runs/sft runs/ppo --output results/NAME/levels.json

The benchmark's rows stay as they are; where one of them is at its floor for every policy, these
still tell policies apart. Textures and noise: the episodes of the rows, at weights .1 and .2.
Positions: what lies in the ring around the trained square comes half as far out. Success at the
last step, temperature .6, every episode once.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.model.checkpoints import load_vla  # noqa: E402
from common.run.evaluate import TEMPERATURE, episode_generators  # noqa: E402
from common.run.files import read_json, write_atomic  # noqa: E402
from common.run.ranks import setup_ranks  # noqa: E402
from common.simulation.env import CAMERA, SCENES, make_env  # noqa: E402
from common.simulation.episodes import evaluation_ids  # noqa: E402
from common.simulation.tasks import decode  # noqa: E402
from scripts.provenance import find_model, short_names  # noqa: E402

LEVELS = {  # name: task, weight of the texture
    "texture_.1": ("vision_texture03", 0.1),
    "texture_.2": ("vision_texture03", 0.2),
    "noise_.1": ("vision_whole03", 0.1),
    "noise_.2": ("vision_whole03", 0.2),
    "near_position": ("position", 0.0),
}
BLOCK = 16  # episodes that run in step


@dataclass
class Args:
    checkpoint: tuple[str, ...]  # models, or runs: their best, else latest checkpoint
    output: str  # a JSON file
    num_episodes: int = 192  # per level


def shifted(name, episode_id):
    """`Episodes` of one episode of a level."""
    task, ratio = LEVELS[name]
    e = decode(task, "test", np.array([episode_id]))
    if name == "near_position":
        middle, half = np.float32([-0.16, 0.0]), 0.075  # of the square, metres
        for xyz in (e.object_xyz, e.plate_xyz):
            off = xyz[:, :2] - middle
            xyz[:, :2] = middle + (off + off.clip(-half, half)) / 2
    return replace(e, ratio=ratio)


@torch.no_grad()
def success(model, envs, name, ids):
    """list of 0 and 1: success at the last step of each episode."""
    found = []
    for part in tqdm(np.split(ids, range(BLOCK, len(ids), BLOCK)), desc=name):
        texts, pictures, generators = [], [], episode_generators(part)
        for env, number in zip(envs, part, strict=False):
            obs, _ = env.reset(options={"episodes": shifted(name, number)})
            texts += env.instructions()
            pictures.append(obs["sensor_data"][CAMERA]["rgb"])
        for _ in range(SCENES["small"]["max_episode_steps"]):
            tokens, _, _ = model.act(torch.cat(pictures), texts, TEMPERATURE, generators)
            actions = model.decode_actions(tokens)
            actions[:, 6] = torch.where(actions[:, 6] > 0.5, 1.0, -1.0)
            steps = [env.step(row[None]) for env, row in zip(envs, actions, strict=False)]
            pictures = [obs["sensor_data"][CAMERA]["rgb"] for obs, *_ in steps]
        found += [int(info["success"]) for *_, info in steps]
    return found


def main(args):
    setup_ranks("cpu")
    envs = [make_env(**SCENES["small"]) for _ in range(BLOCK)]
    for name, checkpoint in zip(short_names(args.checkpoint), args.checkpoint, strict=True):
        model, rows = load_vla(find_model(checkpoint), trainable=False), {}
        for level in LEVELS:
            ids = evaluation_ids(LEVELS[level][0], "test", args.num_episodes)
            rows[level] = {"success": success(model, envs, level, ids), "episode_ids": ids.tolist()}
        print(name, {level: np.mean(row["success"]) for level, row in rows.items()})
        old = read_json(Path(args.output)) if Path(args.output).exists() else {}
        write_atomic(Path(args.output), json.dumps(old | {name: rows}))


if __name__ == "__main__":
    main(tyro.cli(Args))
