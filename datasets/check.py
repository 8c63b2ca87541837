"""Before a first run, check new data for unusable files and for images or patients in two splits.

The script prints one line for each kind of finding. Errors (exit status 1) are images or patients in two splits; masks
that are missing, all black, or not the size of their image; and unreadable files. Notices (exit status 0) are counts
that differ from the published ones, near-duplicates, mixed sizes or formats, odd masks, and names that may belong to
the same patient. The script writes two files to <root>/.cache: a record of the check (JSON), quoted by later runs on
the same files, and a picture (PNG) with samples and the closest pairs.

Images are compared by their texture: the difference between an image and its blurred copy, divided by the local
standard deviation of that difference. Brightness, contrast and gamma hardly change the texture.
1. The 32x32 textures of all images are compared in eight orientations, with and without inversion. For each image, the
   best match in another split is passed to step 2. (In all 750 trials, the best match of a copy was its original.)
2. Both images are read again at half their size (64 to 256 pixels), aligned by a shift, and matched in their tone
   curve. Similarity is the correlation of the textures: fine details and noise distinguish a copy from a second
   photograph. At least 0.965 (SAME) means the same image, at least 0.75 (NEAR) a near-duplicate.

Similarity of copies of 50 solar-cell and 50 brain MR images (minimum / the lower of the two medians):
  mirrored              0.994 / 0.999    gamma 0.6 or 1.6      0.992 / 0.996
  JPEG of quality 80    0.982 / 0.991    contrast 0.5 or 1.5   0.985 / 0.992
  JPEG of quality 60    0.967 / 0.982    inverted              0.989 / 0.996
  scaled to 70%, back   0.981 / 0.990    mirrored, 70%, gamma 1.6, JPEG of quality 60   0.955 / 0.981

Some copies of the last kind, and JPEG copies of almost uniform images, are therefore reported as near-duplicates.

Similarity of different images (median / maximum):
  the ten closest pairs of solar cells, each pair from one silicon block   0.950 / 0.962
  adjacent MR slices, 1 mm apart 0.851 / 0.931, 2 mm apart 0.663 / 0.834

The margin around 0.965 is small: slices interpolated between thicker ones can exceed it (0.961 / 0.981), and cropped,
enlarged or shifted copies are below it. Always inspect the pairs in the picture.
"""

import csv
import json
import re
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

SAME, NEAR = 0.965, 0.75
COMPARED = 3000  # maximum number of image pairs in step 2 per pair of splits, so that a check takes only minutes
CLASSES = ["train normal", "valid normal", "valid anomalous", "test normal", "test anomalous"]
PUBLISHED = {  # numbers of images (README, Benchmarks)
    "brain": (7500, 39, 44, 640, 3075), "liver": (1542, 93, 73, 833, 660), "resc": (4297, 45, 70, 1041, 764),
    "oct2017": (26315, 8, 24, 242, 726), "chest": (8000, 70, 1420, 781, 16413), "histo": (5088, 100, 100, 1000, 1000)}
MAYBE_PATIENT = re.compile(r"(.*\d.*)[-_]\D*\d+")
FORMATS = {"1": "1-bit", "L": "8-bit grey", "RGB": "8-bit colour", "I;16": "16-bit grey"}  # others: Pillow's name
TILE, COLUMNS = 120, 8  # in the picture


@dataclass
class Args:
    data: str = "phantom"
    """name of a benchmark in root, or a folder in a supported layout"""
    root: str = "data"
    """parent folder of all benchmarks; the record and the picture go to <root>/.cache"""
    limit: Annotated[int | None, Ge(1)] = None
    """maximum number of images per split and class (default: all)"""


# ------------------------------------------------------------------------------------------------------- single files
def look_at(entry):
    """Return an image's 32x32 texture (None if unreadable), its size and format in words, and the findings."""
    image, _, mask = entry
    try:
        array, size = common.decode(image, 32)
        with Image.open(image) as opened:
            kind = f"{size[0]}x{size[1]} {FORMATS.get(opened.mode, opened.mode)}"
    except common.Error as e:
        return None, None, [("error", "unreadable files", e)]
    thumbnail = torch.from_numpy(array.mean(axis=0, dtype=np.float32))
    flat = [("notice", "images almost without contrast", image)] * bool(thumbnail.max() - thumbnail.min() < 10)
    return texture(thumbnail[None])[0], kind, flat + look_at_mask(mask, size)


def look_at_mask(mask, size):
    """Return the findings [(level, what, example), ...] for the mask (a file or None) of an image of this size."""
    if mask is None:
        return []
    try:
        array, mask_size = common.decode(mask, mask=True)
    except common.Error as e:
        return [("error", "unreadable files", e)]
    values = np.bincount(array.max(axis=0).ravel(), minlength=256)
    share, found = values[26:].sum() / values.sum(), np.flatnonzero(values).tolist()  # values above 25 are anomalous
    findings = []
    if mask_size != size:
        findings.append(("error", "masks of another size than their image", f"{mask}: {mask_size} instead of {size}"))
    if share == 0:
        findings.append(("error", "masks that are all black (no value above 25)", mask))
    if share > 0.5:
        findings.append(("notice", "masks that cover more than half of the image (inverted?)", f"{mask}: {share:.0%}"))
    if set(found) - {0, 255}:
        findings.append(("notice", "masks with values other than 0 and 255", f"{mask}: {found[:8]}"))
    return findings


def patients(files, base):
    """Return {(level, patient): {split: an image}}; level: "error", or "notice" for ambiguous file names.

    files: {split: [image, ...]}. The manifest of a preparation script (CSV with image, case) overrides file names."""
    cases, found = {}, defaultdict(dict)
    for manifest in base.glob("*.csv"):
        with suppress(csv.Error, OSError), open(manifest, newline="", encoding="utf-8-sig", errors="replace") as f:
            cases |= {base / row["image"]: row["case"] for row in csv.DictReader(f) if {"image", "case"} <= set(row)}
    for split, images in files.items():
        for image in images:
            if told := cases.get(image) or common.patient(image.relative_to(base)):
                found["error", told][split] = image
            elif maybe := MAYBE_PATIENT.fullmatch(image.stem):
                found["notice", maybe[1]][split] = image
    return found


# ------------------------------------------------------------------------------------------------------- equal images
def turn(image, orientation):
    """Return one of the eight orientations of square images (..., S, S)."""
    return torch.rot90(image.flip(-1) if orientation >= 4 else image, orientation % 4, (-2, -1))


def texture(image):
    """Convert grey values (B, S, S) in 0..255 to unit vectors (B, S * S), whose dot products are correlations."""
    detail = image - common.smooth(image, 2)
    detail = detail / (common.smooth(detail**2, 4) + 16).sqrt()  # + 16 suppresses details below 4 grey values
    detail = detail.flatten(1)
    return torch.nn.functional.normalize(detail - detail.mean(dim=1, keepdim=True))


def toned(image, other):
    """Match the tone curve of `image` (S, S) to `other`: map each grey value to the mean of `other` at its pixels."""
    value = image.round().long().flatten().numpy()
    count, total = (ndimage.gaussian_filter1d(np.bincount(value, weights, 256), 2)
                    for weights in (np.ones(len(value)), other.flatten().numpy()))
    return torch.from_numpy((total / (count + 1e-6))[value]).float().view_as(image)


def similarity(file, other, orientation=0):
    """Return the correlation between the textures of two image files after matching their position and tone curve."""
    with Image.open(file) as first, Image.open(other) as second:
        size = min(256, max(64, min(first.size + second.size) // 2))
    a, b = (torch.from_numpy(common.decode(f, size)[0].mean(axis=0, dtype=np.float32)) for f in (file, other))
    b = turn(b, orientation)
    spectra = torch.fft.rfft2(texture(torch.stack([a, b])).view(2, size, size))
    correlation = torch.fft.irfft2(spectra[0] * spectra[1].conj(), (size, size))  # for each shift
    b = b.roll(divmod(int(correlation.abs().argmax()), size), (0, 1))
    pairs = texture(torch.stack([toned(a, b), b, a, toned(b, a)]))
    return max(float(pairs[0] @ pairs[1]), float(pairs[2] @ pairs[3]))  # clipped tones match in one direction only


def closest(known, others):
    """Return [(correlation, index, orientation), ...]: the best match in `known` (N, P) for each of `others` (M, P)."""
    matches = []
    for chunk in others.view(-1, 32, 32).split(512):
        found = [(turn(chunk, orientation).flatten(1) @ known.T).abs().max(dim=1) for orientation in range(8)]
        value, orientation = torch.stack([f.values for f in found]).max(dim=0)  # (8, m) -> (m,)
        index = torch.stack([f.indices for f in found]).gather(0, orientation[None])[0]
        matches += zip(value.tolist(), index.tolist(), orientation.tolist(), strict=True)
    return matches


def compare(files, textures, first, second):
    """Return [(similarity, image of `first`, image of `second`, its orientation), ...], most similar first.

    files: {split: [image, ...]}; textures: {split: [(1024,), ...]}."""
    found = closest(torch.stack(textures[first]), torch.stack(textures[second]))
    found = sorted(zip(found, files[second], strict=True), reverse=True)[:COMPARED]
    pairs = [(files[first][index], image, orientation) for (_, index, orientation), image in found]
    with ThreadPoolExecutor() as pool:
        values = pool.map(lambda pair: similarity(*pair), pairs)
        values = common.progress(values, f"comparing {first} and {second}", len(pairs))
        return sorted(((value, *pair) for value, pair in zip(values, pairs, strict=True)), reverse=True)


# -------------------------------------------------------------------------------------------------------- the picture
def tile(file, mask, orientation):
    """Return the image in this orientation at TILE x TILE pixels, with the outline of its mask in red."""
    image = turn(torch.tensor(common.decode(file, TILE)[0]), orientation)
    image = image.expand(3, -1, -1).permute(1, 2, 0).numpy().copy()
    if mask:
        mask = Image.fromarray(common.decode(mask, mask=True)[0].max(axis=0))
        mask = mask.resize((TILE, TILE), Image.Resampling.NEAREST)
        image[(anomalous := np.asarray(mask) > 25) ^ ndimage.binary_erosion(anomalous)] = 255, 0, 0
    return Image.fromarray(image)


def draw(file, classes, pairs):
    """Draw a row of samples per class ({title: entries}) and up to two rows for each of `pairs` ({title: matches})."""
    rows = []  # (title, [(caption, image, mask, orientation), ...])
    for title, entries in classes.items():
        rows.append((title, [("", image, mask, 0) for image, _, mask in common.spread(entries, COLUMNS)]))
    for title, found in pairs.items():
        cells = []
        for value, known, image, orientation in found[:COLUMNS]:
            kind = "SAME PICTURE" if value >= SAME else "near-duplicate" if value >= NEAR else "different"
            cells += [(f"{value:.3f} {kind}", known, None, 0), ("turned" * (orientation > 0), image, None, orientation)]
        rows += [(title, cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]
    width, height, font = TILE + 4, TILE + 52, ImageFont.load_default(12)
    canvas = Image.new("RGB", (COLUMNS * width, len(rows) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (title, cells) in enumerate(rows):
        pen.text((2, y * height + 3), title, "blue", font)
        for x, (caption, image, mask, orientation) in enumerate(cells):
            colour = "red" if "SAME" in caption else "black"
            pen.text((x * width + 2, y * height + 18), f"{caption}\n{image.stem[-18:]}", colour, font)
            with suppress(common.Error):  # leave unreadable images blank
                canvas.paste(tile(image, mask, orientation), (x * width, y * height + 50))
    with common.atomic(file) as tmp:
        canvas.save(tmp, "PNG")


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    base, parts = common.find_benchmark(args.data, args.root)
    findings, listed = [], {}  # {split: [(image, label, mask or None), ...]}
    for split in common.SPLITS:
        try:
            listed[split] = common.list_split(parts, split)
        except common.Error as e:
            findings.append(("error", "masks missing or without image", e))
            listed[split] = [(image, int(key[0] not in common.NORMAL), None)
                             for key, images in parts.get((split, False), {}).items() for image in images]
    read = {file for files in parts.values() for some in files.values() for file in some}
    findings += [("notice", "files not read (wrong format or not in a class folder)", file)
                 for file in common.files_in(base) if file not in read and file.suffix != ".db"
                 and file.relative_to(base).parts[0].lower() in common.ROLES]
    names = {args.data.lower(), *(part.lower() for part in base.resolve().parts[-3:])}
    benchmark = next((name for name in PUBLISHED if names & set(common.NAMES[name])), None)
    classes = {}
    for name, published in zip(CLASSES, PUBLISHED.get(benchmark, [0] * 5), strict=True):
        split, kind = name.split()
        chosen = [e for e in listed[split] if e[1] == (kind == "anomalous")]
        print(f"{name:<15} {len(chosen):>6}" + f"   published {published:>6}" * bool(benchmark))
        if benchmark and len(chosen) != published:
            findings.append(("notice", "other counts than published", f"{name} {len(chosen)} instead of {published}"))
        if not chosen:
            made = f" (made by datasets/{common.MADE_BY[benchmark]})" if benchmark else ""
            alone = split == "test" and not listed["test"]  # training needs normal images only
            findings.append(("notice" if split == "valid" or alone else "error", "no images", name + made))
        classes[name] = common.spread(chosen, args.limit or len(chosen))
    # Runs look for the record of all files, so a check with --limit writes a record with another name.
    entries = sum((classes if args.limit else listed).values(), [])
    record = Path(args.root) / ".cache" / f"{common.fingerprint(entries, base)}.check.json"

    if kept := common.read_check(record):
        print(*kept["findings"], f"checked {kept['checked']}: {record}", f"{base}: {kept['summary']}", sep="\n")
        raise SystemExit(int("errors: none" not in kept["summary"]))

    files, textures, kinds = defaultdict(list), defaultdict(list), defaultdict(Counter)
    entries = [(name, entry) for name in CLASSES for entry in classes[name]]
    with ThreadPoolExecutor() as pool:
        looked = common.progress(pool.map(look_at, [entry for _, entry in entries]), "reading", len(entries))
        for (name, (image, _, _)), (small, kind, found) in zip(entries, looked, strict=True):
            findings += found
            if small is not None:
                kinds[kind][name] += 1
                files[name.split()[0]].append(image)
                textures[name.split()[0]].append(small)
    print(f"{sum(bool(mask) for _, (_, _, mask) in entries)} masks; {', '.join(list(kinds)[:4])}")
    if len(kinds) > 1:
        words = [f"{kind} ({', '.join(found)})" for kind, found in kinds.items()]
        findings.append(("notice", "several image sizes or pixel formats", f"{len(kinds)}: {', '.join(words[:4])}"))

    for (level, patient), images in patients(files, base).items():
        what = "one patient" if level == "error" else "possibly one patient"
        findings += [(level, f"{what} in {first} and {second}", f"{patient} ({images[first].name}, "
                      f"{images[second].name})") for first, second in combinations(images, 2)]

    pairs = {}
    for first, second in combinations(files, 2):
        found = compare(files, textures, first, second)
        pairs[f"closest pairs of {first} and {second}"] = found
        for value, known, image, _ in found:
            if value >= NEAR:
                level, what = ("error", "the same picture") if value >= SAME else ("notice", "near-duplicates")
                findings.append((level, f"{what} in {first} and {second}", f"{known.relative_to(base)} and "
                                 f"{image.relative_to(base)} (similarity {value:.3f})"))

    examples = defaultdict(list)
    for level, what, example in findings:
        examples[level, what].append(example)
    lines = [f"{level}: {what}: " + f"{len(found)}, e.g. " * (len(found) > 1) + str(found[0])
             for (level, what), found in sorted(examples.items())]  # "error" comes before "notice"
    errors, notices = ([f"{what} ({len(found)})" for (its, what), found in sorted(examples.items()) if its == level]
                       for level in ("error", "notice"))
    summary = f"{len(entries)} images; errors: {', '.join(errors) or 'none'}; notices: {', '.join(notices) or 'none'}"
    draw(record.with_suffix(".png"), classes, pairs)
    with common.atomic(record) as tmp:
        tmp.write_text(json.dumps(dict(summary=summary, checked=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                                       folder=str(base.resolve()), findings=lines), indent=1))
    print(*lines, f"record: {record}", f"picture: {record.with_suffix('.png')}", f"{base}: {summary}", sep="\n")
    raise SystemExit(1 if errors else 0)
