"""report.md and figure.png from results.json: `python scripts/report.py DIRECTORY`."""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest, norm
from tabulate import tabulate

from common.run.evaluate import wilson
from common.run.files import check, naming, read_json, write_atomic
from scripts.pictures import write_figure

ROW = {"dimension": str, "success": [int], "episode_ids": [int], "hardware": str, "commit": str}
OOD = ("vision", "semantics", "execution")
ABOUT = """# Generalisation benchmark

Success at the last step, Wilson's 95 % interval; a dimension pools its tasks, ood the dimensions.
a and b: same episodes, McNemar's exact test; p_holm is adjusted over dimensions and, apart, tasks.

![success](figure.png)
"""


def outcomes(rows):
    """dict of dimensions with several rows, then rows -> success (E,). rows: of results.json."""
    groups = {}
    for dimension in (*OOD, "ood"):
        members = OOD if dimension == "ood" else (dimension,)
        names = [name for name, row in rows.items() if row["dimension"] in members]
        if len(names) > 1 and names not in groups.values():
            groups[dimension] = names
    groups.update((name, [name]) for name in rows)
    success = {}
    for group, names in groups.items():
        success[group] = np.concatenate([rows[name]["success"] for name in names])
    return success


def holm(p_values):
    """Holm's step-down adjustment (1979): rejecting below 0.05 errs in at most 5 % of families."""
    order = np.argsort(p_values)
    steps = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    return np.minimum(1.0, np.maximum.accumulate(steps))[np.argsort(order)]


def paired_difference(only_a, only_b, n):
    """95 % interval (low, high) of b - a over n paired episodes (Agresti and Min 2005)."""
    b, c, m = only_b + 0.5, only_a + 0.5, n + 2
    half = norm.ppf(0.975) * np.sqrt(b + c - (b - c) ** 2 / m) / m
    return max(-1.0, (b - c) / m - half), min(1.0, (b - c) / m + half)


def compare(rows_a, rows_b):
    """McNemar's exact test of two policies: list of dicts, of dimensions and then of rows.

    It is exact for a dimension too: if the policies are equal in each of its rows, a discordant
    episode is equally likely on either side. ValueError: the policies ran different episodes.
    """
    for name, row in rows_a.items():
        if row["episode_ids"] != rows_b[name]["episode_ids"]:
            raise ValueError(f"{name}: the episode_ids differ; use the same --seed for both")
    b = outcomes(rows_b)
    tests = []
    for name, success in outcomes(rows_a).items():
        change = b[name] - success
        only_a = int((change < 0).sum())
        only_b = int((change > 0).sum())
        p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        low, high = paired_difference(only_a, only_b, len(change))
        test = {"": name, "b - a": change.mean(), "low": low, "high": high}
        tests.append({**test, "only a": only_a, "only b": only_b, "p": p})
    for family in (tests[: -len(rows_a)], tests[-len(rows_a) :]):
        adjusted = holm([test["p"] for test in family])
        for test, p in zip(family, adjusted, strict=True):
            test["p_holm"] = p
    return tests


def report_text(policies):
    """Markdown. policies: those of results.json."""
    first, *others = policies
    parts = [ABOUT, success_table(policies)]
    for other in others:
        tests = compare(policies[first]["rows"], policies[other]["rows"])
        table = tabulate(tests, "keys", "github", floatfmt=".3g")
        parts.append(f"\n## a = {first}, b = {other}\n\n{table}")
    parts.append("\n## Settings\n")
    for policy, results in policies.items():
        row = next(iter(results["rows"].values()))
        parts.append(f"- {policy}: {row['hardware']}, {row['commit']}, {results.get('arguments')}")
    return "\n".join(parts) + "\n"


def success_table(policies):
    """A line per dimension and row, a column per policy."""
    lines = {}
    for policy, results in policies.items():
        for name, success in outcomes(results["rows"]).items():
            low, high = wilson(success.sum(), len(success))
            line = lines.setdefault(name, {"": name})
            line[policy] = f"{success.mean():.3f} [{low:.3f}, {high:.3f}]"
    return tabulate(lines.values(), "keys", "github")


def figure(policies):
    """Bars with intervals, dimensions first."""
    rows = next(iter(policies.values()))["rows"]
    names = list(outcomes(rows))
    y = np.arange(len(names)) + [name in rows for name in names]
    fig = Figure((9, 2 + 0.5 * len(names)), layout="constrained")
    axes = fig.add_subplot(xlim=(0, 1), xlabel="success at the last step, Wilson 95 % interval")
    for number, (policy, results) in enumerate(policies.items()):
        success = outcomes(results["rows"])
        mean = np.array([success[name].mean() for name in names])
        limits = [wilson(success[name].sum(), len(success[name])) for name in names]
        error = np.abs(np.transpose(limits) - mean)
        at = y + 0.8 * ((number + 0.5) / len(policies) - 0.5)
        axes.barh(at, mean, 0.7 / len(policies), xerr=error, ecolor="0.25", label=policy)
    axes.set_yticks(y, [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    fig.legend(loc="outside lower center", ncols=3)
    return fig


def read_results(path):
    """results.json of eval_ood.py: {"policies": {name: {"rows": {row: record}}}}."""
    return read_json(path, like={"policies": {str: {"rows": {str: ROW}}}})


def read_report(path):
    """Policies of results.json, and report.md of them."""
    policies = read_results(path)["policies"]
    with naming(path, "evaluate again into another --output"):
        whole = policies and all(entry["rows"] for entry in policies.values())
        check(whole, f"policies = {list(policies)} are none, or one has no rows")
        return policies, report_text(policies)


def make(directory):
    """Write report.md and figure.png beside results.json."""
    policies, text = read_report(Path(directory, "results.json"))
    write_atomic(Path(directory, "report.md"), text)
    write_figure(Path(directory, "figure.png"), figure(policies), dpi=110)
    print(success_table(policies))
    print(f"wrote report.md and figure.png in {directory}")


if __name__ == "__main__":
    check(len(sys.argv) == 2, __doc__)
    make(sys.argv[1])
