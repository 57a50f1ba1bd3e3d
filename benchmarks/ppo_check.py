"""Does PPO learn where it must? One object at one place, then again with the sign flipped.

    python benchmarks/ppo_check.py    # 24 minutes on two cores; exit code 1 if it fails

Supports "A check of the algorithm" of docs/ppo_vla.md. Both runs are `ppo_vla.main` with small
rollouts and a constant rate. The control follows the negative advantages: it must fall, or
something else than the advantages does the learning.
"""

import itertools
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common.run.evaluate  # noqa: E402
import ppo_vla  # noqa: E402


@dataclass
class Args:
    episode_id: int = 32894  # a carrot that the start puts down in 20 to 60 % of its attempts
    num_iterations: int = 30
    num_envs: int = 32
    num_minibatches: int = 8  # of 160 samples
    eval_episodes: int = 192  # attempts at the same episode, temperature 0.6
    seed: int = 1
    output: str = "results/ppo/check.json"


def train(name, args):
    """Success of the evaluations and of the training iterations of one run, and its minutes."""
    start = time.time()
    default = ppo_vla.PRESETS["default"]
    run = replace(
        default.run, name=time.strftime(f"check-{name}-%Y%m%d-%H%M%S"), seed=args.seed,
        eval_every=args.num_iterations, eval_episodes=args.eval_episodes,
    )  # fmt: skip
    ppo_vla.main(
        replace(
            default, run=run, num_envs=args.num_envs, num_steps=40, anneal_lr=False,
            num_minibatches=args.num_minibatches, num_iterations=args.num_iterations,
            value_warmup_iterations=1,
        )
    )  # fmt: skip
    lines = Path("runs", run.name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = {"minutes": round((time.time() - start) / 60, 1)}
    for key in ("eval", "train"):
        metric = f"{key}/success_at_end"
        found[key] = [row[metric] for row in rows if metric in row]
    return found


def main(args: Args):
    normalize = ppo_vla.normalize
    one_episode = itertools.repeat(args.episode_id)
    attempts = np.full(args.eval_episodes, args.episode_id)
    results = {"arguments": vars(args)}
    for name, sign in (("ppo", 1.0), ("sign-flipped", -1.0)):
        with (
            patch.object(ppo_vla, "training_episodes", lambda *_: one_episode),
            patch.object(common.run.evaluate, "evaluation_ids", lambda *_: attempts),
            patch.object(ppo_vla, "normalize", lambda a, sign=sign: sign * normalize(a)),
        ):
            results[name] = train(name, args)
    before, after = results["ppo"]["eval"]
    _, control = results["sign-flipped"]["eval"]
    results["passed"] = bool(0.2 <= before <= 0.6 and after > 0.95 and control < before)
    Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"start {before:.2f}, must be .2 to .6, or choose another --episode-id")
    print(f"PPO {after:.2f}, must exceed .95; sign flipped {control:.2f}, must fall")
    sys.exit(not results["passed"])


if __name__ == "__main__":
    main(tyro.cli(Args))
