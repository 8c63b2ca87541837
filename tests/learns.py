"""Does every trained method learn? One short training each, scored on a phantom of another seed.

    python tests/learns.py [METHOD ...] --weights mobilenet_v2.pth                        one seed: below a floor?
    python tests/learns.py [METHOD ...] --weights mobilenet_v2.pth --seeds 0 1 2 3 4      what floors come from
    python tests/learns.py --report                                                       the table of tests/README.md

Trained on 1,000 normal phantom images of seed 0, the last epoch kept; tested on 500 + 500 of seed 1, where the standard
error of an image AUROC is 0.018. FLAGS has the commands. *Untrained* is the same command with a learning rate of 0
(1e-30: no weight moves) for one epoch, which fills what is no weight: batch norm, memory banks, centres, densities.

The floor of a score is the mean over FLOOR_SEEDS less two standard deviations of a single run. It counts if it exceeds
the mean of the untrained (of two seeds) by more than 0.05; a method without such a floor does not learn. The exit
status is 1 then, and if another seed is below a floor.

Each training adds a line to learns.jsonl, with its losses; a finished one is skipped (--again: unless it is of another
commit; the newest line counts). --times 4 trains four times as many epochs, to see whether more would help."""

import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common

NET = "--backbone mobilenet_v2 --weights WEIGHTS --image-size 128"
FLAGS = {  # of each method's script
    "anogan": "--epochs 16 --image-size 32 --width 16 --batch-size 16 --lr 1e-3 --steps 60 --search-lr 0.05 "
              "--feature-weight 0.5",
    "cfa": f"--epochs 1 {NET} --batch-size 8",
    "cflow": f"--epochs 1 {NET} --batch-size 8 --blocks 4 --lr 1e-3",
    "clip_recon": f"--epochs 1 {NET} --model tiny --clip-weights none --da-levels 0 --prompt-tokens 4 --lr 1e-2 "
                  "--patches-per-step 32",
    "csflow": f"--epochs 4 {NET} --batch-size 8 --hidden 64 --lr 1e-3",
    "cutpaste": "--epochs 400 --backbone resnet18 --weights none --image-size 64 --batch-size 16 --lr 0.1",
    "ddpm": "--epochs 2 --image-size 32 --base-channels 16 --multipliers 1 1 2 --attention 8 --noise-level 100 "
            "--sample-steps 4 --lr 2e-3 --batch-size 4",
    "deepsvdd": "--epochs 10 --ae-epochs 5 --ae-lr 1e-4 --ae-batch-size 20 --batch-size 20",
    "draem": "--epochs 6 --textures images --image-size 64 --width 16 --batch-size 4 --lr 5e-4",
    "fanogan": "--epochs 10 --gan-epochs 12 --image-size 32 --batch-size 16 --lr 1e-3",
    "ganomaly": "--epochs 100 --image-size 32 --features 16 --lr 5e-4",
    "mkd": f"--epochs 1 {NET} --batch-size 8 --lr 3e-3",
    "patchsvdd": "--epochs 1 --image-size 96 --batch-size 8 --repeat 2 --bank 2000 --lr 1e-3 --svdd 0.001",
    "rd4ad": f"--epochs 1 {NET} --batch-size 8",
    "simplenet": f"--epochs 2 {NET}",
    "stfpm": f"--epochs 1 {NET} --batch-size 4 --lr 0.8",
    "utrad": f"--epochs 3 {NET} --image-size 64 --width 64 --layers 1 --batch-size 2 --lr 3e-3",
}
STAND_STILL = {  # more than `--lr 1e-30 --epochs 1`
    "deepsvdd": "--ae-lr 1e-30 --ae-epochs 1", "fanogan": "--gan-epochs 1", "patchsvdd": "--repeat 1",
    "simplenet": "--lr-adaptor 1e-30"}
SCORES = ["image_auroc", "pixel_auroc", "aupro"]  # the last two where there are maps; older lines have no AUPRO
FLOOR_SEEDS, MARGIN, UNTRAINED = range(5), 0.05, 2


@dataclass
class Args:
    methods: Annotated[list[str], tyro.conf.Positional] = field(default_factory=lambda: list(FLAGS))
    """methods to train; all by default"""
    weights: Path = Path("mobilenet_v2.pth")
    """ImageNet weights of torchvision's mobilenet_v2"""
    seeds: tuple[int, ...] = (5,)
    """seeds to train with"""
    times: int = 1
    """so many times the epochs; such lines are no part of floors"""
    jobs: int = 1
    """trainings at a time, one thread each"""
    again: bool = False
    """train again what was trained at another commit"""
    report: bool = False
    """only print the table"""
    out: Path = ROOT / "runs/learns"
    """the phantom and the run folders"""
    jsonl: Path = Path(__file__).with_suffix(".jsonl")
    """a line is added for each training"""


def run_script(script, *flags):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    if done.returncode:
        raise common.Error(f"{script}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")


def make_phantom(out):
    """The benchmark folder: train and valid of seed 0, test of seed 1."""
    if not (out / "phantom").exists():
        run_script("datasets/phantom.py", "--root", out / "one", "--train", 1, "--valid", 1, "--test", 500, "--seed", 1)
        run_script("datasets/phantom.py", "--root", out / "new", "--train", 1000, "--valid", 50, "--test", 1)
        shutil.rmtree(out / "new/phantom/test")
        (out / "one/phantom/test").rename(out / "new/phantom/test")
        (out / "new/phantom").rename(out / "phantom")
    return out / "phantom"


def train(args, data, method, seed, flags):
    """A run of the method's script: its scores, its losses (at most 20 epochs of them), commit and seconds."""
    out, started = args.out / f"{method}-{seed}", time.perf_counter()
    flags = [str(args.weights.resolve()) if flag == "WEIGHTS" else flag for flag in flags.split()]
    run_script(f"methods/{method}.py", "--data", data, "--root", args.out, "--out", out, "--device", "cpu", "--seed",
               seed, "--maps", 0, "--overwrite", "--eval-every", 10**6, *flags)  # the last epoch alone is looked at
    folder = out / "phantom" / method / f"seed{seed}"
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    names = [name for name in rows[0] if name not in ("epoch", "seconds") and not name.startswith("valid_")]
    losses = {name: [float(f"{float(row[name]):.4g}") for row in rows[:: 1 + len(rows) // 20]] for name in names}
    results = json.loads((folder / "results.json").read_text())
    shutil.rmtree(out)
    scores = {name: round(results["metrics"][name], 4) for name in SCORES if results["metrics"][name] is not None}
    return scores, dict(seconds=round(time.perf_counter() - started, 1), losses=losses, commit=results["commit"])


def line_of(args, data, method, seed):
    """A line of learns.jsonl; untrained, too, until UNTRAINED lines of the method have it."""
    flags = re.sub(r"epochs (\d+)", lambda found: f"epochs {int(found[1]) * args.times}", FLAGS[method])
    still = f"{flags} --epochs 1 --lr 1e-30 {STAND_STILL.get(method, '')}"  # of two values the last counts
    known = sum(bool(line["untrained"]) for (name, *_), line in read_lines(args.jsonl).items() if name == method)
    untrained = train(args, data, method, seed, still)[0] if known < UNTRAINED else None
    trained, more = train(args, data, method, seed, flags)
    return dict(method=method, seed=seed, times=args.times, flags=FLAGS[method], untrained=untrained,
                trained=trained, **more)


def read_lines(file):
    """{(method, seed, times): line} of the commands in FLAGS; the newest of each."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {(l["method"], l["seed"], l["times"]): l for l in lines if l["flags"] == FLAGS.get(l["method"])}


def summary(lines, method, budget=1):
    """Of each score of a method: name, untrained (mean), trained (its values), floor or None, {other seed: score}."""
    of_method = {key[1:]: line for key, line in sorted(lines.items()) if key[0] == method}
    ours = {seed: line for (seed, times), line in of_method.items() if times == budget}
    base = [line for seed, line in ours.items() if seed in FLOOR_SEEDS]
    for name in SCORES:
        untrained = [line["untrained"][name] for line in of_method.values() if name in (line["untrained"] or ())]
        trained, floor = [line["trained"][name] for line in base if name in line["trained"]], None
        if untrained and trained:
            untrained = statistics.mean(untrained)
            if len(trained) == len(FLOOR_SEEDS):
                floor = statistics.mean(trained) - 2 * statistics.stdev(trained)
                floor = floor if floor > untrained + MARGIN else None
            others = {seed: line["trained"][name] for seed, line in ours.items()
                      if seed not in FLOOR_SEEDS and name in line["trained"]}
            yield name, untrained, trained, floor, others


def report(lines):
    """Prints a row for each score of each method and budget."""
    print("| method | score | untrained | trained | floor | other seeds | seconds |\n|" + " --- |" * 7)
    for method, budget in sorted({(method, times) for method, _, times in lines}):
        seconds = [line["seconds"] for key, line in lines.items() if (key[0], key[2]) == (method, budget)]
        label = method if budget == 1 else f"{method}, {budget} times the epochs"
        for name, untrained, trained, floor, others in summary(lines, method, budget):
            spread = f" ± {statistics.stdev(trained):.3f}" if len(trained) > 1 else ""
            title = name.replace("_auroc", " AUROC").replace("aupro", "AUPRO")
            print(f"| {label} | {title} | {untrained:.3f} | {statistics.mean(trained):.3f}"
                  f"{spread} ({len(trained)}) | {floor and round(floor, 3) or '-'} "
                  f"| {', '.join(f'{value:.3f}' for value in others.values())} | {statistics.mean(seconds):.0f} |")


def failures(lines, methods):
    """What is wrong with the methods, a sentence each."""
    for method in methods:
        rows = list(summary(lines, method))
        if not any(floor for *_, floor, _ in rows):
            yield f"{method} does not learn, or has fewer than {len(FLOOR_SEEDS)} seeds for a floor"
        for name, *_, floor, others in rows:
            for seed, score in others.items():
                if floor is not None and score < floor:
                    yield f"{method}, seed {seed}: {name} {score:.3f} is below the floor {floor:.3f}"


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    if unknown := set(args.methods) - set(FLAGS):
        raise common.Error(f"no training of {', '.join(sorted(unknown))}; there are {', '.join(FLAGS)}")
    lines, wrong = read_lines(args.jsonl), []
    if args.report:
        report(lines)
        raise SystemExit
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40"],
                            capture_output=True, text=True).stdout.strip()
    done = {key for key, line in lines.items() if not args.again or line["commit"] == commit}
    left = [(m, seed) for seed in args.seeds for m in args.methods if (m, seed, args.times) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        data = left and make_phantom(args.out)  # before the first, not by each
        jobs = {pool.submit(line_of, args, data, *job): job for job in left}
        for job in as_completed(jobs):
            try:
                line = job.result()
            except common.Error as e:
                wrong.append(f"{jobs[job]}: {e}")
                continue
            with open(args.jsonl, "a") as f:
                f.write(json.dumps(line) + "\n")
            print(*jobs[job], "untrained", line["untrained"], "trained", line["trained"], line["seconds"], flush=True)
    wrong += failures(read_lines(args.jsonl), args.methods) if args.times == 1 else ()
    print(*wrong, sep="\n", file=sys.stderr)
    raise SystemExit(bool(wrong))
