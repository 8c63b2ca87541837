"""Report on runs: `python report.py runs` prints a table for each benchmark and writes <runs>/report/.

The script reads every finished run <runs>/<data>/<method>/seed<k>/ (results.json, scores.csv, curves.csv, log.csv,
lesions.csv, browser/). It writes index.html (which loads test images from the run folders on demand), report.md,
report.tex, report.csv (unrounded means and standard deviations), pvalues.csv and the figures as SVG. A row shows the
thesis' results (methods/published.csv) only if all its runs have the published settings, trained weights and the
published number of images.

Intervals and tests of image AUROC describe the variation over test images for fixed trained networks; the standard
deviation describes the variation over seeds. An AUROC is the mean placement of the images. The placement of an image is
the fraction of the other class that is ranked correctly against it. Placements are averaged over seeds, so that their
mean is the seeds' mean AUROC, and intervals and tests refer to the value in the table. Scores of different seeds are
never mixed. Intervals are percentiles of a bootstrap that resamples normal and anomalous placements with replacement.
P-values are from DeLong's paired test (1988). If file names identify patients (datasets/check.py), the bootstrap
resamples patients instead of images, and the test is Obuchowski's (1997), which groups the images of each patient."""

import csv
import fcntl
import itertools
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import jinja2
import numpy as np
import tyro
from matplotlib import colormaps
from scipy.stats import rankdata

import common

sys.path.insert(1, str(Path(__file__).with_name("datasets")))
from check import PUBLISHED

METRICS = {  # {name in results.json: column heading}
    "image_auroc": "Image AUROC", "image_ap": "Image AP", "pixel_auroc": "Pixel AUROC", "pixel_ap": "Pixel AP",
    "aupro": "PRO", "dice": "Dice", "dice_valid": "Dice (valid)",
}
DECISIONS = {
    "sensitivity_at_90": "Sens. at 90% spec.", "sensitivity_at_95": "Sens. at 95% spec.",
    "sensitivity": "Sensitivity", "specificity": "Specificity", "f1": "F1", "balanced_accuracy": "Balanced acc.",
    "sensitivity_f1": "Sensitivity (F1)", "specificity_f1": "Specificity (F1)", "f1_f1": "F1 (F1)",
    "balanced_accuracy_f1": "Balanced acc. (F1)",
}
SIZES = {"pro_small": "Small", "pro_medium": "Medium", "pro_large": "Large"}  # from lesions.csv
COSTS = {"train_seconds": "Training, s", "ms": "Test, ms/image", "ram_gib": "Peak RAM, GiB",
         "gpu_gib": "Peak GPU memory, GiB"}
MARKS = {
    "u": "untrained weights: the result only shows that the code runs",
    "l": "limited number of images per split and class",
    "c": "settings differ from the published ones",
    "d": "settings differ between seeds",
    "f": "image files differ from those of other runs (names, sizes or dates)",
}
NOT_COMPARED = {  # no difference is shown, because the thesis uses another method or metric
    "ddpm": "ddpm: this is AnoDDPM, but the thesis cites another method (Wolleb et al. 2022)",
    "winclip": "winclip: the thesis gives neither text prompts nor an image size, so we chose our own",
    "clip_zeroshot": "clip_zeroshot: the thesis gives neither text prompts nor an image size, so we chose our own",
    "dice": "Dice: Table 3.11 uses the threshold with the best F1 on test (MKD: each map has its own scale); we use "
            "the middle of the range of all maps (Dice, Eq. 3.3) or the best threshold on valid (Dice (valid))",
}
IMAGES = {name: [(train, normal, anomalous)] for name, (train, _, _, normal, anomalous) in PUBLISHED.items()}
IMAGES["histo"].append((5088, 1026, 1008))  # counts with the authors' coordinates
OURS = {  # variants in the thesis' Tables 4.1 to 4.4: {variant: (name in published.csv, method, changed settings)}
    "base": ("clip_recon", "clip_recon", {}),
    "da-levels 0": ("clip_recon (ViT, no DA)", "clip_recon", dict(da_levels=0)),
    "backbone resnet18": ("clip_recon (ResNet-18, DA)", "clip_recon", dict(backbone="resnet18")),
    "backbone resnet50": ("clip_recon (ResNet-50, DA)", "clip_recon", dict(backbone="resnet50")),
}
NUMBER = (int, float)
NEEDED = dict(method=str, metrics=dict, counts=dict, train_seconds=NUMBER, test_ms_per_image=(*NUMBER, type(None)),
              notes=dict, peak_memory_gib=dict, weights=list, args=dict, changed=dict, device=str, decision=dict,
              versions=dict, threads=int, commit=str, finished=str, images=str, seed=int,
              epoch=(int, type(None)), check=(dict, type(None)))  # required keys of results.json
DECIDED = {"from": str, "image": (*NUMBER, type(None)), "map_range": (list, type(None)), "normal_scores": list,
           "pixel": (*NUMBER, type(None))}
DRAWS = 2000  # bootstrap samples of the test images
UNDECIDED = {"from": "nothing", "image": None, "map_range": None, "normal_scores": [], "pixel": None}  # no decisions.py
RATES = np.concatenate([np.linspace(0, 0.1, 61), np.linspace(0.1, 1, 91)[1:]])  # false positive rates of the curves
LEVELS = [f"fpr_{0.015 * i:.3f}" for i in range(1, 21)]  # columns of lesions.csv
LABELLED, HUES = 5, 8  # number of labelled curves, number of colours

TEMPLATES = Path(__file__).with_name(".report")
ENV = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
                         autoescape=lambda name: name.endswith((".html", ".svg")), undefined=jinja2.StrictUndefined)
DRAW, WORDS = ENV.get_template("figures.svg").module, ENV.get_template("words.txt").module  # the macros in them


@dataclass
class Args:
    runs: Annotated[str, tyro.conf.Positional] = "runs"
    """folder with the runs (their --out)"""
    table: bool = False
    """only print the rows of the results table in README.md"""


# ----------------------------------------------------------------------------------------------------- reading the runs
def read_runs(folder, root):
    """Read {(data, method): [results, ...]} of all finished runs, sorted by seed, and {(data, method): {seed: state}}
    of unfinished ones."""
    runs, others = defaultdict(list), defaultdict(dict)
    places = [p for p in Path(folder).glob("*/*/seed*") if re.fullmatch(r"seed\d+", p.name) and p.is_dir()]
    for place in sorted(places, key=lambda p: (p.parts[:-1], int(p.name[4:]))):
        data, method, seed = place.parts[-3:]
        if (place / "results.json").exists():
            runs[data, method].append(read_run(place / "results.json", root))
        elif not (place / "predict.json").exists():
            others[data, method][seed] = state_of(place)
    shown = {data for data, _ in runs} | set(sum(common.NAMES.values(), []))  # other folders are from --predict
    return dict(sorted(runs.items())), {key: found for key, found in others.items() if key[0] in shown}


def read_run(file, root):
    """Read results.json of a finished run. root: the folder with all runs, for links from the report."""
    try:
        results = common.read_results(file)
        if wrong := [k for k, kind in NEEDED.items() if not isinstance(results[k], kind)]:
            raise TypeError(f"{wrong[0]} is {results[wrong[0]]!r}")
        costs = dict(train_seconds=results["train_seconds"], ms=results["test_ms_per_image"] or math.nan)  # no test
        results["costs"] = costs | {f"{k}_gib": float(v) for k, v in results["peak_memory_gib"].items()}
        wrong = {k: v for k, v in results["metrics"].items() if not (v is None or 0 <= v <= 1)}
        wrong |= {k: v for k, v in results["costs"].items() if math.isinf(v)}
        for name, value in wrong.items():
            raise ValueError(f"{name} is {value}")
        results["decision"] = results["decision"] or UNDECIDED
        if wrong := [k for k, kind in DECIDED.items() if not isinstance(results["decision"][k], kind)]:
            raise TypeError(f"decision: {wrong[0]} is {results['decision'][wrong[0]]!r}")
        if file.parent.name != f"seed{results['seed']}":
            raise ValueError(f"its seed is {results['seed']}; was the folder renamed or copied?")
        np.array(results["decision"]["normal_scores"], float), sum(sum(c.values()) for c in results["counts"].values())
        results["metrics"] = {m: results["metrics"].get(m) for m in METRICS | DECISIONS}
        as_published(None, results["method"], [results], {}), marks([results], {""}), "" + check_line(results)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
        what = f"no {e}" if isinstance(e, KeyError) else e
        raise common.Error(f"{file} is not a run's results ({what}); remove it, or run that method again") from e
    results |= dict(folder=file.parent, link=quote(f"../{file.parent.relative_to(root).as_posix()}/"))
    results["metrics"] |= read_lesions(file.with_name("lesions.csv"))
    return results


def state_of(folder):
    """Describe the state of a run without results. A running process holds a lock on the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        state = "unfinished" if (folder / "resume.pt").exists() else "failed"
    except BlockingIOError:
        state = "running"
    os.close(descriptor)
    epochs = [row["epoch"] for row in read_log(folder / "log.csv")]
    return state + (f" after epoch {epochs[-1]:g}" if epochs else "")


def read_ablation(folder):
    """Read {(data, variant): [results, ...]} of `bash run_all.sh ablation`. Variants are named after flag and value."""
    found = {}
    for variant in sorted(Path(folder).glob("ablation/*"), key=lambda variant: (variant.name != "base", variant.name)):
        for (data, _), results in read_runs(variant, folder)[0].items():
            found[data, variant.name.replace("_", " ")] = results
    return dict(sorted(found.items(), key=lambda kv: kv[0][0]))


def read_published():
    """Read {(method, benchmark, metric): row} from methods/published.csv, skipping rows without a number."""
    with open(Path(__file__).parent / "methods/published.csv", newline="") as f:
        return {(r["method"], r["benchmark"], r["metric"]): r for r in csv.DictReader(f) if r["mean"]}


def read_columns(file, **kinds):
    """Read the columns of a CSV file. kinds: their names and types (str or float). `Error` if they do not match."""
    try:
        with open(file, newline="") as f:
            rows = csv.reader(f)
            if (header := next(rows, [])) != list(kinds):
                raise ValueError(f"its first line is {','.join(header)[:200]!r}")
            columns = list(zip(*rows, strict=True))
        if not columns:
            raise ValueError("it has no rows")
        columns = [c if kind is str else np.array(c, float) for c, kind in zip(columns, kinds.values(), strict=True)]
        if not all(np.isfinite(c).all() for c, kind in zip(columns, kinds.values(), strict=True) if kind is float):
            raise ValueError("a number is not finite")
        return columns
    except (OSError, ValueError, csv.Error) as e:
        raise common.Error(f"{file} cannot be read ({e}); expected the columns {','.join(kinds)[:200]}; run that "
                           f"method again") from e


def read_log(file):
    """Read [{name: number}, ...] from log.csv, skipping empty cells; [] if the file does not exist."""
    try:
        with open(file, newline="") as f:
            return [dict(epoch=float(row["epoch"])) | {k: float(v) for k, v in row.items() if v}
                    for row in csv.DictReader(f)]
    except FileNotFoundError:
        return []
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as e:
        raise common.Error(f"{file} cannot be read ({e}); run that method again") from e


def read_lesions(file):
    """Return the PRO of small, medium and large lesions (`SIZES`: thirds by area) and both area limits in pixels; {} if
    the file does not exist. The PRO is computed from the overlap at 20 false positive rates up to 30%."""
    if not file.exists():
        return {}
    kinds = dict(path=str, lesion=str, area=float, overlap=str) | dict.fromkeys(LEVELS, float)
    _, _, area, _, *overlap = read_columns(file, **kinds)
    overlap = np.array([np.zeros(len(area)), *overlap])  # (21, L), starting at a false positive rate of 0
    pro = (overlap[1:] + overlap[:-1]).mean(axis=0) / 2  # (L,), trapezoidal rule divided by 0.3
    edges = np.quantile(area, [1 / 3, 2 / 3])
    third = np.searchsorted(edges, area)
    found = {name: float(pro[third == i].mean()) if (third == i).any() else None for i, name in enumerate(SIZES)}
    return found | dict(lesions=len(area), small_to=edges[0], medium_to=edges[1])


@dataclass
class Scores:
    """Scores of a method for S seeds and N test images."""
    anomalous: np.ndarray  # (N,)
    scores: np.ndarray  # (S, N)
    placements: np.ndarray  # (S, N)
    paths: tuple
    patients: np.ndarray | None  # (N,) patient numbers, or None if file names do not identify patients

    @property
    def share(self):
        return self.placements.mean(axis=0)


def read_scores(results, known):
    """Read `Scores` from scores.csv; None if a file or a class is missing, or if seeds have different images.

    known: a cache ({(paths, labels): ...}) that makes equal lists of images the same object."""
    scores, placements, seen = [], [], set()
    for r in results:
        if not (file := r["folder"] / "scores.csv").exists() or "test" not in r["counts"]:
            return None
        paths, labels, values = read_columns(file, path=str, label=str, score=float)
        if (paths, labels) not in known:
            known[paths, labels] = paths, np.array([label == "1" for label in labels]), patients_of(paths)
        paths, anomalous, patients = known[paths, labels]
        seen.add(id(paths))
        if anomalous.all() or not anomalous.any() or len(seen) > 1:
            return None
        scores.append(values)
        placements.append(placement(anomalous, values))
        auroc, told = placements[-1][anomalous].mean(), r["metrics"]["image_auroc"]
        if told is None or abs(auroc - told) > 1e-6:
            raise common.Error(f"{file} gives image AUROC {auroc:.6f}, but results.json {told}; run that "
                               f"method again")
    return Scores(anomalous, np.array(scores), np.array(placements), paths, patients)


def patients_of(paths):
    """Return the patient number of each image (N,), or None unless all file names identify a patient."""
    patients = [common.patient(path) for path in paths]
    return np.unique(patients, return_inverse=True)[1] if all(patients) else None


# --------------------------------------------------------------------------------------------- intervals and tests
def placement(anomalous, scores):
    """Return the fraction of the other class ranked correctly against each image (N,); ties are half (DeLong 1988)."""
    rank, share = rankdata(scores), np.empty(len(scores))
    for these in (anomalous, ~anomalous):  # fraction of the other class with a lower rank
        share[these] = (rank[these] - rankdata(scores[these])) / (~these).sum()
    return np.where(anomalous, share, 1 - share)


@lru_cache(maxsize=4)  # methods with the same images share samples
def resample(units, stream):
    """Return how often each unit occurs in each bootstrap sample (units, DRAWS). stream: part of the random seed."""
    rng, times = np.random.default_rng([stream, units]), np.empty((units, DRAWS), np.float32)
    for i in range(DRAWS):
        times[:, i] = np.bincount(rng.integers(units, size=units), minlength=units)
    return times


def interval(anomalous, share, patients=None):
    """Return the 95% bootstrap interval (low, high) of the AUROC, which is the mean of the placements `share` (N,).

    Return (None, None) if a class has only one image (or patient) or all samples are equal (perfect separation)."""
    auroc = -share[anomalous].mean()
    for stream, these in enumerate((anomalous, ~anomalous)):
        unit = np.arange(these.sum()) if patients is None else patients[these]
        if len(set(unit)) < 2:
            return None, None
        drawn = resample(len(unit), stream) if patients is None else resample(patients.max() + 1, 2)
        total, count = (np.bincount(unit, weights, len(drawn)).astype(np.float32)
                        for weights in (share[these], None))
        with np.errstate(invalid="ignore"):  # a sample of patients may lack a class
            auroc = auroc + (total @ drawn) / (count @ drawn)  # the AUROC is the mean over either class
    low, high = np.nanquantile(auroc.clip(0, 1), [0.025, 0.975])
    return (float(low), float(high)) if high - low > 1e-6 else (None, None)


def p_value(anomalous, first, second, patients=None):
    """Return the two-sided p-value for equal AUROC of two methods, from their placements (N,) on the same images."""
    difference = first - second
    delta = difference[anomalous].mean()
    if min(anomalous.sum(), (~anomalous).sum()) < 2 or abs(delta) < 1e-12:  # a single image has no variance
        return 1.0
    if patients is None:
        var = sum(difference[c].var(ddof=1) / c.sum() for c in (anomalous, ~anomalous))
    else:
        part = sum(np.bincount(patients[c], difference[c] - delta, patients.max() + 1) / c.sum()
                   for c in (anomalous, ~anomalous))  # (patients,)
        var = (part**2).sum() * len(part) / (len(part) - 1)
    return math.erfc(abs(delta) / math.sqrt(2 * var)) if var > 0 else 0.0


def holm(p_values):
    """Return the pairs of {pair: p} that differ at 5% (Holm 1979: smallest p at 5%/n, then 5%/(n - 1), and so on)."""
    held = set()
    for i, (pair, p) in enumerate(sorted(p_values.items(), key=lambda kv: kv[1])):
        if p > 0.05 / (len(p_values) - i):
            break
        held.add(pair)
    return held


@dataclass
class Comparison:
    """Pairwise comparison of the methods on a benchmark. Methods whose images differ from most are left out."""
    auroc: dict  # {method: image AUROC}, descending
    p_values: dict  # {(better, worse): p}
    held: set  # pairs that differ at 5% after Holm's correction
    left_out: list

    def alike(self, best):
        """Return `best` and the methods that do not differ from it significantly."""
        return {m for m in self.auroc if m == best or not {(best, m), (m, best)} & self.held}


def compare(data, scores):
    known = {m: s for (d, m), s in scores.items() if d == data and s}
    most = Counter(id(s.paths) for s in known.values()).most_common(1)
    same = {m: s for m, s in known.items() if id(s.paths) == most[0][0]}
    share = {m: s.share for m, s in same.items()}
    auroc = {m: float(share[m][s.anomalous].mean()) for m, s in same.items()}
    order = sorted(same, key=lambda m: -auroc[m])
    p_values = {(a, b): p_value(same[a].anomalous, share[a], share[b], same[a].patients)
                for a, b in itertools.combinations(order, 2)}
    left_out = sorted({m for d, m in scores if d == data} - set(same)) if same else []
    return Comparison({m: auroc[m] for m in order}, p_values, holm(p_values), left_out)


# ---------------------------------------------------------------------------------------------------------------- rows
def marks(results, changed):
    untrained = any(not w["trained"] for r in results for w in r["weights"])
    limited = any(r["args"]["limit"] for r in results)
    return "u" * untrained + "l" * limited + "c" * any(changed) + "d" * (len(changed) > 1)


def check_line(results):
    """Return the summary of datasets/check.py for the images of a run."""
    return results["check"]["summary"] if results["check"] else "not run on these images"


def as_published(data, method, results, changed):
    """Return True if all runs have trained weights and the thesis' method, number of images and settings.
    changed: settings in which the thesis' variant differs from the defaults."""
    def counts(r):
        test = r["counts"].get("test", dict(normal=None, anomalous=None))
        return r["counts"]["train"]["normal"], test["normal"], test["anomalous"]

    def resolved(r):  # with trained weights, auto means the published ones
        trained = all(w["trained"] for w in r["weights"])
        return trained and {k: v for k, v in r["changed"].items() if v != "auto"} == changed

    return all([r["method"] == method and resolved(r) and r["args"]["limit"] is None and
                counts(r) in IMAGES.get(data, []) for r in results])


def flags(changed):
    """Format {argument: value} as command-line flags."""
    return [f"--{k.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, list) else v}"
            for k, v in changed.items()]


def benchmark_of(data):
    return next((name for name, folders in common.NAMES.items() if data.lower() in folders), None)


def rows_of(runs, scores, published):
    """Return a dict per benchmark and method: names, marks, seeds, mean and standard deviation (n - 1) of each metric,
    image AUROC of each seed, interval of the mean image AUROC, and the thesis' results."""
    rows, files = [], defaultdict(Counter)  # {benchmark: {fingerprint of its files: number of runs}}
    for (data, _), results in runs.items():
        files[data].update(r["images"] for r in results)
    for (data, method), results in runs.items():
        changed = {" ".join(flags(r["changed"])) for r in results}
        other = {r["images"] for r in results} != {files[data].most_common(1)[0][0]}
        row = dict(data=data, method=method, marks=marks(results, changed) + "f" * other, seeds=len(results),
                   folder=results[0]["link"].rsplit("/", 2)[0],  # relative to the report
                   changed=" | ".join(sorted(changed)), check=" | ".join(sorted({check_line(r) for r in results})),
                   device=" | ".join(sorted({f"{r['device']}, {r['threads']} threads" for r in results})))
        for name in [*METRICS, *DECISIONS, *SIZES, *COSTS]:
            values = [(r["metrics"] | r["costs"]).get(name) for r in results]
            known = [v for v in values if v is not None]
            row[name] = float(np.mean(known)) if known else None
            row[f"{name}_std"] = float(np.std(known, ddof=1)) if len(known) > 1 else None
        row |= {f"seed{r['seed']}": r["metrics"]["image_auroc"] for r in results}
        row |= {name: results[0]["metrics"].get(name) for name in ("lesions", "small_to", "medium_to")}
        s = scores[data, method]
        low, high = interval(s.anomalous, s.share, s.patients) if s else (None, None)
        row |= dict(image_auroc_low=low, image_auroc_high=high,
                    interval_by="patients" if s and s.patients is not None else "images")
        printed, script, setting = OURS.get(method, (method, method, {}))
        same = as_published(benchmark_of(data), script, results, setting)
        for metric in METRICS:
            found = published.get((printed, benchmark_of(data), metric), {}) if same else {}
            for name in ("mean", "std"):
                row[f"{metric}_thesis_{name}"] = float(found[name]) / 100 if found else None
            row[f"{metric}_thesis_note"] = found["note"] if found.get("suspect") else ""
        rows.append(row)
    return rows


def fair(row):
    """Return True if no run of the row is untrained, on fewer images, or on other images than the other rows."""
    return not {"u", "l", "f"} & set(row["marks"])


def best_of(rows, metric):
    """Return the row with the highest value, preferring fair rows; None if no row has a value."""
    known = [r for r in rows if r[metric] is not None]
    return max(known, key=lambda r: (fair(r), r[metric]), default=None)


# -------------------------------------------------------------------------------------------------------------- tables
@dataclass
class Cell:
    text: str
    value: float | None = None  # sort key of the column
    bold: bool = False
    signs: str | list = ""  # keys of MARKS
    link: str = ""
    title: str = ""
    shade: float | None = None  # in [0, 1]
    span: list | None = None  # low, point and high of an interval to plot, in [0, 1]

    def __str__(self):
        return self.text + "".join(f" ({k})" for k in self.signs)


Table = namedtuple("Table", "name caption header lines")  # each line is a list of Cells


def text_of(row, name, scale=100, digits=2):
    if row.get(name) is None:
        return "-"
    deviation = row.get(f"{name}_std")
    return f"{scale * row[name]:.{digits}f}" + (f" ± {scale * deviation:.{digits}f}" if deviation is not None else "")


def thesis_cell(row, metric):
    """Return the thesis' value, with a question mark if suspect, and the difference (ours minus thesis) in brackets."""
    if row[f"{metric}_thesis_mean"] is None:
        return Cell("-")
    mean, deviation = 100 * row[f"{metric}_thesis_mean"], 100 * row[f"{metric}_thesis_std"]
    compared = row[metric] is not None and not {row["method"], metric} & NOT_COMPARED.keys()
    ours = f" ({100 * row[metric] - mean:+.2f})" if compared else ""
    return Cell(f"{mean:.2f} ± {deviation:.2f}{'?' * bool(row[f'{metric}_thesis_note'])}{ours}", mean)


def interval_cell(row, rows):
    low, point, high = (row[f"image_auroc{end}"] for end in ("_low", "", "_high"))
    if low is None:
        return Cell("-")
    lowest = min([0.99, *(r["image_auroc_low"] for r in rows if r["image_auroc_low"] is not None)])
    span = [(v - lowest) / (1 - lowest) for v in (low, point, high)]
    return Cell(f"{100 * low:.2f} to {100 * high:.2f}", low, span=span)


def marks_of_all(rows):
    """Return the marks common to all of several rows; they are printed only once."""
    return [k for k in MARKS if len(rows) > 1 and all(k in r["marks"] for r in rows)]


def table(name, rows, metrics, caption, alike=()):
    """Return a table of methods x metrics without empty columns. alike: methods whose image AUROC is bold. In the other
    columns, the highest value is bold."""
    once = marks_of_all(rows)
    columns = {"Method": [Cell(r["method"], signs="".join(k for k in r["marks"] if k not in once)) for r in rows],
               "Seeds": [Cell(str(r["seeds"]), r["seeds"]) for r in rows]}
    for metric, title in metrics.items():
        best, scale, digits = best_of(rows, metric), *((1, 1) if metric in COSTS else (100, 2))
        cells = columns[title] = [Cell(text_of(r, metric, scale, digits), r[metric]) for r in rows]
        for row, cell in zip(rows, cells, strict=True):
            if metric == "image_auroc" and alike:
                cell.bold = row["method"] in alike
            elif metric in METRICS | DECISIONS | SIZES and best and len(rows) > 1:
                cell.bold = fair(row) == fair(best) and cell.text.split()[0] == f"{100 * best[metric]:.2f}"
            elif metric.startswith("seed") and row[metric] is not None:
                cell.link = f"{row['folder']}/{metric}/"
        if metric in METRICS:
            columns[f"{title}: thesis (diff.)"] = [thesis_cell(r, metric) for r in rows]
        if metric == "image_auroc":
            columns["95% interval"] = [interval_cell(r, rows) for r in rows]
    columns = {title: cells for title, cells in columns.items() if any(c.text != "-" for c in cells)}
    return Table(name, caption, list(columns), [list(line) for line in zip(*columns.values(), strict=True)])


def tables_of(rows, alike):
    text = "Percent, mean ± standard deviation over seeds. Bold: the highest value"
    text += " and, for image AUROC, all values that do not differ from it significantly." if alike else "."
    decided = ("Percent. Sensitivity at 90% and 95% specificity on test, then metrics at the threshold from normal "
               "validation scores or, if marked (F1), at the threshold with the best F1 on valid.")
    tables = [table("results", rows, METRICS, text, alike), table("decisions", rows, DECISIONS, decided)]
    if known := [r for r in rows if r["lesions"]]:
        text = ("Percent. PRO up to 30% for {lesions} lesions in three equal groups: small (up to {small_to:.0f} "
                "pixels at the methods' image size), medium (up to {medium_to:.0f}) and large.")
        tables.append(table("sizes", known, SIZES, text.format(**known[0])))
    seeds = sorted({k for r in rows for k in r if re.fullmatch(r"seed\d+", k)}, key=lambda k: int(k[4:]))
    devices = "; ".join(sorted({r["device"] for r in rows}))
    tables += [table("seeds", [dict.fromkeys(seeds) | r for r in rows],
                     {k: f"Seed {k[4:]}" for k in seeds} | dict(image_auroc_std="Standard deviation"),
                     "Image AUROC of each seed, percent. Values link to the runs."),
               table("costs", rows, COSTS, f"Mean ± standard deviation over seeds, on {devices}.")]
    return [t for t in tables if len(t.header) > 2]


def overview(rows, others, metric):
    """Return a table of methods x benchmarks for one metric, sorted by mean rank, with the state of unfinished runs."""
    known = {(r["data"], r["method"]): r for r in rows if r[metric] is not None}
    names, seeds, lines = sorted({data for data, _ in known}), max(r["seeds"] for r in rows), []
    for method in sorted({m for _, m in known} | {m for _, m in others if metric == "image_auroc"}):
        line, ranks = [Cell(method)], []
        for data in names:
            states, cell = others.get((data, method), {}), Cell("missing")
            if row := known.get((data, method)):
                column = np.array([r[metric] for (d, _), r in known.items() if d == data])
                ranks.append((column > row[metric]).sum() + ((column == row[metric]).sum() + 1) / 2)
                signs = set(row["marks"]) - set(marks_of_all([r for r in rows if r["data"] == data]))
                cell = Cell(text_of(row, metric), row[metric], signs=sorted(signs), link=row["folder"] + "/",
                            shade=(row[metric] - column.min()) / (np.ptp(column) or 1))
                cell.text += f" ({row['seeds']} of {seeds})" * (row["seeds"] < seeds)
            elif states:
                cell = Cell(next(iter(states.values())), link=quote(f"../{data}/{method}/"))
            cell.title = ", ".join(f"{seed} {state}" for seed, state in states.items())
            line.append(cell)
        mean, part = np.mean(ranks or [999]), len(ranks) < len(names)
        text = f"{mean:.1f}" + f" (of {len(ranks)})" * part if ranks else "-"
        lines.append([*line, Cell(text, mean + 100 * part)])
    text = f"{METRICS[metric]}, percent, mean ± standard deviation over seeds. (1 of {seeds}): finished seeds."
    return Table(metric, text, ["Method", *names, "Mean rank"], sorted(lines, key=lambda line: line[-1].value))


# ------------------------------------------------------------------------------------------------------------- figures
# Each function returns the `Frame` of a figure's panels and the SVG of each panel (drawn by .report/figures.svg).
@dataclass
class Frame:
    """Coordinates of a panel: data ranges, and size and margins in pixels."""
    x: tuple
    y: tuple
    width: int = 330
    height: int = 300
    left: int = 42
    top: int = 26
    right: int = 12
    bottom: int = 38

    def px(self, value):
        share = (value - self.x[0]) / (self.x[1] - self.x[0] or 1)
        return round(float(self.left + share * (self.width - self.left - self.right)), 1)

    def py(self, value):
        share = (value - self.y[0]) / (self.y[1] - self.y[0] or 1)
        return round(float(self.height - self.bottom - share * (self.height - self.top - self.bottom)), 1)

    def path(self, xs, ys, y_range=None):
        frame = replace(self, y=y_range or self.y)
        return " ".join(f"{frame.px(x)},{frame.py(y)}" for x, y in zip(xs, ys, strict=True))

    @staticmethod
    def ticks(low, high, count=7):
        """Return about `count` round numbers within a range."""
        step = 10 ** math.floor(math.log10((high - low) / count or 1))
        step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
        return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def summary_figure(rows, alike):
    """Plot each method's mean image AUROC (highest first), its 95% interval, its seeds and the thesis' value."""
    rows = sorted((r for r in rows if r["image_auroc"] is not None), key=lambda r: -r["image_auroc"])
    seeds = {r["method"]: [v for k, v in r.items() if re.fullmatch(r"seed\d+", k)] for r in rows}
    names = ("image_auroc", "image_auroc_low", "image_auroc_high", "image_auroc_thesis_mean")
    values = [100 * v for r in rows for v in (*seeds[r["method"]], *(r[n] for n in names)) if v is not None] or [0]
    shown = min(values) - 1, min(max(values) + 1, 100)
    frame = Frame(shown, (len(rows) - 0.4, -0.6), width=400, height=46 + 15 * len(rows), left=94, top=6)
    return frame, [DRAW.summary(frame, rows, seeds, alike)] if rows else []


def roc(anomalous, placements):
    """Return the true positive rate at RATES, averaged over seeds."""
    curves = []
    for share in placements:  # (N,)
        # an anomalous image is detected at false positive rates of at least 1 - placement
        rate = np.sort(1 - share[anomalous])
        curves.append(np.searchsorted(rate, RATES + 1e-9, side="right") / len(rate))
    return np.mean(curves, axis=0)


def pixel_curves(results):
    """Return the mean (tpr, pro) at RATES over all runs with a curves.csv; None if no run has one."""
    curves = []
    for r in results:
        if (file := r["folder"] / "curves.csv").exists():
            fpr, tpr, pro = read_columns(file, fpr=float, tpr=float, pro=float)
            if (np.diff(fpr) < 0).any():
                raise common.Error(f"{file} is not a curve, because its fpr decreases; run that method again")
            curves.append([np.interp(RATES, fpr, y) for y in (tpr, pro)])
    return np.mean(curves, axis=0) if curves else None


def curves_figure(data, rows, runs, scores):
    """Plot image ROC, pixel ROC and PRO (up to 30%), averaged over seeds, with labels for the best methods."""
    curves = [{}, {}, {}]
    for method in [r["method"] for r in rows]:
        if s := scores[data, method]:
            curves[0][method] = 100 * roc(s.anomalous, s.placements)
        if (known := pixel_curves(runs[data, method])) is not None:
            curves[1][method], curves[2][method] = 100 * known
    panels, hues = [], {}
    titles = [("ROC, images", "image_auroc", 1), ("ROC, pixels", "pixel_auroc", 1), ("PRO", "aupro", 0.3)]
    for (title, metric, limit), lines in zip(titles, curves, strict=True):
        best = sorted((r for r in rows if r["method"] in lines), key=lambda r: -(r[metric] or 0))[:LABELLED]
        for r in best:
            hues.setdefault(r["method"], len(hues) % HUES)
        frame, shown = Frame((0, 100 * limit), (0, 100)), limit >= RATES
        lines = {m: (100 * RATES[shown], y[shown]) for m, y in lines.items()}
        if lines:
            places = name_lines(frame, lines, [r["method"] for r in best])
            panels.append(DRAW.curves(frame, title, lines, places, hues))
    return Frame, panels


def name_lines(frame, lines, named):
    """Return label positions {method: (x, y)} below the lines, away from other labels and other labelled lines."""
    points = {m: [(frame.px(x), frame.py(y)) for x, y in zip(*lines[m], strict=True)] for m in named}
    places = {}
    for method in named:
        best = -math.inf, points[method][-1]
        for k, (x, y) in enumerate(points[method]):
            inside = x + 7 * len(method) < frame.width and y + 16 < frame.height - frame.bottom
            free = all(x + 7 * len(method) < a or x > a + 7 * len(m) or abs(y - b) > 12 for m, (a, b) in places.items())
            apart = min((abs(y + 8 - points[m][k][1]) for m in named if m != method), default=0)
            best = max(best, (inside and free and min(apart, 30), (x, y)), key=lambda place: place[0])
        places[method] = best[1]
    return places


def training_figure(data, rows, runs):
    """For each method's first seed, plot the log's first loss column and the image AUROC of evaluated epochs."""
    panels, frame = [], Frame((0, 1), (0, 100), 200, 118, 30, 22, 10, 20)
    for method in [r["method"] for r in rows]:
        log, chosen = read_log(runs[data, method][0]["folder"] / "log.csv"), runs[data, method][0]["epoch"]
        log = [row for row in log if "valid_image_auroc" in row] or log
        if len(log) > 1:
            loss = next((k for k in log[0] if k not in ("epoch", "seconds") and not k.startswith("valid")), None)
            lines = {k: list(zip(*((row["epoch"], row[k]) for row in log if k in row), strict=True))
                     for k in (loss, "valid_image_auroc") if k in log[0]}
            panels.append(DRAW.training(replace(frame, x=(0, log[-1]["epoch"])), method, lines, chosen))
    return frame, panels


# ------------------------------------------------------------------------------------------------------- image browser
def browser(data, runs, scores):
    """Return the data that the page needs to show the test images of a benchmark; None if no run saved images.

    Each method is represented by its first seed with maps or, without maps, by its first seed. Methods with other
    images are left out."""
    shared, methods = None, {}
    for method, results in [(method, results) for (d, method), results in runs.items() if d == data]:
        r = next((r for r in results if (r["folder"] / "browser").is_dir()), results[0])
        s, decision, limit = scores[data, method], r["decision"], r["args"]["limit"]
        place = r["folder"].parents[1] / (f"images-{r['images']}" + f"-{limit}" * bool(limit))
        if not s or not place.is_dir() or shared and shared["place"].name != place.name:
            continue
        images = f"{r['link']}../../{place.name}/"
        shared = shared or dict(place=place, images=images, paths=s.paths, labels=s.anomalous.astype(int).tolist())
        values, normal = s.scores[results.index(r)], np.sort(decision["normal_scores"])
        percentiles = 100 * np.searchsorted(normal, values, side="right") / max(len(normal), 1)
        methods[method] = dict(
            seed=r["seed"], maps=r["link"] + "browser/" if (r["folder"] / "browser").is_dir() else None,
            range=decision["map_range"], pixel=decision["pixel"], threshold=decision["image"],
            scores=[float(f"{v:.5g}") for v in values], percentiles=percentiles.round(1).tolist(),
            anomalous=None if decision["image"] is None else (values > decision["image"]).astype(int).tolist())
    if not shared:
        return None
    masks = sorted(int(file.name[:5]) for file in shared.pop("place").glob("*-mask.png"))
    return shared | dict(masks=masks, methods=methods)


# --------------------------------------------------------------------------------------------------------- the report
def settings_of(rows, results):
    """Return lines "methods: settings that all their runs changed", with paths shortened to file names."""
    having, shared = defaultdict(dict), defaultdict(list)  # {flag: {method: None}}, {methods: [flag, ...]}
    for r in results:
        for flag in flags(r["changed"]):
            having[re.sub(r"\S*/", "", flag)][r["method"]] = None
    for flag, methods in having.items():
        shared["all methods" if len(methods) == len(rows) > 1 else ", ".join(methods)].append(flag)
    return [f"{methods}: {' '.join(these)}" for methods, these in sorted(shared.items(), key=lambda kv: -len(kv[0]))]


def section_of(title, data, rows, runs, scores, others):
    """Return the report section on a benchmark or on its variants of clip_recon."""
    rows = [r for r in rows if r["data"] == data]
    results = [r for row in rows for r in runs[data, row["method"]]]
    compared, best = compare(data, scores), best_of(rows, "image_auroc")
    alike = compared.alike(best["method"]) if best and best["method"] in compared.auroc else set()
    marked = best and any(r["image_auroc"] and r["image_auroc"] > best["image_auroc"] for r in rows)
    printed = {key for r in rows for m in METRICS if r[f"{m}_thesis_mean"] is not None for key in (r["method"], m)}
    figures = dict(summary=summary_figure(rows, alike), curves=curves_figure(data, rows, runs, scores),
                   training=training_figure(data, rows, runs))
    if compared.p_values:
        frame = Frame((0, 1), (0, 1), 110 + 19 * len(compared.auroc), 10 + 19 * len(compared.auroc))
        figures["differences"] = frame, [DRAW.differences(frame, compared)]
    return dict(
        title=title, file=common.plain(title), results=results, compared=compared,
        sentence=WORDS.finding(best, compared, alike, marked).strip(), settings=settings_of(rows, results),
        notes=WORDS.notes(data, rows, compared, others, marks_of_all(rows), MARKS).strip().splitlines(),
        suspect=WORDS.suspect(rows, METRICS, NOT_COMPARED, printed).strip().splitlines(),
        tables=tables_of(rows, alike), figures={kind: found for kind, found in figures.items() if found[1]},
        browser=browser(data, runs, scores))


def readme_table(rows, published):
    """Print the rows of the results table in README.md: the thesis' image AUROC and ours for each benchmark."""
    names, ours = [n for n in common.NAMES if n != "phantom"], {(r["method"], benchmark_of(r["data"])): r for r in rows}
    methods = sorted({m for m, _, _ in published if " " not in m} | {m for m, name in ours if name in names})
    print(WORDS.readme_table(methods, names, published, ours).strip())


def print_section(section):
    table, kept = section["tables"][0], ("Method", "Seeds", *METRICS.values())
    lines = [[str(c) for c, title in zip(line, table.header, strict=True) if title in kept]
             for line in [table.header, *table.lines]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{section['title']}: {section['sentence']}")
    for first, *others in lines:
        cells = [f"{c:>{w}}" for c, w in zip(others, widths[1:], strict=True)]
        print("  ".join([f"  {first:<{widths[0]}}", *cells]))
    print("".join(f"    {line}\n" for line in section["settings"] + section["notes"]), end="")


def tex(text):
    """Escape special characters and signs for LaTeX."""
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
                                                  "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$", ">": "$>$"}
    return "".join(special.get(c, c) for c in str(text)).replace("--", "-{}-")  # avoids en dashes


def write_figure(frame, panels, file):
    """Write all panels to one SVG for other programs, with CSS variables replaced by the colours of the light theme."""
    across = min(len(panels), 1000 // frame.width)
    text = ENV.get_template("figure.svg").render(frame=frame, panels=panels, across=across)
    colours = dict(reversed(re.findall(r"(--[\w-]+): ([^;]+);", text)))  # of equal names, the first wins
    file.write_text(re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], text), encoding="utf-8")


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    target = Path(args.runs) / "report"
    if target.exists() and not (target / "index.html").exists():
        raise common.Error(f"{target} is not an earlier report and would be overwritten; move it away")
    (runs, others), variants = read_runs(args.runs, args.runs), read_ablation(args.runs)
    if not runs and not variants:
        raise common.Error(f"no finished runs: expected {args.runs}/<data>/<method>/seed<k>/results.json")
    rows, sections, known, published = [], [], {}, read_published()
    for these, states, what in ((runs, others, ""), (variants, {}, ": variants of clip_recon")):
        scores = {key: read_scores(results, known) for key, results in these.items()}
        rows += (here := rows_of(these, scores, published))
        names = [] if args.table else dict.fromkeys(data for data, _ in these)
        sections += [section_of(data + what, data, here, these, scores, states) for data in names]
    here = [r for r in rows if (r["data"], r["method"]) in runs]
    if args.table:
        readme_table(here, published)
        raise SystemExit
    notes = WORDS.reading(rows, METRICS, MARKS).strip().splitlines()
    shown = [m for m in ("image_auroc", "pixel_auroc", "aupro", "dice") if any(r[m] is not None for r in here)]
    context = dict(sections=sections, notes=notes, marks=MARKS, draws=DRAWS,
                   colours=colormaps["inferno"](range(256), bytes=True)[:, :3].tolist(),
                   overviews=[overview(here, others, m) for m in shown],
                   versions=sorted({name for results in runs.values() for r in results for name in r["versions"]}))
    p_rows = [dict(data=s["title"], method=a, other=b, difference=s["compared"].auroc[a] - s["compared"].auroc[b], p=p,
                   holm_5_percent=(a, b) in s["compared"].held)
              for s in sections for (a, b), p in s["compared"].p_values.items()]
    with common.atomic(target) as tmp:
        tmp.mkdir()
        ENV.filters |= dict(tex=tex, quote=quote, counts=lambda c: " + ".join(f"{n:,}" for n in c.values() if n))
        for name in ("index.html", "report.md", "report.tex"):
            (tmp / name).write_text(ENV.get_template(name).render(context), encoding="utf-8")
        for i, section in enumerate(sections):
            for kind, figure in section["figures"].items():
                write_figure(*figure, tmp / f"{section['file']}_{kind}.svg")
            if section["browser"]:
                text = json.dumps(section["browser"], separators=(",", ":"))
                (tmp / f"images-{i}.js").write_text(f"IMAGES[{i}] = {text};\n", encoding="utf-8")
        common.write_csv(tmp / "report.csv", rows)
        if p_rows:
            common.write_csv(tmp / "pvalues.csv", p_rows)
    for section in sections:
        print_section(section)
    print("\n".join(["\nPercent, mean ± standard deviation over seeds.", *notes]))
    print(f"report: {target / 'index.html'}")
