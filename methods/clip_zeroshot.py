"""Zero-shot CLIP (Radford et al., ICML 2021, arXiv:2103.00020), one of the methods in the thesis' Tables 4.1 to 4.4.

One sentence describes each class. An image is anomalous if its feature is closer to that of "{m} of an abnormal {o}"
than to that of "{m} of a normal {o}" (m: kind of image, o: organ). The anomaly map compares each patch in the same way.
There is no training and no randomness.

Settings: the thesis does not give this method's sentences, image sizes or model, nor the source of its standard
deviations. We use WinCLIP's model, so that only the methods differ, and the temperature of trained CLIP.
Differences from the paper: the paper has no anomaly map. We apply the class token's layer norm and projection to the
patch tokens of the last block, as AnoVL and VAND do before they train or change anything. `--prompts ensemble` averages
the medical sentences of winclip.py for each class.
Note: CLIP was trained only through its class token, and its patch tokens often contradict the text. A pixel AUROC
below 0.5 is therefore a property of plain CLIP, not an error. Value-value attention (MaskCLIP, CLIP Surgery, AnoVL)
corrects this, but is a different method. Scores are never inverted here.

Cost of the default settings on one CPU thread: 3 s for the sentences, 0.7 s per image; 1.8 GiB of memory with batches
of 8.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import common

TAU = 0.01  # temperature of the softmax over the two classes


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
    batch_size: Annotated[int, Ge(1)] = 32
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
    prompts: Literal["plain", "ensemble"] = "plain"
    """plain: one sentence per class; ensemble: the average over many sentences"""
    organ: str | None = None
    """what the images show, in your own words, such as "knee", instead of the organ in WORDS"""
    findings: str = "none"
    """findings in ensemble sentences (never in plain sentences); none: the organ is only called normal or abnormal;
    named: those in WORDS, such as tumor or drusen (uses knowledge of the disease); or your own, separated by commas"""
    sentences: str | None = None
    """use the sentences in this text FILE instead, one per line, each after "normal:" or "anomalous:\""""


class ZeroShot(nn.Module):
    """Shapes: P = h * w patches; D: width of CLIP's joint space, W: width of its image encoder."""

    def __init__(self, args):
        super().__init__()
        self.clip, self.size = common.load_clip(args.model, args.clip_weights, args.clip_size), args.clip_size
        self.register_buffer("text", torch.zeros(2, self.clip.visual.output_dim))  # normal, anomalous

    @torch.inference_mode()
    def set_classes(self, classes):
        """Set each class's text feature: the mean over each state's sentences, then over states (see `sentences`)."""
        for i, states in enumerate(classes):
            means = [encode_text(self.clip, texts).mean(dim=0) for texts in states]  # (D,) each
            self.text[i] = F.normalize(torch.stack(means).mean(dim=0), dim=0)

    @torch.inference_mode()
    def predict(self, image):
        """Return the anomaly map (B, H, W) and the score (B,): softmax probabilities of the anomalous class."""
        self.eval()
        encoder, small = self.clip.visual, image
        if image.shape[-1] != self.size:
            small = F.interpolate(image, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        last = encoder.forward_intermediates(
            common.normalize(small, self.clip.mean, self.clip.std), indices=1, output_fmt="NLC",
            normalize_intermediates=True, intermediates_only=True, output_extra_tokens=True)  # last block with ln_post
        tokens = torch.cat(last["image_intermediates_prefix"] + last["image_intermediates"], dim=1)  # (B, 1 + P, W)
        feature = F.normalize(tokens @ encoder.proj, dim=-1)  # (B, 1 + P, D)
        score = (feature @ self.text.T / TAU).softmax(dim=-1)[..., 1]  # (B, 1 + P, 2) -> (B, 1 + P)
        anomaly_map = score[:, 1:].unflatten(1, encoder.grid_size)[:, None]  # (B, 1, h, w)
        return F.interpolate(anomaly_map, image.shape[-2:], mode="bilinear")[:, 0], score[:, 0]  # the class token's


def encode_text(clip, sentences):
    """Return the unit-length text features (n, D) of n sentences."""
    import open_clip  # imported here: it would delay --help by a second

    tokens = open_clip.tokenize(sentences, clip.context_length).to(clip.positional_embedding.device)  # (n, 77)
    return clip.encode_text(tokens, normalize=True)


def build_model(args):
    return ZeroShot(args)


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
PLAIN = ["{m} of a normal {o}", "{m} of an abnormal {o}"]
# For `--prompts ensemble`, as in winclip.py.
NORMAL = ["normal {o}", "healthy {o}", "{o} without abnormality", "{o} with no {f}", "unremarkable {o}"]
ANOMALOUS = ["abnormal {o}", "diseased {o}", "{o} with {f}", "{o} showing {f}", "{o} with signs of {f}"]
TEMPLATES = ["{m} of the {s}", "a {m} of a {s}", "an image of the {s}", "a medical image of a {s}",
             "a close-up {m} of the {s}", "a low-contrast {m} of the {s}", "a bright {m} of the {s}",
             "a noisy {m} of the {s}"]


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
    if prompts == "plain":
        return [[[sentence.format(m=modality, o=organs[0])]] for sentence in PLAIN]

    def written(state):
        texts = [t.format(m=modality, s=state.format(o=o, f=f)) for t in TEMPLATES for o in organs
                 for f in (names if "{f}" in state else [""])]
        return [re.sub(r"\ba (?=[aeiou]|H&E)", "an ", text) for text in texts]

    return [[written(s) for s in states if findings != "none" or "{f}" not in s] for states in (NORMAL, ANOMALOUS)]


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.Run(__file__, args, zero_shot=True)
    train, valid, test = common.load_benchmark(args)
    model = build_model(args).to(run.device)
    if not args.checkpoint:
        words = benchmark_words(args.predict or args.data) if args.words == "auto" else args.words
        classes = own_sentences(args.sentences) if args.sentences else sentences(
            words, args.prompts, args.findings, args.organ)
        run.notes = dict(words=words, sentences=[sum(map(len, states)) for states in classes])
        print("sentences:", run.notes, flush=True)
        model.set_classes(classes)
        run.keep(model)
    common.finish(run, model, (train, valid, test))
