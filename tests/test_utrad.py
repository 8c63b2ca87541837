"""UTRAD's transformer, losses and score against slow references written group by group."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn

import common

script = load_script("methods/utrad.py")
CHANNELS = 64, 128, 256


class Backbone(nn.Module):
    """Three layers of resnet18's shapes, each a repetition of pooled pixels; takes no time."""

    frozen = True

    def forward(self, image):
        return {c: F.avg_pool2d(image[:, :1], s).repeat(1, c, 1, 1) for c, s in zip(CHANNELS, (4, 8, 16), strict=True)}


def made(monkeypatch, image_size=64, width=16, layers=2, activation="relu"):
    monkeypatch.setattr(common, "feature_extractor", lambda *_: Backbone())
    torch.manual_seed(0)
    return script.UTRAD("resnet18", "none", image_size, width, layers, activation)


def images(count=2, size=64):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------- slow reference, in eval mode
def attention(layer, query, memory):
    """Multi-head attention of one sequence: query (T, d), memory (M, d)."""
    d, dim = query.shape[1], query.shape[1] // script.HEADS
    q, k, v = (x @ w.T + b for x, w, b in zip((query, memory, memory), layer.in_proj_weight.split(d),
                                              layer.in_proj_bias.split(d), strict=True))
    heads = []
    for h in range(script.HEADS):
        mine = slice(h * dim, (h + 1) * dim)
        heads.append((q[:, mine] @ k[:, mine].T / dim**0.5).softmax(dim=1) @ v[:, mine])
    return layer.out_proj(torch.cat(heads, dim=1))


def feed_forward(layer, x, activation):
    return layer.linear2(activation(layer.linear1(x)))


def encode(encoder, x, activation):
    for layer in encoder.layers:
        x = layer.norm1(x + attention(layer.self_attn, x, x))
        x = layer.norm2(x + feed_forward(layer, x, activation))
    return encoder.norm(x)


def decode(decoder, x, memory, activation):
    for layer in decoder.layers:
        x = layer.norm1(x + attention(layer.self_attn, x, x))
        x = layer.norm2(x + attention(layer.multihead_attn, x, memory))
        x = layer.norm3(x + feed_forward(layer, x, activation))
    return decoder.norm(x)


def reference(model, features, activation):
    """The tokens behind the last level of one image, (h, h, d)."""
    x = model.embed(features[None])[0] + model.position
    x, stack = x.permute(1, 2, 0), []
    for level in model.levels:
        s, groups = level.side, len(x) // level.side
        above, skips = torch.zeros(groups, groups, x.shape[2]), {}
        for i in range(groups):
            for j in range(groups):
                tokens = x[i * s : i * s + s, j * s : j * s + s].reshape(s * s, -1) + level.position
                out = encode(level.encoder, torch.cat([torch.zeros(1, x.shape[2]), tokens]), activation)
                above[i, j], skips[i, j] = out[0], level.bottleneck(out[1:])
        stack.append(skips)
        x = above
    for level, skips in zip(reversed(model.levels), reversed(stack), strict=True):
        s, groups = level.side, len(x)
        below = torch.zeros(groups * s, groups * s, x.shape[2])
        for (i, j), skip in skips.items():
            out = decode(level.decoder, level.query, torch.cat([x[i, j][None], skip]), activation)
            below[i * s : i * s + s, j * s : j * s + s] = out.view(s, s, -1)
        x = below
    return x


@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("gelu", F.gelu)])
def test_transformer_equals_the_loop_over_groups(activation, function, monkeypatch):
    model = made(monkeypatch, activation=activation).eval()
    features = model.features(images())
    with torch.no_grad():
        recon, std = model(features)
        tokens = torch.stack([reference(model, f, function) for f in features]).permute(0, 3, 1, 2)
        assert torch.allclose(recon, model.recon(tokens), atol=1e-5)
        assert torch.allclose(std, model.std(tokens), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- model
def test_parameter_counts_are_the_published_ones(monkeypatch):
    with torch.device("meta"):
        model = made(monkeypatch, 256, 512, 4)

    def count(*modules):
        return sum(p.numel() for p in {p for m in modules for p in m.parameters()})

    codes = model.position.numel() + sum(level.position.numel() for level in model.levels)
    assert (count(model), codes) == (91_719_232 - 2_121_728, 2_121_728)
    assert count(*(level.encoder for level in model.levels)) == 12 * 3_152_384 + 1024
    assert count(*(level.decoder for level in model.levels)) == 12 * 4_204_032 + 1024
    assert count(model.std) == 512 * 512 + 512 * 256 + 256 * 128 + 128 * 64 + 64 + 2 * (512 + 256 + 128 + 64)


@pytest.mark.parametrize(("size", "sides"), [(256, [4, 4, 4]), (128, [4, 4, 2]), (64, [4, 4]), (32, [4, 2]), (16, [4]),
                                             (224, [4, 14])])
def test_levels_follow_the_grid_of_tokens(size, sides, monkeypatch):
    model = made(monkeypatch, size, layers=1)
    assert [level.side for level in model.levels] == sides
    assert model.scales[0] == 1 and model.scales[-1] == size // 4 and len(model.scales) == len(sides) + 1
    anomaly_map, score = model.predict(images(1, size))
    assert anomaly_map.shape == (1, size, size) and score.shape == (1,) and anomaly_map.isfinite().all()


def test_norms_are_shared_and_layers_of_a_level_start_with_equal_attention(monkeypatch):
    model = made(monkeypatch)
    first, second = model.levels
    assert first.encoder.norm is second.encoder.norm and first.decoder.norm is second.decoder.norm
    assert first.encoder.norm is not first.decoder.norm
    for level in model.levels:
        a, b = level.encoder.layers
        assert torch.equal(a.self_attn.in_proj_weight, b.self_attn.in_proj_weight)
        assert not torch.equal(a.linear1.weight, b.linear1.weight)
        assert 0.01 < float(a.self_attn.out_proj.weight.detach().std()) < 0.03


def test_deeper_layers_are_repeated_not_interpolated(monkeypatch):
    features = made(monkeypatch).features(images())
    deepest = features[:, 64 + 128]
    assert torch.equal(deepest, deepest[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2))


def test_a_step_trains_everything_but_backbone_and_position_codes():
    torch.manual_seed(0)
    model = script.UTRAD("mobilenet_v2", "none", 32, 16, 1, "relu")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    features = model.features(images(size=32))
    sum(script.losses(features, *model(features))).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        fixed = name.startswith("backbone") or "position" in name
        assert torch.equal(value, before[name]) == fixed, name


def test_an_image_is_not_seen_by_its_neighbours_in_the_batch(monkeypatch):
    model, image = made(monkeypatch), images(3)
    alone = torch.cat([model.predict(i[None])[0] for i in image])
    assert torch.allclose(model.predict(image)[0], alone, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------- losses and score
def test_losses_worked_out_by_hand():
    features = torch.zeros(1, 2, 1, 2)
    recon = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).view(1, 2, 1, 2)  # errors of the two tokens: 5 and 1
    std = torch.tensor([4.0, -1.0]).view(1, 1, 1, 2)
    loss_recon, loss_std = script.losses(features, recon, std)
    assert float(loss_recon) == (9 + 16 + 0 + 1) / 4
    assert float(loss_std) == ((4 - 5) ** 2 + (-1 - 1) ** 2) / 2


def test_the_expected_error_trains_its_own_head_only(monkeypatch):
    model = made(monkeypatch).train()
    features = model.features(images())
    script.losses(features, *model(features))[1].backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"std"}


def test_score_is_the_mean_ratio_over_all_scales(monkeypatch):
    model = made(monkeypatch, 64, layers=1)
    draw = torch.Generator().manual_seed(2)
    features, recon = torch.randn(1, 5, 16, 16, generator=draw), torch.randn(1, 5, 16, 16, generator=draw)
    std = 1 + torch.rand(1, 1, 16, 16, generator=draw)
    monkeypatch.setattr(model, "features", lambda _: features)
    maps = []
    for sign in (1, -1):
        monkeypatch.setattr(model, "forward", lambda _, sign=sign: (recon, sign * std))
        anomaly_map, score = model.predict(images(1))
        maps.append(anomaly_map)
    assert torch.equal(maps[0], maps[1])  # the sign of the expected error is free
    ratio = ((recon - features)[0] ** 2).sum(0).sqrt() / std[0, 0]
    total = ratio.clone()
    for scale in (4, 16):
        means = torch.stack([torch.stack([ratio[i : i + scale, j : j + scale].mean() for j in range(0, 16, scale)])
                             for i in range(0, 16, scale)])
        total += F.interpolate(means[None, None], (16, 16), mode="bilinear", align_corners=False)[0, 0]
    expected = F.interpolate(total[None, None] / 3, (64, 64), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(maps[0], expected, rtol=1e-5) and float(score) == float(maps[0].max())


def test_an_expected_error_of_zero_gives_a_finite_score(monkeypatch):
    model = made(monkeypatch, layers=1)
    nn.init.zeros_(model.std[-1].weight)
    assert model.predict(images(1))[1].isfinite().all()


@pytest.mark.parametrize(("arguments", "named"), [
    (("resnet34", "none", 64, 16, 1, "relu"), "--backbone resnet34"),
    (("mobilenet_v2", "none", 72, 16, 1, "relu"), "--image-size 72"),
    (("mobilenet_v2", "none", 64, 20, 1, "relu"), "--width 20"),
])
def test_bad_arguments_are_refused(arguments, named):
    with pytest.raises(common.Error, match=named):
        script.UTRAD(*arguments)


def test_build_model_follows_the_arguments():
    args = script.Args(backbone="mobilenet_v2", weights="none", image_size=32, width=16, layers=3, activation="gelu")
    model = script.build_model(args)
    assert [len(level.encoder.layers) for level in model.levels] == [3, 3] and model.recon.weight.shape[:2] == (152, 16)
