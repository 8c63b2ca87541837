"""DeepSVDD (Ruff et al., ICML 2018, PMLR 80:4393-4402; not on arXiv).

A network without biases learns to map normal images close to a fixed centre c. The anomaly score of an image is the
squared distance between its embedding and c. Autoencoder pretraining comes first. Then c is set to the mean embedding
of the training images and never updated: a trained c or a bias in any layer would let the network map every image to c.

Settings: thesis, Table 3.2 (LeNet, Adam with learning rate 1e-4, weight decay 0.5e-7, batches of 200). Where the thesis
is silent, we follow BMAD's code (DorisBao/BMAD, the thesis' benchmark): 300 epochs for the autoencoder and 300 for the
network, ImageNet scaling, and the autoencoder's learning rate, weight decay and batch size. The architecture, the
schedule and the rule for c are those of the official code, lukasruff/Deep-SVDD-PyTorch.
Differences from the official code:
- Images are resized twice: to 256x256 pixels by the loader, then, with antialiasing, to 32x32 by the model. An input
  size other than 32 would change the network, since half of its weights belong to positions in the last feature map.
- ImageNet scaling is used, as in the code behind the thesis' results; `--scaling gcn` gives the official scaling. With
  ImageNet scaling, the autoencoder's loss stays high, because its sigmoid cannot reach values outside [0, 1], but its
  features are useful nonetheless.
- A coordinate of c that is exactly zero is set to 0.1, like other small ones (official code: it stays zero).
- The best epoch is chosen on valid (thesis, 3.4.1; official code: the last one).
- A last batch with a single image is dropped, since it has no batch statistics (official code: an error).

Parameters: 0.521 M, or 0.805 M with the autoencoder's decoder. Cost on one CPU thread: 5 ms per image and epoch in
either stage, 1 to 3 ms to score an image, 0.9 GiB of memory.
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

SIZE = 32  # width and height of the network's input
CENTER_MARGIN = 0.1  # minimum |c_i|, since zero weights trivially map images to a zero coordinate (official code)
WARM_UP = 10  # epochs before the soft boundary's radius is set (official code)


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
    """images are first resized to this width and height in pixels (our choice), then to the network's 32"""
    batch_size: Annotated[int, Ge(1)] = 200
    """images per batch (thesis, Table 3.2)"""
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
    lr: Annotated[float, Gt(0)] = 1e-4
    """Adam's learning rate (thesis, Table 3.2)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    weight_decay: Annotated[float, Ge(0)] = 0.5e-7
    """Adam's L2 penalty (thesis, Table 3.2; official code: 0.5e-6)"""
    milestone: Annotated[int, Ge(1)] = 50
    """number of epochs after which the learning rate is divided by 10 (official code)"""
    ae_epochs: Annotated[int, Ge(0)] = 300
    """epochs of autoencoder pretraining (BMAD's code); 0: start from random weights"""
    ae_lr: Annotated[float, Gt(0)] = 1e-5
    """the autoencoder's learning rate (BMAD's code; official code: 1e-4)"""
    ae_batch_size: Annotated[int, Ge(1)] = 64
    """images per batch for the autoencoder (BMAD's code; official code: 200)"""
    ae_weight_decay: Annotated[float, Ge(0)] = 0.5e-6
    """the autoencoder's L2 penalty (BMAD's code, official code)"""
    ae_milestone: Annotated[int, Ge(1)] = 250
    """number of epochs after which the autoencoder's learning rate is divided by 10 (BMAD's code, official code)"""
    scaling: Literal["imagenet", "gcn"] = "imagenet"
    """imagenet: ImageNet's mean and std (BMAD's code); gcn: global contrast normalisation to [0, 1] (official code)"""
    objective: Literal["one-class", "soft-boundary"] = "one-class"
    """one-class: mean squared distance to c (paper, Eq. 4; BMAD's code); soft-boundary: sphere with outliers (Eq. 3)"""
    nu: Annotated[float, Interval(gt=0, le=1)] = 0.1
    """fraction of the training images that may lie outside the soft boundary (official code)"""


def contrast_normalize(image):
    """Global contrast normalisation: subtract each image's mean, then divide by its mean absolute deviation."""
    image = image - image.mean(dim=(1, 2, 3), keepdim=True)
    scale = image.abs().mean(dim=(1, 2, 3), keepdim=True)
    return torch.where(scale > 1e-6, image / scale, 0)  # 0 for uniform images: do not amplify rounding errors


def normed(conv):
    """Return a convolution, batch norm without scale and shift, and leaky ReLU, all without biases."""
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels, eps=1e-4, affine=False), nn.LeakyReLU(0.01))


class Encoder(nn.Sequential):
    """phi, a LeNet: (B, 3, 32, 32) -> (B, 128)."""

    def __init__(self):
        super().__init__(
            normed(nn.Conv2d(3, 32, 5, padding=2, bias=False)), nn.MaxPool2d(2),
            normed(nn.Conv2d(32, 64, 5, padding=2, bias=False)), nn.MaxPool2d(2),
            normed(nn.Conv2d(64, 128, 5, padding=2, bias=False)), nn.MaxPool2d(2),  # (B, 128, 4, 4)
            nn.Flatten(), nn.Linear(128 * 4 * 4, 128, bias=False))


class Autoencoder(nn.Module):
    """Reinitialises `encoder` and pretrains it together with a mirrored decoder, which is discarded afterwards."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Sequential(
            nn.BatchNorm1d(128, eps=1e-4, affine=False), nn.Unflatten(1, (8, 4, 4)), nn.LeakyReLU(0.01),
            normed(nn.ConvTranspose2d(8, 128, 5, padding=2, bias=False)), nn.Upsample(scale_factor=2),
            normed(nn.ConvTranspose2d(128, 64, 5, padding=2, bias=False)), nn.Upsample(scale_factor=2),
            normed(nn.ConvTranspose2d(64, 32, 5, padding=2, bias=False)), nn.Upsample(scale_factor=2),
            nn.ConvTranspose2d(32, 3, 5, padding=2, bias=False), nn.Sigmoid())
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight, nn.init.calculate_gain("leaky_relu"))

    def loss(self, image):
        """Return the squared reconstruction error of images (B, 3, 32, 32): sum per image, mean over the batch."""
        return (self.decoder(self.encoder(image)) - image).square().sum(dim=(1, 2, 3)).mean()


class DeepSVDD(nn.Module):
    def __init__(self, scaling, objective, nu):
        super().__init__()
        self.scaling, self.objective, self.nu = scaling, objective, nu
        self.encoder = Encoder()
        self.register_buffer("center", torch.zeros(128))  # c, a constant, not a parameter
        self.register_buffer("radius", torch.zeros(()))  # R of the soft boundary
        self.register_buffer("low", torch.zeros(()))  # value range of the contrast-normalised training images
        self.register_buffer("high", torch.ones(()))

    def prepare(self, image):
        """(B, 3, H, W) in [0, 1] -> the encoder's input (B, 3, 32, 32)."""
        image = F.interpolate(image, (SIZE, SIZE), mode="bilinear", antialias=True)
        if self.scaling == "imagenet":
            return common.normalize(image)
        return (contrast_normalize(image) - self.low) / (self.high - self.low)

    @torch.no_grad()
    def load(self, batches):
        """Return all prepared training images (N, 3, 32, 32). With `--scaling gcn`, also set the value range."""
        images = torch.cat([self.prepare(image) for image in batches])
        if self.scaling == "gcn":
            self.low, self.high = images.aminmax()
            images = (images - self.low) / (self.high - self.low)
        return images

    @torch.no_grad()
    def init_center(self, images):
        """Set c to the mean embedding in eval mode; return the number of coordinates that were too close to zero."""
        self.eval()
        c = sum(self.encoder(x).sum(dim=0) for x in images.split(1000)) / len(images)  # (128,)
        small = c.abs() < CENTER_MARGIN
        self.center.copy_(torch.where(small, torch.where(c < 0, -CENTER_MARGIN, CENTER_MARGIN), c))
        return int(small.sum())

    def distance(self, image):
        """Return ||phi(x) - c||^2 (B,) for prepared images."""
        return (self.encoder(image) - self.center).square().sum(dim=1)

    def loss(self, distance):
        """Return the loss, without weight decay, for squared distances (B,): paper, Eq. 4 (soft boundary: Eq. 3)."""
        if self.objective == "one-class":
            return distance.mean()
        return self.radius**2 + F.relu(distance - self.radius**2).mean() / self.nu

    def quantile(self, distance):
        """Return R, the (1 - nu)-quantile of a batch's distances, given their squares (B,)."""
        return torch.quantile(distance.detach().sqrt(), 1 - self.nu)

    @torch.inference_mode()
    def predict(self, image):
        """Return None (no anomaly map) and the score (B,): |phi(x) - c|^2, minus R^2 if the boundary is soft."""
        self.eval()
        distance = [self.distance(self.prepare(x)) for x in image.split(1)]  # one by one, so equal images score equally
        return None, torch.cat(distance) - self.radius**2


def batches(images, batch_size):
    """Yield batches of images in random order. Drop a batch of one image, which has no batch statistics."""
    for index in torch.randperm(len(images)).to(images.device).split(batch_size):
        if len(index) > 1:
            yield images[index]


def adam(network, lr, weight_decay, milestone):
    """Return the optimiser and the learning rate schedule for a training stage."""
    optimizer = torch.optim.Adam(network.parameters(), lr, weight_decay=weight_decay)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [milestone])


def build_model(args):
    return DeepSVDD(args.scaling, args.objective, args.nu)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        if len(train) < 2 or min(args.batch_size, args.ae_batch_size) < 2:
            raise common.Error("batch norm needs two images per batch: give more training images or larger batches")
        images = model.load(train.batches(256, run.device))
        autoencoder = Autoencoder(model.encoder).to(run.device)
        optimizer, schedule = adam(autoencoder, args.ae_lr, args.ae_weight_decay, args.ae_milestone)
        for epoch in run.epochs(model, autoencoder, optimizer, schedule, first_stage=args.ae_epochs):
            losses = []
            for image in batches(images, args.ae_batch_size):
                loss = autoencoder.loss(image)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            schedule.step()
            run.notes["ae_loss"] = float(torch.stack(losses).mean())
            print(f"autoencoder, epoch {epoch}/{args.ae_epochs}  loss {run.notes['ae_loss']:.4f}", flush=True)
        run.notes["center_raised"] = model.init_center(images)
        optimizer, schedule = adam(model.encoder, args.lr, args.weight_decay, args.milestone)
        for epoch in run.epochs(model, optimizer, schedule):
            model.train()
            losses = []
            for image in batches(images, args.batch_size):
                distance = model.distance(image)
                loss = model.loss(distance)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if args.objective == "soft-boundary" and epoch > WARM_UP:
                    model.radius.copy_(model.quantile(distance))
                losses.append(loss.detach())
            schedule.step()
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
