"""The mathematics of PatchSVDD: sizes, pairs of patches, the losses, one pass for all patches, neighbours, maps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn

import common

patchsvdd = load_script("methods/patchsvdd.py")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = patchsvdd.PatchSVDD(96)
    model.mean.uniform_()
    for p in model.parameters():
        p.data.mul_(2)  # PyTorch's starting values hardly tell patches apart
    return model


class Images:
    """What `fit` needs of a split."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def batches(self, batch_size, device):
        return self.images.split(batch_size)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def encode(model, patch):
    """(3, K, K) -> (D,), as the paper draws it: a patch of 64 pixels is what its four quadrants say."""
    if patch.shape[1] == 32:
        return model.small(patch[None])[0, :, 0, 0]
    rows = [torch.stack([encode(model, patch[:, y : y + 32, x : x + 32]) for x in (0, 32)], dim=1) for y in (0, 32)]
    h = F.leaky_relu(model.join1(torch.stack(rows, dim=1)[None]), 0.1)
    return model.join2(h).tanh()[0, :, 0, 0]


def test_parameters_are_as_many_as_the_official_ones(model):
    widths = [3, 32, 64, 128, 128, 64, 32, 32, 64]
    assert count(model.small) == sum(9 * a * b + b for a, b in zip(widths, widths[1:], strict=False)) == 360_832
    assert count(model.join1, model.join2) == 4 * 64 * 128 + 128 + 128 * 64 + 64 == 41_152
    assert count(model.position64) == count(model.position32) == 64 * 128 + 128 + 128 * 128 + 128 + 128 * 8 + 8
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["position64.4.weight", "position32.4.weight"]
    norms = patchsvdd.PositionClassifier()[-1].weight.norm(dim=0)
    assert torch.allclose(norms, torch.ones(128))


def test_neighbours_lie_on_the_side_that_their_class_says():
    for patch in (32, 64):
        first, second, label = patchsvdd.position_corners(4000, 256, patch)
        move = second - first
        inside = ((second > 0) & (second < 256 - patch)).all(dim=1)  # not moved back into the image
        assert inside.float().mean() > 0.2
        assert (move[inside].sign() == patchsvdd.DIRECTIONS[label[inside]]).all()
        away = move[inside].abs()[move[inside] != 0]
        assert away.min() == 3 * patch // 4 and away.max() == patch - 1
        assert set(label.tolist()) == set(range(8)) and min(first.min(), second.min()) == 0
        assert max(first.max(), second.max()) == 256 - patch


@pytest.mark.parametrize("patch, reach", [(32, 1), (64, 2)])
def test_jittered_patches_move_by_every_small_step_equally_often_but_never_stay(patch, reach):
    first, second = patchsvdd.jittered_corners(48000, 256, patch)
    inside = ((first >= reach) & (first <= 256 - patch - reach)).all(dim=1)
    moves, counts = np.unique((second - first)[inside].numpy(), axis=0, return_counts=True)
    steps = range(-reach, reach + 1)
    assert moves.tolist() == [[y, x] for y in steps for x in steps if (y, x) != (0, 0)]
    assert counts.min() > 0.8 * counts.mean() and second.min() >= 0 and second.max() <= 256 - patch


def test_crops_are_slices_and_draws_have_their_order():
    image = torch.rand(3, 3, 96, 96)
    corner = torch.tensor([[0, 5], [10, 0], [64, 64]])
    expected = torch.stack([x[:, i : i + 32, j : j + 32] for x, (i, j) in zip(image, corner.tolist(), strict=True)])
    assert torch.equal(patchsvdd.crop(image, corner, 32), expected)
    flat = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 96, 96)  # an image knows its number
    patches, label = patchsvdd.draw(flat, 64)
    assert patches.shape == (12, 3, 64, 64) and label.shape == (3,)
    assert torch.equal(patches[6:, 0, 0, 0], torch.tensor([0.0, 1, 2, 0, 1, 2]))
    noise = patches[:6] - torch.tensor([0.0, 1, 2, 0, 1, 2]).view(6, 1, 1, 1)
    assert noise.std(dim=(2, 3)).mean() == pytest.approx(0.02, rel=0.05)  # of each value
    many = patchsvdd.draw(torch.zeros(300, 3, 96, 96), 32)[0][:600].mean(dim=(2, 3))
    assert many.std() == pytest.approx(0.02, rel=0.1)  # of each channel


def test_losses_equal_a_loop_over_patches(model):
    image = torch.rand(2, 3, 96, 96)
    big, small = patchsvdd.draw(image, 64), patchsvdd.draw(image, 32)
    losses = model.losses(*big, *small)
    found = []
    for (patches, label), classifier in ((big, model.position64), (small, model.position32)):
        h = [encode(model, p) for p in patches]
        logits = [classifier(h[i] - h[2 + i]) for i in range(2)]
        position = sum(torch.logsumexp(x, 0) - x[y] for x, y in zip(logits, label, strict=True)) / 2
        svdd = sum((h[4 + i] - h[6 + i]).square().sum().sqrt() for i in range(2)) / 2
        found.append((position.item(), svdd.item()))
    (position64, svdd64), (position32, svdd32) = found
    assert [x.item() for x in losses] == pytest.approx([position64, position32, svdd64, svdd32], rel=1e-5)
    sum(losses).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {"position64.4.weight", "position32.4.weight"}


def test_one_pass_over_the_image_equals_patch_by_patch(model):
    image = torch.rand(3, 3, 96, 96)
    big, small = model.embed(image)
    assert big.shape == (3, 64, 3, 3) and small.shape == (3, 64, 17, 17)
    x = image[2] - model.mean
    for i, j in ((0, 0), (1, 2), (2, 2)):
        expected = encode(model, x[:, 16 * i : 16 * i + 64, 16 * j : 16 * j + 64])
        assert torch.allclose(big[2, :, i, j], expected, atol=1e-5) and expected.std() > 0.01
    for i, j in ((0, 0), (3, 8), (16, 16)):
        expected = encode(model, x[:, 4 * i : 4 * i + 32, 4 * j : 4 * j + 32])
        assert torch.allclose(small[2, :, i, j], expected, atol=1e-5)


def test_nearest_is_exact_also_where_points_almost_coincide():
    torch.manual_seed(0)
    bank = torch.rand(300, 64) * 2 - 1
    points = torch.cat([torch.rand(70, 64) * 2 - 1, bank[:30] + 1e-5 * torch.randn(30, 64), bank[:3]])
    expected = torch.linalg.vector_norm(points[:, None].double() - bank.double(), dim=2).amin(dim=1)
    for rows in (8192, 77):
        distance = patchsvdd.nearest(points, bank, rows)
        assert torch.allclose(distance.double(), expected, rtol=1e-5, atol=0)
    assert (distance[-3:] == 0).all() and 0 < expected[70:100].max() < 2e-4
    assert torch.allclose(patchsvdd.nearest(points, bank[:1]), (points - bank[0]).norm(dim=1))


def test_each_pixel_is_the_mean_of_the_patches_that_cover_it():
    distance = torch.rand(2, 3, 3)
    total, covered = torch.zeros(2, 96, 96), torch.zeros(96, 96)
    for i in range(3):
        for j in range(3):
            total[:, 16 * i : 16 * i + 64, 16 * j : 16 * j + 64] += distance[:, i, j, None, None]
            covered[16 * i : 16 * i + 64, 16 * j : 16 * j + 64] += 1
    assert torch.allclose(patchsvdd.spread(distance, 96, 64, 16), total / covered, atol=1e-6)
    assert torch.allclose(patchsvdd.spread(torch.ones(1, 17, 17), 96, 32, 4), torch.ones(1, 96, 96))


def test_maps_are_the_product_of_both_scales_and_normal_images_score_zero(model):
    train, query = torch.rand(3, 3, 96, 96), torch.rand(2, 3, 96, 96)
    model.fit(Images(train), 2, "cpu", 10**6)
    assert model.bank64.shape == (3 * 9, 64) and model.bank32.shape == (3 * 289, 64)
    anomaly_map, score = model.predict(query)
    expected = torch.ones(2, 96, 96)
    for k, h, bank in zip((64, 32), model.embed(query), (model.bank64, model.bank32), strict=True):
        distance = torch.cdist(h.permute(0, 2, 3, 1).flatten(1, 2), bank[None]).amin(dim=2)
        expected *= patchsvdd.spread(distance.view(2, *h.shape[2:]), 96, k, patchsvdd.STRIDES[k])
    assert torch.allclose(anomaly_map, expected, rtol=1e-4) and torch.equal(score, anomaly_map.amax(dim=(1, 2)))
    assert model.predict(train)[1].max() < 1e-6 * score.min()
    single = torch.cat([model.predict(x[None])[0] for x in query])
    assert torch.equal(single, anomaly_map)  # to the last digit, which counts where patches almost coincide


def test_a_small_bank_takes_as_many_patches_of_each_image_and_the_same_each_time(model):
    train = Images(torch.rand(4, 3, 96, 96))
    model.fit(train, 3, "cpu", 10**6)
    everything = model.bank32
    model.fit(train, 3, "cpu", 25)
    bank = model.bank32
    assert bank.shape == model.bank64.shape == (4 * 6, 64) and torch.unique(bank, dim=0).shape == bank.shape
    owner = torch.cdist(bank, everything).argmin(dim=1) // 289
    assert owner.tolist() == [i for i in range(4) for _ in range(6)]
    model.fit(train, 3, "cpu", 25)
    assert torch.equal(model.bank32, bank)
    model.fit(train, 3, "cpu", 2)
    assert len(model.bank32) == len(model.bank64) == 4


def test_a_checkpoint_brings_banks_of_its_own_length(model):
    model.fit(Images(torch.rand(2, 3, 96, 96)), 2, "cpu", 10**6)
    other, image = patchsvdd.PatchSVDD(96), torch.rand(1, 3, 96, 96)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.predict(image)[0], model.predict(image)[0])
    model.load_state_dict(other.state_dict())


def test_the_mean_image_is_that_of_all_images(model):
    images = torch.rand(5, 3, 96, 96)
    model.fit_mean(images.split(2))
    assert torch.allclose(model.mean, images.mean(dim=0), atol=1e-6)


@pytest.mark.slow
def test_training_learns_positions_without_collapse():
    torch.manual_seed(0)
    model = patchsvdd.PatchSVDD(80)
    side = torch.linspace(-1, 1, 80)
    image = torch.stack([side.expand(80, 80), side[:, None].expand(80, 80), torch.zeros(80, 80)])  # says where it is
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 2e-3)
    losses = []
    for _ in range(40):
        patches, label = patchsvdd.draw(image.expand(16, 3, 80, 80), 32)
        first, second, patch, jittered = model.small(patches).flatten(1).chunk(4)
        losses.append(F.cross_entropy(model.position32(first - second), label))
        optimizer.zero_grad()
        (losses[-1] + 0.9 * (patch - jittered).norm(dim=1).mean()).backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5]) and patch.std(dim=0).max() > 0.05


@pytest.mark.parametrize("size", [64, 100])
def test_sizes_that_patches_do_not_fill_end_with_one_line(size):
    with pytest.raises(common.Error, match=f"--image-size {size}"):
        patchsvdd.PatchSVDD(size)


def test_no_layer_pads_or_strides_after_the_first(model):
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.stride[0] for m in convs] == [2] + 9 * [1] and {m.padding for m in convs} == {(0, 0)}
