"""PaDiM next to anomalib 2.7.0. Undone: anomalib adds another 1e-5 to the covariance's diagonal, and its smoothing
reflects the border without repeating the edge pixel."""

from unittest import mock

import torch
from anomalib.models.image.padim.torch_model import PadimModel
from conftest import load_script

import common

script = load_script("methods/padim.py")


def compare(args, train, test):
    layers = script.LAYERS["mobilenet_v2"][0][::-1]  # the peer takes the finest grid from its first layer
    peer = PadimModel(backbone=common.pretrained_network("mobilenet_v2", args.weights).eval(), layers=layers,
                      pre_trained=False, n_features=100)
    # the peer's channel numbers run over features.3, 6, 13 (24 + 32 + 96 channels), ours over 13, 6, 3
    start = torch.tensor([128] * 24 + [96 - 24] * 32 + [-56] * 96)
    drawn = peer.idx + start[peer.idx]
    with mock.patch("torch.randperm", lambda n: drawn):
        ours = script.PaDiM("mobilenet_v2", args.weights, 100, args.image_size)
    peer.train()
    with torch.no_grad():
        for image in train.batches(8):
            peer(common.normalize(image))
        peer.fit()
    peer.eval()
    image = test.batch(range(len(test)))
    blur = peer.anomaly_map_generator.blur
    with mock.patch.object(script, "EPSILON", 0.01 + 1e-5), \
            mock.patch.object(common, "smooth", lambda anomaly_map: blur(anomaly_map[:, None])[:, 0]):
        ours.fit(train.batches(8))
        anomaly_map, score = ours.predict(image)
    with torch.no_grad():
        theirs = peer(common.normalize(image))
    yield "anomaly map", anomaly_map, theirs.anomaly_map[:, 0]
    yield "image score", score, theirs.pred_score.flatten()
