"""Pointing scenes: where are object and receptacle, seen from the gripper? What the small model is pre-trained on.

    python -m tiny.pointing --num-scenes 8000 --output demos/pointing

OpenVLA starts from a vision-language model that knows where things are; the small model learns it here, without one
robot action. In a scene of the training configurations the arm takes `poses_per_scene` random poses, in a quarter of
them with the object in hand, and the answer is seven numbers, scored by the same tokens as an action:
    0:3 object centre - TCP, 3:5 receptacle - TCP (metres), 5:7 m cos 2 b, m sin 2 b: the angle b of the object's short
    horizontal axis and its elongation m = 1 - short / long side; all in base axes
An angle would jump between +-90 degrees, and mean nothing for round objects; these two numbers do neither.
A share of the scenes is varied: coloured noise as the table, tinted light, filler words around the instruction.
Stored like demonstrations (common/simulation/demos.py), one episode per scene, with the class of every second pixel and the places
that the answers come from: what tiny/pretrain.py trains on; there is nothing to replay.
"""

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
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
from common.simulation.demos import action_statistics, encode_image, write_episode
from common.simulation.env import CAMERA, check_env_args
from common.simulation.robot import quat_to_matrix

LOW, HIGH = (-0.33, -0.18, 0.885), (-0.05, 0.22, 1.05)  # metres, world: where the TCP can be in view
FINGERS_M = (0.015, 0.026, 0.037)  # closed, around an object at most, open
MODES, SHARES = ("anywhere", "near", "held"), (0.5, 0.25, 0.25)
ARM, FINGERS, RECEPTACLE, OBJECTS = 1, 2, 3, 4  # classes of pixels; 0 = all else, OBJECTS + k = object k
FILLERS = "please now you can could should would the this so and then it of for at with down up over".split()


@dataclass
class Args:
    output: str = "demos/pointing"  # directory of trajectory.h5 and .json; not one that exists
    num_scenes: int = 8000
    poses_per_scene: int = 8  # of the arm, one picture and answer each
    varied: float = 0.3  # share of the scenes with noise as the table, tinted light and filler words
    task: str = "main"  # a row of common/simulation/tasks.py
    split: Literal["train", "test"] = "train"  # its configurations; those kept for evaluation are never drawn
    seed: int = 0
    sim_freq: int = 250  # physics Hz, while the objects settle
    solver_iterations: int = 4  # of the contact solver
    fidelity: Literal["fixed", "published"] = "fixed"  # published = with the benchmark's known defects
    shader_pack: Literal["minimal", "default"] = "minimal"  # renderer quality
    num_workers: int = 0  # simulator processes; 0 = one per core
    image_format: Literal["jpeg", "png"] = "jpeg"  # jpeg: quality 95


def places(state):
    """(12,) float32 of one environment's `privileged_state`, in base axes; each is seen without the others, TCP and
    closing axis by the fingers: 0:3 object centre, 3:5 receptacle, 5:7 m cos 2 b, m sin 2 b of the object's short
    horizontal axis, 7:10 TCP (metres), 10:12 cos 2 g, sin 2 g of the fingers' closing axis."""
    base, origin = quat_to_matrix(state["base_pose"][:, 3:])[0], state["base_pose"][0, :3]
    box, rotation = state["object_bbox"][0], quat_to_matrix(state["object_pose"][:, 3:])[0]
    points = state["object_pose"][0, :3] + rotation @ box.mean(0), state["plate_pose"][0, :3], state["tcp_pose"][0, :3]
    thing, plate, tcp = (np.array(points) - origin) @ base
    sides, vertical = box[1] - box[0], np.abs(rotation[2]).argmax()
    short, long = sorted(set(range(3)) - {vertical}, key=lambda axis: sides[axis])
    axes = np.stack([rotation[:, short], quat_to_matrix(state["tcp_pose"][:, 3:])[0, :, 1]]) @ base
    double = 2 * np.arctan2(axes[:, 1], axes[:, 0])
    lie, closing = np.stack([np.cos(double), np.sin(double)], axis=1)
    return np.float32([*thing, *plate[:2], *(1 - sides[short] / sides[long]) * lie, *tcp, *closing])


def answer(places):
    """(..., 7) float32, see the module, of `places` (..., 12): object and receptacle as seen from the gripper."""
    thing, plate, lie, tcp, _ = np.split(places, (3, 5, 7, 10), axis=-1)
    return np.concatenate([thing - tcp, plate - tcp[..., :2], lie], axis=-1)


def place_arm(env, rng, mode):
    """Put the arm, vertical, at a random pose, in mode "held" with the object in hand; False: out of reach."""
    import sapien
    from mani_skill.utils.structs import Pose

    arm, robot = env.agent.controller.controllers["arm"], env.agent.robot._objs[0]
    state, base = env.privileged_state(), env.agent.robot.pose.sp
    target = rng.uniform(LOW, HIGH)
    if mode == "near":
        target = state["object_pose"][0, :3] + rng.normal((0, 0, 0.01), (0.025, 0.025, 0.03))
    elif mode == "held" and rng.random() < 0.5:
        target = state["plate_pose"][0, :3] + [*rng.normal(0, 0.03, 2), rng.uniform(0.02, 0.12)]
    target[2] = max(target[2], LOW[2])
    half_turn = rng.uniform(-0.75, 0.75)
    turn = sapien.Pose(q=[np.cos(half_turn), 0, 0, np.sin(half_turn)])
    goal = base.inv() * sapien.Pose(target, (turn * sapien.Pose(q=state["tcp_pose"][0, 3:])).q)
    kinematics = arm.kinematics
    qpos, reached, _ = kinematics.pmodel.compute_inverse_kinematics(
        kinematics.end_link_idx, goal, initial_qpos=robot.qpos, active_qmask=kinematics.qmask, max_iterations=100
    )
    if not reached:
        return False
    fingers = rng.uniform(FINGERS_M[0], FINGERS_M[1 if mode == "held" else 2])
    if mode == "near" and rng.random() < 0.7:
        fingers = FINGERS_M[2]
    robot.set_qpos(np.array([*qpos[:6], fingers, fingers]))
    if mode == "held":
        lies = sapien.Pose(q=state["object_pose"][0, 3:])
        pose = np.concatenate([arm.ee_pose.sp.p + rng.normal(0, (0.004, 0.004, 0.006)), (turn * lies).q])
        env._teleport_object(Pose.create(torch.as_tensor(pose[None], dtype=torch.float32)).raw_pose, False)
    return True


def noise_table(rng, width, height):
    """(height, width, 3) uint8: coloured noise of a random grain and contrast around a random colour."""
    cells = int(2 ** rng.uniform(0, 6))
    noise = Image.fromarray(rng.integers(256, size=(-(-cells * 3 // 4), cells, 3)).astype(np.uint8))
    noise = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) - 127.5
    return (rng.uniform(30, 225, 3) + rng.uniform(0, 1) * noise).clip(0, 255).astype(np.uint8)


def with_fillers(text, rng):
    """`text` with up to three filler words before and after it."""
    before, after = (" ".join(rng.choice(FILLERS, rng.integers(4))) for _ in range(2))
    return f"{before} {text} {after}".strip()


def scene(env, rng, episode_id, num_poses, varied, image_format):
    """(frames, classes (P, H / 2, W / 2) uint8, places (P, 12) float32, instruction, object's number) of P <= num_poses
    poses of the arm in one scene."""
    env.reset(options={"episode_ids": [episode_id]})
    text, tint, varied = env.instructions()[0], 1.0, rng.random() < varied
    if varied:
        env.backgrounds = torch.as_tensor(noise_table(rng, *env.image_size)[None])
        text, tint = with_fillers(text, rng), rng.uniform(0.7, 1.1) * rng.uniform(0.85, 1.15, 3)
    fingers = env.agent.finger1_link, env.agent.finger2_link
    robot, rest, object_pose = env.agent.robot._objs[0], env.agent.robot._objs[0].qpos, env._pose("object").clone()
    class_of = np.zeros(256, np.uint8)  # of a body's number in the segmentation
    for link in env.agent.robot.links:
        class_of[link.per_scene_id.item()] = FINGERS if link in fingers else ARM
    for (kind, index), actor in env._in_play.items():  # a body's number changes when it enters a new scene
        class_of[actor._objs[0].per_scene_id] = OBJECTS + index if kind == "object" else RECEPTACLE
    frames, classes, where, number = [], [], [], int(env.privileged_state()["object_index"][0])
    for mode in rng.choice(MODES, num_poses, p=SHARES):
        robot.set_qpos(rest)
        env._teleport_object(object_pose, False)
        if place_arm(env, rng, mode):
            camera = env._get_obs_with_sensor_data({})["sensor_data"][CAMERA]
            image = (camera["rgb"][0].numpy() * tint).clip(0, 255).astype(np.uint8)
            frames.append(encode_image(image, image_format))
            classes.append(class_of[camera["segmentation"][0, ::2, ::2, 0].numpy()])
            where.append(places(env.privileged_state()))
    return frames, np.array(classes), np.array(where, np.float32).reshape(-1, 12), text, number


def _start(env_kwargs, *settings):
    global job
    from common.simulation.env import make_env

    torch.set_num_threads(1)
    env = make_env(**env_kwargs)
    job = lambda seed, episode_id: scene(env, np.random.default_rng(seed), episode_id, *settings)  # noqa: E731


def _scene(item):
    return job(*item)


def record(args):
    """Write the scenes of `args`; one depends on (seed, num_scenes, its number) alone. Returns the path of the .h5."""
    final = Path(args.output) / "trajectory.h5"
    if final.with_suffix(".json").exists():  # written last
        raise FileExistsError(f"{final} exists and is never overwritten; use another --output")
    if not 0 <= args.varied <= 1:
        raise ValueError(f"varied = {args.varied} is a share: it must be 0 to 1; use 0.5")
    if args.num_scenes < 1 or args.poses_per_scene < 1:
        raise ValueError(f"num_scenes = {args.num_scenes} and poses_per_scene = {args.poses_per_scene} must be >= 1")
    env_kwargs = {"task": args.task, "split": args.split, "assets": "primitive", "image_size": (160, 120)}
    env_kwargs |= {key: getattr(args, key) for key in ("sim_freq", "solver_iterations", "fidelity")}
    check_env_args(*env_kwargs.values())
    final.parent.mkdir(parents=True, exist_ok=True)
    ids = training_ids(args.task, args.split, args.num_scenes, np.random.default_rng(args.seed), args.fidelity)
    settings = env_kwargs | {k: v for k, v in asdict(args).items() if k not in ("output", "num_workers")}
    temporary, episodes, answers, start = final.with_suffix(".tmp"), [], [], time.time()
    os.environ.setdefault("LP_NUM_THREADS", "0")  # software Vulkan: no threads of its own, see `common/simulation/vec_env.py`
    pool = ProcessPoolExecutor(
        args.num_workers or len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"), _start,
        (env_kwargs | {"shader_pack": args.shader_pack}, args.poses_per_scene, args.varied, args.image_format),
    )  # fmt: skip
    items = [([args.seed, k], int(i)) for k, i in enumerate(ids)]
    with pool, h5py.File(temporary, "w") as file, closing(pool.map(_scene, items, chunksize=8)) as jobs:
        for k, (frames, classes, where, text, number) in enumerate(tqdm(jobs, total=len(ids), unit="scene")):
            if not frames:
                continue
            labels = answer(where)
            batch = {"actions": labels[None], "labels": labels[None], "instructions": [text]}
            batch |= {"frames": [[*frames, frames[-1]]]}  # an episode ends with a frame that has no action
            batch |= {key: np.zeros((1, len(labels)), t) for key, t in (("success", bool), ("rewards", np.float32))}
            write_episode(file, f"traj_{len(episodes)}", batch, 0, len(labels), int(ids[k]), args.seed)
            group = file[f"traj_{len(episodes)}"]
            group.create_dataset("classes", data=classes, compression="gzip", compression_opts=1)
            group["places"], group.attrs["object"] = where, number
            episodes.append({"episode_id": len(episodes)} | json.loads(group.attrs["episode"]))
            answers.append(labels)
    header = {
        "source_type": "pointing", "source_desc": __doc__.splitlines()[0], "settings": settings, "episodes": episodes,
        "statistics": {"action": action_statistics(np.concatenate(answers))},
    }  # fmt: skip
    os.replace(temporary, final)
    text = final.with_suffix(".json.tmp")
    text.write_text(json.dumps(header, indent=1))
    os.replace(text, final.with_suffix(".json"))
    print(f"{len(np.concatenate(answers))} pictures of {len(episodes)} scenes in {(time.time() - start) / 60:.1f} min")
    return final


if __name__ == "__main__":
    record(tyro.cli(Args))
