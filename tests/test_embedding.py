"""The mathematics of PaDiM and PatchCore against slow references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from scipy import ndimage
from scipy.spatial.distance import mahalanobis

padim, patchcore = load_script("methods/padim.py"), load_script("methods/patchcore.py")


@pytest.fixture(scope="module")
def images():
    """Smooth random images (14, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(14, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear").expand(-1, 3, -1, -1)


# ---------------------------------------------------------------------------------------------------- PaDiM
def fitted(images, features, batch):
    torch.manual_seed(0)
    model = padim.PaDiM("mobilenet_v2", "none", features, 64)
    model.fit(images[start : start + batch] for start in range(0, len(images), batch))
    return model


@torch.inference_mode()
def dense_embedding(model, images):
    """(N, d, P): all drawn channels on the finest grid, as the paper says it."""
    features = [f[:, model.get_buffer(f"channels{l}")] for l, f in enumerate(model.features(images))]
    size = features[-1].shape[-2:]
    return torch.cat([F.interpolate(f, size) for f in features], dim=1).flatten(2).double().numpy()


@pytest.mark.parametrize("features", [20, 100])  # fewer and more than there are training images
def test_padim_distances_equal_scipy_on_the_two_pass_covariance(features, images):
    train, test = images[:10], images[10:]
    model = fitted(train, features, batch=4)
    x, y = dense_embedding(model, train), dense_embedding(model, test)
    side = round(x.shape[2] ** 0.5)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(padim, "smooth", lambda m: m)
        patch.setattr(F, "interpolate", keep_size(F.interpolate))
        maps = model.predict(test)[0].numpy()
    assert maps.shape == (4, side, side)
    for p in range(0, x.shape[2], 37):
        inverse = np.linalg.inv(np.cov(x[:, :, p], rowvar=False) + padim.EPSILON * np.eye(features))
        for i in range(len(test)):
            expected = mahalanobis(y[i, :, p], x[:, :, p].mean(0), inverse)
            assert maps[i].ravel()[p] == pytest.approx(expected, rel=1e-4)


def keep_size(interpolate):
    """F.interpolate that leaves out the last step, from the grid to the image."""
    return lambda x, size, mode="nearest": x if mode == "bilinear" else interpolate(x, size, mode=mode)


@pytest.mark.parametrize("features, size, said", [(1, 64, "the draw left"), (500, 64, "152 channels"),
                                                  (20, 100, "multiple of 16")])
def test_padim_refuses_what_has_no_shared_blocks(features, size, said, capsys):
    with pytest.raises(SystemExit):
        padim.PaDiM("mobilenet_v2", "none", features, size)
    assert said in capsys.readouterr().err


def test_padim_does_not_depend_on_the_batch_size(images):
    one, other = fitted(images, 30, batch=3), fitted(images, 30, batch=14)
    for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3), name
    assert torch.allclose(one.predict(images)[1], other.predict(images)[1], rtol=1e-4)


def test_padim_holds_the_shared_blocks_only(images):
    model = fitted(images[:2], 100, batch=2)
    held = sum(model.get_buffer(f"whiten{l}").numel() for l in range(3))
    assert held < 0.6 * 16 * 16 * 100 * 100


def test_padim_of_one_training_image_is_finite(images):
    assert fitted(images[:1], 20, batch=1).predict(images)[0].isfinite().all()


@pytest.mark.parametrize("script", [padim, patchcore])
def test_smoothing_equals_scipy(script):
    anomaly_map = torch.rand(2, 1, 40, 48, generator=torch.Generator().manual_seed(0))
    expected = [ndimage.gaussian_filter(m[0].numpy(), 4) for m in anomaly_map]
    assert np.abs(script.smooth(anomaly_map)[:, 0].numpy() - expected).max() < 1e-6


# ---------------------------------------------------------------------------------------------------- PatchCore
def sequential_greedy(points, count, first):
    """Algorithm 1 of the paper, one pick at a time; also the covering radius after each pick."""
    distance, picks, radii = torch.full((len(points),), torch.inf, dtype=torch.double), [first], []
    while True:
        distance = torch.minimum(distance, (points.double() - points[picks[-1]].double()).norm(dim=1))
        radii.append(float(distance.max()))
        if len(picks) == count:
            return picks, radii
        picks.append(int(distance.argmax()))


@pytest.mark.parametrize("batch", [1, 16, 5000])
def test_lazy_coreset_covers_as_the_sequential_one_pick_by_pick(batch):
    torch.manual_seed(0)
    points = torch.randn(1500, 12)
    chosen = patchcore.greedy_coreset(points, 200, batch).tolist()
    picks, _ = sequential_greedy(points, 200, chosen[0])
    assert chosen == picks


def test_coreset_members_are_distinct_even_where_points_repeat():
    points = torch.randn(20, 4).repeat(5, 1)
    assert len(set(patchcore.greedy_coreset(points, 60, 16).tolist())) == 60


def test_nearest_equals_brute_force_across_chunk_borders():
    torch.manual_seed(0)
    points, centers = 5 + torch.randn(300, 24), 5 + torch.randn(70, 24)
    expected = torch.cdist(points.double(), centers.double()).amin(1).square()
    found = patchcore.nearest(points, centers, rows=64, columns=32)
    assert torch.allclose(found.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("shift", [0, 3, 300])  # among the bank; beside it; where no bound excludes anything
def test_search_by_bounds_equals_brute_force(shift):
    torch.manual_seed(0)
    bank = torch.randn(700, 6) @ torch.randn(6, 60) + 0.1 * torch.randn(700, 60)
    axes = patchcore.principal_axes(bank)
    assert 0 < axes.shape[1] <= 6
    off = torch.randn(50, 60)
    points = bank[::7] + 0.2 * torch.randn(100, 60)
    points[::2] += shift * (off - off @ axes @ axes.T)
    short = patchcore.shorten(bank - bank.mean(0), axes)
    expected = torch.cdist(points.double(), bank.double()).amin(1).square()
    found = patchcore.search(points, bank, axes, short, rows=32, columns=300, block=16)
    assert torch.allclose(found.double(), expected, rtol=1e-4)


def test_bounds_change_no_score_and_are_left_out_where_they_cost_more(images):
    model = bank_of(images[:10], ratio=0.5)
    assert model.axes.numel()  # smooth images have few principal axes
    anomaly_map, score = model.predict(images[10:])
    model.axes = torch.zeros(0, 0)
    for one, other in zip(model.predict(images[10:]), (anomaly_map, score), strict=True):
        assert torch.allclose(one, other, rtol=1e-4)
    assert not patchcore.principal_axes(torch.randn(500, 30)).numel()


def bank_of(images, ratio):
    torch.manual_seed(0)
    model = patchcore.PatchCore("mobilenet_v2", "none", ratio, 9)

    class Train:
        def __len__(self):
            return len(images)

        def batches(self, size, device):
            return iter(images.split(size))

    model.fit(Train(), 4, torch.device("cpu"))
    return model


def test_training_images_score_zero_when_every_patch_is_kept(images):
    model = bank_of(images[:10], ratio=1)
    kept = model.predict(images[:10])[1]
    assert float(kept.max()) < 0.02 * float(model.predict(images[10:])[1].min())


def test_patchcore_image_score_is_the_reweighted_largest_distance(images):
    model = bank_of(images[:10], ratio=0.1)
    patches = model.embed(images[10:])[0].double()
    bank = model.memory_bank.double()
    score = model.predict(images[10:])[1]
    for i, mine in enumerate(patches):
        distance = torch.cdist(mine, bank)
        q = int(distance.amin(1).argmax())
        near = torch.cdist(bank[distance[q].argmin()][None], bank)[0].argsort()[:9]  # N_b(m*), m* itself among them
        weight = 1 - distance[q].amin().exp() / distance[q][near].exp().sum()  # paper, Eq. 7
        assert float(score[i]) == pytest.approx(float(weight * distance[q].amin()), rel=1e-4)


def test_patchcore_bank_holds_the_asked_share_of_the_patches(images):
    model = bank_of(images[:10], ratio=0.25)
    assert len(model.memory_bank) == 10 * 8 * 8 // 4
    every = model.embed(images[:10])[0].flatten(0, 1)
    assert float(torch.cdist(model.memory_bank, every).amin(1).max()) < 1e-2  # its rows are patches, unprojected
