"""What the method scripts must share to be comparable: benchmarks, pretrained weights, metrics, the run folder.

A script calls `command_line`, `Run` and `load_benchmark`, trains on `Split.batches`, calls `Run.validate` after
each epoch, which keeps the state that is best on valid (or `Run.keep` where there are no epochs), and ends with
`finish`: the test set is scored once, there. What a reader needs to re-implement a paper is in the paper's own script.

Shapes: N images of a split, B of a batch, H W image. Scores: higher is more anomalous."""

import csv
import dataclasses
import fcntl
import hashlib
import json
import math
import operator
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import torch
import tyro
from annotated_types import Ge, Gt, Interval
from PIL import Image, ImageOps
from scipy import ndimage
from tqdm import tqdm


# ----------------------------------------------------------------------------------------------------- errors and files
class Error(Exception):
    """What a user can mend. The message is one line: what is wrong, with which file or flag, and what to do."""


def command_line(Args, description):
    """The script's arguments. From here on an `Error` ends the program with one line on stderr and exit code 2; a
    notebook or a test, which calls functions only, sees the exception itself."""
    def in_one_line(kind, error, traceback):
        if issubclass(kind, Error):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2)
        if kind is KeyboardInterrupt:
            print("interrupted; the same command resumes after the last evaluation, if there was one", file=sys.stderr)
            raise SystemExit(130)
        sys.__excepthook__(kind, error, traceback)

    sys.excepthook = in_one_line
    args = tyro.cli(Args, description=description)
    check_ranges(args)
    return args


def check_ranges(args):
    """`Error` for a number that is not in the range of its declaration, such as Annotated[int, Ge(1)]."""
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        limits = [limit for limit in getattr(kind, "__metadata__", ()) if isinstance(limit, (Ge, Gt, Interval))]
        rules = [rule for limit in limits for part in (limit if isinstance(limit, Interval) else [limit])
                 for rule in dataclasses.asdict(part).items()]  # [("ge", 1), ...]
        values = getattr(args, name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, int | float) and not all(getattr(operator, op)(value, bound) for op, bound in rules):
                signs = dict(ge="at least", gt="above", le="at most", lt="below")
                asked = " and ".join(f"{signs[op]} {bound}" for op, bound in rules)
                raise Error(f"--{name.replace('_', '-')} {value}: the value must be {asked}")


@contextmanager
def atomic(path):
    """Yield a temporary name next to `path`; the file or folder written there takes the real name once complete."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # a full disk, which torch.save reports as a RuntimeError
        raise Error(f"cannot write {path}: {e}; free some space or choose another folder") from e
    finally:
        remove(temporary)


def remove(path):
    """Remove a file, or a folder with all that it holds, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_csv(path, rows):
    """Rows are dicts; their keys, in the order of appearance, give the header."""
    with atomic(path) as tmp, open(tmp, "w", newline="") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def progress(iterable, what, total=None):
    """A progress bar on stderr, silent when that is not a terminal."""
    return tqdm(iterable, desc=what, total=total, disable=None, leave=False)


def sha256(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------- benchmarks
NAMES = {  # folder names of the published downloads; `--data FOLDER` takes any other benchmark
    "brain": ["brain", "brain_ad"],
    "liver": ["liver", "liver_ad"],
    "resc": ["resc", "retina_resc_ad"],
    "oct2017": ["oct2017", "retina_oct2017_ad"],
    "chest": ["chest", "chest-rsna", "chest_ad"],
    "histo": ["histo", "camelyon16", "camelyon16_256", "histopathology_ad"],
    "phantom": ["phantom"],
}
MADE_BY = {"brain": "brats2021", "liver": "btcv (train) and lits (valid, test)", "resc": "resc", "oct2017": "oct2017",
           "chest": "rsna", "histo": "camelyon16", "phantom": "phantom"}  # scripts of datasets/
SPLITS = {"train": ["train"], "valid": ["valid", "val", "validation"], "test": ["test"]}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
NORMAL, MASKS = {"good", "normal"}, {"anomaly_mask", "label"}  # folders of normal images, of masks; else anomalous
# What a folder's name says of the images below it: (split, whether they are masks).
ROLES = {name + end: (split, bool(end)) for split, names in SPLITS.items() for name in names for end in ("", "_label")}
ROLES["ground_truth"] = ("test", True)  # MVTec AD


def images_in(folder):
    """Image files in and below `folder`, sorted; hidden files and folders are left out, links are followed."""
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        files += [Path(place, name) for name in names if name[0] != "." and Path(name).suffix.lower() in SUFFIXES]
    return sorted(files)


def named_folder(data, root):
    """The folder that --data and --root mean; None if it is not there."""
    if Path(data).is_dir():
        return Path(data)
    known = NAMES.get(data.lower(), [])
    return next((p for p in sorted(Path(root).glob("*")) if p.name.lower() in known and p.is_dir()), None)


def find_benchmark(data, root):
    """(folder, its files for `list_split`); `Error` if there is no benchmark.

    All published layouts are read: train/good[/img], test/{good,Ungood}[/img] with masks in
    Ungood/{anomaly_mask,label}; valid/img/{good,Ungood} with valid/label/{good,Ungood}; Test/test/{good,Ungood} with
    Test/test_label/Ungood; MVTec AD's test/<defect> with ground_truth/<defect>/*_mask.png."""
    asked = named_folder(data, root)
    if asked is None:
        maker = f"made by datasets/{MADE_BY[data.lower()]}" if data.lower() in NAMES else f"known: {', '.join(NAMES)}"
        raise Error(f"no benchmark {data} in {root} ({maker}), no folder {data}")
    bases = {}  # {folder: {(split, mask or not): {(class, ..., name): [files]}}}
    for file in images_in(asked):
        folders = file.relative_to(asked).parts[:-1]
        roles = [ROLES.get(name.lower(), (None, None)) for name in folders]
        if last := max((i for i, (split, _) in enumerate(roles, 1) if split), default=None):  # the last that names one
            split, mask = roles[last - 1]
            first = next(i for i in range(last) if all(role[0] == split for role in roles[i:last]))  # Val/val
            inner = [name.lower() for name in folders[last:]]
            key = *(name for name in inner if name not in ("img", *MASKS)), file.stem.removesuffix("_mask")
            parts = bases.setdefault(asked.joinpath(*folders[:first]), {})
            parts.setdefault((split, mask or bool(MASKS & set(inner))), {}).setdefault(key, []).append(file)
    for base, parts in sorted(bases.items()):
        if ("test", False) in parts and any(key[0] in NORMAL for key in parts.get(("train", False), {})):
            return base, parts
    maker = f"; its parts come from datasets/{MADE_BY[data.lower()]}" if data.lower() in NAMES else ""
    raise Error(f"{asked} is not a benchmark: expected images in train/good, test/good and test/Ungood (or MVTec AD's "
                f"test/<defect>), found {sorted(p.name for p in asked.iterdir())[:8]}{maker}")


def list_split(parts, split):
    """[(image, label, mask or None)], label 0 (normal) first, then 1 (anomalous). parts: see `find_benchmark`."""
    images, masks = (parts.get((split, mask), {}) for mask in (False, True))
    entries = [(file, 0, None) for key, files in images.items() if key[0] in NORMAL for file in files]
    if split == "train":
        return entries
    masks = {key: files for key, files in masks.items() if key[0] not in NORMAL}
    masked = bool(masks)
    for key in [key for key in images if key[0] not in NORMAL and len(key) > 1]:
        own = masks.pop(key, []) if masked else [None]
        if own != [None] and (len(own) != 1 or len(images[key]) != 1):
            who, what = (" and ".join(map(str, files)) for files in (images[key], own))
            raise Error(f"{who}: {what or 'no mask'}; each anomalous image needs one mask that has its name")
        entries += [(file, 1, own[0]) for file in images[key]]
    if masks:
        raise Error(f"mask {min(masks.values())[0]} has no image of that name; add it or remove the mask")
    return entries


def fingerprint(entries, base):
    """Hex digest of the names, sizes and times of images and masks; it changes when a file does."""
    state = [(file.relative_to(base).as_posix(), (s := file.stat()).st_size, s.st_mtime_ns)
             for image, _, mask in entries for file in (image, mask) if file]
    return hashlib.sha256(repr((str(base.resolve()), state)).encode()).hexdigest()[:16]


def decode(path, size=None, mask=False):
    """uint8 (3, size, size) and the file's own (width, height); size None: not resized. 16 bit: 65535 is white.

    mask: transparent pixels are black; in images, transparency is ignored."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{image.n_frames} pages or frames: save each as an image")
            image = ImageOps.exif_transpose(image)  # as a viewer shows it
            original = image.size
            if mask and "A" in image.getbands():
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                array = np.asarray(image, np.float32)
                if image.mode == "F" or array.min() < 0 or array.max() > 65535:
                    raise ValueError("32-bit or signed pixels have no fixed white: save it with 8 or 16 bits")
                image = Image.fromarray(array / 257)
            else:
                image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            image = image.resize((size, size), Image.Resampling.BILINEAR) if size else image  # Pillow antialiases
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # a broken PNG raises SyntaxError
        raise Error(f"{path} is not a readable image ({e}); replace or remove it") from e
    array = np.rint(np.atleast_3d(image)).astype(np.uint8).transpose(2, 0, 1)
    return np.broadcast_to(array, (3, *array.shape[1:])), original


def decode_mask(path, image_size, size):
    """uint8 (1, size, size): 1 (anomalous) above 10% of full scale; resized by nearest neighbour. path None: all 0."""
    if path is None:
        return np.zeros((1, size, size), np.uint8)
    array, original = decode(path, mask=True)
    if original != image_size:
        raise Error(f"mask {path} has {original} pixels, its image {image_size}; make them equal")
    array = (array.max(axis=0) > 25.5).astype(np.uint8)
    if not array.any():
        raise Error(f"mask {path} has no value above 10% of full scale; save masks as 0 and 255 (anomalous)")
    return np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.NEAREST))[None]


class Split:
    """One split, decoded and resized once into a file below `cache`.

    images: uint8 (N, 3, H, W); masks: bool (N, H, W) or None; labels (N,): 0 normal, 1 anomalous, -1 unknown; paths: as
    written to scores.csv."""

    def __init__(self, name, entries, size, base, cache):
        """entries: [(image, label, mask or None)], see `find_benchmark`."""
        self.name, self.size = name, size
        self.paths = [image.relative_to(base).as_posix() for image, _, _ in entries]
        self.labels = np.array([label for _, label, _ in entries], int)
        self.has_masks = any(mask for _, _, mask in entries)
        self.shape = len(entries), 3 + self.has_masks, size, size  # a mask is its image's fourth channel
        decoded = cache / f"{base.resolve().name}-{name}-{size}-{len(entries)}-{fingerprint(entries, base)}.decoded"
        if not decoded.is_file() or decoded.stat().st_size != math.prod(self.shape):
            with atomic(decoded) as tmp:
                self._decode(entries, tmp)
        self.file = open(decoded, "rb")  # noqa: SIM115 (lives as long as this object, even if the name is removed)

    def _decode(self, entries, file):
        def one(entry):
            array, original = decode(entry[0], self.size)
            return np.concatenate([array, decode_mask(entry[2], original, self.size)]) if self.has_masks else array

        with open(file, "wb") as f, ThreadPoolExecutor() as pool:
            for start in progress(range(0, len(entries), 256), f"decoding {self.name}"):
                for array in pool.map(one, entries[start : start + 256]):
                    f.write(array.tobytes())  # not mapped: on a full disk a mapped write kills the process

    # The file is mapped again at each use, so that pages once read don't count as this process' memory for ever.
    @property
    def images(self):
        return np.memmap(self.file, np.uint8, "r", shape=self.shape)[:, :3]

    @property
    def masks(self):
        return np.memmap(self.file, bool, "r", shape=self.shape)[:, 3] if self.has_masks else None

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, device="cpu"):
        """Images (B, 3, H, W), float32 in [0, 1], on `device`."""
        return torch.from_numpy(np.asarray(self.images[indices])).to(device).float() / 255

    def batches(self, batch_size, device="cpu", shuffle=None, drop_last=False, fetch=None):
        """Yield all images as `batch` gives them.

        shuffle: None for file order, or a seed (an int or a tuple such as (seed, epoch)) for that seed's order.
        drop_last: leave out an incomplete last batch, unless it is the only one.
        fetch: indices (b,) -> what to yield in place of images."""
        order = np.arange(len(self)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(self))
        if drop_last and len(self) >= batch_size:
            order = order[: len(self) // batch_size * batch_size]
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield fetch(indices) if fetch else self.batch(indices, device)


class Features:
    """A frozen network's features of a split's images, for training loops that need them in each epoch.

    Computed once and kept in a file below the run folder if that takes no more than `args.cache_features` GiB ("auto":
    16, if the disk has twice that to spare), else computed again for each batch; which of the two is printed."""

    def __init__(self, extract, split, args, run):
        """extract: images (B, 3, H, W) -> [(B, ...), ...], frozen: constants of each image."""
        self.extract, self.split, self.device, self.file = extract, split, run.device, None
        self.shapes = [f.shape[1:] for f in extract(split.batch([0], run.device))]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        needed, free = sum(self.sizes) * 4 * len(split) / 2**30, shutil.disk_usage(run.folder).free / 2**30
        budget = min(16, free / 2) if args.cache_features == "auto" else args.cache_features
        run.notes["features_cached"] = needed <= budget
        print(f"features of {split.name}: {needed:.2f} GiB, " + ("cached" if needed <= budget else
              f"above the budget of {budget:.2f} (--cache-features), computed again each epoch"), flush=True)
        if needed <= budget:
            batches = split.batches(args.batch_size, run.device)
            with atomic(run.folder / "features") as tmp, open(tmp, "w+b") as f:
                for image in progress(batches, "features", -(-len(split) // args.batch_size)):
                    f.write(torch.cat([f.flatten(1).float().cpu() for f in extract(image)], dim=1).numpy().tobytes())
            self.file = open(run.folder / "features", "rb")  # noqa: SIM115 (as long as this object)
            os.unlink(run.folder / "features")

    def batches(self, batch_size, shuffle=None, drop_last=False):
        """Yield [(b, ...), ...] on the device, float32, in the order of `Split.batches`."""
        def fetch(indices):
            if self.file is None:
                return self.extract(self.split.batch(indices, self.device))
            rows = np.memmap(self.file, np.float32, "r", shape=(len(self.split), sum(self.sizes)))  # see `images`
            parts = torch.from_numpy(np.asarray(rows[indices])).to(self.device).split(self.sizes, dim=1)
            return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

        return self.split.batches(batch_size, self.device, shuffle, drop_last, fetch)


def listed(args):
    """(folder, {split: entries}, fingerprint of all of them) of the benchmark args.data."""
    base, parts = find_benchmark(args.data, args.root)
    entries = {split: list_split(parts, split) for split in SPLITS}
    return base, entries, fingerprint(sum(entries.values(), []), base)


def volumes():
    """The module datasets/volumes.py, which reads NIfTI volumes for --predict."""
    sys.path.append(str(Path(__file__).with_name("datasets")))
    try:
        import volumes
    except ImportError as e:
        raise Error(f"a volume needs datasets/volumes.py and nibabel ({e}); add them, or give images") from e
    return volumes


def load_benchmark(args):
    """(train, valid, test) as `Split`s for args.data, args.root, args.image_size and args.limit; prints their counts.

    valid is None where the benchmark has none (MVTec AD). With args.predict: (None, None, that folder's images)."""
    cache = Path(args.root) / ".cache"
    if args.predict:
        volume = args.predict.lower().endswith((".nii", ".nii.gz"))
        base = volumes().slices_as_images(Path(args.predict), cache) if volume else Path(args.predict)
        files = images_in(base) if base.is_dir() else [base] * (base.suffix.lower() in SUFFIXES)
        if not files:
            raise Error(f"--predict {base}: no image ({' '.join(sorted(SUFFIXES))}), no folder with images, no NIfTI")
        print(f"{args.predict}: {len(files)} images to score")
        base = base if base.is_dir() else base.parent
        return None, None, Split("predict", [(file, -1, None) for file in files], args.image_size, base, cache)
    (base, entries, images), splits, counts = listed(args), [], []
    for name in SPLITS:
        normal, anomalous = ([e for e in entries[name] if e[1] == label] for label in (0, 1))
        if args.limit:  # evenly spread over the files
            normal, anomalous = ([e[i * len(e) // n] for i in range(n)] for e in (normal, anomalous)
                                 for n in [min(args.limit, len(e))])
        counts.append(f"{name} {len(normal)} normal" + f" + {len(anomalous)} anomalous" * (name != "train"))
        complete = normal and (anomalous or name == "train")
        if not complete and name != "valid":
            raise Error(f"{base}: {counts[-1]} images; put images into train/good, test/good and test/Ungood")
        splits.append(Split(name, normal + anomalous, args.image_size, base, cache) if complete else None)
    checked = cache / f"{images}.check.json"  # by datasets/check.py
    splits[2].check = json.loads(checked.read_text()) if checked.exists() else None
    print(f"{base}: {', '.join(counts)}; {args.image_size}x{args.image_size}, "
          f"{'' if splits[2].has_masks else 'no '}masks" + f"; LIMITED to {args.limit} a class" * bool(args.limit))
    print("datasets/check.py:", splits[2].check["summary"] if splits[2].check else "not run on these files", flush=True)
    if not splits[1]:
        print("warning: valid needs normal and anomalous images to choose a checkpoint: the last epoch is taken")
    return splits


# --------------------------------------------------------------------------------------------------- pretrained weights
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_TAG = "laion400m_e32"  # the only public training of ViT-B-16-plus-240 (e31 is the same one, an epoch earlier)
TINY_CLIP = dict(embed_dim=128, vision_cfg=dict(layers=4, width=128, patch_size=16),
                 text_cfg=dict(layers=4, width=128, heads=4))  # --model tiny: for tests and demonstrations


def normalize(image, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """(B, 3, H, W) in [0, 1] -> zero mean and unit deviation a channel, as the network saw its training images."""
    mean, std = (torch.tensor(v, device=image.device).view(1, 3, 1, 1) for v in (mean, std))
    return (image - mean) / std


def smooth(anomaly_map, sigma=4):
    """Gaussian filter of (B, H, W), cut at 4 sigma, the border mirrored: equal to scipy.ndimage.gaussian_filter."""
    from torchvision.transforms.v2.functional import gaussian_blur, pad  # here: torchvision takes seconds to import

    radius, size = 4 * sigma, 8 * sigma + 1
    padded = pad(anomaly_map, radius, padding_mode="symmetric")
    blurred = gaussian_blur(gaussian_blur(padded, [1, size], sigma), [size, 1], sigma)  # separable
    return blurred[..., radius:-radius, radius:-radius]


def read_state(file, what):
    """What torch.save wrote to `file`, on the CPU, tensors only. what: whose weights are wanted, for the `Error`."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # missing, empty, truncated, no zip file, or pickled objects that weights_only refuses
        reason = getattr(e, "strerror", None) or (str(e) or type(e).__name__).splitlines()[0]
        raise Error(f"{file} cannot be read by PyTorch ({reason}); give the {what}") from e


def load_state(net, state, source, optional):
    """Load the state dict `state` of the file `source`; keys that begin with one of `optional` may be missing."""
    try:
        missing, unknown = net.load_state_dict(state, strict=False)
        if wrong := unknown + [key for key in missing if not key.startswith(optional)]:
            raise RuntimeError(f"{wrong[0]} and {len(wrong) - 1} more are unknown or missing")
    except (RuntimeError, TypeError, AttributeError) as e:
        raise Error(f"{source} does not fit this network or its arguments: {str(e).splitlines()[-1].strip()}") from e


def pretrained_network(name, weights):
    """A torchvision classification network on the CPU; its `weights_used` is {name, weights, sha256, trained}.

    weights: 'imagenet' (torchvision's IMAGENET1K_V1 through its own cache, the weights of all official codes), a FILE
    (torchvision's state dict; the classifier may be missing), 'none' (untrained, always from seed 0), or 'auto'
    ('imagenet', else 'none' with a warning)."""
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
        except Exception as e:  # no network, a broken file in the cache, a hash that differs
            if weights == "imagenet":
                raise Error(f"no ImageNet weights for {name} ({e}); put them at {file}, or give --weights FILE, or "
                            "--weights none for an untrained network") from e
            print(f"warning: no ImageNet weights for {name} ({e}); continuing with random weights", flush=True)
    elif weights != "none":
        state = read_state(file, f"torchvision weights of {name}, or --weights imagenet, auto or none")
    if state is not None:
        load_state(net, state, file, ("fc.", "classifier."))
    net.weights_used = _weights_used(name, weights, file if state else None)
    return net


def _weights_used(name, weights, file):
    return dict(name=name, weights=weights if file else "none", sha256=file and sha256(file), trained=bool(file))


def feature_extractor(name, layers, weights):
    """A frozen network in eval mode that returns {layer: (B, C, h, w)} and stops at the last of `layers`.

    name, weights: see `pretrained_network`; layers: torchvision's node names. A checkpoint leaves out every module with
    `frozen` set, as here: it names that module's weights instead, and refuses others."""
    from torchvision.models.feature_extraction import create_feature_extractor

    net = pretrained_network(name, weights)
    return _freeze(create_feature_extractor(net.eval(), layers), net.weights_used)


def _freeze(net, weights_used):
    net.eval().requires_grad_(False)
    net.train = lambda mode=True: net  # batch norm keeps its statistics, whatever the model around it does
    net.frozen, net.weights_used = True, weights_used
    return net


def load_clip(name, weights, image_size):
    """A frozen open_clip.CLIP with a ViT, on the CPU, for images of `image_size`; `mean` and `std` are those of its
    training images.

    name: an open_clip model, or 'tiny', which has no published weights. weights: a published TAG of open_clip, a FILE,
    'none' (untrained, always from seed 0), or 'auto' (CLIP_TAG, else 'none' with a warning)."""
    import open_clip  # here, since only three methods need it

    config = TINY_CLIP if name == "tiny" else open_clip.get_model_config(name) or {}
    vision = config.get("vision_cfg", {})
    if not isinstance(vision.get("layers"), int) or config.get("custom_text") or "hf_model_name" in config["text_cfg"]:
        raise Error(f"--model {name} is no CLIP with a ViT; take ViT-B-16-plus-240, ViT-B-16 or tiny")
    if image_size % vision["patch_size"]:
        raise Error(f"{name}: {image_size} pixels are no multiple of its patches' {vision['patch_size']}")
    file = weights if Path(weights).is_file() else None
    published = {} if file else open_clip.get_pretrained_cfg(name, CLIP_TAG if weights == "auto" else weights)
    quick_gelu = config.get("quick_gelu", False) or published.get("quick_gelu", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(**config | dict(vision_cfg=vision | dict(image_size=image_size), quick_gelu=quick_gelu))
        for block in clip.transformer.resblocks if name == "tiny" else ():  # stays random: PyTorch's own initial values
            torch.nn.init.xavier_uniform_(block.attn.in_proj_weight)
            for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                layer.reset_parameters()
    try:
        if weights != "none":
            # the release first: on the hub, laion400m_e32 of the default model holds the weights of e31
            file = file or open_clip.download_pretrained(published, prefer_hf_hub=False)
            open_clip.load_checkpoint(clip, file)  # interpolates the positions if the file has another image size
    except Exception as e:  # no such file or tag, no network, unreadable, other keys, other shapes
        if weights != "auto":
            raise Error(f"--clip-weights {weights} of {name} cannot be used ({' '.join(str(e).split())[:200]}); give a "
                        f"FILE, one of the tags {open_clip.list_pretrained_tags_by_model(name)}, or none") from e
        print(f"warning: no CLIP weights {CLIP_TAG} of {name} ({e}); continuing with random weights", flush=True)
        file = None
    clip.mean = published.get("mean", open_clip.OPENAI_DATASET_MEAN)
    clip.std = published.get("std", open_clip.OPENAI_DATASET_STD)
    return _freeze(clip, _weights_used(f"CLIP {name}", f"{weights} ({file})", file))


# -------------------------------------------------------------------------------------------------------------- metrics
def image_metrics(labels, scores):
    """Image AUROC and average precision of labels (N,) in {0, 1} and scores (N,); None if there is one class only."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    metrics = dict(image_auroc=roc_auc_score, image_ap=average_precision_score)
    both = len(np.unique(labels)) == 2
    return {name: float(metric(labels, scores)) if both else None for name, metric in metrics.items()}


class PixelMetrics:
    """Pixel AUROC, pixel AP, AUPRO and Dice over a set of anomaly maps, exact: all scores are sorted, once.

    Holds 4 bytes a normal pixel and 8 an anomalous one: 1 GB for the largest benchmark with masks (brain).
    `best`: after `compute`, the threshold of the highest Dice; scores at or above it are anomalous."""

    def __init__(self, pixels, threshold=None):
        """pixels: how many will come at most. threshold: the `best` of the valid split, for `dice_valid`."""
        self.threshold, self.best = threshold, None
        self.normal, self.n = np.empty(pixels, np.float32), 0  # scores of the normal pixels, and their number
        self.anomalous, self.region = [], []  # scores of the anomalous ones, and the region that each belongs to
        self.regions, self.low, self.high, self.curve = 0, math.inf, -math.inf, []

    def update(self, anomaly_maps, masks):
        """anomaly_maps: (B, H, W) floats; masks: (B, H, W) bools. ValueError on other shapes or scores not finite."""
        maps, masks = np.asarray(anomaly_maps, np.float32), np.asarray(masks, bool)
        if maps.shape != masks.shape or maps.ndim != 3 or not np.isfinite([maps.min(), maps.max()]).all():
            raise ValueError(f"anomaly maps {maps.shape} and masks {masks.shape} must be (B, H, W), the maps finite")
        self.low, self.high = min(self.low, float(maps.min())), max(self.high, float(maps.max()))
        for scores, mask in zip(maps, masks, strict=True):
            if mask.any():
                region, count = ndimage.label(mask, np.ones((3, 3)))  # 8-connected
                self.anomalous.append(scores[mask])
                self.region.append(region[mask] + (self.regions - 1))
                self.regions += count
                scores = scores[~mask]
            self.normal[self.n : self.n + scores.size] = scores.ravel()
            self.n += scores.size

    def compute(self):
        """{pixel_auroc, pixel_ap, aupro, dice, dice_valid}, each in [0, 1]; None where no or every pixel is anomalous.

        aupro: the mean overlap per region against the false positive rate, one curve over all images, area to 30%
        divided by 0.3 (thesis, Eq. 3.2; Bergmann et al. 2020). dice: at 0.5 of the maps scaled to [0, 1] by the minimum
        and maximum of the whole set (thesis, Eq. 3.3). dice_valid: at the threshold. Both pool all pixels."""
        if not self.regions or not self.n:
            return dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro", "dice", "dice_valid"))
        normal = self.normal[: self.n]
        normal.sort()
        anomalous, region = np.concatenate(self.anomalous), np.concatenate(self.region)
        overlap = (1 / np.bincount(region) / self.regions)[region]  # Eq. 3.2: mean over regions of |A n C_k| / |C_k|
        order = anomalous.argsort()[::-1]
        anomalous, pro = anomalous[order], overlap[order].cumsum()
        last = np.append(np.flatnonzero(np.diff(anomalous)), len(anomalous) - 1)  # of equal scores
        # From the highest score down: pixels at or above it, and normal ones above it
        tp, pro = last + 1, pro[last]
        fp_above, fp = (self.n - np.searchsorted(normal, anomalous[last], side) for side in ("right", "left"))
        hits, middle = np.diff(tp, prepend=0), np.float32(self.low / 2 + self.high / 2)
        self.best = float(anomalous[last][np.argmax(2 * tp / (tp + fp + tp[-1]))])

        def dice(threshold):
            true, false = np.sum(anomalous >= threshold), self.n - np.searchsorted(normal, threshold)
            return float(2 * true / (true + false + tp[-1]))

        # The curves' corners: level from one anomalous score to the next, then a step (slanted where scores are equal)
        fpr = np.append(np.stack([fp_above, fp], axis=1).ravel(), self.n) / self.n
        tpr, pro = (np.append(np.stack([np.append(0, y[:-1]), y], axis=1).ravel(), 1) for y in (tp / tp[-1], pro))
        # for figures
        places = np.concatenate([np.linspace(0, 0.01, 50), np.linspace(0.01, 0.3, 100), np.linspace(0.3, 1, 50)])
        columns = ([0, *y] for y in (places, np.interp(places, fpr, tpr), np.interp(places, fpr, pro)))
        self.curve = [dict(zip(("fpr", "tpr", "pro"), map(float, y), strict=True)) for y in zip(*columns, strict=True)]
        inside = fpr <= 0.3
        x, y = np.append(fpr[inside], 0.3), np.append(pro[inside], np.interp(0.3, fpr, pro))
        return dict(pixel_auroc=float(np.sum(hits * (self.n - fp / 2 - fp_above / 2)) / tp[-1] / self.n),
                    pixel_ap=float(np.sum(hits * tp / (tp + fp)) / tp[-1]), aupro=float(np.trapezoid(y, x) / 0.3),
                    dice=dice(np.nextafter(middle, np.float32(np.inf))),  # above the middle, not at it
                    dice_valid=None if self.threshold is None else dice(np.float32(self.threshold)))


@torch.no_grad()
def evaluate(predict, split, batch_size, device, map_indices=(), map_file=None, threshold=None):
    """Score a split: an object with metrics {image_auroc, ..., dice_valid}, scores (N,), ms_per_image (from the image
    on the device to score and map), map_range (minimum, maximum) of all maps or None; curve, best: see PixelMetrics.

    predict: images (B, 3, H, W) in [0, 1] -> anomaly maps (B, H, W) or None, anomaly scores (B,); higher is more
    anomalous. The maps at `map_indices` are written to `map_file` as they come, float32."""
    pixel = PixelMetrics(len(split) * split.size**2 * split.has_masks, threshold)
    scores, low, high, seconds, done = [], math.inf, -math.inf, 0.0, 0
    for image in progress(split.batches(batch_size, device), f"scoring {split.name}", -(-len(split) // batch_size)):
        started = time.perf_counter()
        anomaly_map, score = predict(image)
        score = score.float().cpu().numpy()  # waits for the device
        seconds += time.perf_counter() - started
        if not np.isfinite(score).all():
            raise Error(f"a score of {split.paths[done]} or what follows is not finite: training diverged; lower --lr")
        scores.append(score)
        if anomaly_map is not None:
            anomaly_map = anomaly_map.float().cpu().numpy()
            low, high = min(low, float(anomaly_map.min())), max(high, float(anomaly_map.max()))
            if split.has_masks:
                pixel.update(anomaly_map, split.masks[done : done + len(score)])
            for i in sorted(set(map_indices).intersection(range(done, done + len(score)))):
                map_file.write(anomaly_map[i - done].tobytes())
        done += len(score)
    scores = np.concatenate(scores)
    return SimpleNamespace(metrics=image_metrics(split.labels, scores) | pixel.compute(), scores=scores,
                           ms_per_image=1000 * seconds / done, map_range=(low, high) if low <= high else None,
                           curve=pixel.curve, best=pixel.best)


# ------------------------------------------------------------------------------------------------------- the run folder
FORMAT = 1  # of model.pt, resume.pt and results.json: it changes with what these hold
# What may differ from the training run when a checkpoint is given, as may --weights that now lie elsewhere; every other
# argument is taken from the checkpoint. A run that resumes must have the same data, limit and batch size, too.
FREE = {"data", "root", "out", "device", "batch_size", "limit", "maps", "overwrite", "checkpoint", "predict",
        "cache_features"}


def read_results(file):
    """The results.json of a finished run, as a dict."""
    try:
        results = json.loads(Path(file).read_text())
        assert results["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as e:
        raise Error(f"{file} is damaged or of another format than {FORMAT}: run that method again") from e
    return results


def read_checkpoint(file, method):
    """What a model.pt or resume.pt of `method` holds, see `Run._save`."""
    kept = read_state(file, f"model.pt of a {method} run")
    kept = kept if isinstance(kept, dict) else {}
    if kept.get("method") != method or kept.get("format") != FORMAT:
        raise Error(f"{file} is of method {kept.get('method')}, format {kept.get('format')}; expected a model.pt of "
                    f"{method}, format {FORMAT}")
    return kept


class Run:
    """A run's folder, device and bookkeeping; results.json and its neighbours come from `finish`.

    checkpoint.pt is the best state yet, model.pt the same of a finished run; resume.pt is all of the last evaluation.
    notes: what else a script wants in results.json (a dict that JSON can hold); kept with the checkpoint."""

    def __init__(self, script, args):
        """Seeds PyTorch, picks the device, makes `<out>/<data>/<method>/seed<k>` and locks it.

        With args.checkpoint the arguments that define the model are taken from it, in place."""
        method, kept, self.args = Path(script).stem, None, args
        if args.predict and not args.checkpoint:
            raise Error("--predict needs a trained model: give --checkpoint FILE, the model.pt of a run")
        if args.checkpoint:
            kept = read_checkpoint(args.checkpoint, method)
            for field in dataclasses.fields(args):
                moved = field.name.endswith("weights") and getattr(args, field.name) != field.default
                if field.name not in FREE and field.name in kept["args"] and not moved:
                    setattr(args, field.name, kept["args"][field.name])
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            device = torch.device(best if args.device == "auto" else args.device)
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as e:
            raise Error(f"--device {args.device} cannot be used ({str(e).splitlines()[0]}); try --device auto") from e
        torch.manual_seed(args.seed)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what PyTorch asks for on a GPU
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.images = None if args.predict else listed(args)[2]  # resuming needs the very same ones
        asked = Path(args.predict or args.data).resolve()
        data = asked.name if asked.is_dir() else args.data
        if args.predict:  # each input and each model has its own folder
            source = f"{asked} {sha256(args.checkpoint)}".encode(errors="surrogateescape")
            data = f"{plain(asked.name)}-{hashlib.sha256(source).hexdigest()[:8]}"
        folder = Path(args.out) / data / method / f"seed{args.seed}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except OSError as e:
            reason = "another process is using it" if isinstance(e, BlockingIOError) else e.strerror
            raise Error(f"cannot write {folder}: {reason}; choose another --out") from None
        for left in folder.glob(".tmp-*"):  # of a run that was killed while it wrote
            remove(left)
        finished, begun = folder / "results.json", folder / "resume.pt"
        if args.checkpoint and finished.exists() and (args.predict or not args.overwrite):
            raise Error(f"{folder} holds a finished run; give another --out" + " or --overwrite" * (not args.predict))
        if not args.checkpoint and not args.overwrite and finished.exists():
            self._belongs_to(read_results(finished), folder)
            print(f"{folder} is finished already, with these arguments; nothing to do (--overwrite does it again)")
            raise SystemExit(0)
        if not args.checkpoint and not args.overwrite and begun.exists():
            kept = read_checkpoint(begun, method)
            self._belongs_to(kept, folder)
            if kept["threads"] != torch.get_num_threads():
                print(f"NOTE: {torch.get_num_threads()} threads now, {kept['threads']} before: results can differ")
        print(f"{method} on {data}, seed {args.seed}, {device}: {folder}", flush=True)
        self.script, self.device, self.folder, self.lock = Path(script), device, folder, lock
        self.kept = kept  # what --checkpoint, or else an interrupted run's last evaluation holds, or None
        self.history, self.best, self.epoch, self.notes = [], -math.inf, None, {}
        self.started, self.stateful, self.fresh = time.perf_counter(), (), kept is None

    def _belongs_to(self, kept, folder):
        """`Error` if what an earlier run left has other arguments or saw other images."""
        asked, theirs = (json.loads(json.dumps(a)) for a in (dataclasses.asdict(self.args), kept["args"]))  # no tuples
        for a in (asked, theirs):  # two folders of one name are not one benchmark
            a["data"] = str(Path(a["data"]).resolve()) if Path(a["data"]).is_dir() else a["data"]
        for k in [k for k in asked if k not in FREE - {"data", "limit", "batch_size"} and asked[k] != theirs.get(k)]:
            raise Error(f"{folder} holds a run with --{k.replace('_', '-')} {theirs.get(k)}, not {asked[k]}; give "
                        "--overwrite or another --out")
        if kept["images"] != self.images:
            raise Error(f"{folder} holds a run on other images: files of {self.args.data} were added, removed or "
                        "changed; give --overwrite or another --out")

    def epochs(self, model, *stateful):
        """1, 2, ..., args.epochs; after an interruption, what follows the last evaluation, with everything as it was.

        stateful: what else training changes: optimizers, schedules, networks outside of the model."""
        self.stateful, done = stateful, 0
        if kept := self.kept:
            done, self.history, self.best, self.epoch = (kept[k] for k in ("epoch", "history", "best", "best_epoch"))
            self.notes |= kept["notes"]
            self._put(model)
            for item, state in zip(stateful, kept["stateful"], strict=True):
                item.load_state_dict(state)
            torch.set_rng_state(kept["random"][0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(kept["random"][1])
            self.started = time.perf_counter() - kept["train_seconds"]
            print(f"resuming after epoch {done}, the last evaluation of an interrupted run", flush=True)
        yield from range(done + 1, self.args.epochs + 1)

    def validate(self, model, epoch, valid, **losses):
        """Log the epoch; at every args.eval_every-th and the last one score valid and keep the state that is best yet.

        The criterion: image AUROC, averaged with pixel AUROC where there are masks (thesis, 3.4.1: chosen on valid,
        evaluated every 10 epochs); the first of equals. Without a valid split the last epoch is kept.
        losses: name -> value of this epoch; one that is not finite ends the run."""
        if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
            raise Error(f"{bad[0]} is {losses[bad[0]]} at epoch {epoch}: training diverged; lower --lr")
        seconds = time.perf_counter() - self.started
        row = dict(epoch=epoch, seconds=round(seconds, 1), **losses)
        self.history.append(row)
        looked, value = epoch % self.args.eval_every == 0 or epoch == self.args.epochs, math.inf
        if looked and valid:
            metrics = evaluate(model.predict, valid, self.args.batch_size, self.device).metrics
            value = np.mean([v for v in (metrics["image_auroc"], metrics["pixel_auroc"]) if v is not None])
            row |= {f"valid_{k}": v for k, v in metrics.items() if v is not None}
        if looked and (value > self.best or not valid):
            self.best = value
            self.keep(model, epoch)
        shown = {k: row[k] for k in (*losses, "valid_image_auroc", "valid_pixel_auroc") if k in row}
        print(f"epoch {epoch}/{self.args.epochs}", *(f"{k} {v:.4f}" for k, v in shown.items()),
              f"{seconds:.0f} s, {seconds / epoch * (self.args.epochs - epoch):.0f} s left",
              *["(best)"] * (self.epoch == epoch), sep="  ", flush=True)
        write_csv(self.folder / "log.csv", self.history)
        if looked:
            on_gpu = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
            self._save("resume.pt", model, epoch, history=self.history, best=float(self.best), best_epoch=self.epoch,
                       stateful=[item.state_dict() for item in self.stateful], random=(torch.get_rng_state(), on_gpu))

    def keep(self, model, epoch=None):
        """Write the model's state, without frozen networks, as checkpoint.pt: the state that `finish` evaluates."""
        self.epoch = epoch
        (self.folder / "results.json").unlink(missing_ok=True)  # from here on the folder is not a finished run
        self._save("checkpoint.pt", model, epoch)

    def _save(self, name, model, epoch, **more):
        if self.fresh:  # nothing of an earlier run survives
            for old in self.folder.iterdir():
                remove(old)
        self.fresh = False
        state = {k: v.cpu() for k, v in model.state_dict().items() if not k.startswith(_frozen(model))}
        with atomic(self.folder / name) as tmp:
            torch.save(dict(format=FORMAT, method=self.script.stem, args=dataclasses.asdict(self.args), epoch=epoch,
                            notes=self.notes, train_seconds=time.perf_counter() - self.started,
                            weights=_weights(model), state=state, images=self.images, threads=torch.get_num_threads(),
                            **more), tmp)

    def load(self, model):
        """Put the kept (with --checkpoint: the given) state into `model`; returns its epoch and train seconds."""
        if not self.args.checkpoint:
            self.kept = read_checkpoint(self.folder / "checkpoint.pt", self.script.stem)
        self._put(model)
        self.notes = self.kept["notes"]
        return self.kept["epoch"], self.kept["train_seconds"]

    def _put(self, model):
        source, theirs, ours = self.args.checkpoint or self.folder, self.kept["weights"], _weights(model)
        if [w["sha256"] for w in theirs] != [w["sha256"] for w in ours]:
            raise Error(f"{source} was trained on the frozen weights {theirs}, these are {ours}; give the same ones")
        load_state(model, self.kept["state"], source, _frozen(model))


def _frozen(model):
    return tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "frozen", False))


def _weights(model):
    return [module.weights_used for module in model.modules() if hasattr(module, "weights_used")]


def finish(run, model, splits):
    """Evaluate the kept state on the test split, once, and write the run folder; the last file is results.json.

    splits: (train, valid, test) of `load_benchmark`. scores.csv: path, label, score. maps/: panels of image, ground
    truth and heat map, min-max over the test set (thesis, 3.4.1). With --predict: scores.csv and maps/ only, and for a
    NIfTI volume anomaly_map.nii.gz."""
    args, folder, test = run.args, run.folder, splits[2]
    epoch, train_seconds = run.load(model)
    for old in ("results.json", "maps", "curves.csv"):  # a folder without results.json is not a finished run
        remove(folder / old)
    model.to(run.device)
    volume = (args.predict or "").lower().endswith((".nii", ".nii.gz"))
    count = len(test) if args.maps < 0 else min(args.maps, len(test))
    shown = [i * len(test) // count for i in range(count)]  # the same images for all methods
    wanted = range(len(test)) if volume else shown
    threshold = None  # of the pixels: the best for Dice on valid
    if splits[1] and splits[1].has_masks:
        threshold = evaluate(model.predict, splits[1], args.batch_size, run.device).best
    with tempfile.TemporaryFile(dir=folder) as raw:
        result = evaluate(model.predict, test, args.batch_size, run.device, wanted, raw, threshold)
        if result.map_range and wanted:
            raw.flush()
            maps = np.memmap(raw, np.float32, "r", shape=(len(wanted), test.size, test.size))
            if volume:
                volumes().write_maps(folder / "anomaly_map.nii.gz", args.predict, maps)
            _write_panels(folder / "maps", test, shown, maps[shown] if volume else maps, *result.map_range)
    rows = zip(test.paths, test.labels, result.scores, strict=True)
    write_csv(folder / "scores.csv", [dict(path=p, label="" if y < 0 else int(y), score=float(s)) for p, y, s in rows])
    if args.predict:
        record = dict(input=str(Path(args.predict).resolve()), checkpoint=str(Path(args.checkpoint).resolve()),
                      checkpoint_sha256=sha256(args.checkpoint), scored=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        (folder / "predict.json").write_text(json.dumps(record, indent=1))
        os.close(run.lock)
        print(f"{len(test)} scores, {count if result.map_range else 0} heat maps: {folder}")
        return
    write_csv(folder / "curves.csv", result.curve) if result.curve else None
    published = {f.name: f.default for f in dataclasses.fields(args) if f.name not in FREE | {"seed"}}
    if "epochs" in published:  # where nothing is trained, the batch size changes nothing but speed and memory
        published["batch_size"] = type(args).batch_size
    packages = ("torch", "torchvision", "open_clip_torch", "numpy", "scipy", "scikit-learn", "pillow")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)  # GiB
    on_gpu = run.device.type == "cuda"
    commit = subprocess.run(["git", "-C", run.script.parent, "describe", "--always", "--dirty", "--abbrev=40"],
                            capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    results = dict(
        format=FORMAT, method=run.script.stem, data=folder.parts[-3], seed=args.seed, metrics=result.metrics,
        images=run.images,
        counts={s.name: dict(normal=int((s.labels == 0).sum()), anomalous=int(s.labels.sum())) for s in splits if s},
        pixel_threshold=threshold, check=test.check, epoch=epoch, train_seconds=train_seconds,
        test_ms_per_image=result.ms_per_image,
        peak_memory_gib=dict(ram=peak) | (dict(gpu=torch.cuda.max_memory_allocated() / 2**30) if on_gpu else {}),
        parameters=dict(total=sum(p.numel() for p in model.parameters()),
                        trained=sum(p.numel() for p in model.parameters() if p.requires_grad)),
        weights=_weights(model), notes=run.notes, args=dataclasses.asdict(args), command=" ".join(sys.argv[1:]),
        changed={name: getattr(args, name) for name, value in published.items() if getattr(args, name) != value},
        versions=dict(python=platform.python_version(), **{p: version(p) for p in packages}),
        device=torch.cuda.get_device_name() if on_gpu else str(run.device), threads=torch.get_num_threads(),
        commit=commit, finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    if not args.checkpoint:
        os.replace(folder / "checkpoint.pt", folder / "model.pt")
    shutil.copyfile(run.script, folder / run.script.name)
    with atomic(folder / "results.json") as tmp:
        tmp.write_text(json.dumps(results, indent=1))
    (folder / "resume.pt").unlink(missing_ok=True)
    os.close(run.lock)
    for name in [w["name"] for w in results["weights"] if not w["trained"]]:
        print(f"NOTE: {name} ran with UNTRAINED weights; the figures show that the code runs, no more")
    print(*(f"  {name:<11}  {'-' if v is None else format(v, '.4f')}" for name, v in result.metrics.items()), sep="\n")
    print(f"  epoch {epoch or '-'}, train {train_seconds:.1f} s, test {result.ms_per_image:.1f} ms/image, "
          f"peak {peak:.2f} GiB: {folder}")


def plain(name):
    """A name as part of a file name: at most 60 characters, ASCII, no dots and spaces."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[-60:]


def map_name(index, path):
    """The file of a test image's heat map, unique whatever the images' paths are."""
    return f"{index:05}_{plain(path.rsplit('.', 1)[0])}.png"


def _write_panels(folder, split, indices, maps, low, high):
    with atomic(folder) as tmp:
        tmp.mkdir()
        for i, anomaly_map in zip(indices, maps, strict=True):
            image = split.images[i].transpose(1, 2, 0)
            heat = (anomaly_map - low) / (high - low or 1)
            jet = np.clip(1.5 - np.abs(4 * heat[..., None] - [3, 2, 1]), 0, 1) * 255  # blue is low, red is high
            panels = [image, (0.5 * image + 0.5 * jet).astype(np.uint8)]
            if split.has_masks:
                panels.insert(1, np.repeat(split.masks[i][..., None] * np.uint8(255), 3, axis=2))
            Image.fromarray(np.concatenate(panels, axis=1)).save(tmp / map_name(i, split.paths[i]))
