"""PaDiM's Gaussians and distances against NumPy and SciPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from scipy.spatial.distance import mahalanobis

import common

padim = load_script("methods/padim.py")


@pytest.fixture(scope="module")
def images():
    """Smooth random images (14, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(14, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear").expand(-1, 3, -1, -1)


def fitted(images, features, batch):
    torch.manual_seed(0)
    model = padim.PaDiM("mobilenet_v2", "none", features, images.shape[-1])
    model.fit(images[start : start + batch] for start in range(0, len(images), batch))
    return model


@torch.inference_mode()
def dense_embedding(model, images):
    """(N, d, P): all channels on the finest grid, of which the drawn ones are taken."""
    features = model.features(images)
    joint = torch.cat([F.interpolate(f, features[-1].shape[-2:]) for f in features], dim=1)
    return joint[:, model.drawn].flatten(2).double().numpy()


@pytest.mark.parametrize("features", [20, 100])  # fewer and more than there are training images
def test_distances_equal_scipy_on_the_two_pass_covariance(features, images, monkeypatch):
    train, test = images[:10], images[10:]
    model = fitted(train, features, batch=4)
    x, y = dense_embedding(model, train), dense_embedding(model, test)
    interpolate = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, size, mode="nearest":  # without the last step, to the image's size
                        x if mode == "bilinear" else interpolate(x, size, mode=mode))
    monkeypatch.setattr(common, "smooth", lambda m: m)
    maps = model.predict(test)[0].numpy()
    assert maps.shape == (4, *model.grid)
    for p in range(0, x.shape[2], 37):
        inverse = np.linalg.inv(np.cov(x[:, :, p], rowvar=False) + padim.EPSILON * np.eye(features))
        for i in range(len(test)):
            expected = mahalanobis(y[i, :, p], x[:, :, p].mean(0), inverse)
            assert maps[i].ravel()[p] == pytest.approx(expected, rel=1e-4)


def test_the_channels_are_drawn_from_all_layers_without_repetition(images):
    model = fitted(images[:2], 100, batch=2)
    assert model.drawn.sum() == 100 and all(part.any() for part in model.drawn.split([96, 32, 24]))
    torch.manual_seed(1)
    other = padim.PaDiM("mobilenet_v2", "none", 100, 64)
    assert not torch.equal(model.drawn, other.drawn)


def test_more_features_than_channels_are_refused():
    with pytest.raises(common.Error, match="152 channels"):
        padim.PaDiM("mobilenet_v2", "none", 153, 64)


def test_a_single_feature_is_enough(images):
    model = fitted(images[:10], 1, batch=4)
    assert model.predict(images[10:])[0].isfinite().all()


@pytest.mark.parametrize("chunk", [1, 100, 5000])
def test_nothing_depends_on_the_batches_or_the_chunks(chunk, images, monkeypatch):
    one = fitted(images, 30, batch=3)
    expected = one.predict(images)
    monkeypatch.setattr(padim, "CHUNK", chunk)
    other = fitted(images, 30, batch=14)
    for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3), name
    for a, b in zip(expected, other.predict(images), strict=True):
        assert torch.allclose(a, b, rtol=1e-4)


def test_grids_need_not_lie_in_one_another(images):
    model = fitted(F.interpolate(images, (100, 100)), 30, batch=7)
    assert model.grid == (25, 25) and model.predict(torch.rand(2, 3, 100, 100))[0].shape == (2, 100, 100)


def test_the_state_holds_one_triangle_a_position(images):
    model = fitted(images[:2], 100, batch=2)
    held = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    assert set(held) == {"drawn", "mean", "whitening"} and held["whitening"].shape == (16 * 16, 100 * 101 // 2)


def test_a_single_training_image_gives_finite_maps(images):
    assert fitted(images[:1], 20, batch=1).predict(images)[0].isfinite().all()
