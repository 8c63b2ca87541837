"""CS-Flow: the flow against autograd and its inverse, the scores by hand, what is trained and what is not."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script

import common

csflow = load_script("methods/csflow.py")


@pytest.fixture(scope="module")
def flow():
    """A small flow in double precision, 4 channels on 4x4, 2x2 and 1x1, with gamma not zero."""
    torch.manual_seed(0)
    flow = csflow.CrossScaleFlow(4, 6).double()
    for name, parameter in flow.named_parameters():
        if "gamma" in name:
            torch.nn.init.normal_(parameter)
    return flow


def scales(flat, channels=4):
    """(B, dim) -> the three scales of 4x4, 2x2 and 1x1."""
    parts = flat.split([channels * n * n for n in (4, 2, 1)], dim=1)
    return [part.unflatten(1, (channels, n, n)) for part, n in zip(parts, (4, 2, 1), strict=True)]


def flat(x):
    return torch.cat([v.flatten(1) for v in x], dim=1)


def inverse(flow, z):
    """From z to the features, coupling by coupling (a reference: the method needs no inverse)."""
    for k, coupling in reversed(list(enumerate(flow.couplings))):
        first, second = zip(*(v.chunk(2, dim=1) for v in z), strict=True)
        second = undo(second, coupling.net1(first))
        first = undo(first, coupling.net2(second))
        x = [torch.cat(halves, dim=1) for halves in zip(first, second, strict=True)]
        z = [v[:, order.argsort()] for v, order in zip(x, flow.get_buffer(f"order{k}"), strict=True)]
    return z


def undo(y, r):
    st = [halves.chunk(2, dim=1) for halves in r]
    return [(v - t) * torch.exp(-3 * 0.636 * torch.atan(s / 3)) for v, (s, t) in zip(y, st, strict=True)]


def test_log_determinant_equals_that_of_autograds_jacobian(flow):
    x = torch.randn(2, 84, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    log_det = flow(scales(x))[1].detach()
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: flat(flow(scales(v[None]))[0])[0], x[i])
        assert float(log_det[i]) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-9)
    assert float((log_det[0] - log_det[1]).abs()) > 0.1  # one for each image


def test_flow_is_undone_by_its_inverse(flow):
    x = scales(torch.randn(3, 84, dtype=torch.double, generator=torch.Generator().manual_seed(1)))
    z, _ = flow(x)
    assert float((flat(z) - flat(x)).detach().abs().max()) > 0.5
    assert torch.allclose(flat(inverse(flow, z)), flat(x), atol=1e-10)


def test_untrained_flow_only_permutes_channels_by_the_official_draws():
    x = scales(torch.randn(2, 84))
    z, log_det = csflow.CrossScaleFlow(4, 6)(x)
    for s in range(3):
        expected = x[s]
        for k in range(4):
            np.random.seed(k)  # the official code draws three times after seeding NumPy's generator by the block
            expected = expected[:, [np.random.permutation(4) for _ in range(3)][s]]
        assert torch.equal(z[s], expected)
    assert torch.equal(log_det, torch.zeros(2))


def test_scales_exchange_information_with_their_neighbours(flow):
    x = scales(torch.randn(1, 84, dtype=torch.double))
    net = flow.couplings[0].net1
    halves = [v[:, :2] for v in x]
    before = net(halves)
    for s, reached in enumerate(([True, True, False], [True, True, True], [False, True, True])):
        changed = [v + (i == s) for i, v in enumerate(halves)]
        assert [not torch.equal(a, b) for a, b in zip(net(changed), before, strict=True)] == reached


def test_cross_convolutions_equal_a_sum_of_convolutions(flow):
    net = flow.couplings[3].net2
    x0, x1, x2 = [v[:, :2] for v in scales(torch.randn(2, 84, dtype=torch.double))]
    y0, y1, y2 = (F.leaky_relu(net.enter[s](x), 0.1) for s, x in enumerate((x0, x1, x2)))
    up = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    expected = [net.stay[0](y0) + net.up[0](up(y1)),
                net.stay[1](y1) + net.down[0](y0) + net.up[1](up(y2)),
                net.stay[2](y2) + net.down[1](y1)]
    for s, found in enumerate(net([x0, x1, x2])):
        assert torch.allclose(found, net.gamma[s] * expected[s], atol=1e-12)


def test_scale_is_clamped_softly_to_three():
    for s, expected in ((0.5, 3 * 0.636 * math.atan(0.5 / 3)), (1e9, 3 * 0.636 * math.pi / 2)):
        (y,), log_det = csflow.affine([torch.ones(1, 1, 1, 1)], [torch.tensor([s, 0.25]).view(1, 2, 1, 1)])
        assert float(log_det) == pytest.approx(expected) and float(y) == pytest.approx(math.exp(expected) + 0.25)
    assert expected < 3


def test_published_flow_has_the_official_parameter_counts(monkeypatch):
    monkeypatch.setattr(csflow.np, "stack", lambda orders: np.zeros((3, 1), int))
    with torch.device("meta"):
        for channels, expected in ((304, 275_227_288), (320, 289_711_640)):
            flow = csflow.CrossScaleFlow(channels, 1024)
            assert sum(p.numel() for p in flow.parameters()) == expected


@pytest.fixture(scope="module")
def model():
    """With gamma not zero, or the first step would move nothing else."""
    torch.manual_seed(0)
    model = csflow.CSFlow("mobilenet_v2", "none", 8, 128)
    for name, parameter in model.flow.named_parameters():
        if "gamma" in name:
            torch.nn.init.constant_(parameter, 0.3)
    return model


def test_loss_score_and_map_are_those_of_the_papers_formulas(model):
    image = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, log_det = model.flow(model.features(image))
        nll = torch.stack([sum(v[i].square().sum() for v in z) / 2 - log_det[i] for i in range(3)])
        assert float(model.loss(model.features(image))) == pytest.approx(float(nll.mean()) / (320 * 21), rel=1e-5)
    anomaly_map, score = model.predict(image)
    expected = [float(torch.cat([v[i].flatten() for v in z]).square().mean() / 2) for i in range(3)]
    assert score.tolist() == pytest.approx(expected, rel=1e-5)
    coarse = z[0].square().mean(1)  # (3, 4, 4)
    assert anomaly_map.shape == (3, 128, 128)
    assert torch.allclose(anomaly_map[:, 0, 0], coarse[:, 0, 0], rtol=1e-5)  # a corner takes the cell's own value
    assert torch.allclose(anomaly_map[:, 31:33, 15:17].mean((1, 2)), coarse[:, :2, 0].mean(1), rtol=1e-5)


def test_small_scales_see_every_second_and_fourth_pixel(model):
    image = torch.rand(2, 3, 128, 128)
    whole = model.features(image)
    for s, step in enumerate((1, 2, 4)):
        small = F.interpolate(image, (128 // step, 128 // step))  # nearest, as in the official code
        assert torch.equal(whole[s], model.backbone(csflow.common.normalize(small))[model.layer])
        assert whole[s].shape == (2, 320, 4 // step, 4 // step)


def test_a_step_changes_the_flow_and_not_the_backbone(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.Adam(model.flow.parameters(), 1e-2)
    model.loss(model.features(torch.rand(2, 3, 128, 128))).backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        moves = key.startswith("flow.") and "order" not in key
        assert torch.equal(value, before[key]) != moves, key


@pytest.mark.slow
def test_training_lowers_the_loss_and_tells_other_correlations_apart():
    torch.manual_seed(0)
    model = csflow.CSFlow.__new__(csflow.CSFlow)
    torch.nn.Module.__init__(model)
    model.flow = csflow.CrossScaleFlow(4, 8)
    base = torch.randn(96, 21)  # normal: all channels of a position are alike; the others: they are not
    x = scales(0.5 * torch.cat([part.repeat(1, 4) for part in base.split([16, 4, 1], dim=1)], dim=1))
    other = scales(0.5 * torch.randn(32, 84))
    optimizer = torch.optim.Adam(model.flow.parameters(), 1e-2, eps=1e-4, weight_decay=1e-5)
    losses = []
    for _ in range(60):
        loss = model.loss([v[:64] for v in x])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.flow.parameters(), 1)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        held_out, unlike = (flat(model.flow(v)[0]).square().mean(1) for v in ([v[64:] for v in x], other))
    assert float(unlike.median()) > 1.3 * float(held_out.median())


@pytest.mark.parametrize("arguments", [("vgg16", 8, 128), ("mobilenet_v2", 8, 200), ("mobilenet_v2", 8, 64)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(common.Error, match="^--[^\n]*$"):
        csflow.CSFlow(arguments[0], "none", *arguments[1:])


def test_build_model_follows_the_arguments():
    args = csflow.Args(backbone="mobilenet_v2", weights="none", image_size=128, hidden=8)
    assert csflow.build_model(args).flow.couplings[0].net1.enter[0].weight.shape == (8, 160, 3, 3)
