"""Statistics with known values, the report's layout, the figure, and files that are whole or absent."""

import json
import math

import numpy as np
import pytest

from common.run import report
from common.run.evaluate import wilson
from common.simulation.tasks import REPORT_ROWS


def row(name, success, ids=None, assets="bridge"):
    """One finished task as eval_ood.py stores it."""
    _, dimension, task, split, sft, ppo = next(r for r in REPORT_ROWS if r[0] == name)
    n, k = len(success), int(sum(success))
    return {"dimension": dimension, "task": task, "split": split, "n": n, "k": k, "wilson": list(wilson(k, n)),
            "success_at_end": k / n, "success_once": k / n, "grasped": 1.0, "held": 1.0, "return": 1.2, "minutes": 0.5,
            "paper": {"sft": sft, "ppo": ppo} if assets == "bridge" else {}, "commit": "abc1234", "hardware": "2 x CPU",
            "success": [int(s) for s in success], "episode_ids": list(ids or range(n))}  # fmt: skip


def results(names, rates, assets="bridge", n=60, rows=tuple(r[0] for r in REPORT_ROWS)):
    rng, policies = np.random.default_rng(0), {}
    for name, rate in zip(names, rates, strict=True):
        records = {r: row(r, rng.random(n) < rate, assets=assets) for r in rows}
        policies[name] = {"checkpoint": "", "rows": records, "dimensions": report.dimension_means(records)}
    first = policies[names[0]]["rows"]
    tests = [{"a": names[0], "b": b, "tests": report.compare(first, policies[b]["rows"])} for b in names[1:]]
    config = report.PROTOCOL | {"assets": assets, "num_episodes": n, "temperature": 0.6, "policy": "zero"}
    return {"config": config, "policies": policies, "comparisons": tests}


# --- statistics ---
def test_mcnemar_known_values():
    """Stops a one-sided or chi-square p, and p > 1 when both sides have equally many discordant episodes."""
    assert report.mcnemar(1, 9) == report.mcnemar(9, 1) == pytest.approx(2 * 11 / 1024)
    assert report.mcnemar(0, 5) == pytest.approx(2 / 32)
    assert report.mcnemar(0, 0) == report.mcnemar(4, 4) == 1.0
    assert report.mcnemar(0, 1070) > 0  # 2.0**1070 would overflow


def test_mcnemar_agrees_with_scipy():
    """Stops a wrong tail sum; scipy is an independent implementation."""
    stats = pytest.importorskip("scipy.stats")
    for only_a, only_b in [(3, 11), (40, 61), (7, 0), (150, 190)]:
        assert report.mcnemar(only_a, only_b) == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)


def test_holm_known_values():
    """Stops unsorted multipliers and adjusted values that are not monotone."""
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.9, 0.8]) == [1.0, 1.0]
    assert report.holm([]) == []


def test_paired_difference_known_values_and_bounds():
    """Stops a swapped sign and an interval of zero width or beyond [-1, 1] when all episodes go one way."""
    difference, low, high = report.paired_difference(only_a=10, only_b=30, n=100)
    assert difference == 0.2
    centre, half = 20 / 102, 1.959964 * math.sqrt(41 - 400 / 102) / 102  # Agresti & Min 2005, N* = n + 2, cells + 1/2
    assert (low, high) == pytest.approx((centre - half, centre + half))
    difference, low, high = report.paired_difference(0, 4, 4)
    assert difference == 1.0 and 0 < low < high <= 1.0
    difference, low, high = report.paired_difference(0, 0, 4)
    assert low < 0 < high


def test_compare_counts_pairs_within_rows():
    """Stops tests on marginal counts: 5 of 10 against 5 of 10 can be 10 discordant pairs or none."""
    names = ("in_distribution", "noise_weak", "noise_strong", "unseen_position")
    a = {name: row(name, s) for name, s in zip(names, ([1] * 5 + [0] * 5, [0] * 10, [1, 0] * 5, [0] * 10), strict=True)}
    b = {name: row(name, s) for name, s in zip(names, ([0] * 5 + [1] * 5, [1] * 10, [1, 0] * 5, [0] * 10), strict=True)}
    tests = {(t["kind"], t["name"]): t for t in report.compare(a, b)}
    swapped = tests["task", "in_distribution"]
    assert (swapped["only_a"], swapped["only_b"], swapped["p"], swapped["significant"]) == (5, 5, 1.0, False)
    better = tests["task", "noise_weak"]
    assert (better["only_b"], better["difference"]) == (10, 1.0) and better["p"] == pytest.approx(2 / 1024)
    assert better["p_holm"] == pytest.approx(4 * better["p"]) and better["significant"]
    vision = tests["dimension", "vision"]
    assert (vision["only_a"], vision["only_b"], vision["n"], vision["difference"]) == (0, 10, 20, 0.5)
    assert tests["dimension", "ood"]["n"] == 30 and ("dimension", "id") not in tests
    assert ("dimension", "semantics") not in tests  # no rows, no test


def test_one_dimension_is_one_hypothesis():
    """Stops Holm from counting a dimension twice, once as itself and once as all that is out of distribution."""
    a, b = ({name: row(name, s) for name in ("noise_weak", "noise_strong")} for s in ([0] * 10, [1] * 4 + [0] * 6))
    (test,) = (test for test in report.compare(a, b) if test["kind"] == "dimension")
    assert test["name"] == "vision" and test["p_holm"] == test["p"]


def test_compare_refuses_unpaired_episodes():
    """Stops a paired test between policies that ran on different episodes."""
    a = {"noise_weak": row("noise_weak", [1, 0], ids=[3, 4])}
    b = {"noise_weak": row("noise_weak", [1, 0], ids=[3, 5])}
    with pytest.raises(ValueError, match="different episode ids"):
        report.compare(a, b)


def test_stratified_test_keeps_its_level():
    """Stops an anti-conservative dimension test: two equal policies over rows of unequal difficulty, 400 repeats."""
    rng, rejections = np.random.default_rng(1), 0
    for _ in range(400):
        rows = [{name: row(name, rng.random(30) < rate) for name, rate in (("noise_weak", 0.9), ("noise_strong", 0.3))}
                for _ in "ab"]  # fmt: skip
        test = next(t for t in report.compare(*rows) if t["name"] == "vision")
        rejections += test["p"] < 0.05
    assert rejections <= 30  # expected at most 20; 31 or more has probability about 1 %


def test_dimension_means_and_drop():
    """Stops a mean weighted by episodes, ID counted as OOD, and a drop with the wrong sign."""
    successes = {"in_distribution": [1, 1, 1, 0], "noise_weak": [1, 0], "noise_strong": [0] * 6, "unseen_position": [1]}
    records = {name: row(name, success) for name, success in successes.items()}
    means = report.dimension_means(records)
    assert list(means) == ["id", "vision", "execution", "ood"]
    assert means["vision"]["success_at_end"] == 0.25 and (means["vision"]["k"], means["vision"]["n"]) == (1, 8)
    assert means["vision"]["drop"] == 0.5 and means["id"]["drop"] is None
    assert means["ood"]["success_at_end"] == pytest.approx(0.5)
    assert means["vision"]["paper"] == pytest.approx({"sft": (0.708 + 0.505) / 2, "ppo": (0.854 + 0.667) / 2})


def test_paper_means_of_the_table():
    """Stops a row in the wrong dimension: the study's printed means are 64.2 / 54.0 / 39.8 and 76.6 / 72.8 / 78.3."""
    means = report.dimension_means({r[0]: row(r[0], [1, 0]) for r in REPORT_ROWS})
    for dimension, sft, ppo in (("vision", 64.2, 76.6), ("semantics", 54.0, 72.8), ("execution", 39.8, 78.3)):
        assert 100 * means[dimension]["paper"]["sft"] == pytest.approx(sft, abs=0.06)
        assert 100 * means[dimension]["paper"]["ppo"] == pytest.approx(ppo, abs=0.06)


# --- report and figure ---
def test_report_has_the_papers_table():
    """Stops a missing task, mean, drop, test or protocol line, and ragged Markdown tables."""
    text = report.report_text(results(["sft", "ppo"], [0.5, 0.9]))
    for name, *_ in REPORT_ROWS:
        assert f"| {name.replace('_', ' ')} |" in text
    assert "paper SFT | paper PPO" in text and "| 0.781 | 0.938 |" in text
    for label in ("Vision** (5 tasks)", "Semantics** (7 tasks)", "Execution** (3 tasks)", "all OOD** (15 tasks)"):
        assert f"**mean, {label}" in text
    assert text.count("drop against own ID") == 4
    assert "## ppo against sft" in text and "McNemar" in text and "**yes**" in text
    assert "abc1234" in text and "2 x CPU" in text and "- temperature: 0.6" in text
    columns = 0
    for line in text.splitlines():
        columns = line.count("|") if line.startswith("|") and columns == 0 else columns
        assert not line.startswith("|") or line.count("|") == columns, line
        columns = columns if line.startswith("|") else 0


def test_paper_columns_only_beside_the_papers_assets():
    """Stops the study's numbers beside results on the embedded assets, where they mean nothing."""
    assert "paper" not in report.report_text(results(["ppo"], [0.9], assets="primitive")).lower()


def test_report_says_where_a_run_differs_from_the_paper():
    """Stops a silent comparison of 40-step episodes at 160x120 with the published protocol."""
    same = results(["ppo"], [0.9])
    assert "the same protocol" in report.report_text(same)
    same["config"] |= {"max_episode_steps": 40, "fidelity": "fixed"}
    assert "max_episode_steps 40 (paper 80); fidelity fixed (paper published)" in report.report_text(same)


@pytest.mark.parametrize("names", [["ppo"], ["a", "b", "c", "d", "e", "f", "g"]])
def test_figure_is_written_with_a_radar(tmp_path, names):
    """Stops a figure that fails for one policy, or for more policies than colours."""
    (tmp_path / "results.json").write_text(json.dumps(results(names, np.linspace(0, 1, len(names)))))
    report.make(tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 30_000 and (tmp_path / "report.md").stat().st_size > 3000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "report.md", "results.json"]


@pytest.mark.parametrize("rows", [("noise_weak",), ("in_distribution", "unseen_position")])
def test_report_and_figure_of_a_few_rows(rows):
    """Stops a crash without an ID row, and a radar with a missing dimension."""
    some = results(["ppo", "sft"], [0.0, 1.0], rows=rows)
    assert ("drop against own ID" in report.report_text(some)) == ("in_distribution" in rows)
    assert len(report.figure(some).axes) == 1
    assert len(report.figure(results(["ppo"], [0.5])).axes) == 2


def test_a_row_without_published_numbers(tmp_path):
    """Stops a crash for one's own task, whose published numbers are NaN in `REPORT_ROWS`."""
    some = results(["ppo"], [0.5])
    rows = some["policies"]["ppo"]["rows"]
    rows["mine"] = rows["unseen_position"] | {"paper": {"sft": math.nan, "ppo": math.nan}}
    some["policies"]["ppo"]["dimensions"] = report.dimension_means(rows)
    (tmp_path / "results.json").write_text(json.dumps(some))
    report.make(tmp_path)
    assert "| Execution | mine |" in (tmp_path / "report.md").read_text()
