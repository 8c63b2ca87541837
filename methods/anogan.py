"""AnoGAN (Schlegl, Seeboeck, Waldstein, Schmidt-Erfurth, Langs, IPMI 2017, arXiv:1703.05921).

A DCGAN learns to generate normal images from random codes z. To score an image, gradient descent searches for the code
whose generated image is most similar to it. The GAN cannot generate anomalies, so the anomaly score is the difference
that remains between the two images and between their discriminator features.

Settings: the search follows the paper (500 steps, lambda = 0.1). We know of no official code, so everything else
follows LeeDoYup/AnoGAN-tf (carpedm20's DCGAN in TensorFlow 1): networks, 64x64 pixels, Adam with learning rate 2e-4 and
beta1 = 0.5, batches of 64, 25 epochs, and two generator steps for each discriminator step. The learning rate of the
search is our choice: with LeeDoYup's 1e-3, 500 steps do not converge; with 0.05, the value in the help text of
LeeDoYup's flag, rounding errors change scores by 1% of their range. The thesis mentions the method but reports no
results for it.
Differences from the paper: images have three channels, and there is no anomaly map, since 64x64 pixels are too few to
locate lesions.
Differences from LeeDoYup/AnoGAN-tf:
- The search takes 500 steps, as in the paper (LeeDoYup: 100). The score is the loss after the last step (LeeDoYup:
  before it).
- All searches start from the same random code, which is stored with the model, so the score of an image does not depend
  on other images. LeeDoYup starts from the final code and Adam moments of the previous image's search.
- The discriminator features use the running statistics of batch normalisation (LeeDoYup: the statistics of the single
  image and of its generated counterpart).
- The codes of a batch are optimised together. The loss is summed over images and Adam works element by element, so each
  code follows its own gradient. In float32, the steps amplify rounding errors, which depend on the batch, to 2e-4 of
  the range of scores (float64: 2e-16).
- Convolutions are padded equally on all sides (LeeDoYup: TensorFlow's padding), training images are shuffled, an
  incomplete last batch is used, and the best epoch is chosen on valid.

Parameters at 64x64 pixels: generator 5,135,363, discriminator 4,316,545.
Cost on one thread of a busy CPU: with `--width 16` and 200 images of 32x32 pixels, 10 epochs take 14 s and 0.8 GiB of
memory; 50 search steps in batches of 16 take 58 ms per image. The default settings were not timed; their 500 search
steps need about 0.4 TFLOP per image.
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

BETAS = 0.5, 0.999  # Adam's, in training and in the search (LeeDoYup)
GENERATOR_STEPS = 2  # per discriminator step, to keep the discriminator's loss from going to zero (LeeDoYup)


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
    image_size: Annotated[int, Ge(16)] = 64
    """images are resized to this width and height in pixels (paper); a power of two, at least 16"""
    batch_size: Annotated[int, Ge(1)] = 64
    """images per batch, in training and in the search (LeeDoYup)"""
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
    epochs: Annotated[int, Ge(1)] = 25
    """passes over the normal training images (LeeDoYup)"""
    lr: Annotated[float, Gt(0)] = 2e-4
    """Adam's learning rate for both networks (LeeDoYup)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    latent: Annotated[int, Ge(1)] = 100
    """length of the code z (LeeDoYup)"""
    width: Annotated[int, Ge(1)] = 64
    """number of channels at half the image size; doubles each time the size is halved (LeeDoYup)"""
    steps: Annotated[int, Ge(1)] = 500
    """number of search steps for each image's code (paper)"""
    search_lr: Annotated[float, Gt(0)] = 5e-3
    """Adam's learning rate in the search (our choice, see above; LeeDoYup: 1e-3)"""
    feature_weight: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """lambda, weight of the feature residual; the image residual has weight 1 - lambda (paper)"""


def channels(image_size, width):
    """Return the number of channels at each size, from half the image size down to 4x4: 64, 128, 256, 512, ..."""
    return [width * 2**i for i in range((image_size // 8).bit_length())]


class Generator(nn.Sequential):
    """Codes (B, latent) -> images (B, 3, H, W) in [-1, 1]."""

    def __init__(self, image_size, latent, width):
        down = channels(image_size, width)[::-1]  # from 4x4 up
        layers = [nn.Linear(latent, down[0] * 16), nn.Unflatten(1, (down[0], 4, 4)), nn.BatchNorm2d(down[0]),
                  nn.ReLU()]
        for narrow, wide in zip(down[1:], down, strict=False):
            layers += [nn.ConvTranspose2d(wide, narrow, 5, 2, 2, 1), nn.BatchNorm2d(narrow), nn.ReLU()]  # 2h x 2w
        super().__init__(*layers, nn.ConvTranspose2d(down[-1], 3, 5, 2, 2, 1), nn.Tanh())


class Discriminator(nn.Module):
    def __init__(self, image_size, width):
        super().__init__()
        layers, before = [], 3
        for c in channels(image_size, width):
            layers += [nn.Conv2d(before, c, 5, 2, 2), nn.BatchNorm2d(c) if before > 3 else nn.Identity(),
                       nn.LeakyReLU(0.2)]
            before = c
        self.features = nn.Sequential(*layers)  # f in the paper: (B, C, 4, 4)
        self.linear = nn.Linear(before * 16, 1)

    def forward(self, x):
        return self.linear(self.features(x).flatten(1))[:, 0]  # logits (B,): positive for real images


def init_weights(module):
    """Draw the weights with standard deviation 0.02, as in DCGAN, and set the biases to 0 (LeeDoYup)."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class AnoGAN(nn.Module):
    def __init__(self, image_size, latent=100, width=64, steps=500, search_lr=5e-3, feature_weight=0.1):
        super().__init__()
        if image_size < 16 or image_size & (image_size - 1):
            raise common.Error(f"--image-size {image_size}: give a power of two, at least 16 (16, 32, 64, ...)")
        self.steps, self.search_lr, self.feature_weight = steps, search_lr, feature_weight
        self.generator = Generator(image_size, latent, width).apply(init_weights)
        self.discriminator = Discriminator(image_size, width).apply(init_weights)
        self.register_buffer("start", 2 * torch.rand(latent) - 1)  # z_1, where each search starts

    def residual(self, z, x, features):
        """Return the loss (B,) of codes z (B, latent), given images x (B, 3, H, W) in [-1, 1] and their features."""
        recon = self.generator(z)
        image = (x - recon).abs().sum(dim=(1, 2, 3))  # L_R, paper, Eq. 3
        feature = (features - self.discriminator.features(recon)).abs().sum(dim=(1, 2, 3))  # L_D, paper, Eq. 5
        return (1 - self.feature_weight) * image + self.feature_weight * feature  # paper, Eq. 6

    def search(self, x):
        """Return the codes (B, latent) of images x (B, 3, H, W) and their residuals (B,)."""
        self.eval()  # in training mode, batch normalisation would make an image's score depend on its batch
        with torch.no_grad():
            features = self.discriminator.features(x)
        z = self.start.repeat(len(x), 1).requires_grad_()
        optimizer = torch.optim.Adam([z], self.search_lr, BETAS)
        with torch.enable_grad():
            for _ in range(self.steps):
                # a sum: gradients of the mean shrink as the batch grows, until Adam's epsilon matters
                z.grad, = torch.autograd.grad(self.residual(z, x, features).sum(), z)  # no gradients for the weights
                optimizer.step()
        with torch.no_grad():
            return z.detach(), self.residual(z, x, features)

    def predict(self, image):
        """Return None, since there is no anomaly map, and the residual after the search as the score (B,)."""
        return None, self.search(2 * image - 1)[1]


def discriminator_loss(real, fake):
    """Return the cross-entropy loss of the logits (B,) of real images (label 1) and generated images (label 0)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()  # -log sigmoid(real) - log(1 - sigmoid(fake))


def generator_loss(fake):
    """Return the cross-entropy loss of the logits (B,) of generated images, labelled as real (1)."""
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
                loss_d = discriminator_loss(discriminator(real), discriminator(fake))  # separate batch statistics
                optimizer_d.zero_grad()  # also clears gradients left by the generator's loss
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
