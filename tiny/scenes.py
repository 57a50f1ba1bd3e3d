"""What the small model has seen before a robot: random bodies, tables, overlays, places and words.

Beside the benchmark's 25 objects and 17 receptacles stand random ones, a "red bar" or a "teal
dish". They lie anywhere on the table with any yaw, often two of a kind, on the 16 training tables
and on others, under coloured noise that is no texture of the benchmark, and are asked for in many
ways. Places are drawn freely, so no scene of the benchmark is among these; "unseen" in its rows
then means what it means in the paper: unseen in fine-tuning.
"""

import json
from dataclasses import replace
from functools import cache, partial

import numpy as np
from PIL import Image

from common.simulation.assets import FOLDER, picture, primitive_pack
from common.simulation.tasks import POSITION_SETS, RING, Episodes
from scripts.draw_tables import draw_table, small

# Random ones, beside the benchmark's
RANDOM_OBJECTS, RANDOM_RECEPTACLES, NUM_TABLES, NUM_NOISES = 4000, 2000, 150, 10_000
COLORS = {
    "red": "red", "green": "green", "blue": "blue", "yellow": "yellow", "orange": "orange",
    "purple": "purple", "pink": "pink", "brown": "brown", "black": "black", "white": "white",
    "grey": "grey", "magenta": "magenta", "teal": "teal", "navy": "navy", "gold": "gold",
    "lime": "lime", "plum": "plum", "beige": "cream", "silver": "silver", "olive": "forest",
}  # fmt: skip
# Shape of the main part, and ranges in mm: of a box x, y, z, else of diameter, length
OBJECT_SHAPES = {
    "bar": ("box", (74, 116), (26, 38), (24, 34)),
    "brick": ("box", (54, 76), (30, 40), (26, 40)),
    "cube": ("box", (34, 42), (34, 42), (34, 42)),
    "rod": ("capsule_x", (28, 36), (80, 118)),
    "capsule": ("capsule_x", (34, 40), (54, 74)),
    "cylinder": ("cylinder_z", (32, 42), (34, 44)),
    "ring": ("cylinder_z", (38, 44), (24, 30)),
    "egg": ("sphere", (36, 44)),
}
RECEPTACLE_SHAPES = {
    "dish": ("cylinder_z", (98, 114), (6, 10)),
    "disc": ("cylinder_z", (88, 104), (4, 7)),
    "mat": ("box", (100, 120), (76, 100), (4, 7)),
    "slab": ("box", (90, 112), (84, 108), (7, 11)),
    "towel": ("box", (84, 104), (104, 116), (4, 6)),
}
PARAPHRASES = (
    "put {o} down on {r}", "place {o} on {r}", "move {o} onto the {r}", "set the {o} down on {r}",
    "lay {o} on the {r}", "pick up the {o} and place it on the {r}", "take {o} to the {r}",
    "take the {o} and lay it down on {r}", "position {o} on {r}", "arrange {o} on the {r}",
    "make sure the {o} is resting on the {r}", "{r} : put {o} on it", "on the {r} place the {o}",
    "on {r} , set the {o}", "to the {r} , move the {o}", "the {r} is for the {o}",
    "the {o} should be on the {r}", "the {o} , put it on the {r}", "{o} to {r}", "{o} , {r}",
    "could you move {o} over to {r} ?", "can you set the {o} on top of the {r} ?",
    "please move the {o} to where the {r} is", "would you lay {o} atop {r} ?",
    "{o} onto {r} , please",
)  # fmt: skip
FILLERS = (
    "please now you can could should would the this so and then it of for at with down up over"
).split()
EDGE_M = 0.01  # of free places beyond the outermost of the benchmark


def body_row(rng, shapes, number, colors):
    """A row of primitive_pack.json: [name, density, solid parts, seen parts] of a random body. Its
    name is that of the numbers `number` modulo the colours and shapes there are."""
    color = list(COLORS)[number % len(COLORS)]
    shape = list(shapes)[number // len(COLORS) % len(shapes)]
    kind, *ranges = shapes[shape]
    size = [round(float(rng.uniform(*limits)), 1) for limits in ranges]
    paint = f"{color} {len(colors)}"
    colors[paint] = np.clip(rng.normal(colors[COLORS[color]], 0.04), 0.02, 1.0).tolist()
    # What would roll collides as a box or an upright cylinder, as in the pack
    width, length = size[0], size[-1]
    solids = {
        "box": ["box", size],
        "cylinder_z": ["cylinder_z", size],
        "capsule_x": ["box", [length - 10, width - 3, width - 3]],
        "sphere": ["cylinder_z", [width - 4, width - 6]],
    }
    solid = solids[kind]
    height = solid[1][-1]
    seen = [[kind, size, [0, 0, 0], paint]]
    for _ in range(rng.integers(3)):  # lids, bands and dots in any colour
        other = str(rng.choice(list(COLORS.values())))
        if rng.random() < 0.5:  # a band around the middle, or a smaller sheet on a receptacle
            spread = np.array([rng.uniform(0.15, 0.5), 1.02, 1.02])
            box = np.array(solid[1] if solid[0] == "box" else [size[0], size[0], height])
            band = np.round(box * spread + (0, 0, 1), 1).tolist()
            shift = round(float(rng.uniform(-0.2, 0.2) * box[0]), 1)
            seen.append(["box", band, [shift, 0, 0], other])
        else:
            dot = round(float(rng.uniform(0.25, 0.7) * min(width, size[min(1, len(size) - 1)])), 1)
            seen.append(["cylinder_z", [dot, 3], [0, 0, round(height / 2 + 0.4, 1)], other])
    return [f"{color} {shape}", 600 if height > 12 else 900, [solid], seen]


def table_row(rng):
    """A row of the pack's tables, drawn at random."""
    first = rng.integers(30, 240, 3)
    second = (first + rng.normal(0, 55, 3)).clip(15, 245).astype(int)
    kind = str(rng.choice("wood plain marble stripes speckle tiles check dots zigzag".split()))
    size = float(0.012 if kind == "speckle" else rng.uniform(0.03, 0.22))
    floor, wall = rng.integers(60, 230, 3), rng.integers(120, 235, 3)
    angle, far, left = rng.uniform(-90, 90), rng.uniform(-0.58, -0.4), rng.uniform(-0.42, -0.26)
    return ["", kind, first, second, size, angle, far, left, floor, wall]


def noise_picture(rng, width=160, height=120):
    """PIL image: noise of a random grain and contrast around a random colour."""
    cells = int(2 ** rng.uniform(0, 6))
    noise = rng.integers(256, size=(-(-cells * 3 // 4), cells, 3)).astype(np.uint8)
    noise = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    noise = np.asarray(noise) - 127.5
    pixels = rng.uniform(30, 225, 3) + rng.uniform(0, 1) * noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def broad_pack(seed=0):
    """The primitive pack with the random bodies behind its own; tables from 21 on are drawn, from
    21 + NUM_TABLES on noise; textures from 21 on are noise."""
    rows = json.loads((FOLDER / "primitive_pack.json").read_text())
    num_tables = len(rows["tables"])
    rng = np.random.default_rng([seed, 1])
    for number in range(RANDOM_OBJECTS):
        rows["objects"].append(body_row(rng, OBJECT_SHAPES, number, rows["colors"]))
    for number in range(RANDOM_RECEPTACLES):
        rows["plates"].append(body_row(rng, RECEPTACLE_SHAPES, number, rows["colors"]))
    pack = primitive_pack(json.dumps(rows))

    @cache
    def drawn(index):
        return small(draw_table(index, table_row(np.random.default_rng([seed, 2, index]))))

    def table(index):
        if index < num_tables:
            return Image.fromarray(pack.background(index, 160, 120))
        if index < num_tables + NUM_TABLES:
            return Image.fromarray(drawn(index))
        return noise_picture(np.random.default_rng([seed, 3, index]))

    def texture(index):
        return noise_picture(np.random.default_rng([seed, 4, index]))

    looks = dict(background=partial(picture, table), texture=partial(picture, texture))
    return replace(pack, mixes=[1.0] * (num_tables + NUM_NOISES), **looks)


def name_number(index, own, shapes):
    """Number of a body's name: random bodies of one colour and shape share it. index: int, or an
    array of indices in the pack, of which the first `own` are the benchmark's."""
    index = np.asarray(index)
    return np.where(index < own, index, own + (index - own) % (len(COLORS) * len(shapes)))


def class_names():
    """Names of all receptacles, then of all objects, in the order of `name_number`."""
    pack, names = primitive_pack(), []
    for bodies, shapes in ((pack.plates, RECEPTACLE_SHAPES), (pack.objects, OBJECT_SHAPES)):
        names += [body.name for body in bodies]
        names += [f"{color} {shape}" for shape in shapes for color in COLORS]
    return names


def _choose(rng, own, num_random, shapes, other=None):
    """An index of the pack: of its own bodies or of the random ones; not one named as `other`."""
    while True:
        benchmark = rng.random() < 0.45
        index = rng.integers(own) if benchmark else own + rng.integers(num_random)
        if other is None or name_number(index, own, shapes) != name_number(other, own, shapes):
            return int(index)


def _places(rng, third):
    """(3, 2) metres: object, receptacle, third body; 3/4 of the benchmark's distances at least."""
    corners = (np.array([RING[0], RING[-1]]) * 2 - 1) * 0.075 + (-0.16, 0.0)
    low, high = corners.min(0) - EDGE_M, corners.max(0) + EDGE_M
    name = {"object": "TC", "plate": "TP"}.get(third, "P")
    least = np.array([*POSITION_SETS[name][2], 0, 0])[:3]
    while True:
        xy = rng.uniform(low, high, (3, 2))
        gaps = np.linalg.norm(xy[[0, 1, 0]] - xy[[1, 2, 2]], axis=1)
        if (gaps > 0.75 * least).all():  # the receptacles are 0.11 wide
            return xy


def random_bodies(rng):
    """Which bodies a scene has: fields of `Episodes`."""
    third = str(rng.choice(["none", "object", "plate"], p=[0.4, 0.3, 0.3]))
    objects = 25, RANDOM_OBJECTS, OBJECT_SHAPES
    receptacles = 17, RANDOM_RECEPTACLES, RECEPTACLE_SHAPES
    thing, plate, third_index = _choose(rng, *objects), _choose(rng, *receptacles), -1
    if third == "object":
        third_index = _choose(rng, *objects, thing)
    if third == "plate":
        third_index = _choose(rng, *receptacles, plate)
    one = [np.array([number], np.int64) for number in (thing, plate, third_index)]
    return dict(zip(("object", "plate", "third_index"), one, strict=True), third=third)


def random_episode(rng, bodies):
    """`Episodes` of one random scene of `broad_pack` with these bodies."""
    third = bodies["third"]
    where = rng.choice(3, p=[0.4, 0.35, 0.25])
    drawn, noise = 21 + rng.integers(NUM_TABLES), 21 + NUM_TABLES + rng.integers(NUM_NOISES)
    table = (rng.integers(16), drawn, noise)
    overlay = str(rng.choice(["plain", "texture", "whole"], p=[0.45, 0.275, 0.275]))
    xy = _places(rng, third).astype(np.float32)
    heights = np.array([0.95, 0.92, 0.97 if third == "object" else 0.92], np.float32)
    xyz = np.concatenate([xy, heights[:, None]], axis=1)[:, None]
    half = rng.uniform(0, np.pi, 2)
    turned = np.stack([np.cos(half), 0 * half, 0 * half, np.sin(half)], axis=1).astype(np.float32)
    upright = np.array([[1, 0, 0, 0]], np.float32)
    texture = 21 + rng.integers(NUM_NOISES)
    table, texture, template = np.array([[table[where]], [texture], [0]], np.int64)
    return Episodes(
        **bodies, table=table, texture=texture, template=template,
        arm_offset=np.zeros((1, 6), np.float32),
        object_xyz=xyz[0], object_quat=turned[:1], plate_xyz=xyz[1], plate_quat=upright,
        third_xyz=xyz[2], third_quat=upright if third == "plate" else turned[1:],
        composite=overlay, ratio=float(rng.uniform(0.1, 0.6)), move_at=None)  # fmt: skip


def random_text(rng, object_name, receptacle_name):
    """An instruction: four in ten times the training one, else another, or one amid fillers."""
    if rng.random() < 0.4:
        return f"put {object_name} on {receptacle_name}"
    text = str(rng.choice(PARAPHRASES)).format(o=object_name, r=receptacle_name)
    if rng.random() < 0.5:
        return text
    before, after = (" ".join(rng.choice(FILLERS, rng.integers(4))) for _ in range(2))
    return f"{before} {text} {after}".strip()
