"""SimpleNet and the official code, DonaldRR/SimpleNet in --peer, with its state and the same noise in both. The
published backbone is compared untrained; mobilenet_v2 shows trained features, with the pooling of our choice put into
the peer: each layer to its own number of channels, then side by side."""

import contextlib
import importlib
import io
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from conftest import load_script

import common

script = load_script("methods/simplenet.py")


def official(folder):
    """The modules simplenet and common of the repository; what it imports for logging and pictures is left out."""
    ours = sys.modules["common"]
    absent = ("torch.utils.tensorboard", "matplotlib", "matplotlib.pyplot", "cv2", "metrics", "utils")
    found = []
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in absent}):
        sys.path.insert(0, folder)
        for name in ("common", "simplenet"):
            sys.modules.pop(name, None)
            found.append(importlib.import_module(name))
        sys.path.remove(folder)
    sys.modules["common"] = ours
    return found


class Side(torch.nn.Module):
    """The mobilenet_v2 pooling: each layer's unfolded patches to its own width, then concatenated."""

    def __init__(self, mappers):
        super().__init__()
        self.mappers = mappers

    def forward(self, features):
        return torch.cat([m(f) for m, f in zip(self.mappers, features, strict=True)], dim=1)


def peer_of(args, ours, backbone):
    peer_common, peer_script = official(args.peer)
    peer = peer_script.SimpleNet(torch.device("cpu"))
    width = ours.adaptor.in_features
    net = common.pretrained_network(backbone, args.weights if backbone == "mobilenet_v2" else "none").eval()
    # the flags of run.sh
    peer.load(net, ours.layers, torch.device("cpu"), (3, args.image_size, args.image_size), width, width,
              noise_std=0.015, dsc_hidden=1024, dsc_layers=2, dsc_margin=0.5, pre_proj=1, gan_epochs=1)
    if backbone == "mobilenet_v2":
        peer.forward_modules["preprocessing"] = Side([peer_common.MeanMapper(w) for w in ours.widths])
    return peer


def peer_step(peer, image, noise):
    """A step of the peer's two optimisers with the given noise; its loss. The gradients stay."""
    logged = {}
    logger = SimpleNamespace(add_scalar=lambda name, value, step: logged.setdefault(name, value))
    peer.logger = SimpleNamespace(logger=logger, step=lambda: None, g_iter=0)
    with mock.patch.object(torch, "normal", lambda mean, std, shape: mean + std * noise), \
            contextlib.redirect_stderr(io.StringIO()):
        peer._train_discriminator([{"image": common.normalize(image)}])
    return logged["loss"]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def compare(args, train, test):
    for backbone in ("wide_resnet50_2", "mobilenet_v2"):
        ours = script.SimpleNet(backbone, args.weights if backbone == "mobilenet_v2" else "none")
        peer = peer_of(args, ours, backbone)
        ours.adaptor.load_state_dict({k.removeprefix("layers.0fc."): v for k, v in
                                      peer.pre_projection.state_dict().items()})
        names = {"body.block1.0": "0", "body.block1.1": "1", "tail": "3"}
        ours.discriminator.load_state_dict({names[k.rpartition(".")[0]] + "." + k.rpartition(".")[2]: v
                                            for k, v in peer.discriminator.state_dict().items()})
        image = train.batch(range(len(train)))
        features = ours.features(image).flatten(0, 2)
        yield f"{backbone} features", features, peer.embed(common.normalize(image))[0]

        noise = torch.randn_like(features)
        peer_loss = peer_step(peer, image, noise)
        with mock.patch.object(torch, "randn_like", return_value=noise):
            loss = ours.train().loss(features, script.NOISE)
        loss.backward()
        yield f"{backbone} loss", loss, peer_loss
        optimizers = [torch.optim.AdamW(ours.adaptor.parameters(), script.Args.lr_adaptor),
                      torch.optim.Adam(ours.discriminator.parameters(), script.Args.lr, weight_decay=1e-5)]
        for part, optimizer, theirs in [("adaptor", optimizers[0], peer.pre_projection),
                                        ("discriminator", optimizers[1], peer.discriminator)]:
            mine, theirs = list(getattr(ours, part).parameters()), list(theirs.parameters())
            yield f"{backbone} gradient {part}", flat(p.grad for p in mine), flat(p.grad for p in theirs)
            # Biases before batch norm have gradient 0 but for rounding, of which Adam's first step takes the sign.
            for p, q in zip(mine, theirs, strict=True):
                p.grad = q.grad.clone()
            optimizer.step()
            yield f"{backbone} {part} after a step", flat(mine), flat(theirs)

        image = test.batch(range(len(test)))
        anomaly_map, score = ours.predict(image)
        scores, maps, _ = peer._predict(common.normalize(image))
        yield f"{backbone} anomaly map", anomaly_map, torch.stack([torch.as_tensor(m) for m in maps])
        yield f"{backbone} image score", score, torch.stack([torch.as_tensor(s) for s in scores])
