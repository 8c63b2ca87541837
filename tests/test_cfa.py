"""The mathematics of CFA against its plain, dense form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from scipy import ndimage

import common

cfa = load_script("methods/cfa.py")


def smooth_images(n, seed=0):
    """Smooth random images (n, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (64, 64), mode="bilinear").expand(-1, 3, -1, -1)


def untrained(learn_radius=True):
    torch.manual_seed(0)
    model = cfa.CFA("mobilenet_v2", "none", 64, 3, 3, 1e-5, learn_radius)
    model.fill_memory_bank(map(model.features, smooth_images(10).split(4)))  # the last batch is smaller
    return model


@pytest.fixture(scope="module")
def model():
    return untrained()


def dense_phi(model, features):
    """(B, D, h, w) as the paper has it: upsample, concatenate, append the coordinates, convolve."""
    joint = torch.cat([F.interpolate(f, features[0].shape[-2:], mode="bilinear") for f in features], dim=1)
    b, _, h, w = joint.shape
    row, column = torch.linspace(-1, 1, h).view(1, 1, h, 1), torch.linspace(-1, 1, w).view(1, 1, 1, w)
    joint = torch.cat([joint, row.expand(b, 1, h, w), column.expand(b, 1, h, w)], dim=1)
    return model.descriptor.conv(joint)


def dense_distances(phi, memory_bank):
    """(B*P, P) squared distances in double precision."""
    patches, centers = phi.flatten(2).mT.flatten(0, 1).double(), memory_bank.double()
    return patches.square().sum(1, keepdim=True) + centers.square().sum(1) - 2 * patches @ centers.T


def test_descriptor_convolves_upsampled_features_and_their_coordinates(model):
    features = model.features(smooth_images(2, seed=1))
    expected = dense_phi(model, features)
    assert torch.allclose(model.descriptor(features), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_memory_bank_is_the_mean_descriptor_at_each_position(model):
    phi = model.descriptor(model.features(smooth_images(10)))
    expected = phi.mean(0).flatten(1).T
    assert torch.allclose(model.memory_bank, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("repels", [False, True])
def test_loss_and_gradients_equal_the_dense_loss(repels):
    model = untrained().double()  # a hinge's corner falls on one side or the other by rounding
    features = model.features(smooth_images(2, seed=2).double())
    trained = [model.radius, *model.descriptor.parameters()]
    distance = dense_distances(dense_phi(model, features), model.memory_bank).sort(dim=1).values
    if repels:
        between = distance[:, 3:6].flatten().sort().values[768:770].mean()  # no patch lies on the hinge's corner
        model.radius.data.copy_((between + cfa.ALPHA).sqrt())
    attraction = torch.clamp(distance[:, 0:3] - model.radius**2, min=0)
    repulsion = torch.clamp(model.radius**2 - distance[:, 3:6] - 0.1, min=0)
    assert bool(repulsion.any()) == repels
    expected = 1000 * (attraction.mean() + repulsion.mean())
    loss = model.loss(features)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    for ours, dense in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        assert torch.allclose(ours, dense, rtol=1e-6, atol=1e-8 * dense.abs().max().item())


@pytest.mark.parametrize("k", [1, 3, 20])
def test_distances_equal_those_of_the_differences(model, k):
    features = model.features(smooth_images(2, seed=4))
    patches = dense_phi(model, features).flatten(2).mT.double()  # (2, P, D)
    expected = torch.stack([torch.cdist(p, model.memory_bank.double()).square().topk(k, largest=False).values
                            for p in patches])
    distance = model.distances(features, k)
    assert distance.shape == (2, 256, k)
    assert torch.allclose(distance.double(), expected, rtol=1e-3, atol=1e-5 * expected.max().item())


def test_a_patch_on_its_centre_has_distance_zero():
    model = untrained()
    features = model.features(smooth_images(1))
    model.memory_bank.copy_(dense_phi(model, features)[0].flatten(1).T)
    distance = model.distances(features, 2)
    assert (distance >= 0).all() and distance[..., 0].max() < 1e-4 * distance[..., 1].median()


def test_map_is_the_smoothed_softmin_score_and_the_image_score_its_maximum(model):
    image = smooth_images(3, seed=3)
    anomaly_map, score = model.predict(image)
    d = dense_distances(dense_phi(model, model.features(image)), model.memory_bank).sqrt().sort(dim=1).values[:, :3]
    patch = d[:, 0] * (-d[:, 0]).exp() / (-d).exp().sum(1)
    large = F.interpolate(patch.view(3, 1, 16, 16), (64, 64), mode="bilinear", align_corners=False)
    expected = np.stack([ndimage.gaussian_filter(m[0].detach().numpy(), 4) for m in large])
    assert anomaly_map.numpy() == pytest.approx(expected, rel=1e-4)
    assert score.numpy() == pytest.approx(expected.max(axis=(1, 2)), rel=1e-4)
    assert torch.allclose(model.predict(image[1:2])[1], score[1:2], rtol=1e-4)  # nothing depends on the batch


def trained(learn_radius, steps=12):
    model = untrained(learn_radius)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    features = model.features(smooth_images(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, amsgrad=True)
    losses = []
    for _ in range(steps):
        loss = model.loss(features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, before, losses


@pytest.mark.parametrize("learn_radius", [True, False])
def test_training_moves_descriptor_and_a_learned_radius_and_nothing_else(learn_radius):
    model, before, losses = trained(learn_radius)
    assert losses[-1] < 0.9 * losses[0]
    for name, value in model.state_dict().items():
        moves = name.startswith("descriptor.conv") or (name == "radius" and learn_radius)
        assert torch.equal(value, before[name]) != moves, name
    if learn_radius:
        assert model.radius.item() > 0.01  # by about the learning rate a step


def test_trained_weights_with_the_published_backbone(monkeypatch):
    shapes = {"layer1": (256, 64), "layer2": (512, 32), "layer3": (1024, 16)}

    def feature_extractor(name, layers, weights):
        return lambda image: {k: torch.zeros(len(image), shapes[k][0], shapes[k][1], shapes[k][1]) for k in layers}

    monkeypatch.setattr(common, "feature_extractor", feature_extractor)
    model = cfa.CFA("wide_resnet50_2", "none", 256, 3, 3, 1e-5, True)
    assert sum(p.numel() for p in model.descriptor.parameters()) == 1794 * 1792 + 1792 == 3_216_640
    assert model.memory_bank.shape == (4096, 1792)


def test_impossible_numbers_of_neighbours_are_refused():
    with pytest.raises(common.Error, match="--neighbors 200 --hard-negatives 57"):
        cfa.CFA("mobilenet_v2", "none", 64, 200, 57, 1e-5, True)
