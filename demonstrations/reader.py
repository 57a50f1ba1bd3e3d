"""Reader of demonstrations: ManiSkill trajectory files with compressed pictures.

demonstrations/record.py writes them; docs/demos.md describes the files. T steps of one episode, B
steps of all E episodes.
"""

import io
import shlex
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

from common.run.files import check, check_types, naming, read_json
from common.simulation.assets import FULL_VIEW
from common.simulation.env import CAMERA, SCENES
from common.simulation.tasks import scene_numbers

ENTRY = {"episode_id": int, "elapsed_steps": int, "instruction": str,
         "reset_kwargs": {"options": {"episode_ids": [int]}}}  # fmt: skip
HEADER = {"settings": {"task": str}, "episodes": [ENTRY]}
FLOORS = (0.01, 0.01, 0.01, 0.05, 0.05, 0.05)  # metres, radians


@dataclass
class Demos:
    images: object  # (B, ...) array or tensor, as `fit` returns it
    actions: np.ndarray  # (B, 7) float32, the expert's labels
    episodes: np.ndarray  # (B,) int64, places in the lists below
    instructions: list  # E
    episode_ids: list  # E
    scenes: np.ndarray  # (E,) int64, see tasks.py: `scene_numbers`
    sources: np.ndarray  # (E,) int64, which directory
    statistics: dict  # of `action_statistics`


def action_statistics(actions, floors=FLOORS):
    """{"q01", "q99", "mask"} of actions (B, 7): what decodes tokens to actions, as OpenVLA's.

    floors: (6,), the range of each of the first six dimensions is symmetric and at least +-floor:
        dimensions that hardly move keep a sensible unit, and zero is exactly the middle bin.
        None: plain 1 % and 99 % quantiles, but +-floor where a dimension does not move at all.
    The gripper is not normalised.
    """
    q01 = np.quantile(actions, 0.01, axis=0).astype(np.float64)
    q99 = np.quantile(actions, 0.99, axis=0).astype(np.float64)
    bound = np.maximum(np.maximum(-q01, q99)[:6], FLOORS if floors is None else floors)
    symmetric = (q01 == q99)[:6] if floors is None else np.ones(6, bool)
    q01[:6] = np.where(symmetric, -bound, q01[:6])
    q99[:6] = np.where(symmetric, bound, q99[:6])
    q01[6], q99[6] = -1.0, 1.0
    return {"q01": q01.tolist(), "q99": q99.tolist(), "mask": [True] * 6 + [False]}


def load_demos(directories, fit=np.asarray, num_demos=None, drop_idle="none"):
    """Read one directory or several, whose episodes are then mixed.

    Args: fit: (T, H, W, 3) uint8 -> what to keep (`model.fit_images`); num_demos: the first so
        many of each; drop_idle: which steps are left out, see `moving_steps`.
    Returns: Demos. Raises: FileNotFoundError, or ValueError that names file and key.
    """
    if isinstance(directories, (str, Path)):
        directories = [directories]
    images, actions, instructions, episode_ids, scenes, sources = [], [], [], [], [], []
    for source, directory in enumerate(directories):
        header = read_header(directory)
        settings, episodes = header["settings"], header["episodes"]
        if num_demos is not None and num_demos > len(episodes):
            raise ValueError(f"num_demos = {num_demos}, but {directory} holds {len(episodes)}")
        with h5py.File(header["path"]) as file:
            for entry in episodes[:num_demos]:
                frames, labels = _read_episode(file, entry, drop_idle)
                images.append(fit(frames))
                actions.append(labels)
                instructions.append(entry["instruction"])
                episode_ids += entry["reset_kwargs"]["options"]["episode_ids"]
                sources.append(source)
        task, split, fidelity = (settings[key] for key in ("task", "split", "fidelity"))
        scenes.extend(scene_numbers(task, split, episode_ids[len(scenes) :], fidelity))
    lengths = [len(labels) for labels in actions]
    actions = np.concatenate(actions)
    images = torch.cat(images) if torch.is_tensor(images[0]) else np.concatenate(images)
    episodes = np.repeat(np.arange(len(lengths)), lengths)
    scenes, sources, statistics = np.array(scenes), np.array(sources), action_statistics(actions)
    return Demos(images, actions, episodes, instructions, episode_ids, scenes, sources, statistics)


def read_header(directory):
    """trajectory.json of a recording, with every key that is needed, and "path" of its .h5."""
    path, json_path = Path(directory, "trajectory.h5"), Path(directory, "trajectory.json")
    if not (path.exists() and json_path.exists()):
        command = f"python -m demonstrations.record --output {shlex.quote(str(directory))}"
        raise FileNotFoundError(f"{path} or its .json is missing; record it with: {command}")
    header = read_json(json_path, "is it of demonstrations?", HEADER)
    with naming(json_path, "is it of demonstrations?"):
        settings, look = header["settings"], header["env_info"]["env_kwargs"]
        if "scene" not in settings:  # of earlier versions
            settings["scene"] = "published" if settings["assets"] == "bridge" else "small"
        settings.setdefault("split", "train")
        check_types(settings, {"scene": str, "split": str})
        scene = SCENES[settings["scene"]]
        settings.setdefault("fidelity", scene["fidelity"])
        check_types(settings, {"fidelity": str})
        where = settings["task"], settings["split"], [], settings["fidelity"]
        scene_numbers(*where)  # it refuses what it does not know
        check(header["episodes"], "it has no episodes")
        size, view = tuple(look["image_size"]), tuple(look.get("view", FULL_VIEW))
        why = f"pictures of {size} pixels are of an earlier version; record them again"
        check((size, view) == (scene["image_size"], scene["view"]), why)
    with naming(path, kinds=Exception):
        file = h5py.File(path)
    with file:
        for entry in header["episodes"]:
            labels_of(file, entry)
    return {"path": path, "settings": settings, "episodes": header["episodes"]}


def labels_of(file, entry):
    """The expert's actions (T, 7) float32 of one episode."""
    name, rule = f"traj_{entry['episode_id']}", (entry["elapsed_steps"], 7)
    with naming(Path(file.filename, name), kinds=Exception):  # HDF5 raises all kinds
        group = file[name]
        key = "expert_actions" if "expert_actions" in group else "actions"
        kind, shape = group[key].dtype.kind, group[key].shape
        right = kind == "f" and shape == rule
        check(right, f"{key} is {shape} of kind {kind}, not {rule} of floats")
        actions = np.asarray(group[key], dtype=np.float32)
        check(np.isfinite(actions).all(), f"{key} has numbers that are not finite")
        return actions


def _read_episode(file, entry, drop_idle):
    """Frames (T, H, W, 3) uint8 and labels (T, 7) float32 of one episode."""
    actions = labels_of(file, entry)
    keep = moving_steps(actions, drop_idle)
    name = f"traj_{entry['episode_id']}/obs/sensor_data/{CAMERA}/rgb"
    with naming(Path(file.filename, name), kinds=Exception):
        files = file[name]
        frames = [np.asarray(Image.open(io.BytesIO(files[int(t)]))) for t in keep]
        return np.stack(frames), actions[keep]


def moving_steps(actions, drop_idle):
    """Indices of the steps of actions (T, 7) to learn from.

    drop_idle: "none": all. "published": without those that move < 1 cm and < 0.06 rad and keep the
        gripper (Liu et al. 2025). "still": without those that do not move at all and keep the
        gripper, but for the last two, which teach to rest.
    """
    metres, radians = {"none": (-1, -1), "still": (0, 0), "published": (0.01, 0.06)}[drop_idle]
    keep = np.diff(actions[:, 6], prepend=actions[:1, 6]) != 0
    keep |= np.linalg.norm(actions[:, :3], axis=1) > metres
    keep |= np.linalg.norm(actions[:, 3:6], axis=1) > radians
    if drop_idle == "still":
        keep[-2:] = True
    return np.flatnonzero(keep)
