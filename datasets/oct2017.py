"""oct2017: the retinal OCT benchmark without masks from OCT2017.

Where: data.mendeley.com/datasets/rscbjbr9sj, the version with 26,315 images in train/NORMAL; CC BY 4.0 (Kermany et al.
2018, doi.org/10.1016/j.cell.2018.02.010). Images of about 512x496 pixels.
--raw: the folder that holds OCT2017/{train,test}/{NORMAL,CNV,DME,DRUSEN}/<CLASS>-<patient>-<k>.jpeg, at any depth. Of
the training part only NORMAL is read.

The rule:
1. train: train/NORMAL. CNV, DME and DRUSEN are anomalous;
2. the test part (250 images a class) is divided by class and patient: in seeded order, a patient with all images goes
   to valid while that makes no class larger than 8 images (of a source of another size, than the same share of it, at
   least one), the others are test;
3. a copy whose folder `val` holds that part already (Kaggle's: 8 a class, with 242 a class in test) keeps it as valid;
4. pixels are written unchanged, in grey.
Published: train 26,315; valid 8 + 24; test 242 + 726.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import prepare
from prepare import common

CLASSES = ["NORMAL", "CNV", "DME", "DRUSEN"]
VALID, TEST = 8, 242  # images a class
PUBLISHED = {("train", 0): 26315, ("valid", 0): 8, ("valid", 1): 24, ("test", 0): 242, ("test", 1): 726}
LOOKED_FOR = "images like train/NORMAL/NORMAL-1001772-1.jpeg and test/CNV/CNV-1016042-1.jpeg"
CHUNK = 200  # images a process works on at a time


def find_images(raw):
    """{name: (part, class, patient, file)}, by name."""
    images = {}
    for file in sorted(raw.rglob("*-*-*.jp*g")):
        part, kind = ["", "", *file.parts][-3:-1]
        part, kind = part.lower(), kind.upper()
        match = re.fullmatch(r"[A-Za-z]+-(\d+)-\d+", file.stem)
        if not match or kind not in CLASSES or part not in ["train", "val", "test"][kind != "NORMAL" :]:
            continue
        name = f"{part}_{file.stem}"
        if name in images:
            raise common.Error(f"{images[name][-1]} and {file} are copies of one image; keep one of them under --raw")
        images[name] = part, kind, match[1], str(file)
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
                           f"each")
    room = Counter({kind: prepare.shares(total[kind], [VALID, TEST])[0] for kind in CLASSES})
    names, valid = sorted(patients), set()
    for patient in [names[i] for i in np.random.default_rng(seed).permutation(len(names))]:
        if patients[patient] <= room:
            room -= patients[patient]
            valid.add(patient)
    return {name: "train" if part == "train" else "valid" if patient in valid else "test"
            for name, (part, _, patient) in images.items()}


def write_image(item, folder):
    """An image as PNG; its manifest row."""
    (part, kind, patient, file), split = item
    image = prepare.read_grey(file)  # (496, 512) and others
    return prepare.save(folder, split, int(kind != "NORMAL"), Path(file).stem, image, case=patient, kind=kind)


if __name__ == "__main__":
    args = common.command_line(prepare.Args, __doc__)
    raw = prepare.raw_folder(args, LOOKED_FOR)
    images = find_images(raw)
    if not {"train", "test"} <= {part for part, *_ in images.values()}:
        prepare.wrong_folder(raw, LOOKED_FOR)
    planned = plan({name: image[:3] for name, image in images.items()}, args.seed)
    preparation = prepare.Preparation("oct2017", "oct2017", ["train", "valid", "test"], args)
    items = {name: (images[name], split) for name, split in planned.items()}
    preparation.finish(list(preparation.map(write_image, items, "writing", CHUNK).values()), PUBLISHED)
