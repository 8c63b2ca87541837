"""The GPU side, proved and measured on one GPU: `python tests/gpu.py right|fast|full|suite [METHOD ...]`.

Needs no network: backbones and CLIP are untrained, and DRAEM's textures are the training images. On a bare machine,
bring the packages of requirements.txt that it lacks. `--device cpu --small` runs the same in small, to test this
script. Each part appends JSON lines to --out as it goes.

right: every script with its published settings, on 32 + 32 phantom images, eight at a time.
    same:   the losses of the first three steps (fitted and zero-shot methods: the scores) on GPU and CPU, from the
            same random numbers, without TF32, autocast and dropout: largest relative difference at the first step, and
            of all
    scores: one trained state scored with TF32 and autocast on and off: the largest difference, as a share of the range
            of the scores, and the difference of the AUROCs
    again:  a run that stops after its first epoch and resumes gives the very scores of one that does not
    GB:     the most GPU memory that PyTorch held in training and testing at the default batch size
fast: images a second in training and in scoring (decoded images to metrics), next to the bare forward (and backward)
    passes of the same networks on the same inputs; published settings, one at a time.
full: PatchCore's coreset at the size of oct2017 on made-up features, PaDiM with wide_resnet50_2 on 7,500 images,
    clip_recon's default model.
suite: from the lines of `fast`: hours of each method on each benchmark at the published number of images and epochs."""

import contextlib
import csv
import gc
import io
import json
import math
import os
import runpy
import shutil
import signal
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
sys.path[:0] = [str(ROOT), str(ROOT / "methods"), str(ROOT / "datasets")]
import common

SLOW = ["clip_recon", "winclip", "ddpm", "draem", "patchsvdd", "anogan"]  # begin with these
METHODS = SLOW + sorted(p.stem for p in (ROOT / "methods").glob("*.py") if p.stem not in SLOW)
UNTRAINED = {"clip_recon": ["--clip-weights", "none"], "clip_zeroshot": ["--clip-weights", "none"],
             "winclip": ["--clip-weights", "none"], "draem": ["--textures", "images"]}
STAGES = {"fanogan": "--gan-epochs", "deepsvdd": "--ae-epochs"}  # what is trained before --epochs begin
# Budgets. Published settings otherwise.
FEW = {"ddpm": 4, "clip_recon": 8, "patchsvdd": 8}  # images of each split and class, else 32
FAST = {"ddpm": 8, "cflow": 32, "patchsvdd": 16, "clip_recon": 64, "winclip": 64, "anogan": 64, "draem": 64}  # else 256
SECONDS = 40  # most that `fast` gives to a method
BRIEF = {"patchsvdd": ["--repeat", 10], "cutpaste": ["--steps-per-epoch", 8]}
STEP = {"ddpm": ["--sample-steps", 2], "anogan": ["--steps", 5], "patchsvdd": ["--repeat", 1]}  # to compare devices
BATCH = {"clip_recon": 1, "ddpm": 1, "csflow": 4, "cutpaste": 4}  # images a step, to compare devices; else 2


@dataclass
class Args:
    part: Annotated[Literal["right", "fast", "full", "suite"], tyro.conf.Positional]
    """what to run, see above"""
    methods: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """only these"""
    device: str = "cuda"
    """cuda, or cpu to test this script"""
    small: bool = False
    """smallest budgets, for a CPU"""
    out: Path = Path(__file__).with_suffix(".jsonl")
    """a line is added for each part and method"""
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


def too_long(*_):
    raise TimeoutError(f"took more than {SECONDS} s")


def run(method, out, *flags, stop=None):
    """One run of a script in this process: its results.json (None where it was stopped or predicts), scores, and
    losses, [{name: value} by epoch]."""
    argv, keep = sys.argv, common.Run.keep

    def and_stop(self, model, epoch=None, file="model.pt", **more):
        keep(self, model, epoch, file, **more)
        if file == "resume.pt" and epoch == stop and not more["first_stage"]:
            os.close(self.lock)
            raise Stopped

    sys.argv = [f"{method}.py", "--out", str(out), *map(str, flags)]
    try:
        common.Run.keep = and_stop
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Stopped):
            runpy.run_path(str(ROOT / f"methods/{method}.py"), run_name="__main__")
    finally:
        sys.argv, common.Run.keep = argv, keep
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


def settings(method, root, small):
    """The flags that all runs of a method have, and whether it has epochs."""
    flags = ["--data", "phantom", "--root", root, "--maps", 0, *UNTRAINED.get(method, [])]
    source = (ROOT / f"methods/{method}.py").read_text()
    if "\n    weights: str" in source:
        flags += ["--weights", "none"]
    if small:
        from test_methods import SHORT

        flags += SHORT[method]
    return flags, "\n    epochs: " in source


def right(method, args, root, out):
    """A row of the table: {what: figure}, for one method."""
    row, device = dict(part="right", method=method), args.device
    fixed, trained = settings(method, root, args.small)
    stage = [STAGES[method], 2] if method in STAGES else []

    # the first three steps, on both devices
    batch = BATCH.get(method, 2)
    short = [*fixed, "--limit", batch, *STEP.get(method, [])]
    if trained:
        short += ["--batch-size", batch, "--epochs", 3, "--eval-every", 3, *stage]
    with exactly(), DrawOnCPU():
        (_, scores, losses), (_, known, steps) = (run(method, out / d, *short, "--device", where)
                                                  for d, where in (("g", device), ("c", "cpu")))
    row["same"] = relative(scores, known)
    if trained:
        by_step = [max(abs(mine[k] - step[k]) / max(abs(step[k]), 1e-6) for k in step)
                   for mine, step in zip(losses[:3], steps[:3], strict=True)]
        row["same_first"], row["same"] = by_step[0], max(by_step)

    # as published
    limit = 4 if args.small else FEW.get(method, 32)
    usual = [*fixed, "--limit", limit, "--device", device, *BRIEF.get(method, []), *stage]
    if trained:
        usual += ["--epochs", 2, "--eval-every", 1]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", ResourceWarning)  # of files that live as long as their objects
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


@contextlib.contextmanager
def phantom(args):
    """The root folder of a phantom benchmark."""
    size, count = (64, 4) if args.small else (256, 128 if args.part == "fast" else 32)
    with tempfile.TemporaryDirectory() as root:
        subprocess.run([sys.executable, ROOT / "datasets/phantom.py", "--root", root, "--size", str(size),
                        f"--train={count}", f"--valid={min(count, 32)}", f"--test={min(count, 64)}"], check=True,
                       stdout=subprocess.DEVNULL)
        if args.part == "fast" and not args.small:  # every training image twice, for longer epochs
            for image in list(Path(root, "phantom/train").rglob("*.png")):
                shutil.copy(image, image.with_name(f"copy_{image.name}"))
        yield Path(root)


def note(args, row):
    """Append a row to --out and print it; figures with three digits."""
    if "device" not in row:
        device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
        row |= dict(device=device, torch=torch.__version__)
    with open(args.out, "a") as f:
        f.write(json.dumps(row) + "\n")
    shown = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}
    print(*(f"{k} {v}" for k, v in shown.items() if k not in ("part", "device", "torch")), sep="  ", flush=True)


def in_processes(args):
    """`right` for all methods, eight processes at a time."""
    with phantom(args) as root:
        (root / "few").mkdir()
        for image in sorted((root / "phantom/test/Ungood/img").iterdir())[:3]:
            shutil.copy(image, root / "few")

        def one(method):
            command = [sys.executable, __file__, args.part, method, "--device", args.device, "--worker", root,
                       *["--small"] * args.small]
            done = subprocess.run(command, capture_output=True, text=True)
            try:
                row = json.loads(done.stdout.splitlines()[-1])
            except (IndexError, ValueError):
                row = dict(method=method, error=f"exit status {done.returncode}")
            note(args, row | (dict(stderr=done.stderr[-600:]) if done.stderr else {}))

        with ThreadPoolExecutor(2 if args.small else 8) as pool:
            list(pool.map(one, args.methods or METHODS))


# ----------------------------------------------------------------------------------------------------------------- fast
class Calls:
    """Records the calls of modules that no other module made, with their inputs, to make them again alone."""

    def __init__(self):
        self.calls, self.depth = [], 0

    def __enter__(self):
        def before(module, inputs):
            if self.depth == 0 and any(isinstance(x, torch.Tensor) for x in inputs):
                state = torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"), module.training
                self.calls.append((module, [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor)
                                            else x for x in inputs], *state))
            self.depth += 1

        def after(*_):
            self.depth -= 1

        hooks = torch.nn.modules.module
        self.hooks = [hooks.register_module_forward_pre_hook(before),
                      hooks.register_module_forward_hook(after, always_call=True)]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def seconds(self, device, repeats=3):
        """Median seconds of all recorded forward passes and, where gradients were on, backward passes. nan if none."""
        if not self.calls:
            return math.nan
        taken = []
        for _ in range(repeats + 1):
            started = now(device)
            for module, inputs, grad, autocast, training in self.calls:
                module.train(training)
                with torch.set_grad_enabled(grad), torch.autocast(device, torch.bfloat16, enabled=autocast):
                    found = module(*inputs)
                found = list(found.values()) if isinstance(found, dict) else found
                found = [y for y in (found if isinstance(found, list | tuple) else [found])
                         if isinstance(y, torch.Tensor) and y.requires_grad]
                if found:
                    torch.autograd.backward(found, [torch.ones_like(y) for y in found])
            taken.append(now(device) - started)
        return sorted(taken[1:])[repeats // 2]


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def timed(device, seconds):
    """Adds the seconds spent in loading, predicting and metrics to the dict `seconds`, unless it is empty."""
    def wrap(name, function):
        def wrapped(*args, **kwargs):
            if not seconds:
                return function(*args, **kwargs)
            started = now(device)
            result = function(*args, **kwargs)
            seconds[name] += now(device) - started
            return result
        return wrapped

    places = [("load", common.Split, "batch"), ("predict", common, "score"), ("metrics", common.PixelMetrics, "update"),
              ("metrics", common.PixelMetrics, "compute")]
    before = [getattr(owner, attribute) for _, owner, attribute in places]
    try:
        for name, owner, attribute in places:
            setattr(owner, attribute, wrap(name, getattr(owner, attribute)))
        yield
    finally:
        for (_, owner, attribute), function in zip(places, before, strict=True):
            setattr(owner, attribute, function)


ZERO = dict(load=0.0, predict=0.0, metrics=0.0)


def milliseconds(seconds, total):
    return {name: round(1000 * s, 1) for name, s in (seconds | dict(total=total)).items()}


def fast(method, args, root):
    """Images a second of one method: ours and bare, in training and scoring."""
    flags, trained = settings(method, root, args.small)
    count = 4 if args.small else FAST.get(method, 256)
    flags += ["--limit", count, "--device", args.device, *BRIEF.get(method, []),
              *([STAGES[method], 3] if method in STAGES else []), *(["--epochs", 3, "--eval-every", 3] * trained)]
    ends, scored, calls, parts = [], [], Calls(), {}
    validate, evaluate = common.Run.validate, common.evaluate

    def timed_validate(run, model, epoch, *rest, **losses):
        ends.append(now(args.device))
        if epoch == 2:
            calls.__enter__()
            parts.update(ZERO)
        if epoch == 3:
            calls.__exit__()
            row["train_parts"] = milliseconds(parts, ends[2] - ends[1])
            parts.clear()
            row["bare_train"] = calls.seconds(args.device)
            run.started += now(args.device) - ends[-1]
            calls.calls.clear()
        validate(run, model, epoch, *rest, **losses)

    def timed_evaluate(model, split, *rest):
        parts.update(ZERO)
        started = now(args.device)
        result = evaluate(model, split, *rest)
        seconds = now(args.device) - started
        scored.append((len(split) / seconds, split.name))
        row["score_parts"] = milliseconds(parts, seconds)
        parts.clear()
        if split.name == "test":
            with Calls() as calls:
                model.predict(split.batch(np.arange(min(rest[0], len(split))), args.device))
            row["bare_score"] = min(rest[0], len(split)) / calls.seconds(args.device)
        return result

    row = dict(part="fast", method=method, images=count)
    common.Run.validate, common.evaluate = timed_validate, timed_evaluate
    try:
        with tempfile.TemporaryDirectory() as out, timed(args.device, parts):
            started = now(args.device)
            results, _, _ = run(method, Path(out), *flags)
    finally:
        common.Run.validate, common.evaluate = validate, evaluate
    if trained:
        # The third epoch ran with the recording hooks, which cost little; the second without
        images = count if method != "cutpaste" else results["args"]["batch_size"] * results["args"]["steps_per_epoch"]
        row["train"] = images / (ends[1] - ends[0])
        row["bare_train"] = images / row["bare_train"]
        row["train_share"] = row["train"] / row["bare_train"]
        if method in STAGES:
            row["stage"] = 3 * count / (ends[0] - started - (ends[1] - ends[0]))
    else:
        row["train"] = count / results["train_seconds"]
    row["score"] = scored[-1][0]
    row["score_share"] = row["score"] / row["bare_score"]
    return row


# ----------------------------------------------------------------------------------------------------------------- full
def full(args):
    """Yields rows: what the largest benchmarks take."""
    def measured(what, work):
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = now(args.device)
        more = work() or {}
        peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else 0.0
        return dict(part="full", what=what, seconds=now(args.device) - started, gb=peak) | more

    import clip_recon
    import padim
    import patchcore

    for images, share in [(20, 0.1)] if args.small else [(1000, 0.1), (2000, 0.1), (4000, 0.1), (8000, 0.1),
                                                         (26315, 0.002)]:
        def coreset(images=images, share=share):
            points = torch.randn(images * 1024, patchcore.PROJECTED, device=args.device, dtype=torch.float16)
            patchcore.greedy_coreset(points, max(2, int(share * len(points))))
            return dict(images=images, share=share)

        with torch.inference_mode():
            yield measured(f"PatchCore: {share:.2%} of {images} images' patches picked, made-up features", coreset)

    def search():
        asked = tyro.cli(patchcore.Args, args=["--weights", "none"])
        model = patchcore.build_model(asked).to(args.device)
        model.memory_bank = torch.randn(200 if args.small else 2694656, 1536, device=args.device)
        some = torch.rand(2 if args.small else asked.batch_size, 3, 256, 256, device=args.device)
        model.predict(some)
        started = now(args.device)
        model.predict(some)
        return dict(images=26315, ms_per_image=1000 * (now(args.device) - started) / len(some))

    yield measured("PatchCore: scores with a bank of 26,315 images at 10%, made-up features", search)

    def fit():
        images = 4 if args.small else 7500
        settings = ["--backbone", "mobilenet_v2", "--image-size", "64"] if args.small else []
        asked = tyro.cli(padim.Args, args=["--weights", "none", *settings])
        model = padim.build_model(asked).to(args.device)
        some = torch.rand(asked.batch_size, 3, asked.image_size, asked.image_size, device=args.device)
        model.fit(some for _ in range(-(-images // len(some))))
        predict = now(args.device)
        model.predict(some)
        return dict(images=images, ms_per_image=1000 * (now(args.device) - predict) / len(some))

    yield measured("PaDiM: default model fitted", fit)

    def steps():
        settings = ["--model", "tiny", "--image-size", "64"] if args.small else []
        asked = tyro.cli(clip_recon.Args, args=["--clip-weights", "none", *settings])
        model = clip_recon.build_model(asked).to(args.device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], asked.lr)
        features = model.image_features(torch.rand(asked.batch_size, 3, asked.image_size, asked.image_size,
                                                   device=args.device))
        for step in range(6):
            if step == 1:
                started = now(args.device)
            loss = sum(d.mean() for d in model.distances(features))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        each = (now(args.device) - started) / 5
        hours = 400 * -(-7500 // asked.batch_size) * each / 3600
        return dict(ms_per_step=1000 * each, hours_of_400_epochs_of_brain=hours)

    yield measured("clip_recon: training steps of the default model, batches of 8", steps)


# ---------------------------------------------------------------------------------------------------------------- suite
def suite(args):
    """Yields rows: hours of a method on each benchmark, one seed, from the lines of `fast` (and `full`) in --out."""
    from check import PUBLISHED

    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    rows = {row["method"]: row for row in lines if row["part"] == "fast" and "score" in row}
    if not rows:
        raise common.Error(f"{args.out} holds no lines of `fast`; run that part first")
    # PatchCore's coreset takes seconds in proportion to N^2, its search milliseconds an image in proportion to N
    coreset, search = ({row["images"]: row for row in lines if row["part"] == "full" and row["what"].startswith(what)}
                       for what in ("PatchCore: 10.00%", "PatchCore: scores"))
    for method, row in rows.items():
        spec = runpy.run_path(str(ROOT / f"methods/{method}.py"), run_name="asked")["Args"]()
        hours = {}
        for data, counts in PUBLISHED.items():
            train, valid, test = counts[0], sum(counts[1:3]), sum(counts[3:])
            epochs = getattr(spec, "epochs", 1) or -(-300_000 // train)  # ddpm: whatever the benchmark
            every = getattr(spec, "eval_every", 1)
            images = spec.batch_size * spec.steps_per_epoch if method == "cutpaste" else train
            brief = spec.repeat / 10 if method == "patchsvdd" else 1  # see BRIEF
            seconds = epochs * images / row["train"] * brief + (test + valid * (epochs // every)) / row["score"]
            if method in STAGES:
                seconds += getattr(spec, STAGES[method][2:].replace("-", "_")) * train / row["stage"]
            if method == "patchcore" and coreset and search:
                seconds += coreset[max(coreset)]["seconds"] * (train / max(coreset)) ** 2
                seconds += (test + valid) * search[26315]["ms_per_image"] / 1000 * train / 26315
            hours[data] = seconds / 3600
        yield dict(part="suite", method=method, **hours, sum_of_five_seeds=5 * sum(hours.values()),
                   device=row["device"], torch=row["torch"])


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    if args.device == "cuda" and args.part != "suite" and not torch.cuda.is_available():
        raise common.Error("no GPU: PyTorch sees none here; --device cpu --small tests this script")
    if args.worker:
        work(args)
    elif args.part == "right":
        in_processes(args)
    elif args.part == "fast":
        signal.signal(signal.SIGALRM, too_long)
        with phantom(args) as root:
            for method in args.methods or METHODS:
                started = time.time()
                signal.alarm(SECONDS)
                try:
                    row = fast(method, args, root)
                except (Exception, SystemExit) as e:
                    row = dict(part="fast", method=method, error=f"{type(e).__name__}: {e}"[:300],
                               where=traceback.format_exc().splitlines()[-4:-1])
                signal.alarm(0)
                note(args, row | dict(seconds=round(time.time() - started, 1)))
                gc.collect()
    else:
        for row in (full if args.part == "full" else suite)(args):
            note(args, row)
