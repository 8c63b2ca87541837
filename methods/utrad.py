"""UTRAD (Chen, You, Zhang, Xi, Le, Neural Networks 147:53-62, 2022; not on arXiv).

The features of a pretrained CNN are the tokens of a U-shaped transformer autoencoder. Attention acts within groups of
4x4 tokens, then between the groups. Each skip connection of the U passes through a bottleneck, so that it cannot simply
copy the tokens. The autoencoder is trained on normal images and fails to reconstruct anomalies. The anomaly score of a
position is its reconstruction error divided by the expected error, which a second head predicts.

    64x64 --> encoder --> 16x16 --> encoder --> 4x4 --> encoder --> 1 token    each group of 4x4 becomes one token
                 | skip                | skip              | skip     |        through a bottleneck
    64x64 <-- decoder <-- 16x16 <-- decoder <-- 4x4 <-- decoder <-----+        each token becomes a group of 4x4

Settings: thesis, Table 3.6 (ReLU, batches of 8, Adam with learning rate 1e-4). The thesis gives neither epochs nor
augmentation, so we follow the code of its benchmark (DorisBao/BMAD): 150 epochs, no augmentation. Architecture,
initialisation and score are those of the official code, gordon-chenmo/UTRAD.
Differences from the official code:
- The activation is ReLU, as in the thesis (official code and BMAD: `--activation gelu`).
- As in BMAD's code, batches have 8 images instead of 2, and training images are not padded, rotated or cropped.
- Images are resized to a square, since the token grid must be square (official code: their short side is resized).
- The best epoch is chosen on valid (thesis, 3.4.1; official code: the one with the lowest training loss).
- The expected error |std|, by which the error is divided, is at least 1e-6; in the official code, it can be zero.
- At image sizes other than 256, tokens are grouped 4x4 as long as the grid is divisible by 4, and the remaining tokens
  form the last group (2x2 at 128 pixels). The scales of the score follow from the group sizes.
- On a GPU, the transformer runs in bfloat16 (autocast), since its dense layers dominate the cost.

We keep three details of the official code that look accidental. The position embeddings (of the whole grid and within
groups) are random and never trained. The encoders of all levels share one final norm, and the decoders another. Within
each encoder or decoder, all layers start with the same weights in the input projections of attention.

Parameters: 91.719 M as published, 2.122 M of them fixed position embeddings; another 2.783 M are frozen in resnet18.
In short runs, dividing by the expected error hurts, since the second head has not learned it yet (see loss_std in
log.csv). After 800 steps of `--width 64 --layers 1 --batch-size 2 --lr 3e-3` on the phantom at 64 pixels, pixel AUROC
is 0.74, or 0.87 without the division.
Cost: 275 GFLOP to score an image of 256 pixels (counted); training takes three times as many. On one thread of a busy
CPU, with 200 phantom images, 128 pixels, mobilenet_v2, `--width 128 --layers 1`: 176 s for 4 epochs, 81 ms to score an
image, 1.5 GiB of memory.
"""

import sys
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common

# Layers with strides 4, 8 and 16; together they have 448 (resnet18) or 152 (mobilenet_v2) channels.
LAYERS = {
    "resnet18": ["layer1", "layer2", "layer3"],
    "mobilenet_v2": ["features.3", "features.6", "features.13"],  # our choice: no published setting
}
SIDE = 4  # tokens along a group's side
HEADS, DROPOUT = 8, 0.1
BETAS = (0.5, 0.999)  # of Adam
MIN_STD = 1e-6


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
    """images are resized to this width and height in pixels (the thesis' benchmark); a multiple of 16"""
    batch_size: Annotated[int, Ge(1)] = 8
    """images per batch (thesis, Table 3.6)"""
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
    epochs: Annotated[int, Ge(1)] = 150
    """passes over the normal training images (BMAD's code, official code)"""
    lr: Annotated[float, Gt(0)] = 1e-4
    """Adam's learning rate (thesis, Table 3.6); for runs of a few hundred steps, use 3e-3"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    backbone: str = "resnet18"
    """torchvision network: resnet18, mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""
    cache_features: Annotated[float, Ge(0)] = 16
    """maximum disk space in GiB for cached features of the training images; 0: recompute them in each epoch"""
    activation: Literal["relu", "gelu"] = "relu"
    """activation in the transformers (thesis, Table 3.6; BMAD's code and official code: gelu)"""
    width: Annotated[int, Ge(1)] = 512
    """d, channels per token; the feed-forward layers have four times as many (official code)"""
    layers: Annotated[int, Ge(1)] = 4
    """number of transformer layers in each encoder and decoder (official code)"""


class Level(nn.Module):
    """One level of the U: P x P groups of S x S tokens with d channels. Each group is a sequence."""

    def __init__(self, side, width, layers, activation, encoder_norm, decoder_norm):
        super().__init__()
        shape = dict(d_model=width, nhead=HEADS, dim_feedforward=4 * width, dropout=DROPOUT, activation=activation,
                     batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**shape), layers, encoder_norm,
                                             enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**shape), layers, decoder_norm)
        self.bottleneck = nn.Sequential(nn.Linear(width, width // 4), nn.LayerNorm(width // 4), nn.GELU(),
                                        nn.Linear(width // 4, width), nn.LayerNorm(width))
        self.register_buffer("position", torch.randn(side**2, width))  # a buffer, since it is never trained
        self.query = nn.Parameter(torch.randn(side**2, width))  # the same for all groups
        self.side = side

    def down(self, x):
        """Encode: tokens (B, P*S, P*S, d) -> one token per group (B, P, P, d) and skip connection (B*P*P, S*S, d)."""
        b, h, w, d = x.shape
        s = self.side
        x = x.view(b, h // s, s, w // s, s, d).transpose(2, 3).reshape(-1, s * s, d)
        x = F.dropout(x + self.position, DROPOUT, self.training)
        x = self.encoder(F.pad(x, (0, 0, 1, 0)))  # the added first token summarises the group
        return x[:, 0].view(b, h // s, w // s, d), self.bottleneck(x[:, 1:])

    def up(self, x, skip):
        """Decode: tokens (B, P, P, d) and skip connection (B*P*P, S*S, d) -> tokens (B, P*S, P*S, d)."""
        b, p, q, d = x.shape
        s = self.side
        memory = torch.cat([x.reshape(-1, 1, d), skip], dim=1)  # (B*P*P, 1 + S*S, d)
        x = self.decoder(self.query.expand(len(memory), -1, -1), memory)
        return x.view(b, p, q, s, s, d).transpose(2, 3).reshape(b, p * s, q * s, d)


class UTRAD(nn.Module):
    """Shapes: C feature channels, h x h tokens (64 x 64 for images of 256 pixels)."""

    def __init__(self, backbone, weights, image_size, width, layers, activation):
        super().__init__()
        if backbone not in LAYERS:
            raise common.Error(f"--backbone {backbone}: choose {', '.join(LAYERS)}, or add its layers to LAYERS")
        if image_size < 16 or image_size % 16:
            raise common.Error(f"--image-size {image_size}: give a multiple of 16, such as 64, 128 or 256")
        if width % HEADS:
            raise common.Error(f"--width {width}: give a multiple of {HEADS}")
        self.backbone = common.feature_extractor(backbone, LAYERS[backbone], weights)
        channels, grid = self.features(torch.zeros(1, 3, image_size, image_size)).shape[1:3]
        sides, rest = [], grid
        while rest % SIDE == 0:
            sides, rest = [*sides, SIDE], rest // SIDE
        sides += [rest] * (rest > 1)
        self.scales = [1, *accumulate(sides, mul)]  # side lengths in tokens: 1, 4, 16, 64 at 256 pixels
        norms = nn.LayerNorm(width), nn.LayerNorm(width)  # one for all encoders, one for all decoders
        self.embed = nn.Conv2d(channels, width, 1, bias=False)
        self.register_buffer("position", torch.randn(width, grid, grid))  # a buffer, since it is never trained
        self.levels = nn.ModuleList(Level(side, width, layers, activation, *norms) for side in sides)
        self.recon = nn.Conv2d(width, channels, 1, bias=False)
        std = []
        for i, o in [(1, 1), (1, 2), (2, 4), (4, 8)]:
            std += [nn.Conv2d(width // i, width // o, 1, bias=False), nn.BatchNorm2d(width // o), nn.LeakyReLU(0.2)]
        self.std = nn.Sequential(*std, nn.Conv2d(width // 8, 1, 1, bias=False))
        for part in (self.embed, self.levels, self.recon, self.std):
            for module in part.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):  # attention's input projection keeps its Xavier weights
                    nn.init.normal_(module.weight, 0, 0.02)
                elif isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.weight, 1, 0.02)

    @torch.no_grad()
    def features(self, image):
        """Return the frozen features F of all layers on the finest grid: (B, 3, H, W) -> (B, C, h, h)."""
        first, *deeper = self.backbone(common.normalize(image)).values()
        return torch.cat([first, *(F.interpolate(f, first.shape[-2:]) for f in deeper)], dim=1)  # by nearest neighbour

    def forward(self, features):
        """features (B, C, h, h) -> reconstruction (B, C, h, h) and, up to sign, expected error (B, 1, h, h)."""
        with torch.autocast("cuda", torch.bfloat16, enabled=features.is_cuda):
            x = F.dropout(self.embed(features) + self.position, DROPOUT, self.training)
            x, skips = x.permute(0, 2, 3, 1).contiguous(), []  # (B, h, h, d)
            for level in self.levels:
                x, skip = level.down(x)
                skips.append(skip)
            for level in reversed(self.levels):
                x = level.up(x, skips.pop())
        x = x.permute(0, 3, 1, 2)  # float32 again: autocast runs the final norm in float32
        return self.recon(x), self.std(x.detach())  # detached, or the model would learn to err predictably

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map (B, H, W; the mean of `ratio` over scales) and its maximum, the score (B,)."""
        self.eval()
        features = self.features(image)
        recon, std = self(features)
        ratio = (recon - features).norm(dim=1, keepdim=True) / std.abs().clamp(min=MIN_STD)  # (B, 1, h, h)
        pooled = [F.interpolate(F.avg_pool2d(ratio, scale), ratio.shape[-2:], mode="bilinear") for scale in self.scales]
        anomaly_map = F.interpolate(sum(pooled) / len(pooled), image.shape[-2:], mode="bilinear")[:, 0]
        return anomaly_map, anomaly_map.amax(dim=(1, 2))


def losses(features, recon, std):
    """Return the mean squared errors, over all tokens, of the reconstruction and of the expected error."""
    error = (recon - features).detach().norm(dim=1, keepdim=True)
    return F.mse_loss(recon, features), F.mse_loss(std, error)


def build_model(args):
    return UTRAD(args.backbone, args.weights, args.image_size, args.width, args.layers, args.activation)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    torch.use_deterministic_algorithms(True, warn_only=run.device.type != "cuda")  # otherwise attention varies on GPUs
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        optimizer = torch.optim.Adam(model.parameters(), args.lr, BETAS)  # frozen parameters get no gradient
        frozen = common.Features(lambda image: [model.features(image)], train, args, run)
        for epoch in run.epochs(model, optimizer):
            logged = []
            model.train()
            for (features,) in frozen.batches(args.batch_size, shuffle=(args.seed, epoch)):
                loss_recon, loss_std = losses(features, *model(features))
                optimizer.zero_grad()
                (loss_recon + loss_std).backward()
                optimizer.step()
                logged.append(torch.stack([loss_recon, loss_std]).detach())
            recon, std = torch.stack(logged).mean(dim=0).tolist()
            run.validate(model, epoch, valid, loss=recon, loss_std=std)
    common.finish(run, model, (train, valid, test))
