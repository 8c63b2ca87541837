"""chest: the chest X-ray benchmark from the RSNA Pneumonia Detection Challenge (stage 2, training set).

Source: kaggle.com/c/rsna-pneumonia-detection-challenge, after accepting its rules; for research, education and other
non-commercial use. There are 26,684 radiographs of 1024x1024 pixels (8-bit JPEG in DICOM), 3.7 GB compressed.
--raw: a folder with stage_2_train_images/<patientId>.dcm and stage_2_detailed_class_info.csv (patientId,class; 30,227
rows, more than one for some patients), at any depth. The script reads nothing else.

Protocol:
1. The class Normal is normal; Lung Opacity and No Lung Opacity / Not Normal are anomalous.
2. Patients are divided at random (--seed): the 8,851 normal ones into 8,000 train, 70 valid and 781 test, the 17,833
   others into 1,420 valid and 16,413 test. A source of another size is divided in the same proportions, with at least
   one patient in each part. --patients FILE (CSV: case,split) replaces this division.
3. Pixels are scaled to 8 bits, from black at the minimum to white at the maximum that the header allows (bits stored,
   sign, rescale slope and intercept). 8-bit pixels (the source has only these) are unchanged. Images with photometric
   interpretation MONOCHROME1 or a negative slope are inverted.

JPEG data in DICOM have no checksums: damage is detected only if a file is truncated or its header is invalid.
Published counts (normal + anomalous): train 8,000; valid 70 + 1,420 (thesis: ratio 1:1); test 781 + 16,413.
"""

import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import prepare
import volumes
from prepare import common

CLASSES = {"Normal": 0, "Lung Opacity": 1, "No Lung Opacity / Not Normal": 1}
PARTS = {0: dict(train=8000, valid=70, test=781), 1: dict(valid=1420, test=16413)}  # patients by label
PUBLISHED = {(split, label): count for label, parts in PARTS.items() for split, count in parts.items()}
LIST = "stage_2_detailed_class_info.csv"
LOOKED_FOR = f"stage_2_train_images/<patientId>.dcm and {LIST}"
MEMORY = 0.15  # GiB per process
CHUNK = 100  # images per task


@dataclass
class Args(prepare.Args):
    patients: Path | None = None
    """CSV file with columns case,split that assigns patients to splits; replaces the random choice"""


def labels_of(rows):
    """Return {patient: label} from the rows of the CSV file; all rows of a patient must have the same class."""
    classes = {}
    for row in rows:
        patient, kind = row["patientId"], row["class"]
        if kind not in CLASSES:
            raise common.Error(f"{LIST}: {patient} has class {kind}: not one of {', '.join(CLASSES)}")
        if classes.setdefault(patient, kind) != kind:
            raise common.Error(f"{LIST}: {patient} has two classes, {classes[patient]} and {kind}; download it again")
    return {patient: CLASSES[kind] for patient, kind in classes.items()}


def plan(labels, seed=0):
    """Return {patient: split} from {patient: label}."""
    rng, planned = np.random.default_rng(seed), {}
    for label, parts in PARTS.items():
        patients = sorted(patient for patient in labels if labels[patient] == label)
        if len(patients) < len(parts):
            raise common.Error(f"{len(patients)} {('normal', 'anomalous')[label]} patients; {', '.join(parts)} need "
                               "one each")
        order = [patients[i] for i in rng.permutation(len(patients))]
        splits = np.repeat(list(parts), prepare.shares(len(patients), list(parts.values()))).tolist()
        planned |= dict(zip(order, splits, strict=True))
    return planned


def read_radiograph(file):
    """Read a DICOM image as (H, W) uint8, with black as 0 (step 3); raise `Damaged` if it cannot be used."""
    dataset = volumes.open_dicom(file)
    try:
        stored = dataset.pixel_array.astype(np.float64)
        bits, signed, kind = dataset.BitsStored, dataset.PixelRepresentation, dataset.PhotometricInterpretation
        slope = float(dataset.get("RescaleSlope", 1))  # the intercept shifts black and white equally
        low = -(2 ** (bits - 1)) if signed else 0
        image = (stored - low) / (2**bits - 1)  # in [0, 1]
    except Exception as e:  # pydicom and its decoders raise many kinds of errors
        why = " ".join(str(e).split())  # the message has one line for each decoder tried
        raise prepare.Damaged(f"{file} has no readable pixels ({why}); download it again") from e
    if image.ndim != 2 or kind not in ("MONOCHROME1", "MONOCHROME2") or not slope:
        raise prepare.Damaged(f"{file} holds {kind} pixels of shape {image.shape}, rescaled by {slope}, not one "
                              "grey image; download it again")
    if image.min() < 0 or image.max() > 1 or (bits > 8 and image.max() - image.min() < 1 / 16):
        raise prepare.Damaged(f"{file} has values from {stored.min():g} to {stored.max():g}, which do not fit the "
                              f"{bits} bits given in its header; download it again")
    inverted = (kind == "MONOCHROME1") != (slope < 0)
    return np.rint(255 * (1 - image if inverted else image)).astype(np.uint8)


def write_image(item, folder):
    """Write one radiograph as PNG and return its manifest row."""
    patient, label, split, file = item
    if file is None:
        raise prepare.Damaged(f"{patient}.dcm is missing, although {LIST} lists it; download it again")
    with warnings.catch_warnings(action="ignore"):  # pydicom warns about headers
        image = read_radiograph(file)  # (1024, 1024)
    return prepare.save(folder, split, label, patient, image, case=patient)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    raw = prepare.raw_folder(args, LOOKED_FOR)
    files, lists = {}, {}
    for file in common.files_in(raw):
        if file.suffix.lower() == ".dcm":
            prepare.note_file(files, file.stem, "radiograph", file)
        elif file.name == LIST:
            prepare.note_file(lists, LIST, "list", file)
    if not files or not lists:
        prepare.wrong_folder(raw, LOOKED_FOR)
    files, listed = {patient: found["radiograph"] for patient, found in files.items()}, lists[LIST]["list"]
    labels = labels_of(prepare.read_list(listed, ["patientId", "class"]))
    if args.patients:
        planned = prepare.read_split(args.patients, labels, ["train", "valid", "test"])
        for patient, split in planned.items():
            if split not in PARTS[labels[patient]]:
                raise common.Error(f"{args.patients}: {patient} is anomalous and cannot be in {split}")
    else:
        planned = plan(labels, args.seed)
    used = [files[patient] for patient in planned if patient in files]
    preparation = prepare.Preparation("rsna", "chest", ["train", "valid", "test"], args, [listed, used], MEMORY)
    places = {Path(file).parent for file in used}
    unlisted = [file for patient, file in files.items() if patient not in labels]
    if cut := [file for file in unlisted if Path(file).parent in places]:
        preparation.damage(LIST, f"{listed} does not name {len(cut)} of the .dcm files in the image "
                                 f"folders, e.g. {cut[0]}; download it again")
    prepare.skipped([file for file in unlisted if Path(file).parent not in places], "other .dcm files")
    preparation.plan(Counter((split, labels[patient]) for patient, split in planned.items()), PUBLISHED)
    items = {patient: (patient, labels[patient], planned[patient], files.get(patient)) for patient in sorted(planned)}
    preparation.finish(list(preparation.map(write_image, items, "writing", CHUNK).values()), PUBLISHED)
