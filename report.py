"""Tables over runs: `python report.py runs` prints mean and standard deviation over seeds for each benchmark.

Reads every <runs>/<data>/<method>/seed<k>/results.json; writes report.md and report.csv (one row a method and
benchmark, raw means and deviations) there. Marks behind a method's name: (u) untrained weights, (l) limited images,
(c) settings changed from the script's defaults, which are listed below the table, (d) they differ between seeds."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import common

METRICS = {  # results.json's names and the tables' headings
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "aupro": "PRO",
    "dice": "Dice",
}
MARKS = {
    "u": "untrained weights: shows that the code runs, no more",
    "l": "a limit on the images of each split and class",
    "c": "settings other than the published ones",
    "d": "settings that differ between the seeds of the row",
}


@dataclass
class Args:
    runs: Annotated[str, tyro.conf.Positional] = "runs"
    """the folder that the runs were written to (their --out)"""


def read_runs(folder):
    """{(data, method): [results, ...]} of all finished runs, seeds in order."""
    runs = defaultdict(list)
    for file in sorted(Path(folder).glob("*/*/seed*/results.json")):
        try:
            results = json.loads(file.read_text())
            runs[results["data"], results["method"]].append(results)
        except (json.JSONDecodeError, KeyError, OSError) as e:
            common.fail(f"{file} is not a run's results ({e}); remove it, or run that method again")
    if not runs:
        common.fail(f"no finished runs in {folder}: expected {folder}/<data>/<method>/seed<k>/results.json")
    return runs


def marks(results, changed):
    found = dict(
        u=any(not w["trained"] for r in results for w in r["weights"]),
        l=any(r["args"]["limit"] for r in results),
        c=any(changed),
        d=len(changed) > 1,
    )
    return "".join(f" ({k})" for k, is_so in found.items() if is_so)


def rows_of(runs):
    """One dict a benchmark and method: names, marks, seeds, and mean and standard deviation (n - 1) of each metric."""
    rows = []
    for (data, method), results in sorted(runs.items()):
        changed = {" ".join(f"--{k.replace('_', '-')} {v}" for k, v in r["changed"].items()) for r in results}
        row = dict(data=data, method=method, marks=marks(results, changed), seeds=len(results),
                   changed=" | ".join(sorted(changed)), leaks=common.leak_line(results[0]["leaks"]))
        costs = dict(train_seconds=[r["train_seconds"] for r in results], ms=[r["test_ms_per_image"] for r in results])
        for name, values in ({m: [r["metrics"][m] for r in results] for m in METRICS} | costs).items():
            known = [v for v in values if v is not None]
            row[name] = float(np.mean(known)) if known else None
            row[f"{name}_std"] = float(np.std(known, ddof=1)) if len(known) > 1 else None
        rows.append(row)
    return rows


def cell(row, name):
    if row[name] is None:
        return "-"
    deviation = row[f"{name}_std"]
    return f"{100 * row[name]:.2f}" + (f" ± {100 * deviation:.2f}" if deviation is not None else "")


def table(rows, metrics):
    """Header and lines of cells for one benchmark; a metric that no method has is left out."""
    shown = [m for m in metrics if any(r[m] is not None for r in rows)]
    header = ["Method", "Seeds", *(METRICS[m] for m in shown), "Train s", "ms/image"]
    lines = [[r["method"] + r["marks"], str(r["seeds"]), *(cell(r, m) for m in shown), f"{r['train_seconds']:.0f}",
              f"{r['ms']:.1f}"] for r in rows]
    return header, lines


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    rows = rows_of(read_runs(args.runs))
    markdown, used = [], set()
    for data in dict.fromkeys(r["data"] for r in rows):
        here = [r for r in rows if r["data"] == data]
        header, lines = table(here, METRICS)
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        print(f"\n{data}")
        for first, *others in [header, *lines]:
            cells = [f"{c:>{w}}" for c, w in zip(others, widths[1:], strict=True)]
            print("  ".join([f"  {first:<{widths[0]}}", *cells]))
        changed = [f"{r['method']}: {r['changed']}" for r in here if r["changed"]]
        leaks = sorted({r["leaks"] for r in here if r["leaks"]})
        print("".join(f"    {line}\n" for line in changed + leaks), end="")
        rule = ["---"] * len(header)
        markdown += [f"## {data}", "", *(f"| {' | '.join(line)} |" for line in [header, rule, *lines]), ""]
        markdown += [f"- `{line}`" for line in changed] + [f"- {line}" for line in leaks] + [""]
        used |= {k for k in MARKS for line in lines if f"({k})" in line[0]}
    notes = ["Percent, mean ± standard deviation over seeds."] + [f"({k}) {MARKS[k]}." for k in MARKS if k in used]
    if any(r["data"] == "phantom" for r in rows):
        notes.append("phantom is one brain, deformed, with painted lesions: a demonstration, no benchmark.")
    print("\n" + "\n".join(notes))
    with common.atomic(Path(args.runs) / "report.md") as tmp:
        tmp.write_text("\n".join(markdown + notes) + "\n")
    common.write_csv(Path(args.runs) / "report.csv", rows)
