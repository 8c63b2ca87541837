"""CFLOW-AD (Gudovskiy, Ishizaka, Kozuka, WACV 2022, arXiv:2107.12571).

At each of three layers of a pretrained CNN, a normalizing flow learns the likelihood of normal feature vectors, given a
code for their position in the image. Feature vectors of lesions have a low likelihood. The anomaly maps of all layers
are enlarged to the size of the image and added.

Settings: thesis, Table 3.3: wide_resnet50_2, Adam with learning rate 1e-4, positional codes of length 128, clamp 1.9.
Where the thesis is silent, we follow the official code (gudovskiy/cflow-ad): layers 2 to 4, 8 coupling blocks (each
with a random rotation of the channels), batches of 32 images, 256 feature vectors per step, 200 epochs with warm-up and
a cosine schedule, and random image rotations of up to 5 degrees. With wide_resnet50_2, the flows have 81,647,616
trained parameters.
Differences from the paper: images of all data sets are resized to 256 pixels.
Differences from the official code:
- Likelihoods are divided by their layer's maximum over the training images, which is stored with the weights. The
  official code uses the maximum over the whole test set, which is unknown when a single image is scored.
- The best epoch is chosen on valid, not on test.
- Each step updates the flow of one layer only. In the official code, with the PyTorch version that it uses, Adam's
  momentum also moves the other flows.
- The CNN uses zero padding, as in its pretraining (official code: reflection).
- The random channel rotations come from QR decomposition, since SciPy (official code) is very slow in 2,048 dimensions.

Differences from anomalib and from BMAD's code, which produced the thesis' results: both divide likelihoods by the
maximum of each batch, so scores from different batches are not comparable. They permute channels instead of rotating
them, use 64 vectors per step (--fiber-batch 64) and a constant learning rate (--schedule constant), and do not rotate
images (--augment-degrees 0).

Cost on one CPU thread: mobilenet_v2 at 128x128 pixels takes 50 ms per training image, 18 ms per test image and 0.9 GiB;
wide_resnet50_2 at 256x256 pixels takes 1.3 s per test image, plus 9 s to draw rotations (176 MB in the checkpoint).
"""

import math
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

LAYERS = {  # with strides 8, 16 and 32
    "resnet18": ["layer2", "layer3", "layer4"],
    "resnet50": ["layer2", "layer3", "layer4"],
    "wide_resnet50_2": ["layer2", "layer3", "layer4"],
    "mobilenet_v2": ["features.6", "features.13", "features.17"],  # our choice: no published setting
}
CLAMP = 1.9  # alpha, the maximum log-scale of a coupling (thesis, Table 3.3)


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
    batch_size: Annotated[int, Ge(1)] = 32
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
    epochs: Annotated[int, Ge(1)] = 200
    """passes over the normal training images (official code: 25 x 8)"""
    lr: Annotated[float, Gt(0)] = 1e-4
    """Adam's learning rate (thesis, Table 3.3; official code: 2e-4)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    backbone: str = "wide_resnet50_2"
    """torchvision network: resnet18, resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""
    cache_features: Annotated[float, Ge(0)] = 16
    """maximum disk space in GiB for cached features of the training images; 0: recompute them in each epoch"""
    blocks: Annotated[int, Ge(1)] = 8
    """number of coupling blocks in each flow (official code)"""
    condition: Annotated[int, Ge(4)] = 128
    """length of the positional code, a multiple of 4 (thesis, Table 3.3)"""
    fiber_batch: Annotated[int, Ge(1)] = 256
    """number of feature vectors per training step, all from the same layer (official code)"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """learning rate schedule: cosine with warm-up (official code), or constant (anomalib, BMAD's code)"""
    augment_degrees: Annotated[float, Interval(ge=0, le=180)] = 5
    """maximum rotation of training images in degrees (official code); 0: no rotation"""


def positional_code(dim, h, w):
    """Return codes (h*w, dim): sines and cosines of column, then row, at dim / 4 wavelengths from 2 pi to 20,000 pi."""
    frequency = 10000 ** (-torch.arange(0, dim // 2, 2) / (dim // 2))  # (dim / 4,)
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = [position.flatten()[:, None] * frequency for position in (column, row)]  # (h*w, dim / 4) each
    return torch.cat([torch.stack([a.sin(), a.cos()], dim=2).flatten(1) for a in angles], dim=1)


class CouplingBlock(nn.Module):
    """Affine coupling, global affine map and rotation: FrEIA's AllInOneBlock of 2021, as in the official code."""

    def __init__(self, channels, condition):
        super().__init__()
        self.split = channels - channels // 2, channels // 2
        width = self.split[0] + condition
        self.subnet = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 2 * self.split[1]))
        self.scale = nn.Parameter(torch.full((channels,), 2 * math.log(math.exp(5) - 1)))  # initial gain: 1
        self.offset = nn.Parameter(torch.zeros(channels))
        q, r = torch.linalg.qr(torch.randn(channels, channels))
        self.register_buffer("rotation", q * r.diagonal().sign())  # uniform over all orthogonal matrices

    def forward(self, x, code):
        """Map x (..., C) and its positional code (..., D) to y (..., C) and log |det dy/dx| (...)."""
        x1, x2 = x.split(self.split, dim=-1)
        log_scale, shift = (0.1 * self.subnet(torch.cat([x1, code], dim=-1))).chunk(2, dim=-1)
        log_scale = CLAMP * torch.tanh(log_scale)
        gain = 0.1 * F.softplus(self.scale, beta=0.5)
        y = torch.cat([x1, x2 * log_scale.exp() + shift], dim=-1) * gain + self.offset
        return F.linear(y, self.rotation), log_scale.sum(-1) + gain.log().sum()


class Flow(nn.ModuleList):
    def __init__(self, channels, condition, blocks):
        super().__init__(CouplingBlock(channels, condition) for _ in range(blocks))

    def forward(self, x, code):
        log_det = 0
        for block in self:
            x, block_log_det = block(x, code)
            log_det = log_det + block_log_det
        return x, log_det

    def log_likelihood(self, x, code):
        """Return log p(x | code) / C for x (..., C), where log p = log N(z; 0, I) + log |det dz/dx|."""
        z, log_det = self(x, code)
        channels = x.shape[-1]
        return (log_det - z.square().sum(-1) / 2) / channels - math.log(2 * math.pi) / 2


class CFlow(nn.Module):
    """Shapes: layer l has P_l = h_l * w_l positions and C_l channels; positional codes have length D."""

    def __init__(self, backbone, weights, image_size, blocks, condition):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(LAYERS)}, or add its layers to LAYERS")
        if condition % 4:
            raise common.Error(f"--condition {condition}: give a multiple of 4")
        self.backbone = common.feature_extractor(backbone, LAYERS[backbone], weights)
        self.layers = LAYERS[backbone]
        shapes = [f.shape[1:] for f in self.backbone(torch.zeros(1, 3, image_size, image_size)).values()]
        self.grids = [(h, w) for _, h, w in shapes]
        for l, grid in enumerate(self.grids):
            self.register_buffer(f"code{l}", positional_code(condition, *grid), persistent=False)  # (P_l, D)
        self.flows = nn.ModuleList(Flow(c, condition, blocks) for c, _, _ in shapes)
        self.register_buffer("likeliest", torch.zeros(len(shapes)))  # maximum log p on the training images, per layer

    @torch.no_grad()
    def features(self, image):
        """Return the frozen features of each layer: (B, 3, H, W) -> [(B, P_l, C_l)]."""
        maps = self.backbone(common.normalize(image))
        return [maps[k].flatten(2).mT.contiguous() for k in self.layers]

    def with_codes(self, features):
        """Yield, for each layer, the feature vectors of all images (B*P_l, C_l) and their codes (B*P_l, D)."""
        for l, x in enumerate(features):
            yield x.flatten(0, 1), self.get_buffer(f"code{l}").repeat(len(x), 1)

    def fiber_batches(self, features, size):
        """Yield (l, x, code): the feature vectors of layer l and their codes, shuffled, in batches of `size`."""
        for l, (x, code) in enumerate(self.with_codes(features)):
            shuffled = torch.randperm(len(x)).to(x.device)
            whole = len(x) // size * size  # drop an incomplete last batch
            for rows in shuffled[: whole or len(x)].split(size):
                yield l, x[rows], code[rows]

    def log_likelihoods(self, features):
        """Return the log-likelihood of each position, (B, P_l) per layer."""
        return [flow.log_likelihood(x, code).view(len(features[0]), -1)
                for flow, (x, code) in zip(self.flows, self.with_codes(features), strict=True)]

    @torch.inference_mode()
    def find_likeliest(self, batches):
        """Set `likeliest` from the `features` of all training images; call again after the flows have changed."""
        self.likeliest.fill_(-torch.inf)
        for features in batches:
            largest = torch.stack([log_p.max() for log_p in self.log_likelihoods(features)])
            self.likeliest.copy_(torch.maximum(self.likeliest, largest))

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map (B, H, W; the sum of 1 - relative likelihood) and its maximum, the score (B,)."""
        self.eval()
        anomaly_map = torch.zeros_like(image[:, :1])  # (B, 1, H, W)
        for l, log_p in enumerate(self.log_likelihoods(self.features(image))):
            unlikely = 1 - (log_p - self.likeliest[l]).clamp(max=0).exp()  # (B, P_l), in [0, 1]
            anomaly_map += F.interpolate(unlikely.unflatten(1, self.grids[l])[:, None], image.shape[-2:],
                                         mode="bilinear", align_corners=True)
        return anomaly_map[:, 0], anomaly_map.amax(dim=(1, 2, 3))


def build_model(args):
    return CFlow(args.backbone, args.weights, args.image_size, args.blocks, args.condition)


def learning_rate(lr, step, steps):
    """Return the rate at `step` of `steps`: a warm-up from lr / 10 (2 of 25 stages), then a cosine to lr / 1,000."""
    def cosine(stage):
        return lr / 1000 + (lr - lr / 1000) * (1 + math.cos(math.pi * stage / 25)) / 2

    stage = 25 * step // steps
    return cosine(stage) if stage >= 2 else lr / 10 + (cosine(2) - lr / 10) * 25 * step / (2 * steps)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        frozen = common.Features(model.features, train, args, run)
        optimizer = torch.optim.Adam(model.flows.parameters(), args.lr, fused=True)
        from torchvision.transforms.v2 import RandomRotation  # imported here to keep --help fast

        rotate, per_epoch = RandomRotation(args.augment_degrees), max(1, len(train) // args.batch_size)
        for epoch in run.epochs(model, optimizer):
            losses, order = [], dict(shuffle=(args.seed, epoch), drop_last=True)
            batches = frozen.batches(args.batch_size, **order)
            if args.augment_degrees:  # images change in each epoch, so features cannot be cached
                images = train.batches(args.batch_size, run.device, **order)
                batches = (model.features(torch.stack([rotate(x) for x in image])) for image in images)
            for step, features in enumerate(batches, (epoch - 1) * per_epoch):
                if args.schedule == "cosine":
                    optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step, args.epochs * per_epoch)
                for l, x, code in model.fiber_batches(features, args.fiber_batch):
                    loss = -F.logsigmoid(model.flows[l].log_likelihood(x, code)).mean()
                    optimizer.zero_grad()  # sets gradients to None, so that Adam skips the other flows
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.detach())
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                model.find_likeliest(frozen.batches(args.batch_size))
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
