"""Success of cloning against demonstrations: docs/images/data_scaling.png and the table beside it.

    python benchmarks/data_scaling.py

Supports "Data scaling" of docs/sft_vla.md. Reads results/sft/N/results.json of eval_ood.py;
bands are Wilson 95 % intervals of a dimension's pooled episodes.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.curves import COLOURS  # noqa: E402
from common.run.evaluate import wilson  # noqa: E402
from scripts.report import outcomes  # noqa: E402

NUMBERS = (125, 250, 500, 1000)
DIMENSIONS = {
    "in_distribution": "in distribution", "vision": "vision", "semantics": "semantics",
    "execution": "execution", "ood": "all out of distribution",
}  # fmt: skip


def main():
    rates = []
    for number in NUMBERS:
        results = json.loads(Path(f"results/sft/{number}/results.json").read_text(encoding="utf-8"))
        (policy,) = results["policies"].values()
        success = outcomes(policy["rows"])
        rates.append({})
        for name in DIMENSIONS:
            k, n = success[name].sum(), len(success[name])
            rates[-1][name] = (k / n, *wilson(k, n))
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*rates[-1][name]) for name in DIMENSIONS]
        print(f"| {number:,} | {' | '.join(cells)} |")
    figure = Figure((7, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel="demonstrations", ylabel="success at the last step")
    for (name, label), colour in zip(DIMENSIONS.items(), COLOURS, strict=False):
        success, low, high = zip(*(rate[name] for rate in rates), strict=True)
        axes.plot(NUMBERS, success, "o-", color=colour, label=label)
        axes.fill_between(NUMBERS, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xscale="log", ylim=(0, 1))
    axes.set_xticks(NUMBERS, [f"{number:,}" for number in NUMBERS])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig("docs/images/data_scaling.png")


if __name__ == "__main__":
    main()
