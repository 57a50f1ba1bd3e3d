"""Two asset packs behind one interface: robot, 25 objects, 17 receptacles, 21 table photos, 21 noise textures.

- `primitive` (default): embedded, nothing to download. Every body is a few boxes, cylinders and spheres, every table is
  drawn by numpy through the benchmark's camera, and the robot is the real WidowX with boxes in place of its meshes.
- `bridge`: the files of the published benchmark, found under MS_ASSET_DIR/data as ManiSkill does.

Both keep the benchmark's split: objects 0-15 train and 16-24 test, receptacle 0 train and 1-16 test, tables 0-15 train
and 16-20 test. Fetch the published files with `python -m common.simulation.assets fetch --dir DIR`.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from shutil import copytree

import numpy as np
import sapien
import tyro
from PIL import Image
from sapien.physx import PhysxMaterial
from sapien.render import RenderMaterial
from transforms3d.quaternions import quat2mat


@dataclass(frozen=True)
class Body:
    """Name for the instruction, density in kg/m^3, exact bounds of the collision shapes about the origin in m."""

    name: str
    density: float
    bbox_min: np.ndarray  # (3,)
    bbox_max: np.ndarray  # (3,)


FRICTION = (1.0, 1.0, 0.0)  # static, dynamic, restitution of objects and receptacles
# The primitive pack, one row per body or table.
# Body: name, density, solid parts (they collide), seen parts. What would roll collides as a box or an upright cylinder
#   a little inside what is seen, so that it stays where it was put. Objects are at most 42 mm across the gripper (52 mm
#   when open) and 24-42 mm high: the fingertips reach 16 mm below the TCP, the palm is 22 mm above it.
# Part, in mm about the origin, z up: shape and long axis; size (box: x y z; others: diameter, length over all); centre;
#   colour; yaw in degrees.
# Table: name; pattern, its two colours, size in m, angle in degrees; far edge x, left edge y in m; floor; wall.
PACK = json.loads((Path(__file__).parent / "primitive_pack.json").read_text())


def _shape(shape, size, at=(0, 0, 0), color=None, yaw=0):
    """Read one part: SAPIEN's name and arguments of the shape in metres, its colour, its bounds (2, 3) in metres."""
    kind, _, axis = shape.partition("_")
    half, center = np.array(size) / 2000, np.array(at) / 1000
    if kind == "box":
        arguments = {"half_size": half}
    elif kind == "sphere":
        arguments = {"radius": half[0]}
    else:
        arguments = {"radius": half[0], "half_length": half[1] - half[0] * (kind == "capsule")}
    c, s = np.cos(np.deg2rad(yaw) / 2), np.sin(np.deg2rad(yaw) / 2)
    stand = [0.5**0.5, 0, -(0.5**0.5), 0] if axis == "z" else [1, 0, 0, 0]  # SAPIEN's long axis is x
    arguments["pose"] = sapien.Pose(center, [c, 0, 0, s]) * sapien.Pose(q=stand)
    x, y, z = half if kind == "box" else half[[0, 0, -1]]  # solid parts are boxes or stand upright
    c, s = abs(c * c - s * s), abs(2 * c * s)
    reach = np.array([c * x + s * y, s * x + c * y, z] if kind == "box" else [x, y, z])
    return kind, arguments, color, np.array([center - reach, center + reach])


# --- tables -----------------------------------------------------------------------------------------------------------


def _noise(x: np.ndarray, y: np.ndarray, seed: int, octaves: int = 1) -> np.ndarray:
    """Smooth value noise in [0, 1] at coordinates x, y (in cells of the coarsest octave); repeats after 64 cells."""
    total, weight = np.float32(0), 0.0
    for octave in range(octaves):
        lattice = np.random.default_rng([seed, octave]).random((65, 65), dtype=np.float32)
        lattice[64], lattice[:, 64] = lattice[0], lattice[:, 0]
        u, v = (2**octave * np.asarray(k, np.float32) % 64 for k in (x, y))
        i, j = u.astype(np.int32), v.astype(np.int32)
        a, b = (t * t * (3 - 2 * t) for t in (u - i, v - j))
        near, k = lattice.ravel(), 65 * i + j
        low, high = near[k] + a * (near[k + 65] - near[k]), near[k + 1] + a * (near[k + 66] - near[k + 1])
        total = total + (low + b * (high - low)) / 2**octave
        weight += 0.5**octave
    return total / weight


def _pattern(kind: str, x: np.ndarray, y: np.ndarray, size: float, seed: int) -> np.ndarray:
    """Share of the second colour at table coordinates x, y in m: an array in [0, 1] of their shape."""
    u, v = x / size, y / size
    if kind == "wood":  # planks along x, each with its own tone and grain, dark seams
        plank = np.floor(v)
        tone = np.random.default_rng(seed).random(256)[plank.astype(int) % 256]
        grain = _noise(x * 5 + 7 * plank, y * 110, seed, 3)
        seam = np.abs(v - plank - 0.5) > 0.5 - 0.0015 / size
        return np.clip(0.5 * tone + 0.9 * (grain - 0.3), 0, 1) * (1 - seam) + 1.5 * seam
    if kind == "plain":
        return _noise(u, v, seed, 4)
    if kind == "marble":  # thin veins where a warped noise crosses one half
        warp = _noise(u, v, seed, 4)
        vein = np.abs(_noise(u + 2.5 * warp, 0.5 * v, seed + 1, 4) - 0.5)
        return np.clip(0.25 * warp + 0.9 * np.exp(-vein / 0.03), 0, 1)
    if kind == "stripes":
        return 0.85 * (np.floor(v) % 2) + 0.15 * _noise(20 * u, 20 * v, seed)
    if kind == "speckle":
        return np.clip((_noise(u, v, seed, 2) - 0.55) * 6, 0, 1)
    if kind == "tiles":
        joint = np.maximum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)) > 0.5 - 0.003 / size
        tone = np.random.default_rng(seed).random((64, 64))[np.floor(u).astype(int) % 64, np.floor(v).astype(int) % 64]
        return np.maximum(joint, 0.35 * tone)
    if kind == "check":
        return 0.5 * (np.floor(u) % 2) + 0.5 * (np.floor(v) % 2)
    if kind == "dots":
        shift = 0.5 * (np.floor(v) % 2)
        return ((u + shift) % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.08
    if kind == "zigzag":
        return (np.floor(v + 2 * np.abs(u % 1 - 0.5)) % 2) * 0.8 + 0.2 * _noise(x * 40, y * 40, seed, 2)
    raise ValueError(f"pattern={kind!r} is not drawn here")


def _draw_table(index: int) -> np.ndarray:
    """Draw table `index` as the benchmark's camera sees it: (480, 640, 3) uint8."""
    _, kind, first, second, size, angle, far, left, floor, wall = PACK["tables"][index]
    v, u = np.mgrid[:480, :640].astype(np.float32)
    rays = np.stack([np.ones_like(u), (319.501 - u) / 623.588, (239.545 - v) / 623.588], -1)  # SAPIEN: x ahead, z up
    base_to_world = np.diag([-1.0, -1.0, 1.0])  # the base is turned by 180 degrees
    rays = (rays @ (base_to_world @ quat2mat([0.8992917, -0.09263245, 0.35892478, 0.23209205])).T).astype(np.float32)
    eye = (np.array([0.147, 0.028, 0.870]) + base_to_world @ [0.0, -0.16, 0.36]).astype(np.float32)
    x, y = (eye[i] + rays[..., i] * (0.870 - eye[2]) / rays[..., 2] for i in (0, 1))  # m, where a ray meets the table
    floor_x, floor_y = (eye[i] + rays[..., i] * -eye[2] / rays[..., 2] for i in (0, 1))
    wall_z = eye[2] + rays[..., 2] * (1.7 * far - 0.1 - eye[0]) / rays[..., 0]  # height where it meets the wall behind

    def mix(share, a, b):
        return np.asarray(a, np.float32) + np.asarray(share, np.float32)[..., None] * np.subtract(b, a)

    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    top = mix(_pattern(kind, c * x + s * y + 8, c * y - s * x + 8, size, index), first, second)
    top *= (1.04 - 0.35 * np.hypot(x + 0.1, y))[..., None]  # a lamp above the middle
    around = mix(_pattern("tiles", floor_x + 9, floor_y + 9, 0.4, index), floor, np.multiply(floor, 0.8))
    around *= np.clip(0.4 + 0.8 * np.maximum(far - x, left - y), 0.4, 0.9)[..., None]  # the table's shadow
    wall = mix(0.8 * (wall_z < 0.09), np.multiply(wall, 0.8), floor) * (0.8 + 0.2 * np.clip(wall_z, 0, 1))[..., None]
    around = np.where((wall_z > 0)[..., None], wall, around)
    inside = np.minimum(np.minimum(x - far, y - left), 0.16 - x)[..., None]  # m from the nearest edge of the table
    image = np.where(inside > 0, np.where(inside < 0.006, 0.65 * top, top), around)
    grain = np.random.default_rng(index).normal(0, 2.0, (480, 640, 1))
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def _draw_texture(index: int) -> np.ndarray:
    """Draw noise texture `index`: blots and bands of three colours, (480, 640, 3) uint8."""
    rng = np.random.default_rng([77, index])
    palette = rng.integers(0, 256, (4, 3))
    v, u = np.mgrid[:480, :640].astype(np.float32) / rng.integers(25, 110) * rng.uniform(0.5, 2, (2, 1, 1))
    share = _noise(u, v, index, 1 + index % 4) * (1 + index % 3)
    share = np.clip((share % 1 - 0.5) * 2.5 + 0.5, 0, 1)[..., None]
    other = _noise(v * 2 + 9, u * 2, index + 50, 2)[..., None]
    first, second = (palette[i] * share + palette[i + 1] * (1 - share) for i in (0, 2))
    return (first * other + second * (1 - other)).astype(np.uint8)


# --- packs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AssetPack:
    """What the environment needs from a pack; the two packs differ in data and in three functions."""

    name: str
    robot_urdf: str
    objects: list[Body]  # 25
    plates: list[Body]  # 17
    tables: list[str]  # 21 names
    mixes: list[float]  # 21
    add_body: Callable  # (builder, "object" | "plate", index): put its shapes on a SAPIEN or ManiSkill actor builder
    build_table: Callable  # (builder): the same for the static `arena`, top at z = 0.870 m, and its pose
    draw: dict[str, Callable]  # "background", "texture": (index) -> (480, 640, 3) uint8

    def background(self, index: int, width: int, height: int) -> np.ndarray:
        """Picture of table `index` without robot and objects: (height, width, 3) uint8, read-only."""
        return _resized(self.draw["background"], int(index), width, height)

    def texture(self, index: int, width: int, height: int) -> np.ndarray:
        """Noise texture `index`: (height, width, 3) uint8, read-only."""
        return _resized(self.draw["texture"], int(index), width, height)

    def texture_mix(self, index: int) -> float:
        """Weight of texture `index`: 0 for the first, which therefore changes nothing, else 1."""
        return self.mixes[index]


@lru_cache(maxsize=256)
def _resized(draw: Callable, index: int, width: int, height: int) -> np.ndarray:
    """Image draw(index) at (height, width, 3) uint8; 640x480 passes unchanged."""
    image = draw(index)
    if image.shape[:2] != (height, width):
        image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))  # antialiased
    image.setflags(write=False)
    return image


@cache
def _primitive_pack() -> AssetPack:
    def add_body(builder, kind, index):
        _, density, solid, seen = PACK[f"{kind}s"][index]
        for shape, arguments, _, _ in (_shape(*row) for row in solid):
            getattr(builder, f"add_{shape}_collision")(**arguments, material=PhysxMaterial(*FRICTION), density=density)
        for shape, arguments, color, _ in (_shape(*row) for row in seen):
            paint = RenderMaterial(base_color=[*PACK["colors"][color], 1], roughness=0.6, specular=0.3)
            getattr(builder, f"add_{shape}_visual")(**arguments, material=paint)

    def build_table(builder):
        builder.add_box_collision(half_size=[1.5, 1.5, 0.02])
        builder.add_box_visual(half_size=[1.5, 1.5, 0.02], material=RenderMaterial(base_color=[0.6, 0.5, 0.4, 1]))
        builder.initial_pose = sapien.Pose([0, 0, 0.85])

    def bodies(rows):
        bounds = [np.array([_shape(*part)[3] for part in solid]) for _, _, solid, _ in rows]
        return [Body(row[0], row[1], b[:, 0].min(0), b[:, 1].max(0)) for row, b in zip(rows, bounds, strict=True)]

    draw = {"background": _draw_table, "texture": _draw_texture}
    urdf, tables = str(Path(__file__).parent / "primitive_widowx.urdf"), [row[0] for row in PACK["tables"]]
    objects, plates, mixes = bodies(PACK["objects"]), bodies(PACK["plates"]), [0.0] + [1.0] * 20
    return AssetPack("primitive", urdf, objects, plates, tables, mixes, add_body, build_table, draw)


@cache
def _bridge_pack(root: Path) -> AssetPack:
    def require(path):
        if not path.exists():
            raise FileNotFoundError(
                f"assets='bridge' needs {path}, which does not exist. MS_ASSET_DIR (now {root}) must be the folder "
                "whose data/ holds robots/widowx, tasks/bridge_v2_real2sim_dataset and rl4vla/more_*. Run `python -m "
                f"common.simulation.assets fetch --dir {root}` and set MS_ASSET_DIR={root}, or use assets='primitive'."
            )
        return path

    def visual(mesh):
        paths = [mesh.with_name(f"textured.{ending}") for ending in ("obj", "dae", "glb")]
        return next((path for path in paths if path.exists()), None) or require(paths[0])

    data = root / "data"
    urdf = require(data / "robots/widowx/wx250s.urdf")
    stage = str(require(data / "tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb"))
    names = {"object": "carrot", "plate": "plate", "table": "table"}
    folders = {kind: data / f"rl4vla/more_{name}" for kind, name in names.items()}
    rows = {kind: json.loads(require(path / "model_db.json").read_text()) for kind, path in folders.items()}
    meshes = {kind: [require(folders[kind] / k / "collision.obj") for k in rows[kind]] for kind in ("object", "plate")}
    visuals = {mesh: visual(mesh) for kind in meshes for mesh in meshes[kind]}
    backgrounds = [require(folders["table"] / "imgs" / k) for k in rows["table"]]
    textures = [require(folders["table"] / "textures" / row["texture"]) for row in rows["table"].values()]

    def bodies(kind):
        boxes = [(row["name"], row["density"], row["bbox"]["min"], row["bbox"]["max"]) for row in rows[kind].values()]
        return [Body(name, density, np.array(low), np.array(high)) for name, density, low, high in boxes]

    objects, plates = bodies("object"), bodies("plate")

    def add_body(builder, kind, index):  # every component of collision.obj is one convex hull, as published
        mesh, density = meshes[kind][index], (objects if kind == "object" else plates)[index].density
        builder.add_multiple_convex_collisions_from_file(str(mesh), material=PhysxMaterial(*FRICTION), density=density)
        builder.add_visual_from_file(str(visuals[mesh]))

    def build_table(builder):
        upright = sapien.Pose(q=[0.707, 0.707, 0, 0])  # three digits, as published
        builder.add_nonconvex_collision_from_file(stage, pose=upright)
        builder.add_visual_from_file(stage, pose=upright)
        builder.initial_pose = sapien.Pose([2.0634, 2.8313, 0.0])

    def read(paths):  # an alpha channel is dropped, not blended, as published
        return lambda index: np.array(Image.open(paths[index]).convert("RGBA"))[..., :3].copy()

    draw = {"background": read(backgrounds), "texture": read(textures)}
    mixes = [float(row["mix"]) for row in rows["table"].values()]
    return AssetPack("bridge", str(urdf), objects, plates, list(rows["table"]), mixes, add_body, build_table, draw)


def load_pack(name: str) -> AssetPack:
    """Return the asset pack "primitive" or "bridge"; ValueError: another name, FileNotFoundError: a missing file."""
    if name == "primitive":
        return _primitive_pack()
    if name == "bridge":
        return _bridge_pack(Path(os.environ.get("MS_ASSET_DIR", "~/.maniskill")).expanduser())
    raise ValueError(f"assets={name!r} is not an asset pack; use 'primitive' (embedded) or 'bridge' (published files)")


# --- fetch ------------------------------------------------------------------------------------------------------------

REPOSITORY, COMMIT = "https://github.com/gen-robot/RL4VLA", "55f966d"
REPOSITORY_FOLDER = "ManiSkill/mani_skill/assets/carrot"


def fetch(dir: Path):
    """Download the published files of the `bridge` pack from their authors.

    Args:
        dir: folder to set MS_ASSET_DIR to; the files go to its data/.
    """
    from mani_skill.utils import download_asset  # slow import, needed here only
    from mani_skill.utils.assets.data import DATA_SOURCES

    folder = dir.expanduser().resolve()
    data = folder / "data"
    sources = [replace(DATA_SOURCES[uid], output_dir=data) for uid in ("bridge_v2_real2sim", "widowx250s")]
    for source in sources:
        print(f"will download {source.url} to {data / source.target_path}")
    print(f"will check out {REPOSITORY_FOLDER} of {REPOSITORY} at {COMMIT} to {data / 'rl4vla'}", flush=True)
    for source in sources:
        download_asset.download(source)
    with tempfile.TemporaryDirectory() as clone:
        for command in (
            ["clone", "--filter=blob:none", "--no-checkout", REPOSITORY, clone],
            ["-C", clone, "sparse-checkout", "set", REPOSITORY_FOLDER],
            ["-C", clone, "checkout", "--quiet", COMMIT],
        ):
            subprocess.run(["git", *command], check=True)
        for kind in ("more_carrot", "more_plate", "more_table"):
            copytree(Path(clone) / REPOSITORY_FOLDER / kind, data / "rl4vla" / kind, dirs_exist_ok=True)
    _bridge_pack(folder)
    print(f"complete; use it with MS_ASSET_DIR={folder}")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"fetch": fetch}, prog="python -m common.simulation.assets")
