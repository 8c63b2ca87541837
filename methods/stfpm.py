"""STFPM (Wang, Han, Ding, Huang: Student-Teacher Feature Pyramid Matching, BMVC 2021, arXiv:2103.04257).

A student starts from random weights and learns, on normal images only, to reproduce the features of a frozen,
pretrained teacher of the same architecture at three layers. On anomalies, which it has never seen, it fails: a position
is anomalous where the two differ at all three layers.

Settings: thesis, Table 3.6: SGD with learning rate 0.4, momentum 0.9, weight decay 1e-4; resnet18 (the default here)
and wide_resnet50_2, in one row that does not say which of the two. Epochs, batch and image size: gdwang08/STFPM
(2598a5e). The thesis cites Yamada and Hotta (arXiv:2111.15376) for STFPM, its [69]; its benchmark ran this method.
Differences from the paper: the squared difference is not halved, as in the official code with its learning rate.
Differences from gdwang08/STFPM:
- The epoch is chosen on valid, which has anomalies, and training uses all training images; the official code holds out
  a fifth of them and takes the epoch with the smallest map on these.
- Each layer's map is enlarged to the image before the product, as in anomalib and the thesis' benchmark; the official
  code multiplies on the grid of stride 4 and enlarges the product.

Difference from anomalib, which the thesis' benchmark used: its loss is half the sum over the batch, ours the mean. With
batches of B images it equals our loss with a learning rate B/2 times as high (32 images: --lr 6.4) and a weight decay
B/2 times as low.

Parameters, trained and as many frozen: resnet18 2,782,784, wide_resnet50_2 24,862,528, mobilenet_v2 542,528. Cost,
measured: mobilenet_v2, 128 pixels, batches of 8, one CPU thread: 37 s for 4 epochs of 200 images with one validation,
20 ms to score an image, 1.1 GiB. The default was not timed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

LAYERS = {  # of strides 4, 8 and 16
    "resnet18": ["layer1", "layer2", "layer3"],
    "resnet50": ["layer1", "layer2", "layer3"],
    "wide_resnet50_2": ["layer1", "layer2", "layer3"],
    "mobilenet_v2": ["features.3", "features.6", "features.13"],  # our choice: no published setting
}
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # thesis, Table 3.6


@dataclass
class Args:
    data: str = "phantom"
    """benchmark (brain, liver, resc, oct2017, chest, histo, phantom) or a folder in a supported layout"""
    root: str = "data"
    """folder of the prepared benchmarks; decoded images are cached below it"""
    out: str = "runs"
    """results are written to <out>/<data>/<method>/seed<k>"""
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    """seed of PyTorch's random numbers"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    image_size: Annotated[int, Ge(16)] = 256
    """images are resized to this width and height in pixels (official code)"""
    batch_size: Annotated[int, Ge(1)] = 32
    """images per batch (official code)"""
    white: Annotated[int, Interval(ge=1, le=65535)] = 65535
    """value of white in 16-bit images; 4095 for 12-bit data"""
    holdout: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """share of the training images held out to set thresholds, if valid has no normal images"""
    limit: Annotated[int | None, Ge(1)] = None
    """use at most this many images of each split and class, for quick tests"""
    maps: Annotated[int, Ge(-1)] = 50
    """number of test images to save pictures of; 0: no pictures, -1: all"""
    overwrite: bool = False
    """discard an existing run and start over"""
    checkpoint: str | None = None
    """a model.pt: skip training and evaluate it on --data"""
    predict: str | None = None
    """with --checkpoint: score this image, folder of images, NIfTI volume, DICOM series or folder of scans"""
    specificity: Annotated[float, Interval(gt=0, lt=1)] = 0.95
    """share of normal images that should lie below the decision threshold"""
    scan_score: Literal["max", "top5"] = "max"
    """score of a scan: the maximum over its slices, or the mean of the five highest"""
    save_maps: Literal["no", "npy", "tiff"] = "no"
    """with --predict: also save each anomaly map, in float32 and at its image's original size"""
    epochs: Annotated[int, Ge(1)] = 100
    """passes over the normal training images (official code)"""
    lr: Annotated[float, Gt(0)] = 0.4
    """SGD's learning rate (thesis, Table 3.6)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    backbone: str = "resnet18"
    """torchvision network of teacher and student: resnet18, resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """weights of the backbone: imagenet (torchvision's), none (untrained), auto (imagenet, else none), or a FILE"""


class STFPM(nn.Module):
    def __init__(self, backbone, weights):
        from torchvision.models import get_model  # here, as torchvision takes seconds to import
        from torchvision.models.feature_extraction import create_feature_extractor

        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone}: take {', '.join(LAYERS)}, or add its layers to LAYERS")
        self.teacher = common.feature_extractor(backbone, LAYERS[backbone], weights)
        # Note: an untrained teacher comes from seed 0; a student from the same seed would have nothing to learn.
        torch.manual_seed(torch.initial_seed() + 1)
        self.student = create_feature_extractor(get_model(backbone, weights=None), LAYERS[backbone])

    def forward(self, image):
        """Return |t - s|^2 of the normalised features t, s at each position, in [0, 4]: a (B, h, w) for each layer.

        2 - 2 cos would be equal, but loses all digits where the two are almost the same."""
        image = common.normalize(image)
        with torch.no_grad():
            target = self.teacher(image)
        pred = self.student(image)  # {layer: (B, C, h, w)}
        return [(F.normalize(target[k]) - F.normalize(pred[k])).square().sum(1) for k in target]

    @torch.inference_mode()
    def predict(self, image):
        """Anomaly map (B, H, W): the product of the enlarged layer maps; anomaly score (B,): its maximum."""
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
            model.train()  # only for the student's batch norm: the teacher stays in eval mode
            losses = []
            for image in train.batches(args.batch_size, run.device, shuffle=(args.seed, epoch)):
                loss = sum(distance.mean() for distance in model(image))  # all layers have the same weight
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
