"""brain: the brain MR benchmark from BraTS2021 (training set of the RSNA-ASNR-MICCAI challenge 2021).

Source: synapse.org (Task 1, training data) after registration, or a copy on Kaggle. The data are free for research that
cites the challenge's papers (Baid et al. 2021, arXiv:2107.02314). There are 1,251 cases, 13 GB compressed.
--raw: a folder with the cases (BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz or .nii), at any depth.
The script reads only FLAIR and the segmentation.

Protocol:
1. The benchmark uses the 40 axial slices 60 to 99 of each FLAIR volume. A slice is anomalous if it has labels above 0,
   which form its mask.
2. Each slice (240x240 pixels) is scaled to 8 bits by its own minimum and maximum. Slices are in radiological view (the
   patient's right is on the left), whatever the affine. --colormap bone reproduces the benchmark's code: slices are
   transposed (rows run from the patient's right to the left) and have the colours of matplotlib's colour map `bone`.
3. Train, test-normal and valid-normal contain all tumour-free slices of the 424, 162 and 39 patients in the published
   lists (brats2021_published.csv, from data_processing/brain of github.com/DorisBao/BMAD). If the source lacks any of
   them, patients are ranked by their number of tumour-free slices among the 40 (most first, ties by name), as in the
   published lists, and assigned to train, test-normal and valid-normal in this order.
4. The remaining 626 patients have tumour in every slice. Valid-anomalous has slices 60, 70, 80 and 90 of the first 11
   by name; test-anomalous has slices 60, 68, 76, 84 and 92 of the other 615. The published 11 are unknown: the
   benchmark's code selected them by the order of a Python set, which differs from run to run.

Cohorts of other sizes are divided in the same proportions, with at least one patient in each part. If at least three
patients have tumour-free slices, only such patients are assigned to the normal parts. With fewer than five patients,
each patient in valid or test contributes slices of both classes. --split FILE (CSV: case,split,label) replaces this
division. The challenge's validation set has no segmentations and is skipped. The checksums of .nii.gz files are
verified. A .nii file has none: damage is detected only if the file is truncated or its header is invalid.
Published counts (normal + anomalous): train 7,500; valid 39 + 44; test 640 + 3,075 (thesis: ratio 1:1). The images
take about 0.4 GB.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import prepare
import volumes
from prepare import common

FIRST, LAST = 60, 99
HIGHEST = 4  # the highest label
GROUPS = [("train", 0), ("test", 0), ("valid", 0), ("valid", 1), ("test", 1)]  # in order of rank
PATIENTS = [424, 162, 39, 11, 615]
SLICES = dict(valid=range(60, 100, 10), test=range(60, 100, 8))  # for anomalous patients
PUBLISHED = {("train", 0): 7500, ("valid", 0): 39, ("valid", 1): 44, ("test", 0): 640, ("test", 1): 3075}
LISTS = Path(__file__).with_name("brats2021_published.csv")
LOOKED_FOR = "cases like BraTS2021_00000/BraTS2021_00000_flair.nii.gz"
MEMORY = 0.2  # GiB per process: an unpacked case of 240x240x155 voxels


@dataclass
class Args(prepare.Args):
    split: Path | None = None
    """CSV file with columns case,split,label that assigns patients to splits; replaces the published lists"""
    colormap: Literal["grey", "bone"] = "grey"
    """bone: coloured and transposed like the published images"""


def find_cases(raw):
    """Return {case: [flair file, seg file or None]}, sorted by case."""
    files = {}
    for file in common.files_in(raw):
        if match := re.fullmatch(r"BraTS2021_(\d+)_(flair|seg)" + prepare.VOLUME, file.name, re.IGNORECASE):
            prepare.note_file(files, f"BraTS2021_{match[1]}", match[2].lower(), file)
    return prepare.labelled(files, raw, "flair", "seg")


def tumour_free(files, folder):
    """Return the tumour-free slices among those that the protocol uses. FLAIR is read, too, so that only usable cases
    are assigned to splits."""
    flair, label = prepare.volume_and_label(files)
    if not np.ptp(flair.axial(FIRST, LAST + 1)):
        raise prepare.Damaged(f"{flair.file} has the same value in all voxels; download it again")
    tumour = label.labels(HIGHEST).any(axis=(1, 2))
    if not tumour.any():
        raise prepare.Damaged(f"{label.file} has no tumour, but every case has one; download it again")
    return [z for z in range(FIRST, LAST + 1) if not tumour[z]]


def plan(free, groups=None):
    """Return {case: (split, {label: slices})} from {case: tumour-free slices}. groups: {case: (split, label)} of the
    listed cases; all others are anomalous."""
    ranked, planned = sorted(free, key=lambda case: (-len(free[case]), case)), {}
    if groups:
        rest = [case for case in ranked if case not in groups]
        groups = groups | {case: ("valid" if i < PATIENTS[3] else "test", 1) for i, case in enumerate(rest)}
        return listed(free, groups)
    small = len(free) < len(GROUPS)  # then each patient in test or valid contributes slices of both classes
    parts = [("train", [0]), ("test", [0, 1]), ("valid", [0, 1])] if small else [(s, [y]) for s, y in GROUPS]
    patients = [PATIENTS[0], PATIENTS[1] + PATIENTS[4], PATIENTS[2] + PATIENTS[3]] if small else PATIENTS
    if len(free) == 4:
        ranked[2:] = ranked[:1:-1]  # give test the patient with the fewest tumour-free slices
    counts, normal = prepare.shares(len(free), patients), sum(map(bool, free.values()))
    if not small and 3 <= normal < sum(counts[:3]):  # only patients with tumour-free slices go to the normal parts
        counts = prepare.shares(normal, PATIENTS[:3]) + prepare.shares(len(free) - normal, PATIENTS[3:])
    for (split, labels), count in zip(parts, counts, strict=True):
        for case in ranked[len(planned) : len(planned) + count]:
            planned[case] = split, {label: slices_of(free[case], split, label) for label in labels}
    return planned


def listed(free, groups):
    """Return the plan for the cases in `groups` ({case: (split, label)})."""
    return {case: (split, {label: slices_of(free[case], split, label)})
            for case, (split, label) in groups.items() if case in free}


def slices_of(free, split, label):
    """Return the slices of a patient: for label 0, all tumour-free slices; for label 1, the protocol's slices that show
    tumour, or all slices with tumour if the protocol's slices show none (possible in small cohorts)."""
    tumour = [z for z in range(FIRST, LAST + 1) if z not in free]
    return ([z for z in SLICES[split] if z in tumour] or tumour) if label else free


def read_groups(file, cases):
    """Read {case: (split, label)} from a list of patients."""
    groups = {}
    for row in prepare.read_list(file, ["case", "split", "label"]):
        case, group = row["case"], (row["split"], {"0": 0, "1": 1}.get(row["label"]))
        if group not in GROUPS:
            raise common.Error(f"{file}: {case} has split {group[0]} and label {row['label']}: not one of "
                               + ", ".join(f"{s} {y}" for s, y in GROUPS))
        if case in groups or case not in cases:
            raise common.Error(f"{file}: {case} {'appears twice' if case in groups else 'is not in the source'}")
        groups[case] = group
    return groups


def write_case(item, folder):
    """Write the slices of one case as PNG and return their manifest rows."""
    case, files, (split, slices), colormap = item
    flair, label = prepare.volume_and_label(files)
    flair, tumour = flair.axial(FIRST, LAST + 1), label.labels(HIGHEST, FIRST, LAST + 1) > 0  # (40, H, W)
    rows = []
    for label, z in [(label, z) for label, chosen in slices.items() for z in chosen]:
        image, mask = flair[z - FIRST], tumour[z - FIRST] if label else None
        if colormap == "bone":
            image, mask = bone(image.T), mask.T if label else None
        else:
            image = volumes.stretched(image)
        rows.append(prepare.save(folder, split, label, f"{case}_{z}", image, mask, case=case, slice=z))
    return rows


def bone(image):
    """Convert (H, W) floats to (H, W, 3) uint8 with the colours of matplotlib.pyplot.imsave."""
    import matplotlib  # imported here: it is slow, and only --colormap bone needs it

    low, high = image.min(), image.max()
    return matplotlib.colormaps["bone"]((image - low) / ((high - low) or 1), bytes=True)[..., :3]


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    raw = prepare.raw_folder(args, LOOKED_FOR)
    cases = find_cases(raw) or prepare.wrong_folder(raw, LOOKED_FOR)
    if len(cases) < 3:
        raise common.Error(f"{len(cases)} cases below {raw}; train, valid and test need one each")
    published = [row["case"] for row in prepare.read_list(LISTS, ["case"])]
    lacking = [case for case in published if case not in cases]
    groups = read_groups(args.split or LISTS, cases) if args.split or not lacking else None
    preparation = prepare.Preparation("brats2021", "brain", ["train", "valid", "test"], args, cases, MEMORY)
    if groups is None:
        print(f"note: {len(lacking)} of the {len(published)} patients in the published lists are not in the source; "
              "patients are ranked instead")
    free = preparation.map(tumour_free, cases, "looking for tumour")
    if len(free) < 3:
        raise common.Error(f"{len(free)} usable cases; train, valid and test need one each")
    planned = listed(free, groups) if args.split else plan(free, groups)
    unused = [case for case, (_, slices) in planned.items() if not any(slices.values())]
    prepare.skipped(unused, "patients without slices of the listed label")
    if groups and not args.split:
        print("note: train, valid normal and test normal have the published patients; those of valid anomalous "
              "cannot be reproduced, so the first by name are used")
    counts = Counter()
    for split, slices in planned.values():
        counts.update({(split, label): len(chosen) for label, chosen in slices.items()})
    preparation.plan(counts, PUBLISHED)
    items = {case: (case, cases[case], planned[case], args.colormap) for case in sorted(planned)}
    rows = preparation.map(write_case, items, "writing")
    preparation.finish([r for case in rows.values() for r in case], PUBLISHED)
