"""CS-Flow (Rudolph, Wehrbein, Rosenhahn, Wandt, WACV 2022, arXiv:2110.02855).

A normalizing flow maps deep features of normal images at three scales to a standard normal distribution. Anomalous
features land far from the origin. In each coupling block, one half of the channels predicts a scale and a shift for the
other half, and neighbouring scales exchange information:

    image      -> CNN -> x_0 -> conv -> y_0 -> conv(y_0) + up(y_1)                up: upsample by 2, convolve
    image, 1/2 -> CNN -> x_1 -> conv -> y_1 -> conv(y_1) + up(y_2) + down(y_0)    down: convolve with stride 2
    image, 1/4 -> CNN -> x_2 -> conv -> y_2 -> conv(y_2) + down(y_1)

Settings: thesis, Table 3.3 (clamp 3, gradients clamped to 1, Adam with learning rate 2e-4 and weight decay 1e-5).
Everything else follows the official code (marco-rudolph/cs-flow), except for the batch size of 64, the 300 epochs and
the image size of 256x256 pixels, which are from BMAD's code (official code: 16, 240 and 768x768).
Differences from the official code: torchvision's EfficientNet-B5 has the same weights as efficientnet_pytorch's but
pads symmetrically; the best epoch is chosen on valid (official code: the last one). The anomaly map is the same as in
the official code, with 8x8 values for an image of 256x256 pixels.
anomalib 2.7 differs: its loss multiplies the log-determinant by the batch size, its Adam has betas of (0.5, 0.9), all
its scales share the same permutation, and its map is the product of the maps at the three scales.

Parameters: 275,227,288 in the flow (mobilenet_v2: 289,711,640). Cached features take 0.1 MB per image of 256x256
pixels. Training starts slowly, because gamma starts at 0 and Adam's eps is large: 100 steps at 2e-4 hardly change the
scores.
Cost on one thread of a busy CPU, with 200 images of 128x128 pixels, mobilenet_v2, --hidden 256 and batches of 8: 27 s
per epoch, 49 ms to score an image, 2.2 GiB of memory. With --hidden 1024, a step with 8 images of 256x256 pixels
takes 8 s, and the flow and Adam need 4.4 GB.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common

LAYERS = {  # with stride 32
    "efficientnet_b5": "features.6",  # the last of nine blocks with 304 channels (official code: block 35)
    "mobilenet_v2": "features.17",  # our choice: no published setting
}
KERNELS = [3, 3, 3, 5]  # of the four coupling blocks (official code, config.py)
CLAMP = 3  # thesis, Table 3.3


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
    """images are resized to this width and height in pixels (BMAD's code); a multiple of 128"""
    batch_size: Annotated[int, Ge(1)] = 64
    """images per batch (BMAD's code)"""
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
    epochs: Annotated[int, Ge(1)] = 300
    """passes over the normal training images (BMAD's code)"""
    lr: Annotated[float, Gt(0)] = 2e-4
    """Adam's learning rate (thesis, Table 3.3)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    backbone: str = "efficientnet_b5"
    """torchvision network: efficientnet_b5, mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""
    cache_features: Annotated[float, Ge(0)] = 16
    """maximum disk space in GiB for cached features of the training images; 0: recompute them in each epoch"""
    hidden: Annotated[int, Ge(1)] = 1024
    """hidden channels of the coupling networks (official code, config.py); 256 is fast enough on a CPU"""


# All lists contain the three scales s = 0, 1, 2: (B, C, h, w), (B, C, h/2, w/2), (B, C, h/4, w/4), with h = H / 32.
class CrossConvolutions(nn.Module):
    """Predict the scale and shift of half the channels from the other half: three (B, 2 C, ., .) (paper, Fig. 4)."""

    def __init__(self, channels, hidden, kernel):
        super().__init__()

        def convolutions(number, c_in, c_out, stride=1):
            return nn.ModuleList(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2) for _ in range(number))

        self.enter = convolutions(3, channels, hidden)
        self.stay = convolutions(3, hidden, 2 * channels)
        self.up = convolutions(2, hidden, 2 * channels)  # from scale 1 to 0, from 2 to 1
        self.down = convolutions(2, hidden, 2 * channels, stride=2)  # from scale 0 to 1, from 1 to 2
        self.gamma = nn.Parameter(torch.zeros(3))  # zero at first: an untrained flow only permutes channels

    def forward(self, x):
        y = [F.leaky_relu(conv(x[s]), 0.1) for s, conv in enumerate(self.enter)]
        out = [conv(y[s]) for s, conv in enumerate(self.stay)]
        for s in (0, 1):
            out[s] = out[s] + self.up[s](F.interpolate(y[s + 1], scale_factor=2, mode="bilinear"))
            out[s + 1] = out[s + 1] + self.down[s](y[s])
        return [self.gamma[s] * out[s] for s in range(3)]


class Coupling(nn.Module):
    def __init__(self, channels, hidden, kernel):
        super().__init__()
        self.net1 = CrossConvolutions(channels // 2, hidden, kernel)
        self.net2 = CrossConvolutions(channels // 2, hidden, kernel)

    def forward(self, x):
        first, second = zip(*(v.chunk(2, dim=1) for v in x), strict=True)
        first, log_det2 = affine(first, self.net2(second))
        second, log_det1 = affine(second, self.net1(first))
        y = [torch.cat(halves, dim=1).clamp(-1e6, 1e6) for halves in zip(first, second, strict=True)]
        return y, log_det1 + log_det2


def affine(x, r):
    """Return exp(s) x + t for each scale and log |det| (B,), the sum of all s. The halves of r are s and t."""
    y, log_det = [], 0
    for v, halves in zip(x, r, strict=True):
        s, t = halves.chunk(2, dim=1)
        s = CLAMP * 0.636 * torch.atan(s / CLAMP)  # soft clamp to +-CLAMP, since 0.636 = 2 / pi
        y.append(s.exp() * v + t)
        log_det = log_det + s.sum(dim=(1, 2, 3))
    return y, log_det


class CrossScaleFlow(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(channels, hidden, kernel) for kernel in KERNELS)
        for k in range(len(KERNELS)):  # seeded by the block's index, not by --seed (official code)
            draw = np.random.RandomState(k)
            order = np.stack([draw.permutation(channels) for _ in range(3)])
            self.register_buffer(f"order{k}", torch.from_numpy(order))  # (3, C)

    def forward(self, x):
        """Map features x at three scales to z (same shapes). Return z and log |det dz/dx| (B,)."""
        log_det = 0
        for k, coupling in enumerate(self.couplings):
            order = self.get_buffer(f"order{k}")
            x, block_log_det = coupling([x[s][:, order[s]] for s in range(3)])
            log_det = log_det + block_log_det
        return x, log_det


class CSFlow(nn.Module):
    def __init__(self, backbone, weights, hidden, image_size):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(LAYERS)}, or add its layers to LAYERS")
        if image_size < 128 or image_size % 128:
            raise common.Error(f"--image-size {image_size}: give a multiple of 128")
        self.layer = LAYERS[backbone]
        self.backbone = common.feature_extractor(backbone, [self.layer], weights)
        channels = self.features(torch.zeros(1, 3, image_size, image_size))[0].shape[1]
        self.flow = CrossScaleFlow(channels, hidden)

    @torch.no_grad()
    def features(self, image):
        image = common.normalize(image)
        # nearest-neighbour resizing, as in the official code
        return [self.backbone(image[:, :, ::step, ::step])[self.layer] for step in (1, 2, 4)]

    def loss(self, features):
        """Return the mean negative log-likelihood per dimension, up to a constant."""
        z, log_det = self.flow(features)
        z = torch.cat([v.flatten(1) for v in z], dim=1)  # (B, dim)
        return (z.square().sum(1) / 2 - log_det).mean() / z.shape[1]

    @torch.inference_mode()
    def predict(self, image):
        """Return mean z^2 at scale 0 as the map (B, H, W) and mean z^2 / 2 over all scales as the score (B,)."""
        self.eval()
        z, _ = self.flow(self.features(image))  # scores ignore the log-determinant (official code)
        anomaly_map = F.interpolate(z[0].square().mean(1, keepdim=True), image.shape[-2:], mode="bilinear")[:, 0]
        return anomaly_map, torch.cat([v.flatten(1) for v in z], dim=1).square().mean(1) / 2


def build_model(args):
    return CSFlow(args.backbone, args.weights, args.hidden, args.image_size)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        frozen = common.Features(model.features, train, args, run)
        # a large eps matters: the loss is divided by dim, so many gradients are below 1e-4 (official code, train.py)
        optimizer = torch.optim.Adam(model.flow.parameters(), args.lr, eps=1e-4, weight_decay=1e-5, fused=True)
        for epoch in run.epochs(model, optimizer):
            losses = []
            for features in frozen.batches(args.batch_size, shuffle=(args.seed, epoch)):
                loss = model.loss(features)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.flow.parameters(), 1)  # gradients are clamped to 1 (thesis)
                optimizer.step()
                losses.append(loss.detach())
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
