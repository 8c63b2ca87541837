"""clip_recon (Bao, MSc thesis, University of Alberta 2024, chapter 4: language-enhanced reconstruction with CLIP).

CLIP's image encoder gives each patch of an image one feature at each of four depths. CLIP's text encoder must reproduce
these features from learned "blank" words. Each patch location has its own words, which an adapter shifts according to
the patch's deepest feature. Both encoders are frozen; the words and the adapter are trained on normal images. A patch
is anomalous if the two encoders disagree.

    image -> augmentation -> image encoder -> features f^1 ... f^4 -------------> M^k = 1 - cos(f^k, p^k)
                                                             | adapter: pi_i         ^
             words T_i + pi_i of each patch location i ------+---> text encoder -> p^1 ... p^4

Eq. 4.1, 4.2: text_i = [SOS, T_i + pi_i, EOT] with pi_i = h(f_i^last); f^last is from the last block (by default f^4)
Eq. 4.3:      M_i^k = 1 - cos(f_i^k, p_i^k)     Eq. 4.5: loss = sum over k of the mean of M_i^k over i
The anomaly map is S = sum over k of Psi(M^k), where Psi upsamples bilinearly. Eq. 4.7 to 4.9 define the augmentation.

Settings: thesis, 4.3.3; there is no public code. Where the thesis is silent, the text side follows CoCoOp (Zhou et al.,
CVPR 2022, arXiv:2203.05557), which conditions its prompt on the image as this method does on the patch. The map and the
loss follow RD4AD (arXiv:2201.10703). As in AnoVL (Deng et al., 2023, arXiv:2308.15939), we use blocks 3, 6, 9 and 12
and apply CLIP's own final norm and projection to each of them.
Decisions where the thesis is ambiguous; flags give other likely readings (see also --blocks, --join, --smooth-sigma):
- The image side is not trained. If it were, both sides would collapse to the same constant.
- The text feature is read at EOT (after SOS and the words), as in CoOp's code (`--frame bare`: at the last word).
  The text is not padded to 77 tokens: attention is causal, so padding would change nothing.
- The loss minimises 1 - cos, although the thesis says that it minimises the similarity. The cosine is taken at each
  position (`--loss layer`: over each layer as one long vector, as in RD4AD's code). The sum over channels in Eq. 4.4 is
  omitted, since the cosine already sums over them.
- The "augmentation" (4.2.3) is deterministic and applied in both training and testing. It adds two images and halves
  the sum to stay in [0, 1] (`--da-sum saturate`: clips it at 1).
- The text of the thesis does not define the module combinations of Figure 4.7. We assume that `prompts` (see --modules)
  has no adapter (pi = 0) and that `adapter` keeps the words at their initial values: Eq. 4.2 always contains T_i, and
  4.2.1 calls the prompt blank, not absent.
- The thesis does not say how a ResNet replaces CLIP's image encoder (Table 4.1). Here, the ResNet's stages are pooled
  to the ViT's grid, normalised over channels and projected to the text features' width by a frozen orthonormal matrix.
  A learned projection with frozen targets would be just as plausible.
- We use batches of 8 and AdamW's defaults without a schedule. The best epoch is chosen on valid, as in chapter 3.
- CLIP was trained at 240 pixels. Its position embeddings are interpolated to 256, as in open_clip.

On a GPU, both encoders and the adapter run in bfloat16; cosines, loss and updates use float32. The published adapter
has 16 times fewer hidden units than inputs, so pi_i may vary so little that p^k is the same for all images. With
`--adapter-reduction 0.25`, it has four times as many hidden units as inputs; see tests/README.md.

Trained parameters: words 2,621,440, adapter 51,880. Cost of the default settings on one CPU thread: 17 s per training
image (image encoder 0.9 s, text encoder 8.0 s forward and 7.9 s backward), 8 s to score an image; 1.8 GiB of memory,
and more in training (see --batch-size).
"""

import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common

STAGES = {  # stages 1 to 4 of the other backbones, with strides 4, 8, 16 and 32
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "resnet50": ["layer1", "layer2", "layer3", "layer4"],
    "mobilenet_v2": ["features.3", "features.6", "features.13", "features.17"],  # our choice: no published setting
}
SOS, EOT = 49406, 49407  # ids of the tokens that start and end a text in CLIP


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
    """images are resized to this width and height in pixels (thesis, 4.3.3)"""
    batch_size: Annotated[int, Ge(1)] = 8
    """images per batch (our choice: the thesis is silent); in training, each image needs 1.3 GiB of memory on a CPU"""
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
    epochs: Annotated[int, Ge(1)] = 400
    """passes over the normal training images (thesis, 4.3.3)"""
    lr: Annotated[float, Gt(0)] = 1e-3
    """AdamW's learning rate (thesis, 4.3.3); for runs of a few hundred steps, use 1e-2"""
    eval_every: Annotated[int, Ge(1)] = 10
    """validate every N epochs; the best checkpoint is kept"""
    model: str = "ViT-B-16-plus-240"
    """CLIP model: the open_clip name of a model whose image encoder is a ViT, or tiny (no published weights)"""
    clip_weights: str = "laion400m_e32"
    """CLIP weights: an open_clip TAG, none (untrained), auto (laion400m_e32 if available, else none) or a FILE"""
    backbone: str = "clip"
    """image encoder: clip (CLIP's own), resnet18, resnet50 (thesis, Table 4.1), mobilenet_v2"""
    weights: str = "imagenet"
    """backbone weights: imagenet (torchvision), none (untrained), auto (imagenet if available, else none) or a FILE"""
    cache_features: Annotated[float, Ge(0)] = 16
    """maximum disk space in GiB for cached features of the training images; 0: recompute them in each epoch"""
    prompt_tokens: Annotated[int, Interval(ge=1, le=75)] = 16
    """M, number of learned words at each patch location (thesis, 4.3.3)"""
    layers: Annotated[tuple[int, ...], Interval(ge=1, le=4)] = (1, 2, 3, 4)
    """layers k whose anomaly maps M^k are added (thesis, 4.3.4)"""
    blocks: Literal["stages", "first"] = "stages"
    """blocks of both encoders used as layers 1 to 4; stages: the last block of each quarter (3, 6, 9, 12 of 12);
    first: the first four blocks (the adapter still reads the last block)"""
    frame: Literal["sos-eot", "bare"] = "sos-eot"
    """sos-eot: words between SOS and EOT tokens, read at EOT (CoOp's code); bare: words only, read at the last word"""
    join: Literal["add", "append"] = "add"
    """add: pi is added to each word (Eq. 4.2); append: pi is an additional word after the others (4.2.1)"""
    modules: Literal["both", "prompts", "adapter"] = "both"
    """parts to train (thesis, Figure 4.7); prompts: no adapter; adapter: words fixed at their initial values"""
    loss: Literal["position", "layer"] = "position"
    """position: 1 - cos averaged over positions (Eq. 4.5); layer: 1 - cos of each layer as one vector (RD4AD's code)"""
    adapter_reduction: Annotated[float, Gt(0)] = 16
    """ratio of the adapter's input width to its hidden width (thesis, 4.2.2); 0.25: hidden layer four times as wide"""
    da_levels: Annotated[int, Ge(0)] = 3
    """K, number of pyramid levels in the augmentation (our choice: the thesis is silent); 0: no augmentation"""
    da_sum: Literal["half", "saturate"] = "half"
    """how to add the image I and its low frequencies S; half: (I + S) / 2; saturate: min(I + S, 1)"""
    smooth_sigma: Annotated[int, Ge(0)] = 0
    """standard deviation in pixels of the Gaussian filter that smooths the map; 0: no filter; 4: as in RD4AD"""
    patches_per_step: Annotated[int, Ge(1)] = 256
    """number of random patch locations per training step; a 256x256 image has 256 in total"""


# ------------------------------------------------------------------------------------------------- model (thesis 4.2.2)
class ClipRecon(nn.Module):
    """Shapes: P patch locations with M words each; D: width of CLIP's joint space, W: width of its text encoder."""

    def __init__(self, args):
        super().__init__()
        self.args, self.layers = args, sorted(set(args.layers))
        clip = common.load_clip(args.model, args.clip_weights, args.image_size)
        self.clip, self.grid, width = clip, clip.visual.grid_size, clip.visual.output_dim
        depth, text_depth = len(clip.visual.transformer.resblocks), len(clip.transformer.resblocks)
        if args.blocks == "stages":
            self.image_blocks, text_blocks = ([ceil(k * d / 4) for k in (1, 2, 3, 4)] for d in (depth, text_depth))
        else:
            self.image_blocks, text_blocks = sorted({1, 2, 3, 4, depth}), [1, 2, 3, 4]  # adapter reads the last block
        self.text_blocks = [text_blocks[k - 1] for k in self.layers]
        # keep the two token embeddings that are used, and free the memory of the other 49,406 (126 MB)
        clip.token_embedding = nn.Embedding.from_pretrained(clip.token_embedding.weight[[SOS, EOT]].clone()).eval()
        self.cnn_encoder = None
        if args.backbone != "clip":
            clip.visual = None
            self.cnn_encoder = CNNEncoder(args.backbone, args.weights, self.grid, width)

        words = 0.02 * torch.randn(self.grid[0] * self.grid[1], args.prompt_tokens, clip.transformer.width)
        self.prompts = nn.Parameter(words, requires_grad=args.modules != "adapter")  # T of Eq. 4.1: (P, M, W)
        self.adapter = None  # h_theta
        if args.modules != "prompts":
            hidden = max(1, round(width / args.adapter_reduction))
            self.adapter = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, words.shape[2]))

    @torch.no_grad()
    def image_features(self, image):
        """Return the frozen features [(B, P, D)]: f^1 to f^4, then f^last if it is not already f^4."""
        if self.args.da_levels:
            image = enhance(image, self.args.da_levels, self.args.da_sum)
        with torch.autocast("cuda", torch.bfloat16, enabled=image.is_cuda):
            return self.cnn_encoder(image) if self.cnn_encoder else image_features(self.clip, image, self.image_blocks)

    def words(self, last, prompts):
        """Return the text encoder's input (B, P, tokens, W), Eq. 4.2; B is 1 without an adapter."""
        words = prompts[None]  # (1, P, M, W)
        if self.adapter:
            pi = self.adapter(F.normalize(last.float(), dim=-1))[:, :, None]  # h(f^last): (B, P, D) -> (B, P, 1, W)
            words = (words + pi if self.args.join == "add" else
                     torch.cat([words.expand(len(pi), -1, -1, -1), pi], dim=2))  # (B, P, M or M + 1, W)
        if self.args.frame == "sos-eot":
            sos, eot = (e.expand(*words.shape[:2], 1, -1) for e in self.clip.token_embedding.weight)
            words = torch.cat([sos, words, eot], dim=2)
        return words

    def distances(self, features, where=slice(None), whole=False):
        """Return M^k (Eq. 4.3) for each layer k: (B, P), in [0, 2], from `image_features` at the locations `where`.

        whole: treat each layer as one vector over all positions, and return 1 - cos (B,) per layer."""
        features = [f[:, where] for f in features]
        with torch.autocast("cuda", torch.bfloat16, enabled=self.prompts.is_cuda):
            words = self.words(features[-1], self.prompts[where])
            # no torch.no_grad here: gradients must flow through the frozen encoder to the words
            texts = text_features(self.clip, words.flatten(0, 1), self.text_blocks)
        pairs = [(features[k - 1].float(), p.float().unflatten(0, words.shape[:2]))  # f^k, p^k: (B, P, D)
                 for k, p in zip(self.layers, texts, strict=True)]
        if whole:
            pairs = [(f.flatten(1), p.flatten(1)) for f, p in pairs]  # (B, P * D)
        return [1 - F.cosine_similarity(f, p, dim=-1) for f, p in pairs]

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map S (B, H, W; the sum of all upsampled M^k) and its maximum, the score (B,)."""
        self.eval()
        total = sum(self.distances(self.image_features(image))).unflatten(1, self.grid)  # sum first: Psi is linear
        # corners are not aligned, unlike in RD4AD, so that a patch's value lies at its centre
        anomaly_map = F.interpolate(total[:, None], image.shape[-2:], mode="bilinear")[:, 0]
        if self.args.smooth_sigma:
            anomaly_map = common.smooth(anomaly_map, self.args.smooth_sigma)
        return anomaly_map, anomaly_map.amax(dim=(1, 2))


# ------------------------------------------------------------------------------------------------------ frozen encoders
def text_features(clip, tokens, blocks):
    """Encode texts given as token embeddings (n, tokens, W). Return the last token after each of `blocks` (counted
    from 1), projected to CLIP's joint space: [(n, D)]."""
    x = tokens + clip.positional_embedding[: tokens.shape[1]]
    mask = clip.attn_mask[: tokens.shape[1], : tokens.shape[1]]  # causal
    features = []
    for number, block in enumerate(clip.transformer.resblocks[: max(blocks)], 1):
        x = block(x, attn_mask=mask)
        if number in blocks:
            features.append(clip.ln_final(x[:, -1]) @ clip.text_projection)
    return features


def image_features(clip, image, blocks):
    """Return the patch tokens after each of `blocks`, projected to CLIP's joint space: [(B, P, D)]."""
    features = clip.visual.forward_intermediates(
        common.normalize(image, clip.mean, clip.std), indices=[b - 1 for b in blocks], output_fmt="NLC",
        normalize_intermediates=True, intermediates_only=True)["image_intermediates"]  # normalised by ln_post
    return [patches @ clip.visual.proj for patches in features]


class CNNEncoder(nn.Module):
    """A frozen CNN that replaces CLIP's image encoder. Its four stages are resized to the ViT's grid: [(B, P, D)]."""

    def __init__(self, backbone, weights, grid, width):
        super().__init__()
        self.grid = grid
        self.cnn = common.feature_extractor(backbone, STAGES[backbone], weights)
        generator = torch.Generator().manual_seed(0)  # the projection is part of the architecture, the same in all runs
        for s, feature in enumerate(self.cnn(torch.zeros(1, 3, 64, 64)).values()):
            c = feature.shape[1]
            q = torch.linalg.qr(torch.randn(max(c, width), min(c, width), generator=generator)).Q
            self.register_buffer(f"map{s}", q if c > width else q.T)  # (C, D), orthonormal; preserves cosines if C <= D

    def forward(self, image):
        features = []
        for s, feature in enumerate(self.cnn(common.normalize(image)).values()):  # (B, C, h, w)
            if feature.shape[-1] > self.grid[1]:
                feature = F.adaptive_avg_pool2d(feature, self.grid)
            else:
                feature = F.interpolate(feature, self.grid, mode="bilinear")
            patches = feature.flatten(2).mT  # (B, P, C)
            # layer_norm centres the features; otherwise ReLU makes all cosines positive
            features.append(F.layer_norm(patches, patches.shape[-1:]) @ self.get_buffer(f"map{s}"))
        return features


# ------------------------------------------------------------------------------------------ augmentation (thesis 4.2.3)
def binomial(channels, device):
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=device) / 16
    return torch.outer(kernel, kernel).expand(channels, 1, 5, 5)  # Burt and Adelson 1983


def down(image):
    """Eq. 4.7: blur and subsample by 2, like OpenCV's pyrDown: (B, C, H, W) -> (B, C, H/2, W/2), rounded up."""
    c = image.shape[1]
    return F.conv2d(F.pad(image, (2, 2, 2, 2), "reflect"), binomial(c, image.device), stride=2, groups=c)


def up(image, size):
    """F_up of Eq. 4.8: insert zeros between the pixels and blur with four times the kernel, like OpenCV's pyrUp. As
    in OpenCV, padding reflects at the top and left and replicates at the bottom and right."""
    c = image.shape[1]
    image = F.pad(F.pad(image, (1, 0, 1, 0), "reflect"), (0, 1, 0, 1), "replicate")
    image = F.conv_transpose2d(image, 4 * binomial(c, image.device), stride=2, groups=c)
    return image[:, :, 4 : 4 + size[0], 4 : 4 + size[1]]  # crops the padding and the kernel's overhang


def enhance(image, levels, how="half"):
    """Add a blurred copy, the "residual" S_K of Eq. 4.9, to the image (B, 3, H, W), and keep the sum in [0, 1]."""
    low, sizes = image, []
    for _ in range(levels):
        sizes.append(low.shape[-2:])
        low = down(low)
    for size in reversed(sizes):
        low = up(low, size)
    return (image + low) / 2 if how == "half" else (image + low).clamp(max=1)


def build_model(args):
    longest = 75 - (args.join == "append")  # CLIP reads 77 tokens, including SOS and EOT
    for allowed, rule in [
            (args.backbone in ["clip", *STAGES], f"--backbone: choose clip, {', '.join(STAGES)}, or extend STAGES"),
            (args.layers, "--layers: give one or more of 1 2 3 4"),
            (args.prompt_tokens <= longest, f"--prompt-tokens: give at most {longest} with --join {args.join}"),
            (4 * args.smooth_sigma <= args.image_size, "--smooth-sigma: give at most a quarter of --image-size"),
            (args.image_size >= 3 * 2 ** max(args.da_levels - 1, 0),
             f"--da-levels: {args.image_size} pixels cannot be halved {args.da_levels} times")]:
        if not allowed:
            raise common.Error(rule)
    return ClipRecon(args)


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args)
    torch.use_deterministic_algorithms(True, warn_only=run.device.type != "cuda")  # for reproducible attention on GPUs
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        frozen = common.Features(model.image_features, train, args, run)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr)
        for epoch in run.epochs(model, optimizer):
            losses = []
            for features in frozen.batches(args.batch_size, shuffle=(args.seed, epoch)):
                where = torch.randperm(len(model.prompts))[: args.patches_per_step].to(run.device)
                distances = model.distances(features, where, whole=args.loss == "layer")
                loss = sum(d.mean() for d in distances)  # Eq. 4.5: all layers have the same weight
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
