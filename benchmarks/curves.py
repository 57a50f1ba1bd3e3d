"""Success on held-out episodes against environment steps: the figures of results/ppo, equal_steps.

    python benchmarks/curves.py PPO=results/ppo/seed1,results/ppo/seed2 --output figure.png

Success counts at the last step of an episode, on the list that every run evaluates by itself.
"""

import json
from pathlib import Path

import tyro
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def held_out(path):
    """Steps and shares of success of the evaluations in a metrics.jsonl."""
    steps, successes = [], []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        # Until commit bb47261 the task stood in the name: eval/main/success_at_end
        success = row.get("eval/success_at_end", row.get("eval/main/success_at_end"))
        if success is not None:
            steps.append(row["step"])
            successes.append(success)
    if not steps:
        raise ValueError(f"{path} holds no evaluation; was it trained with --eval-every 0?")
    return steps, successes


def in_words(steps, _=None):
    """200000 -> 200k."""
    return f"{steps / 1000:.0f}k" if steps else "0"


def draw(axes, groups):
    """One line per run, one colour per group. groups: dict label -> list of run directories."""
    for (label, runs), colour in zip(groups.items(), COLOURS, strict=False):
        for run in runs:
            steps, successes = held_out(Path(run, "metrics.jsonl"))
            text = label if run == runs[0] else None
            axes.plot(steps, successes, "o-", color=colour, markersize=4, label=text)
    axes.set(ylim=(0, 1), xlabel="environment steps", ylabel="success on held-out episodes")
    axes.xaxis.set_major_formatter(in_words)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def main(
    groups: tyro.conf.Positional[tuple[str, ...]],
    output: str = "figure.png",
    most_steps: int | None = None,
):
    """Draw a figure.

    Args:
        groups: LABEL=RUN,RUN,...: directories with a metrics.jsonl, one per seed.
        most_steps: where the axis of environment steps ends.
    """
    parts = [group.partition("=") for group in groups]
    figure = Figure((7, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    draw(axes, {label: runs.split(",") for label, _, runs in parts})
    if most_steps:
        axes.set_xlim(right=1.02 * most_steps)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(output)


if __name__ == "__main__":
    tyro.cli(main)
