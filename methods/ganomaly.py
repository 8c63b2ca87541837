"""GANomaly (Akcay, Atapour-Abarghouei, Breckon, ACCV 2018, arXiv:1805.06725).

An encoder and a decoder reconstruct the image, and a second encoder encodes the reconstruction. All three networks are
trained on normal images only. The reconstruction must also match the image in the features of a discriminator. The
codes of the image and its reconstruction agree for normal images and differ for anomalous ones, so the distance between
the two codes is the anomaly score.

Settings: thesis, Table 3.5 (Adam with learning rate 2e-4 and betas 0.5 and 0.999, loss weights 1, 50, 1). The batch
size of 32 and the maximum of 100 epochs are from the code of BMAD (the thesis' benchmark). Losses, networks and
initialisation follow the official code, samet-akcay/ganomaly.
Differences from the paper: the anomaly score is the squared distance between the codes, as in the official code, not
the L1 distance.
Differences from the official code:
- Images are resized to 256 pixels by default, not to 32. The networks grow with the image size (3.9 M weights at 32).
- In testing, batch normalisation uses its running statistics. The official code uses the statistics of the test batch,
  so its scores depend on the other images; `--instance-stats` gives the scores it computes for batches of one image.
- The best epoch is chosen on valid, not on test, and scores are not rescaled by their range on test.
- The discriminator returns logits instead of probabilities; the loss is equivalent.

Differences from BMAD's code and anomalib, which produced the thesis' results: the loss compares the discriminator's
features, not its outputs; it compares codes by squared distance, not smooth L1; the first convolution is padded by 1,
not 4; images are scaled to [-1, 1] (the range of the decoder's tanh), not normalised with ImageNet's statistics; and
initial weights are drawn from N(0, 0.02) (a bug prevents this in both).

Parameters at 256 pixels: generator 144.0 M, discriminator 44.7 M (only for training); at 64 pixels: 10.7 M and 2.8 M.
Cost on one busy CPU thread: 30 epochs on 200 images of 32x32 pixels take 58 s and 0.87 GiB of memory; scoring an image
takes 3 ms.
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

W_ADV, W_CON, W_ENC = 1, 50, 1  # weights of the generator's losses (thesis, Table 3.5)
BETAS = 0.5, 0.999  # of Adam (thesis, Table 3.5)
COLLAPSED = 1e-5  # the discriminator is reinitialised when its loss falls below this value (official code)


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
    """images are resized to this width and height in pixels (our choice); a power of two, at least 16"""
    batch_size: Annotated[int, Ge(1)] = 32
    """images per batch (BMAD's code; not given in the thesis)"""
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
    epochs: Annotated[int, Ge(1)] = 100
    """passes over the normal training images (BMAD's code; official code: 15)"""
    lr: Annotated[float, Gt(0)] = 2e-4
    """Adam's learning rate for both networks (thesis, Table 3.5)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    latent: Annotated[int, Ge(1)] = 100
    """length of the code z (official code: nz)"""
    features: Annotated[int, Ge(1)] = 64
    """output channels of the first convolution; each later one doubles them (official code: ngf)"""
    instance_stats: bool = False
    """in testing, batch normalisation uses each image's own statistics instead of the running ones"""


class BatchNorm(nn.BatchNorm2d):
    instance_stats = False  # if true, evaluation uses each image's own statistics

    def forward(self, x):
        if self.training or not self.instance_stats:
            return super().forward(x)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


def features(size, width):
    """(B, 3, size, size) -> (B, width * size / 8, 4, 4): each layer halves the grid and doubles the channels."""
    layers = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    while (size := size // 2) > 4:
        layers += [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), BatchNorm(2 * width), nn.LeakyReLU(0.2)]
        width *= 2
    return nn.Sequential(*layers)


def encoder(size, latent, width):
    """(B, 3, size, size) -> (B, latent, 1, 1)."""
    return nn.Sequential(*features(size, width), nn.Conv2d(width * size // 8, latent, 4, bias=False))


def decoder(size, latent, width):
    """Mirror the encoder's layers: (B, latent, 1, 1) -> (B, 3, size, size) in [-1, 1]."""
    c = width * size // 8
    layers = [nn.ConvTranspose2d(latent, c, 4, bias=False), BatchNorm(c), nn.ReLU()]  # (B, c, 4, 4)
    while c > width:
        layers += [nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False), BatchNorm(c // 2), nn.ReLU()]
        c //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())


def initialize(module):
    """Initialise the weights of one layer as in DCGAN (Radford et al., 2016)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)
        nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """The paper's generator G (encoder G_E and decoder G_D) and its second encoder E, with separate weights."""

    def __init__(self, image_size, latent, width, instance_stats=False):
        super().__init__()
        if image_size < 16 or image_size & (image_size - 1):
            raise common.Error(f"--image-size {image_size}: give a power of two, at least 16: 16, 32, 64, ...")
        self.encoder1 = encoder(image_size, latent, width)
        self.decoder = decoder(image_size, latent, width)
        self.encoder2 = encoder(image_size, latent, width)
        self.apply(initialize)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.instance_stats = instance_stats

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> reconstruction (B, 3, H, W), its code and x's code (B, latent, 1, 1)."""
        z = self.encoder1(x)
        recon = self.decoder(z)
        return recon, self.encoder2(recon), z

    @torch.inference_mode()
    def predict(self, image):
        """Return None (no anomaly map) and, as the score (B,), the mean squared difference between the codes."""
        self.eval()
        _, z_recon, z = self(2 * image - 1)
        return None, (z - z_recon).square().mean(dim=(1, 2, 3))


class Discriminator(nn.Module):
    def __init__(self, image_size, width):
        super().__init__()
        self.features = features(image_size, width)  # f in the paper
        self.classifier = nn.Conv2d(width * image_size // 8, 1, 4, bias=False)
        self.apply(initialize)

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> features (B, C, 4, 4) and logits (B,), which are high for real images."""
        f = self.features(x)
        return f, self.classifier(f).flatten()


def generator_losses(generator, discriminator, x):
    """Return L_adv, L_con and L_enc (paper, Eq. 2 to 4) and the reconstructions (B, 3, H, W) for images x."""
    recon, z_recon, z = generator(x)
    f_real, f_fake = discriminator(x)[0].detach(), discriminator(recon)[0]
    return F.mse_loss(f_fake, f_real), F.l1_loss(recon, x), F.mse_loss(z_recon, z), recon


def discriminator_loss(discriminator, real, fake):
    """Return the mean cross-entropy for images (B, 3, H, W; label 1) and reconstructions (label 0; official code)."""
    real, fake = discriminator(real)[1], discriminator(fake.detach())[1]  # logits (B,); the generator gets no gradient
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def build_model(args):
    return Generator(args.image_size, args.latent, args.features, args.instance_stats)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    generator = build_model(args).to(run.device)
    if not args.checkpoint:
        discriminator = Discriminator(args.image_size, args.features).to(run.device)
        optimizer_g = torch.optim.Adam(generator.parameters(), args.lr, BETAS)
        optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr, BETAS)
        for epoch in run.epochs(generator, discriminator, optimizer_g, optimizer_d):
            generator.train()
            total = []
            for image in train.batches(args.batch_size, run.device, shuffle=(args.seed, epoch), drop_last=True):
                x = 2 * image - 1
                loss_adv, loss_con, loss_enc, recon = generator_losses(generator, discriminator, x)
                loss_g = W_ADV * loss_adv + W_CON * loss_con + W_ENC * loss_enc  # paper, Eq. 5
                optimizer_g.zero_grad()
                loss_g.backward()
                optimizer_g.step()
                loss_d = discriminator_loss(discriminator, x, recon)
                optimizer_d.zero_grad()  # also clears the gradients left by loss_g
                loss_d.backward()
                optimizer_d.step()
                if loss_d < COLLAPSED:  # waits for the GPU
                    discriminator.apply(initialize)
                total.append(torch.stack([loss_adv, loss_con, loss_enc, loss_d]).detach())
            adv, con, enc, d = torch.stack(total).mean(0).tolist()
            run.validate(generator, epoch, valid, adv=adv, con=con, enc=enc, discriminator=d)
    common.finish(run, generator, (train, valid, test))
