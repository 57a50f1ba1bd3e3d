"""What fine-tuning kept of its start: the KL to it, and pointing, which no fine-tuning trains.

    python benchmarks/kept.py --checkpoint runs/sft runs/ppo --output results/NAME/kept.json

KL: nats per action of the policy's own actions against the start's, at temperature 1, on the first
pictures of each row's evaluation. Pointing: errors in mm on validation scenes of tiny/pointing.py,
asked as in the pre-training; in the row of random bodies no training has shown the bodies.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.model.checkpoints import load_vla, locate  # noqa: E402
from common.run.evaluate import episode_generators  # noqa: E402
from common.run.files import read_json, write_atomic  # noqa: E402
from common.run.ranks import setup_ranks  # noqa: E402
from common.simulation.episodes import evaluation_ids  # noqa: E402
from common.simulation.tasks import REPORT_ROWS  # noqa: E402
from common.simulation.vec_env import make_envs  # noqa: E402
from scripts.provenance import find_model, short_names  # noqa: E402
from tiny.pretrain import errors, load  # noqa: E402


@dataclass
class Args:
    checkpoint: tuple[str, ...]  # models, or runs: their best, else latest checkpoint
    output: str  # a JSON file
    start: str = "checkpoints/tiny-warmup"
    base: str = "checkpoints/tiny-pretrained"  # whose statistics decode places
    scenes: str = "demos/pointing/validation.h5"
    num_episodes: int = 48  # per row


def first_pictures(num_episodes):
    """dict row -> images (E, H, W, 3), instructions, episode ids."""
    envs, found = make_envs(16), {}
    for row, _, task, split, *_ in REPORT_ROWS:
        envs.set_task(task, split)
        ids, images, texts = evaluation_ids(task, split, num_episodes), [], []
        for part in np.split(ids, range(16, num_episodes, 16)):
            streams = [iter(part[n : n + 1]) for n in range(16)]
            obs, infos = envs.reset(streams, whole_episodes=True)
            images.append(obs[: len(part)])
            texts += infos["instruction"][: len(part)]
        found[row] = np.concatenate(images), texts, ids
    envs.close()
    return found


@torch.no_grad()
def kl_to(start, policy, images, texts, ids):
    """Mean over episodes, nats per action: exact at each token, given the tokens before it."""
    tokens, _, _ = policy.act(images, texts, 1.0, episode_generators(ids))
    logp, logq = (model.bin_logprobs(images, texts, tokens)[0] for model in (policy, start))
    return (logp.exp() * (logp - logq)).sum((1, 2)).mean().item()


def main(args):
    setup_ranks("cpu")
    start, scenes = load_vla(args.start, trainable=False), load(Path(args.scenes))
    rows, found = first_pictures(args.num_episodes), {}
    statistics = locate(args.base).norm_stats["pointing"]
    for name, checkpoint in zip(short_names(args.checkpoint), args.checkpoint, strict=True):
        model = load_vla(find_model(checkpoint), trainable=False)
        kl = {row: kl_to(start, model, *pictures) for row, pictures in rows.items()}
        model.set_statistics("pointing", statistics)
        columns = ("pictures", "object_mm", "object_off", "receptacle_mm", "receptacle_off")
        table = {kind: dict(zip(columns, row, strict=True)) for kind, *row in errors(model, scenes)}
        found[name] = {"kl": kl, "pointing": table}
        print(f"{name}: KL {np.mean([*kl.values()]):.3f} nats per action")
        old = read_json(Path(args.output)) if Path(args.output).exists() else {}
        write_atomic(Path(args.output), json.dumps(old | found, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
