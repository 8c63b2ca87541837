"""Everything that all method scripts share: benchmarks, pretrained weights, metrics and the run folder.

A script calls `command_line`, `Run` and `load_benchmark`, then trains on `Split.batches`. After each epoch it calls
`Run.validate`, which keeps the state that is best on valid; a script without epochs calls `Run.keep` once. `finish`
then scores the test set once. Shapes: N is the number of images in a split, B the batch size, H the height and W the
width. A higher score means more anomalous."""

import csv
import dataclasses
import errno
import hashlib
import io
import json
import math
import operator
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from scipy import ndimage
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:
    sys.exit("error: Linux or macOS is needed; on Windows use WSL, the Windows Subsystem for Linux")


# ----------------------------------------------------------------------------------------------------- errors and files
class Error(Exception):
    """An error that the user can fix. Its message is one line: what is wrong, in which file or flag, and what to do."""


def command_line(Args, description):
    """Parse the script's arguments and make an uncaught `Error` print one line to stderr and exit with code 2.
    Notebooks and tests, which do not call this function, see the exception itself."""
    def in_one_line(kind, error, traceback):
        if issubclass(kind, BrokenPipeError):  # the reader has gone, as with `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
            raise SystemExit(141)
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted; run the same command again to resume from the last evaluation, if any", file=sys.stderr)
            raise SystemExit(130)
        if issubclass(kind, Error):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            print(f"error: cannot write: {error}; free some space or choose another folder", file=sys.stderr)
            raise SystemExit(2)
        sys.__excepthook__(kind, error, traceback)

    sys.excepthook = in_one_line
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a printed file name can be invalid UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        with redirect_stderr(io.StringIO()) as box:
            args = tyro.cli(Args, description=description)
    except SystemExit as e:
        if not e.code:  # --help
            raise
        text = box.getvalue().split("├")[0].partition("\n")[2]  # the text inside tyro's frame, without its title
        raise Error(" ".join(re.sub("[│╰╯─]", " ", text).split())) from None
    if any(not word or re.fullmatch("--[a-z-]+=", word) for word in sys.argv[1:]):
        raise Error("an argument is empty; give a value, or leave the flag out")
    check_ranges(args)
    return args


def check_ranges(args):
    """Raise `Error` if a value is outside the range declared in its type, e.g. Annotated[int, Ge(1)]."""
    signs = dict(ge="at least", gt="above", le="at most", lt="below")
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        rules = [(op, bound) for limits in getattr(kind, "__metadata__", ()) if dataclasses.is_dataclass(limits)
                 for op, bound in dataclasses.asdict(limits).items() if bound is not None]  # [("ge", 1), ...]
        values = getattr(args, name)
        for value in values if isinstance(values, tuple) else (values,):
            inside = isinstance(value, int | float) and math.isfinite(value) \
                and all(getattr(operator, op)(value, bound) for op, bound in rules)
            if rules and value is not None and not inside:
                asked = " and ".join(f"{signs[op]} {bound}" for op, bound in rules)
                raise Error(f"--{name.replace('_', '-')} {value}: the value must be a number that is {asked}")


@contextmanager
def atomic(path):
    """Yield a temporary path next to `path`. The file or folder written there is renamed to `path` when complete."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{platform.node()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".tmp-*-{platform.node()}-*"):
            try:
                os.kill(int(left.name.split("-")[1]), 0)  # signal 0 only checks whether the process is running
            except ProcessLookupError:  # it was killed while writing
                remove(left)
            except PermissionError:  # it is running as another user
                pass
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as e:
        raise Error(f"cannot write {path}: {e}; free some space or choose another folder") from e
    finally:
        remove(temporary)


def remove(path):
    """Remove a file, or a folder and its contents, if it exists."""
    with suppress(FileNotFoundError, NotADirectoryError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_csv(path, rows):
    """Write a list of dicts. The header has all keys, in the order in which they first appear."""
    with atomic(path) as tmp, open(tmp, "w", newline="", encoding="utf-8", errors="backslashreplace") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def progress(iterable, what, total=None):
    """Wrap an iterable in a progress bar, which is shown only if stderr is a terminal."""
    return tqdm(iterable, desc=what, total=total, disable=None, leave=False)


def sha256(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def plain(name):
    """Make a string safe for use in file names: at most 60 ASCII characters, no dots or spaces."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[-60:]


def spread(items, n):
    """Return at most n of `items`, evenly spread."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


# ----------------------------------------------------------------------------------------------------------- benchmarks
NAMES = {  # folder names of the published downloads; for other benchmarks give --data FOLDER
    "brain": ["brain", "brain_ad"],
    "liver": ["liver", "liver_ad"],
    "resc": ["resc", "retina_resc_ad"],
    "oct2017": ["oct2017", "retina_oct2017_ad"],
    "chest": ["chest", "chest-rsna", "chest_ad"],
    "histo": ["histo", "camelyon16", "camelyon16_256", "histopathology_ad"],
    "phantom": ["phantom"],
}
MADE_BY = dict(brain="brats2021", liver="btcv (train) and lits (valid, test)", resc="resc", oct2017="oct2017",
               chest="rsna", histo="camelyon16", phantom="phantom")  # scripts in datasets/
SPLITS = {"train": ["train"], "valid": ["valid", "val", "validation"], "test": ["test"]}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
NORMAL, MASKS = {"good", "normal"}, {"anomaly_mask", "label"}  # folder names; images in other folders are anomalous
# folder name -> (split, whether it holds masks)
ROLES = {name + end: (split, bool(end)) for split, names in SPLITS.items() for name in names for end in ("", "_label")}
ROLES["ground_truth"] = ("test", True)  # MVTec AD
SCAN = r"((?:patient|pat|subject|subj|sub|case|scan|volume|vol|p)[-_]?\d+)[-_].+"
PATIENT = r"(brats.*_\d+)_\d+|(?:normal|cnv|dme|drusen)-(\d+)-\d+|((?:normal|tumor|test)_\d+)_\d+_\d+|(.+?)_macular.*|"


def patient(path):
    """Return the patient, scan or slide named in an image's path, or None.

    path: relative to the benchmark. Recognises the names of BraTS (BraTS2021_00003_60.png), OCT2017, Camelyon16 and
    RESC, and a word such as "scan" with a number (scan012_0001.png, scan012/0001.png, sub-12/ses-1/0001.png)."""
    path = Path(path)
    folders = (re.fullmatch(SCAN, f"{folder}_{path.stem}", re.I) for folder in path.parts[:-1])  # the outermost first
    match = next(filter(None, folders), None) or re.fullmatch(PATIENT + SCAN, path.stem, re.I)
    return match and next(group for group in match.groups() if group)


def files_in(folder):
    """Return a sorted list of all non-hidden files below `folder`. Links are followed unless they point to a parent."""
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        above = {os.path.realpath(parent) for parent in (place, *Path(place).parents)}
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))
                      and os.path.realpath(Path(place, name)) not in above]
        if closed := [name for name in folders if not os.access(Path(place, name), os.R_OK | os.X_OK)]:
            raise Error(f"{Path(place, closed[0])} cannot be read; change its permissions or remove it")
        files += [Path(place, name) for name in names if name[0] != "."]
    return sorted(files)


def images_in(folder):
    return [file for file in files_in(folder) if file.suffix.lower() in SUFFIXES]


def named_folder(data, root):
    """Return the folder that --data and --root refer to, or None if it does not exist."""
    known = NAMES.get(data.lower(), [])
    places = (p for p in sorted(Path(root).glob("*")) if p.name.lower() in known and p.is_dir())
    return Path(data) if data and Path(data).is_dir() else next(places, None)


def find_benchmark(data, root):
    """Return the benchmark's folder and `parts`, its files grouped by split and kind (image or mask).

    Reads all published layouts: train/good[/img], test/{good,Ungood}[/img] with masks in Ungood/{anomaly_mask,label};
    valid/img/{good,Ungood} with valid/label/{good,Ungood}; Test/test/{good,Ungood} with Test/test_label/Ungood; MVTec
    AD's test/<defect> with ground_truth/<defect>/*_mask.png. A folder with only images or train/good: normal ones."""
    known, asked = data.lower() in NAMES, named_folder(data, root)
    if asked is None:
        maker = f"make it with datasets/{MADE_BY[data.lower()]}" if known else f"known benchmarks: {', '.join(NAMES)}"
        raise Error(f"no benchmark {data} in {root} and no folder {data}; {maker}")
    benchmarks = {}  # {folder: {(split, mask or not): {(class, ..., name): [files]}}}
    files = images_in(asked)
    for file in files:
        folders = file.relative_to(asked).parts[:-1]
        names = [name.lower() for name in folders]
        if named := [i for i, name in enumerate(names) if name in ROLES]:
            # Val/val/img/Ungood/x.png: base "", split valid, key ("ungood", "x"); its mask: Val/val_label/Ungood/x.png
            last = max(i for i in named if not {*NORMAL, "ungood"} & set(names[named[0] : i]))  # not below a class
            base, (split, mask), inner = asked.joinpath(*folders[: named[0]]), ROLES[names[last]], names[last + 1 :]
            key = *(name for name in inner if name not in ("img", *MASKS)), file.stem.removesuffix("_mask")
            part = split, mask or bool(MASKS & set(inner))
            if len(key) > 1:  # in a class folder
                benchmarks.setdefault(base, {}).setdefault(part, {}).setdefault(key, []).append(file)
    found = [base for base, parts in sorted(benchmarks.items()) if (("test", False) in parts or not known)
             and any(k[0] in NORMAL for k in parts.get(("train", False), {}))]
    if len(found) == 1 or asked in found:
        return found[0], benchmarks[found[0]]
    if files and not known and all(file.parent == asked for file in files):
        return asked, {("train", False): {("good", file.name): [file] for file in files}}
    if found:
        raise Error(f"{asked} holds {len(found)} benchmarks; give one of them, e.g. {found[0]}")
    raise Error(f"{asked} is not a benchmark: expected images in train/good, test/good and test/Ungood (or MVTec AD's "
                f"test/<defect>), or normal images alone; it holds {sorted(os.listdir(asked))[:8]}"
                + f"; its parts come from datasets/{MADE_BY.get(data.lower())}" * known)


def list_split(parts, split):
    """Return [(image, label, mask or None)], normal (0) before anomalous (1). parts: see `find_benchmark`."""
    images, masks = (parts.get((split, mask), {}) for mask in (False, True))
    entries = [(file, 0, None) for key, files in images.items() if key[0] in NORMAL for file in files]
    if split == "train":
        return entries
    masks = {key: files for key, files in masks.items() if key[0] not in NORMAL}
    masked = bool(masks)
    for key in [key for key in images if key[0] not in NORMAL]:
        own = masks.pop(key, [])
        if masked and (len(own) != 1 or len(images[key]) != 1):
            who, what = (" and ".join(map(str, files)) for files in (images[key], own))
            raise Error(f"{who}: {what or 'no mask'}; each anomalous image needs one mask with the same name")
        entries += [(file, 1, own[0] if masked else None) for file in images[key]]
    if masks:
        raise Error(f"mask {min(masks.values())[0]} has no image with the same name; add one or remove the mask")
    return entries


def list_benchmark(args):
    """Return (folder, {split: entries}, fingerprint, number of held-out images) of the benchmark args.data.

    If valid has no normal images, a fraction args.holdout of the training images is held out to set the thresholds. If
    the file names identify patients, whole patients are held out."""
    base, parts = find_benchmark(args.data, args.root)
    entries = {split: list_split(parts, split) for split in SPLITS}
    images, held = fingerprint(sum(entries.values(), []), base), []
    scans = {entry: patient(entry[0].relative_to(base)) or entry[0] for entry in entries["train"]}
    names = list(dict.fromkeys(scans.values()))
    if len(names) > 1 and args.holdout and all(label for _, label, _ in entries["valid"]):
        chosen = set(spread(names, min(max(1, round(args.holdout * len(names))), len(names) - 1)))
        held = [entry for entry, scan in scans.items() if scan in chosen]
        entries["train"] = [entry for entry, scan in scans.items() if scan not in chosen]
        entries["valid"] = held + entries["valid"]
    return base, entries, images, len(held)


def fingerprint(entries, base):
    """Return a hex digest of the images' and masks' names, sizes and modification times, to detect changed files."""
    files = [file for image, _, mask in entries for file in (image, mask) if file]
    try:
        state = [(file.relative_to(base).as_posix(), (s := file.stat()).st_size, s.st_mtime_ns) for file in files]
    except OSError as e:  # a broken link
        raise Error(f"{e.filename} cannot be read ({e.strerror}); replace or remove it") from e
    return hashlib.sha256(repr((str(base.resolve()), state)).encode()).hexdigest()[:16]


def to_array(image, size=None, white=65535):
    """Convert a Pillow image to uint8 (3, size, size), or (3, H, W) without a size. white: 16-bit value of white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image, np.float32)
        if image.mode == "F" or array.min() < 0 or array.max() > 65535:
            raise ValueError("32-bit or signed pixels have no fixed white level: save the image with 8 or 16 bits")
        image = Image.fromarray((array / np.float32(white / 255)).clip(max=255))
    else:
        image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    image = image.resize((size, size), Image.Resampling.BILINEAR) if size else image  # Pillow antialiases
    array = np.rint(np.atleast_3d(image)).astype(np.uint8).transpose(2, 0, 1)
    return np.broadcast_to(array, (3, *array.shape[1:]))


def decode(path, size=None, mask=False, white=65535):
    """Return an image file's array (see `to_array`) and (width, height). In a mask, transparent pixels become black."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{image.n_frames} pages or frames: save each one as an image")
            if white < 65535 and ";16" in str(image.tile) and image.mode[0] != "I":
                raise ValueError("with --white, a 16-bit image must be grey, without alpha: convert it")
            image = ImageOps.exif_transpose(image)  # rotate it as image viewers do
            if mask and "A" in image.getbands():
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
            return to_array(image, size, white), image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # a broken PNG raises SyntaxError
        raise Error(f"{path} is not a readable image ({e}); replace or remove it") from e


def decode_mask(path, image_size, size):
    """Read a mask as uint8 (1, size, size), 1 where it exceeds 10% of full scale. Without a path, it is all 0."""
    if path is None:
        return np.zeros((1, size, size), np.uint8)
    array, original = decode(path, mask=True)
    if original != image_size:
        raise Error(f"mask {path} has {original} pixels but its image has {image_size}; make them equal")
    array = (array.max(axis=0) > 25.5).astype(np.uint8)
    if not array.any():
        raise Error(f"mask {path} has no value above 10% of full scale; save masks as 0 and 255 (anomalous)")
    return np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.NEAREST))[None]


class Split:
    """The images of a split. They are decoded and resized once, and then read from a file in `cache`.

    images: uint8 (N, 3, H, W); masks: bool (N, H, W) or None; labels (N,): 0 normal, 1 anomalous; paths: relative to
    the benchmark's folder."""

    def __init__(self, name, entries, size, base, cache, white=65535):
        """entries: [(image, label, mask or None)], see `list_split`; white: see `to_array`."""
        self.name, self.entries, self.size, self.white, self.source = name, entries, size, white, name
        self.paths = [image.relative_to(base).as_posix() for image, _, _ in entries]
        self.labels = np.array([label for _, label, _ in entries], int)
        self.has_masks = any(mask for _, _, mask in entries)
        self.shape = len(entries), 3 + self.has_masks, size, size  # the fourth channel is the mask
        decoded = cache / f"{plain(base.resolve().name)}-{name}-{size}-{white}-{fingerprint(entries, base)}.decoded"
        if not decoded.is_file() or decoded.stat().st_size != math.prod(self.shape):
            with atomic(decoded) as tmp:
                self._decode(tmp)
        self.file = open(decoded, "rb")  # noqa: SIM115 (the open file stays readable even if it is removed)

    def _decode(self, file):
        def one(entry):
            array, original = decode(entry[0], self.size, white=self.white)
            return np.concatenate([array, decode_mask(entry[2], original, self.size)]) if self.has_masks else array

        maximum = 0
        with open(file, "wb") as f, ThreadPoolExecutor() as pool:
            for start in progress(range(0, len(self), 256), f"decoding {self.name}"):
                for array in pool.map(one, self.entries[start : start + 256]):
                    maximum = max(maximum, array[:3].max())
                    f.write(array.tobytes())  # on a full disk this raises an error; a memmap would kill the process
        if maximum < 17:
            print(f"NOTE: {self.name} is almost black: no value is above {maximum} of 255. If its 16-bit files hold "
                  "12-bit images, give --white 4095")

    # Each access makes a new memmap, because pages read through an old one count as this process's memory.
    @property
    def images(self):
        return np.memmap(self.file, np.uint8, "r", shape=self.shape)[:, :3]

    @property
    def masks(self):
        return np.memmap(self.file, bool, "r", shape=self.shape)[:, 3] if self.has_masks else None

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, device="cpu"):
        """Return images (B, 3, H, W), float32 in [0, 1], on `device`."""
        return to_device(self.images[indices], device).float() / 255

    def batches(self, batch_size, device="cpu", shuffle=None, drop_last=False, fetch=None):
        """Yield all images in batches, in file order or shuffled with a seed (an int or a tuple such as (seed, epoch)).

        drop_last: leave out an incomplete last batch, unless it is the only one.
        fetch: a function from indices (b,) to the batch; without it, batches are images."""
        order = np.arange(len(self)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(self))
        if drop_last and len(self) >= batch_size:
            order = order[: len(self) // batch_size * batch_size]
        for start in progress(range(0, len(order), batch_size), self.name):
            indices = order[start : start + batch_size]
            yield fetch(indices) if fetch else self.batch(indices, device)


def to_device(array, device):
    """Copy an array to a device. A copy to a GPU starts from pinned memory, so the CPU does not wait for it."""
    tensor = torch.from_numpy(np.asarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if "cuda" in str(device) else tensor.to(device)


class Features:
    """Features of a split's images from a frozen network, for training loops that need them in every epoch.

    They are computed once and then read from a file if it needs at most args.cache_features GiB and half of the free
    disk space. Otherwise they are computed again for each batch. On a GPU, features of more than 2 MiB per image are
    always computed again, because reading them takes longer (tests/README.md)."""

    def __init__(self, extract, split, args, run):
        """extract: a deterministic function from images (B, 3, H, W) to [(B, ...), ...]."""
        self.extract, self.split, self.device, self.file = extract, split, run.device, None
        self.shapes = [f.shape[1:] for f in extract(split.batch([0], run.device))]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        each, free = 4 * sum(self.sizes), shutil.disk_usage(run.folder).free  # bytes
        cached = each * len(split) <= min(args.cache_features * 2**30, free / 2) \
            and not (self.device.type == "cuda" and each > 2**21)
        print(f"features of {split.name}: {each * len(split) / 2**30:.2f} GiB, "
              + ("cached" if cached else "computed again each epoch (--cache-features)"), flush=True)
        if cached:
            with atomic(run.folder / "features") as tmp, open(tmp, "w+b") as f:
                for image in split.batches(args.batch_size, run.device):
                    f.write(torch.cat([f.flatten(1).float().cpu() for f in extract(image)], dim=1).numpy().tobytes())
            self.file = open(run.folder / "features", "rb")  # noqa: SIM115 (stays open)
            os.unlink(run.folder / "features")

    def batches(self, batch_size, shuffle=None, drop_last=False):
        """Yield [(b, ...), ...] on the device, float32, in the order of `Split.batches`."""
        def fetch(indices):
            if self.file is None:
                return self.extract(self.split.batch(indices, self.device))
            rows = np.memmap(self.file, np.float32, "r", shape=(len(self.split), sum(self.sizes)))  # see `Split.images`
            parts = to_device(rows[indices], self.device).split(self.sizes, dim=1)
            return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

        return self.split.batches(batch_size, self.device, shuffle, drop_last, fetch)


def load_benchmark(args):
    """Return (train, valid, test) as `Split`s for args.data, args.root, args.image_size and args.limit.

    A split that the benchmark lacks is None; with args.predict, all three are None. See `list_benchmark` for what
    happens if valid has no normal images."""
    if args.predict:
        return None, None, None
    (base, entries, _, held), splits, counts = list_benchmark(args), [], []
    for name in SPLITS:
        normal, anomalous = ([e for e in entries[name] if e[1] == label] for label in (0, 1))
        if args.limit:
            normal, anomalous = spread(normal, args.limit), spread(anomalous, args.limit)
        counts.append(f"{name} {len(normal)} normal" + f" + {len(anomalous)} anomalous" * (name != "train"))
        if (name == "train" and not normal) or (name == "test" and bool(normal) != bool(anomalous)):
            raise Error(f"{base}: {counts[-1]} images; put images into train/good, test/good and test/Ungood")
        splits.append(Split(name, normal + anomalous, args.image_size, base, Path(args.root) / ".cache", args.white)
                      if normal else None)
    _, valid, test = splits
    print(f"{base}: {', '.join(counts)}; {args.image_size}x{args.image_size}, "
          + ("masks" if test and test.has_masks else "no masks")
          + f"; LIMITED to {args.limit} per class" * bool(args.limit), flush=True)
    if held:
        valid.source = f"{len(valid) - valid.labels.sum()} training images held out"
        print(f"{valid.source} for the thresholds (--holdout {args.holdout})")
    if hasattr(args, "epochs") and not (valid and valid.labels.any()):
        print("NOTE: the last epoch is kept; choosing the best one requires normal and anomalous images in valid")
    if not test:
        print("NOTE: no test images, so there will be no metrics; use the trained model with --predict")
    return splits


# --------------------------------------------------------------------------------------------------- pretrained weights
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_TAG = "laion400m_e32"  # the published weights of ViT-B-16-plus-240 (laion400m_e31 is one epoch earlier)
TINY_CLIP = dict(embed_dim=128, vision_cfg=dict(layers=4, width=128, patch_size=16),
                 text_cfg=dict(layers=4, width=128, heads=4))  # --model tiny: for tests and demonstrations


def normalize(image, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Standardise images (B, 3, H, W) in [0, 1] per channel, as the pretrained network expects."""
    mean, std = (torch.tensor(v, device=image.device).view(1, 3, 1, 1) for v in (mean, std))
    return (image - mean) / std


def smooth(anomaly_map, sigma=4):
    """Smooth maps (B, H, W) like scipy.ndimage.gaussian_filter: a Gaussian cut off at 4 sigma, mirrored borders."""
    from torchvision.transforms.v2.functional import gaussian_blur, pad  # a slow import

    radius, size = 4 * sigma, 8 * sigma + 1
    padded = pad(anomaly_map, radius, padding_mode="symmetric")
    blurred = gaussian_blur(gaussian_blur(padded, [1, size], sigma), [size, 1], sigma)  # separable
    return blurred[..., radius:-radius, radius:-radius]


def read_state(file, what, mmap=False):
    """Load a dict of tensors from a torch.save file onto the CPU. mmap: read large tensors only when they are used.

    what: the expected kind of file, for the error message."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        return state | {}  # TypeError if it is not a dict
    except Exception as e:  # missing, empty, truncated, not a zip file, or with objects that weights_only refuses
        reason = getattr(e, "strerror", None) or (str(e) or type(e).__name__).splitlines()[0]
        raise Error(f"{file} cannot be read by PyTorch ({reason}); give the {what}") from e


def load_state(net, state, source, optional):
    """Load a state dict that was read from `source`. Keys that start with one of `optional` may be missing."""
    try:
        for key, value in state.items():  # aminmax, since isfinite would copy a large memory bank
            if value.numel() and not all(math.isfinite(limit) for limit in torch.aminmax(value)):
                raise RuntimeError(f"{key} has values that are not finite")
        missing, unknown = net.load_state_dict(state, strict=False)
        if wrong := unknown + [key for key in missing if not key.startswith(optional)]:
            raise RuntimeError(f"unknown or missing keys: {len(wrong)}, e.g. {wrong[0]}")
    except (RuntimeError, TypeError, AttributeError) as e:
        raise Error(f"{source} does not fit this network or its arguments: {str(e).splitlines()[-1].strip()}") from e


def pretrained_network(name, weights):
    """Return a torchvision classifier on the CPU; its `weights_used` is {name, weights, sha256, trained}.

    weights: 'imagenet' (torchvision's IMAGENET1K_V1, as in all official implementations), a FILE (a torchvision state
    dict, with or without the classifier), 'none' (untrained, always from seed 0) or 'auto' ('imagenet' if available,
    otherwise 'none' with a warning)."""
    from torchvision.models import get_model, get_model_weights

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = get_model(name, weights=None)
    file, state = weights, None
    if weights in ("imagenet", "auto"):
        published = get_model_weights(name).IMAGENET1K_V1
        file = Path(torch.hub.get_dir()) / "checkpoints" / published.url.rsplit("/", 1)[1]
        try:
            state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as e:  # no network, a broken file in the cache, a wrong hash
            if weights == "imagenet":
                raise Error(f"no ImageNet weights for {name} ({e}); put them at {file}, or give --weights FILE, or "
                            "--weights none for an untrained network") from e
            print(f"warning: no ImageNet weights for {name} ({e}); continuing with random weights", flush=True)
    elif weights != "none":
        state = read_state(file, f"torchvision weights of {name}, or --weights imagenet, auto or none")
    if state is not None:
        load_state(net, state, file, ("fc.", "classifier."))
    net.weights_used = dict(name=name, weights=weights if state else "none", sha256=sha256(file) if state else None,
                            trained=bool(state))
    return net


def feature_extractor(name, layers, weights):
    """Return a frozen network that maps images to {layer: (B, C, h, w)} and stops at the last of `layers`.

    name, weights: see `pretrained_network`; layers: torchvision's node names. Checkpoints store modules that have the
    attribute `frozen`, such as this network, only as a hash of their weights, which must match on loading."""
    from torchvision.models.feature_extraction import create_feature_extractor

    net = pretrained_network(name, weights)
    extractor = create_feature_extractor(net.eval(), layers)
    extractor.weights_used = net.weights_used
    return _freeze(extractor)


def _freeze(net):
    net.eval().requires_grad_(False)
    net.train = lambda mode=True: net  # batch norm statistics must not change while other modules are trained
    net.frozen = True
    return net


def load_clip(name, weights, image_size):
    """Return a frozen open_clip.CLIP with a ViT for images of `image_size`, on the CPU. Its attributes `mean` and
    `std` are the arguments for `normalize`.

    name: an open_clip model, or 'tiny', which has no published weights. weights: an open_clip TAG, a FILE, 'none'
    (untrained, always from seed 0) or 'auto' (CLIP_TAG if available, otherwise 'none' with a warning)."""
    import open_clip  # imported here because only three methods need it

    config = TINY_CLIP if name == "tiny" else open_clip.get_model_config(name) or {}
    vision = config.get("vision_cfg", {})
    if not isinstance(vision.get("layers"), int) or config.get("custom_text") or "hf_model_name" in config["text_cfg"]:
        raise Error(f"--model {name} is not a CLIP model with a ViT; give ViT-B-16-plus-240, ViT-B-16 or tiny")
    if image_size % vision["patch_size"]:
        raise Error(f"{name}: image size {image_size} is not a multiple of the patch size {vision['patch_size']}")
    file = weights if Path(weights).is_file() else None
    published = {} if file else open_clip.get_pretrained_cfg(name, CLIP_TAG if weights == "auto" else weights)
    quick_gelu = config.get("quick_gelu", False) or published.get("quick_gelu", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(**config | dict(vision_cfg=vision | dict(image_size=image_size), quick_gelu=quick_gelu))
        for block in clip.transformer.resblocks if name == "tiny" else ():  # untrained: PyTorch's initial values
            torch.nn.init.xavier_uniform_(block.attn.in_proj_weight)
            for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                layer.reset_parameters()
    try:
        if weights != "none":
            # not from the Hugging Face hub, where laion400m_e32 of the default model is a copy of e31
            file = file or open_clip.download_pretrained(published, prefer_hf_hub=False)
            open_clip.load_checkpoint(clip, file)  # resizes the position embedding if the image size differs
    except Exception as e:  # no such file or tag, no network, an unreadable file, wrong keys or shapes
        if weights != "auto":
            raise Error(f"--clip-weights {weights} of {name} cannot be used ({' '.join(str(e).split())[:200]}); give a "
                        f"FILE, one of the tags {open_clip.list_pretrained_tags_by_model(name)}, or none") from e
        print(f"warning: no CLIP weights {CLIP_TAG} of {name} ({e}); continuing with random weights", flush=True)
        file = None
    clip.mean = published.get("mean", open_clip.OPENAI_DATASET_MEAN)
    clip.std = published.get("std", open_clip.OPENAI_DATASET_STD)
    clip.weights_used = dict(name=f"CLIP {name}", weights=f"{weights} ({file})" if file else "none",
                             sha256=file and sha256(file), trained=bool(file))
    return _freeze(clip)


# -------------------------------------------------------------------------------------------------------------- metrics
def image_metrics(labels, scores):
    """Compute image AUROC and AP from labels (N,) in {0, 1} and scores (N,). Both are None if all labels are equal."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    metrics = dict(image_auroc=roc_auc_score, image_ap=average_precision_score)
    both = len(np.unique(labels)) == 2
    return {name: float(metric(labels, scores)) if both else None for name, metric in metrics.items()}


class PixelMetrics:
    """Exact pixel AUROC, pixel AP, AUPRO and Dice of a set of anomaly maps. All scores are kept and sorted once.

    This takes 4 bytes per normal pixel and 8 per anomalous one: 1 GB for the largest benchmark with masks (brain).
    After `compute`, `best` is the threshold with the highest Dice (scores at or above it are anomalous), and `curve`
    holds the false positive rates, true positive rates and mean overlaps per region of all thresholds."""

    def __init__(self, pixels, threshold=None):
        """pixels: an upper bound on their number. threshold: for `dice_valid`, usually `best` of the valid split."""
        self.threshold, self.best, self.curve = threshold, None, None
        self.maxima, self.low = [], math.inf  # maximum of each map, minimum of all maps
        self.normal, self.n = np.empty(pixels, np.float32), 0  # scores of normal pixels, and their number
        self.anomalous, self.region = [], []  # scores of anomalous pixels, and the region of each
        self.regions = []  # the image of each region

    def update(self, anomaly_maps, masks=None):
        """Add float maps and bool masks, both (B, H, W). Without masks, only the range of the maps is kept.

        Raises ValueError if shapes differ or a map is not finite."""
        maps, shape = np.asarray(anomaly_maps, np.float32), np.shape(masks)  # () without masks
        if maps.ndim != 3 or shape not in ((), maps.shape) or not np.isfinite([maps.min(), maps.max()]).all():
            raise ValueError(f"anomaly maps {maps.shape} and masks {shape} must be (B, H, W), the maps finite")
        first, self.low = len(self.maxima), min(self.low, float(maps.min()))
        self.maxima += maps.max(axis=(1, 2)).tolist()
        pairs = zip(maps, np.asarray(masks, bool), strict=True) if shape else ()
        for image, (scores, mask) in enumerate(pairs, first):
            if mask.any():
                region, count = ndimage.label(mask, np.ones((3, 3)))  # 8-connected
                self.anomalous.append(scores[mask])
                self.region.append(region[mask] + (len(self.regions) - 1))
                self.regions += [image] * count
                scores = scores[~mask]
            self.normal[self.n : self.n + scores.size] = scores.ravel()
            self.n += scores.size

    def compute(self):
        """Return {pixel_auroc, pixel_ap, aupro, dice, dice_valid} in [0, 1], all None if all pixels are of one class.

        aupro: area under the curve of mean overlap per region against false positive rate up to 30%, divided by 0.3
        (thesis, Eq. 3.2; Bergmann et al. 2020). dice: at threshold 0.5, after joint min-max scaling of all
        maps (thesis, Eq. 3.3). dice_valid: at `self.threshold`. Both kinds of Dice pool the pixels of all images."""
        if not self.regions or not self.n:
            return dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro", "dice", "dice_valid"))
        self.normal = normal = self.normal[: self.n]
        normal.sort()
        anomalous, region = np.concatenate(self.anomalous), np.concatenate(self.region)
        overlap = (1 / np.bincount(region) / len(self.regions))[region]  # Eq. 3.2: mean over k of |A n C_k| / |C_k|
        order = anomalous.argsort()[::-1]
        anomalous, pro = anomalous[order], overlap[order].cumsum()
        last = np.append(np.flatnonzero(np.diff(anomalous)), len(anomalous) - 1)  # last of equal scores
        # For each anomalous score, highest first: numbers of anomalous and of normal pixels at or above it
        tp, pro = last + 1, pro[last]
        fp_above, fp = (self.n - np.searchsorted(normal, anomalous[last], side) for side in ("right", "left"))
        hits, middle = np.diff(tp, prepend=0), np.float32(self.low / 2 + max(self.maxima) / 2)
        self.best = float(anomalous[last][np.argmax(2 * tp / (tp + fp + tp[-1]))])

        def dice(threshold):
            true, false = np.sum(anomalous >= threshold), self.n - np.searchsorted(normal, threshold)
            return float(2 * true / (true + false + tp[-1]))

        # Corners of the curves: flat between anomalous scores, a step at each (slanted if shared by normal pixels)
        fpr = np.append(np.stack([fp_above, fp], axis=1).ravel(), self.n) / self.n
        tpr, pro = (np.append(np.stack([np.append(0, y[:-1]), y], axis=1).ravel(), 1) for y in (tp / tp[-1], pro))
        self.curve, inside = (fpr, tpr, pro), fpr <= 0.3
        x, y = np.append(fpr[inside], 0.3), np.append(pro[inside], np.interp(0.3, fpr, pro))
        return dict(pixel_auroc=float(np.sum(hits * (self.n - fp / 2 - fp_above / 2)) / tp[-1] / self.n),
                    pixel_ap=float(np.sum(hits * tp / (tp + fp)) / tp[-1]),
                    aupro=min(1.0, float(np.trapezoid(y, x) / 0.3)),  # rounding
                    dice=dice(np.nextafter(middle, np.float32(np.inf))),  # above the middle, not at it
                    dice_valid=None if self.threshold is None else dice(np.float32(self.threshold)))


@torch.no_grad()
def score(model, image, batch_size=1):
    """Score images (B, 3, H, W) in [0, 1]. Returns float32 arrays: anomaly maps (B, H, W) or None, and scores (B,).

    batch_size: a smaller batch is padded to this size, because rounding depends on it and on the order in memory.
    Raises `Error` if an image is outside [0, 1] or a score is not finite."""
    if image.ndim != 4 or image.shape[1] != 3 or not (image.min() >= 0 and image.max() <= 1):
        raise Error(f"images {tuple(image.shape)} with values {float(image.min())} to {float(image.max())}: expected "
                    "(B, 3, H, W) in [0, 1]; divide 8-bit images by 255")
    n = len(image)
    image = torch.cat([image, *[image[-1:]] * (batch_size - n)]).contiguous()
    maps, scores = (None if part is None else part[:n].float().cpu().numpy() for part in model.predict(image))
    if not np.isfinite(scores).all():
        raise Error("a score is not finite: training diverged; lower --lr")
    return maps, scores


def evaluate(model, split, batch_size, device, threshold=None, each=None):
    """Score a split. Returns an object with metrics {image_auroc, ..., dice_valid}, scores (N,), ms_per_image (without
    loading) and pixel (`PixelMetrics`).

    model.predict: images (B, 3, H, W) in [0, 1] -> anomaly maps (B, H, W) or None, scores (B,). threshold: for
    `dice_valid`. each: a function that is called with the index and the map (H, W) of each image."""
    pixel = PixelMetrics(len(split) * split.size**2 * split.has_masks, threshold)
    scores, seconds, done = [], 0.0, 0
    for image in split.batches(batch_size, device):
        n, started = len(image), time.perf_counter()
        maps, new = score(model, image, batch_size)
        seconds += time.perf_counter() - started
        scores.append(new)
        if maps is not None:
            pixel.update(maps, split.masks[done : done + n] if split.has_masks else None)
            for i in range(n) if each else ():
                each(done + i, maps[i])
        done += n
    scores = np.concatenate(scores)
    return SimpleNamespace(metrics=image_metrics(split.labels, scores) | pixel.compute(), scores=scores,
                           ms_per_image=1000 * seconds / done, pixel=pixel)


# ------------------------------------------------------------------------------------------------------- the run folder
FORMAT = 4  # of model.pt, resume.pt and results.json; increase it whenever their format changes
# Arguments that do not change the scores of a run. Not --data either: the images themselves are compared.
NO_EFFECT = {"data", "root", "out", "device", "maps", "save_maps", "overwrite", "predict", "cache_features"}
# With --checkpoint, all arguments except these come from the checkpoint, unless --weights or --batch-size are given.
FREE = NO_EFFECT | {"checkpoint", "limit", "specificity", "scan_score"}


def read_check(file):
    """Read the record of datasets/check.py; None if the file does not exist or is damaged."""
    with suppress(OSError, ValueError, AttributeError):
        record = json.loads(file.read_text())
        if [type(record.get(key)) for key in ("summary", "checked", "findings")] == [str, str, list]:
            return record


def read_results(file):
    results = None
    with suppress(OSError, ValueError):
        results = json.loads(Path(file).read_text())
    return _checked(results, file, args=dict, images=str, metrics=dict, counts=dict, decision=dict)


def read_checkpoint(file, method, more=()):
    """Read a model.pt of `method`, as written by `Run.keep`. more: additional keys that resume.pt must have."""
    kept = read_state(file, f"model.pt of a {method} run", mmap=True)
    if kept.get("method") != method:
        raise Error(f"{file} belongs to method {kept.get('method')}; expected a model.pt of {method}")
    return _checked(kept, file, args=dict, state=dict, weights=list, notes=dict, train_seconds=float, threads=int,
                    epoch=(int, type(None)), images=(str, type(None)), **dict.fromkeys(more, object))


def _checked(kept, file, **kinds):
    holds = kept if isinstance(kept, dict) else {}
    wrong = [k for k, kind in kinds.items() if k not in holds or not isinstance(holds[k], kind)]
    if wrong or holds.get("format") != FORMAT:
        why = f"{wrong[0]} is missing or wrong" if wrong else f"its format is {holds.get('format')}, not {FORMAT}"
        raise Error(f"{file} is damaged or from another version ({why}); run that method again with --overwrite")
    return kept


class Run:
    """A run's folder, device and state. `finish` writes the results.

    model.pt holds the best state so far, resume.pt what is needed to resume from the last evaluation. A script can add
    values to the dict `notes`, which goes into results.json."""

    def __init__(self, script, args, zero_shot=False):
        """Seed PyTorch, choose the device, make the folder `<out>/<data>/<method>/seed<k>` and lock it.

        With args.checkpoint, the checkpoint's arguments replace those that define the model. zero_shot: the method
        needs no training images, so --predict works without a checkpoint."""
        self.script, self.args, method, kept = Path(script), args, Path(script).stem, None
        self.source = self.script.read_bytes()  # now, since a script may be edited while it runs
        git = ["git", "-C", self.script.parent, "describe", "--always", "--dirty", "--abbrev=40"]
        self.commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        if args.checkpoint:
            kept = read_checkpoint(args.checkpoint, method)
            for field in dataclasses.fields(args):
                given, value = getattr(args, field.name), kept["args"].get(field.name)
                moved = field.name.endswith(("weights", "batch_size")) and given != field.default
                if field.name not in FREE and field.name in kept["args"] and not moved:
                    if given not in (field.default, value):
                        print(f"NOTE: --{field.name.replace('_', '-')} is {value}, from the checkpoint, not {given}")
                    setattr(args, field.name, value)
            check_ranges(args)
        elif args.predict and not zero_shot:
            raise Error("--predict needs a trained model: give --checkpoint FILE (the model.pt of a run)")
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        try:
            self.device = torch.device(best if args.device == "auto" else args.device)
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError) as e:
            reason = str(e).splitlines()[0][:120]
            raise Error(f"--device {args.device} cannot be used ({reason}); try --device auto") from e
        torch.manual_seed(args.seed)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic cuBLAS
        torch.use_deterministic_algorithms(True, warn_only=True)
        if args.predict:  # a folder for each input and model
            asked, model = Path(args.predict).resolve(), sha256(args.checkpoint) if args.checkpoint else args
            if not asked.exists() or Path(args.out, "x").resolve().is_relative_to(asked):
                why = f"contains --out {args.out}; give another --out" if asked.exists() else "does not exist"
                raise Error(f"--predict {args.predict} {why}")
            of_both = hashlib.sha256(f"{asked} {model}".encode(errors="surrogateescape")).hexdigest()
            data, self.images = f"{plain(asked.name)}-{of_both[:8]}", None
        else:
            data = Path(args.data).resolve().name if Path(args.data).is_dir() else args.data.lower()
            self.images = list_benchmark(args)[2]
            if data in ("report", "ablation"):
                raise Error(f"--data {args.data}: {args.out}/{data} has another use; rename the folder")
        self.folder = folder = Path(args.out) / data / method / f"seed{args.seed}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until `finish` or until the process ends
        except OSError as e:
            reason = "another process is using it" if isinstance(e, BlockingIOError) else e.strerror
            raise Error(f"cannot write {folder}: {reason}; choose another --out") from None
        finished, interrupted = folder / "results.json", folder / "resume.pt"
        if args.overwrite or not (finished.exists() or interrupted.exists()):
            for old in sorted(folder.iterdir(), key=lambda old: old != finished):  # results.json first
                if not (args.checkpoint and old.samefile(args.checkpoint)):
                    remove(old)
        elif args.checkpoint:
            raise Error(f"{folder} holds another run; give another --out or --overwrite")
        elif finished.exists():
            self._belongs_to(read_results(finished))
            print(f"{folder} already holds this run, which is finished; nothing to do (--overwrite runs it again)")
            raise SystemExit(0)
        else:
            kept = read_checkpoint(interrupted, method, ("first_stage", "history", "best", "stateful", "random"))
            self._belongs_to(kept)
            if kept["threads"] != torch.get_num_threads():
                print(f"NOTE: {torch.get_num_threads()} threads now, {kept['threads']} before: results can differ")
        print(f"{method} on {data}, seed {args.seed}, {self.device}: {folder}", flush=True)
        self.check = read_check(Path(args.root) / ".cache" / f"{self.images}.check.json")
        if not args.predict:
            print("datasets/check.py:", self.check["summary"] if self.check else "not run on these files", flush=True)
        self.kept = kept  # the content of --checkpoint, or of resume.pt after an interruption, or None
        self.history, self.best, self.notes, self.started = [], -math.inf, {}, time.perf_counter()
        self.total = getattr(args, "epochs", None)  # a script may change it

    def _belongs_to(self, kept):
        """Raise `Error` if the earlier run `kept` had different arguments or images."""
        asked, theirs = (json.loads(json.dumps(a)) for a in (dataclasses.asdict(self.args), kept["args"]))  # as JSON
        other = [f"--{k.replace('_', '-')} {theirs.get(k)}, not {asked[k]}" for k in asked
                 if k not in NO_EFFECT and asked[k] != theirs.get(k)]
        if kept["images"] != self.images:  # the fingerprint includes the folder
            other.append(f"other images: --data {self.args.data} is another folder, or its files have changed")
        if other:
            raise Error(f"{self.folder} holds a run with {other[0]}; give --overwrite or another --out")

    def epochs(self, model, *stateful, first_stage=None):
        """Yield 1, 2, ..., total. After an interruption, continue from the state saved at the last evaluation.

        stateful: what training changes besides the model: optimizers, schedules, other networks. first_stage: number of
        epochs of an earlier stage without validation. Yields nothing if an interrupted run completed that stage."""
        kept, done, total, stage = self.kept, 0, self.total, ""
        if first_stage is not None:
            if kept and kept["first_stage"] is None:
                return
            total, stage = first_stage, " of the first stage"
        if kept:
            restore(model, kept, self.folder)
            for item, state in zip(stateful, kept["stateful"], strict=True):
                item.load_state_dict(state)
            torch.set_rng_state(kept["random"][0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(kept["random"][1])
            self.history, self.best, done = kept["history"], kept["best"], kept["epoch"]
            self.notes |= kept["notes"]
            self.started = time.perf_counter() - kept["train_seconds"]
            self.kept = None
            print(f"resuming after epoch {done}{stage}, where the interrupted run was saved", flush=True)
        for epoch in range(done + 1, total + 1):
            yield epoch
            if epoch % self.args.eval_every == 0 or epoch == total:
                on_gpu = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
                self.keep(model, epoch, "resume.pt", first_stage=first_stage, history=self.history, best=self.best,
                          stateful=[item.state_dict() for item in stateful], random=(torch.get_rng_state(), on_gpu))

    def validate(self, model, epoch, valid, **losses):
        """Log the epoch. Every args.eval_every epochs, and after the last, score valid and keep the best state so far.

        The best state has the highest image AUROC or, if there are masks, the highest mean of image and pixel AUROC
        (thesis, 3.4.1: chosen on valid, evaluated every 10 epochs); ties go to the first. If valid has no anomalous
        images, the last state is kept. losses: name -> value in this epoch. A loss that is not finite ends the run."""
        if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
            raise Error(f"{bad[0]} is {losses[bad[0]]} at epoch {epoch}: training diverged; lower --lr")
        seconds, is_best = time.perf_counter() - self.started, False
        row = dict(epoch=epoch, seconds=round(seconds, 1), **losses)
        self.history.append(row)
        if epoch % self.args.eval_every == 0 or epoch == self.total:
            value = epoch
            if valid and valid.labels.any():
                metrics = evaluate(model, valid, self.args.batch_size, self.device).metrics
                value = float(np.mean([metrics[k] for k in ("image_auroc", "pixel_auroc") if metrics[k] is not None]))
                row |= {f"valid_{k}": v for k, v in metrics.items() if v is not None}
            if is_best := value > self.best:
                self.best = value
                self.keep(model, epoch)
        shown = {k: row[k] for k in (*losses, "valid_image_auroc", "valid_pixel_auroc") if k in row}
        print(f"epoch {epoch}/{self.total}", *(f"{k} {v:.4f}" for k, v in shown.items()),
              f"{seconds:.0f} s, {seconds / epoch * (self.total - epoch):.0f} s left", *["(kept)"] * is_best, sep="  ",
              flush=True)
        write_csv(self.folder / "log.csv", self.history)

    def keep(self, model, epoch=None, file="model.pt", **more):
        """Save the model, without its frozen networks, as model.pt, which `finish` evaluates."""
        used, frozen = pretrained(model)
        kept = dict(format=FORMAT, method=self.script.stem, args=dataclasses.asdict(self.args), epoch=epoch,
                    notes=self.notes, train_seconds=time.perf_counter() - self.started, weights=used,
                    state={k: v.cpu() for k, v in model.state_dict().items() if not k.startswith(frozen)},
                    images=self.images, threads=torch.get_num_threads(), **more)
        with atomic(self.folder / file) as tmp, open(tmp, "wb") as f:
            torch.save(kept, f)


def pretrained(model):
    """Return `weights_used` of each pretrained network in `model`, and the key prefixes of the frozen ones."""
    networks = [(name, module) for name, module in model.named_modules() if hasattr(module, "weights_used")]
    frozen = tuple(f"{name}." for name, module in networks if hasattr(module, "frozen"))
    return [module.weights_used for _, module in networks], frozen


def restore(model, kept, source):
    """Load the state in `kept` (see `read_checkpoint`) into `model`. source: its file, named in errors."""
    used, frozen = pretrained(model)
    if [w["sha256"] for w in kept["weights"]] != [w["sha256"] for w in used]:
        raise Error(f"{source} was trained on the frozen weights {kept['weights']}, not on {used}; give the same ones")
    load_state(model, kept["state"], source, frozen)


def finish(run, model, splits):
    """Evaluate the kept state once on the test split and write the results; results.json is written last.

    splits: (train, valid, test) from `load_benchmark`. Thresholds and pictures need datasets/decisions.py, and
    --predict needs datasets/predict.py; a script copied without these files works but lacks these features."""
    args, folder, (train, valid, test), decision, metrics, test_ms = run.args, run.folder, splits, {}, {}, None
    kept = run.kept if args.checkpoint else read_checkpoint(folder / "model.pt", run.script.stem)
    restore(model, kept, args.checkpoint or folder)
    model.to(run.device)
    for name in [w["name"] for w in kept["weights"] if not w["trained"]]:
        print(f"NOTE: {name} has UNTRAINED weights; the results are meaningless")
    extra = Path(__file__).with_name("datasets")
    sys.path.insert(0, str(extra))
    if args.predict:
        if not all((extra / f"{name}.py").exists() for name in ("decisions", "predict", "volumes")):
            raise Error(f"--predict needs decisions.py, predict.py and volumes.py in {extra}; copy them there")
        from predict import predict

        return predict(run, model, kept)
    if (extra / "decisions.py").exists():
        import decisions
    else:
        decisions = None
        print("NOTE: without datasets/decisions.py there are no thresholds and no pictures")
    for old in ("maps", "browser", "curves.csv", "lesions.csv"):
        remove(folder / old)  # written before an interruption
    on_valid = evaluate(model, valid or train, args.batch_size, run.device)
    if decisions:
        seen = decisions.on_valid(model, valid, on_valid)
        decision = decisions.decide(seen, args)
        kept |= dict(seen=seen, decision=decision)
        print(decisions.stated(decision))
    if test:
        draw = decisions and decisions.pictures(run, test, decision)
        result = evaluate(model, test, args.batch_size, run.device, on_valid.pixel.best, draw)
        metrics, test_ms = result.metrics, result.ms_per_image
        rows = zip(test.paths, test.labels, result.scores, strict=True)
        write_csv(folder / "scores.csv", [dict(path=p, label=int(y), score=float(s)) for p, y, s in rows])
        if decisions:
            metrics |= decisions.write(run, test, result, decision)
    versions = dict(python=platform.python_version())
    for package in ("torch", "torchvision", "open_clip_torch", "numpy", "scipy", "scikit-learn", "pillow"):
        with suppress(PackageNotFoundError):  # a copied script may not need it
            versions[package] = version(package)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)  # GiB
    on_gpu = run.device.type == "cuda"
    same = FREE - {"checkpoint"} | {"seed"} | ({"batch_size"} if not hasattr(args, "epochs") else set())  # ignored
    results = dict(
        format=FORMAT, method=run.script.stem, data=folder.parts[-3], seed=args.seed, metrics=metrics,
        images=run.images, counts={name: dict(normal=int((s.labels == 0).sum()), anomalous=int(s.labels.sum()))
                                   for name, s in zip(SPLITS, splits, strict=True) if s},
        decision=decision, check=run.check, test_ms_per_image=test_ms,
        **{key: kept[key] for key in ("epoch", "train_seconds", "weights", "notes")},
        peak_memory_gib=dict(ram=peak) | (dict(gpu=torch.cuda.max_memory_allocated() / 2**30) if on_gpu else {}),
        parameters=dict(total=sum(p.numel() for p in model.parameters()),
                        trained=sum(p.numel() for p in model.parameters() if p.requires_grad)),
        args=dataclasses.asdict(args), command=" ".join(sys.argv[1:]),
        changed={f.name: getattr(args, f.name) for f in dataclasses.fields(args)
                 if f.name not in same and getattr(args, f.name) != f.default},
        versions=versions, device=torch.cuda.get_device_name() if on_gpu else str(run.device),
        threads=torch.get_num_threads(), commit=run.commit, finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    with atomic(folder / "model.pt") as tmp, open(tmp, "wb") as f:
        torch.save(kept, f)
    (folder / run.script.name).write_bytes(run.source)
    with atomic(folder / "results.json") as tmp:
        tmp.write_text(json.dumps(results, indent=1))
    remove(folder / "resume.pt")
    os.close(run.lock)
    shown = [f"{k} {v:.4f}" for k, v in metrics.items() if v is not None and not k.endswith("_f1")]
    for start in range(0, len(shown), 4):
        print("", *shown[start : start + 4], sep="  ")
    print(f"  epoch {kept['epoch'] or '-'}, train {kept['train_seconds']:.1f} s, peak {peak:.2f} GiB: {folder}")

