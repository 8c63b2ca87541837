"""MKD next to the official code, rohban-lab/Knowledge_Distillation_AD in --peer, with its state and the same untrained
VGG-16 in both (its training loop needs a GPU, so its networks, loss and test functions are called from here). Its maps
have 128 pixels: run with --image-size 128. They are compared with `--map-norm image`, and the gradient that all maps
are made of by itself."""

import contextlib
import importlib
import io
import sys
from unittest import mock

import numpy as np
import torch
import torchvision  # noqa: F401 (before sys.modules is patched, which forgets what is imported meanwhile)
from conftest import load_script
from scipy import ndimage

import common

script = load_script("methods/mkd.py")
CONFIG = dict(equal_network_size=False, pretrain=True, use_bias=False, experiment_name="", normal_class=0,
              dataset_name="", lamda=0.01, direction_loss_only=False)


def official(folder):
    """The modules network, loss_functions and test_functions of the repository."""
    absent = {"yaml": mock.MagicMock(), "cv2": mock.MagicMock(),  # for its configuration and its own pixel AUROC
              "scipy.ndimage.filters": ndimage}  # its name before SciPy 1.15
    sys.path.insert(0, folder)
    with mock.patch.dict(sys.modules, absent):
        found = [importlib.import_module(name) for name in ("models.network", "loss_functions", "test_functions")]
    sys.path.remove(folder)
    return found


def compare(args, train, test):
    network, losses, functions = official(args.peer)
    gradient_of = functions.GuidedBackprop  # which asks for a GPU by number
    with mock.patch.object(torch.nn.Module, "cuda", lambda module: module), \
            mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor), \
            mock.patch.object(functions, "GuidedBackprop", lambda model, vgg, _: gradient_of(model, vgg, "cpu")), \
            mock.patch.object(network, "vgg16", lambda _: common.pretrained_network("vgg16", "none")):
        with contextlib.redirect_stdout(io.StringIO()):
            networks = network.get_networks(CONFIG)
        yield from compare_with(networks, losses, functions, train, test)


def official_map(cloner, vgg, batch, functions):
    with contextlib.redirect_stdout(io.StringIO()):
        return torch.as_tensor(functions.gbp_localization(cloner, vgg, batch, CONFIG))


def compare_with(networks, losses, functions, train, test):
    vgg, cloner = networks
    ours = script.MKD("vgg16", "none", 0.01, "image")
    ours.cloner.load_state_dict(dict(zip(ours.cloner.state_dict(), cloner.state_dict().values(), strict=True)))
    image = train.batch(range(len(train)))
    x = common.normalize(image)

    pred, target = cloner.train()(x), vgg(x)
    for layer, (mine, i) in enumerate(zip(ours.source(x).values(), (3, 6, 9, 12), strict=True)):
        yield f"source features {layer}", mine, target[i]
    loss = ours.train().loss(image)
    peer_loss = losses.MseDirectionLoss(CONFIG["lamda"])(pred, target)
    yield "loss", loss, peer_loss
    yield "loss, direction only", script.discrepancy([pred[i] for i in (3, 6, 9, 12)], [target[i] for i in
          (3, 6, 9, 12)], 0).mean(), losses.DirectionOnlyLoss()(pred, target)
    loss.backward()
    peer_loss.backward()
    for (name, p), q in zip(ours.cloner.named_parameters(), cloner.parameters(), strict=True):
        yield f"gradient {name}", p.grad, q.grad
    for m in (ours.cloner, cloner):
        torch.optim.Adam(m.parameters(), script.Args.lr).step()
    yield "all parameters after a step", *(torch.cat([p.flatten() for p in m.parameters()])
                                           for m in (ours.cloner, cloner))

    ours.cloner.load_state_dict(dict(zip(ours.cloner.state_dict(), cloner.state_dict().values(), strict=True)))
    image, label = test.batch(range(len(test))), torch.from_numpy(test.labels)
    batch = [(common.normalize(image), label)]
    anomaly_map, score = ours.predict(image)
    with mock.patch.object(functions, "roc_curve", return_value=([0, 1], [0, 1], [0, 1])) as ranked:
        functions.detection_test(cloner, vgg, batch, CONFIG)
    yield "image score", score, torch.as_tensor(ranked.call_args.args[1])

    raw = []
    with mock.patch.object(functions, "convert_to_grayscale", lambda g: raw.append(np.abs(g).sum(0)) or g[:1]):
        official_map(cloner, vgg, batch, functions)
    with mock.patch.object(common, "smooth", lambda m: m):
        ours.map_norm = "none"
        yield "guided gradient, summed over colours", ours.predict(image)[0], torch.as_tensor(np.stack(raw))
    yield "anomaly map", anomaly_map, official_map(cloner, vgg, batch, functions)
