"""What the preparation scripts share: arguments, work on many cases that a kill does not lose, one way to write images,
the checks between splits. A source's rule is in its own script.

A script scans its source, plans which case belongs to which split, lets `Preparation.map` write the images case by case
(in parallel; what is done is kept), and ends with `Preparation.finish`. Until then everything lies in a hidden folder
<root>/.preparing-<source>; a benchmark that can be seen is complete.
"""

import csv
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from volumes import Damaged

import common


@dataclass
class Args:
    raw: str
    """folder of the source, as downloaded and unpacked"""
    root: str = "data"
    """the benchmark is written to <root>/<benchmark>"""
    seed: int = 0
    """seeds whatever the rule draws"""
    workers: int = os.cpu_count() or 1
    """cases worked on at a time; each holds one case in memory"""
    strict: bool = False
    """stop at the first damaged file, instead of going on without it"""
    allow_duplicates: bool = False
    """let equal images, or a patient, in two splits pass with a warning"""


FREE = {"raw", "root", "workers", "strict", "allow_duplicates"}  # what does not change the benchmark


def raw_folder(args, looked_for):
    """args.raw as a Path; ends with one line if it is not there. looked_for: what it should hold, in words."""
    raw = Path(args.raw)
    if not raw.is_dir():
        raise common.Error(f"no folder {raw}; --raw takes the folder that holds {looked_for}")
    return raw


def wrong_folder(raw, looked_for):
    """End with one line: what was looked for and what is there."""
    found = sorted(p.name + "/" * p.is_dir() for p in raw.iterdir() if p.name[0] != ".")
    raise common.Error(f"{raw} does not hold {looked_for}; found {', '.join(found[:6]) or 'nothing'}"
                       f"{f' and {len(found) - 6} more' if len(found) > 6 else ''}; give the unpacked source with "
                       f"--raw")


def read_list(file, columns):
    """Rows of a CSV file as dicts; ends with one line if it is missing, unreadable, or lacks one of `columns`."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise common.Error(f"cannot read {file} ({getattr(e, 'strerror', None) or e}); give a CSV file with the "
                           f"columns "
                           f"{', '.join(columns)}") from e
    if not rows or (missing := [c for c in columns if c not in rows[0] or any(r[c] is None for r in rows)]):
        lacks = f"lacks the column {missing[0]} or a value in it" if rows else "is empty"
        raise common.Error(f"{file} {lacks}; its columns must be {', '.join(columns)}")
    return rows


def read_split(file, cases, splits):
    """{case: split} from a CSV file with the columns case,split; ends with one line if a row is not of `cases` and
    `splits`, or repeats a case."""
    found = {}
    for row in read_list(file, ["case", "split"]):
        case, split = row["case"], row["split"]
        if split not in splits:
            raise common.Error(f"{file}: {case} has split {split}; known are {', '.join(splits)}")
        if case in found or case not in cases:
            raise common.Error(f"{file}: {case} {'stands there twice' if case in found else 'is not in the source'}")
        found[case] = split
    return found


def read_grey(file):
    """The image of a file as (H, W) uint8; Damaged if it cannot be used."""
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise Damaged(f"{file} has pixels of mode {image.mode}, where 8 bits are expected; download it again")
            return np.asarray(image.convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # SyntaxError: a broken PNG chunk
        raise Damaged(f"{file} is not a readable image ({e}); download it again") from e


def same_shape(volume, label):
    """Damaged if a volume and its label do not belong together."""
    if volume.shape != label.shape:
        raise Damaged(f"{label.file} is {label.shape}, its volume {volume.file} {volume.shape} voxels; "
                      "download both again")


# --------------------------------------------------------------------------------------------------- writing and checks
def save(folder, split, label, name, image, mask=None, **columns):
    """Write a uint8 image (and a bool mask) as PNG into `folder`; its manifest row. label: 0 normal, 1 anomalous."""
    place = Path(split) / ("Ungood" if label else "good")
    for kind, array in (("img", image), ("anomaly_mask", mask)):
        if array is not None:
            array = array * np.uint8(255) if array.dtype == bool else array
            with common.atomic(folder / place / kind / f"{name}.png") as tmp:
                Image.fromarray(array).save(tmp, "PNG")
    digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
    return dict(image=(place / "img" / f"{name}.png").as_posix(), split=split, label=label, **columns, sha256=digest)


def _some(function, items, folder, kept):
    """({key: result}, {key: why it is damaged}) of `items`; the results are kept as JSON in `kept`, each with its item,
    since a plan may be another one when a damaged file was replaced."""
    known, results, damaged = json.loads(kept.read_text()) if kept.exists() else {}, {}, {}
    for key, item in items.items():
        asked = json.dumps(item)
        if known.get(key, [None])[0] == asked:
            results[key] = known[key][1]
            continue
        try:
            results[key] = function(item, folder)
            known[key] = asked, results[key]
        except Damaged as e:
            damaged[key] = str(e)
    with common.atomic(kept) as tmp:
        tmp.write_text(json.dumps(known))
    return results, damaged


class Preparation:
    """One source's way into one benchmark; ends the program where that is there already."""

    def __init__(self, source, benchmark, splits, args):
        """source: the script's name; splits: those of `benchmark` that it writes."""
        self.source, self.splits, self.args = source, splits, args
        self.folder, self.work = Path(args.root) / benchmark, Path(args.root) / f".preparing-{source}"
        self.damaged = {}
        # A list stands for what it holds, so that an edited one asks for another benchmark.
        self.asked = {k: [common.sha256(f) for f in sorted([Path(v), *Path(v).glob("*")]) if f.is_file()]
                      if isinstance(v, str) else v for k, v in dataclasses.asdict(args).items() if k not in FREE}
        if args.workers < 1 or args.seed < 0:
            raise common.Error("--workers must be at least 1 and --seed not negative")
        record = self.folder / f"{source}.json"
        if record.exists():
            made = json.loads(record.read_text())
            if made["arguments"] != self.asked:
                raise common.Error(f"{self.folder} was made from {source} with other arguments ({made['arguments']}); "
                                   f"remove "
                                   "it, or choose another --root")
            print(f"{self.folder} is there already, made from {source} with these arguments; nothing to do")
            self._report_damage(made["damaged"])
            raise SystemExit(1 if made["damaged"] else 0)
        if there := [s for s in splits if (self.folder / s).exists() and not (self.work / "moving").exists()]:
            raise common.Error(f"{self.folder / there[0]} exists and was not made by this script; choose another "
                               f"--root")
        begun = self.work / "arguments.json"
        if begun.exists() and json.loads(begun.read_text()) != self.asked:
            raise common.Error(f"{self.work} was begun with other arguments; remove it, or choose another --root")
        with common.atomic(begun) as tmp:
            tmp.write_text(json.dumps(self.asked))

    def map(self, function, items, what, chunk=1):
        """{key: function(item, folder)} in the order of `items` ({key (str): item}), in worker processes; what is
        damaged is named and left out. function: of a module; returns what JSON can hold, writes with `save`.
        chunk: so many items go to a process at a time, and share one file of what is done."""
        results, kept, keys = {}, self.work / what, list(items)
        chunks = [{key: items[key] for key in keys[i : i + chunk]} for i in range(0, len(keys), chunk)]
        try:
            with ProcessPoolExecutor(min(self.args.workers, max(1, len(chunks)))) as pool:
                found = [pool.submit(_some, function, some, self.work / "images", kept / f"{next(iter(some))}.json")
                         for some in chunks]
                try:
                    for future in common.progress(found, f"{self.source}: {what}"):
                        done, damaged = future.result()
                        results |= done
                        for key, why in damaged.items():
                            print(f"damaged: {why}", file=sys.stderr, flush=True)
                            self.damaged[key] = why
                            if self.args.strict:
                                raise common.Error("stopped at the first damaged file (--strict)")
                finally:
                    pool.shutdown(cancel_futures=True)
        except BrokenProcessPool:
            raise common.Error(f"a process died while {what}, most likely for lack of memory; take fewer "
                               f"--workers") from None
        if not results:
            raise common.Error(f"{self.args.raw}: nothing could be read; see the damaged files above")
        return results

    def finish(self, rows, published):
        """Check the splits, print counts beside the published ones, write the manifest, let the benchmark be seen.

        rows: of `save`, with the column `case`; published: {(split, label): count}. Exit status 1 if something was
        damaged."""
        rows = sorted(rows, key=lambda r: (self.splits.index(r["split"]), r["label"], r["image"]))
        others = [r for f in sorted(self.folder.glob("*.csv")) for r in read_list(f, ["image", "split", "sha256"])]
        for what, everything in (("case", rows), ("sha256", rows + others)):
            seen = {}
            if crossing := [(first, row) for row in everything
                            if (first := seen.setdefault(row[what], row))["split"] != row["split"]]:
                first, row = crossing[0]
                line = (f"{len(crossing)} images cross splits: {first['image']} and {row['image']} are "
                        + ("the same image" if what == "sha256" else f"both of {row['case']}"))
                if not self.args.allow_duplicates:
                    raise common.Error(f"{line}; clean the source, or let it pass with --allow-duplicates")
                print(f"warning: {line}", file=sys.stderr)
        counts = Counter((r["split"], r["label"]) for r in rows)
        for split in self.splits:
            for label, name in enumerate(("normal", "anomalous")):
                if (split, label) in published or counts[split, label]:
                    print(f"{split:<5} {name:<9} {counts[split, label]:>6}   published {published[split, label]:>6}")
        for split, label in published:
            if not counts[split, label] and split != "valid":  # without valid a benchmark can be used, with a warning
                raise common.Error(f"no {('normal', 'anomalous')[label]} image for {split}: the source has too few "
                                   f"cases")
        planned = {Path(r["image"]) for r in rows}
        planned |= {path.parents[1] / "anomaly_mask" / path.name for path in planned if path.parts[1] == "Ungood"}
        for file in (self.work / "images").rglob("*.png"):  # of an earlier plan, before a damaged file was replaced
            if file.relative_to(self.work / "images") not in planned:
                file.unlink()
        (self.work / "moving").touch()
        for split in self.splits:
            if (self.work / "images" / split).exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                os.replace(self.work / "images" / split, self.folder / split)
        common.write_csv(self.folder / f"{self.source}.csv", rows)
        with common.atomic(self.folder / f"{self.source}.json") as tmp:
            tmp.write_text(json.dumps(dict(arguments=self.asked, damaged=self.damaged)))
        shutil.rmtree(self.work)
        print(f"{self.folder}: {len(rows)} images from {len({r['case'] for r in rows})} cases")
        self._report_damage(self.damaged)
        raise SystemExit(1 if self.damaged else 0)

    def _report_damage(self, damaged):
        if damaged:
            listed = [*damaged.values()][:20] + [f"and {len(damaged) - 20} more, see above"] * (len(damaged) > 20)
            print(f"made without {len(damaged)} damaged: {'; '.join(listed)}. Replace them, remove {self.folder} and "
                  "prepare it again", file=sys.stderr)


def shares(total, counts):
    """`total` cases divided in proportion to `counts`: at least one in each, the greatest remainders first."""
    exact = np.array(counts) * total / sum(counts)
    found = np.maximum(1, np.floor(exact)).astype(int)
    while found.sum() != total:
        step = 1 if found.sum() < total else -1
        gap = np.where((found > 1) | (step > 0), step * (exact - found), -np.inf)
        found[int(np.argmax(gap))] += step
    return found.tolist()


def divide(counts, wanted, seed):
    """The cases of `counts` ({case: (normal, anomalous)}) whose images together come nearest to `wanted` (normal,
    anomalous), exactly if any do; tried in seeded order. The other cases keep both kinds; [] if none can be spared."""
    total = np.sum(list(counts.values()), axis=0).tolist()
    names = sorted(counts)
    reached = {(0, 0): None}  # sum of some cases: the sum before the last of them, and that case
    best, nearest = float("inf"), (0, 0)
    for case in [names[i] for i in np.random.default_rng(seed).permutation(len(names))]:
        for before in list(reached):
            after = before[0] + counts[case][0], before[1] + counts[case][1]
            excess = max(0, after[0] - wanted[0]) + max(0, after[1] - wanted[1])  # further cases can only add to it
            if after in reached or after[0] >= total[0] or after[1] >= total[1] or excess >= best:
                continue
            reached[after] = before, case
            distance = abs(after[0] - wanted[0]) + abs(after[1] - wanted[1])
            if distance < best:
                best, nearest = distance, after
        if best == 0:
            break
    chosen = []
    while reached[nearest] is not None:
        nearest, case = reached[nearest]
        chosen.append(case)
    return sorted(chosen)
