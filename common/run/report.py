"""What an evaluation says: means per dimension, paired tests, `report.md` and `figure.png`.

All of it is a function of `results.json` (fields: docs/eval_ood.md), so a report can be made again without a simulator:
python -m common.run.report results/NAME
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.run.evaluate import wilson
from common.run.runs import write_atomic

OOD = ("vision", "semantics", "execution")
DIMENSIONS = {"id": "ID", "vision": "Vision", "semantics": "Semantics", "execution": "Execution", "ood": "all OOD"}
MEMBERS = {name: OOD if name == "ood" else (name,) for name in DIMENSIONS}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito, colour-blind safe
PAPERS = {"sft": "0.6", "ppo": "0.15"}  # columns of the study (Liu et al. 2025) and their greys
PROTOCOL = dict(image_size=[640, 480], sim_freq=500, solver_iterations=15, max_episode_steps=80, fidelity="published",
                shader_pack="default", temperature=0.6, sim_device="cuda")  # fmt: skip


# --- statistics ---
def mcnemar(only_a: int, only_b: int) -> float:
    """p of the two-sided exact McNemar test; only_a, only_b: episodes where only that policy succeeded."""
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment (1979), in the order given: rejecting below 0.05 errs in at most 5 % of families."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def paired_difference(only_a: int, only_b: int, n: int) -> tuple[float, float, float]:
    """(difference b - a, low, high), 95 %, n paired episodes; half an episode per cell (Agresti & Min 2005)."""
    b, c, m = only_b + 0.5, only_a + 0.5, n + 2
    half = 1.959964 * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return (only_b - only_a) / n, max(-1.0, (b - c) / m - half), min(1.0, (b - c) / m + half)


def compare(rows_a: dict, rows_b: dict) -> list[dict]:
    """Paired tests of policy b against policy a: one entry per row, then one per dimension and one for all OOD rows.

    Row: exact McNemar test over its episodes. Dimension: the exact McNemar test stratified by row; discordant pairs are
    counted within rows and summed, which is exact because every row has probability 1/2 under equality. p_holm is
    adjusted over the rows and, apart, over the dimensions. ValueError if the two saw different episodes.
    """
    counts: dict[str, dict[str, tuple]] = {"task": {}, "dimension": {}}
    for name, a in rows_a.items():
        if a["episode_ids"] != rows_b[name]["episode_ids"]:
            raise ValueError(f"{name}: different episode ids; a paired test needs the same: run both with one --seed")
        pairs = list(zip(a["success"], rows_b[name]["success"], strict=True))
        counts["task"][name] = (pairs.count((1, 0)), pairs.count((0, 1)), len(pairs))
    for group, members in MEMBERS.items():
        cells = [counts["task"][name] for name, row in rows_a.items() if row["dimension"] in members]
        if cells and group != "id" and (group != "ood" or len(counts["dimension"]) > 1):  # of one, ood is the same
            counts["dimension"][group] = tuple(map(sum, zip(*cells, strict=True)))
    tests = []
    for kind, items in counts.items():
        p_values = [mcnemar(only_a, only_b) for only_a, only_b, _ in items.values()]
        for (name, (only_a, only_b, n)), p, p_holm in zip(items.items(), p_values, holm(p_values), strict=True):
            difference, low, high = paired_difference(only_a, only_b, n)
            test = dict(kind=kind, name=name, n=n, only_a=only_a, only_b=only_b, difference=difference)
            tests.append(test | dict(low=low, high=high, p=p, p_holm=p_holm, significant=p_holm < 0.05))
    return tests


def dimension_means(rows: dict) -> dict[str, dict]:
    """Unweighted means over the rows of each dimension and, as "ood", over all rows but in_distribution.

    Returns {dimension: {rows (how many), k, n, success_at_end, wilson (of the pooled counts: conservative when rows
    differ), drop (own ID minus this; None for ID or without it), paper (means of {"sft", "ppo"}; empty without)}}.
    """
    means: dict[str, dict] = {}
    for name, members in MEMBERS.items():
        if group := [row for row in rows.values() if row["dimension"] in members]:
            k, n = sum(row["k"] for row in group), sum(row["n"] for row in group)
            mean = float(np.mean([row["success_at_end"] for row in group]))
            drop = means["id"]["success_at_end"] - mean if "id" in means else None
            means[name] = dict(rows=len(group), k=k, n=n, success_at_end=mean, wilson=wilson(k, n), drop=drop)
            means[name]["paper"] = {k: float(np.mean([row["paper"][k] for row in group])) for k in group[0]["paper"]}
    return means


# --- report.md ---
def report_text(results: dict) -> str:
    """The report as Markdown: the paper's table, drops, details per policy, paired comparisons, protocol."""
    policies, config = list(results["policies"].values()), results["config"]
    rows, dimensions = policies[0]["rows"], policies[0]["dimensions"]
    papers, table = list(next(iter(rows.values()))["paper"]), []
    for name, row in rows.items():
        table.append([DIMENSIONS[row["dimension"]], _words(name), *_cells([p["rows"][name] for p in policies], papers)])
    for name in list(dimensions)["id" in dimensions :]:  # "id" comes first
        means = [p["dimensions"][name] for p in policies]
        table.append(["", f"**mean, {DIMENSIONS[name]}** ({means[0]['rows']} tasks)", *_cells(means, papers)])
        if "id" in dimensions:
            drops = [m["drop"] for m in means]
            drops += [dimensions["id"]["paper"][key] - means[0]["paper"][key] for key in papers]
            table.append(["", "drop against own ID, points", *(f"{100 * drop:.1f}" for drop in drops)])
    head = ["dimension", "task", *results["policies"], *(f"paper {key.upper()}" for key in papers)]
    text = f"""# Generalisation benchmark, asset pack `{config["assets"]}`

Success at the last step [Wilson 95 % interval]; {config["num_episodes"]} episodes per task. Means are unweighted over
tasks; their intervals are Wilson's on the pooled episodes.

{_table(head, table)}
![success per task and per dimension](figure.png)
"""
    if papers:
        here = dict(shader_pack="minimal", sim_device="cpu") | config  # reports of before the keys were kept
        differs = [f"{key} {here[key]} (paper {value})" for key, value in PROTOCOL.items() if here[key] != value]
        text += "\nPaper: OpenVLA-7B, SFT on 16,384 demos, PPO; 192 unpaired episodes, temperature 0.6, GPU simulation."
        text += f" This run: {'; '.join(differs) or 'the same protocol'}.\n"
    keys = ("success_at_end", "success_once", "grasped", "held", "return", "minutes")
    for name, policy in results["policies"].items():
        table = [[_words(n), f"{r['k']}/{r['n']}", *(f"{r[k]:.3f}" for k in keys)] for n, r in policy["rows"].items()]
        table = _table(["task", "k/n", *map(_words, keys)], table)
        text += f"\n## {name}\n\n`{policy['checkpoint'] or config['policy']}`\n\n{table}"
    for a, b, tests in ((c["a"], c["b"], c["tests"]) for c in results["comparisons"]):
        table, head = [], ["", "", "difference, points", f"only {a}", f"only {b}", "p", "p, Holm", "significant"]
        for t in tests:
            points = f"{100 * t['difference']:+.1f} [{100 * t['low']:+.1f}, {100 * t['high']:+.1f}]"
            marks = [f"{t['p']:.2g}", f"{t['p_holm']:.2g}", "**yes**" if t["significant"] else "no"]
            table.append([t["kind"], _words(t["name"]), points, t["only_a"], t["only_b"], *marks])
        text += f"""
## {b} against {a}

Same episodes for both. Task: two-sided exact McNemar test. Dimension: exact McNemar test stratified by task (discordant
episodes counted within tasks, then summed). Holm-adjusted over the tasks and, apart, over the dimensions; significant:
adjusted p < 0.05. Intervals of the paired difference: Agresti-Min, 95 %, not adjusted.

{_table(head, table)}"""
    protocol = [f"- {_words(key)}: {value}" for key, value in config.items()]
    protocol += sorted({f"- {row['hardware']}; commit {row['commit']}" for p in policies for row in p["rows"].values()})
    return "\n".join([text, "## Protocol\n", *protocol, ""])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cells(entries: list[dict], papers: list[str]) -> list[str]:
    cells = ["{:.3f} [{:.3f}, {:.3f}]".format(entry["success_at_end"], *entry["wilson"]) for entry in entries]
    return cells + [f"{entries[0]['paper'][key]:.3f}" for key in papers]


def _table(head: list, rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


# --- figure.png ---
def figure(results: dict) -> Figure:
    """Bars with Wilson intervals per task; beside them a radar of the three dimensions when all were run."""
    policies, config = results["policies"], results["config"]
    rows, dimensions = (next(iter(policies.values()))[key] for key in ("rows", "dimensions"))
    radar, papers = all(d in dimensions for d in OOD), next(iter(rows.values()))["paper"]
    labels = [row["dimension"] for row in rows.values()]
    starts = [labels.index(d) for d in dimensions if d != "ood"]  # rows come sorted by dimension
    y = np.arange(len(rows)) + 0.8 * np.searchsorted(starts, np.arange(len(rows)), side="right")  # room for headings
    fig = Figure((14 if radar else 9, 2.4 + y[-1] * (0.3 + 0.1 * len(policies))), dpi=110, layout="constrained")
    fig.suptitle("{assets} assets, {num_episodes} episodes per task, temperature {temperature}".format(**config))
    grid = fig.add_gridspec(1, 2, width_ratios=(3, 2) if radar else (1, 1e-3))
    bars, thickness = fig.add_subplot(grid[0, 0]), 0.8 / len(policies)
    for i, (label, policy) in enumerate(policies.items()):
        value, low, high = np.array([(r["success_at_end"], *r["wilson"]) for r in policy["rows"].values()]).T
        at, error = y - 0.4 + thickness * (i + 0.5), np.abs([low - value, high - value])
        bars.barh(at, value, 0.9 * thickness, color=COLOURS[i % len(COLOURS)], label=label)
        bars.errorbar(value, at, xerr=error, fmt="none", ecolor="0.25", elinewidth=1.2, capsize=2)
        for number, where in zip(value, at, strict=True):
            bars.text(1.03, where, f"{number:.2f}", va="center", fontsize=8)
    for key in papers:
        value, style = [row["paper"][key] for row in rows.values()], dict(marker="|", linewidths=2.5, zorder=3)
        bars.scatter(value, y, 150, PAPERS[key], label=f"paper {key.upper()}", **style)
    for i in starts:
        bars.text(0, y[i] - 0.55, f" {DIMENSIONS[labels[i]]}", weight="bold", va="bottom")
    bars.set(xlim=(0, 1.1), ylim=(y[-1] + 0.7, y[0] - 1.3), xlabel="success at the last step, Wilson 95 % interval")
    bars.set(xticks=np.linspace(0, 1, 6), yticks=y, yticklabels=map(_words, rows))
    bars.spines[["top", "right"]].set_visible(False)
    bars.grid(axis="x", alpha=0.3)
    fig.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    if radar:
        axes, angles = fig.add_subplot(grid[0, 1], projection="polar"), np.pi / 2 - 2 * np.pi / 3 * np.arange(4)
        curves = [[p["dimensions"][d]["success_at_end"] for d in OOD] for p in policies.values()]
        for i, values in enumerate(curves):
            axes.plot(angles, values + values[:1], color=COLOURS[i % len(COLOURS)], linewidth=2)
            axes.fill(angles, values + values[:1], color=COLOURS[i % len(COLOURS)], alpha=0.08)
        for key in papers:
            axes.plot(angles, [dimensions[d]["paper"][key] for d in (*OOD, OOD[0])], "--", color=PAPERS[key])
        numbers = [" / ".join(f"{value:.2f}" for value in values) for values in zip(*curves, strict=True)]
        axes.set_xticks(angles[:3] % (2 * np.pi), [f"{DIMENSIONS[d]}\n{n}" for d, n in zip(OOD, numbers, strict=True)])
        axes.tick_params(axis="x", pad=18)
        axes.set(ylim=(0, 1), yticks=np.linspace(0.2, 1, 5), title="mean success per dimension\n")
    return fig


# --- files ---
def make(directory: Path) -> None:
    """Write report.md and figure.png from directory/results.json."""
    results = json.loads((directory / "results.json").read_text())
    write_atomic(directory / "report.md", lambda path: path.write_text(report_text(results)))
    write_atomic(directory / "figure.png", figure(results).savefig)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
