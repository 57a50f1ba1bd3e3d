"""Evaluation shared by training scripts and `eval_ood.py`: which episodes, how they run, intervals, videos.

Evaluation lists are explicit and the same for every policy (paired); training never sees their episodes.
"""

import os
import time
import zlib
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.run.runs import gather_over_ranks, rank_and_world_size
from common.simulation.tasks import REPORT_ROWS, num_configurations, scene_numbers

HELD_OUT = 64  # one configuration of 64 is for evaluation only


# --- which episodes ---
def held_out(task, split, episode_ids, fidelity="fixed"):
    """(N,) bool: hash(scene number) % 64 == 0 (splitmix64), so a scene is held out in every task that can draw it."""
    x = scene_numbers(task, split, episode_ids, fidelity).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) % np.uint64(HELD_OUT) == 0


def evaluation_ids(task, split, num_episodes, seed=0, fidelity="fixed"):
    """The paired evaluation list: (num_episodes,) int64 held-out ids, a shorter list is a prefix of a longer one.

    Repeats only when the task has fewer held-out configurations than num_episodes.
    """
    total = num_configurations(task, split, fidelity)
    rng = np.random.default_rng([zlib.crc32(f"{task}/{split}".encode()), seed])
    ids = rng.permutation(total) if total <= 2**20 else rng.integers(total, size=2**20)
    ids = ids[held_out(task, split, ids, fidelity)]
    ids = ids[np.sort(np.unique(ids, return_index=True)[1])]
    if len(ids) == 0:
        raise ValueError(f"task {task} ({split}) has {total} configurations, none is held out; use a larger task")
    return np.resize(ids, num_episodes).astype(np.int64)


def training_ids(task, split, n, generator, fidelity="fixed", only=()):
    """(n,) int64 ids drawn uniformly from all that are not held out, so that no evaluation list of this task and split
    contains them, nor of another task that can draw the same scene (docs/eval_ood.md); or from the ids `only`, if any.
    generator: np.random.Generator. ValueError for the split "all", which numbers its scenes in another way."""
    if split == "all":
        raise ValueError("split = 'all' holds what is evaluated under 'train' and 'test' too; train on one of these")
    if len(only):
        return generator.choice(np.asarray(only, dtype=np.int64), n)
    total = num_configurations(task, split, fidelity)
    ids = generator.integers(total, size=n)
    while (again := held_out(task, split, ids, fidelity)).any():
        ids[again] = generator.integers(total, size=again.sum())
    return ids.astype(np.int64)


# --- episodes ---
def sampling_policy(model, unnorm_key, temperature, episode_ids, seed=0):
    """policy(images, instructions, rows) for `run_episodes`. Every episode of the list draws from a generator of its
    own, so that only rounding, which differs with the batch's size, depends on num_envs and the number of ranks."""
    generators = [torch.Generator().manual_seed(int(key)) for key in _episode_seeds(episode_ids, seed)]

    def policy(images, instructions, rows):
        tokens, _, _ = model.act(images, instructions, temperature, [generators[row] for row in rows])
        return model.actions_from_tokens(tokens, unnorm_key)

    return policy


def _episode_seeds(episode_ids, seed):
    """One seed per entry of the list; the n-th repeat of an id gets another one."""
    seen = {}
    for key in episode_ids.tolist():
        seen[key] = seen.get(key, -1) + 1
        yield np.random.SeedSequence([seed, key, seen[key]]).generate_state(1, np.uint64)[0] >> np.uint64(1)


def run_episodes(policy, envs, episode_ids, record=0):
    """Runs every episode once to the step limit, num_envs at a time.

    Args:
        policy(images (M, H, W, 3) uint8, instructions list[str] (M,), rows (M,) int) -> actions (M, 7) float32;
            rows are the positions of these episodes in `episode_ids`.
        episode_ids: (E,) int64; record: keep the frames of the first `record` episodes.
    Returns: dict of (E,) arrays success_at_end, success_once, grasped, held (bool), return (float32), success_steps
        (int: of the lasting success at the end), instruction (str), and "frames": {row: list of (H, W, 3) uint8, the
        first one before any action}.
    """
    episode_ids = np.asarray(episode_ids, dtype=np.int64)
    batches, frames = [], {row: [] for row in range(min(record, len(episode_ids)))}
    for first in range(0, len(episode_ids), envs.num_envs):
        rows = np.arange(first, min(first + envs.num_envs, len(episode_ids)))
        # The last batch may be short: its idle environments repeat an episode, get zero actions and are not counted.
        images, instructions = envs.reset(np.resize(episode_ids[rows], envs.num_envs))
        n = len(rows)
        actions, dones, steps = np.zeros((envs.num_envs, 7), np.float32), np.zeros(envs.num_envs, bool), 0
        while not dones.all():
            for row in frames.keys() & set(rows.tolist()):
                frames[row].append(images[row - first].copy())  # not the whole batch
            actions[:n] = policy(images[:n], instructions[:n], rows)
            images, _, dones, infos = envs.step(actions)
            steps = (steps + 1) * infos["success"]
        for row in frames.keys() & set(rows.tolist()):
            frames[row].append(images[row - first].copy())
        batch = {key: infos[key][:n] for key in ("success_once", "grasped", "held", "return")}
        batch |= {"success_at_end": infos["success"][:n], "success_steps": steps[:n]}
        batches.append(batch | {"instruction": np.array(instructions[:n])})
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]} | {"frames": frames}


def evaluate(model, envs, task, split, num_episodes, temperature, unnorm_key, video_stem=None, num_videos=2, only=()):
    """Success of `model` on the paired list of a task that `envs` is set to; the list is shared out over ranks.
    `only`: repeat these episode ids instead.

    Returns: metrics eval/<task>/{success_at_end, low, high (Wilson 95 %), success_once, grasped, return, episodes} and
    time/eval_s. Videos of the first episodes go to <video_stem>-<n>-<success|failure>.mp4.
    """
    start, (rank, world_size) = time.time(), rank_and_world_size()
    own = int((task, split) in {row[2:4] for row in REPORT_ROWS})  # eval_ood.py judges these on their list of seed 0
    listed = only if len(only) else evaluation_ids(task, split, num_episodes, own, envs.fidelity)
    ids = np.resize(listed, num_episodes)
    mine = np.arange(len(ids))[rank::world_size]
    policy = sampling_policy(model, unnorm_key, temperature, ids)
    record = num_videos if rank == 0 and video_stem else 0
    results = run_episodes(lambda images, texts, rows: policy(images, texts, mine[rows]), envs, ids[mine], record)
    for row, frames in results.pop("frames").items():
        outcome = "success" if results["success_at_end"][row] else "failure"
        write_video(f"{video_stem}-{row}-{outcome}.mp4", frames, results["instruction"][row])
    parts = gather_over_ranks(results)
    merged = {key: np.concatenate([part[key] for part in parts]) for key in results}
    low, high = wilson(merged["success_at_end"].sum(), len(ids))
    means = {key: merged[key].mean() for key in ("success_at_end", "success_once", "grasped", "return")}
    means |= {"low": low, "high": high, "episodes": len(ids)}
    return {f"eval/{task}/{key}": float(mean) for key, mean in means.items()} | {"time/eval_s": time.time() - start}


def wilson(k, n, z=1.96):
    """Wilson's 95 % interval of the success rate k / n (Wilson 1927): (low, high)."""
    centre, half = (k + z * z / 2) / (n + z * z), z * np.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)


def write_video(path, frames, instruction, fps=5):
    """H.264 mp4, 640 wide, of (H, W, 3) uint8 frames with the instruction on top; written whole, then renamed."""
    path, upscale = Path(path), max(1, 640 // frames[0].shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp.mp4")
    with imageio.get_writer(temporary, fps=fps, codec="libx264", macro_block_size=2) as writer:
        for frame in frames:
            picture = ImageOps.scale(Image.fromarray(frame), upscale, Image.NEAREST)
            draw = ImageDraw.Draw(picture)
            draw.rectangle((0, 0, picture.width, 28), fill="black")
            draw.text((8, 4), instruction, fill="white", font=ImageFont.load_default(18))
            writer.append_data(np.asarray(picture))
    os.replace(temporary, path)
