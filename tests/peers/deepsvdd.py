"""DeepSVDD next to lukasruff/Deep-SVDD-PyTorch (--peer): its networks, trainers and contrast normalisation run as they
are, on the images that our `prepare` makes. The peer's seeded weights go into ours, by order. An epoch of a trainer
over one batch is one step; then both sides score other images. Undone: nothing. Not met here: a coordinate of c that is
exactly zero, and milestones."""

import sys

import torch
import torch.nn.functional as F
from conftest import load_script

import common

script = load_script("methods/deepsvdd.py")
LAYERS = {"conv1": "0.0", "conv2": "2.0", "conv3": "4.0", "fc1": "7"}
DECODER = {"deconv1": "3.0", "deconv2": "5.0", "deconv3": "7.0", "deconv4": "9"}


class Loaders:
    """A dataset of the peer: the training images as one batch, the test images as one."""

    def __init__(self, train, test):
        self.batches = [(images, torch.arange(len(images)) % 2, torch.arange(len(images))) for images in (train, test)]

    def loaders(self, batch_size, num_workers):
        return [[batch] for batch in self.batches]


def copy(source, target):
    """Parameters and buffers have the same order on both sides, whatever their names."""
    pairs = zip(target.state_dict(), source.state_dict().values(), strict=True)
    target.load_state_dict({name: value.clone() for name, value in pairs})


def step(loss, optimizer):
    loss.backward()
    optimizer.step()
    return loss


def side_by_side(what, ours, peer, names):
    for theirs, mine in names.items():
        a, b = ours.get_parameter(f"{mine}.weight"), peer.get_parameter(f"{theirs}.weight")
        yield f"{what}: gradient of {theirs}", a.grad, b.grad
        yield f"{what}: {theirs} after Adam", a, b
    statistics = ([b.flatten() for name, b in net.named_buffers() if "running" in name] for net in (ours, peer))
    yield f"{what}: batch norm statistics", *map(torch.cat, statistics)


def compare(args, train, test):
    if args.peer is None:
        raise common.Error("deepsvdd is compared with the official code: give its checkout with --peer")
    sys.path.insert(0, f"{args.peer}/src")
    from datasets.preprocessing import global_contrast_normalization
    from deepSVDD import DeepSVDD
    from networks.cifar10_LeNet import CIFAR10_LeNet_Autoencoder
    from optim.ae_trainer import AETrainer
    from optim.deepSVDD_trainer import DeepSVDDTrainer

    image, query = (split.batch(range(len(split))) for split in (train, test))
    small = F.interpolate(image, (32, 32), mode="bilinear", antialias=True)
    yield "contrast normalisation", script.contrast_normalize(small), torch.stack(
        [global_contrast_normalization(x.clone(), scale="l1") for x in small])

    ours = script.DeepSVDD("imagenet", "one-class", 0.1)
    autoencoder, peer = script.Autoencoder(ours.encoder), CIFAR10_LeNet_Autoencoder()
    copy(peer, autoencoder)
    images = ours.load([image])
    dataset = Loaders(images, ours.prepare(query))
    settings = dict(lr=1e-3, n_epochs=1, batch_size=len(images), weight_decay=0.5e-6, device="cpu")
    AETrainer(**settings).train(dataset, peer)
    step(autoencoder.loss(images), script.adam(autoencoder, 1e-3, 0.5e-6, 250)[0])
    names = {k: f"encoder.{v}" for k, v in LAYERS.items()} | {k: f"decoder.{v}" for k, v in DECODER.items()}
    yield from side_by_side("autoencoder", autoencoder, peer, names)
    with torch.no_grad():
        yield "autoencoder: loss", autoencoder.loss(images), (peer(images) - images).square().sum((1, 2, 3)).mean()

    for objective in ("one-class", "soft-boundary"):
        ours = script.DeepSVDD("imagenet", objective, 0.1)
        method = DeepSVDD(objective, 0.1)
        method.set_network("cifar10_LeNet")
        method.ae_net = peer
        method.init_network_weights_from_pretraining()
        copy(method.net, ours.encoder)
        trainer = DeepSVDDTrainer(objective, R=0.5, c=None, nu=0.1, **settings)
        trainer.warm_up_n_epochs = 0
        trainer.train(dataset, method.net)  # sets the centre first
        ours.init_center(images)
        yield f"{objective}: centre", ours.center, trainer.c
        ours.radius.fill_(0.5)
        ours.train()
        distance = ours.distance(images)
        step(ours.loss(distance), script.adam(ours.encoder, 1e-3, 0.5e-6, 50)[0])
        yield from side_by_side(objective, ours.encoder, method.net, LAYERS)
        if objective == "soft-boundary":
            ours.radius.copy_(ours.quantile(distance))
            yield "soft-boundary: radius", ours.radius, trainer.R
        else:
            trainer.R, ours.radius = torch.tensor(0.0), torch.tensor(0.0)
        trainer.test(dataset, method.net)
        yield f"{objective}: image score", ours.predict(query)[1], [score for _, _, score in trainer.test_scores]
