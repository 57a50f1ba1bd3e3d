"""Draw the primitive pack's 21 tables and 21 noise textures: `python scripts/draw_tables.py`.

Writes common/simulation/primitive_tables.png and primitive_textures.png, 3 rows of 7 pictures of
160x120. The tables are drawn at 640x480 through the benchmark's camera, with a grain that depends
on numpy's generator, and made smaller; pictures are part of results, so the files are committed.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from transforms3d.quaternions import quat2mat

FOLDER = Path(__file__).parents[1] / "common/simulation"
SIZE = (160, 120)  # pixels; the small scene shows the middle of it


def noise(x, y, seed, octaves=1):
    """Smooth value noise in [0, 1] at coordinates in cells of the coarsest octave, period 64."""
    total, weight = np.float32(0), 0.0
    for octave in range(octaves):
        lattice = np.random.default_rng([seed, octave]).random((65, 65), dtype=np.float32)
        lattice[64], lattice[:, 64] = lattice[0], lattice[:, 0]
        u, v = (2**octave * np.asarray(k, np.float32) % 64 for k in (x, y))
        i, j = u.astype(np.int32), v.astype(np.int32)
        a, b = (t * t * (3 - 2 * t) for t in (u - i, v - j))
        near, k = lattice.ravel(), 65 * i + j
        low = near[k] + a * (near[k + 65] - near[k])
        high = near[k + 1] + a * (near[k + 66] - near[k + 1])
        total = total + (low + b * (high - low)) / 2**octave
        weight += 0.5**octave
    return total / weight


def pattern(kind, x, y, size, seed):
    """Share of the second colour at table coordinates x, y in m: an array in [0, 1]."""
    u, v = x / size, y / size
    if kind == "wood":  # planks along x, each with its own tone and grain, dark seams
        plank = np.floor(v)
        tone = np.random.default_rng(seed).random(256)[plank.astype(int) % 256]
        grain = noise(x * 5 + 7 * plank, y * 110, seed, 3)
        seam = np.abs(v - plank - 0.5) > 0.5 - 0.0015 / size
        return np.clip(0.5 * tone + 0.9 * (grain - 0.3), 0, 1) * (1 - seam) + 1.5 * seam
    if kind == "plain":
        return noise(u, v, seed, 4)
    if kind == "marble":  # thin veins where a warped noise crosses one half
        warp = noise(u, v, seed, 4)
        vein = np.abs(noise(u + 2.5 * warp, 0.5 * v, seed + 1, 4) - 0.5)
        return np.clip(0.25 * warp + 0.9 * np.exp(-vein / 0.03), 0, 1)
    if kind == "stripes":
        return 0.85 * (np.floor(v) % 2) + 0.15 * noise(20 * u, 20 * v, seed)
    if kind == "speckle":
        return np.clip((noise(u, v, seed, 2) - 0.55) * 6, 0, 1)
    if kind == "tiles":
        joint = np.maximum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)) > 0.5 - 0.003 / size
        tones = np.random.default_rng(seed).random((64, 64))
        tone = tones[np.floor(u).astype(int) % 64, np.floor(v).astype(int) % 64]
        return np.maximum(joint, 0.35 * tone)
    if kind == "check":
        return 0.5 * (np.floor(u) % 2) + 0.5 * (np.floor(v) % 2)
    if kind == "dots":
        shift = 0.5 * (np.floor(v) % 2)
        return ((u + shift) % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.08
    if kind == "zigzag":
        line = np.floor(v + 2 * np.abs(u % 1 - 0.5)) % 2
        return line * 0.8 + 0.2 * noise(x * 40, y * 40, seed, 2)
    raise ValueError(f"pattern = {kind!r} is not drawn here")


def mix(share, a, b):
    return np.asarray(a, np.float32) + np.asarray(share, np.float32)[..., None] * np.subtract(b, a)


def draw_table(index, row):
    """Table `index`, a row of primitive_pack.json, as the camera sees it: (480, 640, 3) uint8."""
    _, kind, first, second, size, angle, far, left, floor, wall = row
    v, u = np.mgrid[:480, :640].astype(np.float32)
    # SAPIEN's camera: x ahead, z up; the robot's base is turned by 180 degrees
    rays = np.stack([np.ones_like(u), (319.501 - u) / 623.588, (239.545 - v) / 623.588], -1)
    base_to_world = np.diag([-1.0, -1.0, 1.0])
    camera = base_to_world @ quat2mat([0.8992917, -0.09263245, 0.35892478, 0.23209205])
    rays = (rays @ camera.T).astype(np.float32)
    eye = np.array([0.147, 0.028, 0.870]) + base_to_world @ [0.0, -0.16, 0.36]
    eye = eye.astype(np.float32)

    # Metres, where a ray meets the table, the floor, and the wall behind
    x, y = (eye[i] + rays[..., i] * (0.870 - eye[2]) / rays[..., 2] for i in (0, 1))
    floor_x, floor_y = (eye[i] + rays[..., i] * -eye[2] / rays[..., 2] for i in (0, 1))
    wall_z = eye[2] + rays[..., 2] * (1.7 * far - 0.1 - eye[0]) / rays[..., 0]

    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    share = pattern(kind, c * x + s * y + 8, c * y - s * x + 8, size, index)
    top = mix(share, first, second)
    top *= (1.04 - 0.35 * np.hypot(x + 0.1, y))[..., None]  # a lamp above the middle
    tiles = pattern("tiles", floor_x + 9, floor_y + 9, 0.4, index)
    around = mix(tiles, floor, np.multiply(floor, 0.8))
    shadow = np.clip(0.4 + 0.8 * np.maximum(far - x, left - y), 0.4, 0.9)
    around *= shadow[..., None]
    wall = mix(0.8 * (wall_z < 0.09), np.multiply(wall, 0.8), floor)
    wall = wall * (0.8 + 0.2 * np.clip(wall_z, 0, 1))[..., None]
    around = np.where((wall_z > 0)[..., None], wall, around)

    # Metres from the nearest edge of the table, which is dark
    inside = np.minimum(np.minimum(x - far, y - left), 0.16 - x)[..., None]
    image = np.where(inside > 0, np.where(inside < 0.006, 0.65 * top, top), around)
    grain = np.random.default_rng(index).normal(0, 2.0, (480, 640, 1))
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def draw_texture(index):
    """Noise texture `index`: blots and bands of three colours, (480, 640, 3) uint8."""
    rng = np.random.default_rng([77, index])
    palette = rng.integers(0, 256, (4, 3))
    pixels = np.mgrid[:480, :640].astype(np.float32)
    v, u = pixels / rng.integers(25, 110) * rng.uniform(0.5, 2, (2, 1, 1))
    share = noise(u, v, index, 1 + index % 4) * (1 + index % 3)
    share = np.clip((share % 1 - 0.5) * 2.5 + 0.5, 0, 1)[..., None]
    other = noise(v * 2 + 9, u * 2, index + 50, 2)[..., None]
    first, second = (palette[i] * share + palette[i + 1] * (1 - share) for i in (0, 2))
    return (first * other + second * (1 - other)).astype(np.uint8)


def small(image):
    """(120, 160, 3) uint8, antialiased."""
    return np.asarray(Image.fromarray(image).resize(SIZE, Image.Resampling.BILINEAR))


def sheet(pictures):
    """21 pictures in 3 rows of 7."""
    return np.concatenate([np.concatenate(pictures[k : k + 7], axis=1) for k in (0, 7, 14)])


def main():
    rows = json.loads((FOLDER / "primitive_pack.json").read_text(encoding="utf-8"))["tables"]
    tables = [small(draw_table(index, row)) for index, row in enumerate(rows)]
    textures = [small(draw_texture(index)) for index in range(len(rows))]
    for name, pictures in (("tables", tables), ("textures", textures)):
        path = FOLDER / f"primitive_{name}.png"
        Image.fromarray(sheet(pictures)).save(path, optimize=True)
        print(f"{path}: {len(pictures)} pictures, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
