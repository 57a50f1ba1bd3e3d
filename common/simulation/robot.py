"""The WidowX-250S with the benchmark's camera, gains and controller, fast on CPU.

ManiSkill ships the robot, the gains and the controller; this adds the camera at any size and a CPU controller that
computes the same targets in numpy (0.26 ms instead of 1.8 ms per control step, most of it torch on tiny tensors).
"""

import numpy as np
import sapien
import torch
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import WidowX250SBridgeDatasetFlatTable

INITIAL_QPOS = (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037)  # rad, m


class WidowX(WidowX250SBridgeDatasetFlatTable):
    """ManiSkill's WidowX with the camera at any size and, on CPU, a controller without tiny-tensor overhead.

    `set_action` computes exactly what ManiSkill's controllers compute, in numpy. On GPU these are its own, where
    inverse kinematics is one step of a solver that cannot fail, where the benchmark's own repeats it; see `converge`.
    """

    uid = "widowx250s_cleanvla"
    image_size = (640, 480)
    shader_pack = "default"

    @property
    def _sensor_configs(self):
        (camera,) = super()._sensor_configs
        scale = self.image_size[0] / camera.width
        camera.intrinsic = camera.intrinsic * scale
        camera.intrinsic[2, 2] = 1.0
        camera.width, camera.height = self.image_size
        camera.shader_pack, camera.shader_config = self.shader_pack, None
        camera.__post_init__()
        return [camera]

    @property
    def _controller_configs(self):
        configs = super()._controller_configs
        for config in configs.values():
            config["gripper"].mimic = {"left_finger": {"joint": "right_finger"}}  # else it guesses this, and warns
        return configs

    def set_action(self, action):
        if self.scene.gpu_sim_enabled:
            super().set_action(action)
            return self.converge()
        action = np.asarray(action, dtype=np.float64).reshape(7)
        arm, gripper = self.controller.controllers["arm"], self.controller.controllers["gripper"]
        target = arm._target_pose.raw_pose[0].numpy()  # a view: the target advances in place, also when IK fails
        target[:3] += action[:3]
        target[3:] = _quaternion_product(_euler_xyz_quaternion(action[3:6]), target[3:])
        kinematics, robot = arm.kinematics, self.robot._objs[0]
        qpos, success, _ = kinematics.pmodel.compute_inverse_kinematics(
            kinematics.end_link_idx,
            sapien.Pose(target[:3], target[3:]),
            initial_qpos=robot.qpos,
            active_qmask=kinematics.qmask,
            max_iterations=100,
        )
        arm_qpos = (qpos if success else robot.qpos)[:6]
        low, high = gripper.config.lower, gripper.config.upper
        finger = low + (np.clip(action[6], -1.0, 1.0) + 1.0) / 2.0 * (high - low)
        for joint, value in zip(robot.active_joints, (*arm_qpos, finger, finger), strict=True):
            joint.set_drive_target(float(value))

    def converge(self):
        """The second step of ManiSkill's GPU solver: after one, targets 4 cm away are missed by over 5e-3 rad.

        It never fails: beyond reach its joints jump by radians. There the arm stays where it is, as on CPU.
        """
        arm, qpos = self.controller.controllers["arm"], self.robot.get_qpos()
        first = torch.cat([arm._target_qpos, qpos[:, 6:]], dim=1)
        settings = {"solver_config": arm.config.delta_solver_config}
        target = arm.kinematics.compute_ik(arm._target_pose, first, **settings)
        reached = arm.kinematics.pk_chain.forward_kinematics(target).get_matrix()[:, :3, 3]
        near = (reached - arm._target_pose.p).norm(dim=1, keepdim=True) < 0.02  # m; up to 16 mm within reach
        arm._target_qpos = torch.where(near, target, qpos[:, :6])
        arm.set_drive_targets(arm._target_qpos)


def quat_to_matrix(q):
    """Rotation matrices (N, 3, 3) of quaternions (N, 4) wxyz."""
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


def _euler_xyz_quaternion(angles):
    """Quaternion of Rx @ Ry @ Rz (intrinsic XYZ) for `angles` (3,) radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles / 2), np.sin(angles / 2)
    return np.array(
        [
            cx * cy * cz - sx * sy * sz,
            sx * cy * cz + cx * sy * sz,
            cx * sy * cz - sx * cy * sz,
            cx * cy * sz + sx * sy * cz,
        ]
    )


def _quaternion_product(a, b):
    (aw, ax, ay, az), (bw, bx, by, bz) = a, b
    return np.array(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ]
    )
