"""How much faster is this checkout than an older commit? Both in turn, by their plain commands.

    python benchmarks/speed.py --against bb47261    # 40 minutes on two idle cores

Supports docs/benchmark.md, "What a step costs". PPO: environment steps per second of whole
iterations, rollout and update, as the runs log them (charts/SPS; the first iteration, which trains
the critic alone, is left out), in float32 and, where it is fast, in bfloat16. eval_ood.py: episodes
per minute of the whole command, the start of the program included. Each checkout runs its own code
with its own checkpoints.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.run.ranks import cores  # noqa: E402
from scripts.provenance import FAST_DTYPE, machine  # noqa: E402

PPO = """ppo_vla.py --num-envs 64 --num-iterations 3 --value-warmup-iterations 1
    --eval-every 0""".split()
EVAL = """eval_ood.py --checkpoint checkpoints/tiny-warmup --num-episodes 64
    --tasks in_distribution,unseen_table,unseen_objects --output runs/speed-eval""".split()
NUM_EPISODES = 3 * 64


@dataclass
class Args:
    against: str  # a commit of this repository
    rounds: int = 3  # old and new in turn
    output: str = "results/speed.json"


def run(folder, command):
    """Seconds that a script of the checkout in `folder` takes."""
    start = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, *command], cwd=folder, check=True, env=environment,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return time.monotonic() - start


def measure(folder):
    """dict of lists: PPO's steps/s per iteration, eval_ood.py's episodes per minute."""
    found = {"eval_ood.py episodes/min": [NUM_EPISODES / (run(folder, EVAL) / 60)]}
    for dtype in sorted({"float32", FAST_DTYPE}):
        run(folder, [*PPO, "--dtype", dtype, "--name", dtype])
        lines = Path(folder, f"runs/{dtype}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line).get("charts/SPS") for line in lines]
        found[f"ppo_vla.py steps/s, {dtype}"] = rows[2:]
    return found


def checkout(commit, folder):
    """A clone at this commit: of what is committed, without what runs have left behind."""
    here = Path(__file__).parent.parent
    subprocess.run(["git", "clone", "-q", here, folder], check=True)
    subprocess.run(["git", "checkout", "-q", commit], cwd=folder, check=True)
    name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, check=True,
                          capture_output=True, text=True)  # fmt: skip
    return name.stdout.strip()


def main(args):
    found, commits = {"old": {}, "new": {}}, {}
    for number in range(args.rounds):
        for name, commit in (("old", args.against), ("new", "HEAD")):
            with tempfile.TemporaryDirectory() as folder:
                commits[name] = checkout(commit, folder)
                for what, values in measure(folder).items():
                    found[name].setdefault(what, []).extend(values)
            print(f"round {number + 1}, {name} ({commits[name]}): {found[name]}", flush=True)
    table = []
    for what in found["old"]:
        old, new = (float(np.median(found[name][what])) for name in ("old", "new"))
        table.append([what, round(old, 1), round(new, 1), round(new / old, 2)])
    headers = ["median", *commits.values(), "ratio"]
    print(tabulate(table, headers))
    result = dict(command=" ".join(sys.argv), commits=commits, cores=cores(), **machine())
    result.update(runs=found, table=[dict(zip(headers, row, strict=True)) for row in table])
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
