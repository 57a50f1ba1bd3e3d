"""Which episodes are for training and which for evaluation.
Evaluation lists are explicit and the same for every policy, so that two policies can be compared
episode by episode. Training never draws an episode that is held out."""

import zlib

import numpy as np

from common.run.files import check
from common.simulation.tasks import num_configurations, scene_numbers

HELD_OUT = 64  # one scene in 64 is for evaluation only


def held_out(task, split, episode_ids, fidelity="fixed"):
    """(N,) bool of ids (N,): splitmix64 of the scene % 64 == 0, in every task that can draw it."""
    x = scene_numbers(task, split, episode_ids, fidelity).astype(np.uint64)
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) % np.uint64(HELD_OUT) == 0


def evaluation_ids(task, split, num_episodes, seed=0, fidelity="fixed"):
    """The evaluation list (num_episodes,) int64: a shorter list is the beginning of a longer one.
    It repeats itself only when the task has fewer held-out scenes. ValueError if it has none."""
    total = num_configurations(task, split, fidelity)
    rng = np.random.default_rng([zlib.crc32(f"{task}/{split}".encode()), seed])
    ids = rng.permutation(total) if total <= 2**20 else rng.integers(total, size=2**20)
    ids = ids[held_out(task, split, ids, fidelity)]
    ids = ids[np.sort(np.unique(ids, return_index=True)[1])]
    check(len(ids), f"{task} ({split}): none of {total} scenes is held out; use a larger task")
    return np.resize(ids, num_episodes).astype(np.int64)


def training_episodes(task, rng, fidelity="fixed"):
    """Endless stream of training ids, drawn uniformly from the scenes that are not held out."""
    total = num_configurations(task, "train", fidelity)
    while True:
        episode_id = rng.integers(total, size=1)
        if not held_out(task, "train", episode_id, fidelity)[0]:
            yield int(episode_id[0])
