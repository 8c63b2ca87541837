"""DRAEM: Perlin noise and losses against slow references, augmentations against Pillow, textures, the networks."""

import colorsys
import math
import time

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image, ImageEnhance, ImageOps

draem = load_script("methods/draem.py")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def slow_perlin(cells, size, angle):
    """One pixel at a time: (cells) along both axes, angle[a, b] that of the gradient at corner (a, b)."""
    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    noise = np.zeros((size, size))
    for r in range(size):
        for c in range(size):
            v, u = r * cells[0] / size, c * cells[1] / size
            a, b = int(v), int(u)
            n = {(i, j): math.cos(angle[a + i, b + j]) * (v - a - i) + math.sin(angle[a + i, b + j]) * (u - b - j)
                 for i in (0, 1) for j in (0, 1)}
            wv, wu = fade(v - a), fade(u - b)
            noise[r, c] = math.sqrt(2) * ((1 - wu) * ((1 - wv) * n[0, 0] + wv * n[1, 0])
                                          + wu * ((1 - wv) * n[0, 1] + wv * n[1, 1]))
    return noise


def test_perlin_noise_equals_a_loop_over_pixels_for_mixed_cells(monkeypatch):
    exponents = torch.tensor([[0, 0], [3, 1], [2, 4], [1, 3]])
    drawn = torch.rand(4, 17, 17)
    monkeypatch.setattr(draem.torch, "rand", lambda *shape: drawn)
    noise = draem.perlin(exponents, 48, "cpu")
    assert noise.shape == (4, 1, 48, 48)
    for i, (a, b) in enumerate(exponents.tolist()):
        expected = slow_perlin((2**a, 2**b), 48, 2 * math.pi * drawn[i].double().numpy())
        assert np.abs(noise[i, 0].numpy() - expected).max() < 2e-6


def test_masks_cover_what_the_official_pipeline_covers():
    noise = draem.perlin(torch.randint(0, 6, (600, 2)), 128, "cpu")
    share = (draem.rotate(noise, draem.uniform(noise, -90, 90)) > 0.5).float().mean((1, 2, 3))
    assert 0.041 < float(share.mean()) < 0.053  # official code at 256 pixels, 2,000 draws: 4.8%
    assert 0.03 < float((share == 0).float().mean()) < 0.08  # 5.4% are empty


# ---------------------------------------------------------------------------------------------------- augmentations
def picture(n=1):
    """Smooth colours with 8 bits, (n, 3, 32, 32)."""
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 6, 6), (32, 32), mode="bilinear")
    return (x * 255).round() / 255


def pillow(x):
    return Image.fromarray((x[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def draws(monkeypatch, *values):
    """Make the draws of one augmentation known."""
    left = list(values)
    monkeypatch.setattr(draem, "uniform", lambda like, low, high, channels=1:
                        torch.tensor(left.pop(0)).view(-1, 1, 1, 1).expand(len(like), channels, 1, 1))


@pytest.mark.parametrize("name, values, expected", [
    ("sharpness", [0.3], lambda image: ImageEnhance.Sharpness(image).enhance(0.3)),
    ("sharpness", [1.8], lambda image: ImageEnhance.Sharpness(image).enhance(1.8)),
    ("solarize", [0.1, 100.0], lambda image: ImageOps.solarize(image, 100)),
    ("solarize", [0.9, 100.0], lambda image: image),
    ("autocontrast", [0.0], lambda image: ImageOps.autocontrast(image)),
    ("autocontrast", [0.1], lambda image: ImageOps.autocontrast(image, 10)),
    ("equalize", [], ImageOps.equalize),
    ("invert", [], ImageOps.invert),
    ("turn", [0.0], lambda image: image),
    ("turn", [90.0], lambda image: image.rotate(90)),
    ("turn", [30.0], lambda image: image.rotate(30, Image.Resampling.BILINEAR)),
])
def test_augmentations_equal_pillows(name, values, expected, monkeypatch):
    x = picture()
    draws(monkeypatch, *values)
    difference = (getattr(draem, name)(x) - tensor(expected(pillow(x)))).abs()
    if values == [30.0]:
        difference = difference[:, :, 6:26, 6:26]  # the border is drawn in another way
    assert float(difference.max()) < 1.6 / 255


def test_posterize_equals_pillows(monkeypatch):
    x = picture()
    for bits in range(1, 9):
        monkeypatch.setattr(draem.torch, "randint", lambda *_, bits=bits: torch.tensor(8 - bits).view(1, 1, 1, 1))
        assert torch.allclose(draem.posterize(x), tensor(ImageOps.posterize(pillow(x), bits)), atol=1e-6)


def test_hue_and_saturation_equal_the_standard_library(monkeypatch):
    x = torch.cat([torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8).expand(-1, 3, -1, -1)])  # colour and grey
    draws(monkeypatch, [40.0, -20.0], [-30.0, 50.0])
    found = draem.hue_saturation(x)
    for i, (hue, saturation) in enumerate(((40, -30), (-20, 50))):
        for pixel, after in zip(x[i].flatten(1).T.tolist(), found[i].flatten(1).T.tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            expected = colorsys.hsv_to_rgb((h + hue / 255) % 1, min(max(s + saturation / 255, 0), 1), v)
            assert after == pytest.approx(expected, abs=1e-5)


def test_brightness_changes_the_luma(monkeypatch):
    x = 0.3 + 0.4 * torch.rand(2, 3, 8, 8)
    draws(monkeypatch, 1.1, 20.0, [0.2, 0.8])
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    before, after = ((y * luma).sum(1) for y in (x, draem.brightness(x)))
    assert torch.allclose(after[0], before[0] * 1.1 + 20 / 255, atol=1e-6)
    assert torch.allclose(after[1], (before[1] + 20 / 255) * 1.1, atol=1e-6)


def test_augmented_textures_stay_in_range_and_their_images_apart():
    x = picture(40)
    found = draem.augment(x)
    assert float(found.min()) >= 0 and float(found.max()) <= 1 and float((found - x).abs().mean()) > 0.05
    assert len({tuple(v.flatten()[:50].tolist()) for v in found}) == 40


# ---------------------------------------------------------------------------------------------- simulated anomalies
class White:
    """Textures of one colour."""

    def __len__(self):
        return 3

    def batch(self, indices, device):
        return torch.ones(len(indices), 3, 64, 64, device=device)


def test_anomalies_are_inside_their_masks_and_the_target_is_clean(monkeypatch):
    monkeypatch.setattr(draem, "augment", lambda texture: texture)
    image = 0.2 + 0.1 * torch.rand(200, 3, 64, 64)
    kept = image.clone()
    target, corrupted, mask = draem.simulate(image, White())
    assert torch.equal(image, kept)  # its argument is left alone
    inside = mask.expand_as(target)
    assert torch.equal(corrupted[~inside], target[~inside])
    share = ((corrupted - target) / (1 - target))[inside]  # of the texture: 1 - beta
    assert 0.2 - 1e-4 <= float(share.min()) < 0.25 and 0.9 < float(share.max()) <= 1 + 1e-4
    assert 0.35 < float(mask.any(3).any(2).float().mean()) < 0.6  # half of the images, less the empty masks
    turned = torch.tensor([not torch.equal(a, b) for a, b in zip(target, image, strict=True)])
    assert 0.2 < float(turned.float().mean()) < 0.4
    assert float(target[turned][:, :, 0, 0].min()) == 0  # black corners, in the target too


def test_noise_textures_are_the_masks_own_noise(monkeypatch):
    monkeypatch.setattr(draem, "augment", lambda texture: texture)
    target, corrupted, mask = draem.simulate(torch.zeros(60, 3, 64, 64))
    inside = mask.expand_as(target)
    assert float(corrupted[~inside].abs().max()) == 0
    assert float(corrupted[inside].min()) >= 0.1 - 1e-6 and float(corrupted.max()) <= 1  # above 0.5, a share of 0.2 up


# ----------------------------------------------------------------------------------------------------------- losses
def test_focal_loss_equals_the_official_codes_smoothed_one_hot():
    logits, mask = 3 * torch.randn(2, 2, 9, 9), torch.rand(2, 1, 9, 9) < 0.2
    p = logits.double().softmax(1)
    one_hot = torch.cat([~mask, mask], dim=1).double().clamp(1e-5, 1 - 1e-5)
    pt = (one_hot * p).sum(1) + 1e-5
    expected = -((1 - pt) ** 2 * pt.log()).mean()
    assert float(draem.focal_loss(logits, mask)) == pytest.approx(float(expected), rel=1e-5)


def test_focal_loss_teaches_normal_pixels_too():
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    loss = draem.focal_loss(logits, torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-0.25 * math.log(0.5), rel=1e-4) and float(logits.grad.abs().min()) > 0


def test_ssim_equals_a_loop_over_windows():
    a, b = torch.rand(1, 2, 14, 13), torch.rand(1, 2, 14, 13)
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(g, g) / g.sum() ** 2
    padded = [np.pad(v[0].double().numpy(), ((0, 0), (5, 5), (5, 5))) for v in (a, b)]
    values = []
    for c in range(2):
        for r in range(14):
            for s in range(13):
                x, y = (p[c, r : r + 11, s : s + 11] for p in padded)
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy, cov = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2, \
                    (window * x * y).sum() - mx * my
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert float(draem.ssim(a, b)) == pytest.approx(np.mean(values), abs=1e-6)
    assert float(draem.ssim(a, a)) == pytest.approx(1, abs=1e-6)


# --------------------------------------------------------------------------------------------------------- networks
def test_networks_have_the_official_parameter_counts():
    with torch.device("meta"):
        model = draem.DRAEM(128)
    assert sum(p.numel() for p in model.reconstructive.parameters()) == 69_048_579
    assert sum(p.numel() for p in model.discriminative.parameters()) == 28_374_146


def test_networks_start_from_the_official_codes_normal_weights():
    for module in draem.DRAEM(16).modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 5000:
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert 0.7 < float(module.weight.detach().mean()) < 1.3 and not module.bias.any()


def test_score_is_the_largest_mean_of_a_window_of_the_map():
    model = draem.DRAEM(4)
    anomaly_map, score = model.predict(torch.rand(2, 3, 64, 64))
    assert anomaly_map.shape == (2, 64, 64) and float(anomaly_map.min()) > 0 and float(anomaly_map.max()) < 1
    for m, s in zip(anomaly_map.numpy(), score.tolist(), strict=True):
        padded = np.pad(m, 10)
        means = [padded[r : r + 21, c : c + 21].mean() for r in range(64) for c in range(64)]
        assert s == pytest.approx(max(means), rel=1e-5)


def test_score_of_an_image_does_not_depend_on_its_batch():
    model, image = draem.DRAEM(4), torch.rand(3, 3, 64, 64)
    assert torch.allclose(model.predict(image)[1][:1], model.predict(image[:1])[1], rtol=1e-5)


@pytest.mark.parametrize("width", [0, 7])
def test_odd_widths_end_with_one_line(width, capsys):
    with pytest.raises(SystemExit):
        draem.DRAEM(width)
    assert capsys.readouterr().err.startswith("error: --width")


# --------------------------------------------------------------------------------------------------------- textures
@pytest.fixture
def args(tmp_path):
    (tmp_path / "stuff/below").mkdir(parents=True)
    for name in ("a.png", "below/b.jpg"):
        Image.new("RGB", (50, 40), (250, 10, 10)).save(tmp_path / "stuff" / name)
    return draem.Args(root=str(tmp_path), image_size=64)


def test_textures_come_from_the_named_folder(args, tmp_path):
    textures, note = draem.load_textures(str(tmp_path / "stuff"), None, args)
    assert textures.batch([0, 1]).shape == (2, 3, 64, 64)
    assert note == dict(source=str(tmp_path / "stuff"), images=2)


def test_textures_can_be_the_training_images_or_noise(args):
    assert draem.load_textures("images", range(7), args) == (range(7), dict(source="images", images=7))
    assert draem.load_textures("noise", range(7), args) == (None, dict(source="noise"))


def unreachable(*_, **__):
    time.sleep(60)


def test_without_dtd_auto_takes_the_training_images_and_says_so(args, monkeypatch, capsys):
    monkeypatch.setattr(draem.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(draem, "PATIENCE", 0.1)
    assert draem.load_textures("auto", range(7), args) == (range(7), dict(source="images", images=7))
    assert "TRAINING IMAGES" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        draem.load_textures("dtd", range(7), args)
    error = capsys.readouterr().err
    assert error.startswith("error: DTD") and error.count("\n") == 1 and "--textures FOLDER" in error


def test_dtd_below_root_is_taken_and_must_be_whole(args, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "dtd/dtd/images/banded"
    folder.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "banded_0001.jpg")
    with pytest.raises(SystemExit):
        draem.load_textures("dtd", None, args)
    assert "1 of DTD's 5640 images" in capsys.readouterr().err
    monkeypatch.setattr(draem, "DTD_IMAGES", 1)
    assert draem.load_textures("auto", None, args)[1] == dict(source="dtd", images=1)


@pytest.mark.parametrize("wrong", ["missing", "empty", "broken"])
def test_unusable_texture_folders_end_with_one_line(wrong, args, tmp_path, capsys):
    folder = tmp_path / wrong
    if wrong != "missing":
        folder.mkdir()
    if wrong == "broken":
        (folder / "x.png").write_text("text")
    with pytest.raises(SystemExit):
        draem.load_textures(str(folder), None, args)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and wrong in error
