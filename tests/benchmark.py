"""Speed beside the peers, in one run: `python tests/benchmark.py metrics`.

Needs the peers in the same environment (no dependency of ours): `pip install anomalib adeval`.

metrics: pixel AUROC and AUPRO of 800 maps of 256x256 with blobs, one thread: ours (which gives pixel AP and Dice too)
    against anomalib's AUPRO and AUROC, and ADEval's streaming accumulator."""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


@dataclass
class Args:
    what: Annotated[Literal["metrics"], tyro.conf.Positional]
    """the comparison to run"""
    images: int = 800
    """anomaly maps"""
    repeats: int = 3
    """timings of each side; medians are printed"""
    threads: int = 1
    """PyTorch's and OpenMP's threads"""


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
    metrics = common.PixelMetrics()
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


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads)
    maps, masks = blob_maps(args.images)
    seconds = {}
    for side in (ours, adeval, anomalib):
        taken = []
        for _ in range(args.repeats):
            started = time.process_time()
            auroc, aupro = side(maps, masks)
            taken.append(time.process_time() - started)
        seconds[side.__name__] = statistics.median(taken)
        print(f"{side.__name__:<9} {seconds[side.__name__]:8.2f} s   pixel AUROC {auroc:.6f}   AUPRO {aupro:.6f}   "
              f"{seconds[side.__name__] / seconds['ours']:6.1f} times ours", flush=True)
