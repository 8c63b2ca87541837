"""STFPM next to anomalib 2.7.0, with our student in both. Undone: its loss is half the sum over the batch, its map has
a factor 1/2 a layer, its weight decay is 1e-3. Note: given a network, anomalib takes that one object, frozen, as
teacher and as student, and nothing is learned; its student is replaced here."""

from unittest import mock

import torch
from anomalib.data import ImageBatch
from anomalib.models.components import TimmFeatureExtractor
from anomalib.models.image import Stfpm
from conftest import load_script
from torchvision.models import get_model

import common

script = load_script("methods/stfpm.py")


def compare(args, train, test):
    layers = script.LAYERS["mobilenet_v2"]
    ours = script.STFPM("mobilenet_v2", args.weights)
    peer = Stfpm(backbone=common.pretrained_network("mobilenet_v2", args.weights).eval(), layers=layers,
                 post_processor=False, evaluator=False, visualizer=False)
    student = TimmFeatureExtractor(backbone=get_model("mobilenet_v2", weights=None), layers=layers, requires_grad=True)
    student.feature_extractor.load_state_dict(ours.student.state_dict())
    peer.model.student_model = student
    peer.log = mock.Mock()
    image = train.batch(range(len(train)))

    for side in (ours, peer):
        side.train()
    target, pred = peer.model(common.normalize(image))
    scale = 2 / len(image)
    for k, distance in zip(layers, ours(image), strict=True):
        yield f"loss of {k}", distance.mean(), scale * peer.loss.compute_layer_loss(target[k], pred[k])

    optimizer = torch.optim.SGD(ours.student.parameters(), 0.4, script.MOMENTUM, weight_decay=script.WEIGHT_DECAY)
    theirs = peer.configure_optimizers()
    theirs.param_groups[0]["weight_decay"] = script.WEIGHT_DECAY
    for step in (1, 2, 3):
        loss = sum(distance.mean() for distance in ours(image))
        found = scale * peer.training_step(ImageBatch(image=common.normalize(image)), 0)["loss"]
        yield f"loss of step {step}", loss, found
        for side, value in ((optimizer, loss), (theirs, found)):
            side.zero_grad()
            value.backward()
        for block in ("features.0", *layers):
            yield f"gradient of {block}, step {step}", *(
                torch.cat([p.grad.flatten() for p in side.get_submodule(block).parameters()])
                for side in (ours.student, student.feature_extractor))
        optimizer.step()
        theirs.step()
    peer.eval()
    image = test.batch(range(len(test)))
    anomaly_map, score = ours.predict(image)
    with torch.no_grad():
        found = peer.model(common.normalize(image))
    yield "anomaly map", anomaly_map, 2**3 * found.anomaly_map[:, 0]
    yield "image score", score, 2**3 * found.pred_score.flatten()
