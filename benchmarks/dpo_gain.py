"""What does one DPO update teach, by its settings? Measured on stored pairs, without new episodes.

    python dpo_vla.py --num-iterations 1 --eval-every 0 --seed 1 --name pairs-1
    python dpo_vla.py --num-iterations 1 --eval-every 0 --seed 2 --name pairs-2
    python benchmarks/dpo_gain.py --settings "" learning-rate=5e-5 "learning-rate=5e-5 nll-coef=1"

Each setting, flags of dpo_vla.py without their dashes, updates the start on the first iteration's pairs of one run and
is measured on those of the other, then the other way round; the line has the means over both. Per pair, in nats:
* log gain: log-ratio to the start of the chosen one less that of the rejected one, which the loss is made of;
* ratio gain: sum over steps of (ratio - 1), chosen less rejected: the first-order gain if chosen steps are worth +1 and
  rejected ones -1. An action that has become impossible counts -1 here and any number above.
KL is per trajectory, of the start to the updated policy, by the estimator ratio - 1 - log ratio.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import dpo_vla  # noqa: E402
from common.run import pairs  # noqa: E402


@dataclass
class Args:
    settings: tuple[str, ...] = ("",)  # a line of the result each: "flag=value flag=value" of dpo_vla.py
    runs: tuple[str, str] = ("runs/pairs-1", "runs/pairs-2")  # of one start and temperature, with iteration 1's pairs
    torch_threads: int = 2


def load_pairs(path, model):
    """The pairs of iteration 1 as `dpo_vla.update` takes them; images are what a rollout keeps for an update."""
    data = pairs.load_pairs(Path(path) / "pairs" / "000001.npz")
    images = torch.from_numpy(pairs.decode_frames(data))
    return {
        "images": torch.stack([model.rollout_inputs(trajectory) for trajectory in images]),
        "instructions": data["instructions"].tolist(),
        "action_tokens": torch.from_numpy(data["action_tokens"]),
        "ref_logprobs": torch.from_numpy(data["ref_logprobs"]),
    }


def main(args: Args):
    from common.model.openvla import load_vla

    used = [json.loads((Path(run) / "args.json").read_text()) for run in args.runs]
    for key in ("model", "temperature"):
        if used[0][key] != used[1][key]:
            raise ValueError(f"{key} of the runs = {[run[key] for run in used]} must be equal; use runs of one start")
    settings = [tyro.cli(dpo_vla.Args, args=[f"--{flag}" for flag in setting.split()]) for setting in args.settings]
    settings = [replace(setting, temperature=used[0]["temperature"]) for setting in settings]
    for setting in settings:
        dpo_vla.check_args(setting)
    torch.set_num_threads(args.torch_threads)
    start = used[0]["model"] or "checkpoints/tiny-warmup"
    load = lambda: load_vla(start, value_head=False, freeze_vision=True)  # noqa: E731
    halves = [load_pairs(path, load()) for path in args.runs]
    for text, setting in zip(args.settings, settings, strict=True):
        began, gains, kls = time.time(), [], []
        for train, test in (halves, halves[::-1]):
            model = load()
            parameters = [p for p in model.backbone.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=setting.learning_rate, weight_decay=setting.weight_decay)
            metrics = dpo_vla.update(model, optimizer, train, setting, np.random.default_rng(0), Path("."), False)
            logratios = dpo_vla.all_logprobs(model, test, setting) - test["ref_logprobs"]  # (S, T)
            excess = logratios.exp() - 1
            both = torch.stack([logratios.sum(1), excess.sum(1)])  # (2, S)
            gains.append(both[:, 0::2] - both[:, 1::2])  # (2, P)
            kls.append((excess - logratios).sum(1).mean().item())
        gains = torch.cat(gains, dim=1)
        (log, ratio), (log_e, ratio_e) = gains.mean(1).tolist(), (gains.std(1) / gains.shape[1] ** 0.5).tolist()
        line = f"{text or 'defaults'} | log gain {log:+.3f} +- {log_e:.3f} | ratio gain {ratio:+.3f} +- {ratio_e:.3f}"
        line += f" | KL {np.mean(kls):.3f} | {metrics['losses/num_updates']} updates | {time.time() - began:.0f} s"
        print(line, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
