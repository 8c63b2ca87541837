"""Read scans (NIfTI volumes and DICOM series) slice by slice, and write their anomaly maps in the same format.

As a script, it converts the axial slices of all scans in a folder to images such as <to>/scan<number>-<name>/0042.png,
for training with `--data`. The number tells the methods which slices belong to the same scan. It is computed from the
slices, so that the same scan has the same number in every folder.

The preparation scripts use `Volume`, `open_dicom` and `stretched`; predict.py uses `find_scans`. In shapes, D is the
number of slices in a scan, (H, W) the size of a slice and S the image size of the method."""

import functools
import gzip
import io
import math
import os
import re
import shutil
import sys
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import torch
from PIL import Image
from pydicom import uid
from pydicom.pixels import apply_modality_lut, apply_voi, pixel_array
from pydicom.valuerep import format_number_as_ds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


@dataclass
class Args:
    scans: str
    """folder with scans: NIfTI volumes or DICOM series"""
    to: str
    """output folder for the slices, e.g. mine/train/good for --data mine"""


class Damaged(common.Error):
    """An unusable source file. The preparation scripts print this error and continue without the file."""


class Volume:
    """Axial slices of a NIfTI volume in the same orientation, whatever its affine: rows run from front to back, columns
    from the patient's right to the left (radiological view), slices upwards. An unusable file raises `Damaged`.

    header_only: read only the grid, without unpacking the file or detecting damaged voxels."""

    def __init__(self, file, header_only=False):
        self.file = file
        try:
            self.image = nibabel.load(file) if header_only else _opened(file)
            orientation = nibabel.io_orientation(self.image.affine)  # (body axis, sign) of each voxel axis
            needed = math.prod(self.image.shape) * self.image.get_data_dtype().itemsize + self.image.dataobj.offset
            data = self.image.file_map["image"]
            size = data.fileobj.getbuffer().nbytes if data.fileobj else os.path.getsize(data.filename)
        except Exception as e:  # nibabel, gzip and numpy raise many kinds of errors
            raise Damaged(f"{file} is not a readable NIfTI volume ({_reason(e)}); download it again") from e
        if size < needed and not header_only:  # with header_only, the file may be compressed
            raise Damaged(f"{file} is cut off: {size} of {needed} bytes; download it again")
        if len(self.image.shape) < 3 or math.prod(self.image.shape[3:]) != 1:
            raise Damaged(f"{file} has {len(self.image.shape)} dimensions {self.image.shape}; a volume has 3")
        if np.isnan(orientation).any():
            raise Damaged(f"{file} has an affine without an orientation; convert the source again")
        self.axes = [int(np.flatnonzero(orientation[:, 0] == a)[0]) for a in range(3)]  # right, front, up
        self.signs = [int(orientation[a, 1]) for a in self.axes]
        self.shape = tuple(self.image.shape[a] for a in self.axes)

    def axial(self, start=0, stop=None, finite=True):
        """Return slices start to stop (excluded) as (n, H, W) floats, scaled by the header's slope and intercept.

        finite: raise `Damaged` if a voxel is not finite."""
        depth = self.shape[2]
        stop = depth if stop is None else stop
        if not 0 <= start < stop <= depth:
            raise Damaged(f"{self.file} has {depth} axial slices; the protocol uses {start} to {stop - 1}")
        where = [slice(None)] * 3 + [0] * (len(self.image.shape) - 3)  # (x, y, z, 1) is a single volume, too
        where[self.axes[2]] = slice(start, stop) if self.signs[2] > 0 else slice(depth - stop, depth - start)
        try:
            with np.errstate(all="ignore"):
                voxels = np.asarray(self.image.dataobj[tuple(where)], np.float32)  # reads only these slices
        except Exception as e:
            raise Damaged(f"{self.file} is damaged ({_reason(e)}); download it again") from e
        if finite and not np.isfinite(voxels).all():
            raise Damaged(f"{self.file} has voxels that are not finite; download or convert it again")
        return voxels.transpose(self.axes[::-1])[self._flips()]  # (up, front, right) -> (D, H, W)

    def labels(self, highest, start=0, stop=None):
        """Return `axial` slices of a segmentation; raise `Damaged` if a value is not a whole number from 0 to `highest`
        (an image in the wrong place, interpolated or rescaled labels)."""
        values = self.axial(start, stop)
        labels = np.rint(values)  # some exporters store labels with a slope, which returns 6 as 6.0001
        if labels.min() < 0 or labels.max() > highest or np.abs(values - labels).max() > 0.1:
            raise Damaged(f"{self.file} has values from {values.min():g} to {values.max():g}, not only the labels 0 to "
                          f"{highest}; is it the volume? Download the segmentation again")
        return labels

    def _flips(self):
        return tuple(slice(None, None, sign) for sign in (self.signs[2], -self.signs[1], -self.signs[0]))

    def save(self, slices, file):
        """Write values (D, H, W) of all axial slices as a volume that viewers can overlay on this one."""
        voxels = slices[self._flips()].transpose(np.argsort(self.axes[::-1]))
        with common.atomic(file) as tmp:
            nibabel.save(nibabel.Nifti1Image(voxels, self.image.affine), f"{tmp}.nii.gz")
            os.replace(f"{tmp}.nii.gz", tmp)


def _opened(file):
    """Open a NIfTI file. Unpack a compressed file completely into memory, because its checksum is at the end. Reading
    slices from disk would skip the checksum and unpack the file from the start each time."""
    image = nibabel.load(file)
    held = {}
    for kind, part in image.file_map.items():
        if str(part.filename).lower().endswith(".gz"):
            held[kind] = nibabel.FileHolder(fileobj=io.BytesIO())
            with gzip.open(part.filename) as packed:
                shutil.copyfileobj(packed, held[kind].fileobj, 2**20)
    return type(image).from_file_map(image.file_map | held) if held else image


def open_dicom(file):
    """Read a DICOM file; raise `Damaged` if it cannot be read or no installed package can decode its pixels."""
    try:
        dataset = pydicom.dcmread(file)
        syntax = dataset.file_meta.TransferSyntaxUID
        try:
            decoder = pydicom.pixels.get_decoder(syntax)
            needed = [d.rpartition("requires ")[2] for d in decoder.missing_dependencies] * (not decoder.is_available)
        except NotImplementedError:
            needed = ["to be converted: pydicom supports no package that decodes it"]
    except Exception as e:  # pydicom raises many kinds of errors for damaged headers
        why = " ".join(str(e).split())
        raise Damaged(f"{file} is not a readable DICOM file ({why}); download it again") from e
    if needed:
        raise Damaged(f"{file} has the transfer syntax {syntax.name} ({syntax}), which needs {', or '.join(needed)}")
    return dataset


def _reason(e):
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def stretched(image):
    """Scale (H, W) floats to uint8, from black at the minimum to white at the maximum."""
    low, high = image.min(), image.max()
    return np.rint((image - low) * (255 / ((high - low) or 1))).astype(np.uint8)


# -------------------------------------------------------------------------------------------------- scans for --predict
# Header fields that a map copies from its DICOM slice: patient, study and position.
SHARED = ["SpecificCharacterSet", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID",
          "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber", "ReferringPhysicianName",
          "Modality", "BodyPartExamined", "Laterality", "PatientPosition", "FrameOfReferenceUID",
          "PositionReferenceIndicator", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
          "ImagerPixelSpacing", "SliceThickness", "SpacingBetweenSlices", "SliceLocation"]
SEGMENTATION = r"(?<![a-z])((d|prob)?seg|segmentation|labels?|mask|map)[-_]?\d*\.nii"  # the end of a file name
HEADER = [*SHARED, "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription",
          "InstanceNumber", "NumberOfFrames", "PhotometricInterpretation", "Rows", "Columns",
          "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]


def find_scans(path):
    """Return (scans, damaged): the scans in a file or folder, sorted by path, and one line for each unusable file.

    A scan is a NIfTI volume, a DICOM series (files in one folder with the same SeriesInstanceUID), or a single DICOM
    file, which may have many frames. Its unique `name` is derived from its path (`source`) and is a valid file name.
    The len(scan) slices are ordered from bottom to top. slice(i) returns (H, W) uint8; blank(i) is True if all its
    pixels are equal; both may raise `Damaged`. Finish one scan before the next: only one volume is kept in memory."""
    path = Path(os.path.abspath(path))
    found, series, damaged, others = [], {}, [], []
    for file in [path] if path.is_file() else common.files_in(path):
        if file != path and re.search(SEGMENTATION, file.name.lower()):
            others.append(file)  # segmentations and the maps that `save_maps` writes
            continue
        try:
            if file.name.lower().endswith((".nii", ".nii.gz")):
                found.append(("", NiftiScan(file)))
            elif file.suffix.lower() not in common.SUFFIXES and _is_dicom(file):
                if slices := _dicom_slices(file):
                    series.setdefault((file.parent, slices[0].header.get("SeriesInstanceUID")), []).extend(slices)
                else:
                    others.append(file)
        except Damaged as e:
            damaged.append(str(e))
    if others:  # segmentations, reports and plans, which archives export with a series
        print(f"note: {len(others)} files that hold no images are skipped, e.g. {others[0]}", file=sys.stderr)
    alone = {key: len({one.file for one in slices}) == 1 for key, slices in series.items()}
    shared = Counter(folder for folder, number in series if not alone[folder, number])
    for (folder, number), slices in series.items():
        header, single = slices[0].header, alone[folder, number]
        told = "".join(f"-{header[key].value}" for key in ("SeriesNumber", "SeriesDescription") if header.get(key))
        scan = DicomScan(slices[0].file if single else folder, slices)
        found.append((told * (shared[folder] > 1 and not single), scan))
    found.sort(key=lambda item: (str(item[1].source), item[0]))
    taken = set()
    for label, scan in found:
        place = scan.source.name if scan.source == path else str(scan.source.relative_to(path))
        scan.name = name = common.plain(re.sub(r"\.(nii|nii\.gz|dcm)$", "", place, flags=re.IGNORECASE) + label)
        number = 1
        while scan.name.lower() in taken:  # some file systems are case-insensitive
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
        return stretched(_voxels(self)[i])  # to the slice's own range, as in the brain benchmark

    def blank(self, i):
        return not np.ptp(self.slice(i))

    def save_maps(self, folder, maps, pixel, low):
        """Write <name>_map.nii.gz on the volume's grid and, with a threshold `pixel`, <name>_mask.nii.gz.

        maps: (D, S, S). Slices without a map are NaN; in the files, they have the value `low` and an empty mask."""
        maps = _resized(maps, self.volume.shape[1::-1])  # (D, H, W)
        if pixel is not None:
            self.volume.save((maps >= pixel).astype(np.uint8), Path(folder, f"{self.name}_mask.nii.gz"))
        maps[np.isnan(maps)] = low
        self.volume.save(maps, Path(folder, f"{self.name}_map.nii.gz"))


@functools.lru_cache(maxsize=1)  # unpack each volume once for all its slices
def _voxels(scan):
    """Return the slices (D, H, W) of a NiftiScan. Voxels that are not finite become the minimum of their slice."""
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
        """Write the series <name>_map, which viewers can overlay on this scan, and, with a threshold `pixel`,
        <name>_mask. maps: (D, S, S). Slices without a map are NaN; in the files, they have the value `low` and an empty
        mask."""
        start, high = (float(f.reduce(maps, axis=None, initial=low)) for f in (np.fmin, np.fmax))  # ignore NaN
        start, step = (float(format_number_as_ds(v)) for v in (start, (high - start) / 65535 or 1.0))  # as stored
        self._save(Path(folder, f"{self.name}_map"), "anomaly map", 1000, maps, start, step,
                   lambda m: np.rint((np.where(np.isnan(m), low, m) - start) / step).clip(0, 65535))
        if pixel is not None:
            self._save(Path(folder, f"{self.name}_mask"), "anomaly mask", 2000, maps, 0, 1, lambda m: m >= pixel)

    def _save(self, folder, description, number, maps, intercept, slope, stored):
        """Write a derived series, one file per slice. stored: a function that converts a map to integers."""
        series = uid.generate_uid()
        with common.atomic(folder) as tmp:
            tmp.mkdir()
            for i, one in enumerate(self.slices):
                image, source = pydicom.Dataset(), pydicom.Dataset()
                for key in [key for key in SHARED if key in one.header]:
                    image.add(one.header[key])
                # Copy the source's class and modality, as viewers rarely overlay different ones. A map has one frame.
                plain = uid.CTImageStorage if one.header.get("Modality") == "CT" else uid.MRImageStorage
                own = plain if one.frames > 1 else one.header.get("SOPClassUID")
                image.SOPClassUID = own or uid.SecondaryCaptureImageStorage
                image.SOPInstanceUID, image.SeriesInstanceUID = uid.generate_uid(), series
                image.SeriesNumber, image.InstanceNumber = one.series_number + number, i + 1
                image.SeriesDescription, image.ImageType = description, ["DERIVED", "SECONDARY", "OTHER"]
                source.ReferencedSOPClassUID = one.header.get("SOPClassUID") or image.SOPClassUID
                source.ReferencedSOPInstanceUID = one.header.get("SOPInstanceUID")
                if one.frames > 1:
                    source.ReferencedFrameNumber = one.frame + 1
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


def _dicom_slices(file):
    """Return, for each frame of a greyscale DICOM file, the header fields that a series needs; [] if the file contains
    no images.

    size: (H, W); turn: directions of rows and columns; place: position of the first pixel in mm. `turn` and `place` are
    empty if the header lacks them."""
    try:
        with warnings.catch_warnings(action="ignore"):
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=HEADER)
            list(header)  # converts all values, so that invalid ones raise their errors here
            kind = getattr(header.file_meta.get("MediaStorageSOPClassUID"), "name", "Image")
            number, series_number, frames, *size = (int(header.get(key) or 0) for key in (
                "InstanceNumber", "SeriesNumber", "NumberOfFrames", "Rows", "Columns"))
            slices = []
            for frame in range(min(max(frames, 1), 10**4)):
                own = _of_frame(header, frame)
                turn, place = (np.array(own.get(key) or [], float) for key in (
                    "ImageOrientationPatient", "ImagePositionPatient"))
                slices.append(SimpleNamespace(file=file, header=own, number=number + frame, size=size, turn=turn,
                                              place=place, series_number=series_number, frame=frame, frames=frames))
    except Exception as e:  # as in open_dicom
        raise Damaged(f"{file} is not a readable DICOM file ({_reason(e)}); download it again") from e
    grey = header.get("PhotometricInterpretation")
    if "Image" in kind and (grey not in ("MONOCHROME1", "MONOCHROME2") or 0 in size):
        raise Damaged(f"{file} holds {grey or 'no'} pixels, {size[0]}x{size[1]}; expected grey images")
    return slices if "Image" in kind else []


def _of_frame(header, frame):
    """Return the header of a frame. Fields of its functional groups, if any, are copied to the top level."""
    flat = pydicom.Dataset()
    flat.update(header)
    for name, item in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        for group in header[name].value[item] if name in header else ():
            if group.VR == "SQ" and group.value:
                flat.update(group.value[0])
    return flat


def _upwards(slices):
    """Sort a series from bottom to top along its slices' common normal, or by number if there is none."""
    turn, heights = slices[0].turn, np.zeros(len(slices))
    if turn.size == 6 and all(s.turn.size == 6 and s.place.size == 3 and np.allclose(s.turn, turn, atol=0.01)
                              for s in slices):
        normal = np.cross(turn[:3], turn[3:])
        normal *= np.sign(normal[np.abs(normal).argmax()])  # up (coronal slices: to the back; sagittal ones: left)
        heights = np.round([s.place @ normal for s in slices], 3)  # mm
    order = sorted(range(len(slices)), key=lambda i: (heights[i], slices[i].number, slices[i].file))
    return [slices[i] for i in order]


_last_dicom = functools.lru_cache(maxsize=1)(open_dicom)  # reads a file with many frames only once


@functools.lru_cache(maxsize=1)  # blank(i) and slice(i) share the decoded slice
def _picture(scan, i):
    """Return slice i of a DicomScan as (H, W) uint8, as viewers display it by default."""
    one = scan.slices[i]
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):  # pydicom warns about headers
        dataset = _last_dicom(one.file)
        try:
            header = _of_frame(dataset, one.frame)
            values = apply_modality_lut(pixel_array(dataset, index=one.frame), header).astype(np.float64)  # HU, for CT
            image = windowed(values, header)
        except Exception as e:  # as in open_dicom; decoders raise other errors, too
            raise Damaged(f"{one.file} has no readable pixels ({_reason(e)}); download it again") from e
    return 255 - image if dataset.PhotometricInterpretation == "MONOCHROME1" else image


def windowed(values, dataset):
    """Convert (H, W) floats of a DICOM image to uint8 with the first window in its header, else with its lookup table;
    without either, from minimum to maximum. Window functions: DICOM PS3.3, C.11.2.1."""
    centre, width = (np.atleast_1d(dataset.get(key))[0] for key in ("WindowCenter", "WindowWidth"))
    function = dataset.get("VOILUTFunction") or "LINEAR"
    if centre is not None and width is not None and function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if centre is None or width is None or not width > 0:  # some exporters write width 0 for constant slices
        return stretched(apply_voi(values, dataset).astype(np.float64))
    if function == "SIGMOID":
        image = 1 / (1 + np.exp(-4 * (values - centre) / width))
    else:
        image = np.clip((values - centre) / width + 0.5, 0, 1)
    return np.rint(255 * image).astype(np.uint8)


def _resized(maps, size):
    """Resize (n, S, S) to (n, H, W) float32."""
    maps = torch.from_numpy(np.array(maps, np.float32))[:, None]  # a copy: maps may be read-only
    return torch.nn.functional.interpolate(maps, size, mode="bilinear")[:, 0].numpy()


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    scans, damaged = find_scans(args.scans)
    if not scans:
        found = damaged[0] if damaged else "no NIfTI volume or DICOM series"
        raise common.Error(f"--scans {args.scans}: {found if Path(args.scans).exists() else 'does not exist'}")
    count = written = 0
    for scan in common.progress(scans, "scans"):
        try:
            slices = {z: scan.slice(z) for z in range(len(scan)) if not scan.blank(z)}
            if not slices:
                raise Damaged(f"{scan.source}: all {len(scan)} slices are blank")
            number = 0
            for image in slices.values():
                number = zlib.crc32(image.tobytes(), number)
            folder = Path(args.to, f"scan{number:010}-{scan.name}")
            if known := [p for p in folder.parent.glob(f"scan{number:010}-*") if p != folder]:
                raise Damaged(f"{scan.source} has the same slices as {known[0]}")
            with common.atomic(folder) as tmp:
                tmp.mkdir()
                for z, image in slices.items():
                    Image.fromarray(image).save(tmp / f"{z:04}.png")
            count, written = count + len(slices), written + 1
        except Damaged as e:
            damaged.append(str(e))
    print(f"{count} slices of {written} scans: {args.to}")
    if damaged:
        print(*[f"skipped: {message}" for message in damaged], sep="\n", file=sys.stderr)
        raise SystemExit(1)
