"""CFA next to anomalib 2.7.0. anomalib knows backbones by name and downloads their weights: its extractor and the width
of its descriptor are replaced by ours. Its descriptor's state is copied into ours. Undone: its radius is no parameter
(compared at 1e-5 as it is, and at a radius where the repulsion acts as a leaf put in its place); its smoothing reflects
the border without repeating the edge pixel; it fills its memory bank with the batch norm of the backbone in training
mode, which ours leaves out. Training is compared in double precision: a hinge's corner, where a patch's gradient sets
in, falls on one side or the other by rounding."""

from types import SimpleNamespace
from unittest import mock

import anomalib.models.image.cfa.torch_model as peer_script
import torch
from anomalib.models.components import GaussianBlur2d
from anomalib.models.image.cfa.loss import CfaLoss
from conftest import load_script

import common

script = load_script("methods/cfa.py")


def compare(args, train, test):
    size, layers = args.image_size, script.LAYERS["mobilenet_v2"]
    ours = script.CFA("mobilenet_v2", args.weights, size, 3, 3, 1e-5, True)
    with mock.patch.multiple(
        peer_script, get_return_nodes=lambda name: layers,
        get_feature_extractor=lambda name, nodes: common.feature_extractor("mobilenet_v2", nodes, args.weights)
    ):
        peer = peer_script.CfaModel("resnet18", 1, 1, 3, 3, 1e-5)
        width = ours.descriptor.conv.out_channels
        peer.descriptor.layer = peer_script.CoordConv2d(width, width, 1)
        ours.descriptor.conv.load_state_dict(peer.descriptor.layer.conv2d.state_dict())
        batches = [train.batch(range(i, i + 4)) for i in (0, 4)]  # of one size: anomalib weighs batches, not images
        ours.fill_memory_bank(map(ours.features, batches))
        peer.initialize_centroid([SimpleNamespace(image=common.normalize(b)) for b in batches])
    yield "memory bank", ours.memory_bank, peer.memory_bank.T
    image = train.batch([0, 3, 5]).double()
    ours.double(), peer.double().train()
    mean = float(peer(common.normalize(image)).topk(6, largest=False).values.mean().detach())
    for radius in (1e-5, (mean + script.ALPHA) ** 0.5):
        with torch.no_grad():
            ours.radius.fill_(radius)
        ours.zero_grad()
        peer.zero_grad()
        loss = ours.loss(ours.features(image))
        loss.backward()
        peer_loss = CfaLoss(3, 3, radius)
        peer_loss.radius = torch.tensor([radius], requires_grad=True)
        peer_value = peer_loss(peer(common.normalize(image)))
        peer_value.backward()
        yield f"loss, r = {radius:.3g}", loss, peer_value
        conv = peer.descriptor.layer.conv2d
        yield f"gradient of the weight, r = {radius:.3g}", ours.descriptor.conv.weight.grad, conv.weight.grad
        yield f"gradient of the bias, r = {radius:.3g}", ours.descriptor.conv.bias.grad, conv.bias.grad
        yield f"gradient of the radius, r = {radius:.3g}", ours.radius.grad.view(1), peer_loss.radius.grad
    image = test.batch(range(len(test)))
    ours.float(), peer.float()
    blur = GaussianBlur2d(sigma=4)
    with mock.patch.object(common, "smooth", lambda anomaly_map: blur(anomaly_map[:, None])[:, 0]), torch.no_grad():
        anomaly_map, score = ours.predict(image)
        theirs = peer.eval()(common.normalize(image))
    yield "anomaly map", anomaly_map, theirs.anomaly_map
    yield "image score", score, theirs.pred_score
