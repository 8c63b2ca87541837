"""liver, valid and test: the liver CT benchmark's slices from LiTS (training set, MICCAI 2017, arXiv:1901.04056).

Where: lits-challenge.com or Kaggle, andrewmvd/liver-tumor-segmentation (and its part 2); the thesis names CC BY-NC-SA.
131 cases, 0 to 130. Train comes from BTCV, see btcv.py.
--raw: the folder that holds volume-<case>.nii and segmentation-<case>.nii (or .nii.gz), at any depth, in one folder or
several. Some segmentations have lost the orientation that their volume's header names (case 53; 28 to 47 in some
copies): see step 4 of btcv.py.

The rule:
1. cases 1 to 10, every axial slice with liver (label above 0); one with tumour (label 2) is anomalous, that being its
   mask. --all-cases takes every case that is there, --patients FILE those that it names;
2. window, mask, equalisation and orientation are those of btcv.py, which must be given the same --equalize;
3. whole patients go into valid so that its slices come nearest to the published 93 normal and 73 anomalous (the same
   shares of a smaller source), exactly if any choice does, and has both kinds if any choice has; tried in an order
   drawn with --seed. The others are test.
   --patients FILE (CSV: case,split, a case being its number) fixes the division instead.

Published: valid 93 + 73, test 833 + 660. So 733 slices with tumour, where the 131 cases have 7,190; the thesis does not
tell which it took. Cases 1 to 10 are inferred: the lists of published valid images that others made public (MVFA-AD,
CVPR 2024) name slices of these ten and of no other, and 734 slices of these ten have tumour. The published split is by
slice (the authors' liver.py), with the same patients in valid and test. Here they are apart, and the slices of ten
whole patients hardly add up to its counts: what is printed, before the images are written, tells how near they come.
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
TUMOUR = 2
PUBLISHED = {("valid", 0): 93, ("valid", 1): 73, ("test", 0): 833, ("test", 1): 660}
MEMORY = 1.2  # GiB that a process takes: the largest case, 512x512x987, unpacked; without .gz 0.2
LOOKED_FOR = "cases like volume-1.nii with segmentation-1.nii"


@dataclass
class Args(prepare.Args):
    equalize: bool = True
    """equalise the histogram of each liver"""
    all_cases: bool = False
    """divide all cases of the source, instead of 1 to 10"""
    patients: Path | None = None
    """CSV file with the columns case,split that says which patients go where, instead of drawing"""


def find_cases(raw):
    """{case: [volume file, label file or None]}, by number."""
    return dict(sorted(btcv.find_pairs(raw, r"(volume|segmentation)-(\d+)", "volume").items(), key=lambda c: int(c[0])))


def is_liver(labels):
    return labels > 0  # the tumours are part of the liver


def count_slices(files, folder):
    """[normal, anomalous slices] of a case; its volume is read, too, so that only usable patients are divided."""
    counts = [0, 0]
    for _, _, labels in btcv.liver_slices(files, is_liver, equalized=False):
        counts[int((labels == TUMOUR).any())] += 1
    return counts


def plan(counts, seed):
    """{case: split} from {case: [normal, anomalous slices]}."""
    wanted = []
    for label in (0, 1):
        valid, total = PUBLISHED["valid", label], PUBLISHED["valid", label] + PUBLISHED["test", label]
        wanted.append(min(valid, max(1, round(sum(c[label] for c in counts.values()) * valid / total))))
    valid = prepare.divide(counts, wanted, seed) if counts else []
    if not valid:
        raise common.Error(f"{len(counts)} usable patients cannot be divided: valid needs one, and test needs slices "
                           "with and without tumour of another; add cases, or give --all-cases or --patients FILE")
    return {case: "valid" if case in valid else "test" for case in counts}


def write_case(item, folder):
    """The slices of one case as PNG; their manifest rows."""
    case, files, split, equalized = item
    rows = []
    for z, image, labels in btcv.liver_slices(files, is_liver, equalized):
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
                           "give --all-cases to divide those that it has")
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
