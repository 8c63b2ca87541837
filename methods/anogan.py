"""AnoGAN (Schlegl, Seeboeck, Waldstein, Schmidt-Erfurth, Langs, IPMI 2017, arXiv:1703.05921).

A DCGAN learns to generate normal images from random codes z. For each image to be scored, gradient steps then look for
the code whose image is most like it. What the GAN cannot generate is anomalous: the score is what remains of the
difference of the images and of their discriminator features.

Settings: the paper for the search (500 steps, lambda = 0.1). No official code is known, so all else is as in
LeeDoYup/AnoGAN-tf (carpedm20's DCGAN in TensorFlow 1): networks, 64 pixels, Adam 2e-4, batches of 64, 25 epochs, two
steps of the generator for one of the discriminator; Adam with beta1 = 0.5. The search's rate is ours: with that code's
1e-3 500 steps end on the way, with the 0.05 that its flag's help gives, rounding moves scores by 1% of their range.
The thesis names the method but has no row for it.
Differences from the paper: three channels; no map of the residual, since images of 64 pixels have no place for lesions.
Differences from LeeDoYup/AnoGAN-tf:
- 500 steps (paper), there 100; the score is the loss after the last step, there before it.
- Every image's search starts from the same random code, which is part of the model, so no score depends on the images
  before or next to it. There the search starts at the code, and with Adam's moments, at which the last image ended.
- The features come from batch normalisation's running statistics; there from those of the one image and of its twin.
- A batch is searched at once: the sum of the losses has each code's own gradient, and Adam works value by value. In
  float32 the steps enlarge rounding, which differs with the batch, to 2e-4 of the range of scores (float64: 2e-16).
- Convolutions are padded alike on all sides (there: as TensorFlow does); a last batch that is not full is trained on;
  images come in random order; the epoch is chosen on valid.

Parameters at 64 pixels: generator 5,135,363, discriminator 4,316,545.
Cost, measured: 200 images at 32 pixels, width 16, 10 epochs: 14 s on one busy CPU thread, 0.8 GiB; 50 steps of the
search in batches of 16: 58 ms per image. The default was not timed; its 500 steps are about 0.4 TFLOP.
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

BETAS = 0.5, 0.999  # of Adam, in training and in the search (LeeDoYup)
GENERATOR_STEPS = 2  # for one step of the discriminator: its loss should not go to zero (LeeDoYup)


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
    image_size: Annotated[int, Ge(16)] = 64
    """images are resized to this many pixels squared (paper): a power of two, at least 16"""
    batch_size: Annotated[int, Ge(1)] = 64
    """images per batch, in training and in the search (LeeDoYup)"""
    white: Annotated[int, Interval(ge=1, le=65535)] = 65535
    """value of 16-bit images that is white, 4095 for 12 bits"""
    holdout: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """share of the training images that thresholds come from, where valid has no normal ones"""
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
    """share of normal images that the threshold of the decision should leave below it"""
    scan_score: Literal["max", "top5"] = "max"
    """of a scan: the maximum over its slices, or the mean of the five highest"""
    save_maps: Literal["no", "npy", "tiff"] = "no"
    """with --predict: also write each image's anomaly map at its own size, in float32"""
    epochs: Annotated[int, Ge(1)] = 25
    """passes over the normal training images (LeeDoYup)"""
    lr: Annotated[float, Gt(0)] = 2e-4
    """Adam's learning rate, of both networks (LeeDoYup)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    latent: Annotated[int, Ge(1)] = 100
    """length of the code z (LeeDoYup)"""
    width: Annotated[int, Ge(1)] = 64
    """channels at half the image's size, doubled at each halving (LeeDoYup)"""
    steps: Annotated[int, Ge(1)] = 500
    """of the search for each image's code (paper)"""
    search_lr: Annotated[float, Gt(0)] = 5e-3
    """Adam's learning rate in the search (ours, see above; LeeDoYup 1e-3)"""
    feature_weight: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """lambda, weight of the features' residual, next to 1 - lambda of the image's (paper)"""


def channels(image_size, width):
    """Of the feature maps from half the image's size down to 4x4: 64, 128, 256, 512 for 64 pixels."""
    return [width * 2**i for i in range((image_size // 8).bit_length())]


class Generator(nn.Sequential):
    """Codes (B, latent) -> images (B, 3, H, W) in [-1, 1]."""

    def __init__(self, image_size, latent, width):
        down = channels(image_size, width)[::-1]  # from 4x4 up
        layers = [nn.Linear(latent, down[0] * 16), nn.Unflatten(1, (down[0], 4, 4)), nn.BatchNorm2d(down[0]),
                  nn.ReLU()]
        for narrow, wide in zip(down[1:], down, strict=False):
            layers += [nn.ConvTranspose2d(wide, narrow, 5, 2, 2, 1), nn.BatchNorm2d(narrow), nn.ReLU()]  # doubles h, w
        super().__init__(*layers, nn.ConvTranspose2d(down[-1], 3, 5, 2, 2, 1), nn.Tanh())


class Discriminator(nn.Module):
    def __init__(self, image_size, width):
        super().__init__()
        layers, before = [], 3
        for c in channels(image_size, width):
            layers += [nn.Conv2d(before, c, 5, 2, 2), nn.BatchNorm2d(c) if before > 3 else nn.Identity(),
                       nn.LeakyReLU(0.2)]
            before = c
        self.features = nn.Sequential(*layers)  # f of the paper: (B, C, 4, 4), what the last layer sees
        self.linear = nn.Linear(before * 16, 1)

    def forward(self, x):
        return self.linear(self.features(x).flatten(1))[:, 0]  # logits (B,): positive says real


def init_weights(module):
    """DCGAN's: N(0, 0.02), no bias (LeeDoYup)."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class AnoGAN(nn.Module):
    def __init__(self, image_size, latent=100, width=64, steps=500, search_lr=5e-3, feature_weight=0.1):
        super().__init__()
        if image_size < 16 or image_size & (image_size - 1):
            raise common.Error(f"--image-size {image_size}: the networks double 4x4 up to it; give 16, 32, 64, ...")
        if not 0 <= feature_weight <= 1:
            raise common.Error(f"--feature-weight {feature_weight}: the image has the rest of 1; give 0 to 1")
        self.steps, self.search_lr, self.feature_weight = steps, search_lr, feature_weight
        self.generator = Generator(image_size, latent, width).apply(init_weights)
        self.discriminator = Discriminator(image_size, width).apply(init_weights)
        self.register_buffer("start", 2 * torch.rand(latent) - 1)  # z_1 of every search

    def residual(self, z, x, features):
        """Loss of the codes z (B, latent) for images x (B, 3, H, W) in [-1, 1] with these features: (B,), sums."""
        recon = self.generator(z)
        image = (x - recon).abs().sum(dim=(1, 2, 3))  # L_R, paper, Eq. 3
        feature = (features - self.discriminator.features(recon)).abs().sum(dim=(1, 2, 3))  # L_D, paper, Eq. 5
        return (1 - self.feature_weight) * image + self.feature_weight * feature  # paper, Eq. 6

    def search(self, x):
        """Codes (B, latent) of images x (B, 3, H, W), and what remains of each, (B,)."""
        self.eval()  # batch normalisation would make the images depend on each other
        with torch.no_grad():
            features = self.discriminator.features(x)
        z = self.start.repeat(len(x), 1).requires_grad_()
        optimizer = torch.optim.Adam([z], self.search_lr, BETAS)
        with torch.enable_grad():
            for _ in range(self.steps):
                # a sum: a mean would shrink the gradients with the batch, until Adam's epsilon counts
                z.grad, = torch.autograd.grad(self.residual(z, x, features).sum(), z)  # and of nothing else
                optimizer.step()
        with torch.no_grad():
            return z.detach(), self.residual(z, x, features)

    def predict(self, image):
        """No anomaly map; anomaly score (B,): what remains after the search."""
        return None, self.search(2 * image - 1)[1]


def discriminator_loss(real, fake):
    """Logits (B,) of real and of generated images: cross-entropy with the truth."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()  # -log sigmoid(real) - log(1 - sigmoid(fake))


def generator_loss(fake):
    """Logits (B,) of generated images, which should pass for real ones."""
    return F.softplus(-fake).mean()


def build_model(args):
    return AnoGAN(args.image_size, args.latent, args.width, args.steps, args.search_lr, args.feature_weight)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    generator, discriminator = model.generator, model.discriminator
    if not args.checkpoint:
        optimizer_g, optimizer_d = (torch.optim.Adam(network.parameters(), args.lr, BETAS)
                                    for network in (generator, discriminator))
        for epoch in run.epochs(model, optimizer_g, optimizer_d):
            model.train()
            losses_d, losses_g = [], []
            for image in train.batches(args.batch_size, run.device, shuffle=(args.seed, epoch)):
                real = 2 * image - 1
                z = (2 * torch.rand(len(real), args.latent) - 1).to(run.device)
                fake = generator(z).detach()
                loss_d = discriminator_loss(discriminator(real), discriminator(fake))  # a batch norm for each of them
                optimizer_d.zero_grad()  # also of what the generator's loss left there
                loss_d.backward()
                optimizer_d.step()
                losses_d.append(loss_d.detach())
                for _ in range(GENERATOR_STEPS):
                    loss_g = generator_loss(discriminator(generator(z)))
                    optimizer_g.zero_grad()
                    loss_g.backward()
                    optimizer_g.step()
                losses_g.append(loss_g.detach())
            run.validate(model, epoch, valid, discriminator=float(torch.stack(losses_d).mean()),
                         generator=float(torch.stack(losses_g).mean()))
    common.finish(run, model, (train, valid, test))
