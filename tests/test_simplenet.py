"""The mathematics of SimpleNet against slow references."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from scipy import ndimage

simplenet = load_script("methods/simplenet.py")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return simplenet.SimpleNet("mobilenet_v2", "none")


@pytest.fixture(scope="module")
def image():
    """Smooth random images (3, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear").expand(-1, 3, -1, -1)


def official_pool(feature, width):
    """Unfolded neighbourhoods, adaptively pooled in two steps, as the official code does it."""
    b, c, h, w = feature.shape
    patches = F.unfold(feature, 3, padding=1).mT.reshape(b * h * w, 1, 9 * c)
    pooled = F.adaptive_avg_pool1d(F.adaptive_avg_pool1d(patches, 2 * width), width)
    return pooled.view(b, h, w, width).permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels", [512, 1024])  # layer2 and layer3 of wide_resnet50_2: runs of 2 and of 4 rows
def test_pooling_equals_the_unfolded_one_of_the_official_code(channels):
    feature = torch.randn(2, channels, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(simplenet.pool(feature, 768), official_pool(feature, 768), atol=1e-6)


def test_pooling_to_as_many_channels_is_the_mean_of_neighbourhoods():
    feature = torch.randn(2, 32, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(simplenet.pool(feature, 32), F.avg_pool2d(feature, 3, 1, 1), atol=1e-6)


def test_parameter_counts_of_the_published_network():
    with torch.device("meta"), mock.patch.object(simplenet.common, "feature_extractor", lambda *_: torch.nn.Identity()):
        published = simplenet.SimpleNet("wide_resnet50_2", "none")
    assert sum(p.numel() for p in published.adaptor.parameters()) == 1536 * 1536 + 1536 == 2_360_832
    assert sum(p.numel() for p in published.discriminator.parameters()) == 1536 * 1024 + 3 * 1024 + 1024 == 1_576_960


def test_features_lie_on_the_finer_grid_finer_layer_first(model, image):
    features = model.features(image)
    assert features.shape == (3, 8, 8, 128) and not features.requires_grad
    with torch.no_grad():
        fine = model.backbone(simplenet.common.normalize(image))["features.6"]
    assert torch.allclose(features[..., :32].permute(0, 3, 1, 2), F.avg_pool2d(fine, 3, 1, 1), atol=1e-5)


def test_loss_by_hand(model):
    """With D(q) and D(q-) given: max(0, 0.5 - D(q)) + max(0, 0.5 + D(q-)), the means of either half added."""
    answers = torch.tensor([0.7, 0.1, -0.3, -0.9, 0.2, -0.5])[:, None]
    with mock.patch.object(model.discriminator, "forward", lambda x: answers):
        loss = model.loss(torch.zeros(3, 128), 0.1)
    assert float(loss.detach()) == pytest.approx((0 + 0.4 + 0.8) / 3 + (0 + 0.7 + 0) / 3)


def test_noise_is_drawn_for_each_value_and_both_kinds_share_a_batch(model):
    seen = []
    with mock.patch.object(model.discriminator, "forward", lambda x: seen.append(x) or x[:, :1]):
        for _ in range(2):
            model.loss(torch.zeros(500, 128), 0.3)
    normal, anomalous = seen[0].chunk(2)
    noise = (anomalous - normal).detach()
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02) and abs(float(noise.mean())) < 0.01
    assert float(noise.std(0).min()) > 0.2 and float(noise.std(1).min()) > 0.2
    assert not torch.equal(seen[0], seen[1])  # drawn again at each step


def test_the_gradient_reaches_the_adaptor_through_both_kinds(model):
    """With D(x) = sum(x) and both hinges active the two terms cancel; a detached half would leave one of them."""
    with mock.patch.object(model.discriminator, "forward", lambda x: 1e-3 * x.sum(1, keepdim=True)):
        loss = model.loss(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)), 0.1)
        grad, = torch.autograd.grad(loss, model.adaptor.weight)
    assert float(loss.detach()) == pytest.approx(1, abs=0.05) and float(grad.abs().max()) < 1e-6


def test_training_moves_heads_only_and_lowers_the_loss(image):
    torch.manual_seed(0)
    model = simplenet.SimpleNet("mobilenet_v2", "none")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam([*model.adaptor.parameters(), *model.discriminator.parameters()], 1e-3)
    features = model.train().features(image).flatten(0, 2)
    losses = []
    for _ in range(30):
        loss = model.loss(features, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_heads_start_as_in_the_official_code():
    """Xavier-normal weights, PyTorch's own biases and batch norm."""
    torch.manual_seed(0)
    model = simplenet.SimpleNet("mobilenet_v2", "none")
    first, norm = model.discriminator[:2]
    for layer in (model.adaptor, first, model.discriminator[3]):
        deviation = (2 / (layer.in_features + layer.out_features)) ** 0.5
        assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.1)
    for layer in (model.adaptor, first):
        assert 0.9 * 128**-0.5 < float(layer.bias.detach().abs().max()) <= 128**-0.5
    assert (norm.weight == 1).all() and not norm.bias.any() and model.discriminator[3].bias is None


def test_image_score_is_the_largest_patch_score_and_the_map_is_smoothed_as_scipy_does(model, image):
    anomaly_map, score = model.predict(image)
    with torch.no_grad():
        q = model.adaptor(model.features(image).flatten(0, 2))
        patch_score = -model.discriminator(q).view(3, 8, 8)
    assert torch.allclose(score, patch_score.flatten(1).amax(1))
    enlarged = F.interpolate(patch_score[:, None], (64, 64), mode="bilinear", align_corners=False)[:, 0].numpy()
    expected = np.stack([ndimage.gaussian_filter(m, 4) for m in enlarged])
    assert anomaly_map.shape == (3, 64, 64) and np.abs(anomaly_map.numpy() - expected).max() < 1e-5


def test_scores_do_not_depend_on_the_batch(model, image):
    alone = torch.cat([model.train().predict(i[None])[1] for i in image])  # predict leaves train mode by itself
    assert torch.allclose(alone, model.predict(image)[1], rtol=1e-4, atol=1e-5)
