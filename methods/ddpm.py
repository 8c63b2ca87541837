"""DDPM, as in AnoDDPM (Wyatt, Leach, Schmon, Willcocks: AnoDDPM, CVPR Workshops 2022; not on arXiv).

A diffusion model (Ho, Jain, Abbeel: DDPM, arXiv:2006.11239) learns to denoise normal images. A test image is noised a
quarter of the way and denoised again. What the noise has hidden is replaced with normal structures, so the result
differs from the test image where the test image is anomalous. White noise does not hide large lesions, but noise with
a 1/f-like spectrum does. AnoDDPM therefore uses simplex noise.

For its "DDPM", the thesis cites another method (Wolleb et al., MICCAI 2022), which needs healthy and diseased images to
train both its diffusion model and the classifier that guides it. The benchmarks have only normal training images, and
training on the anomalous images in valid would leak labels. Without the classifier, that method's DDIM encoding and
decoding return the image unchanged, lesion included. The thesis does not explain how it obtained its results. AnoDDPM
needs no labels; `--noise gauss` gives the reconstruction of plain DDPM.

Settings: official code (Julian-Wyatt/AnoDDPM, 3052f04, args28.json): network, noise schedule, 0 <= t < 800 in training,
AdamW with learning rate 1e-4, gradients clipped to norm 1, averaged weights, 300,000 images seen (epochs: brain 40,
liver 195, resc 70, oct2017 12, chest 38, histo 59).
Differences from the official code:
- Perlin noise on a cubic lattice replaces simplex noise, with the same periods and persistence.
- Each noise field is normalised to mean 0 and standard deviation 1, as the schedule assumes (official code: not
  normalised). In training, each image and channel has its own field (official code: one per batch).
- Denoising starts at t = 250 (official code: 200 for the figures, 250 elsewhere) and takes 50 steps (official code:
  all, as with --sample-steps 0). All images get the same noise, so a score depends only on the image and the seed.
- Training uses batches of 8 (official code: single images), in bfloat16 on a GPU. The averaged weights forget their
  initial values (see `average`).
- Training images are not randomly shifted or rotated. The score of an image is the maximum of its map, as for the
  thesis' other methods; the official code scores pixels only, not images.
- Denoising steps add noise with the posterior variance (DDPM, Eq. 7), not beta. Both suit the full chain, but in a
  shortened chain, noise of variance beta is too much for the last step (t = 0) to remove.
- Attention has two heads, both in training and in testing (official code: two in training, one in testing).
- The last weights are kept, as in the official code; with --choose-on-valid, the best epoch is chosen on valid, as in
  the other methods here.

Parameters: 131,649,793 with one channel, as in the official code; 32,950,401 with --base-channels 64. A forward pass
at 256 pixels takes 563 and 142 GFLOP, respectively; scoring an image takes 50 passes.
Cost on one thread of a busy CPU, with 200 images of 64x64 pixels, batches of 2, --multipliers 1 1 2 2, --attention 8
and --base-channels 16: 34 s per epoch, 0.3 s to score an image in 5 steps, 0.9 GiB. The defaults were not timed.
"""

import copy
import itertools
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

STEPS, BETAS = 1000, (1e-4, 0.02)  # T; first and last beta of the linear schedule (DDPM, Sec. 4)
TRAINED_STEPS = 800  # t is below this value in training (official code: sample_distance)
BLOCKS, HEADS = 2, 2  # residual blocks per level, attention heads (official code)
OCTAVES, PERIOD, PERSISTENCE = 6, 64, 0.8  # periods 64, 32, ... 2 pixels; each octave has 0.8 of the previous amplitude
AVERAGE = 0.9999  # decay of the averaged weights (official code)


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
    """images are resized to this width and height in pixels (official code)"""
    batch_size: Annotated[int, Ge(1)] = 8
    """images per batch; in training, each needs about 2.7 GiB of memory in float32, half as much in bfloat16"""
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
    epochs: Annotated[int, Ge(0)] = 0
    """passes over the normal training images; 0: enough passes to see 300,000 images (official code)"""
    lr: Annotated[float, Gt(0)] = 1e-4
    """AdamW's learning rate (official code)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """with --choose-on-valid: validate every N epochs; the best checkpoint is kept"""
    choose_on_valid: bool = False
    """keep the weights of the best epoch on valid instead of the last weights"""
    noise: Literal["simplex", "gauss"] = "simplex"
    """type of noise; simplex: smooth noise, summed over octaves (AnoDDPM); gauss: white noise (DDPM)"""
    channels: Literal[1, 3] = 1
    """number of image channels: 1 for greyscale images (official code), 3 for colour images"""
    base_channels: Annotated[int, Ge(1)] = 128
    """channels of the U-Net's first level (official code)"""
    multipliers: Annotated[tuple[int, ...], Ge(1)] = (1, 1, 2, 2, 4, 4)
    """channels of each level as multiples of --base-channels; each level halves the size (official code)"""
    attention: Annotated[tuple[int, ...], Ge(1)] = (32, 16, 8)
    """feature map sizes, in pixels, at which the U-Net uses attention (official code)"""
    noise_level: Annotated[int, Interval(ge=1, le=1000)] = 250
    """lambda, the step (of 1000) up to which test images are noised (official code: 200 or 250)"""
    sample_steps: Annotated[int, Ge(0)] = 50
    """number of evenly spaced denoising steps; 0: as many as --noise-level (official code)"""
    repeats: Annotated[int, Ge(1)] = 1
    """number of reconstructions averaged for each image (official code: 1 for the results, 5 for the figures)"""
    sigma: Annotated[int, Ge(0)] = 0
    """standard deviation in pixels of the Gaussian filter that smooths the map; 0: no filter"""
    score: Literal["max", "top"] = "max"
    """score of an image: the maximum of its map (max) or the mean of the map's highest 1% (top; more stable)"""


# --------------------------------------------------------------------------------------------------------------- noise
def smooth_noise(t, channels, size, generator=None):
    """Return slices of 3-D Perlin noise at t (b,), summed over octaves: (b, channels, size, size), mean 0, deviation 1.
    Lattice corners have random gradients; a pixel is the sum of gradient times offset over the corners of its cell,
    weighted by `fade`."""
    n, total = len(t) * channels, 0
    for octave in range(OCTAVES):
        period = PERIOD / 2**octave  # in pixels and in steps of t
        side = int((size - 1) / period) + 2  # corners
        gradient = torch.randn(2, 3, n, side, side, generator=generator).to(t.device)  # the same on all devices
        gradient = F.normalize(gradient, dim=1)
        place = torch.arange(size, device=t.device) / period  # in cells
        cell = place.long()
        z = (t / period % 1).repeat_interleave(channels).view(n, 1, 1)  # position in the cell; one lattice per t
        for i, j, k in itertools.product((0, 1), repeat=3):
            g_x, g_y, g_z = gradient[i][:, :, cell + j][..., cell + k]  # (n, size, size) each
            dx, dy, dz = place - cell - k, (place - cell - j)[:, None], z - i
            total = total + PERSISTENCE**octave * fade(dx) * fade(dy) * fade(dz) * (g_x * dx + g_y * dy + g_z * dz)
    total = total.view(len(t), channels, size, size)
    deviation, mean = torch.std_mean(total, dim=(2, 3), keepdim=True)
    return (total - mean) / deviation


def fade(offset):
    """Return Perlin's weight for a corner at this offset (in cells): 1 at offset 0, 0 at 1, with zero slope at both."""
    s = 1 - offset.abs()
    return s**3 * (6 * s**2 - 15 * s + 10)


def white_noise(t, channels, size, generator=None):
    return torch.randn(len(t), channels, size, size, generator=generator).to(t.device)


# ----------------------------------------------------------------------------------------------------------- diffusion
class Diffusion(nn.Module):
    """Constants and equations of DDPM. Denoising starts at step `level` - 1 and visits `count` steps (0: all)."""

    def __init__(self, level, count):
        super().__init__()
        alpha_bar = (1 - torch.linspace(*BETAS, STEPS, dtype=torch.double)).cumprod(0)  # t counts from 0
        t = torch.linspace(0, level - 1, count or level, dtype=torch.double).round().long()  # visited steps
        now, before = alpha_bar[t], F.pad(alpha_bar[t[:-1]], (1, 0), value=1)
        beta = 1 - now / before  # between visited steps (Nichol and Dhariwal, arXiv:2102.09672, Eq. 19)
        constants = dict(
            sqrt_alpha_bar=alpha_bar.sqrt(),
            sqrt_one_minus_alpha_bar=(1 - alpha_bar).sqrt(),
            weight_x_0=before.sqrt() * beta / (1 - now),  # in the posterior's mean, Eq. 7
            weight_x_t=(1 - beta).sqrt() * (1 - before) / (1 - now),
            sigma=(beta * (1 - before) / (1 - now)).sqrt())  # Eq. 7; 0 at the last step, as in Algorithm 2
        self.register_buffer("t", t, persistent=False)
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    def q_sample(self, x_0, t, noise):
        """Return x_t at steps t (b,), sampled directly from x_0 (Eq. 4)."""
        left, added = self.sqrt_alpha_bar[t], self.sqrt_one_minus_alpha_bar[t]
        return left.view(-1, 1, 1, 1) * x_0 + added.view(-1, 1, 1, 1) * noise

    def step_back(self, x_t, i, epsilon, noise):
        """Denoise x_t from visited step i to visited step i - 1, given the predicted noise epsilon."""
        x_0 = (x_t - self.sqrt_one_minus_alpha_bar[self.t[i]] * epsilon) / self.sqrt_alpha_bar[self.t[i]]  # Eq. 15
        return self.weight_x_0[i] * x_0.clamp(-1, 1) + self.weight_x_t[i] * x_t + self.sigma[i] * noise  # Eq. 6, 7


# ------------------------------------------------------------------------------------------------------------- network
def norm(channels):
    """Return a group norm with 32 groups at the published widths. Groups of one channel would erase the time step."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def zero(layer):
    """Set all weights of a layer to 0, so that its block is initially the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """BigGAN's residual block, with the time step as an additional input and optional resampling."""

    def __init__(self, c_in, c_out, c_time, resample=None):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.embed = nn.Linear(c_time, c_out)
        self.norm2, self.conv2 = norm(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.resample = resample or nn.Identity()

    def forward(self, x, time):  # (B, c_in, h, w), (B, c_time)
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = h + self.embed(F.silu(time))[:, :, None, None]
        return self.skip(self.resample(x)) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention over all positions, with a skip connection."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.project = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x, time):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, 3C, P)
        q, k, v = qkv.view(b, HEADS, 3, c // HEADS, h * w).mT.unbind(2)  # (B, heads, P, C / heads) each
        attended = F.scaled_dot_product_attention(q, k, v).mT.reshape(b, c, h * w)
        return x + self.project(attended).view(b, c, h, w)


class Stage(nn.Sequential):
    def forward(self, x, time):
        for layer in self:
            x = layer(x, time)
        return x


class UNet(nn.Module):
    """The network of Dhariwal and Nichol: x_t (B, C, H, W), t (B,) -> predicted noise in x_t (B, C, H, W)."""

    def __init__(self, channels, size, base, multipliers, attention):
        super().__init__()
        c_time, last = 4 * base, len(multipliers) - 1
        self.time = nn.Sequential(nn.Linear(base, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.first = nn.Conv2d(channels, base, 3, padding=1)

        def stage(c_in, c_out, level):
            attend = size >> level in attention
            return Stage(ResBlock(c_in, c_out, c_time), *[Attention(c_out)] * attend)

        c, skips, down, up = base, [base], [], []
        for level, multiplier in enumerate(multipliers):
            for _ in range(BLOCKS):
                down.append(stage(c, multiplier * base, level))
                c = multiplier * base
                skips.append(c)
            if level < last:
                down.append(ResBlock(c, c, c_time, nn.AvgPool2d(2)))
                skips.append(c)
        self.down = nn.ModuleList(down)
        self.middle = Stage(ResBlock(c, c, c_time), Attention(c), ResBlock(c, c, c_time))
        for level in range(last, -1, -1):
            for _ in range(BLOCKS + 1):
                up.append(stage(c + skips.pop(), multipliers[level] * base, level))
                c = multipliers[level] * base
            if level:
                up[-1].append(ResBlock(c, c, c_time, nn.Upsample(scale_factor=2)))
        self.up = nn.ModuleList(up)
        self.last = nn.Sequential(norm(c), nn.SiLU(), zero(nn.Conv2d(c, channels, 3, padding=1)))

    def forward(self, x, t):
        half = self.time[0].in_features // 2
        angle = t[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))  # (B, half)
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        x = self.first(x)
        skips = [x]
        for layer in self.down:
            x = layer(x, time)
            skips.append(x)
        x = self.middle(x, time)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], dim=1), time)
        return self.last(x)


# -------------------------------------------------------------------------------------------------------------- method
class AnoDDPM(nn.Module):
    """`unet` holds the averaged weights; the network being trained is not part of this model."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.draw_noise = smooth_noise if args.noise == "simplex" else white_noise
        self.unet = UNet(args.channels, args.image_size, args.base_channels, args.multipliers, args.attention)
        self.diffusion = Diffusion(args.noise_level, args.sample_steps)
        # The last denoising step, at t[0], adds no noise, so field 0 is free for noising the image to t[-1].
        t, generator = self.diffusion.t.clone(), torch.Generator().manual_seed(args.seed)
        t[0] = t[-1]
        fields = [self.draw_noise(t, args.channels, args.image_size, generator) for _ in range(args.repeats)]
        self.register_buffer("fields", torch.stack(fields), persistent=False)  # (repeats, steps, C, H, W)

    def scaled(self, image):
        """(B, 3, H, W) in [0, 1] -> (B, C, H, W) in [-1, 1]."""
        return 2 * (image.mean(1, keepdim=True) if self.args.channels == 1 else image) - 1

    def loss(self, unet, image):
        """Return L_simple (DDPM, Eq. 14): the mean squared error of the predicted noise."""
        t = torch.randint(TRAINED_STEPS, (len(image),)).to(image.device)
        noise = self.draw_noise(t, self.args.channels, self.args.image_size)
        x_t = self.diffusion.q_sample(self.scaled(image), t, noise)
        with torch.autocast("cuda", torch.bfloat16, enabled=image.is_cuda):
            pred = unet(x_t, t)
        return F.mse_loss(pred.float(), noise)

    @torch.no_grad()
    def average(self, unet, step):
        """Update the averaged weights after step `step`. The average covers about the last ninth of the steps, but at
        most 10,000. With a constant decay, the initial values would still have weight 1 / e after 10,000 steps."""
        decay = min(AVERAGE, step / (9 + step))
        for mean, p in zip(self.unet.parameters(), unet.parameters(), strict=True):
            mean.lerp_(p, 1 - decay)

    def reconstruct(self, x_0, fields):
        """Noise x_0 (B, C, H, W) to --noise-level and denoise it, using the noise fields (steps, C, H, W)."""
        x = self.diffusion.q_sample(x_0, self.diffusion.t[-1:], fields[0])
        for i, t in reversed(list(enumerate(self.diffusion.t))):
            x = self.diffusion.step_back(x, i, self.unet(x, t.expand(len(x))), fields[i])
        return x

    @torch.inference_mode()
    def predict(self, image):
        """Return the squared error, summed over channels, as the anomaly map (B, H, W), and the score (B,)."""
        self.eval()
        x_0 = self.scaled(image)
        recon = torch.cat([sum(self.reconstruct(x, fields) for fields in self.fields) / len(self.fields)
                           for x in x_0.split(1)])  # one by one, because rounding depends on the batch
        anomaly_map = (recon - x_0).square().sum(dim=1)
        if self.args.sigma:
            anomaly_map = common.smooth(anomaly_map, self.args.sigma)
        largest = anomaly_map.flatten(1).topk(1 if self.args.score == "max" else anomaly_map[0].numel() // 100)
        return anomaly_map, largest.values.mean(dim=1)


def build_model(args):
    check(args)
    return AnoDDPM(args)


def check(args):  # raises an Error if values are incompatible
    size, halvings = args.image_size, len(args.multipliers) - 1
    if halvings < 0 or min(args.multipliers) < 1:
        raise common.Error(f"--multipliers {args.multipliers}: give a whole number for each level")
    if size < 16 or size % 2**halvings:
        raise common.Error(f"--image-size {size}: the network halves it {halvings} times; give a multiple of "
                           f"{2**halvings}, at least 16, or fewer --multipliers")
    if args.base_channels < 8 or args.base_channels % 8:
        raise common.Error(f"--base-channels {args.base_channels}: give a multiple of 8, for norms and attention")
    if not 2 <= args.noise_level <= TRAINED_STEPS:
        raise common.Error(f"--noise-level {args.noise_level}: give 2 to {TRAINED_STEPS}, the steps used in training")
    if args.sample_steps and not 2 <= args.sample_steps <= args.noise_level:
        raise common.Error(f"--sample-steps {args.sample_steps}: give 0, or 2 to {args.noise_level} (--noise-level)")
    if 4 * args.sigma >= size:
        raise common.Error(f"--sigma {args.sigma}: give less than {size // 4}, a quarter of --image-size")


def whole_training(images):
    """Return the number of epochs needed to see 300,000 images (official code: 3,000 epochs of 100 images)."""
    return math.ceil(300_000 / images)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        if args.channels == 1 and not torch.equal(*train.batch([0])[0, :2]):  # red and green
            raise common.Error(f"--channels 1: the images of {args.data} are in colour; use --channels 3")
        run.total = args.epochs or whole_training(len(train))
        learner = copy.deepcopy(model.unet)
        optimizer = torch.optim.AdamW(learner.parameters(), args.lr, weight_decay=0)
        for epoch in run.epochs(model, optimizer, learner):
            losses, step = [], (epoch - 1) * math.ceil(len(train) / args.batch_size)
            for image in train.batches(args.batch_size, run.device, shuffle=(args.seed, epoch)):
                loss = model.loss(learner, image)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(learner.parameters(), 1)
                optimizer.step()
                model.average(learner, step := step + 1)
                losses.append(loss.detach())
            run.validate(model, epoch, valid if args.choose_on_valid else None, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
