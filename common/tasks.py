"""The benchmark as data: 17 tasks, what an episode id means, instructions, image compositing.

Liu, Gao et al., "What Can RL Bring to VLA Generalization?", arXiv 2505.19789: a WidowX puts an object on a receptacle.
A task is one row of `TASKS`; a new task is one more row. In a row every pair is (train split, test split), and the
split "all" is the union of both. An episode id is a mixed-radix number whose digits pick object, extra, plate, table,
position and yaw, so an id alone fixes an episode. Indices are 0-based, quaternions w, x, y, z, lengths in metres.

Quirks of the published code. fidelity="published" reproduces them, the default "fixed" does not:
1. multi_carrot test. Published: the distractor is counted from the absolute object index, so 9 of 72 pairs (12.5 % of
   the ids) have none, and the target lies at the third point. Fixed: counted within the split, never missing.
2. multi_plate. Published: all 21 tables in both splits, which mixes unseen tables into its rows. Fixed: tables 0-15.
3. instruct test. Published: templates 1-16; 17-20 are written down but unreachable. Fixed: templates 1-20.
4. Composite "texture". Published: resized to the largest foreground box of the batch and cropped, so an image depends
   on the other environments. Fixed: resized to the image's own foreground box.
One accident is kept in both modes: the 0.150 m rule of the sets TC and TP is decided by float64 rounding for points
exactly 0.150 m apart, and the ids of four tasks depend on which of them pass.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

# --- pairs (train, test) used in the table: 25 objects, 17 plates, 21 tables, 20 textures, 21 templates ---
FIRST = (range(1), range(1))
SEEN = (range(16), range(16))  # objects or tables of the training split in both splits
UNSEEN_OBJECTS = (range(16), range(16, 25))
UNSEEN_TABLES = (range(16), range(16, 21))
UNSEEN_PLATES = (range(1), range(1, 17))
UNSEEN_TEXTURES = (range(1), range(1, 17))  # texture 0 has mix 0: no texture
UNSEEN_TEMPLATES = (range(1), range(1, 21))
UNSEEN_ARM_OFFSETS = (range(1), range(1, 14376))  # offset 0 is zero
ID_DIGITS = ("object", "extra", "plate", "table", "position", "yaw")  # most significant first
ID_DIGITS_PLATE_FIRST = ("object", "plate", "extra", "table", "position", "yaw")


@dataclass(frozen=True)
class Task:
    """One row of the table; a pair is (train, test). `decode` says what the columns do."""

    name: str
    published_id: str
    objects: tuple[range, range] = SEEN
    plates: tuple[range, range] = FIRST
    tables: tuple[range, range] = SEEN
    positions: tuple[str, str] = ("P", "P")  # keys of POSITION_SETS
    yaws: tuple[str, str] = ("Y4", "Y4")  # keys of YAW_SETS
    extra: str = "none"  # what the extra digit picks: texture, template, arm_offset, or a distractor object, plate
    extras: tuple[range, range] = FIRST  # its values; for a distractor the pool that the target belongs to as well
    composite: str = "plain"  # plain, texture or whole
    ratio: float = 0.0  # weight of the texture in the composite
    move_at: tuple[int | None, int | None] = (None, None)  # step after which the object jumps to the third point
    id_digits: tuple[str, ...] = ID_DIGITS


def _vision(kind: str, percent: int) -> dict:
    return dict(extra="texture", extras=UNSEEN_TEXTURES, composite=kind, ratio=percent / 100)


# --- the table ---
_ID = "PutOnPlateInScene25"
TASKS = {
    task.name: task
    for task in (
        Task("main", _ID + "Main-v3", objects=UNSEEN_OBJECTS, tables=UNSEEN_TABLES),
        Task("single", _ID + "Single-v1", objects=FIRST, tables=FIRST),
        Task("main_carrot", _ID + "MainCarrot-v3", objects=UNSEEN_OBJECTS, tables=FIRST),
        Task("main_image", _ID + "MainImage-v3", objects=FIRST, tables=UNSEEN_TABLES),
        Task("vision_image", _ID + "VisionImage-v1", tables=UNSEEN_TABLES),
        Task("vision_texture03", _ID + "VisionTexture03-v1", **_vision("texture", 30)),
        Task("vision_texture05", _ID + "VisionTexture05-v1", **_vision("texture", 50)),
        Task("vision_whole03", _ID + "VisionWhole03-v1", **_vision("whole", 30)),
        Task("vision_whole05", _ID + "VisionWhole05-v1", **_vision("whole", 50)),
        Task("carrot", _ID + "Carrot-v1", objects=UNSEEN_OBJECTS),
        Task("instruct", _ID + "Instruct-v1", extra="template", extras=UNSEEN_TEMPLATES),
        Task("plate", _ID + "Plate-v1", plates=UNSEEN_PLATES),
        Task("multi_carrot", _ID + "MultiCarrot-v1", objects=UNSEEN_OBJECTS, positions=("TC", "TC"),
             extra="object", extras=UNSEEN_OBJECTS),
        Task("multi_plate", _ID + "MultiPlate-v1", plates=UNSEEN_PLATES, positions=("TP", "TP"),
             extra="plate", extras=(range(17), range(1, 17)), id_digits=ID_DIGITS_PLATE_FIRST),
        Task("position", _ID + "Position-v1", positions=("P", "R"), yaws=("Y4", "YR")),
        Task("ee_pose", _ID + "EEPose-v1", extra="arm_offset", extras=UNSEEN_ARM_OFFSETS),
        Task("position_change", _ID + "PositionChangeTo-v1", positions=("TC", "TC"), move_at=(None, 5)),
    )
}  # fmt: skip
PUBLISHED = {  # columns that differ with fidelity="published"
    "multi_plate": dict(tables=(range(21), range(21))),
    "instruct": dict(extras=(range(1), range(1, 17))),
}

# --- the study's results: success at the end of 192 episodes (its table 1; ID and 15 out-of-distribution rows) ---
REPORT_ROWS = (  # row, dimension, task, split, SFT (16k demonstrations), PPO
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
    "Take the {o} and put it on the {r}", "pick up {o} and set it down on {r}", "please put the {o} on the {r}",
    "Put {o} onto {r}.", "place the {o} onto the {r} surface", "Make sure {o} is on {r}.", "on the {r}, put the {o}",
    "put the {o} where the {r} is", "Move the {o} from the table to the {r}", "Move {o} so it\u2019s on {r}.",
    "Can you put {o} on {r}?", "{o} on the {r}, please.", "the {o} should be placed on the {r}.",
    "Lay the {o} down on the {r}.", "could you place {o} over {r}", "position the {o} atop the {r}",
    "Arrange for the {o} to be resting on {r}.",
)  # fmt: skip


def instruction(template: int, object_name: str, plate_name: str) -> str:
    """Instruction of an episode, in the published casing (the policy lower-cases it)."""
    return TEMPLATES[template].format(o=object_name, r=plate_name)


# --- placements ---
_INNER = [(a, b) for a in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) for b in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]  # 36 points
_OUTER = (-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
_RING = [(a, b) for a in _OUTER for b in _OUTER if {a, b} & {-0.2, 1.2}]  # 28 points around them, same 3 cm pitch
POSITION_SETS = {  # lattice, z of object and plate (and third), least distance object-plate (plate-third, object-third)
    "P": (_INNER, (0.95, 0.95), (0.07,)),
    "R": (_RING, (0.95, 0.95), (0.07,)),
    "TC": (_INNER, (0.95, 0.92, 1.00), (0.07, 0.07, 0.15)),  # third: a distractor object, or where the object moves to
    "TP": (_INNER, (1.00, 0.92, 0.96), (0.07, 0.15, 0.07)),  # third: a distractor plate
}
YAW_SETS = {"Y4": (0.0, 45.0, 90.0, 135.0), "YR": (-22.5, -67.5, -112.5, -157.5)}  # degrees


@cache
def position_set(name: str) -> np.ndarray:
    """Where bodies appear: (K, 2 or 3, 3) float64, xyz of object, plate (and third body), object outermost."""
    lattice, z, least = POSITION_SETS[name]
    points = (np.array(lattice) * 2 - 1) * 0.075 + (-0.16, 0.0)  # this expression decides which 0.150 m pairs pass
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    keep = distance > least[0]
    if len(z) == 3:
        keep = keep[:, :, None] & (distance > least[1])[None] & (distance > least[2])[:, None]
    xy = points[np.argwhere(keep)]
    return np.concatenate([xy, np.broadcast_to(np.array(z)[:, None], (*xy.shape[:2], 1))], axis=-1)


@cache
def arm_offsets() -> np.ndarray:
    """Offsets to the first 6 joints' initial angles: (14376, 6) float32, radians; 0 is zero, the rest are unseen."""
    angles, wrist = (-0.15, -0.08, 0.0, 0.08, 0.15), (-0.6, -0.3, 0.0, 0.3, 0.6)
    grid = np.stack(np.meshgrid(*[angles] * 5, wrist, indexing="ij"), axis=-1).reshape(-1, 6)
    grid = grid[np.abs(grid[:, 1] + grid[:, 2]) <= 0.25]  # shoulder and elbow must not both lean far the same way
    return np.concatenate([np.zeros((1, 6)), grid]).astype(np.float32)


# --- episode ids ---
@dataclass
class Episodes:
    """What N episode ids stand for: arrays with N first, poses float32, and five values of the task."""

    object: np.ndarray  # (N,) int64, as are plate, table, third_index, texture and template
    plate: np.ndarray
    table: np.ndarray
    object_xyz: np.ndarray  # (N, 3)
    object_quat: np.ndarray  # (N, 4)
    plate_xyz: np.ndarray
    plate_quat: np.ndarray
    third: str  # none, object or plate (a distractor), or move_target (the object's pose after move_at)
    third_index: np.ndarray  # object or plate index of the distractor, -1 if there is none
    third_xyz: np.ndarray
    third_quat: np.ndarray
    texture: np.ndarray
    template: np.ndarray
    arm_offset: np.ndarray  # (N, 6) float32, radians
    composite: str  # plain, texture or whole
    ratio: float
    move_at: int | None  # elapsed steps


def _check(name: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is not known; use one of {', '.join(allowed)}")


def get_task(name: str, fidelity: str = "fixed") -> Task:
    """Row `name` of the table. Raises ValueError for an unknown name or fidelity."""
    _check("task", name, TASKS)
    _check("fidelity", fidelity, ("fixed", "published"))
    return replace(TASKS[name], **PUBLISHED.get(name, {})) if fidelity == "published" else TASKS[name]


def _of_split(pair: tuple, split: str) -> tuple:
    """The entries of a (train, test) pair that belong to a split, without repetition."""
    return tuple(dict.fromkeys({"train": pair[:1], "test": pair[1:], "all": pair}[split]))


def _union(ranges: tuple[range, ...]) -> np.ndarray:
    return np.unique(np.concatenate([np.arange(r.start, r.stop) for r in ranges]))


@cache
def _digits(task: Task, split: str) -> dict[str, np.ndarray]:
    """Digit name -> the values it chooses from (first axis), most significant digit first."""
    _check("split", split, ("train", "test", "all"))
    digits = {}
    for name in task.id_digits:
        entries = _of_split(getattr(task, name + "s"), split)
        if name == "position":
            digits[name] = np.concatenate([position_set(entry) for entry in entries])
        elif name == "yaw":
            digits[name] = np.concatenate([YAW_SETS[entry] for entry in entries])
        elif name == "extra" and task.extra in ("object", "plate"):
            digits[name] = np.arange(1, len(_union(entries)))  # steps from the target to the distractor in their pool
        else:
            digits[name] = _union(entries)
    return digits


def num_configurations(task: str, split: str, fidelity: str = "fixed") -> int:
    """Number of different episodes of a task's split; episode ids count modulo this number."""
    return math.prod(len(values) for values in _digits(get_task(task, fidelity), split).values())


def decode(task: str, split: str, episode_ids: np.ndarray, fidelity: str = "fixed") -> Episodes:
    """Decode episode ids; the same id is always the same episode.

    Args: task and split as in the table; episode_ids (N,) integers >= 0, taken modulo `num_configurations`.
    Returns `Episodes` with N first. Raises ValueError for an unknown name or ids that are not (N,) integers >= 0.
    """
    row = get_task(task, fidelity)
    digits = _digits(row, split)
    ids = np.asarray(episode_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"episode_ids are {ids.dtype} of shape {ids.shape}; give integers of shape (N,)")
    if (ids < 0).any():
        raise ValueError(f"episode_ids contain {ids.min()}; ids are >= 0 (and count modulo num_configurations)")
    rest, chosen = ids % num_configurations(task, split, fidelity), {}
    for name, values in reversed(digits.items()):
        rest, digit = np.divmod(rest.astype(np.int64), len(values))
        chosen[name] = values[digit]

    n = len(ids)
    extra, xyz = chosen["extra"], chosen["position"].astype(np.float32)
    half_yaw = np.deg2rad(chosen["yaw"]) / 2
    yaw_quat = np.stack([np.cos(half_yaw), 0 * half_yaw, 0 * half_yaw, np.sin(half_yaw)], axis=1).astype(np.float32)
    identity = np.tile(np.array([1, 0, 0, 0], np.float32), (n, 1))
    none = np.zeros(n, np.int64)
    move_at = _of_split(row.move_at, split)[-1]
    object_xyz, third, third_index = xyz[:, 0], "move_target" if move_at else "none", none - 1
    if row.extra in ("object", "plate"):
        third, pool = row.extra, _union(_of_split(row.extras, split))
        first = 0 if (third, fidelity) == ("object", "published") else pool[0]  # quirk 1
        third_index = pool[(chosen[third] - first + extra) % len(pool)]
        missing = (third_index == chosen["object"]) & (third == "object")  # the target takes the distractor's place
        third_index, object_xyz = np.where(missing, -1, third_index), np.where(missing[:, None], xyz[:, 2], object_xyz)
    return Episodes(
        object=chosen["object"], plate=chosen["plate"], table=chosen["table"],
        object_xyz=object_xyz, object_quat=yaw_quat, plate_xyz=xyz[:, 1], plate_quat=identity,
        third=third, third_index=third_index, third_xyz=0 * object_xyz if third == "none" else xyz[:, 2],
        third_quat=yaw_quat if third in ("object", "move_target") else identity,
        texture=extra if row.extra == "texture" else none, template=extra if row.extra == "template" else none,
        arm_offset=arm_offsets()[extra if row.extra == "arm_offset" else none],
        composite=row.composite, ratio=row.ratio, move_at=move_at,
    )  # fmt: skip


# --- images ---
def composite(rgb, foreground, background, texture, mix, mode: str, ratio: float, fidelity: str = "fixed"):
    """Put the rendered foreground over a photo, with a texture on the foreground or over the whole image.

    plain: foreground over background. texture: the foreground is blended with the texture laid over its bounding box.
    whole: plain, then everything is blended with a window of the texture at twice its size, whose corner is the
    foreground's centre, so the noise moves with the robot. 640x480 gives the published result bit by bit.
    Args: rgb, background, texture (B, H, W, 3) uint8; foreground (B, H, W) bool, true on robot, objects and plates;
    mix (B,) weight of each texture, 0..1, multiplied by ratio. texture and mix may be None if mode is "plain".
    Returns (B, H, W, 3) uint8 on the device of the inputs. Raises ValueError for wrong names or shapes.
    """
    _check("mode", mode, ("plain", "texture", "whole"))
    _check("fidelity", fidelity, ("fixed", "published"))
    images = (rgb, background) if mode == "plain" else (rgb, background, texture)
    if any(x.shape != (*foreground.shape, 3) or x.dtype != torch.uint8 for x in images) or foreground.ndim != 3:
        shapes = [(tuple(x.shape), x.dtype) for x in (foreground, *images)]
        raise ValueError(f"foreground, rgb, background (, texture) are {shapes}; give (B, H, W) and (B, H, W, 3) uint8")
    out = torch.where(foreground[..., None], rgb, background)
    if mode == "plain":
        return out
    _, height, width = foreground.shape
    boxes = torch.stack([*_extent(foreground.any(dim=2)), *_extent(foreground.any(dim=1))], dim=1)  # (B, 4) inclusive
    largest = tuple((boxes[:, 1::2] - boxes[:, ::2] + 1).amax(dim=0).tolist())
    weights = (mix.float() * ratio).tolist()
    for i, (top, bottom, left, right) in enumerate(boxes.tolist()):
        if weights[i] == 0:
            continue
        if mode == "texture":
            box = (i, slice(top, bottom + 1), slice(left, right + 1))
            size = (bottom - top + 1, right - left + 1)
            cover = _resize(texture[i], largest if fidelity == "published" else size)[: size[0], : size[1]]  # quirk 4
            inside = foreground[box][..., None]
            out[box] = torch.where(inside, _blend(rgb[box], cover, weights[i]), out[box])
        else:
            y = min(max((top + bottom) // 2, 1), height - 1)
            x = min(max((left + right) // 2, 1), width - 1)
            noise = (_resize(texture[i], (2 * height, 2 * width)) + 0.5).floor()  # 8-bit resizing
            out[i] = _blend(out[i], noise[y : y + height, x : x + width], weights[i])
    return out


def _extent(hit):
    """First and last true index of each row of (B, L) bool: two (B,) int64, both 0 if there is none."""
    index = torch.arange(hit.shape[1], device=hit.device)
    last = torch.where(hit, index, 0).amax(dim=1)
    return torch.where(hit, index, last[:, None]).amin(dim=1), last


def _resize(image, size):
    return F.interpolate(image.permute(2, 0, 1)[None].float(), size=size, mode="bilinear")[0].permute(1, 2, 0)


def _blend(image, cover, weight):
    return (cover * weight + image.float() * (1 - weight)).clamp(0, 255).to(torch.uint8)  # truncated, as published
