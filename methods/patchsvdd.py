"""PatchSVDD (Yi, Yoon: Patch SVDD, ACCV 2020, arXiv:2006.16067).

A patch encoder is trained on normal images with two losses. The SVDD loss pulls the embedding of each patch towards
those of almost identical patches, not towards one centre common to all patches. For the position loss, a classifier
predicts the direction (one of eight) between two adjacent patches from their embeddings, which forces the encoder to
represent their content. The anomaly score of a patch is its distance to the nearest normal patch, at two scales: 64 and
32 pixels.

Settings: thesis, Table 3.2 (D = 64, lambda = 0.9). Everything else follows the official code,
nuclearboy95/Anomaly-Detection-PatchSVDD-PyTorch (934d623), whose lambda is 1, or 0.001 in its example.
Differences from the official code:
- The same results take less computation: since the encoder has no padding and halves the grid only once, one pass over
  a whole image embeds all its patches (21 times fewer operations). The four losses also share one pass.
- Nearest neighbours are exact at both scales (official code: a k-d tree at 64 pixels, the approximate NGT at 32).
- The memory banks keep at most `--bank` patches per scale (0.33 GB), the same number from each image, drawn at random.
  The official code keeps all patches, up to 1.3 million for an MVTec AD class; those of 26,315 images would take 22 GB.
- The best epoch is chosen on valid. The official code evaluates on test in each of its 300 epochs, trains in 299 of
  them and keeps the last.
- The last layer of the position classifiers has normalised columns and is frozen from the start. The official code
  normalises it in such a way that no gradient reaches it.

As in the official code, a neighbour that would extend beyond the image is moved back into it, which makes some position
labels wrong.

Parameters: encoder 360,832 (32 pixels) + 41,152 (64 pixels), position classifiers 25,864 each, 1,024 of them frozen.
Note: until the position task is learned, nothing keeps the embeddings of different patches apart. While the position
losses in log.csv stay at ln 8 = 2.08 (chance), as in a run of 150 steps on the phantom, the embedding is meaningless.
The published training takes 100,000 steps or more.
Cost on one thread of a busy CPU, at 128 pixels with batches of 4: 71 s for 100 steps and filling the bank, 138 ms to
score an image against 10,000 patches, 0.96 GiB of memory. The default settings were not timed; a step takes 219 GFLOP.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common

DIM = 64  # D, length of an embedding (thesis, Table 3.2)
STRIDES = {64: 16, 32: 4}  # patch size K: stride of the test patches, in pixels (official code)
DIRECTIONS = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)])  # the 8 classes
NOISE = 0.02  # standard deviation of noise added to position pairs: once per channel, once per value (official code)


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
    """images are resized to this width and height in pixels (official code); a multiple of 16, at least 80"""
    batch_size: Annotated[int, Ge(1)] = 64
    """pairs per batch for each loss (official code); images per batch when scoring"""
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
    """passes over the normal training images, each using every image --repeat times (official code)"""
    lr: Annotated[float, Gt(0)] = 1e-4
    """Adam's learning rate (official code)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    repeat: Annotated[int, Ge(1)] = 100
    """number of times each image is used per epoch, each time with new patches (official code)"""
    svdd: Annotated[float, Interval(ge=0, le=1)] = 0.9
    """lambda, weight of the two SVDD losses (thesis, Table 3.2; official code: 1, or 1e-3 in its example)"""
    bank: Annotated[int, Ge(1)] = 1_300_000
    """maximum number of patches in each scale's memory bank; every image keeps at least one (our choice)"""


def position_corners(count, size, patch):
    """Draw top-left pixels (count, 2) of patches and of one neighbour each, and the neighbours' directions (count,).

    Along each axis of its direction, the neighbour is shifted by 3/4 K to almost K pixels."""
    first = torch.randint(size - patch + 1, (count, 2))
    label = torch.randint(len(DIRECTIONS), (count,))
    offset = 3 * patch // 4 + torch.randint(patch // 4, (count, 2))
    return first, (first + DIRECTIONS[label] * offset).clamp(0, size - patch), label


def jittered_corners(count, size, patch):
    """Draw top-left pixels (count, 2) of patches and of copies shifted by up to K/32 per axis, but not by (0, 0)."""
    first = torch.randint(size - patch + 1, (count, 2))
    reach = patch // 32
    side = 2 * reach + 1
    move = torch.randint(side**2 - 1, (count,))
    move += move >= side**2 // 2  # skip (0, 0), the middle one of the side^2 moves
    move = torch.stack([move // side, move % side], dim=1) - reach
    return first, (first + move).clamp(0, size - patch)


def crop(image, corner, size):
    """Crop each image (B, C, H, W) to the patch with top-left pixel `corner` (B, 2): (B, C, size, size)."""
    y, x = (corner[:, axis, None] + torch.arange(size) for axis in (0, 1))  # (B, size)
    return image[torch.arange(len(image))[:, None, None], :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2)


def draw(image, patch):
    """Draw a position pair and an SVDD pair from each image (B, 3, H, W): patches (4B, 3, K, K), directions (B,).

    Order of patches: first and second of the position pairs (with noise), then first and second of the SVDD pairs."""
    *position, label = position_corners(len(image), image.shape[-1], patch)
    jittered = jittered_corners(len(image), image.shape[-1], patch)
    position, jittered = (torch.cat([crop(image, c, patch) for c in corners]) for corners in (position, jittered))
    shift = torch.randn_like(position[..., :1, :1])  # (2B, 3, 1, 1)
    position = position + NOISE * (shift + torch.randn_like(position))
    return torch.cat([position, jittered]), label.to(image.device)


def quadrants(patch):
    """Return the four quadrants of each patch in row-major order: (B, C, 64, 64) -> (4B, C, 32, 32)."""
    return patch.unflatten(3, (2, 32)).unflatten(2, (2, 32)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


class PositionClassifier(nn.Sequential):
    """A patch's embedding minus that of its neighbour (B, D) -> logits (B, 8) of the eight directions."""

    def __init__(self):
        super().__init__(nn.Linear(DIM, 128), nn.LeakyReLU(0.1), nn.Linear(128, 128), nn.LeakyReLU(0.1),
                         nn.Linear(128, len(DIRECTIONS)))
        self[-1].weight.requires_grad_(False).div_(self[-1].weight.norm(dim=0))


class PatchSVDD(nn.Module):
    def __init__(self, image_size):
        super().__init__()
        if image_size <= 64 or image_size % 16:
            raise common.Error(f"--image-size {image_size}: give a multiple of 16, at least 80: 80, 96, 112, ...")
        widths = 3, 32, 64, 128, 128, 64, 32, 32, DIM
        convs = [nn.Conv2d(a, b, 3, 1 + (a == 3)) for a, b in zip(widths, widths[1:], strict=False)]
        # 32x32 pixels -> 1x1, without padding; only the first layer has stride 2
        self.small = nn.Sequential(*(layer for conv in convs[:-1] for layer in (conv, nn.LeakyReLU(0.1))), convs[-1],
                                   nn.Tanh())
        self.join1, self.join2 = nn.Conv2d(DIM, 128, 2), nn.Conv2d(128, DIM, 1)
        self.position64, self.position32 = PositionClassifier(), PositionClassifier()
        self.register_buffer("mean", torch.zeros(3, image_size, image_size))  # of the training images at each pixel
        self.register_buffer("bank64", torch.zeros(0))  # (K, D) embeddings of normal patches
        self.register_buffer("bank32", torch.zeros(0))

    def load_state_dict(self, state, strict=True):
        for name in ("bank64", "bank32"):
            setattr(self, name, torch.zeros_like(state[name]))  # its length is only known after fitting
        return super().load_state_dict(state, strict)

    def join(self, h, dilation=1):
        """Combine the embeddings (B, D, h, w) of quadrants, `dilation` cells apart, into those of 64x64 patches."""
        h = F.conv2d(h, self.join1.weight, self.join1.bias, dilation=dilation)
        return torch.tanh(self.join2(F.leaky_relu(h, 0.1)))

    def losses(self, patches64, label64, patches32, label32):
        """Return four losses for patches from `draw` at both scales: position 64 and 32, SVDD 64 and 32."""
        parts = quadrants(patches64)
        h = self.small(torch.cat([parts, patches32]))  # (16B + 4B, D, 1, 1)
        h64 = self.join(h[: len(parts)].view(-1, 2, 2, DIM).permute(0, 3, 1, 2))  # (4B, D, 2, 2) -> (4B, D, 1, 1)
        position, svdd = [], []
        for h_k, classifier, label in ((h64, self.position64, label64), (h[len(parts) :], self.position32, label32)):
            first, second, patch, jittered = h_k.flatten(1).chunk(4)  # (B, D) each
            position.append(F.cross_entropy(classifier(first - second), label))
            svdd.append((patch - jittered).norm(dim=1).mean())  # paper, Eq. 2: the distance, not its square
        return *position, *svdd

    def embed(self, image):
        """(B, 3, H, W) -> embeddings (B, D, h, w) of 64-pixel patches at stride 16 and 32-pixel patches at stride 4.

        For a whole image, cell (i, j) of the encoder's output is the embedding of the 32x32 patch at pixel (2i, 2j)."""
        fine = torch.cat([self.small(x - self.mean)[..., ::2, ::2] for x in image.split(1)])  # one by one: less memory
        return self.join(fine[..., ::4, ::4], dilation=2), fine  # quadrants are 32 pixels apart, cells 16

    @torch.no_grad()
    def fit_mean(self, batches):
        """Compute the mean of the training images at each pixel, which is subtracted from all images."""
        total, count = 0, 0
        for image in batches:
            total, count = total + image.sum(dim=0), count + len(image)
        self.mean.copy_(total / count)

    @torch.no_grad()
    def fit(self, train, batch_size, device, limit):
        """Fill the banks with embeddings of training patches. Every call chooses the same patches."""
        chance, banks = torch.Generator().manual_seed(0), ([], [])
        keep = max(1, limit // len(train))  # patches per image
        for image in train.batches(batch_size, device):
            for bank, h in zip(banks, self.embed(image), strict=True):
                h = h.flatten(2).mT  # (B, P, D)
                if keep < h.shape[1]:
                    chosen = torch.rand(h.shape[:2], generator=chance).argsort(dim=1)[:, :keep]
                    h = h.take_along_dim(chosen[..., None].to(device), dim=1)
                bank.append(h.flatten(0, 1))
        self.bank64, self.bank32 = map(torch.cat, banks)

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map (B, H, W; the product of both scales' maps) and its maximum, the score (B,)."""
        self.eval()
        anomaly_map = torch.cat([self.localize(x) for x in image.split(1)])  # one by one: rounding depends on the batch
        return anomaly_map, anomaly_map.amax(dim=(1, 2))

    def localize(self, image):
        """Return the map (1, H, W) of one image. Rounding matters for patches that almost equal one in the bank."""
        anomaly_map = 1
        for (k, stride), h, bank in zip(STRIDES.items(), self.embed(image), (self.bank64, self.bank32), strict=True):
            distance = nearest(h[0].flatten(1).T, bank).view(1, *h.shape[2:])  # (1, D, h, w) -> (1, h, w)
            anomaly_map = anomaly_map * spread(distance, image.shape[-1], k, stride)
        return anomaly_map


def nearest(points, bank, rows=8192):
    """Return the distance (n,) from each of the points (n, D) to the nearest row of the bank (K, D).

    The nearest row is found by matrix products, as |a|^2 - 2ab + |b|^2, which loses precision where a and b almost
    coincide. The distance itself is therefore computed from the difference."""
    middle = bank.mean(dim=0)  # subtracted to reduce cancellation error
    best = torch.full((len(points),), torch.inf, device=points.device)  # squared distance minus |a|^2
    index = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for start in range(0, len(bank), rows):
        part = bank[start : start + rows] - middle
        value, row = torch.addmm(part.square().sum(dim=1), points - middle, part.T, alpha=-2).min(dim=1)  # (n,) each
        index = torch.where(value < best, row + start, index)
        best = torch.minimum(best, value)
    return (points - bank[index]).norm(dim=1)


def spread(distance, size, patch, stride):
    """Return the mean distance of the patches that cover each pixel: (B, h, w) -> (B, size, size).

    The mean is separable: one matrix product along each axis."""
    h = distance.shape[-1]
    offset = torch.arange(size)[:, None] - stride * torch.arange(h)
    covers = ((offset >= 0) & (offset < patch)).to(distance)  # (size, h)
    share = covers / covers.sum(dim=1, keepdim=True)
    return share @ distance @ share.T


def build_model(args):
    return PatchSVDD(args.image_size)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        model.fit_mean(train.batches(args.batch_size, run.device))
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), args.lr)
        for epoch in run.epochs(model, optimizer):
            order = np.random.default_rng((args.seed, epoch)).permutation(args.repeat * len(train)) % len(train)
            history = []
            for start in common.progress(range(0, len(order), args.batch_size), f"epoch {epoch}"):
                image = train.batch(order[start : start + args.batch_size], run.device) - model.mean
                position64, position32, svdd64, svdd32 = losses = model.losses(*draw(image, 64), *draw(image, 32))
                loss = position64 + position32 + args.svdd * (svdd64 + svdd32)  # paper, Eq. 6
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                history.append(torch.stack(losses).detach())
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                model.fit(train, args.batch_size, run.device, args.bank)
            names = "position64", "position32", "svdd64", "svdd32"
            run.validate(model, epoch, valid, **dict(zip(names, torch.stack(history).mean(0).tolist(), strict=True)))
    common.finish(run, model, (train, valid, test))
