"""STFPM (Wang, Han, Ding, Huang: Student-Teacher Feature Pyramid Matching, BMVC 2021, arXiv:2103.04257).

A student network starts from random weights and learns, on normal images only, to reproduce the features of a frozen,
pretrained teacher of the same architecture at three layers. The student has never seen anomalies and fails on them: a
position is anomalous if student and teacher differ at all three layers.

Settings (thesis, Table 3.6): SGD with learning rate 0.4, momentum 0.9 and weight decay 1e-4; resnet18 (the default
here) or wide_resnet50_2 (the thesis has a single row of results and does not say which of the two produced it). Epochs,
batch size and image size are those of the official code, gdwang08/STFPM (2598a5e). For STFPM, the thesis cites Yamada
and Hotta (arXiv:2111.15376, its reference [69]), but its benchmark ran the method implemented here.
Differences from the paper: the squared difference is not halved. The official code, with the same learning rate, does
not halve it either.
Differences from the official code:
- The best epoch is chosen on valid, which contains anomalies, and all training images are used for training. The
  official code holds out a fifth of the images and keeps the epoch whose maps have the lowest mean on that fifth.
- Each layer's map is upsampled to the image size before the maps are multiplied, as in anomalib and the thesis'
  benchmark. The official code multiplies the maps on the stride-4 grid and upsamples the product.

Differences from anomalib, which the thesis' benchmark used: its loss is half the sum over the batch; ours is the mean.
With batches of B images, training with anomalib's loss equals training with ours at B/2 times the learning rate (--lr
6.4 for 32 images) and 2/B times the weight decay.

Parameters (as many again in the frozen teacher): resnet18 2,782,784, wide_resnet50_2 24,862,528, mobilenet_v2 542,528.
Cost on one CPU thread, with mobilenet_v2, 128 pixels and batches of 8: 37 s for 4 epochs of 200 images with one
validation, 20 ms to score an image, 1.1 GiB of memory. The default settings were not timed.
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

LAYERS = {  # strides 4, 8 and 16
    "resnet18": ["layer1", "layer2", "layer3"],
    "resnet50": ["layer1", "layer2", "layer3"],
    "wide_resnet50_2": ["layer1", "layer2", "layer3"],
    "mobilenet_v2": ["features.3", "features.6", "features.13"],  # our choice: no published setting
}
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # thesis, Table 3.6


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
    """images are resized to this width and height in pixels (official code)"""
    batch_size: Annotated[int, Ge(1)] = 32
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
    epochs: Annotated[int, Ge(1)] = 100
    """passes over the normal training images (official code)"""
    lr: Annotated[float, Gt(0)] = 0.4
    """SGD's learning rate (thesis, Table 3.6)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    backbone: str = "resnet18"
    """torchvision network used for teacher and student: resnet18, resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""


class STFPM(nn.Module):
    def __init__(self, backbone, weights):
        from torchvision.models import get_model  # imported here, since it takes seconds
        from torchvision.models.feature_extraction import create_feature_extractor

        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(LAYERS)}, or add its layers to LAYERS")
        self.teacher = common.feature_extractor(backbone, LAYERS[backbone], weights)
        # An untrained teacher starts from seed 0. Without this line, the student of a run with seed 0 would be a copy.
        torch.manual_seed(torch.initial_seed() + 1)
        self.student = create_feature_extractor(get_model(backbone, weights=None), LAYERS[backbone])

    def forward(self, image):
        """Return |t - s|^2 in [0, 4] at each position, for normalised features t and s: one (B, h, w) per layer.

        2 - 2 cos is mathematically equal, but loses all precision where t and s are almost equal."""
        image = common.normalize(image)
        with torch.no_grad():
            target = self.teacher(image)
        pred = self.student(image)  # {layer: (B, C, h, w)}
        return [(F.normalize(target[k]) - F.normalize(pred[k])).square().sum(1) for k in target]

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map (B, H, W; the product of upsampled layer maps) and its maximum, the score (B,)."""
        self.eval()
        layer_maps = [F.interpolate(d[:, None], image.shape[-2:], mode="bilinear")[:, 0] for d in self(image)]
        anomaly_map = torch.stack(layer_maps).prod(dim=0)
        return anomaly_map, anomaly_map.amax(dim=(1, 2))


def build_model(args):
    return STFPM(args.backbone, args.weights)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        optimizer = torch.optim.SGD(model.student.parameters(), args.lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
        for epoch in run.epochs(model, optimizer):
            model.train()  # affects only the student's batch norm: the teacher stays in eval mode
            losses = []
            for image in train.batches(args.batch_size, run.device, shuffle=(args.seed, epoch)):
                loss = sum(distance.mean() for distance in model(image))  # all layers are weighted equally
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
