"""DRAEM (Zavrtanik, Kristan, Skocaj, ICCV 2021, arXiv:2108.07610).

Textures are blended into normal images inside random masks made from Perlin noise. One network learns to restore the
normal image. A second network receives the input and its restoration and learns to segment the blended texture. In a
test image, the second network segments the anomalous pixels.

Settings: thesis, Table 3.5 (Adam with learning rate 1e-4). Everything else follows the official code (VitjanZ/DRAEM):
data pipeline, textures, widths, losses, initial weights, 700 epochs with batches of 8, and a learning rate that is
multiplied by 0.2 after 80% and again after 90% of the epochs.
Differences from the paper, all as in the official code: the schedule (paper: x 0.1 after 400 and 600 epochs), a
texture opacity of at least 0.2 (paper: 0.1), ten texture augmentations (paper: seven) and image rotations of up to 90
degrees (paper: 45).
Differences from the official code: an epoch visits each image once (official code: draws with replacement); the best
epoch is chosen on valid (official code: the last one); SSIM assumes a value range of 1 (official code: 2 if the
restoration falls below -0.5); torchvision augments textures as floats (official code: imgaug 0.4, 8 bits), so that
- brightness changes by one factor and one offset (official code: the lightness in one of six colour spaces);
- saturation is multiplied by 0.8 to 1.2 (official code: shifted by up to 50 / 255, which adds colour to grey textures).

Differences from BMAD's code, which produced the thesis' results: textures are photographs (BMAD: --textures noise);
images lie in [0, 1] (BMAD: scaled by ImageNet's statistics, while textures are in [0, 1]); the weights are initialised
as in the official code (BMAD: PyTorch's defaults, as in anomalib).

Parameters: 69,048,579 (restoration) + 28,374,146 (segmentation), as in the official code.
Cost on one CPU thread, with 200 images of 64x64 pixels, --width 16 and batches of 8: 10 s per epoch, 13 ms to score an
image, 1.0 GiB. Published settings on an H100: 0.24 s per step of 8 images, plus 0.01 s to simulate anomalies.
"""

import math
import sys
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common


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
    image_size: Annotated[int, Ge(64)] = 256
    """images are resized to this width and height in pixels (official code); a multiple of 32"""
    batch_size: Annotated[int, Ge(1)] = 8
    """images per batch (official code); each needs 1.1 GB of memory in training"""
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
    epochs: Annotated[int, Ge(1)] = 700
    """passes over the normal training images (official code)"""
    lr: Annotated[float, Gt(0)] = 1e-4
    """Adam's learning rate (thesis, Table 3.5)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    textures: str = "dtd"
    """textures to blend in: dtd (official code; 600 MB, downloaded by torchvision to <root>/dtd), images (the
    training images themselves), noise (the Perlin noise of the mask; BMAD's code) or a FOLDER of images"""
    width: Annotated[int, Ge(2)] = 128
    """first-layer channels of the restoring network (official code); half in the segmenting network; try 16 on a CPU"""


# ---------------------------------------------------------------------------------------- networks (paper, 3.1 and 3.2)
def block(*channels):
    layers = []
    for c_in, c_out in pairwise(channels):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def up(c_in, c_out):
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), *block(c_in, c_out))


def restoring_network(w):
    """Encoder (down to 1/16 of the size) and decoder without skip connections: (B, 3, H, W) -> (B, 3, H, W)."""
    pool = nn.MaxPool2d(2)
    return nn.Sequential(
        block(3, w, w), pool, block(w, 2 * w, 2 * w), pool, block(2 * w, 4 * w, 4 * w), pool,
        block(4 * w, 8 * w, 8 * w), pool, block(8 * w, 8 * w, 8 * w),
        up(8 * w, 8 * w), block(8 * w, 8 * w, 4 * w), up(4 * w, 4 * w), block(4 * w, 4 * w, 2 * w),
        up(2 * w, 2 * w), block(2 * w, 2 * w, w), up(w, w), block(w, w, w), nn.Conv2d(w, 3, 3, padding=1))


class SegmentingNetwork(nn.Module):
    """U-Net down to 1/32 of the size: restoration and image (B, 6, H, W) -> logits (B, 2, H, W; channel 1: anomaly)."""

    def __init__(self, w):
        super().__init__()
        widths = [w, 2 * w, 4 * w, 8 * w, 8 * w, 8 * w]  # of the encoder, at 1, 1/2, ..., 1/32 of the size
        up_widths = [8 * w, 4 * w, 2 * w, w, w]  # of the decoder, at 1/16, ..., 1 of the size
        self.encoder = nn.ModuleList(block(c_in, c_out, c_out) for c_in, c_out in pairwise([6, *widths]))
        self.up = nn.ModuleList(up(c_in, c_out) for c_in, c_out in pairwise([8 * w, *up_widths]))
        self.decoder = nn.ModuleList(block(c + skip, c, c) for c, skip in zip(up_widths, widths[-2::-1], strict=True))
        self.head = nn.Conv2d(w, 2, 3, padding=1)

    def forward(self, x):
        skips = []
        for encoder in self.encoder:
            x = encoder(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for upsample, decoder, skip in zip(self.up, self.decoder, skips[-2::-1], strict=True):
            x = decoder(torch.cat([upsample(x), skip], dim=1))
        return self.head(x)


class DRAEM(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.reconstructive = restoring_network(width)
        self.discriminative = SegmentingNetwork(width // 2)
        for module in self.modules():  # official code, train_DRAEM.py; biases keep PyTorch's default
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, image):
        """Return the restoration I_r (B, 3, H, W) and the segmentation's logits (B, 2, H, W)."""
        recon = self.reconstructive(image)
        return recon, self.discriminative(torch.cat([recon, image], dim=1))

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly probabilities M_o (B, H, W) and their maximum after 21x21 averaging, the score (B,)."""
        self.eval()
        anomaly_map = self(image)[1].softmax(dim=1)[:, 1]
        # paper, Eq. 5; pixels outside the image count as zero (official code, test_DRAEM.py)
        return anomaly_map, F.avg_pool2d(anomaly_map, 21, stride=1, padding=10).amax(dim=(1, 2))


def build_model(args):
    return DRAEM(args.width)


def ssim(recon, image):
    """Return the structural similarity, averaged over pixels and channels (11x11 Gaussian windows, zero padding)."""
    channels = image.shape[1]
    gaussian = torch.exp(-0.5 * ((torch.arange(11, device=image.device) - 5) / 1.5) ** 2)
    window = (torch.outer(gaussian, gaussian) / gaussian.sum() ** 2).expand(channels, 1, 11, 11)
    local = torch.cat([recon, image, recon**2, image**2, recon * image])
    mu_r, mu_i, rr, ii, ri = F.conv2d(local, window, padding=5, groups=channels).chunk(5)  # means, (B, 3, H, W) each
    variances, covariance = rr - mu_r**2 + ii - mu_i**2, ri - mu_r * mu_i
    c1, c2 = 0.01**2, 0.03**2  # for values in [0, 1]
    similarity = (2 * mu_r * mu_i + c1) * (2 * covariance + c2) / ((mu_r**2 + mu_i**2 + c1) * (variances + c2))
    return similarity.mean()


def focal_loss(logits, mask, smooth=1e-5):
    """Return the mean of -(1 - p)^2 log p, where p is the predicted probability of the true class. Shapes: logits
    (B, 2, H, W), mask (B, 1, H, W)."""
    anomalous = logits.softmax(dim=1)[:, 1:]
    p = torch.where(mask, anomalous, 1 - anomalous)
    p = (1 - smooth) * p + smooth * (1 - p) + smooth  # label smoothing of the official code, in closed form
    return -((1 - p) ** 2 * p.log()).mean()


# ------------------------------------------------------------------------------------- simulated anomalies (paper, 3.3)
# All random numbers come from PyTorch's CPU generator, so they do not depend on the device.
def uniform(low, high):
    return torch.empty(1).uniform_(low, high).item()


def rotate(image, degrees=90):
    from torchvision.transforms.v2 import InterpolationMode, RandomRotation  # imported here to keep --help fast

    return RandomRotation(degrees, InterpolationMode.BILINEAR)(image)  # corners become black


def autocontrast(texture):
    """Stretch each channel of (3, H, W) to [0, 1] after clipping 0 to 20% of its pixels at both ends."""
    clipped = uniform(0, 0.2)
    low, high = (texture.flatten(1).quantile(q, dim=1)[:, None, None] for q in (clipped, 1 - clipped))
    return torch.where(high > low, ((texture - low) / (high - low)).clamp(0, 1), texture)


def augment(texture, k):
    """Apply the k-th of ten augmentations to a texture (3, H, W) in [0, 1], with the official code's ranges."""
    import torchvision.transforms.v2.functional as TF
    from torchvision.transforms.v2 import ColorJitter

    return [
        lambda a: torch.cat([TF.adjust_gamma(channel, uniform(0.5, 2)) for channel in a.split(1)]),
        lambda a: (TF.adjust_brightness(a, uniform(0.8, 1.2)) + uniform(-30, 30) / 255).clamp(0, 1),
        lambda a: TF.adjust_sharpness(a, uniform(0, 2)),
        ColorJitter(hue=50 / 255, saturation=0.2),
        lambda a: TF.solarize(a, uniform(32, 128) / 255) if uniform(0, 1) < 0.5 else a,
        lambda a: TF.posterize(a, int(torch.randint(1, 9, ()))),  # bits
        TF.invert,
        autocontrast,
        TF.equalize,
        lambda a: rotate(a, 45)][k](texture)


def perlin(rows, columns, size, device):
    """Return Perlin noise (size, size) with mean 0. The corners of rows x columns cells have random unit gradients. A
    pixel is the weighted sum, over its cell's corners, of the dot product of the gradient and the pixel's offset."""
    def weight(offset):  # of a corner: 1 at offset 0, 0 at 1 cell, with zero slope at both
        s = 1 - offset.abs()
        return s**3 * (6 * s**2 - 15 * s + 10)

    angle = 2 * math.pi * torch.rand(rows + 1, columns + 1).to(device)
    y, x = (torch.arange(size, device=device) / size * cells for cells in (rows, columns))  # pixel coordinates in cells
    noise = 0
    for down, right in product((0, 1), repeat=2):
        v, u = (y % 1 - down)[:, None], x % 1 - right  # the offset, in [-1, 1]
        corner = angle[y.long()[:, None] + down, x.long() + right]  # (size, size)
        noise = noise + weight(v) * weight(u) * (corner.cos() * v + corner.sin() * u)
    return math.sqrt(2) * noise


def simulate(image, textures):
    """For a normal image (3, H, W), return the target I, the input I_a and its anomaly mask M_a (1, H, W). Half of the
    images get no anomaly. `textures` comes from `load_textures`."""
    size, device = image.shape[-1], image.device
    if uniform(0, 1) < 0.3:
        image = rotate(image)
    if uniform(0, 1) < 0.5:
        return image, image, torch.zeros(1, size, size, dtype=torch.bool, device=device)
    rows, columns = (2 ** torch.randint(0, 6, (2,))).tolist()
    noise = rotate(perlin(rows, columns, size, device)[None])  # P
    mask = noise > 0.5  # M_a; sometimes empty
    if textures:
        texture = textures.batch(torch.randint(len(textures), (1,)).numpy(), device)[0]
    else:
        texture = noise.clamp(0, 1).expand(3, -1, -1)
    for k in torch.randperm(10)[:3]:
        texture = augment(texture, k)  # A
    beta = uniform(0.2, 1)
    return image, torch.where(mask, (1 - beta) * image + beta * texture, image), mask  # paper, Eq. 4


def load_textures(args, train):
    """Return the texture images as a `common.Split`, or None if the mask's noise serves as the texture."""
    if args.textures in ("images", "noise"):
        return train if args.textures == "images" else None
    folder, count = (Path(args.textures), 1) if args.textures != "dtd" else (Path(args.root) / "dtd/dtd/images", 5640)
    if args.textures == "dtd":
        from torchvision.datasets import DTD

        try:
            DTD(args.root, download=True)
        except Exception as e:  # no network, a broken download, a full disk
            raise common.Error(f"DTD is not in {folder} and could not be downloaded ({e}); unpack {DTD._URL} into "
                               f"{folder.parents[1]}, or use --textures FOLDER, images or noise") from e
    entries = [(file, -1, None) for file in common.images_in(folder)]
    if len(entries) < count:  # no images, or DTD is incomplete
        raise common.Error(f"--textures {args.textures}: {folder} has {len(entries)} images (DTD has 5640); remove the "
                           "folder, or use --textures with another FOLDER, images or noise")
    return common.Split("textures", entries, args.image_size, folder, Path(args.root) / ".cache")


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    if args.image_size % 32:
        raise common.Error(f"--image-size {args.image_size}: the networks halve it five times; give a multiple of 32")
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        textures = load_textures(args, train)
        optimizer = torch.optim.Adam(model.parameters(), args.lr)
        milestones = [math.ceil(args.epochs * 8 / 10), math.ceil(args.epochs * 9 / 10)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
        for epoch in run.epochs(model, optimizer, schedule):
            losses = []
            for batch in train.batches(args.batch_size, run.device, shuffle=(args.seed, epoch)):
                model.train()
                samples = [simulate(image, textures) for image in batch]
                image, corrupted, mask = (torch.stack(part) for part in zip(*samples, strict=True))  # (B, ., H, W)
                recon, logits = model(corrupted)
                terms = [F.mse_loss(recon, image), 1 - ssim(recon, image), focal_loss(logits, mask)]
                optimizer.zero_grad()
                sum(terms).backward()  # paper, Eqs. 1 to 3 with lambda = 1
                optimizer.step()
                losses.append(torch.stack(terms).detach())
            schedule.step()
            loss_l2, loss_ssim, loss_focal = torch.stack(losses).mean(0).tolist()
            run.validate(model, epoch, valid, loss_l2=loss_l2, loss_ssim=loss_ssim, loss_focal=loss_focal)
    common.finish(run, model, (train, valid, test))
