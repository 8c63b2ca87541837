"""What could never be checked without published CLIP weights: `python tests/clip.py --clip-weights FILE`.

For whoever has the weights (or a network: --clip-weights laion400m_e32 downloads them). About ten minutes on a CPU.
What must come out is written here beforehand; a check that fails is marked, and the exit code is 1.

1. Two photographs that scikit-learn ships, a Chinese temple and a flower, each get the highest similarity from their
   own sentence, of six. Trained CLIP: cosines of 0.15 to 0.45 with the own sentence, 0.02 or more above the others.
2. Upside down or mirrored they are still told apart (the image encoder sees content, not positions).
3. WinCLIP's windows see different things: on the temple the cosine between two windows' features is below 0.95 in the
   median, and the windows' similarities to "a photo of the sky" are higher in the top third than in the bottom third.
4. clip_recon on the phantom: the loss falls to 0.9 of its start or less within --steps steps, and the trained model's
   image AUROC on 24 + 24 images is above the untrained model's."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from sklearn.datasets import load_sample_image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "methods")]
import clip_recon
import winclip

import common

SENTENCES = ["a photo of a Chinese temple", "a photo of a flower", "a photo of a dog", "a photo of a car",
             "a brain MRI slice", "a photo of a plate of food"]


@dataclass
class Args:
    clip_weights: str
    """a FILE with the weights of --model, or a tag of open_clip"""
    model: str = "ViT-B-16-plus-240"
    """open_clip's name of the model"""
    image_size: int = 240
    """pixels that CLIP sees"""
    root: str = "data"
    """folder with the phantom (datasets/phantom.py)"""
    steps: int = 60
    """training steps of clip_recon"""


def check(what, holds, figures):
    print(f"{'ok    ' if holds else 'FAILED'} {what}: {figures}", flush=True)
    return bool(holds)


def photographs(size):
    """The temple and the flower, (2, 3, size, size) in [0, 1]."""
    images = [torch.from_numpy(load_sample_image(f"{name}.jpg").copy()) for name in ("china", "flower")]
    images = [image.permute(2, 0, 1)[None].float() / 255 for image in images]  # (1, 3, 427, 640)
    return torch.cat([torch.nn.functional.interpolate(i, (size, size), mode="bicubic", antialias=True) for i in images]
                     ).clamp(0, 1)


@torch.inference_mode()
def zero_shot(args):
    """Checks 1 to 3."""
    asked = tyro.cli(winclip.Args, args=["--model", args.model, "--clip-weights", args.clip_weights, "--clip-size",
                                         str(args.image_size)])
    model = winclip.build_model(asked).eval()
    images, text = photographs(args.image_size), winclip.encode_text(model.clip, SENTENCES)  # (6, D)
    whole, windows = model.features(images)
    cosine = whole @ text.T  # (2, 6)
    own = cosine.diagonal()
    margin = own - cosine.masked_fill(torch.eye(2, 6, dtype=torch.bool), -1).amax(dim=1)
    yield check("each photograph's own sentence is the most similar", (margin > 0).all(), f"margins {margin.tolist()}")
    yield check("by 0.02 or more, with cosines of 0.15 to 0.45",
                ((own >= 0.15) & (own <= 0.45) & (margin >= 0.02)).all(), f"cosines {own.tolist()}")
    turned = torch.cat([images.flip(-1), images.flip(-2)])  # mirrored, upside down
    answers = (model.features(turned)[0] @ text[:2].T).argmax(dim=1).tolist()
    yield check("mirrored and upside down they are told apart", answers == [0, 1, 0, 1], answers)
    features = windows[2][0]  # (n, D) of the temple's 2 x 2 windows
    between = (features @ features.T).median()
    yield check("windows see different things", between < 0.95, f"median cosine {between:.3f}")
    sky = (features @ winclip.encode_text(model.clip, ["a photo of the sky"]).T).view(model.grid[0] - 1, -1)  # (h, w)
    third = len(sky) // 3
    top, bottom = float(sky[:third].mean()), float(sky[-third:].mean())
    yield check("the sky is found at the top of the temple", top > bottom, f"{top:.3f} above, {bottom:.3f} below")


def reconstruction(args):
    """Check 4."""
    size = args.image_size // 16 * 16
    asked = tyro.cli(clip_recon.Args, args=["--model", args.model, "--clip-weights", args.clip_weights, "--image-size",
                                            str(size), "--lr", "1e-2", "--batch-size", "2"])
    asked.root, asked.limit = args.root, 24
    train, _, test = common.load_benchmark(asked)
    torch.manual_seed(0)
    model = clip_recon.build_model(asked)
    untrained = common.evaluate(model, test, 2, "cpu").metrics["image_auroc"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], asked.lr)
    losses, batches = [], []
    while len(losses) < args.steps:
        batches = batches or list(train.batches(2, shuffle=len(losses)))
        where = torch.randperm(len(model.prompts))[:16]
        loss = sum(d.mean() for d in model.distances(model.image_features(batches.pop()), where))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    fifth = max(1, args.steps // 5)
    start, end = np.mean(losses[:fifth]), np.mean(losses[-fifth:])
    yield check("clip_recon's loss falls", end <= 0.9 * start, f"{start:.4f} to {end:.4f}")
    trained = common.evaluate(model, test, 2, "cpu").metrics["image_auroc"]
    yield check("clip_recon is better trained than untrained", trained > untrained, f"{untrained:.3f} to {trained:.3f}")


if __name__ == "__main__":
    args = common.command_line(Args, __doc__)
    passed = [*zero_shot(args), *reconstruction(args)]
    print(f"{sum(passed)} of {len(passed)} checks hold")
    raise SystemExit(int(not all(passed)))
