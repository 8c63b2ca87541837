"""brain: the brain MR benchmark from BraTS2021 (training set of the RSNA-ASNR-MICCAI challenge 2021).

Where: synapse.org (Task 1, training data) after registration, or its copy on Kaggle; free for research, with the
challenge's citations (Baid et al. 2021, arXiv:2107.02314). 1,251 cases, 13 GB packed.
--raw: the folder that holds the cases, BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz (or .nii), at any
depth. Only FLAIR and the segmentation are read.

The rule:
1. of each FLAIR volume the 40 axial slices 60 to 99; a slice with any label above 0 is anomalous, that being its mask;
2. each slice scaled by its own least and greatest value to 8 bits, 240x240, seen from below (the patient's right on the
   left), whatever the affine of the file;
3. patients ranked by how many of their 40 slices are free of tumour (most first; ties by name). The first 424 are
   train, with all their tumour-free slices; the next 162 test-normal and the next 39 valid-normal, likewise;
4. the remaining 626 show tumour in every slice: the first 11 are valid-anomalous with slices 60, 70, 80, 90, the other
   615 test-anomalous with slices 60, 68, 76, 84, 92.
A cohort of another size is divided in the same shares, at least one patient in each part; of fewer than five, those of
valid and test give both kinds of slices. --split FILE (CSV: case,split,label) fixes it instead.
Published: train 7,500; valid 39 + 44; test 640 + 3,075 (the thesis calls that 1:1; about 0.4 GB).
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import prepare
import volumes
from prepare import common

FIRST, LAST = 60, 99
GROUPS = [("train", 0), ("test", 0), ("valid", 0), ("valid", 1), ("test", 1)]  # in the order of the ranking
PATIENTS = [424, 162, 39, 11, 615]
SLICES = dict(valid=range(60, 100, 10), test=range(60, 100, 8))  # of anomalous patients
PUBLISHED = {("train", 0): 7500, ("valid", 0): 39, ("valid", 1): 44, ("test", 0): 640, ("test", 1): 3075}
LOOKED_FOR = "cases like BraTS2021_00000/BraTS2021_00000_flair.nii.gz"


@dataclass
class Args(prepare.Args):
    split: str | None = None
    """CSV file with the columns case,split,label that says which patients go where, instead of the ranking"""


def find_cases(raw):
    """{case: [flair file, seg file or None]}, by name."""
    files = {}
    for file in sorted(raw.rglob("*.nii*")):
        if match := re.fullmatch(r"(BraTS2021_\d+)_(flair|seg)\.nii(\.gz)?", file.name, re.IGNORECASE):
            files.setdefault(match[1], {})[match[2].lower()] = str(file)
    return {case: [found["flair"], found.get("seg")] for case, found in sorted(files.items()) if "flair" in found}


def tumour_free(files, folder):
    """The slices without tumour, of those that the rule reads."""
    flair, seg = files
    if seg is None:
        raise prepare.Damaged(f"{flair} has no segmentation beside it (_seg.nii.gz); download the training set")
    label = volumes.Volume(seg)
    prepare.same_shape(volumes.Volume(flair), label)
    return (FIRST + np.flatnonzero(~(label.axial(FIRST, LAST + 1) > 0).any(axis=(1, 2)))).tolist()


def plan(free):
    """{case: (split, {label: slices})} from {case: tumour-free slices}."""
    ranked, planned = sorted(free, key=lambda case: (-len(free[case]), case)), {}
    if len(free) < 3:
        raise common.Error(f"{len(free)} usable cases; train, valid and test need one each")
    small = len(free) < len(GROUPS)  # then a patient of test or valid gives both normal and anomalous slices
    groups = [("train", [0]), ("test", [0, 1]), ("valid", [0, 1])] if small else [(s, [y]) for s, y in GROUPS]
    patients = [PATIENTS[0], PATIENTS[1] + PATIENTS[4], PATIENTS[2] + PATIENTS[3]] if small else PATIENTS
    for (split, labels), count in zip(groups, prepare.shares(len(free), patients), strict=True):
        for case in ranked[len(planned) : len(planned) + count]:
            planned[case] = split, {label: slices_of(free[case], split, label) for label in labels}
    return planned


def slices_of(free, split, label):
    return [z for z in SLICES[split] if z not in free] if label else free


def read_groups(file, cases):
    """{case: (split, label)} from the list --split."""
    groups = {}
    for row in prepare.read_list(file, ["case", "split", "label"]):
        case, group = row["case"], (row["split"], {"0": 0, "1": 1}.get(row["label"]))
        if group not in GROUPS:
            raise common.Error(f"{file}: {case} has split {group[0]} and label {row['label']}; known are "
                               + ", ".join(f"{s} {y}" for s, y in GROUPS))
        if case in groups or case not in cases:
            raise common.Error(f"{file}: {case} {'stands there twice' if case in groups else 'is not in the source'}")
        groups[case] = group
    return groups


def write_case(item, folder):
    """The slices of one case as PNG; their manifest rows."""
    case, (flair, seg), (split, slices) = item
    volume, tumour = volumes.Volume(flair).axial(FIRST, LAST + 1), volumes.Volume(seg).axial(FIRST, LAST + 1) > 0
    rows = []
    for label, z in [(label, z) for label, chosen in slices.items() for z in chosen]:
        image, mask = volumes.stretched(volume[z - FIRST]), tumour[z - FIRST] if label else None
        rows.append(prepare.save(folder, split, label, f"{case}_{z}", image, mask, case=case, slice=z))
    return rows


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    raw = prepare.raw_folder(args, LOOKED_FOR)
    cases = find_cases(raw) or prepare.wrong_folder(raw, LOOKED_FOR)
    groups = args.split and read_groups(args.split, cases)
    preparation = prepare.Preparation("brats2021", "brain", ["train", "valid", "test"], args)
    free = preparation.map(tumour_free, cases, "looking for tumour")
    if groups:
        planned = {case: (split, {label: slices_of(free[case], split, label)})
                   for case, (split, label) in groups.items() if case in free}
    else:
        planned = plan(free)
    items = {case: (case, cases[case], planned[case]) for case in sorted(planned)}
    rows = preparation.map(write_case, items, "writing")
    preparation.finish([r for case in rows.values() for r in case], PUBLISHED)
