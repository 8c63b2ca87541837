"""WinCLIP (Jeong, Zou, Kim, Zhang, Ravichandran, Dabeer, CVPR 2023, arXiv:2303.14814), zero-shot and with K images.

CLIP knows from captions how normal and anomalous things look. Its image tower is shown small windows of the image, 2x2
and 3x3 patches, one at a time; a window is the more anomalous, the nearer its feature is to the mean of sentences on
the anomalous state, compared with that of sentences on the normal one. With `--shots K` (the paper's WinCLIP+) it is
also compared with all windows of K normal images, which the seed draws from the training images. Nothing is trained.

Settings: the windows, the temperature and the way scores are put together are those of anomalib 2.7 and
zqhang/Accurate-WinCLIP-pytorch, which agree; there is no official code. The thesis gives no shots, prompts or sizes for
its rows. Without shots nothing is random: seeds give the same scores.
Differences from the paper: medical sentences in place of industrial ones (`--prompts original` brings those back).
Naming what may be found (tumor, drusen) uses knowledge of the disease: zero-shot, but not blind; `--findings none`
leaves it out. results.json says under `notes` what was used, and which images were the references. Maps have 256 pixels
like those of all methods here; CLIP sees the images at 240.
Differences from anomalib 2.7: sentences are normalised before they are averaged, and states weigh the same, however
many findings they name. Its windows are right only with an open_clip from before mid-2024; with today's it lets each
token attend to other windows in place of its own, and all windows get the same feature.

Cost, measured, of the default on one CPU thread: 15 s for the sentences, 9 s for each reference and each image
to score; 2 GiB with two images a batch.
"""

import itertools
import re
import sys
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

TAG = "laion400m_e32"  # the only public training of ViT-B-16-plus-240 (e31 is the same one, an epoch earlier)
TINY = dict(embed_dim=128, vision_cfg=dict(layers=4, width=128, patch_size=16),
            text_cfg=dict(layers=4, width=128, heads=4))  # --model tiny: for tests and demonstrations
PATIENCE = 6  # seconds for the hub to answer; without a network its own client tries for almost a minute
SCALES = (2, 3)  # k, windows of k x k patches, stride 1
TAU = 0.07  # temperature of the softmax over the two classes; trained CLIP's own is 0.01
FLOOR = 1e-6  # least score: harmonic means divide by it

# What the sentences speak of, our own words: the kind of image, the organ's names, what may be found there.
WORDS = {
    "brain": ("axial FLAIR MRI slice", ["brain", "head"], ["tumor", "glioma", "edema", "lesion", "mass"]),
    "liver": ("axial abdominal CT slice", ["liver", "liver parenchyma"],
              ["tumor", "metastasis", "focal lesion", "nodule", "hypodense mass"]),
    "resc": ("retinal OCT B-scan", ["retina", "macula"],
             ["macular edema", "intraretinal fluid", "subretinal fluid", "retinal detachment", "cysts"]),
    "oct2017": ("retinal OCT B-scan", ["retina", "macula"],
                ["choroidal neovascularization", "diabetic macular edema", "drusen", "fluid", "thickening"]),
    "chest": ("frontal chest X-ray", ["chest", "lungs"],
              ["pneumonia", "lung opacity", "consolidation", "infiltrate", "pleural effusion"]),
    "histo": ("H&E histopathology patch", ["lymph node tissue", "tissue"],
              ["metastasis", "tumor cells", "carcinoma", "atypical cells", "malignant cells"]),
    "phantom": ("synthetic brain MRI slice", ["brain", "head"],
                ["lesion", "tumor", "bright spot", "dark spot", "mass"]),
    "generic": ("medical scan", ["tissue", "organ"], ["lesion", "tumor", "fluid", "inflammation", "mass"]),
}
NORMAL = ["normal {o}", "healthy {o}", "{o} without abnormality", "{o} with no {f}", "unremarkable {o}"]
ANOMALOUS = ["abnormal {o}", "diseased {o}", "{o} with {f}", "{o} showing {f}", "{o} with signs of {f}"]
TEMPLATES = ["{m} of the {s}", "a {m} of a {s}", "an image of the {s}", "a medical image of a {s}",
             "a close-up {m} of the {s}", "a low-contrast {m} of the {s}", "a bright {m} of the {s}",
             "a noisy {m} of the {s}"]
# The paper's, for `--prompts original`: {a} is a, then the.
PAPER_NORMAL = ["{o}", "perfect {o}", "flawless {o}", "unblemished {o}", "{o} without flaw", "{o} without defect",
                "{o} without damage"]
PAPER_ANOMALOUS = ["damaged {o}", "{o} with flaw", "{o} with defect", "{o} with damage"]
PAPER_TEMPLATES = ["a cropped photo of {a} {s}.", "a close-up photo of {a} {s}.", "a bright photo of {a} {s}.",
                   "a dark photo of {a} {s}.", "a jpeg corrupted photo of {a} {s}.", "a blurry photo of {a} {s}.",
                   "a photo of {a} {s}.", "a photo of {a} small {s}.", "a photo of {a} large {s}.",
                   "a photo of {a} {s} for visual inspection.", "a photo of {a} {s} for anomaly detection."]


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
    """images a batch; changes nothing but speed and memory"""
    limit: int | None = None
    """at most this many images of each split and class, for quick looks"""
    maps: int = 50
    """how many test images get a picture; 0 none, -1 all"""
    overwrite: bool = False
    """replace a finished run in the folder, or one that was stopped, instead of keeping it or going on"""
    overwrite: bool = False
    """replace a finished run in the folder, or one that was stopped, instead of keeping it or going on"""
    checkpoint: str | None = None
    """a model.pt: skip training and evaluate it on --data"""
    predict: str | None = None
    """with --checkpoint: score this image, folder of images or NIfTI volume; no labels needed"""
    model: str = "ViT-B-16-plus-240"
    """CLIP: an open_clip model with a ViT as image tower, or tiny, which has no published weights"""
    clip_weights: str = TAG
    """of CLIP: a published TAG of open_clip, none (untrained), auto (laion400m_e32, else none), or a FILE"""
    clip_size: int = 240
    """images are resized once more, to this many pixels squared, for CLIP: 240 are its own 15 x 15 patches"""
    words: Literal["auto", "brain", "liver", "resc", "oct2017", "chest", "histo", "phantom", "generic"] = "auto"
    """what the sentences speak of (WORDS); auto: the benchmark of --data, generic for other folders"""
    prompts: Literal["medical", "original"] = "medical"
    """sentences: our medical ones, or the paper's industrial ones about the organ"""
    findings: Literal["named", "none"] = "named"
    """medical sentences name what may be found, or speak of normal and abnormal only"""
    shots: int = 0
    """K, normal training images to compare with, drawn by --seed; 0 is WinCLIP, more is WinCLIP+ (paper: 1, 2, 4)"""


# -------------------------------------------------------------------------------------------------------- the sentences
def benchmark_words(data):
    """The row of WORDS for --data: that of a benchmark or of a folder with its name, else generic."""
    name = Path(data).resolve().name.lower()
    return next((key for key, folders in common.NAMES.items() if name in folders), "generic")


def sentences(words, prompts, findings):
    """For the normal and for the anomalous class: a list of states, each a list of sentences."""
    modality, organs, found = WORDS[words]
    states, templates = (NORMAL, ANOMALOUS), TEMPLATES
    if prompts == "original":
        states, organs = (PAPER_NORMAL, PAPER_ANOMALOUS), organs[:1]
        templates = [t.replace("{a}", a) for t in PAPER_TEMPLATES for a in ("a", "the")]
    classes = []
    for kinds in states:
        kinds = [s for s in kinds if findings == "named" or "{f}" not in s]
        classes.append([[t.format(m=modality, s=s.format(o=o, f=f)) for t, o, f in
                         itertools.product(templates, organs, found if "{f}" in s else [""])] for s in kinds])
    return [[[re.sub(r"\ba (?=[aeiou]|H&E)", "an ", x) for x in state] for state in kinds] for kinds in classes]


# ---------------------------------------------------------------------------------------------------------- frozen CLIP
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


def text_features(clip, sentences):
    """(n, D), not normalised: what clip.encode_text gives for the sentences, without padding them to 77 tokens."""
    ids = open_clip.get_tokenizer(context_length=clip.context_length)(sentences).to(clip.positional_embedding.device)
    last = ids.argmax(dim=1)  # EOT, where CLIP reads, has the largest id
    length = int(last.max()) + 1  # what stands behind cannot reach it: the text tower is causal
    x = clip.token_embedding(ids[:, :length]) + clip.positional_embedding[:length]  # (n, T, W)
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    return x[torch.arange(len(x), device=x.device), last] @ clip.text_projection


# ---------------------------------------------------------------------------------------------------------------- model
class WinCLIP(nn.Module):
    """P = h * w patches; n windows of k x k of them; D CLIP's joint width, W that of its image tower; K shots."""

    def __init__(self, args):
        super().__init__()
        clip = load_clip(args.model, args.clip_weights, args.clip_size)
        self.grid, self.size, self.shots = clip.visual.grid_size, args.clip_size, args.shots
        if min(self.grid) < max(SCALES):
            raise common.Error(f"--clip-size {args.clip_size}: windows need {max(SCALES)} x {max(SCALES)} patches")
        if args.shots < 0:
            raise common.Error(f"--shots {args.shots}: give the number of normal images to compare with, 0 for none")
        self.clip = clip
        patches, width = self.grid[0] * self.grid[1], clip.visual.output_dim
        number = torch.arange(1, patches + 1.0).view(1, 1, *self.grid)
        self.register_buffer("text", torch.zeros(2, width))  # features of the normal and the anomalous class
        for k in SCALES:
            window = F.unfold(number, k)[0].T.long()  # (n, k * k): the tokens of each window
            self.register_buffer(f"window{k}", F.pad(window, (1, 0)), persistent=False)  # token 0 is the class token
            self.register_buffer(f"memory{k}", torch.zeros(args.shots * len(window), width))  # R of the paper
        self.register_buffer("memory1", torch.zeros(args.shots * patches, clip.visual.ln_post.normalized_shape[0]))

    @torch.inference_mode()
    def read(self, classes):
        """Take the text features from `sentences`: sentences of a state, then states of a class weigh the same."""
        for i, states in enumerate(classes):
            means = [F.normalize(text_features(self.clip, s), dim=1).mean(dim=0) for s in states]
            self.text[i] = F.normalize(torch.stack(means).mean(dim=0), dim=0)

    @torch.inference_mode()
    def remember(self, image):
        """Take K normal images (K, 3, H, W) as what to compare with."""
        for k, feature in self.features(image)[1].items():
            self.get_buffer(f"memory{k}").copy_(feature.flatten(0, 1))

    def features(self, image):
        """Of unit length: the image's (B, D), and {k: (B, n, D) of the k x k windows, 1: (B, P, W) of the patches}."""
        if image.shape[-1] != self.size:
            image = F.interpolate(image, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        tower = self.clip.visual
        patches = tower.conv1(common.normalize(image, self.clip.mean, self.clip.std)).flatten(2).mT  # (B, P, W)
        tokens = torch.cat([tower.class_embedding.expand(len(image), 1, -1), patches], dim=1)
        tokens = tower.ln_pre(tokens + tower.positional_embedding)  # (B, 1 + P, W)
        whole = tower.ln_post(tower.transformer(tokens))
        found = {1: F.normalize(whole[:, 1:], dim=-1)}  # not projected: seen by no text, as in both repositories
        for k in SCALES:
            window = self.get_buffer(f"window{k}")  # (n, 1 + k * k)
            # a sequence of its own for each window, whose patches keep the positions they have in the image
            x = tower.transformer(tokens[:, window].flatten(0, 1))[:, 0]  # (B * n, 1 + k * k, W) -> (B * n, W)
            found[k] = F.normalize(tower.ln_post(x) @ tower.proj, dim=-1).unflatten(0, (len(image), len(window)))
        return F.normalize(whole[:, 0] @ tower.proj, dim=-1), found

    def text_score(self, feature):
        """ascore_0 of features (..., D) (paper, Eq. 1): the anomalous class' part of the softmax, in (0, 1)."""
        return (feature @ self.text.T / TAU).softmax(dim=-1)[..., 1].clamp(min=FLOOR)

    def memory_score(self, feature, k):
        """Of features (B, n, D): half the cosine distance to the nearest of the memory (paper, Eq. 4), in (0, 1]."""
        return ((1 - (feature @ self.get_buffer(f"memory{k}").T).amax(dim=-1)) / 2).clamp(min=FLOOR)  # (B, n, K*n)

    def on_patches(self, score, k):
        """(B, n) -> (B, h, w): the harmonic mean of the scores of the windows that cover a patch."""
        inverse = torch.stack([1 / score, torch.ones_like(score)], dim=1).repeat_interleave(k * k, dim=1)
        total, count = F.fold(inverse, self.grid, k).unbind(dim=1)  # (B, 2 * k * k, n) -> (B, 2, h, w)
        return count / total

    @torch.inference_mode()
    def predict(self, image):
        """Anomaly map (B, H, W), anomaly score (B,); both of WinCLIP or, with shots, of WinCLIP+."""
        self.eval()
        whole, found = self.features(image)
        score = self.text_score(whole)  # (B,); also the third scale of the map, the same everywhere
        windows = sum(1 / self.on_patches(self.text_score(found[k]), k) for k in SCALES)
        anomaly_map = (len(SCALES) + 1) / (windows + 1 / score[:, None, None])  # (B, h, w), harmonic over the scales
        if self.shots:
            few = self.memory_score(found[1], 1).unflatten(1, self.grid)
            few = few + sum(self.on_patches(self.memory_score(found[k], k), k) for k in SCALES)
            few = few / (len(SCALES) + 1)  # (B, h, w), arithmetic over the scales
            anomaly_map, score = (anomaly_map + few) / 2, (score + few.amax(dim=(1, 2))) / 2
        return F.interpolate(anomaly_map[:, None], image.shape[-2:], mode="bilinear")[:, 0], score


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.start_run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = WinCLIP(args).to(run.device)
    if not args.checkpoint:
        if args.shots > len(train):
            raise common.Error(f"--shots {args.shots}: there are {len(train)} normal training images")
        words = benchmark_words(args.data) if args.words == "auto" else args.words
        classes = sentences(words, args.prompts, args.findings)
        run.notes = dict(words=words, prompts=args.prompts,
                         findings=args.findings if args.prompts == "medical" else "none",
                         sentences=[sum(map(len, states)) for states in classes])
        print("sentences:", run.notes, flush=True)
        model.read(classes)
        if args.shots:
            drawn = np.random.default_rng(args.seed).permutation(len(train))[: args.shots]
            run.notes["references"] = [train.paths[i] for i in drawn]
            model.remember(train.batch(drawn, run.device))
        run.keep(model)
    common.finish(run, model, (train, valid, test))
