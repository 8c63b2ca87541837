"""oct2017: the retinal OCT benchmark without masks from OCT2017.

Source: data.mendeley.com/datasets/rscbjbr9sj, the version with 26,315 images in train/NORMAL; CC BY 4.0 (Kermany et al.
2018, doi.org/10.1016/j.cell.2018.02.010). The images are about 512x496 pixels.
--raw: a folder with OCT2017/{train,test}/{NORMAL,CNV,DME,DRUSEN}/<CLASS>-<patient>-<k>.jpeg, at any depth. In the
training part, the script reads only NORMAL.

The download also contains chest X-rays, which are skipped: the script reads a folder only if one of its parts has CNV,
DME or DRUSEN, and reads only its images named after their class.

Protocol:
1. Train is train/NORMAL. CNV, DME and DRUSEN are anomalous.
2. The test part (250 images per class) is divided by patient, in a random order (--seed). A patient goes to valid
   unless a class in valid would then exceed 8 images (in a source of another size, a proportional number, but at least
   one). The other patients go to test.
3. If the source already has a folder `val` (Kaggle's copy: 8 images per class, 242 in test), that folder is valid.
4. Images are written in grey with unchanged pixel values.

Train and test of the original source probably share patients (file names give their numbers); one version had 3,663
images of such patients. If there are any, the script stops before it reads any image and asks for one of two flags:
  --leave-out-shared leaves out the train images of patients who are also in valid or test (and, if there is a `val`,
    its images of patients who are also in test): fewer images than published, but no patient is in two splits
  --allow-duplicates keeps all images, as published, although some patients are in two splits

JPEG files have no checksums: damage is detected only if a file is truncated or its header is invalid.
Published counts (normal + anomalous): train 26,315; valid 8 + 24; test 242 + 726.
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
VALID, TEST = 8, 242  # images per class
PUBLISHED = {("train", 0): 26315, ("valid", 0): 8, ("valid", 1): 24, ("test", 0): 242, ("test", 1): 726}
LOOKED_FOR = "images like train/NORMAL/NORMAL-1001772-1.jpeg and test/CNV/CNV-1016042-1.jpeg"
MEMORY = 0.1  # GiB per process
CHUNK = 200  # images per task


@dataclass
class Args(prepare.Args):
    leave_out_shared: bool = False
    """leave out train images of patients in valid or test, and valid images of patients in test"""


def find_images(raw):
    """Return {name: (part, class, patient, file)}."""
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
                raise common.Error(f"{images[name][-1]} and {file} are copies of the same image; keep only "
                                   "one below --raw")
            images[name] = part, kind, match[1], str(file)
    prepare.skipped(left, "JPEG files that are not OCT images, judging by folder and name,")
    return images


def plan(images, seed=0):
    """Return {name: split} from {name: (part, class, patient)}."""
    if any(part == "val" for part, *_ in images.values()):
        return {name: {"val": "valid"}.get(part, part) for name, (part, *_) in images.items()}
    patients = {}  # test images: {patient: {class: images}}
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
    """Return the names of train images whose patients are also in valid or test, and of valid images (in a folder
    `val`) whose patients are also in test. images: as in `plan`."""
    patients = {split: {images[name][2] for name, s in planned.items() if s == split} for split in ("valid", "test")}
    others = dict(train=patients["valid"] | patients["test"], valid=patients["test"], test=set())
    return [name for name, split in planned.items() if images[name][2] in others[split]]


def write_image(item, folder):
    """Write one image as PNG and return its manifest row."""
    (part, kind, patient, file), split = item
    image = prepare.read_grey(file)  # usually (496, 512)
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
        raise common.Error(f"{len(crossing)} of {len(planned)} images (e.g. {crossing[0]}) show patients who are "
                           "also in valid or test; give --leave-out-shared, or keep them all with --allow-duplicates")
    left = set(crossing) if args.leave_out_shared else set()
    planned = {name: split for name, split in planned.items() if name not in left}
    preparation = prepare.Preparation("oct2017", "oct2017", ["train", "valid", "test"], args, images, MEMORY)
    preparation.plan(Counter((split, int(images[name][1] != "NORMAL")) for name, split in planned.items()), PUBLISHED)
    items = {name: (images[name], split) for name, split in planned.items()}
    preparation.finish(list(preparation.map(write_image, items, "writing", CHUNK).values()), PUBLISHED)
