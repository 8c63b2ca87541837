"""Scans: NIfTI volumes and DICOM series, read slice by slice, and their anomaly maps in the same form.

As a script it writes the axial slices of a folder of scans as training images: <to>/scan0001-<name>/0042.png, ...; a
method that is trained on them with `--data` knows from these names which slices are of one scan.

`Volume`, `open_dicom` and `stretched` are for the preparation scripts, `find_scans` is for predict.py. D slices of a
scan, H W slice, S image size of the method."""

import functools
import gzip
import io
import math
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import torch
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi
from pydicom.valuerep import format_number_as_ds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


@dataclass
class Args:
    scans: str
    """folder of scans: NIfTI volumes or DICOM series"""
    to: str
    """folder for the slices, for instance mine/train/good for --data mine"""


class Damaged(common.Error):
    """A source file that cannot be used; the preparation scripts name it and continue without it."""


class Volume:
    """A NIfTI volume read by axial slices, with the same orientation whatever its affine: rows run from front to back,
    columns from the patient's right to the left (radiological view), slices upwards. Damaged if it cannot be used.

    header_only: for the grid alone; what is wrong with the voxels is not seen, and nothing is unpacked."""

    def __init__(self, file, header_only=False):
        self.file = file
        try:
            self.image = nibabel.load(file) if header_only else _opened(file)
            orientation = nibabel.io_orientation(self.image.affine)  # per voxel axis: axis of the body, and its sign
            needed = math.prod(self.image.shape) * self.image.get_data_dtype().itemsize + self.image.dataobj.offset
            data = self.image.file_map["image"]
            size = data.fileobj.getbuffer().nbytes if data.fileobj else os.path.getsize(data.filename)
        except Exception as e:  # nibabel, gzip and numpy raise many kinds where a header is damaged
            raise Damaged(f"{file} is not a readable NIfTI volume ({_reason(e)}); download it again") from e
        if size < needed and not header_only:  # the size of a packed file says nothing
            raise Damaged(f"{file} is cut off: {size} of {needed} bytes; download it again")
        if len(self.image.shape) < 3 or math.prod(self.image.shape[3:]) != 1:
            raise Damaged(f"{file} has {len(self.image.shape)} dimensions {self.image.shape}; one volume has 3")
        if np.isnan(orientation).any():
            raise Damaged(f"{file} has an affine that names no orientation; convert the source again")
        self.axes = [int(np.flatnonzero(orientation[:, 0] == a)[0]) for a in range(3)]  # right, front, up
        self.signs = [int(orientation[a, 1]) for a in self.axes]
        self.shape = tuple(self.image.shape[a] for a in self.axes)

    def axial(self, start=0, stop=None, finite=True):
        """Slices start to stop as (n, H, W) floats, scaled as the header says.

        finite: Damaged if a value is not finite."""
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
        if finite and not np.isfinite(voxels).all():
            raise Damaged(f"{self.file} has voxels that are not finite; download or convert it again")
        return voxels.transpose(self.axes[::-1])[self._flips()]  # (up, front, right) -> (D, H, W)

    def _flips(self):
        return tuple(slice(None, None, sign) for sign in (self.signs[2], -self.signs[1], -self.signs[0]))

    def save(self, slices, file):
        """Write values for all axial slices, (D, H, W), as a volume that every viewer shows on top of this one."""
        voxels = slices[self._flips()].transpose(np.argsort(self.axes[::-1]))
        with common.atomic(file) as tmp:
            nibabel.save(nibabel.Nifti1Image(voxels, self.image.affine), f"{tmp}.nii.gz")
            os.replace(f"{tmp}.nii.gz", tmp)


def _opened(file):
    """The NIfTI image of a file. A compressed one is unpacked into memory, to the end, where its checksum is; from a
    file, slices would be read without it, and each from the start."""
    image = nibabel.load(file)
    held = {}
    for kind, part in image.file_map.items():
        if str(part.filename).lower().endswith(".gz"):
            held[kind] = nibabel.FileHolder(fileobj=io.BytesIO())
            with gzip.open(part.filename) as packed:
                shutil.copyfileobj(packed, held[kind].fileobj, 2**20)
    return type(image).from_file_map(image.file_map | held) if held else image


def open_dicom(file):
    """The dataset of a DICOM file whose pixels can be decoded here; else Damaged."""
    try:
        dataset = pydicom.dcmread(file)
        syntax = dataset.file_meta.TransferSyntaxUID
        try:
            decoder = pydicom.pixels.get_decoder(syntax)
            needed = [d.rpartition("requires ")[2] for d in decoder.missing_dependencies] * (not decoder.is_available)
        except NotImplementedError:
            needed = ["to be converted: pydicom knows no package for it"]
    except Exception as e:  # pydicom raises many kinds, also where it trusts a damaged header
        why = " ".join(str(e).split())
        raise Damaged(f"{file} is not a readable DICOM file ({why}); download it again") from e
    if needed:
        raise Damaged(f"{file} has the transfer syntax {syntax.name} ({syntax}), which needs {', or '.join(needed)}")
    return dataset


def _reason(e):
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def stretched(image):
    """(H, W) floats as uint8, the minimum black and the maximum white."""
    low, high = image.min(), image.max()
    return np.rint((image - low) * (255 / ((high - low) or 1))).astype(np.uint8)


# -------------------------------------------------------------------------------------------------- scans for --predict
# What the map of a DICOM slice has from that slice: whose it is, which study, and where it lies.
SHARED = ["SpecificCharacterSet", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID",
          "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName",
          "Modality", "BodyPartExamined", "Laterality", "PatientPosition", "FrameOfReferenceUID",
          "PositionReferenceIndicator", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
          "ImagerPixelSpacing", "SliceThickness", "SpacingBetweenSlices", "SliceLocation"]
HEADER = [*SHARED, "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription",
                   "InstanceNumber", "NumberOfFrames", "PhotometricInterpretation", "Rows", "Columns"]


def find_scans(path):
    """(scans, damaged): the scans in a file or folder, by place, and one line for each file that cannot be used.

    A scan is a NIfTI volume, a DICOM series (the files of one folder that have one SeriesInstanceUID), or a DICOM file
    where `path` is one. Its `name` is that of its `source`, unique, and can be part of a file name. Of its len(scan)
    slices from bottom to top, slice(i) is (H, W) uint8, and blank(i) whether that has one value only; both may raise
    Damaged. Read one scan after the other: the voxels of the last volume stay in memory."""
    path = Path(os.path.abspath(path))
    found, series, damaged, others = [], {}, [], []
    for file in [path] if path.is_file() else common.files_in(path):
        if file != path and re.search(r"[-_](seg|labels?|mask|map)\.nii", file.name.lower()):
            others.append(file)  # segmentations, and what `save_maps` wrote
            continue
        try:
            if file.name.lower().endswith((".nii", ".nii.gz")):
                found.append(("", NiftiScan(file)))
            elif file.suffix.lower() not in common.SUFFIXES and _is_dicom(file):
                if one := _dicom_slice(file):
                    series.setdefault((file.parent, one.header.get("SeriesInstanceUID")), []).append(one)
                else:
                    others.append(file)
        except Damaged as e:
            damaged.append(str(e))
    if others:  # segmentations; reports and plans, as archives export them with a series
        print(f"note: {len(others)} files that hold no images are passed over, e.g. {others[0]}", file=sys.stderr)
    shared = Counter(folder for (folder, _), slices in series.items() if len(slices) > 1)
    for (folder, _), slices in series.items():
        header, alone = slices[0].header, len(slices) == 1
        told = "".join(f"-{header[key].value}" for key in ("SeriesNumber", "SeriesDescription") if header.get(key))
        scan = DicomScan(slices[0].file if alone else folder, slices)
        found.append((told * (shared[folder] > 1 and not alone), scan))
    found.sort(key=lambda item: (str(item[1].source), item[0]))
    taken = set()
    for label, scan in found:
        place = scan.source.name if scan.source == path else str(scan.source.relative_to(path))
        scan.name = name = common.plain(re.sub(r"\.(nii|nii\.gz|dcm)$", "", place, flags=re.IGNORECASE) + label)
        number = 1
        while scan.name.lower() in taken:  # some file systems do not tell a from A
            number += 1
            scan.name = common.plain(f"{name}-{number}")
        taken.add(scan.name.lower())
    return [scan for _, scan in found], damaged


class NiftiScan:

    def __init__(self, file):
        self.source, self.volume = file, Volume(file, header_only=True)

    def __len__(self):
        return self.volume.shape[2]

    def slice(self, i):
        return stretched(_voxels(self)[i])  # by its own range, as in `brain`

    def blank(self, i):
        return not np.ptp(self.slice(i))

    def save_maps(self, folder, maps, pixel, low):
        """<name>_map.nii.gz on the volume's grid and, if there is a threshold `pixel`, <name>_mask.nii.gz.

        maps: (D, S, S), NaN in slices without one, which are shown as `low` and have no mask."""
        maps = _resized(maps, self.volume.shape[1::-1])  # (D, H, W)
        if pixel is not None:
            self.volume.save((maps >= pixel).astype(np.uint8), Path(folder, f"{self.name}_mask.nii.gz"))
        maps[np.isnan(maps)] = low
        self.volume.save(maps, Path(folder, f"{self.name}_map.nii.gz"))


@functools.lru_cache(maxsize=1)  # a volume is unpacked once for all of its slices, and makes room for the next one
def _voxels(scan):
    """The slices (D, H, W) of a NiftiScan; voxels that are not finite are background, the minimum of their slice."""
    voxels = np.require(Volume(scan.source).axial(finite=False), requirements="W")
    bad = ~np.isfinite(voxels)
    if bad.any():
        print(f"note: {scan.source}: {bad.sum()} voxels are not finite; they count as background", file=sys.stderr)
        for image, where in zip(voxels, bad, strict=True):
            image[where] = 0 if where.all() else image[~where].min()
    return voxels


class DicomScan:

    def __init__(self, source, slices):
        self.source, self.slices = source, _upwards(slices)

    def __len__(self):
        return len(self.slices)

    def slice(self, i):
        return _picture(self, i)

    def blank(self, i):
        return not np.ptp(self.slice(i))

    def save_maps(self, folder, maps, pixel, low):
        """<name>_map, a series that viewers lay over this one, and, if there is a threshold `pixel`, <name>_mask.

        maps: (D, S, S), NaN in slices without one, which are shown as `low` and have no mask."""
        start, high = (float(f.reduce(maps, axis=None, initial=low)) for f in (np.fmin, np.fmax))  # NaN left out
        start, step = (float(format_number_as_ds(v)) for v in (start, (high - start) / 65535 or 1.0))  # as written
        self._save(Path(folder, f"{self.name}_map"), "anomaly map", 1000, maps, start, step,
                   lambda m: np.rint((np.where(np.isnan(m), low, m) - start) / step).clip(0, 65535))
        if pixel is not None:
            self._save(Path(folder, f"{self.name}_mask"), "anomaly mask", 2000, maps, 0, 1, lambda m: m >= pixel)

    def _save(self, folder, description, number, maps, intercept, slope, stored):
        """A derived series, one file a slice. stored: turns a map into the integers that slope and intercept undo."""
        series = pydicom.uid.generate_uid()
        with common.atomic(folder) as tmp:
            tmp.mkdir()
            for i, one in enumerate(self.slices):
                image, source = pydicom.Dataset(), pydicom.Dataset()
                for key in [key for key in SHARED if key in one.header]:
                    image.add(one.header[key])
                # The source's own class and modality: viewers lay few others over a series.
                image.SOPClassUID = one.header.get("SOPClassUID") or pydicom.uid.SecondaryCaptureImageStorage
                image.SOPInstanceUID, image.SeriesInstanceUID = pydicom.uid.generate_uid(), series
                image.SeriesNumber, image.InstanceNumber = one.series_number + number, i + 1
                image.SeriesDescription, image.ImageType = description, ["DERIVED", "SECONDARY", "OTHER"]
                source.ReferencedSOPClassUID = image.SOPClassUID
                source.ReferencedSOPInstanceUID = one.header.get("SOPInstanceUID")
                image.SourceImageSequence = [source]
                image.RescaleIntercept, image.RescaleSlope, image.RescaleType = intercept, slope, "US"  # unspecified
                values = stored(_resized(maps[i : i + 1], one.size)[0])  # (H, W)
                image.set_pixel_data(values.astype(np.uint16), "MONOCHROME2", 16, generate_instance_uid=False)
                try:
                    image.save_as(tmp / f"{i:04}.dcm", enforce_file_format=True)
                except (TypeError, ValueError, AttributeError) as e:
                    raise Damaged(f"{one.file} has a header that cannot be copied to a map ({_reason(e)})") from e


def _is_dicom(file):
    if not file.is_file():  # a pipe, a broken link
        return False
    try:
        with open(file, "rb") as f:
            return f.read(132)[128:] == b"DICM" or file.suffix.lower() == ".dcm"
    except OSError as e:
        raise Damaged(f"{file} cannot be read ({e.strerror}); check its permissions") from e


def _dicom_slice(file):
    """What a series needs of a DICOM file with one grey image; None where it holds another kind of thing.

    size: (H, W), turn: directions of rows and columns, place: of the first pixel in mm; empty where not told."""
    try:
        with warnings.catch_warnings(action="ignore"):
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=HEADER)
            list(header)  # converts all values: one that cannot be is found here
            kind = getattr(header.file_meta.get("MediaStorageSOPClassUID"), "name", "Image")
            number, series_number, frames, *size = (int(header.get(key) or 0) for key in (
                "InstanceNumber", "SeriesNumber", "NumberOfFrames", "Rows", "Columns"))
            turn, place = (np.array(header.get(key) or [], float) for key in (
                "ImageOrientationPatient", "ImagePositionPatient"))
    except Exception as e:  # as in open_dicom
        raise Damaged(f"{file} is not a readable DICOM file ({_reason(e)}); download it again") from e
    if "Image" not in kind:
        return None
    if frames > 1:
        raise Damaged(f"{file} holds {frames} frames; convert it to NIfTI, for example with dcm2niix")
    grey = header.get("PhotometricInterpretation")
    if grey not in ("MONOCHROME1", "MONOCHROME2") or 0 in size:
        raise Damaged(f"{file} holds {grey or 'no'} pixels, {size[0]}x{size[1]}; one grey image was expected")
    return SimpleNamespace(file=file, header=header, number=number, series_number=series_number, size=size, turn=turn,
                           place=place)


def _upwards(slices):
    """A series from bottom to top along the slices' normal; by number where their headers tell no common one."""
    turn, heights = slices[0].turn, np.zeros(len(slices))
    if turn.size == 6 and all(s.turn.size == 6 and s.place.size == 3 and np.allclose(s.turn, turn, atol=0.01)
                              for s in slices):
        normal = np.cross(turn[:3], turn[3:])
        normal *= np.sign(normal[np.abs(normal).argmax()])  # up; of coronal slices to the back, of sagittal to the left
        heights = np.round([s.place @ normal for s in slices], 3)  # mm
    order = sorted(range(len(slices)), key=lambda i: (heights[i], slices[i].number, slices[i].file))
    return [slices[i] for i in order]


@functools.lru_cache(maxsize=1)  # blank(i) and slice(i) decode once
def _picture(scan, i):
    """Slice i of a DicomScan as (H, W) uint8, as a viewer first shows it."""
    file = scan.slices[i].file
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):  # pydicom's, of headers
        dataset = open_dicom(file)
        try:
            values = apply_modality_lut(dataset.pixel_array, dataset).astype(np.float64)  # HU, for CT
            image = windowed(values, dataset)
        except Exception as e:  # as in open_dicom, and of every decoder
            raise Damaged(f"{file} has no readable pixels ({_reason(e)}); download it again") from e
    return 255 - image if dataset.PhotometricInterpretation == "MONOCHROME1" else image


def windowed(values, dataset):
    """(H, W) floats of a DICOM image as uint8: the first window of the header, else its table, else minimum to maximum.

    The functions of a window: DICOM PS3.3, C.11.2.1."""
    centre, width = (np.atleast_1d(dataset.get(key))[0] for key in ("WindowCenter", "WindowWidth"))
    function = dataset.get("VOILUTFunction") or "LINEAR"
    if centre is not None and width is not None and function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if centre is None or width is None or not width > 0:  # some exporters write 0 for slices of one value
        return stretched(apply_voi(values, dataset).astype(np.float64))
    if function == "SIGMOID":
        image = 1 / (1 + np.exp(-4 * (values - centre) / width))
    else:
        image = np.clip((values - centre) / width + 0.5, 0, 1)
    return np.rint(255 * image).astype(np.uint8)


def _resized(maps, size):
    """(n, S, S) -> (n, H, W) float32."""
    maps = torch.from_numpy(np.array(maps, np.float32))[:, None]  # a copy: the maps may be those of a read-only file
    return torch.nn.functional.interpolate(maps, size, mode="bilinear")[:, 0].numpy()

if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    scans, damaged = find_scans(args.scans)
    if not scans:
        raise common.Error(f"--scans {args.scans}: no NIfTI volume or DICOM series that can be read {damaged[:1]}")
    count = 0
    for number, scan in enumerate(common.progress(scans, "scans"), 1):
        try:
            with common.atomic(Path(args.to, f"scan{number:04}-{scan.name}")) as tmp:
                tmp.mkdir()
                for z in [z for z in range(len(scan)) if not scan.blank(z)]:
                    Image.fromarray(scan.slice(z)).save(tmp / f"{z:04}.png")
                    count += 1
        except Damaged as e:
            damaged.append(str(e))
    print(f"{count} slices of {len(scans)} scans: {args.to}")
    if damaged:
        print(*[f"left out: {message}" for message in damaged], sep="\n", file=sys.stderr)
        raise SystemExit(1)
