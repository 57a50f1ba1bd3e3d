"""How much of a policy gradient is signal? By the choice of advantages, on recorded episodes, without new ones.

python benchmarks/gradient_signal.py --model checkpoints/tiny-warmup --num-episodes 512

A quarter of the episodes, cut into chunks, is compared with another quarter. If the gradients of two chunks have the
cosine c, a chunk's gradient has the squared signal-to-noise ratio c / (1 - c): twice as many episodes, twice that.
Their critics, on h0 or on the simulator's state, are fitted on the third and the fourth quarter, so that one critic's
error does not look like signal; what both get wrong still does. Printed for the raw gradient and for one scaled per
weight, as Adam does.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.model.critic import state_features
from common.run.evaluate import training_ids
from common.simulation.vec_env import make_envs
from eval_ood import fingerprint
from ppo_vla import gae

T = 40  # steps of an episode


@dataclass
class Args:
    model: str = "checkpoints/tiny-warmup"
    recording: str = "runs/gradient_signal.pt"  # made by the first call and read by the next
    num_episodes: int = 1024
    num_chunks: int = 4  # of each quarter that is compared
    gae_lambdas: tuple[float, ...] = (0.5, 0.65, 0.8, 0.95, 1.0)
    temperature: float = 1.0  # sampled from and scored
    num_envs: int = 64
    num_workers: int = 0  # 0 = one per core
    torch_threads: int = 2
    dtype: str = "float32"  # of matmuls; bfloat16 is faster where the processor has it


def record(args, model):
    """Episodes of the start: dict of what the model saw, action_tokens (E, T, 7), rewards (E, T), and
    states (E, T, D) as a state critic reads them."""
    envs = make_envs(num_envs=args.num_envs, max_episode_steps=T, num_workers=args.num_workers)
    (key,) = model.norm_stats
    ids = training_ids("main", "train", args.num_episodes, np.random.default_rng(99))
    generators = [torch.Generator().manual_seed(1000 + i) for i in range(args.num_envs)]
    data = {name: [] for name in "inputs action_tokens rewards states".split()}
    texts = []
    for batch in ids.reshape(-1, args.num_envs):
        images, instructions = envs.reset(batch)
        steps, flags = [], np.zeros((args.num_envs, 3))
        for t in range(T):
            state = state_features(envs.privileged_state(), flags, np.full(args.num_envs, t / T))
            inputs = model.rollout_inputs(images)
            tokens = model.act(inputs, instructions, args.temperature, generators)[0]
            images, rewards, _, infos = envs.step(model.actions_from_tokens(tokens, key))
            flags = np.stack([infos[name] for name in ("grasped", "held", "success")], axis=1)
            steps.append((inputs, tokens, torch.as_tensor(rewards), state))
        for name, values in zip(data, zip(*steps, strict=True), strict=True):
            data[name].append(torch.stack(values, dim=1))
        texts += instructions
    envs.close()
    return {name: torch.cat(values) for name, values in data.items()} | {"instructions": texts}


def recording(args, model):
    """`record`'s episodes, made once and then read. ValueError: they are another policy's, or another number."""
    path = Path(args.recording)
    made_with = f"{args.model} {fingerprint(args.model)[:8]}, {args.num_episodes} at {args.temperature}, {args.dtype}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(record(args, model) | {"made_with": made_with}, path)
    data = torch.load(path, weights_only=True)
    if (found := data.get("made_with")) != made_with:
        raise ValueError(f"{path} is of {found}, not of {made_with}; remove it or choose another --recording")
    return data


def discounted_returns(rewards):
    """(T, E) of rewards (T, E): the sum of what follows, discounted by .99."""
    dones, zeros = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
    dones[-1] = 1
    return gae(rewards, torch.zeros_like(rewards), dones, zeros, 0.99, 1.0)[0]


def fit_critic(features, returns, quarter):
    """Values (E, T) by MLPs on features (E, T, D): quarter 0 by one fitted on quarter 2, quarter 1 by one of 3."""
    values = torch.zeros_like(returns)
    for q in range(2):
        torch.manual_seed(q)
        widths = (features.shape[-1], 256, 256)
        layers = [layer for pair in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(*pair), nn.GELU())]
        critic = nn.Sequential(*layers, nn.Linear(256, 1))
        optimizer = torch.optim.AdamW(critic.parameters(), 1e-3)
        x, y = features[quarter == q + 2].flatten(0, 1), returns[quarter == q + 2].flatten()
        for rows in (rows for _ in range(5) for rows in torch.randperm(len(x)).split(256)):
            optimizer.zero_grad()
            F.mse_loss(critic(x[rows])[:, 0], y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            values[quarter == q] = critic(features[quarter == q])[..., 0]
    return values


def mean_cosine(first, second):
    """Mean cosine of all pairs of a row of each, and its standard error as if the pairs were independent."""
    pairs = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    return pairs.mean().item(), (pairs.std() / pairs.numel() ** 0.5).item()


def main(args: Args):
    from common.model.openvla import load_vla

    if args.num_episodes % args.num_envs or args.num_episodes % 4 or args.num_chunks < 2:
        raise ValueError(
            f"num_episodes = {args.num_episodes} must be a multiple of 4 and of num_envs = {args.num_envs}, "
            f"num_chunks = {args.num_chunks} >= 2; use 1024, 64 and 4"
        )
    torch.set_num_threads(args.torch_threads)
    model = load_vla(args.model, dtype=getattr(torch, args.dtype), value_head=False, freeze_vision=True)
    data = recording(args, model)
    inputs, tokens = data["inputs"].flatten(0, 1), data["action_tokens"].flatten(0, 1)
    texts = np.repeat(data["instructions"], T).tolist()
    rewards = data["rewards"].float().T.contiguous()  # (T, E)
    num_episodes = rewards.shape[1]

    # --- advantages ---
    with torch.no_grad():
        prompts = [model.tokenize(texts[k : k + 512]) for k in range(0, len(texts), 512)]
        parts = zip(inputs.split(512), prompts, strict=True)
        hidden = torch.cat([model.backbone.hidden(*model.backbone.embed(x, *prompt))[:, 0] for x, prompt in parts])
    dones, last = torch.zeros_like(rewards), torch.zeros(num_episodes)
    dones[-1] = 1
    returns = discounted_returns(rewards)
    quarter, compared = torch.arange(num_episodes) % 4, torch.arange(num_episodes) % 4 < 2
    print(f"{num_episodes} episodes, mean return {rewards.sum(0).mean():.2f}")
    advantages = {"returns - their mean per step": returns - returns.mean(1, keepdim=True)}
    for critic, features in (("h0", hidden.view(num_episodes, T, -1)), ("state", data["states"])):
        values = fit_critic(features, returns.T.contiguous(), quarter).T.contiguous()
        explained = 1 - (values - returns)[:, compared].var() / returns[:, compared].var()
        print(f"{critic} critic: explained variance {explained:.2f}")
        for gae_lambda in args.gae_lambdas:
            advantages[f"{critic}, lambda {gae_lambda}"] = gae(rewards, values, dones, last, 0.99, gae_lambda)[0]

    # --- gradients ---
    parameters = [p for p in model.parameters() if p.requires_grad]
    for name, advantage in advantages.items():
        start, gradients = time.time(), []
        used = advantage[:, compared]
        advantage = ((advantage - used.mean()) / used.std()).T.flatten()
        for chunk in (c for q in range(2) for c in torch.nonzero(quarter == q).flatten().chunk(args.num_chunks)):
            model.zero_grad()
            rows = (chunk[:, None] * T + torch.arange(T)).flatten()
            for part in rows.split(256):
                logprobs = model.evaluate(inputs[part], [texts[row] for row in part], tokens[part], args.temperature)[0]
                (-(logprobs * advantage[part]).sum() / len(rows)).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        gradients = torch.stack(gradients)
        scaled = gradients / (gradients.square().mean(0).sqrt() + 1e-8)
        (raw, raw_se), (adam, adam_se) = (mean_cosine(*x.split(args.num_chunks)) for x in (gradients, scaled))
        cosines = f"cosine {raw:+.3f} +- {raw_se:.3f}, scaled {adam:+.3f} +- {adam_se:.3f}"
        print(f"{name:30} {cosines} | {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
