"""CFA (Lee, Lee, Song, IEEE Access 2022, arXiv:2206.04325).

A learned 1x1 convolution, the descriptor, adapts the features of a pretrained CNN to the normal images. The loss
attracts each patch to small hyperspheres around its nearest centres in a memory bank and repels it from the next
nearest centres. The memory bank holds the mean output of the untrained descriptor at each position and is never
updated. The anomaly score of a patch is its distance to the nearest centre, reduced if other centres are almost as
close. Repulsion is zero until the learned radius r exceeds the distance to a centre by a margin. During training, r
grows, because a larger r reduces the attraction.

Settings: thesis (J. Bao, University of Alberta 2024), Table 3.4: wide_resnet50_2, 3 nearest neighbours, 3 hard
negatives, radius 1e-5, learning rate 1e-3, weight decay 5e-4. Everything else follows the official
code (sungwool/CFA_for_anomaly_localization): layers 1 to 3, AdamW with AMSGrad (the thesis says Adam), batches of 4, 30
epochs, nu 1e-3, alpha 0.1, no k-means on the memory bank and no narrower descriptor (the paper's compression ratios
gamma_c and gamma_d are 1). With wide_resnet50_2, the descriptor and the radius have 3,216,640 trained parameters.
Differences from the paper: images are resized to 256 pixels and not cropped, since lesions may lie at the
border (the paper crops from 256 to 224 pixels; the thesis' benchmark, BMAD, resizes to 224).
Differences from the official code, whose loss and score we keep: each training image has the same weight in the memory
bank (official code: each batch), the best epoch is chosen on valid (official code: on test), and the anomaly map
is mirrored at its border before smoothing, as in SciPy.
Differences from anomalib and from BMAD's code, which produced the thesis' results: both keep the radius fixed, so that
repulsion is always zero (as with --no-learn-radius). Anomalib fills the memory bank while the CNN's batch norm is in
training mode.
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

LAYERS = {  # with strides 4, 8 and 16
    "resnet18": ["layer1", "layer2", "layer3"],
    "resnet50": ["layer1", "layer2", "layer3"],
    "wide_resnet50_2": ["layer1", "layer2", "layer3"],
    "mobilenet_v2": ["features.3", "features.6", "features.13"],  # our choice: no published setting
}
NU, ALPHA = 1e-3, 0.1  # the loss is divided by nu; patches are repelled if r^2 > |phi - c|^2 + alpha (official cfa.py)


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
    batch_size: Annotated[int, Ge(1)] = 4
    """images per batch (official code); in training, an incomplete last batch is dropped"""
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
    epochs: Annotated[int, Ge(1)] = 30
    """passes over the normal training images (official code)"""
    lr: Annotated[float, Gt(0)] = 1e-3
    """AdamW's learning rate (thesis, Table 3.4)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    backbone: str = "wide_resnet50_2"
    """torchvision network: resnet18, resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""
    cache_features: Annotated[float, Ge(0)] = 16
    """maximum disk space in GiB for cached features of the training images; 0: recompute them in each epoch"""
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    """AdamW's weight decay (thesis, Table 3.4)"""
    neighbors: Annotated[int, Ge(1)] = 3
    """K, number of nearest centres that attract a patch and determine its score (thesis, Table 3.4)"""
    hard_negatives: Annotated[int, Ge(1)] = 3
    """J, number of next-nearest centres that repel a patch (thesis, Table 3.4)"""
    radius: Annotated[float, Gt(0)] = 1e-5
    """r, initial radius of the hyperspheres (thesis, Table 3.4)"""
    learn_radius: bool = True
    """train r (official code); with a fixed r, as in anomalib and BMAD's code, patches are never repelled"""


class Descriptor(nn.Module):
    """A 1x1 convolution of features and coordinates (CoordConv). Input: [(B, C_l, h_l, w_l)], finest layer first.
    Output: phi (B, D, h, w) on the finest grid, where D is the sum of all C_l."""

    def __init__(self, channels, grid):
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(sum(channels) + 2, sum(channels), 1)
        row, column = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in grid), indexing="ij")
        self.register_buffer("coordinates", torch.stack([row, column])[None])  # (1, 2, h, w)

    def forward(self, features):
        joint = [F.interpolate(f, self.grid, mode="bilinear") for f in features]
        joint.append(self.coordinates.expand(len(features[0]), -1, -1, -1))
        return self.conv(torch.cat(joint, dim=1))  # (B, D + 2, h, w) -> (B, D, h, w)


class CFA(nn.Module):
    def __init__(self, backbone, weights, image_size, neighbors, hard_negatives, radius, learn_radius):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(LAYERS)}, or add its layers to LAYERS")
        self.layers, self.neighbors, self.hard_negatives = LAYERS[backbone], neighbors, hard_negatives
        self.backbone = common.feature_extractor(backbone, self.layers, weights)
        shapes = [f.shape for f in self.features(torch.zeros(1, 3, image_size, image_size))]  # (1, C_l, h_l, w_l)
        channels, grid = [c for _, c, _, _ in shapes], shapes[0][2:]
        if neighbors + hard_negatives > grid.numel():
            raise common.Error(f"--neighbors {neighbors} --hard-negatives {hard_negatives}: there are only "
                               f"{grid.numel()} centres at {image_size} pixels; lower one of the two")
        self.descriptor = Descriptor(channels, grid)
        self.register_buffer("memory_bank", torch.zeros(grid.numel(), sum(channels)))  # C in the paper, (P, D)
        self.radius = nn.Parameter(torch.tensor(radius), requires_grad=learn_radius)

    @torch.no_grad()
    def features(self, image):
        """Return 3x3 averages of each layer's frozen features: (B, 3, H, W) -> [(B, C_l, h_l, w_l)], finest first."""
        features = self.backbone(common.normalize(image))
        return [F.avg_pool2d(features[k], 3, stride=1, padding=1) for k in self.layers]  # means include zero padding

    @torch.no_grad()
    def fill_memory_bank(self, batches):
        """Set C to the untrained descriptor's output at each position, averaged over the `features` of all images."""
        n, mean = 0, 0
        for features in batches:
            phi = self.descriptor(features)
            n += len(phi)
            mean = mean + (phi - mean).sum(dim=0) / n  # (D, h, w)
        self.memory_bank.copy_(mean.flatten(1).T)

    def distances(self, features, k):
        """Return the squared distances |phi - c|^2 from each patch to its k nearest centres, ascending: (B, P, k)."""
        squared = []
        for patches in self.descriptor(features).flatten(2).mT:  # (P, D); one image at a time: it has P * P distances
            with torch.no_grad():
                nearest = torch.cdist(patches, self.memory_bank).topk(k, largest=False).indices  # (P, k)
            # recomputed from the differences: cdist is less precise, and its gradient needs P * P values
            difference = patches[:, None] - self.memory_bank[nearest]  # (P, k, D)
            squared.append(difference.square().sum(dim=2).sort(dim=1).values)
        return torch.stack(squared)

    def loss(self, features):
        distance = self.distances(features, self.neighbors + self.hard_negatives)
        r2 = self.radius.square()
        attraction = F.relu(distance[..., : self.neighbors] - r2).mean()  # L_att: the K nearest centres
        repulsion = F.relu(r2 - distance[..., self.neighbors :] - ALPHA).mean()  # L_rep: the J next nearest ones
        return (attraction + repulsion) / NU

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map (B, H, W; the smoothed patch scores) and its maximum, the image score (B,)."""
        self.eval()
        distance = self.distances(self.features(image), self.neighbors).sqrt()  # (B, P, K), not squared
        patch_score = distance[..., 0] * F.softmin(distance, dim=2)[..., 0]  # lower if other centres are as close
        patch_score = patch_score.unflatten(1, self.descriptor.grid)  # (B, P) -> (B, h, w)
        anomaly_map = F.interpolate(patch_score[:, None], image.shape[-2:], mode="bilinear")[:, 0]
        anomaly_map = common.smooth(anomaly_map)
        return anomaly_map, anomaly_map.amax(dim=(1, 2))


def build_model(args):
    return CFA(args.backbone, args.weights, args.image_size, args.neighbors, args.hard_negatives, args.radius,
               args.learn_radius)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
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
