"""phantom: test data without a download, generated from the brain MR volume included in every nibabel installation.

Each image is a slice of one volunteer's brain (an axial volume of 128x96x24 voxels that nibabel distributes as test
data) with random deformation and contrast; anomalous images also have painted lesions. The phantom is for first runs
and tests. It is not a benchmark: results on it say nothing about patients.

Each image is generated with its own random generator in three steps:
1. Cut a slice at a random depth and tilt, mirror it or not, then scale, rotate and elastically deform it.
2. If the image is anomalous, add one to three lesions, each bright or dark, textured, soft-edged and irregular. The
   mask marks pixels that a lesion changes by more than a third of its largest change.
3. Apply a random tone curve, a smooth bias field and Rician noise.

The script writes <root>/phantom/{train/good,{valid,test}/{good,Ungood}}/img/*.png (8-bit grey), masks in
Ungood/anomaly_mask, and manifest.csv. The same arguments always produce identical files. Default counts: train 200;
valid 20 + 20; test 60 + 60.

Source: nibabel/tests/data/example4d.nii.gz, the mean of two repetitions of one scan. nibabel's MIT licence covers the
package and its examples; nibabel does not say where the scan comes from.
"""

import dataclasses
import json
import sys
import zlib
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import nibabel
import numpy as np
from annotated_types import Ge, Interval
from PIL import Image
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

VOXEL = (2.0, 2.0, 2.2)  # mm
FIELD_OF_VIEW = 200  # mm across an image


@dataclass
class Args:
    root: str = "data"
    """parent folder of all benchmarks; output is <root>/phantom"""
    seed: Annotated[int, Ge(0)] = 0
    """random seed for all images"""
    size: Annotated[int, Interval(ge=32, le=2048)] = 128
    """image size in pixels"""
    train: Annotated[int, Ge(1)] = 200
    """number of normal training images"""
    valid: Annotated[int, Ge(1)] = 20
    """number of validation images per class"""
    test: Annotated[int, Ge(1)] = 60
    """number of test images per class"""


def read_volume():
    """Read the brain as (x, y, z) floats, scaled so that the 99.5th percentile is 1. Axes: left, front, up."""
    source = files("nibabel") / "tests" / "data" / "example4d.nii.gz"
    try:
        with as_file(source) as path:
            volume = np.asarray(nibabel.load(path).dataobj, np.float32).mean(axis=3)  # two repetitions
    except FileNotFoundError:
        raise common.Error(f"this nibabel was packaged without its test data {source}; install nibabel with "
                           f"pip") from None
    except (OSError, EOFError, zlib.error, nibabel.filebasedimages.ImageFileError) as e:
        raise common.Error(f"cannot read {source} ({e}); reinstall nibabel with pip") from e
    return volume / np.percentile(volume, 99.5)


def smooth_noise(rng, size, width):
    """Return Gaussian noise (size, size), smoothed with sigma `width` and scaled to standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.normal(size=(size, size)), width, mode="wrap")
    return noise / noise.std()


def slice_of(volume, middle, rng, size):
    """Return a deformed slice (size, size) and the parameters of the cut."""
    scale, turn = rng.uniform(0.88, 1.12, 2), rng.normal(0, np.radians(4))
    cut = dict(depth=rng.uniform(6, 20), tilt_x=rng.normal(0, np.radians(3)), tilt_y=rng.normal(0, np.radians(4)),
               mirrored=bool(rng.integers(2)))
    mm = FIELD_OF_VIEW / size
    v, u = np.mgrid[:size, :size] * mm - FIELD_OF_VIEW / 2  # mm down and to the right of the centre
    bend = [rng.uniform(1, 3) * smooth_noise(rng, size, size / 10) for _ in range(2)]  # mm
    u, v = (u + bend[0]) * scale[0], (v + bend[1]) * scale[1]
    u, v = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    u = -u if cut["mirrored"] else u
    z = cut["depth"] + (u * np.tan(cut["tilt_x"]) + v * np.tan(cut["tilt_y"])) / VOXEL[2]
    where = [middle[0] + u / VOXEL[0], middle[1] - v / VOXEL[1], z]
    return np.clip(ndimage.map_coordinates(volume, where, order=2, prefilter=False, mode="grid-constant"), 0, None), cut


def lesions(image, rng):
    """Generate lesions inside the brain; return the change of the image (size, size) and the lesion mask."""
    size = len(image)
    brain = ndimage.binary_fill_holes(ndimage.gaussian_filter(image, size / 64) > 0.25)
    inside = np.argwhere(ndimage.binary_erosion(brain, iterations=max(1, size // 32)))
    y, x = np.mgrid[:size, :size]
    change, mask = np.zeros_like(image), np.zeros(image.shape, bool)
    for _ in range(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15])):
        radius = np.exp(rng.uniform(np.log(5), np.log(16))) * size / FIELD_OF_VIEW  # 5 to 16 mm
        centre = inside[rng.integers(len(inside))]
        stretch, angle = rng.uniform(0.7, 1.4), rng.uniform(0, np.pi)
        dy, dx = y - centre[0], x - centre[1]
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        distance = np.hypot(along * stretch, across / stretch) / radius
        distance += 0.22 * smooth_noise(rng, size, radius / 2)  # an irregular outline
        shape = brain / (1 + np.exp(np.clip((distance - 1) / rng.uniform(0.05, 0.15), -50, 50)))  # a soft edge
        texture = 1 + 0.25 * smooth_noise(rng, size, max(1, radius / 5))
        added = rng.choice([-1, 1]) * rng.uniform(0.15, 0.45) * shape * texture
        mask |= np.abs(added) > np.abs(added).max() / 3
        change += added
    return change, mask


def finish_image(image, rng):
    """Apply a tone curve, a bias field and Rician noise; return uint8 (size, size)."""
    size = len(image)
    image = np.clip(image, 0, None) ** rng.uniform(0.75, 1.35) * rng.uniform(0.5, 0.75)
    image = image * np.exp(0.1 * smooth_noise(rng, size, size / 4))
    noise = rng.uniform(0.01, 0.03) * rng.normal(size=(2, size, size))
    return np.clip(255 * np.hypot(image + noise[0], noise[1]), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    folder = Path(args.root) / "phantom"
    asked = json.dumps({k: v for k, v in dataclasses.asdict(args).items() if k != "root"})
    if folder.exists():
        made = folder / "arguments.json"
        if made.is_file() and made.read_text() == asked:
            if (count := len(list(folder.rglob("*.png")))) != args.train + 3 * (args.valid + args.test):  # with masks
                raise common.Error(f"{folder} has missing or extra images ({count} PNG files); remove it")
            print(f"{folder} already exists and was made with these arguments; nothing to do")
            raise SystemExit
        raise common.Error(f"{folder} exists and was made with other arguments; remove it, or choose another --root")
    volume = read_volume()
    middle = [(s.start + s.stop - 1) / 2 for s in ndimage.find_objects((volume > 0.25).astype(int))[0]]  # of the brain
    volume = ndimage.spline_filter(volume, order=2)
    rows = []
    with common.atomic(folder) as tmp:
        for s, (split, counts) in enumerate(dict(train=(args.train, 0), valid=(args.valid, args.valid),
                                                 test=(args.test, args.test)).items()):
            for label, (name, count) in enumerate(zip(("good", "Ungood"), counts, strict=True)):
                kinds = ["img", "anomaly_mask"][: 1 + label] if count else []
                for kind in kinds:
                    (tmp / split / name / kind).mkdir(parents=True)
                for i in range(count):
                    rng = np.random.default_rng([args.seed, s, label, i])
                    image, cut = slice_of(volume, middle, rng, args.size)
                    path = Path(split) / name / "img" / f"{i:04}.png"
                    if label:
                        change, mask = lesions(image, rng)
                        image = image + change
                        Image.fromarray(mask * np.uint8(255)).save(tmp / split / name / "anomaly_mask" / path.name)
                    Image.fromarray(finish_image(image, rng)).save(tmp / path)
                    rows.append(dict(image=path.as_posix(), split=split, label=label, source="example4d.nii.gz",
                                     **{k: round(v, 4) for k, v in cut.items()}))
        common.write_csv(tmp / "manifest.csv", rows)
        (tmp / "arguments.json").write_text(asked)
    print(f"{folder}: train {args.train} normal, valid {args.valid} + {args.valid}, test {args.test} + {args.test} "
          f"(normal + anomalous), {args.size}x{args.size} pixels; one deformed brain, painted lesions, not a benchmark")
