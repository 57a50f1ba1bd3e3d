"""A closed-loop expert: privileged poses in, the policy's own actions out. Made for `common/simulation/demos.py`.

It is a feedback law, not a planner: every step it looks at the measured poses, so it follows rolling or teleported
objects and recovers from drops. Each axis moves by one of few speeds, so the action tokens of its demonstrations have
few distinct values; roll and pitch actions are exactly zero unless the arm starts tilted.

Units: metres, radians; poses are xyz + wxyz quaternion in the world; N environments.
"""

import numpy as np

from common.simulation.robot import quat_to_matrix

STEP_M = (0.005, 0.01, 0.02, 0.04)  # speeds per axis and control step; the residual is at most half the smallest
STEP_RAD = (0.05, 0.1, 0.2, 0.4)
REACH, CLOSE, CARRY, OPEN, RETREAT = range(5)
OPENING_M = 0.051  # widest object that fits between the open fingers
PALM_M = 0.02  # the palm is this far above the TCP: a grasp must not be deeper below the object's top
TIP_M = 0.018  # the finger tips are this far below the TCP: the lowest grasp above the table
MAX_TILT = 0.08  # rad; the usual start pose is 0.058 off vertical and stays so: roll and pitch actions are exactly 0


def quantise(error, speeds):
    """Largest of 0 and `speeds` (ascending) that does not overshoot `error` by more than half the smallest speed."""
    levels = np.array((0.0, *speeds))
    index = np.searchsorted(levels, np.abs(error) + speeds[0] / 2, side="right") - 1
    return np.sign(error) * levels[index]


def grasp(rotation, half, closing):
    """Turn (N,) in radians that lays the fingers' closing axis along a narrow horizontal axis of the object's box.

    Args: rotation (N, 3, 3) and half (N, 3) extents of the box; closing (N, 3) closing axis of the fingers now.
    A wider axis is taken if it spares much turning; a turn of half a circle is none; ties turn counter-clockwise.
    """
    axes = np.moveaxis(rotation, 2, 1)  # (N, 3 axes, xyz)
    turn = np.arctan2(axes[:, :, 1], axes[:, :, 0]) - np.arctan2(closing[:, 1], closing[:, 0])[:, None]
    turn = (turn + np.deg2rad(80)) % np.pi - np.deg2rad(80)  # [-80, 100) degrees
    width = 2 * half
    cost = width + 0.004 * np.abs(turn - 0.1) + (width > OPENING_M)
    cost[np.arange(len(cost)), np.abs(axes[:, :, 2]).argmax(1)] = np.inf  # the vertical axis
    return turn[np.arange(len(turn)), cost.argmin(1)]


class Expert:
    """Feedback law from `envs.privileged_state()` to actions (N, 7) float32; call `reset` when episodes start."""

    def __init__(self, num_envs):
        self.phase = np.full(num_envs, REACH)
        self.fingers = np.zeros(num_envs)

    def reset(self):
        self.phase[:] = REACH
        self.fingers[:] = 0.0

    def act(self, state):
        """One action per environment; afterwards `self.done` (N,) : the arm rests above the placed object."""
        tcp, target, table = state["tcp_pose"][:, :3], state["tcp_target_pose"][:, :3], state["base_pose"][:, 2]
        box, rotation = state["object_bbox"], quat_to_matrix(state["object_pose"][:, 3:])
        half = (box[:, 1] - box[:, 0]) / 2
        centre = state["object_pose"][:, :3] + np.einsum("nij,nj->ni", rotation, box.mean(1))
        height = np.einsum("nj,nj->n", np.abs(rotation[:, 2]), half)  # half the object's height as it lies
        top, bottom = centre[:, 2] + height, centre[:, 2] - height
        plate = state["plate_pose"][:, :3]
        plate_top = plate[:, 2] + state["plate_bbox"][:, 1, 2]
        frame = quat_to_matrix(state["tcp_target_pose"][:, 3:])
        approach, closing = frame[:, :, 0], frame[:, :, 1]
        turn = grasp(rotation, half, closing)
        fingers = state["finger_qpos"].mean(1)
        fingers_rest = np.abs(fingers - self.fingers) < 0.001
        self.fingers = fingers

        # What is true now
        offset = centre - tcp
        grasp_z = np.maximum(np.maximum(centre[:, 2], top - PALM_M), table + TIP_M)
        off_grasp = np.linalg.norm(offset[:, :2], axis=1)
        low = tcp[:, 2] < top + 0.01
        aligned = (off_grasp < np.where(low, 0.02, 0.01)) & (np.abs(turn) < 0.15)
        off_plate = np.linalg.norm((centre - plate)[:, :2], axis=1)
        lost = (off_grasp > 0.05) | (centre[:, 2] < tcp[:, 2] - np.maximum(height, 0.01) - 0.03)

        # Transitions
        phase = self.phase
        phase = np.where((phase == CARRY) & lost, REACH, phase)
        phase = np.where((phase == RETREAT) & (off_plate > 0.06), REACH, phase)
        at_grasp = aligned & (np.abs(tcp[:, 2] - grasp_z) < 0.01)
        was_closing = phase == CLOSE
        phase = np.where((phase == REACH) & at_grasp, CLOSE, phase)
        phase = np.where(was_closing & fingers_rest, CARRY, phase)
        blocked = target[:, 2] < tcp[:, 2] - 0.015  # the object stands on something, the arm presses
        down = (off_plate < 0.02) & ((bottom < plate_top + 0.012) | (blocked & (bottom < plate_top + 0.04)))
        was_opening = phase == OPEN
        phase = np.where((phase == CARRY) & down, OPEN, phase)
        phase = np.where(was_opening & ((fingers > 0.034) | fingers_rest), RETREAT, phase)
        self.phase = phase

        # Goal of the TCP per phase; CLOSE and OPEN stand still
        reach_z = np.where(aligned, grasp_z, np.maximum(top + 0.03, table + 0.06))
        lift_z = np.where(off_plate < 0.02, plate_top + 0.005, plate_top + 0.03) - bottom + tcp[:, 2]
        clear = bottom > plate_top + 0.01
        goal = target.copy()
        for k, (xy, z) in {
            REACH: (centre[:, :2], reach_z),
            CARRY: (np.where((clear | (off_plate < 0.02))[:, None], (plate - offset)[:, :2], target[:, :2]), lift_z),
            RETREAT: (target[:, :2], np.maximum(target[:, 2], top + 0.04)),
        }.items():
            goal[:, :2] = np.where((phase == k)[:, None], xy, goal[:, :2])
            goal[:, 2] = np.where(phase == k, z, goal[:, 2])
        delta = quantise(goal - target, STEP_M)
        base = quat_to_matrix(state["base_pose"][:, 3:])
        actions = np.zeros((len(tcp), 7), dtype=np.float32)
        actions[:, :3] = np.einsum("nji,nj->ni", base, delta)  # world to base axes
        # Upright a tilted approach axis: turn about the horizontal axis approach x down, beyond the usual tilt only
        tilt = np.arctan2(np.linalg.norm(approach[:, :2], axis=1), -approach[:, 2])
        axis = np.stack([-approach[:, 1], approach[:, 0], np.zeros(len(tcp))], axis=1)
        axis /= np.linalg.norm(axis, axis=1, keepdims=True) + 1e-9
        upright = axis * np.where((tilt > MAX_TILT) & (phase == REACH), np.minimum(tilt - 0.05, 0.2), 0.0)[:, None]
        upright[:, 2] = np.where(phase == REACH, quantise(turn, STEP_RAD), 0.0)
        actions[:, 3:6] = np.einsum("nji,nj->ni", base, upright)
        actions[:, 6] = np.where((phase == CLOSE) | (phase == CARRY), -1.0, 1.0)
        self.done = (phase == RETREAT) & np.all(delta == 0, axis=1)
        return actions
