"""The GPU side, proved and measured on one GPU: `python tests/gpu.py right [METHOD ...]`.

Needs no network: backbones and CLIP are untrained unless --weights gives mobilenet_v2's. On a bare machine, bring the
packages of requirements.txt that it lacks. `--device cpu --small` runs the same in small, to test this script.

right: every script on the GPU with its published settings, on 2 x 32 phantom images, six at a time:
    same:   the losses of the first three steps (fitted and zero-shot methods: the scores) on GPU and CPU, from the same
            random numbers, with TF32 and autocast off: the largest relative difference
    scores: one trained state scored with TF32 and autocast on and off: the largest difference, in ranges of the scores,
            and that of the AUROC
    again:  a run that stops after its first epoch and resumes gives the scores of one that does not (also: same seed,
            same scores)
    GB:     the most GPU memory that PyTorch held in training and testing at the default batch size"""

import contextlib
import csv
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import common

SLOW = ["clip_recon", "winclip", "ddpm", "draem", "patchsvdd", "anogan"]  # begin with these
METHODS = SLOW + sorted(p.stem for p in (ROOT / "methods").glob("*.py") if p.stem not in SLOW)
UNTRAINED = {"clip_recon": ["--clip-weights", "none"], "clip_zeroshot": ["--clip-weights", "none"],
             "winclip": ["--clip-weights", "none"], "draem": ["--textures", "images"]}
STAGES = {"fanogan": "--gan-epochs", "deepsvdd": "--ae-epochs"}  # what is trained before --epochs begin
# Budgets. Published settings otherwise.
FEW = {"ddpm": 4, "clip_recon": 8, "patchsvdd": 8}  # images of each split and class, else 32
BRIEF = {"patchsvdd": ["--repeat", 10]}
STEP = {"ddpm": ["--sample-steps", 2], "anogan": ["--steps", 5], "patchsvdd": ["--repeat", 1]}  # to compare devices
BATCH = {"clip_recon": 1, "ddpm": 1, "csflow": 4}  # images a step, to compare devices; else 2


@dataclass
class Args:
    part: Annotated[Literal["right"], tyro.conf.Positional]
    """what to run, see above"""
    methods: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """only these"""
    device: str = "cuda"
    """cuda, or cpu to test this script"""
    small: bool = False
    """smallest budgets, for a CPU"""
    out: str = "gpu.jsonl"
    """a JSON line for each method"""
    worker: str | None = None
    """the phantom's root: do one method in this process (called by this script itself)"""


class DrawOnCPU(TorchFunctionMode):
    """Random numbers come from the CPU's generator, so that all devices draw the same; no dropout."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in ("rand", "randn", "randint", "randperm"):
            device = kwargs.pop("device", "cpu")
            return function(*args, **kwargs).to(device)
        if name in ("rand_like", "randn_like"):
            return function(args[0].cpu(), **kwargs).to(args[0].device)
        if name in ("uniform_", "normal_", "exponential_", "bernoulli_") and args:
            return args[0].copy_(function(torch.empty(args[0].shape), *args[1:], **kwargs))
        if name == "dropout":
            return args[0]
        if name == "scaled_dot_product_attention":
            kwargs["dropout_p"] = 0.0
        return function(*args, **kwargs)


@contextlib.contextmanager
def exactly():
    """Without TF32 and autocast."""
    autocast, flags = torch.autocast, (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [f.allow_tf32 for f in flags]
    torch.autocast = lambda *_, **__: contextlib.nullcontext()
    try:
        for f in flags:
            f.allow_tf32 = False
        yield
    finally:
        torch.autocast = autocast
        for f, value in zip(flags, before, strict=True):
            f.allow_tf32 = value


class Stopped(Exception):
    pass


def run(method, out, *flags, stop=None):
    """One run of a script in this process: its results.json (None where it was stopped or predicts), scores, and
    losses, [{name: value} by epoch]."""
    argv, validate = sys.argv, common.Run.validate

    def and_stop(self, model, epoch, *rest, **losses):
        validate(self, model, epoch, *rest, **losses)
        if epoch == stop:
            os.close(self.lock)
            raise Stopped

    sys.argv = [f"{method}.py", "--out", str(out), *map(str, flags)]
    try:
        common.Run.validate = and_stop
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Stopped):
            runpy.run_path(str(ROOT / f"methods/{method}.py"), run_name="__main__")
    finally:
        sys.argv, common.Run.validate = argv, validate
    folder = next(out.glob(f"*/{method}/seed0"))
    results, scores, losses = None, None, []
    if (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text())
    if (folder / "scores.csv").exists():
        scores = np.array([float(row["score"]) for row in read_csv(folder / "scores.csv")])
    if (folder / "log.csv").exists():
        losses = [{k: float(v) for k, v in row.items() if v and not k.startswith(("valid", "epoch", "seconds"))}
                  for row in read_csv(folder / "log.csv")]
    return results, scores, losses


def read_csv(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def relative(ours, theirs):
    return float(np.abs(np.subtract(ours, theirs)).max() / max(np.abs(theirs).max(), 1e-30))


def right(method, args, root, out):
    """A row of the table: {what: figure}, for one method."""
    row, device = dict(method=method), args.device
    fixed = ["--data", "phantom", "--root", root, "--maps", 0, *UNTRAINED.get(method, [])]
    source = (ROOT / f"methods/{method}.py").read_text()
    if "\n    weights: str" in source:
        fixed += ["--weights", "none"]
    if args.small:
        from test_methods import SHORT

        fixed += SHORT[method]
    trained = "\n    epochs: int" in source
    stage = [STAGES[method], 2] if method in STAGES else []

    # the first three steps, on both devices
    batch = BATCH.get(method, 2)
    short = [*fixed, "--limit", batch, *STEP.get(method, [])]
    if trained:
        short += ["--batch-size", batch, "--epochs", 3, "--eval-every", 3, *stage]
    with exactly(), DrawOnCPU():
        (_, scores, losses), (_, known, steps) = (run(method, out / d, *short, "--device", where)
                                                  for d, where in (("g", device), ("c", "cpu")))
    row["same"] = max(relative([r[k] for r in losses[:3]], [r[k] for r in steps[:3]]) for k in steps[0]) if trained \
        else relative(scores, known)

    # as published
    limit = 4 if args.small else FEW.get(method, 32)
    usual = [*fixed, "--limit", limit, "--device", device, *BRIEF.get(method, []), *stage]
    if trained:
        usual += ["--epochs", 2, "--eval-every", 1]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        results, scores, _ = run(method, out / "a", *usual)
    row["warnings"] = sorted({str(w.message).split("\n")[0][:150] for w in caught})
    row["gb"] = results["peak_memory_gib"].get("gpu", 0) * 2**30 / 1e9
    row["test_ms"], row["train_s"] = results["test_ms_per_image"], results["train_seconds"]
    if trained:
        run(method, out / "b", *usual, stop=1)
    _, again, _ = run(method, out / "b", *usual)
    row["again"] = bool(np.array_equal(scores, again))
    row["again_difference"] = relative(again, scores)

    checkpoint = ["--checkpoint", results_folder(out / "a", method) / "model.pt", "--root", root, "--device", device]
    with exactly():
        other, exact, _ = run(method, out / "e", *checkpoint, "--limit", limit, "--maps", 0)
    row["scores"] = float(np.abs(scores - exact).max() / (np.ptp(scores) or 1))
    row["auroc"] = abs(other["metrics"]["image_auroc"] - results["metrics"]["image_auroc"])
    predicted = run(method, out / "p", *checkpoint, "--predict", root / "few")[1]
    row["predict"] = bool(len(predicted) == 3 and np.isfinite(predicted).all())
    return row


def results_folder(out, method):
    return next(out.glob(f"*/{method}/seed0"))


def work(args):
    """One method, in this process: its row as the last line on stdout."""
    method, started = args.methods[0], time.time()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 8))
    with tempfile.TemporaryDirectory() as out:
        try:
            row = right(method, args, Path(args.worker), Path(out))
        except BaseException as e:  # SystemExit, too: a row all the same
            row = dict(method=method, error=f"{type(e).__name__}: {e}"[:300],
                       where=traceback.format_exc().splitlines()[-4:-1])
    print(json.dumps(row | dict(seconds=round(time.time() - started, 1))))


def in_processes(args):
    """The rows of all methods, six at a time; each is written to args.out as it comes."""
    with tempfile.TemporaryDirectory() as root:
        size, count = (64, 4) if args.small else (256, 32)
        subprocess.run([sys.executable, ROOT / "datasets/phantom.py", "--root", root, "--size", str(size),
                        *(f"--{split}={count}" for split in common.SPLITS)], check=True, stdout=subprocess.DEVNULL)
        (Path(root) / "few").mkdir()
        for image in sorted((Path(root) / "phantom/test/Ungood/img").iterdir())[:3]:
            shutil.copy(image, Path(root) / "few")

        def one(method):
            command = [sys.executable, __file__, args.part, method, "--device", args.device, "--worker", root,
                       *["--small"] * args.small]
            done = subprocess.run(command, capture_output=True, text=True)
            try:
                row = json.loads(done.stdout.splitlines()[-1])
            except (IndexError, ValueError):
                row = dict(method=method, error=f"exit status {done.returncode}")
            if "error" in row or done.stderr:
                row["stderr"] = done.stderr[-600:]
            with open(args.out, "a") as f:
                f.write(json.dumps(row) + "\n")
            print(row["method"], {k: v for k, v in row.items() if k != "method"}, flush=True)
            return row

        with ThreadPoolExecutor(2 if args.small else 8) as pool:
            return list(pool.map(one, args.methods or METHODS))


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise common.Error("no GPU: PyTorch sees none here; --device cpu --small tests this script")
    if args.worker:
        work(args)
    else:
        in_processes(args)
