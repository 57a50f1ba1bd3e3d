"""Summary, tables and figures of the study, from its raw files: docs/study.md has the protocol.

python benchmarks/study_report.py results/study    # writes summary.json, tables.md, figure.png
"""

import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.curves import held_out, in_words  # noqa: E402
from benchmarks.study import ARMS, MAIN  # noqa: E402
from common.run.files import read_json, write_atomic  # noqa: E402
from common.simulation.tasks import REPORT_ROWS  # noqa: E402
from scripts.report import OOD, compare  # noqa: E402

DIMENSIONS = ("id", *OOD)
SFT, RL = MAIN  # the primary comparison
SEEDS = ARMS[RL][1]
MATCHED, EQUAL = 0.05, 0.03  # success in distribution may differ by; what counts as no difference
DRAWS = 10_000
SIZES = {f"sft-{size}": size for size in (125, 500, 2000, 8000, 16000)}


# --- read ---
def read_arms(root):
    """dict arm -> dict seed -> what was recorded: "checkpoints", dict number -> rows, ..."""
    arms = {arm: {} for arm in ARMS}
    for path in sorted(root.glob("*-*/results.json")):
        arm, _, seed = path.parent.name.rpartition("-")
        policies = read_json(path)["policies"]
        numbers = [int(name[-6:]) if name[-6:].isdigit() else 0 for name in policies]
        rows = [entry["rows"] for entry in policies.values()]
        checkpoints = dict(zip(numbers, rows, strict=True))
        run = {"checkpoints": dict(sorted(checkpoints.items())), "minutes": 0.0}
        log = path.with_name("metrics.jsonl")
        if log.exists():  # not of the start
            logged = [json.loads(row) for row in log.read_text(encoding="utf-8").splitlines()]
            times = ("time/rollout_s", "time/update_s")
            run["minutes"] = sum(row.get(time, 0) for row in logged for time in times) / 60
            run["log"] = log
        for name in ("kept", "levels"):
            file = path.with_name(f"{name}.json")
            run[name] = next(iter(read_json(file).values())) if file.exists() else None
        arms[arm][int(seed)] = run
    return {arm: runs for arm, runs in arms.items() if runs}


def last(run):
    return [*run["checkpoints"].values()][-1]


def means(rows):
    """dict dimension -> mean success over its rows, and "ood", the mean of the three."""
    found = {}
    for name in DIMENSIONS:
        inside = [row["k"] / row["n"] for row in rows.values() if row["dimension"] == name]
        found[name] = float(np.mean(inside))
    return found | {"ood": float(np.mean([found[name] for name in OOD]))}


# --- the primary comparison ---
def matched(a, b):
    """Numbers of the checkpoints of two runs that are compared: of those pairs that differ by at
    most MATCHED in distribution, the one whose lesser success is highest; then the closest pair,
    then the later checkpoints. None: there is none."""
    ids = [{k: means(rows)["id"] for k, rows in run["checkpoints"].items()} for run in (a, b)]
    fits = []
    for x, y in product(*ids):
        gap = abs(ids[0][x] - ids[1][y])
        if gap <= MATCHED:
            fits.append((min(ids[0][x], ids[1][y]), -gap, x, y))
    return max(fits)[2:] if fits else None


def differences(pairs):
    """Mean difference b - a per dimension and "ood" over pairs of rows, with the 95 % interval of
    a bootstrap over seeds and, within each row, over its episodes, which all seeds share."""
    rng, names = np.random.default_rng(0), (*DIMENSIONS, "ood")
    change = []  # per pair: dict dimension -> (rows, episodes)
    for a, b in pairs:
        rows = [[np.subtract(b[r]["success"], a[r]["success"]) for r in a if
                 a[r]["dimension"] == name] for name in DIMENSIONS]  # fmt: skip
        change.append([np.array(part) for part in rows])

    def draw():
        seeds, found = rng.integers(len(change), size=len(change)), []
        for k in range(len(DIMENSIONS)):
            parts = np.array([change[seed][k] for seed in seeds])  # (seeds, rows, episodes)
            chosen = rng.integers(parts.shape[2], size=parts.shape[1:])
            found.append(np.take_along_axis(parts, chosen[None], axis=2).mean())
        return found

    draws = np.array([draw() for _ in range(DRAWS)])
    draws = np.column_stack([draws, draws[:, 1:].mean(axis=1)])
    point = np.mean([[part.mean() for part in parts] for parts in change], axis=0)
    point = [*point, point[1:].mean()]
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return {
        name: {"difference": float(point[k]), "low": float(low[k]), "high": float(high[k])}
        for k, name in enumerate(names)
    }


def verdict(ood, signs):
    if len(signs) < SEEDS:
        return "not decided yet"
    if ood["low"] > 0 and set(signs) == {1.0}:
        return "RL generalises better, here"
    refuted = ood["low"] <= 0 and ood["high"] < EQUAL
    return "refuted here: SFT is equal or better" if refuted else "not decided"


def primary(arms):
    """RL against SFT at matched success in distribution, and at their ends."""
    found = {}
    for when in ("matched", "end"):
        pairs, tests, chosen = [], {}, {}
        for seed in sorted(arms[RL].keys() & arms[SFT].keys()):
            a, b = (arms[arm][seed] for arm in MAIN)
            numbers = (
                matched(a, b) if when == "matched" else [max(r["checkpoints"]) for r in (a, b)]
            )
            if numbers:
                rows = [run["checkpoints"][k] for run, k in zip((a, b), numbers, strict=True)]
                pairs.append(rows)
                chosen[seed] = list(numbers)
                keep = {name: row for name, row in rows[0].items() if row["dimension"] != "id"}
                (ood,) = [t for t in compare(keep, rows[1]) if t[""] == "ood"]
                tests[seed] = {k: float(ood[k]) for k in ("b - a", "only a", "only b", "p")}
        if pairs:
            found[when] = differences(pairs)
            found[when].update(checkpoints=chosen, mcnemar=tests)
            signs = [np.sign(means(b)["ood"] - means(a)["ood"]) for a, b in pairs]
            if when == "matched":
                found[when]["verdict"] = verdict(found[when]["ood"], signs)
    return found


def explanations(summary):
    """What the page says of the two explanations, as the protocol defines them."""
    arms, found = summary["arms"], {}
    ahead = summary["primary"].get("end", {}).get("execution", {}).get("low", 0) > 0
    if "sft-recovery" in arms and RL in arms:
        gap = arms[RL]["execution"] - arms["sft-recovery"]["execution"]
        found["execution only by coverage"] = bool(ahead and gap <= EQUAL)
    if all("kl" in arms.get(arm, {}) for arm in ("start", *MAIN)):
        rl, sft = arms[RL], arms[SFT]
        less = rl["pointing_mm"] < sft["pointing_mm"] and rl["kl"] < sft["kl"]
        found["semantics by kept knowledge"] = bool(less)
    return found


# --- write ---
def summarize(arms):
    summary = {}
    for arm, runs in arms.items():
        ends = [last(run) for run in runs.values()]
        rows = {
            name: {key: sum(rows[name][key] for rows in ends) for key in "kn"} for name in ends[0]
        }
        each = [means(rows) for rows in ends]
        mean = {name: float(np.mean([m[name] for m in each])) for name in each[0]}
        summary[arm] = {"seeds": [*runs], "rows": rows, **mean, "per_seed": each}
        minutes = [run["minutes"] for run in runs.values()]
        summary[arm]["training_minutes"] = float(np.mean(minutes))
        once = [[np.mean(row["success_once"]) for row in end.values()] for end in ends]
        summary[arm]["once"] = dict(zip(ends[0], np.mean(once, axis=0).tolist(), strict=True))
        levels = [run["levels"] for run in runs.values() if run["levels"]]
        if levels:
            shares = [[np.mean(row["success"]) for row in level.values()] for level in levels]
            means_of = np.mean(shares, axis=0).tolist()
            summary[arm]["levels"] = dict(zip(levels[0], means_of, strict=True))
        kept = [run["kept"] for run in runs.values() if run["kept"]]
        if kept:
            new = "anywhere, random bodies"
            summary[arm]["kl"] = float(np.mean([[*k["kl"].values()] for k in kept]))
            summary[arm]["pointing_mm"] = float(
                np.mean([k["pointing"][new]["object_mm"] for k in kept])
            )
    summary = {"arms": summary, "primary": primary(arms) if all(a in arms for a in MAIN) else {}}
    return summary | {"explanations": explanations(summary)}


def tables(summary):
    """Markdown: the paper's table with ours beside it; arms; the primary comparison."""
    arms, lines = summary["arms"], []
    for name, dimension, _, _, sft, ppo in REPORT_ROWS:
        line = {"row": name, "dimension": dimension, "paper SFT": sft, "paper PPO": ppo}
        for arm, entry in arms.items():
            line[arm] = f"{entry['rows'][name]['k'] / entry['rows'][name]['n']:.2f}"
        lines.append(line)
    parts = ["# Success at the end, all seeds together", tabulate(lines, "keys", "github")]
    columns = (*DIMENSIONS, "ood", "kl", "pointing_mm", "training_minutes")
    lines = [{"arm": arm, "seeds": len(e["seeds"]), **{c: e.get(c) for c in columns}}
             for arm, e in arms.items()]  # fmt: skip
    parts += ["# Arms", tabulate(lines, "keys", "github", floatfmt=".3g")]
    lines = [{"arm": arm, **e["levels"]} for arm, e in arms.items() if "levels" in e]
    parts += ["# Graded levels", tabulate(lines, "keys", "github", floatfmt=".2f")]
    for when, found in summary["primary"].items():
        lines = [{"": name, **found[name]} for name in (*DIMENSIONS, "ood")]
        parts += [f"# {RL} - {SFT}, {when}: {found.get('verdict', 'not the primary one')}"]
        parts += [tabulate(lines, "keys", "github", floatfmt="+.3f")]
    parts += [f"- {name}: {'yes' if right else 'no'}" for name, right in
              summary["explanations"].items()]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def figure(arms, summary):
    fig = Figure((12, 8), layout="constrained")
    curve, bars, steps, scale = fig.subplots(2, 2).flat
    colours = dict(zip(ARMS, colormaps["tab20"].colors, strict=False))
    for arm in MAIN:
        for run in arms.get(arm, {}).values():
            at = [means(rows) for rows in run["checkpoints"].values()]
            x, y = ([m[name] for m in at] for name in ("id", "ood"))
            (line,) = curve.plot(x, y, "o-", color=colours[arm])
        if arm in arms:
            line.set_label(arm)
    curve.set(xlabel="success in distribution", ylabel="mean of the three shifted dimensions")
    width = 0.8 / len(arms)
    for k, (arm, entry) in enumerate(summary["arms"].items()):
        at = np.arange(len(DIMENSIONS)) + (k + 0.5) * width - 0.4
        share = [entry[name] for name in DIMENSIONS]
        bars.bar(at, share, width * 0.9, color=colours[arm], label=arm)
        for seed in entry["per_seed"]:
            bars.plot(at, [seed[name] for name in DIMENSIONS], "k.", markersize=3)
    bars.set_xticks(range(len(DIMENSIONS)), DIMENSIONS)
    bars.set_ylabel("success at the end; a dot per seed")
    for arm in [arm for arm in arms if arm != "start" and not arm.startswith("sft")]:
        for run in arms[arm].values():
            (line,) = steps.plot(*held_out(run["log"]), color=colours[arm])
        line.set_label(arm)
    steps.set(xlabel="environment steps", ylabel="success on its own held-out episodes")
    steps.xaxis.set_major_formatter(in_words)
    sizes = {arm: size for arm, size in SIZES.items() if arm in arms}
    for name in DIMENSIONS:
        y = [summary["arms"][arm][name] for arm in sizes]
        scale.semilogx(list(sizes.values()), y, "o-", label=name)
    scale.set_xticks(list(sizes.values()), list(sizes.values()), minor=False)
    scale.set_xticks([], minor=True)
    scale.set(xlabel="clean demonstrations", ylabel="success of cloning")
    for axes in (curve, bars, steps, scale):
        axes.set_ylim(0, 1)
        axes.legend(fontsize="small")
    return fig


def main(directory):
    root = Path(directory)
    arms = read_arms(root)
    summary = summarize(arms)
    write_atomic(root / "summary.json", json.dumps(summary, indent=1))
    write_atomic(root / "tables.md", tables(summary))
    figure(arms, summary).savefig(root / "figure.png", dpi=110)
    print(tables(summary))


if __name__ == "__main__":
    main(sys.argv[1])
