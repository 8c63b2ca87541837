"""PatchCore (Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler, CVPR 2022, arXiv:2106.08265).

A memory bank holds locally pooled mid-level CNN features of normal images, thinned to a coreset that covers them
evenly. A patch is as anomalous as its distance to the nearest stored patch; nothing is trained.

Settings: thesis, Table 3.4: 10% of the patches kept, 9 neighbours for the re-weighting of the image score; resnet18
or wide_resnet50_2 (the default here: the thesis gives one row for both and does not say which). Features as in BMAD's
code, which made the thesis' row: layers 2 and 3, 3x3 means, concatenated (1,536 channels).
Differences from the paper: 256 pixels, not 256 cropped to 224 (lesions may lie at the border).
Differences from the official code (amazon-science/patchcore-inspection): the image score is re-weighted (paper,
Eq. 7; the official code takes the plain maximum); distances, not squared ones; features are not pooled to 1,024
dimensions.
Differences from BMAD's: the deeper layer is upsampled bilinearly, as in the official code, not by nearest neighbour;
one pass over the data (three epochs there triple some of its banks).
The coreset is the greedy one of the paper (Alg. 1), exactly, but many picks are settled in one pass over the patches,
and only the projections of all patches are held (256 bytes a patch): the kept ones are computed again in a second
pass. The search is exact, too: along the bank's principal axes most of it is shown to be too far, see `search`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

# The layers of strides 8 and 16.
LAYERS = {
    "resnet18": ["layer2", "layer3"],
    "resnet50": ["layer2", "layer3"],
    "wide_resnet50_2": ["layer2", "layer3"],
    "mobilenet_v2": ["features.6", "features.13"],  # our choice: no published setting
}
PROJECTED = 128  # dimensions in which the coreset is chosen (official code, sampler.py)
EXPLAINED = 0.9, 0.95  # share of the bank's variance, least and most, on the axes of `search`; its speed only


@dataclass
class Args:
    data: str = "phantom"
    """benchmark (brain, liver, resc, oct2017, chest, histo, phantom) or a folder in a layout that is read"""
    root: str = "data"
    """folder of the prepared benchmarks; decoded images are cached below it"""
    out: str = "runs"
    """results go to <out>/<data>/<method>/seed<k>"""
    seed: int = 0
    """seeds Python, NumPy and PyTorch"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    image_size: int = 256
    """images are resized to this many pixels squared (thesis, 4.3.3)"""
    batch_size: int = 32
    """images a batch; changes nothing but speed and memory"""
    limit: int | None = None
    """at most this many images of each split and class, for quick looks"""
    maps: int = 50
    """how many test images get a picture; 0 none, -1 all"""
    overwrite: bool = False
    """replace a finished run in the folder, or one that was stopped, instead of keeping it or going on"""
    checkpoint: str | None = None
    """a model.pt: skip training and evaluate it on --data"""
    predict: str | None = None
    """with --checkpoint: score this image, folder of images or NIfTI volume; no labels needed"""
    backbone: str = "wide_resnet50_2"
    """torchvision network: resnet18, resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """of the backbone: imagenet (torchvision's), none (untrained), auto (imagenet, else none), or a FILE"""
    ratio: float = 0.1
    """share of the patches kept in the memory bank (thesis, Table 3.4)"""
    neighbors: int = 9
    """b, bank patches around the nearest one that re-weight the image score (thesis, Table 3.4; paper, Eq. 7)"""


class PatchCore(nn.Module):
    def __init__(self, backbone, weights, ratio, neighbors):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone} is unknown: take {', '.join(LAYERS)}, or add its layers to "
                               f"LAYERS")
        if not 0 < ratio <= 1:
            raise common.Error(f"--ratio {ratio}: the share of kept patches lies above 0 and up to 1")
        self.layers = LAYERS[backbone]
        self.backbone = common.feature_extractor(backbone, self.layers, weights)
        self.ratio, self.neighbors = ratio, neighbors
        self.register_buffer("memory_bank", torch.zeros(0))  # (K, D), M in the paper
        self.register_buffer("axes", torch.zeros(0, 0))  # (D, k) of the bank
        self.register_buffer("short", torch.zeros(0, 0))  # (K, k + 1), see `shorten`

    def load_state_dict(self, state, strict=True):
        for name in ("memory_bank", "axes", "short"):  # their shapes are known only after fitting; GBs, so no copies
            setattr(self, name, state[name].to(self.memory_bank.device))
        return super().load_state_dict(state, strict)

    def embed(self, image):
        """(B, 3, H, W) -> patch features (B, h*w, D) on the finer layer's grid, and that grid (h, w)."""
        found = self.backbone(common.normalize(image))
        fine, coarse = (F.avg_pool2d(found[k], 3, stride=1, padding=1) for k in self.layers)  # f_agg; zeros at borders
        coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear")
        joint = torch.cat([fine, coarse], dim=1)  # (B, D, h, w)
        return joint.flatten(2).mT, joint.shape[-2:]

    @torch.inference_mode()
    def fit(self, train, batch_size, device):
        """Fill the memory bank with the coreset of all patches of the normal images."""
        steps = -(-len(train) // batch_size)
        project, projected = None, None
        for i, image in enumerate(common.progress(train.batches(batch_size, device), "projecting", steps)):
            patches = self.embed(image)[0]  # (B, P, D)
            if project is None:
                _, count, dim = patches.shape
                # Johnson-Lindenstrauss: distances survive a random projection; pointless where D is small already
                project = torch.randn(dim, PROJECTED) / PROJECTED**0.5 if dim > PROJECTED else torch.eye(dim)
                project = project.to(device)
                projected = torch.empty(len(train) * count, project.shape[1], dtype=torch.float16, device=device)
                mean = patches.mean(dim=(0, 1))  # a fixed point near the middle: half precision is finest around 0
            rows = (patches.flatten(0, 1) - mean) @ project
            projected[i * batch_size * count :][: len(rows)] = rows.half()
        chosen = greedy_coreset(projected, max(1, int(self.ratio * len(projected)))).sort().values
        del projected
        self.memory_bank = torch.empty(len(chosen), dim, device=device)
        start = stored = 0
        for image in common.progress(train.batches(batch_size, device), "storing", steps):
            patches = self.embed(image)[0].flatten(0, 1)
            kept = patches[chosen[(chosen >= start) & (chosen < start + len(patches))] - start]
            self.memory_bank[stored : stored + len(kept)] = kept
            start, stored = start + len(patches), stored + len(kept)
        self.axes = principal_axes(self.memory_bank)
        if self.axes.numel():
            middle = self.memory_bank.mean(dim=0)
            self.short = torch.empty(len(chosen), self.axes.shape[1] + 1, device=device)
            for part, short in zip(self.memory_bank.split(8192), self.short.split(8192), strict=True):
                short.copy_(shorten(part - middle, self.axes))

    def nearest(self, points):
        """Squared distance of each patch (n, D) to its nearest one of the bank: (n,)."""
        if self.axes.numel():
            return search(points, self.memory_bank, self.axes, self.short)
        return nearest(points, self.memory_bank)

    @torch.inference_mode()
    def predict(self, image):
        """Anomaly map (B, H, W): smoothed distances to the bank; anomaly score (B,): the largest one, re-weighted."""
        self.eval()
        bank = self.memory_bank
        patches, grid = self.embed(image)  # (B, P, D)
        patch_score = self.nearest(patches.flatten(0, 1)).sqrt().unflatten(0, patches.shape[:2])  # (B, P)
        top = patch_score.argmax(dim=1)
        q = patches[torch.arange(len(top)), top]  # m^test,* in the paper: (B, D)
        distance, m = distances(q, bank).min(dim=1)  # s* and its neighbour m*: (B,)
        near = distances(bank[m], bank).topk(min(self.neighbors, len(bank)), largest=False).indices  # N_b(m*): (B, b)
        around = torch.linalg.vector_norm(q[:, None] - bank[near], dim=2)  # (B, b)
        weight = 1 - torch.exp(distance - torch.logsumexp(around, dim=1))  # Eq. 7: 1 - exp|q - m*| / sum exp|q - m|
        anomaly_map = patch_score.unflatten(1, grid)[:, None]  # (B, 1, h, w)
        anomaly_map = smooth(F.interpolate(anomaly_map, image.shape[-2:], mode="bilinear"))[:, 0]
        return anomaly_map, distance * (weight if len(bank) > 1 else 1)


def greedy_coreset(points, count, batch=2048):
    """Farthest-first traversal (paper, Alg. 1): indices (count,) into points (n, d), from a random first one.

    The next picks are sought among the `batch` points farthest from all centres: while the farthest is no nearer
    than the (batch + 1)-th was, no other point can be farther, so each pick is the one that the sequential algorithm
    makes. Then all distances are lowered by all these picks in one matrix product."""
    n = len(points)
    chosen = torch.randint(n, (1,)).to(points.device)
    distance = torch.full((n,), torch.inf, device=points.device)  # squared, to the nearest centre
    picks = [chosen]
    done = 1
    bar = common.progress(None, "coreset", count)
    while True:
        centers = points[chosen].float()
        distance = torch.minimum(distance, nearest(points, centers))
        distance[chosen] = -1  # never again
        bar.update(len(chosen))
        if done >= count:
            return torch.cat(picks)
        farthest = distance.topk(min(batch + 1, n))
        candidates, cut = farthest.indices[:batch], float(farthest.values[-1]) if n > batch else -torch.inf
        between = torch.cdist(points[candidates].float(), points[candidates].float()).square().cpu().numpy()
        left, order = farthest.values[:batch].cpu().numpy(), []
        while done < count and left[best := int(left.argmax())] >= cut and left[best] >= 0:
            order.append(best)
            left = np.minimum(left, between[best])
            left[best] = -1
            done += 1
        chosen = candidates[torch.tensor(order, device=points.device)]
        picks.append(chosen)


def nearest(points, centers, rows=2048, columns=8192):
    """Squared Euclidean distance of each of the points (n, d) to its nearest center (m, d): (n,)."""
    middle = centers.mean(dim=0)  # |a|^2 - 2ab + |b|^2 cancels less around the middle
    result = torch.full((len(points),), torch.inf, device=points.device)
    buffer = torch.empty(rows * min(columns, len(centers)), device=points.device)  # fresh memory costs more
    for c in centers.split(columns):
        c = c - middle
        squared = c.square().sum(1)
        for best, x in zip(result.split(rows), points.split(rows), strict=True):
            x = x.float() - middle
            product = torch.addmm(squared, x, c.T, alpha=-2, out=buffer[: len(x) * len(c)].view(len(x), len(c)))
            torch.minimum(best, product.amin(dim=1).add_(x.square().sum(1)).clamp_(min=0), out=best)
    return result


def distances(points, bank):
    """Euclidean distances (n, K) of a few points; in parts, as cdist copies what it is given."""
    return torch.cat([torch.cdist(points, part) for part in bank.split(8192)], dim=1)


def principal_axes(bank):
    """The first principal axes of the bank (K, D), at most half of them: (D, k); or none, (D, 0), where these hold too
    little of its variance to pay."""
    middle, scatter = bank.mean(dim=0), 0
    for part in bank.split(8192):
        part = part - middle
        scatter = scatter + part.T @ part
    variance, axes = torch.linalg.eigh(scatter.double() if bank.device.type == "cpu" else scatter.cpu().double())
    variance, axes = variance.flip(0), axes.flip(1).float().to(bank.device)
    share = variance.cumsum(0) / variance.sum()
    count = min(1 + int((share < EXPLAINED[1]).sum()), len(axes) // 2)
    return axes[:, : count if share[count - 1] >= EXPLAINED[0] else 0].contiguous()


def shorten(x, axes):
    """(n, D) -> (n, k + 1): coordinates along the axes, and the length of what is left. By the triangle inequality for
    that rest, two shortened vectors lie no farther apart than the whole ones."""
    along = x @ axes
    rest = (x.square().sum(1) - along.square().sum(1)).clamp(min=0).sqrt()
    return torch.cat([along, rest[:, None]], dim=1)


def search(points, bank, axes, short, rows=512, columns=32768, block=64):
    """What `nearest` gives, of points (n, D) and a bank (K, D) with its axes (D, k) and short form (K, k + 1).

    Only bank patches whose short form lies nearer than the nearest patch known so far are compared as a whole."""
    middle = bank.mean(dim=0)
    result = torch.full((len(points),), torch.inf, device=points.device)
    for part, s in zip(bank.split(columns), short.split(columns), strict=True):
        s2 = F.pad(s.square().sum(1), (0, -len(s) % block), value=torch.inf)  # blocks are whole
        s = F.pad(s, (0, 0, 0, -len(s) % block))

        def compare(x, row, column, best, part=part):
            for r, c in zip(row.split(16384), column.split(16384), strict=True):
                best.scatter_reduce_(0, r, (x[r] - part[c]).square_().sum(1), "amin")

        for best, x in zip(result.split(rows), points.split(rows), strict=True):
            q = shorten(x - middle, axes)
            q2 = q.square().sum(1)
            bound = torch.addmm(s2, q, s.T, alpha=-2).unflatten(1, (-1, block))  # + q2: squared, from below
            least = bound.amin(dim=2)  # (n, K / block)
            row, b = torch.arange(len(x), device=x.device), least.argmin(dim=1)
            compare(x, row, b * block + bound[row, b].argmin(dim=1), best)  # a guess, so that few are left
            limit = (best - q2 + 1e-5 * (best + q2))[:, None]  # rounding must not hide the nearest one
            near = least < limit
            many = near.sum(dim=1) > near.shape[1] // 2  # of these rows one product is cheaper
            if many.any():
                best[many] = torch.minimum(best[many], nearest(x[many], part))
                near[many] = False
            row, b = near.nonzero(as_tuple=True)
            i, within = (bound[row, b] < limit[row]).nonzero(as_tuple=True)
            compare(x, row[i], b[i] * block + within, best)
    return result


def smooth(anomaly_map, sigma=4):
    """Gaussian filter of (B, 1, H, W) cut at 4 sigma, edge pixels mirrored, equal to scipy.ndimage.gaussian_filter."""
    radius = 4 * sigma
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=anomaly_map.device) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for dim in (2, 3):  # separable
        size = anomaly_map.shape[dim]
        head, tail = (anomaly_map.narrow(dim, s, radius).flip(dim) for s in (0, size - radius))
        padded = torch.cat([head, anomaly_map, tail], dim)
        anomaly_map = F.conv2d(padded, kernel.view((1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)))
    return anomaly_map


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.start_run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = PatchCore(args.backbone, args.weights, args.ratio, args.neighbors).to(run.device)
    if not args.checkpoint:
        model.fit(train, args.batch_size, run.device)
        run.keep(model)
        model.memory_bank = model.short = torch.zeros(0, device=run.device)  # `finish` reads them; not twice in memory
    common.finish(run, model, (train, valid, test))
