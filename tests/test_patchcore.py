"""PatchCore's coreset, search and image score against slow references."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script

patchcore = load_script("methods/patchcore.py")


@pytest.fixture(scope="module")
def images():
    """Smooth random images (14, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(14, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear").expand(-1, 3, -1, -1)


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
    expected = torch.cdist(points.double(), centers.double()).amin(1)
    distance = patchcore.nearest(points, centers, rows=64, columns=32)
    assert torch.allclose(distance.double(), expected, rtol=1e-4)
    assert patchcore.nearest(centers, centers).max() < 1e-2
    assert torch.allclose(patchcore.distances(points, centers).double(), torch.cdist(points.double(), centers.double()))


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
    patches = model.embed(images[10:]).flatten(1, 2).double()
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
    every = model.embed(images[:10]).flatten(0, 2)
    assert float(torch.cdist(model.memory_bank, every).amin(1).max()) < 1e-2  # its rows are patches, unprojected


def test_a_fitted_model_is_loaded_into_an_empty_one(images):
    model = bank_of(images[:10], ratio=0.1)
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    assert set(kept) == {"memory_bank"}
    other = patchcore.PatchCore("mobilenet_v2", "none", 0.1, 9)
    other.load_state_dict(kept, strict=False)
    assert torch.equal(other.predict(images[10:])[1], model.predict(images[10:])[1])
