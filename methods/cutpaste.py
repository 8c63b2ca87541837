"""CutPaste (Li et al., CVPR 2021, arXiv:2104.04015).

A network learns to tell normal images from such where a patch, or a thin rotated "scar", was cut out and pasted
elsewhere in the same image. What it needs to see such breaks shows real anomalies too: a Gaussian is fitted to the
embeddings of the normal training images, and an image is as anomalous as its Mahalanobis distance.

Settings: thesis, Table 3.5 (ResNet-18, frozen for the first 20 epochs; SGD 0.03; batch 64). Where it is silent, the
thesis' code (DorisBao/BMAD, a copy of the unofficial Runinho/pytorch-cutpaste; the authors released none): ImageNet
weights, 3-way classification, head of 512, 512 and 128 units, 256 epochs of ONE step, 192 images each.
Differences from the paper: it trains from scratch, 256 epochs of 256 steps (`--weights none --steps-per-epoch 256
--freeze-epochs 0`), translates images at random and fits no shrunk covariance.
Differences from Runinho's code:
- All training images are used for training; there the first 3,000 files only.
- Augmentation runs on the whole batch in floats: no rounding to 256 levels between its steps.
- Scars lie fully inside of the image; there width and height are exchanged when their position is drawn.
- The density is fitted before each look at valid, which chooses the epoch (thesis, 3.4.1); there the last step is kept.
- The covariance's shrinkage (Ledoit and Wolf 2004) is our own: as scikit-learn's, 20 times faster.
- The cosine schedule starts at once; there the first two steps share one learning rate.

A patch pasted from black onto black changes nothing and bears a wrong label, as published: the share of such images is
noted in results.json. Images get a score but no anomaly map (thesis: NA).
11.18 M parameters (ResNet-18) + 0.59 M (head, for training only).

Cost, measured on one busy CPU thread, mobilenet_v2 at 128 pixels: 85 s for 60 steps of 12 images (36 with the pasted
ones) and four looks at valid, each with a fit on 200 images; 17 ms to score an image; 2.1 GiB.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

CLASSIFIER = {"resnet18": "fc", "resnet50": "fc", "wide_resnet50_2": "fc", "mobilenet_v2": "classifier"}
AREA, ASPECT = (0.02, 0.15), (0.3, 1 / 0.3)  # of a patch: share of the image, width / height (Runinho)
SCAR_HEIGHT, SCAR_WIDTH, SCAR_ANGLE = (10, 25), (2, 16), (-45, 45)  # pixels and degrees (Runinho)
JITTER = 0.1  # greatest change of brightness, contrast, saturation (factors) and hue (turns)


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
    """images are resized to this many pixels squared (thesis, 4.3.3); scars keep their size in pixels"""
    batch_size: int = 64
    """images a batch (thesis, Table 3.5); in training each comes three times: normal, CutPaste, scar"""
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
    epochs: int = 256
    """epochs of `steps_per_epoch` updates (thesis' code, paper)"""
    steps_per_epoch: int = 1
    """updates an epoch (thesis' code); paper: 256"""
    lr: float = 0.03
    """SGD's learning rate at the start of its cosine schedule (thesis, Table 3.5)"""
    eval_every: int = 10
    """epochs between looks at valid, which choose the checkpoint"""
    freeze_epochs: int = 20
    """epochs in which only the head is trained (thesis, Table 3.5); none if the weights are untrained"""
    momentum: float = 0.9
    """of SGD (Runinho)"""
    weight_decay: float = 3e-5
    """SGD's L2 penalty (Runinho)"""
    backbone: str = "resnet18"
    """torchvision network: resnet18 (thesis), resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """of the backbone: imagenet (torchvision's), none (untrained), auto (imagenet, else none), or a FILE"""


# --------------------------------------------------------------------------------------------------------- augmentation
# Random numbers are drawn on the CPU, so that a seed means the same on all devices.
def uniform(count, low, high):
    return low + (high - low) * torch.rand(count)


def gray(image):
    """(B, 3, H, W) -> (B, 1, H, W), ITU-R 601-2 luma."""
    return (image * image.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)


def blend(image, other, amount):
    """`amount` (B, 1, 1, 1) of the image, the rest of the other; above 1 it leads away from the other."""
    return (amount * image + (1 - amount) * other).clamp(0, 1)


def brightness(image, amount, inside):
    return blend(image, torch.zeros_like(image), 1 + amount)


def contrast(image, amount, inside):
    mean = (gray(image) * inside).sum(dim=(1, 2, 3), keepdim=True) / inside.sum(dim=(1, 2, 3), keepdim=True)
    return blend(image, mean, 1 + amount)


def saturation(image, amount, inside):
    return blend(image, gray(image), 1 + amount)


def hue(image, amount, inside):
    """HSV and back, the hue turned by `amount`."""
    r, g, b = image.split(1, dim=1)
    value = image.amax(dim=1, keepdim=True)
    chroma = value - image.amin(dim=1, keepdim=True)
    sextant = torch.where(value == r, g - b, torch.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))
    sextant = sextant / torch.where(chroma == 0, 1, chroma) + 6 * amount
    k = (sextant + image.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def jitter(image, inside=None):
    """Brightness, contrast, saturation and hue of each image (B, 3, H, W) changed at random, in random order.

    inside: (B, 1, H, W), the pixels over which contrast takes the mean; None for all."""
    image = image.clone()
    inside = torch.ones_like(image[:, :1]) if inside is None else inside
    amount = uniform((len(image), 4, 1, 1, 1), -JITTER, JITTER).to(image.device)
    order = torch.rand(len(image), 4).argsort(dim=1)  # operation k comes as number order[:, k]
    for number in range(4):
        for k, adjust in enumerate((brightness, contrast, saturation, hue)):
            where = (order[:, k] == number).nonzero()[:, 0].to(image.device)
            image[where] = adjust(image[where], amount[where, k], inside[where])
    return image


class Patch(NamedTuple):
    """Where patches come from and go to; pairs are (vertical, horizontal), in pixels."""

    size: Tensor  # (B, 2)
    angle: Tensor  # (B,), radians, counter-clockwise
    source: Tensor  # (B, 2), top left corner
    target: Tensor  # (B, 2), top left corner of the turned patch's bounding box


def bounding_box(size, angle):
    """(B, 2): whole pixels that a turned patch takes, as Pillow counts them."""
    half = (size * angle.cos().abs()[:, None] + size.flip(1) * angle.sin().abs()[:, None]) / 2
    return (size / 2 + half).ceil() - (size / 2 - half).floor()


def draw_patch(size, angle, side):
    """Source and target drawn at random, both fully inside of the image."""
    corners = [(torch.rand(len(size), 2) * (side - room)).floor() for room in (size, bounding_box(size, angle))]
    return Patch(size, angle, *corners)


def draw_cutpaste(count, side):
    """A large patch: its area uniform, the logarithm of its aspect ratio too."""
    area = side**2 * uniform(count, *AREA)
    aspect = uniform(count, *map(math.log, ASPECT)).exp()
    size = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=1).round()
    return draw_patch(size, torch.zeros(count), side)


def draw_scar(count, side):
    """A small rotated rectangle."""
    size = torch.stack([uniform(count, *SCAR_HEIGHT), uniform(count, *SCAR_WIDTH)], dim=1).round()
    return draw_patch(size, uniform(count, *SCAR_ANGLE).deg2rad(), side)


def cut(image, patch):
    """Each patch, moved and turned (nearest neighbour), on a frame of the image's size, and the pixels it covers.

    (B, 3, H, W) -> (B, 3, H, W), bool (B, 1, H, W); outside of the patch the frame's values mean nothing."""
    side, device = image.shape[-1], image.device
    size, source, target = (pair.to(device).view(-1, 2, 1, 1) for pair in (patch.size, patch.source, patch.target))
    cos, sin = (f(patch.angle).to(device).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    pixel = torch.arange(side, device=device) + 0.5  # its centre
    center = target + bounding_box(patch.size, patch.angle).to(device).view(-1, 2, 1, 1) / 2
    y, x = pixel[:, None] - center[:, 0], pixel - center[:, 1]  # (B, H, 1), (B, 1, W)
    turned = torch.stack([sin * x + cos * y, cos * x - sin * y], dim=1)  # (B, 2, H, W): back into the patch
    offset = (turned + size / 2).floor()
    inside = ((offset >= 0) & (offset < size)).all(dim=1, keepdim=True)
    row, column = (source + offset).long().clamp(0, side - 1).unbind(dim=1)
    index = (row * side + column).flatten(1)[:, None].expand(-1, 3, -1)  # (B, 3, H*W)
    return image.flatten(2).gather(2, index).view_as(image), inside


def paste(image, patch):
    """A patch of each image, jittered, pasted into it: (B, 3, H, W)."""
    moved, inside = cut(image, patch)
    return torch.where(inside, jitter(moved, inside), image)


@torch.no_grad()
def three_way(image):
    """(3B, 3, H, W): the jittered images, the same with CutPaste and with a scar; their labels 0, 1, 2; share of pasted
    images in which no pixel changed."""
    image = jitter(image)
    pasted = torch.cat([paste(image, draw(len(image), image.shape[-1])) for draw in (draw_cutpaste, draw_scar)])
    unchanged = (pasted == image.repeat(2, 1, 1, 1)).flatten(1).all(dim=1).float().mean()
    label = torch.arange(3, device=image.device).repeat_interleave(len(image))
    return torch.cat([image, pasted]), label, unchanged


# ---------------------------------------------------------------------------------------------------------------- model
def ledoit_wolf(x):
    """Covariance of centred rows (N, D), shrunk towards mu * identity so that N may be below D (as scikit-learn's)."""
    n, d = x.shape
    cov = x.T @ x / n
    mu = cov.trace() / d
    delta = cov.square().sum() - d * mu**2  # squared distance of cov to the target
    beta = (x.square().sum(dim=1).square().mean() - cov.square().sum()) / n  # and of cov to the truth, as estimated
    shrinkage = (beta / delta).clamp(0, 1)
    return (1 - shrinkage) * cov + shrinkage * mu * torch.eye(d, dtype=x.dtype)


class CutPaste(nn.Module):
    def __init__(self, backbone, weights):
        super().__init__()
        if backbone not in CLASSIFIER:
            raise common.Error(f"--backbone {backbone}: known are {', '.join(CLASSIFIER)}; add yours to CLASSIFIER")
        self.backbone = common.pretrained_network(backbone, weights)  # trained on, so a checkpoint holds its state
        classifier = self.backbone.get_submodule(CLASSIFIER[backbone])
        width = [m for m in classifier.modules() if isinstance(m, nn.Linear)][-1].in_features
        setattr(self.backbone, CLASSIFIER[backbone], nn.Identity())  # (B, D): average pooling is the last layer
        self.head = nn.Sequential(
            nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU(),
            nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(),
            nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, 3))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whiten", torch.eye(width))  # L^-1 of the covariance L L^T

    def forward(self, image):
        """Logits of normal, CutPaste and scar, (B, 3)."""
        return self.head(self.backbone(common.normalize(image)))

    def embed(self, image):
        """Embeddings of length 1, (B, D)."""
        return F.normalize(self.backbone(common.normalize(image)))

    @torch.no_grad()
    def fit(self, batches):
        """The Gaussian of the embeddings of normal images as they are: no augmentation, batch norm in eval mode."""
        self.eval()
        e = torch.cat([self.embed(image).cpu() for image in batches]).double()  # (N, D): 2 kB an image with ResNet-18
        mean = e.mean(dim=0)
        # _ex: after a diverged step it gives values that are not finite, which end the run with a clear line
        cholesky = torch.linalg.cholesky_ex(ledoit_wolf(e - mean)).L
        self.mean.copy_(mean)
        self.whiten.copy_(torch.linalg.solve_triangular(cholesky, torch.eye(len(mean)).double(), upper=False))

    @torch.inference_mode()
    def predict(self, image):
        """No anomaly map; anomaly score (B,): the Mahalanobis distance to the Gaussian of normal embeddings."""
        self.eval()
        return None, ((self.embed(image) - self.mean) @ self.whiten.T).norm(dim=1)


def endless(train, batch_size, device, seed, start):
    """Batches without end, from the start-th on; each pass over the images has an order of its own."""
    passes, skip = divmod(start, max(1, len(train) // batch_size))
    for number in itertools.count(passes + 1):
        for indices in itertools.islice(train.order(batch_size, (seed, number), drop_last=True), skip, None):
            yield train.batch(indices, device)
        skip = 0


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.start_run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    if args.image_size < 32:
        raise common.Error(f"--image-size {args.image_size}: a scar takes up to 31 pixels; give at least 32")
    model = CutPaste(args.backbone, args.weights).to(run.device)
    if not args.checkpoint:
        if len(train) < 3:
            raise common.Error(f"{len(train)} training images have no covariance: give at least 3")
        optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * args.steps_per_epoch)
        freeze_epochs = args.freeze_epochs if model.backbone.weights_used["trained"] else 0
        source, shares = None, []
        for epoch in run.epochs(model, optimizer, schedule):
            source = source or endless(train, args.batch_size, run.device, args.seed,
                                       (epoch - 1) * args.steps_per_epoch)
            model.train()  # all of it: the statistics of batch norm move in the frozen backbone too (Runinho)
            model.backbone.requires_grad_(epoch > freeze_epochs)
            losses = []
            for _ in range(args.steps_per_epoch):
                image, label, unchanged = three_way(next(source))
                loss = F.cross_entropy(model(image), label)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                shares.append(unchanged)
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                run.notes["pasted_without_change"] = float(torch.stack(shares).mean())  # since the last evaluation
                shares = []
                model.fit(train.batches(args.batch_size, run.device))
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
