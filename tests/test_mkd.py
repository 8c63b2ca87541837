"""The mathematics of MKD against slow references and values worked out by hand."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from scipy import ndimage
from torch import nn
from torchvision.models import get_model

mkd = load_script("methods/mkd.py")
VGG = mkd.LAYERS["vgg16"][1]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mkd.MKD("mobilenet_v2", "none", 0.01, "none")


@pytest.fixture(scope="module")
def image():
    """Smooth random images (3, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear").expand(-1, 3, -1, -1)


def test_cloner_is_the_official_one():
    with torch.device("meta"):
        cloner = mkd.Cloner(VGG, True)
        features = cloner(torch.zeros(2, 3, 64, 64))
    layers = [layer for stage in cloner.stages for layer in stage]
    assert len(layers) == 39 and sum(p.numel() for p in cloner.parameters()) == 343_984
    assert [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)] == [5, 11, 20, 29, 38]
    assert [tuple(f.shape) for f in features] == [(2, c, 16 >> i, 16 >> i) for i, c in enumerate(VGG)]
    for before, layer in zip(layers, layers[1:], strict=False):
        if isinstance(before, nn.Conv2d):
            assert before.bias is None
            ends_stage = before.out_channels > 16 or before is layers[3]
            assert type(layer) is (nn.ReLU if ends_stage else nn.BatchNorm2d)  # no batch norm before a pool


def test_vgg16_is_read_behind_its_last_four_pools():
    with torch.device("meta"):
        features = get_model("vgg16", weights=None).features
    for name, width in zip(*mkd.LAYERS["vgg16"][:2], strict=True):
        number = int(name.removeprefix("features."))
        assert isinstance(features[number], nn.MaxPool2d) and features[number - 2].out_channels == width
    assert sum(p.numel() for p in features.parameters()) == 14_714_688


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18"])
def test_other_cloners_have_the_shapes_and_signs_of_their_source(backbone, image):
    _, widths, positive = mkd.LAYERS[backbone]
    source = mkd.common.feature_extractor(backbone, mkd.LAYERS[backbone][0], "none")
    with torch.no_grad():
        pred, target = mkd.Cloner(widths, positive)(image), list(source(image).values())
    assert [f.shape for f in pred] == [f.shape for f in target]
    assert all((float(f.min()) < 0) != positive for f in [*pred, *target])


def test_discrepancy_by_hand():
    """Of (3, 4, 0, 0) and (4, 3, 0, 0) the cosine is 24/25, the squared error 2/4; another layer, of right angle."""
    p, t = torch.tensor([3.0, 4, 0, 0]).view(1, 1, 2, 2), torch.tensor([4.0, 3, 0, 0]).view(1, 1, 2, 2)
    q, u = torch.tensor([1.0, 0]).view(1, 2, 1, 1), torch.tensor([0.0, 1]).view(1, 2, 1, 1)
    found = mkd.discrepancy([p, q], [t, u], 0.1)
    assert found.shape == (1,) and float(found) == pytest.approx((0.04 + 0.1 * 0.5) + (1 + 0.1 * 1))


def test_direction_is_of_whole_maps_not_of_positions():
    p = torch.tensor([[1.0, 0], [0, 1]]).view(1, 2, 1, 2)
    t = torch.tensor([[2.0, 0], [0, 1]]).view(1, 2, 1, 2)  # the same direction at each position
    assert float(mkd.discrepancy([p], [t], 0)) == pytest.approx(1 - 3 / (2 * 5) ** 0.5)


def test_loss_takes_four_layers_the_score_the_last_three(model, image):
    pred, target = [], []
    for c, f in zip(mkd.LAYERS["mobilenet_v2"][1], (0.1, 0.2, 0.4, 0.8), strict=True):
        pred.append(torch.ones(3, c, 1, 1, requires_grad=True) * (1 + f))  # one direction: values differ only
        target.append(torch.ones(3, c, 1, 1))
    answers = dict(zip("abcd", target, strict=True))
    with mock.patch.object(model.cloner, "forward", lambda x, guided=0: [p[: len(x)] + 0 * x.sum() for p in pred]), \
            mock.patch.object(model.source, "forward", lambda x: {k: t[: len(x)] for k, t in answers.items()}):
        assert float(model.loss(image).detach()) == pytest.approx(0.01 * (0.01 + 0.04 + 0.16 + 0.64), rel=1e-4)
        assert model.predict(image)[1].tolist() == pytest.approx([0.01 * (0.04 + 0.16 + 0.64)] * 3, rel=1e-4)


def guided_reference(model, image):
    """The gradient of one image's score, through ReLUs that zero what is negative or came from a negative input."""
    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, grad):
            return grad * (ctx.saved_tensors[0] > 0) * (grad > 0)

    x = mkd.common.normalize(image[None]).requires_grad_()
    f, pred = x, []
    for stage in model.cloner.eval().stages:
        for layer in stage:
            f = Guided.apply(f) if isinstance(layer, nn.ReLU) else layer(f)
        pred.append(f)
    score = sum(1 - F.cosine_similarity(p.reshape(1, -1), t.reshape(1, -1)) + 0.01 * F.mse_loss(p, t)
                for p, t in list(zip(pred[1:], model.source(x).values(), strict=True))[1:])
    return score.detach(), torch.autograd.grad(score, x)[0].abs().sum(1)[0]


def test_map_is_the_guided_gradient_of_each_image_alone(model, image):
    anomaly_map, score = model.predict(image)
    for i in range(3):
        expected_score, gradient = guided_reference(model, image[i])
        assert float(score[i]) == pytest.approx(float(expected_score), rel=1e-4)
        expected = ndimage.gaussian_filter(gradient.double().numpy(), 4)
        assert np.abs(anomaly_map[i].numpy() - expected).max() < 1e-3 * expected.max()


def test_map_of_the_official_code_is_stretched_to_the_99th_percentile_of_its_image(model, image):
    stretched = mkd.MKD("mobilenet_v2", "none", 0.01, "image")
    stretched.load_state_dict(model.state_dict())
    with mock.patch.object(mkd.common, "smooth", lambda m: m):
        raw, score = model.predict(image)
        found, same_score = stretched.predict(image)
    for gradient, norm in zip(raw.numpy(), found.numpy(), strict=True):
        low, high = gradient.min(), np.percentile(gradient, 99)
        assert np.allclose(norm, np.clip((gradient - low) / (high - low), 0, 1), atol=1e-4)
    assert torch.equal(score, same_score)


def test_predict_works_without_gradients_and_leaves_none(model, image):
    with torch.no_grad():
        anomaly_map, score = model.train().predict(image)  # leaves train mode by itself
        again = model.predict(image[:1])
    assert not anomaly_map.requires_grad and not score.requires_grad and anomaly_map.min() > 0
    assert torch.equal(again[0], anomaly_map[:1]) and torch.equal(again[1], score[:1])  # whatever the batch
    assert all(p.grad is None for p in model.parameters())


def test_training_moves_the_cloner_only_and_lowers_the_loss(image):
    torch.manual_seed(0)
    model = mkd.MKD("mobilenet_v2", "none", 0.01, "none")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.cloner.parameters(), 1e-3)
    losses = []
    for _ in range(10):
        loss = model.train().loss(image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("source."), name
