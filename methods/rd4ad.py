"""RD4AD (Deng, Li: Anomaly Detection via Reverse Distillation from One-Class Embedding, CVPR 2022, arXiv:2201.10703).

A frozen, pretrained teacher E extracts features f_E^k at three layers. A bottleneck fuses them into a small embedding
phi, from which the student, a decoder D with blocks like the teacher's, learns to reproduce these features as f_D^k.
The bottleneck and student, trained on normal images only, do not pass anomalies on, so the features differ where the
image is anomalous. The anomaly map of layer k is M^k(h, w) = 1 - cos(f_E^k(h, w), f_D^k(h, w)) (Eq. 2).

    image -> teacher E:  f_E^1  f_E^2  f_E^3 --> one-class bottleneck --> phi
                           |      |      |                                 |
             student D:  f_D^1  f_D^2  f_D^3 <-----------------------------'    M^k compares f_E^k with f_D^k

Settings (thesis, Table 3.6): wide_resnet50_2, Adam with learning rate 0.005 and betas 0.5 and 0.99 (official code: 0.5
and 0.999). Epochs, batch size and image size are those of the official code, hq-deng/RD4AD (6554076).
Differences from the paper: the loss treats a layer's whole feature map as one vector, as in the official code, instead
of averaging over positions; users report lower accuracy with the paper's form (issue 22 of the official code).
Differences from the official code:
- The best epoch is chosen on valid; the official code evaluates every tenth epoch on the test set and keeps the last.
- The teacher runs without gradients and without its last stage, which is not used. The bottleneck omits a layer that
  the official code never calls (conv4).

Differences from the thesis' benchmark: layer maps are added, as in the official code; the benchmark's configuration
multiplies them (--combine product).
The version for mobilenet_v2 is our own. The bottleneck fuses features as in the paper. Its blocks and the decoder's are
inverted residuals; the decoder has as many as the teacher (3 with 96, 3 with 32 and 2 with 24 channels). Where the grid
changes, the shortcut is a convolution, as in ResNets. The blocks end without ReLU, since the teacher's features can be
negative.

Parameters of bottleneck, decoder and frozen teacher: wide_resnet50_2 58,885,120, 24,917,504 and 24,862,528 (as in the
official code); resnet18 11,680,000, 3,703,168 and 2,782,784; mobilenet_v2 1,545,984, 696,544 and 542,528.
Cost on one CPU thread, with mobilenet_v2, 128 pixels and batches of 8: 38 s for 3 epochs of 200 images with three
validations (--eval-every 1), 20 ms to score an image, 1.2 GiB of memory. The default settings were not timed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common

# Layers with strides 4, 8 and 16; their channels and those of the embedding (stride 32); the type of block; numbers of
# blocks in bottleneck and decoder, coarsest stage first (official code; the decoder does not mirror the teacher).
BACKBONES = {
    "resnet18": (["layer1", "layer2", "layer3"], (64, 128, 256, 512), "basic", (2, 2, 2, 2)),
    "resnet50": (["layer1", "layer2", "layer3"], (256, 512, 1024, 2048), "bottleneck", (3, 3, 4, 6)),
    "wide_resnet50_2": (["layer1", "layer2", "layer3"], (256, 512, 1024, 2048), "wide", (3, 3, 4, 6)),
    "mobilenet_v2": (["features.3", "features.6", "features.13"], (24, 32, 96, 160), "inverted", (3, 3, 3, 2)),
}
BETAS = (0.5, 0.99)  # thesis, Table 3.6


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
    """images are resized to this width and height in pixels (official code); a multiple of 32"""
    batch_size: Annotated[int, Ge(1)] = 16
    """images per batch (official code)"""
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
    epochs: Annotated[int, Ge(1)] = 200
    """passes over the normal training images (official code)"""
    lr: Annotated[float, Gt(0)] = 0.005
    """Adam's learning rate (thesis, Table 3.6)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    backbone: str = "wide_resnet50_2"
    """torchvision network used as teacher: resnet18, resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""
    combine: Literal["sum", "product"] = "sum"
    """how to combine the layer maps: sum (official code) or product (the thesis' benchmark)"""


def conv(inputs, outputs, kernel, resize=None, groups=1):
    """Return a convolution. resize: "down" halves the grid, "up" doubles it with a transposed 2x2 convolution."""
    if resize == "up":
        return nn.ConvTranspose2d(inputs, outputs, 2, 2, groups=groups, bias=False)
    return nn.Conv2d(inputs, outputs, kernel, 2 if resize else 1, kernel // 2, groups=groups, bias=False)


def with_norm(convs, activation=nn.ReLU):
    """Return the convolutions, each followed by batch norm and, except for the last, by an activation."""
    layers = []
    for c in convs:
        layers += [c, nn.BatchNorm2d(c.out_channels), activation(inplace=True)]
    return layers[:-1]


class Block(nn.Module):
    """A residual block like the teacher's, which can also halve or double the grid."""

    def __init__(self, kind, inputs, outputs, resize=None):
        super().__init__()
        if kind == "basic":
            convs = [conv(inputs, outputs, 3, resize), conv(outputs, outputs, 3)]
        else:
            width = {"bottleneck": outputs // 4, "wide": outputs // 2, "inverted": 6 * inputs}[kind]
            groups = width if kind == "inverted" else 1
            convs = [conv(inputs, width, 1), conv(width, width, 3, resize, groups), conv(width, outputs, 1)]
        self.body = nn.Sequential(*with_norm(convs, nn.ReLU6 if kind == "inverted" else nn.ReLU))
        self.shortcut = nn.Sequential(*(with_norm([conv(inputs, outputs, 1, resize)]) if resize else []))
        self.last = nn.Identity() if kind == "inverted" else nn.ReLU(inplace=True)

    def forward(self, x):
        return self.last(self.body(x) + self.shortcut(x))


def stage(kind, inputs, outputs, blocks, resize):
    more = (Block(kind, outputs, outputs) for _ in range(blocks - 1))
    return nn.Sequential(Block(kind, inputs, outputs, resize), *more)


class OneClassBottleneck(nn.Module):
    """Multi-scale feature fusion (MFF) and one-class bottleneck embedding (OCBE): features -> (B, C4, H/32, W/32)."""

    def __init__(self, kind, channels, blocks):
        super().__init__()
        c1, c2, c3, c4 = channels
        self.fuse1 = nn.Sequential(*with_norm([conv(c1, c2, 3, "down"), conv(c2, c3, 3, "down")]), nn.ReLU())
        self.fuse2 = nn.Sequential(*with_norm([conv(c2, c3, 3, "down")]), nn.ReLU())
        self.embed = stage(kind, 3 * c3, c4, blocks, "down")

    def forward(self, features):
        e1, e2, e3 = features
        return self.embed(torch.cat([self.fuse1(e1), self.fuse2(e2), e3], dim=1))  # (B, 3 * C3, H/16, W/16)


class Decoder(nn.ModuleList):
    """(B, C4, H/32, W/32) -> reproductions of the teacher's three feature maps, from finest to coarsest."""

    def __init__(self, kind, channels, blocks):
        c1, c2, c3, c4 = channels
        super().__init__(stage(kind, inputs, outputs, n, "up")
                         for inputs, outputs, n in zip((c4, c3, c2), (c3, c2, c1), blocks, strict=True))

    def forward(self, x):
        features = []
        for part in self:
            x = part(x)
            features.insert(0, x)
        return features


class RD4AD(nn.Module):
    def __init__(self, backbone, weights, combine):
        super().__init__()
        if backbone not in BACKBONES:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(BACKBONES)}; others need a new decoder")
        layers, channels, kind, blocks = BACKBONES[backbone]
        self.combine = combine
        self.teacher = common.feature_extractor(backbone, layers, weights)
        self.bottleneck = OneClassBottleneck(kind, channels, blocks[0])
        self.decoder = Decoder(kind, channels, blocks[1:])
        for module in [*self.bottleneck.modules(), *self.decoder.modules()]:
            if isinstance(module, nn.Conv2d):  # transposed convolutions keep PyTorch's default, as in the official code
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image):
        """Return the features of teacher and student: two lists of (B, C, h, w), with strides 4, 8 and 16."""
        with torch.no_grad():
            features = list(self.teacher(common.normalize(image)).values())
        return features, self.decoder(self.bottleneck(features))

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map (B, H, W; the layer maps, combined and smoothed) and its maximum, the score (B,)."""
        self.eval()
        layer_maps = []
        for e, d in zip(*self(image), strict=True):
            layer_map = 1 - F.cosine_similarity(e, d, dim=1)  # (B, h, w), Eq. 2
            layer_maps.append(F.interpolate(layer_map[:, None], image.shape[-2:], mode="bilinear",
                                            align_corners=True)[:, 0])  # as in the official code
        layer_maps = torch.stack(layer_maps)  # (3, B, H, W)
        anomaly_map = common.smooth(layer_maps.sum(0) if self.combine == "sum" else layer_maps.prod(0))
        return anomaly_map, anomaly_map.amax(dim=(1, 2))


def distillation_loss(target, pred):
    """Return 1 - cos between teacher and student (one vector per layer), summed over layers, averaged over images.

    target, pred: lists of (B, C, h, w)."""
    return sum(1 - F.cosine_similarity(e.flatten(1), d.flatten(1)).mean() for e, d in zip(target, pred, strict=True))


def build_model(args):
    return RD4AD(args.backbone, args.weights, args.combine)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    if args.image_size % 32:
        raise common.Error(f"--image-size {args.image_size}: the decoder starts at stride 32; give a multiple of 32")
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        optimizer = torch.optim.Adam([*model.bottleneck.parameters(), *model.decoder.parameters()], args.lr, BETAS)
        for epoch in run.epochs(model, optimizer):
            model.train()  # affects only the batch norm of the bottleneck and decoder: the teacher stays in eval mode
            losses = []
            for image in train.batches(args.batch_size, run.device, shuffle=(args.seed, epoch)):
                loss = distillation_loss(*model(image))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
