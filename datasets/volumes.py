"""NIfTI volumes: read slice by slice, cut into images, and written back with anomaly maps.

For the preparation scripts, and for common.py where --predict is given a volume."""

import gzip
import io
import math
import os
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


class Damaged(common.Error):
    """A source file that cannot be used; the preparation scripts name it and continue without it."""


class Volume:
    """A NIfTI volume read by axial slices, with the same orientation whatever its affine: rows run from front to back,
    columns from the patient's right to the left (radiological view), slices upwards. Damaged if it cannot be used."""

    def __init__(self, file):
        self.file = file
        try:
            self.image = _opened(file)
            orientation = nibabel.io_orientation(self.image.affine)  # per voxel axis: axis of the body, and its sign
            needed = math.prod(self.image.shape) * self.image.get_data_dtype().itemsize + self.image.dataobj.offset
            data = self.image.file_map["image"]
            size = data.fileobj.getbuffer().nbytes if data.fileobj else os.path.getsize(data.filename)
        except Exception as e:  # nibabel, gzip and numpy raise many kinds where a header is damaged
            raise Damaged(f"{file} is not a readable NIfTI volume ({_reason(e)}); download it again") from e
        if size < needed:
            raise Damaged(f"{file} is cut off: {size} of {needed} bytes; download it again")
        if len(self.image.shape) < 3 or math.prod(self.image.shape[3:]) != 1:
            raise Damaged(f"{file} has {len(self.image.shape)} dimensions {self.image.shape}; one volume has 3")
        if np.isnan(orientation).any():
            raise Damaged(f"{file} has an affine that names no orientation; convert the source again")
        self.axes = [int(np.flatnonzero(orientation[:, 0] == a)[0]) for a in range(3)]  # right, front, up
        self.signs = [int(orientation[a, 1]) for a in self.axes]
        self.shape = tuple(self.image.shape[a] for a in self.axes)

    def axial(self, start=0, stop=None):
        """Slices start to stop as (n, H, W) floats, scaled as the header says; Damaged if a value is not finite."""
        depth = self.shape[2]
        stop = depth if stop is None else stop
        if not 0 <= start < stop <= depth:
            raise Damaged(f"{self.file} has {depth} axial slices; the rule reads {start} to {stop - 1}")
        where = [slice(None)] * 3 + [0] * (len(self.image.shape) - 3)  # (x, y, z, 1) is one volume, too
        where[self.axes[2]] = slice(start, stop) if self.signs[2] > 0 else slice(depth - stop, depth - start)
        try:
            with np.errstate(all="ignore"):
                voxels = np.asarray(self.image.dataobj[tuple(where)], np.float32)  # reads these slices only
        except Exception as e:
            raise Damaged(f"{self.file} is damaged ({_reason(e)}); download it again") from e
        if not np.isfinite(voxels).all():
            raise Damaged(f"{self.file} has voxels that are not finite; download or convert it again")
        return voxels.transpose(self.axes[::-1])[self._flips()]  # (up, front, right) -> (D, H, W)

    def _flips(self):
        return tuple(slice(None, None, sign) for sign in (self.signs[2], -self.signs[1], -self.signs[0]))

    def save(self, slices, file):
        """Write values for all axial slices, (D, H, W), as a volume that every viewer shows on top of this one."""
        voxels = slices[self._flips()].transpose(np.argsort(self.axes[::-1]))
        with common.atomic(file) as tmp:
            nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), self.image.affine), f"{tmp}.nii.gz")
            os.replace(f"{tmp}.nii.gz", tmp)


def _opened(file):
    """The NIfTI image of a file. A compressed one is unpacked into memory, to the end, where its checksum is; from a
    file, slices would be read without it, and each from the start."""
    image = nibabel.load(file)
    held = {}
    for kind, part in image.file_map.items():
        if str(part.filename).endswith(".gz"):
            held[kind] = nibabel.FileHolder(fileobj=io.BytesIO())
            with gzip.open(part.filename) as packed:
                shutil.copyfileobj(packed, held[kind].fileobj, 2**20)
    return type(image).from_file_map(image.file_map | held) if held else image


def _reason(e):
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def stretched(image):
    """(H, W) floats as uint8, the minimum black and the maximum white."""
    low, high = image.min(), image.max()
    return np.rint((image - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def slices_as_images(file, cache):
    """The folder with a volume's axial slices as 8-bit PNG, each scaled by its own range as in `brain`."""
    try:
        folder = cache / f"{file.name}-{common.sha256(file)[:12]}"
    except OSError as e:
        raise common.Error(f"cannot read {file} ({e.strerror}); give a NIfTI volume") from e
    if not folder.exists():
        with common.atomic(folder) as tmp:
            tmp.mkdir()
            for z, image in enumerate(Volume(file).axial()):
                Image.fromarray(stretched(image)).save(tmp / f"{z:04}.png")
    return folder


def write_maps(file, source, maps):
    """Anomaly maps (D, S, S) of the axial slices of the volume `source`, resized to its grid, as a NIfTI volume."""
    volume = Volume(source)
    size = volume.shape[1::-1]  # (H, W)
    resized = torch.nn.functional.interpolate(torch.from_numpy(maps.copy())[:, None], size, mode="bilinear")
    volume.save(resized[:, 0].numpy(), file)
