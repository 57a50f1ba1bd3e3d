"""Task table, episode ids, instructions and compositing: published counts, and by hand."""

import itertools
import zlib

import numpy as np
import pytest
import torch

from common.simulation import tasks
from common.simulation.tasks import TASKS, composite, decode, instruction, num_configurations

IDS = """Main-v3 Single-v1 MainCarrot-v3 MainImage-v3 VisionImage-v1 VisionTexture03-v1
    VisionTexture05-v1 VisionWhole03-v1 VisionWhole05-v1 Carrot-v1 Instruct-v1 Plate-v1
    MultiCarrot-v1 MultiPlate-v1 Position-v1 EEPose-v1 PositionChangeTo-v1"""
# Published number of configurations, train and test
COUNTS = """802816 141120 3136 3136 50176 28224 50176 15680 802816 250880 802816 12845056 802816
    12845056 802816 12845056 802816 12845056 802816 451584 802816 12845056 802816 12845056 32317440
    9695232 45244416 678666240 802816 643072 802816 11540480000 2154496 2154496"""

# What 1,000 ids mean in the modes published and fixed, for each task of the table; frozen when
# a second decoder, by hand, agreed. They hold the quirks that one mode keeps and the other mends
CHECKSUMS = """1577469431 1577469431 3673414287 3673414287 2476937515 2476937515 1320136722
    1320136722 1381395788 1381395788 1923462365 1923462365 1923462365 1923462365 1923462365
    1923462365 1923462365 1923462365 764255188 764255188 1203559195 3073106533 2389174744
    2389174744 1957462696 1390193725 212159046 1676303749 2797177773 2797177773 3867546089
    3867546089 402222274 402222274"""


def test_tables_are_the_published_benchmark():
    """Stops a missing task, id or letter, a range that changes a count, a mistyped figure."""
    assert [row.published_id for row in TASKS.values()] == IDS.split()
    splits = itertools.product(TASKS, ("train", "test"))
    counts = [num_configurations(name, split, "published") for name, split in splits]
    assert counts == [int(count) for count in COUNTS.split()]
    assert {row.move_at for row in TASKS.values()} == {(None, None), (None, 5)}
    texts = "|".join(instruction(k, "BBQ sauce", "bowl") for k in range(21))
    assert instruction(13, "BBQ sauce", "bowl") == "Move BBQ sauce so it\u2019s on bowl."
    assert zlib.crc32(texts.encode()) == 3675423464
    means = {"id": (78.1, 93.8), "vision": (64.2, 76.6), "semantics": (54.0, 72.8)}
    means["execution"] = (39.8, 78.3)
    for dimension, want in means.items():
        figures = np.array([row[4:] for row in tasks.REPORT_ROWS if row[1] == dimension])
        np.testing.assert_allclose(100 * figures.mean(axis=0), want, atol=0.051)
    rows = [row[2:4] for row in tasks.REPORT_ROWS]
    assert len(set(rows)) == 16 and all(task in TASKS for task, _ in rows)
    seen = [task for task, split in rows if split == "train"]
    assert seen == ["carrot", "multi_carrot", "multi_plate"]


@pytest.mark.parametrize("number, name", list(enumerate(TASKS)))
def test_ids_mean_the_published_episodes(number, name):
    """Stops a swapped digit, a lost offset or quirk, another order or rounding, an overflow."""
    found = []
    for fidelity in ("published", "fixed"):
        parts = []
        for split in ("train", "test"):
            n = num_configurations(name, split, fidelity)
            episodes = decode(name, split, np.arange(500) * int(0.618 * n) % n, fidelity)
            arrays = [x for x in vars(episodes).values() if isinstance(x, np.ndarray)]
            assert {str(x.dtype) for x in arrays} == {"int64", "float32"}
            parts += [x.astype(np.float64).ravel() for x in arrays]
        values = np.concatenate(parts).round(4) + 0.0  # -0.0 becomes 0.0
        found.append(str(zlib.crc32(values.tobytes())))
    assert found == CHECKSUMS.split()[2 * number : 2 * number + 2]


def test_an_id_alone_fixes_the_episode():
    """Stops an episode that depends on the batch, the order or the integer type; ids wrap."""
    n = num_configurations("ee_pose", "test")
    ids = np.array([7, n - 1, 5_000_000_000])
    episodes = decode("ee_pose", "test", ids)
    for other in (ids + n, (ids + n * 10**8).astype(np.uint64)):
        again = decode("ee_pose", "test", other)
        np.testing.assert_array_equal(again.arm_offset, episodes.arm_offset)
    for i in range(3):
        alone = decode("ee_pose", "test", ids[[i]])
        for key in ("object", "table", "object_xyz", "object_quat", "plate_xyz", "arm_offset"):
            np.testing.assert_array_equal(getattr(alone, key)[0], getattr(episodes, key)[i])


COLUMNS = torch.tensor([0, 80, 160, 240])


def grey(values, height=3):
    """(1, height, W, 3) uint8 whose rows are `values`."""
    values = torch.as_tensor(values, dtype=torch.uint8)
    return values[None, None, :, None].repeat(1, height, 1, 3)


def columns(*shown, width=4, height=3):
    """(1, height, width) bool foreground that covers whole columns."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, :, list(shown)] = True
    return mask


def first_row(image):
    assert (image == image[:, :1, :, :1]).all()  # these images only vary along a row
    return image[0, 0, :, 0].tolist()


def composite_row(*args):
    """First row of the composite: the same for rows as for columns, and no input is written to."""
    before = [x.clone() for x in args if torch.is_tensor(x)]
    image = composite(*args)
    after = [x for x in args if torch.is_tensor(x)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    turned = [x.transpose(1, 2) if torch.is_tensor(x) and x.ndim > 1 else x for x in args]
    assert torch.equal(composite(*turned).transpose(1, 2), image)
    return first_row(image)


def test_what_is_not_blended():
    """Stops a train split that does not look like main: texture 0 has mix 0; `plain` needs none."""
    rgb, background, mix = grey([10, 20, 30, 40]), grey([1, 2, 3, 4]), torch.zeros(1)
    for mode, texture in (("plain", None), ("texture", grey(COLUMNS)), ("whole", grey(COLUMNS))):
        for mask, want in ((columns(1, 3), [1, 20, 3, 40]), (columns(), [1, 2, 3, 4])):
            assert composite_row(rgb, mask, background, texture, mix, mode, 0.5) == want


@pytest.mark.parametrize("fidelity", ["fixed", "published"])
@pytest.mark.parametrize("ratio, want", [(0.3, [35, 8, 118, 114]), (0.5, [25, 8, 130, 150])])
def test_texture_tints_the_foreground_only(ratio, want, fidelity):
    """By hand: ratio * (0, 80, 160, 240) + (1 - ratio) * rgb, truncated; column 1 stays clean."""
    rgb, background = grey([51, 50, 101, 61]), grey([7, 8, 9, 10])
    images = rgb, columns(0, 2, 3), background, grey(COLUMNS), torch.ones(1)
    assert composite_row(*images, "texture", ratio, fidelity) == want


def test_quirk_texture_of_the_largest_box_in_the_batch():
    """Published: an image changes with its neighbours. Fixed: not. Box 2 wide beside 4 wide."""
    images = [grey(row).repeat(2, 1, 1, 1) for row in ([0] * 4, [7] * 4, COLUMNS)]
    rgb, background, texture = images
    mask = torch.cat([columns(1, 2), columns(0, 1, 2, 3)])
    args = rgb, mask, background, texture, torch.ones(2), "texture", 1.0
    fixed, published = (composite(*args, fidelity) for fidelity in ("fixed", "published"))
    assert first_row(fixed[:1]) == [7, 40, 200, 7]  # 4 -> 2 wide: means of pairs
    assert first_row(published[:1]) == [7, 0, 80, 7]  # left part of the texture at 4 wide
    assert first_row(fixed[1:]) == first_row(published[1:]) == COLUMNS.tolist()


@pytest.mark.parametrize("ratio, want", [(0.3, [25, 37, 56, 61]), (1.0, [60, 100, 140, 180])])
def test_whole_blends_a_window_that_follows_the_foreground(ratio, want):
    """Stops another resize, or another window than that of the foreground's box."""
    # Doubled as by OpenCV, the row is 0 20 60 100 140 180 220 240; columns 2, 3 put the window at 2
    # By hand: ratio * window + (1 - ratio) * (11, 11, 21, 11), truncated, everywhere
    images = grey([0, 0, 21, 11]), columns(2, 3), grey([11] * 4), grey(COLUMNS), torch.ones(1)
    assert composite_row(*images, "whole", ratio) == want
    without = images[0], columns(), *images[2:]
    assert composite_row(*without, "whole", 1.0) == [20, 60, 100, 140]  # the corner is at least 1


def test_bad_input_is_refused(monkeypatch):
    """Stops a typing error that becomes a default, ids that wrap, and images that are broadcast."""
    for change in (dict(move_at=(None, 5)), dict(extra="object", extras=tasks.OBJECTS)):
        monkeypatch.setitem(TASKS, "own", tasks.Task("own", "", **change))
        with pytest.raises(ValueError, match="own: .* needs positions TC or TP"):
            num_configurations("own", "test")
    for where in (("mian", "train"), ("main", "val"), ("main", "train", "exact")):
        with pytest.raises(ValueError, match="'(mian|val|exact)' is not known"):
            num_configurations(*where)
    for ids in ([-1], [3, -5], [[0, 1]], 3, [0.5], np.zeros(2), [True]):
        with pytest.raises(ValueError, match="episode_ids = "):
            decode("main", "train", ids)
    good = [grey([1] * 4), columns(1), grey([1] * 4), grey(COLUMNS), torch.ones(1)]
    for place, bad in ((0, good[0].float()), (2, good[2][:, :, :3]), (3, good[3][:, :2])):
        images = [*good[:place], bad, *good[place + 1 :]]
        with pytest.raises(AssertionError):
            composite(*images, "whole", 0.5)
