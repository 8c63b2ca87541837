"""f-AnoGAN next to A03ki/f-AnoGAN (commit 900f9d6), given as --peer: its three programs run as they are, on one batch
each, with an Adam that keeps the gradients and changes nothing. In double precision: in single, values that rounding
puts on the other side of a LeakyReLU's kink change gradients by 1e-3. The critic's last layer is enlarged, since its
losses are read from what the programs print, with six decimals.

Undone: its gradient penalty draws one weight an image and channel; its generator sees the batch a second time."""

import contextlib
import csv
import io
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from conftest import load_script

import common

script = load_script("methods/fanogan.py")


class Recorder:
    """In place of Adam: holds the gradients of the last step."""

    def __init__(self, parameters, **_):
        self.parameters = list(parameters)
        self.parameters[0].recorder = self

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    def step(self):
        self.gradients = flat(p.grad for p in self.parameters)


def flat(tensors):
    return torch.cat([t.detach().flatten().clone() for t in tensors])


def gradients(network):
    return next(network.parameters()).recorder.gradients


def load(ours, *peers):
    """Put the peers' states into ours: the same layers in the same order, under other names."""
    values = [v for peer in peers for v in peer.state_dict().values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))


def run_peer(program, *arguments):
    """The losses that one of its programs prints; random numbers as ours will get them."""
    rand, printed = torch.rand, io.StringIO()
    one_weight_an_image = mock.patch("torch.rand", lambda b, c, *_, device: rand(b, 1, 1, 1))
    torch.manual_seed(1)
    with contextlib.redirect_stdout(printed), mock.patch("torch.optim.Adam", Recorder), one_weight_an_image:
        program(*arguments)
    return [float(v) for v in re.findall(r"loss: (\S+)\]", printed.getvalue())]


def compare(args, train, test):
    if not args.peer:
        raise common.Error("fanogan is compared with A03ki/f-AnoGAN: give its folder with --peer")
    sys.path[:0] = [args.peer, f"{args.peer}/mvtec_ad"]
    del sys.modules["fanogan"]  # ours; theirs has the same name
    from fanogan.test_anomaly_detection import test_anomaly_detection
    from fanogan.train_encoder_izif import train_encoder_izif
    from fanogan.train_wgangp import train_wgangp
    from model import Discriminator, Encoder, Generator

    torch.set_default_dtype(torch.float64)
    cpu, x = torch.device("cpu"), 2 * train.batch(range(len(train))).double() - 1
    image = test.batch(range(len(test))).double()
    opt = SimpleNamespace(img_size=args.image_size, latent_dim=100, channels=3, n_epochs=1, n_critic=5, lr=2e-4, b1=0.5,
                          b2=0.999, sample_interval=400)
    peer = Generator(opt), Discriminator(opt), Encoder(opt)
    peer[1].adv_layer[0].weight.data *= 100
    ours = script.FAnoGAN(args.image_size, 100, 1.0, "batch")
    load(ours, *peer)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        loss_d, loss_g = run_peer(train_wgangp, opt, *peer[:2], [(x, None)], cpu)
        torch.manual_seed(1)
        z = torch.randn(len(x), 100)
        fake = ours.generator(z)
        our_d = script.critic_loss(ours.critic, x, fake.detach())
        our_g = -ours.critic(fake).mean()
        yield "loss of the critic", our_d, loss_d
        yield "gradients, critic", flat(torch.autograd.grad(our_d, list(ours.critic.parameters()))), gradients(peer[1])
        yield "loss of the generator", our_g, loss_g
        found = flat(torch.autograd.grad(our_g, list(ours.generator.parameters())))
        yield "gradients, generator", found, gradients(peer[0])
        ours.generator(z)
        for name, network, other in (("generator", ours.generator, peer[0]), ("critic", ours.critic, peer[1])):
            yield f"running statistics, {name}", flat(network.buffers()), flat(other.buffers())

        loss_e, = run_peer(train_encoder_izif, opt, *peer, [(x, None)], cpu)
        ours.eval()
        ours.encoder.train()
        torch.manual_seed(1)
        loss = ours.residual(x).mean()
        yield "loss of the encoder", loss, loss_e
        found = flat(torch.autograd.grad(loss, list(ours.encoder.parameters())))
        yield "gradients, encoder", found, gradients(peer[2])

        load(ours, *peer)
        test_anomaly_detection(opt, *peer, [(2 * i[None] - 1, torch.tensor(0)) for i in image], cpu)
        with open(Path("results/score.csv")) as f:
            yield "image score", ours.predict(image)[1], [float(row["anomaly_score"]) for row in csv.DictReader(f)]
