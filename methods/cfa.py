"""CFA (Lee, Lee, Song, IEEE Access 2022, arXiv:2206.04325).

A learned 1x1 descriptor adapts the features of a pretrained CNN to the normal images: it pulls each patch into small
hyperspheres around its nearest centres in a memory bank and pushes it off the next ones. The bank is the untrained
descriptor's mean at each position and stays fixed. A patch is as anomalous as its distance to the nearest centre, more
so where one centre is clearly the nearest.

Settings: thesis, Table 3.4: wide_resnet50_2, 3 nearest neighbours, 3 hard negatives, radius 1e-5, learning rate 1e-3,
weight decay 5e-4. Where it is silent, the official code (sungwool/CFA_for_anomaly_localization): layers 1 to 3, AdamW
with AMSGrad (the thesis says Adam), batches of 4, 30 epochs, nu 1e-3, alpha 0.1, neither k-means on the memory bank
nor a narrower descriptor (gamma_c = gamma_d = 1).
Trained with wide_resnet50_2: 3,216,640 weights of the descriptor and the radius.
Differences from the paper: 256 pixels, not 256 cropped to 224 (lesions may lie at the border).
Differences from the official code: all training images weigh the same in the memory bank (there: all batches); the
epoch is chosen on valid, not on test; border pixels are repeated before smoothing as SciPy does it. None in the loss
or the score, which are computed with less: the descriptor is linear, so the bank is the descriptor of the mean
features, and it comes before the upsampling of the deeper layers; of all distances the loss needs the six smallest,
whose gradient needs no matrix of patches by centres and whose search needs few axes, as mean features are smooth.
Differences from anomalib's and BMAD's, which made the thesis' row: there the radius is never trained, so that the
repulsion is always zero (--no-learn-radius does the same); anomalib fills the memory bank with the CNN's batch norm in
training mode.

Cost, measured on one CPU thread at 256 pixels: mobilenet_v2, an epoch of 200 images with a look at 40 of valid 60 s,
0.19 s an image in testing, 0.96 GiB; wide_resnet50_2, untrained, 0.9 s an image in training and 1.2 s in testing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

# The layers of strides 4, 8 and 16.
LAYERS = {
    "resnet18": ["layer1", "layer2", "layer3"],
    "resnet50": ["layer1", "layer2", "layer3"],
    "wide_resnet50_2": ["layer1", "layer2", "layer3"],
    "mobilenet_v2": ["features.3", "features.6", "features.13"],  # our choice: no published setting
}
NU, ALPHA = 1e-3, 0.1  # the loss is divided by nu; alpha is the margin of the repulsion (official code, cfa.py)
AXES = 256  # of the memory bank, for the speed of the search: all but 6e-7 of its variance (untrained wide_resnet50_2)


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
    batch_size: int = 4
    """images a batch (official code); an incomplete last one is left out in training"""
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
    epochs: int = 30
    """passes over the normal training images (official code)"""
    lr: float = 1e-3
    """AdamW's learning rate (thesis, Table 3.4)"""
    eval_every: int = 10
    """epochs between looks at valid, which choose the checkpoint"""
    backbone: str = "wide_resnet50_2"
    """torchvision network: resnet18, resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """of the backbone: imagenet (torchvision's), none (untrained), auto (imagenet, else none), or a FILE"""
    cache_features: float | Literal["auto"] = "auto"
    """GiB of disk for the frozen features of the training images; auto: 16; 0: they are computed anew each epoch"""
    weight_decay: float = 5e-4
    """AdamW's weight decay (thesis, Table 3.4)"""
    neighbors: int = 3
    """K, nearest centres that attract a patch and enter its score (thesis, Table 3.4)"""
    hard_negatives: int = 3
    """J, next nearest centres that repel a patch (thesis, Table 3.4)"""
    radius: float = 1e-5
    """r of the hyperspheres at the start (thesis, Table 3.4)"""
    learn_radius: bool = True
    """train r (official code); without it nothing ever repels, as in anomalib and BMAD"""


class Descriptor(nn.Module):
    """A 1x1 convolution of all layers' features and the position (CoordConv): pooled maps [(B, C_l, h_l, w_l)] -> phi
    (B, D, h, w) on the finest grid; D is the sum of all C_l."""

    def __init__(self, channels, grid):
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(sum(channels) + 2, sum(channels), 1)
        row, column = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in grid), indexing="ij")
        self.register_buffer("coordinates", torch.stack([row, column])[None])  # (1, 2, h, w)

    def forward(self, features):
        # 1x1 convolution and bilinear upsampling commute, so each layer is convolved on its own, coarser grid
        first, *deeper, position = self.conv.weight.split([*self.channels, 2], dim=1)
        first_map, *deeper_maps, coordinates = (  # channels last: upsampled twenty times as fast on a CPU
            f.contiguous(memory_format=torch.channels_last) for f in (*features, self.coordinates))
        phi = F.conv2d(first_map, first) + F.conv2d(coordinates, position, self.conv.bias)
        for feature, weight in zip(deeper_maps, deeper, strict=True):
            phi += F.interpolate(F.conv2d(feature, weight), phi.shape[-2:], mode="bilinear")
        return phi


def shorten(x, axes):
    """(n, D) -> (n, r + 1): coordinates along the axes (D, r), and the length of what is left. By the triangle
    inequality for that rest, two shortened vectors lie no farther apart than the whole ones."""
    along = x @ axes
    rest = (x.square().sum(1) - along.square().sum(1)).clamp(min=0).sqrt()
    return torch.cat([along, rest[:, None]], dim=1)


def distances_to(centers, index, x):
    """Squared distances (n, k) of each of the patches x (n, D) to its own centers[index], index (n, k): from the
    differences, as they are small beside |phi|^2 - 2 phi c + |c|^2."""
    return torch.cdist(x[:, None], centers[index], compute_mode="donot_use_mm_for_euclid_dist")[:, 0].square()


class NearestDistances(torch.autograd.Function):
    """Squared distances of each of the patches (n, D) to its k nearest centers (P, D), ascending: (n, k).

    `axes` (D, r) are orthonormal, `short` is the centres' short form around their mean. A few centres are compared as a
    whole; where the others might lie nearer by their short forms, all are. Neither the n * P distances nor the n * k
    differences are held for the gradient, 2 (phi - c) for each pair."""

    @staticmethod
    def forward(ctx, patches, centers, axes, short, k, rows=1024):
        middle, squared, short_squared = centers.mean(0), centers.square().sum(1), short.square().sum(1)
        candidates = min(2 * k + 2, len(centers))
        distance = patches.new_empty(len(patches), k)
        nearest = torch.empty(len(patches), k, dtype=torch.long, device=patches.device)
        for d, i, x in zip(distance.split(rows), nearest.split(rows), patches.split(rows), strict=True):
            q = shorten(x - middle, axes)
            q_squared = q.square().sum(1)
            bound, few = torch.addmm(short_squared, q, short.T, alpha=-2).topk(candidates, largest=False)
            found = distances_to(centers, few, x).topk(k, largest=False)
            d.copy_(found.values)
            i.copy_(few.gather(1, found.indices))
            unsure = bound[:, -1] + q_squared < d[:, -1] + 1e-5 * (d[:, -1] + q_squared)  # not by rounding alone
            if unsure.any():
                x = x[unsure]
                i[unsure] = torch.addmm(squared, x, centers.T, alpha=-2).topk(k, largest=False).indices
                d[unsure] = distances_to(centers, i[unsure], x)
        ctx.save_for_backward(patches, centers, nearest)
        return distance

    @staticmethod
    def backward(ctx, grad):  # (n, k)
        patches, centers, nearest = ctx.saved_tensors
        pulled = F.embedding_bag(nearest, centers, mode="sum", per_sample_weights=grad)  # sum_k grad_k c_k: (n, D)
        return 2 * (grad.sum(1, keepdim=True) * patches - pulled), None, None, None, None


class CFA(nn.Module):
    def __init__(self, backbone, weights, image_size, neighbors, hard_negatives, radius, learn_radius):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone} is unknown: take {', '.join(LAYERS)}, or add its layers to "
                               f"LAYERS")
        self.layers, self.neighbors, self.hard_negatives = LAYERS[backbone], neighbors, hard_negatives
        self.backbone = common.feature_extractor(backbone, self.layers, weights)
        shapes = [f.shape[1:] for f in self.features(torch.zeros(1, 3, image_size, image_size))]  # (C_l, h_l, w_l)
        channels, (_, h, w) = [c for c, _, _ in shapes], shapes[0]
        if not (neighbors > 0 and hard_negatives > 0 and neighbors + hard_negatives <= h * w):
            raise common.Error(f"--neighbors {neighbors} --hard-negatives {hard_negatives}: each is at least 1, both "
                               f"together "
                               f"at most {h * w}, the positions of a {image_size}-pixel image")
        self.descriptor = Descriptor(channels, (h, w))
        dim = sum(channels)
        self.register_buffer("memory_bank", torch.zeros(h * w, dim))  # C in the paper, (P, D)
        self.register_buffer("axes", torch.zeros(dim, min(AXES, dim // 2)))  # of the bank
        self.register_buffer("short", torch.zeros(h * w, min(AXES, dim // 2) + 1))  # the bank's, see `shorten`
        self.radius = nn.Parameter(torch.tensor(radius), requires_grad=learn_radius)

    @torch.no_grad()
    def features(self, image):
        """The frozen part: (B, 3, H, W) -> 3x3 means of each layer's features, [(B, C_l, h_l, w_l)], finest first."""
        found = self.backbone(common.normalize(image))
        return [F.avg_pool2d(found[k], 3, stride=1, padding=1) for k in self.layers]  # zeros at the border count

    @torch.no_grad()
    def fill_memory_bank(self, batches):
        """The descriptor's mean at each position over all normal images, batches of whose `features` are given, and its
        axes; to be called before the descriptor is trained."""
        n, mean = 0, None
        for features in batches:
            n += len(features[0])
            mean = mean or [torch.zeros_like(f[:1]) for f in features]
            for m, f in zip(mean, features, strict=True):
                m += (f - m).sum(0) / n
        self.memory_bank.copy_(self.descriptor(mean)[0].flatten(1).T)  # the descriptor is linear
        centered = self.memory_bank - self.memory_bank.mean(0)
        self.axes.copy_(torch.svd_lowrank(centered.cpu(), self.axes.shape[1])[2])
        self.short.copy_(shorten(centered, self.axes))

    def distances(self, features, k):
        """Squared distances of each patch to its k nearest centres, ascending: (B*P, k)."""
        phi = self.descriptor(features)  # (B, D, h, w)
        return NearestDistances.apply(phi.flatten(2).mT.flatten(0, 1), self.memory_bank, self.axes, self.short, k)

    def loss(self, features):
        distance = self.distances(features, self.neighbors + self.hard_negatives)
        r2 = self.radius.square()
        attraction = F.relu(distance[:, : self.neighbors] - r2).mean()  # L_att: the K nearest centres
        repulsion = F.relu(r2 - distance[:, self.neighbors :] - ALPHA).mean()  # L_rep: the J next ones
        return (attraction + repulsion) / NU

    @torch.inference_mode()
    def predict(self, image):
        """Anomaly map (B, H, W): smoothed distances to the nearest centre; anomaly score (B,): its maximum."""
        self.eval()
        distance = self.distances(self.features(image), self.neighbors).sqrt()  # (B*P, K); unsquared, unlike the loss
        patch_score = distance[:, 0] * F.softmin(distance, dim=1)[:, 0]  # lower where several centres are as near
        grid = self.descriptor.coordinates.shape[-2:]
        anomaly_map = F.interpolate(patch_score.view(-1, 1, *grid), image.shape[-2:], mode="bilinear")
        anomaly_map = smooth(anomaly_map)[:, 0]
        return anomaly_map, anomaly_map.amax(dim=(1, 2))


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
    model = CFA(args.backbone, args.weights, args.image_size, args.neighbors, args.hard_negatives, args.radius,
                args.learn_radius).to(run.device)
    if not args.checkpoint:
        frozen = common.Features(model.features, train, args, run)
        model.fill_memory_bank(frozen.batches(args.batch_size))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay, amsgrad=True)
        for epoch in run.epochs(model, optimizer):
            losses = []
            for features in frozen.batches(args.batch_size, shuffle=(args.seed, epoch), drop_last=True):
                loss = model.loss(features)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()), radius=model.radius.item())
    common.finish(run, model, (train, valid, test))
