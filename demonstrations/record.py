"""Record demonstrations of the closed-loop expert or of a policy: trajectory.h5, trajectory.json.

    python -m demonstrations.record --num-demos 1000 --output demos/main
    python -m demonstrations.record --checkpoint runs/ppo --output demos/ppo    # its successes

The files are ManiSkill's, with compressed pictures; they appear when all is recorded. For very many
demonstrations use several directories with a --seed each: sft_vla.py mixes them. See docs/demos.md.
"""

import io
import json
import os
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from common.model.checkpoints import choose_key, load_vla, locate
from common.run.args import check_values
from common.run.evaluate import episode_generators
from common.run.files import check, naming, write_atomic
from common.run.ranks import setup_ranks
from common.simulation.env import CAMERA, ENV_ID, SCENES, check_scene
from common.simulation.episodes import training_episodes
from common.simulation.tasks import num_configurations
from common.simulation.vec_env import make_envs
from demonstrations.expert import Expert
from demonstrations.reader import action_statistics
from scripts.provenance import find_model
from scripts.renderer import check_simulator

CONTROL_MODE = "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos"
MAY_BE_ZERO = """seed max_episode_steps hold_steps action_noise noise_probability
    blunder_probability""".split()
BLUNDER_STEPS = 4  # 0.8 s drop any object
SUCCESS_STEPS = 5  # that a policy's success must last, as in training, before it counts as done


@dataclass
class Args:
    output: str = "demos/main"  # a new directory
    num_demos: int = 100  # successful episodes
    checkpoint: str = ""  # a model or a run whose policy acts, at temperature 1; empty = the expert
    task: str = "main"  # a row of common/simulation/tasks.py, in training
    scene: Literal["small", "published"] = "small"  # embedded bodies, or the paper's own assets
    seed: int = 0  # of the episodes and of what disturbs them
    num_envs: int = 16  # simulated at once; another number gives other demonstrations
    max_episode_steps: int = 0  # control steps; 0 = the scene's
    hold_steps: int = 4  # stored after the expert is done, so that a policy learns to rest
    action_noise: float = 0.0  # m, and 10 times it in rad of yaw: std of a push; labels stay clean
    noise_probability: float = 0.15  # of a step being pushed: rare and visible, no constant jitter
    blunder_probability: float = 0.0  # of a step to begin four with opposite fingers: drops, misses
    image_format: Literal["jpeg", "png"] = "jpeg"  # jpeg: quality 95


def rollout(envs, expert, model, ids, args, rng):
    """Run the expert, or `model` unless it is None, for one batch of whole episodes, ids (N,).

    Returns: list of N dicts of one episode: frames, T + 1 files; actions as executed and labels
        (T, 7); success, rewards (T,); instruction; done_at: the first step at which the expert
        rested, or the policy's success had lasted.
    """
    num_envs = len(ids)
    obs, infos = envs.reset([iter([episode_id]) for episode_id in ids])
    expert.reset()
    frames = [[encode_image(image, args.image_format)] for image in obs]
    instructions = infos["instruction"]
    labels, actions, success, rewards, done = [], [], [], [], []
    blunder = np.zeros(num_envs, dtype=int)  # steps it will last
    generators, lasted = episode_generators(ids, args.seed), np.zeros(num_envs, dtype=int)
    for _ in range(envs.max_episode_steps):
        if model is None:
            label = expert.act(envs.privileged_state())
            done.append(expert.done)
        else:
            tokens, _, _ = model.act(obs, instructions, 1.0, generators)
            label = model.decode_actions(tokens).numpy()
            done.append(lasted >= SUCCESS_STEPS)
        action = label.copy()
        pushed = rng.random((num_envs, 1)) < args.noise_probability
        push = rng.normal(size=(num_envs, 4)) * args.action_noise * np.array([1, 1, 1, 10])
        action[:, [0, 1, 2, 5]] += pushed * push
        begins = rng.random(num_envs) < args.blunder_probability
        blunder = np.where(blunder > 0, blunder - 1, BLUNDER_STEPS * begins)
        action[:, 6] *= np.where(blunder > 0, -1, 1)
        obs, reward, _, _, infos = envs.step(action)
        for env, image in enumerate(obs):
            frames[env].append(encode_image(image, args.image_format))
        labels.append(label)
        actions.append(action)
        success.append(infos["success"])
        lasted = np.where(success[-1], lasted + 1, 0)
        rewards.append(reward)
    episodes = []
    for env in range(num_envs):
        rests = np.flatnonzero(np.array(done)[:, env])
        episode = {"id": int(ids[env]), "frames": frames[env], "instruction": instructions[env]}
        episode["done_at"] = rests[0] if len(rests) else len(done)
        episode["actions"] = np.array(actions)[:, env]
        episode["labels"] = np.array(labels)[:, env]
        episode["success"] = np.array(success)[:, env]
        episode["rewards"] = np.array(rewards)[:, env]
        episodes.append(episode)
    return episodes


def encode_image(image, image_format):
    """(H, W, 3) uint8 -> bytes of a JPEG (quality 95, full colour) or PNG file, as uint8 array."""
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0}
    if image_format == "png":
        options = {"compress_level": 3}
    Image.fromarray(image).save(buffer, image_format, **options)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def write_episode(file, episode, length, seed):
    """Add the first `length` steps of an episode to an HDF5 file, as ManiSkill's RecordEpisode.

    Returns: its entry of trajectory.json.
    """
    for key in ("actions", "labels", "rewards"):
        finite = np.isfinite(episode[key]).all()
        check(finite, f"{file.filename}: {key} of episode {episode['id']} are not finite")
    number = len(file)
    group = file.create_group(f"traj_{number}")
    for key in ("actions", "success", "rewards"):
        group[key] = episode[key][:length]
    if not np.array_equal(episode["labels"], episode["actions"]):
        group["expert_actions"] = episode["labels"][:length]
    group["terminated"] = np.zeros(length, dtype=bool)
    group["truncated"] = np.arange(1, length + 1) == length
    bytes_type = h5py.vlen_dtype(np.uint8)
    rgb = group.create_dataset(f"obs/sensor_data/{CAMERA}/rgb", (length + 1,), dtype=bytes_type)
    for t, frame in enumerate(episode["frames"][: length + 1]):
        rgb[t] = frame
    return {
        "episode_id": number,
        "episode_seed": seed,
        "control_mode": CONTROL_MODE,
        "elapsed_steps": int(length),
        "success": True,
        "reset_kwargs": {"options": {"episode_ids": [episode["id"]]}, "seed": seed},
        "instruction": episode["instruction"],
    }


def new_files(output):
    """Paths of trajectory.h5 and of what it is called until it is complete."""
    path = Path(output, "trajectory.h5")
    if path.exists():
        raise FileExistsError(f"{path} exists and is never overwritten; use another --output")
    with naming(path, "use another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path, path.with_suffix(".tmp")


def finish_files(path, temporary, header):
    """Both files appear: first the header, so that an .h5 never lies there without one."""
    write_atomic(path.with_suffix(".json"), json.dumps(header, indent=1))
    os.replace(temporary, path)


def check_args(args):
    check_values(vars(args), vars(Args()), MAY_BE_ZERO)
    check_scene(args.task, "train", args.scene)
    configurations = num_configurations(args.task, "train", SCENES[args.scene]["fidelity"])
    if args.num_demos > configurations * 9 // 10:
        raise ValueError(
            f"num_demos = {args.num_demos} must be <= {configurations * 9 // 10}, nine tenths of "
            f"the scenes of {args.task}; use fewer, or a larger task"
        )
    check_simulator("cpu")
    if args.checkpoint:
        source = locate(find_model(args.checkpoint))
        choose_key(source.norm_stats, "", SCENES[args.scene]["assets"])


def main(args):
    check_args(args)
    setup_ranks("cpu")
    model = load_vla(find_model(args.checkpoint), trainable=False) if args.checkpoint else None
    path, temporary = new_files(args.output)
    envs = make_envs(args.num_envs, task=args.task, scene=args.scene)
    envs.max_episode_steps = args.max_episode_steps or envs.max_episode_steps
    expert = Expert(args.num_envs)
    entries, labels, attempted, rejected, seen = [], [], 0, 0, set()
    bar = tqdm(total=args.num_demos, unit="demo")
    with naming(temporary):
        file = h5py.File(temporary, "w")
    with file:
        for batch in count():
            rng = np.random.default_rng([args.seed, batch])
            ids = list(islice(training_episodes(args.task, rng, envs.fidelity), args.num_envs))
            for episode in rollout(envs, expert, model, ids, args, rng):
                length = min(episode["done_at"] + args.hold_steps, envs.max_episode_steps)
                success = episode["success"][length - 1] and episode["success"][-1]
                attempted += 1
                rejected += not success
                if success and episode["id"] not in seen and len(entries) < args.num_demos:
                    seen.add(episode["id"])
                    entries.append(write_episode(file, episode, length, args.seed))
                    labels.append(episode["labels"][:length])
            bar.update(len(entries) - bar.n)
            bar.set_postfix_str(f"rejected {rejected}/{attempted}")
            if len(entries) == args.num_demos:
                break
            if attempted > 20 * (len(entries) + args.num_envs):
                raise RuntimeError(
                    f"only {len(entries)} demonstrations from {attempted} episodes of {args.task}; "
                    "raise --max-episode-steps: the expert needs about 25, a policy may need more"
                )
    bar.close()
    envs.close()
    settings = dict(asdict(args), split="train", max_episode_steps=envs.max_episode_steps)
    scene = dict(SCENES[args.scene], task=args.task, split="train")
    del settings["output"], scene["max_episode_steps"]
    backend = {"obs_mode": "rgb+segmentation", "sim_backend": "physx_cpu"}
    header = {
        "env_info": {
            "env_id": ENV_ID,
            "env_kwargs": scene | backend,
            "max_episode_steps": envs.max_episode_steps,
        },
        "source_type": "rl" if args.checkpoint else "motionplanning",  # ManiSkill's words
        "source_desc": f"CleanVLA's {args.checkpoint or 'closed-loop expert'}",
        "settings": settings,
        "counts": {"attempted": attempted, "rejected": rejected},
        "statistics": {"action": action_statistics(np.concatenate(labels))},
        "episodes": entries,
    }
    finish_files(path, temporary, header)
    return path.parent


if __name__ == "__main__":
    main(tyro.cli(Args))
