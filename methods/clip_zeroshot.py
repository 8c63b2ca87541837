"""CLIP, zero-shot (Radford et al., ICML 2021, arXiv:2103.00020), a row of the thesis' Tables 4.1 to 4.4.

One sentence a class: an image is the more anomalous, the nearer its feature is to that of "{m} of an abnormal {o}",
compared with "{m} of a normal {o}". The map asks the same of each patch. Nothing is trained, nothing is random.

Settings: the thesis gives no sentences, sizes or model for its row, and does not say where its deviations come from.
The model is WinCLIP's, so that the two rows differ by method alone; the temperature is trained CLIP's own.
Differences from the paper: it has no map. Ours puts the last block's patches through the class token's norm and
projection, as AnoVL and VAND do before they train or change anything.
Known trap: CLIP was trained through its class token only, and its patches often answer the opposite of the text. A
pixel AUROC below 0.5 is then a property of plain CLIP, no error; attention from values to values (MaskCLIP, CLIP
Surgery, AnoVL) mends it, and is another method. Scores are not turned round here.
`--prompts ensemble` takes the mean of WinCLIP's medical sentences for each class. They name what may be found (tumor,
drusen), which uses knowledge of the disease; `--findings none` leaves it out. results.json says under `notes` what was
used.

Cost, measured, of the default on one CPU thread: 3 s to begin with, 0.7 s an image; 1.8 GiB with eight images a batch.
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
TAU = 0.01  # temperature of the softmax over the two classes

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
PLAIN = ["{m} of a normal {o}", "{m} of an abnormal {o}"]
# For `--prompts ensemble`, as in winclip.py.
NORMAL = ["normal {o}", "healthy {o}", "{o} without abnormality", "{o} with no {f}", "unremarkable {o}"]
ANOMALOUS = ["abnormal {o}", "diseased {o}", "{o} with {f}", "{o} showing {f}", "{o} with signs of {f}"]
TEMPLATES = ["{m} of the {s}", "a {m} of a {s}", "an image of the {s}", "a medical image of a {s}",
             "a close-up {m} of the {s}", "a low-contrast {m} of the {s}", "a bright {m} of the {s}",
             "a noisy {m} of the {s}"]


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
    batch_size: int = 32
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
    prompts: Literal["plain", "ensemble"] = "plain"
    """one sentence a class, or the mean of many"""
    findings: Literal["named", "none"] = "named"
    """the ensemble names what may be found, or speaks of normal and abnormal only; plain sentences never do"""


# -------------------------------------------------------------------------------------------------------- the sentences
def benchmark_words(data):
    """The row of WORDS for --data: that of a benchmark or of a folder with its name, else generic."""
    name = Path(data).resolve().name.lower()
    return next((key for key, folders in common.NAMES.items() if name in folders), "generic")


def sentences(words, prompts, findings):
    """For the normal and for the anomalous class: a list of states, each a list of sentences."""
    modality, organs, found = WORDS[words]
    if prompts == "plain":
        return [[[sentence.format(m=modality, o=organs[0])]] for sentence in PLAIN]
    classes = []
    for kinds in (NORMAL, ANOMALOUS):
        kinds = [s for s in kinds if findings == "named" or "{f}" not in s]
        classes.append([[t.format(m=modality, s=s.format(o=o, f=f)) for t, o, f in
                         itertools.product(TEMPLATES, organs, found if "{f}" in s else [""])] for s in kinds])
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
class ZeroShot(nn.Module):
    """P = h * w patches; D CLIP's joint width, W that of its image tower."""

    def __init__(self, args):
        super().__init__()
        clip = load_clip(args.model, args.clip_weights, args.clip_size)
        if 0 in clip.visual.grid_size:
            raise common.Error(f"--clip-size {args.clip_size} is smaller than a patch of {args.model}")
        self.clip, self.size = clip, args.clip_size
        self.register_buffer("text", torch.zeros(2, clip.visual.output_dim))  # of the normal and the anomalous class

    @torch.inference_mode()
    def read(self, classes):
        """Take the text features from `sentences`: sentences of a state, then states of a class weigh the same."""
        for i, states in enumerate(classes):
            means = [F.normalize(text_features(self.clip, s), dim=1).mean(dim=0) for s in states]
            self.text[i] = F.normalize(torch.stack(means).mean(dim=0), dim=0)

    @torch.inference_mode()
    def predict(self, image):
        """Anomaly map (B, H, W), anomaly score (B,): the anomalous class' part of the softmax, in [0, 1]."""
        self.eval()
        small = image
        if image.shape[-1] != self.size:
            small = F.interpolate(image, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        found = self.clip.visual.forward_intermediates(
            common.normalize(small, self.clip.mean, self.clip.std), indices=1, output_fmt="NLC",
            normalize_intermediates=True, intermediates_only=True, output_extra_tokens=True)  # the last block, ln_post
        tokens = torch.cat(found["image_intermediates_prefix"] + found["image_intermediates"], dim=1)  # (B, 1 + P, W)
        feature = F.normalize(tokens @ self.clip.visual.proj, dim=-1)  # (B, 1 + P, D)
        score = (feature @ self.text.T / TAU).softmax(dim=-1)[..., 1]  # (B, 1 + P, 2) -> (B, 1 + P)
        anomaly_map = score[:, 1:].unflatten(1, self.clip.visual.grid_size)[:, None]  # (B, 1, h, w)
        return F.interpolate(anomaly_map, image.shape[-2:], mode="bilinear")[:, 0], score[:, 0]  # 0: the class token


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    run = common.start_run(__file__, args)
    train, valid, test = common.load_benchmark(args)
    model = ZeroShot(args).to(run.device)
    if not args.checkpoint:
        words = benchmark_words(args.data) if args.words == "auto" else args.words
        classes = sentences(words, args.prompts, args.findings)
        run.notes = dict(words=words, prompts=args.prompts,
                         findings=args.findings if args.prompts == "ensemble" else "none",
                         sentences=[sum(map(len, states)) for states in classes])
        print("sentences:", run.notes, flush=True)
        model.read(classes)
        run.keep(model)
    common.finish(run, model, (train, valid, test))
