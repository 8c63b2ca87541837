"""The mathematics of DeepSVDD: shapes and sizes, the centre's rule, both losses, scaling, and no way to collapse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from PIL import Image
from torch import nn

import common

deepsvdd = load_script("methods/deepsvdd.py")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return deepsvdd.DeepSVDD("imagenet", "one-class", 0.1)


@pytest.fixture(scope="module")
def images():
    """Smooth random images (24, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear")


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_as_many_as_the_official_ones_and_none_is_a_bias(model):
    autoencoder = deepsvdd.Autoencoder(model.encoder)
    # 5x5 kernels 3-32-64-128 and 8-128-64-32-3, 2048 x 128
    assert count(model) == 25 * (3 * 32 + 32 * 64 + 64 * 128) + 2048 * 128 == 520_544
    assert count(autoencoder) == 520_544 + 25 * (8 * 128 + 128 * 64 + 64 * 32 + 32 * 3) == 804_544
    assert all(name.endswith("weight") and p.dim() > 1 for name, p in autoencoder.named_parameters())


def test_zero_weights_are_the_only_way_to_a_constant(model):
    x = torch.randn(4, 3, 32, 32)
    assert model.encoder(x).std(dim=0).min() > 0
    for p in model.parameters():
        p.data.zero_()
    assert model.encoder(x).abs().max() == 0 and (model.distance(x) == model.center.square().sum()).all()


def test_the_autoencoder_trains_the_encoder_of_the_model_itself(model):
    autoencoder = deepsvdd.Autoencoder(model.encoder)
    assert autoencoder.decoder(model.encoder(torch.randn(2, 3, 32, 32))).shape == (2, 3, 32, 32)
    before = model.encoder[0][0].weight.clone()
    optimizer, _ = deepsvdd.adam(autoencoder, 1e-3, 0, 1)
    autoencoder.loss(torch.rand(4, 3, 32, 32)).backward()
    optimizer.step()
    assert (model.encoder[0][0].weight != before).any()


def test_the_autoencoder_loss_is_a_sum_over_values_and_a_mean_over_images(model):
    autoencoder = deepsvdd.Autoencoder(model.encoder)
    autoencoder.decoder[-2].weight.data.zero_()  # the sigmoid of zero: a grey of 0.5
    image = torch.stack([torch.full((3, 32, 32), 1.5), torch.full((3, 32, 32), 0.5)])
    assert autoencoder.loss(image).item() == pytest.approx((3 * 32 * 32 * 1 + 0) / 2)


def test_xavier_bounds_belong_to_the_pretrained_network(model):
    deepsvdd.Autoencoder(model.encoder)
    bound = (2 / (1 + 0.01**2)) ** 0.5 * (6 / (25 * (3 + 32))) ** 0.5
    assert 0.95 * bound < model.encoder[0][0].weight.abs().max() <= bound


def test_no_coordinate_of_the_center_lies_near_zero(model):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([0.5, -0.5, 0.05, -0.05, 0.0, *[1.0] * 123]) * x.mean(dim=(1, 2, 3))[:, None]

    model.encoder = Constant()
    images = torch.stack([torch.full((3, 32, 32), v) for v in (0.5, 1.5)])  # mean 1
    assert model.init_center(images) == 3
    assert torch.allclose(model.center[:6], torch.tensor([0.5, -0.5, 0.1, -0.1, 0.1, 1.0]))


def test_the_center_is_the_mean_in_eval_mode_and_stays_where_it_was_set(model):
    model.encoder = nn.Sequential(nn.Flatten(), nn.Linear(3072, 128, bias=False), nn.Dropout(0.5))
    images = torch.rand(1001, 3, 32, 32)  # more than one batch
    model.init_center(images)
    mean = model.encoder[1](images.flatten(1).mean(dim=0)).detach()
    far = mean.abs() > deepsvdd.CENTER_MARGIN
    assert 0 < far.sum() < 128 and torch.allclose(model.center[far], mean[far], atol=1e-5)
    center = model.center.clone()
    optimizer, _ = deepsvdd.adam(model.encoder, 1e-3, 0, 1)
    model.loss(model.distance(images[:8])).backward()
    optimizer.step()
    assert torch.equal(model.center, center)
    assert "center" in model.state_dict() and "center" not in dict(model.named_parameters())


def test_losses_of_both_objectives_by_hand(model):
    distance = torch.tensor([1.0, 5.0, 9.0])
    assert model.loss(distance) == 5
    model.objective, model.nu = "soft-boundary", 0.5
    model.radius.fill_(2)
    assert model.loss(distance).item() == pytest.approx(4 + (0 + 1 + 5) / 3 / 0.5)


def test_the_score_is_the_squared_distance_less_the_squared_radius(model, images):
    model.init_center(model.load([images]))
    anomaly_map, score = model.predict(images)
    expected = [(model.encoder(model.prepare(x[None])) - model.center).square().sum().item() for x in images]
    assert anomaly_map is None and not model.training
    assert score.tolist() == pytest.approx(expected, rel=1e-4)
    model.radius.fill_(3)
    assert model.predict(images)[1].tolist() == pytest.approx([e - 9 for e in expected], rel=1e-4, abs=1e-3)


def test_images_are_made_small_as_pillow_does_it(model):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    small = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)) / 255
    ours = model.prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0]
    ours = ours.permute(1, 2, 0).numpy() * common.IMAGENET_STD + common.IMAGENET_MEAN
    assert np.abs(ours - small).max() < 1 / 255


def test_contrast_normalisation_maps_the_training_set_to_0_1(images):
    model = deepsvdd.DeepSVDD("gcn", "one-class", 0.1)
    found = model.load([images[:10], images[10:20]])
    assert found.shape == (20, 3, 32, 32) and found.min() == 0 and found.max() == 1
    assert torch.allclose(model.prepare(images[:10]), found[:10], atol=1e-6)  # the same at test time
    brighter = model.prepare(0.5 * images[:4] + 0.25)  # contrast and brightness are gone
    assert torch.allclose(brighter, found[:4], atol=1e-4)
    x = deepsvdd.contrast_normalize(images)
    assert x.mean(dim=(1, 2, 3)).abs().max() < 1e-5 and torch.allclose(x.abs().mean(dim=(1, 2, 3)), torch.ones(24))
    greys = torch.linspace(0, 1, 50).view(50, 1, 1, 1).expand(50, 3, 64, 64)
    assert model.prepare(greys).unique().numel() == 1  # uniform images have no contrast to bring out
    dot = torch.full((1, 3, 64, 64), 0.5)
    dot[..., 8, 8] += 1 / 255  # the smallest contrast of an 8-bit image
    assert deepsvdd.contrast_normalize(dot).abs().mean().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("scaling", ["imagenet", "gcn"])
def test_equal_images_get_equal_scores_whatever_their_batch(scaling, images):
    torch.manual_seed(0)
    model = deepsvdd.DeepSVDD(scaling, "one-class", 0.1)
    model.init_center(model.load([images]))
    same = images[:1].expand(23, -1, -1, -1)
    scores = [torch.cat([model.predict(batch)[1] for batch in same.split(size)]) for size in (1, 7, 8, 23)]
    assert torch.cat(scores).unique().numel() == 1


def test_each_image_comes_once_an_epoch_and_never_alone():
    images = torch.arange(9.0)[:, None]
    assert sorted(torch.cat(list(deepsvdd.batches(images, 3))).flatten().tolist()) == list(range(9))
    assert [len(b) for b in deepsvdd.batches(images, 4)] == [4, 4]
    assert [len(b) for b in deepsvdd.batches(images, 200)] == [9]


def test_training_pulls_embeddings_to_the_center_without_collapse(model, images):
    images, losses = images[:12], []
    small = model.load([images])
    model.init_center(small)
    optimizer, _ = deepsvdd.adam(model.encoder, 1e-4, 0.5e-7, 50)
    for _ in range(20):
        model.train()
        losses.append(model.loss(model.distance(small)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    score, other = model.predict(images)[1], model.predict(1 - images.flip(2))[1]
    assert score.std() > 0.01 * score.mean() and other.mean() > score.mean()  # images are still told apart
