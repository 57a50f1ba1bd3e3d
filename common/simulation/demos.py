"""Demonstrations of the closed-loop expert as ManiSkill trajectory files with compressed images, and their reader.

    python -m common.simulation.demos --num-demos 100 --task main --output demos/main    # makes trajectory.h5 and trajectory.json

Details and measurements: docs/demos.md. N environments, T steps of one episode, B steps of all.
"""

import io
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from common.run.evaluate import training_ids
from common.simulation.env import CAMERA, ENV_ID, check_env_args
from common.simulation.expert import Expert
from common.simulation.tasks import num_configurations
from common.simulation.vec_env import make_envs

# --- recording ---
CONTROL_MODE = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
ENV_KEYS = ("task", "split", "assets", "image_size", "sim_freq", "solver_iterations", "fidelity", "shader_pack")


@dataclass
class Args:
    output: str = "demos/main"  # directory of trajectory.h5 and .json; an unfinished or smaller set there is continued
    num_demos: int = 100  # successful episodes to store
    task: str = "main"  # a row of common/simulation/tasks.py
    split: Literal["train", "test"] = "train"  # its configurations; those kept for evaluation are never drawn
    seed: int = 0  # of the episode ids and the action noise
    assets: Literal["primitive", "bridge"] = "primitive"  # embedded bodies, or the real ones under MS_ASSET_DIR
    image_size: tuple[int, int] = (160, 120)  # camera pixels (width, height)
    sim_freq: int = 250  # physics Hz
    solver_iterations: int = 4  # of the contact solver
    max_episode_steps: int = 40  # control steps of 0.2 s
    fidelity: Literal["fixed", "published"] = "fixed"  # published = with the benchmark's known defects
    shader_pack: Literal["minimal", "default"] = "minimal"  # renderer quality
    num_envs: int = 16  # simulated at once; also the size of a part file
    num_workers: int = 0  # simulator processes; 0 = one per core
    hold_steps: int = 4  # steps stored after the expert is done, so that a policy learns to rest
    action_noise: float = 0.0  # m (10 times it in rad of yaw): std of what disturbs execution; labels stay clean
    noise_probability: float = 0.15  # of a step being disturbed: rare, visible pushes, not constant jitter
    blunder_probability: float = 0.0  # of a step to begin four with opposite fingers: drops and misses to recover from
    image_format: Literal["jpeg", "png"] = "jpeg"  # jpeg: quality 95


def rollout(envs, expert, episode_ids, encode, noise, rng):
    """Run the expert for one batch of whole episodes.

    Args: episode_ids (N,) int64; encode: image (H, W, 3) uint8 -> stored frame; noise: m, its and blunders' rate.
    Returns a dict: frames N lists of T + 1, actions (executed) and labels (N, T, 7), success (N, T) bool, rewards
    (N, T), done_at (N,) first step at which the expert rested (T if never), instructions.
    """
    images, instructions = envs.reset(episode_ids)
    expert.reset()
    frames = [[encode(image)] for image in images]
    labels, actions, success, rewards, done = [], [], [], [], []
    blunder = np.zeros(len(images), dtype=int)  # steps it will last
    for _ in range(envs.max_episode_steps):
        label = expert.act(envs.privileged_state())
        done.append(expert.done)
        action = label.copy()
        pushed = rng.random((len(label), 1)) < noise[1]
        action[:, [0, 1, 2, 5]] += pushed * rng.normal(size=(len(label), 4)) * noise[0] * np.array([1, 1, 1, 10])
        blunder = np.where(blunder > 0, blunder - 1, 4 * (rng.random(len(label)) < noise[2]))  # 0.8 s drop any object
        action[:, 6] *= np.where(blunder > 0, -1, 1)
        images, reward, _, infos = envs.step(action)
        for i, image in enumerate(images):
            frames[i].append(encode(image))
        for values, value in ((labels, label), (actions, action), (success, infos["success"]), (rewards, reward)):
            values.append(np.array(value))
    done = np.stack(done, axis=1)
    done_at = np.where(done.any(1), done.argmax(1), done.shape[1])
    parts = {"actions": actions, "labels": labels, "success": success, "rewards": rewards}
    stacked = {key: np.stack(values, axis=1) for key, values in parts.items()}
    return {"frames": frames, "instructions": instructions, "done_at": done_at, **stacked}


def encode_image(image, image_format):
    """(H, W, 3) uint8 -> (bytes,) uint8 array of a JPEG (quality 95, no chroma subsampling) or PNG file."""
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if image_format == "jpeg" else {"compress_level": 3}
    Image.fromarray(image).save(buffer, image_format, **options)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def write_episode(file, name, batch, i, length, episode_id, seed):
    """Add the first `length` steps of episode `i` of a `rollout` to an open HDF5 file, as ManiSkill's RecordEpisode."""
    group = file.create_group(name)
    for key in ("actions", "success", "rewards"):
        group[key] = batch[key][i, :length]
    if not np.array_equal(batch["labels"], batch["actions"]):
        group["expert_actions"] = batch["labels"][i, :length]
    group["terminated"] = np.zeros(length, dtype=bool)
    group["truncated"] = np.arange(1, length + 1) == length
    rgb = group.create_dataset(f"obs/sensor_data/{CAMERA}/rgb", (length + 1,), dtype=h5py.vlen_dtype(np.uint8))
    for t, frame in enumerate(batch["frames"][i][: length + 1]):
        rgb[t] = frame
    episode = {
        "episode_seed": seed, "control_mode": CONTROL_MODE, "elapsed_steps": length, "success": True,
        "reset_kwargs": {"options": {"episode_ids": [episode_id]}, "seed": seed},
        "instruction": batch["instructions"][i],
    }  # fmt: skip
    group.attrs.update({"id": episode_id, "episode": json.dumps(episode)})


def record(args):
    """Write `args.num_demos` successful episodes; continues what an earlier call left. Returns the path of the .h5."""
    final, parts = Path(args.output) / "trajectory.h5", Path(args.output) / "parts"
    limits = {"num_demos": 1e9, "hold_steps": 1e9, "seed": 1e9, "noise_probability": 1, "blunder_probability": 1}
    for key, most in limits.items():
        if not (least := key == "num_demos") <= (value := getattr(args, key)) <= most:
            raise ValueError(f"{key} = {value} must be {int(least)} to {most:g}; use {getattr(Args, key)}")
    settings = {k: v for k, v in asdict(args).items() if k not in ("output", "num_demos", "num_envs", "num_workers")}
    settings = json.loads(json.dumps(settings))
    counts, seen = {"attempted": 0, "rejected": 0, "batches": 0}, set()
    rendering = args.image_size, args.sim_freq, args.solver_iterations, args.fidelity
    check_env_args(args.task, args.split, args.assets, *rendering)
    if args.num_demos > (most := num_configurations(args.task, args.split, args.fidelity) * 9 // 10):
        fix = f"nine tenths of the configurations of {args.task}/{args.split}; use fewer, or a larger task"
        raise ValueError(f"num_demos = {args.num_demos} must be <= {most}, {fix}")
    parts.mkdir(parents=True, exist_ok=True)
    part_paths = sorted(parts.glob("*.h5"))
    for path in [final] * final.exists() + part_paths:
        with _open(path) as file:
            old = json.loads(file.attrs["settings"])
            changed = [f"{k} = {old.get(k)} there, {settings[k]} now" for k in settings if old.get(k) != settings[k]]
            if changed:
                raise ValueError(f"{path} has {', '.join(changed)}; use the same settings or another --output")
            counts = json.loads(file.attrs["counts"])
            seen |= {int(group.attrs["id"]) for group in file.values()}
    if len(seen) < args.num_demos:
        part_paths += _record_parts(args, settings, counts, seen, parts)
    if part_paths or not final.with_suffix(".json").exists():
        _merge(final, part_paths, settings)
    shutil.rmtree(parts)
    return final


def _record_parts(args, settings, counts, seen, parts):
    """Run batches of episodes until `seen` holds enough ids; one file per batch. Returns the files' paths."""
    task, rows, paths, old, start = (args.task, args.split), np.arange(args.num_envs), [], len(seen), time.time()
    envs = make_envs(
        *task, args.num_envs, assets=args.assets, image_size=args.image_size, sim_freq=args.sim_freq,
        solver_iterations=args.solver_iterations, max_episode_steps=args.max_episode_steps, fidelity=args.fidelity,
        shader_pack=args.shader_pack, num_workers=args.num_workers,
    )  # fmt: skip
    expert = Expert(args.num_envs)
    noise = args.action_noise, args.noise_probability, args.blunder_probability
    bar = tqdm(total=args.num_demos, initial=old, unit="demo")
    try:
        while len(seen) < args.num_demos:
            rng = np.random.default_rng([args.seed, counts["batches"]])  # fixes a batch of num_envs episodes
            ids = training_ids(*task, args.num_envs, rng, args.fidelity)
            batch = rollout(envs, expert, ids, lambda x: encode_image(x, args.image_format), noise, rng)
            lengths = np.minimum(batch["done_at"] + args.hold_steps, args.max_episode_steps)
            success = batch["success"][rows, lengths - 1] & batch["success"][:, -1]
            counts["batches"] += 1
            counts["attempted"] += len(ids)
            counts["rejected"] += int((~success).sum())
            paths.append(parts / f"{counts['batches']:06d}.h5")
            temporary = paths[-1].with_suffix(".tmp")
            with h5py.File(temporary, "w") as file:
                file.attrs.update({"settings": json.dumps(settings), "counts": json.dumps(counts)})
                for i in np.flatnonzero(success):
                    if int(ids[i]) not in seen and len(seen) < args.num_demos:
                        seen.add(int(ids[i]))
                        write_episode(file, f"{i:06d}", batch, i, int(lengths[i]), int(ids[i]), args.seed)
            os.replace(temporary, paths[-1])
            bar.update(len(seen) - bar.n)
            bar.set_postfix_str(f"rejected {counts['rejected']}/{counts['attempted']}")
            if counts["attempted"] > 20 * (len(seen) + args.num_envs):
                raise RuntimeError(
                    f"only {len(seen)} demonstrations from {counts['attempted']} episodes of {'/'.join(task)}: raise "
                    "--max-episode-steps (the expert needs about 25) or choose a task with more configurations"
                )
    finally:
        bar.close()
        envs.close()
    print(f"{len(seen) - old} demonstrations in {(time.time() - start) / 60:.1f} min; {bar.postfix} episodes")
    return paths


def _merge(final, part_paths, settings):
    """Append the parts to the trajectory file and derive its .json; each appears whole or not at all."""
    temporary, actions, episodes = final.with_suffix(".tmp"), [], []
    temporary.unlink(missing_ok=True)
    if final.exists():
        shutil.copy(final, temporary)
    with h5py.File(temporary, "a") as file:
        known = {int(group.attrs["id"]) for group in file.values()}
        for path in part_paths:
            with h5py.File(path) as part:
                file.attrs.update(part.attrs)
                for name in part:
                    if int(part[name].attrs["id"]) not in known:  # known: an earlier merge was interrupted after it
                        part.copy(name, file, f"traj_{len(file)}")
        for k in range(len(file)):
            group = file[f"traj_{k}"]
            episodes.append({"episode_id": k} | json.loads(group.attrs["episode"]))
            actions.append(group["expert_actions" if "expert_actions" in group else "actions"][:])
        counts = json.loads(file.attrs["counts"])
    env_kwargs = {k: settings[k] for k in ENV_KEYS} | {"obs_mode": "rgb+segmentation", "sim_backend": "physx_cpu"}
    header = {
        "env_info": {"env_id": ENV_ID, "env_kwargs": env_kwargs, "max_episode_steps": settings["max_episode_steps"]},
        "source_type": "motionplanning",
        "source_desc": "closed-loop expert of CleanVLA's common/simulation/demos.py",
        "settings": settings,
        "counts": counts,
        "statistics": {"action": action_statistics(np.concatenate(actions))},
        "episodes": episodes,
    }
    os.replace(temporary, final)
    text = final.with_suffix(".json.tmp")
    text.write_text(json.dumps(header, indent=1))
    os.replace(text, final.with_suffix(".json"))


# --- reading ---
FLOORS = (0.01, 0.01, 0.01, 0.05, 0.05, 0.05)  # metres, radians


@dataclass
class Demos:
    """B steps of E episodes; `images` as returned by `fit`, `actions` (B, 7) float32 are the expert's labels."""

    images: object
    actions: np.ndarray
    episodes: np.ndarray  # (B,) int64 index into `instructions` and `episode_ids`
    instructions: list[str]
    episode_ids: list[int]
    sources: np.ndarray  # (E,) int64 index into `settings`
    statistics: dict
    settings: list[dict]  # Args of each file


def action_statistics(actions, floors=FLOORS):
    """{"q01", "q99", "mask"} of actions (B, 7): what decodes tokens to actions (OpenVLA's normalisation).

    With floors (6,), the range of each of the first six dimensions is symmetric and at least +-floor: dimensions that
    hardly move keep a sensible unit, and a zero action is exactly the middle bin. None: the plain 1 % and 99 %
    quantiles, but for dimensions that do not move at all, of which every bin would be one number: these have +-floor.
    The gripper is not normalised (mask False).
    """
    q01, q99 = (np.quantile(actions, q, axis=0).astype(np.float64) for q in (0.01, 0.99))
    symmetric = np.full(6, floors is not None) | (q01 == q99)[:6]
    bound = np.maximum(np.maximum(-q01, q99)[:6], FLOORS if floors is None else floors)
    q01[:6], q99[:6] = np.where(symmetric, -bound, q01[:6]), np.where(symmetric, bound, q99[:6])
    q01[6], q99[6] = -1.0, 1.0
    return {"q01": q01.tolist(), "q99": q99.tolist(), "mask": [True] * 6 + [False]}


def _open(path):
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not a readable HDF5 file ({error}); truncated? record it again") from error


def load_demos(paths, fit=lambda images: images, num_demos=None, drop_idle="none"):
    """Read what `record` wrote: one directory (or its trajectory.h5), or a sequence of them to mix.

    Args: fit: (T, H, W, 3) uint8 -> array or tensor to keep (`model.fit_images`); num_demos: the first so many of each;
    drop_idle: "none", "still" or "published": which steps are left out, see `moving_steps`.
    Returns `Demos`; its statistics are the file's, computed anew for a part, a mixture or with `drop_idle`.
    Raises FileNotFoundError, or ValueError naming file and key.
    """
    images, actions, kept, sources, settings = [], [], [], [], []
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    for path in map(Path, paths):
        header = read_header(path)
        path = header["path"]
        settings.append(header["settings"])
        if num_demos is not None and num_demos > len(header["episodes"]):
            raise ValueError(f"num_demos = {num_demos}, but {path} holds {len(header['episodes'])}; record more")
        with _open(path) as file:
            for entry in header["episodes"][:num_demos]:
                frames, labels = _read_episode(path, file, entry, drop_idle)
                images.append(fit(frames))
                actions.append(labels)
                kept.append(entry)
                sources.append(len(settings) - 1)
    alone = len(paths) == 1 and drop_idle == "none" and num_demos is None
    return Demos(
        images=np.concatenate(images) if isinstance(images[0], np.ndarray) else torch.cat(images),
        actions=np.concatenate(actions),
        episodes=np.repeat(np.arange(len(actions)), [len(a) for a in actions]),
        instructions=[entry["instruction"] for entry in kept],
        episode_ids=[entry["reset_kwargs"]["options"]["episode_ids"][0] for entry in kept],
        sources=np.array(sources),
        statistics=header["statistics"]["action"] if alone else action_statistics(np.concatenate(actions)),
        settings=settings,
    )


def read_header(path):
    """The .json of a recording's directory or .h5, with every key that `load_demos` needs, and "path": its .h5."""
    path = Path(path) if str(path).endswith(".h5") else Path(path) / "trajectory.h5"
    for each in (path, json_path := path.with_suffix(".json")):
        if not each.exists():
            raise FileNotFoundError(f"{each} is missing; make it with: python -m common.simulation.demos --output {path.parent}")
    try:
        header = json.loads(json_path.read_text())
        header["settings"], header["episodes"], *(header["statistics"]["action"][k] for k in ("q01", "q99", "mask"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{json_path} is not valid JSON ({error}); remove it, repeat its command") from error
    except KeyError as error:
        raise ValueError(f"{json_path} has no key {error}; record it again with this version") from error
    return header | {"path": path}


def _read_episode(path, file, entry, drop_idle):
    """Frames (T, H, W, 3) uint8 and labels (T, 7) float32 of one episode."""
    name = f"traj_{entry['episode_id']}"
    try:
        group = file[name]
        actions = np.asarray(group["expert_actions" if "expert_actions" in group else "actions"], dtype=np.float32)
        if actions.shape != (rule := (entry["elapsed_steps"], 7)):
            raise ValueError(f"{path}: {name}/actions is {actions.shape}, not {rule}: xyz, Euler angles, gripper")
        keep = moving_steps(actions, drop_idle)
        frames = group[f"obs/sensor_data/{CAMERA}/rgb"]
        return np.stack([np.asarray(Image.open(io.BytesIO(frames[int(t)]))) for t in keep]), actions[keep]
    except (KeyError, OSError) as error:
        raise ValueError(f"{path}: {name} cannot be read ({error}); truncated? record it again") from error


def moving_steps(actions, drop_idle):
    """Indices of the steps of actions (T, 7) to learn from. Dropped are: "none", no step; "published", those that move
    < 1 cm and < 0.06 rad without a gripper change (Liu et al. 2025); "still", those that do not move at all without a
    gripper change, but for the last two, which teach to rest."""
    metres, radians = {"none": (-1, -1), "still": (0, 0), "published": (0.01, 0.06)}[drop_idle]
    toggled = np.diff(actions[:, 6], prepend=actions[:1, 6]) != 0
    moves = (np.linalg.norm(actions[:, :3], axis=1) > metres) | (np.linalg.norm(actions[:, 3:6], axis=1) > radians)
    rests = (drop_idle == "still") & (np.arange(len(actions)) >= len(actions) - 2)
    return np.flatnonzero(moves | toggled | rests)


if __name__ == "__main__":
    record(tyro.cli(Args))
