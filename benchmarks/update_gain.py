"""What does one PPO update teach, by its settings? Measured on recorded episodes, without new ones.

python benchmarks/update_gain.py --model runs/NAME/checkpoint-000007 --num-episodes 768 --no-freeze-vision

Two thirds of the episodes train a critic (a head on the start's h0) and then the policy. On the others it prints the
sum over steps of (ratio - 1) A, the first-order gain in units of the normalised advantage A, and the KL it cost.
Settings to be compared need the same recording: `--recording` is made by the first call and read by the next.
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
from ppo_vla import gae, normalize, policy_loss

T = 40  # steps of an episode


@dataclass
class Args:
    model: str = "checkpoints/tiny-warmup"
    recording: str = "runs/update_gain.npz"
    num_episodes: int = 768
    num_envs: int = 64
    freeze_vision: bool = True
    lora_rank: int = 0  # of the language model; 0 = all its weights
    learning_rate: float = 1e-4
    minibatch_size: int = 512
    update_epochs: int = 1
    gae_lambda: float = 0.95  # of the update; the gain is measured with 0.95
    clip_coef: float = 0.2
    torch_threads: int = 2


def record(args, model):
    """Episodes of the start at temperature 1, one row each: images, action_tokens, logprobs, rewards, instructions."""
    envs, (key,) = make_envs(num_envs=args.num_envs, max_episode_steps=T), model.norm_stats
    ids = training_ids("main", "train", args.num_episodes, np.random.default_rng(99))
    generators = [torch.Generator().manual_seed(1000 + i) for i in range(args.num_envs)]
    rows = {name: [] for name in ("images", "action_tokens", "logprobs", "rewards", "instructions")}
    for batch in ids.reshape(-1, args.num_envs):
        images, instructions = envs.reset(batch)
        steps = []
        for _ in range(T):
            inputs = model.fit_images(images)
            tokens, logprobs, _ = model.act(inputs, instructions, 1.0, generators)
            images, rewards, _, _ = envs.step(model.actions_from_tokens(tokens, key))
            steps.append((inputs.numpy(), tokens.numpy(), logprobs.numpy(), rewards))
        for name, values in zip(rows, zip(*steps, strict=True), strict=False):
            rows[name].append(np.stack(values, axis=1))
        rows["instructions"].append(np.array(instructions))
    envs.close()
    np.savez(args.recording, **{name: np.concatenate(values) for name, values in rows.items()})


def fit_critic(hidden, returns, train):
    """Values (E, T) of an MLP on hidden (E, T, D), fitted to returns (E, T) of the episodes `train`."""
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(hidden.shape[-1], 128), torch.nn.GELU(), torch.nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3)
    x, y = hidden[train].flatten(0, 1), returns[train].flatten()
    for rows in (rows for _ in range(5) for rows in torch.randperm(len(x)).split(512)):
        optimizer.zero_grad()
        F.mse_loss(head(x[rows])[:, 0], y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return head(hidden)[..., 0]


def main(args: Args):
    from common.vla import load_vla

    if args.num_episodes % args.num_envs or args.num_episodes < 2 * args.num_envs:
        raise ValueError(
            f"num_episodes = {args.num_episodes} must be >= 2 and a multiple of num_envs = {args.num_envs}"
        )
    torch.set_num_threads(args.torch_threads)
    settings = dict(value_head=False, lora_rank=args.lora_rank, lora_targets="llm", freeze_vision=args.freeze_vision)
    model = load_vla(args.model, **settings)
    Path(args.recording).parent.mkdir(parents=True, exist_ok=True)
    if not Path(args.recording).exists():
        record(args, model)
    data = dict(np.load(args.recording, allow_pickle=False))
    images, tokens, old = (torch.from_numpy(data[k]).flatten(0, 1) for k in ("images", "action_tokens", "logprobs"))
    texts, rewards = np.repeat(data["instructions"], T), torch.from_numpy(data["rewards"]).T.contiguous()  # (T, E)
    num_episodes = rewards.shape[1]
    train, test = torch.arange(num_episodes).split([num_episodes * 2 // 3, num_episodes - num_episodes * 2 // 3])
    rows_of = lambda episodes: (episodes[:, None] * T + torch.arange(T)).flatten()  # noqa: E731

    # --- critic ---
    with torch.no_grad():
        prompts = [model.tokenize(texts[rows].tolist()) for rows in torch.arange(len(texts)).split(512)]
        parts = zip(images.split(512), prompts, strict=True)
        hidden = torch.cat([model.backbone.hidden(*model.backbone.embed(x, *prompt))[:, 0] for x, prompt in parts])
    dones, last = torch.zeros_like(rewards), torch.zeros(num_episodes)
    dones[-1] = 1
    returns = gae(rewards, torch.zeros_like(rewards), dones, last, 0.99, 1.0)[0].T
    values = fit_critic(hidden.view(num_episodes, T, -1), returns, train).T.contiguous()
    explained = 1 - (values.T - returns)[test].var() / returns[test].var()
    advantages = lambda gae_lambda: gae(rewards, values, dones, last, 0.99, gae_lambda)[0]  # noqa: E731
    measured, used = (normalize(x, x).T.flatten() for x in (advantages(0.95), advantages(args.gae_lambda)))

    # --- update ---
    start, parameters = time.time(), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.01)
    rng, rows = np.random.default_rng(0), rows_of(train)
    for minibatch in (
        m for _ in range(args.update_epochs) for m in rows[rng.permutation(len(rows))].split(args.minibatch_size)
    ):
        optimizer.zero_grad()
        for part in minibatch.split(256):
            logprobs = model.evaluate(images[part], texts[part].tolist(), tokens[part])[0]
            (policy_loss(logprobs, old[part], used[part], args.clip_coef)[0].sum() / len(minibatch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()

    # --- other episodes ---
    with torch.no_grad():
        parts = rows_of(test).split(256)
        logratios = torch.cat([model.evaluate(images[p], texts[p].tolist(), tokens[p])[0] - old[p] for p in parts])
    ratios = logratios.exp()
    gains = ((ratios - 1) * measured[rows_of(test)]).view(-1, T).sum(1)
    kl = (ratios - 1 - logratios).mean().item()
    print(
        f"{sum(p.numel() for p in parameters) / 1e6:.2f} M weights, explained variance {explained:.2f} | gain per "
        f"episode {gains.mean():+.3f} +- {gains.std() / len(gains) ** 0.5:.3f} | KL {kl:.4f} | gain / sqrt(KL) "
        f"{gains.mean() / max(kl, 1e-9) ** 0.5:.2f} | {time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
