"""Two asset packs behind one interface: robot, 25 objects, 17 receptacles, 21 table photos, 21 noise textures.

- `primitive` (default): embedded, nothing to download. Every body is a few boxes, cylinders and spheres, every table is
  drawn by numpy through the benchmark's camera, and the robot is the real WidowX with boxes in place of its meshes.
- `bridge`: the files of the published benchmark, found under MS_ASSET_DIR (ManiSkill's convention, files in its `data`).

Both keep the benchmark's split: objects 0-15 train and 16-24 test, receptacle 0 train and 1-16 test, tables 0-15 train
and 16-20 test. Fetch the published files with `python -m common.assets fetch --dir DIR`.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from shutil import copytree
from typing import NamedTuple

import numpy as np
import sapien
from PIL import Image
from sapien.physx import PhysxMaterial
from sapien.render import RenderMaterial
from transforms3d.quaternions import quat2mat


class Part(NamedTuple):
    """One primitive of a body, in millimetres about the body's origin; the z axis is up, `yaw` turns it about z."""

    shape: str  # box | ball | cylinder_x | cylinder_z | capsule_x (the letter is the long axis)
    size: tuple  # box (x, y, z); ball (diameter,); cylinder and capsule (diameter, length over all)
    at: tuple = (0, 0, 0)
    color: str = ""  # a key of COLORS; empty for a solid part
    yaw: float = 0.0  # degrees


@dataclass(frozen=True)
class Body:
    """Name for the instruction, density in kg/m^3, and the exact bounds of the collision shapes about the origin in m."""

    name: str
    density: float
    bbox_min: np.ndarray  # (3,)
    bbox_max: np.ndarray  # (3,)


COLORS = dict(
    white=(0.93, 0.93, 0.90), cream=(0.93, 0.87, 0.70), silver=(0.70, 0.72, 0.75), grey=(0.40, 0.41, 0.43),
    black=(0.06, 0.06, 0.07), red=(0.80, 0.07, 0.06), crimson=(0.50, 0.03, 0.08), pink=(0.95, 0.45, 0.60),
    magenta=(0.75, 0.08, 0.50), orange=(0.97, 0.42, 0.03), gold=(0.85, 0.60, 0.15), yellow=(0.97, 0.84, 0.08),
    lime=(0.55, 0.80, 0.15), green=(0.12, 0.50, 0.12), forest=(0.05, 0.27, 0.09), teal=(0.05, 0.52, 0.50),
    sky=(0.45, 0.70, 0.93), blue=(0.07, 0.22, 0.75), navy=(0.04, 0.08, 0.30), purple=(0.27, 0.06, 0.35),
    plum=(0.55, 0.16, 0.38), tan=(0.80, 0.60, 0.36), crust=(0.66, 0.38, 0.14), brown=(0.33, 0.17, 0.07),
    cocoa=(0.17, 0.08, 0.04),
)  # fmt: skip
PACK = json.loads((Path(__file__).parent / "primitive_pack.json").read_text())  # one row per body and per table


def _parts(rows: list) -> list[Part]:
    """Rows [shape, size, at, color, yaw] of primitive_pack.json, the last three optional, as parts."""
    return [Part(*row) for row in rows]


def _pose(part: Part) -> sapien.Pose:
    """Pose of a part in its body; SAPIEN's cylinders and capsules lie along x."""
    half = np.deg2rad(part.yaw) / 2
    turn = sapien.Pose(q=[np.cos(half), 0, 0, np.sin(half)])
    stand = sapien.Pose(q=[0.5**0.5, 0, -(0.5**0.5), 0]) if part.shape.endswith("_z") else sapien.Pose()
    return sapien.Pose(np.array(part.at) / 1000) * turn * stand


def _dimensions(part: Part) -> dict:
    """SAPIEN's arguments for the size of a part, metres."""
    size = np.array(part.size) / 2000
    if part.shape == "box":
        return {"half_size": size.tolist()}
    if part.shape == "ball":
        return {"radius": size[0]}
    return {"radius": size[0], "half_length": size[1] - (size[0] if part.shape == "capsule_x" else 0)}


def _bounds(parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Axis-aligned bounds of solid parts (boxes and upright cylinders), metres: two (3,) arrays."""
    corners = []
    for part in parts:
        half = np.array(part.size if part.shape == "box" else (part.size[0], part.size[0], part.size[1])) / 2000
        yaw = np.deg2rad(part.yaw)
        c, s = abs(np.cos(yaw)), abs(np.sin(yaw))
        reach = np.array([c * half[0] + s * half[1], s * half[0] + c * half[1], half[2]])
        corners += [np.array(part.at) / 1000 - reach, np.array(part.at) / 1000 + reach]
    return np.min(corners, axis=0), np.max(corners, axis=0)


# --- tables -----------------------------------------------------------------------------------------------------------

def _noise(x: np.ndarray, y: np.ndarray, seed: int, octaves: int = 1) -> np.ndarray:
    """Smooth value noise in [0, 1] at coordinates x, y (in cells of the coarsest octave); repeats after 64 cells."""
    total, weight = np.zeros_like(x), 0.0
    for octave in range(octaves):
        lattice = np.random.default_rng([seed, octave]).random((64, 64), dtype=np.float32)
        u, v = x * 2**octave, y * 2**octave
        i, j = np.floor(u).astype(int), np.floor(v).astype(int)
        a, b = u - i, v - j
        a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
        i0, i1, j0, j1 = i % 64, (i + 1) % 64, j % 64, (j + 1) % 64
        low = lattice[i0, j0] * (1 - a) + lattice[i1, j0] * a
        high = lattice[i0, j1] * (1 - a) + lattice[i1, j1] * a
        total += (low * (1 - b) + high * b) / 2**octave
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
    if kind == "weave":
        return 0.5 * _noise(u, v, seed, 2) + 0.4 * (np.sin(40 * x) * np.sin(40 * y) > 0) * 0.4
    if kind == "stripes":
        return 0.85 * (np.floor(v) % 2) + 0.15 * _noise(20 * u, 20 * v, seed)
    if kind == "speckle":
        return np.clip((_noise(u, v, seed, 2) - 0.55) * 6, 0, 1)
    if kind == "tiles":
        joint = np.maximum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)) > 0.5 - 0.003 / size
        return np.maximum(joint, 0.35 * np.random.default_rng(seed).random((64, 64))[u.astype(int) % 64, v.astype(int) % 64])
    if kind == "check":
        return 0.5 * (np.floor(u) % 2) + 0.5 * (np.floor(v) % 2)
    if kind == "dots":
        shift = 0.5 * (np.floor(v) % 2)
        return ((u + shift) % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.08
    if kind == "zigzag":
        return (np.floor(v + 2 * np.abs(u % 1 - 0.5)) % 2) * 0.8 + 0.2 * _noise(x * 40, y * 40, seed, 2)
    raise ValueError(f"pattern={kind!r} is not drawn here")


@lru_cache(maxsize=None)
def _table_image(index: int) -> np.ndarray:
    """Draw table `index` as the benchmark's camera sees it: (480, 640, 3) uint8."""
    _, kind, first, second, size, angle, far_edge, floor, wall = PACK["tables"][index]
    v, u = np.mgrid[:480, :640].astype(np.float32)
    rays = np.stack([np.ones_like(u), (319.501 - u) / 623.588, (239.545 - v) / 623.588], -1)  # SAPIEN: x ahead, z up
    base_to_world = np.diag([-1.0, -1.0, 1.0])  # the base is turned by 180 degrees
    rays = (rays @ (base_to_world @ quat2mat([0.8992917, -0.09263245, 0.35892478, 0.23209205])).T).astype(np.float32)
    eye = np.array([0.147, 0.028, 0.870]) + base_to_world @ [0.0, -0.16, 0.36]
    x, y = (eye[i] + rays[..., i] * (0.870 - eye[2]) / rays[..., 2] for i in (0, 1))
    fx, fy = (eye[i] + rays[..., i] * -eye[2] / rays[..., 2] for i in (0, 1))  # where the ray would meet the floor

    def blend(share, a, b):
        return np.asarray(a, np.float32) + np.asarray(share, np.float32)[..., None] * (np.subtract(b, a))

    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    image = blend(_pattern(kind, c * x + s * y + 8, c * y - s * x + 8, size, index), first, second)
    image *= (1.04 - 0.25 * np.hypot(x + 0.1, y))[..., None]  # a lamp above the middle
    beyond = blend(_pattern("tiles", fx + 8, fy + 8, 0.4, index), floor, np.multiply(floor, 0.8))
    wall_z = eye[2] + rays[..., 2] * (-1.5 - eye[0]) / rays[..., 0]  # height at which the ray meets a wall at x = -1.5
    beyond = np.where((wall_z > 0)[..., None], blend((wall_z < 0.08) * 0.5, wall, (60, 50, 45)), beyond)
    beyond *= np.clip(0.55 + 0.9 * (far_edge - x), 0.55, 0.9)[..., None]  # the table's shadow
    image = np.where((x < far_edge)[..., None], beyond, image)
    image *= np.where(np.abs(x - far_edge) < 0.006, 0.6, 1.0)[..., None]  # its rim
    grain = np.random.default_rng(index).normal(0, 2.0, (480, 640, 1))
    return np.clip(image + grain, 0, 255).astype(np.uint8)


@lru_cache(maxsize=None)
def _noise_image(index: int) -> np.ndarray:
    """Draw noise texture `index`: blots and bands of three colours, (480, 640, 3) uint8."""
    rng = np.random.default_rng([77, index])
    palette = rng.integers(0, 256, (4, 3))
    v, u = np.mgrid[:480, :640].astype(np.float32) / rng.integers(25, 110) * rng.uniform(0.5, 2, (2, 1, 1))
    share = _noise(u, v, index, 1 + index % 4) * (1 + index % 3)
    share = np.clip((share % 1 - 0.5) * 2.5 + 0.5, 0, 1)[..., None]
    other = _noise(v * 2 + 9, u * 2, index + 50, 2)[..., None]
    image = (palette[0] * share + palette[1] * (1 - share)) * other + (palette[2] * share + palette[3] * (1 - share)) * (1 - other)
    return image.astype(np.uint8)


@lru_cache(maxsize=256)
def _resized(draw, key, width: int, height: int) -> np.ndarray:
    """Image draw(key) at (height, width, 3) uint8; 640x480 is passed through unchanged."""
    image = draw(key)
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX if width < 640 else None))
    image.setflags(write=False)
    return image


def _file_image(path: Path) -> np.ndarray:
    """Read an RGB image; an alpha channel is dropped, not blended, as the published benchmark does."""
    return np.array(Image.open(path).convert("RGBA"))[..., :3].copy()


# --- packs ------------------------------------------------------------------------------------------------------------


class PrimitivePack:
    """The embedded pack; see the module docstring."""

    name = "primitive"
    robot_urdf = str(Path(__file__).parent / "primitive_widowx.urdf")
    tables = [row[0] for row in PACK["tables"]]

    def __init__(self):
        self.objects, self.plates = (
            [Body(name, density, *_bounds(_parts(solid))) for name, density, solid, _ in PACK[kind]]
            for kind in ("objects", "plates")
        )

    def add_body(self, builder, kind: str, index: int):
        """Put collision and visual shapes of object or plate `index` on a SAPIEN or ManiSkill actor builder."""
        _, density, solid, seen = PACK[f"{kind}s"][index]
        friction = PhysxMaterial(static_friction=1.0, dynamic_friction=1.0, restitution=0.0)
        for part in _parts(solid):
            add = getattr(builder, f"add_{part.shape.split('_')[0]}_collision")
            add(_pose(part), **_dimensions(part), material=friction, density=density)
        for part in _parts(seen):
            paint = RenderMaterial(base_color=[*COLORS[part.color], 1], roughness=0.6, specular=0.3)
            shape = part.shape.split("_")[0].replace("ball", "sphere")
            getattr(builder, f"add_{shape}_visual")(_pose(part), **_dimensions(part), material=paint)

    def build_table(self, builder):
        """Put the table (the static `arena`) on a builder: a slab whose top is at z = 0.870 m."""
        builder.add_box_collision(half_size=[1.5, 1.5, 0.02])
        builder.add_box_visual(half_size=[1.5, 1.5, 0.02], material=RenderMaterial(base_color=[0.6, 0.5, 0.4, 1]))
        builder.initial_pose = sapien.Pose([0, 0, 0.85])

    def background(self, index: int, width: int, height: int) -> np.ndarray:
        """Picture of table `index` without robot and objects: (height, width, 3) uint8, read-only."""
        return _resized(_table_image, index, width, height)

    def texture(self, index: int, width: int, height: int) -> np.ndarray:
        """Noise texture `index`: (height, width, 3) uint8, read-only."""
        return _resized(_noise_image, index, width, height)

    def texture_mix(self, index: int) -> float:
        """Weight of texture `index`: 0 for the first, which therefore changes nothing, else 1."""
        return float(index > 0)


class BridgePack:
    """The published files under `root` (MS_ASSET_DIR); see the module docstring."""

    name = "bridge"

    def __init__(self, root: Path):
        data = root / "data"
        self.robot_urdf = str(data / "robots/widowx/wx250s.urdf")
        self.stage = data / "tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb"
        databases = [data / f"rl4vla/more_{kind}/model_db.json" for kind in ("carrot", "plate", "table")]
        self._require(root, [Path(self.robot_urdf), self.stage, *databases])
        objects, plates, tables = (json.loads(path.read_text()) for path in databases)
        self.objects, self.plates = (
            [Body(v["name"], v["density"], np.array(v["bbox"]["min"]), np.array(v["bbox"]["max"])) for v in db.values()]
            for db in (objects, plates)
        )
        self.folders = {"object": [databases[0].parent / k for k in objects],
                        "plate": [databases[1].parent / k for k in plates]}  # fmt: skip
        self.tables = list(tables)
        self.mixes = [float(row["mix"]) for row in tables.values()]
        self.backgrounds = [databases[2].parent / "imgs" / key for key in tables]
        self.textures = [databases[2].parent / "textures" / row["texture"] for row in tables.values()]
        bodies = [folder / "collision.obj" for folders in self.folders.values() for folder in folders]
        self._require(root, [*bodies, *self.backgrounds, *self.textures])

    @staticmethod
    def _require(root: Path, paths: list[Path]):
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(
                    f"assets='bridge' needs {path}, which does not exist. MS_ASSET_DIR (now {root}) must be the folder "
                    "whose data/ holds robots/widowx, tasks/bridge_v2_real2sim_dataset and rl4vla/more_carrot, more_plate, "
                    f"more_table. Run `python -m common.assets fetch --dir {root}` and set MS_ASSET_DIR={root}, or use "
                    "assets='primitive', which needs no files."
                )

    def add_body(self, builder, kind: str, index: int):
        """As PrimitivePack.add_body; every component of collision.obj is one convex hull, as published."""
        folder = self.folders[kind][index]
        body = (self.objects if kind == "object" else self.plates)[index]
        friction = PhysxMaterial(static_friction=1.0, dynamic_friction=1.0, restitution=0.0)
        builder.add_multiple_convex_collisions_from_file(
            str(folder / "collision.obj"), material=friction, density=body.density
        )
        visuals = [folder / f"textured.{ending}" for ending in ("obj", "dae", "glb")]
        builder.add_visual_from_file(str(next(path for path in visuals if path.exists())))

    def build_table(self, builder):
        """As PrimitivePack.build_table: the published stage mesh at its published pose, top at z = 0.870 m."""
        upright = sapien.Pose(q=[0.707, 0.707, 0, 0])  # three digits, as published
        builder.add_nonconvex_collision_from_file(str(self.stage), pose=upright)
        builder.add_visual_from_file(str(self.stage), pose=upright)
        builder.initial_pose = sapien.Pose([2.0634, 2.8313, 0.0])

    def background(self, index: int, width: int, height: int) -> np.ndarray:
        """As PrimitivePack.background."""
        return _resized(_file_image, self.backgrounds[index], width, height)

    def texture(self, index: int, width: int, height: int) -> np.ndarray:
        """As PrimitivePack.texture."""
        return _resized(_file_image, self.textures[index], width, height)

    def texture_mix(self, index: int) -> float:
        """As PrimitivePack.texture_mix."""
        return self.mixes[index]


AssetPack = PrimitivePack | BridgePack


@lru_cache(maxsize=None)
def _bridge(root: str) -> BridgePack:
    return BridgePack(Path(root))


@lru_cache(maxsize=None)
def _primitive() -> PrimitivePack:
    return PrimitivePack()


def load_pack(name: str) -> AssetPack:
    """Return the asset pack "primitive" or "bridge"; ValueError for another name, FileNotFoundError for a missing file."""
    if name == "primitive":
        return _primitive()
    if name == "bridge":
        return _bridge(os.environ.get("MS_ASSET_DIR", str(Path.home() / ".maniskill")))
    raise ValueError(f"assets={name!r} is not an asset pack; use 'primitive' (embedded) or 'bridge' (published files)")
