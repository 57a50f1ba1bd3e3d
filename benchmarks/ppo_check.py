"""Does PPO learn where it must? One object at one position, from the shipped start; then with the sign flipped.

    python benchmarks/ppo_check.py    # minutes on two cores; exits with 1 if PPO does not solve it or the control rises

Both runs are `ppo_vla.main` with its default settings but for smaller rollouts and minibatches and a constant rate. The
control follows the negative advantages: it must fall, or something else than the advantages does the learning. Writes
results/ppo/check.json.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import ppo_vla  # noqa: E402


@dataclass
class Args:
    episode_id: int = 32894  # a training configuration that the start solves in 20 to 60 % of its attempts
    num_iterations: int = 30  # of num_envs episodes or more: they end five steps after success
    num_envs: int = 32
    num_minibatches: int = 8  # updates per iteration, of 160 samples
    eval_episodes: int = 192  # attempts at the same configuration, temperature 0.6
    seed: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    output: str = "results/ppo/check.json"


def main(args: Args):
    normalize, results = ppo_vla.normalize, {"arguments": vars(args)}
    for name, sign in (("ppo", 1.0), ("sign flipped", -1.0)):
        ppo_vla.normalize = lambda *advantages, sign=sign: sign * normalize(*advantages)
        run, start = f"ppo_check-{name.replace(' ', '-')}-{time.strftime('%Y%m%d-%H%M%S')}", time.time()
        ppo_vla.main(
            replace(
                ppo_vla.PRESETS["default"], name=run, episode_ids=(args.episode_id,), num_envs=args.num_envs,
                num_steps=40, num_minibatches=args.num_minibatches, num_iterations=args.num_iterations,
                value_warmup_iterations=1, anneal_lr=False, eval_every=args.num_iterations,
                eval_episodes=args.eval_episodes, num_videos=1, seed=args.seed, dtype=args.dtype,
            )
        )  # fmt: skip
        rows = [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]
        results[name] = {
            "eval": [row["eval/main/success_at_end"] for row in rows if "eval/main/success_at_end" in row],
            "train": [row["train/success_at_end"] for row in rows if "train/success_at_end" in row],
            "minutes": round((time.time() - start) / 60, 1),
        }
    ppo_vla.normalize = normalize
    (before, after), (_, control) = results["ppo"]["eval"], results["sign flipped"]["eval"]
    results["passed"] = bool(0.2 <= before <= 0.6 and after > 0.95 and control < before)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
    start = f"start {before:.2f} (must be 0.2 to 0.6, or choose another --episode-id)"
    print(f"{start} -> PPO {after:.2f} (must exceed 0.95), sign flipped {control:.2f} (must fall)")
    sys.exit(not results["passed"])


if __name__ == "__main__":
    main(tyro.cli(Args))
