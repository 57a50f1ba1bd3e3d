"""Success against environment steps of several runs in one figure: the curves of README and docs.

python benchmarks/curves.py PPO=results/ppo/seed1,results/ppo/seed2 --output figure.png
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.run.evaluate import wilson


def read(run, key):
    """(steps, values) of a metric in RUN/metrics.jsonl."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if not pairs:
        raise ValueError(f"{run}/metrics.jsonl has no {key}; was it trained with --eval-every 0?")
    return np.array(pairs).T


def main(groups: tyro.conf.Positional[tuple[str, ...]], output: str = "docs/images/curves.png", task: str = "main"):
    """Draw and print a table.

    Args:
        groups: LABEL=RUN,RUN,...: directories with metrics.jsonl, one per seed.
        output: the figure. Left: episodes of training at the rollout's temperature, each seed and their mean over 5
            iterations. Right: the mean of the seeds on the paired evaluation list at temperature 0.6; Wilson 95 % of
            one list, because seeds share its episodes. How much seeds differ it does not show: the left side does.
        task: that of the evaluation.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    print("| | seeds | environment steps | success at end, start | end [95 %] |\n|---|---|---|---|---|")
    for number, group in enumerate(groups):
        label, _, names = group.partition("=")
        runs, color = names.split(","), f"C{number}"
        for k, run in enumerate(runs):
            steps, values = read(run, "train/success_at_end")
            smooth = [values[max(0, i - 4) : i + 1].mean() for i in range(len(values))]
            left.plot(steps, values, color=color, alpha=0.15, linewidth=0.8)
            left.plot(steps, smooth, color=color, label=label if k == 0 else None)
        curves = [read(run, f"eval/{task}/success_at_end") for run in runs]
        episodes = read(runs[0], f"eval/{task}/episodes")[1][0]
        common = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
        mean = np.array([np.mean([dict(curve.T)[step] for curve in curves]) for step in common])
        low, high = np.array([wilson(p * episodes, episodes) for p in mean]).T
        right.plot(common, mean, "o-", color=color, markersize=3, label=label)
        right.fill_between(common, low, high, color=color, alpha=0.15)
        interval = f"{mean[-1]:.2f} [{low[-1]:.2f}, {high[-1]:.2f}]"
        print(f"| {label} | {len(runs)} | {common[-1]:,.0f} | {mean[0]:.2f} | {interval} |")
    left.set_title("training episodes, temperature of the rollouts")
    right.set_title("held-out episodes, temperature 0.6")
    for axis in (left, right):
        axis.set(xlabel="environment steps", ylim=(0, 1))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        axis.legend()
    left.set_ylabel("success at the last step")
    figure.tight_layout()
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
