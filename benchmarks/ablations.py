"""The study's ablations of PPO: short runs of ppo_vla.py from one start, one flag changed in each.

    python benchmarks/ablations.py --output runs/ablations.json  # all, on two cores 1.5 to 3 hours
    python benchmarks/ablations.py --dtype bfloat16 --only  # the table of results/ppo/ablations.json

A run that is there already, from a call that was interrupted, is resumed or read. `--only default h0` runs some of
SETTINGS. Settings that the output has from calls with the same arguments stay; a file of others is refused. A separate
critic is trained at `--value-learning-rate`, ten times that of the policy, backbone included: its row differs in that
too.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.run.runs import write_atomic  # noqa: E402

SETTINGS = {
    "default": "",
    "h0": "--value-input h0",
    "hn": "--value-input hn",
    "concat": "--value-input concat",
    "h0, separate critic": "--value-input h0 --separate-critic",
    "2 epochs": "--update-epochs 2",
    "4 epochs": "--update-epochs 4",
    "gamma = lambda = 1": "--gamma 1 --gae-lambda 1",
    "without warm-up": "--model checkpoints/tiny-pretrained",
}
WINDOWS = (4, 7), (7, 9), (9, 12)  # iterations 5 to 7, 8 and 9, 10 to 12, over which the table averages success


@dataclass
class Args:
    only: tuple[str, ...] = tuple(SETTINGS)  # names in SETTINGS
    num_iterations: int = 12  # the first three train the critic alone
    num_steps: int = 80  # of 64 environments
    ranks: int = 2  # processes of torchrun, one per core
    dtype: str = "float32"  # bfloat16 is faster where the processor has it
    seed: int = 1
    output: str = "results/ppo/ablations.json"


def run(name, args):
    """One dict per iteration of the setting's run, which is made or continued if it is not complete."""
    flags = f"--num-steps {args.num_steps} --dtype {args.dtype} --seed {args.seed} --no-anneal-lr --eval-every 0"
    label = f"{name}-{args.num_steps}-{args.num_iterations}-{args.dtype}-{args.seed}"
    directory = Path("runs", "ablation-" + "".join(c if c.isalnum() else "-" for c in label))
    new = f"{flags} {SETTINGS[name]} --num-iterations {args.num_iterations} --name {directory.name}"
    words = f"--resume {directory}" if any(directory.glob("checkpoint-*")) else new
    command = ["torchrun", "--nproc-per-node", str(args.ranks), "ppo_vla.py", *words.split()]
    path = directory / "metrics.jsonl"
    rows = lambda: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []  # noqa: E731
    if not rows() or rows()[-1].get("charts/iteration", 0) < args.num_iterations:
        subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], check=True)
    return [row for row in rows() if row.get("charts/iteration", 0) > 0]


def main(args: Args):
    if unknown := [name for name in args.only if name not in SETTINGS]:
        raise ValueError(f"only = {unknown} must be among {list(SETTINGS)}")
    same = {key: value for key, value in vars(args).items() if key not in ("only", "output")}
    results = {"arguments": same, "settings": {}}
    if Path(args.output).exists():
        results = json.loads(Path(args.output).read_text())
        if (was := results["arguments"]) != same:
            raise ValueError(f"{args.output} is of other arguments, {was}; repeat these or choose another --output")
    for name in args.only:
        rows = run(name, args)
        column = lambda key, rows=rows: [row.get(key) for row in rows]  # noqa: E731
        results["settings"][name] = {
            "flags": SETTINGS[name],
            "success_at_end": column("train/success_at_end"),
            "explained_variance": column("losses/explained_variance"),
            "approx_kl": column("losses/approx_kl"),
            "update_s": column("time/update_s"),
            "peak_ram_gb": column("system/peak_ram_gb"),
        }
        write_atomic(Path(args.output), lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    headings = " | ".join(f"success, {first + 1}-{last}" for first, last in WINDOWS)
    print(f"| setting | iterations | {headings} | explained variance | KL | update, s | peak GB |")
    print("|---" * (6 + len(WINDOWS)) + "|")
    early = slice(*WINDOWS[0])  # the other columns: the policy trains, every run that was cut short has them
    for name, values in results["settings"].items():
        success = [values["success_at_end"][first:last] for first, last in WINDOWS]
        cells = [f"{np.mean(window):.2f}" if window else "-" for window in success]
        for key, digits in ("explained_variance", 2), ("approx_kl", 3), ("update_s", 0):
            cells.append(f"{np.mean(values[key][early]):.{digits}f}")
        cells.append(f"{max(values['peak_ram_gb'][early]):.1f}")
        print("|", name, "|", len(values["success_at_end"]), "|", " | ".join(cells), "|")


if __name__ == "__main__":
    main(tyro.cli(Args))
