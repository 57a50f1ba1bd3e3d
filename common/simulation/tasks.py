"""The benchmark as data: 17 tasks, what an episode id means, instructions, image compositing.
Liu et al., "What Can RL Bring to VLA Generalization?", arXiv 2505.19789. To add a task, add a row
to `TASKS`. An episode id is a mixed-radix number whose digits choose object, extra, plate, table,
position and yaw, so an id alone fixes an episode. Quaternions are wxyz, lengths metres.
fidelity="published" has the paper's quirks, which "fixed" mends: docs/benchmark.md."""

import math
from dataclasses import dataclass, replace
from functools import cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from common.run.files import check

# --- the table ---
SPLITS = ("train", "test")  # the order of all pairs
FIRST, SEEN, PLATES = (range(1), range(1)), (range(16), range(16)), (range(1), range(1, 17))
OBJECTS, TABLES = (range(16), range(16, 25)), (range(16), range(16, 21))
Y4, YR = (0.0, 45.0, 90.0, 135.0), (-22.5, -67.5, -112.5, -157.5)  # degrees
TEXTURES = dict(extra="texture", extras=PLATES)  # texture 0 has weight 0: no texture
DIGITS = ("object", "extra", "plate", "table", "position", "yaw")  # most significant first
DISTRACTOR = dict(extra="object", extras=OBJECTS, positions=("TC", "TC"))


@dataclass(frozen=True)
class Task:
    name: str
    published_id: str  # after PutOnPlateInScene25
    objects: tuple = SEEN
    plates: tuple = FIRST
    tables: tuple = SEEN
    positions: tuple = ("P", "P")  # of POSITION_SETS
    yaws: tuple = (Y4, Y4)
    # What the extra digit chooses: "texture", "template", "arm_offset", or the "object" or "plate"
    # that distracts; and its values, for a distractor the pool that it shares with the target
    extra: str = "none"
    extras: tuple = FIRST
    composite: str = "plain"  # or texture, whole: see `composite`
    ratio: float = 0.0  # weight of the texture in the picture
    move_at: tuple = (None, None)  # elapsed steps when the object jumps to the third point
    digits: tuple = DIGITS


TASKS = (
    Task("main", "Main-v3", OBJECTS, tables=TABLES),
    Task("single", "Single-v1", FIRST, tables=FIRST),
    Task("main_carrot", "MainCarrot-v3", OBJECTS, tables=FIRST),
    Task("main_image", "MainImage-v3", FIRST, tables=TABLES),
    Task("vision_image", "VisionImage-v1", tables=TABLES),
    Task("vision_texture03", "VisionTexture03-v1", **TEXTURES, composite="texture", ratio=0.3),
    Task("vision_texture05", "VisionTexture05-v1", **TEXTURES, composite="texture", ratio=0.5),
    Task("vision_whole03", "VisionWhole03-v1", **TEXTURES, composite="whole", ratio=0.3),
    Task("vision_whole05", "VisionWhole05-v1", **TEXTURES, composite="whole", ratio=0.5),
    Task("carrot", "Carrot-v1", OBJECTS),
    Task("instruct", "Instruct-v1", extra="template", extras=(range(1), range(1, 21))),
    Task("plate", "Plate-v1", plates=PLATES),
    Task("multi_carrot", "MultiCarrot-v1", OBJECTS, **DISTRACTOR),
    Task("multi_plate", "MultiPlate-v1", plates=PLATES, positions=("TP", "TP"), extra="plate",
         extras=(range(17), range(1, 17)), digits=("object", "plate", "extra", *DIGITS[3:])),
    Task("position", "Position-v1", positions=("P", "R"), yaws=(Y4, YR)),
    Task("ee_pose", "EEPose-v1", extra="arm_offset", extras=(range(1), range(1, 14376))),
    Task("position_change", "PositionChangeTo-v1", positions=("TC", "TC"), move_at=(None, 5)),
)  # fmt: skip
TASKS = {row.name: row for row in TASKS}
PUBLISHED = {  # columns that differ with fidelity="published"
    "multi_plate": dict(tables=(range(21), range(21))),
    "instruct": dict(extras=(range(1), range(1, 17))),
}

# The paper's table 1: row, dimension, task, split, success at the end of 192 episodes of SFT on
# 16k demonstrations, and of PPO
REPORT_ROWS = (
    ("in_distribution", "id", "carrot", "train", 0.781, 0.938),
    ("unseen_table", "vision", "vision_image", "test", 0.719, 0.844),
    ("texture_weak", "vision", "vision_texture03", "test", 0.719, 0.833),
    ("texture_strong", "vision", "vision_texture05", "test", 0.557, 0.630),
    ("noise_weak", "vision", "vision_whole03", "test", 0.708, 0.854),
    ("noise_strong", "vision", "vision_whole05", "test", 0.505, 0.667),
    ("unseen_objects", "semantics", "carrot", "test", 0.453, 0.714),
    ("unseen_receptacles", "semantics", "plate", "test", 0.615, 0.750),
    ("unseen_instructions", "semantics", "instruct", "test", 0.672, 0.891),
    ("multi_object_seen", "semantics", "multi_carrot", "train", 0.615, 0.750),
    ("multi_object_unseen", "semantics", "multi_carrot", "test", 0.297, 0.578),
    ("distractor_receptacle", "semantics", "multi_plate", "train", 0.672, 0.812),
    ("two_unseen_receptacles", "semantics", "multi_plate", "test", 0.458, 0.599),
    ("unseen_position", "execution", "position", "test", 0.568, 0.807),
    ("unseen_robot_pose", "execution", "ee_pose", "test", 0.339, 0.797),
    ("mid_episode_reposition", "execution", "position_change", "test", 0.286, 0.745),
)

# --- instructions ---
TEMPLATES = (
    "put {o} on {r}", "Place the {o} on the {r}", "set {o} on {r}", "move the {o} to the {r}",
    "Take the {o} and put it on the {r}", "pick up {o} and set it down on {r}",
    "please put the {o} on the {r}", "Put {o} onto {r}.", "place the {o} onto the {r} surface",
    "Make sure {o} is on {r}.", "on the {r}, put the {o}", "put the {o} where the {r} is",
    "Move the {o} from the table to the {r}", "Move {o} so it\u2019s on {r}.",
    "Can you put {o} on {r}?", "{o} on the {r}, please.", "the {o} should be placed on the {r}.",
    "Lay the {o} down on the {r}.", "could you place {o} over {r}", "position the {o} atop the {r}",
    "Arrange for the {o} to be resting on {r}.")  # fmt: skip


def instruction(template, object_name, plate_name):
    return TEMPLATES[template].format(o=object_name, r=plate_name)


# --- placements ---
UNITS = (-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
INNER = [(a, b) for a in UNITS[1:-1] for b in UNITS[1:-1]]  # 36 points
RING = [(a, b) for a in UNITS for b in UNITS if (a, b) not in INNER]  # 28 points
# Lattice; z of object, plate and third body; least distance object-plate, plate-third, object-third
POSITION_SETS = {
    "P": (INNER, (0.95, 0.95), (0.07,)),
    "R": (RING, (0.95, 0.95), (0.07,)),
    "TC": (INNER, (0.95, 0.92, 1.00), (0.07, 0.07, 0.15)),  # third: where another object is
    "TP": (INNER, (1.00, 0.92, 0.96), (0.07, 0.15, 0.07)),  # third: where another plate is
}


@cache
def position_set(name):
    """Spawn points (K, 2 or 3, 3) float64: xyz of object, plate (and third), object outermost."""
    lattice, z, least = POSITION_SETS[name]
    # Rounding decides which points exactly 0.150 m apart pass, and so what the later ids mean
    points = (np.array(lattice) * 2 - 1) * 0.075 + (-0.16, 0.0)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    keep = distance > least[0]
    if len(z) == 3:
        keep = keep[:, :, None] & (distance > least[1])[None] & (distance > least[2])[:, None]
    xy = points[np.argwhere(keep)]
    height = np.broadcast_to(np.array(z)[:, None], (*xy.shape[:2], 1))
    return np.concatenate([xy, height], axis=-1)


@cache
def arm_offsets():
    """Offsets of the initial joint angles: (14376, 6) float32, radians; row 0 is zero."""
    angles, wrist = (-0.15, -0.08, 0.0, 0.08, 0.15), (-0.6, -0.3, 0.0, 0.3, 0.6)
    grid = np.stack(np.meshgrid(*[angles] * 5, wrist, indexing="ij"), axis=-1).reshape(-1, 6)
    # Shoulder and elbow do not both lean far the same way
    grid = grid[np.abs(grid[:, 1] + grid[:, 2]) <= 0.25]
    return np.concatenate([np.zeros((1, 6)), grid]).astype(np.float32)


# --- episode ids ---
@dataclass
class Episodes:
    """What N episode ids stand for: int64 indices, float32 poses; the last four are the task's."""

    object: np.ndarray  # (N,), as are plate, table, texture, template
    plate: np.ndarray
    table: np.ndarray
    texture: np.ndarray
    template: np.ndarray
    arm_offset: np.ndarray  # (N, 6), radians
    object_xyz: np.ndarray  # (N, 3)
    object_quat: np.ndarray  # (N, 4)
    plate_xyz: np.ndarray
    plate_quat: np.ndarray
    third_xyz: np.ndarray
    third_quat: np.ndarray
    third_index: np.ndarray  # (N,) the distractor object or plate, -1 if there is none
    third: str  # "object", "plate", "move_target" (where the object is at move_at), or "none"
    composite: str
    ratio: float
    move_at: int | None


def get_task(name, fidelity="fixed"):
    """A row of the table; ValueError for an unknown name or fidelity."""
    check(name in TASKS, f"task = {name!r} is not known; use one of {', '.join(TASKS)}")
    check(fidelity in ("fixed", "published"), f"fidelity = {fidelity!r} is not known; use fixed")
    columns = PUBLISHED.get(name, {}) if fidelity == "published" else {}
    return replace(TASKS[name], **columns)


@cache
def _digits(task, split):
    """Digit -> the values it chooses from, most significant digit first."""
    check(split in SPLITS, f"split = {split!r} is not known; use one of {', '.join(SPLITS)}")
    values, number = {}, SPLITS.index(split)
    for name in task.digits:
        choice = getattr(task, name + "s")[number]
        values[name] = position_set(choice) if name == "position" else np.array(choice)
    if task.extra in ("object", "plate") or task.move_at[number] is not None:
        why = f"task {task.name}: a distractor or a jump needs positions TC or TP"
        check(values["position"].shape[1] == 3, why)
    if task.extra in ("object", "plate"):
        values["extra"] = np.arange(1, len(values["extra"]))  # steps from target to distractor
    return values


def num_configurations(task, split, fidelity="fixed"):
    """Number of different episodes; ids count modulo this number."""
    return math.prod(map(len, _digits(get_task(task, fidelity), split).values()))


def scene_numbers(task, split, episode_ids, fidelity="fixed"):
    """(N,) int64: the ids as if the task had 16 tables, as `main` has in training, so
    that a scene has one number in `main`, `single`, `main_carrot`, `main_image` and `carrot`."""
    digits = _digits(get_task(task, fidelity), split)
    places, tables = len(digits["position"]) * len(digits["yaw"]), len(digits["table"])
    rest, place = np.divmod(np.asarray(episode_ids, dtype=np.int64), places)
    rest, table = np.divmod(rest, tables)
    return (rest * max(tables, 16) + table) * places + place


def decode(task, split, episode_ids, fidelity="fixed"):
    """`Episodes` of ids (N,), integers >= 0 (else ValueError), modulo num_configurations."""
    row, ids = get_task(task, fidelity), np.asarray(episode_ids)
    right = ids.ndim == 1 and ids.dtype.kind in "iu" and (ids >= 0).all()
    check(right, f"episode_ids = {episode_ids!r} must be a 1-d array of integers >= 0")
    digits, rest, chosen = _digits(row, split), ids, {}
    for name in reversed(row.digits):
        rest, digit = np.divmod(rest, len(digits[name]))
        chosen[name] = digits[name][digit]
    none = np.zeros(len(ids), np.int64)
    extra = dict(texture=none, template=none, arm_offset=none)
    extra[row.extra] = chosen["extra"]
    xyz, half_yaw = chosen["position"].astype(np.float32), np.deg2rad(chosen["yaw"]) / 2
    quat = np.stack([np.cos(half_yaw), none, none, np.sin(half_yaw)], axis=1).astype(np.float32)
    upright = np.float32([[1, 0, 0, 0]] * len(ids))
    move_at = row.move_at[SPLITS.index(split)]
    third = "none" if move_at is None else "move_target"
    third_index, object_xyz = none - 1, xyz[:, 0]
    if row.extra in ("object", "plate"):
        third, first = row.extra, digits[row.extra][0]
        quirk = third == "object" and fidelity == "published"
        steps = chosen[third] - (0 if quirk else first) + extra[third]
        third_index = first + steps % (len(digits["extra"]) + 1)
        if quirk:
            missing = third_index == chosen["object"]
            third_index[missing] = -1
            object_xyz = np.where(missing[:, None], xyz[:, 2], object_xyz)
    return Episodes(
        object=chosen["object"], plate=chosen["plate"], table=chosen["table"],
        texture=extra["texture"], template=extra["template"],
        arm_offset=arm_offsets()[extra["arm_offset"]],
        object_xyz=object_xyz, object_quat=quat, plate_xyz=xyz[:, 1], plate_quat=upright,
        third_xyz=xyz[:, -1], third_quat=upright if third == "plate" else quat,
        third_index=third_index, third=third, composite=row.composite, ratio=row.ratio,
        move_at=move_at)  # fmt: skip


# --- images ---
def composite(rgb, foreground, background, texture, mix, mode, ratio, fidelity="fixed"):
    """The rendered foreground before a photo, with a texture over it or over all: as rgb.
    Args: rgb, background, texture: (B, H, W, 3) uint8; foreground: (B, H, W) bool: robot, objects,
        plates; mix: (B,) weights of the textures, times ratio. mode "plain": no texture.
        "texture": the foreground is blended with the texture laid over its bounding box. "whole":
        all is blended with a window of the doubled texture; its corner is the centre of the box."""
    assert rgb.shape == background.shape == (*foreground.shape, 3)
    assert rgb.dtype == background.dtype == torch.uint8
    out = torch.where(foreground[..., None], rgb, background)
    if mode == "plain":
        return out
    assert texture.shape == rgb.shape and texture.dtype == torch.uint8
    boxes = [_box(mask) for mask in foreground]
    largest = [max(box[k] - box[k - 1] + 1 for box in boxes) for k in (1, 3)]
    for i, weight in enumerate((mix * ratio).tolist()):
        top, bottom, left, right = boxes[i]
        if mode == "texture":
            box = (i, slice(top, bottom + 1), slice(left, right + 1))
            shape = rgb[box].shape[:2]
            size = largest if fidelity == "published" else shape  # quirk 4
            cover = texture[i].permute(2, 0, 1)[None].float()
            cover = F.interpolate(cover, size=size, mode="bilinear")[0].permute(1, 2, 0)
            blend = cover[: shape[0], : shape[1]] * weight + rgb[box] * (1 - weight)
            out[box] = torch.where(foreground[box][..., None], blend.to(torch.uint8), out[box])
        else:
            y, x = max((top + bottom) // 2, 1), max((left + right) // 2, 1)
            doubled = cv2.resize(texture[i].cpu().numpy(), None, fx=2, fy=2)
            window = torch.as_tensor(doubled[y : y + rgb.shape[1], x : x + rgb.shape[2]])
            out[i] = (out[i] * (1 - weight) + window.to(out.device) * weight).to(torch.uint8)
    return out


def _box(mask):
    """First and last row, first and last column that show foreground; zeros where none does."""
    rows = mask.any(dim=1).nonzero().flatten().tolist() or [0]
    columns = mask.any(dim=0).nonzero().flatten().tolist() or [0]
    return rows[0], rows[-1], columns[0], columns[-1]
