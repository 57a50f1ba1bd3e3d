"""Short runs of ppo_vla.py from one start, one flag changed in each.

    python benchmarks/ablations.py --dtype bfloat16                  # hours on two cores
    python benchmarks/ablations.py --only default h0 --num-iterations 5

Supports the table "Ablations" of docs/ppo_vla.md, whose raw curves, results/ppo/ablations.json,
are of commit c83dab3. An interrupted call continues where it was.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

SETTINGS = {
    "default": "",
    "h0": "--critic h0",
    "hn": "--critic hn",
    "concat": "--critic concat",
    "separate": "--critic separate",
    "2-epochs": "--update-epochs 2",
    "4-epochs": "--update-epochs 4",
    "gamma-lambda-1": "--gamma 1 --gae-lambda 1",
    "no-warm-up": "--model checkpoints/tiny-pretrained",
}
WINDOWS = ((5, 7), (8, 9), (10, 12))  # iterations over which the table averages success
COLUMNS = {
    "success_at_end": "train/success_at_end",
    "approx_kl": "losses/approx_kl",
    "update_s": "time/update_s",
}


@dataclass
class Args:
    only: tuple[str, ...] = tuple(SETTINGS)  # names in SETTINGS
    num_iterations: int = 12  # the first three train the critic alone
    num_steps: int = 80  # of 64 environments
    dtype: str = "float32"
    seed: int = 1
    output: str = "runs/ablations.json"


def train(name, args):
    """Metrics of one run, which is made, continued, or read: list of one dict per iteration."""
    words = f"{name}-{args.num_steps}x{args.num_iterations}-{args.dtype}-{args.seed}"
    run_dir = Path("runs", f"ablation-{words}")
    command = [sys.executable, "ppo_vla.py"]
    if any(run_dir.glob("checkpoint-*")):
        command += ["--resume", str(run_dir)]
    else:
        command += ["--name", run_dir.name, "--no-anneal-lr", "--eval-every", "0"]
        for flag in ("num_iterations", "num_steps", "dtype", "seed"):
            command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
        command += SETTINGS[name].split()
    subprocess.run(command, check=True)
    rows = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return rows[1:]  # without the start


def main(args: Args):
    results = {"arguments": vars(args), "settings": {}}
    print("| setting | success, 5 to 7 | 8, 9 | 10 to 12 | KL | update, s |")
    print("|---" * 6 + "|")
    for name in args.only:
        rows = train(name, args)
        curves = {key: [row.get(metric) for row in rows] for key, metric in COLUMNS.items()}
        results["settings"][name] = {"flags": SETTINGS[name], **curves}
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        cells = [name]
        for first, last in WINDOWS:
            window = curves["success_at_end"][first - 1 : last]
            cells.append(f"{np.mean(window):.2f}" if window else "-")
        cells.append(f"{np.mean(curves['approx_kl'][4:7]):.3f}")
        cells.append(f"{np.mean(curves['update_s'][4:7]):.0f}")
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
