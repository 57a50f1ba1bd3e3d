"""Running a policy on a list of held-out episodes: success, intervals, videos."""

import time

import numpy as np
import torch
from scipy.stats import binomtest

from common.run.metrics import episode_metrics
from common.run.ranks import rank_and_world_size
from common.simulation.episodes import evaluation_ids
from scripts.pictures import write_video

TEMPERATURE = 0.6  # of evaluations, the paper's; never compare results across temperatures
OWN_SEED = 2**32  # of a run's own evaluations, beyond what --seed accepts


def run_episodes(policy, envs, episode_ids, record=0):
    """Run every episode of a list once, to the step limit.
    policy(obs (M, H, W, 3) uint8, instructions: M strings, rows (M,): places of these episodes in
    the list) -> actions (M, 7). episode_ids: (E,) int64. record: keep the first so many's pictures.
    Returns: dict of (E,) arrays: what `infos["episode"]` has, and instruction; "frames":
        dict row -> list of (H, W, 3) uint8, from before the first action to after the last."""
    num_envs = envs.num_envs
    rows = np.arange(num_envs)  # environment n runs the episodes n, n + num_envs, ...
    streams = [iter(episode_ids[n::num_envs]) for n in range(num_envs)]
    obs, infos = envs.reset(streams, whole_episodes=True)
    frames = {row: [] for row in range(min(record, len(episode_ids)))}
    texts, found = {}, []
    while infos["active"].any():
        active = np.flatnonzero(infos["active"])
        instructions = [infos["instruction"][env] for env in active]
        for env, instruction in zip(active, instructions, strict=True):
            texts[rows[env]] = instruction
            if rows[env] in frames:
                frames[rows[env]].append(obs[env])
        actions = np.zeros((num_envs, 7), np.float32)
        actions[active] = policy(obs[active], instructions, rows[active])
        obs, _, _, _, infos = envs.step(actions)
        ended = infos["episode"]["env"]
        for env, picture in zip(ended, infos["final_obs"], strict=True):
            if rows[env] in frames:
                frames[rows[env]].append(picture)
        found.append(dict(infos["episode"], row=rows[ended]))
        rows[ended] += num_envs
    results = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    order = results.pop("row").argsort()
    results = {key: values[order] for key, values in results.items() if key != "env"}
    results["instruction"] = np.array([texts[row] for row in range(len(episode_ids))])
    results["frames"] = frames
    return results


def episode_generators(episode_ids, seed=0):
    """One torch.Generator per episode, so that a sample depends on nothing that runs beside it.
    The n-th repeat of an id in the list gets another one."""
    seen, generators = {}, []
    for episode_id in np.asarray(episode_ids).tolist():
        seen[episode_id] = seen.get(episode_id, -1) + 1
        sequence = np.random.SeedSequence([seed, episode_id, seen[episode_id]])
        key = sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)
        generators.append(torch.Generator().manual_seed(int(key)))
    return generators


def evaluate(model, envs, task, num_episodes, video_stem=None, num_videos=2):
    """Success of `model` on held-out episodes of its training task, shared out over ranks.
    The best checkpoint is chosen by it, so its list is none that eval_ood.py would judge it on.
    Returns: metrics eval/{success_at_end, low, high (Wilson 95 %), success_once, grasped, return,
        episodes} and time/eval_s. Videos: <video_stem>-<n>-<success|failure>.mp4."""
    start = time.monotonic()
    rank, world_size = rank_and_world_size()
    # eval_ood.py never uses the list of `main` and seed 0, which all committed runs have used
    seed = 0 if task == "main" else OWN_SEED
    ids = evaluation_ids(task, "train", num_episodes, seed, envs.fidelity)
    generators = episode_generators(ids)[rank::world_size]

    def policy(obs, instructions, rows):
        tokens, _, _ = model.act(obs, instructions, TEMPERATURE, [generators[row] for row in rows])
        return model.decode_actions(tokens)

    record = num_videos if rank == 0 and video_stem else 0
    results = run_episodes(policy, envs, ids[rank::world_size], record)
    for row, frames in results.pop("frames").items():
        outcome = "success" if results["success_at_end"][row] else "failure"
        write_video(f"{video_stem}-{row}-{outcome}.mp4", frames, results["instruction"][row])
    metrics = episode_metrics([results], "eval/")
    successes = round(metrics["eval/success_at_end"] * num_episodes)
    metrics["eval/low"], metrics["eval/high"] = wilson(successes, num_episodes)
    return metrics | {"eval/episodes": num_episodes, "time/eval_s": time.monotonic() - start}


def wilson(k, n):  # 95 % interval (low, high) of the success rate k / n
    interval = binomtest(int(k), int(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
