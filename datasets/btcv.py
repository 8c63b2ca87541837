"""liver, train: normal slices of the liver CT benchmark from BTCV (MICCAI 2015 "Beyond the Cranial Vault").

Source: synapse.org, syn3193805, after registration: RawData.zip of the abdomen part (syn3379050). The licence is CC BY
4.0 according to the thesis. There are 30 labelled cases. Valid and test come from LiTS (see lits.py).
--raw: a folder with RawData/Training/img/img0001.nii.gz and RawData/Training/label/label0001.nii.gz (or .nii), at any
depth. Unlabelled scans in a folder named Testing (or imagesTs) are skipped.

Protocol (lits.py shares steps 2 to 4):
1. Every axial slice with liver (label 6) is used.
2. Hounsfield units are clipped to the abdominal window (-200 to 250) and scaled to 8 bits; pixels outside the liver are
   set to 0. A slice whose liver has no value above -200 would be black and is left out. This step follows the thesis.
   The benchmark's code (data_processing/liver of github.com/DorisBao/BMAD) clips LiTS but not BTCV, and scales each
   slice by its own range over the whole body before applying the liver mask. The published images therefore vary in
   brightness from slice to slice, and those of train differ from those of test.
3. The histogram of the pixels above 0 is equalised: v becomes floor(255 * fraction of these pixels at or below v).
   A result x from 1 to 149 then becomes floor(30 + 0.8 x), i.e. 30 to 149. --no-equalize skips this step (the
   thesis provides both versions); give lits.py the same flag.
4. Slices keep the source's 512x512 pixels and are in radiological view (the patient's right is on the left), whatever
   the affine. If a label has the same grid as its volume, but its affine gives it a different orientation and
   position, the volume's orientation is used for both, and a note is printed.

The checksums of .nii.gz files are verified. A .nii file has none: damage is detected only if the file is truncated or
its header is invalid. --patients FILE (CSV with a `case` column, e.g. img0001) selects cases.
Published count: 1,542 training slices, "selected" (thesis, 3.1.2) by an unstated criterion; we use all slices.
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
LIVER, HIGHEST = 6, 13  # labels
BLOCK = 32  # slices read at a time: 32 MiB of each volume at 512x512
MEMORY = 0.6  # GiB per process: an unpacked volume and its label, 512x512x200 voxels each
PUBLISHED = {("train", 0): 1542}
LOOKED_FOR = "cases like Training/img/img0001.nii.gz with Training/label/label0001.nii.gz"


@dataclass
class Args(prepare.Args):
    equalize: bool = True
    """equalise the histogram of the liver in each slice"""
    patients: Path | None = None
    """CSV file whose column case lists the cases to use"""


# ------------------------------------------------------------------------------------------------- shared with lits.py
def find_pairs(raw, pattern, volume):
    """Return {case: [volume file, label file or None]}. The first group of `pattern` matches the kind (`volume` or
    another word), and the second group matches the case (a number)."""
    files = {}
    for file in common.files_in(raw):
        if match := re.fullmatch(pattern + prepare.VOLUME, file.name, re.IGNORECASE):
            prepare.note_file(files, int(match[2]), "volume" if match[1].lower() == volume else "label", file)
    return prepare.labelled(files, raw, "volume", "label")


def liver_slices(files, is_liver, highest, equalized):
    """Yield (slice, image of the liver (H, W) uint8, labels (H, W)) for each slice that shows liver. At the end, raise
    `Damaged` if most slices show nothing within the liver.

    is_liver: a function that converts labels to a liver mask; highest: the highest label."""
    volume, label = prepare.volume_and_label(files)
    count = shown = 0
    for start in range(0, label.shape[2], BLOCK):
        labels = label.labels(highest, start, min(start + BLOCK, label.shape[2]))  # (n, H, W)
        liver = is_liver(labels)
        found = np.flatnonzero(liver.any(axis=(1, 2)))
        if not len(found):
            continue
        hu = volume.axial(start + int(found[0]), start + int(found[-1]) + 1)
        for z in found.tolist():
            image = np.where(liver[z], window(hu[z - found[0]]), np.uint8(0))
            count += 1
            shown += bool(np.ptp(np.percentile(image[liver[z]], [10, 90])))  # neither white, black nor constant
            if image.any():
                yield start + z, equalize(image) if equalized else image, labels[z]
    if shown <= count / 2:
        raise prepare.Damaged(f"{volume.file} shows liver in only {shown} of {count} slices labelled in {label.file} "
                              f"(at {WINDOW[0]} to {WINDOW[1]} HU); download both again")


def window(hu):
    """Convert Hounsfield units to 8 bits."""
    low, high = WINDOW
    return np.rint((np.clip(hu, low, high) - low) * (255 / (high - low))).astype(np.uint8)


def equalize(image):
    """Apply step 3 of the protocol. image: (H, W) uint8, not all 0."""
    counts = np.bincount(image.ravel(), minlength=256)
    counts[0] = 0
    table = 255 * counts.cumsum() // counts.sum()  # integer arithmetic gives the same result on all machines
    lifted = np.where((table > 0) & (table < 150), 30 + table * 4 // 5, table)
    return lifted.astype(np.uint8)[image]


def check_equalize(args, other):
    """Raise `Error` if the other source of the benchmark was prepared with a different --equalize."""
    record = Path(args.root) / "liver" / f"{other}.json"
    if record.exists() and (theirs := json.loads(record.read_text())["arguments"]["equalize"]) != args.equalize:
        raise common.Error(f"{record.parent} has slices of {other} made with --{'' if theirs else 'no-'}equalize; give "
                           "the same flag here, or choose another --root")


# ---------------------------------------------------------------------------------------------------------------- BTCV
def find_cases(raw):
    """Return {case: [volume file, label file or None]}, sorted by case."""
    return {f"img{number:04}": files for number, files in find_pairs(raw, r"(img|label)(\d+)", "img").items()}


def write_case(item, folder):
    """Write the slices of one case as PNG and return their manifest rows."""
    case, files, equalized = item
    return [prepare.save(folder, "train", 0, f"{case}_{z}", image, case=case, slice=z)
            for z, image, _ in liver_slices(files, lambda labels: labels == LIVER, HIGHEST, equalized)]


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
