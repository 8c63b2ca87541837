"""The mathematics of GANomaly: networks as published, losses by hand, gradients that stay with their network."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn

import common

script = load_script("methods/ganomaly.py")


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return script.Generator(32, 20, 8), script.Discriminator(32, 8), 2 * torch.rand(6, 3, 32, 32) - 1


def test_the_networks_have_the_official_number_of_parameters():
    for size, enc, gen, dis in ((256, 47983360, 143950208, 44739328), (64, 3576576, 10729856, 2765568)):
        with torch.device("meta"):
            generator, discriminator = script.Generator(size, 100, 64), script.Discriminator(size, 64)
        assert (count(generator.encoder1), count(generator), count(discriminator)) == (enc, gen, dis)
        assert not any(m.bias is not None for m in generator.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))


@torch.no_grad()
def test_initial_weights_are_dcgans():
    torch.manual_seed(0)
    network = script.Generator(64, 100, 16)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert float(module.weight.std()) == pytest.approx(0.02, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert float((module.weight - 1).abs().max()) < 0.1 and not module.bias.any()
            assert float(module.weight.std()) > 0.01


def test_shapes_and_ranges(networks):
    generator, discriminator, x = networks
    recon, z_recon, z = generator(x)
    assert recon.shape == x.shape and z.shape == z_recon.shape == (6, 20, 1, 1)
    assert recon.abs().max() <= 1
    features, logits = discriminator(x)
    assert features.shape == (6, 32, 4, 4) and logits.shape == (6,)


def test_losses_equal_the_official_formulas(networks):
    generator, discriminator, x = networks
    adv, con, enc, fake = script.generator_losses(generator, discriminator, x)
    loss_d = script.discriminator_loss(discriminator, x, fake)
    z = generator.encoder1(x)
    recon = generator.decoder(z)
    (f_real, real), (f_fake, fake) = discriminator(x), discriminator(recon)
    assert adv.item() == pytest.approx((f_real - f_fake).square().mean().item(), rel=1e-5)
    assert con.item() == pytest.approx((x - recon).abs().mean().item(), rel=1e-5)
    assert enc.item() == pytest.approx((z - generator.encoder2(recon)).square().mean().item(), rel=1e-5)
    bce = F.binary_cross_entropy(real.sigmoid(), torch.ones(6)) + F.binary_cross_entropy(fake.sigmoid(), torch.zeros(6))
    assert loss_d.item() == pytest.approx(bce.item() / 2, rel=1e-5)


def test_each_network_gets_the_gradient_of_its_own_loss_only(networks):
    generator, discriminator, x = networks
    adv, con, enc, recon = script.generator_losses(generator, discriminator, x)
    (adv + 50 * con + enc).backward()
    discriminator.zero_grad()
    script.discriminator_loss(discriminator, x, recon).backward()
    ours = [p.grad.clone() for p in (*generator.parameters(), *discriminator.parameters())]
    recon, z_recon, z = generator(x)
    adv = F.mse_loss(discriminator(recon)[0], discriminator(x)[0].detach())
    expected = torch.autograd.grad(adv + 50 * F.l1_loss(recon, x) + F.mse_loss(z_recon, z),
                                   list(generator.parameters()))
    loss_d = (F.softplus(-discriminator(x)[1]).mean() + F.softplus(discriminator(recon.detach())[1]).mean()) / 2
    expected += torch.autograd.grad(loss_d, list(discriminator.parameters()))
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_score_is_the_distance_of_the_codes_and_ignores_the_other_images(networks):
    generator, _, x = networks
    image = (x + 1) / 2
    generator(x)
    anomaly_map, score = generator.predict(image)
    assert anomaly_map is None and score.shape == (6,) and not generator.training
    with torch.no_grad():
        _, z_recon, z = generator(x)
    assert torch.allclose(score, (z - z_recon).flatten(1).square().mean(1), rtol=1e-5)
    assert torch.allclose(generator.predict(image[2:3])[1], score[2:3], rtol=1e-4)


def test_instance_stats_equal_training_mode_on_one_image_and_change_nothing():
    torch.manual_seed(0)
    generator = script.Generator(32, 20, 8, instance_stats=True)
    image = torch.rand(3, 3, 32, 32)
    before = [b.clone() for b in generator.buffers()]
    score = generator.predict(image)[1]
    assert all(torch.equal(a, b) for a, b in zip(before, generator.buffers(), strict=True))
    generator.train()
    with torch.no_grad():
        for i in range(3):
            _, z_recon, z = generator(2 * image[i : i + 1] - 1)
            assert float((z - z_recon).square().mean()) == pytest.approx(float(score[i]), rel=1e-4)


@pytest.mark.parametrize("size", [8, 48, 100])
def test_sizes_that_do_not_halve_down_to_4_are_refused(size):
    with pytest.raises(common.Error, match=f"--image-size {size}"):
        script.Generator(size, 20, 8)
