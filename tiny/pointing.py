"""Pointing scenes: where are object and receptacle, seen from the gripper?

    python -m tiny.pointing --output demos/pointing

OpenVLA starts from a vision-language model that knows where things are; the small model learns it
here, without one robot action. In every picture of a random scene (tiny/scenes.py) its bodies and
the arm are elsewhere, in a quarter of them with the object in hand. The answer is seven numbers,
scored by the same tokens as an action, in the base's axes:
    0:3 object - TCP, 3:5 receptacle - TCP (metres), 5:7 m cos 2b, m sin 2b of the object's short
    horizontal axis: its angle b (which would jump by half a circle) and its elongation m (0: round)

A part of the scenes is one file, written whole; the same command makes those that are missing.
validation.h5 has other random bodies, tables and noise than the rest. Of B pictures each has:
    images (B, H, W, 3) uint8; bodies (B, H / 2, W / 2) uint16: what every second pixel shows, see
    below; places (B, 12) float32, see `places`; text (B,); object, receptacle (B,): the names of
    those that are meant; third (B,): 1 another object, 2 another receptacle; overlay (B,): 1 over
    the bodies, 2 over all; mode (B,): of MODES
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import tyro
from tqdm import tqdm

from common.run.ranks import cores
from common.simulation.env import CAMERA, SCENES
from common.simulation.robot import quat_to_matrix
from tiny.scenes import (
    COLORS,
    OBJECT_SHAPES,
    RECEPTACLE_SHAPES,
    broad_pack,
    name_number,
    random_bodies,
    random_episode,
    random_text,
)  # fmt: skip

LOW, HIGH = (-0.33, -0.18, 0.885), (-0.03, 0.22, 1.07)  # metres, world: where the TCP is in view
TILTS_RAD = (0.05, 0.05, 0.15)  # standard deviations of the gripper's roll and pitch, one is drawn
FINGERS_M = (0.015, 0.026, 0.037)  # closed, around an object at most, open
MODES, SHARES = ("anywhere", "near", "held"), (0.5, 0.25, 0.25)
# What a pixel shows: 0 all else, RECEPTACLES + k or OBJECTS + k what has the k-th name
ARM, FINGERS, RECEPTACLES = 1, 2, 3
OBJECTS = RECEPTACLES + 17 + len(COLORS) * len(RECEPTACLE_SHAPES)


@dataclass
class Args:
    output: str = "demos/pointing"  # a directory
    num_scenes: int = 60_000
    scenes_per_file: int = 1000
    val_scenes: int = 1000  # with other bodies
    pictures_per_scene: int = 8  # of the same bodies, elsewhere on another table
    seed: int = 0


def places(state):
    """(12,) float32 of one environment's `privileged_state`, in the base's axes.

    0:3 object, 3:5 receptacle, 5:7 m cos 2b, m sin 2b (see above), 7:10 TCP (metres), 10:12 cos 2g,
    sin 2g of the fingers' closing axis.
    """
    base = quat_to_matrix(state["base_pose"][:, 3:])[0]
    box, rotation = state["object_bbox"][0], quat_to_matrix(state["object_pose"][:, 3:])[0]
    middle = state["object_pose"][0, :3] + rotation @ box.mean(0)
    points = np.array([middle, state["plate_pose"][0, :3], state["tcp_pose"][0, :3]])
    thing, plate, tcp = (points - state["base_pose"][0, :3]) @ base
    sides = box[1] - box[0]
    horizontal = np.delete(np.arange(3), np.abs(rotation[2]).argmax())
    short, long = horizontal[np.argsort(sides[horizontal], kind="stable")]
    closing = quat_to_matrix(state["tcp_pose"][:, 3:])[0, :, 1]
    axes = np.stack([rotation[:, short], closing]) @ base
    double = 2 * np.arctan2(axes[:, 1], axes[:, 0])
    lie, closing = np.stack([np.cos(double), np.sin(double)], axis=1)
    elongation = 1 - sides[short] / sides[long]
    return np.float32([*thing, *plate[:2], *(elongation * lie), *tcp, *closing])


def answer(places):
    """(..., 7) float32 of `places` (..., 12): object and receptacle as seen from the gripper."""
    thing, plate, lie, tcp, _ = np.split(places, (3, 5, 7, 10), axis=-1)
    return np.concatenate([thing - tcp, plate - tcp[..., :2], lie], axis=-1)


def place_arm(env, rng, mode):
    """Put the arm at a random pose, in mode "held" with the object in hand; False: no reach."""
    import sapien

    arm, robot = env.agent.controller.controllers["arm"], env.agent.robot._objs[0]
    state = env.privileged_state()
    target = rng.uniform(LOW, HIGH)
    if mode == "near":
        target = state["object_pose"][0, :3] + rng.normal((0, 0, 0.01), (0.025, 0.025, 0.03))
    elif mode == "held" and rng.random() < 0.5:
        above = [*rng.normal(0, 0.03, 2), rng.uniform(0.02, 0.12)]
        target = state["plate_pose"][0, :3] + above
    target[2] = max(target[2], LOW[2])
    half_turn = rng.uniform(-0.75, 0.75)
    tilt = rng.normal(0, rng.choice(TILTS_RAD) / 2, 2)
    turn = sapien.Pose(q=[np.cos(half_turn), 0, 0, np.sin(half_turn)])
    tilt = sapien.Pose(q=np.array([1, *tilt, 0]) / np.linalg.norm([1, *tilt]))
    upright = sapien.Pose(q=state["tcp_pose"][0, 3:])
    goal = env.agent.robot.pose.sp.inv() * sapien.Pose(target, (tilt * turn * upright).q)
    qpos, reached, _ = arm.kinematics.pmodel.compute_inverse_kinematics(
        arm.kinematics.end_link_idx, goal, robot.qpos, arm.kinematics.qmask, max_iterations=100
    )
    if not reached:
        return False
    fingers = rng.uniform(FINGERS_M[0], FINGERS_M[1 if mode == "held" else 2])
    if mode == "near" and rng.random() < 0.7:
        fingers = FINGERS_M[2]
    robot.set_qpos(np.array([*qpos[:6], fingers, fingers]))
    if mode == "held":
        point = arm.ee_pose.sp.p + rng.normal(0, (0.004, 0.004, 0.006))
        lies = tilt * turn * sapien.Pose(q=state["object_pose"][0, 3:])
        pose = np.concatenate([point, lies.q])[None].astype(np.float32)
        env._teleport_object(pose, keep_velocity=False)
    return True


def place_bodies(env, rest):
    """Move the bodies from where they came to rest to the places of `env.episodes`, turned."""
    import sapien

    e = env.episodes
    meant = {("object", int(e.object[0])): "object", ("plate", int(e.plate[0])): "plate"}
    for key, pose in rest.items():
        which = meant.get(key, "third")
        xyz, turn = getattr(e, f"{which}_xyz")[0], getattr(e, f"{which}_quat")[0]
        turned = sapien.Pose(q=turn) * sapien.Pose(q=pose.q)
        env._in_play[key]._objs[0].set_pose(sapien.Pose([*xyz[:2], pose.p[2]], turned.q))


def scene(env, rng, num_pictures):
    """dict of arrays of P <= num_pictures pictures of the same bodies, as in a file."""
    bodies = random_bodies(rng)
    episode = random_episode(rng, bodies)
    keys = "images bodies places text object receptacle third overlay mode".split()
    found = {key: [] for key in keys}
    try:
        env.reset(options={"episodes": episode})
    except ValueError:  # a body began inside another and fell through the table, once in thousands
        return found
    names = env.pack.objects[episode.object[0]].name, env.pack.plates[episode.plate[0]].name
    number_of = np.zeros(2**15, np.uint16)  # by a body's number in the segmentation
    for link in env.agent.robot.links:
        finger = link in (env.agent.finger1_link, env.agent.finger2_link)
        number_of[link.per_scene_id.item()] = FINGERS if finger else ARM
    for (kind, index), actor in env._in_play.items():
        number = OBJECTS + name_number(index, 25, OBJECT_SHAPES)
        if kind == "plate":
            number = RECEPTACLES + name_number(index, 17, RECEPTACLE_SHAPES)
        number_of[actor._objs[0].per_scene_id] = number
    robot = env.agent.robot._objs[0]
    qpos, rest = robot.qpos, {key: env._in_play[key]._objs[0].pose for key in env._in_play}
    for mode in rng.choice(len(MODES), num_pictures, p=SHARES):
        env.episodes = episode = random_episode(rng, bodies)
        env._load_images()
        robot.set_qpos(qpos)
        place_bodies(env, rest)
        if not place_arm(env, rng, MODES[mode]):
            continue
        place = places(env.privileged_state())
        if not np.isfinite(place).all():  # bodies that began inside each other, once in 10,000
            continue
        camera = env._get_obs_with_sensor_data({})["sensor_data"][CAMERA]
        tint = rng.uniform(0.7, 1.1) * rng.uniform(0.85, 1.15, 3) if rng.random() < 0.5 else 1.0
        pixels = (camera["rgb"][0].numpy() * tint).clip(0, 255).astype(np.uint8)
        shown = number_of[camera["segmentation"][0, ::2, ::2, 0].numpy()]
        meant = name_number(episode.object[0], 25, OBJECT_SHAPES)
        receptacle = name_number(episode.plate[0], 17, RECEPTACLE_SHAPES)
        third = ("none", "object", "plate").index(episode.third)
        overlay = ("plain", "texture", "whole").index(episode.composite)
        text = random_text(rng, *names)
        values = pixels, shown, place, text, meant, receptacle, third, overlay, mode
        for key, value in zip(keys, values, strict=True):
            found[key].append(value)
    return found


def _start(seed):
    global env
    import torch

    from common.simulation.env import make_env

    torch.set_num_threads(1)
    env = make_env(**SCENES["small"])
    env.pack = broad_pack(seed)


def _scene(seed, num_pictures):
    return scene(env, np.random.default_rng(seed), num_pictures)


def write(path, args, pool, seed, numbers):
    """One file of the scenes of these numbers, whole or not at all."""
    temporary, columns = path.with_suffix(".tmp"), {}
    seeds = [[seed, number] for number in numbers]
    jobs = pool.map(_scene, seeds, [args.pictures_per_scene] * len(seeds))
    for found in tqdm(jobs, total=len(numbers), unit="scene", desc=path.name):
        for key, values in found.items():
            columns.setdefault(key, []).extend(values)
    types = dict(images=np.uint8, bodies=np.uint16, places=np.float32, text=h5py.string_dtype())
    with h5py.File(temporary, "w") as file:
        for key, values in columns.items():
            values = np.array(values, types.get(key, np.int16))
            options = dict(compression="gzip", compression_opts=1) if values.ndim > 2 else {}
            file.create_dataset(key, data=values, **options)
    os.replace(temporary, path)


def main(args):
    """Write the files that are missing; a scene depends on the seed and its number alone."""
    if min(args.num_scenes, args.scenes_per_file, args.val_scenes) < 1:
        raise ValueError(f"{args}: numbers of scenes must be >= 1")
    os.environ.setdefault("LP_NUM_THREADS", "0")  # software Vulkan: no threads of its own
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    training = {}
    for start in range(0, args.num_scenes, args.scenes_per_file):
        numbers = range(start, min(start + args.scenes_per_file, args.num_scenes))
        training[f"scenes-{start:06d}.h5"] = numbers
    validation, context = {"validation.h5": range(args.val_scenes)}, get_context("spawn")
    for seed, files in ((args.seed + 1000, validation), (args.seed, training)):
        with ProcessPoolExecutor(cores(), context, _start, (seed,)) as pool:
            for name, numbers in files.items():
                if not (folder / name).exists():
                    write(folder / name, args, pool, seed, numbers)


if __name__ == "__main__":
    main(tyro.cli(Args))
