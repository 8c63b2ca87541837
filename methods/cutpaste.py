"""CutPaste (Li, Sohn, Yoon, Pfister, CVPR 2021, arXiv:2104.04015).

A network learns to distinguish normal images from images in which a patch, or a thin rotated "scar", was copied and
pasted elsewhere. Features that reveal such discontinuities also reveal real anomalies. A Gaussian is fitted to the
embeddings of the normal training images; the anomaly score of an image is its Mahalanobis distance.

Settings: thesis, Table 3.5 (ResNet-18, frozen for the first 20 epochs; SGD with learning rate 0.03; batches of 64).
There is no official code. Where the thesis is silent, we follow BMAD's code (DorisBao/BMAD, the thesis' benchmark), a
copy of the unofficial Runinho/pytorch-cutpaste: ImageNet weights for the backbone, PyTorch's default initialisation for
the head, 3-way classification, a head with 512, 512 and 128 units, and 256 epochs of ONE step (3 x 64 images).
Differences from the paper: the paper trains from scratch for 256 epochs of 256 steps (here: --weights none
--freeze-epochs 0 --steps-per-epoch 256), translates images at random and does not shrink the covariance.
Differences from Runinho's code:
- All training images are used (Runinho: only the first 3,000 files).
- Images are floats and are not rounded to 256 levels after each operation.
- A Gaussian is fitted before each validation, and the best epoch is chosen on valid (thesis, 3.4.1; Runinho: the last
  step).
- The cosine schedule lowers the learning rate from the second step on (Runinho: from the third).
- Scars lie fully inside the image (Runinho swaps their width and height when choosing the position).

As in the published method, a black patch pasted onto black changes nothing, so the label is wrong; results.json records
the fraction of such images. Images get a score but no anomaly map (thesis: NA).
Parameters: 11.18 M (ResNet-18) + 0.59 M (head, used only in training).

Cost on one CPU thread with mobilenet_v2 at 128 pixels: 25 s for 60 steps with 12 images (36 with the pasted copies) and
four validations, each with a fit to 200 images; 13 ms to score an image; 2.0 GiB of memory. With the published settings
on an H100, a step with 64 images takes 0.05 s, plus 0.34 s for their augmentation.
"""

import math
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

CLASSIFIER = {"resnet18": "fc", "resnet50": "fc", "wide_resnet50_2": "fc", "mobilenet_v2": "classifier"}


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
    image_size: Annotated[int, Ge(32)] = 256
    """images are resized to this width and height in pixels (BMAD's code); scars are always at most 31 pixels long"""
    batch_size: Annotated[int, Ge(1)] = 64
    """images per batch (thesis, Table 3.5); each is used three times in training: normal, CutPaste, scar"""
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
    epochs: Annotated[int, Ge(1)] = 256
    """number of epochs with --steps-per-epoch steps each (BMAD's code, paper)"""
    steps_per_epoch: Annotated[int, Ge(1)] = 1
    """number of steps per epoch (BMAD's code; paper: 256)"""
    lr: Annotated[float, Gt(0)] = 0.03
    """SGD's learning rate at the start of its cosine schedule (thesis, Table 3.5)"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    freeze_epochs: Annotated[int, Ge(0)] = 20
    """number of initial epochs that train only the head (thesis, Table 3.5); ignored for untrained weights"""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """SGD's momentum (Runinho)"""
    weight_decay: Annotated[float, Ge(0)] = 3e-5
    """SGD's L2 penalty (Runinho)"""
    backbone: str = "resnet18"
    """torchvision network: resnet18 (thesis), resnet50, wide_resnet50_2, mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""


# --------------------------------------------------------------------------------------------------------- augmentation
# All settings are Runinho's. Random numbers come from PyTorch's CPU generator, so they do not depend on the device.
def uniform(low, high):
    return torch.empty(1).uniform_(low, high).item()


def jitter(image):
    from torchvision.transforms.v2 import ColorJitter  # imported here to keep --help fast

    return ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1)(image)


def corner(image, height, width):
    """Return the top left corner of a random rectangle that lies fully inside the image (3, H, W)."""
    return int(uniform(0, image.shape[1] - height)), int(uniform(0, image.shape[2] - width))


def cut(image, height, width):
    """Return a jittered copy of a random rectangle of the image: (3, H, W) -> (3, height, width)."""
    top, left = corner(image, height, width)
    return jitter(image[:, top : top + height, left : left + width])


def paste(image, patch, mask):
    """Copy the image and paste, at a random position, the pixels of patch (3, h, w) where mask (1, h, w) is true."""
    _, height, width = patch.shape
    top, left = corner(image, height, width)
    image = image.clone()
    target = image[:, top : top + height, left : left + width]  # a view
    target.copy_(torch.where(mask, patch, target))
    return image


def cutpaste(image):
    """Paste a large rectangle. Its area and the logarithm of its aspect ratio are uniformly distributed."""
    area = uniform(0.02, 0.15) * image.shape[1] * image.shape[2]
    aspect = math.exp(uniform(math.log(0.3), math.log(1 / 0.3)))
    patch = cut(image, height=round(math.sqrt(area / aspect)), width=round(math.sqrt(area * aspect)))
    return paste(image, patch, torch.ones_like(patch[:1], dtype=torch.bool))


def scar(image):
    """Paste a thin, rotated rectangle; the corners of its bounding box are transparent."""
    from torchvision.transforms.v2.functional import rotate

    width, height = round(uniform(2, 16)), round(uniform(10, 25))  # pixels
    patch = cut(image, height, width)
    opaque = torch.ones_like(patch[:1])
    rotated = rotate(torch.cat([patch, opaque]), uniform(-45, 45), expand=True)  # (4, h, w); degrees
    return paste(image, rotated[:3], rotated[3:] > 0)


@torch.no_grad()
def three_way(batch):
    """(B, 3, H, W) -> (3B, 3, H, W), labels (3B,): jittered (0), jittered with CutPaste (1) or a scar (2)."""
    normal = [jitter(image) for image in batch]
    images = [*normal, *(cutpaste(image) for image in normal), *(scar(image) for image in normal)]
    return torch.stack(images), torch.arange(3, device=batch.device).repeat_interleave(len(batch))


# ---------------------------------------------------------------------------------------------------------------- model
class CutPaste(nn.Module):
    def __init__(self, backbone, weights):
        super().__init__()
        if backbone not in CLASSIFIER:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(CLASSIFIER)}, or add it to CLASSIFIER")
        self.backbone = common.pretrained_network(backbone, weights)  # trained, so the checkpoint includes it
        classifier = self.backbone.get_submodule(CLASSIFIER[backbone])
        width = [m for m in classifier.modules() if isinstance(m, nn.Linear)][-1].in_features
        setattr(self.backbone, CLASSIFIER[backbone], nn.Identity())  # (B, D): average pooling becomes the last layer
        self.head = nn.Sequential(
            nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU(),
            nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(),
            nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, 3))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whiten", torch.eye(width))

    def forward(self, image):
        """Return the paper's g(x): logits (B, 3) for normal, CutPaste and scar."""
        return self.head(self.backbone(common.normalize(image)))

    def embed(self, image):
        """Return the paper's f(x): embeddings (B, D), scaled to unit length (Runinho)."""
        return F.normalize(self.backbone(common.normalize(image)))

    @torch.no_grad()
    def fit(self, batches):
        """Fit a Gaussian to the embeddings of normal images, without augmentation and with batch norm in eval mode."""
        self.eval()
        e = torch.cat([self.embed(image).cpu() for image in batches]).double()  # (N, D): 2 kB per image with ResNet-18
        if not e.isfinite().all():
            raise common.Error("training diverged (the embeddings are not finite); lower --lr")
        mean = e.mean(dim=0)
        from sklearn.covariance import ledoit_wolf  # imported here to keep --help fast

        sigma = torch.from_numpy(ledoit_wolf((e - mean).numpy(), assume_centered=True)[0])
        self.mean.copy_(mean)
        self.whiten.zero_()
        if sigma.trace() > 1e-20:  # otherwise all embeddings are equal, and all distances 0
            cholesky = torch.linalg.cholesky_ex(sigma).L  # Sigma = L L^T
            inverse = torch.linalg.solve_triangular(cholesky, torch.eye(len(mean)).double(), upper=False)
            self.whiten.copy_(inverse)

    @torch.inference_mode()
    def predict(self, image):
        """Return None (no anomaly map) and, as the score (B,), the Mahalanobis distance (monotonic in -log p)."""
        self.eval()
        # (f - mu)^T Sigma^-1 (f - mu) = |L^-1 (f - mu)|^2
        return None, ((self.embed(image) - self.mean) @ self.whiten.T).norm(dim=1)


def build_model(args):
    return CutPaste(args.backbone, args.weights)


def batch_of(train, step, args, device):
    """Return the images of a step (0, 1, ...). The training images are reshuffled for each pass."""
    number, position = divmod(step, max(1, len(train) // args.batch_size))
    order = np.random.default_rng((args.seed, number)).permutation(len(train))
    return train.batch(order[position * args.batch_size :][: args.batch_size], device)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        if len(train) < 3:
            raise common.Error(f"{len(train)} training images are too few for a covariance: give at least 3")
        optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * args.steps_per_epoch)
        freeze_epochs = args.freeze_epochs if model.backbone.weights_used["trained"] else 0
        unchanged = []  # for each pasted image since the last validation: whether it equals the original
        for epoch in run.epochs(model, optimizer, schedule):
            model.train()  # even a frozen backbone updates its batch norm statistics (Runinho)
            model.backbone.requires_grad_(epoch > freeze_epochs)
            losses = []
            for step in range((epoch - 1) * args.steps_per_epoch, epoch * args.steps_per_epoch):
                image, label = three_way(batch_of(train, step, args, run.device))
                loss = F.cross_entropy(model(image), label)  # paper, Eq. 1, with three classes (Sec. 2.2)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                normal, *pasted = image.chunk(3)
                unchanged += [(other == normal).flatten(1).all(dim=1) for other in pasted]
            if epoch % args.eval_every == 0 or epoch == args.epochs:
                run.notes["pasted_without_change"] = float(torch.cat(unchanged).float().mean())
                unchanged = []
                model.fit(train.batches(args.batch_size, run.device))
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
