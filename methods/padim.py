"""PaDiM (Defard, Setkov, Loesch, Audigier, ICPR 2021, arXiv:2011.08785).

Three layers of a pretrained CNN describe each position of an image. At each position, a Gaussian is fitted to the
features of all normal images, in a single pass and without training. The anomaly score of a position is the Mahalanobis
distance of its features from this Gaussian.

Settings (thesis: J. Bao, University of Alberta 2024, Table 3.4): 100 features with resnet18, 550 with wide_resnet50_2
(the default here; the thesis has a single row of results and does not say which of the two produced it).
Differences from the paper: images are resized to 256 pixels and not cropped, since lesions may lie at the border (the
paper crops from 256 to 224 pixels; the thesis' benchmark, BMAD, resizes to 224).
Differences from xiahaifeng1995/PaDiM-Anomaly-Detection-Localization-master, the usual reimplementation: mean and
covariance are updated batch by batch, so memory use does not grow with the number of images.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common

# Layers with strides 16, 8 and 4, and how many of their channels are drawn at random (thesis, Table 3.4).
LAYERS = {
    "resnet18": (["layer3", "layer2", "layer1"], 100),
    "resnet50": (["layer3", "layer2", "layer1"], 550),  # our choice, like mobilenet_v2's: no published setting
    "wide_resnet50_2": (["layer3", "layer2", "layer1"], 550),
    "mobilenet_v2": (["features.13", "features.6", "features.3"], 100),
}
EPSILON = 0.01  # added to the covariance's diagonal (paper, Eq. 1)
CHUNK = 64  # positions processed at once; affects only speed and memory


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
    batch_size: Annotated[int, Ge(1)] = 16
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
    features: Annotated[int | None, Ge(1)] = None
    """d, number of channels drawn from the three layers; None: 100 for resnet18 and mobilenet_v2, 550 for the others"""


class PaDiM(nn.Module):
    def __init__(self, backbone, weights, features, image_size):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(LAYERS)}, or add its layers to LAYERS")
        self.layers, published = LAYERS[backbone]
        self.backbone = common.feature_extractor(backbone, self.layers, weights)
        shapes = [f.shape for f in self.features(torch.zeros(1, 3, image_size, image_size))]  # (1, C_l, h_l, w_l)
        self.channels, self.grid = [shape[1] for shape in shapes], shapes[-1][2:]
        total, positions, d = sum(self.channels), self.grid.numel(), published if features is None else features
        if d > total:
            raise common.Error(f"--features {d}: {backbone} has only {total} channels in {', '.join(self.layers)}")
        self.register_buffer("drawn", torch.zeros(total, dtype=torch.bool))
        self.drawn[torch.randperm(total)[:d]] = True  # the same channels at all positions
        self.register_buffer("mean", torch.zeros(positions, d))  # mu, (P, d)
        self.register_buffer("lower", torch.ones(d, d, dtype=torch.bool).tril(), persistent=False)
        self.register_buffer("whitening", torch.zeros(positions, d * (d + 1) // 2))  # lower triangle of W, see `fit`

    def features(self, image):
        features = self.backbone(common.normalize(image))
        return [features[k] for k in self.layers]

    def embed(self, image):
        """(B, 3, H, W) -> x (P, B, d): the drawn channels of all layers at each position of the finest grid."""
        x = []
        for f, drawn in zip(self.features(image), self.drawn.split(self.channels), strict=True):
            own = torch.arange(f[0, 0].numel(), device=f.device).float().view(1, 1, *f.shape[2:])
            nearest = F.interpolate(own, self.grid).long().flatten()  # (P,): nearest position in this layer
            x.append(f[:, drawn].flatten(2).permute(2, 0, 1).contiguous()[nearest])  # (P, B, d_l)
        return torch.cat(x, dim=2)

    @torch.no_grad()
    def fit(self, batches):
        """Compute the mean and the covariance S at each position from batches of normal images (paper, Eq. 1)."""
        self.whitening = None  # frees memory for `scatter` (4.6 GiB with 550 features)
        n, d = 0, self.mean.zero_().shape[1]
        scatter = [m.new_zeros(len(m), d, d) for m in self.mean.split(CHUNK)]  # sum of (x - mu)(x - mu)^T
        for image in batches:
            n += len(image)
            for x, mean, s in zip(self.embed(image).split(CHUNK), self.mean.split(CHUNK), scatter, strict=True):
                before = x - mean[:, None]  # (CHUNK, B, d)
                mean += before.sum(dim=1) / n
                s.baddbmm_(before.mT, x - mean[:, None])  # sum about the new mean (Chan et al. 1979)
        whitening = []
        while scatter:
            cov = scatter.pop(0)  # frees each chunk before the next one is computed
            cov = (cov.cpu() if cov.device.type == "mps" else cov).double().div_(max(n - 1, 1))  # mps has no float64
            cov.diagonal(dim1=1, dim2=2).add_(EPSILON)
            L = torch.linalg.cholesky(cov)  # S = L L^T
            W = torch.linalg.solve_triangular(L, torch.eye(d).to(cov), upper=False)  # L^-1, so S^-1 = W^T W
            whitening.append(W.float().to(self.mean.device)[:, self.lower])
        self.whitening = torch.cat(whitening)

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map (B, H, W; the smoothed Mahalanobis distance) and its maximum, the score (B,)."""
        self.eval()
        distance = []
        chunks = (x.split(CHUNK) for x in (self.embed(image), self.mean, self.whitening))
        for x, mean, triangle in zip(*chunks, strict=True):
            W = triangle.new_zeros(len(mean), *self.lower.shape).masked_scatter_(self.lower, triangle)  # (CHUNK, d, d)
            z = (x - mean[:, None]) @ W.mT  # rows of z (CHUNK, B, d): W (x - mu)
            distance.append(torch.linalg.vector_norm(z, dim=2))  # paper, Eq. 2: sqrt((x - mu)^T S^-1 (x - mu))
        distance = torch.cat(distance).T.unflatten(1, self.grid)  # (P, B) -> (B, h, w)
        anomaly_map = F.interpolate(distance[:, None], image.shape[-2:], mode="bilinear")[:, 0]
        anomaly_map = common.smooth(anomaly_map)
        return anomaly_map, anomaly_map.amax(dim=(1, 2))


def build_model(args):
    return PaDiM(args.backbone, args.weights, args.features, args.image_size)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        model.fit(train.batches(args.batch_size, run.device))
        run.keep(model)
    common.finish(run, model, (train, valid, test))
