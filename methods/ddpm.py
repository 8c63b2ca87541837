"""DDPM, as AnoDDPM (Wyatt, Leach, Schmon, Willcocks: AnoDDPM, CVPR Workshops 2022; it has no arXiv number).

A diffusion model (Ho, Jain, Abbeel: DDPM, arXiv:2006.11239) learns to take noise out of normal images. A test image is
noised a quarter of the way and denoised again: what the noise has hidden comes back as it looks in normal images, so
the two differ where the image is anomalous. Noise with a spectrum like 1/f hides large lesions, too, white noise does
not: AnoDDPM takes simplex noise.

Why it is not what the thesis cites for its row "DDPM" (Wolleb et al., MICCAI 2022): that method guides the denoising by
a classifier of healthy and diseased images, and its diffusion model sees both. The benchmarks' training images are
normal only; to take the anomalous ones of valid would leak labels into a table of unsupervised methods. Without the
classifier its DDIM encoding and decoding gives the image back as it is, lesion included. The thesis does not say how
its row was made. AnoDDPM needs no labels; `--noise gauss` is the plain DDPM's reconstruction.

Settings: the official code (Julian-Wyatt/AnoDDPM, 3052f04, args28.json): network, schedule, 0 <= t < 800 in training,
AdamW 1e-4, gradients cut at norm 1, averaged weights, 300,000 images. Those are 40 epochs of brain; of liver 195,
resc 70, oct2017 11, chest 38, histo 59.
Differences from the official code:
- Octaves of gradient noise (Perlin's, on a cubic lattice) instead of simplex noise, with its periods and persistence.
- A noise field is shifted and scaled to mean 0 and deviation 1, which the schedule takes for granted; there it is used
  as it comes. In training each image and channel has its own, there the images of a batch share one.
- Scoring starts at t = 250 (there 200 for the figures, 250 elsewhere), in 50 steps instead of all (--sample-steps 0),
  with the same noise for all images, drawn from the seed: a score depends on nothing but the image, and like images
  have like scores.
- Batches of 8, in bfloat16 on a GPU; there single images. Averaged weights forget how they began (see `average`).
- No random shift and rotation of training images. The score is the map's maximum, as elsewhere in the thesis' chapter;
  there single pixels are scored only.
- A step back adds noise of the posterior's variance (DDPM, Eq. 7), not beta: both suit the full chain, but beta of a
  shortened one is much more than its last step, of t = 0, takes out again.
- Two attention heads in training and test; there one in the test, with the weights that were trained with two.
- As there, the last weights are taken: --choose-on-valid chooses the epoch as the other methods here do.

Parameters: 131,649,793 with one channel, as in the official code; 32,950,401 with --base-channels 64. A forward pass
at 256 pixels: 563 and 142 GFLOP; to score an image, 50 of them.
Cost, measured on one busy CPU thread: 200 images of 64 pixels with --base-channels 16 --multipliers 1 1 2 2
--attention 8, batches of 2: 34 s an epoch, 0.3 s to score an image in 5 steps, 0.9 GiB. The default was not timed.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

STEPS, BETAS = 1000, (1e-4, 0.02)  # T, and the linear schedule's ends (DDPM, Sec. 4)
TRAINED_STEPS = 800  # t is drawn below this (official code: sample_distance)
BLOCKS, HEADS = 2, 2  # residual blocks a level, attention heads (official code)
OCTAVES, PERIOD, PERSISTENCE = 6, 64, 0.8  # periods of 64, 32, ... 2 pixels, each 0.8 as strong as the one before
AVERAGE = 0.9999  # of the averaged weights (official code)


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
    """images are resized to this many pixels squared (official code)"""
    batch_size: int = 8
    """images a batch; each takes about 2.7 GiB in training in float32, half of it in bfloat16"""
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
    epochs: int = 40
    """passes over the normal training images: 300,000 images of brain (official code)"""
    lr: float = 1e-4
    """AdamW's learning rate (official code)"""
    eval_every: int = 10
    """epochs between savings of the weights, with --choose-on-valid also between looks at valid"""
    choose_on_valid: bool = False
    """keep the epoch that is best on valid instead of the last"""
    noise: Literal["simplex", "gauss"] = "simplex"
    """what hides the image: octaves of smooth noise (AnoDDPM) or white noise (DDPM)"""
    base_channels: int = 128
    """channels of the U-Net's first level (official code)"""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    """channels of each level over --base-channels; a level has half the size of the one before (official code)"""
    attention: tuple[int, ...] = (32, 16, 8)
    """sizes in pixels at which levels have attention (official code)"""
    noise_level: int = 250
    """lambda: the step, of 1000, to which a test image is noised (official code: 200 or 250)"""
    sample_steps: int = 50
    """steps back from there, evenly spaced; 0 takes all --noise-level of them (official code)"""
    repeats: int = 1
    """reconstructions of an image that are averaged (official code: 1 for its figures, 5 for its pictures)"""
    sigma: int = 0
    """pixels: the map is smoothed by a Gaussian of this deviation; 0 leaves it as it is"""
    score: Literal["max", "top"] = "max"
    """of an image: the maximum of its map, or the mean of the largest hundredth, which is steadier"""


# --------------------------------------------------------------------------------------------------------------- noise
def smooth_noise(t, channels, size, generator=None):
    """Octaves of 3-D gradient noise cut at the step t (b,): (b, channels, size, size), of mean 0 and deviation 1.

    A pixel sums over the eight corners of its cell: weight times (gradient, offset from that corner). Both are products
    of one axis each, so that all pixels of one plane of corners are matrix products."""
    n, total = len(t) * channels, 0
    for octave in range(OCTAVES):
        period = PERIOD / 2**octave  # pixels, and steps of t
        side = math.ceil((size - 1) / period) + 1
        gradient = torch.randn(2, 3, n, side, side, generator=generator).to(t.device)  # one sequence for all devices
        gradient = F.normalize(gradient, dim=1)
        place = torch.arange(size, device=t.device) / period  # in cells
        offset = place[:, None] - torch.arange(side, device=t.device)  # (size, side)
        weight = fade(offset)  # 0 but for the two corners around a pixel
        slope = weight * offset
        z = (t / period % 1).repeat_interleave(channels).view(n, 1, 1)  # the lattice is new, whole cells say nothing
        for plane, (g_x, g_y, g_z) in enumerate(gradient):  # (n, side, side) each
            dz = z - plane
            value = weight @ (g_x @ slope.T + dz * (g_z @ weight.T)) + slope @ g_y @ weight.T  # (n, size, size)
            total = total + PERSISTENCE**octave * fade(dz) * value
    total = total.view(len(t), channels, size, size)
    deviation, mean = torch.std_mean(total, dim=(2, 3), keepdim=True)
    return (total - mean) / deviation


def fade(offset):
    """Perlin's weight of a corner at this distance, in cells: 1 at 0, 0 from 1 on, flat at both."""
    s = 1 - offset.abs().clamp(max=1)
    return s**3 * (6 * s**2 - 15 * s + 10)


def white_noise(t, channels, size, generator=None):
    return torch.randn(len(t), channels, size, size, generator=generator).to(t.device)


NOISE = dict(simplex=smooth_noise, gauss=white_noise)


# ------------------------------------------------------------------------------------------------------------ schedule
def alpha_bar(t):
    """The share of the image's variance that is left after step t (DDPM, Eq. 4); t counts from 0."""
    return (1 - torch.linspace(*BETAS, STEPS, dtype=torch.double)).cumprod(0).to(t.device)[t]


def q_sample(x_0, t, noise):
    """x_t of x_0 in one jump (DDPM, Eq. 4); t (b,)."""
    left = alpha_bar(t).view(-1, 1, 1, 1)
    return left.sqrt().float() * x_0 + (1 - left).sqrt().float() * noise


def reverse_chain(level, count):
    """(t, alpha_bar, a, b, sigma), each (count,), of the chain that visits `count` of the steps 0 ... level - 1:

    x at the step before = a x_0 + b x_t + sigma noise. count 0: all steps."""
    t = torch.linspace(0, level - 1, count or level, dtype=torch.double).round().long()
    left = alpha_bar(t)
    before = torch.cat([left.new_ones(1), left[:-1]])
    beta = 1 - left / before  # of the kept steps (Nichol and Dhariwal, arXiv:2102.09672, Eq. 19)
    a = before.sqrt() * beta / (1 - left)  # DDPM, Eq. 7
    b = (1 - beta).sqrt() * (1 - before) / (1 - left)
    sigma = (beta * (1 - before) / (1 - left)).sqrt()  # DDPM, Eq. 7; 0 at the last step, as in its Algorithm 2
    return t, left.float(), a.float(), b.float(), sigma.float()


# ------------------------------------------------------------------------------------------------------------- network
def norm(channels):
    """32 groups at the published widths. Trap: a group of one channel would take the step, added to channels, away."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def zero(layer):
    """A layer that gives 0 at first, so that its block starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """Two convolutions beside a skip, both resampled first where `resample` says so; BigGAN's, with the step added."""

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
    """All positions look at each other, beside a skip."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.project = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x, time):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, 3C, P)
        q, k, v = qkv.view(b, HEADS, 3, c // HEADS, h * w).mT.unbind(2)  # (B, heads, P, C / heads) each
        found = F.scaled_dot_product_attention(q, k, v).mT.reshape(b, c, h * w)
        return x + self.project(found).view(b, c, h, w)


class Stage(nn.Sequential):
    def forward(self, x, time):
        for layer in self:
            x = layer(x, time)
        return x


class UNet(nn.Module):
    """The noise in x_t (B, C, H, W) at the steps t (B,), (B, C, H, W); Dhariwal and Nichol's network."""

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
    """Its `unet` has the averaged weights; the network that is trained stands beside it."""

    def __init__(self, args, channels):
        super().__init__()
        self.args, self.channels = args, channels
        self.unet = UNet(channels, args.image_size, args.base_channels, args.multipliers, args.attention)
        chain = reverse_chain(args.noise_level, args.sample_steps)
        for name, values in zip(["t", "alpha_bar", "a", "b", "sigma"], chain, strict=True):
            self.register_buffer(name, values, persistent=False)
        # Steps add noise but for the last one, of t[0]: that field serves the jump to t[-1].
        t, generator = torch.cat([self.t[-1:], self.t[1:]]), torch.Generator().manual_seed(args.seed)
        fields = [NOISE[args.noise](t, channels, args.image_size, generator) for _ in range(args.repeats)]
        self.register_buffer("fields", torch.stack(fields), persistent=False)  # (repeats, steps, C, H, W)

    def scaled(self, image):
        """(B, 3, H, W) in [0, 1] -> (B, C, H, W) in [-1, 1]; C is 1 for grey benchmarks."""
        return 2 * (image.mean(1, keepdim=True) if self.channels == 1 else image) - 1

    def loss(self, unet, image):
        """L_simple (DDPM, Eq. 14): how far the network's noise is from what was added."""
        t = torch.randint(TRAINED_STEPS, (len(image),)).to(image.device)
        noise = NOISE[self.args.noise](t, self.channels, self.args.image_size)
        x_t = q_sample(self.scaled(image), t, noise)
        with torch.autocast("cuda", torch.bfloat16, enabled=image.is_cuda):
            pred = unet(x_t, t)
        return F.mse_loss(pred.float(), noise)

    @torch.no_grad()
    def average(self, unet, step):
        """Follow `unet` after its `step`-th step: the mean over about the last ninth of them, at most 10,000.

        Trap: with 0.9999 from the start the random first weights would still count for 1 / e after 10,000 steps."""
        decay = min(AVERAGE, step / (9 + step))
        for mean, p in zip(self.unet.parameters(), unet.parameters(), strict=True):
            mean.lerp_(p, 1 - decay)

    def reconstruct(self, x_0, fields):
        """Noise x_0 (B, C, H, W) to --noise-level and denoise it; fields: the noise of each step, (steps, C, H, W)."""
        x = self.alpha_bar[-1].sqrt() * x_0 + (1 - self.alpha_bar[-1]).sqrt() * fields[0]
        for i in reversed(range(len(self.t))):
            noise = self.unet(x, self.t[i].expand(len(x)))
            start = (x - (1 - self.alpha_bar[i]).sqrt() * noise) / self.alpha_bar[i].sqrt()  # DDPM, Eq. 15
            x = self.a[i] * start.clamp(-1, 1) + self.b[i] * x + self.sigma[i] * fields[i]  # DDPM, Eq. 6, 7
        return x

    @torch.inference_mode()
    def predict(self, image):
        """Anomaly map (B, H, W): the squared error, summed over channels; anomaly score (B,): its maximum (--score)."""
        self.eval()
        x_0 = self.scaled(image)
        recon = sum(self.reconstruct(x_0, fields) for fields in self.fields) / len(self.fields)
        anomaly_map = (recon - x_0).square().sum(dim=1)
        if self.args.sigma:
            anomaly_map = gaussian_blur(anomaly_map, 8 * self.args.sigma + 1, self.args.sigma)
        largest = anomaly_map.flatten(1).topk(1 if self.args.score == "max" else anomaly_map[0].numel() // 100)
        return anomaly_map, largest.values.mean(dim=1)


def check(args):
    """End with one line where arguments cannot go together."""
    size, halvings = args.image_size, len(args.multipliers) - 1
    if halvings < 0 or min(args.multipliers) < 1:
        raise common.Error(f"--multipliers {args.multipliers}: give a whole number for each level")
    if size < 16 or size % 2**halvings:
        raise common.Error(f"--image-size {size}: the network halves it {halvings} times; 16 or more, a multiple of "
                           f"{2**halvings}, or fewer --multipliers")
    if args.base_channels < 8 or args.base_channels % 8:
        raise common.Error(f"--base-channels {args.base_channels}: a multiple of 8, for norms and attention heads")
    if not 2 <= args.noise_level <= TRAINED_STEPS:
        raise common.Error(f"--noise-level {args.noise_level}: 2 to {TRAINED_STEPS}, the steps that are trained")
    if args.sample_steps and not 2 <= args.sample_steps <= args.noise_level:
        raise common.Error(f"--sample-steps {args.sample_steps}: 0 for all, or 2 to --noise-level ({args.noise_level})")
    if args.repeats < 1 or args.sigma < 0 or 4 * args.sigma >= size:
        raise common.Error(f"--repeats {args.repeats} --sigma {args.sigma}: at least 1 reconstruction, and 0 <= sigma "
                           f"< "
                           f"{size // 4}, a quarter of the image")


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.start_run(__file__, args)
    check(args)
    train, valid, test = common.load_benchmark(args)
    run.notes["channels"] = run.restored["notes"]["channels"] if run.restored else train.images.shape[1]
    model = AnoDDPM(args, run.notes["channels"]).to(run.device)
    if not args.checkpoint:
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
