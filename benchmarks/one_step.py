"""The picture of docs/walkthrough.md, docs/images/one_step.png, and the numbers of its text.

    python benchmarks/one_step.py    # a few seconds

One episode of checkpoints/tiny-warmup at temperature 1, the first one of `main` that it solves with
a grasp before the object is on the plate: one step in full, and the pictures where it is rewarded.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.model.checkpoints import load_vla  # noqa: E402
from common.simulation.episodes import evaluation_ids  # noqa: E402
from common.simulation.vec_env import make_envs  # noqa: E402
from ppo_vla import gae  # noqa: E402

NAMES = ("dx", "dy", "dz", "roll", "pitch", "yaw", "gripper")
GOOD = 5  # steps of success after which a training episode ends


def play(model, envs, episode_id):
    """What one episode shows, does and gets: pictures, tokens, log-probs, rewards, instruction."""
    obs, infos = envs.reset([iter([episode_id])])
    text, generator = infos["instruction"], torch.Generator().manual_seed(int(episode_id))
    pictures, tokens, logprobs, rewards, successes = [obs[0]], [], [], [], 0
    while len(rewards) < 40 and successes < GOOD:
        action, _, _ = model.act(obs, text, 1.0, [generator])
        logprobs.append(model.bin_logprobs(obs, text, action, 1.0)[0][0].detach())
        obs, reward, _, _, infos = envs.step(model.decode_actions(action))
        successes = successes + 1 if infos["success"][0] else 0
        tokens.append(action[0] - model.bins.start)
        pictures.append(obs[0])
        rewards.append(float(reward[0]))
    return pictures, tokens, logprobs, np.round(rewards, 3), text[0]


def draw(pictures, tokens, logprobs, rewards, text, step, output):
    figure = Figure((9.6, 4.9), layout="constrained")
    upper, lower = figure.add_gridspec(2, 1, height_ratios=(1.8, 1))
    seen, chosen = upper.subgridspec(1, 2, width_ratios=(1.1, 1.4))
    axes = figure.add_subplot(seen)
    axes.imshow(pictures[step], interpolation="nearest")
    for side, line in ((60, axes.axhline), (80, axes.axvline)):
        for place in range(16, side, 16):
            line(place - 0.5, color="white", linewidth=0.5, alpha=0.7)
    axes.set_title(f'"{text}"\n(60, 80, 3) uint8 -> 20 image tokens')
    axes.set_axis_off()
    said = logprobs[step][torch.arange(7), tokens[step]]
    for i, cell in enumerate(chosen.subgridspec(7, 1, hspace=0)):
        axes, token = figure.add_subplot(cell), int(tokens[step][i])
        axes.bar(np.arange(256), logprobs[step][i].exp(), width=2.5, color="0.55")
        axes.plot(token, 1, "v", color="red", markersize=4)
        axes.set(xlim=(-4, 260), ylim=(0, 1.2), yticks=[], xticks=[])
        axes.set_ylabel(NAMES[i], rotation=0, ha="right", va="center")
        axes.text(264, 0.3, f"{said[i]:.2f}")
        axes.spines[["top", "right"]].set_visible(False)
        if i == 0:
            sum_of = f"log-probs sum to {said.sum():.2f} nats"
            axes.set_title(f"model.act: 7 x 256 probabilities, one token each,\n{sum_of}")
    axes.set_xticks([0, 128, 255], ["bin 0: high", "128: middle", "255: low"])
    grasped, held, placed = np.flatnonzero(rewards > 0.05)[:3]
    shown = {0: "first picture", step: "the picture above", grasped + 1: "grasped: +0.1"}
    shown |= {held + 1: "held for 5 steps: +0.1", placed + 1: "on the plate: +1.0"}
    shown[len(pictures) - 1] = f"{GOOD} steps of success: end"
    for cell, number in zip(lower.subgridspec(1, 6), sorted(shown), strict=True):
        axes = figure.add_subplot(cell)
        axes.imshow(pictures[number], interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"after step {number - 1}" if number else "before step 0", fontsize=9)
        axes.text(0.5, -0.05, shown[number], transform=axes.transAxes, ha="center", va="top")
    figure.savefig(output, dpi=110)
    small = Image.open(output).convert("RGB").quantize(200, dither=Image.Dither.NONE)
    small.save(output, optimize=True)


def main(model: str = "checkpoints/tiny-warmup", output: str = "docs/images/one_step.png"):
    os.chdir(Path(__file__).parent.parent)
    vla, envs = load_vla(model, trainable=False), make_envs(1, task="main")
    for episode_id in evaluation_ids("main", "train", 192):
        found = play(vla, envs, episode_id)
        rewards = found[3]
        gains = np.flatnonzero(rewards > 0.05)
        if len(gains) == 3 and len(rewards) < 25 and gains[0] > 3 and (rewards >= 0).all():
            break
    envs.close()
    said = [p[torch.arange(7), token].sum() for token, p in zip(*found[1:3], strict=True)]
    step = 1 + int(np.argmin(said[1 : gains[0]]))  # the least likely one before the grasp
    draw(*found, step, output)
    count = torch.zeros(len(rewards), 1)
    dones = count.clone()
    dones[-1] = 1
    given = torch.tensor(rewards, dtype=torch.float32)[:, None]
    advantages, _ = gae(given, count, dones, torch.zeros(1), 0.99, 0.8)
    print(f"episode {episode_id}: {found[4]}; rewards and advantages by step:")
    for number, (reward, advantage) in enumerate(zip(rewards, advantages[:, 0], strict=True)):
        print(number, reward, f"{advantage:.2f}")


if __name__ == "__main__":
    tyro.cli(main)
