"""oct2017: the retinal OCT benchmark without masks from OCT2017.

Where: data.mendeley.com/datasets/rscbjbr9sj, the version with 26,315 images in train/NORMAL; CC BY 4.0 (Kermany et al.
2018, doi.org/10.1016/j.cell.2018.02.010). Images of about 512x496 pixels.
--raw: the folder that holds OCT2017/{train,test}/{NORMAL,CNV,DME,DRUSEN}/<CLASS>-<patient>-<k>.jpeg, at any depth. Of
the training part only NORMAL is read.

The chest X-rays that the same entry contains are passed over: what counts is a folder with CNV, DME or DRUSEN in one of
its parts, and images that have the name of their class.

The rule:
1. train: train/NORMAL. CNV, DME and DRUSEN are anomalous;
2. the test part (250 images a class) is divided by class and patient: in seeded order, a patient with all images goes
   to valid while that makes no class larger than 8 images (of a source of another size, than the same share of it, at
   least one), the others are test;
3. a copy whose folder `val` holds that part already (Kaggle's: 8 a class, with 242 a class in test) keeps it as valid;
4. pixels are written unchanged, in grey.

Patients (the number in a name) are probably shared by train and test of the real source: 3,663 such images were counted
in one version. The script then ends before it reads an image, and asks for one of two switches:
  --leave-out-shared leaves out of train the images of patients of valid and test (and out of a given valid those of
    test): fewer than the published ones, but clean
  --allow-duplicates takes them all: the published images, with patients in two splits
JPEG has no checksums: damage inside its data cannot be seen, unless the file is cut off or its header is wrong.
Published: train 26,315; valid 8 + 24; test 242 + 726.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import prepare
from prepare import common

CLASSES = ["NORMAL", "CNV", "DME", "DRUSEN"]
VALID, TEST = 8, 242  # images a class
PUBLISHED = {("train", 0): 26315, ("valid", 0): 8, ("valid", 1): 24, ("test", 0): 242, ("test", 1): 726}
LOOKED_FOR = "images like train/NORMAL/NORMAL-1001772-1.jpeg and test/CNV/CNV-1016042-1.jpeg"
MEMORY = 0.1  # GiB that a process takes
CHUNK = 200  # images a process works on at a time


@dataclass
class Args(prepare.Args):
    leave_out_shared: bool = False
    """leave out of train the images of patients of valid and test, and out of valid those of test"""


def find_images(raw):
    """{name: (part, class, patient, file)}, by name."""
    found, classes, images, left = [], {}, {}, []
    for file in common.files_in(raw):
        *_, part, kind = ["", "", *file.parts[:-1]]
        if part.lower() in ("train", "val", "test") and re.fullmatch(r"\.jpe?g", file.suffix, re.IGNORECASE):
            found.append((file.parents[2], part.lower(), kind.upper(), file))
            classes.setdefault(file.parents[2], set()).add(kind.upper())
    for folder, part, kind, file in found:
        match = re.fullmatch(rf"{kind}-(\d+)-\d+", file.stem, re.IGNORECASE)
        if not classes[folder] & {*CLASSES[1:]} or not match:
            left.append(file)
        elif kind in CLASSES and (part != "train" or kind == "NORMAL"):
            name = f"{part}_{file.stem}"
            if name in images:
                raise common.Error(f"{images[name][-1]} and {file} are copies of one image; keep one of them below "
                                   "--raw")
            images[name] = part, kind, match[1], str(file)
    prepare.passed_over(left, "JPEG files that are no OCT images by folder and name")
    return images


def plan(images, seed=0):
    """{name: split} from {name: (part, class, patient)}."""
    if any(part == "val" for part, *_ in images.values()):
        return {name: {"val": "valid"}.get(part, part) for name, (part, *_) in images.items()}
    patients = {}  # of the test part: {patient: {class: images}}
    for part, kind, patient in images.values():
        if part == "test":
            patients.setdefault(patient, Counter())[kind] += 1
    total = sum(patients.values(), Counter())
    if lacking := [kind for kind in CLASSES if total[kind] < 2]:
        raise common.Error(f"the test part has {total[lacking[0]]} images of {lacking[0]}; valid and test need one "
                           "each")
    room = Counter({kind: prepare.shares(total[kind], [VALID, TEST])[0] for kind in CLASSES})
    names, valid = sorted(patients), set()
    for patient in [names[i] for i in np.random.default_rng(seed).permutation(len(names))]:
        if patients[patient] <= room:
            room -= patients[patient]
            valid.add(patient)
    return {name: "train" if part == "train" else "valid" if patient in valid else "test"
            for name, (part, _, patient) in images.items()}


def shared(images, planned):
    """The names of train images whose patient is in valid or test, too, and of valid images (of a folder `val`) whose
    patient is in test; images: as in `plan`."""
    patients = {split: {images[name][2] for name, s in planned.items() if s == split} for split in ("valid", "test")}
    others = dict(train=patients["valid"] | patients["test"], valid=patients["test"], test=set())
    return [name for name, split in planned.items() if images[name][2] in others[split]]


def write_image(item, folder):
    """An image as PNG; its manifest row."""
    (part, kind, patient, file), split = item
    image = prepare.read_grey(file)  # (496, 512) and others
    return prepare.save(folder, split, int(kind != "NORMAL"), Path(file).stem, image, case=patient, kind=kind)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    raw = prepare.raw_folder(args, LOOKED_FOR)
    images = find_images(raw)
    if not {"train", "test"} <= {part for part, *_ in images.values()}:
        prepare.wrong_folder(raw, LOOKED_FOR)
    planned = plan({name: image[:3] for name, image in images.items()}, args.seed)
    crossing = shared(images, planned)
    if crossing and not (args.leave_out_shared or args.allow_duplicates):
        raise common.Error(f"{len(crossing)} of {len(planned)} images (e.g. {crossing[0]}) are of patients that valid "
                           "or test have, too; give --leave-out-shared, or take them all with --allow-duplicates")
    left = set(crossing) if args.leave_out_shared else set()
    planned = {name: split for name, split in planned.items() if name not in left}
    preparation = prepare.Preparation("oct2017", "oct2017", ["train", "valid", "test"], args, images, MEMORY)
    preparation.plan(Counter((split, int(images[name][1] != "NORMAL")) for name, split in planned.items()), PUBLISHED)
    items = {name: (images[name], split) for name, split in planned.items()}
    preparation.finish(list(preparation.map(write_image, items, "writing", CHUNK).values()), PUBLISHED)
