"""histo: the histopathology benchmark from Camelyon16 (whole-slide images of lymph nodes, with and without metastases).

Source: AWS Registry of Open Data or GigaDB, linked from camelyon17.grand-challenge.org/Data; CC0 1.0, public domain. Of
the 700 GB, the script reads only the normal training slides, the test slides and the test annotations.
--raw: a folder with normal_001.tif ... normal_160.tif (training/normal), test_001.tif ... test_130.tif (testing/images)
and test_001.xml ... (testing/lesion_annotations, unpacked), at any depth. A test slide without an XML file has no
tumour. The 49 test slides with tumour are known: if one of them lacks its XML file, it is reported as damaged. If the
folder also contains the source's list of checksums (checksums.md5), all files are verified against it. Without the
list, damage to a slide's JPEG data or to the numbers in an XML file is not detected.

Protocol, for patches of 256x256 pixels at level 0:
1. Train consists of the 159 normal training slides other than normal_086, which shows tumour and was withdrawn. Of the
   test slides, 13 (5 with tumour) are in valid and 115 in test; test_049 (a withdrawn duplicate) and test_114 (its
   tumour is only partly annotated) are left out.
2. At the level nearest to 1:32, tissue consists of the pixels whose chroma (maximum minus minimum of R, G, B) is above
   Otsu's threshold. Unlike saturation, chroma is also small in black, unscanned areas. Patch centres lie on a grid with
   a spacing of 64 pixels, and at least half of each patch is tissue.
3. The centre of a tumour patch is inside a tumour polygon (groups _0, _1, Tumor, metastases) and outside the excluded
   polygons (_2, Exclusion). A normal patch lies completely outside all polygons.
4. Patches are drawn at random, with a separate seed for each slide, and do not overlap. Each training slide contributes
   32 patches. Valid has 100 normal and 100 tumour patches, test 1,000 and 1,000, spread over the slides as evenly as
   possible, with at most 100 per class and slide. Patches from other slides replace those of a damaged slide.

A smaller source is divided in the same proportions, separately for test slides with and without tumour; those with the
highest numbers go to valid. --slides FILE (CSV: case,split) replaces this division of the test slides.

--coords FOLDER reads the patch centres from lists instead: files train_good, valid_good, valid_bad, test_good and
test_bad (.txt or .csv; good may be spelled normal, bad tumor) with lines slide,x_center,y_center. The authors' lists
are in data_processing/histopathology/coords of github.com/DorisBao/BMAD. They have 5,088 patches in train, 117 + 105 in
valid and 1,026 + 1,008 in test (none from test_125); the thesis gives round numbers. The lists agree with the
protocol above in the slides of each split, the 64-pixel grid, the absence of overlap and 32 patches per training slide.
Published counts (normal + anomalous): train 5,088; valid 100 + 100; test 1,000 + 1,000 (about 0.9 GB).
"""

import csv
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide

sys.path.insert(0, str(Path(__file__).resolve().parent))
import prepare
from prepare import common

SIZE, STEP = 256, 64  # pixels: patch size and grid spacing of the patch centres
MIN_COLOUR = 15  # minimum chroma (of 255): a lower Otsu threshold would only split an empty slide's noise
LEFT_OUT = {"normal_086", "test_049", "test_114"}
VALID = {f"test_{n}" for n in (113, 116, 117, 120, 121, 122, 123, 124, 126, 127, 128, 129, 130)}
TUMOUR = {f"test_{n:03}" for n in (
    1, 2, 4, 8, 10, 11, 13, 16, 21, 26, 27, 29, 30, 33, 38, 40, 46, 48, 51, 52, 61, 64, 65, 66, 68, 69, 71, 73, 74, 75,
    79, 82, 84, 90, 92, 94, 97, 99, 102, 104, 105, 108, 110, 113, 114, 116, 117, 121, 122)}
TUMOUR_GROUPS, EXCLUDED_GROUPS = {"_0", "_1", "tumor", "metastases"}, {"_2", "exclusion"}
PER_TRAINING_SLIDE, PER_TEST_SLIDE = 32, 100  # maximum number of patches per class
PUBLISHED = {("train", 0): 5088, ("valid", 0): 100, ("valid", 1): 100, ("test", 0): 1000, ("test", 1): 1000}
MEMORY = 0.4  # GiB per process: tissue of a slide of 100,000x200,000 pixels, and OpenSlide's cache
LOOKED_FOR = "slides like training/normal/normal_001.tif and testing/images/test_001.tif"


@dataclass
class Args(prepare.Args):
    slides: Path | None = None
    """CSV file with columns case,split that assigns test slides to valid or test; others are omitted"""
    coords: Path | None = None
    """folder with published lists of patch centres; replaces the random choice"""


# --------------------------------------------------------------------------------------------------- slides and splits
def find_slides(raw):
    """Return {slide: [image file, annotation file or None]}, sorted by slide."""
    files = {}
    for file in common.files_in(raw):
        match = re.fullmatch(r"(normal|test)_(\d+)\.(tiff?|xml)", file.name, re.IGNORECASE)
        if match is None or re.search("mask|background", file.parent.name, re.IGNORECASE):  # a mask with a slide's name
            continue
        kind = "annotation" if match[3].lower() == "xml" else "slide"
        prepare.note_file(files, f"{match[1].lower()}_{int(match[2]):03}", kind, file)
    return {slide: [found["slide"], found.get("annotation")] for slide, found in sorted(files.items())
            if "slide" in found and slide not in LEFT_OUT}


def plan(slides, fixed=None):
    """Return {slide: split} from {slide: true if it shows tumour}. fixed: {test slide: split}, or None."""
    splits = {slide: "train" for slide in slides if slide.startswith("normal")}
    tests = sorted(slides.keys() - splits.keys(), key=lambda slide: (slide in VALID, slide))
    groups = [[s for s in tests if (s in TUMOUR or bool(slides[s])) == tumour] for tumour in (False, True)]
    if not splits or not groups[1]:
        raise common.Error(f"{len(splits)} normal training slides, {len(tests)} test slides, {len(groups[1])} of them "
                           "with tumour; at least one training slide and one test slide with tumour are needed")
    if fixed:
        return splits | fixed
    for group, numbers in zip(groups, ([72, 8], [43, 5]), strict=True):
        test = prepare.shares(len(group), numbers)[0] if len(group) > 1 else len(group)
        splits |= {slide: "test" if k < test else "valid" for k, slide in enumerate(group)}
    return splits


def share_out(total, available, seed):
    """Spread `total` over the slides as evenly as `available` ({slide: count}) allows. Returns {slide: count}."""
    taken, rng = dict.fromkeys(available, 0), np.random.default_rng(seed)
    while left := min(total, sum(available.values())) - sum(taken.values()):
        more = sorted(slide for slide in taken if taken[slide] < available[slide])
        for slide in rng.permutation(more)[:left].tolist():
            taken[slide] += 1
    return taken


def choose(splits, found, seed):
    """Return {slide: [(split, label, x, y)]} from {slide: split} and {slide: [normal, tumour] centres}."""
    patches = {slide: [("train", 0, *c) for c in found[slide][0]] for slide in found if splits[slide] == "train"}
    for split in ("valid", "test"):
        for label in (0, 1):
            centres = {slide: found[slide][label] for slide in found if splits[slide] == split}
            counts = share_out(PUBLISHED[split, label], {slide: len(c) for slide, c in centres.items()}, seed)
            for slide, count in counts.items():
                patches.setdefault(slide, []).extend((split, label, *c) for c in centres[slide][:count])
    return patches


def share(splits, found, args):
    """Return the result of `choose`. If damaged slides leave valid without a class, first divide the others again."""
    patches = choose(splits, found, args.seed)
    kinds = {label for chosen in patches.values() for split, label, *_ in chosen if split == "valid"}
    if args.slides or kinds == {0, 1}:
        return patches
    return choose(plan({slide: centres[1] for slide, centres in found.items()}), found, args.seed)


def read_coords(folder):
    """Read patches, in the form that `choose` returns, from the lists in the folder --coords."""
    patches, lists, seen = {}, set(), {}
    for file in sorted(Path(folder).glob("*")):
        match = re.fullmatch(r"(train|valid|test)_(?:(good|normal)|bad|ungood|tumou?r)\.(txt|csv)", file.name.lower())
        if match is None:
            continue
        split, label = match[1], int(match[2] is None)
        lists.add((split, label))
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise common.Error(f"cannot read {file} ({e}); give text lines slide,x_center,y_center") from e
        for number, row in enumerate(csv.reader(lines), 1):
            if not any(row) or row[0] == "slide":
                continue
            if len(row) != 3 or not re.fullmatch(r"\w+_\d+", row[0]) or not (row[1] + row[2]).isdecimal():
                raise common.Error(f"{file}, line {number}: {','.join(row)} is not slide,x_center,y_center; correct it")
            if other := seen.get(patch := (row[0].lower(), int(row[1]), int(row[2]))):
                raise common.Error(f"{file}, line {number}: {','.join(row)} is also in {other}; remove one of them")
            seen[patch] = file
            patches.setdefault(row[0].lower(), []).append((split, label, int(row[1]), int(row[2])))
    if missing := {("train", 0), ("test", 0), ("test", 1)} - lists:
        names = [f"{split}_{('good', 'bad')[label]}" for split, label in sorted(missing)]
        raise common.Error(f"--coords {folder} has no list {', '.join(names)} (.txt or .csv)")
    return patches


# ---------------------------------------------------------------------------------------------- tissue and annotations
@contextmanager
def opened(file):
    """Open a slide; raise `Damaged` if it cannot be opened or read, or has lost its highest resolution."""
    try:
        with openslide.OpenSlide(file) as slide:
            size = float(slide.properties.get(openslide.PROPERTY_NAME_MPP_X, 0))  # the source's are 0.23 to 0.25
            if 0.3 < size < 20:  # 0 or more than 20: unknown
                raise prepare.Damaged(f"{file} has {size:.2f} micrometres per pixel at level 0, not 0.25; use the "
                                      "original file")
            yield slide
    except prepare.Damaged:
        raise
    except Exception as e:  # OpenSlide's errors and those caused by a damaged header
        raise prepare.Damaged(f"{file} is not a readable slide ({e}); download it again") from e


def on_tissue(slide, file):
    """Return a bool array over the grid of patch centres: True if at least half of the patch is tissue."""
    level = min(range(slide.level_count), key=lambda k: abs(math.log2(slide.level_downsamples[k] / 32)))
    scale, (width, height) = slide.level_downsamples[level], slide.level_dimensions[level]
    if not 8 <= scale <= 128:
        raise prepare.Damaged(f"{file} has no level near 1:32 (the nearest is 1:{scale:g}); use the original file")
    colour, counts = np.empty((height, width), np.uint8), np.zeros(256, int)
    for top in range(0, height, 512):
        strip = slide.read_region((0, round(top * scale)), level, (width, min(512, height - top))).convert("RGB")
        rgb = np.asarray(strip)  # (up to 512, width, 3)
        colour[top : top + 512] = rgb.max(axis=2) - rgb.min(axis=2)
        counts += np.bincount(colour[top : top + 512].ravel(), minlength=256)
    tissue = np.zeros((height + 1, width + 1), np.int32)  # becomes the integral image (summed-area table)
    tissue[1:, 1:] = colour > max(otsu(counts), MIN_COLOUR)
    for axis in (0, 1):
        tissue.cumsum(axis, out=tissue)
    left, top = (STEP * np.arange(max(0, (n - SIZE) // STEP + 1)) for n in slide.dimensions)
    (x0, x1), (y0, y1) = ([np.rint((start + d) / scale).astype(int).clip(0, most) for d in (0, SIZE)]
                          for start, most in ((left, width), (top, height)))
    patches = tissue[y1][:, x1] - tissue[y0][:, x1] - tissue[y1][:, x0] + tissue[y0][:, x0]
    return patches * 2 * scale**2 >= SIZE**2


def otsu(counts):
    """Return Otsu's threshold, which maximises the variance between two classes; the lower class includes it."""
    below, sums = counts.cumsum(), (counts * np.arange(len(counts))).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2.0
    return int(np.argmax(np.where(below * above > 0, between, -1)))


def read_annotation(file):
    """Read [(group, polygon)] from an ASAP file; polygon: (n, 2), x and y at level 0."""
    try:
        found = [(annotation.get("PartOfGroup", "").lower(),
                  np.array([(float(c.get("X")), float(c.get("Y"))) for c in annotation.iter("Coordinate")]))
                 for annotation in ElementTree.parse(file).iter("Annotation")]
    except Exception as e:  # also unknown encodings and invalid numbers
        raise prepare.Damaged(f"{file} is not a readable ASAP annotation ({e}); download it again") from e
    found = [(group, polygon) for group, polygon in found if len(polygon) > 2]
    if not any(group in TUMOUR_GROUPS for group, _ in found):
        raise prepare.Damaged(f"{file} has no polygon of the groups {', '.join(sorted(TUMOUR_GROUPS))}; "
                              "download it again")
    return found


def inside(polygon, xs, ys):
    """Return a bool array (len(ys), len(xs)), True where the point is inside the polygon (exact even-odd rule)."""
    found = np.zeros((len(ys), len(xs)), bool)
    (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T  # edges from each corner to the next
    for row in np.flatnonzero((ys >= y0.min()) & (ys <= y0.max())):
        cut = (y0 <= ys[row]) != (y1 <= ys[row])
        crossings = x0[cut] + (ys[row] - y0[cut]) / (y1[cut] - y0[cut]) * (x1[cut] - x0[cut])
        found[row] = np.searchsorted(np.sort(crossings), xs) % 2 == 1
    return found


def outline(polygon, shape):
    """Return a bool array of `shape` (the grid of centres): True for patches within 4 pixels of the outline."""
    found, steps = np.zeros(shape, bool), np.roll(polygon, -1, axis=0) - polygon
    parts = np.ceil(np.hypot(*steps.T) / 8).astype(int).clip(1)  # at most 8 pixels apart, so one point is within 4
    part = np.arange(parts.sum()) - np.repeat(parts.cumsum() - parts, parts)
    points = np.repeat(polygon, parts, axis=0) + np.repeat(steps / parts[:, None], parts, axis=0) * part[:, None]
    first = np.ceil((points - SIZE - 4) / STEP).astype(int)  # (column, row) of the patches that cover a point
    last = np.floor((points + 4) / STEP).astype(int)
    for dy in range(SIZE // STEP + 1):
        for dx in range(SIZE // STEP + 1):
            x, y = (first + (dx, dy)).T
            ok = (x <= last[:, 0]) & (y <= last[:, 1]) & (x >= 0) & (y >= 0) & (x < shape[1]) & (y < shape[0])
            found[y[ok], x[ok]] = True
    return found


# ---------------------------------------------------------------------------------------------------- work on one slide
def draw(free, most, rng):
    """Draw up to `most` centres (x, y) at random from a bool grid, so that their patches do not overlap."""
    free, centres = free.copy(), []
    for place in rng.permutation(np.flatnonzero(free)):
        row, column = divmod(int(place), free.shape[1])
        if free[row, column]:
            centres.append([SIZE // 2 + STEP * column, SIZE // 2 + STEP * row])
            free[near(row, column)] = False
        if len(centres) == most:
            break
    return centres


def near(row, column):
    """Return the grid region (two slices) whose patches overlap with the patch at (row, column)."""
    apart = SIZE // STEP - 1
    return tuple(slice(max(0, place - apart), place + apart + 1) for place in (row, column))


def find_patches(item, folder):
    """Return the centres [normal, tumour] of a slide's candidate patches, in the order drawn."""
    slide, (file, annotation), seed = item
    if annotation is None and slide in TUMOUR:
        raise prepare.Damaged(f"{file} shows tumour but has no annotation {slide}.xml; unpack lesion_annotations.zip")
    polygons = read_annotation(annotation) if annotation else []
    with opened(file) as image:
        tissue, size = on_tissue(image, file), image.dimensions
    for _, polygon in polygons:
        if not ((polygon >= -SIZE) & (polygon <= np.add(size, SIZE))).all():  # also true for NaN
            raise prepare.Damaged(f"{annotation} has points outside {file}; download both again")
    ys, xs = (SIZE // 2 + STEP * np.arange(n) for n in tissue.shape)
    tumour, excluded, touched = (np.zeros(tissue.shape, bool) for _ in range(3))
    for group, polygon in polygons:
        covered = inside(polygon, xs, ys)
        touched |= covered | outline(polygon, tissue.shape)
        tumour |= covered & (group in TUMOUR_GROUPS)
        excluded |= covered & (group in EXCLUDED_GROUPS)
    kind, number = slide.split("_")
    most, rng = PER_TRAINING_SLIDE if kind == "normal" else PER_TEST_SLIDE, np.random.default_rng([seed, int(number)])
    tumours = draw(tissue & tumour & ~excluded, most, rng)
    free = tissue & ~touched
    for x, y in tumours:
        free[near((y - SIZE // 2) // STEP, (x - SIZE // 2) // STEP)] = False
    centres = [draw(free, most, rng), tumours]
    if not any(centres):
        raise prepare.Damaged(f"{file} shows no tissue; download it again")
    return centres


def write_patches(item, folder):
    """Write the patches of one slide as PNG and return their manifest rows."""
    slide, file, patches = item
    if file is None:
        raise prepare.Damaged(f"no {slide}.tif, although --coords lists it; download it")
    with opened(file) as image:
        width, height = image.dimensions
        for *_, x, y in patches:
            if not (SIZE // 2 <= x <= width - SIZE // 2 and SIZE // 2 <= y <= height - SIZE // 2):
                raise prepare.Damaged(f"{file} is {width}x{height}; the patch at {x},{y} in --coords does not fit")
        corners = [(x - SIZE // 2, y - SIZE // 2) for *_, x, y in patches]
        # Read all patches before writing any, so that a damaged slide leaves no files.
        images = [np.asarray(image.read_region(corner, 0, (SIZE, SIZE)).convert("RGB")) for corner in corners]
    return [prepare.save(folder, split, label, f"{slide}_{x}_{y}", patch, case=slide, x=x, y=y)
            for (split, label, x, y), patch in zip(patches, images, strict=True)]


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    if args.slides and args.coords:
        raise common.Error("--coords already assigns slides to splits; leave out --slides")
    raw = prepare.raw_folder(args, LOOKED_FOR)
    slides = find_slides(raw) or prepare.wrong_folder(raw, LOOKED_FOR)
    if not args.coords:
        tests = [slide for slide in slides if slide.startswith("test")]
        fixed = prepare.read_split(args.slides, tests, ["valid", "test"]) if args.slides else None
        splits = plan({slide: annotation for slide, (_, annotation) in slides.items()}, fixed)
    preparation = prepare.Preparation("camelyon16", "histo", ["train", "valid", "test"], args, slides, MEMORY)
    sums = prepare.published_sums(common.files_in(raw))
    checked = {Path(file).name: (file, sums[file]) for file in prepare.strings(slides) if file in sums}
    sound = preparation.map(prepare.correct_sum, checked, "checking checksums") if checked else checked
    unsound = {slide for slide, files in slides.items()
               if any(file in sums and Path(file).name not in sound for file in files)}
    if args.coords:
        patches = read_coords(args.coords)
    else:
        items = {slide: (slide, slides[slide], args.seed) for slide in splits if slide not in unsound}
        found = preparation.map(find_patches, items, "looking for tissue")
        patches = share(splits, found, args)
    while True:
        preparation.plan(Counter((s, label) for chosen in patches.values() for s, label, *_ in chosen), PUBLISHED)
        items = {slide: (slide, slides.get(slide, [None])[0], patches[slide])
                 for slide in sorted(patches) if slide not in unsound}
        rows = preparation.map(write_patches, items, "writing")
        failed = items.keys() - rows.keys()
        if args.coords or not failed:
            break
        found = {slide: centres for slide, centres in found.items() if slide not in failed}
        patches = share(splits, found, args)
        print(f"note: the patches of {', '.join(sorted(failed))} are taken from other slides")
    preparation.finish([row for slide in rows.values() for row in slide], PUBLISHED)
