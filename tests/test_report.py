"""Statistics with known values, report and figure."""

import json

import pytest

from common.run.evaluate import wilson
from common.simulation.tasks import REPORT_ROWS
from scripts import report

DIMENSION = {row[0]: row[1] for row in REPORT_ROWS}


def rows_of(**successes):
    """dict name -> record, as eval_ood.py writes it. successes: name=list of 0 and 1."""
    rows = {}
    for name, success in successes.items():
        rows[name] = {"dimension": DIMENSION.get(name, "training"), "success": success}
        rows[name].update(episode_ids=[*range(len(success))], hardware="2 x CPU", commit="abc1234")
    return rows


def compared(a, b):
    """dict row or dimension -> test."""
    return {test[""]: test for test in report.compare(rows_of(**a), rows_of(**b))}


def test_known_values_of_pairs_within_rows():
    """Stops another interval, adjustment or test, and a bar beside another task's name."""
    assert wilson(8, 10) == pytest.approx((0.4901624, 0.9433178), abs=1e-6)
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0]) and len(report.holm([])) == 0
    cases = ((1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 5, 2 / 32), (4, 4, 1), (0, 0, 1))
    for only_a, only_b, p in cases:
        a, b = ([k] * only_a + [1 - k] * only_b + [1, 0] for k in (1, 0))
        test = compared({"noise_weak": a}, {"noise_weak": b})["noise_weak"]
        assert (test["only a"], test["only b"], test["p"]) == (only_a, only_b, pytest.approx(p))
        assert test["b - a"] == (only_b - only_a) / len(a)
    same = dict(noise_strong=[1, 0] * 5, unseen_position=[0] * 10)
    a = dict(in_distribution=[1] * 5 + [0] * 5, noise_weak=[0] * 10, **same)
    b = dict(in_distribution=[0] * 5 + [1] * 5, noise_weak=[1] * 10, **same)
    tests = compared(a, b)
    assert list(tests) == ["vision", "ood", *a]
    assert (tests["in_distribution"]["only a"], tests["in_distribution"]["p"]) == (5, 1)
    for name, number in (("vision", 2), ("ood", 2), ("noise_weak", 4)):
        assert (tests[name]["only a"], tests[name]["only b"]) == (0, 10)
        assert tests[name]["p_holm"] == pytest.approx(number * 2 / 1024)
    assert tests["vision"]["b - a"] == 0.5
    other = rows_of(**b)
    other["noise_weak"]["episode_ids"][0] = 99
    with pytest.raises(ValueError, match="noise_weak"):
        report.compare(rows_of(**a), other)
    rows = rows_of(in_distribution=[1, 1], noise_weak=[0, 0])
    figure = report.figure({"a": {"rows": rows}, "b": {"rows": dict(reversed(rows.items()))}})
    texts = [*figure.axes[0].get_yticklabels(), *figure.legends[0].get_texts()]
    assert [text.get_text() for text in texts] == ["in distribution", "noise weak", "a", "b"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1, 0, 1, 0]


@pytest.mark.parametrize("names", [["noise_weak"], ["in_distribution", "main"], list(DIMENSION)])
@pytest.mark.parametrize("number", [1, 7])
def test_report_has_all_numbers(number, names, tmp_path):
    """Stops a report without a row or setting, and a crash for one policy, row or dimension."""
    policies = {}
    for n in range(number):
        rows = rows_of(**{name: [1] * n + [0] * (7 - n) for name in names})
        policies[f"policy {n}"] = {"arguments": {"temperature": 0.6}, "rows": rows}
    (tmp_path / "results.json").write_text(json.dumps({"policies": policies}))
    report.make(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert all(text.count(f"| {name} ") == number for name in names)
    low, high = wilson(n, 7)  # of the last policy
    for words in (f"{n / 7:.3f} [{low:.3f}, {high:.3f}]", f"policy {n}", "0.6", "abc1234", "CPU"):
        assert words in text
