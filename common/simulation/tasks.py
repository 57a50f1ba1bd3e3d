"""The benchmark as data: 17 tasks, what an episode id means, instructions, image compositing.

Liu, Gao et al., "What Can RL Bring to VLA Generalization?", arXiv 2505.19789: a WidowX puts an object on a plate.
To add a task, add a row to `TASKS`. An episode id is a mixed-radix number whose digits choose object, extra, plate,
table, position and yaw, so an id alone fixes an episode. Indices count from 0, quaternions are wxyz, lengths metres.
fidelity="published" gives the study's episodes, and its images at 640x480, with their quirks; "fixed" (default) mends:
1. multi_carrot test. Published: the distractor is counted from the absolute object index, so in 9 of 72 pairs (1 in 8
   episodes) it is missing and the target lies at the third point. Fixed: counted within the split, never missing.
2. multi_plate. Published: all 21 tables in both splits, which mixes unseen tables into its rows. Fixed: tables 0-15.
3. instruct test. Published: templates 1-16; 17-20 are written down but never used. Fixed: templates 1-20.
4. Texture compositing. Published: resized to the largest foreground box of the batch, then cropped, so an image depends
   on the other environments (on CPU each is a batch of its own). Fixed: resized to the image's own foreground box.
Kept in both: float64 rounding decides which points exactly 0.150 m apart pass in TC and TP (else ids would shift).
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

# --- the table ---
# Pairs are (train split, test split); the split "all" is their union.
FIRST, SEEN, PLATES = (range(1), range(1)), (range(16), range(16)), (range(1), range(1, 17))
OBJECTS, TABLES = (range(16), range(16, 25)), (range(16), range(16, 21))
TEXTURES = {"extra": "texture", "extras": (range(1), range(1, 17))}  # texture 0 has mix 0: no texture


@dataclass(frozen=True)
class Task:
    name: str
    published_id: str
    objects: tuple[range, range] = SEEN
    plates: tuple[range, range] = FIRST
    tables: tuple[range, range] = SEEN
    positions: tuple[str, str] = ("P", "P")  # keys of POSITION_SETS
    yaws: tuple[str, str] = ("Y4", "Y4")  # keys of YAW_SETS
    extra: str = "none"  # what the extra digit chooses: texture, template, arm_offset, or a distractor object, plate
    extras: tuple[range, range] = FIRST  # its values; for a distractor the pool that it shares with the target
    composite: str = "plain"  # plain, texture or whole
    ratio: float = 0.0  # weight of the texture in the image
    move_at: tuple[int | None, int | None] = (None, None)  # elapsed steps when the object jumps to the third point
    digits: tuple[str, ...] = ("object", "extra", "plate", "table", "position", "yaw")  # most significant first


_ID = "PutOnPlateInScene25"
TASKS = (
    Task("main", _ID + "Main-v3", OBJECTS, tables=TABLES),
    Task("single", _ID + "Single-v1", FIRST, tables=FIRST),
    Task("main_carrot", _ID + "MainCarrot-v3", OBJECTS, tables=FIRST),
    Task("main_image", _ID + "MainImage-v3", FIRST, tables=TABLES),
    Task("vision_image", _ID + "VisionImage-v1", tables=TABLES),
    Task("vision_texture03", _ID + "VisionTexture03-v1", **TEXTURES, composite="texture", ratio=0.3),
    Task("vision_texture05", _ID + "VisionTexture05-v1", **TEXTURES, composite="texture", ratio=0.5),
    Task("vision_whole03", _ID + "VisionWhole03-v1", **TEXTURES, composite="whole", ratio=0.3),
    Task("vision_whole05", _ID + "VisionWhole05-v1", **TEXTURES, composite="whole", ratio=0.5),
    Task("carrot", _ID + "Carrot-v1", OBJECTS),
    Task("instruct", _ID + "Instruct-v1", extra="template", extras=(range(1), range(1, 21))),
    Task("plate", _ID + "Plate-v1", plates=PLATES),
    Task("multi_carrot", _ID + "MultiCarrot-v1", OBJECTS, positions=("TC", "TC"), extra="object", extras=OBJECTS),
    Task("multi_plate", _ID + "MultiPlate-v1", plates=PLATES, positions=("TP", "TP"), extra="plate",
         extras=(range(17), range(1, 17)), digits=("object", "plate", "extra", "table", "position", "yaw")),
    Task("position", _ID + "Position-v1", positions=("P", "R"), yaws=("Y4", "YR")),
    Task("ee_pose", _ID + "EEPose-v1", extra="arm_offset", extras=(range(1), range(1, 14376))),
    Task("position_change", _ID + "PositionChangeTo-v1", positions=("TC", "TC"), move_at=(None, 5)),
)  # fmt: skip
TASKS = {row.name: row for row in TASKS}
# Columns that differ with fidelity="published".
PUBLISHED = {"multi_plate": {"tables": (range(21), range(21))}, "instruct": {"extras": (range(1), range(1, 17))}}

# The study's table 1: row, dimension, task, split, success at the end of 192 episodes of SFT (16k demonstrations), PPO.
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
    "Take the {o} and put it on the {r}", "pick up {o} and set it down on {r}", "please put the {o} on the {r}",
    "Put {o} onto {r}.", "place the {o} onto the {r} surface", "Make sure {o} is on {r}.", "on the {r}, put the {o}",
    "put the {o} where the {r} is", "Move the {o} from the table to the {r}", "Move {o} so it\u2019s on {r}.",
    "Can you put {o} on {r}?", "{o} on the {r}, please.", "the {o} should be placed on the {r}.",
    "Lay the {o} down on the {r}.", "could you place {o} over {r}", "position the {o} atop the {r}",
    "Arrange for the {o} to be resting on {r}.",
)  # fmt: skip


def instruction(template: int, object_name: str, plate_name: str) -> str:
    return TEMPLATES[template].format(o=object_name, r=plate_name)


# --- placements ---
_ALL = [(a, b) for a in (-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2) for b in (-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)]
_INNER, _RING = [p for p in _ALL if not {-0.2, 1.2} & {*p}], [p for p in _ALL if {-0.2, 1.2} & {*p}]  # 36 + 28 points
POSITION_SETS = {  # lattice, z of object, plate (third), least distance object-plate (plate-third, object-third)
    "P": (_INNER, (0.95, 0.95), (0.07,)),
    "R": (_RING, (0.95, 0.95), (0.07,)),
    "TC": (_INNER, (0.95, 0.92, 1.00), (0.07, 0.07, 0.15)),  # third: distractor object, or where the object moves to
    "TP": (_INNER, (1.00, 0.92, 0.96), (0.07, 0.15, 0.07)),  # third: distractor plate
}
YAW_SETS = {"Y4": (0.0, 45.0, 90.0, 135.0), "YR": (-22.5, -67.5, -112.5, -157.5)}  # degrees


@cache
def position_set(name: str) -> np.ndarray:
    """Spawn points (K, 2 or 3, 3) float64: xyz of object, plate (and third), the object's point outermost."""
    lattice, z, least = POSITION_SETS[name]
    points = (np.array(lattice) * 2 - 1) * 0.075 + (-0.16, 0.0)  # in this order: its rounding decides the 0.150 m cases
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    keep = distance > least[0]
    if len(z) == 3:
        keep = keep[:, :, None] & (distance > least[1])[None] & (distance > least[2])[:, None]
    xy = points[np.argwhere(keep)]
    return np.concatenate([xy, np.broadcast_to(np.array(z)[:, None], (*xy.shape[:2], 1))], axis=-1)


@cache
def arm_offsets() -> np.ndarray:
    """Offsets to the initial angles of the six arm joints: (14376, 6) float32, radians; row 0 is zero."""
    angles, wrist = (-0.15, -0.08, 0.0, 0.08, 0.15), (-0.6, -0.3, 0.0, 0.3, 0.6)
    grid = np.stack(np.meshgrid(*[angles] * 5, wrist, indexing="ij"), axis=-1).reshape(-1, 6)
    grid = grid[np.abs(grid[:, 1] + grid[:, 2]) <= 0.25]  # shoulder and elbow do not both lean far the same way
    return np.concatenate([np.zeros((1, 6)), grid]).astype(np.float32)


# --- episode ids ---
@dataclass
class Episodes:
    """What N episode ids stand for: int64 indices, float32 poses and angles, N first; then the task's scalars."""

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
    third: str  # none (then third_* mean nothing), object or plate (distractors), move_target (object pose at move_at)
    composite: str
    ratio: float
    move_at: int | None


def _check(what: str, value, known) -> None:
    if value not in known:
        raise ValueError(f"{what} = {value!r} is not known; use one of {', '.join(known)}")


def get_task(name: str, fidelity: str = "fixed") -> Task:
    """A row of the table; ValueError for an unknown name or fidelity."""
    _check("task", name, TASKS)
    _check("fidelity", fidelity, ("fixed", "published"))
    return replace(TASKS[name], **PUBLISHED.get(name, {})) if fidelity == "published" else TASKS[name]


def _of_split(pair: tuple, split: str) -> tuple:
    _check("split", split, ("train", "test", "all"))
    return {"train": pair[:1], "test": pair[1:], "all": tuple(dict.fromkeys(pair))}[split]


@cache
def _digits(task: Task, split: str) -> dict[str, np.ndarray]:
    """Digit -> the values it chooses from, most significant digit first."""
    columns = {name: _of_split(getattr(task, name + "s"), split) for name in task.digits}
    lookup = {"position": position_set, "yaw": YAW_SETS.get}
    values = {name: np.concatenate([lookup.get(name, np.array)(x) for x in pair]) for name, pair in columns.items()}
    for name in ("object", "extra", "plate", "table"):
        values[name] = np.unique(values[name])
    if task.extra in ("object", "plate"):
        values["extra"] = np.arange(1, len(values["extra"]))  # steps within the pool from the target to the distractor
    return values


def num_configurations(task: str, split: str, fidelity: str = "fixed") -> int:
    """Number of different episodes; ids count modulo this number."""
    return math.prod(len(values) for values in _digits(get_task(task, fidelity), split).values())


def scene_numbers(task: str, split: str, episode_ids: np.ndarray, fidelity: str = "fixed") -> np.ndarray:
    """(N,) int64: the ids as if the task had 16 tables, as `main` has in training.

    So a scene has one number in all tasks that can draw it: `main`, `single`, `main_carrot`, `main_image`, `carrot`.
    """
    digits = _digits(get_task(task, fidelity), split)
    place, tables = len(digits["position"]) * len(digits["yaw"]), len(digits["table"])
    rest, place_digit = np.divmod(np.asarray(episode_ids, dtype=np.int64), place)
    rest, table_digit = np.divmod(rest, tables)
    return (rest * max(tables, 16) + table_digit) * place + place_digit


def decode(task: str, split: str, episode_ids: np.ndarray, fidelity: str = "fixed") -> Episodes:
    """Episodes of the ids (N,), integers >= 0 (else ValueError), taken modulo num_configurations."""
    row, ids = get_task(task, fidelity), np.asarray(episode_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids < 0).any():
        raise ValueError(f"episode_ids = {episode_ids!r}; the rule is a 1-d array of integers >= 0")
    digits, rest, chosen = _digits(row, split), ids, {}
    for name in reversed(row.digits):
        rest, digit = np.divmod(rest, len(digits[name]))
        chosen[name] = digits[name][digit]

    extra, xyz, half_yaw = chosen["extra"], chosen["position"].astype(np.float32), np.deg2rad(chosen["yaw"]) / 2
    none = np.zeros(len(ids), np.int64)
    yaw = np.stack([np.cos(half_yaw), none, none, np.sin(half_yaw)], axis=1).astype(np.float32)
    upright = np.tile(np.array([1, 0, 0, 0], np.float32), (len(ids), 1))
    move_at = _of_split(row.move_at, split)[-1]
    third, third_index, object_xyz = "move_target" if move_at else "none", none - 1, xyz[:, 0]
    if row.extra in ("object", "plate"):
        third, first = row.extra, digits[row.extra][0]
        start = 0 if (third, fidelity) == ("object", "published") else first  # quirk 1
        third_index = first + (chosen[third] - start + extra) % (len(digits["extra"]) + 1)
        missing = (third_index == chosen["object"]) & (third == "object")  # never when fixed
        third_index, object_xyz = np.where(missing, -1, third_index), np.where(missing[:, None], xyz[:, 2], object_xyz)
    return Episodes(
        object=chosen["object"], plate=chosen["plate"], table=chosen["table"],
        texture=extra if row.extra == "texture" else none, template=extra if row.extra == "template" else none,
        arm_offset=arm_offsets()[extra if row.extra == "arm_offset" else none],
        object_xyz=object_xyz, object_quat=yaw, plate_xyz=xyz[:, 1], plate_quat=upright,
        third_xyz=xyz[:, -1], third_quat=upright if third == "plate" else yaw, third_index=third_index,
        third=third, composite=row.composite, ratio=row.ratio, move_at=move_at,
    )  # fmt: skip


# --- images ---
def composite(rgb, foreground, background, texture, mix, mode: str, ratio: float, fidelity: str = "fixed"):
    """Show the rendered foreground before a photo, with a texture over the foreground or over the whole image.

    plain: foreground over background. texture: the foreground blended with the texture laid over its bounding box.
    whole: plain, all of it blended with a window of the doubled texture whose corner is the centre of that box.
    Args: rgb, background, texture (B, H, W, 3) uint8; foreground (B, H, W) bool: robot, objects, plates; mix (B,)
    weights, multiplied by ratio. Mode "plain" ignores texture and mix. Returns (B, H, W, 3) uint8.
    """
    _check("mode", mode, ("plain", "texture", "whole"))
    _check("fidelity", fidelity, ("fixed", "published"))
    for name, image in {"rgb": rgb, "background": background, "texture": rgb if mode == "plain" else texture}.items():
        if image is None or image.dtype != torch.uint8 or image.shape != (*foreground.shape, 3):
            got = image if image is None else (*image.shape, image.dtype)
            raise ValueError(f"{name} is {got}; the foreground asks for {(*foreground.shape, 3, torch.uint8)}")
    out = torch.where(foreground[..., None], rgb, background)
    if mode == "plain":
        return out
    # Indices of the rows and columns of each image that show foreground; the box is from the first to the last.
    spans = [[mask.any(dim=dim).nonzero().flatten().tolist() or [0] for dim in (1, 0)] for mask in foreground]
    sizes = [(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) for rows, columns in spans]
    largest = tuple(map(max, *sizes, (1, 1)))  # over the batch
    for i, ((rows, columns), (h, w), weight) in enumerate(zip(spans, sizes, (mix * ratio).tolist(), strict=True)):
        if mode == "texture":
            box = (i, slice(rows[0], rows[0] + h), slice(columns[0], columns[0] + w))
            size = largest if fidelity == "published" else (h, w)  # quirk 4
            cover = F.interpolate(texture[i].permute(2, 0, 1)[None].float(), size=size, mode="bilinear")[0]
            blend = cover.permute(1, 2, 0)[:h, :w] * weight + rgb[box] * (1 - weight)
            out[box] = torch.where(foreground[box][..., None], blend.to(torch.uint8), out[box])
        else:
            y, x = max((rows[0] + rows[-1]) // 2, 1), max((columns[0] + columns[-1]) // 2, 1)
            window = _double(texture[i])[y : y + rgb.shape[1], x : x + rgb.shape[2]]
            out[i] = (out[i] * (1 - weight) + window * weight).to(torch.uint8)
    return out


def _double(image):
    """Bilinear (H, W, 3) uint8 to (2H, 2W, 3) int16, each term cut to quarters: bit by bit OpenCV's 8-bit resize."""
    image = 4 * image.short()
    for dim in (1, 0):
        n, own = image.shape[dim], 3 * image >> 2
        before = torch.cat([image.narrow(dim, 0, 1), image.narrow(dim, 0, n - 1)], dim)
        after = torch.cat([image.narrow(dim, 1, n - 1), image.narrow(dim, n - 1, 1)], dim)
        image = torch.stack([own + (before >> 2), own + (after >> 2)], dim + 1).flatten(dim, dim + 1)
    return (image + 2) >> 2
