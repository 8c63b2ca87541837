"""The mathematics of CFLOW: the flow's inverse and density, positional codes, schedule, score."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script

import common

cflow = load_script("methods/cflow.py")


def smooth_images(n, seed=0):
    """Smooth random images (n, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (64, 64), mode="bilinear").expand(-1, 3, -1, -1)


def random_flow(channels, condition=8, blocks=3):
    torch.manual_seed(0)
    flow = cflow.Flow(channels, condition, blocks).double()
    for parameter in flow.parameters():  # at the start scale and offset do nothing
        parameter.data += 0.5 * torch.randn_like(parameter)
    for block in flow:
        block.rotation = torch.linalg.qr(block.rotation).Q  # orthogonal in double precision
    return flow


def inverse(flow, z, code):
    for block in reversed(flow):
        y = z @ block.rotation - block.offset  # the rotation's inverse is its transpose
        y = y / (0.2 * (1 + (block.scale / 2).exp()).log())  # softplus with beta 0.5, times 0.1
        x1, y2 = y.split(block.split, dim=-1)
        log_scale, shift = (0.1 * block.subnet(torch.cat([x1, code], dim=-1))).split(block.split[1], dim=-1)
        z = torch.cat([x1, (y2 - shift) * (-1.9 * log_scale.tanh()).exp()], dim=-1)
    return z


@pytest.mark.parametrize("channels", [6, 7])
def test_flow_is_invertible(channels):
    flow, x, code = random_flow(channels), torch.randn(5, channels).double(), torch.randn(5, 8).double()
    z, _ = flow(x, code)
    assert not torch.allclose(z, x, atol=0.1)
    assert torch.allclose(inverse(flow, z, code), x, atol=1e-9)


@pytest.mark.parametrize("channels", [6, 7])
def test_log_likelihood_equals_the_change_of_variables_by_autograd(channels):
    flow, x, code = random_flow(channels), torch.randn(4, channels).double(), torch.randn(4, 8).double()
    found, log_det = flow.log_likelihood(x, code), flow(x, code)[1]
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda v, i=i: flow(v, code[i])[0], x[i])
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert log_det[i].item() == pytest.approx(expected.item(), abs=1e-9)
        normal = torch.distributions.Normal(0, 1).log_prob(flow(x[i], code[i])[0]).sum()
        assert found[i].item() == pytest.approx((normal + expected).item() / channels, abs=1e-9)


def test_the_log_scale_of_a_coupling_is_clamped():
    torch.manual_seed(0)
    block = cflow.CouplingBlock(6, 8)
    x, code = 1e6 * torch.randn(50, 6), torch.randn(50, 8)
    log_det = block(x, code)[1].detach()
    assert log_det.abs().max() <= 3 * 1.9 + 1e-4 and log_det.abs().max() > 1.9


def test_block_starts_with_gain_one_and_an_orthogonal_rotation_in_its_state():
    torch.manual_seed(0)
    block = cflow.CouplingBlock(32, 8)
    x, code = torch.randn(5, 32), torch.randn(5, 8)
    for parameter in block.subnet.parameters():  # without the coupling a block only rotates
        torch.nn.init.zeros_(parameter)
    y, log_det = block(x, code)
    assert torch.allclose(y, x @ block.rotation.T, atol=1e-5) and torch.allclose(log_det, torch.zeros(5), atol=1e-5)
    assert torch.allclose(block.rotation @ block.rotation.T, torch.eye(32), atol=1e-5)
    assert block.rotation.abs().max() < 0.9  # mixes all channels, unlike a permutation
    assert "rotation" in block.state_dict() and not block.rotation.requires_grad


def test_positional_code_is_sine_and_cosine_of_column_and_row():
    code = cflow.positional_code(16, 3, 5)
    assert code.shape == (15, 16)
    for row, column in [(0, 0), (2, 1), (1, 4)]:
        for k in range(4):
            w = 10000 ** (-2 * k / 8)
            expected = [math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)]
            found = [code[row * 5 + column, i].item() for i in (2 * k, 2 * k + 1, 8 + 2 * k, 8 + 2 * k + 1)]
            assert found == pytest.approx(expected, abs=1e-6)


def test_learning_rate_is_the_official_one_of_25_meta_epochs():
    lr, batches = 2e-4, 7  # a meta epoch: 8 passes of 7 batches
    end, per_meta = lr * 0.1**3, 8 * batches
    peak = end + (lr - end) * (1 + math.cos(math.pi * 2 / 25)) / 2
    for step in range(25 * per_meta):
        meta = step // per_meta
        if meta < 2:
            expected = lr / 10 + step / (2 * per_meta) * (peak - lr / 10)
        else:
            expected = end + (lr - end) * (1 + math.cos(math.pi * meta / 25)) / 2
        assert cflow.learning_rate(lr, step, 25 * per_meta) == pytest.approx(expected, rel=1e-9)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = cflow.CFlow("mobilenet_v2", "none", 64, 2, 8)
    model.find_likeliest(map(model.features, smooth_images(6).split(4)))
    return model


def test_fiber_batches_use_each_vector_once_with_the_code_of_its_position(model):
    features = model.features(smooth_images(3))  # 3 * 64, 3 * 16 and 3 * 4 vectors
    for l, x in enumerate(features):
        seen = [(v, code) for i, v, code in model.fiber_batches(features, 20) if i == l]
        vectors, codes = (torch.cat(side) for side in zip(*seen, strict=True))
        whole = x.flatten(0, 1)
        assert [len(v) for v, _ in seen] == ([20] * (len(whole) // 20) or [len(whole)])  # the rest is left out
        rows = torch.cdist(vectors, whole, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        assert torch.equal(vectors, whole[rows]) and len(rows.unique()) == len(rows)
        assert torch.equal(codes, model.get_buffer(f"code{l}")[rows % (len(whole) // 3)])


def test_a_step_of_the_shared_optimizer_moves_the_flow_of_one_layer(model):
    """Adam leaves a parameter without gradient alone, its momentum included."""
    flows, features = copy.deepcopy(model.flows), model.features(smooth_images(2))
    optimizer = torch.optim.Adam(flows.parameters(), 1e-3, fused=True)
    for l in (0, 1):
        before = {k: v.clone() for k, v in flows.named_parameters()}
        _, x, code = next(batch for batch in model.fiber_batches(features, 8) if batch[0] == l)
        optimizer.zero_grad()
        flows[l].log_likelihood(x, code).mean().backward()
        optimizer.step()
        assert {k.split(".")[0] for k, v in flows.named_parameters() if not torch.equal(v, before[k])} == {str(l)}


def test_likeliest_is_that_of_all_training_images(model):
    found = [m.max().item() for m in model.log_likelihoods(model.features(smooth_images(6)))]
    assert model.likeliest.tolist() == pytest.approx(found, rel=1e-5)
    assert "likeliest" in model.state_dict()


def test_map_is_what_is_missing_to_the_likeliest_at_every_layer(model):
    image = smooth_images(3, seed=1)
    anomaly_map, score = model.predict(image)
    expected = torch.zeros(3, 64, 64)
    for l, (m, grid) in enumerate(zip(model.log_likelihoods(model.features(image)), (8, 4, 2), strict=True)):
        m = torch.exp(torch.clamp(m - model.likeliest[l], max=0)).view(3, 1, grid, grid)
        expected += 1 - F.interpolate(m, (64, 64), mode="bilinear", align_corners=True)[:, 0]
    assert torch.allclose(anomaly_map, expected, atol=1e-5)
    assert torch.allclose(score, expected.amax(dim=(1, 2)), atol=1e-5)
    assert torch.allclose(model.predict(image[1:2])[1], score[1:2], atol=1e-5)  # nothing depends on the batch
    assert anomaly_map.min() >= 0 and anomaly_map.max() <= 3


def test_training_raises_the_likelihood_and_moves_only_the_flows(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flow, x, code = model.flows[0], model.features(smooth_images(4))[0].flatten(0, 1), model.code0.repeat(4, 1)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    first = flow.log_likelihood(x, code).mean().item()
    for _ in range(5):
        loss = -F.logsigmoid(flow.log_likelihood(x, code)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert flow.log_likelihood(x, code).mean().item() > first
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("flows.0") or name.endswith("rotation")), name


def test_trained_weights_with_the_published_backbone():
    with torch.device("meta"):
        flows = [cflow.Flow(c, 128, 8) for c in (512, 1024, 2048)]
    counts = [sum(p.numel() for p in flow.parameters()) for flow in flows]
    assert counts == [5_523_456, 17_074_176, 59_049_984] and sum(counts) == 81_647_616


def test_an_impossible_code_is_refused():
    with pytest.raises(common.Error, match="--condition 130"):
        cflow.CFlow("mobilenet_v2", "none", 64, 8, 130)


def test_build_model_follows_the_arguments():
    args = cflow.Args(backbone="mobilenet_v2", weights="none", image_size=64, blocks=2, condition=8)
    model = cflow.build_model(args)
    assert [len(flow) for flow in model.flows] == [2, 2, 2] and model.code0.shape == (64, 8)
