"""The WidowX-250S with the benchmark's camera and controller. ManiSkill ships robot and gains."""

import numpy as np
import sapien
import torch
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval import base_env
from scipy.spatial.transform import Rotation
from transforms3d.euler import euler2quat
from transforms3d.quaternions import qmult

INITIAL_QPOS = (  # radians of waist, shoulder, elbow, forearm, wrist angle, wrist; m of fingers
    -0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037,
)  # fmt: skip


class WidowX(base_env.WidowX250SBridgeDatasetFlatTable):
    """ManiSkill's WidowX; a subclass in env.py has image_size, shader_pack and view: see SCENES."""

    uid = "widowx250s_cleanvla"

    @property
    def _sensor_configs(self):
        (camera,) = super()._sensor_configs
        left, top, right, _ = self.view
        camera.intrinsic = np.array(camera.intrinsic)
        camera.intrinsic[:2, 2] -= left, top
        camera.intrinsic[:2] *= self.image_size[0] / (right - left)
        camera.width, camera.height = self.image_size
        camera.shader_pack, camera.shader_config = self.shader_pack, None
        camera.__post_init__()
        return [camera]

    @property
    def _controller_configs(self):
        configs = super()._controller_configs
        for config in configs.values():  # else ManiSkill guesses this, and warns
            config["gripper"].mimic = {"left_finger": {"joint": "right_finger"}}
        return configs

    def set_action(self, action):
        """Drive targets of an action (1, 7). On a CPU they are exactly those of ManiSkill's
        controllers, computed without small tensors: 1.5 ms less of a control step of 5 ms."""
        if self.scene.gpu_sim_enabled:
            super().set_action(action)
            return self.converge()
        action = np.asarray(action, dtype=np.float64).reshape(7)
        arm, gripper = self.controller.controllers["arm"], self.controller.controllers["gripper"]
        # A view: the target advances in place, also where inverse kinematics fails
        target = arm._target_pose.raw_pose[0].numpy()
        target[:3] += action[:3]
        target[3:] = qmult(euler2quat(*action[3:6], axes="rxyz"), target[3:])
        kinematics, robot = arm.kinematics, self.robot._objs[0]
        goal = sapien.Pose(target[:3], target[3:])
        qpos, success, _ = kinematics.pmodel.compute_inverse_kinematics(
            kinematics.end_link_idx, goal, robot.qpos, kinematics.qmask, max_iterations=100
        )
        arm_qpos = (qpos if success else robot.qpos)[:6]
        finger = np.interp(action[6], (-1, 1), (gripper.config.lower, gripper.config.upper))
        for joint, value in zip(robot.active_joints, (*arm_qpos, finger, finger), strict=True):
            joint.set_drive_target(float(value))

    def converge(self):
        """On a GPU: the second step of ManiSkill's solver; one misses targets 4 cm off by 5e-3 rad.
        It never fails: beyond reach joints jump by radians. There the arm stays, as on a CPU."""
        arm, qpos = self.controller.controllers["arm"], self.robot.get_qpos()
        first = torch.cat([arm._target_qpos, qpos[:, 6:]], dim=1)
        solver = arm.config.delta_solver_config
        target = arm.kinematics.compute_ik(arm._target_pose, first, solver_config=solver)
        reached = arm.kinematics.pk_chain.forward_kinematics(target).get_matrix()[:, :3, 3]
        # Within reach the solver is at most 16 mm off
        near = (reached - arm._target_pose.p).norm(dim=1, keepdim=True) < 0.02
        arm._target_qpos = torch.where(near, target, qpos[:, :6])
        arm.set_drive_targets(arm._target_qpos)


def quat_to_matrix(q):
    """Rotation matrices (N, 3, 3) float64 of quaternions (N, 4) wxyz."""
    return Rotation.from_quat(q[:, [1, 2, 3, 0]]).as_matrix()
