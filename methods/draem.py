"""DRAEM (Zavrtanik, Kristan, Skocaj, ICCV 2021, arXiv:2108.07610).

Textures are blended into normal images within random masks of Perlin noise. One network learns to restore the normal
image, a second one sees the restoration beside its input and learns to segment what was blended in. In a test image
the second network marks what the first would not have drawn like that.

Settings: thesis, Table 3.5 (Adam 1e-4, "the remaining settings: the default configurations of the original work"):
official code (VitjanZ/DRAEM), its data pipeline, widths, losses, 700 epochs in batches of 8, learning rate x 0.2 after
80% and 90% of the epochs.
Textures: see --textures. The original has DTD's photographs. The thesis' row was made by BMAD's code without any: the
noise that draws the mask is then its filling, too (--textures noise). results.json says what was used (notes).
Differences from the paper: official code where they part: learning rate (there x 0.1 after 400 and 600 epochs),
share of the texture (0.2 to 1, there 0.1 to 1), ten augmentations of the texture (there seven), rotation to 90 degrees.
Differences from the official code: an epoch sees each image once (there: draws with replacement); the epoch is chosen
on valid (the last is kept there); SSIM's range is 1 (there guessed from the restoration, 2 where it undershoots). The
augmentations are imgaug's, written with tensors: brightness is changed in the luma (there in one of six colour spaces).
Differences from BMAD's: images in [0, 1] as in the original (there textures in [0, 1] are blended into images scaled
with ImageNet's statistics).

Parameters: 69,048,579 (restoration) + 28,374,146 (segmentation), as in the official code.
Cost, measured on one CPU thread: 200 images of 64 pixels with --width 16, batches of 8: 10 s an epoch, 13 ms an image
to score, 1.0 GiB. As published: 6 s and more for a step of 4 images of 64 pixels; at 256 they have 16 times the pixels.
"""

import sys
import threading
import urllib.request
from dataclasses import dataclass
from itertools import pairwise
from math import pi, sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import DTD
from torchvision.transforms.v2.functional import equalize as equalize_uint8

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

PATIENCE = 8  # seconds for DTD's server to answer
DTD_IMAGES = 5640  # 47 kinds of texture, 120 images each


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
    """images are resized to this many pixels squared (official code), a multiple of 32"""
    batch_size: int = 8
    """images a batch (official code); each takes 1.1 GB in training"""
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
    epochs: int = 700
    """passes over the normal training images (official code)"""
    lr: float = 1e-4
    """Adam's learning rate (thesis, Table 3.5)"""
    eval_every: int = 10
    """epochs between looks at valid, which choose the checkpoint"""
    textures: str = "auto"
    """what is blended in: a FOLDER of images, dtd (torchvision's, downloaded to <root>/dtd: 600 MB), images (the
    training images), noise (the mask's own, as in BMAD's code), auto (dtd, else images)"""
    width: int = 128
    """channels of the restoring network's first layer; the segmenting one has half (official code); 16 suits a CPU"""


# ----------------------------------------------------------------------------------------------------------- textures
def published_textures(root):
    """The folder of DTD's images, downloaded if need be. OSError, within PATIENCE, if they cannot be had."""
    folder = Path(root) / "dtd" / "dtd" / "images"
    if not folder.is_dir():
        answer = []

        def ask():
            try:
                urllib.request.urlopen(urllib.request.Request(DTD._URL, method="HEAD"), timeout=PATIENCE).close()
                answer.append("")
            except Exception as e:
                answer.append(str(getattr(e, "reason", e)))

        thread = threading.Thread(target=ask, daemon=True)  # looking up a name knows no timeout
        thread.start()
        thread.join(PATIENCE)
        try:
            if not answer or answer[0]:
                raise OSError(answer[0] if answer else "no answer")
            DTD(root, download=True)
        except Exception as e:  # no network, a broken download, a full disk
            raise OSError(f"DTD is neither below {Path(root) / 'dtd'} nor to be had ({e}); unpack {DTD._URL} "
                          "there") from e
    if (found := len(common.images_in(folder, "**/*"))) < DTD_IMAGES:  # unpacking was interrupted
        raise OSError(f"{folder} holds {found} of DTD's {DTD_IMAGES} images; remove {Path(root) / 'dtd'}")
    return folder


def load_textures(source, train, args):
    """The `Split` of images to blend in, or None for noise; and what is recorded of it."""
    if source == "noise":
        return None, dict(source=source)
    if source in ("dtd", "auto"):
        try:
            folder, source = published_textures(args.root), "dtd"
        except OSError as e:
            if source == "dtd":
                raise common.Error(f"{e}, or take --textures FOLDER, images or noise") from e
            print(f"warning: {e}; going on with the TRAINING IMAGES as textures", flush=True)
            source = "images"
    else:
        folder = Path(source)
    if source == "images":
        return train, dict(source=source, images=len(train))
    entries = [(file, -1, None) for file in common.images_in(folder, "**/*")]
    if not entries:
        raise common.Error(f"--textures {source}: no folder with images; give another, or dtd, images, noise or auto")
    print(f"textures: {len(entries)} images in {folder}", flush=True)
    textures = common.Split("textures", entries, args.image_size, folder, Path(args.root) / ".cache")
    return textures, dict(source=source, images=len(textures))


# ---------------------------------------------- augmentation of textures: (n, 3, H, W) in [0, 1], imgaug 0.4's ranges
def uniform(like, low, high, channels=1):
    """A number for each image (and channel), (n, channels, 1, 1), drawn on the CPU: the same on every device."""
    return torch.empty(len(like), channels, 1, 1).uniform_(low, high).to(like.device)


def rotate(image, degrees):
    """Turn (B, C, H, W) by degrees (B, 1, 1, 1) about the middle; bilinear, black where nothing was."""
    angle = degrees.flatten() * (pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, image.shape, align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)


def gamma(x):
    return x ** uniform(x, 0.5, 2, channels=3)


def brightness(x):
    luma = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    times, plus = uniform(x, 0.8, 1.2), uniform(x, -30, 30) / 255
    changed = torch.where(uniform(x, 0, 1) < 0.5, luma * times + plus, (luma + plus) * times)  # in either order
    return (x + changed - luma).clamp(0, 1)


def sharpness(x):
    """Pillow's: away from or towards a smoothed image, whose border pixels are not smoothed."""
    kernel = torch.ones(3, 1, 3, 3, device=x.device)
    kernel[:, :, 1, 1] = 5
    smooth = F.pad(F.conv2d(x, kernel / 13, groups=3) - x[:, :, 1:-1, 1:-1], (1, 1, 1, 1)) + x
    return torch.lerp(smooth, x, uniform(x, 0, 2)).clamp(0, 1)


def hue_saturation(x):
    """Both shifted in HSV, each by up to 50 / 255 of a turn or of the range."""
    (r, g, b), value = x.split(1, dim=1), x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    c = chroma.clamp(min=1e-8)
    hue = torch.where(value == r, (g - b) / c, torch.where(value == g, (b - r) / c + 2, (r - g) / c + 4))  # sextants
    hue = hue + 6 * uniform(x, -50, 50) / 255
    saturation = (chroma / value.clamp(min=1e-8) + uniform(x, -50, 50) / 255).clamp(0, 1)
    k = (hue + x.new_tensor([5, 3, 1]).view(3, 1, 1)) % 6  # one for each of R, G, B
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def solarize(x):
    turned = (uniform(x, 0, 1) < 0.5) & (x >= uniform(x, 32, 128) / 255)
    return torch.where(turned, 1 - x, x)


def posterize(x):
    step = 2 ** torch.randint(0, 8, (len(x), 1, 1, 1)).to(x.device)  # 8 to 1 bits are left
    return (x * 255).round().div(step, rounding_mode="floor") * step / 255


def invert(x):
    return 1 - x


def autocontrast(x):
    """Stretch each channel to [0, 1] after a share of its darkest and of its brightest pixels."""
    values = x.flatten(2).sort(dim=2).values
    cut = (values.shape[2] * uniform(x, 0, 0.2)).long().flatten(2).expand(-1, 3, -1)
    low = values.gather(2, cut)[..., None]
    high = values.gather(2, values.shape[2] - 1 - cut)[..., None]
    return torch.where(high > low, (x - low) / (high - low), x).clamp(0, 1)


def equalize(x):
    return equalize_uint8((x * 255).round().to(torch.uint8)) / 255


def turn(x):
    return rotate(x, uniform(x, -45, 45))


AUGMENTERS = [gamma, brightness, sharpness, hue_saturation, solarize, posterize, invert, autocontrast, equalize, turn]


def augment(texture):
    """Three different ones of AUGMENTERS for each image, in random order."""
    chosen = torch.rand(len(texture), len(AUGMENTERS)).argsort(dim=1)[:, :3]
    texture = texture.clone()
    for step in range(3):
        for k, augmenter in enumerate(AUGMENTERS):
            rows = (chosen[:, step] == k).nonzero()[:, 0].to(texture.device)
            if len(rows):
                texture[rows] = augmenter(texture[rows])
    return texture


# ------------------------------------------------------------------------------------------------- simulated anomalies
def perlin(exponents, size, device):
    """Noise (n, 1, size, size) about 0 with 2^i x 2^j cells, (i, j) the rows of `exponents` (n, 2).

    A pixel sums over the four corners of its cell: weight times gradient times offset from that corner. Weights and
    offsets are products of one axis each, so all corners of the image are summed by matrix products."""
    side = int(2 ** exponents.max()) + 1
    corner = torch.arange(side, device=device)
    place = torch.arange(size, device=device) / size * 2 ** exponents.to(device)[..., None]  # (n, 2, size), in cells
    offset = place[..., None] - corner  # (n, 2, size, side)
    t = 1 - offset.abs().clamp(max=1)
    weight = 6 * t**5 - 15 * t**4 + 10 * t**3  # 0 but for the two corners around a pixel
    (x, y), (dx, dy) = weight.unbind(1), (weight * offset).unbind(1)  # (n, size, side)
    angle = 2 * pi * torch.rand(len(exponents), side, side).to(device)
    return sqrt(2) * (dx @ angle.cos() @ y.mT + x @ angle.sin() @ dy.mT)[:, None]


def simulate(image, textures=None):
    """Normal images (B, 3, H, W) -> (what is to be restored, the input with anomalies, their masks (B, 1, H, W)).

    textures: a `common.Split`, or None for the noise itself. Half of the images stay without anomaly."""
    b, _, size, _ = image.shape
    image, mask = image.clone(), torch.zeros(b, 1, size, size, dtype=torch.bool, device=image.device)
    turned, spoiled = ((torch.rand(b) < share).nonzero()[:, 0].to(image.device) for share in (0.3, 0.5))
    if len(turned):
        image[turned] = rotate(image[turned], uniform(turned, -90, 90))
    corrupted, n = image.clone(), len(spoiled)
    if n:
        noise = perlin(torch.randint(0, 6, (n, 2)), size, image.device)
        noise = rotate(noise, uniform(noise, -90, 90))
        mask[spoiled] = noise > 0.5  # (n, 1, H, W); a few stay empty
        if textures:
            texture = textures.batch(torch.randint(0, len(textures), (n,)).numpy(), image.device)
        else:
            texture = noise.clamp(0, 1).expand(-1, 3, -1, -1)
        blended = torch.lerp(image[spoiled], augment(texture), uniform(noise, 0.2, 1))
        corrupted[spoiled] = torch.where(mask[spoiled], blended, image[spoiled])
    return image, corrupted, mask


# ------------------------------------------------------------------------------------------------------------ networks
def convolution(c_in, c_out):
    return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]


def block(c_in, c_mid, c_out):
    return nn.Sequential(*convolution(c_in, c_mid), *convolution(c_mid, c_out))


def up(c_in, c_out):
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), *convolution(c_in, c_out))


def restoring_network(w):
    """Encoder to 1/16 of the size and decoder, without skips: (B, 3, H, W) -> (B, 3, H, W)."""
    pool = nn.MaxPool2d(2)
    return nn.Sequential(
        block(3, w, w), pool, block(w, 2 * w, 2 * w), pool, block(2 * w, 4 * w, 4 * w), pool,
        block(4 * w, 8 * w, 8 * w), pool, block(8 * w, 8 * w, 8 * w),
        up(8 * w, 8 * w), block(8 * w, 8 * w, 4 * w), up(4 * w, 4 * w), block(4 * w, 4 * w, 2 * w),
        up(2 * w, 2 * w), block(2 * w, 2 * w, w), up(w, w), block(w, w, w), nn.Conv2d(w, 3, 3, padding=1))


class SegmentingNetwork(nn.Module):
    """U-Net to 1/32 of the size: restoration and image (B, 6, H, W) -> logits (B, 2, H, W), channel 1 anomalous."""

    def __init__(self, w):
        super().__init__()
        widths = [w, 2 * w, 4 * w, 8 * w, 8 * w, 8 * w]
        self.encoder = nn.ModuleList(block(a, b, b) for a, b in pairwise([6, *widths]))
        outputs = [8 * w, 4 * w, 2 * w, w, w]
        self.up = nn.ModuleList(up(a, b) for a, b in pairwise([8 * w, *outputs]))
        self.decoder = nn.ModuleList(block(b + skip, b, b) for b, skip in zip(outputs, widths[-2::-1], strict=True))
        self.head = nn.Conv2d(w, 2, 3, padding=1)

    def forward(self, x):
        skips = []
        for k, encoder in enumerate(self.encoder):
            x = encoder(F.max_pool2d(x, 2) if k else x)
            skips.append(x)
        for upsample, decoder, skip in zip(self.up, self.decoder, skips[-2::-1], strict=True):
            x = decoder(torch.cat([upsample(x), skip], dim=1))
        return self.head(x)


class DRAEM(nn.Module):
    def __init__(self, width):
        super().__init__()
        if width < 2 or width % 2:
            raise common.Error(f"--width {width}: the segmenting network has half of it, so it is even")
        self.reconstructive = restoring_network(width)
        self.discriminative = SegmentingNetwork(width // 2)
        for module in self.modules():  # official code, train_DRAEM.py; biases as PyTorch has them
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, image):
        recon = self.reconstructive(image)
        return recon, self.discriminative(torch.cat([recon, image], dim=1))

    @torch.inference_mode()
    def predict(self, image):
        """Anomaly map (B, H, W): the probability of an anomaly; score (B,): the largest mean of a 21x21 window."""
        self.eval()
        anomaly_map = self(image)[1].softmax(dim=1)[:, 1]
        # beyond the border count zeros (official code, test_DRAEM.py)
        return anomaly_map, F.avg_pool2d(anomaly_map, 21, stride=1, padding=10).amax(dim=(1, 2))


# -------------------------------------------------------------------------------------------------------------- losses
def ssim(recon, image):
    """Structural similarity: mean over pixels and channels; Gaussian windows of 11 pixels, zeros beyond the border."""
    window = torch.exp(-0.5 * ((torch.arange(11, device=image.device) - 5) / 1.5) ** 2)
    window = window / window.sum()
    maps = torch.stack([recon, image, recon * recon, image * image, recon * image]).flatten(0, 2)[:, None]
    maps = F.conv2d(maps, window.view(1, 1, 11, 1), padding=(5, 0))  # separable
    maps = F.conv2d(maps, window.view(1, 1, 1, 11), padding=(0, 5))
    mean_r, mean_i, square_r, square_i, product = maps.unflatten(0, (5, -1))
    covariance, variances = product - mean_r * mean_i, square_r - mean_r**2 + square_i - mean_i**2
    c1, c2 = 0.01**2, 0.03**2  # for values in [0, 1]
    similarity = (2 * mean_r * mean_i + c1) * (2 * covariance + c2)
    return (similarity / ((mean_r**2 + mean_i**2 + c1) * (variances + c2))).mean()


def focal_loss(logits, mask, smooth=1e-5):
    """-(1 - p)^2 log p, p the probability of the true class, (B, 2, H, W) and (B, 1, H, W); mean over pixels."""
    anomalous = logits.softmax(dim=1)[:, 1:]
    p = torch.where(mask, anomalous, 1 - anomalous)
    p = (1 - smooth) * p + smooth * (1 - p) + smooth  # the official code's smoothed classes, in closed form
    return -((1 - p) ** 2 * p.log()).mean()


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.start_run(__file__, args)
    if args.image_size < 64 or args.image_size % 32:
        raise common.Error(f"--image-size {args.image_size}: the networks halve it five times; a multiple of 32, 64 or "
                           f"more")
    train, valid, test = common.load_benchmark(args)
    model = DRAEM(args.width).to(run.device)
    if not args.checkpoint:
        textures, run.notes["textures"] = load_textures(args.textures, train, args)
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
        steps = [-(-args.epochs * tenths // 10) for tenths in (8, 9)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.2)
        for epoch in run.epochs(model, optimizer, schedule):
            losses = []
            for image in train.batches(args.batch_size, run.device, shuffle=(args.seed, epoch)):
                model.train()
                image, corrupted, mask = simulate(image, textures)
                recon, logits = model(corrupted)
                terms = [F.mse_loss(recon, image), 1 - ssim(recon, image), focal_loss(logits, mask)]
                optimizer.zero_grad()
                sum(terms).backward()
                optimizer.step()
                losses.append(torch.stack(terms).detach())
            schedule.step()
            loss_l2, loss_ssim, loss_focal = torch.stack(losses).mean(0).tolist()
            run.validate(model, epoch, valid, loss_l2=loss_l2, loss_ssim=loss_ssim, loss_focal=loss_focal)
    common.finish(run, model, (train, valid, test))
