"""SimpleNet (Zhikang Liu, Zhou, Xu, Wang, CVPR 2023, arXiv:2303.15140).

A linear layer, the adaptor, adapts the patch features of a frozen CNN to the target images. Adding Gaussian noise to
adapted features yields synthetic anomalous features, and a small discriminator learns to tell the two apart. The
anomaly score of a patch is the negative output of the discriminator.

Settings: the thesis (3.4.1) uses "the original hyper-parameters", i.e. those of the official code (DonaldRR/SimpleNet,
run.sh: noise 0.015, margin 0.5, 40 x 4 passes, batches of 8), and keeps the best epoch on valid.
Differences from the paper: features are pooled as in the official code (see `pool`), whereas the paper averages each
channel's 3x3 neighbourhood.
Differences from the official code: every tenth epoch is evaluated on valid to choose the best, not every fourth on
test; images are resized to 256 pixels and not cropped, since lesions may lie at the border (official code: resized to
329, cropped to 288); two unused computations are omitted: the upsampling of features to the image size and the last
stage of the CNN.
Noise with standard deviation 0.015 suits the scale of wide_resnet50_2's features. For backbones without published
settings, the noise has half the standard deviation of the features in the first batch. resnet18 and mobilenet_v2 have
too few channels for 1,536 pooled values, so they use the 3x3 mean of each channel.

Parameters: adaptor 2,360,832, discriminator 1,576,960 (and 24,862,528 frozen ones in wide_resnet50_2).
Cost with default settings on one thread of a busy CPU: 1.1 s per training image, 0.65 s per test image, 1.6 GiB of RAM.
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

# Layers with strides 8 and 16, and their numbers of pooled values per position.
LAYERS = {
    "wide_resnet50_2": (["layer2", "layer3"], [768, 768]),  # as run.sh: pooled to 1,536 per layer, then to 1,536 in all
    "resnet50": (["layer2", "layer3"], [768, 768]),
    "resnet18": (["layer2", "layer3"], [128, 256]),  # these two are our choice: no published setting
    "mobilenet_v2": (["features.6", "features.13"], [32, 96]),
}
NOISE = 0.015  # standard deviation of the noise for wide_resnet50_2 (run.sh: noise_std)
RELATIVE_NOISE = 0.5  # for other backbones, relative to the features' standard deviation (our choice, tuned on valid)
MARGIN = 0.5  # th in the paper (run.sh: dsc_margin)
HIDDEN = 1024  # hidden units of the discriminator (run.sh: dsc_hidden)


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
    batch_size: Annotated[int, Ge(1)] = 8
    """images per batch (run.sh)"""
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
    epochs: Annotated[int, Ge(1)] = 160
    """passes over the normal training images (run.sh: 40 meta epochs of 4 passes each)"""
    lr: Annotated[float, Gt(0)] = 2e-4
    """Adam's learning rate for the discriminator (official code)"""
    lr_adaptor: Annotated[float, Gt(0)] = 1e-4
    """AdamW's learning rate for the adaptor (official code)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    backbone: str = "wide_resnet50_2"
    """torchvision network: resnet18, resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""
    cache_features: Annotated[float, Ge(0)] = 16
    """maximum disk space in GiB for cached features of the training images; 0: recompute them in each epoch"""
    noise: Annotated[float | None, Ge(0)] = None
    """standard deviation of the noise; None: 0.015 for wide_resnet50_2 (run.sh), else half that of the features"""


def pool(feature, width):
    """Pool the 9C values in the 3x3 neighbourhood of each position to `width` means: (B, C, h, w) -> (B, width, h, w).

    As in the official code, values are ordered by channel, row and column, and each mean covers 9C / width values.
    Groups of nine values are one channel's 3x3 neighbourhood; groups of six or twelve may span two channels."""
    neighbourhoods = F.unfold(feature, 3, padding=1)  # (B, 9C, h*w)
    return neighbourhoods.unflatten(1, (width, -1)).mean(2).unflatten(2, feature.shape[-2:])


class SimpleNet(nn.Module):
    def __init__(self, backbone, weights):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(LAYERS)}, or add its layers to LAYERS")
        self.layers, self.widths = LAYERS[backbone]
        self.backbone = common.feature_extractor(backbone, self.layers, weights)
        width = sum(self.widths)  # D
        self.adaptor = nn.Linear(width, width)  # G_theta in the paper
        self.discriminator = nn.Sequential(  # D_psi
            nn.Linear(width, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1, bias=False))
        for layer in (self.adaptor, self.discriminator[0], self.discriminator[3]):  # as in the official code
            nn.init.xavier_normal_(layer.weight)

    @torch.no_grad()
    def features(self, image):
        """Return the frozen patch features o on the finer layer's grid: (B, 3, H, W) -> (B, h, w, D)."""
        maps = self.backbone(common.normalize(image))
        fine, coarse = (pool(maps[k], width) for k, width in zip(self.layers, self.widths, strict=True))
        coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear")
        return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1)

    def loss(self, features, noise):
        """Return the truncated l1 loss (paper, Eq. 6) of features (n, D). It is zero for outputs beyond the margin."""
        normal = self.adaptor(features)  # q
        anomalous = normal + noise * torch.randn_like(normal)  # q-; both pass gradients to the adaptor
        answers = self.discriminator(torch.cat([normal, anomalous]))  # one batch: both share batch norm's statistics
        d_normal, d_anomalous = answers.chunk(2)
        return F.relu(MARGIN - d_normal).mean() + F.relu(MARGIN + d_anomalous).mean()

    @torch.inference_mode()
    def predict(self, image):
        """Return the map (B, H, W) and score (B,). The map is -D(q), smoothed; the score is the maximum of -D(q)."""
        self.eval()
        features = self.features(image)
        q = self.adaptor(features.flatten(0, 2))  # (B*h*w, D)
        patch_score = -self.discriminator(q).view(features.shape[:3])  # (B, h, w)
        anomaly_map = F.interpolate(patch_score[:, None], image.shape[-2:], mode="bilinear")[:, 0]
        return common.smooth(anomaly_map), patch_score.amax(dim=(1, 2))


def build_model(args):
    return SimpleNet(args.backbone, args.weights)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        noise = NOISE if args.noise is None else args.noise
        if args.noise is None and args.backbone != "wide_resnet50_2":
            features = model.features(train.batch(range(min(args.batch_size, len(train))), run.device))
            noise = RELATIVE_NOISE * float(features.flatten(0, 2).std(0).mean())
        run.notes["noise"] = noise
        frozen = common.Features(lambda image: [model.features(image)], train, args, run)
        optimizers = [torch.optim.Adam(model.discriminator.parameters(), args.lr, weight_decay=1e-5),
                      torch.optim.AdamW(model.adaptor.parameters(), args.lr_adaptor)]  # default weight decay, 0.01
        for epoch in run.epochs(model, *optimizers):
            model.train()
            losses = []
            for (features,) in frozen.batches(args.batch_size, shuffle=(args.seed, epoch)):
                loss = model.loss(features.flatten(0, 2), noise)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                losses.append(loss.detach())
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
