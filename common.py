"""What the method scripts must share to be comparable: benchmarks, pretrained weights, metrics, the run folder.

A script calls, in this order: `start_run` (seeds, device, folder), `load_benchmark` (train, valid, test), then trains
on `Split.batches`, calls `Run.validate` after each epoch, which keeps the state that is best on valid (or `Run.keep`
where there are no epochs), and ends with `finish`: the test set is scored once, there. The model is an nn.Module with a
method `predict` (see `evaluate`). What a reader needs to re-implement a paper is in the paper's own script, not here.

Shapes: N images of a split, B of a batch, C channels, H W image. Scores: higher is more anomalous.
"""

import csv
import ctypes
import dataclasses
import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import torch
import tyro
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from torchvision.models import get_model, get_model_weights
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2.functional import gaussian_blur, pad
from tqdm import tqdm


# ----------------------------------------------------------------------------------------------------- errors and files
class Error(Exception):
    """What a user can mend. The message is one line: what is wrong, with which file or flag, and what to do."""


def command_line(Args, description):
    """The script's arguments, from the command line. From here on an `Error` ends the program with one line on stderr
    and exit code 2, and Ctrl-C with one line."""
    sys.excepthook = in_one_line
    return tyro.cli(Args, description=description)


def in_one_line(kind, error, traceback):
    """`sys.excepthook` of the scripts; a notebook or a test that imports them sees the exception itself."""
    if issubclass(kind, Error):
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; run the same command again to resume", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


@contextmanager
def atomic(path):
    """Yield a temporary name beside `path`; what was written there takes the real name only when it is complete.

    Works for files and folders. A full disk or a folder that cannot be written ends the program with one line."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        raise Error(f"cannot write {path}: {getattr(e, 'strerror', None) or e}; free some space or choose another "
                    f"folder") from e
    finally:
        if temporary.exists():
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def write_csv(path, rows):
    """Rows are dicts with the same keys; the first one gives the header."""
    with atomic(path) as tmp, open(tmp, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def progress(iterable, what, total=None):
    """A progress bar on stderr, silent when that is not a terminal."""
    return tqdm(iterable, desc=what, total=total, disable=None, leave=False)


# ---------------------------------------------------------------------------------------- benchmarks: finding the files
NAMES = {  # folder names of the published downloads; `--data FOLDER` takes any other benchmark
    "brain": ["brain", "brain_ad"],
    "liver": ["liver", "liver_ad"],
    "resc": ["resc", "retina_resc_ad"],
    "oct2017": ["oct2017", "retina_oct2017_ad"],
    "chest": ["chest", "chest-rsna", "chest_ad"],
    "histo": ["histo", "camelyon16", "camelyon16_256", "histopathology_ad"],
    "phantom": ["phantom"],
}
SPLITS = {"train": ["train"], "valid": ["valid", "val", "validation"], "test": ["test"]}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
MASK_FOLDERS = ["anomaly_mask", "label"]


def _child(folder, *names):
    """The subfolder of `folder` with one of these names, without regard to case; None if there is none."""
    found = {p.name.lower(): p for p in folder.iterdir() if p.is_dir()} if folder and folder.is_dir() else {}
    return next((found[n.lower()] for n in names if n.lower() in found), None)


def images_in(folder, pattern="*"):
    """Image files of `folder` (pattern "**/*": and below it), sorted; hidden files and non-images are left out."""
    found = folder.glob(pattern) if folder else []
    return sorted(p for p in found if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file())


def _split_folder(base, split):
    """`base`/train, also where it is nested as Train/train; None if there is none."""
    folder = _child(base, *SPLITS[split])
    while folder and (inner := _child(folder, *SPLITS[split])):
        folder = inner
    return folder


def _benchmark_folder(data, root):
    """The folder that holds train and test splits, at most three levels below what was asked for."""
    asked = Path(data)
    if data.lower() in NAMES and not asked.is_dir():
        asked = _child(Path(root), *NAMES[data.lower()])
        if asked is None:
            raise Error(f"benchmark '{data}' not found: {Path(root).resolve()} has none of the folders "
                        f"{NAMES[data.lower()]}; "
                        "prepare it with a script of datasets/, or give its folder with --data")
    if not asked.is_dir():
        raise Error(f"no folder {asked}; --data takes one of {', '.join(NAMES)} (looked for below --root) or a folder")
    level = [asked]
    for _ in range(4):
        for folder in level:
            if _split_folder(folder, "test") and list_split(folder, "train"):
                return folder
        level = sorted(p for folder in level for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    raise Error(f"{asked} is not a benchmark: expected images in train/good, and test/good beside test/Ungood (or "
                f"MVTec AD's "
                f"test/<defect>), found {sorted(p.name for p in asked.iterdir())[:8]}")


def _masks_of(images, folder, split):
    """The mask file of each image, by stem (MVTec AD: stem_mask); [None, ...] where the benchmark has no masks."""
    if folder is None:
        return [None] * len(images)
    masks = {p.stem.removesuffix("_mask"): p for p in images_in(folder)}
    for image in images:
        if image.stem not in masks:
            raise Error(f"{split}: anomalous image {image} has no mask {folder / image.stem}.png; add the mask or "
                        f"remove both")
    if extra := set(masks) - {p.stem for p in images}:
        raise Error(f"{split}: mask {masks[min(extra)]} has no image of that name; add the image or remove the mask")
    return [masks[p.stem] for p in images]


def list_split(base, split):
    """[(image, label, mask or None)] of one split: label 0 (good) first, then 1; every published layout is read.

    The layouts: train/good[/img], test/{good,Ungood}[/img] with masks in Ungood/{anomaly_mask,label};
    valid/img/{good,Ungood} with valid/label/{good,Ungood}; Test/test/{good,Ungood} with Test/test_label/Ungood;
    MVTec AD's test/<defect> with ground_truth/<defect>/*_mask.png."""
    folder = _split_folder(base, split)
    if folder is None:
        return []
    sibling = f"{folder.name}_label".lower()
    mask_roots = [_child(folder, "label"), _child(folder.parent, sibling), _child(folder, sibling),
                  _child(base, "ground_truth")]
    entries = []
    for cls in sorted(p for p in (_child(folder, "img") or folder).iterdir() if p.is_dir() and p.name[0] != "."):
        name = cls.name.lower()
        if name in [*MASK_FOLDERS, sibling] or (split == "train" and name != "good"):
            continue
        images = images_in(_child(cls, "img") or cls)
        masks = [None] * len(images)
        if name != "good":
            folders = [_child(cls, *MASK_FOLDERS), *(_child(root, name) for root in mask_roots)]
            masks = _masks_of(images, next(filter(None, folders), None), split)
        entries += [(image, int(name != "good"), mask) for image, mask in zip(images, masks, strict=True)]
    return sorted(entries, key=lambda e: (e[1], str(e[0])))


# ------------------------------------------------------------------------------------------------------- NIfTI volumes
class Damaged(ValueError):
    """A file that cannot be used: the message says which, what is wrong, and what to do."""


class Volume:
    """A NIfTI volume read by axial slices, the same way up whatever its affine: rows run from front to back, columns
    from the patient's right to the left (as radiologists look at it), slices upwards. Damaged if it cannot be used."""

    def __init__(self, file):
        self.file = file
        try:
            self.image = nibabel.load(file)
        except (OSError, EOFError, nibabel.filebasedimages.ImageFileError) as e:
            raise Damaged(f"{file} is not a readable NIfTI volume ({e}); download it again") from e
        if len(self.image.shape) != 3:
            raise Damaged(f"{file} has {len(self.image.shape)} dimensions {self.image.shape}; one volume has 3")
        orientation = nibabel.io_orientation(self.image.affine)  # by voxel axis: the axis of the body, and its sign
        if np.isnan(orientation).any():
            raise Damaged(f"{file} has an affine that names no orientation; convert the source again")
        self.axes = [int(np.flatnonzero(orientation[:, 0] == a)[0]) for a in range(3)]  # right, front, up
        self.signs = [orientation[a, 1] for a in self.axes]
        self.shape = tuple(self.image.shape[a] for a in self.axes)

    def axial(self, start=0, stop=None):
        """Slices start to stop as (n, H, W) floats, rescaled as the header says; Damaged if one is not finite."""
        depth = self.shape[2]
        stop = depth if stop is None else stop
        if not 0 <= start < stop <= depth:
            raise Damaged(f"{self.file} has {depth} axial slices; the rule reads {start} to {stop - 1}")
        window = slice(start, stop) if self.signs[2] > 0 else slice(depth - stop, depth - start)
        where = [slice(None)] * 3
        where[self.axes[2]] = window
        try:
            voxels = np.asarray(self.image.dataobj[tuple(where)], np.float32)  # reads no more than it needs
        except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError) as e:
            raise Damaged(f"{self.file} is damaged ({e}); download it again") from e
        if not np.isfinite(voxels).all():
            raise Damaged(f"{self.file} has voxels that are not finite; download or convert it again")
        return voxels.transpose(self.axes[::-1])[self._turned()]  # from up, front, right

    def _turned(self):
        return tuple(slice(None, None, int(sign)) for sign in (self.signs[2], -self.signs[1], -self.signs[0]))

    def save(self, slices, file):
        """Write what was made of all axial slices, (D, H, W), as a volume that lies on this one in every viewer."""
        voxels = slices[self._turned()].transpose(np.argsort(self.axes[::-1]))
        with atomic(file) as tmp:
            nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), self.image.affine), f"{tmp}.nii.gz")
            os.replace(f"{tmp}.nii.gz", tmp)


def stretched(image):
    """(H, W) floats as uint8, the least value black and the greatest white."""
    low, high = image.min(), image.max()
    return np.rint((image - low) * (255 / ((high - low) or 1))).astype(np.uint8)


# -------------------------------------------------------------------------------------------- benchmarks: decoding once
def _decode(path, size=None):
    """uint8 (C, size, size), C = 1 where the image is grey, else 3, and the file's own (width, height).

    size None: not resized. 16 bit: 65535 is white. ValueError where the file cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            original = image.size
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                array = np.asarray(image, np.float32)
                if image.mode == "F" or array.min() < 0 or array.max() > 65535:
                    raise ValueError("32-bit or signed pixels have no fixed white: save it with 8 or 16 bits")
                image = Image.fromarray(array / 257)
            else:
                image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            image = image.resize((size, size), Image.Resampling.BILINEAR) if size else image  # Pillow antialiases
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # a broken PNG raises SyntaxError
        raise ValueError(f"{path} is not a readable image ({e}); replace or remove it") from e
    array = np.asarray(image)
    array = np.rint(array).astype(np.uint8) if array.dtype != np.uint8 else array
    if array.ndim == 2:
        return array[None], original
    array = array.transpose(2, 0, 1)
    return (array[:1] if (array == array[:1]).all() else array), original


def _decode_mask(path, image_size, size):
    """bool (size, size): anomalous where the value is above 10% of full scale; resized by nearest neighbour."""
    if path is None:
        return np.zeros((size, size), bool)
    array, original = _decode(path)
    if original != image_size:
        raise ValueError(f"mask {path} is {'x'.join(map(str, original))}, its image {'x'.join(map(str, image_size))} "
                         "pixels; make them equal")
    array = array.max(axis=0)
    if 0 < array.max() <= 25:
        raise ValueError(f"mask {path} has no value above {array.max()} of 255; save masks as 0 and 255 (anomalous)")
    return np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.NEAREST)) > 25.5


class Split:
    """One split, decoded and resized once into arrays on disk: images uint8 (N, C, H, W), masks bool (N, H, W) or None.

    `labels` (N,): 0 normal, 1 anomalous, -1 unknown; `paths`: as written to scores.csv."""

    def __init__(self, name, entries, size, base, cache):
        """entries: [(image, label, mask or None)] as `list_split` gives them; cache: folder for the decoded arrays."""
        self.name, self.size = name, size
        self.paths = [image.relative_to(base).as_posix() for image, _, _ in entries]
        self.labels = np.array([label for _, label, _ in entries], int)
        self.has_masks = any(mask for _, _, mask in entries)
        state = [(str(p.relative_to(base)), (s := p.stat()).st_size, s.st_mtime_ns)
                 for e in entries for p in (e[0], e[2]) if p]
        where, what = (hashlib.sha256(repr(x).encode()).hexdigest()[:12] for x in (base.resolve(), (state, size)))
        stem = f"{base.resolve().name}-{where}-{name}-{size}-{len(entries)}"
        self.files = [cache / f"{stem}-{what}.{kind}.npy" for kind in ("images", "masks")]
        if not all(f.exists() for f in self.files):
            for old in cache.glob(f"{glob.escape(stem)}-*.npy"):  # from before a file changed
                old.unlink(missing_ok=True)
            try:
                self._decode_all(entries)
            except ValueError as e:
                raise Error(e) from e

    def _decode_all(self, entries):
        def one(entry):
            array, original = _decode(entry[0], self.size)
            return array, _decode_mask(entry[2], original, self.size) if self.has_masks else None

        def write(channels, f, g):  # False: an image has more channels
            # written, not mapped: on a full disk a mapped write kills the process without a word
            shape = len(entries), channels, self.size, self.size
            np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=shape))
            shape = (len(entries) * self.has_masks, self.size, self.size)
            np.lib.format.write_array_header_1_0(g, dict(descr="|b1", fortran_order=False, shape=shape))
            for start in progress(range(0, len(entries), 256), f"decoding {self.name}"):
                for array, mask in pool.map(one, entries[start : start + 256]):
                    if len(array) > channels:
                        return False
                    f.write(np.broadcast_to(array, (channels, self.size, self.size)).tobytes())
                    if mask is not None:
                        g.write(mask.tobytes())
            return True

        with atomic(self.files[0]) as images, atomic(self.files[1]) as masks, ThreadPoolExecutor() as pool:
            for channels in (1, 3):  # grey, until a coloured image is met
                with open(images, "wb") as f, open(masks, "wb") as g:
                    if write(channels, f, g):
                        break

    # Both are mapped anew at each use, so that pages once read don't count as this process' memory for ever.
    @property
    def images(self):
        return np.load(self.files[0], mmap_mode="r")

    @property
    def masks(self):
        return np.load(self.files[1], mmap_mode="r") if self.has_masks else None

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, device="cpu"):
        """Images (B, 3, H, W), float32 in [0, 1], on `device`; grey ones repeated to three channels."""
        image = torch.from_numpy(self.images[indices]).to(device)  # an index array copies, so nothing mapped escapes
        return (image.float() / 255).expand(-1, 3, -1, -1)

    def order(self, batch_size, shuffle=None, drop_last=False):
        """Yield the indices (b,) of each batch; the arguments of `batches`."""
        order = np.arange(len(self)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(self))
        if drop_last and len(self) >= batch_size:
            order = order[: len(self) // batch_size * batch_size]
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def batches(self, batch_size, device="cpu", shuffle=None, drop_last=False):
        """Yield all images as `batch` gives them.

        shuffle: None for file order, or a seed (an int or a tuple such as (seed, epoch)) for that seed's order.
        drop_last: leave out an incomplete last batch, unless it is the only one."""
        for indices in self.order(batch_size, shuffle, drop_last):
            yield self.batch(indices, device)


class Features:
    """What a frozen network says of a split's images, for training loops that ask it again each epoch.

    Computed once and kept in a file below the run folder if that takes no more than `args.cache_features` GiB ("auto":
    16, if the disk has twice that to spare), else computed anew for each batch; which of the two is printed."""

    def __init__(self, extract, split, args, run):
        """extract: images (B, 3, H, W) -> [(B, ...), ...], frozen: constants of each image."""
        self.extract, self.split, self.device, self.file = extract, split, run.device, None
        first = [f.cpu() for f in extract(split.batch([0], run.device))]
        self.shapes, needed = [f.shape[1:] for f in first], sum(f.numel() for f in first) * 4 * len(split) / 2**30
        free = shutil.disk_usage(run.folder).free / 2**30
        budget = min(16, free / 2) if args.cache_features == "auto" else args.cache_features
        run.notes["features_cached"] = needed <= budget
        print(f"features of {split.name}: {needed:.2f} GiB, " + ("cached" if needed <= budget else
              f"above the budget of {budget:.2f} (--cache-features), computed anew each epoch"), flush=True)
        if needed <= budget:
            self.file = tempfile.TemporaryFile(dir=run.folder)  # noqa: SIM115 (lives as long as this object)
            try:
                for image in progress(split.batches(args.batch_size, run.device), "features",
                                      -(-len(split) // args.batch_size)):
                    rows = torch.cat([f.flatten(1).float().cpu() for f in extract(image)], dim=1)
                    self.file.write(rows.numpy().tobytes())
                self.file.flush()
            except OSError as e:
                raise Error(f"cannot write the features below {run.folder} ({e.strerror}); free some space, or give "
                            "--cache-features 0") from e

    def batches(self, batch_size, shuffle=None, drop_last=False):
        """Yield [(b, ...), ...] on the device, float32, in the order of `Split.batches`."""
        sizes = [shape.numel() for shape in self.shapes]
        for indices in self.split.order(batch_size, shuffle, drop_last):
            if self.file is None:
                yield self.extract(self.split.batch(indices, self.device))
                continue
            rows = np.memmap(self.file, np.float32, "r", shape=(len(self.split), sum(sizes)))  # anew: see `images`
            parts = torch.from_numpy(rows[indices]).to(self.device).split(sizes, dim=1)
            yield [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def is_volume(path):
    return Path(path).name.lower().endswith((".nii", ".nii.gz"))


def _slices_as_images(file, cache):
    """The folder of a NIfTI volume's axial slices as 8-bit PNG, each scaled by its own range as in `brain`."""
    try:
        folder = cache / f"{file.name}-{sha256(file)[:12]}"
        if not folder.exists():
            with atomic(folder) as tmp:
                tmp.mkdir()
                for z, image in enumerate(Volume(file).axial()):
                    Image.fromarray(stretched(image)).save(tmp / f"{z:04}.png")
    except Damaged as e:
        raise Error(e) from e
    except OSError as e:
        raise Error(f"cannot read {file} ({e.strerror}); give a NIfTI volume") from e
    return folder


def _thumbnails(split, block=256):
    """The images' 32x32 means, each of zero mean and unit length, (N, 1024): their products are correlations."""
    found = []
    for start in range(0, len(split), block):
        image = torch.from_numpy(split.images[start : start + block].copy()).float().mean(dim=1, keepdim=True)
        small = torch.nn.functional.adaptive_avg_pool2d(image, 32).flatten(1)
        found.append(torch.nn.functional.normalize(small - small.mean(dim=1, keepdim=True)))
    return torch.cat(found)


def find_leaks(splits, cache):
    """Images of valid and test that stand in train, too: {split: count, ..., examples: [(path, path in train)]}.

    Two images count as one if their 32x32 means correlate above 0.99, mirrored or not. Kept in `cache`."""
    train, others = splits[0], [s for s in splits[1:] if s]
    name = hashlib.sha256("".join(s.files[0].name for s in [train, *others]).encode()).hexdigest()[:12]
    kept = cache / f"{train.files[0].name.split('-train-')[0]}-{name}.leaks.json"
    if not kept.exists():
        known, leaks = _thumbnails(train), dict(examples=[])
        for split in others:
            count = 0
            for start, small in enumerate(_thumbnails(split).split(1024)):
                mirrored = small.view(-1, 32, 32).flip(2).flatten(1)
                best = torch.maximum(small @ known.T, mirrored @ known.T).max(dim=1)  # (b,)
                found = torch.nonzero(best.values > 0.99).flatten().tolist()
                count += len(found)
                leaks["examples"] += [(split.paths[1024 * start + i], train.paths[best.indices[i]]) for i in found[:2]]
            leaks[split.name] = count
        leaks["examples"] = leaks["examples"][:2]
        with atomic(kept) as tmp:
            tmp.write_text(json.dumps(leaks))
    return json.loads(kept.read_text())


def leak_line(leaks):
    """What `find_leaks` found, in words; "" for nothing."""
    counts = " and ".join(f"{n} images of {split}" for split, n in leaks.items() if split != "examples" and n)
    examples = " and ".join(f"{path} = {known}" for path, known in leaks["examples"])
    return f"LEAK: {counts} stand in train, too, e.g. {examples}" if counts else ""


def load_benchmark(args):
    """(train, valid, test) as `Split`s for args.data, args.root, args.image_size and args.limit; prints what was found.

    valid is None where the benchmark has none (MVTec AD). With args.predict: (None, None, that folder's images).
    Ends with one line naming the file for every kind of unusable input."""
    cache = Path(args.root) / ".cache"
    if args.predict:
        base = Path(args.predict)
        if is_volume(base):
            base = _slices_as_images(base, cache)
        found = [base] if base.is_file() and base.suffix.lower() in SUFFIXES else images_in(base, "**/*")
        entries, base = [(p, -1, None) for p in found], base.parent if base.is_file() else base
        if not entries:
            raise Error(f"--predict {base}: no image, no folder with images ({', '.join(sorted(SUFFIXES))}), and no "
                        f"NIfTI "
                        "volume")
        print(f"{args.predict}: {len(entries)} images to score")
        return None, None, Split("predict", entries, args.image_size, base, cache)
    base = _benchmark_folder(args.data, args.root)
    splits, counts = [], []
    for name in SPLITS:
        entries = list_split(base, name)
        normal, anomalous = ([e for e in entries if e[1] == label] for label in (0, 1))
        if args.limit:  # evenly spread over the files
            normal, anomalous = ([c[i * len(c) // args.limit] for i in range(args.limit)] if len(c) > args.limit else c
                                 for c in (normal, anomalous))
        if name == "valid" and not (normal and anomalous):
            print(f"warning: {base} has no valid split with normal and anomalous images: no checkpoint can be chosen, "
                  "the last epoch is taken")
            splits.append(None)
            continue
        if not normal or (name == "test" and not anomalous):
            raise Error(f"{base}: the {name} split has {len(normal)} normal and {len(anomalous)} anomalous images; "
                        f"put images (png, jpg, bmp, tif) into {name}/good" + " and test/Ungood" * (name == "test"))
        splits.append(Split(name, normal + anomalous, args.image_size, base, cache))
        counts.append(f"{name} {len(normal)} normal" + f" + {len(anomalous)} anomalous" * bool(anomalous))
    leaks = splits[2].leaks = find_leaks(splits, cache)
    print(f"{base}: {', '.join(counts)}; {'grey' if splits[2].images.shape[1] == 1 else 'colour'}, "
          f"{args.image_size}x{args.image_size}, {'' if splits[2].has_masks else 'no '}masks"
          + f"; LIMITED to {args.limit} a class" * bool(args.limit), flush=True)
    if line := leak_line(leaks):
        print(line, flush=True)
    return splits


# -------------------------------------------------------------------------------------------------- pretrained networks
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize(image, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """(B, 3, H, W) in [0, 1] -> zero mean and unit deviation a channel, as the network saw its training images."""
    mean, std = (torch.tensor(v, device=image.device).view(1, 3, 1, 1) for v in (mean, std))
    return (image - mean) / std


def smooth(anomaly_map, sigma=4):
    """Gaussian filter of (B, H, W), cut at 4 sigma, the border mirrored: equal to scipy.ndimage.gaussian_filter."""
    radius, size = 4 * sigma, 8 * sigma + 1
    padded = pad(anomaly_map, radius, padding_mode="symmetric")
    blurred = gaussian_blur(gaussian_blur(padded, [1, size], sigma), [size, 1], sigma)  # separable
    return blurred[..., radius:-radius, radius:-radius]


def sha256(source):
    """Hex digest of a file (a path) or of a network's state (a module)."""
    if not isinstance(source, torch.nn.Module):
        with open(source, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    digest = hashlib.sha256()
    for key, value in source.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_state(file, what):
    """The state dict in `file`, on the CPU; ends with one line if it cannot be read. what: whose weights are wanted."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Error(f"no file {file}; give the {what}") from None
    except Exception as e:  # not a zip file, truncated, or pickled objects that weights_only refuses
        raise Error(f"{file} cannot be read by PyTorch ({str(e).splitlines()[0]}); give the {what}") from e


def pretrained_network(name, weights):
    """A torchvision classification network on the CPU; its `weights_used` is {name, weights, sha256, trained}.

    weights: 'imagenet' (torchvision's IMAGENET1K_V1 through its own cache, the weights of all official codes), a FILE
    (torchvision's state dict; the classifier may be missing), 'none' (untrained, always from seed 0), or 'auto'
    ('imagenet', else 'none' with a warning). Without network or cache it ends within 10 s with one line."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = get_model(name, weights=None)
    if weights == "none":
        net.weights_used = dict(name=name, weights="none", sha256=sha256(net), trained=False)
        return net
    if weights in ("imagenet", "auto"):
        published = get_model_weights(name).IMAGENET1K_V1
        file = Path(torch.hub.get_dir()) / "checkpoints" / published.url.rsplit("/", 1)[1]
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(8)
            state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as e:  # no network, a timeout, a broken file in the cache, a hash that differs
            if weights == "auto":
                print(f"warning: no ImageNet weights for {name} ({e}); going on with an UNTRAINED network", flush=True)
                return pretrained_network(name, "none")
            raise Error(f"ImageNet weights of {name} are neither cached nor to be had ({e}); put them at {file}, "
                        "or give a file with --weights FILE, or run an untrained network with --weights none") from e
        finally:
            socket.setdefaulttimeout(timeout)
    else:
        file = Path(weights)
        state = read_state(file, f"torchvision weights of {name}, or --weights imagenet, auto or none")
    own = net.state_dict()
    missing = [k for k in own if k not in state and not k.startswith(("fc.", "classifier."))]
    wrong = [k for k in state if k not in own or state[k].shape != own[k].shape]
    if missing or wrong:
        raise Error(f"{file} does not fit torchvision's {name}: {len(missing)} tensors missing, {len(wrong)} unknown "
                    f"or of "
                    f"another shape (first: {(missing + wrong)[0]}); give weights of {name}, or another --backbone")
    net.load_state_dict(state, strict=False)
    net.weights_used = dict(name=name, weights=weights, sha256=sha256(file), trained=True)
    return net


def feature_extractor(name, layers, weights):
    """A frozen network in eval mode that returns {layer: (B, C, h, w)} and stops at the last of `layers`.

    name, weights: see `pretrained_network`; layers: torchvision's node names. A checkpoint leaves out every module with
    `frozen` set, as here: it names that module's weights instead, and refuses others."""
    net = pretrained_network(name, weights)
    extractor = create_feature_extractor(net.eval(), layers).eval().requires_grad_(False)
    extractor.train = lambda mode=True: extractor  # batch norm keeps its statistics, whatever the model around it does
    extractor.weights_used, extractor.frozen = net.weights_used, True
    return extractor


CLIP_TAG = "laion400m_e32"  # the only public training of ViT-B-16-plus-240 (e31 is the same one, an epoch earlier)
TINY_CLIP = dict(embed_dim=128, vision_cfg=dict(layers=4, width=128, patch_size=16),
                 text_cfg=dict(layers=4, width=128, heads=4))  # --model tiny: for tests and demonstrations


def load_clip(name, weights, image_size):
    """A frozen open_clip.CLIP with a ViT, on the CPU, for images of `image_size`; its `mean` and `std` are those of its
    training images, its `weights_used` is that of `pretrained_network`.

    name: an open_clip model, or 'tiny', which has no published weights. weights: a published TAG of open_clip, a FILE,
    'none' (untrained, always from seed 0), or 'auto' (CLIP_TAG, else 'none' with a warning)."""
    import open_clip  # here, since only three methods need it

    config = TINY_CLIP if name == "tiny" else open_clip.get_model_config(name)
    if config is None:
        raise Error(f"--model {name}: open_clip has no such model; take ViT-B-16-plus-240, ViT-B-16 or tiny")
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision.get("layers"), int) or config.get("custom_text") or "hf_model_name" in text:
        raise Error(f"--model {name}: needs a ViT and CLIP's own text encoder; take ViT-B-16-plus-240 or ViT-B-16")
    if image_size % vision["patch_size"]:
        raise Error(f"{name} cannot tile {image_size} pixels with its patches of {vision['patch_size']}; take a "
                    "multiple of that")
    published, file = {}, None
    tag = CLIP_TAG if weights == "auto" else weights
    if Path(weights).is_file():
        file = weights
    elif tag in open_clip.list_pretrained_tags_by_model(name):
        published = open_clip.get_pretrained_cfg(name, tag)
        try:  # the release first: on the hub, laion400m_e32 of the default model holds the weights of e31
            file = open_clip.download_pretrained(published, prefer_hf_hub=False)
        except Exception as e:  # no network, and not in open_clip's cache
            if weights != "auto":
                raise Error(f"CLIP weights {tag} of {name} are not cached and could not be downloaded ({e}); put "
                            f"{published['url'] or published['hf_hub']} into ~/.cache/clip, or give --clip-weights FILE, "
                            "or none for an untrained CLIP") from e
    elif weights not in ("auto", "none"):
        raise Error(f"--clip-weights {weights}: there is no such file, and {name} has the published tags "
                    f"{', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}; give one of these, a FILE, "
                    "or none for an untrained CLIP")
    if weights == "auto" and not file:
        print(f"warning: no CLIP weights {tag} of {name}; continuing with an UNTRAINED CLIP", flush=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(**config | dict(vision_cfg=vision | dict(image_size=image_size), quick_gelu=config.get(
            "quick_gelu", False) or published.get("quick_gelu", False)))
        if name == "tiny":  # PyTorch's initial values, smaller ones, for a text encoder that stays random
            for block in clip.transformer.resblocks:
                torch.nn.init.xavier_uniform_(block.attn.in_proj_weight)
                for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                    layer.reset_parameters()
    if file:
        try:
            open_clip.load_checkpoint(clip, file)  # interpolates the positions if the file has another image size
        except Exception as e:  # unreadable, pickled objects, other keys, other shapes
            raise Error(f"{file} does not fit {name} ({' '.join(str(e).split())[:200]}); give the weights of {name}, "
                        "or another --model") from e
    clip.eval().requires_grad_(False)
    clip.train = lambda mode=True: clip  # stays in eval mode, whatever the model around it does
    clip.frozen = True
    clip.mean = published.get("mean", open_clip.OPENAI_DATASET_MEAN)
    clip.std = published.get("std", open_clip.OPENAI_DATASET_STD)
    clip.weights_used = dict(name=f"CLIP {name}", weights=f"{tag} ({file})" if published else str(file or "none"),
                             sha256=sha256(file or clip), trained=file is not None)
    return clip


# -------------------------------------------------------------------------------------------------------------- metrics
def image_metrics(labels, scores):
    """Image AUROC and average precision (sklearn) of labels (N,) in {0, 1}, scores (N,); None if there is one class."""
    if len(np.unique(labels)) < 2:
        return dict(image_auroc=None, image_ap=None)
    return dict(image_auroc=float(roc_auc_score(labels, scores)),
                image_ap=float(average_precision_score(labels, scores)))


class PixelMetrics:
    """Pixel AUROC, pixel AP, AUPRO and Dice over a set of anomaly maps, one batch at a time, in constant memory.

    Up to two million pixels are sorted. More are counted in bins of their float32 bits, whose order is the order of the
    values: the upper 16 bits name a page, made when a score first falls there, and 8 of the lower 16 bits a bin in it,
    up to all 16 where scores crowd (probabilities near 1, a large offset). Equal scores share a bin, so ties count as
    ties. The error is below 1e-6 (tests/test_common.py)."""

    SORTED = 2**21

    def __init__(self):
        # A key's bin is start[page] + (key >> shift[page]); shift 31: no page yet. Most pages shift by 8: quick has
        # their start, and of all others a number so low that no key leads to a bin. PyTorch counts faster than NumPy.
        self.shift, self.start, self.quick = (torch.full((65536,), v, dtype=torch.int32) for v in (31, 0, -(2**24)))
        # By bin: pixels, anomalous ones among them, and the sum over these of 1 / their region's size.
        self.total, self.positive = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        self.overlap, self.bins = torch.zeros(0, dtype=torch.float64), 0  # the arrays are longer than the bins in use
        self.waiting, self.filled = torch.empty(0, dtype=torch.int32), 0  # bins of pixels not yet in total
        self.pending, self.pixels, self.regions, self.low, self.high = [], 0, 0, math.inf, -math.inf
        self.curve = []

    def update(self, anomaly_maps, masks):
        """anomaly_maps: (B, H, W) floats; masks: (B, H, W) bools. ValueError on other shapes or scores not finite."""
        maps, masks = np.ascontiguousarray(anomaly_maps, np.float32), np.asarray(masks, bool)
        if maps.shape != masks.shape or maps.ndim != 3:
            raise ValueError(f"anomaly maps {maps.shape} and masks {masks.shape} must both be (B, H, W)")
        low, high = (float(v) for v in torch.from_numpy(maps).aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError("anomaly maps hold values that are not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        for anomaly_map, mask in zip(maps, masks, strict=True):
            share = None
            if (rows := np.flatnonzero(mask.any(axis=1))).size:
                band = mask[rows[0] : rows[-1] + 1]
                columns = np.flatnonzero(band.any(axis=0))
                box = band[:, columns[0] : columns[-1] + 1]
                region, count = ndimage.label(box, np.ones((3, 3)))  # 8-connected
                where = np.flatnonzero(region)
                y, x = np.divmod(where, box.shape[1])
                region = region.ravel()[where] - 1
                where = (y + rows[0]) * mask.shape[1] + x + columns[0]
                share = where, 1 / np.bincount(region)[region]  # thesis, Eq. 3.2: |A n C_k| / |C_k|
                self.regions += count
            scores = torch.from_numpy(anomaly_map.reshape(-1))
            self.pixels += len(scores)
            if self.bins:
                self._count(scores, share)
            else:
                self.pending.append((scores + 0, share))  # a copy; -0 and 0 are one score
        if not self.bins and self.pixels > self.SORTED:
            self._make_pages(torch.cat([self._key(scores)[1] for scores, _ in self.pending]), self.pixels)
            for scores, share in self.pending:
                self._count(scores, share)
            self.pending = []

    def _key(self, scores, out=None):
        """float32 (n,) -> int32 (n,) that order as the scores do, and the page of each (0 to 65535)."""
        key = torch.add(scores, 0, out=out).view(torch.int32)  # -0 and 0 are one score
        if self.low < 0:
            key ^= (key >> 31) & 0x7FFFFFFF  # two's complement for negative floats
        return key, (key >> 16).add_(32768)

    def _make_pages(self, pages, pixels):
        """Bins for the pages (n,) of scores that have none yet, out of so many pixels."""
        share = torch.bincount(pages, minlength=65536) / pixels
        # 32 neighbours at once, but where scores crowd: those who crowd beside them later need finer bins, too
        most = share.view(-1, 32).amax(dim=1).repeat_interleave(32)
        new = torch.nonzero(((share > 0) | (most > 0) & (most < 2**-6)) & (self.shift > 16)).flatten()
        share = share[new]  # where they crowd, a bin is to hold a 2**18th of the pixels
        bits = (share * 2**18).log2().ceil().clamp(8, 16).where(share > 2**-6, 8).int()
        size = 1 << bits
        self.shift[new] = 16 - bits
        self.start[new] = self.bins + (size.cumsum(0) - size).int() - self._least_key(new)
        self.quick[new] = self.start[new].where(bits == 8, self.quick[new])
        self.bins += int(size.sum())
        if self.bins > len(self.total):  # twice as long as needed, so that few pages copy the counts
            self.total, self.positive, self.overlap = (torch.cat([a, a.new_zeros(2 * self.bins - len(a))])
                                                       for a in (self.total, self.positive, self.overlap))

    def _least_key(self, pages):
        return ((pages - 32768).int() << 16) >> self.shift[pages]

    def _count(self, scores, share):
        if self.filled + len(scores) > len(self.waiting):
            self._count_waiting()
            self.waiting = self.waiting.new_empty(max(self.SORTED, len(scores)))
        # One place holds the scores, then their keys, then their bins: new arrays of a map's size cost more than the
        # arithmetic.
        bins, page = self._key(scores, self.waiting[self.filled : self.filled + len(scores)].view(torch.float32))
        bins >>= 8
        bins += self.quick.index_select(0, page)
        if bins.min() < 0:
            other = torch.nonzero(bins < 0).flatten()
            key, page = self._key(scores[other])
            if len(unknown := page[self.shift[page] > 16]):
                self._make_pages(unknown, len(scores))
            bins[other] = self.start[page] + (key >> self.shift[page])  # int32 may overflow, and comes back
        if share:
            where, weight = (torch.from_numpy(a) for a in share)
            self.positive.index_add_(0, bins[where], torch.ones(len(where), dtype=torch.int64))
            self.overlap.index_add_(0, bins[where], weight)
        self.filled += len(scores)

    def _count_waiting(self):
        count = torch.bincount(self.waiting[: self.filled])
        self.total[: len(count)] += count
        self.filled = 0

    def _ordered(self):
        """(total, positive, overlap) by distinct score or bin, from the highest down, and the least score's key."""
        if self.bins:
            self._count_waiting()
            pages = torch.nonzero(self.shift < 31).flatten()
            size = 1 << (16 - self.shift[pages])
            offset = torch.arange(int(size.sum())) - (size.cumsum(0) - size).repeat_interleave(size)
            bins = (self.start[pages] + self._least_key(pages)).repeat_interleave(size) + offset
            keys = (pages - 32768 << 16).repeat_interleave(size) + (offset << self.shift[pages].repeat_interleave(size))
            used = torch.nonzero(self.total[bins]).flatten().flip(0)  # from the highest down
            bins, keys = bins[used], keys[used]
            return tuple(a.numpy() for a in (self.total[bins], self.positive[bins], self.overlap[bins], keys))
        values, bins = np.unique(torch.cat([scores for scores, _ in self.pending]).numpy(), return_inverse=True)
        shares = np.zeros(len(bins))
        start = 0
        for scores, share in self.pending:
            if share:
                shares[start + share[0]] = share[1]
            start += len(scores)
        keys = self._key(torch.from_numpy(values))[0]
        found = np.bincount(bins), np.bincount(bins, shares > 0), np.bincount(bins, shares), keys
        return tuple(np.asarray(a)[::-1] for a in found)

    def compute(self):
        """{pixel_auroc, pixel_ap, aupro, dice}, each in [0, 1]; None where no pixel or every pixel is anomalous.

        aupro: the mean overlap per region against the false positive rate, one curve over all images, area to 30%
        divided by 0.3 (thesis, Eq. 3.2; Bergmann et al. 2020). dice: at 0.5 of the maps scaled to [0, 1] by the least
        and greatest value of the whole set; greater is anomalous (thesis, Eq. 3.3, Table 3.11)."""
        nothing = dict(pixel_auroc=None, pixel_ap=None, aupro=None, dice=None)
        if not self.regions:
            return nothing
        total, positive, overlap, keys = self._ordered()
        above = keys > int(self._key(torch.tensor([self.low / 2 + self.high / 2]))[0])
        tp, fp = np.cumsum(positive), np.cumsum(total - positive)
        if fp[-1] == 0:
            return nothing
        tpr, fpr = np.append(0, tp / tp[-1]), np.append(0, fp / fp[-1])
        pro = np.append(0, np.cumsum(overlap) / self.regions)
        places = np.concatenate([np.linspace(0, 0.01, 50), np.linspace(0.01, 0.3, 100), np.linspace(0.3, 1, 50)])
        shown = np.unique([*np.searchsorted(fpr, places), len(fpr) - 1])
        self.curve = [dict(fpr=fpr[i], tpr=tpr[i], pro=pro[i]) for i in shown.tolist()]  # for figures
        inside = fpr <= 0.3
        x, y = np.append(fpr[inside], 0.3), np.append(pro[inside], np.interp(0.3, fpr, pro))
        return dict(
            pixel_auroc=float(np.trapezoid(tpr, fpr)),
            pixel_ap=float(np.sum(positive / tp[-1] * tp / np.maximum(tp + fp, 1))),
            aupro=float(np.trapezoid(y, x) / 0.3),
            dice=float(2 * positive[above].sum() / (total[above].sum() + tp[-1])),
        )


@torch.no_grad()
def evaluate(predict, split, batch_size, device, map_indices=(), map_file=None):
    """Score a split: an object with metrics {image_auroc, ..., dice}, scores (N,), ms_per_image (from the image on the
    device to score and map), map_range, the (least, greatest) value of all maps, None without maps, and curve of the
    pixels, [{fpr, tpr, pro}, ...].

    predict: images (B, 3, H, W) in [0, 1] -> anomaly maps (B, H, W) or None, anomaly scores (B,); higher is more
    anomalous. The maps at `map_indices` are written to `map_file` as they come, float32."""
    scores, pixel, map_range, seconds, wanted, done = [], PixelMetrics(), None, 0.0, set(map_indices), 0
    for image in progress(split.batches(batch_size, device), f"scoring {split.name}", -(-len(split) // batch_size)):
        started = time.perf_counter()
        anomaly_map, score = predict(image)
        score = score.float().cpu().numpy()  # waits for the device
        seconds += time.perf_counter() - started
        if not np.isfinite(score).all():
            bad = split.paths[done + int(np.flatnonzero(~np.isfinite(score))[0])]
            raise Error(f"the score of {bad} is not finite: training diverged; lower --lr")
        scores.append(score)
        if anomaly_map is not None:
            anomaly_map = anomaly_map.float().cpu().numpy()
            low, high = map_range or (math.inf, -math.inf)
            map_range = min(low, float(anomaly_map.min())), max(high, float(anomaly_map.max()))
            if split.has_masks:
                pixel.update(anomaly_map, split.masks[done : done + len(score)])
            for i in sorted(wanted.intersection(range(done, done + len(score)))):
                map_file.write(anomaly_map[i - done].tobytes())
        done += len(score)
    scores = np.concatenate(scores)
    metrics = image_metrics(split.labels, scores) | pixel.compute()
    return SimpleNamespace(metrics=metrics, scores=scores, ms_per_image=1000 * seconds / done, map_range=map_range,
                           curve=pixel.curve)


# ------------------------------------------------------------------------------------------------------- the run folder
# What may differ from the training run when a checkpoint is given, beside --weights that now lie elsewhere; every other
# argument is taken from the checkpoint. A run that goes on must have the same data, limit and batch size, too.
FREE = {"data", "root", "out", "device", "batch_size", "limit", "maps", "overwrite", "checkpoint", "predict",
        "cache_features"}


def keep_memory():
    """glibc returns large freed blocks to the system; on a CPU their new pages cost more than the arithmetic."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: up to 1 GiB stays here
            libc.mallopt(option, 2**30)


def start_run(script, args):
    """Seeds Python, NumPy and PyTorch, picks the device, makes `<out>/<data>/<method>/seed<k>`; returns the `Run`.

    With args.checkpoint the arguments that define the model are taken from it, in place."""
    if args.predict and not args.checkpoint:
        raise Error("--predict needs a trained model: give --checkpoint FILE, the model.pt of a run")
    method, restored = Path(script).stem, None
    if args.checkpoint:
        restored = _read_checkpoint(args.checkpoint, method)
        defaults = {f.name: f.default for f in dataclasses.fields(args)}
        for name, value in restored["args"].items():
            moved = name.endswith("weights") and getattr(args, name, None) != defaults.get(name)  # now lies elsewhere
            if name in defaults and name not in FREE and not moved:
                setattr(args, name, value)
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if args.device == "auto" else args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise Error(f"--device {args.device} cannot be used ({str(e).splitlines()[0]}); try --device auto") from e
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what PyTorch asks for on a GPU
    torch.use_deterministic_algorithms(True, warn_only=True)
    keep_memory()
    asked = args.predict or args.data
    data = Path(asked).resolve().name if Path(asked).is_dir() else Path(asked).name.split(".")[0]
    folder = Path(args.out) / data / method / f"seed{args.seed}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Error(f"cannot write {folder}: {e.strerror}; choose another --out") from e
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except OSError:
        raise Error(f"another process is at work in {folder}; wait for it, or choose another --out") from None
    for left in folder.glob(".tmp-*"):  # of a run that was killed while it wrote
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    resumed = None
    if args.checkpoint and (folder / "results.json").exists() and (args.predict or not args.overwrite):
        raise Error(f"{folder} holds a finished run, which this would replace; choose another --out"
                    + ", or give --overwrite" * (not args.predict))
    if not args.checkpoint and not args.overwrite:
        resumed = _earlier_run(folder, args, method)
    print(f"{method} on {data}, seed {args.seed}, {device}: {folder}", flush=True)
    return Run(script, args, device, folder, lock, restored, resumed)


def _earlier_run(folder, args, method):
    """What a killed run of the same arguments left, or None; ends the program where that run is finished already."""
    done, begun = folder / "results.json", folder / "resume.pt"
    if not done.exists() and not begun.exists():
        return None
    kept = json.loads(done.read_text()) if done.exists() else _read_checkpoint(begun, method)
    asked, theirs = (json.loads(json.dumps(a)) for a in (dataclasses.asdict(args), kept["args"]))  # tuples as lists
    for a in (asked, theirs):  # two folders of one name are not one benchmark
        a["data"] = str(Path(a["data"]).resolve()) if Path(a["data"]).is_dir() else a["data"]
    if changed := [k for k in asked if k not in FREE - {"data", "limit", "batch_size"} and asked[k] != theirs.get(k)]:
        k = changed[0]
        raise Error(f"{folder} holds a run with --{k.replace('_', '-')} {theirs.get(k)} instead of {asked[k]}; give "
                    "--overwrite to replace it, or another --out")
    if done.exists():
        print(f"{folder} is finished already, with these arguments; nothing to do (--overwrite does it again)")
        raise SystemExit(0)
    return kept


def _random_state(device, state=None):
    """The state of all random generators, as torch.save takes it; with `state`, put it back."""
    if state is None:
        name, keys, *rest = np.random.get_state()
        return dict(python=random.getstate(), numpy=(name, keys.tolist(), *rest), torch=torch.get_rng_state(),
                    cuda=torch.cuda.get_rng_state() if device.type == "cuda" else None)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    return None


class Run:
    """A run's folder, device and bookkeeping, made by `start_run`; results.json and its neighbours come from `finish`.

    checkpoint.pt is the best state yet, model.pt the same of a finished run; resume.pt is all of the last evaluation.
    notes: what else a script wants in results.json (a dict that JSON can hold); kept with the checkpoint."""

    def __init__(self, script, args, device, folder, lock, restored, resumed):
        self.script, self.args, self.device, self.folder = Path(script), args, device, folder
        self.method, self.lock, self.restored = self.script.stem, lock, restored  # what --checkpoint holds, or None
        self.resumed = resumed  # what a stopped run left at its last evaluation, or None
        self.history, self.best, self.epoch, self.notes = [], -math.inf, None, {}
        self.started, self.stateful = time.perf_counter(), ()

    def epochs(self, model, *stateful):
        """1, 2, ..., args.epochs; where a run was killed, what follows its last evaluation, with everything as it was.

        stateful: what else training changes: optimizers, schedules, networks outside of the model."""
        self.stateful, done = stateful, 0
        if kept := self.resumed:
            done, seconds = kept["epoch"], kept["train_seconds"]
            self.history, self.best, self.epoch = kept["history"], kept["best"], kept["best_epoch"]
            self.notes |= kept["notes"]
            self._put(kept, model, self.folder / "resume.pt")
            for item, state in zip(stateful, kept["stateful"], strict=True):
                item.load_state_dict(state)
            _random_state(self.device, kept["random"])
            self.started = time.perf_counter() - seconds
            print(f"going on after epoch {done}, the last evaluation of a run that was stopped", flush=True)
        yield from range(done + 1, self.args.epochs + 1)

    def validate(self, model, epoch, valid, **losses):
        """Log the epoch; at every args.eval_every-th and the last one score valid and keep the state that is best yet.

        The criterion: image AUROC, averaged with pixel AUROC where there are masks (thesis, 3.4.1: chosen on valid,
        looked at every 10 epochs); the first of equals. Without a valid split the last epoch is kept.
        losses: name -> value of this epoch; one that is not finite ends the run."""
        if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
            raise Error(f"{bad[0]} is {losses[bad[0]]} at epoch {epoch}: training diverged; lower --lr")
        row = dict(epoch=epoch, seconds=round(time.perf_counter() - self.started, 1), **losses)
        self.history.append(row)
        if epoch % self.args.eval_every and epoch != self.args.epochs:
            return
        value = math.inf
        if valid:
            metrics = evaluate(model.predict, valid, self.args.batch_size, self.device).metrics
            value = np.mean([v for v in (metrics["image_auroc"], metrics["pixel_auroc"]) if v is not None])
            row |= {f"valid_{k}": v for k, v in metrics.items() if v is not None}
        if value > self.best or not valid:
            self.best = value
            self.keep(model, epoch)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float) and k != "seconds")
        print(f"epoch {epoch}/{self.args.epochs}  {shown}" + "  (best)" * (self.epoch == epoch), flush=True)
        keys = list(dict.fromkeys(k for r in self.history for k in r))
        write_csv(self.folder / "log.csv", [{k: r.get(k) for k in keys} for r in self.history])
        self._save("resume.pt", model, epoch, history=self.history, best=float(self.best), best_epoch=self.epoch,
                   stateful=[item.state_dict() for item in self.stateful], random=_random_state(self.device))

    def keep(self, model, epoch=None):
        """Write the model's state, without frozen networks, as checkpoint.pt: the state that `finish` evaluates."""
        self.epoch = epoch
        (self.folder / "results.json").unlink(missing_ok=True)  # from here on the folder is not a finished run
        self._save("checkpoint.pt", model, epoch)

    def _save(self, name, model, epoch, **more):
        state = {k: v.cpu() for k, v in model.state_dict().items() if not k.startswith(_frozen(model))}
        with atomic(self.folder / name) as tmp:
            torch.save(dict(method=self.method, args=dataclasses.asdict(self.args), epoch=epoch, notes=self.notes,
                            train_seconds=time.perf_counter() - self.started, weights=_weights(model), state=state,
                            **more), tmp)

    def load(self, model):
        """Put the kept (with --checkpoint: the given) state into `model`; returns its epoch and train seconds."""
        source = self.args.checkpoint or self.folder / "checkpoint.pt"
        kept = self.restored or _read_checkpoint(source, self.method)
        self._put(kept, model, source)
        self.notes = kept["notes"]
        return kept["epoch"], kept["train_seconds"]

    def _put(self, kept, model, source):
        theirs, ours = (", ".join(f"{w['name']} {w['sha256'][:12]}" for w in weights)
                        for weights in (kept["weights"], _weights(model)))
        if theirs != ours:
            raise Error(f"{source} was trained on the frozen weights {theirs}, these are {ours}; give the same ones")
        try:
            missing, unknown = model.load_state_dict(kept["state"], strict=False)
            if unknown or (missing := [k for k in missing if not k.startswith(_frozen(model))]):
                raise RuntimeError(f"{(unknown + missing)[0]} is {'unknown' if unknown else 'missing'}")
        except RuntimeError as e:
            raise Error(f"{source} does not fit this model: {str(e).splitlines()[-1].strip()}; use the arguments of "
                        f"its run") from e


def _frozen(model):
    return tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "frozen", False))


def _weights(model):
    return [module.weights_used for module in model.modules() if hasattr(module, "weights_used")]


def _read_checkpoint(file, method):
    kept = read_state(file, f"model.pt of a {method} run")
    if not isinstance(kept, dict) or kept.get("method") != method:
        found = kept.get("method") if isinstance(kept, dict) else None
        raise Error(f"{file} is a checkpoint of {found or 'something else'}; give the model.pt of a {method} run")
    return kept


def finish(run, model, splits):
    """Evaluate the kept state on the test split, once, and write the run folder; the last file is results.json.

    splits: (train, valid, test) of `load_benchmark`. scores.csv: path, label, score. maps/: panels of image, ground
    truth and heat map, min-max over the test set (thesis, 3.4.1). With --predict: scores.csv and maps/ only, and for a
    NIfTI volume anomaly_map.nii.gz."""
    args, test = run.args, splits[2]
    epoch, train_seconds = run.load(model)
    if not args.predict:
        (run.folder / "results.json").unlink(missing_ok=True)  # until scores.csv and maps/ are new, too
    model.to(run.device)
    volume = args.predict and is_volume(args.predict)
    count = len(test) if args.maps < 0 else min(args.maps, len(test))
    shown = [i * len(test) // count for i in range(count)]  # the same images for all methods
    wanted = range(len(test)) if volume else shown
    with tempfile.TemporaryFile(dir=run.folder) as raw:
        result = evaluate(model.predict, test, args.batch_size, run.device, wanted, raw)
        if result.map_range and wanted:
            raw.flush()
            maps = np.memmap(raw, np.float32, "r", shape=(len(wanted), test.size, test.size))
            if volume:
                _write_volume(run.folder / "anomaly_map.nii.gz", Volume(args.predict), maps)
            _write_panels(run.folder / "maps", test, shown, maps[shown] if volume else maps, *result.map_range)
    rows = zip(test.paths, test.labels, result.scores, strict=True)
    write_csv(run.folder / "scores.csv",
              [dict(path=p, label="" if y < 0 else int(y), score=repr(float(s))) for p, y, s in rows])
    if args.predict:
        os.close(run.lock)
        print(f"{len(test)} scores, {count if result.map_range else 0} heat maps: {run.folder}")
        return
    packages = ("torch", "torchvision", "open_clip_torch", "numpy", "scipy", "scikit-learn", "pillow")
    parameters = list(model.parameters())
    results = dict(
        method=run.method, data=run.folder.parts[-3], seed=args.seed, metrics=result.metrics,
        images={s.name: {k: int((s.labels == i).sum()) for i, k in enumerate(("normal", "anomalous"))}
                for s in splits if s},
        leaks=test.leaks, epoch=epoch, train_seconds=round(train_seconds, 2),
        test_ms_per_image=round(result.ms_per_image, 2),
        peak_memory_gib=peak_memory(run.device),
        parameters=dict(total=sum(p.numel() for p in parameters),
                        trained=sum(p.numel() for p in parameters if p.requires_grad)),
        weights=_weights(model), notes=run.notes, args=dataclasses.asdict(args),
        changed={f.name: getattr(args, f.name) for f in dataclasses.fields(args)
                 if f.name not in FREE | {"seed"} and getattr(args, f.name) != f.default},  # not as published
        versions=dict(python=platform.python_version(), **{p: version(p) for p in packages}),
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else str(run.device),
        threads=torch.get_num_threads(), commit=_commit(run.script.parent),
        finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    if result.curve:
        write_csv(run.folder / "curves.csv", result.curve)
    if run.history:
        _draw_history(run.folder / "log.png", run.history)
    if run.restored is None:
        os.replace(run.folder / "checkpoint.pt", run.folder / "model.pt")
    with atomic(run.folder / run.script.name) as tmp:
        shutil.copyfile(run.script, tmp)
    with atomic(run.folder / "results.json") as tmp:
        tmp.write_text(json.dumps(results, indent=1))
    (run.folder / "resume.pt").unlink(missing_ok=True)
    os.close(run.lock)
    for name in [w["name"] for w in results["weights"] if not w["trained"]]:
        print(f"NOTE: {name} ran with UNTRAINED weights; the figures show that the code runs, no more")
    for name, value in result.metrics.items():
        print(f"  {name:<11}  " + ("-" if value is None else f"{value:.4f}"))
    print(f"  epoch {epoch or '-'}, train {train_seconds:.1f} s, test {result.ms_per_image:.1f} ms/image, "
          f"peak {results['peak_memory_gib']['ram']:.2f} GiB: {run.folder}")


def _draw_history(file, history):
    """The losses and the metrics on valid by epoch, as a PNG; log.csv has their values."""
    from matplotlib.figure import Figure  # here, since a run without epochs needs none of it

    figure = Figure(figsize=(10, 4), layout="constrained")
    names = dict.fromkeys(k for row in history for k in row if k not in ("epoch", "seconds"))
    for axes, what in zip(figure.subplots(1, 2), ("loss", "valid"), strict=True):
        for name in [n for n in names if n.startswith("valid_") == (what == "valid")]:
            points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), ".-", label=name.removeprefix("valid_"))
        axes.set(xlabel="epoch", title=what)
        if axes.lines:
            axes.legend()
    with atomic(file) as tmp:
        figure.savefig(tmp, format="png")


def _write_volume(file, volume, maps):
    """Anomaly maps (D, S, S) of a volume's axial slices, enlarged to its grid, on top of it."""
    size = volume.shape[1::-1]  # (H, W)
    found = torch.nn.functional.interpolate(torch.from_numpy(maps.copy())[:, None], size, mode="bilinear")
    volume.save(found[:, 0].numpy(), file)


def _write_panels(folder, split, indices, maps, low, high):
    with atomic(folder) as tmp:
        tmp.mkdir()
        for i, anomaly_map in zip(indices, maps, strict=True):
            image = np.broadcast_to(split.images[i], (3, split.size, split.size)).transpose(1, 2, 0)
            heat = (anomaly_map - low) / (high - low or 1)
            jet = np.clip(1.5 - np.abs(4 * heat[..., None] - [3, 2, 1]), 0, 1) * 255  # blue is low, red is high
            panels = [image, (0.5 * image + 0.5 * jet).astype(np.uint8)]
            if split.has_masks:
                panels.insert(1, np.repeat(split.masks[i][..., None] * np.uint8(255), 3, axis=2))
            name = split.paths[i].rsplit(".", 1)[0].replace("/", "_")
            Image.fromarray(np.concatenate(panels, axis=1)).save(tmp / f"{name}.png")


def peak_memory(device):
    """GiB: the process' largest resident size so far and, on a GPU, the most that PyTorch allocated there."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    peak = dict(ram=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3))
    return peak | (dict(gpu=round(torch.cuda.max_memory_allocated() / 2**30, 3)) if device.type == "cuda" else {})


def _commit(folder):
    """The commit of the checkout that holds the script, '+changes' if it was edited; None outside a checkout."""
    def git(*command):
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + "+changes" * bool(git("status", "--porcelain", "-uno")) if commit else None
    except OSError:
        return None
