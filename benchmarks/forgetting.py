"""Why learning from one's own samples forgets less: a toy of docs/study.md, in a minute.

    python benchmarks/forgetting.py --output results/study/forgetting.json

A policy of 10 actions knows two things. Skill: pictures of 10 kinds, each with one right action.
Task: pictures of 10 other kinds, where 5 of the 10 actions are right; the policy succeeds in two
thirds. It is fine-tuned on the task alone, in four ways, until it succeeds in .99, and then asked
for the skill again ("RL's razor", Shenfeld et al. 2025):

RL            samples its own action; the reward is 1 where it is one of the right ones
SFT           imitates an expert, who always takes the same one of the right actions
RL, one way   samples its own action; but only the expert's is rewarded
SFT, nearest  imitates the start's own choice among the right actions, which is as close as can be

If RL keeps the skill because it samples, both RL keep it. If it keeps it because it ends near the
start, RL and "SFT, nearest" keep it, and the other two lose it.
"""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.run.files import check, write_atomic  # noqa: E402

ACTIONS, SIZE, NOISE = 10, 16, 0.4  # of actions; of a picture; standard deviation within a kind
RIGHT = torch.eye(2).repeat(ACTIONS // 2, ACTIONS // 2).bool()  # (kind, action): equal parity
EXPERT = torch.arange(ACTIONS) % 2  # (kind,): 0 or 1
WAYS = ("RL", "SFT", "RL, one way", "SFT, nearest")


@dataclass
class Args:
    seeds: int = 10
    learning_rate: float = 0.1  # SGD, of all four ways
    success: float = 0.99  # where fine-tuning ends
    output: str = ""  # file of results


def draw(means, n):
    """n pictures (n, SIZE) and their kinds (n,)."""
    kinds = torch.randint(0, ACTIONS, (n,))
    return means[kinds] + NOISE * torch.randn(n, SIZE), kinds


def make_start(skill, task):
    """A policy that knows the skill, and succeeds in two thirds of the task."""
    model = torch.nn.Sequential(
        torch.nn.Linear(SIZE, 64), torch.nn.ReLU(), torch.nn.Linear(64, ACTIONS)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(2000):
        x, kinds = draw(skill, 128)
        y, others = draw(task, 128)
        noisy = torch.rand(128) < 2 / 3  # half of these are right by chance
        other = torch.randint(0, ACTIONS, (128,))
        loss = F.cross_entropy(model(x), kinds)
        loss = loss + F.cross_entropy(model(y), torch.where(noisy, other, others))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def loss_of(way, model, start, pictures, kinds):
    logprobs = model(pictures).log_softmax(1)
    if way == "SFT":
        return F.nll_loss(logprobs, EXPERT[kinds])
    if way == "SFT, nearest":
        with torch.no_grad():
            target = start(pictures).softmax(1) * RIGHT[kinds]
        return F.cross_entropy(logprobs, target / target.sum(1, keepdim=True))
    action = torch.multinomial(logprobs.detach().exp(), 1)[:, 0]
    right = RIGHT[kinds, action] if way == "RL" else action == EXPERT[kinds]
    advantage = right.float() - right.float().mean()
    return -(advantage * logprobs.gather(1, action[:, None])[:, 0]).mean()


@torch.no_grad()
def measure(model, start, skill, task):
    pictures, kinds = draw(skill, 4096)
    kept = (model(pictures).argmax(1) == kinds).float().mean()
    pictures, kinds = draw(task, 4096)
    now, before = (m(pictures).log_softmax(1) for m in (model, start))
    success = (now.exp() * RIGHT[kinds]).sum(1).mean()
    kl = (now.exp() * (now - before)).sum(1).mean()
    return {"success": success.item(), "skill": kept.item(), "KL to start": kl.item()}


def main(args):
    torch.set_num_threads(1)
    found = {way: [] for way in ("start", *WAYS)}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        skill, task = torch.randn(2, ACTIONS, SIZE)
        start = make_start(skill, task)
        found["start"].append(measure(start, start, skill, task) | {"updates": 0})
        for way in WAYS:
            model, updates = copy.deepcopy(start), 0
            optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
            while (now := measure(model, start, skill, task))["success"] < args.success:
                for _ in range(20):
                    loss = loss_of(way, model, start, *draw(task, 128))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                updates += 20
                check(updates < 20_000, f"{way} does not learn: {now}")
            found[way].append(now | {"updates": updates})
    rows = []
    for way, runs in found.items():
        means = {key: np.mean([run[key] for run in runs]) for key in runs[0]}
        spread = np.std([run["skill"] for run in runs], ddof=1)
        rows.append({"": way, **means, "skill, std over seeds": spread})
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    if args.output:
        write_atomic(Path(args.output), json.dumps(found, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
