"""What does one PPO update teach, by its settings? Measured on recorded episodes, without new ones.

python benchmarks/update_gain.py --settings 4e-5:1e-8:1:0.8 1e-3:1e-2:1:0.8

The recording is that of gradient_signal.py. The policy is updated on one quarter of its episodes; on another it prints
the sum over steps of (ratio - 1) A, the first-order gain of return per episode, and the KL that it cost; then the other
way round, and the mean of both. Advantages of the two quarters come from state critics fitted on the third and the
fourth, so that one critic's error does not pass for a gain. The gain is measured with lambda .8 and, with far more
noise but no trust in a critic, with lambda 1.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.gradient_signal import T, discounted_returns, fit_critic, recording
from ppo_vla import gae, normalize, policy_loss


@dataclass
class Args:
    settings: tuple[str, ...]  # learning rate:Adam's eps:epochs:lambda, each a line of the result
    model: str = "checkpoints/tiny-warmup"
    recording: str = "runs/gradient_signal.pt"  # made by the first call and read by the next
    num_episodes: int = 1024
    num_minibatches: int = 20
    clip_coef: float = 0.2
    temperature: float = 1.0  # sampled from and scored
    num_envs: int = 64
    num_workers: int = 0  # 0 = one per core
    torch_threads: int = 2
    dtype: str = "float32"  # of matmuls; bfloat16 is faster where the processor has it


def logprobs_of(model, data, rows, temperature):
    """(M,) float32 nats of the recorded actions of rows (M,)."""
    texts = [data["instructions"][row // T] for row in rows.tolist()]
    inputs, tokens = data["inputs"].flatten(0, 1)[rows], data["action_tokens"].flatten(0, 1)[rows]
    return model.evaluate(inputs, texts, tokens, temperature)[0]


def main(args: Args):
    from common.model.openvla import load_vla

    if args.num_episodes % args.num_envs or args.num_episodes % 4:
        rule = f"must be a multiple of 4 and of num_envs = {args.num_envs}; use 1024 and 64"
        raise ValueError(f"num_episodes = {args.num_episodes} {rule}")
    if any(setting.count(":") != 3 for setting in args.settings):
        raise ValueError(f"settings = {args.settings} must be LR:EPS:EPOCHS:LAMBDA each; use 4e-5:1e-8:1:0.8")
    torch.set_num_threads(args.torch_threads)
    load = lambda: load_vla(args.model, dtype=getattr(torch, args.dtype), value_head=False, freeze_vision=True)  # noqa: E731
    data = recording(args, load())
    rewards = data["rewards"].float().T.contiguous()  # (T, E)
    quarter = torch.arange(rewards.shape[1]) % 4
    dones, last = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
    dones[-1] = 1
    values = fit_critic(data["states"], discounted_returns(rewards).T.contiguous(), quarter).T.contiguous()
    advantages_of = lambda lam: gae(rewards, values, dones, last, 0.99, lam)[0].T.contiguous()  # (E, T)  # noqa: E731
    halves = [(torch.nonzero(quarter == q) * T + torch.arange(T)).flatten() for q in (0, 1)]  # rows of E x T
    with torch.no_grad():
        model = load()
        old = torch.zeros(rewards.numel())
        for rows in (rows for half in halves for rows in half.split(256)):
            old[rows] = logprobs_of(model, data, rows, args.temperature)
    for setting in args.settings:
        learning_rate, eps, epochs, gae_lambda = (float(part) for part in setting.split(":"))
        start, gains, kls = time.time(), {0.8: [], 1.0: []}, []
        for train, test in (halves, halves[::-1]):
            model, advantages = load(), advantages_of(gae_lambda).flatten()
            advantages = normalize(advantages, advantages[train])
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, learning_rate, eps=eps, weight_decay=0.01)
            rng = np.random.default_rng(0)
            permutations = (train[rng.permutation(len(train))] for _ in range(int(epochs)))
            for rows in (rows for each in permutations for rows in each.chunk(args.num_minibatches)):
                optimizer.zero_grad()
                for part in rows.split(128):
                    logprobs = logprobs_of(model, data, part, args.temperature)
                    (policy_loss(logprobs, old[part], advantages[part], args.clip_coef)[0].sum() / len(rows)).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 10.0)
                optimizer.step()
            with torch.no_grad():
                logratios = torch.cat([logprobs_of(model, data, p, args.temperature) - old[p] for p in test.split(256)])
            kls.append((logratios.exp() - 1 - logratios).mean().item())
            for lam, parts in gains.items():
                parts.append(((logratios.exp() - 1) * advantages_of(lam).flatten()[test]).view(-1, T).sum(1))
        gains = {lam: torch.cat(parts) for lam, parts in gains.items()}
        text = " | ".join(f"lambda {k}: {g.mean():+.3f} +- {g.std() / len(g) ** 0.5:.3f}" for k, g in gains.items())
        print(f"{setting} | gain, {text} | KL {np.mean(kls):.4f} | {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
