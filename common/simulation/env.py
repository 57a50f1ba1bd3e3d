"""The benchmark scene as one ManiSkill environment: a WidowX puts an object on a receptacle.
All follows the RL4VLA benchmark (Liu et al. 2025), but that on a CPU the arm is reset before the
objects settle and only bodies in play are there. Metres, newtons, quaternions wxyz; B episodes."""

from functools import partial

import gymnasium
import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.structs import Pose
from mani_skill.utils.wrappers import CPUGymWrapper

from common.run.files import check
from common.simulation.assets import load_pack
from common.simulation.robot import INITIAL_QPOS, WidowX, quat_to_matrix
from common.simulation.tasks import OBJECTS, composite, decode, instruction, num_configurations

ENV_ID = "CleanVLA-PutOnReceptacle-v1"
SCENES = {  # the embedded one, the paper's; view: left, top, right, bottom in its 640x480 pixels
    "small": dict(
        assets="primitive", image_size=(80, 60), view=(56, 80, 536, 440), sim_freq=100,
        solver_iterations=4, max_episode_steps=40, fidelity="fixed", shader_pack="minimal"),
    "published": dict(
        assets="bridge", image_size=(640, 480), view=(0, 0, 640, 480), sim_freq=500,
        solver_iterations=15, max_episode_steps=80, fidelity="published", shader_pack="default"),
}  # fmt: skip
CONTROL_FREQ = 5  # Hz: a control step is 0.2 s
CAMERA = "3rd_view_camera"
BASE_POSE = ((0.147, 0.028, 0.870), (0.0, 0.0, 0.0, 1.0))  # the arm faces -x
TABLE_M, HOIST_M = 0.87, 1.0  # the table's top; so far above it the arm waits while objects settle
SETTLE_SUBSTEPS, MOVE_SUBSTEPS = 650, 50  # of 2 ms, as published
GRASP_FORCE_N, GRASP_ANGLE_DEG, HELD_STEPS = 0.5, 85.0, 5
XY_MARGIN_M, Z_MARGIN_M, CONTACT_FORCE_N = 0.01, 0.05, 0.03
NUM_OBJECTS = max(split.stop for split in OBJECTS)
STATE_SIZE = 23 + 4 + 4 + 3 + 1 + NUM_OBJECTS  # of `state_features`
gymnasium.register(ENV_ID, "common.simulation.env:make_gym")


def check_scene(task, split, scene):
    """ValueError or FileNotFoundError with value, rule and fix; it costs milliseconds."""
    check(scene in SCENES, f"scene = {scene!r} is not known; use one of {', '.join(SCENES)}")
    num_configurations(task, split, SCENES[scene]["fidelity"])
    load_pack(SCENES[scene]["assets"])


class PutOnReceptacleEnv(BaseEnv):
    """One episode is one id: `reset(options={"episode_ids": (B,) int})`; "episodes": `Episodes`.
    Args: task, split: see tasks.py; the others are a row of SCENES. Nothing ends an episode:
        max_episode_steps is what `state_features` measures progress by.
    Observation: ManiSkill's rgb+segmentation, rgb composited over the table's photo:
        obs["sensor_data"]["3rd_view_camera"]["rgb"] (B, H, W, 3) uint8.
    Action (B, 7): xyz delta (m) and intrinsic XYZ Euler delta (rad) of the gripper's target pose
        in base axes; gripper, 1 = open, -1 = closed."""

    SUPPORTED_REWARD_MODES = ("dense", "none")
    SUPPORTED_OBS_MODES = ("rgb+segmentation",)

    def __init__(self, *args, task="main", split="train", **settings):
        row = {key: settings.pop(key, default) for key, default in SCENES["small"].items()}
        size, view, sim_freq = tuple(row["image_size"]), tuple(row["view"]), row["sim_freq"]
        assert size[0] * (view[3] - view[1]) == size[1] * (view[2] - view[0])
        assert sim_freq % CONTROL_FREQ == 0, f"sim_freq = {sim_freq} is no multiple of 5 Hz"
        self.pack, self.image_size, self.view = load_pack(row["assets"]), size, view
        self.fidelity, self.max_episode_steps = row["fidelity"], row["max_episode_steps"]
        self.set_task(task, split)
        look = dict(image_size=size, view=view, shader_pack=row["shader_pack"])
        robot = type("PackWidowX", (WidowX,), dict(look, urdf_path=self.pack.robot_urdf))
        physics = dict(sim_freq=sim_freq, control_freq=CONTROL_FREQ, spacing=20)
        physics["scene_config"] = {"solver_position_iterations": row["solver_iterations"]}
        # PhysX's own size: with ManiSkill's 4 MB contacts may be lost, with only a log line
        physics["gpu_memory_config"] = {"collision_stack_size": 64 * 2**20}
        super().__init__(*args, robot_uids=robot, sim_config=physics, **settings)

    def set_task(self, task, split):  # of the next episodes
        num_configurations(task, split, self.fidelity)
        self.task, self.split = task, split

    # --- scene ---
    def _load_agent(self, options):
        super()._load_agent(options, sapien.Pose(*BASE_POSE))
        for link in self.agent.robot.links:
            body = link._objs[0].entity.find_component_by_type(sapien.render.RenderBodyComponent)
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
        if self.gpu_sim_enabled:  # bodies cannot be added later: those not in play are parked
            for kind, bodies in (("object", self.pack.objects), ("plate", self.pack.plates)):
                for index in range(len(bodies)):
                    self._in_play[kind, index] = self._build_body(kind, index)

    def _build_body(self, kind, index):
        builder = self.scene.create_actor_builder()
        self.pack.add_body(builder, kind, index)
        builder.initial_pose = sapien.Pose(*_parking(kind, index))
        actor = self._bodies[kind, index] = builder.build(name=f"{kind}_{index}")
        return actor

    def _bring_into_play(self, wanted):
        """On a CPU: a new PhysX world with robot, table and `wanted` (kind, index) bodies. PhysX
        orders contacts by its world's past; in a new one (1 ms) an id alone fixes an episode."""
        for actor in self._in_play.values():
            actor._objs[0].remove_from_scene()
            del self.scene.actors[actor.name]
        old_scene = self.scene.sub_scenes[0]
        physx_system = sapien.physx.PhysxCpuSystem()
        physx_system.timestep = self.scene.px.timestep
        scene = sapien.Scene([physx_system, old_scene.render_system])
        entities = list(old_scene.entities)
        for entity in entities:  # all leave before the first enters: an arm cannot be in two scenes
            entity.remove_from_scene()
        for entity in entities:
            scene.add_entity(entity)
        self.scene.sub_scenes[0], self.scene.px = scene, physx_system
        self._in_play = {}
        for key in wanted:
            if key in self._bodies:
                scene.add_entity(self._bodies[key]._objs[0])
            actor = self._bodies.get(key) or self._build_body(*key)
            self._in_play[key] = self.scene.actors[actor.name] = actor

    # --- reset ---
    def _initialize_episode(self, env_idx, options):
        right = len(env_idx) == self.num_envs
        check(right, f"{len(env_idx)} of {self.num_envs} environments: all settle at once")
        gymnasium.Env.reset(self, seed=int(self._main_seed[0]))  # ManiSkill leaves this one out
        most = num_configurations(self.task, self.split, self.fidelity)
        drawn = self._batched_episode_rng.randint(min(most, 2**31 - 1))
        ids = np.asarray(options.get("episode_ids", drawn), np.int64).reshape(self.num_envs)
        e = options.get("episodes") or decode(self.task, self.split, ids, self.fidelity)
        self.episodes = e
        spawns = [("object", e.object, e.object_xyz, e.object_quat),
                  ("plate", e.plate, e.plate_xyz, e.plate_quat)]  # fmt: skip
        if e.third in ("object", "plate") and (e.third_index >= 0).any():
            spawns.append((e.third, e.third_index, e.third_xyz, e.third_quat))
        if not self.gpu_sim_enabled:
            self._bring_into_play([(kind, int(index[0])) for kind, index, _, _ in spawns])
        # The bodies settle while the arm is out of the way
        robot, base = self.agent.robot, sapien.Pose(*BASE_POSE)
        joints = (robot.active_joints, torch.arange(8, device=self.device))
        qpos = torch.tensor(INITIAL_QPOS, device=self.device).repeat(self.num_envs, 1)
        robot.set_pose(sapien.Pose([0, 0, HOIST_M]) * base)
        robot.set_qpos(qpos)
        robot.set_joint_drive_targets(qpos, *joints)
        for (kind, index), actor in self._in_play.items():
            self._place_body(kind, index, actor, spawns)
        self._simulate(SETTLE_SUBSTEPS)
        robot.set_pose(base)
        qpos[:, :6] += torch.as_tensor(e.arm_offset, device=self.device)
        robot.set_qpos(qpos)
        robot.set_qvel(torch.zeros_like(qpos))
        robot.set_joint_drive_targets(qpos, *joints)
        self.object_rest_pose = self._pose("object")
        self._measure_bodies()
        self._grasp_count = np.zeros(self.num_envs, dtype=int)
        self._ever = dict.fromkeys(("grasped", "held", "success"), np.zeros(self.num_envs, bool))
        self._potential = torch.zeros(self.num_envs, device=self.device)
        self._load_images()

    def _place_body(self, kind, index, actor, spawns):
        """Put a body at rest where its environments' `spawns` say, else where it is parked."""
        pose = torch.tensor(np.concatenate(_parking(kind, index)), dtype=torch.float32)
        for spawn_kind, indices, xyz, quat in spawns:
            chosen = torch.as_tensor((indices == index) & (spawn_kind == kind))
            spawn = torch.as_tensor(np.concatenate([xyz, quat], axis=1))
            pose = torch.where(chosen[:, None], spawn, pose)
        actor.set_pose(Pose.create(pose.expand(self.num_envs, 7).to(self.device)))
        nothing = torch.zeros(self.num_envs, 3, device=self.device)
        actor.set_linear_velocity(nothing)
        actor.set_angular_velocity(nothing)

    def _simulate(self, substeps):
        """Let the world run for the time of so many published substeps of 2 ms."""
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()
        for _ in range(round(substeps * self.sim_freq / 500)):
            self.scene.step()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()

    def _load_images(self):
        """Table photos and textures (B, H, W, 3), and the weights (B,) of the textures."""
        e, pack = self.episodes, self.pack

        def load(picture, indices):
            pictures = [picture(k, *self.image_size, self.view) for k in indices]
            return torch.as_tensor(np.stack(pictures), device=self.device)

        self.backgrounds = self.textures = load(pack.background, e.table)
        if e.composite != "plain":
            self.textures = load(pack.texture, e.texture)
        self.mix = torch.tensor([pack.mixes[k] for k in e.texture], device=self.device)

    # --- state of the bodies in play ---
    def _for_selected(self, which, function):
        """`function(actor) -> (B, ...)` array of each environment's own "object" or "plate"."""
        indices = getattr(self.episodes, which)
        if not self.gpu_sim_enabled:
            return function(self._in_play[which, int(indices[0])])
        used = np.unique(indices)
        values = np.stack([function(self._in_play[which, int(k)]) for k in used])
        return values[np.searchsorted(used, indices), np.arange(self.num_envs)]

    def _pose_of(self, body):
        """(B, 7) float32 of an actor or a link; on a CPU without ManiSkill's small tensors."""
        if self.gpu_sim_enabled:
            return body.pose.raw_pose.cpu().numpy()
        pose = getattr(body._objs[0], "entity", body._objs[0]).pose
        return np.concatenate([pose.p, pose.q])[None]

    def _pose(self, which):
        return self._for_selected(which, self._pose_of)

    def _force(self, body, other):
        return self.scene.get_pairwise_contact_forces(body, other).cpu().numpy()  # (B, 3) newtons

    def _measure_bodies(self):
        """Boxes (B, 2, 3) of collision shapes; half extents (B, 3) in world axes, offset ignored"""
        self.boxes, self.half = {}, {}
        for which, bodies in (("object", self.pack.objects), ("plate", self.pack.plates)):
            chosen = [bodies[k] for k in getattr(self.episodes, which)]
            box = np.array([(body.bbox_min, body.bbox_max) for body in chosen])
            z, names = self._pose(which)[:, 2].min(), [body.name for body in chosen]
            why = f"a {which} of {names} fell to z = {z:.2f} m; is its collision mesh whole?"
            check(z > TABLE_M - 0.1, why)
            self.boxes[which], half = box, (box[:, 1] - box[:, 0]) / 2
            rotation = quat_to_matrix(self._pose(which)[:, 3:])
            self.half[which] = (np.abs(rotation) @ half[:, :, None])[:, :, 0]

    def instructions(self):
        """list[str] (B,)"""
        objects = [self.pack.objects[k].name for k in self.episodes.object]
        plates = [self.pack.plates[k].name for k in self.episodes.plate]
        return list(map(instruction, self.episodes.template, objects, plates))

    def privileged_state(self):
        """dict of arrays (B, ...) for experts and critics; never an input of the policy."""
        arm = self.agent.controller.controllers["arm"]
        x, y, z, qw, qx, qy, qz = arm._target_pose.raw_pose.cpu().numpy().T
        half_turn = [-x, -y, z, -qz, -qy, qx, qw]  # the base is turned by 180 degrees about z
        target = np.stack(half_turn, axis=1)
        target[:, :3] += np.float32(BASE_POSE[0])
        fingers = self.agent.robot.get_qpos()[:, 6:8].cpu().numpy()
        return dict(
            object_pose=self._pose("object"), plate_pose=self._pose("plate"),
            object_bbox=self.boxes["object"], plate_bbox=self.boxes["plate"],
            object_index=self.episodes.object, plate_index=self.episodes.plate,
            tcp_pose=self._pose_of(arm.ee_link), tcp_target_pose=target, finger_qpos=fingers,
            base_pose=self._pose_of(self.agent.robot.links[0]))  # fmt: skip

    def state_features(self):
        """(B, STATE_SIZE) float32, what a state critic reads; progress, or no value is right."""
        s = self.privileged_state()
        bodies = ("object", "plate", "tcp", "tcp_target", "base")
        thing, plate, tcp, target, base = (s[f"{body}_pose"][:, :3] for body in bodies)
        metres = [
            thing - tcp, plate - thing, target - tcp, thing - base, tcp - base,
            s["object_bbox"].reshape(self.num_envs, 6), s["finger_qpos"]]  # fmt: skip
        # An object pushed through the table falls 300 m, and unbounded would drown a whole rollout
        decimetres = (10 * np.concatenate(metres, axis=1)).clip(-10, 10)
        flags = np.stack([self._ever["grasped"], self._ever["held"], self._success], axis=1)
        progress = self._elapsed_steps.cpu().numpy()[:, None] / self.max_episode_steps
        which = np.eye(NUM_OBJECTS)[s["object_index"]]
        turns = s["object_pose"][:, 3:], s["tcp_pose"][:, 3:]
        features = (decimetres, *turns, flags, progress, which)
        return np.concatenate(features, axis=1).astype(np.float32)

    # --- step ---
    def _step_action(self, action):
        action = torch.as_tensor(action, dtype=torch.float32, device=self.device).reshape(-1, 7)
        if not torch.isfinite(action).all():
            raise ValueError(f"action {action.tolist()} is not finite; check the policy's outputs")
        self.agent.set_action(action)
        if self.gpu_sim_enabled:
            self.scene.px.gpu_apply_articulation_target_position()
        for _ in range(self._sim_steps_per_control):
            self.scene.step()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()
        if self.fidelity == "fixed" and self._elapsed_steps[0] + 1 == self.episodes.move_at:
            pose = self.object_rest_pose.copy()
            pose[:, :2] = self.episodes.third_xyz[:, :2]
            self._teleport_object(pose, keep_velocity=False)
        return action

    def _move_as_published(self):
        """The object falls from 13 cm and time goes on, in every evaluation at that step."""
        pose = np.concatenate([self.episodes.third_xyz, self.episodes.object_quat], axis=1)
        self._teleport_object(pose, keep_velocity=True)
        self._simulate(MOVE_SUBSTEPS)

    def _teleport_object(self, pose, keep_velocity):
        pose = torch.as_tensor(pose, device=self.device)
        for index in np.unique(self.episodes.object):
            actor = self._in_play["object", int(index)]
            chosen = torch.as_tensor(self.episodes.object == index, device=self.device)[:, None]
            actor.set_pose(Pose.create(torch.where(chosen, pose, actor.pose.raw_pose)))
            if not keep_velocity:
                actor.set_linear_velocity(torch.where(chosen, 0.0, actor.linear_velocity))
                actor.set_angular_velocity(torch.where(chosen, 0.0, actor.angular_velocity))
        self._simulate(0)

    def evaluate(self):
        """ManiSkill's success test, once per control step: forces are of the last substep."""
        if self.fidelity == "published" and self._elapsed_steps[0] == self.episodes.move_at:
            self._move_as_published()
        grasped = self._grasped()
        self._success = self._placed()
        self._grasp_count = np.where(grasped, self._grasp_count + 1, 0)
        held = self._grasp_count >= HELD_STEPS
        now = {"grasped": grasped, "held": held, "success": self._success}
        self._ever = {key: self._ever[key] | now[key] for key in now}
        info = dict(self._ever, success=self._success, success_once=self._ever["success"])
        return {key: torch.as_tensor(value, device=self.device) for key, value in info.items()}

    def _grasped(self):
        """(B,) bool: both fingers press the object, about in the direction in which they close."""
        grasped = np.ones(self.num_envs, dtype=bool)
        for link, sign in ((self.agent.finger1_link, 1.0), (self.agent.finger2_link, -1.0)):
            push = self._for_selected("object", partial(self._force, link))  # (B, 3)
            newtons = np.linalg.norm(push, axis=1)
            grasped &= newtons >= GRASP_FORCE_N
            if not grasped.any():  # mostly so
                break
            rotation = quat_to_matrix(self._pose_of(link)[:, 3:])
            cosine = (push * sign * rotation[:, :, 1]).sum(1) / np.maximum(newtons, 1e-9)
            grasped &= cosine >= np.cos(np.deg2rad(GRASP_ANGLE_DEG))
        return grasped

    def _placed(self):
        """(B,) bool: the object is over the receptacle, close above it, and touches it."""
        x, y, z = (self._pose("object")[:, :3] - self._pose("plate")[:, :3]).T
        gap = z - self.half["plate"][:, 2] - self.half["object"][:, 2]
        placed = np.hypot(x, y) <= self.half["plate"].max(axis=1) + XY_MARGIN_M
        placed &= (z > 0) & (gap <= Z_MARGIN_M)
        if placed.any():
            on_plate = lambda body: self._for_selected("plate", partial(self._force, body))  # noqa: E731
            touch = self._for_selected("object", on_plate)
            placed &= np.linalg.norm(touch, axis=1) > CONTACT_FORCE_N
        return placed

    def compute_dense_reward(self, obs, action, info):
        """(B,) float32: what the potential 0.1 grasped + 0.1 held + 1.0 success gained."""
        before = self._potential
        self._potential = 0.1 * info["grasped"].float() + 0.1 * info["held"].float()
        self._potential += (info["success"] & info["grasped"]).float()
        return self._potential - before

    # --- observation ---
    def _get_obs_with_sensor_data(self, info, apply_texture_transforms=True):
        sensor_data = self._get_obs_sensor_data(apply_texture_transforms)
        camera, e = sensor_data[CAMERA], self.episodes
        segmentation = camera["segmentation"][..., 0]
        foreground = (segmentation != 0) & (segmentation != self.arena.per_scene_id[0])
        texture = (self.textures, self.mix, e.composite, e.ratio, self.fidelity)
        camera["rgb"] = composite(camera["rgb"], foreground, self.backgrounds, *texture)
        return {"sensor_data": sensor_data}


def _parking(kind, index):
    """Published parking pose of a body that is not in play: behind the camera."""
    return (1.0 if kind == "object" else 2.0, 0.3 * index, 1.0), (0.0, 0.0, 0.0, 1.0)


def make_env(num_envs=1, sim_backend="physx_cpu", render_backend="cpu", **settings):
    """One environment: on a CPU one episode at a time, on a GPU `num_envs` in one simulation."""
    backends = dict(sim_backend=sim_backend, render_backend=render_backend)
    return PutOnReceptacleEnv(num_envs=num_envs, **backends, **settings)


def make_gym(scene="small", task="main", split="train", **settings):
    """For `gymnasium.make`: one environment in numpy, which its scene's step limit truncates."""
    check_scene(task, split, scene)
    env = make_env(**SCENES[scene] | settings, task=task, split=split)
    env = CPUGymWrapper(env, ignore_terminations=True)
    return gymnasium.wrappers.TimeLimit(env, env.unwrapped.max_episode_steps)
