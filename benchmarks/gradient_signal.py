"""How much of a policy gradient is signal? By the choice of advantages, on recorded episodes, without new ones.

python benchmarks/gradient_signal.py --model checkpoints/tiny-warmup --num-episodes 512

Episodes are cut into chunks. If the gradients of two chunks have the cosine c, then a chunk's gradient has the squared
signal-to-noise ratio c / (1 - c): twice as many episodes, twice that. A critic (a head on the start's h0, fitted on the
other half of the episodes) that errs in the same way in all chunks looks like signal too, so a high cosine is necessary
for learning, not sufficient. Printed for the raw gradient and for one scaled per weight, as Adam does.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.evaluate import training_ids
from common.vec_env import make_envs
from ppo_vla import gae

T = 40  # steps of an episode


@dataclass
class Args:
    model: str = "checkpoints/tiny-warmup"
    recording: str = "runs/gradient_signal.pt"  # made by the first call and read by the next
    num_episodes: int = 512
    num_chunks: int = 8
    gae_lambdas: tuple[float, ...] = (0.8, 0.9, 0.95, 1.0)  # and always: returns without a critic
    num_envs: int = 64
    torch_threads: int = 2


def record(args, model):
    """Episodes of the start at temperature 1: dict of what the model saw, action_tokens (E, T, 7), rewards (E, T)."""
    envs, (key,) = make_envs(num_envs=args.num_envs, max_episode_steps=T), model.norm_stats
    ids = training_ids("main", "train", args.num_episodes, np.random.default_rng(99))
    generators = [torch.Generator().manual_seed(1000 + i) for i in range(args.num_envs)]
    data = {name: [] for name in ("inputs", "action_tokens", "rewards")}
    texts = []
    for batch in ids.reshape(-1, args.num_envs):
        images, instructions = envs.reset(batch)
        steps = []
        for _ in range(T):
            inputs = model.rollout_inputs(images)
            tokens = model.act(inputs, instructions, 1.0, generators)[0]
            images, rewards, _, _ = envs.step(model.actions_from_tokens(tokens, key))
            steps.append((inputs, tokens, torch.as_tensor(rewards)))
        for name, values in zip(data, zip(*steps, strict=True), strict=True):
            data[name].append(torch.stack(values, dim=1))
        texts += instructions
    envs.close()
    torch.save({name: torch.cat(values) for name, values in data.items()} | {"instructions": texts}, args.recording)


def fit_critic(hidden, returns):
    """Values (E, T): each half of the episodes by a head on hidden (E, T, D) that was fitted to the other half."""
    values = torch.zeros_like(returns)
    for half in range(2):
        train = torch.arange(len(returns)) % 2 == half
        torch.manual_seed(0)
        head = torch.nn.Sequential(torch.nn.Linear(hidden.shape[-1], 128), torch.nn.GELU(), torch.nn.Linear(128, 1))
        optimizer = torch.optim.AdamW(head.parameters(), 1e-3)
        x, y = hidden[train].flatten(0, 1), returns[train].flatten()
        for rows in (rows for _ in range(4) for rows in torch.randperm(len(x)).split(256)):
            optimizer.zero_grad()
            F.mse_loss(head(x[rows])[:, 0], y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            values[~train] = head(hidden[~train])[..., 0]
    return values


def mean_cosine(gradients):
    """Mean cosine of all pairs of rows, and its standard error as if the pairs were independent."""
    unit = F.normalize(gradients, dim=1)
    pairs = (unit @ unit.T)[torch.triu(torch.ones(len(unit), len(unit), dtype=torch.bool), 1)]
    return pairs.mean().item(), (pairs.std() / len(pairs) ** 0.5).item()


def main(args: Args):
    from common.vla import load_vla

    if args.num_episodes % args.num_envs or args.num_chunks < 2:
        raise ValueError(
            f"num_episodes = {args.num_episodes} must be a multiple of num_envs = {args.num_envs} and num_chunks = "
            f"{args.num_chunks} >= 2; use 512 and 8"
        )
    torch.set_num_threads(args.torch_threads)
    model = load_vla(args.model, value_head=False, freeze_vision=True)
    if not Path(args.recording).exists():
        Path(args.recording).parent.mkdir(parents=True, exist_ok=True)
        record(args, model)
    data = torch.load(args.recording, weights_only=True)
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
    returns = gae(rewards, torch.zeros_like(rewards), dones, last, 0.99, 1.0)[0]
    values = fit_critic(hidden.view(num_episodes, T, -1), returns.T.contiguous()).T.contiguous()
    explained = 1 - (values - returns).var() / returns.var()
    print(f"{num_episodes} episodes, mean return {rewards.sum(0).mean():.2f}, explained variance {explained:.2f}")
    advantages = {"returns - their mean per step": returns - returns.mean(1, keepdim=True)}
    for gae_lambda in args.gae_lambdas:
        advantages[f"lambda {gae_lambda}"] = gae(rewards, values, dones, last, 0.99, gae_lambda)[0]

    # --- gradients ---
    parameters = [p for p in model.parameters() if p.requires_grad]
    for name, advantage in advantages.items():
        start, gradients = time.time(), []
        advantage = ((advantage - advantage.mean()) / advantage.std()).T.flatten()
        for chunk in torch.arange(num_episodes).chunk(args.num_chunks):
            model.zero_grad()
            rows = (chunk[:, None] * T + torch.arange(T)).flatten()
            for part in rows.split(256):
                logprobs = model.evaluate(inputs[part], [texts[row] for row in part], tokens[part])[0]
                (-(logprobs * advantage[part]).sum() / len(rows)).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        gradients = torch.stack(gradients)
        scaled = gradients / (gradients.square().mean(0).sqrt() + 1e-8)
        (raw, raw_se), (adam, adam_se) = mean_cosine(gradients), mean_cosine(scaled)
        cosines = f"cosine {raw:+.3f} +- {raw_se:.3f}, scaled {adam:+.3f} +- {adam_se:.3f}"
        print(f"{name:30} {cosines} | {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
