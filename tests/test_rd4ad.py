"""The mathematics of RD4AD: loss, maps, networks of the published sizes, mirrored decoders, a frozen teacher."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from scipy import ndimage
from torch import nn

import common

rd4ad = load_script("methods/rd4ad.py")


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def seeded(seed=0, backbone="mobilenet_v2", combine="sum"):
    torch.manual_seed(seed)
    return rd4ad.RD4AD(backbone, "none", combine)


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_loss_takes_a_whole_map_as_one_vector():
    # two positions: e = (1, 0), (0, 2); d = (1, 0), (3, 0). Flattened: e.d = 1, |e|^2 = 5, |d|^2 = 10; by position the
    # cosines would be 1 and 0.
    e = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)
    d = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    one = 1 - 1 / 50**0.5
    assert float(rd4ad.distillation_loss([e], [d])) == pytest.approx(one, rel=1e-6)
    both = rd4ad.distillation_loss([torch.cat([e, e]), e], [torch.cat([d, 7 * e]), -e])
    assert float(both) == pytest.approx(one / 2 + 2, rel=1e-6)  # mean over images, sum over layers


@pytest.mark.parametrize("combine", ["sum", "product"])
def test_map_combines_the_layers_position_by_position_and_is_smoothed_as_by_scipy(combine, images):
    model = seeded(combine=combine)
    anomaly_map, score = model.predict(images)
    with torch.no_grad():
        target, pred = model(images)
    expected = np.full((4, 64, 64), 0.0 if combine == "sum" else 1.0)
    for e, d in zip(target, pred, strict=True):
        distance = 1 - (e * d).sum(1) / (e.norm(dim=1) * d.norm(dim=1))
        enlarged = F.interpolate(distance[:, None], 64, mode="bilinear", align_corners=True)[:, 0].numpy()
        assert enlarged[:, 0, 0] == pytest.approx(distance[:, 0, 0].numpy(), abs=1e-6)  # corners stay where they are
        expected = expected + enlarged if combine == "sum" else expected * enlarged
    expected = [ndimage.gaussian_filter(m, 4) for m in expected]
    assert np.allclose(anomaly_map.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(score, anomaly_map.flatten(1).max(1).values)


@pytest.mark.parametrize(("backbone", "sizes"), [
    ("wide_resnet50_2", (58_885_120, 24_917_504)),  # the official networks, less 8,392,704 that these never call
    ("resnet18", (11_680_000, 3_703_168)),
    ("mobilenet_v2", (1_545_984, 696_544))])
def test_networks_have_their_published_sizes_and_the_decoder_gives_the_teachers_shapes(backbone, sizes):
    _, channels, kind, blocks = rd4ad.BACKBONES[backbone]
    with torch.device("meta"):
        bottleneck = rd4ad.OneClassBottleneck(kind, channels, blocks[0])
        decoder = rd4ad.Decoder(kind, channels, blocks[1:])
        features = [torch.zeros(2, c, 64 // s, 64 // s) for c, s in zip(channels, (4, 8, 16), strict=False)]
        embedding = bottleneck(features)
        assert embedding.shape == (2, channels[3], 2, 2)
        assert [d.shape for d in decoder(embedding)] == [e.shape for e in features]
    assert (count(bottleneck), count(decoder)) == sizes
    assert all(f"{size:,}" in rd4ad.__doc__ for size in sizes)
    assert not any(m.bias is not None for part in (bottleneck, decoder) for m in part.modules()
                   if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))


@pytest.mark.parametrize(("backbone", "least"), [("mobilenet_v2", None), ("resnet18", 0)])
def test_student_features_have_the_teachers_sign(backbone, least, images):
    for side in seeded(backbone=backbone)(images):
        lowest = [float(f.detach().min()) for f in side]
        assert all(low < 0 for low in lowest) if least is None else lowest == [least] * 3


def test_a_step_moves_bottleneck_and_decoder_and_leaves_the_teacher(images):
    model = seeded()
    model.train()
    trained = [*model.bottleneck.parameters(), *model.decoder.parameters()]
    assert count(model.teacher) == 542_528
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in trained)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(trained, 0.005, rd4ad.BETAS)
    losses = []
    for _ in range(4):
        loss = rd4ad.distillation_loss(*model(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("teacher"), name


def test_seeds_give_other_students_of_one_teacher(images):
    one, other = seeded(0), seeded(1)
    assert torch.equal(one.teacher(common.normalize(images))["features.3"],
                       other.teacher(common.normalize(images))["features.3"])
    assert not torch.equal(one.decoder[0][0].body[0].weight, other.decoder[0][0].body[0].weight)
