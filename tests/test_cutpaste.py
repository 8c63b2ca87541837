"""The mathematics of CutPaste: patches and scars against Pillow, drawn sizes, the Gaussian against scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from PIL import Image
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf

import common

cutpaste = load_script("methods/cutpaste.py")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def images():
    """Smooth random coloured images (6, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear")


@pytest.fixture
def plain(monkeypatch):
    """Patches without jitter."""
    monkeypatch.setattr(cutpaste, "jitter", lambda image: image)


def draws(monkeypatch, *values):
    """Make the draws of one augmentation known."""
    left = list(values)
    monkeypatch.setattr(cutpaste, "uniform", lambda low, high: left.pop(0))


def test_jitter_stays_in_range_differs_by_image_and_leaves_its_input_alone(images):
    kept = images[0].clone()
    jittered = torch.stack([cutpaste.jitter(images[0]) for _ in range(6)])
    assert jittered.min() >= 0 and jittered.max() <= 1 and torch.equal(images[0], kept)
    assert len({round(float(x.sum()), 3) for x in jittered}) == 6
    grey = torch.stack([cutpaste.jitter(image[:1].expand(3, -1, -1)) for image in images])
    assert torch.allclose(grey, grey[:, :1].expand_as(grey), atol=1e-6) and (grey - images[:, :1]).abs().max() < 0.2


def test_drawn_patches_have_the_published_sizes_and_lie_inside(monkeypatch):
    sizes, places = [], []
    cut, corner = cutpaste.cut, cutpaste.corner
    monkeypatch.setattr(cutpaste, "jitter", lambda image: image)
    monkeypatch.setattr(cutpaste, "cut", lambda image, height, width:
                        sizes.append((height, width)) or cut(image, height, width))
    monkeypatch.setattr(cutpaste, "corner", lambda image, height, width:
                        places.append((height, width, *corner(image, height, width))) or places[-1][2:])
    image = torch.zeros(3, 256, 256)
    for _ in range(2000):
        cutpaste.cutpaste(image)
    height, width = np.array(sizes).T
    share, aspect = height * width / 256**2, width / height
    assert 0.0195 < share.min() < 0.022 and 0.148 < share.max() < 0.152 and abs(share.mean() - 0.085) < 0.003
    assert 0.28 < aspect.min() < 0.32 and 3.1 < aspect.max() < 3.5 and abs(np.log(aspect).mean()) < 0.05
    sizes.clear()
    for _ in range(2000):
        cutpaste.scar(image)
    assert np.min(sizes, 0).tolist() == [10, 2] and np.max(sizes, 0).tolist() == [25, 16]
    height, width, top, left = np.array(places).T
    assert len(places) == 8000 and min(top.min(), left.min()) == 0
    assert (top + height <= 256).all() and (left + width <= 256).all()
    assert (top + height).max() > 250 and (left + width).max() > 250
    assert max(height[4001::2].max(), width[4001::2].max()) <= 31  # the least --image-size is 32


def test_an_unturned_patch_is_an_exact_copy(images, plain, monkeypatch):
    draws(monkeypatch, 45 / 64**2, math.log(9 / 5), 10.7, 20.2, 40.9, 3.0)  # 5x9 pixels from (10, 20) to (40, 3)
    pasted = cutpaste.cutpaste(images[0])
    expected = images[0].clone()
    expected[:, 40:45, 3:12] = images[0, :, 10:15, 20:29]
    assert torch.equal(pasted, expected)


@pytest.mark.parametrize("degrees", [-45, -30.3, -7, 12.5, 44])
def test_a_scar_equals_pillows(degrees, plain, monkeypatch):
    pixels = np.random.default_rng(0).integers(1, 256, (64, 64, 3)).astype(np.uint8)
    height, width, source, target = 21, 7, (11, 30), (20, 5)
    draws(monkeypatch, width, height, *source, degrees, *target)
    ours = cutpaste.scar(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    image = Image.fromarray(pixels)
    patch = image.crop((source[1], source[0], source[1] + width, source[0] + height))
    turned = patch.convert("RGBA").rotate(degrees, expand=True)
    image.paste(turned.convert("RGB"), target[::-1], mask=turned.split()[-1])
    ours = (ours.permute(1, 2, 0) * 255).round().byte().numpy()
    assert (ours != np.asarray(image)).any(axis=2).sum() <= 2  # of 147: rounding where a pixel's edge is met


def test_three_way_batches_hold_normal_patch_and_scar_of_the_same_jittered_image(images):
    kept = images.clone()
    batch, label = cutpaste.three_way(images)
    assert torch.equal(images, kept) and label.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    normal, patched, scarred = batch.chunk(3)
    assert 0.001 < float((normal - images).abs().mean()) < 0.2
    for pasted, most in ((patched, 0.16), (scarred, 0.12)):
        share = (pasted != normal).any(dim=1).float().mean(dim=(1, 2))
        assert (share > 0).all() and (share < most).all()
    normal, *pasted = cutpaste.three_way(torch.zeros(2, 3, 64, 64))[0].chunk(3)
    assert all(torch.equal(normal, other) for other in pasted)  # black on black


def test_draws_follow_from_pytorchs_random_state_alone(images):
    state = torch.get_rng_state()
    first, _ = cutpaste.three_way(images)
    np.random.seed(5)
    torch.set_rng_state(state)
    again, _ = cutpaste.three_way(images)
    assert torch.equal(first, again) and not torch.equal(first, cutpaste.three_way(images)[0])


def test_scores_are_mahalanobis_distances_of_normalised_embeddings(images):
    model = cutpaste.CutPaste("mobilenet_v2", "none")
    model.fit([images[:3], images[3:5]])
    anomaly_map, score = model.predict(images)
    with torch.no_grad():
        e = model.embed(images).double().numpy()
    assert anomaly_map is None and np.allclose(np.linalg.norm(e, axis=1), 1)
    reference = LedoitWolf().fit(e[:5])
    expected = [mahalanobis(x, reference.location_, reference.precision_) for x in e]
    assert score.tolist() == pytest.approx(expected, rel=1e-3)
    assert {"mean", "whiten"} < set(model.state_dict())


def test_where_all_training_images_are_equal_no_score_differs(images):
    model = cutpaste.CutPaste("mobilenet_v2", "none")
    model.fit([images[:1].expand(4, -1, -1, -1)])
    assert model.predict(images)[1].unique().numel() == 1


def test_embeddings_that_are_not_finite_end_with_one_line(images):
    with pytest.raises(common.Error, match="lower --lr"):
        cutpaste.CutPaste("mobilenet_v2", "none").fit([images * torch.nan])


def test_parameters_are_as_many_as_the_peers():
    model = cutpaste.build_model(cutpaste.Args(weights="none"))
    count = [sum(p.numel() for p in m.parameters()) for m in (model.backbone, model.head)]
    assert count == [11_176_512, 593_667] and model.head[0].in_features == len(model.mean) == 512
    assert cutpaste.CutPaste("mobilenet_v2", "none").head[0].in_features == 1280


def test_each_pass_over_the_images_has_its_own_order_and_whole_batches():
    class Train:
        def __len__(self):
            return 5

        def batch(self, indices, device):
            return indices.tolist()

    batches = [cutpaste.batch_of(Train(), step, cutpaste.Args(batch_size=2), "cpu") for step in range(4)]
    assert batches[:2] != batches[2:] and len(set(sum(batches[:2], []))) == 4 == len(set(sum(batches[2:], [])))
    assert cutpaste.batch_of(Train(), 3, cutpaste.Args(batch_size=2), "cpu") == batches[3]


def test_only_what_is_thawed_is_trained(images):
    model = cutpaste.CutPaste("resnet18", "none").train()
    model.backbone.requires_grad_(False)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.03, 0.9, weight_decay=3e-5)
    batch, label = cutpaste.three_way(images[:2, :, :32, :32])
    F.cross_entropy(model(batch), label).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])}
    assert all(k.startswith("head.") or "running" in k or "tracked" in k for k in changed)
    assert "head.0.weight" in changed and "backbone.layer4.1.bn2.running_mean" in changed
