"""WinCLIP (Jeong, Zou, Kim, Zhang, Ravichandran, Dabeer, CVPR 2023, arXiv:2303.14814), zero-shot and with K images.

CLIP has learned from image captions what normal and anomalous objects look like. Its image encoder processes small
windows of 2x2 or 3x3 patches, one at a time. A window is anomalous if its feature is closer to the mean feature of
sentences about the anomalous state than to that of sentences about the normal state. With `--shots K` (the paper's
WinCLIP+), each window is also compared with all windows of K normal images. Nothing is trained.

Settings: the windows, the temperature and the way scores are combined are those of anomalib 2.7 and
zqhang/Accurate-WinCLIP-pytorch, which agree. There is no official code, and the thesis does not state shots, prompts or
sizes. Without shots, all seeds give the same scores.
Differences from the paper: sentences are medical instead of industrial; `--findings named` adds knowledge of the test
classes, which the paper does not use and the thesis does not mention.
Differences from anomalib 2.7: text features are normalised before they are averaged, and all states have the same
weight, regardless of their number of sentences. anomalib's windows are correct only with open_clip versions from before
mid-2024; with later ones, each token attends to other windows instead of its own, and all windows get the same feature.

Cost of the default settings on one thread of a busy CPU: 20 s for the sentences, 8 s per reference image and per scored
image; 2.0 GiB of memory with four images per batch.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common

SCALES = (2, 3)  # k, for windows of k x k patches with stride 1
TAU = 0.07  # temperature of the softmax over the two classes; trained CLIP has 0.01
FLOOR = 1e-6  # minimum score, since harmonic means divide by scores


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
    """images are resized to this width and height in pixels (our choice; the thesis' benchmark: 224)"""
    batch_size: Annotated[int, Ge(1)] = 8
    """images per batch; affects only speed and memory"""
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
    """path to the image, image folder, NIfTI volume, DICOM series or scan folder to score; needs no --checkpoint"""
    specificity: Annotated[float, Interval(gt=0, lt=1)] = 0.95
    """fraction of normal images that should score below the decision threshold"""
    scan_score: Literal["max", "top5"] = "max"
    """score of a scan: its highest slice score (max) or the mean of its five highest slice scores (top5)"""
    save_maps: Literal["no", "npy", "tiff"] = "no"
    """with --predict: also save each anomaly map as float32, at the image's original size"""
    model: str = "ViT-B-16-plus-240"
    """CLIP model: the open_clip name of a model whose image encoder is a ViT, or tiny (no published weights)"""
    clip_weights: str = "laion400m_e32"
    """CLIP weights: an open_clip TAG, none (untrained), auto (laion400m_e32 if available, else none) or a FILE"""
    clip_size: Annotated[int, Ge(16)] = 240
    """images are resized again to this width and height in pixels; 240: 15 x 15 patches, as in CLIP's training"""
    words: Literal["auto", "brain", "liver", "resc", "oct2017", "chest", "histo", "phantom", "generic"] = "auto"
    """what the sentences are about (see WORDS); auto: the benchmark given by --data, or generic for other folders"""
    prompts: Literal["medical", "original"] = "medical"
    """medical: our own sentences; original: the paper's industrial sentences, applied to the organ"""
    organ: str | None = None
    """what the images show, in your own words, such as "knee", instead of the organ in WORDS"""
    findings: str = "none"
    """none: medical sentences only say normal or abnormal; named: they name the findings in WORDS, such as tumor or
    drusen (uses knowledge of the disease); or your own findings, separated by commas"""
    sentences: str | None = None
    """use the sentences in this text FILE instead, one per line, each after "normal:" or "anomalous:\""""
    shots: Annotated[int, Ge(0)] = 0
    """K, number of normal reference images from train, drawn with --seed; 0: WinCLIP, else WinCLIP+ (paper: 1, 2, 4)"""


class WinCLIP(nn.Module):
    """Shapes: P = h * w patches; n windows of k x k patches; D, W: widths of CLIP's joint space and image encoder."""

    def __init__(self, args):
        super().__init__()
        self.clip = common.load_clip(args.model, args.clip_weights, args.clip_size)
        encoder, self.size, self.shots = self.clip.visual, args.clip_size, args.shots
        self.grid, patches = encoder.grid_size, encoder.grid_size[0] * encoder.grid_size[1]
        if min(self.grid) < max(SCALES):
            raise common.Error(f"--clip-size {args.clip_size}: windows need {max(SCALES)} x {max(SCALES)} patches")
        self.register_buffer("text", torch.zeros(2, encoder.output_dim))  # normal, anomalous
        self.register_buffer("memory1", torch.zeros(args.shots * patches, encoder.ln_post.normalized_shape[0]))
        number = torch.arange(1, patches + 1.0).view(1, 1, *self.grid)
        for k in SCALES:
            window = F.unfold(number, k)[0].T.long()  # (n, k * k): the tokens of each window
            self.register_buffer(f"window{k}", F.pad(window, (1, 0)), persistent=False)  # token 0 is the class token
            self.register_buffer(f"memory{k}", torch.zeros(args.shots * len(window), encoder.output_dim))  # paper: R

    @torch.inference_mode()
    def set_classes(self, classes):
        """Set each class's text feature: the mean over each state's sentences, then over states (see `sentences`)."""
        for i, states in enumerate(classes):
            means = [encode_text(self.clip, texts).mean(dim=0) for texts in states]  # (D,) each
            self.text[i] = F.normalize(torch.stack(means).mean(dim=0), dim=0)

    @torch.inference_mode()
    def set_references(self, image):
        """Fill the memory with the features of K normal images (K, 3, H, W)."""
        for k, feature in self.features(image)[1].items():
            self.get_buffer(f"memory{k}").copy_(feature.flatten(0, 1))

    def features(self, image):
        """Return features of unit length: (B, D) of the image, {1: (B, P, W) of patches, k: (B, n, D) of windows}."""
        if image.shape[-1] != self.size:
            image = F.interpolate(image, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        encoder = self.clip.visual
        patches = encoder.conv1(common.normalize(image, self.clip.mean, self.clip.std)).flatten(2).mT  # (B, P, W)
        tokens = torch.cat([encoder.class_embedding.expand(len(image), 1, -1), patches], dim=1)
        tokens = encoder.ln_pre(tokens + encoder.positional_embedding)  # (B, 1 + P, W)
        whole = encoder.ln_post(encoder.transformer(tokens))
        features = {1: F.normalize(whole[:, 1:], dim=-1)}  # not projected, since they are not compared with text
        for k in SCALES:
            window = self.get_buffer(f"window{k}")  # (n, 1 + k * k)
            # each window is a sequence of its own; its patches keep their position embeddings from the whole image
            x = encoder.transformer(tokens[:, window].flatten(0, 1))[:, 0]  # (B * n, 1 + k * k, W) -> (B * n, W)
            x = F.normalize(encoder.ln_post(x) @ encoder.proj, dim=-1)
            features[k] = x.unflatten(0, (len(image), len(window)))
        return F.normalize(whole[:, 0] @ encoder.proj, dim=-1), features

    def text_score(self, feature):
        """Return ascore_0 (paper, Eq. 1) of features (..., D): the softmax probability of the anomalous class."""
        return (feature @ self.text.T / TAU).softmax(dim=-1)[..., 1].clamp(min=FLOOR)

    def memory_score(self, feature, k):
        """Return half the cosine distance from features (B, n, D) to the nearest ones in the memory (paper, Eq. 4)."""
        return ((1 - (feature @ self.get_buffer(f"memory{k}").T).amax(dim=-1)) / 2).clamp(min=FLOOR)  # (B, n, K*n)

    def on_patches(self, score, k):
        """Return the harmonic mean over the windows that cover each patch: (B, n) -> (B, h, w)."""
        def total(x):
            return F.fold(x[:, None].expand(-1, k * k, -1), self.grid, k)[:, 0]  # (B, n) -> (B, h, w)

        return total(torch.ones_like(score)) / total(1 / score)

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map (B, H, W) and the score (B,); with shots, those of WinCLIP+."""
        self.eval()
        whole, features = self.features(image)
        score = self.text_score(whole)  # (B,); also the third scale of the map, constant over the image
        windows = sum(1 / self.on_patches(self.text_score(features[k]), k) for k in SCALES)
        anomaly_map = (len(SCALES) + 1) / (windows + 1 / score[:, None, None])  # (B, h, w), harmonic mean over scales
        if self.shots:
            few = self.memory_score(features[1], 1).unflatten(1, self.grid)
            few = few + sum(self.on_patches(self.memory_score(features[k], k), k) for k in SCALES)
            few = few / (len(SCALES) + 1)  # (B, h, w), arithmetic mean over scales
            anomaly_map, score = (anomaly_map + few) / 2, (score + few.amax(dim=(1, 2))) / 2
        return F.interpolate(anomaly_map[:, None], image.shape[-2:], mode="bilinear")[:, 0], score


def encode_text(clip, sentences):
    """Return the unit-length text features (n, D) of n sentences."""
    import open_clip  # imported here: it would delay --help by a second

    tokens = open_clip.tokenize(sentences, clip.context_length).to(clip.positional_embedding.device)  # (n, 77)
    return clip.encode_text(tokens, normalize=True)


def build_model(args):
    return WinCLIP(args)


# ------------------------------------------------------------------------------------------------------------ sentences
# Our own words for the sentences: the type of image, names of the organ, possible findings.
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
# The paper's sentences, for `--prompts original`; {a} stands for "a" and "the".
PAPER_NORMAL = ["{o}", "perfect {o}", "flawless {o}", "unblemished {o}", "{o} without flaw", "{o} without defect",
                "{o} without damage"]
PAPER_ANOMALOUS = ["damaged {o}", "{o} with flaw", "{o} with defect", "{o} with damage"]
PAPER_TEMPLATES = ["a cropped photo of {a} {s}.", "a close-up photo of {a} {s}.", "a bright photo of {a} {s}.",
                   "a dark photo of {a} {s}.", "a jpeg corrupted photo of {a} {s}.", "a blurry photo of {a} {s}.",
                   "a photo of {a} {s}.", "a photo of {a} small {s}.", "a photo of {a} large {s}.",
                   "a photo of {a} {s} for visual inspection.", "a photo of {a} {s} for anomaly detection."]


def benchmark_words(data):
    """Return the key of WORDS that matches the name of the folder `data`, or generic if none does."""
    name = Path(data).resolve().name.lower()
    return next((key for key, folders in common.NAMES.items() if name in folders), "generic")


def own_sentences(file):
    """Return a text file's sentences in the form that `sentences` returns, with one state per class."""
    try:
        lines = [line.partition(":") for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise common.Error(f"--sentences {file} cannot be read ({e}); give a text file") from e
    classes = [[[text.strip() for name, _, text in lines if name.strip() == kind]] for kind in ("normal", "anomalous")]
    if sum(len(states[0]) for states in classes) < len(lines) or not all(states[0] for states in classes):
        raise common.Error(f'--sentences {file}: begin each line with "normal:" or "anomalous:"; both are needed')
    return classes


def sentences(words, prompts, findings, organ=None):
    """Return the states of the normal and of the anomalous class, each state as a list of sentences."""
    modality, organs, names = WORDS[words]
    organs = [organ] if organ else organs
    names = names if findings in ("none", "named") else [name.strip() for name in findings.split(",")]
    classes, templates = (NORMAL, ANOMALOUS), TEMPLATES
    if prompts == "original":
        classes, organs = (PAPER_NORMAL, PAPER_ANOMALOUS), organs[:1]
        templates = [t.replace("{a}", a) for t in PAPER_TEMPLATES for a in ("a", "the")]

    def written(state):
        texts = [t.format(m=modality, s=state.format(o=o, f=f)) for t in templates for o in organs
                 for f in (names if "{f}" in state else [""])]
        return [re.sub(r"\ba (?=[aeiou]|H&E)", "an ", text) for text in texts]

    return [[written(s) for s in states if findings != "none" or "{f}" not in s] for states in classes]


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args, zero_shot=not args.shots)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        if args.shots and args.shots > len(train):
            raise common.Error(f"--shots {args.shots}: there are only {len(train)} normal training images")
        words = benchmark_words(args.predict or args.data) if args.words == "auto" else args.words
        classes = own_sentences(args.sentences) if args.sentences else sentences(
            words, args.prompts, args.findings, args.organ)
        run.notes = dict(words=words, sentences=[sum(map(len, states)) for states in classes])
        print("sentences:", run.notes, flush=True)
        model.set_classes(classes)
        if args.shots:
            drawn = np.random.default_rng(args.seed).permutation(len(train))[: args.shots]
            run.notes["references"] = [train.paths[i] for i in drawn]
            model.set_references(train.batch(drawn, run.device))
        run.keep(model)
    common.finish(run, model, (train, valid, test))
