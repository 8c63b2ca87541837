"""Metrics, layouts and decoding against slow references, on inputs that hypothesis makes up: 50 of each, 2,000 in the
long tier, the same ones each time."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import common


def examples(count):
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def tiers(test):
    """The test `test(inputs)` with 50 examples, and with 2,000 in the long tier."""
    return pytest.mark.parametrize("count", [50, pytest.param(2000, marks=pytest.mark.long)])(test)


# -------------------------------------------------------------------------------------------------------------- metrics
@st.composite
def scored_maps(draw):
    """(maps (N, H, W), masks): few distinct scores or many, of one sign or both, from sparse to full masks."""
    n, h, w = (draw(st.integers(1, most)) for most in (3, 6, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    masks = rng.random((n, h, w)) < draw(st.sampled_from([0.05, 0.3, 0.7, 1]))
    maps = rng.normal(size=masks.shape) + draw(st.sampled_from([0, 1, 5])) * masks
    steps = draw(st.sampled_from([None, 1, 3, 10]))  # None: hardly any ties
    maps = maps if steps is None else np.round(steps * maps) / steps
    return np.float32(draw(st.sampled_from([1, 1e-6, 1e6])) * maps + draw(st.sampled_from([0, -7]))), masks


def regions_of(mask):
    """The 8-connected regions of a mask as lists of (row, column), by filling from each pixel in turn."""
    left, regions = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        region, edge = [], [left.pop()]
        while edge:
            y, x = edge.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        regions.append(region)
    return regions


def slow_aupro(maps, masks):
    """Eq. 3.2 of the thesis with every score as a threshold, region by region; area to 30% by trapezoids."""
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        over = maps >= threshold
        overlaps = [np.mean([over[i][pixel] for pixel in region])
                    for i, mask in enumerate(masks) for region in regions_of(mask)]
        points.append(((over & ~masks).sum() / (~masks).sum(), np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 < 0.3 and x1 > x0:
            end = min(x1, 0.3)
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / 0.3


def slow_dice(maps, masks, over):
    tp = sum(bool(o and m) for o, m in zip(over.ravel(), masks.ravel(), strict=True))
    return 2 * tp / (over.sum() + masks.sum())


@tiers
def test_pixel_metrics_equal_plain_loops(count):
    @examples(count)
    @given(scored_maps(), scored_maps())
    def holds(case, valid):
        (maps, masks), (other, truth) = case, valid
        assume(masks.any() and not masks.all() and truth.any() and not truth.all())
        chosen = common.PixelMetrics(other.size)
        chosen.update(other, truth)
        chosen.compute()
        best = max(slow_dice(other, truth, other >= t) for t in set(other.ravel().tolist()))
        assert slow_dice(other, truth, other >= np.float32(chosen.best)) == pytest.approx(best, abs=1e-12)
        pixel = common.PixelMetrics(maps.size, chosen.best)
        for start in range(0, len(maps), 2):
            pixel.update(maps[start : start + 2], masks[start : start + 2])
        found, middle = pixel.compute(), (float(maps.min()) + float(maps.max())) / 2
        assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)
        assert found["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-9)
        assert found["aupro"] == pytest.approx(slow_aupro(maps, masks), abs=1e-9)
        assert found["dice_valid"] == pytest.approx(slow_dice(maps, masks, maps >= np.float32(chosen.best)), abs=1e-12)
        either = {slow_dice(maps, masks, maps > np.float32(middle)), slow_dice(maps, masks, maps > middle)}
        assert any(found["dice"] == pytest.approx(dice, abs=1e-12) for dice in either)  # rounded to float32, or not

    holds()


@tiers
def test_image_metrics_equal_a_count_of_pairs(count):
    @examples(count)
    @given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30))
    def holds(rows):
        labels, scores = (np.array(column) for column in zip(*rows, strict=True))
        assume(0 < labels.sum() < len(labels))
        pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
        found = common.image_metrics(labels.astype(int), scores.astype(float))
        assert found["image_auroc"] == pytest.approx(np.mean(pairs))

    holds()


# -------------------------------------------------------------------------------------------------------------- layouts
NAMES = st.text("ab1_.", min_size=1, max_size=4).filter(lambda name: name[0] not in "._" and "_mask" not in name)
SPLIT_NAMES = {"train": ["train", "Train"], "valid": ["valid", "Val", "validation"], "test": ["test", "TEST"]}


@st.composite
def layouts(draw):
    """({file below the benchmark: (split, label, which mask or None)}, all mask files), in one of the layouts."""
    mvtec, masked = draw(st.booleans()), draw(st.booleans())
    images, masks = {}, []
    for split, spellings in SPLIT_NAMES.items():
        if mvtec and split == "valid":
            continue
        folder, nested = draw(st.sampled_from(spellings)), draw(st.sampled_from(["", "/img"]))
        kinds = [("good" if mvtec else draw(st.sampled_from(["good", "normal", "Good"])), 0)]
        if split != "train":
            defects = draw(st.lists(st.sampled_from(["crack", "hole", "cut"]), min_size=1, max_size=2, unique=True))
            kinds += [(name, 1) for name in (defects if mvtec else [draw(st.sampled_from(["Ungood", "abnormal"]))])]
        for kind, label in kinds:
            for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique_by=str.lower)):
                mask = None
                if label and masked:
                    mask = (f"ground_truth/{kind}/{name}_mask.png" if mvtec else
                            f"{folder}/{kind}/{draw(st.sampled_from(['anomaly_mask', 'label']))}/{name}.png")
                    masks.append(mask)
                inner = "" if mvtec else nested if not (label and masked) else "/img"
                images[f"{folder}/{kind}{inner}/{name}.{draw(st.sampled_from(['png', 'jpg', 'TIF']))}"] = \
                    (split, label, mask)
    return images, masks


@tiers
def test_every_image_of_a_layout_is_listed_once_with_its_label_and_mask(count):
    @examples(count)
    @given(layouts())
    def holds(layout):
        images, masks = layout
        with tempfile.TemporaryDirectory() as folder:
            for file in [*images, *masks, "readme.txt", ".hidden/train/good/a.png"]:
                Path(folder, file).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, file).touch()
            _, parts = common.find_benchmark(folder, folder)
            found = {}
            for split in common.SPLITS:
                for image, label, mask in common.list_split(parts, split):
                    name = image.relative_to(folder).as_posix()
                    assert name not in found
                    found[name] = split, label, mask and mask.relative_to(folder).as_posix()
        assert found == images

    holds()


# ------------------------------------------------------------------------------------------------------------- decoding
@st.composite
def pictures(draw):
    """(a Pillow image, its suffix, what `decode` should give (3, H, W)): modes, bit depths, alpha, palettes, sizes."""
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    written = dict.fromkeys(("1", "L", "RGB", "RGBA", "P"), ("png", "tif", "bmp"))
    written |= {"LA": ("png", "tif"), "16": ("png", "tif"), "32": ("tif",)}
    mode = draw(st.sampled_from(list(written)))
    suffix = draw(st.sampled_from(written[mode]))
    if mode in ("16", "32"):
        values = rng.integers(0, 65536, (h, w)).astype(np.uint16 if mode == "16" else np.int32)
        return Image.fromarray(values), suffix, np.rint(np.tile(values / 257, (3, 1, 1))).astype(np.uint8)
    if mode == "P":
        colours, index = rng.integers(0, 256, (8, 3)).astype(np.uint8), rng.integers(0, 8, (h, w)).astype(np.uint8)
        image = Image.fromarray(index).convert("P")
        image.putpalette(colours.ravel().tolist())
        return image, suffix, colours[index].transpose(2, 0, 1)
    bands = len(mode) if mode != "1" else 1
    values = rng.integers(0, 256, (h, w, bands)).astype(np.uint8)
    if mode == "1":
        image, grey = Image.fromarray(values[..., 0] > 127), (values[..., 0] > 127) * np.uint8(255)
        return image, suffix, np.tile(grey, (3, 1, 1))
    image = Image.fromarray(values.squeeze(2) if bands == 1 else values)
    colours = values[..., [0, 0, 0]] if mode in ("L", "LA") else values[..., :3]
    return image, suffix, colours.transpose(2, 0, 1)


@tiers
def test_every_kind_of_image_decodes_to_its_values(count):
    @examples(count)
    @given(pictures(), st.sampled_from([None, 3, 8]))
    def holds(picture, size):
        image, suffix, expected = picture
        with tempfile.TemporaryDirectory() as folder:
            image.save(Path(folder, f"x.{suffix}"))
            found, original = common.decode(Path(folder, f"x.{suffix}"), size)
        assert original == image.size and found.dtype == np.uint8
        if size is None:
            assert np.array_equal(found, expected)
        else:  # Pillow's own filter on the values, a channel at a time, in float
            channels = [Image.fromarray(c.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
                        for c in expected]
            assert np.abs(found - np.stack([np.asarray(c) for c in channels])).max() <= 1.01

    holds()


@tiers
def test_every_kind_of_mask_marks_what_is_above_a_tenth_and_not_transparent(count):
    @examples(count)
    @given(pictures(), st.integers(1, 9))
    def holds(picture, size):
        image, suffix, expected = picture
        assume(not (suffix == "bmp" and image.mode == "RGBA"))  # not every version of Pillow writes its alpha
        alpha = np.asarray(image.getchannel("A"), float) / 255 if "A" in image.getbands() else 1.0
        values = expected.max(axis=0) * alpha
        assume((np.abs(values - 25.5) > 1).all())  # what rounding may turn either way, as the middle between two pixels
        assume(not any((2 * k + 1) * n % (2 * size) == 0 for n in image.size for k in range(size)))
        marked = values > 25.5
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"x.{suffix}")
            image.save(file)
            if not marked.any():
                with pytest.raises(common.Error, match="10% of full scale"):
                    common.decode_mask(file, image.size, size)
                return
            found = common.decode_mask(file, image.size, size)
            with pytest.raises(common.Error, match="make them equal"):
                common.decode_mask(file, (image.width + 1, image.height), size)
        rows, columns = (((np.arange(size) + 0.5) * n / size).astype(int) for n in marked.shape)
        assert found.shape == (1, size, size) and np.array_equal(found[0], marked[np.ix_(rows, columns)])

    holds()
