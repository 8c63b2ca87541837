"""DRAEM: Perlin noise and losses against slow references, augmentations against Pillow, textures, the networks."""

import colorsys
import math

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import RandomRotation

import common

draem = load_script("methods/draem.py")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def slow_perlin(rows, columns, size, angle):
    """One pixel at a time; angle[a, b] that of the gradient at corner (a, b)."""
    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    noise = np.zeros((size, size))
    for r in range(size):
        for c in range(size):
            v, u = r * rows / size, c * columns / size
            a, b = int(v), int(u)
            n = {(i, j): math.cos(angle[a + i, b + j]) * (v - a - i) + math.sin(angle[a + i, b + j]) * (u - b - j)
                 for i in (0, 1) for j in (0, 1)}
            wv, wu = fade(v - a), fade(u - b)
            noise[r, c] = math.sqrt(2) * ((1 - wu) * ((1 - wv) * n[0, 0] + wv * n[1, 0])
                                          + wu * ((1 - wv) * n[0, 1] + wv * n[1, 1]))
    return noise


@pytest.mark.parametrize("rows, columns", [(1, 1), (8, 2), (4, 16), (2, 8), (32, 1)])
def test_perlin_noise_equals_a_loop_over_pixels(rows, columns, monkeypatch):
    drawn = torch.rand(rows + 1, columns + 1)
    monkeypatch.setattr(draem.torch, "rand", lambda *shape: drawn if shape == drawn.shape else None)
    noise = draem.perlin(rows, columns, 48, "cpu")
    expected = slow_perlin(rows, columns, 48, 2 * math.pi * drawn.double().numpy())
    assert noise.shape == (48, 48) and np.abs(noise.numpy() - expected).max() < 2e-5


# ---------------------------------------------------------------------------------------------------- augmentations
def picture():
    """Smooth colours with 8 bits, (3, 32, 32)."""
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6), (32, 32), mode="bilinear")[0]
    return (x * 255).round() / 255


def pillow(x):
    return Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def draws(monkeypatch, *values):
    """Make the draws of one augmentation known."""
    left = list(values)
    monkeypatch.setattr(draem, "uniform", lambda low, high: left.pop(0))


GAMMA, BRIGHTNESS, SHARPNESS, COLOUR, SOLARIZE, POSTERIZE, INVERT, AUTOCONTRAST, EQUALIZE, TURN = range(10)


@pytest.mark.parametrize("k, values, expected", [
    (SHARPNESS, [0.3], lambda image: ImageEnhance.Sharpness(image).enhance(0.3)),
    (SHARPNESS, [1.8], lambda image: ImageEnhance.Sharpness(image).enhance(1.8)),
    (SOLARIZE, [0.1, 100.0], lambda image: ImageOps.solarize(image, 100)),
    (SOLARIZE, [0.9], lambda image: image),
    (BRIGHTNESS, [0.8, 0.0], lambda image: ImageEnhance.Brightness(image).enhance(0.8)),
    (AUTOCONTRAST, [0.0], ImageOps.autocontrast),
    (AUTOCONTRAST, [0.2], lambda image: ImageOps.autocontrast(image, cutoff=20)),
    (EQUALIZE, [], ImageOps.equalize),
    (INVERT, [], ImageOps.invert),
])
def test_augmentations_equal_pillows(k, values, expected, monkeypatch):
    x = picture()
    draws(monkeypatch, *values)
    assert float((draem.augment(x, k) - tensor(expected(pillow(x)))).abs().max()) < 1.6 / 255


def test_gamma_is_drawn_for_each_channel(monkeypatch):
    x = picture()
    draws(monkeypatch, 0.5, 1.0, 2.0)
    assert torch.allclose(draem.augment(x, GAMMA), torch.stack([x[0] ** 0.5, x[1], x[2] ** 2]))


def test_brightness_has_a_factor_and_an_offset(monkeypatch):
    x = 0.3 + 0.4 * torch.rand(3, 8, 8)
    draws(monkeypatch, 1.1, -20.0)
    assert torch.allclose(draem.augment(x, BRIGHTNESS), x * 1.1 - 20 / 255, atol=1e-6)


def test_posterize_leaves_one_to_eight_bits():
    x = torch.linspace(0, 1, 256).view(1, 16, 16).expand(3, -1, -1)
    levels = {len(draem.augment(x, POSTERIZE).unique()) for _ in range(200)}
    assert levels == {2**bits for bits in range(1, 9)}


def test_hue_turns_by_up_to_50_of_255():
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    turned = [colorsys.rgb_to_hsv(*draem.augment(red, COLOUR).flatten().tolist())[0] for _ in range(300)]
    turned = [(h + 0.5) % 1 - 0.5 for h in turned]
    assert -50 / 255 <= min(turned) < -0.18 and 0.18 < max(turned) <= 50 / 255 + 1e-6


@pytest.mark.parametrize("turn, degrees", [(draem.rotate, 90), (lambda x: draem.augment(x, TURN), 45)])
def test_rotation_equals_pillows_and_leaves_black_corners(turn, degrees, monkeypatch):
    x = picture().clamp(min=0.1)
    asked = []
    monkeypatch.setattr(RandomRotation, "make_params",
                        lambda self, flat: asked.append(self.degrees) or dict(angle=30.0))
    turned, expected = turn(x), tensor(pillow(x).rotate(30, Image.Resampling.BILINEAR))
    assert float((turned - expected)[:, 6:26, 6:26].abs().max()) < 1.6 / 255  # the border is drawn in another way
    assert not turned[:, 0, 0].any() and [list(d) for d in asked] == [[-degrees, degrees]]


@pytest.mark.parametrize("k", range(10))
def test_augmented_textures_stay_in_range_and_leave_their_input_alone(k):
    x = picture()
    kept = x.clone()
    for _ in range(5):
        augmented = draem.augment(x, k)
        assert augmented.shape == x.shape and float(augmented.min()) >= 0 and float(augmented.max()) <= 1
    assert torch.equal(x, kept)


# ---------------------------------------------------------------------------------------------- simulated anomalies
class White:
    """Textures of one colour."""

    def __len__(self):
        return 3

    def batch(self, indices, device):
        return torch.ones(len(indices), 3, 64, 64, device=device)


@pytest.fixture
def plain(monkeypatch):
    """Textures stay as they are."""
    monkeypatch.setattr(draem, "augment", lambda texture, k: texture)


def simulate(images, textures=None):
    return (torch.stack(part) for part in zip(*(draem.simulate(x, textures) for x in images), strict=True))


def test_anomalies_are_inside_their_masks_and_the_target_is_clean(plain):
    image = 0.2 + 0.1 * torch.rand(300, 3, 64, 64)
    kept = image.clone()
    target, corrupted, mask = simulate(image, White())
    assert torch.equal(image, kept)  # its argument is left alone
    inside = mask.expand_as(target)
    assert torch.equal(corrupted[~inside], target[~inside])
    opacity = ((corrupted - target) / (1 - target))[inside]  # beta
    assert 0.2 - 1e-4 <= float(opacity.min()) < 0.25 and 0.9 < float(opacity.max()) <= 1 + 1e-4
    assert 0.35 < float(mask.any(3).any(2).float().mean()) < 0.6  # half of the images, less the empty masks
    turned = torch.tensor([not torch.equal(a, b) for a, b in zip(target, image, strict=True)])
    assert 0.2 < float(turned.float().mean()) < 0.4
    assert float(target[turned][:, :, 0, 0].min()) == 0  # black corners, in the target too


def test_noise_textures_are_the_masks_own_noise(plain):
    _, corrupted, mask = simulate(torch.zeros(60, 3, 64, 64))
    inside = mask.expand_as(corrupted)
    assert float(corrupted[~inside].abs().max()) == 0
    assert float(corrupted[inside].min()) >= 0.1 - 1e-6 and float(corrupted.max()) <= 1  # above 0.5, a share of 0.2 up


def test_masks_cover_what_the_official_pipeline_covers(plain, monkeypatch):
    monkeypatch.setattr(draem, "uniform", lambda low, high: 0.9)  # all images get an anomaly
    _, _, mask = simulate(torch.zeros(600, 3, 128, 128))
    share = mask.float().mean((1, 2, 3))
    assert 0.041 < float(share.mean()) < 0.053  # official code at 256 pixels, 2,000 draws: 4.8%
    assert 0.03 < float((share == 0).float().mean()) < 0.08  # 5.4% are empty


def test_draws_follow_from_pytorchs_random_state_alone():
    images, state = torch.rand(20, 3, 64, 64), torch.get_rng_state()
    first = [*simulate(images, White())]
    np.random.seed(5)
    torch.set_rng_state(state)
    assert all(map(torch.equal, first, simulate(images, White())))
    assert not torch.equal(first[1], [*simulate(images, White())][1])


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


# --------------------------------------------------------------------------------------------------------- textures
@pytest.fixture
def args(tmp_path):
    (tmp_path / "stuff/below").mkdir(parents=True)
    for name in ("a.png", "below/b.jpg"):
        Image.new("RGB", (50, 40), (250, 10, 10)).save(tmp_path / "stuff" / name)
    return draem.Args(root=str(tmp_path), image_size=64)


def load(args, source, train=None):
    args.textures = str(source)
    return draem.load_textures(args, train)


def test_textures_come_from_the_named_folder(args, tmp_path):
    textures = load(args, tmp_path / "stuff")
    assert textures.batch([0, 1]).shape == (2, 3, 64, 64) and len(textures) == 2


def test_textures_can_be_the_training_images_or_noise(args):
    assert load(args, "images", range(7)) == range(7) and load(args, "noise", range(7)) is None


def test_without_dtd_the_error_names_the_other_ways(args, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no answer")

    unreachable._URL = "https://somewhere/dtd.tar.gz"
    monkeypatch.setattr("torchvision.datasets.DTD", unreachable)
    with pytest.raises(common.Error, match="DTD.*no answer.*--textures FOLDER") as error:
        load(args, "dtd")
    assert "\n" not in str(error.value)


def test_dtd_below_root_is_taken_and_must_be_whole(args, tmp_path, monkeypatch):
    folder = tmp_path / "dtd/dtd/images/banded"
    folder.mkdir(parents=True)
    (tmp_path / "dtd/dtd/labels").mkdir()
    (tmp_path / "dtd/dtd/labels/train1.txt").write_text("banded/banded_0001.jpg\n")
    Image.new("RGB", (9, 9)).save(folder / "banded_0001.jpg")
    with pytest.raises(common.Error, match="has 1 images .DTD has 5640."):
        load(args, "dtd")
    monkeypatch.setattr(draem.common, "images_in", lambda *_: [folder / "banded_0001.jpg"] * 5640)
    monkeypatch.setattr(draem.common, "Split", lambda name, entries, *_: entries)
    assert len(load(args, "dtd")) == 5640


@pytest.mark.parametrize("wrong", ["missing", "empty", "broken"])
def test_unusable_texture_folders_end_with_one_line(wrong, args, tmp_path):
    folder = tmp_path / wrong
    if wrong != "missing":
        folder.mkdir()
    if wrong == "broken":
        (folder / "x.png").write_text("text")
    with pytest.raises(common.Error, match=wrong) as error:
        load(args, folder)
    assert "\n" not in str(error.value)
