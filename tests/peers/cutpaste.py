"""CutPaste next to Runinho/pytorch-cutpaste (--peer), the unofficial code that the thesis' copied. Its network is a
ResNet-18 by construction, so both sides have the same seeded untrained state: --weights goes unused. Its augmentations
run on Pillow images, and what they drew is given to ours; undone for that: the jitter, whose draws and 8-bit levels
differ. Then one step frozen, one thawed, and the density on unaugmented images."""

import importlib.util
import math
import random
from unittest import mock

import torch
import torch.nn.functional as F
from conftest import load_script
from torchvision.transforms.functional import to_pil_image, to_tensor

import common

script = load_script("methods/cutpaste.py")


def load(folder, name):
    """A file of the peer, whose names are those of our own modules."""
    spec = importlib.util.spec_from_file_location(f"peer_{name}", f"{folder}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy(source, target):
    """Parameters and buffers have the same order on both sides, whatever their names."""
    pairs = zip(target, source.state_dict().values(), strict=True)
    return {name: value.clone() for name, value in pairs}


def recorded(augment, image):
    """The peer's augmented image and its draws: those of random.uniform, and the aspect ratio that PyTorch drew."""
    draws, uniform = [], random.uniform

    def keep(low, high):
        draws.append(uniform(low, high))
        return draws[-1]

    state = torch.get_rng_state()
    with mock.patch("random.uniform", keep):
        _, augmented = augment(image)
    torch.set_rng_state(state)
    log_aspect = torch.empty(1).uniform_(math.log(0.3), math.log(1 / 0.3)).item()
    return to_tensor(augmented), draws, log_aspect


def given(draws):
    """Our `uniform`, with the peer's draws, which come in the same order."""
    draws = iter(draws)
    return mock.patch.object(script, "uniform", lambda low, high: next(draws))


def gradients(network, parameters):
    return torch.cat([p.grad.flatten() for p in parameters(network)])


def compare(args, train, test):
    if args.peer is None:
        raise common.Error("cutpaste is compared with Runinho/pytorch-cutpaste: give its checkout with --peer")
    augmentation, density, network = (load(args.peer, name) for name in ("cutpaste", "density", "model"))
    image, query = (split.batch(range(len(split))) for split in (train, test))

    random.seed(0)
    for what, ours, theirs in [("CutPaste", script.cutpaste, augmentation.CutPasteNormal(colorJitter=None)),
                               ("scar", script.scar, augmentation.CutPasteScar(colorJitter=None))]:
        same, side = [], image.shape[-1]
        for x in image:
            peer, draws, log_aspect = recorded(theirs, to_pil_image(x))
            if what == "CutPaste":
                draws.insert(1, log_aspect)
            else:
                x = F.pad(x, (0, 32, 0, 32))  # the peer's scars may leave the image
            with mock.patch.object(script, "jitter", lambda patch: patch), given(draws):
                same.append((ours(x)[:, :side, :side] - peer).abs().amax(dim=0) < 1e-6)
        yield f"{what}: share of equal pixels", torch.stack(same).float().mean(), 1.0

    ours, peer = script.CutPaste("resnet18", "none").train(), network.ProjectionNet(False, [512, 512, 128], 3).train()
    mine = [name for name in ours.state_dict() if name.startswith(("backbone.", "head."))]
    ours.load_state_dict(copy(peer, mine), strict=False)
    peer_out = peer.out.parameters
    batch, label = script.three_way(image)
    settings = dict(lr=0.03, momentum=0.9, weight_decay=3e-5)
    a, b = (torch.optim.SGD(net.parameters(), **settings) for net in (ours, peer))
    ours.backbone.requires_grad_(False)
    peer.freeze_resnet()
    for stage in ("frozen", "thawed"):
        if stage == "thawed":
            ours.backbone.requires_grad_(True)
            peer.unfreeze()
        loss = F.cross_entropy(ours(batch), label)
        peer_loss = torch.nn.CrossEntropyLoss()(peer(common.normalize(batch))[1], label)
        yield f"{stage}: loss", loss, peer_loss
        for optimizer, value in ((a, loss), (b, peer_loss)):
            optimizer.zero_grad()
            value.backward()
        yield f"{stage}: gradient of the head", gradients(ours, lambda n: n.head.parameters()), gradients(
            peer, lambda n: [*n.head.parameters(), *peer_out()])
        if stage == "thawed":
            yield "thawed: gradient of the backbone", gradients(ours, lambda n: n.backbone.parameters()), gradients(
                peer, lambda n: n.resnet18.parameters())
        a.step()
        b.step()
    yield "state after both steps", *(torch.cat([v.flatten().double() for v in values]) for values in (
        [v for k, v in ours.state_dict().items() if k in mine], peer.state_dict().values()))

    ours.fit([image])
    peer.eval()
    with torch.no_grad():
        fitted, asked = (F.normalize(peer(common.normalize(x))[0], p=2, dim=1) for x in (image, query))
    gaussian = density.GaussianDensityTorch()
    gaussian.fit(fitted)
    yield "precision matrix", ours.whiten.double().T @ ours.whiten.double(), gaussian.inv_cov
    yield "image score", ours.predict(query)[1], gaussian.predict(asked)
