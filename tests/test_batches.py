"""No score or map depends on the other images of its batch: each method, small, untrained, in float64.

In float32 batches of different sizes are rounded differently, and untrained networks tell images apart by little more
than that; tests/README.md has the figures of trained ones."""

import json

import numpy as np
import pytest
import torch
from conftest import load_script, once
from PIL import Image
from test_methods import METHODS, SHORT, run_here

NET = dict(backbone="mobilenet_v2", weights="none", image_size=64)
CLIP = dict(model="tiny", clip_weights="none", image_size=64)
CLASSES = [[["a normal brain"]], [["a brain with a lesion"]]]
TABLE = {  # method: (its arguments, what has to be fitted before it scores)
    "anogan": (dict(image_size=32, width=8, steps=20), None),
    "cfa": (NET, lambda m, image: m.fill_memory_bank([m.features(image)])),
    "cflow": (NET | dict(blocks=2), lambda m, image: m.find_likeliest([m.features(image)])),
    "clip_recon": (CLIP | dict(backbone="mobilenet_v2", weights="none"), None),
    "clip_zeroshot": (CLIP | dict(clip_size=64), lambda m, image: m.set_classes(CLASSES)),
    "csflow": (NET | dict(image_size=128, hidden=16), None),
    "cutpaste": (NET, lambda m, image: m.fit([image])),
    "ddpm": (dict(image_size=16, base_channels=8, multipliers=(1, 2), sample_steps=2, noise_level=20), None),
    "deepsvdd": (dict(image_size=64), lambda m, image: m.init_center(m.load([image]))),
    "draem": (dict(image_size=64, width=4), None),
    "fanogan": (dict(image_size=32), None),
    "ganomaly": (dict(image_size=32, features=8), None),
    "mkd": (NET, None),
    "padim": (NET, lambda m, image: m.fit([image])),
    "patchcore": (NET, lambda m, image: m.fit(Images(image), 4, torch.device("cpu"))),
    "patchsvdd": (dict(image_size=80), lambda m, image: (m.fit_mean([image]), m.fit(Images(image), 4, "cpu", 10**6))),
    "rd4ad": (NET, None),
    "simplenet": (NET, None),
    "stfpm": (NET, None),
    "utrad": (NET | dict(width=64, layers=1), None),
    "winclip": (CLIP | dict(clip_size=64, shots=2),
                lambda m, image: (m.set_classes(CLASSES), m.set_references(image[:2]))),
}


class Images:
    """Training images (N, 3, H, W), as a `common.Split` yields them."""

    def __init__(self, image):
        self.image = image

    def __len__(self):
        return len(self.image)

    def batches(self, size, *_, **__):
        return self.image.split(size)


def images(count, size, seed):
    """Smooth colours, each image with a contrast of its own, so that scores have a range."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=draw) * torch.linspace(0.1, 1, count).view(-1, 1, 1, 1)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fitted(method):
    """A model, and seven images to score."""
    arguments, fit = TABLE[method]
    script = load_script(f"methods/{method}.py")
    torch.manual_seed(0)
    model = script.build_model(script.Args(**arguments)).eval()
    for p in model.parameters():  # of layers that start as zero, which would leave nothing to compare
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    if fit:
        fit(model, images(12, arguments["image_size"], seed=1))
    return model, images(7, arguments["image_size"], seed=2)


@torch.no_grad()
def largest_difference(model, image):
    """Of scores, and of maps, between batches of 1, 3 and 7: a share of the range of all."""
    results = [zip(*(model.predict(part) for part in image.split(size)), strict=True) for size in (7, 3, 1)]
    shares = []
    for whole, *others in zip(*results, strict=True):
        if whole[0] is not None:
            whole, *others = (torch.cat(parts) for parts in (whole, *others))
            assert whole.max() > whole.min()
            difference = max(float((whole - other).abs().max()) for other in others)
            shares.append(difference / float(whole.max() - whole.min()))
    return max(shares)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", TABLE)
def test_scores_and_maps_do_not_depend_on_the_batch(method):
    assert largest_difference(*fitted(method)) <= 1e-9


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """The root folder of a benchmark whose images are all the same grey; no batch size divides its test set."""
    def make(root):
        for folder, count in (("train/good", 8), ("valid/good", 3), ("valid/Ungood", 3), ("test/good", 4),
                              ("test/Ungood", 7)):
            (root / "grey" / folder).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((64, 64), 100, np.uint8)).save(root / "grey" / folder / f"{i}.png")

    return once(tmp_path_factory, "constant-root", make)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_equal_images_get_equal_scores_so_that_auroc_is_one_half(method, constant, tmp_path):
    words = ["--words", "generic"] * (method in ("clip_zeroshot", "winclip"))
    run_here(method, "--data", constant / "grey", "--root", constant, "--out", tmp_path, "--device", "cpu", "--maps", 0,
             *SHORT[method], *words)
    results = json.loads((tmp_path / "grey" / method / "seed0/results.json").read_text())
    assert results["metrics"]["image_auroc"] == 0.5
