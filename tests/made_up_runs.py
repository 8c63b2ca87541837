"""Made-up runs, as the methods leave them, to test and to look at the report: 21 methods, six benchmarks, five seeds.

    python tests/made_up_runs.py FOLDER [--images 60] [--full]

No figure in them was measured. --full: as many test images as the real benchmarks have, without pictures."""

import argparse
import csv
import json
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
from matplotlib import colormaps
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common

METHODS = sorted(p.stem for p in (ROOT / "methods").glob("*.py"))
WITHOUT_MAPS = {"anogan", "cutpaste", "deepsvdd", "fanogan", "ganomaly"}
COUNTS = {"brain": (7500, 640, 3075), "liver": (1542, 833, 660), "resc": (4297, 1041, 764),
          "oct2017": (26315, 242, 726), "chest": (8000, 781, 16413), "histo": (5088, 1000, 1000)}
MASKED = {"brain", "liver", "resc"}
LEVELS = [round(0.015 * i, 3) for i in range(1, 21)]  # false positive rates of lesions.csv


def draw(seed, normal, anomalous, shift):
    """Labels and scores: normal N(0, 1), anomalous N(shift, 1)."""
    labels = np.repeat([0, 1], [normal, anomalous])
    return labels, np.random.default_rng(seed).normal(size=len(labels)) + shift * labels


def names_of(data, labels, patients):
    """Paths of the test images; with `patients`, three slices of a patient follow each other."""
    names = [f"BraTS2021_{i // 3:05}_{i % 3}.png" if patients else f"{data}{i}.png" for i in range(len(labels))]
    return [f"test/{'Ungood' if label else 'good'}/{name}" for label, name in zip(labels, names, strict=True)]


def make_run(root, data, method, seed=0, shift=1.0, counts=(12, 30, 30), curves=False, log=False, lesions=False,
             browser=False, patients=False, name=None, difficulty=0, told=None, **changes):
    """A run's folder. counts: train, test normal, test anomalous; difficulty: (N,), added to the images' scores;
    told: the counts in results.json, if others; changes: of results.json."""
    rng = np.random.default_rng([seed, *method.encode(), *data.encode()])
    labels, scores = draw([seed, *method.encode()], *counts[1:], shift)
    scores, told = scores + difficulty, told or counts
    paths = names_of(name or data, labels, patients)
    folder = Path(root) / data / method / f"seed{seed}"
    folder.mkdir(parents=True)
    common.write_csv(folder / "scores.csv", [dict(path=p, label=int(y), score=float(s))
                                             for p, y, s in zip(paths, labels, scores, strict=True)])
    rate = NormalDist().cdf(shift / 2**0.5)  # the AUROC that is meant
    if curves:
        t, power = np.linspace(0, 1, 60) ** 2, max((1 - rate) / rate, 0.02)
        common.write_csv(folder / "curves.csv", [dict(fpr=x, tpr=x ** (power / 2), pro=x**power) for x in t])
    if log:
        common.write_csv(folder / "log.csv", [
            dict(epoch=e, seconds=e, loss=float(np.exp(-e / 15) + 0.05 * rng.random()))
            | ({} if e % 5 else dict(valid_image_auroc=float(rate - 0.2 * np.exp(-e / 10) + 0.01 * rng.random())))
            for e in range(1, 51)])
    if lesions:
        rows = []
        for path in [p for p, y in zip(paths, labels, strict=True) if y]:
            area = int(np.exp(rng.uniform(3, 8)))
            overlap = np.clip(np.array(LEVELS) ** 0.5 + 0.08 * np.log(area) + rate - 1.2, 0, 1)
            rows.append(dict(path=path, lesion=1, area=area, overlap=round(float(overlap[5]), 4))
                        | {f"fpr_{x:.3f}": round(float(y), 4) for x, y in zip(LEVELS, overlap, strict=True)})
        common.write_csv(folder / "lesions.csv", rows)
    normal = np.sort(rng.normal(size=39))
    threshold, best = float(normal[36]), float(normal[30])
    known = common.image_metrics(labels, scores)
    decided = {}
    for end, at in (("", threshold), ("_f1", best)):
        hits, quiet = float((scores[labels == 1] > at).mean()), float((scores[labels == 0] <= at).mean())
        decided |= {f"sensitivity{end}": hits, f"specificity{end}": quiet,
                    f"balanced_accuracy{end}": (hits + quiet) / 2, f"f1{end}": 2 * hits / (1 + hits + 1 - quiet)}
    decided |= {f"sensitivity_at_{s}": float((scores[labels == 1] > np.quantile(scores[labels == 0], s / 100)).mean())
                for s in (90, 95)}
    pixel = dict(pixel_auroc=rate, pixel_ap=rate / 2, aupro=rate - 0.1, dice=rate / 3, dice_valid=rate / 2)
    decision = dict(specificity=0.95, reached=37 / 39, normal_scores=normal.tolist(), image=threshold, image_f1=best,
                    map_range=None if method in WITHOUT_MAPS else [0.0, 4.0], pixel=2.4 if lesions else None,
                    pixel_rule="best Dice on valid" if lesions else None, scans=None, **{"from": "valid"})
    results = dict(
        format=common.FORMAT, method=method, data=data, seed=seed, images="0123456789abcdef", check=None, notes={},
        metrics=known | decided | (pixel if lesions else dict.fromkeys(pixel)), decision=decision,
        counts=dict(train=dict(normal=told[0], anomalous=0), valid=dict(normal=39, anomalous=44),
                    test=dict(normal=told[1], anomalous=told[2])),
        epoch=35 if log else None, train_seconds=float(rng.uniform(20, 4000)),
        test_ms_per_image=float(rng.uniform(2, 200)),
        peak_memory_gib=dict(ram=float(rng.uniform(1, 9))), parameters=dict(total=10, trained=5),
        weights=[dict(name="x", weights="imagenet", sha256=None, trained=True)], args=dict(limit=None, image_size=256),
        changed={}, command="", device="cpu", threads=1, versions=dict(python="3.11.7", torch="2.6.0", numpy="2.0.0"),
        commit="0" * 40, finished=f"2026-01-0{seed % 9 + 1}T12:00:00+0000")
    if browser:
        draw_browser(folder, labels, scores, rng)
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


def blob(size, x, y, radius):
    """(size, size) in [0, 1], 1 at (x, y), which are in [0, 1] as is the radius."""
    down, across = np.mgrid[:size, :size] / size
    return np.exp(-((across - x) ** 2 + (down - y) ** 2) / (2 * radius**2))


def draw_browser(folder, labels, scores, rng, size=96):
    """The run's maps as palette PNG, and the benchmark's test images and masks, if they are not there yet."""
    shared = folder.parents[1] / "images-0123456789abcdef"
    first = not shared.exists()
    for place in (folder / "browser", shared):
        place.mkdir(exist_ok=True)
    places = np.random.default_rng(0).uniform(0.3, 0.7, (len(labels), 2))
    for i, (label, score, (x, y)) in enumerate(zip(labels, scores, places, strict=True)):
        if first:
            head = np.sqrt(blob(size, 0.5, 0.5, 0.22)) * (0.7 + 0.3 * np.sin(np.arange(size) / (3 + i % 5)))
            image = np.clip(0.8 * head + 0.3 * label * blob(size, x, y, 0.06), 0, 1)
            Image.fromarray((255 * image).astype(np.uint8)).save(shared / f"{i:05}.jpg")
            if label:
                Image.fromarray(blob(size, x, y, 0.06) > 0.4).save(shared / f"{i:05}-mask.png")
        heat = np.clip((score + 3) / 8, 0.1, 1) * blob(size // 2, x, y, 0.09)
        heat += 0.15 * rng.random(heat.shape)
        tile = Image.fromarray((255 * np.clip(heat, 0, 1)).astype(np.uint8)).convert("P")
        tile.putpalette(colormaps["inferno"](range(256), bytes=True)[:, :3].tobytes())
        tile.save(folder / "browser" / f"{i:05}.png")


def make_all(root, methods=METHODS, benchmarks=COUNTS, seeds=5, images=60, full=False):
    """Runs of all methods on all benchmarks, with image AUROC about as published; three are missing or unfinished."""
    with open(ROOT / "methods/published.csv", newline="") as f:
        printed = {(r["method"], r["benchmark"]): float(r["mean"] or 50) / 100 for r in csv.DictReader(f)
                   if r["metric"] == "image_auroc"}
    for data in benchmarks:
        counts = COUNTS[data] if full else (COUNTS[data][0], images // 2, images - images // 2)
        difficulty = np.random.default_rng(1).normal(size=sum(counts[1:]))
        for method in methods:
            auroc = min(printed.get((method, data), 0.6), 0.985)
            for seed in range(seeds):
                if (data, method) == ("histo", "draem") or (data, method, seed) == ("chest", "ddpm", 4):
                    continue
                maps = method not in WITHOUT_MAPS
                shift = 1.4 * 2**0.5 * NormalDist().inv_cdf(auroc)
                make_run(root, data, method, seed, shift, counts, told=COUNTS[data],
                         curves=maps and data in MASKED, lesions=maps and data in MASKED, log=method != "padim",
                         browser=maps and not full and seed == 0, patients=data == "brain", difficulty=difficulty,
                         changed=dict(backbone="resnet18") if data == "histo" else
                         dict(lr=0.01) if (data, method) == ("liver", "cfa") else {})
    if {"histo", "chest"} <= set(benchmarks):
        for place in ("histo/draem/seed0", "chest/ddpm/seed4"):
            (Path(root) / place).mkdir(parents=True)
        (Path(root) / "chest/ddpm/seed4/resume.pt").touch()
        common.write_csv(Path(root) / "chest/ddpm/seed4/log.csv", [dict(epoch=e, seconds=e) for e in range(1, 13)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--full", action="store_true")
    asked = parser.parse_args()
    make_all(asked.folder, images=asked.images, full=asked.full)
