"""f-AnoGAN (Schlegl, Seeboeck, Waldstein, Langs, Schmidt-Erfurth, Medical Image Analysis 54, 2019; not on arXiv).

A Wasserstein GAN learns to generate normal images from random codes z. The GAN is then frozen, and an encoder learns to
map normal images to codes from which the generator reconstructs them. The encoder's loss (izi_f: image to z to image)
is the residual between an image and its reconstruction plus that between their critic features f. Since the GAN cannot
generate anomalies, this loss is high for anomalous images and also serves as the anomaly score.

Settings: thesis, Table 3.5 (Adam with learning rate 2e-4, batches of 32, codes of length 100). The networks, the 200
epochs of each stage and all other settings follow the code of BMAD (the thesis' benchmark), which adopted them from
A03ki/f-AnoGAN.
Differences from the paper: the networks are those of PyTorch-GAN's DCGAN (the paper and its official code,
tSchlegl/f-AnoGAN, use residual networks for 64 pixels). The critic has dropout and batch normalisation, so the gradient
penalty of an image depends on the other images in its batch; `--critic-norm layer` uses layer normalisation without
dropout, as in the paper.
Differences from A03ki/f-AnoGAN and BMAD's code:
- The gradient penalty interpolates with one random weight per image (Gulrajani et al., 2017), not one per channel.
- Higher scores mean more anomalous (BMAD's test prints 1 - AUROC), and test images are never flipped.
- The encoder is saved at the best epoch on valid, not at the last epoch.
- The generator step reuses the fake images of the preceding critic step. The other two implementations regenerate them,
  so the generator's running statistics count them twice.

Parameters at 256 pixels: generator 53.2 M (53.0 M of them in its linear layer), critic 0.13 M, encoder 3.4 M.
Cost on one busy CPU thread: 15 + 15 epochs on 200 images of 32x32 pixels take 43 s and 0.89 GiB of memory; scoring an
image takes 4 ms.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common

BETAS = 0.5, 0.999  # of Adam (BMAD's code)
N_CRITIC = 5  # critic steps per generator step (BMAD's code, paper)
PENALTY = 10  # weight of the gradient penalty (BMAD's code, paper)
EPS = 0.8  # of batch norm: PyTorch-GAN mistook Keras' momentum for eps, and all code based on it inherited the value


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
    """images are resized to this width and height in pixels (our choice; BMAD: 32); a multiple of 16, at least 32"""
    batch_size: Annotated[int, Ge(1)] = 32
    """images per batch (thesis, Table 3.5)"""
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
    gan_epochs: Annotated[int, Ge(1)] = 200
    """stage 1 (GAN): passes over the normal training images (BMAD's code)"""
    epochs: Annotated[int, Ge(1)] = 200
    """stage 2 (encoder): passes over the normal training images (BMAD's code)"""
    lr: Annotated[float, Gt(0)] = 2e-4
    """Adam's learning rate in both stages (thesis, Table 3.5)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    latent: Annotated[int, Ge(1)] = 100
    """length of the code z (thesis, Table 3.5)"""
    kappa: Annotated[float, Ge(0)] = 1.0
    """weight of the feature residual in the encoder's loss and the anomaly score (paper)"""
    critic_norm: Literal["batch", "layer"] = "batch"
    """normalisation in the critic: batch (with dropout; BMAD's code) or layer (without dropout; paper)"""


def augment(image):
    """Flip each image (B, 3, H, W) horizontally with probability 1/2 (BMAD's code, official code)."""
    flip = torch.rand(len(image), 1, 1, 1) < 0.5
    return torch.where(flip.to(image.device), image.flip(3), image)


class Generator(nn.Module):
    def __init__(self, image_size, latent):
        super().__init__()
        self.side = image_size // 4
        self.linear = nn.Linear(latent, 128 * self.side**2)
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2), nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128, EPS), nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2), nn.Conv2d(128, 64, 3, padding=1), nn.BatchNorm2d(64, EPS), nn.LeakyReLU(0.2),
            nn.Conv2d(64, 3, 3, padding=1), nn.Tanh(),
        )

    def forward(self, z):
        """(B, latent) -> images (B, 3, H, W) in [-1, 1]."""
        return self.blocks(self.linear(z).unflatten(1, (128, self.side, self.side)))


def trunk(norm="batch"):
    """Return the first layers of the critic or the encoder: (B, 3, H, W) -> (B, 128 * H/16 * W/16)."""
    layers, channels = [], 3
    for width in (16, 32, 64, 128):
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.LeakyReLU(0.2)]
        if norm == "batch":
            layers.append(nn.Dropout2d(0.25))
        if channels > 3:
            layers.append(nn.BatchNorm2d(width, EPS) if norm == "batch" else nn.GroupNorm(1, width))
        channels = width
    return nn.Sequential(*layers, nn.Flatten())


class Critic(nn.Module):
    def __init__(self, image_size, norm):
        super().__init__()
        self.features = trunk(norm)  # f in the paper
        self.linear = nn.Linear(128 * (image_size // 16) ** 2, 1)

    def forward(self, x):
        return self.linear(self.features(x))  # (B, 1), unbounded


class FAnoGAN(nn.Module):
    def __init__(self, image_size, latent, kappa, critic_norm):
        super().__init__()
        if image_size < 32 or image_size % 16:
            raise common.Error(f"--image-size {image_size}: give a multiple of 16, at least 32: 32, 48, 64, ...")
        self.kappa = kappa
        self.generator = Generator(image_size, latent)
        self.critic = Critic(image_size, critic_norm)
        # tanh keeps codes within the range of the standard normal codes on which the GAN was trained (paper)
        self.encoder = nn.Sequential(trunk(), nn.Linear(128 * (image_size // 16) ** 2, latent), nn.Tanh())

    def residual(self, x):
        """Return the izi_f residual (B,) of x (B, 3, H, W) in [-1, 1]. It is both the encoder's loss and the score."""
        recon = self.generator(self.encoder(x))
        with torch.no_grad():
            target = self.critic.features(x)
        image = (recon - x).square().mean(dim=(1, 2, 3))
        return image + self.kappa * (self.critic.features(recon) - target).square().mean(dim=1)

    @torch.inference_mode()
    def predict(self, image):
        """Return None (no anomaly map) and the anomaly score (B,)."""
        self.eval()
        return None, self.residual(2 * image - 1)


def gradient_penalty(critic, real, fake):
    """Return the mean of (|gradient of D at x^| - 1)^2, where x^ is a random mix of a real and a fake image."""
    a = torch.rand(len(real), 1, 1, 1).to(real.device)
    between = (a * real + (1 - a) * fake).requires_grad_()
    gradient, = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def critic_loss(critic, real, fake):
    """Return the WGAN-GP loss. It pushes D up on real images (B, 3, H, W), down on fake ones and its slope to 1."""
    return -critic(real).mean() + critic(fake).mean() + PENALTY * gradient_penalty(critic, real, fake)


def build_model(args):
    return FAnoGAN(args.image_size, args.latent, args.kappa, args.critic_norm)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    generator, critic, encoder = model.generator, model.critic, model.encoder
    if not args.checkpoint:
        optimizer_g, optimizer_d, optimizer_e = (torch.optim.Adam(m.parameters(), args.lr, BETAS)
                                                 for m in (generator, critic, encoder))
        for epoch in run.epochs(model, optimizer_g, optimizer_d, first_stage=args.gan_epochs):
            losses_d, losses_g = [], []
            for step, image in enumerate(train.batches(args.batch_size, run.device, shuffle=(args.seed, 1, epoch))):
                real = 2 * augment(image) - 1
                fake = generator(torch.randn(len(real), args.latent).to(run.device))
                loss_d = critic_loss(critic, real, fake.detach())
                optimizer_d.zero_grad()
                loss_d.backward()
                optimizer_d.step()
                losses_d.append(loss_d.detach())
                if step % N_CRITIC == 0:
                    loss_g = -critic(fake).mean()
                    optimizer_g.zero_grad()
                    loss_g.backward()
                    optimizer_g.step()
                    losses_g.append(loss_g.detach())
            run.notes |= dict(critic=float(torch.stack(losses_d).mean()), generator=float(torch.stack(losses_g).mean()))
            print(f"GAN, epoch {epoch}/{args.gan_epochs}  critic {run.notes['critic']:.4f}  "
                  f"generator {run.notes['generator']:.4f}", flush=True)
        generator.requires_grad_(False)  # stage 2 trains only the encoder
        critic.requires_grad_(False)
        for epoch in run.epochs(model, optimizer_e):
            model.eval()  # the GAN uses running statistics and no dropout
            encoder.train()
            losses = []
            for image in train.batches(args.batch_size, run.device, shuffle=(args.seed, 2, epoch)):
                loss = model.residual(2 * augment(image) - 1).mean()
                optimizer_e.zero_grad()
                loss.backward()
                optimizer_e.step()
                losses.append(loss.detach())
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
        model.requires_grad_()  # so that results.json counts the GAN as trained, too
    common.finish(run, model, (train, valid, test))
