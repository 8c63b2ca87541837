"""The mathematics of DDPM: noise, schedule, shortened chain, a perfect network, sizes, scores of single images."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script, run_script
from PIL import Image

import common

ddpm = load_script("methods/ddpm.py")
NOISE = dict(simplex=ddpm.smooth_noise, gauss=ddpm.white_noise)
SMALL = dict(image_size=32, base_channels=8, multipliers=(1, 2), attention=(16,), sample_steps=4)
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.double), dim=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def seeded(seed=0, **arguments):
    """A small model whose last layers are not zero, as after some training."""
    torch.manual_seed(seed)
    model = ddpm.build_model(ddpm.Args(**(SMALL | arguments), seed=seed))
    for p in model.unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 1, 32, 32, generator=generator()).expand(-1, 3, -1, -1)


def coloured_benchmark(folder):
    for name in ("train/good", "test/good", "test/Ungood"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (200, 30, len(name))).save(folder / name / "a.png")
    return folder


# --------------------------------------------------------------------------------------------------------------- noise
@pytest.mark.parametrize("name", ["simplex", "gauss"])
def test_noise_has_mean_0_and_deviation_1_and_follows_its_generator(name):
    t = torch.tensor([0, 1, 250, 799])
    noise = NOISE[name](t, 3, 64, generator())
    assert noise.shape == (4, 3, 64, 64) and noise.dtype == torch.float32
    tolerance = 1e-5 if name == "simplex" else 0.05
    assert noise.mean(dim=(2, 3)).abs().max() < tolerance
    assert (noise.std(dim=(2, 3)) - 1).abs().max() < tolerance
    assert torch.equal(noise, NOISE[name](t, 3, 64, generator()))
    assert not torch.equal(noise, NOISE[name](t, 3, 64, generator(1)))
    among = torch.corrcoef(noise.flatten(0, 1).flatten(1)) - torch.eye(12)
    assert among.abs().max() < 0.9  # each image and channel has its own


def test_smooth_noise_has_most_power_at_low_frequencies_and_white_noise_has_not():
    ratio = {}
    for name, make in NOISE.items():
        power = torch.fft.rfft2(make(torch.full((8,), 100), 1, 128, generator())).abs().square().mean(dim=(0, 1))
        ratio[name] = float(power[2:6, 2:6].mean() / power[40:60, 40:60].mean())
    assert ratio["simplex"] > 100 and 0.5 < ratio["gauss"] < 2


def test_gradient_noise_equals_a_loop_over_corners(monkeypatch):
    size, t = 9, torch.tensor([37, 5])
    monkeypatch.setattr(ddpm, "PERIOD", 4)
    monkeypatch.setattr(ddpm, "OCTAVES", 1)
    gradient = F.normalize(torch.randn(2, 3, 2, 4, 4, generator=generator()), dim=1)  # what it draws
    expected = torch.zeros(2, size, size)
    for n in range(2):
        for row in range(size):
            for column in range(size):
                point = [column / 4, row / 4, float(t[n]) / 4 % 1]  # x, y, z
                for plane in range(2):
                    for i in range(4):
                        for j in range(4):
                            offset = torch.tensor([point[0] - j, point[1] - i, point[2] - plane])
                            s = 1 - offset.abs().clamp(max=1)
                            weight = (6 * s**5 - 15 * s**4 + 10 * s**3).prod()
                            expected[n, row, column] += weight * (gradient[plane, :, n, i, j] @ offset)
    expected = (expected - expected.mean((1, 2), keepdim=True)) / expected.std((1, 2), keepdim=True)
    assert torch.allclose(ddpm.smooth_noise(t, 1, size, generator())[:, 0], expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ schedule
def test_q_sample_has_the_closed_forms_mean_and_variance():
    """Against the chain itself, step by step (DDPM, Eq. 2), for which Eq. 4 is the closed form."""
    t, x_0 = torch.tensor([0, 249, 799]), torch.tensor([0.7, -0.4, 0.2]).view(3, 1, 1, 1)
    q_sample = ddpm.Diffusion(250, 0).q_sample
    assert torch.allclose(q_sample(x_0, t, torch.zeros(3, 1, 1, 1)).flatten(),
                          (ALPHA_BAR[t].sqrt() * x_0.flatten()).float())
    draws = q_sample(x_0, t, torch.randn(3, 1, 400, 400, generator=generator()))
    mean, variance = x_0.flatten().double(), torch.zeros(3, dtype=torch.double)
    for step, beta in enumerate(torch.linspace(1e-4, 0.02, 1000, dtype=torch.double)):
        on = step <= t
        mean = torch.where(on, (1 - beta).sqrt() * mean, mean)
        variance = torch.where(on, (1 - beta) * variance + beta, variance)
    assert torch.allclose(draws.mean(dim=(1, 2, 3)).double(), mean, atol=0.01)
    assert torch.allclose(draws.var(dim=(1, 2, 3)).double(), variance, rtol=0.02)


def test_the_posterior_is_bayes_rule_and_has_no_variance_at_t_0():
    diffusion = ddpm.Diffusion(250, 0)
    a, b, sigma = diffusion.weight_x_0, diffusion.weight_x_t, diffusion.sigma
    assert diffusion.t.tolist() == list(range(250)) and (a[0], b[0], sigma[0]) == (1, 0, 0)
    for i in (1, 2, 100, 249):  # x_before given x_0, (before, 1 - before), times x_t given x_before, (alpha, 1 - alpha)
        before, alpha = ALPHA_BAR[i - 1], ALPHA_BAR[i] / ALPHA_BAR[i - 1]
        precision = 1 / (1 - before) + alpha / (1 - alpha)
        assert float(sigma[i]) ** 2 == pytest.approx(float(1 / precision), rel=1e-5)
        assert float(a[i]) == pytest.approx(float(before.sqrt() / (1 - before) / precision), rel=1e-5)
        assert float(b[i]) == pytest.approx(float(alpha.sqrt() / (1 - alpha) / precision), rel=1e-5)


@pytest.mark.parametrize("level,count", [(250, 50), (250, 7), (800, 2), (100, 100)])
def test_respaced_steps_keep_alpha_bar(level, count):
    diffusion = ddpm.Diffusion(level, count)
    t, a, b, sigma = diffusion.t, diffusion.weight_x_0, diffusion.weight_x_t, diffusion.sigma
    assert t[0] == 0 and t[-1] == level - 1 and len(t.unique()) == count
    left = diffusion.sqrt_alpha_bar[t].double() ** 2
    assert torch.allclose(left, ALPHA_BAR[t], rtol=1e-6)
    assert torch.allclose(diffusion.sqrt_one_minus_alpha_bar[t].double() ** 2, 1 - ALPHA_BAR[t], rtol=1e-6)
    beta = 1 - left[1:] / left[:-1]
    again = torch.cat([left[:1], left[0] * (1 - beta).cumprod(0)])  # a chain of these betas
    assert torch.allclose(again, ALPHA_BAR[t], rtol=1e-5)
    # a step back from q(x_t | x_0) with the true x_0 gives q(x_before | x_0), mean and variance
    assert torch.allclose((a + b * left.sqrt())[1:].double(), left[:-1].sqrt(), atol=1e-5)
    assert torch.allclose((b**2 * (1 - left) + sigma**2)[1:].double(), 1 - left[:-1], atol=1e-5)


@pytest.mark.parametrize("steps", [0, 5, 50])
@pytest.mark.parametrize("noise", ["simplex", "gauss"])
def test_with_a_perfect_network_the_chain_returns_the_image(noise, steps, images):
    model = seeded(noise=noise, sample_steps=steps)
    image = images[:1]
    x_0 = model.scaled(image)

    class Perfect(torch.nn.Module):
        def forward(self, x, t):
            left = ALPHA_BAR[t].view(-1, 1, 1, 1)
            return (x - left.sqrt().float() * x_0) / (1 - left).sqrt().float()

    model.unet = Perfect()
    assert torch.allclose(model.reconstruct(x_0, model.fields[0]), x_0, atol=1e-5)
    anomaly_map, score = model.predict(image)
    assert anomaly_map.max() < 1e-8 and score.max() < 1e-8


# ------------------------------------------------------------------------------------------------------------- network
@pytest.mark.parametrize("base,expected", [(128, 131_649_793), (64, 32_950_401)])  # counted in the official code
def test_size_is_the_published_one(base, expected):
    args = ddpm.Args()
    assert (args.image_size, args.base_channels) == (256, 128)
    with torch.device("meta"):
        unet = ddpm.UNet(1, args.image_size, base, args.multipliers, args.attention)
    assert sum(p.numel() for p in unet.parameters()) == expected
    attention = [name for name, module in unet.named_modules() if isinstance(module, ddpm.Attention)]
    assert len(attention) == 3 * (2 + 3) + 1  # 32, 16 and 8 pixels, down and up, and the middle
    if base == 128:
        assert {m.num_groups for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}


def test_an_untrained_network_predicts_no_noise_and_a_trained_one_sees_the_step():
    """Groups of one channel would hide the step at small widths."""
    x, t = torch.randn(2, 3, 32, 32, generator=generator()), torch.tensor([5, 500])
    torch.manual_seed(0)
    unet = ddpm.UNet(3, 32, 8, (1, 2), (16,))
    assert unet(x, t).shape == x.shape and not unet(x, t).any()
    unet = seeded(channels=3).unet
    assert not torch.allclose(unet(x, t), unet(x, t.flip(0)), atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- method
def test_scores_do_not_depend_on_the_batch_the_order_or_what_was_drawn_before(images):
    model = seeded()
    maps, scores = model.predict(images)
    assert maps.shape == (4, 32, 32) and torch.equal(scores, maps.amax(dim=(1, 2)))
    torch.manual_seed(123)
    again = seeded(seed=0).predict(images)
    assert torch.equal(maps, again[0]) and torch.equal(scores, again[1])
    for i in range(4):
        alone = model.predict(images[i : i + 1])
        assert torch.allclose(alone[0][0], maps[i], rtol=1e-4, atol=1e-6)
    assert torch.allclose(model.predict(images.flip(0))[1].flip(0), scores, rtol=1e-4)


def test_the_seed_draws_the_noise_and_the_checkpoint_holds_none_of_it():
    assert not torch.equal(seeded().fields, seeded(seed=1).fields)
    assert set(seeded().state_dict()) == {f"unet.{k}" for k in seeded().unet.state_dict()}


def test_no_buffer_is_in_float64_which_some_devices_lack():
    assert {b.dtype for b in seeded().buffers()} == {torch.float32, torch.long}


def test_build_model_follows_the_arguments():
    assert seeded(channels=3).unet.first.weight.shape == (8, 3, 3, 3) and seeded().unet.first.weight.shape[1] == 1
    assert seeded(repeats=2).fields.shape == (2, 4, 1, 32, 32)


def test_map_adds_channels_and_averages_reconstructions(images):
    coloured = torch.rand(2, 3, 32, 32, generator=generator())
    model = seeded(channels=3, repeats=2, score="top")
    x_0 = 2 * coloured - 1
    with torch.no_grad():
        recon = (model.reconstruct(x_0, model.fields[0]) + model.reconstruct(x_0, model.fields[1])) / 2
    anomaly_map, score = model.predict(coloured)
    assert torch.allclose(anomaly_map, (recon - x_0).square().sum(1), atol=1e-5)
    assert torch.allclose(score, anomaly_map.flatten(1).sort(dim=1).values[:, -10:].mean(1))  # 1024 // 100 pixels
    smoothed, _ = seeded(sigma=2).predict(images)
    assert smoothed.shape == (4, 32, 32) and smoothed.std() < seeded().predict(images)[0].std()


@pytest.mark.slow
def test_loss_falls_and_reaches_all_weights(images):
    model = seeded()
    learner = copy.deepcopy(model.unet)
    optimizer = torch.optim.AdamW(learner.parameters(), 2e-3, weight_decay=0)
    losses = []
    for _ in range(40):
        loss = model.loss(learner, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    assert all(p.grad is not None for p in learner.parameters())
    assert all(p.grad is None for p in model.unet.parameters())  # the averaged weights only follow


def test_averaged_weights_forget_their_start_and_then_move_slowly():
    model = seeded()
    learner = copy.deepcopy(model.unet)
    for p in learner.parameters():
        torch.nn.init.ones_(p)
    with torch.no_grad():
        for step in range(1, 31):
            model.average(learner, step)
    assert all(torch.allclose(p, torch.ones_like(p), atol=1e-5) for p in model.unet.parameters())
    for p in learner.parameters():
        torch.nn.init.zeros_(p)
    model.average(learner, 10**6)
    assert all(torch.allclose(p, torch.full_like(p, 0.9999), atol=2e-5) for p in model.unet.parameters())


@pytest.mark.parametrize("wrong", [dict(image_size=40), dict(image_size=8, multipliers=(1,)), dict(base_channels=12),
                                   dict(noise_level=801), dict(noise_level=1), dict(sample_steps=251),
                                   dict(sample_steps=1), dict(multipliers=()),
                                   dict(sigma=64), dict(base_channels=0)])
def test_arguments_that_cannot_go_together_are_refused(wrong):
    with pytest.raises(common.Error, match=f"--{next(iter(wrong)).replace('_', '-')}[^\n]*$"):
        ddpm.build_model(ddpm.Args(**wrong))
    ddpm.check(ddpm.Args())


def test_the_published_training_lasts_300000_images():
    assert ddpm.Args().epochs == 0
    assert [ddpm.whole_training(n) for n in (12, 7)] == [25_000, 42_858]


@pytest.mark.slow
def test_a_run_without_epochs_counts_images_and_is_finished_once(phantom, tmp_path):
    arguments = ["--root", phantom, "--out", tmp_path, "--device", "cpu", "--image-size", 16, "--maps", 0, "--limit", 4,
                 "--base-channels", 8, "--multipliers", 1, "--noise-level", 4, "--sample-steps", 2]
    script = tmp_path / "ddpm.py"
    source = (ROOT / "methods/ddpm.py").read_text()
    script.write_text(source.replace("300_000 / images", "50 / images").replace(
        "Path(__file__).resolve().parents[1]", repr(str(ROOT))))
    for said in ("epoch 13/13", "nothing to do"):
        done = run_script(script, *arguments)
        assert done.returncode == 0 and said in done.stdout, done.stderr
    results = json.loads((tmp_path / "phantom/ddpm/seed0/results.json").read_text())
    assert results["args"]["epochs"] == 0 and "epochs" not in results["changed"]


@pytest.mark.slow
def test_coloured_images_need_three_channels(tmp_path):
    done = run_script("methods/ddpm.py", "--data", coloured_benchmark(tmp_path / "colour"), "--root", tmp_path,
                      "--out", tmp_path / "runs", "--device", "cpu", "--image-size", 32, "--base-channels", 8,
                      "--multipliers", 1, 2)
    assert done.returncode == 2 and "--channels 3" in done.stderr and done.stderr.count("\n") == 1
