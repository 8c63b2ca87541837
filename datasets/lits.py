"""liver, valid and test: slices of the liver CT benchmark from LiTS (training set, MICCAI 2017, arXiv:1901.04056).

Source: lits-challenge.com or Kaggle (andrewmvd/liver-tumor-segmentation and part 2). The licence is CC BY-NC-SA
according to the thesis. There are 131 cases, 0 to 130. Train comes from BTCV (see btcv.py).
--raw: a folder with volume-<case>.nii and segmentation-<case>.nii (or .nii.gz), at any depth, in one or more folders.
Some segmentations lack their volume's orientation (case 53; in some copies also 28 to 47): see step 4 of btcv.py.

Protocol:
1. Every axial slice with liver (label above 0) in cases 1 to 10 is used. Slices with tumour (label 2) are anomalous;
   the tumour is the mask. --all-cases uses every case of the source, --patients FILE only the listed ones.
2. Window, mask, equalisation and orientation are those of btcv.py. Give both scripts the same --equalize.
3. Whole patients are chosen for valid so that its slice counts come as close as possible to the published 93 normal and
   73 anomalous slices (in a smaller source, proportionally fewer). Valid has slices of both classes if possible.
   Patients are tried in a random order (--seed); those not chosen go to test. --patients FILE (CSV: case,split, where
   case is the number) replaces this division.

Published counts (normal + anomalous): valid 93 + 73, test 833 + 660, with 733 of the 7,190 slices that show tumour
in the 131 cases. The thesis does not name the cases. We infer cases 1 to 10: public lists of the published valid images
(MVFA-AD, CVPR 2024) contain slices of these ten only, which have 734 slices with tumour. The published split is by
slice (the authors' liver.py), so valid and test share patients. Here each patient is in one split only, so the counts
rarely equal the published ones; the script prints them before it writes the images.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import btcv
import prepare
from prepare import common

CASES = range(1, 11)
TUMOUR = 2  # the highest label
PUBLISHED = {("valid", 0): 93, ("valid", 1): 73, ("test", 0): 833, ("test", 1): 660}
MEMORY = 1.2  # GiB per process: the largest case, unpacked (512x512x987 voxels); 0.2 without .gz
LOOKED_FOR = "cases like volume-1.nii with segmentation-1.nii"


@dataclass
class Args(prepare.Args):
    equalize: bool = True
    """equalise the histogram of the liver in each slice"""
    all_cases: bool = False
    """use all cases of the source instead of 1 to 10"""
    patients: Path | None = None
    """CSV file with columns case,split that assigns patients to splits; replaces the random choice"""


def find_cases(raw):
    """Return {case: [volume file, label file or None]}, sorted by number."""
    return {str(n): files for n, files in btcv.find_pairs(raw, r"(volume|segmentation)-(\d+)", "volume").items()}


def is_liver(labels):
    return labels > 0  # including tumours


def count_slices(files, folder):
    """Count [normal, anomalous] slices of a case. Its CT is read, too, so that only usable cases enter the splits."""
    counts = [0, 0]
    for _, _, labels in btcv.liver_slices(files, is_liver, TUMOUR, equalized=False):
        counts[int((labels == TUMOUR).any())] += 1
    return counts


def plan(counts, seed):
    """Return {case: split} from {case: [number of normal slices, number of anomalous slices]}."""
    wanted = []
    for label in (0, 1):
        valid, total = PUBLISHED["valid", label], PUBLISHED["valid", label] + PUBLISHED["test", label]
        wanted.append(min(valid, max(1, round(sum(c[label] for c in counts.values()) * valid / total))))
    valid = prepare.divide(counts, wanted, seed) if counts else []
    if not valid:
        raise common.Error(f"{len(counts)} usable patients cannot be divided: valid needs one and test another, "
                           "with normal and anomalous slices; add cases, or give --all-cases or --patients FILE")
    return {case: "valid" if case in valid else "test" for case in counts}


def write_case(item, folder):
    """Write the slices of one case as PNG and return their manifest rows."""
    case, files, split, equalized = item
    rows = []
    for z, image, labels in btcv.liver_slices(files, is_liver, TUMOUR, equalized):
        tumour = labels == TUMOUR
        label = int(tumour.any())
        rows.append(prepare.save(folder, split, label, f"{case}_{z}", image, tumour if label else None,
                                 case=case, slice=z))
    return rows


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    raw = prepare.raw_folder(args, LOOKED_FOR)
    cases = find_cases(raw) or prepare.wrong_folder(raw, LOOKED_FOR)
    chosen = {case: files for case, files in cases.items() if args.all_cases or int(case) in CASES}
    if args.patients:
        split_of = prepare.read_split(args.patients, cases, ["valid", "test"])
        chosen = {case: cases[case] for case in split_of}
    elif len(chosen) < 2:
        raise common.Error(f"{raw} has {len(chosen)} of the cases 1 to 10; valid and test need one each: add cases, or "
                           "give --all-cases to use all cases of the source")
    btcv.check_equalize(args, "btcv")
    preparation = prepare.Preparation("lits", "liver", ["valid", "test"], args, cases, MEMORY)
    counts = preparation.map(count_slices, chosen, "counting slices")
    if not args.patients:
        split_of = plan(counts, args.seed)
    total = Counter()
    for case, slices in counts.items():
        total.update({(split_of[case], label): count for label, count in enumerate(slices)})
    preparation.plan(total, PUBLISHED)
    items = {case: (case, cases[case], split_of[case], args.equalize) for case in counts}
    rows = preparation.map(write_case, items, "writing")
    preparation.finish([r for case in rows.values() for r in case], PUBLISHED)
