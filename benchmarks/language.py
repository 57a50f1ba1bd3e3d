"""Does the instruction decide? Two objects on the table, the same episodes with the right or the other object named.

python benchmarks/language.py --checkpoint runs/NAME/best-000010 --output results/language/NAME.json
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.run.evaluate import evaluation_ids, run_episodes, sampling_policy, wilson
from common.run.runs import choose_key
from common.simulation.assets import load_pack
from common.simulation.tasks import decode, instruction
from common.simulation.vec_env import make_envs


@dataclass
class Args:
    checkpoint: str
    output: str = "results/language.json"
    task: str = "multi_carrot"  # its third body is another object
    split: Literal["train", "test", "all"] = "train"
    num_episodes: int = 192  # of the paired evaluation list
    temperature: float = 0.6
    assets: Literal["primitive", "bridge"] = "primitive"
    num_envs: int = 64


def main(args: Args):
    from common.model.openvla import load_vla

    torch.set_num_threads(2)
    model = load_vla(args.checkpoint, value_head=False, trainable=False)
    key, pack = choose_key(model.norm_stats, "", args.assets), load_pack(args.assets)
    ids = evaluation_ids(args.task, args.split, args.num_episodes)
    e = decode(args.task, args.split, ids)
    if e.third != "object":
        raise ValueError(f"task = {args.task} has no second object; use multi_carrot")
    others = [
        instruction(t, pack.objects[o].name, pack.plates[p].name)
        for t, o, p in zip(e.template, e.third_index, e.plate, strict=True)
    ]
    envs = make_envs(args.task, args.split, args.num_envs, assets=args.assets)
    results = {"arguments": vars(args)}
    for name in ("right object named", "other object named"):
        policy = sampling_policy(model, key, args.temperature, ids)
        named = lambda images, texts, rows, policy=policy: policy(images, [others[row] for row in rows], rows)  # noqa: E731
        outcome = run_episodes(policy if name.startswith("right") else named, envs, ids)
        results[name] = {
            what: {"k": int(outcome[what].sum()), "n": len(ids), "interval": wilson(outcome[what].sum(), len(ids))}
            for what in ("success_at_end", "grasped")
        }
        print(name, {what: f"{np.mean(outcome[what]):.2f}" for what in ("success_at_end", "grasped")}, flush=True)
    envs.close()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
