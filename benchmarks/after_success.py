"""How a policy loses what it had put down: episodes that succeed once and not at the end, step by step.

    python benchmarks/after_success.py --checkpoint runs/ppo/checkpoint-000085

One line per such episode: steps of the first and the last success, in how many steps between them the gripper was told
to be open, and the object's distance from the plate's middle and height above it at the end, in cm.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.model.openvla import load_vla  # noqa: E402
from common.run.evaluate import evaluation_ids, run_episodes, sampling_policy  # noqa: E402
from common.run.runs import choose_key  # noqa: E402
from common.simulation.vec_env import make_envs  # noqa: E402


@dataclass
class Args:
    checkpoint: str
    num_episodes: int = 192  # the first ones of eval_ood.py's row in_distribution, other random draws
    num_envs: int = 64
    temperature: float = 0.6
    seed: int = 0  # of the draws


def main(args: Args):
    ids = evaluation_ids("carrot", "train", args.num_episodes)
    model = load_vla(args.checkpoint, value_head=False, trainable=False)
    policy = sampling_policy(model, choose_key(model.norm_stats, "", "primitive"), args.temperature, ids, args.seed)
    envs, log = make_envs("carrot", "train", args.num_envs), []
    step = envs.step

    def logged_step(actions):
        outcome, state = step(actions), envs.privileged_state()
        opened = np.asarray(actions)[:, 6] > 0.5
        log.append((outcome[3]["success"].copy(), opened, state["object_pose"][:, :3] - state["plate_pose"][:, :3]))
        return outcome

    envs.step, succeeded, lost = logged_step, 0, []
    for first in range(0, len(ids), args.num_envs):
        log.clear()
        part = ids[first : first + args.num_envs]
        run_episodes(lambda images, texts, rows, first=first: policy(images, texts, rows + first), envs, part)
        for row in range(len(part)):
            success, opened, offset = (np.array([entry[i][row] for entry in log]) for i in range(3))
            succeeded += success.any()
            if success.any() and not success[-1]:
                steps = np.flatnonzero(success)
                between = slice(steps[0], steps[-1] + 1)
                away, above = 100 * np.linalg.norm(offset[-1, :2]), 100 * offset[-1, 2]
                lost.append((steps[0] + 1, steps[-1] + 1, opened[between].sum(), away, above))
    envs.close()
    print(f"{len(ids)} episodes, {succeeded} succeed once, {len(lost)} of them not at the end")
    for line in sorted(lost):
        print("first {:2d}, last {:2d}, open in {:2d}; {:4.1f} cm off, {:3.1f} above".format(*line))


if __name__ == "__main__":
    main(tyro.cli(Args))
