"""Pointing scenes: where are object and receptacle, seen from the gripper?

    python -m tiny.pointing --num-scenes 8000 --output demos/pointing

OpenVLA starts from a vision-language model that knows where things are; the small model learns it
here, without one robot action. In a scene of the training configurations the arm takes random
poses, in a quarter of them with the object in hand. The answer is seven numbers, scored by the same
tokens as an action, in the base's axes:
    0:3 object - TCP, 3:5 receptacle - TCP (metres), 5:7 m cos 2b, m sin 2b of the object's short
    horizontal axis: its angle b (which would jump by half a circle) and its elongation m (0: round)
A share of the scenes is varied: noise as the table, tinted light, filler words.

The files are those of demonstrations/record.py, with an episode per scene and, beside the answers,
the class of every second pixel and the places that the answers come from.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice

import h5py
import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from common.run.ranks import cores
from common.simulation.env import CAMERA, SCENES, check_scene
from common.simulation.episodes import training_episodes
from common.simulation.robot import quat_to_matrix
from demonstrations.reader import action_statistics
from demonstrations.record import encode_image, finish_files, new_files, write_episode

LOW, HIGH = (-0.33, -0.18, 0.885), (-0.05, 0.22, 1.05)  # metres, world: where the TCP is in view
FINGERS_M = (0.015, 0.026, 0.037)  # closed, around an object at most, open
MODES, SHARES = ("anywhere", "near", "held"), (0.5, 0.25, 0.25)
ARM, FINGERS, RECEPTACLE, OBJECTS = 1, 2, 3, 4  # classes of pixels; OBJECTS + k: object k; 0: else
FILLERS = (
    "please now you can could should would the this so and then it of for at with down up over"
)


@dataclass
class Args:
    output: str = "demos/pointing"  # a new directory
    num_scenes: int = 8000
    poses_per_scene: int = 8  # of the arm, one picture and answer each
    varied: float = 0.3  # share of the scenes
    task: str = "main"  # a row of common/simulation/tasks.py, in training
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
    from mani_skill.utils.structs import Pose

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
    turn = sapien.Pose(q=[np.cos(half_turn), 0, 0, np.sin(half_turn)])
    upright = sapien.Pose(q=state["tcp_pose"][0, 3:])
    goal = env.agent.robot.pose.sp.inv() * sapien.Pose(target, (turn * upright).q)
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
        lies = turn * sapien.Pose(q=state["object_pose"][0, 3:])
        pose = torch.as_tensor(np.concatenate([point, lies.q])[None], dtype=torch.float32)
        env._teleport_object(Pose.create(pose).raw_pose, keep_velocity=False)
    return True


def noise_table(rng, width, height):
    """(height, width, 3) uint8: noise of a random grain and contrast around a random colour."""
    cells = int(2 ** rng.uniform(0, 6))
    noise = rng.integers(256, size=(-(-cells * 3 // 4), cells, 3)).astype(np.uint8)
    noise = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    noise = np.asarray(noise) - 127.5
    return (rng.uniform(30, 225, 3) + rng.uniform(0, 1) * noise).clip(0, 255).astype(np.uint8)


def with_fillers(text, rng):
    """`text` with up to three filler words before and after it."""
    before, after = (" ".join(rng.choice(FILLERS.split(), rng.integers(4))) for _ in range(2))
    return f"{before} {text} {after}".strip()


def scene(env, rng, episode_id, num_poses, varied):
    """dict of P <= num_poses poses of the arm in one scene: frames, places (P, 12), instruction,
    classes (P, H / 2, W / 2) uint8, object (its number)."""
    env.reset(options={"episode_ids": [episode_id]})
    text, tint = env.instructions()[0], 1.0
    if rng.random() < varied:
        env.backgrounds = torch.as_tensor(noise_table(rng, *env.image_size)[None])
        text = with_fillers(text, rng)
        tint = rng.uniform(0.7, 1.1) * rng.uniform(0.85, 1.15, 3)
    class_of = np.zeros(256, np.uint8)  # of a body's number in the segmentation
    for link in env.agent.robot.links:
        finger = link in (env.agent.finger1_link, env.agent.finger2_link)
        class_of[link.per_scene_id.item()] = FINGERS if finger else ARM
    for (kind, index), actor in env._in_play.items():
        is_object = kind == "object"
        class_of[actor._objs[0].per_scene_id] = OBJECTS + index if is_object else RECEPTACLE
    robot = env.agent.robot._objs[0]
    rest, object_pose = robot.qpos, env._pose("object").clone()
    found = {"id": episode_id, "instruction": text, "object": int(env.episodes.object[0])}
    found.update(frames=[], classes=[], places=[])
    for mode in rng.choice(MODES, num_poses, p=SHARES):
        robot.set_qpos(rest)
        env._teleport_object(object_pose, keep_velocity=False)
        if not place_arm(env, rng, mode):
            continue
        camera = env._get_obs_with_sensor_data({})["sensor_data"][CAMERA]
        image = (camera["rgb"][0].numpy() * tint).clip(0, 255).astype(np.uint8)
        found["frames"].append(encode_image(image, "jpeg"))
        found["classes"].append(class_of[camera["segmentation"][0, ::2, ::2, 0].numpy()])
        found["places"].append(places(env.privileged_state()))
    return found


def _start(settings):
    global env
    from common.simulation.env import make_env

    torch.set_num_threads(1)
    env = make_env(**settings)


def _scene(seed, *rest):
    return scene(env, np.random.default_rng(seed), *rest)


def main(args):
    """Write the scenes; one depends on the seed and its number alone."""
    if args.num_scenes < 1 or not 0 <= args.varied <= 1:
        raise ValueError(
            f"num_scenes = {args.num_scenes} must be >= 1, varied = {args.varied} <= 1"
        )
    check_scene(args.task, "train", "small")
    settings = dict(SCENES["small"], task=args.task, split="train")
    path, temporary = new_files(args.output)
    stream = training_episodes(args.task, np.random.default_rng(args.seed), settings["fidelity"])
    ids = list(islice(stream, args.num_scenes))
    seeds = [[args.seed, number] for number in range(args.num_scenes)]
    rest = [args.poses_per_scene] * len(ids), [args.varied] * len(ids)
    os.environ.setdefault("LP_NUM_THREADS", "0")  # software Vulkan: no threads of its own
    context = multiprocessing.get_context("spawn")
    entries, answers = [], []
    pool = ProcessPoolExecutor(cores(), context, _start, (settings,))
    with pool, h5py.File(temporary, "w") as file:
        scenes = pool.map(_scene, seeds, ids, *rest, chunksize=8)
        for found in tqdm(scenes, total=len(ids), unit="scene"):
            length = len(found["frames"])
            if not length:
                continue
            labels = answer(np.array(found["places"]))
            found["frames"].append(found["frames"][-1])  # an episode ends without an action
            found.update(actions=labels, labels=labels)
            found.update(success=np.zeros(length, bool), rewards=np.zeros(length, np.float32))
            entry = write_episode(file, found, length, args.seed)
            group = file[f"traj_{entry['episode_id']}"]
            options = dict(compression="gzip", compression_opts=1)
            group.create_dataset("classes", data=np.array(found["classes"]), **options)
            group["places"] = np.array(found["places"])
            group.attrs["object"] = found["object"]
            group.attrs["instruction"] = found["instruction"]
            entries.append(entry)
            answers.append(labels)
    header = {"settings": dict(asdict(args), scene="small"), "episodes": entries}
    header["statistics"] = {"action": action_statistics(np.concatenate(answers))}
    finish_files(path, temporary, header)


if __name__ == "__main__":
    main(tyro.cli(Args))
