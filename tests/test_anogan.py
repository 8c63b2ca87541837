"""The mathematics of AnoGAN: sizes, losses, and a search that improves, ends alike and looks at one image only."""

import pytest
import torch
from conftest import load_script
from torch import nn

import common

anogan = load_script("methods/anogan.py")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = anogan.AnoGAN(16, 8, 4, 30, 1e-2)
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))  # with DCGAN's starting values all codes give grey images
    model.train()
    for _ in range(20):  # running statistics
        model.discriminator(model.generator(2 * torch.rand(32, 8) - 1))
    return model.eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_networks_have_the_published_sizes():
    model = anogan.AnoGAN(64)
    kernels = 25 * (512 * 256 + 256 * 128 + 128 * 64 + 64 * 3)
    norms = 2 * (256 + 128 + 64)  # what G and D share
    linear = 100 * 8192 + 8192
    assert count(model.generator) == linear + 2 * 512 + kernels + norms + 256 + 128 + 64 + 3 == 5_135_363
    assert count(model.discriminator) == kernels + 2 * (512 + 256 + 128) + 64 + 128 + 256 + 512 + 8193 == 4_316_545
    assert model.generator(torch.zeros(2, 100)).shape == (2, 3, 64, 64)
    assert model.discriminator.features(torch.zeros(2, 3, 64, 64)).shape == (2, 512, 4, 4)
    assert model.discriminator(torch.zeros(2, 3, 64, 64)).shape == (2,)


@pytest.mark.parametrize("size, expected", [(16, [64, 128]), (32, [64, 128, 256]), (128, [64, 128, 256, 512, 1024])])
def test_each_doubling_of_the_image_adds_a_stage(size, expected):
    assert anogan.channels(size, 64) == expected
    model = anogan.AnoGAN(size, 5, 2)
    assert model.generator(torch.zeros(1, 5)).shape == (1, 3, size, size)
    assert model.discriminator.features(torch.zeros(1, 3, size, size)).shape[2:] == (4, 4)


def test_the_first_convolution_has_no_normalisation_and_weights_start_at_0_02():
    model = anogan.AnoGAN(64)
    kinds = [type(m) for m in model.discriminator.features]
    assert kinds[:3] == [nn.Conv2d, nn.Identity, nn.LeakyReLU] and kinds.count(nn.BatchNorm2d) == 3
    for m in model.modules():
        if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.05) and m.bias.abs().max() == 0


def test_losses_by_hand():
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])
    bce = nn.BCEWithLogitsLoss()
    assert anogan.discriminator_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(2 * 0.693147)
    expected = bce(real, torch.ones(2)) + bce(fake, torch.zeros(2))
    assert anogan.discriminator_loss(real, fake).item() == pytest.approx(expected.item())
    assert anogan.generator_loss(fake).item() == pytest.approx(bce(fake, torch.ones(2)).item())  # non-saturating


def test_the_residual_sums_over_values_and_weighs_image_and_features(model):
    class Constant(nn.Module):
        def forward(self, z):
            return torch.full((len(z), 3, 16, 16), 0.25)

    model.generator = Constant()
    x = torch.full((2, 3, 16, 16), -0.75)
    features = model.discriminator.features(torch.full((2, 3, 16, 16), 0.25)) + 2
    found = model.residual(torch.zeros(2, 8), x, features)
    assert found.tolist() == pytest.approx([0.9 * 3 * 16 * 16 * 1 + 0.1 * 8 * 4 * 4 * 2] * 2, rel=1e-5)


def test_the_search_lowers_the_residual_of_each_image_and_changes_no_weight(model):
    x = torch.rand(6, 3, 16, 16) * 2 - 1
    before = {k: v.clone() for k, v in model.state_dict().items()}
    z, after = model.search(x)
    start = model.residual(model.start.expand(6, -1), x, model.discriminator.features(x))
    assert (after < start).all() and z.shape == (6, 8) and not z.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_search_finds_the_code_of_a_generated_image(model):
    model.steps, model.search_lr = 100, 5e-2
    code = (model.start + 0.3 * torch.randn(4, 8)).clamp(-1, 1)
    x = model.generator(code).detach()
    start = model.residual(model.start.expand(4, -1), x, model.discriminator.features(x))
    _, after = model.search(x)
    assert (after < 0.3 * start).all()
    _, other = model.search(torch.rand(4, 3, 16, 16) * 2 - 1)
    assert other.min() > after.max()  # what the generator cannot make


def test_a_score_does_not_depend_on_the_other_images(model):
    image = torch.rand(5, 3, 16, 16)
    with torch.no_grad():  # as common.evaluate calls it
        anomaly_map, together = model.predict(image)
        alone = torch.cat([model.predict(x[None])[1] for x in image.flip(0)]).flip(0)
        again = model.predict(image)[1]
    assert anomaly_map is None and torch.equal(together, again) and together.unique().numel() == 5
    assert torch.allclose(alone, together, rtol=1e-5)


def test_one_step_is_adam_on_the_gradient_of_the_images_own_residual(model):
    model.steps = 1
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    found, _ = model.search(x)
    for i in range(3):
        z = model.start.clone()[None].requires_grad_()
        model.residual(z, x[i : i + 1], model.discriminator.features(x[i : i + 1])).sum().backward()
        assert torch.allclose(found[i], model.start - 1e-2 * z.grad[0].sign(), atol=1e-6)  # Adam's first step


def test_the_start_belongs_to_the_model_and_to_its_seed(model):
    assert "start" in model.state_dict() and model.start.abs().max() <= 1
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        starts.append(anogan.AnoGAN(16, 8, 4).start)
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("size", [48, 8])
def test_sizes_that_are_no_power_of_two_end_with_one_line(size):
    with pytest.raises(common.Error, match=f"--image-size {size}"):
        anogan.AnoGAN(size)
