"""Record how the scripts of one checkout behave, to compare them before and after a rewrite (tests/before.jsonl).

    python tests/before.py --root CHECKOUT --weights FILE --brain FOLDER --out FOLDER --jsonl FILE [METHOD ...]

Each method runs on brain_mri and, if it gives anomaly maps, on the phantom, which is made below --out unless --phantom
names one. Every run is on the CPU with one thread and seed 0; CLIP is the untrained tiny model. One line a pair:
losses: name -> its values in the first five steps. An epoch of the run `few` is one step on four images.
notes: what else that run reports, such as the last losses of an earlier stage.
scores: path -> score of four test images a class, computed from the model.pt of the run `few` (from that of --states,
    if given: then one state can be scored by two versions of the code; score_error says why if that failed).
few_metrics: the metrics of these images. On the phantom they depend on the anomaly maps.
metrics, epoch, train_seconds, test_ms_per_image: of the run `main`, a short training and the whole test split.
    train_seconds ends with the epoch that was kept; all_seconds is the time until the last epoch was trained.

The seconds are noisy: the old code was measured on a machine that other work shared. Read them as "about as fast".
Lines already in the file are skipped, so the same command continues an interrupted recording. The run folders stay in
--out: few/, scores/ and main/, each with <data>/<method>/seed0; their output is in logs/."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

NET = "--backbone mobilenet_v2 --weights WEIGHTS"
CLIP = "--model tiny --clip-weights none --image-size 128"
SMALL = "--image-size 128 --batch-size 8"
FLAGS = {  # of the run `main`: 5 to 60 seconds each
    "anogan": "--image-size 32 --width 16 --batch-size 16 --epochs 60 --lr 1e-3 --steps 30 --search-lr 0.02",
    "cfa": f"{NET} --image-size 128 --epochs 8",
    "cflow": f"{NET} {SMALL} --blocks 4 --epochs 8",
    "clip_recon": f"{NET} {CLIP} --da-levels 0 --prompt-tokens 4 --epochs 6 --lr 1e-2 --patches-per-step 32",
    "clip_zeroshot": f"{CLIP} --clip-size 128",
    "csflow": f"{NET} {SMALL} --hidden 64 --epochs 6",
    "cutpaste": f"{NET} {SMALL} --epochs 120 --freeze-epochs 3",
    "ddpm": "--image-size 32 --base-channels 16 --multipliers 1 1 2 --attention 8 --noise-level 100 --sample-steps 4 "
            "--lr 2e-3 --batch-size 4 --epochs 8",
    "deepsvdd": "--ae-epochs 10 --ae-lr 1e-4 --ae-batch-size 20 --epochs 30 --batch-size 20",
    "draem": "--textures images --image-size 64 --width 16 --epochs 8 --lr 1e-3",
    "fanogan": "--image-size 32 --gan-epochs 16 --epochs 16",
    "ganomaly": "--image-size 32 --features 32 --epochs 80",
    "mkd": f"{NET} {SMALL} --epochs 10",
    "padim": NET,
    "patchcore": NET,
    "patchsvdd": "--image-size 96 --batch-size 2 --repeat 1 --epochs 4 --bank 2000",
    "rd4ad": f"{NET} {SMALL} --epochs 6",
    "simplenet": f"{NET} --image-size 128 --epochs 12",
    "stfpm": f"{NET} --image-size 128 --batch-size 4 --lr 0.8 --epochs 6",
    "utrad": f"{NET} --image-size 64 --width 64 --layers 1 --batch-size 2 --lr 3e-3 --epochs 12",
    "winclip": f"{CLIP} --clip-size 128 --shots 4",
}
UNTRAINED = {"clip_zeroshot", "padim", "patchcore", "winclip"}
IMAGE_ONLY = {"anogan", "cutpaste", "deepsvdd", "fanogan", "ganomaly"}  # methods without anomaly maps
FEW = "--limit 4 --batch-size 4"
FIVE_STEPS = "--epochs 5 --eval-every 1"  # an epoch of four images in batches of four is one step
EARLIER_STAGE = {"deepsvdd": "--ae-epochs 5 --ae-batch-size 4", "fanogan": "--gan-epochs 5"}  # five steps, too


@dataclass
class Args:
    methods: Annotated[list[str], tyro.conf.Positional] = field(default_factory=lambda: list(FLAGS))
    """methods to record; all by default"""
    root: Path = Path(__file__).resolve().parents[1]
    """the checkout whose scripts are run"""
    weights: Path = Path("mobilenet_v2.pth")
    """ImageNet weights of torchvision's mobilenet_v2"""
    brain: Path = Path("brain_mri")
    """benchmark folder without masks"""
    phantom: Path | None = None
    """benchmark folder with masks; by default datasets/phantom.py of the checkout makes it below --out"""
    out: Path = Path("before-runs")
    """the run folders are kept here"""
    states: Path | None = None
    """the --out of an earlier recording, whose states are scored instead of this one's"""
    jsonl: Path = Path("before.jsonl")
    """a line is added for each method and benchmark"""


def run_script(args, log, script, *flags):
    """Run a script of the checkout on one CPU thread; its output goes to a file. RuntimeError if it fails."""
    file = args.out / "logs" / f"{log}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as f:
        status = subprocess.run([sys.executable, args.root / script, *map(str, flags)], stdout=f, stderr=f,
                                cwd=args.root, env=os.environ | dict(OMP_NUM_THREADS="1")).returncode
    if status:
        raise RuntimeError(f"{file}: {file.read_text().strip().splitlines()[-1:]}")


def run_method(args, kind, method, data, flags):
    """Run a method; returns its run folder. kind: few, scores or main."""
    flags = [str(args.weights) if flag == "WEIGHTS" else flag for flag in flags]
    out = args.out / kind
    run_script(args, f"{kind}-{data.name}-{method}", f"methods/{method}.py", "--data", data, "--root", args.out,
               "--out", out, "--device", "cpu", "--seed", 0, "--maps", 0, "--overwrite", *flags)
    return out / data.name / method / "seed0"


def read_csv(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def read_losses(folder):
    """Of a run that validates after each step: name -> the loss of each step."""
    rows = read_csv(folder / "log.csv")
    names = [n for n in rows[0] if n not in ("epoch", "seconds") and not n.startswith("valid_")]
    return {name: [float(row[name]) for row in rows] for name in names}


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def record(args, method, data):
    """The line of one method on one benchmark."""
    main, few = FLAGS[method], [*FLAGS[method].split(), *FEW.split()]
    if method not in UNTRAINED:
        few += FIVE_STEPS.split()
    few += EARLIER_STAGE.get(method, "").split()
    line = dict(method=method, data=data.name, main=main, few=" ".join(few))

    folder = run_method(args, "few", method, data, few)
    results = read_results(folder)
    line |= dict(losses={} if method in UNTRAINED else read_losses(folder), notes=results["notes"],
                 few_epoch=results["epoch"])

    state = (args.states or args.out) / "few" / data.name / method / "seed0/model.pt"
    try:
        folder = run_method(args, "scores", method, data, [*few, "--checkpoint", state])
        line["scores"] = {row["path"]: float(row["score"]) for row in read_csv(folder / "scores.csv")}
        line["few_metrics"] = read_results(folder)["metrics"]
    except RuntimeError as e:
        line["score_error"] = str(e)

    folder = run_method(args, "main", method, data, main.split())
    results = read_results(folder)
    line |= {name: results[name] for name in ("metrics", "epoch", "train_seconds", "test_ms_per_image")}
    if method not in UNTRAINED:
        line["all_seconds"] = float(read_csv(folder / "log.csv")[-1]["seconds"])
    return line


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for name in ("root", "weights", "brain", "phantom", "out", "states", "jsonl"):  # scripts run in another folder
        if path := getattr(args, name):
            setattr(args, name, path.resolve())
    if args.phantom is None:
        args.phantom = args.out / "phantom"
        if not args.phantom.exists():
            run_script(args, "phantom", "datasets/phantom.py", "--root", args.out)
    done, failed = set(), False
    if args.jsonl.exists():
        done = {(line["method"], line["data"]) for line in map(json.loads, args.jsonl.read_text().splitlines())}
    for method in args.methods:
        for data in [args.brain] if method in IMAGE_ONLY else [args.brain, args.phantom]:
            if (method, data.name) in done:
                continue
            try:
                line = record(args, method, data)
            except RuntimeError as e:
                failed = True
                print(f"{method} on {data.name} failed: {e}", file=sys.stderr, flush=True)
                continue
            with open(args.jsonl, "a") as f:
                f.write(json.dumps(line) + "\n")
            print(f"{method} on {data.name}: {line['metrics']['image_auroc']:.3f}, {line['train_seconds']:.0f} s, "
                  f"{line['test_ms_per_image']:.0f} ms", flush=True)
    raise SystemExit(failed)
