"""The report over runs: `python report.py runs` prints a table for each benchmark and writes <runs>/report/.

Reads every finished <runs>/<data>/<method>/seed<k>/ (results.json, scores.csv, curves.csv, maps/). Writes index.html
(everything, in one file), report.md, report.tex, report.csv (one row a method and benchmark, raw means and deviations),
pvalues.csv and the figures as PNG. What the thesis prints (methods/published.csv) stands beside a figure only where all
runs of the row have the published settings, trained weights and the published number of images.

Marks behind a method's name: (u) untrained weights, (l) limited images, (c) settings changed from the script's
defaults, which are listed below the table, (d) they differ between seeds.

Intervals and tests of image AUROC tell what other test images would change, given these trained networks; what other
seeds would change is the standard deviation. Intervals: the percentiles of a bootstrap that draws the normal and the
anomalous test images anew, with replacement; a draw's figure is the mean AUROC of all seeds on these images. p-values:
DeLong's paired test. An AUROC is the mean over images of their placement, the share of the other class that an image is
ranked right against; placements averaged over seeds have the seeds' mean AUROC as their mean, so the test is of the
very figure in the table. No scores of different seeds are mixed in either."""

import base64
import csv
import html
import itertools
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse import csr_array
from scipy.stats import rankdata

import common

METRICS = {  # results.json's names and the tables' headings
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "aupro": "PRO",
    "dice": "Dice",
    "dice_valid": "Dice (valid)",
}
MARKS = {
    "u": "untrained weights: shows that the code runs, no more",
    "l": "a limit on the images of each split and class",
    "c": "settings other than the published ones",
    "d": "settings that differ between the seeds of the row",
}
NOT_COMPARED = {  # rows of the thesis that are something else than our script or metric: printed without a difference
    "ddpm": "ddpm is AnoDDPM; the thesis cites another method (Wolleb et al. 2022)",
    "winclip": "winclip: the thesis gives no sentences and no size; ours are our own",
    "clip_zeroshot": "clip_zeroshot: the thesis gives no sentences and no size; ours are our own",
    "dice": "Dice: Table 3.11 uses the threshold that is best for F1 on the test set (MKD: each map scaled by itself); "
            "ours use half of the range of all maps (Dice, Eq. 3.3) or the best threshold on valid (Dice (valid))",
}
IMAGES = {  # published counts: train, test normal, test anomalous (README, Benchmarks)
    "brain": [(7500, 640, 3075)],
    "liver": [(1542, 833, 660)],
    "resc": [(4297, 1041, 764)],
    "oct2017": [(26315, 242, 726)],
    "chest": [(8000, 781, 16413)],
    "histo": [(5088, 1000, 1000), (5088, 1026, 1008)],  # the paper's counts, and those of the authors' coordinates
}
OURS = {  # variants of clip_recon that the thesis' Tables 4.1 to 4.4 have: its name, the method, what was changed
    "base": ("clip_recon", "clip_recon", {}),
    "da-levels 0": ("clip_recon (ViT, no DA)", "clip_recon", dict(da_levels=0)),
    "backbone resnet18": ("clip_recon (ResNet-18, DA)", "clip_recon", dict(backbone="resnet18")),
    "backbone resnet50": ("clip_recon (ResNet-50, DA)", "clip_recon", dict(backbone="resnet50")),
}
NUMBER = (int, float)
NEEDED = dict(method=str, metrics=dict, counts=dict, train_seconds=NUMBER, test_ms_per_image=NUMBER,
              peak_memory_gib=dict, weights=list, notes=dict, args=dict, changed=dict, device=str)  # of results.json
DRAWS = 2000  # of the test images, for the intervals
RATES = np.linspace(0, 1, 1001)  # false positive rates at which the curves of the seeds are averaged
TILE, SHOWN = 128, 5  # pixels of an image in the grid of heat maps; how many anomalous ones, beside one normal


@dataclass
class Args:
    runs: Annotated[str, tyro.conf.Positional] = "runs"
    """the folder that the runs were written to (their --out)"""


# ----------------------------------------------------------------------------------------------------- reading the runs
def read_runs(folder):
    """{(data, method): [results, ...]} of all finished runs, seeds in order; each knows its folder."""
    runs = defaultdict(list)
    for file in sorted(Path(folder).glob("*/*/seed*/results.json")):
        try:
            results = common.read_results(file)
            if wrong := [k for k, kind in NEEDED.items() if not isinstance(results[k], kind)]:
                raise TypeError(f"{wrong[0]} is {results[wrong[0]]!r}")
            if wrong := [m for m in METRICS if not (results["metrics"][m] is None or 0 <= results["metrics"][m] <= 1)]:
                raise ValueError(f"{wrong[0]} is {results['metrics'][wrong[0]]}")
            check_line(results), as_published(None, results["method"], [results], {}), marks([results], {""})
            results["memory"] = {k: float(v) for k, v in results["peak_memory_gib"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as e:
            what = f"no {e}" if isinstance(e, KeyError) else e
            raise common.Error(f"{file} is not a run's results ({what}); remove it, or run that method again") from e
        results["folder"] = file.parent
        runs[file.parts[-4], file.parts[-3]].append(results)
    return dict(sorted(runs.items()))


def read_ablation(folder):
    """{data: {variant: [results, ...]}} of `bash run_all.sh ablation`; a variant is named by its flag and value."""
    found = defaultdict(dict)
    for variant in sorted({file.parents[3] for file in Path(folder).glob("ablation/*/*/*/seed*/results.json")},
                          key=lambda folder: (folder.name != "base", folder.name)):
        for (data, _), results in read_runs(variant).items():
            found[data][variant.name.replace("_", " ")] = results
    return found


def read_published():
    """{(method, benchmark, metric): its row of methods/published.csv}, the cells without a number left out."""
    with open(Path(__file__).parent / "methods/published.csv", newline="") as f:
        return {(r["method"], r["benchmark"], r["metric"]): r for r in csv.DictReader(f) if r["mean"]}


def read_columns(file, **kinds):
    """The columns of a CSV file, whose names and types (str or float) are `kinds`; ends with one line if it differs."""
    columns = [[] for _ in kinds]
    try:
        with open(file, newline="") as f:
            rows = csv.reader(f)
            if (header := next(rows, [])) != list(kinds):
                raise ValueError(f"its first line is {','.join(header)!r}")
            for row in rows:  # keeping the rows, too, would wake the garbage collector all the time
                for column, kind, value in zip(columns, kinds.values(), row, strict=True):
                    column.append(kind(value))
        if not columns[0]:
            raise ValueError("it has no rows")
        if not all(np.isfinite(c).all() for c, kind in zip(columns, kinds.values(), strict=True) if kind is float):
            raise ValueError("a number is not finite")
        return columns
    except (OSError, ValueError, csv.Error) as e:
        raise common.Error(f"{file} cannot be read ({e}); expected the columns {','.join(kinds)}; run that method "
                           f"again") from e


def read_scores(results, known):
    """(anomalous (N,), scores (S, N) of all S seeds, the images' paths) from scores.csv; None where one is missing,
    the seeds have other images, or one class is missing. known: {(paths, labels): ...}, so that equal ones are one."""
    found, seen = [], set()
    for r in results:
        if not (file := r["folder"] / "scores.csv").exists():
            return None
        paths, labels, scores = read_columns(file, path=str, label=str, score=float)
        images = tuple(paths), tuple(labels)
        paths, anomalous = known.setdefault(images, (paths, np.array([label == "1" for label in labels])))
        seen.add(id(paths))
        if anomalous.all() or not anomalous.any() or len(seen) > 1:
            return None
        found.append(np.array(scores))
        auroc, told = placement(anomalous, found[-1])[anomalous].mean(), r["metrics"]["image_auroc"]
        if told is None or abs(auroc - told) > 1e-6:
            raise common.Error(f"{file} gives image AUROC {auroc:.6f}, results.json beside it says {told}; run it "
                               f"again")
    return anomalous, np.array(found), paths


# --------------------------------------------------------------------------------------------- intervals and tests
@lru_cache(maxsize=1)  # methods with the same images share the draws
def resample(*counts):
    """How often each image of either class is in each of DRAWS draws with replacement: two of (count, DRAWS)."""
    rng, drawn = np.random.default_rng(0), [np.empty((n, DRAWS), np.float32) for n in counts]
    for times in drawn:
        for i in range(DRAWS):
            times[:, i] = np.bincount(rng.integers(len(times), size=len(times)), minlength=len(times))
    return drawn


def interval(anomalous, scores):
    """(low, high), 95%, of the mean AUROC of seeds (S, N): percentiles of a bootstrap over the images of either class.

    None where a class has one image or all draws are alike (perfect separation): these tell nothing of the error."""
    n, m = anomalous.sum(), (~anomalous).sum()
    if min(n, m) < 2:
        return None, None
    drawn, drawn_normal = resample(n, m)
    auroc = np.zeros(DRAWS)
    for these in scores:
        order = np.argsort(these[~anomalous])
        normal = these[~anomalous][order]
        below = np.zeros((m + 1, DRAWS), np.float32)  # row k: how many of the draw are among the k lowest
        np.cumsum(drawn_normal[order], axis=0, out=below[1:])
        # an anomalous image exceeds the k lowest normal ones; among ties there are two k, which count half
        k = np.concatenate([np.searchsorted(normal, these[anomalous], side) for side in ("left", "right")])
        halves = csr_array((np.full(2 * n, 0.5, np.float32), (k, np.tile(np.arange(n), 2))), shape=(m + 1, n))
        auroc += ((halves @ drawn) * below).sum(axis=0, dtype=float) / (n * m)
    low, high = np.quantile(auroc / len(scores), [0.025, 0.975])
    return (float(low), float(high)) if low < high else (None, None)


def placement(anomalous, scores):
    """(..., N): the share of the other class that each image is ranked right against, ties half (DeLong et al. 1988).

    scores: (N,) or (S, N)."""
    rank, share = rankdata(scores, axis=-1), np.empty(scores.shape)
    for these in (anomalous, ~anomalous):  # of the others, ranked below
        share[..., these] = (rank[..., these] - rankdata(scores[..., these], axis=-1)) / (~these).sum()
    return np.where(anomalous, share, 1 - share)


def p_value(anomalous, first, second):
    """Two-sided, that two methods' placements (N,) on the same images have the same AUROC: DeLong's paired test."""
    if min(anomalous.sum(), (~anomalous).sum()) < 2:
        return 1.0  # one image of a class tells nothing
    difference = first - second
    delta = difference[anomalous].mean()
    if abs(delta) < 1e-12:
        return 1.0
    var = sum(difference[c].var(ddof=1) / c.sum() for c in (anomalous, ~anomalous))
    return math.erfc(abs(delta) / math.sqrt(2 * var)) if var > 0 else 0.0


def holm(p_values):
    """Which tests of {pair: p} hold at 5% all together (Holm 1979: the least p at 5%/n, the next at 5%/(n - 1) ...)."""
    held = set()
    for i, (pair, p) in enumerate(sorted(p_values.items(), key=lambda kv: kv[1])):
        if p > 0.05 / (len(p_values) - i):
            break
        held.add(pair)
    return held


# --------------------------------------------------------------------------------------------------------------- tables
def marks(results, changed):
    found = dict(
        u=any(not w["trained"] for r in results for w in r["weights"]),
        l=any(r["args"]["limit"] for r in results),
        c=any(changed),
        d=len(changed) > 1,
    )
    return "".join(f" ({k})" for k, is_so in found.items() if is_so)


def check_line(results):
    """What datasets/check.py said of the run's images, in words."""
    return results["check"]["summary"] if results["check"] else "not run on these images"


def as_published(data, method, results, changed):
    """Whether all these runs have the thesis' method, settings (with what its table says is `changed`) and number of
    images, and what they resolved was published: trained weights, DRAEM's textures."""
    def count(r):
        return r["counts"]["train"]["normal"], r["counts"]["test"]["normal"], r["counts"]["test"]["anomalous"]

    def resolved(r):  # auto found the published weights if they are trained
        trained = all(w["trained"] for w in r["weights"])
        textures = r["notes"].get("textures", {}).get("source", "dtd") == "dtd"
        return trained and textures and {k: v for k, v in r["changed"].items() if v != "auto"} == changed

    return all(r["method"] == method and resolved(r) and r["args"]["limit"] is None and count(r) in IMAGES.get(data, [])
               for r in results)


def rows_of(runs, scores, published):
    """One dict a benchmark and method: names, marks, seeds, mean and standard deviation (n - 1) of each metric, the
    interval, and what the thesis prints."""
    rows = []
    for (data, method), results in runs.items():
        changed = {" ".join(f"--{k.replace('_', '-')} {v}" for k, v in r["changed"].items()) for r in results}
        row = dict(data=data, method=method, marks=marks(results, changed), seeds=len(results),
                   changed=" | ".join(sorted(changed)),
                   check=" | ".join(sorted({check_line(r) for r in results})))
        costs = dict(train_seconds=[r["train_seconds"] for r in results], ms=[r["test_ms_per_image"] for r in results])
        for kind in ("ram", "gpu"):
            costs[f"{kind}_gib"] = [r["memory"].get(kind) for r in results]
        for name, values in ({m: [r["metrics"][m] for r in results] for m in METRICS} | costs).items():
            known = [v for v in values if v is not None]
            row[name] = float(np.mean(known)) if known else None
            row[f"{name}_std"] = float(np.std(known, ddof=1)) if len(known) > 1 else None
        low_high = interval(*known[:2]) if (known := scores[data, method]) else (None, None)
        row["image_auroc_low"], row["image_auroc_high"] = low_high
        benchmark = next((n for n, folders in common.NAMES.items() if data.lower() in folders), None)
        printed, script, setting = OURS.get(method, (method, method, {}))
        same = as_published(benchmark, script, results, setting)
        for metric in METRICS:
            found = published.get((printed, benchmark, metric), {}) if same else {}
            for name in ("mean", "std"):
                row[f"{metric}_thesis_{name}"] = float(found[name]) / 100 if found else None
            row[f"{metric}_thesis_note"] = found["note"] if found.get("suspect") else ""
        rows.append(row)
    return rows


def cell(row, name):
    if row[name] is None:
        return "-"
    deviation = row[f"{name}_std"]
    return f"{100 * row[name]:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


def thesis_cell(row, metric):
    """The printed figure and ours less it; a question mark where the figure is suspect."""
    if row[f"{metric}_thesis_mean"] is None:
        return "-"
    mean, deviation = 100 * row[f"{metric}_thesis_mean"], 100 * row[f"{metric}_thesis_std"]
    compared = row[metric] is not None and not {row["method"], metric} & NOT_COMPARED.keys()
    ours = f" ({100 * row[metric] - mean:+.2f})" if compared else ""
    return f"{mean:.2f} ± {deviation:.2f}{'?' * bool(row[f'{metric}_thesis_note'])}{ours}"


def best_of(rows, metric):
    """The shown figure to set bold: the highest, among rows of trained weights and all images where there are any."""
    fair = [r for r in rows if "(u)" not in r["marks"] and "(l)" not in r["marks"]] or rows
    known = [r[metric] for r in fair if r[metric] is not None]
    return f"{100 * max(known):.2f}" if known and len(rows) > 1 else None


def table(rows, full=False):
    """Header and lines of cells for one benchmark; a metric that no method has is left out.

    full: also intervals, the thesis' figures, and **bold** for the best."""
    header, columns = ["Method", "Seeds"], [[r["method"] + r["marks"] for r in rows], [str(r["seeds"]) for r in rows]]
    for metric, title in METRICS.items():
        if all(r[metric] is None for r in rows):
            continue
        best, cells = best_of(rows, metric), [cell(r, metric) for r in rows]
        header.append(title)
        columns.append([f"**{c}**" if full and c.split()[0] == best else c for c in cells])
        if full and metric == "image_auroc" and any(r["image_auroc_low"] is not None for r in rows):
            header.append("95% interval")
            columns.append(["-" if r["image_auroc_low"] is None else
                            f"{100 * r['image_auroc_low']:.2f} to {100 * r['image_auroc_high']:.2f}" for r in rows])
        if full and any(r[f"{metric}_thesis_mean"] is not None for r in rows):
            header.append("Thesis (diff.)")
            columns.append([thesis_cell(r, metric) for r in rows])
    header += ["Train s", "ms/image"]
    columns += [[f"{r['train_seconds']:.0f}" for r in rows], [f"{r['ms']:.1f}" for r in rows]]
    return header, [list(line) for line in zip(*columns, strict=True)]


def notes_of(rows):
    """The lines below a benchmark's table: changed settings, datasets/check.py's, suspect figures of the thesis."""
    changed = [f"{r['method']}: {r['changed']}" for r in rows if r["changed"]]
    checks = [f"datasets/check.py: {line}" for line in sorted({r["check"] for r in rows})]
    suspect = [f"{r['method']}, {title}, the thesis' {100 * r[f'{m}_thesis_mean']:.2f}?: {note}"
               for r in rows for m, title in METRICS.items() if (note := r[f"{m}_thesis_note"])]
    shown = {key for r in rows for m in METRICS if r[f"{m}_thesis_mean"] is not None for key in (r["method"], m)}
    suspect += [f"No difference for {why}." for key, why in NOT_COMPARED.items() if key in shown]
    return changed, checks, suspect


def overview(rows, metric):
    """Methods x benchmarks of one metric (the form of the thesis' Tables 3.10 and 3.11)."""
    known = {(r["data"], r["method"]): r for r in rows if r[metric] is not None}
    names, methods = (sorted({key[i] for key in known}) for i in (0, 1))
    best = {d: best_of([r for r in rows if r["data"] == d], metric) for d in names}
    lines = []
    for method in methods:
        here = [known.get((d, method)) for d in names]
        cells = [cell(row, metric) + row["marks"] if row else "-" for row in here]
        lines.append([method] + [f"**{c}**" if c.split()[0] == best[d] else c
                                 for d, c in zip(names, cells, strict=True)])
    return ["Method", *names], lines


def compare(data, scores):
    """(header, lines) of the p-values of all pairs, methods by falling AUROC; the same as dicts; the methods left out.

    Only methods with the images that most of them have; bold: holds after Holm's correction for all pairs."""
    known = {m: p for (d, m), p in scores.items() if d == data and p}
    groups = Counter(id(p[2]) for p in known.values())
    if not groups or (most := groups.most_common(1)[0])[1] < 2:
        return None, [], []
    same = {m: (p[0], placement(*p[:2]).mean(axis=0)) for m, p in known.items() if id(p[2]) == most[0]}
    auroc = {m: share[anomalous].mean() for m, (anomalous, share) in same.items()}
    order = sorted(same, key=lambda m: -auroc[m])
    p_values = {(a, b): p_value(*same[a], same[b][1]) for a, b in itertools.combinations(order, 2)}
    held = holm(p_values)
    lines = []
    for a in order:
        line = [a, f"{100 * auroc[a]:.2f}"]
        for b in order:
            pair = (a, b) if (a, b) in p_values else (b, a)
            p = p_values.get(pair)
            text = "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
            line.append(f"**{text}**" if pair in held else text)
        lines.append(line)
    rows = [dict(data=data, method=a, other=b, difference=auroc[a] - auroc[b], p=p, holm_5_percent=(a, b) in held)
            for (a, b), p in p_values.items()]
    return (["Method", "AUROC", *order], lines), rows, sorted({m for d, m in scores if d == data} - set(same))


# -------------------------------------------------------------------------------------------------------------- figures
def style(i):
    """The colour and line of the i-th method, the same in all figures."""
    return dict(color=f"C{i % 10}", linestyle=["-", "--", ":"][i // 10 % 3])


def roc(anomalous, scores):
    """Mean true positive rate (1001,) of the seeds at RATES. A normal image's placement is 1 - (rates above it)."""
    found = []
    for share in placement(anomalous, scores):  # (N,)
        # an anomalous image is found at the false positive rate 1 - its placement: the curve counts these
        rate = np.sort(1 - share[anomalous])
        found.append(np.searchsorted(rate, RATES + 1e-9, side="right") / len(rate))
    return np.mean(found, axis=0)


def pixel_curves(results):
    """Mean (tpr, pro), each (1001,), at RATES, of the runs that have a curves.csv; None if none has."""
    found = []
    for r in results:
        if (file := r["folder"] / "curves.csv").exists():
            fpr, tpr, pro = read_columns(file, fpr=float, tpr=float, pro=float)
            if (np.diff(fpr) < 0).any():
                raise common.Error(f"{file} is no curve, its fpr falls; run that method again")
            found.append([np.interp(RATES, fpr, y) for y in (tpr, pro)])
    return np.mean(found, axis=0) if found else None


def curves_figure(data, methods, runs, scores):
    """Image ROC, pixel ROC and PRO curve (to 30%) of a benchmark's methods, means over seeds; None without any."""
    panels = [("ROC, images", "true positive rate", 1), ("ROC, pixels", "true positive rate", 1),
              ("PRO", "mean overlap per region", 0.3)]
    lines = [{}, {}, {}]
    for method in methods:
        if known := scores.get((data, method)):
            lines[0][method] = roc(*known[:2])
        if (known := pixel_curves(runs.get((data, method), []))) is not None:
            lines[1][method], lines[2][method] = known
    shown = [i for i in range(3) if lines[i]]
    if not shown:
        return None
    figure = Figure(figsize=(4.1 * len(shown) + 1.8, 4.1), layout="constrained", dpi=130)
    handles = {}
    for axes, i in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        title, y, limit = panels[i]
        for method, values in lines[i].items():
            handles[method], = axes.plot(RATES, values, lw=1.2, **style(methods.index(method)))
        axes.set(title=title, xlabel="false positive rate", ylabel=y, xlim=(0, limit), ylim=(0, 1.01))
        axes.grid(color="0.9")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def panels_of(file):
    """The square images of a run's panel, in TILE pixels: image, ground truth (where there are masks), heat map."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width not in (2 * height, 3 * height):
                raise ValueError(f"{width}x{height} pixels are not two or three squares")
            return [image.convert("RGB").resize((TILE, TILE), Image.Resampling.BILINEAR, (x, 0, x + height, height))
                    for x in range(0, width, height)]
    except (OSError, SyntaxError, ValueError) as e:
        raise common.Error(f"{file} is no panel of image, ground truth and heat map ({e}); run that method "
                           f"again") from e


def maps_figure(data, methods, runs, scores):
    """Rows: test images, the same for all; columns: image, ground truth, each method's heat map (thesis, Figure 3.8).

    Of the images that all methods have: SHOWN anomalous ones, evenly spread, and the first normal one."""
    folders = {m: next((r["folder"] / "maps" for r in runs.get((data, m), []) if (r["folder"] / "maps").is_dir()), None)
               for m in methods}
    folders = {m: f for m, f in folders.items() if f}
    names = sorted(set.intersection(*({p.name for p in f.glob("*.png")} for f in folders.values()))) if folders else []
    normal = {common.map_name(i, path) for (d, _), known in scores.items() if d == data and known
              for i, (path, is_so) in enumerate(zip(known[2], ~known[0], strict=True)) if is_so}
    anomalous = [n for n in names if n not in normal]
    count = min(SHOWN, len(anomalous))
    names = [anomalous[i * len(anomalous) // count] for i in range(count)] + [n for n in names if n in normal][:1]
    if not names:
        return None
    rows = []
    for name in names:
        panels = [panels_of(f / name) for f in folders.values()]
        rows.append([*panels[0][:-1], *(p[-1] for p in panels)])
    if len({len(row) for row in rows}) > 1:
        raise common.Error(f"{next(iter(folders.values()))} holds panels with and without ground truth; run that "
                           f"method again")
    titles = ["image", "ground truth"][: len(rows[0]) - len(folders)] + list(folders)
    sides = ["normal" if n in normal else "anomalous" for n in names]
    step, font = TILE + 4, ImageFont.load_default(16)
    left, top = 100, 30
    grid = Image.new("RGB", (left + step * len(titles), top + step * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for i, row in enumerate(rows):
        draw.text((left - 8, top + (i + 0.5) * step), sides[i], "black", font, "rm")
        for k, tile in enumerate(row):
            grid.paste(tile, (left + k * step, top + i * step))
    for k, title in enumerate(titles):
        draw.text((left + k * step + TILE / 2, top - 8), title, "black", font, "ms")
    return grid


def training_figure(data, methods, runs):
    """First loss and image AUROC on valid by epoch, of each method's first seed; a dot marks the chosen epoch."""
    logs = {}
    for method in methods:
        run = next(iter(runs.get((data, method), [])), None)
        if run and (file := run["folder"] / "log.csv").exists():
            with open(file, newline="") as f:
                logs[method] = list(csv.DictReader(f)), run["epoch"]
    if not logs:
        return None
    figure = Figure(figsize=(10, 3.6), layout="constrained", dpi=130)
    for axes, valid in zip(figure.subplots(1, 2), (False, True), strict=True):
        for method, (log, chosen) in logs.items():
            names = [k for k in log[0] if k not in ("epoch", "seconds")]
            name = "valid_image_auroc" if valid else next(k for k in names if not k.startswith("valid"))
            rows = [row for row in log if row.get(name)]
            epochs, values = ([float(row[k]) for row in rows] for k in ("epoch", name))
            axes.plot(epochs, values, lw=1.2, label=method, markevery=[x == chosen for x in epochs], marker="o", ms=4,
                      **style(methods.index(method)))
        axes.set(xlabel="epoch", title="image AUROC on valid" if valid else "loss")
        axes.grid(color="0.9")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def cost_figure(rows, methods):
    """Time per image, image AUROC and, as area, peak memory of a benchmark's methods (thesis, Figure 3.9)."""
    rows = [r for r in rows if r["image_auroc"] is not None and r["ms"] > 0]
    if not rows:
        return None
    kind = "gpu_gib" if all(r["gpu_gib"] is not None for r in rows) else "ram_gib"  # one measure for all
    memory = np.array([r[kind] or 0 for r in rows])
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=130)
    axes = figure.subplots()
    x, y = [r["ms"] for r in rows], [100 * r["image_auroc"] for r in rows]
    area = 900 * memory / (memory.max() or 1)  # square points
    axes.scatter(x, y, area, [f"C{methods.index(r['method']) % 10}" for r in rows], alpha=0.5, edgecolors="0.3", lw=0.6)
    margin = max(2, 0.12 * (max(y) - min(y)))
    axes.set(xscale="log", xlabel="ms/image, log scale", ylabel="image AUROC, %", xlim=(min(x) / 1.6, max(x) * 1.9),
             ylim=(min(y) - margin, max(y) + margin))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter() if max(x) < 10 * min(x) else NullFormatter())
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.set_title(f"area: peak {'GPU memory' if kind == 'gpu_gib' else 'RAM'}, {memory.max():.1f} GiB the largest",
                   fontsize=10)
    figure.draw_without_rendering()
    place_labels(axes, x, y, area, [r["method"] for r in rows])
    return figure


def ablation_figure(variants):
    """Image AUROC against each flag's value (thesis, Figures 4.6 to 4.8): mean and deviation of the seeds, with the
    base (hollow) among them at its own value of that flag."""
    found = defaultdict(dict)
    for name, results in variants.items():
        if name != "base":
            flag, _, value = name.partition(" ")
            found[flag][value] = results
            own = variants["base"][0]["args"][flag.replace("-", "_")] if "base" in variants else []
            own = " ".join(map(str, own)) if isinstance(own, list) else f"{own:g}" if isinstance(own, NUMBER) else own
            found[flag] |= {own: variants["base"]} if own else {}
    figure = Figure(figsize=(3.2 * len(found), 3.4), layout="constrained", dpi=130)
    for axes, (flag, values) in zip(figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items(),
                                    strict=True):
        order = sorted(values, key=lambda v: (len(v.split()), float(v) if re.fullmatch(r"[\d.]+", v) else v))
        for x, value in enumerate(order):
            auroc = 100 * np.array([r["metrics"]["image_auroc"] for r in values[value]])
            axes.errorbar(x, auroc.mean(), auroc.std(ddof=1) if len(auroc) > 1 else 0, fmt="o", color="C0", capsize=3,
                          mfc="white" if values[value] is variants.get("base") else "C0")
        axes.set_xticks(range(len(order)), [v.replace(" ", ",") for v in order], rotation=30)
        axes.set(title=f"--{flag}", xlim=(-0.5, len(order) - 0.5))
        axes.grid(axis="y", color="0.9")
    figure.supylabel("image AUROC, %")
    return figure


def place_labels(axes, x, y, area, names):
    """Write each name beside its bubble, at the first of some places where it covers no other name or bubble."""
    scale = axes.figure.dpi / 72  # pixels a point; all below is in points
    centres, right = axes.transData.transform(np.stack([x, y], axis=1)) / scale, axes.bbox.x1 / scale
    radii = np.sqrt(np.array(area) / math.pi)
    bubbles = [(*(c - r), *(c + r)) for c, r in zip(centres, radii, strict=True)]  # left, bottom, right, top
    taken = []
    for i in np.argsort(y):
        width, height = 4.8 * len(names[i]), 8  # at 8 points' type
        for dx, dy in itertools.product((radii[i] + 2, -radii[i] - 2 - width), (-3, 6, -12, 15, -21)):
            box = (*(centres[i] + (dx, dy)), *(centres[i] + (dx + width, dy + height)))
            others = taken + bubbles[:i] + bubbles[i + 1 :]
            if box[2] < right and all(box[0] > o[2] or o[0] > box[2] or box[1] > o[3] or o[1] > box[3] for o in others):
                break
        else:
            dx, dy = radii[i] + 2, -3
            box = (*(centres[i] + (dx, dy)), *(centres[i] + (dx + width, dy + height)))
        taken.append(box)
        axes.annotate(names[i], (x[i], y[i]), xytext=(dx, dy), textcoords="offset points", fontsize=8, in_layout=False)


# -------------------------------------------------------------------------------------------------------------- formats
CSS = """body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:1400px;margin:2em auto}
h1{font-size:1.6em}h2{font-size:1.3em;margin-top:2.2em;border-bottom:1px solid #ccc;padding-bottom:.2em}
nav ul{columns:3;padding-left:1.2em}a{color:#245a8d}.wide{overflow-x:auto;margin:1em 0}
table{border-collapse:collapse;font-size:.87em;font-variant-numeric:tabular-nums}
caption{caption-side:top;text-align:left;color:#555;padding:.3em 0}
th,td{padding:.25em .7em;text-align:right;white-space:nowrap;border-bottom:1px solid #e4e4e4}
th{border-bottom:2px solid #888;font-weight:600}th:first-child,td:first-child{text-align:left}
tbody tr:hover{background:#f4f6f8}.dense th,.dense td{padding:.2em .3em;font-size:.83em}
figure{margin:1.5em 0}img{max-width:100%;height:auto}figcaption,.notes{color:#555;font-size:.9em}
.notes{padding-left:1.2em}code{background:#f2f2f2;padding:0 .25em}"""


def bold(text, before, after):
    """**bold**, the one mark that cells have, in another format."""
    return re.sub(r"\*\*(.+?)\*\*", lambda found: before + found[1] + after, text)


def as_markdown(sections, notes):
    out = ["# Report", ""]
    for s in sections:
        out += [f"## {s['title']}", ""]
        for caption, header, lines in s["tables"]:
            rule = ["---"] + ["---:"] * (len(header) - 1)
            out += [caption, "", *(f"| {' | '.join(line)} |" for line in [header, rule, *lines]), ""]
        out += [f"- `{line}`" for line in s["changed"]] + [f"- {line}" for line in s["notes"]] + [""]
        out += [f"![{caption}]({quote(file)})\n\n*{caption}*\n" for file, caption in s["figures"]]
    return "\n".join(out + notes) + "\n"


def tex(text):
    """Text for LaTeX: its special characters, signs and **bold**."""
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
                                                  "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$", ">": "$>$"}
    return bold("".join(special.get(c, c) for c in text).replace("--", "-{}-"), r"\textbf{", "}")  # no en dash


def as_latex(sections, notes):
    out = [r"% \usepackage{booktabs,adjustbox}"]
    for s in sections:
        for caption, header, lines in s["tables"]:
            below = [*s["changed"], *s["notes"]] if caption == s["tables"][0][0] else []
            columns = "l" + "r" * (len(header) - 1)
            head, *body = (" & ".join(map(tex, line)) + r" \\" for line in [header, *lines])
            out += [r"\begin{table}", r"\centering", rf"\caption{{{tex(s['title'])}: {tex(caption)}}}",
                    r"\begin{adjustbox}{max width=\textwidth}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head,
                    r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}",
                    *(rf"\par {{\footnotesize {tex(line)}}}" for line in below), r"\end{table}", ""]
    return "\n".join(out + [rf"\noindent {tex(line)}\par" for line in notes]) + "\n"


def as_html(sections, notes, folder):
    """One file that holds everything: the figures' bytes stand in it."""
    def cells(tag, line):
        return "".join(f"<{tag}>{bold(html.escape(c), '<b>', '</b>')}</{tag}>" for c in line)

    contents = "".join(f'<li><a href="#s{i}">{html.escape(s["title"])}</a></li>' for i, s in enumerate(sections))
    out = [f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Anomaly detection: report</title>'
           f"<style>{CSS}</style></head><body>\n<h1>Anomaly detection: report over runs</h1>",
           *(f"<p>{html.escape(line)}</p>" for line in notes), f"<nav><ul>{contents}</ul></nav>"]
    for i, s in enumerate(sections):
        out.append(f'<h2 id="s{i}">{html.escape(s["title"])}</h2>')
        for k, (caption, header, lines) in enumerate(s["tables"]):
            body = "\n".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
            kind = "wide dense" if len(header) > 12 else "wide"
            out.append(f'<div class="{kind}"><table><caption>{html.escape(caption)}</caption>'
                       f"<thead><tr>{cells('th', header)}</tr></thead>\n<tbody>{body}</tbody></table></div>")
            below = [f"<li><code>{html.escape(line)}</code></li>" for line in s["changed"]]
            below += [f"<li>{html.escape(line)}</li>" for line in s["notes"]]
            out += [f'<ul class="notes">{"".join(below)}</ul>'] * bool(k == 0 and below)
        for file, caption in s["figures"]:
            image, text = base64.b64encode((folder / file).read_bytes()).decode(), html.escape(caption)
            with Image.open(folder / file) as opened:
                width = round(opened.width / 1.3)  # 130 pixels an inch are shown as 100
            out.append(f'<figure><img alt="{text}" width="{width}" src="data:image/png;base64,{image}">'
                       f"<figcaption>{text}</figcaption></figure>")
    return "\n".join([*out, "</body></html>\n"])


def print_tables(rows, what=""):
    for data in dict.fromkeys(r["data"] for r in rows):
        here = [r for r in rows if r["data"] == data]
        header, lines = table(here)
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        print(f"\n{data}{what}")
        for first, *others in [header, *lines]:
            cells = [f"{c:>{w}}" for c, w in zip(others, widths[1:], strict=True)]
            print("  ".join([f"  {first:<{widths[0]}}", *cells]))
        changed, checks, _ = notes_of(here)
        print("".join(f"    {line}\n" for line in changed + checks), end="")


def section_of(data, rows, matrix, left_out, figures):
    """A benchmark's part of the report: title, tables (caption, header, lines), what stands below, figures."""
    changed, checks, suspect = notes_of(rows)
    tables = [("Percent, mean ± standard deviation over seeds; bold: the best.", *table(rows, full=True))]
    if matrix:
        tables.append(("p-values of equal image AUROC on the same test images (DeLong, two-sided, seeds averaged); "
                       "bold: the two differ at 5%, after Holm's correction for all pairs.", *matrix))
        checks += [f"Not compared, for want of scores on the same images: {', '.join(left_out)}."] * bool(left_out)
    return dict(title=data, tables=tables, changed=changed, notes=checks + suspect, figures=figures)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    target = Path(args.runs) / "report"
    if target.exists() and not (target / "index.html").exists():
        raise common.Error(f"{target} is no report of before, and would be replaced; move it away")
    runs, ablation, known = read_runs(args.runs), read_ablation(args.runs), {}
    if not runs and not ablation:
        raise common.Error(f"no finished runs in {args.runs}: expected "
                           f"{args.runs}/<data>/<method>/seed<k>/results.json")
    scores = {key: read_scores(results, known) for key, results in runs.items()}
    rows = rows_of(runs, scores, read_published())
    methods = sorted({r["method"] for r in rows})
    variants = {(data, variant): results for data, found in ablation.items() for variant, results in found.items()}
    variant_rows = rows_of(variants, {k: read_scores(results, known) for k, results in variants.items()},
                           read_published())
    print_tables(rows)
    print_tables(variant_rows, ": variants of clip_recon")
    used = [k for k in MARKS if any(f"({k})" in r["marks"] for r in rows + variant_rows)]
    notes = ["Percent, mean ± standard deviation over seeds."] + [f"({k}) {MARKS[k]}." for k in used]
    if any(r["data"] == "phantom" for r in rows):
        notes.append("phantom is one brain, deformed, with painted lesions: a demonstration, no benchmark.")
    print("\n" + "\n".join(notes))
    notes.append(f"Intervals (bootstrap, {DRAWS:,} draws of the test images) and p-values (DeLong) tell what other "
                 "test images would change, given these networks; they take images as independent, and with several "
                 "slices of a patient promise too much.")
    if any(r[f"{m}_thesis_mean"] is not None for r in rows + variant_rows for m in METRICS):
        notes.append("Thesis: the printed figure (methods/published.csv) and ours less it, where all runs of the row "
                     "have the published settings and number of images; ? marks printed figures that are suspect.")
    names = list(dict.fromkeys(r["data"] for r in rows))
    sections, p_rows = [], []
    with common.atomic(target) as tmp:
        tmp.mkdir()
        for data in names:
            here = [r for r in rows if r["data"] == data]
            matrix, found, left_out = compare(data, scores)
            p_rows += found
            devices = ", ".join(sorted({r["device"] for m in methods for r in runs.get((data, m), [])}))
            figures = []
            for kind, figure, caption in (
                ("curves", curves_figure(data, methods, runs, scores), "Curves on the test set, means over seeds"),
                ("maps", maps_figure(data, methods, runs, scores),
                 "Test images and heat maps, each method's scaled by its range over the test set; red is anomalous"),
                ("training", training_figure(data, methods, runs), "Training of the first seed; dots: the epoch kept"),
                ("cost", cost_figure(here, methods), f"Time, image AUROC and memory on {devices}"),
            ):
                if figure:
                    figures.append((f"{data}_{kind}.png", f"{data}: {caption}"))
                    (figure.savefig if isinstance(figure, Figure) else figure.save)(tmp / figures[-1][0])
            sections.append(section_of(data, here, matrix, left_out, figures))
        if len(names) > 1:
            tables = [(METRICS[m], *overview(rows, m)) for m in ("image_auroc", "dice") if any(r[m] for r in rows)]
            sections.insert(0, dict(title="All benchmarks", tables=tables, changed=[], notes=[], figures=[]))
        for data, variants in ablation.items():
            figures, name = [], f"{data}_ablation.png"
            if set(variants) != {"base"}:
                figures = [(name, f"{data}: clip_recon's variants, mean and deviation; hollow: the base")]
                ablation_figure(variants).savefig(tmp / name)
            here = [r for r in variant_rows if r["data"] == data]
            base = [f"base: {r['changed'] or 'the published settings'}" for r in here if r["method"] == "base"]
            part = section_of(f"{data}: variants of clip_recon", here, None, [], figures)
            sections.append(part | dict(changed=base))
        (tmp / "report.md").write_text(as_markdown(sections, notes), encoding="utf-8")
        (tmp / "report.tex").write_text(as_latex(sections, notes), encoding="utf-8")
        (tmp / "index.html").write_text(as_html(sections, notes, tmp), encoding="utf-8")
        common.write_csv(tmp / "report.csv", rows + variant_rows)
        if p_rows:
            common.write_csv(tmp / "pvalues.csv", p_rows)
    print(f"report: {target / 'index.html'}")
