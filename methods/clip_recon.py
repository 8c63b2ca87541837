"""clip_recon (Bao, MSc thesis, University of Alberta 2024, chapter 4: language-enhanced reconstruction with CLIP).

CLIP's image tower describes each patch of the image, four layers deep; its text tower has to say the same from learned
"blank" words, a set of them for each patch location, to which an adapter adds what the image shows there. Both towers
stay frozen. Words and adapter are trained on normal images; where the two descriptions disagree, a patch is anomalous.

Settings: thesis, 4.3.3. Where it is silent: the text side follows CoCoOp (Zhou et al., CVPR 2022, arXiv:2203.05557),
whose conditional prompt this is, for a patch instead of an image; the image side AnoVL (Deng et al., 2023,
arXiv:2308.15939), which has the author's own way with this very tower; map and loss RD4AD (arXiv:2201.10703).
Decisions where the thesis leaves room (there is no public code to compare with):
- "layers 1, 2, 3, 4" are stages: blocks 3, 6, 9 and 12 of both towers, seen through CLIP's own frozen last norm and
  projection. Whatever could be trained there collapses: both sides would agree on a constant.
- The text said of patch i is read at EOT, after SOS and the 16 words t_i + pi_i, the same pi_i on each word (Eq. 4.2),
  as in CoOp's code. No padding to 77: later words cannot reach an earlier one. `--frame bare` reads the last word.
- The distance 1 - cos is minimised (the text says the similarity is) and Eq. 4.4's sum over channels is left out: the
  cosine has summed over them already.
- The "augmentation" (4.2.3) is no random one: it belongs to the method, in training and in testing. Its sum of two
  images is halved, or it would leave [0, 1].
- ResNets keep the text tower; stages are pooled to the ViT's grid, normalised over channels and brought to the joint
  width by a frozen orthonormal map.
- Batches of 8, AdamW's defaults, no schedule; the epoch is chosen on valid, as in chapter 3.
- The tower was made for 240 pixels: its positions are interpolated to 256 as open_clip does it.

The published adapter is narrow: with 16 times fewer hidden units than inputs the model may know little more than the
mean of each location. `--adapter-reduction 0.25` gives it four times more units than inputs (README: what it did).

Cost, measured, of the default on one CPU thread: 17 s to train on an image (image tower 0.9 s, text tower 8.0 s, its
backward pass 7.9 s) and 8 s to score one; 1.8 GiB, and another 1.6 for each image of a training batch.
"""

import sys
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

# Stages 1 to 4 of the other backbones: strides 4, 8, 16 and 32.
STAGES = {
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "resnet50": ["layer1", "layer2", "layer3", "layer4"],
    "mobilenet_v2": ["features.3", "features.6", "features.13", "features.17"],  # our choice: no published setting
}
TAG = "laion400m_e32"  # the only public training of ViT-B-16-plus-240 (e31 is the same one, an epoch earlier)
TINY = dict(embed_dim=128, vision_cfg=dict(layers=4, width=128, patch_size=16),
            text_cfg=dict(layers=4, width=128, heads=4))  # --model tiny: for tests and demonstrations
SOS, EOT = 49406, 49407  # ids of CLIP's tokens that start and end a text
PATIENCE = 6  # seconds for the hub to answer; without a network its own client tries for almost a minute


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
    """images are resized to this many pixels squared (thesis, 4.3.3)"""
    batch_size: int = 8
    """images a batch (the thesis is silent); each takes 1.3 GiB of a CPU's memory in training"""
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
    epochs: int = 400
    """passes over the normal training images (thesis, 4.3.3)"""
    lr: float = 1e-3
    """AdamW's learning rate (thesis, 4.3.3); runs of a few hundred steps need 1e-2"""
    eval_every: int = 10
    """epochs between looks at valid, which choose the checkpoint"""
    model: str = "ViT-B-16-plus-240"
    """CLIP: an open_clip model with a ViT as image tower, or tiny, which has no published weights"""
    clip_weights: str = TAG
    """of CLIP: a published TAG of open_clip, none (untrained), auto (laion400m_e32, else none), or a FILE"""
    backbone: str = "clip"
    """image tower: clip (CLIP's own), resnet18, resnet50 (thesis, Table 4.1), mobilenet_v2"""
    weights: str = "imagenet"
    """of the backbone: imagenet (torchvision's), none (untrained), auto (imagenet, else none), or a FILE"""
    cache_features: float | Literal["auto"] = "auto"
    """GiB of disk for the frozen features of the training images; auto: 16; 0: they are computed anew each epoch"""
    prompt_tokens: int = 16
    """M, learned words at each patch location (thesis, 4.3.3)"""
    layers: tuple[int, ...] = (1, 2, 3, 4)
    """stages whose distances are summed (thesis, 4.3.4)"""
    frame: Literal["sos-eot", "bare"] = "sos-eot"
    """words between CLIP's start and end tokens, read at the end (CoOp's code), or bare, read at the last word"""
    adapter_reduction: float = 16
    """the adapter's hidden layer is this many times narrower than its input (thesis, 4.2.2); 0.25: four times wider"""
    da_levels: int = 3
    """K, pyramid levels of the augmentation (our choice: the thesis is silent); 0 switches it off"""
    patches_per_step: int = 256
    """locations a training step, drawn at random; 256 are all of them at 256 pixels"""


# ------------------------------------------------------------------------------------------ augmentation (thesis 4.2.3)
def binomial(channels, device):
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=device) / 16
    return torch.outer(kernel, kernel).expand(channels, 1, 5, 5)  # Burt and Adelson 1983


def down(image):
    """Eq. 4.7: blur and take every second pixel, (B, C, H, W) -> (B, C, H/2, W/2), rounded up; OpenCV's pyrDown."""
    c = image.shape[1]
    return F.conv2d(F.pad(image, (2, 2, 2, 2), "reflect"), binomial(c, image.device), stride=2, groups=c)


def up(image, size):
    """F_up of Eq. 4.8: put zeros between the pixels and blur with four times the kernel; OpenCV's pyrUp.

    Beyond the border: reflected on top and left, repeated on bottom and right, as OpenCV has it."""
    c = image.shape[1]
    image = F.pad(F.pad(image, (1, 0, 1, 0), "reflect"), (0, 1, 0, 1), "replicate")
    image = F.conv_transpose2d(image, 4 * binomial(c, image.device), stride=2, groups=c)
    return image[:, :, 4 : 4 + size[0], 4 : 4 + size[1]]  # off the padding and the kernel's overhang


def enhance(image, levels):
    """(I + S_K) / 2 with the low-frequency residual S_K (Eq. 4.9); in [0, 1] as the image is, (B, 3, H, W)."""
    low, sizes = image, []
    for _ in range(levels):
        sizes.append(low.shape[-2:])
        low = down(low)
    for size in reversed(sizes):
        low = up(low, size)
    return (image + low) / 2


# -------------------------------------------------------------------------------------------------------- frozen towers
def published_file(name, tag):
    """The file of a tag: in a cache, else downloaded. OSError, within PATIENCE, if it can be neither."""
    entry = open_clip.get_pretrained_cfg(name, tag)
    url, hub = entry["url"] if "mlfoundations" in entry["url"] else "", entry["hf_hub"]
    release = Path.home() / ".cache" / "clip" / url.rsplit("/", 1)[-1]  # where open_clip puts it
    if url and release.is_file():
        return release
    # Trap: the hub's entry for laion400m_e32 of the default model leads to the weights of e31; the release is the true
    # e32. What was loaded is recorded by its SHA-256.
    repository, _, given = hub.rpartition("/")
    for file in [given] if given else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
        if isinstance(found := huggingface_hub.try_to_load_from_cache(repository, file), str):
            return Path(found)
    answer = []

    def ask():
        try:
            page = f"{huggingface_hub.constants.ENDPOINT}/api/models/{repository}"
            urllib.request.urlopen(page, timeout=PATIENCE).close()
            answer.append("")
        except Exception as e:
            answer.append(str(getattr(e, "reason", e)))

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name knows no timeout
    thread.start()
    thread.join(PATIENCE)
    try:
        if not answer or answer[0]:
            raise OSError(answer[0] if answer else "no answer")
        return Path(open_clip.download_pretrained(entry))
    except Exception as e:
        way = f"put {url} at {release}" if url else f"fill {huggingface_hub.constants.HF_HUB_CACHE} with {repository}"
        raise OSError(f"neither cached nor to be had ({e}); {way}") from e


def load_clip(name, weights, image_size):
    """A frozen open_clip.CLIP on the CPU with a ViT for `image_size`; its `weights_used` as in common.py.

    weights: see Args. Ends with one line if they cannot be had or do not fit."""
    config = TINY if name == "tiny" else open_clip.get_model_config(name)
    if config is None:
        raise common.Error(f"--model {name}: open_clip has no such model; the default is {Args.model}, the small one "
                           f"tiny")
    if not isinstance(config["vision_cfg"].get("layers"), int) or config.get("custom_text") or \
            {"hf_model_name", "hf_tokenizer_name"} & set(config["text_cfg"]):
        raise common.Error(f"--model {name}: needs a ViT beside CLIP's own text tower; take {Args.model} or ViT-B-16")
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag, file, entry = TAG if weights == "auto" else weights, None, {}
    if Path(weights).is_file():
        file = Path(weights)
    elif tag in tags:
        try:
            file, entry = published_file(name, tag), open_clip.get_pretrained_cfg(name, tag)
        except OSError as e:
            if weights != "auto":
                raise common.Error(f"CLIP weights {tag} of {name} are {e}, or give a file with --clip-weights FILE, or "
                                   f"run an "
                                   "untrained CLIP with --clip-weights none") from e
            print(f"warning: CLIP weights {tag} of {name} are {e}; going on with an UNTRAINED CLIP", flush=True)
    elif weights == "auto":
        print(f"warning: {name} has no published weights {tag}; going on with an UNTRAINED CLIP", flush=True)
    elif weights != "none":
        raise common.Error(f"--clip-weights {weights}: there is no such file, and of {name} are published: "
                           f"{', '.join(tags) or 'none'}; give one of these, a FILE, or none (an untrained CLIP)")
    config = config | dict(vision_cfg=config["vision_cfg"] | dict(image_size=image_size),
                           quick_gelu=config.get("quick_gelu", False) or entry.get("quick_gelu", False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(**config)
        if name == "tiny":  # PyTorch's starting values, smaller ones, for a text tower that stays random (README)
            for block in clip.transformer.resblocks:
                nn.init.xavier_uniform_(block.attn.in_proj_weight)
                for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                    layer.reset_parameters()
    if file:
        try:
            open_clip.load_checkpoint(clip, str(file))  # interpolates the positions if the file has another image size
        except Exception as e:  # unreadable, pickled objects, other keys, other shapes
            raise common.Error(f"{file} does not fit {name} ({' '.join(str(e).split())[:200]}); give the weights of "
                               f"{name}, "
                               "or another --model") from e
    clip.eval().requires_grad_(False)
    clip.train = lambda mode=True: clip  # stays in eval mode, whatever the model around it does
    clip.frozen = True
    clip.mean = entry.get("mean", open_clip.OPENAI_DATASET_MEAN)
    clip.std = entry.get("std", open_clip.OPENAI_DATASET_STD)
    clip.weights_used = dict(name=f"CLIP {name}", weights=f"{tag} ({file})" if entry else str(file or "none"),
                             sha256=common.sha256(file or clip), trained=file is not None)
    return clip


def text_features(clip, tokens, blocks, recompute=False):
    """Run embedded texts (n, T, D) through the text tower; what is said at their last token after each of `blocks`
    (numbers from 1), in CLIP's joint space: [(n, D)]. recompute: save memory, not time, for the backward pass."""
    length, found = tokens.shape[1], []
    mask = clip.attn_mask[:length, :length]  # causal: so T tokens give what T padded to 77 would
    x = tokens + clip.positional_embedding[:length]
    for number, block in enumerate(clip.transformer.resblocks[: max(blocks)], 1):
        if recompute:
            x = checkpoint(block, x, attn_mask=mask, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, attn_mask=mask)
        if number in blocks:
            found.append(clip.ln_final(x[:, -1]) @ clip.text_projection)
    return found


def image_features(clip, image, blocks):
    """Patches after each of `blocks` of the image tower, in CLIP's joint space, without class token: [(B, P, D)]."""
    found = clip.visual.forward_intermediates(
        common.normalize(image, clip.mean, clip.std), indices=[b - 1 for b in blocks], output_fmt="NLC",
        normalize_intermediates=True, intermediates_only=True)["image_intermediates"]  # ln_post is the norm
    return [patches @ clip.visual.proj for patches in found]


class ConvTower(nn.Module):
    """A frozen CNN in the place of CLIP's image tower: four stages on one grid, (B, P, D) each."""

    def __init__(self, backbone, weights, grid, width):
        super().__init__()
        self.stages, self.grid = STAGES[backbone], grid
        self.cnn = common.feature_extractor(backbone, self.stages, weights)
        draw = torch.Generator().manual_seed(0)  # part of the architecture: the same for all seeds
        for s, feature in enumerate(self.cnn(torch.zeros(1, 3, 64, 64)).values()):
            c = feature.shape[1]
            q = torch.linalg.qr(torch.randn(max(c, width), min(c, width), generator=draw)).Q
            self.register_buffer(f"map{s}", q if c > width else q.T)  # (C, D), orthonormal; keeps cosines if C <= D

    def forward(self, image):
        found = []
        for s, feature in enumerate(self.cnn(common.normalize(image)).values()):  # (B, C, h, w)
            if feature.shape[-1] > self.grid[1]:
                feature = F.adaptive_avg_pool2d(feature, self.grid)
            else:
                feature = F.interpolate(feature, self.grid, mode="bilinear")
            patches = feature.flatten(2).mT  # (B, P, C)
            # centred, since the cosines of features behind a ReLU are all positive
            found.append(F.layer_norm(patches, patches.shape[-1:]) @ self.get_buffer(f"map{s}"))
        return found


# ---------------------------------------------------------------------------------------------------------------- model
class ClipRecon(nn.Module):
    """P patch locations, M words each; L of the four stages; D CLIP's joint width, W that of its text tower."""

    def __init__(self, args):
        super().__init__()
        if args.backbone not in ["clip", *STAGES]:
            raise common.Error(f"--backbone {args.backbone}: known are clip, {', '.join(STAGES)}; add yours to STAGES")
        if not args.layers or not set(args.layers) <= {1, 2, 3, 4}:
            raise common.Error(f"--layers {' '.join(map(str, args.layers))}: give some of the stages 1 2 3 4")
        if args.da_levels < 0 or args.image_size < 3 * 2 ** max(args.da_levels - 1, 0):
            raise common.Error(f"--da-levels {args.da_levels}: from 0 to what {args.image_size} pixels can be halved")
        clip = load_clip(args.model, args.clip_weights, args.image_size)
        longest = clip.context_length - 2
        if not 1 <= args.prompt_tokens <= longest or args.patches_per_step < 1 or args.adapter_reduction <= 0:
            raise common.Error(f"--prompt-tokens lies in 1 to {longest}; --patches-per-step and --adapter-reduction "
                               f"above 0")
        self.stages, self.frame, self.da_levels = sorted(set(args.layers)), args.frame, args.da_levels
        self.grid, width = clip.visual.grid_size, clip.visual.output_dim
        if 0 in self.grid:
            raise common.Error(f"--image-size {args.image_size} is smaller than a patch of {args.model}")
        depth = len(clip.visual.transformer.resblocks)
        self.image_blocks = [-(-s * depth // 4) for s in (1, 2, 3, 4)]
        self.text_blocks = [-(-s * len(clip.transformer.resblocks) // 4) for s in self.stages]
        # Of 49408 embeddings two are used: the others, 126 MB in the default model, are dropped.
        clip.token_embedding = nn.Embedding.from_pretrained(clip.token_embedding.weight[[SOS, EOT]].clone()).eval()
        self.conv_tower = None
        if args.backbone != "clip":
            clip.visual = None
            self.conv_tower = ConvTower(args.backbone, args.weights, self.grid, width)
        self.clip = clip
        text_width = clip.transformer.width
        positions = self.grid[0] * self.grid[1]
        self.prompts = nn.Parameter(0.02 * torch.randn(positions, args.prompt_tokens, text_width))  # T of Eq. 4.1
        hidden = max(1, round(width / args.adapter_reduction))
        self.adapter = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, text_width))  # h_theta

    @torch.no_grad()
    def image_features(self, image):
        """f^1..f^4 of all four stages, 4 x (B, P, D); constants of the image, since augmentation and tower are."""
        image = enhance(image, self.da_levels)
        with torch.autocast("cuda", torch.bfloat16, enabled=image.is_cuda):
            return self.conv_tower(image) if self.conv_tower else image_features(self.clip, image, self.image_blocks)

    def distances(self, features, where=None):
        """M^k of Eq. 4.3 from f^1..f^4, a (B, P) for each layer, in [0, 2]; where: at these positions only."""
        features = [f if where is None else f[:, where] for f in features]
        prompts = self.prompts if where is None else self.prompts[where]
        with torch.autocast("cuda", torch.bfloat16, enabled=prompts.is_cuda):
            pi = self.adapter(F.normalize(features[-1].float(), dim=-1))  # h(f^last): (B, P, D) -> (B, P, W)
            words = (prompts + pi[:, :, None]).flatten(0, 1)  # T_i + pi_i: (B*P, M, W)
            if self.frame == "sos-eot":
                sos, eot = (e.expand(len(words), 1, -1) for e in self.clip.token_embedding.weight)
                words = torch.cat([sos, words, eot], dim=1)  # (B*P, M + 2, W)
            # no torch.no_grad here: the gradient of the words passes through the frozen tower
            spoken = text_features(self.clip, words, self.text_blocks, words.is_cuda and torch.is_grad_enabled())
        shape = features[0].shape[:2]
        return [1 - F.cosine_similarity(features[k - 1].float(), p.float().unflatten(0, shape), dim=-1)
                for k, p in zip(self.stages, spoken, strict=True)]

    @torch.inference_mode()
    def predict(self, image):
        """Anomaly map (B, H, W): S, the sum of all M^k enlarged; anomaly score (B,): its maximum (thesis, 4.2.2)."""
        self.eval()
        total = sum(self.distances(self.image_features(image))).unflatten(1, self.grid)  # sum first: Psi is linear
        # corners not aligned, unlike RD4AD: a patch's value belongs to its middle
        anomaly_map = F.interpolate(total[:, None], image.shape[-2:], mode="bilinear")[:, 0]
        return anomaly_map, anomaly_map.amax(dim=(1, 2))


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.start_run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = ClipRecon(args).to(run.device)
    if not args.checkpoint:
        frozen = common.Features(model.image_features, train, args, run)
        optimizer = torch.optim.AdamW([model.prompts, *model.adapter.parameters()], args.lr)
        for epoch in run.epochs(model, optimizer):
            losses = []
            for features in frozen.batches(args.batch_size, shuffle=(args.seed, epoch)):
                where = torch.randperm(len(model.prompts))[: args.patches_per_step].to(run.device)
                loss = sum(d.mean() for d in model.distances(features, where))  # Eq. 4.5: all layers weigh the same
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            run.validate(model, epoch, valid, loss=float(torch.stack(losses).mean()))
    common.finish(run, model, (train, valid, test))
