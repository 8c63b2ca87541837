"""The mathematics of f-AnoGAN: networks as published, the gradient penalty, the frozen GAN, the score."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn

import common

script = load_script("methods/fanogan.py")


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return script.FAnoGAN(32, 10, 1.0, "batch")


@pytest.fixture
def image():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size, expected", [(256, (53176835, 130657, 3374788)), (64, (3533315, 99937, 302788))])
def test_the_networks_have_the_official_number_of_parameters(size, expected):
    with torch.device("meta"):
        model = script.FAnoGAN(size, 100, 1.0, "batch")
    assert (count(model.generator), count(model.critic), count(model.encoder)) == expected


def test_shapes_and_ranges(model, image):
    z = model.encoder(2 * image - 1)
    assert z.shape == (5, 10) and z.abs().max() < 1
    recon = model.generator(z)
    assert recon.shape == image.shape and recon.abs().max() < 1
    assert model.critic.features(recon).shape == (5, 128 * 2 * 2) and model.critic(recon).shape == (5, 1)


@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_the_penalty_of_a_linear_critic_is_its_slope_minus_one_squared(slope, image):
    direction = torch.randn(3, 32, 32)
    direction *= slope / direction.norm()
    penalty = script.gradient_penalty(lambda x: (x * direction).flatten(1).sum(1), image, image.flip(0))
    assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-5)


def test_the_penalty_looks_between_the_two_images_with_one_weight_an_image(image):
    zero, seen = torch.zeros_like(image), []
    script.gradient_penalty(lambda x: seen.append(x.detach()) or x.sum(), zero, zero + 1)
    x, = seen
    assert (x == x[:, :1, :1, :1]).all() and len(x[:, 0, 0, 0].unique()) == 5 and x.min() > 0 and x.max() < 1


def test_the_penalty_has_the_gradient_of_finite_differences(model, image):
    critic, image = model.critic.double().eval(), image.double()
    weight = critic.features[0].weight

    def penalty():
        torch.manual_seed(0)
        return script.gradient_penalty(critic, image, image.flip(0))

    penalty().backward()
    with torch.no_grad():
        where = weight.grad.abs().argmax()
        step = torch.zeros(weight.numel(), dtype=torch.double)
        step[where] = 1e-5
        weight += step.view_as(weight)
    higher = penalty().item()
    with torch.no_grad():
        weight -= 2 * step.view_as(weight)
    assert weight.grad.flatten()[where].item() == pytest.approx((higher - penalty().item()) / 2e-5, rel=1e-2)


def test_the_critics_loss_adds_up(image):
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1))
    loss = script.critic_loss(critic, image, image.flip(3))
    slope = critic[1].weight.norm().item()
    expected = critic(image.flip(3)).mean() - critic(image).mean() + 10 * (slope - 1) ** 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_score_is_the_residual_of_image_and_features_and_ignores_the_other_images(image):
    torch.manual_seed(0)
    model = script.FAnoGAN(32, 10, 0.5, "batch")
    anomaly_map, score = model.predict(image)
    assert anomaly_map is None and score.shape == (5,) and not model.training
    with torch.no_grad():
        x = 2 * image[1:2] - 1
        recon = model.generator(model.encoder(x))
        expected = F.mse_loss(recon, x) + 0.5 * F.mse_loss(model.critic.features(recon), model.critic.features(x))
    assert score[1].item() == pytest.approx(expected.item(), rel=1e-4)
    assert model.predict(image[1:2])[1].item() == pytest.approx(score[1].item(), rel=1e-4)


def test_the_encoders_step_leaves_the_gan_as_it_is(model, image):
    frozen = nn.ModuleList([model.generator, model.critic])
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    model.eval()
    model.encoder.train()
    frozen.requires_grad_(False)
    optimizer = torch.optim.Adam(model.encoder.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        loss = model.residual(2 * image - 1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert all(p.grad is None for p in frozen.parameters())


def test_with_layer_norm_the_critic_judges_each_image_alone_and_without_chance(image):
    torch.manual_seed(0)
    critic = script.Critic(32, "layer")  # in training mode
    assert torch.allclose(critic(image)[2:3], critic(image[2:3]), atol=1e-5)
    assert not any(isinstance(m, nn.Dropout2d | nn.BatchNorm2d) for m in critic.modules())
    batch = [m.eps for m in script.Critic(32, "batch").modules() if isinstance(m, nn.BatchNorm2d)]
    assert batch == [0.8] * 3


def test_augmentation_flips_about_half_of_the_images():
    torch.manual_seed(0)
    image = torch.arange(4.0).expand(400, 3, 2, 4)
    augmented = script.augment(image)
    flipped = augmented[:, 0, 0, 0] == 3
    assert 150 < flipped.sum() < 250
    assert torch.equal(augmented[flipped], image[flipped].flip(3))
    assert torch.equal(augmented[~flipped], image[~flipped])


@pytest.mark.parametrize("size", [16, 40, 100])
def test_sizes_that_cannot_be_halved_four_times_are_refused(size):
    with pytest.raises(common.Error, match=f"--image-size {size}"):
        script.FAnoGAN(size, 10, 1.0, "batch")
