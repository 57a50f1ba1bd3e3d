"""A critic that reads the simulator's state instead of the image: asymmetric actor-critic (Pinto et al. 2017).

The policy never sees the state, and evaluation does not need it. Metres, radians; N environments.
"""

import numpy as np
import torch
from torch import nn

from common.simulation.tasks import OBJECTS

NUM_OBJECTS = max(split.stop for split in OBJECTS)
NUM_FEATURES = 23 + 4 + 4 + 3 + 1 + NUM_OBJECTS


class StateCritic(nn.Module):
    """Value (N,) float32 of `state_features` (N, D). Stands in a VLA's `value_head`, whose sizes mean nothing to it."""

    def __init__(self, *_, hidden=(256, 256)):
        super().__init__()
        widths = (NUM_FEATURES, *hidden)
        layers = [layer for pair in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(*pair), nn.GELU())]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, features):
        return self.layers(features)[:, 0]


def state_features(state, flags, progress):
    """(N, D) float32 of `envs.privileged_state()`, flags (N, 3) bool: grasped, held so far, success now; progress (N,):
    share of the episode that is over, without which no value of a fixed-length episode is right."""
    base, tcp, target = (state[f"{name}_pose"] for name in ("base", "tcp", "tcp_target"))
    thing, plate = state["object_pose"], state["plate_pose"]
    which = np.eye(NUM_OBJECTS)[state["object_index"]]
    metres = (
        thing[:, :3] - tcp[:, :3], plate[:, :3] - thing[:, :3], target[:, :3] - tcp[:, :3], thing[:, :3] - base[:, :3],
        tcp[:, :3] - base[:, :3], state["object_bbox"].reshape(len(tcp), 6), state["finger_qpos"],
    )  # fmt: skip
    # An object pushed through the table falls 300 m in 32 steps: unbounded, such values drown a whole rollout.
    decimetres = (10 * np.concatenate(metres, 1)).clip(-10, 10)
    parts = (decimetres, thing[:, 3:], tcp[:, 3:], flags, progress[:, None], which)
    return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))
