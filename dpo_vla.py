"""DPO for a vision-language-action model in simulation (Rafailov et al. 2023; Liu et al. 2025).

    python dpo_vla.py --num-envs 64               # small model, embedded scene, any CPU
    python dpo_vla.py --preset paper              # OpenVLA-7B, LoRA, published scene, 80 GB GPU
    torchrun --nproc-per-node 2 dpo_vla.py        # the same update on two GPUs or machines
    python dpo_vla.py --resume runs/NAME          # continues exactly

The paper takes GRAPE's loss (Zhang et al. 2024): DPO on trajectories tau from one first state,
    L = -log sigmoid(beta [log pi(tau_w) / pi_ref(tau_w) - log pi(tau_l) / pi_ref(tau_l)]),
of which tau_w has the higher return. Its code was never released; our decisions (docs/dpo_vla.md):
 1. Every iteration collects with the current policy; `--num-iterations 1` is offline DPO.
 2. Two passes give the exact gradient of a whole trajectory's loss in micro-batches of steps.
 3. The reference is the start: LoRA turned off, or a frozen copy where LoRA did not begin anew.
"""

import math
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common.model.checkpoints import locate, trainable_parameters
from common.run.args import Model, Run, Scene, check, check_args, parse_args
from common.run.evaluate import run_episodes, write_video
from common.run.experiment import Experiment, load_start
from common.run.metrics import Means, episode_metrics
from common.run.ranks import gather_over_ranks, minibatches, setup_ranks, sum_gradients
from common.simulation.env import SCENES
from common.simulation.episodes import training_episodes
from common.simulation.vec_env import make_envs


# --- args ---
@dataclass
class Args:
    """[G] = the value of GRAPE's code, where the default is another one."""

    run: Run = field(default_factory=Run)  # name, seed, resume, device, evaluation
    scene: Scene = field(default_factory=Scene)  # task, small or published, cpu or cuda
    model: Model = field(default_factory=Model)  # start, dtype, LoRA, what is frozen
    # rollout
    num_envs: int = 64  # over all ranks
    num_steps: int = 160  # control steps per environment and iteration
    num_iterations: int = 85
    temperature: float = 1.0  # of sampling, and of the distribution that is scored
    # pairs
    num_trajectories: int = 8  # from each initial state
    pairs_per_state: int = 4  # at most: equal returns make no pair
    # update of the policy
    beta: float = 0.1  # per nat of a trajectory's log-ratio, which is a sum over its steps
    learning_rate: float = 3e-5  # AdamW [G] 2e-5
    anneal_lr: bool = True  # linear to 0 over the run [G] False
    update_epochs: int = 1
    pairs_per_batch: int = 8  # pairs per optimizer step [G] 1
    micro_batch_size: int = 40  # steps of a trajectory per forward: only memory and speed
    max_grad_norm: float = 10.0


PRESETS = {
    "default": Args(),
    "paper": Args(
        scene=Scene(scene="published", sim_device="cuda"),
        model=Model("gen-robot/openvla-7b-rlvla-warmup", "bridge_orig", "bfloat16", lora_rank=32),
        num_steps=80, num_iterations=391, learning_rate=2e-5, anneal_lr=False, pairs_per_batch=1,
        micro_batch_size=8,
    ),
}  # fmt: skip


# --- pairs ---
def make_pairs(returns, num_trajectories, pairs_per_state):
    """Of each state: best and worst, second best and second worst, ...; no row is in two pairs.

    Args: returns: (E,) float; each `num_trajectories` in a row began in the same state.
    Returns: pairs (P, 2) int64, rows of chosen and rejected trajectories, `pairs_per_state` of
        every state; differ (P,) bool: the chosen one has the higher return.
    """
    assert returns.ndim == 1
    # A stage is worth 0.1: rounding errors of summed rewards make no difference
    scores = returns.astype(np.float64).round(1)
    states = scores.reshape(-1, num_trajectories)
    order = np.argsort(-states, axis=1, kind="stable")
    order += np.arange(0, len(scores), num_trajectories)[:, None]
    chosen = order[:, :pairs_per_state].flatten()
    rejected = order[:, ::-1][:, :pairs_per_state].flatten()
    pairs = np.stack([chosen, rejected], axis=1)
    return pairs, scores[chosen] > scores[rejected]


# --- loss ---
def dpo_loss(chosen_logratios, rejected_logratios, beta):
    """-log sigmoid(margin) and margin = beta (chosen - rejected), (M,) (Rafailov et al., eq. 7).

    chosen_logratios, rejected_logratios: (M,) float32 nats, log pi(tau) - log pi_ref(tau).
    """
    assert chosen_logratios.shape == rejected_logratios.shape
    margins = beta * (chosen_logratios - rejected_logratios)
    return -F.logsigmoid(margins), margins


# --- update ---
class Batch(NamedTuple):
    """E trajectories of L steps that this rank has collected, and pairs of them."""

    obs: torch.Tensor  # (E, L, ...) what the model sees: pixels, or image tokens of frozen eyes
    instructions: list[str]  # E
    actions: torch.Tensor  # (E, L, 7) int64 tokens
    pairs: torch.Tensor  # (P, 2) int64, rows of chosen and rejected trajectories
    differ: np.ndarray  # (P of all ranks,) bool: False = equal returns, left out of the update


def score(model, batch, row, args):
    """Yields log pi () float32 of a trajectory's micro-batches of steps, under the model now."""
    # None spans two trajectories: in the same shapes, equal weights give equal numbers bit for bit
    for first in range(0, batch.actions.shape[1], args.micro_batch_size):
        steps = slice(first, first + args.micro_batch_size)
        actions = batch.actions[row, steps]
        texts = [batch.instructions[row]] * len(actions)
        inputs = batch.obs[row, steps], texts, actions
        logprobs, _, _ = model.evaluate_actions(*inputs, args.temperature)
        yield logprobs.sum()


@torch.no_grad()
def trajectory_logprobs(model, batch, rows, args):
    """log pi(tau) (M,) float32 of the trajectories in these rows."""
    logprobs = torch.zeros(len(rows))
    for i, row in enumerate(rows):
        logprobs[i] = sum(score(model, batch, row, args))
    return logprobs


def update_policy(model, optimizer, batch, ref_logprobs, args, rng):
    """DPO epochs over the pairs of one iteration. A minibatch spans all ranks.

    A pair's loss is no sum over micro-batches: a sigmoid is around the sum over all steps. So a
    first pass without gradients finds the slope of the loss at each trajectory's log-ratio. With
    these constants the loss is linear in every step's log-prob, and a second pass may go backward
    through one micro-batch after another. ref_logprobs: (E,) float32. Returns: dict of metrics.
    """
    parameters = optimizer.param_groups[0]["params"]
    samples = np.flatnonzero(batch.differ)
    num_minibatches = math.ceil(len(samples) / args.pairs_per_batch)
    stats = Means()
    for _ in range(args.update_epochs):
        for mb_inds, mb_size in minibatches(samples, len(batch.differ), num_minibatches, rng):
            # First pass: log-ratios of whole trajectories, and the slopes of the loss at them
            rows = batch.pairs[mb_inds].flatten()
            logratios = trajectory_logprobs(model, batch, rows, args) - ref_logprobs[rows]
            logratios.requires_grad_()
            chosen, rejected = logratios[0::2], logratios[1::2]
            losses, margins = dpo_loss(chosen, rejected, args.beta)
            (losses.sum() / mb_size).backward()

            # Second pass: micro-batches and ranks add up to the mean over the minibatch
            optimizer.zero_grad()
            for row, slope in zip(rows, logratios.grad, strict=True):
                for part in score(model, batch, row, args):
                    (slope * part).backward()
            sum_gradients(parameters)
            norm = clip_grad_norm_(parameters, args.max_grad_norm, error_if_nonfinite=True)
            optimizer.step()

            stats.add("losses/dpo_loss", losses)
            stats.add("losses/grad_norm", norm)
            stats.add("rewards/chosen", args.beta * chosen)
            stats.add("rewards/rejected", args.beta * rejected)
            stats.add("rewards/margins", margins)
            stats.add("rewards/accuracies", margins > 0)
    return stats.means()


# --- rollout ---
def collect(model, envs, numbers, iteration, record, args):
    """Episodes of the policy as it is now, `num_trajectories` in a row from each initial state.

    numbers: (E,), of this rank's among all. Returns: obs, actions (see `Batch`), their results.
    """
    ids, generators = [], []
    seed = (args.run.seed, iteration)
    for number in numbers:
        # Random numbers depend on (seed, iteration, state, trajectory) alone; 0 is the state's own
        state, k = divmod(number, args.num_trajectories)
        rng = np.random.default_rng((*seed, state))
        ids.append(next(training_episodes(args.scene.task, rng, envs.fidelity)))
        rng = np.random.default_rng((*seed, state, 1 + k))
        generators.append(torch.Generator().manual_seed(int(rng.integers(2**62))))
    obs = [[] for _ in ids]
    actions = [[] for _ in ids]

    def policy(images, instructions, rows):
        inputs = model.preprocess(images).cpu()
        draws = [generators[row] for row in rows]
        tokens, _, _ = model.act(inputs, instructions, args.temperature, draws)
        for i, row in enumerate(rows):
            obs[row].append(inputs[i])
            actions[row].append(tokens[i].cpu())
        return model.decode_actions(tokens)

    results = run_episodes(policy, envs, ids, record)
    obs = torch.stack([torch.stack(steps) for steps in obs])
    actions = torch.stack([torch.stack(steps) for steps in actions])
    return obs, actions, results


def main(args):
    # E trajectories of L steps, P pairs of this rank
    # --- setup ---
    check_args(args, PRESETS, {})
    length = SCENES[args.scene.scene]["max_episode_steps"]
    right = args.num_steps % length == 0
    check(right, f"num_steps = {args.num_steps} must be a multiple of an episode's {length} steps")
    right = args.pairs_per_state <= args.num_trajectories // 2
    check(right, f"pairs_per_state = {args.pairs_per_state} must be <= num_trajectories / 2")
    batch_size = args.num_envs * args.num_steps  # of all ranks
    rank, world_size, device = setup_ranks(args.run.device, args.run.seed)
    size = batch_size // length // world_size
    numbers = np.arange(rank * size, (rank + 1) * size)  # of this rank's trajectories
    right = size % args.num_trajectories == 0
    check(right, f"num_trajectories must divide the {size} episodes of num_envs = {args.num_envs}")

    model = load_start(args.run, args.model, device)
    reference = None
    policy_optimizer = torch.optim.AdamW(trainable_parameters(model), lr=args.learning_rate)
    state = {"policy": policy_optimizer}
    if not args.model.lora_rank or locate(args.model.model).adapter:
        # Turning LoRA off would not give the start: a copy, which --resume restores
        reference = state["reference"] = load_start(args.run, args.model, device)
    envs = make_envs(args.num_envs // world_size, **vars(args.scene))
    experiment = Experiment(args, model, envs, state)

    for iteration in range(experiment.iteration + 1, args.num_iterations + 1):
        # --- rollout ---
        start = time.monotonic()
        frac = 1.0 - (iteration - 1) / args.num_iterations if args.anneal_lr else 1.0
        policy_optimizer.param_groups[0]["lr"] = frac * args.learning_rate
        record = args.num_trajectories if rank == 0 and experiment.due(iteration) else 0
        obs, actions, results = collect(model, envs, numbers, iteration, record, args)

        # --- pairs ---
        pairs, differ = make_pairs(results["return"], args.num_trajectories, args.pairs_per_state)
        batch = Batch(
            obs=obs,
            instructions=results["instruction"].tolist(),
            actions=actions,
            pairs=torch.as_tensor(pairs),
            differ=np.concatenate(gather_over_ranks(differ)),
        )
        rows = pairs[differ].flatten()
        ref_logprobs = torch.zeros(len(actions))
        if reference is None:
            with model.disable_adapter():
                ref_logprobs[rows] = trajectory_logprobs(model, batch, rows, args)
        else:
            ref_logprobs[rows] = trajectory_logprobs(reference, batch, rows, args)
        if record and differ[0]:
            # Chosen left, rejected right
            sides = [results["frames"][row] for row in pairs[0]]
            path = experiment.run_dir / f"videos/{iteration:06d}-pair.mp4"
            both = np.concatenate(sides, axis=2)
            write_video(path, both, batch.instructions[0])
        rollout_s = time.monotonic() - start

        # --- update ---
        # Every rank draws the same minibatches; the states' streams have smaller numbers
        rng = np.random.default_rng((args.run.seed, iteration, batch_size))
        metrics = episode_metrics([results])
        if iteration == 1:
            # Policy and reference are still one
            again = trajectory_logprobs(model, batch, rows[:2], args)
            margin = (again - ref_logprobs[rows[:2]]).abs().sum()
            check(margin == 0, f"the first margin is {margin:.1e}, not 0: try --dtype float32")
            metrics["losses/first_margin"] = margin
        if batch.differ.any():
            metrics |= update_policy(model, policy_optimizer, batch, ref_logprobs, args, rng)
        update_s = time.monotonic() - start - rollout_s

        # --- metrics ---
        has_pair = batch.differ.reshape(-1, args.pairs_per_state).any(1)
        metrics["train/frac_without_pair"] = 1 - has_pair.mean()
        metrics["train/num_pairs"] = batch.differ.sum()
        metrics["charts/learning_rate"] = policy_optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = batch_size / (rollout_s + update_s)
        metrics["time/rollout_s"] = rollout_s
        metrics["time/update_s"] = update_s

        # --- evaluation, log, checkpoint ---
        experiment.finish(iteration, metrics, step=iteration * batch_size)

    experiment.close()


if __name__ == "__main__":
    main(parse_args(Args, PRESETS))
