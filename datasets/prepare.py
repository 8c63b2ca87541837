"""Code shared by the preparation scripts: arguments, resumable parallel work, image files, and checks across splits.
Each script describes the protocol for its own source.

A script scans its source, assigns each case to a split, writes the images with `Preparation.map` and ends with
`Preparation.finish`. Cases are processed in parallel, and an interrupted script resumes after the finished ones. Until
`finish`, all files are in the hidden folder <root>/.preparing-<source>. A single rename then makes its subfolder `part`
visible, including the manifest, so a visible part of a benchmark is always complete.
"""

import csv
import dataclasses
import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from volumes import Damaged, Volume

import common


@dataclass
class Args:
    raw: str
    """folder with the downloaded and unpacked source data"""
    root: str = "data"
    """parent folder of all benchmarks; output is <root>/<benchmark>"""
    seed: Annotated[int, Ge(0)] = 0
    """seed for all random choices"""
    workers: Annotated[int | None, Ge(1)] = None
    """number of parallel processes (default: one per CPU core, fewer if memory is limited)"""
    strict: bool = False
    """stop at the first damaged file instead of skipping it"""
    allow_duplicates: bool = False
    """print a warning instead of stopping if an image or a patient appears in two splits, or an image in two classes"""


FREE = {"raw", "root", "workers", "strict", "allow_duplicates"}  # arguments that do not change the benchmark


# ------------------------------------------------------------------------------------------------------ the source
def raw_folder(args, looked_for):
    """Return args.raw as an absolute path; `Error` if it is not a folder. looked_for: expected contents in words."""
    raw = Path(args.raw).absolute()
    if not raw.is_dir():
        raise common.Error(f"no folder {raw}; give the folder that contains {looked_for} with --raw")
    return raw


def wrong_folder(raw, looked_for):
    """Raise an `Error` that names the expected and the actual contents of `raw`."""
    found = sorted(p.name + "/" * p.is_dir() for p in raw.iterdir() if p.name[0] != ".")
    more = f" and {len(found) - 6} more" * (len(found) > 6)
    raise common.Error(f"{raw} does not contain {looked_for}; found {', '.join(found[:6]) or 'nothing'}{more}; give "
                       "the unpacked source with --raw")


def note_file(files, case, kind, file):
    """Set files[case][kind] to the path `file` (str); raise `Error` with both paths if it is already set."""
    if (other := files.setdefault(case, {}).setdefault(kind, str(file))) != str(file):
        raise common.Error(f"{other} and {file} are both {case} ({kind}); keep only one of them in --raw")


def labelled(files, raw, volume, label):
    """Return {case: [volume file, label file or None]}, sorted by case, from {case: {kind: file}}. Skip unlabelled
    volumes in folders named test or validation, because challenges do not publish labels for these parts."""
    found, left = {}, []
    skipped([kinds[label] for kinds in files.values() if volume not in kinds], "labels without a volume")
    for case, kinds in sorted(files.items()):
        if volume in kinds:
            folders = Path(kinds[volume]).relative_to(raw).parts[:-1]
            if label in kinds or not any(UNLABELLED.search(folder) for folder in folders):
                found[case] = [kinds[volume], kinds.get(label)]
            else:
                left.append(kinds[volume])
    skipped(left, "volumes without label in folders of a test or validation part")
    return found


UNLABELLED = re.compile(r"(?<![a-z])(test|valid)|(images|labels)ts$", re.IGNORECASE)
VOLUME = r"\.(?:nii(?:\.gz)?|img)"  # NIfTI file extensions; an .img has its .hdr next to it


def skipped(files, what):
    if files:
        print(f"note: {len(files)} {what} are skipped, e.g. {files[0]}")


def stamp(file):
    """Return [size, modification time] of a file, and of an .img's .hdr; None if either is missing."""
    try:
        found = [os.stat(f) for f in [file, file[:-3] + "hdr"][: 1 + file.endswith(".img")]]
        return [number for state in found for number in (state.st_size, state.st_mtime_ns)]
    except OSError:
        return None


def strings(item):
    """Yield all strings in nested tuples, lists and dicts."""
    if isinstance(item, str):
        yield item
    elif isinstance(item, dict | list | tuple | set):
        for inner in item.values() if isinstance(item, dict) else item:
            yield from strings(inner)


# ------------------------------------------------------------------------------------------------------ reading files
def read_list(file, columns):
    """Read the rows of a CSV file as dicts; `Error` if it is missing or unreadable or lacks one of `columns`."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise common.Error(f"cannot read {file} ({getattr(e, 'strerror', None) or e}); give a CSV file with "
                           f"columns {', '.join(columns)}") from e
    if not rows or (missing := [c for c in columns if c not in rows[0] or any(r[c] is None for r in rows)]):
        lacks = f"lacks the column {missing[0]} or a value in it" if rows else "is empty"
        raise common.Error(f"{file} {lacks}; its columns must be {', '.join(columns)}")
    return rows


def read_split(file, cases, splits):
    """Read {case: split} from a CSV file with columns case,split; `Error` if a case is repeated or not in `cases`, or a
    split is not in `splits`."""
    found = {}
    for row in read_list(file, ["case", "split"]):
        case, split = row["case"], row["split"]
        if split not in splits:
            raise common.Error(f"{file}: {case} has split {split}: not one of {', '.join(splits)}")
        if case in found or case not in cases:
            raise common.Error(f"{file}: {case} {'appears twice' if case in found else 'is not in the source'}")
        found[case] = split
    return found


def read_grey(file):
    """Read an image as (H, W) uint8; `Damaged` if it cannot be used."""
    try:
        with Image.open(file) as image:
            image.verify()  # verifies a PNG's checksums, which decoding ignores
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise Damaged(f"{file} has pixels of mode {image.mode}, not 8-bit ones; download it again")
            return np.asarray(image.convert("L"))
    except Damaged:
        raise
    except Exception as e:  # Pillow raises many kinds of errors for damaged headers
        raise Damaged(f"{file} is not a readable image ({e}); download it again") from e


def volume_and_label(files):
    """Read [volume file, label file] as two `Volume`s of equal shape. If a label of the same size has another
    orientation and position, the volume's orientation is used for both, because some LiTS labels have lost theirs. If
    it covers the same box, only the order of its voxels differs, and it keeps its orientation."""
    if files[1] is None:
        raise Damaged(f"{files[0]} has no segmentation (label file); download it, too")
    volume, label = map(Volume, files)
    if not any(volume.image.header.get(code) for code in ("sform_code", "qform_code")):
        note("volume headers give no orientation; left, front, up is assumed: check the resulting images")
    turned = (label.axes, label.signs) != (volume.axes, volume.signs)
    if turned and label.image.shape[:3] == volume.image.shape[:3] and not np.allclose(
            corners(label.image), corners(volume.image), atol=0.5):  # mm
        note("labels have the size of their volumes but another orientation; the volume's is used")
        label.axes, label.signs, label.shape = volume.axes, volume.signs, volume.shape
    if volume.shape != label.shape:
        raise Damaged(f"{label.file} has {label.shape} voxels, its volume {volume.file} {volume.shape}; "
                      "download both again")
    return volume, label


def corners(image):
    """Return the minimum and maximum coordinates (2, 3) of a NIfTI image's voxel centres, in mm."""
    ends = np.indices((2, 2, 2)).reshape(3, 8).T * np.subtract(image.shape[:3], 1)  # (8, 3)
    ends = ends @ image.affine[:3, :3].T + image.affine[:3, 3]
    return np.array([ends.min(axis=0), ends.max(axis=0)])


# --------------------------------------------------------------------------------------- the work of one process
noted = []  # notes on the current case of this process


def note(text):
    """Add a note on the current case. At the end, each distinct note is printed with its number of cases."""
    noted.append(text)


def save(folder, split, label, name, image, mask=None, **columns):
    """Write a uint8 image (and a bool mask) as PNG and return its manifest row. label: 0 normal, 1 anomalous."""
    place, files = Path(split) / ("Ungood" if label else "good"), {}
    for kind, array in (("img", image), ("anomaly_mask", mask)):
        if array is not None:
            files[kind] = (place / kind / f"{name}.png").as_posix()
            array = array * np.uint8(255) if array.dtype == bool else array
            with common.atomic(folder / files[kind]) as tmp:
                Image.fromarray(array).save(tmp, "PNG")
    digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
    return dict(image=files["img"], mask=files.get("anomaly_mask", ""), split=split, label=label, **columns,
                sha256=digest)


def images_of(rows):
    """Return the image and mask files named in manifest rows."""
    return [row[kind] for row in rows for kind in ("image", "mask") if row.get(kind)]


def lost(rows, folder):
    """Return the files named in manifest rows that are missing from `folder` or empty."""
    return [file for file in images_of(rows)
            if not (folder / file).is_file() or not (folder / file).stat().st_size]


def worker():
    """Set up a worker process that ignores Ctrl-C and exits when its parent ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)  # nibabel and pydicom also log the errors that they raise
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def work_on(function, items, folder, kept):
    """Call function(item, folder) for `items` ({key: (item, asked)}); return ({key: (result, notes)}, {key: damage}).
    asked: a string that identifies the item and the state of its files. The JSON file `kept` stores each result and its
    `asked`. A result is reused if its `asked` is unchanged and its images exist."""
    try:
        known = json.loads(kept.read_text())
    except (OSError, ValueError):
        known = {}
    results, damaged = {}, {}
    for key, (item, asked) in items.items():
        before, result, notes = known.get(key, (None, None, None))
        rows = [row for row in (result if isinstance(result, list) else [result]) if isinstance(row, dict)]
        if before != asked or lost(rows, folder):
            noted.clear()
            try:
                result, notes = function(item, folder), list(noted)
            except Damaged as e:
                damaged[key] = str(e)
            except common.Error:  # a full disk
                raise
            except Exception as e:  # libraries raise many kinds of errors for damaged files
                read = ", ".join(s for s in strings(item) if os.path.isfile(s))
                damaged[key] = " ".join(f"{read or key} cannot be used ({type(e).__name__}: {e})".split())
            if key in damaged:
                continue
            known[key] = asked, result, notes
        results[key] = result, notes
    with common.atomic(kept) as tmp:
        tmp.write_text(json.dumps(known))
    return results, damaged


def correct_sum(item, folder):
    """Raise `Damaged` if the file does not have the published checksum. item: (file, checksum)."""
    file, published = item
    with open(file, "rb") as f:
        found = hashlib.file_digest(f, {32: "md5", 64: "sha256"}[len(published)]).hexdigest()
    if found != published:
        raise Damaged(f"{file} has the checksum {found} instead of the published {published}; download it again")


def published_sums(files):
    """Return {file: checksum} from the checksum lists among `files` (all files of the source). A checksum list is the
    output of md5sum or sha256sum."""
    sums = {}  # {name: {path as listed: checksum}}
    for file in files:
        if re.search("md5|sha256|checksum", file.name, re.IGNORECASE) and file.stat().st_size < 2**26:
            for line in file.read_text(errors="replace").splitlines():
                if match := re.fullmatch(r"\\?([0-9a-f]{64}|[0-9a-f]{32}) [ *](.+)", line.strip(), re.IGNORECASE):
                    path = match[2].removeprefix("./")
                    sums.setdefault(path.rsplit("/")[-1], {})[path] = match[1].lower()
    found = {}
    for file in files:
        listed = sums.get(file.name, {})
        same = [path for path in listed if file.as_posix().endswith("/" + path)] or list(listed)
        if len({listed[path] for path in same}) == 1:
            found[str(file)] = listed[same[0]]
    return found


# ---------------------------------------------------------------------------------------------------- the preparation
def locked(file, wait=False):
    """Create, open and lock `file`. The lock lasts until the file is closed. If another process holds it, wait or raise
    `Error`."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file, "w")  # noqa: SIM115 (the caller closes it)
    except OSError as e:
        raise common.Error(f"cannot write {file}: {e.strerror}; choose another --root") from e
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        raise common.Error(f"{file} cannot be locked ({e.strerror}): wait for the process that uses it, or choose "
                           "another --root") from e
    return lock


def free_memory():
    """Return the free memory in bytes, but at most the memory limit of this container or job."""
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        group = Path("/sys/fs/cgroup" + Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)[2])
    except (OSError, TypeError, IndexError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limits = [place / "memory.max" for place in (group, *group.parents)]
    return min([free, *(int(f.read_text()) for f in limits if f.exists() and f.read_text().strip().isdecimal())])


class Preparation:
    """Prepare a benchmark, or a part of it, from one source. Exit if the part already exists."""

    def __init__(self, source, benchmark, splits, args, files, memory):
        """source: name of the script; splits: the splits of `benchmark` that it writes; files: nested containers with
        the source's files, whose names, sizes and times are recorded; memory: GiB per process."""
        self.source, self.splits, self.args, self.memory = source, splits, args, memory
        self.folder, self.work = Path(args.root) / benchmark, Path(args.root) / f".preparing-{source}"
        self.part, self.record = self.work / "part", self.folder / f"{source}.json"
        self.damaged, self.notes = {}, {}
        # Lists are recorded by their content, because an edited list defines another benchmark.
        self.asked = {k: [common.sha256(f) for f in sorted([v, *v.glob("[!.]*")]) if f.is_file()] if isinstance(v, Path)
                      else v for k, v in dataclasses.asdict(args).items() if k not in FREE}
        raw = str(raw_folder(args, source))
        self.stamps = {s: stamp(s) for s in strings(files) if s.startswith(raw + os.sep)}
        self.files = {os.path.relpath(file, raw): state for file, state in self.stamps.items()}
        self.lock = locked(self.work / "lock")
        self._mend()
        if self.record.exists():
            self._finished()
        if there := [s for s in splits if (self.folder / s).exists()]:
            raise common.Error(f"{self.folder / there[0]} exists but was not made by this script; choose "
                               f"another --root")
        begun = self._read(self.work / "begun.json", dict(arguments=self.asked, files=self.files))
        if begun["arguments"] != self.asked:
            raise common.Error(f"{self.work} was started with other arguments; remove it, or choose another --root")
        if changed := self._changed(begun["files"]):
            print(f"note: the source has changed: {changed}; the affected images are written again")
        with common.atomic(self.work / "begun.json") as tmp:
            tmp.write_text(json.dumps(dict(arguments=self.asked, files=self.files)))

    @staticmethod
    def _read(file, default):
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return default
        except (OSError, ValueError) as e:
            raise common.Error(f"{file} is damaged ({e}); remove its folder and prepare it again") from e

    def _changed(self, before):
        """Describe in words how the source has changed. before: {file: [size, time]}."""
        lists = {"changed": [f for f in before if f in self.files and before[f] != self.files[f]],
                 "are missing": sorted(before.keys() - self.files.keys()),
                 "are new": sorted(self.files.keys() - before.keys())}
        return " and ".join(f"{len(files)} of its files {how} (e.g. {files[0]})"
                            for how, files in lists.items() if files)

    def _finished(self):
        """Exit if the existing part matches the arguments and the source; otherwise raise `Error`."""
        shutil.rmtree(self.work)
        made, again = self._read(self.record, {}), "remove it and prepare it again, or choose another --root"
        if made.get("arguments") != self.asked or "files" not in made:
            raise common.Error(f"{self.folder} was made from {self.source} with other arguments "
                               f"({made.get('arguments')}) or by another version; {again}")
        if changed := self._changed(made["files"]):
            raise common.Error(f"{self.folder} was made from a source other than {self.args.raw}: {changed}; {again}")
        if missing := lost(read_list(self.record.with_suffix(".csv"), ["image", "mask"]), self.folder):
            raise common.Error(f"{self.folder} lacks {len(missing)} of its images, e.g. {missing[0]}; {again}")
        print(f"{self.folder} already exists and was made from {self.source} with these arguments; nothing to do")
        self.notes = {text: range(count) for text, count in made["notes"].items()}
        self._end(made["damaged"])

    def map(self, function, items, what, chunk=1):
        """Call function(item, folder) for `items` ({key (str): item}) in worker processes; return {key: result} in the
        same order. Damaged items are reported and left out. function: a module-level function that returns JSON values
        and writes images with `save`. chunk: number of items per task; the results of a task are stored in one file."""
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        count = self.args.workers or max(1, min(cores, int(free_memory() / 2**30 / self.memory)))
        results, keys = {}, list(items)
        asked = {key: (items[key], json.dumps([items[key], [self.stamps.get(s) for s in strings(items[key])]]))
                 for key in keys}
        chunks = [{key: asked[key] for key in keys[i : i + chunk]} for i in range(0, len(keys), chunk)]
        try:
            for done in self._work(function, chunks, what, count):
                results |= done
        except BrokenProcessPool:  # a case crashed the process, or memory was too low for several
            print(f"note: a process died while {what}; the remaining cases are processed one by one", flush=True)
            for key in [key for some in chunks if not some.keys() & (results.keys() | self.damaged) for key in some]:
                try:
                    for done in self._work(function, [{key: asked[key]}], what, 1):
                        results |= done
                except BrokenProcessPool:
                    read = ", ".join(s for s in strings(items[key]) if s in self.stamps)
                    self.damage(key, f"{read or key} cannot be used (the process that read it died: out of memory, or "
                                     "a crash in a library); download it again")
        if not results:
            raise common.Error(f"{self.args.raw}: nothing could be read; see the damaged files above")
        for key, (_, notes) in results.items():
            for text in notes:
                self.notes.setdefault(text, set()).add(key)
        return {key: results[key][0] for key in keys if key in results}

    def _work(self, function, chunks, what, count):
        """Yield {key: (result, notes)} for each chunk, in order."""
        # Forked processes share imported modules (PyTorch takes 300 MB). Forking is safe on Linux only.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        with ProcessPoolExecutor(min(count, max(1, len(chunks))), context, worker) as pool:
            found = [pool.submit(work_on, function, some, self.part, self.work / what / f"{next(iter(some))}.json")
                     for some in chunks]
            try:
                for future in common.progress(found, f"{self.source}: {what}"):
                    done, damaged = future.result()
                    for key, why in damaged.items():
                        self.damage(key, why)
                    yield done
            finally:
                pool.shutdown(cancel_futures=True)

    def damage(self, key, why):
        """Print a damaged item, and store it for the list at the end."""
        print(f"damaged: {why}", file=sys.stderr, flush=True)
        self.damaged[key] = why
        if self.args.strict:
            raise common.Error("stopped at the first damaged file (--strict)")

    def plan(self, counts, published):
        """Print counts that differ from the published ones; raise `Error` if train or test would lack a class.

        counts, published: {(split, label): number of images}."""
        other = []
        for (split, label), wanted in published.items():
            kind, count = ("normal", "anomalous")[label], counts.get((split, label), 0)
            if not count and split != "valid":  # a benchmark can be used without valid, with a warning
                raise common.Error(f"no {kind} image for {split}: the source has too few usable cases")
            other += [f"{split} {count} {kind} instead of {wanted}"] * (count != wanted)
        if other:
            print(f"note: other counts than published: {', '.join(other)}", flush=True)

    def finish(self, rows, published):
        """Check the splits, print the counts next to the published ones, write the manifest and make the part visible.

        rows: from `save`, with a column `case`; published: {(split, label): count}. The exit status is 1 if any
        file was damaged."""
        rows = sorted(rows, key=lambda r: (self.splits.index(r["split"]), r["label"], r["image"]))
        with locked(Path(self.args.root) / ".lock", wait=True):  # the two scripts for liver check each other's images
            self._check(rows)
            counts = Counter((r["split"], r["label"]) for r in rows)
            for split in self.splits:
                for label, name in enumerate(("normal", "anomalous")):
                    if (split, label) in published or counts[split, label]:
                        print(f"{split:<5} {name:<9} {counts[split, label]:>6}   published "
                              f"{published[split, label]:>6}")
            for split, label in published:
                if not counts[split, label] and split != "valid":
                    raise common.Error(f"no {('normal', 'anomalous')[label]} image for {split}: the source has too few "
                                       "usable cases")
            self._complete(rows)
            self._publish()
        shutil.rmtree(self.work)
        print(f"{self.folder}: {len(rows)} images from {len({r['case'] for r in rows})} cases")
        self._end(self.damaged)

    def _check(self, rows):
        """Raise `Error` (with --allow-duplicates, print a warning) if a case or an image is in two splits, or an image
        in two classes."""
        lists = [f for f in sorted(self.folder.glob("[!.]*.csv")) if f.with_suffix(".json").exists()]  # manifests only
        others = [r for f in lists for r in read_list(f, ["image", "split", "label", "sha256"])]
        for what, everything in (("case", rows), ("sha256", rows + others)):
            seen, own = {}, ("split", "label")[: 1 + (what == "sha256")]  # a case may have images of both classes
            if crossing := [(first, row) for row in everything if any(
                    str((first := seen.setdefault(row[what], row))[key]) != str(row[key]) for key in own)]:
                first, row = crossing[0]
                line = (f"{len(crossing)} images are in two splits or classes: {first['image']} and {row['image']} are "
                        + ("the same image" if what == "sha256" else f"both of {row['case']}"))
                if not self.args.allow_duplicates:
                    raise common.Error(f"{line}; clean the source, or accept it with --allow-duplicates (finished "
                                       "work is kept)")
                print(f"warning: {line}", file=sys.stderr)

    def _complete(self, rows):
        """Delete all files in self.part except the images and masks of `rows`, and write their manifest."""
        if missing := lost(rows, self.part):
            raise common.Error(f"{self.part / missing[0]} and {len(missing) - 1} more disappeared while this script "
                               "ran; run it again")
        planned = set(images_of(rows))
        for place, folders, names in os.walk(self.part, topdown=False):
            for file in [Path(place, name) for name in names]:  # left by an earlier plan or an interrupted write
                if file.relative_to(self.part).as_posix() not in planned:
                    file.unlink()
            for folder in folders:
                if not any(Path(place, folder).iterdir()):
                    Path(place, folder).rmdir()
        common.write_csv(self.part / f"{self.source}.csv", rows)
        with common.atomic(self.part / f"{self.source}.json") as tmp:
            tmp.write_text(json.dumps(dict(
                arguments=self.asked, damaged=self.damaged, files=self.files,
                notes={text: len(keys) for text, keys in self.notes.items()})))

    def _publish(self):
        """Make the part visible by a single rename. If the folder already holds another script's part, hide the folder,
        add this part and move the folder back, so that a visible folder is always complete."""
        whole = self.work / "whole"
        try:
            if not self.folder.exists():
                os.rename(self.part, self.folder)
                return
            os.rename(self.folder, whole)
            for entry in sorted(self.part.iterdir()):
                os.rename(entry, whole / entry.name)
            os.rename(whole, self.folder)
        except OSError as e:
            raise common.Error(f"cannot move {self.part} to {self.folder}: {e}; run it again, or choose another "
                               "--root") from e

    def _mend(self):
        """Undo the changes of a run that was killed during `_publish`."""
        whole = self.work / "whole"
        if whole.exists():
            self.part.mkdir(exist_ok=True)
            for entry in [whole / name for name in (*self.splits, f"{self.source}.csv", f"{self.source}.json")]:
                if entry.exists():
                    os.rename(entry, self.part / entry.name)
            if self.folder.exists():  # the folder was made again in the meantime
                shutil.rmtree(whole)
            else:
                os.rename(whole, self.folder)

    def _end(self, damaged):
        for text, keys in self.notes.items():
            print(f"note: {len(keys)} {text}")
        if damaged:
            listed = [*damaged.values()][:20] + [f"and {len(damaged) - 20} more, see above"] * (len(damaged) > 20)
            print(f"made without {len(damaged)} damaged items: {'; '.join(listed)}. Replace these, remove "
                  f"{self.folder} and prepare it again", file=sys.stderr)
        raise SystemExit(1 if damaged else 0)


def shares(total, counts):
    """Divide `total` cases in proportion to `counts` (largest remainder method), with at least one each."""
    exact = np.array(counts) * total / sum(counts)
    found = np.maximum(1, np.floor(exact)).astype(int)
    while found.sum() != total:
        step = 1 if found.sum() < total else -1
        gap = np.where((found > 1) | (step > 0), step * (exact - found), -np.inf)
        found[int(np.argmax(gap))] += step
    return found.tolist()


def divide(counts, wanted, seed):
    """Choose cases from `counts` ({case: (normal, anomalous)}) so that their image counts come as close as
    possible to `wanted` (normal, anomalous). Cases are tried in a random order (`seed`). The other cases always have
    images of both classes, and so do the chosen ones if possible. Return [] if no case can be chosen."""
    total = np.sum(list(counts.values()), axis=0).tolist()
    names = sorted(counts)
    reached = {(0, 0): None}  # {sum over some cases: (sum without the last case, the last case)}
    best, nearest = (True, float("inf")), (0, 0)  # (a class is missing, distance)
    for case in [names[i] for i in np.random.default_rng(seed).permutation(len(names))]:
        for before in list(reached):
            after = before[0] + counts[case][0], before[1] + counts[case][1]
            excess = max(0, after[0] - wanted[0]) + max(0, after[1] - wanted[1])  # more cases can only increase it
            if after in reached or after[0] >= total[0] or after[1] >= total[1] or (False, excess) >= best:
                continue
            reached[after] = before, case
            distance = 0 in after, abs(after[0] - wanted[0]) + abs(after[1] - wanted[1])
            if distance < best:
                best, nearest = distance, after
        if best == (False, 0):
            break
    chosen = []
    while reached[nearest] is not None:
        nearest, case = reached[nearest]
        chosen.append(case)
    return sorted(chosen)
