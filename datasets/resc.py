"""resc: the retinal OCT benchmark with masks from RESC (retinal edema segmentation challenge, AI Challenger 2018).

Source: linked from github.com/CharlesKangZhou/P_Net_-Anomaly_Detection, for research only (Hu et al. 2019,
doi.org/10.1016/j.media.2019.05.002). There are 70 + 15 labelled cubes of 128 slices (B-scans), 512x1024 pixels.
--raw: a folder with the training and validation parts as PNG or BMP, at any depth, in one of two layouts:
  Edema_trainingset/original_images/<cube>.img/<k>.bmp with Edema_trainingset/label_images/<cube>_labelMark/<k>.bmp
  train/images/<cube>_<k>.png with train/labels/<cube>_<k>.png

The innermost folder with train, trainingset, val, valid, validation or validationset as a word in its name (in upper or
lower case) tells which part a file is in. A part named test has no labels and is skipped. The innermost folder with
image, or with label, mask or ground, in its name tells whether a file is an image or a label; folders common to all
slices are ignored.

Protocol:
1. A slice with labels above 0 (128, 191, 255: three kinds of lesions) is anomalous, and these labels are its mask.
2. Train consists of the slices without lesions in the training part.
3. The validation part is divided by patient. Whole patients are chosen for valid so that its slice counts come as close
   as possible to 45 normal and 70 anomalous slices (in proportion if the part has another size). Patients are tried in
   a random order (--seed); those not chosen go to test. --patients FILE (CSV: case,split) replaces this division.
4. Images are written in grey with unchanged pixel values.

A patient may have several cubes: the text before _Macular in a cube's name (P0077_MacularCube512x128_...) identifies
the patient. Any other cube counts as one patient, named train_<cube> or valid_<cube> in the column `case`.
The checksums of PNG files are verified. A BMP file has none: damage is detected only if the file is truncated or its
header is invalid.
Published counts (normal + anomalous): train 4,297; valid 45 + 70; test 1,041 + 764. Valid and test together comprise
all 15 x 128 slices. The 115 slices of valid are not a multiple of 128, so whole cubes of the full source only
approximate the published counts; the script prints the actual counts before it writes the images.
"""

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import prepare
from prepare import common

PART = re.compile(r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?:set|data)?(?![a-z])")
LABEL, IMAGE = re.compile("label|mask|ground"), re.compile(r"image|\.img$")
VALUES = 8  # at most, in a label (the source's have 4)
MEMORY = 0.1  # GiB per process
VALID, TEST = (45, 70), (1041, 764)  # normal, anomalous
PUBLISHED = {("train", 0): 4297, ("valid", 0): VALID[0], ("valid", 1): VALID[1], ("test", 0): TEST[0],
             ("test", 1): TEST[1]}
LOOKED_FOR = ("a training and a validation part like Edema_trainingset/original_images/<cube>.img/1.bmp with "
              "Edema_trainingset/label_images/<cube>_labelMark/1.bmp")
CHUNK = 128  # slices per task


@dataclass
class Args(prepare.Args):
    patients: Path | None = None
    """CSV file with columns case,split that assigns patients of the validation part to valid or test"""


def find_slices(raw):
    """Return {name: (part, patient, cube, k, image or None, label or None)}, sorted by part, cube and k."""
    slices, found = [], {}
    for file in common.files_in(raw):
        folders = [folder.lower() for folder in file.relative_to(raw).parts[:-1]]
        part = next((match[1] for folder in reversed(folders) if (match := PART.search(folder))), "test")
        stem, parent = (re.sub(r"_labelmark|\.img", "", n, flags=re.IGNORECASE) for n in (file.stem, file.parent.name))
        match = re.fullmatch(r"(.+)_(\d+)", f"{parent}_{stem}" if stem.isdigit() else stem)
        if file.suffix.lower() in {".png", ".bmp"} and part != "test" and match:
            slices.append((({"val": "valid"}.get(part, part), match[1], int(match[2])), folders, file))
    shared = len(os.path.commonprefix([folders for _, folders, _ in slices]))
    for (part, cube, k), folders, file in slices:
        says = next((f for f in reversed(folders[shared:]) if LABEL.search(f) or IMAGE.search(f)), "")
        prepare.note_file(found, (part, cube, k), "label" if LABEL.search(says) else "image", file)
    return {f"{part}_{cube}_{k}": (part, patient_of(part, cube), cube, k, files.get("image"), files.get("label"))
            for (part, cube, k), files in sorted(found.items())}


def patient_of(part, cube):
    patient, *rest = re.split("_macular", cube, flags=re.IGNORECASE)
    return patient if rest else f"{part}_{cube}"


def has_lesion(item, folder):
    """Return True if the label has a lesion. The image is read, too, so that only usable slices are assigned."""
    image, label = item
    if image is None or label is None:
        raise prepare.Damaged(f"{image or label} has no {'label' if image else 'image'} for the same slice; "
                              "unpack the source again")
    pixels, mask = prepare.read_grey(image), prepare.read_grey(label)  # (512, 1024)
    if (values := len(np.unique(mask))) > VALUES:
        raise prepare.Damaged(f"{label} has {values} grey values, too many for a label (an image or a lossy copy?); "
                              "unpack the source again")
    if mask.shape != pixels.shape:
        raise prepare.Damaged(f"{label} has {mask.shape} pixels, its image {image} {pixels.shape}; unpack both again")
    return bool(mask.any())


def plan(slices, seed=0, fixed=None):
    """Return {name: split} from {name: (part, patient, has lesion)}. fixed: {patient: split} of the validation part."""
    if fixed is None:
        counts = {}
        for part, patient, lesion in slices.values():
            if part == "valid":
                counts.setdefault(patient, [0, 0])[lesion] += 1
        total = [sum(c[label] for c in counts.values()) for label in (0, 1)]
        wanted = [max(1, round(t * v / (v + w))) for t, v, w in zip(total, VALID, TEST, strict=True)]
        chosen = prepare.divide(counts, wanted, seed) if counts else []
        if not chosen:
            raise common.Error(f"{len(counts)} usable patients in the validation part cannot be divided: valid needs "
                               "one and test another, with normal and anomalous slices")
        fixed = {patient: "valid" if patient in chosen else "test" for patient in counts}
    planned = {}
    for name, (part, patient, lesion) in slices.items():
        if part == "valid" and patient in fixed:
            planned[name] = fixed[patient]
        elif part == "train" and not lesion:
            planned[name] = "train"
    return planned


def write_slice(item, folder):
    """Write one slice as PNG and return its manifest row."""
    (_, patient, cube, k, file, label), split, lesion = item
    image, mask = prepare.read_grey(file), prepare.read_grey(label) > 0 if lesion else None
    return prepare.save(folder, split, int(lesion), f"{cube}_{k}", image, mask, case=patient, cube=cube, slice=k)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    raw = prepare.raw_folder(args, LOOKED_FOR)
    slices = find_slices(raw)
    if {part for part, *_ in slices.values()} != {"train", "valid"}:
        prepare.wrong_folder(raw, LOOKED_FOR)
    patients = {patient for part, patient, *_ in slices.values() if part == "valid"}
    fixed = args.patients and prepare.read_split(args.patients, patients, ["valid", "test"])
    if len(patients) < 2 and not fixed:
        raise common.Error(f"{len(patients)} patient in the validation part; valid and test need one each")
    preparation = prepare.Preparation("resc", "resc", ["train", "valid", "test"], args, slices, MEMORY)
    files = {name: (image, label) for name, (*_, image, label) in slices.items()}
    lesions = preparation.map(has_lesion, files, "looking for lesions", CHUNK)
    planned = plan({name: (*slices[name][:2], lesion) for name, lesion in lesions.items()}, args.seed, fixed)
    preparation.plan(Counter((split, int(lesions[name])) for name, split in planned.items()), PUBLISHED)
    items = {name: (slices[name], split, lesions[name]) for name, split in planned.items()}
    preparation.finish(list(preparation.map(write_slice, items, "writing", CHUNK).values()), PUBLISHED)
