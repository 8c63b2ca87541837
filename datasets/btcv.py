"""liver, train: the liver CT benchmark's normal slices from BTCV (MICCAI 2015 "Beyond the Cranial Vault").

Where: synapse.org, syn3193805, after registration: RawData.zip of the abdomen part (syn3379050); the thesis names CC BY
4.0. 30 labelled cases; valid and test of the benchmark come from LiTS, see lits.py.
--raw: the folder that holds RawData/Training/img/img0001.nii.gz and RawData/Training/label/label0001.nii.gz (or .nii),
at any depth. Scans without label in a folder Testing (or imagesTs) are passed over.

The rule, whose steps 2 to 4 lits.py shares:
1. every axial slice with liver (label 6);
2. Hounsfield units clipped to the abdominal window, -200 to 250, and scaled to 8 bits; zero outside the liver. A slice
   on which the liver is nowhere above -200 is left out, as nothing is to be seen on it. So the thesis says; the
   benchmark's code (data_processing/liver of github.com/DorisBao/BMAD) clips LiTS but not BTCV, and scales each slice
   by its own range, of the whole body, before the liver is cut out, so that the published images are darker or brighter
   from slice to slice, and those of train unlike those of test;
3. histogram equalisation of the pixels above 0: v becomes floor(255 * share of them that are at most v); of the results
   1 to 149 are then lifted to 30 to 149 (x to floor(30 + 0.8 x)). --no-equalize leaves this step out (the thesis ships
   both versions); lits.py must be given the same;
4. 512x512 as in the source, seen from below (the patient's right on the left), whatever the affine of the volume. A
   label on the volume's grid is turned as the volume is, whatever its own affine; where they disagree it is said.

A .nii.gz is read to its checksum; damage inside a .nii, which has none, cannot be seen, unless the file is cut off or
its header is wrong.
--patients FILE (CSV: case, like img0001) takes these cases only.
Published: train 1,542, "selected" (thesis, 3.1.2) in a way that it does not tell; here all slices are taken.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import prepare
from prepare import common

WINDOW = -200, 250  # HU
LIVER = 6
BLOCK = 32  # slices read at a time: 32 MiB of each volume where they are 512x512
MEMORY = 0.6  # GiB that a process takes: 512x512x200, volume and label unpacked
PUBLISHED = {("train", 0): 1542}
LOOKED_FOR = "cases like Training/img/img0001.nii.gz with Training/label/label0001.nii.gz"


@dataclass
class Args(prepare.Args):
    equalize: bool = True
    """equalise the histogram of each liver"""
    patients: Path | None = None
    """CSV file with the column case: use these cases only"""


# ------------------------------------------------------------------------------------------------- shared with lits.py
def find_pairs(raw, pattern, volume):
    """{case: [volume file, label file or None]}: the groups of `pattern` are the kind (`volume` or another) and the
    case."""
    files = {}
    for file in common.files_in(raw):
        if match := re.fullmatch(pattern + prepare.VOLUME, file.name, re.IGNORECASE):
            prepare.note_file(files, match[2], "volume" if match[1].lower() == volume else "label", file)
    return prepare.labelled(files, raw, "volume", "label")


def liver_slices(files, is_liver, equalized):
    """(slice, image of the liver (H, W) uint8, labels (H, W)) of each slice on which liver is to be seen.

    is_liver: turns labels into a mask."""
    volume, label = prepare.volume_and_label(files)
    for start in range(0, label.shape[2], BLOCK):
        labels = label.axial(start, min(start + BLOCK, label.shape[2]))  # (n, H, W)
        liver = is_liver(labels)
        found = np.flatnonzero(liver.any(axis=(1, 2)))
        if not len(found):
            continue
        hu = volume.axial(start + int(found[0]), start + int(found[-1]) + 1)
        for z in found.tolist():
            image = np.where(liver[z], window(hu[z - found[0]]), np.uint8(0))
            if image.any():
                yield start + z, equalize(image) if equalized else image, labels[z]


def window(hu):
    """Hounsfield units to 8 bits."""
    low, high = WINDOW
    return np.rint((np.clip(hu, low, high) - low) * (255 / (high - low))).astype(np.uint8)


def equalize(image):
    """Step 3 of the rule; image: (H, W) uint8, not all 0."""
    counts = np.bincount(image.ravel(), minlength=256)
    counts[0] = 0
    table = 255 * counts.cumsum() // counts.sum()  # in whole numbers, so that no machine rounds it otherwise
    lifted = np.where((table > 0) & (table < 150), 30 + table * 4 // 5, table)
    return lifted.astype(np.uint8)[image]


def check_equalize(args, other):
    """End with one line if the other source of the benchmark was prepared with another --equalize."""
    record = Path(args.root) / "liver" / f"{other}.json"
    if record.exists() and (theirs := json.loads(record.read_text())["arguments"]["equalize"]) != args.equalize:
        raise common.Error(f"{record.parent} has slices of {other} made with --{'' if theirs else 'no-'}equalize; give "
                           "the same here, or choose another --root")


# ---------------------------------------------------------------------------------------------------------------- BTCV
def find_cases(raw):
    """{case: [volume file, label file or None]}, by name."""
    return {f"img{number}": files for number, files in sorted(find_pairs(raw, r"(img|label)(\d+)", "img").items())}


def write_case(item, folder):
    """The slices of one case as PNG; their manifest rows."""
    case, files, equalized = item
    return [prepare.save(folder, "train", 0, f"{case}_{z}", image, case=case, slice=z)
            for z, image, _ in liver_slices(files, lambda labels: labels == LIVER, equalized)]


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    raw = prepare.raw_folder(args, LOOKED_FOR)
    cases = find_cases(raw) or prepare.wrong_folder(raw, LOOKED_FOR)
    if args.patients:
        asked = [row["case"] for row in prepare.read_list(args.patients, ["case"])]
        if unknown := [case for case in asked if case not in cases]:
            raise common.Error(f"{args.patients}: {unknown[0]} is not in the source")
        cases = {case: files for case, files in cases.items() if case in asked}
    check_equalize(args, "lits")
    preparation = prepare.Preparation("btcv", "liver", ["train"], args, cases, MEMORY)
    items = {case: (case, files, args.equalize) for case, files in cases.items()}
    rows = preparation.map(write_case, items, "writing")
    preparation.finish([r for case in rows.values() for r in case], PUBLISHED)
