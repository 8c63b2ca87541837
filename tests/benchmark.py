"""Speed, next to the peers where there are:
`python tests/benchmark.py metrics|padim|patchcore|cfa|clip|memory|cache|score|cost`.

CPU seconds. The first four need the peers in the same environment (no dependency of ours):
`pip install anomalib adeval`. Next to a peer, both sides run in turn, --repeats times; medians, and the ratio's range.

metrics: pixel AUROC and AUPRO of 800 maps of 256x256 with blobs, one thread: ours (which gives pixel AP and Dice too)
    against anomalib's AUPRO and AUROC, and ADEval's streaming accumulator.
padim: fitting and scoring on the same made-up features of mobilenet_v2's shapes at 256 pixels (features excluded).
patchcore: the coreset of 1,024 made-up patches an image; anomalib's is measured for a few steps, which all cost the
    same, and scaled. The search for 8 phantom images among 128 and among 768 channels of mobilenet_v2 (--weights).
cfa: a training step of 4 images of 256 pixels, the same mobilenet_v2 and descriptor on both sides.
memory: peak memory of PaDiM for two and of PatchCore for three numbers of images, extrapolated.
cache: seconds of an epoch with and without --cache-features, default settings but 16 images and untrained backbones.
clip: a training step of clip_recon's default model, untrained, at --images (64) locations of one image, against the
    text encoder's bare forward and backward pass on as many words, and the step with every text padded to 77 words.
score: from decoded images to metrics, against the backbone's forward pass alone; published settings, untrained.
cost: every script as published, untrained, one pass over a few phantom images of its size in batches of 1 and of 32:
    what its results.json says."""

import csv
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import common


@dataclass
class Args:
    what: Annotated[Literal["metrics", "padim", "patchcore", "cfa", "clip", "memory", "cache", "score", "cost",
                            "padim-memory", "patchcore-memory"],
                    tyro.conf.Positional]
    """the comparison to run (the last two: what memory calls for each number of images)"""
    images: int | None = None
    """anomaly maps (800), training images (200), images to score (16)"""
    repeats: int = 3
    """timings of each side; medians are printed"""
    threads: int = 1
    """PyTorch's and OpenMP's threads"""
    weights: str = "auto"
    """mobilenet_v2's in patchcore's search, see the methods' --weights"""


def blob_maps(n, size=256, seed=0):
    """Smooth maps (n, size, size) float32, and masks with one to three discs in every second one."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    maps, masks = np.empty((n, size, size), np.float32), np.zeros((n, size, size), bool)
    for i in range(n):
        for _ in range(rng.integers(1, 4) * (i % 2)):
            cy, cx, r = rng.integers(20, size - 20), rng.integers(20, size - 20), rng.integers(4, 20)
            masks[i] |= (y - cy) ** 2 + (x - cx) ** 2 < r**2
        coarse = rng.gamma(2, size=(size // 8, size // 8)) + 2 * masks[i, ::8, ::8]
        maps[i] = ndimage.zoom(coarse, 8, order=1)
    return maps, masks


def ours(maps, masks):
    metrics = common.PixelMetrics(maps.size)
    for start in range(0, len(maps), 32):
        metrics.update(maps[start : start + 32], masks[start : start + 32])
    found = metrics.compute()
    return found["pixel_auroc"], found["aupro"]


def anomalib(maps, masks):
    from anomalib.data import ImageBatch
    from anomalib.metrics import AUPRO, AUROC

    auroc, aupro = (m(fields=["anomaly_map", "gt_mask"]) for m in (AUROC, AUPRO))
    for start in range(0, len(maps), 32):
        part = torch.from_numpy(maps[start : start + 32])
        batch = ImageBatch(image=torch.zeros(len(part), 3, *part.shape[1:]), anomaly_map=part,
                           gt_mask=torch.from_numpy(masks[start : start + 32]))
        auroc.update(batch)
        aupro.update(batch)
    return float(auroc.compute()), float(aupro.compute())


def adeval(maps, masks):
    from adeval import EvalAccumulator

    np.trapz = np.trapezoid  # ADEval 1.1 needs the name that NumPy 2.4 dropped
    accumulator = EvalAccumulator(float(maps.min()), float(maps.max()))  # it must be told the range in advance
    for start in range(0, len(maps), 32):
        accumulator.add_anomap_batch(maps[start : start + 32], masks[start : start + 32].astype(np.uint8))
    accumulator.add_image(maps.max(axis=(1, 2)), masks.any(axis=(1, 2)))
    found = accumulator.summary()
    return found["p_auroc"], found["p_aupro"]


def cpu_seconds(work, repeats):
    """Median over repeats, and the last result."""
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        result = work()
        taken.append(time.process_time() - started)
    return statistics.median(taken), result


def in_turn(what, ours, peer, repeats, peer_name="anomalib", scale=1, note=""):
    """Run both sides in turn; print medians and the ratios' range; their last results. scale: of the peer's seconds."""
    pairs = []
    for _ in range(repeats):
        (mine, our_result), (theirs, their_result) = cpu_seconds(ours, 1), cpu_seconds(peer, 1)
        pairs.append((mine, scale * theirs))
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    print(f"{what:<45} ours {mine:8.3f} s   {peer_name} {theirs:9.3f} s   {statistics.median(ratios):6.2f} times ours "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f}){note}", flush=True)
    return our_result, their_result


def compare_metrics(args):
    maps, masks = blob_maps(args.images or 800)
    seconds = {}
    for side in (ours, adeval, anomalib):
        seconds[side.__name__], (auroc, aupro) = cpu_seconds(lambda side=side: side(maps, masks), args.repeats)
        print(f"{side.__name__:<9} {seconds[side.__name__]:8.2f} s   pixel AUROC {auroc:.6f}   AUPRO {aupro:.6f}   "
              f"{seconds[side.__name__] / seconds['ours']:6.1f} times ours", flush=True)


# ---------------------------------------------------------------------------------------------------------------- PaDiM
LAYERS = {"features.3": (24, 64), "features.6": (32, 32), "features.13": (96, 16)}  # channels and grid at 256 pixels


def made_up_features(start, count):
    """Features of images start to start + count, [(count, C, h, h)] as LAYERS lists them; always the same."""
    draw = torch.Generator().manual_seed(start)
    return [torch.randn(count, c, h, h, generator=draw).relu_() for c, h in LAYERS.values()]


def our_padim():
    import padim

    torch.manual_seed(0)
    model = padim.PaDiM("mobilenet_v2", "none", 100, 256)
    model.features = lambda image: made_up_features(int(image[0, 0]), len(image))[::-1]  # coarsest first
    return model


def numbers(images, batch=32):
    """Instead of images their numbers, from which features are made up."""
    for start in range(0, images, batch):
        yield torch.full((min(batch, images - start), 1), start)


def padim_memory(args):
    our_padim().fit(numbers(args.images))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def compare_padim(args):
    from anomalib.models.image.padim.torch_model import PadimModel
    from torchvision.models import mobilenet_v2

    n, model = args.images or 200, our_padim()
    peer = PadimModel(backbone=mobilenet_v2(weights=None), layers=list(LAYERS), pre_trained=False, n_features=100)
    batches = [made_up_features(int(b[0, 0]), len(b)) for b in numbers(n)]
    stored = {int(b[0, 0]): f[::-1] for b, f in zip(numbers(n), batches, strict=True)}

    def their_fit():
        peer.memory_bank = [peer.generate_embedding(dict(zip(LAYERS, f, strict=True))) for f in batches]
        peer.fit()

    def their_score():
        for f in batches[:2]:
            embedding = peer.generate_embedding(dict(zip(LAYERS, f, strict=True)))
            peer.anomaly_map_generator(embedding=embedding, mean=peer.gaussian.mean,
                                       inv_covariance=peer.gaussian.inv_covariance, image_size=(256, 256))

    def our_score():
        for batch in list(numbers(n))[:2]:
            model.predict(batch.float().view(-1, 1, 1, 1).expand(-1, -1, 256, 256))

    model.features = lambda image: stored[int(image.flatten(1)[0, 0])]
    with torch.no_grad():
        in_turn(f"PaDiM, fit, {n} images", lambda: model.fit(numbers(n)), their_fit, args.repeats)
        in_turn("PaDiM, scores of 64 images", our_score, their_score, args.repeats)


# ------------------------------------------------------------------------------------------------------------ PatchCore
def compare_patchcore(args):
    import patchcore
    from anomalib.models.components.sampling import KCenterGreedy
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    from torchvision.models import mobilenet_v2

    n, steps = 1024 * (args.images or 200), 40
    draw = torch.Generator().manual_seed(0)
    patches = torch.randn(n, 8, generator=draw) @ torch.randn(8, 128, generator=draw)  # of low dimension, as features
    patches += 0.3 * torch.randn(n, 128, generator=draw)
    count = n // 10
    torch.manual_seed(0)
    with torch.no_grad():
        few = KCenterGreedy(embedding=patches, sampling_ratio=steps / n)
        few.model.fit(patches)
        few.features = few.model.transform(patches)

        def their_steps():
            few.reset_distances()
            center = 0
            for _ in range(steps):
                few.update_distances(center)
                center = few.get_new_idx()

        in_turn(f"PatchCore, coreset, {count} of {n} patches", lambda: patchcore.greedy_coreset(patches.half(), count),
                their_steps, args.repeats, scale=count / steps, note=f", anomalib: {steps} steps, scaled")
        peer = PatchcoreModel(backbone=mobilenet_v2(weights=None), layers=["features.6"], pre_trained=False)
        with tempfile.TemporaryDirectory() as folder:
            phantom(folder)
            train, _, test = load(folder, args.images)
            for layers in (["features.6", "features.13"], ["features.6.conv.1", "features.13.conv.1"]):
                patchcore.LAYERS["mobilenet_v2"] = layers
                model = patchcore.PatchCore("mobilenet_v2", args.weights, 0.1, 9)
                model.fit(train, 8, torch.device("cpu"))
                peer.memory_bank = bank = model.memory_bank
                query = model.embed(test.batch(range(len(test))[:: len(test) // 8][:8])).flatten(0, 2)
                distance, (nearest, _) = in_turn(
                    f"PatchCore, {len(query)} patches, bank {len(bank)} x {bank.shape[1]}",
                    lambda b=bank, q=query: patchcore.nearest(q, b), lambda q=query: peer.nearest_neighbors(q, 1),
                    args.repeats)
                print(f"distances differ by {float((nearest.flatten() - distance).abs().max()):.1e}")


# ------------------------------------------------------------------------------------------------------------------ CFA
def compare_cfa(args):
    from unittest import mock

    import anomalib.models.image.cfa.torch_model as peer_script
    import cfa
    from anomalib.models.image.cfa.loss import CfaLoss

    model, layers = cfa.CFA("mobilenet_v2", args.weights, 256, 3, 3, 1e-5, False), cfa.LAYERS["mobilenet_v2"]
    with mock.patch.multiple(peer_script, get_return_nodes=lambda name: layers,
                             get_feature_extractor=lambda name, nodes: model.backbone):
        peer = peer_script.CfaModel("resnet18", 1, 1, 3, 3, 1e-5)
    width = model.descriptor.conv.out_channels
    peer.descriptor.layer = peer_script.CoordConv2d(width, width, 1)
    model.descriptor.conv.load_state_dict(peer.descriptor.layer.conv2d.state_dict())
    image, peer_loss = torch.rand(4, 3, 256, 256), CfaLoss(3, 3, 1e-5)
    model.fill_memory_bank([model.features(image)])
    peer.memory_bank = model.memory_bank.T.contiguous()
    peer_loss.radius = torch.tensor([1e-5])  # its own is the result of a product, whose graph only one step can use
    peer.train()
    optimizers = [torch.optim.AdamW(m.descriptor.parameters(), 1e-6, weight_decay=5e-4, amsgrad=True)
                  for m in (model, peer)]

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    ours, theirs = in_turn("CFA, a step of 4 images", lambda: step(optimizers[0], model.loss(model.features(image))),
                           lambda: step(optimizers[1], peer_loss(peer(common.normalize(image)))), args.repeats)
    print(f"losses {ours:.6g} and {theirs:.6g}")


# --------------------------------------------------------------------------------------------------------------- memory
def peak_memory(method, *counts):
    """GiB for each number of images, each in a process of its own (where Linux counts this one's peak, too)."""
    peaks = []
    for count in counts:
        command = [sys.executable, __file__, f"{method}-memory", "--images", str(count)]
        peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    shown = ", ".join(f"{p:.3f} GiB for {c} images" for p, c in zip(peaks, counts, strict=True))
    print(f"peak memory of {method}: {shown}", flush=True)
    return peaks


def compare_memory(args):
    peak_memory("padim", 400, 4000)
    largest, counts = 26315, (200, 400, 800)  # the largest training set is oct2017's
    slope, base = np.polyfit(counts, peak_memory("patchcore", *counts), 1)
    work = 2 * 128 * 0.1 * (1024 * largest) ** 2
    print(f"patchcore for {largest} images: {base + slope * largest:.1f} GiB extrapolated; coreset {work:.1e} FLOP, "
          f"{work / 25e12:.0f} s at 25 TFLOP/s (not measured)")


def patchcore_memory(args):
    """Fit, save, load and score made-up features of wide_resnet50_2's shape: 32x32 positions, 1,536 channels."""
    import patchcore

    rank = torch.randn(250, 1536, generator=torch.Generator().manual_seed(1))

    def embed(image):
        draw = torch.Generator().manual_seed(int(image.flatten(1)[0, 0]))
        return torch.randn(len(image), 32, 32, 250, generator=draw) @ rank

    class Train:
        def __len__(self):
            return args.images

        def batches(self, size, device):
            return numbers(args.images, size)

    model = patchcore.PatchCore("mobilenet_v2", "none", 0.1, 9)
    model.embed = embed
    model.fit(Train(), 8, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), f"{folder}/model.pt")
        model.memory_bank = torch.zeros(0)
        model.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
        model.predict(torch.zeros(1, 3, 256, 256))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


# ---------------------------------------------------------------------------------------------------------------- cache
CACHED = {  # one epoch of each must take seconds on a CPU
    "cfa": [], "csflow": ["--hidden", 64, "--batch-size", 8], "simplenet": [], "utrad": ["--image-size", 128],
    "cflow": ["--augment-degrees", 0, "--batch-size", 8],
    "clip_recon": ["--model", "tiny", "--clip-weights", "none", "--backbone", "resnet50", "--patches-per-step", 8],
}


def phantom(folder):
    subprocess.run([sys.executable, ROOT / "datasets/phantom.py", "--root", folder], check=True, capture_output=True)


def load(folder, limit):
    return common.load_benchmark(SimpleNamespace(data="phantom", root=folder, image_size=256, limit=limit, predict=None,
                                                 white=65535, holdout=0))


def compare_cache(args):
    with tempfile.TemporaryDirectory() as folder:
        phantom(folder)
        for method, flags in CACHED.items():
            seconds = []
            for budget in (16, 0):
                out = Path(folder) / f"runs{budget}"
                command = [sys.executable, ROOT / f"methods/{method}.py", "--root", folder, "--out", out, "--weights",
                           "none", "--limit", args.images or 16, "--maps", 0, "--epochs", 3, "--eval-every", 3,
                           "--device", "cpu", "--cache-features", budget, *flags]
                subprocess.run(list(map(str, command)), check=True, capture_output=True)
                with open(out / "phantom" / method / "seed0/log.csv", newline="") as f:
                    first, *_, last = (float(row["seconds"]) for row in csv.DictReader(f))
                seconds.append((last - first) / 2)
            print(f"{method:<10} {' '.join(map(str, flags)):<60} an epoch: cached {seconds[0]:6.2f} s, anew "
                  f"{seconds[1]:6.2f} s, {seconds[1] / seconds[0]:5.1f} times", flush=True)


# ----------------------------------------------------------------------------------------------------------- clip_recon
def compare_clip(args):
    import clip_recon

    model = clip_recon.ClipRecon(clip_recon.Args(clip_weights="none"))
    features, where = model.image_features(torch.rand(1, 3, 256, 256)), torch.arange(args.images or 64)
    short, blocks = clip_recon.text_features, model.clip.transformer.resblocks
    words = torch.randn(len(where), 18, model.clip.transformer.width, requires_grad=True)

    def step():
        sum(d.mean() for d in model.distances(features, where)).backward()

    def bare():
        x = words
        for block in blocks:
            x = block(x, attn_mask=model.clip.attn_mask[:18, :18])
        x.sum().backward()

    def padded(clip, tokens, numbers):
        x, found = torch.nn.functional.pad(tokens, (0, 0, 0, 77 - tokens.shape[1])) + clip.positional_embedding, []
        for number, block in enumerate(blocks, 1):
            x = block(x, attn_mask=clip.attn_mask)
            if number in numbers:
                found.append(clip.ln_final(x[:, tokens.shape[1] - 1]) @ clip.text_projection)
        return found

    def padded_step():
        clip_recon.text_features = padded
        try:
            step()
        finally:
            clip_recon.text_features = short

    in_turn(f"clip_recon, a step at {len(where)} locations", step, padded_step, args.repeats, "padded to 77")
    in_turn("the same", step, bare, args.repeats, "bare text encoder")
    with torch.no_grad():
        distances = model.distances(features, where)
        clip_recon.text_features = padded
        error = max(float((a - b).abs().max())
                    for a, b in zip(distances, model.distances(features, where), strict=True))
    print(f"distances, padded or not, differ by {error:.1e}")


# --------------------------------------------------------------------------------------------------- scoring, all costs
def scored_models(train):
    """Names, models as published but for their weights, and what of them is the backbone's forward pass."""
    import cfa
    import cflow
    import csflow
    import padim
    import patchcore
    import simplenet

    a = padim.Args()
    model = padim.PaDiM(a.backbone, "none", a.features, a.image_size)
    model.fit(train.batches(8))
    yield "padim", model, model.backbone
    a = cfa.Args()
    model = cfa.CFA(a.backbone, "none", a.image_size, a.neighbors, a.hard_negatives, a.radius, a.learn_radius)
    model.fill_memory_bank(model.features(image) for image in train.batches(8))
    yield "cfa", model, model.backbone
    model = simplenet.SimpleNet(simplenet.Args.backbone, "none")
    yield "simplenet", model, model.backbone
    a = patchcore.Args()
    model = patchcore.PatchCore(a.backbone, "none", a.ratio, a.neighbors)
    model.memory_bank = model.embed(train.batch([0]))[0, 0, :10]  # the search in a real one is measured above
    yield "patchcore, bank of 10", model, model.backbone
    a = cflow.Args()
    model = cflow.CFlow(a.backbone, "none", a.image_size, a.blocks, a.condition)
    yield "cflow", model, model.backbone
    a = csflow.Args()
    model = csflow.CSFlow(a.backbone, "none", a.hidden, a.image_size)
    yield "csflow", model, model.features  # three sizes of each image


def compare_score(args):
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        phantom(folder)
        train, _, test = load(folder, (args.images or 16) // 2)
        for name, model, network in scored_models(train):
            model.eval()

            def forward(network=network):
                for image in test.batches(8):
                    network(common.normalize(image))

            def score(model=model):
                common.evaluate(model, test, 8, torch.device("cpu"))

            alone, whole = (cpu_seconds(work, args.repeats)[0] / len(test) for work in (forward, score))
            print(f"{name:<22} forward {alone:6.3f} s an image, score and metrics {whole:6.3f} s, "
                  f"{whole / alone:5.2f} times", flush=True)


ONE_PASS = {"deepsvdd": ["--ae-epochs", 1], "fanogan": ["--gan-epochs", 1], "patchsvdd": ["--repeat", 1]}
LONG = {"anogan", "clip_recon", "ddpm", "draem", "patchsvdd", "utrad", "winclip"}  # 2 images, in batches of 1 only


def compare_cost(args):
    with tempfile.TemporaryDirectory() as folder:
        phantom(folder)
        shutil.rmtree(Path(folder) / "phantom/valid")
        for script in sorted((ROOT / "methods").glob("*.py")):
            for size in (1, 32):
                if size > 1 and script.stem in LONG:
                    continue
                taken, out = script.read_text(), Path(folder) / str(size)
                count = 2 if script.stem in LONG else 4 if size == 1 else 32
                command = [sys.executable, script, "--root", folder, "--out", out, "--maps", 0, "--device", "cpu",
                           "--limit", count, "--batch-size", size, *ONE_PASS.get(script.stem, [])]
                for flag in ("weights", "clip_weights"):
                    command += [f"--{flag.replace('_', '-')}", "none"] if f"\n    {flag}: str" in taken else []
                command += ["--epochs", 1] if "\n    epochs: " in taken else []
                command += ["--steps-per-epoch", count // size] if "\n    steps_per_epoch: " in taken else []
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                if done.returncode:
                    print(f"{script.stem}, batch {size}: status {done.returncode} {done.stderr[-200:]}", flush=True)
                    continue
                r = json.loads((out / f"phantom/{script.stem}/seed0/results.json").read_text())
                print(f"{script.stem:<14} batch {size:>2}   {r['parameters']['total'] / 1e6:7.1f} M parameters   train "
                      f"{r['train_seconds'] / count:8.3f} s an image   score {r['test_ms_per_image']:9.1f} ms   peak "
                      f"{r['peak_memory_gib']['ram']:6.2f} GiB", flush=True)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    torch.set_num_threads(args.threads)
    {"metrics": compare_metrics, "padim": compare_padim, "patchcore": compare_patchcore, "cfa": compare_cfa,
     "clip": compare_clip, "memory": compare_memory, "cache": compare_cache, "score": compare_score,
     "cost": compare_cost, "padim-memory": padim_memory, "patchcore-memory": patchcore_memory}[args.what](args)
