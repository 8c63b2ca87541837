"""PatchCore next to anomalib 2.7.0, with our memory bank in both (the coreset has tests of its own). Undone: anomalib
enlarges its map by nearest neighbour, and its smoothing reflects the border without repeating the edge pixel."""

from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from conftest import load_script

import common

script = load_script("methods/patchcore.py")


def interpolate(x, size, mode):
    return F.interpolate(x, size, mode="nearest" if x.shape[1] == 1 else mode)  # one channel: the map


def compare(args, train, test):
    ours = script.PatchCore("mobilenet_v2", args.weights, 0.1, 9)
    ours.fit(train, 8, torch.device("cpu"))
    peer = PatchcoreModel(backbone=common.pretrained_network("mobilenet_v2", args.weights).eval(),
                          layers=script.LAYERS["mobilenet_v2"], pre_trained=False).eval()
    peer.memory_bank = ours.memory_bank.clone()
    image = test.batch(range(len(test)))
    undone = SimpleNamespace(interpolate=interpolate, avg_pool2d=F.avg_pool2d, pad=F.pad)
    blur = peer.anomaly_map_generator.blur
    with mock.patch.object(script, "F", undone), \
            mock.patch.object(common, "smooth", lambda anomaly_map: blur(anomaly_map[:, None])[:, 0]):
        anomaly_map, score = ours.predict(image)
    with torch.no_grad():
        theirs = peer(common.normalize(image))
    yield "anomaly map", anomaly_map, theirs.anomaly_map.flatten(1).view_as(anomaly_map)
    yield "image score", score, theirs.pred_score.flatten()
