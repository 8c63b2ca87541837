"""CS-Flow and anomalib 2.7.0: mobilenet_v2's features.17 in both, 304 of its 320 channels, since anomalib's flow has
no other width; its state, with gamma drawn at random (zero would switch the coupling networks off). Undone: anomalib
sums the log-determinant over the batch (ours: one for each image, as in the official code), so its loss is taken image
by image; its map is the product of three scales, ours the largest scale (anomalib's own mode "max").

In float64: in float32 a hidden value next to zero may fall on either side of the leaky ReLU's kink, which changes some
gradients by 3e-3 while losses and scores agree to 1e-7. With 256 hidden channels; --image-size is a multiple of 128."""

from unittest import mock

import anomalib.models.image.csflow.torch_model as anomalib
import torch
from anomalib.models.image.csflow.anomaly_map import AnomalyMapMode
from anomalib.models.image.csflow.loss import CsFlowLoss
from conftest import load_script

import common

script = load_script("methods/csflow.py")
CHANNELS, HIDDEN = 304, 256


def features_of(backbone, layer):
    """The class that replaces anomalib's EfficientNet-B5: as many channels of our backbone as its flow takes."""
    class Features(torch.nn.Module):
        def __init__(self, **unused):
            super().__init__()

        def forward(self, image):
            return {"features.6.8": backbone(image)[layer][:, :CHANNELS]}

    return Features


def compare(args, train, test):
    torch.set_default_dtype(torch.float64)
    layer = script.LAYERS["mobilenet_v2"]
    backbone = common.feature_extractor("mobilenet_v2", [layer], args.weights)
    size = (args.image_size, args.image_size)
    features = features_of(backbone, layer)
    with mock.patch.multiple(anomalib, TimmFeatureExtractor=features, efficientnet_b5=lambda weights: None):
        peer = anomalib.CsFlowModel(size, HIDDEN)
    for name, parameter in peer.named_parameters():
        if "gamma" in name:
            torch.nn.init.normal_(parameter, 0, 0.5)
    peer.anomaly_map_generator.mode = AnomalyMapMode.MAX

    with mock.patch.object(script, "CrossScaleFlow"):
        ours = script.CSFlow("mobilenet_v2", args.weights, HIDDEN, args.image_size)
    ours.flow = script.CrossScaleFlow(CHANNELS, HIDDEN)
    modules = [m for m in peer.graph.graph.module_list if not isinstance(m, anomalib.OutputNode)]
    couplings = [m for m in modules if isinstance(m, anomalib.ParallelGlowCouplingLayer)]
    permutations = [m for m in modules if isinstance(m, anomalib.ParallelPermute)]
    pairs = []  # (name, ours, the peer's) of every parameter
    for k, (coupling, permutation) in enumerate(zip(couplings, permutations, strict=True)):
        ours.flow.get_buffer(f"order{k}").copy_(torch.stack(permutation.perm))
        for net, theirs in (("net1", coupling.cross_convolution1), ("net2", coupling.cross_convolution2)):
            mine = getattr(ours.flow.couplings[k], net)
            convolutions = [(mine.enter[s], getattr(theirs, f"conv_scale{s}_0")) for s in range(3)]
            convolutions += [(mine.stay[s], getattr(theirs, f"conv_scale{s}_1")) for s in range(3)]
            convolutions += [(mine.up[0], theirs.up_conv10), (mine.up[1], theirs.up_conv21),
                             (mine.down[0], theirs.down_conv01), (mine.down[1], theirs.down_conv12)]
            for a, b in convolutions:
                a.load_state_dict(b.state_dict())
            mine.gamma.data = torch.cat([theirs.gamma0, theirs.gamma1, theirs.gamma2]).detach()
            pairs.append((f"block {k}, {net}", mine, convolutions, theirs))
    image = test.batch(range(len(test))).double()
    with mock.patch.object(ours, "features", lambda x, full=ours.features: [f[:, :CHANNELS] for f in full(x)]):
        features = ours.features(image)
        anomaly_map, score = ours.predict(image)
        loss = ours.loss(features)
    loss.backward()
    peer.eval()
    with torch.no_grad():
        for s, (a, b) in enumerate(zip(features, peer.feature_extractor(common.normalize(image)), strict=True)):
            yield f"features, scale {s}", a, b
        found = peer(common.normalize(image))
    peer.train()
    losses = []
    for one in image.split(1):
        term = CsFlowLoss()(*peer(common.normalize(one)))
        (term / len(image)).backward()
        losses.append(term.detach())
    yield "loss", loss, torch.stack(losses).mean()
    for name, mine, convolutions, theirs in pairs:
        for what in ("weight", "bias"):
            grads = [[getattr(m, what).grad.flatten() for m in side] for side in zip(*convolutions, strict=True)]
            yield f"{name}: gradients, {what}", *(torch.cat(side) for side in grads)
        yield f"{name}: gradients, gamma", mine.gamma.grad, \
            torch.cat([getattr(theirs, f"gamma{s}").grad for s in range(3)])
    yield "anomaly map", anomaly_map, found.anomaly_map[:, 0]
    yield "image score", score, found.pred_score
