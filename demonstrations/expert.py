"""A closed-loop expert: privileged poses in, the policy's own actions out. It makes demonstrations.

It is a feedback law: every step it looks at the measured poses, so it follows rolling or teleported
objects and recovers from drops. Each axis moves by one of few speeds, so actions have few values;
roll and pitch actions are exactly zero unless the arm starts tilted. Metres, radians, wxyz.
"""

import numpy as np

from common.simulation.robot import quat_to_matrix

STEP_M = (0.005, 0.01, 0.02, 0.04)  # speeds per axis and control step
STEP_RAD = (0.05, 0.1, 0.2, 0.4)
REACH, CLOSE, CARRY, OPEN, RETREAT = range(5)
OPENING_M = 0.051  # widest object that fits between the open fingers
PALM_M = 0.02  # of the palm above the TCP: a grasp is no deeper below the object's top
TIP_M = 0.018  # of the finger tips below the TCP: the lowest grasp above the table
MAX_TILT = 0.08  # the usual start pose is 0.058 off vertical, and stays so


def quantise(error, speeds):
    """Largest of 0 and `speeds` that overshoots `error` by at most half the smallest speed."""
    levels = np.array((0.0, *speeds))
    index = np.searchsorted(levels, np.abs(error) + speeds[0] / 2, side="right") - 1
    return np.sign(error) * levels[index]


def grasp(rotation, half, closing):
    """Turn (N,) that lays the closing axis (N, 3) of the fingers along a narrow axis of the box
    with this rotation (N, 3, 3) and half extents (N, 3). A wider one is taken if it spares much
    turning; ties turn counter-clockwise."""
    axes = np.moveaxis(rotation, 2, 1)  # (N, 3 axes, xyz)
    now = np.arctan2(closing[:, 1], closing[:, 0])[:, None]
    turn = np.arctan2(axes[:, :, 1], axes[:, :, 0]) - now
    turn = (turn + np.deg2rad(80)) % np.pi - np.deg2rad(80)  # half a circle is none: [-80, 100)
    width = 2 * half
    cost = width + 0.004 * np.abs(turn - 0.1) + (width > OPENING_M)
    rows = np.arange(len(cost))
    vertical = np.abs(axes[:, :, 2]).argmax(1)
    cost[rows, vertical] = np.inf
    return turn[rows, cost.argmin(1)]


class Expert:
    def __init__(self, num_envs):
        self.phase = np.full(num_envs, REACH)
        self.fingers = np.zeros(num_envs)
        self.done = np.zeros(num_envs, bool)

    def reset(self, envs=slice(None)):
        """New episodes begin, in all environments or in those of the index."""
        self.phase[envs] = REACH
        self.fingers[envs] = 0.0

    def act(self, state):
        """Actions (N, 7) float32 for `envs.privileged_state()`. Afterwards `self.done` (N,) bool:
        the arm rests above the placed object."""
        tcp, target = state["tcp_pose"][:, :3], state["tcp_target_pose"][:, :3]
        table = state["base_pose"][:, 2]
        box, rotation = state["object_bbox"], quat_to_matrix(state["object_pose"][:, 3:])
        half = (box[:, 1] - box[:, 0]) / 2
        centre = state["object_pose"][:, :3] + np.einsum("nij,nj->ni", rotation, box.mean(1))
        height = np.einsum("nj,nj->n", np.abs(rotation[:, 2]), half)  # half of it, as it lies
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
        at_grasp = aligned & (np.abs(tcp[:, 2] - grasp_z) < 0.01)
        off_plate = np.linalg.norm((centre - plate)[:, :2], axis=1)
        over_plate = off_plate < 0.02
        fell = centre[:, 2] < tcp[:, 2] - np.maximum(height, 0.01) - 0.03
        lost = (off_grasp > 0.05) | fell
        pressing = target[:, 2] < tcp[:, 2] - 0.015  # the object stands on something
        down = over_plate & (
            (bottom < plate_top + 0.012) | (pressing & (bottom < plate_top + 0.04))
        )

        # Transitions
        phase = self.phase
        was_closing = phase == CLOSE
        was_opening = phase == OPEN
        phase = np.where((phase == CARRY) & lost, REACH, phase)
        phase = np.where((phase == RETREAT) & (off_plate > 0.06), REACH, phase)
        phase = np.where((phase == REACH) & at_grasp, CLOSE, phase)
        phase = np.where(was_closing & fingers_rest, CARRY, phase)
        phase = np.where((phase == CARRY) & down, OPEN, phase)
        phase = np.where(was_opening & ((fingers > 0.034) | fingers_rest), RETREAT, phase)
        self.phase = phase

        # Goal of the TCP; in CLOSE and OPEN it stands still
        reach, carry, retreat = (phase == k for k in (REACH, CARRY, RETREAT))
        reach_z = np.where(aligned, grasp_z, np.maximum(top + 0.03, table + 0.06))
        carry_z = np.where(over_plate, plate_top + 0.005, plate_top + 0.03) - bottom + tcp[:, 2]
        may_cross = (bottom > plate_top + 0.01) | over_plate
        goal = target.copy()
        goal[reach, :2] = centre[reach, :2]
        goal[carry & may_cross, :2] = (plate - offset)[carry & may_cross, :2]
        goal[reach, 2] = reach_z[reach]
        goal[carry, 2] = carry_z[carry]
        goal[retreat, 2] = np.maximum(target[:, 2], top + 0.04)[retreat]

        delta = quantise(goal - target, STEP_M)
        base = quat_to_matrix(state["base_pose"][:, 3:])
        actions = np.zeros((len(tcp), 7), dtype=np.float32)
        actions[:, :3] = np.einsum("nji,nj->ni", base, delta)  # world to base axes
        # Beyond the usual tilt, turn upright about the horizontal axis approach x down
        tilt = np.arctan2(np.linalg.norm(approach[:, :2], axis=1), -approach[:, 2])
        axis = np.stack([-approach[:, 1], approach[:, 0], np.zeros(len(tcp))], axis=1)
        axis /= np.linalg.norm(axis, axis=1, keepdims=True) + 1e-9
        speed = np.where((tilt > MAX_TILT) & reach, np.minimum(tilt - 0.05, 0.2), 0.0)
        rotate = axis * speed[:, None]
        rotate[:, 2] = np.where(reach, quantise(turn, STEP_RAD), 0.0)
        actions[:, 3:6] = np.einsum("nji,nj->ni", base, rotate)
        actions[:, 6] = np.where((phase == CLOSE) | carry, -1.0, 1.0)
        self.done = retreat & np.all(delta == 0, axis=1)
        return actions
