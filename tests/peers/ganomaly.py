"""GANomaly next to anomalib 2.7.0, or with --peer next to the official samet-akcay/ganomaly (commit 78da4ea), whose own
class then makes the training step and the test; only its plots are left out.

Undone, for anomalib: it pads the first convolution by 4, its adversarial loss compares outputs of the discriminator,
its loss of the codes is the smooth L1. For the official code: it tests in training mode, here image by image."""

import sys
from types import SimpleNamespace

import torch
from anomalib.models.image.ganomaly.loss import DiscriminatorLoss, GeneratorLoss
from anomalib.models.image.ganomaly.torch_model import GanomalyModel
from conftest import load_script
from torch import nn

script = load_script("methods/ganomaly.py")


def copied(peer, ours):
    """Our network with the peer's state: the same layers in the same order, under other names."""
    ours.load_state_dict(dict(zip(ours.state_dict(), peer.state_dict().values(), strict=True)))
    return ours


def gradients(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def anomalib(size, x):
    peer = GanomalyModel((size, size), 3, 64, 100)
    generator, discriminator = peer.generator, peer.discriminator
    ours = copied(generator, script.Generator(size, 100, 64)), copied(discriminator, script.Discriminator(size, 64))
    for first in (ours[0].encoder1[0], ours[0].encoder2[0], ours[1].features[0]):
        first.padding = (4, 4)
    padded, fake, z, z_fake = peer(x)
    loss = GeneratorLoss(1, 50, 1)
    loss.loss_enc = nn.MSELoss()
    features = discriminator(x)[1], discriminator(fake)[1]
    loss_g = loss(z, z_fake, padded, fake, *features)
    loss_g.backward(retain_graph=True)
    discriminator.zero_grad()
    loss_d = DiscriminatorLoss()(discriminator(x)[0], discriminator(fake.detach())[0])
    loss_d.backward()
    parts = loss.loss_adv(*features), loss.loss_con(padded, fake), loss.loss_enc(z, z_fake)
    return ours, generator, discriminator, [*parts, loss_d], lambda y: peer.eval()(y).pred_score


def official(folder, size, x):
    sys.path.insert(0, folder)
    sys.modules["lib.visualizer"] = SimpleNamespace(Visualizer=lambda opt: None)  # needs visdom
    from lib.model import Ganomaly

    opt = SimpleNamespace(isize=size, nz=100, nc=3, ngf=64, ngpu=1, extralayers=0, w_adv=1, w_con=50, w_enc=1, lr=0,
                          beta1=0.5, batchsize=len(x), device="cpu", manualseed=0, isTrain=True, resume="", outf=".",
                          name="")
    peer = Ganomaly(opt, None)
    ours = copied(peer.netg, script.Generator(size, 100, 64)), copied(peer.netd, script.Discriminator(size, 64))
    peer.input = x
    peer.optimize_params()

    def score(y):
        codes = [peer.netg(image[None])[1:] for image in y]
        return torch.cat([torch.mean(torch.pow(a - b, 2), dim=1).flatten() for a, b in codes])

    for module in ours[0].modules():
        module.instance_stats = True
    return ours, peer.netg, peer.netd, [peer.err_g_adv, peer.err_g_con, peer.err_g_enc, peer.err_d], score


def compare(args, train, test):
    size, x = args.image_size, 2 * train.batch(range(len(train))) - 1
    made = official(args.peer, size, x) if args.peer else anomalib(size, x)
    (generator, discriminator), peer_g, peer_d, peer_losses, score = made
    adv, con, enc, recon = script.generator_losses(generator, discriminator, x)
    (adv + 50 * con + enc).backward()
    discriminator.zero_grad()
    loss_d = script.discriminator_loss(discriminator, x, recon)
    loss_d.backward()
    yield from zip(("L_adv", "L_con", "L_enc", "L_D"), (adv, con, enc, loss_d), peer_losses, strict=True)
    for part in ("encoder1", "decoder", "encoder2"):
        yield f"gradients, {part}", gradients(getattr(generator, part)), gradients(getattr(peer_g, part))
    yield "gradients, discriminator", gradients(discriminator), gradients(peer_d)
    image = test.batch(range(len(test)))
    with torch.no_grad():
        yield "image score", generator.predict(image)[1], score(2 * image - 1)
