"""The benchmark scene as one ManiSkill environment: a WidowX-250S puts an object on a receptacle on a table.

What differs between the tasks (objects, tables, placement, distractors, arm offsets, compositing, ...) is data in
`common/simulation/tasks.py`; what differs between asset packs (meshes or primitive shapes) is data in `common/simulation/assets.py`.
Scene, robot, controller, reset, success and reward follow the RL4VLA benchmark (Liu et al. 2025); the departures are
* on CPU an episode is fixed by its episode id alone: the arm is reset before the objects settle, and the velocity
  test after the first 50 substeps of settling, which always fires, is gone;
* on CPU only the bodies in play are in the scene (the published scene simulates all 25 objects all the time);
* `fidelity="fixed"` moves the object of `position_change` once, at rest and without extra physics;
  `"published"` repeats the published side effect: every evaluation at step 5 drops it from 13 cm and runs 50 substeps.

Units: metres, radians, newtons, seconds; quaternions are w, x, y, z. B = number of environments (1 on CPU).
"""

import gymnasium as gym
import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs import Pose
from mani_skill.utils.structs.types import GPUMemoryConfig, SceneConfig, SimConfig

from common.simulation.assets import load_pack
from common.simulation.robot import INITIAL_QPOS, WidowX, quat_to_matrix
from common.simulation.tasks import composite, decode, get_task, instruction, num_configurations

ENV_ID = "CleanVLA-PutOnReceptacle-v1"
CONTROL_FREQ = 5  # Hz; one control step = 0.2 s
CAMERA = "3rd_view_camera"
BASE_POSE = ((0.147, 0.028, 0.870), (0.0, 0.0, 0.0, 1.0))  # yaw 180 degrees: the arm faces -x
HOIST_M = 1.0  # the arm waits this far above the table while the objects settle
SETTLE_SUBSTEPS, MOVE_SUBSTEPS = 650, 50  # at the published 500 Hz: 1.3 s and 0.1 s
GRASP_FORCE_N, GRASP_ANGLE_DEG, HELD_STEPS = 0.5, 85.0, 5
XY_MARGIN_M, Z_MARGIN_M, CONTACT_FORCE_N = 0.01, 0.05, 0.03


def check_env_args(task, split, assets, image_size, sim_freq, solver_iterations, fidelity):
    """Raise ValueError / FileNotFoundError naming value, rule and fix; costs milliseconds and loads no simulator."""
    get_task(task, fidelity)
    num_configurations(task, split, fidelity)
    load_pack(assets)
    width, height = image_size
    if width % 4 or height % 2 or width * 3 != height * 4 or not 64 <= width <= 1920:
        raise ValueError(
            f"image_size = {width}x{height} is not supported: width and height must be even, in the camera's ratio "
            "4:3, and 64 to 1920 wide; use 160x120 (small model) or 640x480 (published)"
        )
    if sim_freq < 50 or sim_freq % CONTROL_FREQ:
        raise ValueError(f"sim_freq = {sim_freq} Hz must be a multiple of {CONTROL_FREQ} and >= 50; use 250 or 500")
    if solver_iterations < 1:
        raise ValueError(f"solver_iterations = {solver_iterations} must be >= 1; use 4 (embedded) or 15 (published)")


@register_env(ENV_ID, max_episode_steps=80)
class PutOnReceptacleEnv(BaseEnv):
    """One episode = one id: `reset(options={"episode_ids": ids})`, ids (B,) int, modulo `num_configurations`.

    Args: see `common/simulation/vec_env.py:make_envs`. Observation (ManiSkill layout, mode rgb+segmentation):
    obs["sensor_data"]["3rd_view_camera"]["rgb"] (B, H, W, 3) uint8, composited over the task's table photo.
    Action (B, 7): xyz delta (m) and intrinsic-XYZ Euler delta (rad) of the target TCP pose in base axes, gripper
    1 = open, -1 = closed. Reward mode "dense": difference of the potential 0.1 grasped + 0.1 held + 1.0 success.
    """

    SUPPORTED_REWARD_MODES = ("dense", "none")
    SUPPORTED_OBS_MODES = ("rgb+segmentation",)

    def __init__(
        self,
        *args,
        task="main",
        split="train",
        assets="primitive",
        image_size=(160, 120),
        sim_freq=250,
        solver_iterations=4,
        fidelity="fixed",
        shader_pack="minimal",
        **kwargs,
    ):
        check_env_args(task, split, assets, image_size, sim_freq, solver_iterations, fidelity)
        self.pack, self.image_size, self.fidelity = load_pack(assets), tuple(image_size), fidelity
        self.set_task(task, split)
        self._frequencies = (sim_freq, solver_iterations)
        attributes = {"urdf_path": str(self.pack.robot_urdf), "image_size": self.image_size}
        attributes |= {"shader_pack": shader_pack}
        robot = type("PackWidowX", (WidowX,), attributes)
        super().__init__(*args, robot_uids=robot, **kwargs)

    def set_task(self, task, split):
        """Draw the next episodes from another task of the same pack."""
        num_configurations(task, split, self.fidelity)
        self.task, self.split = task, split

    # --- scene ---
    @property
    def _default_sim_config(self):
        sim_freq, iterations = self._frequencies
        # PhysX's own size of the collision stack: beyond ManiSkill's 4 MB contacts may be lost, with a log line.
        settings = {"gpu_memory_config": GPUMemoryConfig(collision_stack_size=64 * 2**20), "spacing": 20}
        settings |= {"scene_config": SceneConfig(solver_position_iterations=iterations)}
        return SimConfig(sim_freq=sim_freq, control_freq=CONTROL_FREQ, **settings)

    def _load_agent(self, options):
        super()._load_agent(options, sapien.Pose(*BASE_POSE))
        for entity in (obj.entity for link in self.agent.robot.links for obj in link._objs):
            body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
            for shape in body.render_shapes if body else ():
                for part in getattr(shape, "parts", [shape]):
                    part.material.set_specular(0.9)
                    part.material.set_roughness(0.3)

    def _load_lighting(self, options):
        self.scene.set_ambient_light([0.3, 0.3, 0.3])
        for direction, color in (([0, 0, -1], 2.2), ([-1, -0.5, -1], 0.7), ([1, 1, -1], 0.7)):
            self.scene.add_directional_light(direction, [color] * 3, shadow=False)

    def _load_scene(self, options):
        builder = self.scene.create_actor_builder()
        self.pack.build_table(builder)
        self.arena = builder.build_static(name="arena")
        self._bodies = {}  # (kind, index) -> Actor ever built
        self._in_play = {}  # (kind, index) -> Actor in the scene now
        if self.gpu_sim_enabled:  # GPU PhysX cannot add bodies later: build all, park those not in play
            for kind, bodies in (("object", self.pack.objects), ("plate", self.pack.plates)):
                for index in range(len(bodies)):
                    self._in_play[kind, index] = self._build_body(kind, index)

    def _build_body(self, kind, index):
        builder = self.scene.create_actor_builder()
        self.pack.add_body(builder, kind, index)
        builder.initial_pose = sapien.Pose(*_parking(kind, index))
        self._bodies[kind, index] = builder.build(name=f"{kind}_{index}")
        return self._bodies[kind, index]

    def _bring_into_play(self, wanted):
        """CPU: a new PhysX world with robot, table and exactly the `wanted` (kind, index) bodies.

        PhysX orders contacts by what happened in its world before, and grasps amplify that to centimetres; a world per
        episode (1 ms) makes an episode a function of its id alone. Bodies not in play cost nothing.
        """
        for actor in self._in_play.values():
            actor._objs[0].remove_from_scene()
            del self.scene.actors[actor.name]
        old_scene, physx_system = self.scene.sub_scenes[0], sapien.physx.PhysxCpuSystem()
        physx_system.timestep = self.scene.px.timestep
        scene = sapien.Scene([physx_system, old_scene.render_system])
        entities = list(old_scene.entities)
        for entity in entities:  # all leave before the first enters: links of an arm cannot be in two scenes
            entity.remove_from_scene()
        for entity in entities:
            scene.add_entity(entity)
        self.scene.sub_scenes[0], self.scene.px = scene, physx_system
        self._in_play = {}
        for key in wanted:
            if key in self._bodies:
                actor = self._bodies[key]
                scene.add_entity(actor._objs[0])
                self.scene.actors[actor.name] = actor
            else:
                actor = self._build_body(*key)
            self._in_play[key] = actor

    # --- reset ---
    def _initialize_episode(self, env_idx, options):
        if len(env_idx) != self.num_envs:
            raise ValueError(f"reset of {len(env_idx)} of {self.num_envs} environments: only full batches can settle")
        ids = options.get("episode_ids")
        if ids is None:
            number = num_configurations(self.task, self.split, self.fidelity)
            ids = self._batched_episode_rng.randint(min(number, 2**31 - 1))
        ids = np.asarray(ids, dtype=np.int64).reshape(self.num_envs)
        self.episode_ids, self.episodes = ids, decode(self.task, self.split, ids, self.fidelity)
        e = self.episodes
        self.third_kind = e.third if e.third in ("object", "plate") and (e.third_index >= 0).any() else None
        spawns = [("object", e.object, e.object_xyz, e.object_quat), ("plate", e.plate, e.plate_xyz, e.plate_quat)]
        if self.third_kind:
            spawns.append((self.third_kind, e.third_index, e.third_xyz, e.third_quat))
        if not self.gpu_sim_enabled:
            self._bring_into_play([(kind, int(index[0])) for kind, index, _, _ in spawns])
        robot = self.agent.robot
        qpos = torch.tensor(INITIAL_QPOS, device=self.device).repeat(self.num_envs, 1)
        base = sapien.Pose(*BASE_POSE)
        robot.set_pose(sapien.Pose([0, 0, HOIST_M]) * base)
        robot.set_qpos(qpos)
        robot.set_joint_drive_targets(qpos, robot.active_joints, torch.arange(8, device=self.device))
        for (kind, index), actor in self._in_play.items():
            pose = torch.tensor(np.concatenate(_parking(kind, index)), dtype=torch.float32).repeat(self.num_envs, 1)
            for spawn_kind, indices, xyz, quat in spawns:
                chosen = torch.as_tensor((indices == index) & (spawn_kind == kind))
                spawn = torch.as_tensor(np.concatenate([xyz, quat], axis=1), dtype=torch.float32)
                pose = torch.where(chosen[:, None], spawn, pose)
            actor.set_pose(Pose.create(pose.to(self.device)))
            actor.set_linear_velocity(torch.zeros(self.num_envs, 3, device=self.device))
            actor.set_angular_velocity(torch.zeros(self.num_envs, 3, device=self.device))
        self._simulate(SETTLE_SUBSTEPS)
        robot.set_pose(base)
        qpos[:, :6] += torch.as_tensor(e.arm_offset, dtype=torch.float32, device=self.device)
        robot.set_qpos(qpos)
        robot.set_qvel(torch.zeros_like(qpos))
        robot.set_joint_drive_targets(qpos, robot.active_joints, torch.arange(8, device=self.device))

        self.object_rest_pose = self._pose("object").clone()
        self.object_half, self.plate_half = self._half_extents("object"), self._half_extents("plate")
        self._grasp_count = np.zeros(self.num_envs, dtype=int)
        self._ever = {key: np.zeros(self.num_envs, dtype=bool) for key in ("grasped", "held", "success")}
        self._potential = torch.zeros(self.num_envs, device=self.device)
        self._load_images()

    def _simulate(self, substeps_at_500_hz):
        """Let the world run for the time of `substeps_at_500_hz` published substeps of 2 ms."""
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()
        for _ in range(round(substeps_at_500_hz * self.sim_freq / 500)):
            self.scene.step()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()

    def _load_images(self):
        """Table photos (B, H, W, 3) and, when the task composites with textures, textures and their weights (B,)."""
        e, size = self.episodes, self.image_size
        stack = lambda images: torch.as_tensor(np.stack(images), device=self.device)  # noqa: E731
        self.backgrounds = stack([self.pack.background(int(k), *size) for k in e.table])
        self.textures, self.mix = None, torch.zeros(self.num_envs, device=self.device)
        if e.composite != "plain":
            self.textures = stack([self.pack.texture(int(k), *size) for k in e.texture])
            self.mix = torch.tensor([self.pack.texture_mix(int(k)) for k in e.texture], device=self.device)

    # --- state of the bodies in play ---
    def _indices(self, which):
        return self.episodes.third_index if which == "third" else getattr(self.episodes, which)

    def _for_selected(self, which, function):
        """`function(actor) -> (B, ...)` of the body that plays `which` ("object", "plate", "third") in each env."""
        kind = self.third_kind if which == "third" else which
        indices = self._indices(which)
        if not self.gpu_sim_enabled:
            return function(self._in_play[kind, int(indices[0])])
        indices = np.where(indices < 0, indices.max(), indices)  # published multi_carrot: some have no third body
        used = np.unique(indices)
        values = torch.stack([function(self._in_play[kind, int(k)]) for k in used])  # (bodies, B, ...)
        row = torch.as_tensor(np.searchsorted(used, indices), device=self.device)
        return values[row, torch.arange(self.num_envs, device=self.device)]

    def _pose(self, which):
        return self._for_selected(which, lambda actor: actor.pose.raw_pose)  # (B, 7)

    def bounding_boxes(self, which):
        """(B, 2, 3) min and max corner of the body's collision shapes in its own frame."""
        bodies = self.pack.plates if (self.third_kind if which == "third" else which) == "plate" else self.pack.objects
        return np.stack([[bodies[int(k)].bbox_min, bodies[int(k)].bbox_max] for k in self._indices(which)])

    def _half_extents(self, which):
        """World-axis half extents (B, 3) after settling; as published, the offset of the box centre is ignored."""
        boxes = self.bounding_boxes(which)
        rotation = quat_to_matrix(self._pose(which)[:, 3:].cpu().numpy())
        return (np.abs(rotation) @ ((boxes[:, 1] - boxes[:, 0]) / 2)[:, :, None])[:, :, 0]

    def instructions(self):
        """list[str] (B,)"""
        e, pack = self.episodes, self.pack
        return [
            instruction(t, pack.objects[o].name, pack.plates[p].name)
            for t, o, p in zip(e.template, e.object, e.plate, strict=True)
        ]

    def privileged_state(self):
        """dict of numpy arrays (B, ...) for experts and analysis; never an input of the policy."""
        arm = self.agent.controller.controllers["arm"]
        as_numpy = lambda tensor: tensor.detach().cpu().numpy().copy()  # noqa: E731
        base = self.agent.robot.pose
        state = {f"{which}_pose": as_numpy(self._pose(which)) for which in ("object", "plate")}
        nowhere = np.full_like(state["object_pose"], np.nan)
        third_pose = as_numpy(self._pose("third")) if self.third_kind else nowhere
        state["third_pose"] = np.where(self.episodes.third_index[:, None] < 0, nowhere, third_pose)
        state |= {f"{which}_bbox": self.bounding_boxes(which) for which in ("object", "plate")}
        state |= {f"{which}_index": np.asarray(getattr(self.episodes, which)) for which in ("object", "plate", "table")}
        state["tcp_pose"] = as_numpy(arm.ee_pose.raw_pose)
        state["tcp_target_pose"] = as_numpy((base * arm._target_pose).raw_pose)
        state["base_pose"] = as_numpy(base.raw_pose)
        state["finger_qpos"] = as_numpy(self.agent.robot.get_qpos()[:, 6:8])
        return state

    # --- step ---
    def _step_action(self, action):
        action = torch.as_tensor(action, dtype=torch.float32, device=self.device).reshape(self.num_envs, 7)
        if not torch.isfinite(action).all():
            raise ValueError(f"action {action.tolist()} is not finite; check the policy's outputs")
        self.agent.set_action(action)
        if self.gpu_sim_enabled:
            self.scene.px.gpu_apply_articulation_target_position()
        for _ in range(self._sim_steps_per_control):  # the drive target is held for the whole control step
            self.scene.step()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()
        if self.fidelity == "fixed" and self._moves_now(self._elapsed_steps + 1):
            pose = self.object_rest_pose.clone()
            pose[:, :2] = torch.as_tensor(self.episodes.third_xyz[:, :2], dtype=torch.float32)
            self._teleport_object(pose, keep_velocity=False)
        return action

    def _moves_now(self, elapsed):
        return self.episodes.move_at is not None and int(elapsed[0]) == self.episodes.move_at

    def _teleport_object(self, pose, keep_velocity):
        for index in np.unique(self.episodes.object):
            actor = self._in_play["object", int(index)]
            chosen = torch.as_tensor(self.episodes.object == index, device=self.device)[:, None]
            actor.set_pose(Pose.create(torch.where(chosen, pose, actor.pose.raw_pose)))
            if not keep_velocity:
                actor.set_linear_velocity(torch.where(chosen, 0.0, actor.linear_velocity))
                actor.set_angular_velocity(torch.where(chosen, 0.0, actor.angular_velocity))
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()
            self.scene._gpu_fetch_all()

    def evaluate(self):
        """Called once per control step, after its physics: contact forces are those of the last substep."""
        if self.fidelity == "published" and self._moves_now(self._elapsed_steps):
            e = self.episodes
            pose = np.concatenate([e.third_xyz, e.object_quat], axis=1)
            self._teleport_object(torch.as_tensor(pose, dtype=torch.float32, device=self.device), keep_velocity=True)
            self._simulate(MOVE_SUBSTEPS)
        as_numpy = lambda tensor: tensor.cpu().numpy()  # noqa: E731  (sooner than torch for so few numbers)
        force = self.scene.get_pairwise_contact_forces
        grasped = np.ones(self.num_envs, dtype=bool)
        for link, sign in ((self.agent.finger1_link, 1.0), (self.agent.finger2_link, -1.0)):
            push = as_numpy(self._for_selected("object", lambda actor, link=link: force(link, actor)))  # (B, 3)
            newtons = np.linalg.norm(push, axis=1)
            grasped &= newtons >= GRASP_FORCE_N
            if not grasped.any():  # mostly so; a link's pose is slow to read
                break
            opening = sign * quat_to_matrix(as_numpy(link.pose.raw_pose[:, 3:]))[:, :, 1]
            cosine = (push * opening).sum(1) / np.maximum(newtons, 1e-9)
            grasped &= cosine >= np.cos(np.deg2rad(GRASP_ANGLE_DEG))
        self._grasp_count = np.where(grasped, self._grasp_count + 1, 0)
        x, y, z = as_numpy(self._pose("object")[:, :3] - self._pose("plate")[:, :3]).T
        placed = np.hypot(x, y) <= self.plate_half.max(axis=1) + XY_MARGIN_M
        placed &= (z > 0) & (z - self.plate_half[:, 2] - self.object_half[:, 2] <= Z_MARGIN_M)
        if placed.any():
            touch = self._for_selected("object", lambda a: self._for_selected("plate", lambda b: force(a, b)))  # (B, 3)
            placed &= np.linalg.norm(as_numpy(touch), axis=1) > CONTACT_FORCE_N
        now = {"grasped": grasped, "held": self._grasp_count >= HELD_STEPS, "success": placed}
        self._ever = {key: self._ever[key] | now[key] for key in now}
        info = self._ever | {"success": placed, "success_once": self._ever["success"]}
        return {key: torch.as_tensor(value, device=self.device) for key, value in info.items()}

    def compute_dense_reward(self, obs, action, info):
        """(B,) float32: potential now minus potential one step ago; the return is 0, 0.1, 0.2, 1.1 or 1.2."""
        potential = 0.1 * info["grasped"].float() + 0.1 * info["held"].float()
        potential = potential + (info["success"] & info["grasped"]).float()
        reward, self._potential = potential - self._potential, potential
        return reward

    # --- observation ---
    def _get_obs_with_sensor_data(self, info, apply_texture_transforms=True):
        sensor_data = self._get_obs_sensor_data(apply_texture_transforms)
        image, segmentation = sensor_data[CAMERA]["rgb"], sensor_data[CAMERA]["segmentation"][..., 0]
        foreground = (segmentation != 0) & (segmentation != self.arena.per_scene_id[0])
        e = self.episodes
        sensor_data[CAMERA]["rgb"] = composite(
            image, foreground, self.backgrounds, self.textures, self.mix, e.composite, e.ratio, self.fidelity
        )
        return {"sensor_data": sensor_data}


def _parking(kind, index):
    """Published parking pose of a body that is not in play: behind the camera."""
    return (1.0 if kind == "object" else 2.0, 0.3 * index, 1.0), (0.0, 0.0, 0.0, 1.0)


def make_env(num_envs=1, sim_backend="physx_cpu", render_backend="cpu", **kwargs):
    """One ManiSkill environment (CPU: exactly one episode at a time; CUDA: `num_envs` in one simulation)."""
    env = gym.make(ENV_ID, num_envs=num_envs, sim_backend=sim_backend, render_backend=render_backend, **kwargs)
    return env.unwrapped
