"""Success of behaviour cloning against the number of demonstrations, in and out of distribution: the study's figure 6.

python benchmarks/data_scaling.py 125=results/sft/125 1000=results/sft/1000 --output docs/images/data_scaling.png

Reads results.json of eval_ood.py; prints the table of docs/sft_vla.md. Rows of a dimension are pooled for its interval.
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
from common.run.report import COLOURS, DIMENSIONS, dimension_means


def main(sets: tyro.conf.Positional[tuple[str, ...]], output: str = "docs/images/data_scaling.png"):
    """Draw and print a table.

    Args:
        sets: NUMBER=DIRECTORY: demonstrations, and where eval_ood.py wrote about the one policy cloned from them.
        output: the figure, a line with Wilson 95 % intervals per dimension.
    """
    means = {}
    for number, directory in (entry.split("=", 1) for entry in sets):
        policies = json.loads((Path(directory) / "results.json").read_text())["policies"]
        if len(policies) != 1:
            raise ValueError(
                f"{directory} compares {len(policies)} policies, {sorted(policies)}; give one of one policy"
            )
        means[int(number)] = dimension_means(next(iter(policies.values()))["rows"])
    numbers = sorted(means)
    figure, axis = plt.subplots(figsize=(7, 4))
    for colour, (key, label) in zip(COLOURS, DIMENSIONS.items(), strict=False):
        p = np.array([means[n][key]["success_at_end"] for n in numbers])
        low, high = np.array([means[n][key]["wilson"] for n in numbers]).T
        axis.plot(numbers, p, "o-", color=colour, label=label)
        axis.fill_between(numbers, low, high, color=colour, alpha=0.15)
    axis.set(xscale="log", xticks=numbers, xticklabels=numbers, ylim=(0, 1))
    axis.set(xlabel="demonstrations", ylabel="success at the last step")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    print("| demonstrations |", " | ".join(DIMENSIONS.values()), "|\n|---" * 1 + "|---" * len(DIMENSIONS) + "|")
    for n in numbers:
        cells = (means[n][key] for key in DIMENSIONS)
        print(
            f"| {n:,} |",
            " | ".join("{:.2f} [{:.2f}, {:.2f}]".format(c["success_at_end"], *c["wilson"]) for c in cells),
            "|",
        )


if __name__ == "__main__":
    tyro.cli(main)
