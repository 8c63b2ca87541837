"""MKD (Salehi, Sadjadi, Baselizadeh, Rohban, Rabiee, CVPR 2021, arXiv:2011.11108): multiresolution distillation.

On normal images, a small cloner network learns to reproduce the features of a large pretrained source network at four
depths, both in direction and in value. It fails on anomalous images, so the discrepancy between the two networks'
features is the anomaly score. The anomaly map is the gradient of the discrepancy with respect to the pixels, computed
by guided backpropagation through the cloner.

Settings (thesis, Table 3.6): VGG-16, batches of 64, Adam with learning rate 1e-3, lambda 0.01. The 200 epochs are from
BMAD's code, which produced the thesis' results (official code: 51 for MNIST to 601 for MVTec AD). The cloner is the
smaller of the two in the official code.
Differences from the official code (rohban-lab/Knowledge_Distillation_AD): images are normalised with ImageNet
statistics, as the source expects (official code: only for CIFAR-10; BMAD: always); the best epoch is chosen on valid
(official code: the last one); images are resized to 256 pixels (official code: 128; BMAD: 224).
The official code stretches each map to [0, 1], so the highest values of a normal image are as high as those of a
lesion, and maps are not comparable across images. With `--map-norm none`, maps remain unstretched and are therefore
comparable, as in other methods. On the phantom (128 pixels, mobilenet_v2, 12 epochs, one seed), pixel AUROC was 0.80
with stretching and 0.72 without. Image scores are not affected.
The design for backbones other than VGG-16 is our own: the source's features are taken after the blocks with strides 4
to 32, and the cloner's features have the same numbers of channels. Since mobilenet_v2's features can be negative, its
cloner has no ReLU before the pooling layers.

Parameters: 343,984 in the cloner, 14,714,688 (frozen) in the convolutions of VGG-16.
Cost with default settings on one thread of a busy CPU: 1.0 s per training image, 1.6 s per test image with its map.
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

# Layers with strides 4, 8, 16 and 32, their channels, and whether a ReLU keeps their features from being negative.
# For vgg16, they are the max-pooling layers, as in the official code; for the other networks, they are our choice.
LAYERS = {
    "vgg16": (["features.9", "features.16", "features.23", "features.30"], [128, 256, 512, 512], True),
    "resnet18": (["layer1", "layer2", "layer3", "layer4"], [64, 128, 256, 512], True),
    "mobilenet_v2": (["features.3", "features.6", "features.13", "features.17"], [24, 32, 96, 320], False),
}


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
    batch_size: Annotated[int, Ge(1)] = 64
    """images per batch (thesis, Table 3.6)"""
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
    """passes over the normal training images (BMAD's code)"""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Adam's learning rate (thesis, Table 3.6)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    backbone: str = "vgg16"
    """torchvision network used as source: vgg16, resnet18, mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""
    value_weight: Annotated[float, Ge(0)] = 0.01
    """lambda, weight of the value loss relative to the direction loss (thesis, Table 3.6)"""
    map_norm: Literal["image", "none"] = "image"
    """image: scale each map so that its minimum is 0 and its 99th percentile 1 (official code); none: keep raw maps"""


class Cloner(nn.Module):
    """VGG-16's five stages, narrow except for the last layers of stages 2 to 5, which are compared with the source."""

    def __init__(self, widths, positive):
        super().__init__()
        stages = [[16, 16], [16, widths[0]], *([16, 16, w] for w in widths[1:])]
        self.stages, c_in = nn.ModuleList(), 3
        for stage in stages:
            layers = []
            for i, c in enumerate(stage):
                last = i == len(stage) - 1  # no batch norm before a pooling layer, as in the official code
                layers += [nn.Conv2d(c_in, c, 3, padding=1, bias=False)]
                nn.init.xavier_uniform_(layers[-1].weight)
                layers += [] if last else [nn.BatchNorm2d(c)]
                layers += [nn.ReLU(inplace=True)] if positive or not last else []
                c_in = c
            self.stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))

    def forward(self, x, guided=False):
        """(B, 3, H, W) -> (B, C, h, w) at strides 4, 8, 16, 32. guided: see `localize`."""
        features = []
        for stage in self.stages:
            for layer in stage:
                x = layer(x)
                if guided and isinstance(layer, nn.ReLU):
                    x.register_hook(lambda grad: grad.clamp(min=0))
            features.append(x)
        return features[1:]


def discrepancy(pred, target, value_weight):
    """Return the paper's L_dir + lambda L_val (B,) for features (B, C, h, w), summed over layers."""
    total = 0
    for p, t in zip(pred, target, strict=True):
        p, t = p.flatten(1), t.flatten(1)  # (B, C*h*w): one vector per layer, not per position
        total = total + 1 - F.cosine_similarity(p, t) + value_weight * (p - t).square().mean(1)
    return total


class MKD(nn.Module):
    def __init__(self, backbone, weights, value_weight, map_norm):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(LAYERS)}, or add its layers to LAYERS")
        layers, widths, positive = LAYERS[backbone]
        self.source = common.feature_extractor(backbone, layers, weights)
        self.cloner = Cloner(widths, positive)
        self.value_weight, self.map_norm = value_weight, map_norm
        self.scaled_by_image = map_norm == "image"  # if so, no pixel threshold fits all images

    def loss(self, image):
        image = common.normalize(image)
        with torch.no_grad():
            target = list(self.source(image).values())
        return discrepancy(self.cloner(image), target, self.value_weight).mean()

    def predict(self, image):
        """Return the map (B, H, W) and score (B,). The score is the discrepancy, the map its smoothed |gradient|."""
        self.eval()
        parts = [self.localize(part) for part in image.split(1)]  # one by one: batch-dependent rounding may flip a ReLU
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    @torch.enable_grad()  # the map is a gradient
    def localize(self, image):
        """Return the map and score of one image. The score omits the first of four layers (official test_functions.py).
        In guided backpropagation, the cloner's ReLUs, but not the source's, pass back only positive gradients."""
        image = common.normalize(image).requires_grad_()
        pred, target = self.cloner(image, guided=True), list(self.source(image).values())
        score = discrepancy(pred[1:], target[1:], self.value_weight)
        grad, = torch.autograd.grad(score.sum(), image)
        anomaly_map = grad.abs().sum(1)  # (B, H, W)
        if self.map_norm == "image":
            values = anomaly_map.flatten(1)  # (B, H*W)
            low, high = values.amin(1, keepdim=True), values.quantile(0.99, dim=1, keepdim=True)
            scaled = (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
            anomaly_map = scaled.clamp(max=1).view_as(anomaly_map)
        return common.smooth(anomaly_map), score.detach()


def build_model(args):
    return MKD(args.backbone, args.weights, args.value_weight, args.map_norm)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        optimizer = torch.optim.Adam(model.cloner.parameters(), args.lr)
        for epoch in run.epochs(model, optimizer):
            model.train()
            losses = []
            for image in train.batches(args.batch_size, run.device, shuffle=(args.seed, epoch)):
                loss = model.loss(image)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
