"""The task table, episode ids, instructions and compositing against the published benchmark's counts and by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from common.simulation import tasks
from common.simulation.tasks import (
    TASKS,
    Task,
    composite,
    decode,
    get_task,
    instruction,
    num_configurations,
    position_set,
)

# Written again by hand: per split (first object, number of objects), extra, plate, table, number of positions and yaws.
ONE, TWO_TO = (0, 1), (1, 16)
MAIN = (0, 16), ONE, ONE, (0, 16), 784, 4
DIGITS = {
    "main": (MAIN, ((16, 9), ONE, ONE, (16, 5), 784, 4)),
    "single": ((ONE, ONE, ONE, ONE, 784, 4),) * 2,
    "main_carrot": (((0, 16), ONE, ONE, ONE, 784, 4), ((16, 9), ONE, ONE, ONE, 784, 4)),
    "main_image": ((ONE, ONE, ONE, (0, 16), 784, 4), (ONE, ONE, ONE, (16, 5), 784, 4)),
    "vision_image": (MAIN, ((0, 16), ONE, ONE, (16, 5), 784, 4)),
    "vision_texture03": (MAIN, ((0, 16), TWO_TO, ONE, (0, 16), 784, 4)),
    "vision_texture05": (MAIN, ((0, 16), TWO_TO, ONE, (0, 16), 784, 4)),
    "vision_whole03": (MAIN, ((0, 16), TWO_TO, ONE, (0, 16), 784, 4)),
    "vision_whole05": (MAIN, ((0, 16), TWO_TO, ONE, (0, 16), 784, 4)),
    "carrot": (MAIN, ((16, 9), ONE, ONE, (0, 16), 784, 4)),
    "instruct": (MAIN, ((0, 16), TWO_TO, ONE, (0, 16), 784, 4)),
    "plate": (MAIN, ((0, 16), ONE, TWO_TO, (0, 16), 784, 4)),
    "multi_carrot": (((0, 16), (0, 15), ONE, (0, 16), 2104, 4), ((16, 9), (0, 8), ONE, (0, 16), 2104, 4)),
    "multi_plate": (((0, 16), (0, 16), ONE, (0, 21), 2104, 4), ((0, 16), (0, 15), TWO_TO, (0, 21), 2104, 4)),
    "position": (MAIN, ((0, 16), ONE, ONE, (0, 16), 628, 4)),
    "ee_pose": (MAIN, ((0, 16), (1, 14375), ONE, (0, 16), 784, 4)),
    "position_change": (((0, 16), ONE, ONE, (0, 16), 2104, 4),) * 2,
}
COUNTS = {  # published number of configurations: train, test, all
    "main": (802_816, 141_120, 1_646_400),
    "single": (3_136, 3_136, 3_136),
    "main_carrot": (50_176, 28_224, 78_400),
    "main_image": (50_176, 15_680, 65_856),
    "vision_image": (802_816, 250_880, 1_053_696),
    "vision_texture03": (802_816, 12_845_056, 13_647_872),
    "vision_texture05": (802_816, 12_845_056, 13_647_872),
    "vision_whole03": (802_816, 12_845_056, 13_647_872),
    "vision_whole05": (802_816, 12_845_056, 13_647_872),
    "carrot": (802_816, 451_584, 1_254_400),
    "instruct": (802_816, 12_845_056, 13_647_872),
    "plate": (802_816, 12_845_056, 13_647_872),
    "multi_carrot": (32_317_440, 9_695_232, 25 * 24 * 16 * 2104 * 4),
    "multi_plate": (45_244_416, 678_666_240, 16 * 17 * 16 * 21 * 2104 * 4),
    "position": (802_816, 643_072, 16 * 16 * 1412 * 8),
    "ee_pose": (802_816, 11_540_480_000, 16 * 14_376 * 16 * 784 * 4),
    "position_change": (2_154_496, 2_154_496, 2_154_496),
}


# --- the table and its placements ---
@pytest.mark.parametrize("name", COUNTS)
def test_number_of_configurations(name):
    """A wrong range in the table changes the published number of configurations."""
    assert tuple(num_configurations(name, split, "published") for split in ("train", "test", "all")) == COUNTS[name]


def test_table_holds_the_17_published_ids():
    """A task that is missing or carries another id would not be the published benchmark."""
    suffixes = "Main-v3 Single-v1 MainCarrot-v3 MainImage-v3 VisionImage-v1 VisionTexture03-v1 VisionTexture05-v1"
    suffixes += " VisionWhole03-v1 VisionWhole05-v1 Carrot-v1 Instruct-v1 Plate-v1 MultiCarrot-v1 MultiPlate-v1"
    suffixes += " Position-v1 EEPose-v1 PositionChangeTo-v1"
    assert [row.published_id for row in TASKS.values()] == ["PutOnPlateInScene25" + s for s in suffixes.split()]
    assert list(TASKS) == list(DIGITS) == list(COUNTS) and all(TASKS[name].name == name for name in TASKS)


@pytest.mark.parametrize("name, count", [("P", 784), ("R", 628), ("TC", 2104), ("TP", 2104)])
def test_position_sets_equal_filtered_loops(name, count):
    """Vectorised filtering must keep the index order of nested loops, and the rounding at exactly 0.150 m."""
    units = (-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2) if name == "R" else (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    units = [u for u in itertools.product(units, units) if name != "R" or {-0.2, 1.2} & {*u}]
    points = (np.array(units) * 2 - 1) * np.array([0.075, 0.075]) + np.array([-0.16, 0.0])
    assert len(points) == (28 if name == "R" else 36)
    far = {(i, j): np.linalg.norm(p - q) for (i, p), (j, q) in itertools.product(enumerate(points), repeat=2)}
    rows, everywhere = [], range(len(points))
    for i, j in itertools.product(everywhere, everywhere):
        if far[i, j] > 0.070:
            if name in ("P", "R"):
                rows.append([[*points[i], 0.95], [*points[j], 0.95]])
                continue
            plate_third, object_third = (0.07, 0.15) if name == "TC" else (0.15, 0.07)
            z = (0.95, 0.92, 1.0) if name == "TC" else (1.0, 0.92, 0.96)
            for k in everywhere:
                if far[j, k] > plate_third and far[i, k] > object_third:
                    rows.append([[*points[index], height] for index, height in zip((i, j, k), z, strict=True)])
    assert position_set(name).shape == (count, 2 if name in ("P", "R") else 3, 3)
    np.testing.assert_array_equal(position_set(name), rows)


def test_exactly_150_mm_is_decided_by_rounding():
    """Exact arithmetic would keep 1896 or 2760 placements: every id of four tasks would mean another episode."""
    steps = np.array(list(itertools.product(range(6), range(6))))
    squared = ((steps[:, None] - steps[None]) ** 2).sum(-1)  # in units of (30 mm)^2; 70 mm is 5.44, 150 mm is 25
    near = squared > 5.44
    for object_third, count in ((squared > 25, 1896), (squared >= 25, 2760)):
        assert (near[:, :, None] & near[None] & object_third[:, None]).sum() == count
    xy = position_set("TC")[:, :, :2]
    exact = np.unique(xy[np.isclose(np.linalg.norm(xy[:, 0] - xy[:, 2], axis=1), 0.15)][:, (0, 2)], axis=0)
    assert len(exact) == 20 and (squared == 25).sum() == 72


def test_arm_offsets():
    """Another joint order or limit shifts all 14,375 unseen robot poses."""
    offsets = tasks.arm_offsets()
    assert offsets.shape == (14_376, 6) and offsets.dtype == np.float32
    assert not offsets[0].any() and np.flatnonzero((offsets == 0).all(axis=1)).tolist() == [0, 7188]
    np.testing.assert_allclose(offsets[1], [-0.15, -0.15, -0.08, -0.15, -0.15, -0.6])  # (-.15, -.15) is left out
    np.testing.assert_allclose(offsets[2] - offsets[1], [0, 0, 0, 0, 0, 0.3], atol=1e-7)  # joint 5 counts fastest
    assert np.abs(offsets[:, 1] + offsets[:, 2]).max() < 0.25 and len(np.unique(offsets[1:], axis=0)) == 14_375


# --- episode ids ---
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", DIGITS)
def test_decode_gives_back_encoded_digits(name, split):
    """A swapped digit, a lost offset or 32-bit overflow gives other episodes than the published ones."""
    *ranges, positions, yaws = DIGITS[name][split == "test"]
    ranges += [(0, positions), (0, yaws)]
    rng, row = np.random.default_rng(0), TASKS[name]
    digits = [np.append(rng.integers(0, radix, 500), [0, radix - 1]) for _, radix in ranges]
    order = [0, 2, 1, 3, 4, 5] if name == "multi_plate" else range(6)  # most significant first
    ids = np.zeros(502, np.int64)
    for k in order:
        ids = ids * ranges[k][1] + digits[k]
    assert ids[-2] == 0 and ids[-1] == num_configurations(name, split, "published") - 1

    episodes = decode(name, split, ids, "published")
    objects, extra, plates, table, position, yaw = (d + first for d, (first, _) in zip(digits, ranges, strict=True))
    xyz = position_set(row.positions[split == "test"])[position].astype(np.float32)
    degrees = (-22.5 - 45 * yaw) if (name, split) == ("position", "test") else 45 * yaw
    for got, want in ((episodes.object, objects), (episodes.plate, plates), (episodes.table, table)):
        np.testing.assert_array_equal(got, want)
    textured = name.startswith(("vision_texture", "vision_whole"))
    assert (episodes.composite, episodes.ratio) == ((name[7:-2], int(name[-2:]) / 10) if textured else ("plain", 0.0))
    np.testing.assert_array_equal(episodes.texture, extra if textured else 0 * extra)
    np.testing.assert_array_equal(episodes.template, extra if name == "instruct" else 0 * extra)
    np.testing.assert_array_equal(episodes.arm_offset, tasks.arm_offsets()[extra if name == "ee_pose" else 0 * extra])
    third = 0 * extra - 1
    if name == "multi_carrot":  # the published rule: shifted by the absolute index
        first, n = ranges[0]
        third = (objects + extra + 1) % n + first
        third[third == objects] = -1
        xyz[third == -1, 0] = xyz[third == -1, 2]
    if name == "multi_plate":
        third = (digits[2] + extra + 1) % (17 if split == "train" else 16) + (split == "test")
    np.testing.assert_array_equal(episodes.third_index, third)
    np.testing.assert_array_equal(episodes.object_xyz, xyz[:, 0])
    np.testing.assert_array_equal(episodes.plate_xyz, xyz[:, 1])
    if episodes.third != "none":
        np.testing.assert_array_equal(episodes.third_xyz, xyz[:, 2])
    np.testing.assert_allclose(2 * np.arctan2(*episodes.object_quat.T[[3, 0]]), np.deg2rad(degrees), atol=1e-6)


def test_decode_known_episodes():
    """First and last ids by hand: digits, poses, quaternions, types."""
    first, last = decode("main", "test", np.array([0])), decode("main", "test", np.array([141_119]))
    assert (first.object[0], first.plate[0], first.table[0]) == (16, 0, 16)
    assert (last.object[0], last.plate[0], last.table[0]) == (24, 0, 20)
    np.testing.assert_allclose(first.object_xyz, [[-0.235, -0.075, 0.95]], atol=1e-7)
    np.testing.assert_allclose(first.plate_xyz, [[-0.235, 0.015, 0.95]], atol=1e-7)
    np.testing.assert_allclose(last.object_xyz, [[-0.085, 0.075, 0.95]], atol=1e-7)
    np.testing.assert_allclose(last.object_quat, [[math.cos(math.radians(67.5)), 0, 0, math.sin(math.radians(67.5))]])
    assert first.object_quat.tolist() == first.plate_quat.tolist() == last.plate_quat.tolist() == [[1, 0, 0, 0]]
    for field in ("object_xyz", "object_quat", "plate_xyz", "plate_quat", "third_xyz", "third_quat", "arm_offset"):
        assert getattr(first, field).dtype == np.float32
    for field in ("object", "plate", "table", "texture", "template", "third_index"):
        assert getattr(first, field).dtype == np.int64 and getattr(first, field).shape == (1,)


def test_position_task_uses_the_ring_and_its_own_yaws():
    """The test split keeps object and plate both on the ring; train and test must not mix."""
    ids = np.arange(643_072)[::999]
    test, train = decode("position", "test", ids), decode("position", "train", ids)
    for xyz in (test.object_xyz, test.plate_xyz):
        np.testing.assert_allclose(np.abs(xyz[:, :2] + [0.16, 0]).max(axis=1), 0.105, atol=1e-6)
    assert np.abs(train.object_xyz[:, 1]).max() < 0.076
    yaws = np.rad2deg(2 * np.arctan2(test.object_quat[:, 3], test.object_quat[:, 0]))
    np.testing.assert_allclose(np.unique(yaws.round(3)), [-157.5, -112.5, -67.5, -22.5])
    union = decode("position", "all", np.array([784 * 8 + 4]))  # first ring position, first ring yaw
    first = decode("position", "test", np.array([0]))
    np.testing.assert_array_equal(union.object_xyz, first.object_xyz)
    np.testing.assert_array_equal(union.object_quat, first.object_quat)


def test_third_body():
    """A distractor turned, dropped from another height, or a move in the train split."""
    ids = np.arange(0, 2_000_000, 40_001)
    objects = decode("multi_carrot", "train", ids)
    assert objects.third == "object" and (objects.third_quat == objects.object_quat).all()
    assert np.allclose(objects.third_xyz[:, 2], 1.0) and np.allclose(objects.plate_xyz[:, 2], 0.92)
    plates = decode("multi_plate", "test", ids)
    assert plates.third == "plate" and (plates.third_quat == [1, 0, 0, 0]).all()
    assert np.allclose(plates.third_xyz[:, 2], 0.96) and np.allclose(plates.object_xyz[:, 2], 1.0)
    move, still = decode("position_change", "test", ids), decode("position_change", "train", ids)
    assert (move.third, move.move_at, still.third, still.move_at) == ("move_target", 5, "none", None)
    assert (move.third_quat == move.object_quat).all() and (move.third_index == -1).all()
    assert np.linalg.norm(move.object_xyz - move.third_xyz, axis=1).min() > 0.15 - 1e-6
    main = decode("main", "train", ids)
    assert (main.third, main.move_at, main.composite, main.ratio) == ("none", None, "plain", 0.0)
    assert (main.third_index == -1).all() and not main.arm_offset.any() and not main.texture.any()


def test_distractors_are_never_the_target():
    """Counting from the wrong start makes the target its own distractor, or leaves some distractors out."""
    for name, split, first, radix, size in (
        ("multi_carrot", "train", 0, 15, 16), ("multi_carrot", "test", 16, 8, 9), ("multi_carrot", "all", 0, 24, 25),
    ):  # fmt: skip
        ids = np.arange(size * radix) * 16 * 2104 * 4
        episodes = decode(name, split, ids)
        pairs = set(zip(episodes.object.tolist(), episodes.third_index.tolist(), strict=True))
        assert pairs == set(itertools.permutations(range(first, first + size), 2))
    for split, plates, distractors in (("train", [0], range(1, 17)), ("test", range(1, 17), range(1, 17))):
        step = num_configurations("multi_plate", split) // 16
        step //= len(plates) * (16 if split == "train" else 15)
        episodes = decode("multi_plate", split, np.arange(len(plates) * (16 if split == "train" else 15)) * step)
        pairs = set(zip(episodes.plate.tolist(), episodes.third_index.tolist(), strict=True))
        assert pairs == {(p, d) for p in plates for d in distractors if p != d}


def test_an_id_alone_fixes_the_episode():
    """Ids wrap at the number of configurations; neither batch, order nor integer type matters; ids beyond 2^31 work."""
    n = num_configurations("ee_pose", "test")
    ids = np.array([7, n - 1, 5_000_000_000])
    episodes = decode("ee_pose", "test", ids)
    for other in (ids + n, (ids + n * 10**8).astype(np.uint64)):
        np.testing.assert_array_equal(decode("ee_pose", "test", other).arm_offset, episodes.arm_offset)
    for i in range(3):
        alone = decode("ee_pose", "test", ids[[i]])
        for key in ("object", "table", "object_xyz", "object_quat", "plate_xyz", "arm_offset"):
            np.testing.assert_array_equal(getattr(alone, key)[0], getattr(episodes, key)[i])
    assert episodes.object[1] == 15 and np.allclose(episodes.arm_offset[1], [0.15, 0.15, 0.08, 0.15, 0.15, 0.6])
    few = decode("main", "train", np.int32([3, 4])).plate_xyz
    np.testing.assert_array_equal(few, decode("main", "train", [3, 4]).plate_xyz)


def test_a_new_task_is_one_row(monkeypatch):
    """Adding a task must need no code: a row with two existing columns combined decodes and counts."""
    row = Task("far_templates", "none", positions=("P", "R"), extra="template", extras=(range(1), range(16, 21)))
    monkeypatch.setitem(tasks.TASKS, row.name, row)
    assert num_configurations("far_templates", "test") == 16 * 5 * 16 * 628 * 4
    assert set(decode("far_templates", "test", np.arange(0, 10**6, 999)).template) <= set(range(16, 21))


# --- quirks, each in both modes ---
def test_quirk_missing_distractor():
    """Published multi_carrot: 9 of 72 pairs have no distractor, and the target lies at the third point."""
    ids = np.arange(72) * 16 * 2104 * 4 + 4 * 100
    published, fixed = (decode("multi_carrot", "test", ids, fidelity) for fidelity in ("published", "fixed"))
    missing = published.third_index == -1
    assert missing.sum() == 9 and (np.flatnonzero(missing) % 8 == 1).all() and (fixed.third_index >= 16).all()
    np.testing.assert_array_equal(published.object_xyz[missing], published.third_xyz[missing])
    np.testing.assert_array_equal(published.object_xyz[~missing], fixed.object_xyz[~missing])
    np.testing.assert_array_equal(published.object, fixed.object)
    for fidelity in ("published", "fixed"):  # the train split was right
        assert (decode("multi_carrot", "train", np.arange(240) * 134_656, fidelity).third_index >= 0).all()


def test_quirk_tables_of_multi_plate():
    """Published multi_plate mixes the unseen tables 16-20 into both splits; fixed keeps the training tables."""
    ids = np.arange(21) * 2104 * 4
    for split in ("train", "test", "all"):
        assert set(decode("multi_plate", split, ids, "published").table) == set(range(21))
        assert set(decode("multi_plate", split, ids, "fixed").table) == set(range(16))
    assert num_configurations("multi_plate", "train") == 45_244_416 // 21 * 16


def test_quirk_unreachable_templates():
    """Published instruct stops at template 16; fixed uses every unseen one; training knows template 0 only."""
    ids = np.arange(20) * 16 * 784 * 4
    assert set(decode("instruct", "test", ids, "published").template) == set(range(1, 17))
    assert set(decode("instruct", "test", ids, "fixed").template) == set(range(1, 21))
    assert num_configurations("instruct", "test") == 16 * 20 * 16 * 784 * 4
    assert not decode("instruct", "train", ids).template.any()


def test_other_tasks_do_not_depend_on_fidelity():
    """A fix must not touch the 14 tasks without a quirk in their data."""
    for name in set(TASKS) - {"multi_carrot", "multi_plate", "instruct"}:
        assert get_task(name, "published") == get_task(name, "fixed")


# --- instructions ---
def test_templates_are_exact():
    """A changed letter, casing or apostrophe is another benchmark."""
    assert [instruction(k, "BBQ sauce", "flat bowl") for k in range(21)] == [
        "put BBQ sauce on flat bowl",
        "Place the BBQ sauce on the flat bowl",
        "set BBQ sauce on flat bowl",
        "move the BBQ sauce to the flat bowl",
        "Take the BBQ sauce and put it on the flat bowl",
        "pick up BBQ sauce and set it down on flat bowl",
        "please put the BBQ sauce on the flat bowl",
        "Put BBQ sauce onto flat bowl.",
        "place the BBQ sauce onto the flat bowl surface",
        "Make sure BBQ sauce is on flat bowl.",
        "on the flat bowl, put the BBQ sauce",
        "put the BBQ sauce where the flat bowl is",
        "Move the BBQ sauce from the table to the flat bowl",
        "Move BBQ sauce so it\N{RIGHT SINGLE QUOTATION MARK}s on flat bowl.",
        "Can you put BBQ sauce on flat bowl?",
        "BBQ sauce on the flat bowl, please.",
        "the BBQ sauce should be placed on the flat bowl.",
        "Lay the BBQ sauce down on the flat bowl.",
        "could you place BBQ sauce over flat bowl",
        "position the BBQ sauce atop the flat bowl",
        "Arrange for the BBQ sauce to be resting on flat bowl.",
    ]
    assert len(tasks.TEMPLATES) == 21


# --- the study's results ---
def test_report_rows():
    """A row that points to the wrong split, or a mistyped figure, shows in the study's own means."""
    rows = tasks.REPORT_ROWS
    assert len(rows) == len({row[0] for row in rows}) == len({row[2:4] for row in rows}) == 16
    assert {row[2] for row in rows if row[3] == "train"} == {"carrot", "multi_carrot", "multi_plate"}
    assert all(row[2] in TASKS for row in rows)
    settings = """carrot train, vision_image test, vision_texture03 test, vision_texture05 test, vision_whole03 test,
        vision_whole05 test, carrot test, plate test, instruct test, multi_carrot train, multi_carrot test,
        multi_plate train, multi_plate test, position test, ee_pose test, position_change test"""
    assert [f"{row[2]} {row[3]}" for row in rows] == [" ".join(words.split()) for words in settings.split(",")]
    figures = """.781 .938 .719 .844 .719 .833 .557 .630 .708 .854 .505 .667 .453 .714 .615 .750 .672 .891 .615 .750
        .297 .578 .672 .812 .458 .599 .568 .807 .339 .797 .286 .745"""
    assert [figure for row in rows for figure in row[4:]] == [float(figure) for figure in figures.split()]
    means = {"id": (78.1, 93.8), "vision": (64.2, 76.6), "semantics": (54.0, 72.8), "execution": (39.8, 78.3)}
    for dimension, want in means.items():
        figures = np.array([row[4:] for row in rows if row[1] == dimension])
        np.testing.assert_allclose(100 * figures.mean(axis=0), want, atol=0.051)


# --- compositing ---
COLUMNS = torch.tensor([0, 80, 160, 240])


def grey(values, height=3):
    """(1, height, W, 3) uint8 whose rows are `values`."""
    return torch.as_tensor(values, dtype=torch.uint8)[None, None, :, None].repeat(1, height, 1, 3)


def columns(*shown, width=4, height=3):
    """(1, height, width) bool foreground that covers whole columns."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, :, list(shown)] = True
    return mask


def first_row(image):
    assert (image == image[:, :1, :, :1]).all()  # these images only vary along a row
    return image[0, 0, :, 0].tolist()


def composite_row(*args):
    """First row of the composite, which must be the same for rows as for columns."""
    turned = [x.transpose(1, 2) if torch.is_tensor(x) and x.ndim > 1 else x for x in args]
    assert torch.equal(composite(*turned).transpose(1, 2), composite(*args))
    return first_row(composite(*args))


@pytest.mark.parametrize("mode", ["plain", "texture", "whole"])
def test_zero_mix_is_the_plain_composite(mode):
    """Texture 0 has mix 0: the train split must look like main, also without any foreground."""
    args = grey([10, 20, 30, 40]), grey([1, 2, 3, 4]), grey(COLUMNS), torch.zeros(1)
    rgb, background, texture, mix = args
    for mask, want in ((columns(1, 3), [1, 20, 3, 40]), (columns(), [1, 2, 3, 4])):
        assert composite_row(rgb, mask, background, texture, mix, mode, 0.5) == want


def test_plain_needs_no_texture():
    """The default tasks must not load textures."""
    assert composite_row(grey([9] * 4), columns(0), grey([5] * 4), None, None, "plain", 0.0) == [9, 5, 5, 5]


@pytest.mark.parametrize("ratio, want", [(0.3, [35, 8, 118, 114]), (0.5, [25, 8, 130, 150])])
def test_texture_tints_the_foreground_only(ratio, want):
    """By hand: ratio * (0, 80, 160, 240) + (1 - ratio) * rgb, truncated; the background at column 1 stays clean."""
    rgb, background = grey([51, 50, 101, 61]), grey([7, 8, 9, 10])
    for fidelity in ("fixed", "published"):
        args = rgb, columns(0, 2, 3), background, grey(COLUMNS), torch.ones(1), "texture", ratio, fidelity
        assert composite_row(*args) == want


def test_quirk_texture_of_the_largest_box_in_the_batch():
    """Published: an image changes with its neighbours. Fixed: it does not. Box 2 wide beside a box 4 wide."""
    rgb, background, texture = (grey(row).repeat(2, 1, 1, 1) for row in ([0] * 4, [7] * 4, COLUMNS))
    mask = torch.cat([columns(1, 2), columns(0, 1, 2, 3)])
    args = rgb, mask, background, texture, torch.ones(2), "texture", 1.0
    both = {fidelity: composite(*args, fidelity) for fidelity in ("fixed", "published")}
    assert first_row(both["fixed"][:1]) == [7, 40, 200, 7]  # 4 -> 2 wide: means of pairs
    assert first_row(both["published"][:1]) == [7, 0, 80, 7]  # left part of the texture at 4 wide
    assert first_row(both["fixed"][1:]) == first_row(both["published"][1:]) == COLUMNS.tolist()
    alone = [x[:1] for x in (rgb, mask, background, texture, torch.ones(1))]
    for fidelity in ("fixed", "published"):
        assert composite_row(*alone, "texture", 1.0, fidelity) == [7, 40, 200, 7]


@pytest.mark.parametrize("ratio, want", [(0.3, [25, 37, 56, 61]), (0.5, [35, 55, 80, 95]), (1.0, [60, 100, 140, 180])])
def test_whole_blends_a_window_that_follows_the_foreground(ratio, want):
    """Doubled, the row is 0 20 60 100 140 180 220 240; columns 2 and 3 put the window at 2: 60 100 140 180.

    By hand: ratio * window + (1 - ratio) * (11, 11, 21, 11), truncated, on foreground and background alike.
    """
    for fidelity in ("fixed", "published"):
        args = grey([0, 0, 21, 11]), columns(2, 3), grey([11] * 4), grey(COLUMNS), torch.ones(1), "whole", ratio
        assert composite_row(*args, fidelity) == want


def test_whole_without_foreground_starts_at_one():
    """An empty box is (0, 0, 0, 0) and the window's corner is at least 1."""
    args = grey([0] * 4), columns(), grey([0] * 4), grey(COLUMNS), torch.ones(1)
    assert composite_row(*args, "whole", 1.0) == [20, 60, 100, 140]


@pytest.mark.parametrize("size", [(480, 640), (120, 160), (7, 5), (2, 3)])
def test_doubling_rounds_like_opencv(size):
    """torch's bilinear resize, rounded, differs in 9 % of the values from the published 8-bit resize."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed; the next test checks one column by hand")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    want = cv2.resize(image, (2 * size[1], 2 * size[0]))
    np.testing.assert_array_equal(tasks._double(torch.from_numpy(image)).numpy(), want)


def test_doubling_by_hand():
    """One column 10, 13: quarter steps are cut before they are added; the ends repeat."""
    image = torch.tensor([10, 13], dtype=torch.uint8)[:, None, None].repeat(1, 2, 3)
    # 10 + 10: 10; (3 * 10 + 13) / 4 = 10.75: 11; (10 + 3 * 13) / 4 = 12.25: 12; 13
    assert tasks._double(image)[:, 0, 0].tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("mode", ["plain", "texture", "whole"])
@pytest.mark.parametrize("size", [(480, 640), (120, 160), (5, 7), (1, 1)])
def test_any_image_size_and_batch_order(size, mode):
    """Fixed images must not depend on their neighbours, and boxes at the border must not leave the image."""
    generator = torch.Generator().manual_seed(0)
    rgb, background, texture = torch.randint(0, 256, (3, 3, *size, 3), generator=generator, dtype=torch.uint8)
    mask = torch.rand((3, *size), generator=generator) < 0.3
    mask[1] = False
    mask[2] = True
    args = rgb, mask, background, texture, torch.tensor([1.0, 1.0, 0.5])
    image = composite(*args, mode, 0.5)
    assert image.shape == rgb.shape and image.dtype == torch.uint8
    for order in ([2, 0, 1], [1]):
        assert torch.equal(composite(*(x[order] for x in args), mode, 0.5), image[order])
    if mode != "whole":
        assert torch.equal(image[~mask], background[~mask])


def test_inputs_are_left_alone():
    """The renderer's buffers are reused; compositing must not write into them."""
    args = grey([10] * 4), columns(1), grey([1] * 4), grey(COLUMNS), torch.ones(1)
    before = [x.clone() for x in args]
    for mode in ("plain", "texture", "whole"):
        composite(*args, mode, 0.5)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


# --- errors ---
def test_unknown_names_are_refused():
    """A typing error must name the value and what is known, not fall back to a default."""
    with pytest.raises(ValueError, match=r"task = 'mian' is not known; use one of main, single,.*position_change"):
        num_configurations("mian", "train")
    with pytest.raises(ValueError, match="split = 'val' is not known; use one of train, test, all"):
        decode("main", "val", np.arange(3))
    with pytest.raises(ValueError, match="fidelity = 'exact' is not known; use one of fixed, published"):
        get_task("main", "exact")
    args = grey([1] * 4), columns(1), grey([1] * 4), grey(COLUMNS), torch.ones(1)
    with pytest.raises(ValueError, match="mode = 'mixed' is not known"):
        composite(*args, "mixed", 0.5)
    with pytest.raises(ValueError, match="fidelity = 'exact' is not known"):
        composite(*args, "plain", 0.5, "exact")


@pytest.mark.parametrize("ids", [[-1], [3, -5], [[0, 1]], 3, [0.5], np.zeros(2), [True]])
def test_wrong_ids_are_refused(ids):
    """Negative ids would wrap to other episodes silently; floats lose digits beyond 2^53."""
    with pytest.raises(ValueError, match="episode_ids = .* 1-d array of integers >= 0"):
        decode("main", "train", ids)


def test_wrong_images_are_refused():
    """A broadcast shape or float image would give an image, but the wrong one."""
    rgb, mask, background, texture, mix = grey([1] * 4), columns(1), grey([1] * 4), grey(COLUMNS), torch.ones(1)
    with pytest.raises(ValueError, match="rgb is .*torch.float32.* asks for .*torch.uint8"):
        composite(rgb.float(), mask, background, texture, mix, "texture", 0.5)
    with pytest.raises(ValueError, match=r"background is \(1, 3, 3, 3,.* asks for \(1, 3, 4, 3,"):
        composite(rgb, mask, background[:, :, :3], None, None, "plain", 0.5)
    with pytest.raises(ValueError, match="texture is None"):
        composite(rgb, mask, background, None, mix, "whole", 0.5)
    with pytest.raises(ValueError):
        composite(rgb, mask, background, texture, torch.ones(2), "whole", 0.5)
