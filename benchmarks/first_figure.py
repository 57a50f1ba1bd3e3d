"""The first figure of README.md, docs/images/first.png, from committed results.

    python benchmarks/first_figure.py                                    # curves anew
    python benchmarks/first_figure.py --before checkpoints/tiny-warmup --after runs/NAME/best-000030

Left: success on held-out episodes of PPO; its start and cloning on the same episodes.
Right: docs/images/strip.jpg, one held-out episode with both policies. With --before and --after
it is made anew, of the first episode of eval_ood.py's list that only the second policy solves.
"""

import sys
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.curves import draw, held_out  # noqa: E402
from common.model.checkpoints import load_vla  # noqa: E402
from common.run.evaluate import TEMPERATURE, episode_generators, run_episodes  # noqa: E402
from common.simulation.episodes import evaluation_ids  # noqa: E402
from common.simulation.vec_env import make_envs  # noqa: E402

RUNS = {"PPO": ["results/small/ppo-1"]}
START = "results/small/ppo-1"  # begins with the evaluation of the shipped start
CLONING = "results/small/clone/metrics.jsonl"
STRIP = Path("docs/images/strip.jpg")
COLUMNS = 4  # pictures of each policy, from the first of the episode to the last
WIDTH, HEIGHT, CAPTION = 320, 240, 36  # of a picture of the strip, pixels


def record(start, envs, episode_ids):
    """Success (E,), pictures and instructions of episodes (E,) with the policy of a checkpoint."""
    model = load_vla(start, trainable=False)
    generators = episode_generators(episode_ids)

    def policy(obs, instructions, rows):
        draws = [generators[row] for row in rows]
        tokens, _, _ = model.act(obs, instructions, TEMPERATURE, draws)
        return model.decode_actions(tokens)

    results = run_episodes(policy, envs, episode_ids, record=len(episode_ids))
    return results["success_at_end"], results["frames"], results["instruction"]


def film_strip(before, after, num_episodes):
    """Write STRIP: above the episode with the policy `before`, below with `after`."""
    envs = make_envs(8, task="carrot")
    episode_ids = evaluation_ids("carrot", "train", num_episodes)
    solved_before, frames_before, _ = record(before, envs, episode_ids)
    solved_after, frames_after, instructions = record(after, envs, episode_ids)
    envs.close()
    row = np.flatnonzero(~solved_before & solved_after)[0]
    print(
        f"of {num_episodes} episodes {solved_before.sum()} before, {solved_after.sum()} after; ",
        end="",
    )
    print(f"shown: number {row} of the list, episode {episode_ids[row]}")
    strip = Image.new("RGB", (COLUMNS * WIDTH, 2 * (HEIGHT + CAPTION)), "white")
    draw_text = ImageDraw.Draw(strip).text
    iterations = int(Path(after).name[-6:])
    texts = (f"{instructions[row]}: the start fails", f"after {iterations} iterations of PPO")
    for line, frames in enumerate((frames_before[row], frames_after[row])):
        y = line * (HEIGHT + CAPTION)
        draw_text((0, y + 2), texts[line], "black", ImageFont.load_default(26))
        times = np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)
        for column, time in enumerate(times):
            picture = Image.fromarray(frames[time]).resize((WIDTH - 4, HEIGHT))
            strip.paste(picture, (column * WIDTH, y + CAPTION))
    strip.save(STRIP, quality=85)


def main(before: str = "", after: str = "", num_episodes: int = 16):
    """before, after: a model directory and a checkpoint-N or best-N; they renew the film strip."""
    if before and after:
        film_strip(before, after, num_episodes)
    figure = Figure((12, 3.4), dpi=100, layout="constrained")
    if STRIP.exists():
        axes, right = figure.subplots(1, 2, width_ratios=(2, 3))
        right.imshow(Image.open(STRIP))
        right.set_axis_off()
    else:
        axes = figure.subplots()
    draw(axes, RUNS)
    cloning = held_out(CLONING)[1][-1]
    start = held_out(f"{START}/metrics.jsonl")[1][0]
    axes.axhline(cloning, color="0.2", linestyle="--", label="cloning, no RL")
    axes.axhline(start, color="0.2", linestyle=":", label="start")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig("docs/images/first.png")


if __name__ == "__main__":
    tyro.cli(main)
