"""The runs of docs/study.md, one after the other, through the public commands.

    python benchmarks/study.py                       # days on two cores; goes on where it was
    python benchmarks/study.py --only sft-8000 ppo   # some arms
    python benchmarks/study.py --quick               # the same steps in minutes: a smoke test

Writes demos/study-*, runs/study-ARM-SEED and results/study/ARM-SEED. What is there is not made
again; a run that was interrupted is resumed. Pointing is measured on demos/pointing/validation.h5,
which `python -m tiny.pointing --num-scenes 1` makes.
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.run.args import parse_args  # noqa: E402
from common.run.files import check  # noqa: E402

MISTAKES = "--action-noise 0.015 --blunder-probability 0.04 --max-episode-steps 60"
DEMOS = {  # seed 1: the start has seen scenes of seed 0
    "clean": "--seed 1 --num-demos 8100",
    "long": "--seed 1 --num-demos 16100",
    "recovery": f"--seed 1 --num-demos 8100 {MISTAKES}",
    "rft": "--seed 1 --num-demos 8100 --checkpoint runs/study-ppo-1/checkpoint-000085",
}
RL = "--eval-every 17 --keep-every 17"  # of 85 iterations
SFT = "--model checkpoints/tiny-warmup --statistics model --val-demos 100"
SFT += " --eval-every 0 --num-iterations 8 --keep-every 2 --demos demos/study-"


def sft(data, num_demos, num_updates):  # per iteration; beside the 100 for validation
    return f"sft_vla {SFT}{data} --num-demos {num_demos + 100} --num-updates {num_updates}"


ARMS = {  # name: command, number of seeds; where time runs out, the last ones are left out
    "start": ("", 1),
    "sft-8000": (sft("clean", 8000, 800), 3),
    "ppo": (f"ppo_vla {RL}", 3),
    "sft-twice": (sft("clean", 8000, 1600), 1),
    "sft-recovery": (sft("recovery", 8000, 800), 2),
    "sft-2000": (sft("clean", 2000, 400), 2),
    "sft-500": (sft("clean", 500, 200), 2),
    "grpo": (f"grpo_vla {RL}", 2),
    "sft-125": (sft("clean", 125, 100), 2),
    "ppo-after-sft": (f"ppo_vla {RL} --model runs/study-sft-8000-SEED/checkpoint-000008", 2),
    "dpo": (f"dpo_vla {RL}", 2),
    "sft-rft": (sft("rft", 8000, 800), 2),
    "ppo-h0": (f"ppo_vla {RL} --critic h0", 2),
    "sft-16000": (sft("long", 16000, 1600), 1),
}
QUICK = {  # flags that replace those above
    "record": "--num-demos 30 --num-envs 6",
    "sft_vla": "--num-demos 30 --val-demos 5 --num-updates 2",
    "ppo_vla": "--num-iterations 4 --keep-every 1 --num-envs 8 --num-steps 20 --eval-episodes 8",
    "grpo_vla": "--num-iterations 4 --keep-every 1 --num-envs 8 --num-steps 40 --eval-episodes 8",
    "dpo_vla": "--num-iterations 4 --keep-every 1 --num-envs 8 --num-steps 40 --eval-episodes 8",
}
MAIN = ("sft-8000", "ppo")  # compared at their earlier checkpoints too, and on graded levels
POINTING = Path("demos/pointing/validation.h5")


@dataclass
class Args:
    only: tuple[str, ...] = tuple(ARMS)  # arms, in this order
    quick: bool = False
    num_episodes: int = 192  # per row of the evaluation


def run(*words):
    print("+", shlex.join(words), flush=True)
    subprocess.run([sys.executable, *words], check=True)


def record(name, flags, quick):
    folder = Path(f"demos/{name}")
    if not (folder / "trajectory.json").exists():
        flags = f"{flags} {QUICK['record'] if quick else ''}"
        if quick:
            flags = flags.replace("runs/study-ppo-1/checkpoint-000085", "checkpoints/tiny-warmup")
        run("-m", "demonstrations.record", "--output", str(folder), *flags.split())


def train(name, command, seed, quick):
    """The run's kept checkpoints, the last one last."""
    if not command:
        return [Path("checkpoints/tiny-warmup")]
    script, *flags = f"{command} {QUICK[command.split()[0]] if quick else ''}".split()
    flags = [flag.replace("SEED", str(seed)) for flag in flags]
    if quick:
        flags = [flag.replace("study-", "quick-") for flag in flags]
    module = __import__(script)
    args = parse_args(module.Args, module.PRESETS, flags)
    folder = Path("runs", name)
    kept = range(args.run.keep_every, args.num_iterations, args.run.keep_every)
    found = [folder / f"checkpoint-{number:06d}" for number in (*kept, args.num_iterations)]
    if not found[-1].exists():
        begun = any(folder.glob("checkpoint-*"))
        new = ["--name", name, "--seed", str(seed), *flags]
        run(f"{script}.py", *(["--resume", str(folder)] if begun else new))
    return found


def main(args):
    os.chdir(Path(__file__).parents[1])
    check(POINTING.exists(), f"{POINTING} is missing; run python -m tiny.pointing --num-scenes 1")
    study, episodes = ("quick", 4) if args.quick else ("study", args.num_episodes)
    for arm in args.only:
        command, num_seeds = ARMS[arm]
        for data, flags in DEMOS.items():
            if f"demos/study-{data} " in command:
                record(f"{study}-{data}", flags, args.quick)
        for seed in range(1, num_seeds + 1):
            name = f"{study}-{arm}-{seed}"
            checkpoints = train(name, command, seed, args.quick)
            if arm not in MAIN:
                checkpoints = checkpoints[-1:]
            output, paths = f"results/{study}/{arm}-{seed}", [str(path) for path in checkpoints]
            flags = ["--num-episodes", str(episodes), "--output", output]
            run("eval_ood.py", "--checkpoint", *paths, *flags)
            for file in ("args.json", "metrics.jsonl") if command else ():
                shutil.copy(Path("runs", name, file), output)
            beside = {"kept": "16"} | ({"levels": "4"} if arm in ("start", *MAIN) else {})
            for script, few in beside.items():
                if not Path(output, f"{script}.json").exists():
                    flags = ["--output", f"{output}/{script}.json"]
                    flags += ["--num-episodes", few] if args.quick else []
                    run(f"benchmarks/{script}.py", "--checkpoint", paths[-1], *flags)
            run("benchmarks/study_report.py", f"results/{study}")


if __name__ == "__main__":
    main(tyro.cli(Args))
