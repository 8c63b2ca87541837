"""PatchCore (Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler, CVPR 2022, arXiv:2106.08265).

A memory bank holds locally averaged mid-level CNN features of normal images, reduced to a coreset that covers them
evenly. The anomaly score of a patch is its distance to the nearest patch in the bank. Nothing is trained.

Settings (thesis, Table 3.4): a coreset of 10% of the patches; 9 neighbours, which re-weight the image score; resnet18
or wide_resnet50_2 (the default here; the thesis has a single row of results and does not say which of the two produced
it). As in BMAD's code, which produced that row, features are 3x3 means of layers 2 and 3, concatenated (1,536
channels).
Differences from the paper: images are resized to 256 pixels and not cropped, since lesions may lie at the border (the
paper crops from 256 to 224 pixels; the thesis' benchmark, BMAD, resizes to 224).
Differences from the official code (amazon-science/patchcore-inspection): the image score is re-weighted (paper, Eq. 7;
the official code takes the plain maximum), distances are not squared, and features are not pooled to 1,024 dimensions.
Differences from BMAD's code: the deeper layer is upsampled bilinearly, as in the official code, not by nearest
neighbour, and each patch is collected once (in some configurations, BMAD collects every patch three times, once per
epoch).
For the 26,315 images of oct2017, the features of all patches would take 166 GB. Therefore, a first pass stores only
random projections of them in half precision (6.9 GB), from which the coreset is chosen. Once the projections are freed,
a second pass stores the features of the chosen patches (16.6 GB). Both passes store their results in device memory.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common

# Layers with strides 8 and 16.
LAYERS = {
    "resnet18": ["layer2", "layer3"],
    "resnet50": ["layer2", "layer3"],
    "wide_resnet50_2": ["layer2", "layer3"],
    "mobilenet_v2": ["features.6", "features.13"],  # our choice: no published setting
}
PROJECTED = 128  # dimensions of the projections (official code, sampler.py)


@dataclass
class Args:
    data: str = "phantom"
    """benchmark name (brain, liver, resc, oct2017, chest, histo, phantom) or path to a folder in a supported layout"""
    root: str = "data"
    """folder with the prepared benchmarks and the cache of decoded images"""
    out: str = "runs"
    """output folder; results go to <out>/<data>/<method>/seed<k>"""
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    """random seed for PyTorch"""
    device: str = "auto"
    """device to run on: auto (a GPU if available), cpu, cuda, cuda:1, mps"""
    image_size: Annotated[int, Ge(16)] = 256
    """images are resized to this width and height in pixels (our choice; the thesis' benchmark: 224)"""
    batch_size: Annotated[int, Ge(1)] = 32
    """images per batch; affects only speed and memory"""
    white: Annotated[int, Interval(ge=1, le=65535)] = 65535
    """pixel value that represents white in 16-bit images; use 4095 for 12-bit data"""
    holdout: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """fraction of training images to hold out for setting thresholds if valid has no normal images"""
    limit: Annotated[int | None, Ge(1)] = None
    """maximum number of images per split and class, for quick tests"""
    maps: Annotated[int, Ge(-1)] = 50
    """number of test images to save heat maps for; 0: none, -1: all"""
    overwrite: bool = False
    """discard an existing run and start over"""
    checkpoint: str | None = None
    """path to a model.pt to evaluate on --data instead of training a model"""
    predict: str | None = None
    """with --checkpoint: path to the image, image folder, NIfTI volume, DICOM series or scan folder to score"""
    specificity: Annotated[float, Interval(gt=0, lt=1)] = 0.95
    """fraction of normal images that should score below the decision threshold"""
    scan_score: Literal["max", "top5"] = "max"
    """score of a scan: its highest slice score (max) or the mean of its five highest slice scores (top5)"""
    save_maps: Literal["no", "npy", "tiff"] = "no"
    """with --predict: also save each anomaly map as float32, at the image's original size"""
    backbone: str = "wide_resnet50_2"
    """torchvision network: resnet18, resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""
    ratio: Annotated[float, Interval(gt=0, le=1)] = 0.1
    """fraction of the training patches that is kept in the memory bank (thesis, Table 3.4)"""
    neighbors: Annotated[int, Ge(2)] = 9
    """b, number of neighbours in the bank that re-weight the image score (thesis, Table 3.4; paper, Eq. 7)"""


class PatchCore(nn.Module):
    def __init__(self, backbone, weights, ratio, neighbors):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(LAYERS)}, or add its layers to LAYERS")
        self.layers = LAYERS[backbone]
        self.backbone = common.feature_extractor(backbone, self.layers, weights)
        self.ratio, self.neighbors = ratio, neighbors
        self.register_buffer("memory_bank", torch.zeros(0))  # M in the paper, (K, D)

    def load_state_dict(self, state, strict=True):
        self.memory_bank = state["memory_bank"].to(self.memory_bank.device)  # K is known only after fitting
        return super().load_state_dict(state, strict)

    def embed(self, image):
        """(B, 3, H, W) -> patch features (B, h, w, D) on the finer layer's grid."""
        features = self.backbone(common.normalize(image))
        fine, coarse = (F.avg_pool2d(features[k], 3, stride=1, padding=1) for k in self.layers)  # zero padding
        coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear")
        return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1)  # (B, D, h, w) -> (B, h, w, D)

    @torch.inference_mode()
    def fit(self, train, batch_size, device):
        """Fill the memory bank with a coreset of all patches of the normal images."""
        projected, seen = None, 0
        for image in train.batches(batch_size, device):
            patches = self.embed(image).flatten(0, 2)  # (B*P, D)
            if projected is None:
                project = random_projection(patches.shape[1]).to(device)
                middle = patches.mean(dim=0)  # half precision is most precise around zero
                count = len(train) * len(patches) // len(image)  # N*P
                projected = torch.empty(count, project.shape[1], dtype=torch.half, device=device)
            projected[seen : seen + len(patches)] = (patches - middle) @ project
            seen += len(patches)
        chosen = greedy_coreset(projected, max(2, int(self.ratio * len(projected)))).sort().values  # (K,)
        del projected
        self.memory_bank = torch.empty(len(chosen), patches.shape[1], device=device)
        seen = stored = 0
        for image in train.batches(batch_size, device):
            patches = self.embed(image).flatten(0, 2)
            kept = patches[chosen[(chosen >= seen) & (chosen < seen + len(patches))] - seen]
            self.memory_bank[stored : stored + len(kept)] = kept
            seen, stored = seen + len(patches), stored + len(kept)

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map (B, H, W; the smoothed distances to the bank) and the re-weighted score (B,)."""
        self.eval()
        bank, patches = self.memory_bank, self.embed(image)  # (K, D), (B, h, w, D)
        patch_score = nearest(patches.flatten(0, 2), bank).view(patches.shape[:3])  # (B, h, w)
        top = patch_score.flatten(1).argmax(dim=1)
        q = patches.flatten(1, 2)[torch.arange(len(top)), top]  # m^test,* in the paper: (B, D)
        star, m = distances(q, bank).min(dim=1)  # s* and the index of m*: (B,)
        around = distances(bank[m], bank).topk(min(self.neighbors, len(bank)), largest=False).indices  # N_b(m*): (B, b)
        others = torch.linalg.vector_norm(q[:, None] - bank[around], dim=2)  # (B, b)
        weight = 1 - torch.exp(star - torch.logsumexp(others, dim=1))  # Eq. 7: 1 - exp|q - m*| / sum exp|q - m|
        anomaly_map = F.interpolate(patch_score[:, None], image.shape[-2:], mode="bilinear")[:, 0]
        return common.smooth(anomaly_map), weight * star


def random_projection(dim):
    """Return a (D, 128) matrix that nearly preserves distances (Johnson-Lindenstrauss), or the identity if D <= 128."""
    return torch.randn(dim, PROJECTED) / PROJECTED**0.5 if dim > PROJECTED else torch.eye(dim)


def greedy_coreset(points, count, batch=2048):
    """Return the indices (count,) of a coreset of points (n, d), chosen by farthest-first traversal (paper, Alg. 1).

    The first pick is random. The paper updates all distances after each pick. Here, each pass over the points finds the
    `batch` points that are farthest from all centres, and many picks are made among them. Distances only decrease, so
    the picks equal the paper's until all of these points are closer than the farthest other point was in that pass."""
    n = len(points)
    chosen = torch.randint(n, (1,)).to(points.device)
    distance = torch.full((n,), torch.inf, device=points.device)  # from each point to its nearest centre
    picks, done = [chosen], 1
    bar = common.progress(None, "coreset", count)
    while done < count:
        distance = torch.minimum(distance, nearest(points, points[chosen].float()))
        distance[chosen] = -1  # never picked again
        bar.update(len(chosen))
        farthest = distance.topk(min(batch + 1, n))
        candidates, cut = farthest.indices[:batch], float(farthest.values[-1]) if n > batch else -torch.inf
        between = torch.cdist(points[candidates].float(), points[candidates].float()).cpu().numpy()
        left, order = farthest.values[:batch].cpu().numpy(), []
        while done < count and left[best := int(left.argmax())] >= cut and left[best] >= 0:
            order.append(best)
            left = np.minimum(left, between[best])
            left[best] = -1
            done += 1
        chosen = candidates[torch.tensor(order, device=points.device)]
        picks.append(chosen)
    return torch.cat(picks)


def nearest(points, centers, rows=None, columns=2048):
    """Return the Euclidean distance (n,) from each of the points (n, d) to the nearest of the centers (m, d)."""
    rows = rows or (65536 if points.is_cuda else 2048)  # large products on a GPU; blocks that fit the cache on a CPU
    middle = centers.mean(dim=0)  # subtracted to reduce cancellation in |x|^2 - 2 x c + |c|^2
    result = torch.full((len(points),), torch.inf, device=points.device)
    for c in centers.split(columns):
        c = c - middle
        squared = c.square().sum(dim=1)
        for best, x in zip(result.split(rows), points.split(rows), strict=True):
            x = x.float() - middle
            minimum = torch.addmm(squared, x, c.T, alpha=-2).amin(dim=1) + x.square().sum(dim=1)
            torch.minimum(best, minimum, out=best)
    return result.clamp(min=0).sqrt()


def distances(points, bank):
    """Return the distances (n, K) from a few points to the bank, computed in chunks, since cdist copies its inputs."""
    return torch.cat([torch.cdist(points, part) for part in bank.split(8192)], dim=1)


def build_model(args):
    return PatchCore(args.backbone, args.weights, args.ratio, args.neighbors)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        model.fit(train, args.batch_size, run.device)
        run.keep(model)
        model.memory_bank = torch.zeros(0, device=run.device)  # frees memory: `finish` loads the saved bank
    common.finish(run, model, (train, valid, test))
