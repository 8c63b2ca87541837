"""The mathematics of CutPaste: jitter and patches against torchvision and Pillow, the Gaussian against scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from PIL import Image
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from torchvision.transforms import functional as TF

cutpaste = load_script("methods/cutpaste.py")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def images():
    """Smooth random coloured images (6, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear")


@pytest.mark.parametrize("ours, theirs, offset", [
    (cutpaste.brightness, TF.adjust_brightness, 1), (cutpaste.contrast, TF.adjust_contrast, 1),
    (cutpaste.saturation, TF.adjust_saturation, 1), (cutpaste.hue, TF.adjust_hue, 0)])
def test_jitter_operations_equal_torchvision_for_each_image(ours, theirs, offset, images):
    amount = torch.tensor([-0.1, -0.07, -0.01, 0.0, 0.05, 0.1]).view(-1, 1, 1, 1)
    found = ours(images, amount, torch.ones_like(images[:, :1]))
    for x, a, y in zip(images, amount.flatten().tolist(), found, strict=True):
        assert torch.allclose(y, theirs(x, offset + a), atol=1e-5)


def test_hue_of_pure_grey_black_and_primary_colours():
    colour = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5], [0, 0, 0]])[:, :, None, None]
    turned = cutpaste.hue(colour, torch.tensor(1 / 3), None)[..., 0, 0]  # red -> green -> blue -> red
    expected = colour[[1, 2, 0, 3, 4], :, 0, 0]
    assert torch.allclose(turned, expected, atol=1e-6)


def test_contrast_of_a_patch_takes_the_mean_of_the_patch():
    image = torch.zeros(1, 3, 4, 4)
    image[:, :, :2] = torch.tensor([0.4, 0.8])[:, None].repeat(1, 2).flatten()  # the upper half: 0.4 0.4 0.8 0.8
    inside = torch.zeros(1, 1, 4, 4)
    inside[:, :, :2] = 1
    found = cutpaste.contrast(image, torch.tensor(0.1).view(1, 1, 1, 1), inside)
    mean = 0.6 * (0.2989 + 0.587 + 0.114)
    assert torch.allclose(found[0, 0, 0], torch.tensor([0.44, 0.44, 0.88, 0.88]) - 0.1 * mean, atol=1e-6)


def test_jitter_stays_in_range_differs_by_image_and_leaves_its_input_alone(images):
    same = images[:1].expand(6, -1, -1, -1)
    found = cutpaste.jitter(same)
    assert found.min() >= 0 and found.max() <= 1
    assert len({round(float(x.sum()), 3) for x in found}) == 6
    assert torch.equal(same[5], images[0])
    grey = cutpaste.jitter(images[:, :1].expand(-1, 3, -1, -1))
    assert torch.allclose(grey, grey[:, :1].expand_as(grey), atol=1e-6) and (grey - images[:, :1]).abs().max() < 0.2


def test_drawn_patches_have_the_published_sizes_and_lie_inside():
    n, side = 4000, 256
    patch = cutpaste.draw_cutpaste(n, side)
    share, aspect = patch.size.prod(dim=1) / side**2, patch.size[:, 1] / patch.size[:, 0]
    assert share.min() > 0.019 and share.max() < 0.152 and abs(share.mean() - 0.085) < 0.003
    assert aspect.min() > 0.28 and aspect.max() < 3.5 and abs(aspect.log().mean()) < 0.05
    scar = cutpaste.draw_scar(n, side)
    assert scar.size.amin(dim=0).tolist() == [10, 2] and scar.size.amax(dim=0).tolist() == [25, 16]
    assert scar.angle.abs().max() <= math.pi / 4
    for p in (patch, scar):
        assert (p.source >= 0).all() and (p.source + p.size <= side).all()
        assert (p.target >= 0).all() and (p.target + cutpaste.bounding_box(p.size, p.angle) <= side).all()
        assert p.source.frac().abs().max() == 0 and p.target.frac().abs().max() == 0


def test_an_unturned_patch_is_an_exact_copy(images):
    patch = cutpaste.Patch(torch.tensor([[5.0, 9.0]]), torch.zeros(1), torch.tensor([[10.0, 20.0]]),
                           torch.tensor([[40.0, 3.0]]))
    moved, inside = cutpaste.cut(images[:1], patch)
    assert inside.sum() == 45 and inside[0, 0, 40:45, 3:12].all()
    assert torch.equal(moved[0, :, 40:45, 3:12], images[0, :, 10:15, 20:29])


@pytest.mark.parametrize("degrees", [-45, -30.3, -7, 12.5, 44])
def test_a_turned_patch_equals_pillows(degrees):
    pixels = np.random.default_rng(0).integers(1, 256, (64, 64, 3)).astype(np.uint8)
    size, source, target = (21, 7), (11, 30), (20, 5)
    patch = cutpaste.Patch(*(torch.tensor([v]).float() for v in (size, math.radians(degrees), source, target)))
    moved, inside = cutpaste.cut(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), patch)
    ours = torch.where(inside, moved, 0)[0].permute(1, 2, 0).numpy().astype(np.uint8)
    image = Image.fromarray(pixels).crop((source[1], source[0], source[1] + size[1], source[0] + size[0]))
    turned = image.convert("RGBA").rotate(degrees, expand=True)
    assert turned.size[::-1] == tuple(cutpaste.bounding_box(patch.size, patch.angle)[0].int().tolist())
    expected = Image.new("RGB", (64, 64))
    expected.paste(turned.convert("RGB"), target[::-1], mask=turned.split()[-1])
    assert (ours != np.asarray(expected)).any(axis=2).sum() <= 2  # of 147: rounding where a pixel's edge is met


def test_pasting_changes_covered_pixels_only(images):
    patch = cutpaste.draw_scar(len(images), 64)
    _, inside = cutpaste.cut(images, patch)
    found = cutpaste.paste(images, patch)
    changed = (found != images).any(dim=1, keepdim=True)
    assert changed.flatten(1).any(dim=1).all() and not (changed & ~inside).any()


def test_three_way_batches_hold_normal_patch_and_scar_of_the_same_jittered_image(images):
    batch, label, unchanged = cutpaste.three_way(images)
    normal, patched, scarred = batch.chunk(3)
    assert label.tolist() == [0] * 6 + [1] * 6 + [2] * 6 and unchanged == 0
    for pasted, most in ((patched, 0.16), (scarred, 0.12)):
        share = (pasted != normal).any(dim=1).float().mean(dim=(1, 2))
        assert (share > 0).all() and (share < most).all()
    assert cutpaste.three_way(torch.zeros(2, 3, 64, 64))[2] == 1  # black on black is noted


@pytest.mark.parametrize("n", [30, 200])  # fewer and more than the dimensions
def test_shrunk_covariance_equals_scikit_learn(n):
    x = np.random.default_rng(0).normal(size=(n, 64)) @ np.random.default_rng(1).normal(size=(64, 64))
    x -= x.mean(axis=0)
    reference = LedoitWolf(assume_centered=True).fit(x)
    assert 0 < reference.shrinkage_ < 1
    found = cutpaste.ledoit_wolf(torch.from_numpy(x)).numpy()
    assert np.abs(found - reference.covariance_).max() < 1e-9 * np.abs(found).max()


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


def test_parameters_are_as_many_as_the_peers():
    model = cutpaste.CutPaste("resnet18", "none")
    count = [sum(p.numel() for p in m.parameters()) for m in (model.backbone, model.head)]
    assert count == [11_176_512, 593_667] and model.head[0].in_features == len(model.mean) == 512
    assert cutpaste.CutPaste("mobilenet_v2", "none").head[0].in_features == 1280


def test_passes_have_their_own_order_and_whole_batches_and_can_start_later():
    class Train:
        def __len__(self):
            return 5

        def order(self, batch_size, shuffle, drop_last):
            order = np.random.default_rng(shuffle).permutation(5)
            return (order[i : i + 2].tolist() for i in (0, 2))

        def batch(self, indices, device):
            return indices

    source = cutpaste.endless(Train(), 2, "cpu", 0, 0)
    batches = [next(source) for _ in range(6)]
    assert batches[:2] != batches[2:4] and len(sum(batches[:4], [])) == 8
    for start in (1, 2, 3):
        later = cutpaste.endless(Train(), 2, "cpu", 0, start)
        assert [next(later) for _ in range(6 - start)] == batches[start:]


def test_only_what_is_thawed_is_trained(images):
    model = cutpaste.CutPaste("resnet18", "none").train()
    model.backbone.requires_grad_(False)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.03, 0.9, weight_decay=3e-5)
    batch, label, _ = cutpaste.three_way(images[:2, :, :32, :32])
    F.cross_entropy(model(batch), label).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])}
    assert all(k.startswith("head.") or "running" in k or "tracked" in k for k in changed)
    assert "head.0.weight" in changed and "backbone.layer4.1.bn2.running_mean" in changed
