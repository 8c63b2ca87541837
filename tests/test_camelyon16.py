"""camelyon16 on small slides in the source's format: BigTIFF pyramids of JPEG tiles, with ASAP annotations."""

import csv
import io
import shutil
import struct
from collections import Counter

import numpy as np
import openslide
import pytest
from conftest import files_of, load_script, run_here
from PIL import Image, ImageDraw

camelyon16 = load_script("datasets/camelyon16.py")

TISSUE = (300, 200, 1700, 1300)  # left, top, right, bottom of the tissue on a slide
TUMOUR = [(400.5, 300), (1100, 350), (1000, 1000), (700, 760), (400, 1000)]  # not convex
EXCLUDED = [(600, 400), (800, 400), (800, 600), (600, 600)]
TRAIN, TESTS = ["normal_001", "Normal_2"], ["test_001", "test_002", "test_003", "test_005"]


def write_slide(file, seed, tissue=TISSUE):
    """A slide of 2048x1536 pixels: glass, tissue with a fine texture, an unscanned area (black); six levels to 1:32."""
    rng = np.random.default_rng(seed)
    picture = np.full((1536, 2048, 3), 238, np.uint8)
    picture[1400:] = 0
    left, top, right, bottom = tissue
    texture = rng.integers(-30, 30, ((bottom - top) // 20, (right - left) // 20, 1)).repeat(20, 0).repeat(20, 1)
    picture[top:bottom, left:right] = np.array([190, 120, 175]) + texture
    data, directories = bytearray(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0)), []
    for level in range(6):
        width, height = 2048 >> level, 1536 >> level
        small, tiles = Image.fromarray(picture).resize((width, height), Image.Resampling.BOX), []
        for box in [(x, y, x + 512, y + 512) for y in range(0, height, 512) for x in range(0, width, 512)]:
            buffer = io.BytesIO()
            small.crop(box).save(buffer, "JPEG", quality=95, subsampling=0)
            tiles.append((len(data), len(buffer.getvalue())))
            data += buffer.getvalue()
        offsets, sizes = zip(*tiles, strict=True)
        directories.append([(254, [int(level > 0)]), (256, [width]), (257, [height]), (258, [8, 8, 8]), (259, [7]),
                            (262, [6]), (277, [3]), (284, [1]), (322, [512]), (323, [512]), (324, offsets),
                            (325, sizes), (530, [1, 1])])  # (tag, values): JPEG tiles in YCbCr, not subsampled
    link = 8  # where the place of the next directory is written
    for tags in directories:
        entries = bytearray()
        for tag, values in tags:
            kind, form = (16, "Q") if tag in (324, 325) else (3, "H")
            value = struct.pack(f"<{len(values)}{form}", *values)
            if len(value) > 8:
                value, place = struct.pack("<Q", len(data)), value
                data += place
            entries += struct.pack("<HHQ", tag, kind, len(values)) + value.ljust(8, b"\0")
        data[link : link + 8] = struct.pack("<Q", len(data))
        data += struct.pack("<Q", len(tags)) + entries + bytes(8)
        link = len(data) - 8
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return picture


def write_annotation(file, polygons):
    """polygons: [(group, [(x, y), ...])]"""
    annotations = "".join(
        f'<Annotation Name="Annotation {n}" Type="Polygon" PartOfGroup="{group}" Color="#F4FA58"><Coordinates>'
        + "".join(f'<Coordinate Order="{k}" X="{x}" Y="{y}" />' for k, (x, y) in enumerate(polygon))
        + "</Coordinates></Annotation>" for n, (group, polygon) in enumerate(polygons))
    groups = '<AnnotationGroups><Group Name="_0" PartOfGroup="None"><Attributes /></Group></AnnotationGroups>'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>{annotations}</Annotations>{groups}'
                    "</ASAP_Annotations>")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two normal training slides and four test slides, test_001 and test_002 of them with tumour."""
    raw = tmp_path_factory.mktemp("CAMELYON16")
    for seed, name in enumerate(TRAIN + TESTS):
        folder = "training/normal" if name in TRAIN else "testing/images"
        write_slide(raw / folder / f"{name}.tif", seed)
    write_annotation(raw / "testing/lesion_annotations/test_001.xml", [("_0", TUMOUR), ("_2", EXCLUDED)])
    write_annotation(raw / "testing/lesion_annotations/test_002.xml", [("Tumor", TUMOUR), ("Exclusion", EXCLUDED)])
    (raw / "testing/evaluation_masks").mkdir()
    (raw / "testing/evaluation_masks/test_001.tif").write_bytes(b"a mask, no slide")
    return raw


def prepare(raw, root, *more):
    return run_here("datasets/camelyon16.py", "--raw", raw, "--root", root, "--workers", 2, *more)


def manifest(root):
    with open(root / "histo" / "camelyon16.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    done = prepare(source, root)
    assert done.returncode == 0, done.stderr
    return root


def in_polygon(polygon):
    """bool (1536, 2048): the pixels in a polygon, as another implementation draws it."""
    picture = Image.new("1", (2048, 1536))
    ImageDraw.Draw(picture).polygon(polygon, fill=1)
    return np.asarray(picture)


def test_the_whole_source_gives_the_published_counts_from_the_published_slides():
    names = [f"normal_{n:03}" for n in range(1, 161)] + [f"test_{n:03}" for n in range(1, 131)]
    slides = {name: ["file", "xml" if name in camelyon16.TUMOUR else None] for name in names
              if name not in camelyon16.LEFT_OUT}
    splits = camelyon16.plan({name: files[1] for name, files in slides.items()})
    assert Counter(splits.values()) == dict(train=159, valid=13, test=115)
    assert {slide for slide, split in splits.items() if split == "valid"} == camelyon16.VALID
    tumours = Counter(splits[slide] for slide in slides if slides[slide][1])
    assert tumours == dict(valid=5, test=43)
    found = {}
    for number, slide in enumerate(slides):  # two thirds of the slides with tumour show little of it
        normal, tumour = 32 if slide.startswith("normal") else 100, 7 if number % 3 else 100
        found[slide] = [[[k, 0] for k in range(n)] for n in (normal, tumour * bool(slides[slide][1]))]
    patches = camelyon16.choose(splits, found, 0)
    counts = Counter((split, label) for chosen in patches.values() for split, label, *_ in chosen)
    assert counts == camelyon16.PUBLISHED
    assert all({split for split, *_ in chosen} == {splits[slide]} for slide, chosen in patches.items())
    normal = [sum(1 - label for _, label, *_ in patches[slide]) for slide in slides if splits[slide] == "test"]
    assert set(normal) == {8, 9}  # 1,000 from 115 slides


def test_what_slides_cannot_give_comes_from_the_others():
    assert camelyon16.share_out(10, dict(a=1, b=100, c=100, d=0), 0) in (dict(a=1, b=4, c=5, d=0),
                                                                        dict(a=1, b=5, c=4, d=0))
    assert camelyon16.share_out(10, dict(a=1, b=2), 0) == dict(a=1, b=2)


def test_every_patch_lies_where_its_label_says(made, source):
    rows, tumour, excluded = manifest(made), in_polygon(TUMOUR), in_polygon(EXCLUDED)
    assert {r["case"]: r["split"] for r in rows} == dict(
        normal_001="train", normal_002="train", test_001="test", test_002="valid", test_003="test", test_005="valid")
    assert {(r["split"], r["label"]) for r in rows} == {("train", "0"), ("valid", "0"), ("valid", "1"), ("test", "0"),
                                                        ("test", "1")}
    left, top, right, bottom = TISSUE
    for row in rows:
        x, y = int(row["x"]), int(row["y"])
        area = slice(y - 128, y + 128), slice(x - 128, x + 128)
        width, height = min(right, x + 128) - max(left, x - 128), min(bottom, y + 128) - max(top, y - 128)
        assert width > 0 and height > 0 and width * height >= 0.45 * 256**2  # the tissue is found on 1:32
        if row["label"] == "1":
            assert tumour[y, x] and not excluded[y, x]
        elif row["case"] in ("test_001", "test_002"):
            assert not tumour[area].any() and not excluded[area].any()
    for one, other in [(a, b) for a in rows for b in rows if a is not b]:
        if (one["case"], one["label"]) == (other["case"], other["label"]):
            assert max(abs(int(one[k]) - int(other[k])) for k in "xy") >= 256
    assert sum(r["label"] == "1" for r in rows) >= 6


def test_inside_and_outline_are_exact():
    xs, ys = 128 + 64 * np.arange(28), 128 + 64 * np.arange(20)
    polygon, mask = np.array(TUMOUR), in_polygon(TUMOUR)
    assert (camelyon16.inside(polygon, xs, ys) == mask[np.ix_(ys, xs)]).all()
    meets = camelyon16.outline(polygon, (20, 28)) | camelyon16.inside(polygon, xs, ys)
    for margin, at_least in ((0, True), (6, False)):  # 4 pixels to spare, not more than 6
        half = 128 + margin
        patches = np.array([[mask[max(0, y - half) : y + half, max(0, x - half) : x + half].any() for x in xs]
                            for y in ys])
        assert (meets >= patches).all() if at_least else (meets <= patches).all()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_patches(made, source, tmp_path):
    assert prepare(source, tmp_path / "same").returncode == 0
    assert files_of(tmp_path / "same") == files_of(made)
    slide = "test_003", [str(source / "testing/images/test_003.tif"), None]
    assert camelyon16.find_patches((*slide, 0), None) != camelyon16.find_patches((*slide, 1), None)


def test_a_list_of_coordinates_gives_exactly_its_patches(source, tmp_path):
    lists = {"train_good.txt": ["normal_001,640,512", "Normal_002,333,700"], "valid_good.txt": ["test_005,500,500"],
             "valid_bad.txt": ["test_002,640,640"], "test_normal.csv": ["slide,x_center,y_center", "test_001,1300,701"],
             "test_tumor.csv": ["test_001,500,500", "", ""]}  # the published files have empty lines
    for name, lines in lists.items():
        (tmp_path / name).write_text("\n".join(lines))
    done = prepare(source, tmp_path / "data", "--coords", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = manifest(tmp_path / "data")
    assert [(r["split"], r["label"], r["case"], r["x"], r["y"]) for r in rows] == [
        ("train", "0", "normal_001", "640", "512"), ("train", "0", "normal_002", "333", "700"),
        ("valid", "0", "test_005", "500", "500"), ("valid", "1", "test_002", "640", "640"),
        ("test", "0", "test_001", "1300", "701"), ("test", "1", "test_001", "500", "500")]
    drawn = write_slide(tmp_path / "again.tif", 1)
    with openslide.OpenSlide(tmp_path / "again.tif") as slide:  # the same as normal_002
        read = np.asarray(slide.read_region((333 - 128, 700 - 128), 0, (256, 256)).convert("RGB"))
    patch = np.asarray(Image.open(tmp_path / "data" / "histo" / rows[1]["image"]))
    assert patch.shape == (256, 256, 3) and (patch == read).all()
    assert np.abs(patch.astype(int) - drawn[572:828, 205:461]).mean() < 2  # JPEG
    (tmp_path / "test_tumor.csv").write_text("test_009,500,500\ntest_001,500,500\ntest_003,10,10")
    done = prepare(source, tmp_path / "more", "--coords", tmp_path)
    assert done.returncode == 1 and "no test_009.tif" in done.stderr and "at 10,10" in done.stderr
    (tmp_path / "test_tumor.csv").write_text("test_001,500")
    done = prepare(source, tmp_path / "wrong", "--coords", tmp_path)
    assert done.returncode == 2 and "test_tumor.csv, line 1" in done.stderr and done.stderr.count("\n") == 1


def test_the_list_of_slides_says_which_are_valid(source, tmp_path):
    (tmp_path / "slides.csv").write_text("case,split\ntest_001,valid\ntest_002,test\n")
    assert prepare(source, tmp_path / "data", "--slides", tmp_path / "slides.csv").returncode == 0
    assert {r["case"]: r["split"] for r in manifest(tmp_path / "data")} == dict(
        normal_001="train", normal_002="train", test_001="valid", test_002="test")


def test_damaged_slides_and_annotations_are_named_and_the_rest_goes_on(source, tmp_path):
    shutil.copytree(source, tmp_path / "raw")
    images = tmp_path / "raw/testing/images"
    whole = (images / "test_003.tif").read_bytes()
    (images / "test_003.tif").write_bytes(whole[: len(whole) // 2])
    broken = bytearray(whole)  # its directories and low levels are whole: seen only when patches are read
    broken[16 : len(whole) // 2] = bytes(len(whole) // 2 - 16)
    (tmp_path / "raw/training/normal/normal_003.tif").write_bytes(broken)
    (tmp_path / "raw/testing/lesion_annotations/test_002.xml").write_text("<ASAP_Annotations><Annotations>")
    write_annotation(tmp_path / "raw/testing/lesion_annotations/test_006.xml", [("elsewhere", TUMOUR)])
    write_slide(images / "test_006.tif", 9)
    write_slide(images / "test_004.tif", 10)  # known to show tumour
    write_slide(images / "test_007.tif", 11, tissue=(0, 0, 0, 0))
    done = prepare(tmp_path / "raw", tmp_path / "data")
    lines = [line for line in done.stderr.splitlines() if line.startswith("damaged: ")]
    wrong = ["test_003.tif is not a readable slide", "normal_003.tif is not a readable slide",
             "test_002.xml is not a readable ASAP annotation", "test_006.xml has no polygon of the groups",
             "test_004.tif shows tumour but has no annotation", "test_007.tif shows no tissue"]
    assert done.returncode == 1 and len(lines) == len(wrong), done.stderr
    assert all(sum(what in line for line in lines) == 1 for what in wrong), done.stderr
    rows = manifest(tmp_path / "data")
    assert {r["case"] for r in rows} == {"normal_001", "normal_002", "test_001", "test_005"}
    written = {str(p) for p in files_of(tmp_path / "data/histo") if p.suffix == ".png"}
    assert written == {r["image"] for r in rows}


def test_a_source_without_tumour_or_with_a_slide_twice_is_one_line(source, tmp_path):
    shutil.copytree(source / "training", tmp_path / "raw/training")
    done = prepare(tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "0 test slides" in done.stderr
    shutil.copytree(source / "training", tmp_path / "raw/training_copy")
    done = prepare(tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "are both normal_00" in done.stderr
