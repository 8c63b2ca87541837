"""RD4AD next to anomalib 2.7.0 with resnet18 and, where --peer gives its checkout, next to the official hq-deng/RD4AD
with wide_resnet50_2; the peer's seeded state in both. --weights is not read: the peers' decoders exist for ResNets
only. Undone: anomalib's smoothing reflects the border without repeating the edge pixel (the official code smooths as
ours does, with scipy). anomalib's bottleneck of wide_resnet50_2 has half the published width, hence the official."""

import sys
from unittest import mock

import torch
from anomalib.data import ImageBatch
from anomalib.models.image import ReverseDistillation
from conftest import load_script
from scipy.ndimage import gaussian_filter

import common

script = load_script("methods/rd4ad.py")


def copy_state(ours, bottleneck, decoder):
    """The peer's bottleneck and decoder into ours, tensor by tensor in the order of the forward pass."""
    parts = [bottleneck.get_submodule(name) for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "bn_layer")]
    for mine, theirs in ((ours.bottleneck, parts), (ours.decoder, [decoder])):
        values = [v for part in theirs for v in part.state_dict().values()]
        mine.load_state_dict(dict(zip(mine.state_dict(), values, strict=True)))


def gradients(*modules):
    return torch.cat([p.grad.flatten() for module in modules for p in module.parameters()])


def step_and_gradients(name, ours, bottleneck, decoder, image, loss):
    parts = [bottleneck.get_submodule(part) for part in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "bn_layer")]
    optimizer = torch.optim.Adam([*ours.bottleneck.parameters(), *ours.decoder.parameters()], 0.005, script.BETAS)
    theirs = torch.optim.Adam([*decoder.parameters(), *bottleneck.parameters()], 0.005, script.BETAS)
    for step in (1, 2):
        mine, found = script.distillation_loss(*ours(image)), loss()
        yield f"{name}: loss of step {step}", mine, found
        for side, value in ((optimizer, mine), (theirs, found)):
            side.zero_grad()
            value.backward()
        if step == 1:
            yield f"{name}: gradient of the bottleneck", gradients(ours.bottleneck), gradients(*parts)
            yield f"{name}: gradient of the decoder", gradients(ours.decoder), gradients(decoder)
        optimizer.step()
        theirs.step()


def anomalib(train, test):
    name = "resnet18"
    ours = script.RD4AD(name, "none", "sum").train()
    peer = ReverseDistillation(backbone=name, pre_trained=False, post_processor=False, evaluator=False,
                               visualizer=False).train()
    peer.log = mock.Mock()
    model = peer.model
    state = common.pretrained_network(name, "none").state_dict()
    assert not model.encoder.feature_extractor.load_state_dict(state, strict=False).missing_keys
    copy_state(ours, model.bottleneck, model.decoder)
    batch = ImageBatch(image=common.normalize(train))
    for side, (e, d) in enumerate(zip(ours(train), model(batch.image), strict=True)):
        for layer, (a, b) in enumerate(zip(e, d, strict=True), 1):
            yield f"anomalib: {('teacher', 'student')[side]}, layer {layer}", a, b
    copy_state(ours, model.bottleneck, model.decoder)
    yield from step_and_gradients("anomalib", ours, model.bottleneck, model.decoder, train,
                                  lambda: peer.training_step(batch)["loss"])
    copy_state(ours, model.bottleneck, model.decoder)  # Adam's first steps are signs: rounding alone parts the two
    peer.eval()
    model.anomaly_map_generator.image_size = test.shape[-2:]
    blur = torch.nn.Identity()
    for ours.combine, mode in (("sum", "add"), ("product", "multiply")):
        model.anomaly_map_generator.mode = mode
        with mock.patch.object(common, "smooth", blur), torch.no_grad(), \
                mock.patch("anomalib.models.image.reverse_distillation.anomaly_map.GaussianBlur2d", lambda **_: blur):
            anomaly_map, score = ours.predict(test)
            found = model(common.normalize(test))
        yield f"anomalib: map, {mode}", anomaly_map, found.anomaly_map[:, 0]
        yield f"anomalib: score, {mode}", score, found.pred_score.flatten()


def official(folder, train, test):
    sys.path.insert(0, folder)
    unused = ("pandas", "matplotlib", "matplotlib.pyplot")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in unused}):
        from de_resnet import de_wide_resnet50_2
        from main import loss_fucntion
        from resnet import wide_resnet50_2
        from test import cal_anomaly_map
    encoder, bottleneck = wide_resnet50_2(pretrained=False)
    decoder = de_wide_resnet50_2(pretrained=False)
    encoder.load_state_dict(common.pretrained_network("wide_resnet50_2", "none").state_dict(), strict=False)
    encoder.eval().requires_grad_(False)
    ours = script.RD4AD("wide_resnet50_2", "none", "sum").train()
    copy_state(ours, bottleneck, decoder)
    image = common.normalize(train)
    yield from step_and_gradients("official", ours, bottleneck, decoder, train,
                                  lambda: loss_fucntion(encoder(image), decoder(bottleneck(encoder(image)))))
    copy_state(ours, bottleneck, decoder)
    bottleneck.eval()
    decoder.eval()
    anomaly_map, score = ours.predict(test)
    with torch.no_grad():
        maps = []
        for image in common.normalize(test).split(1):  # it knows batches of one
            features = encoder(image)
            found = cal_anomaly_map(features, decoder(bottleneck(features)), image.shape[-1], amap_mode="a")[0]
            maps.append(torch.as_tensor(gaussian_filter(found, sigma=4)))
    yield "official: map", anomaly_map, torch.stack(maps)
    yield "official: score", score, torch.stack(maps).flatten(1).amax(1)


def compare(args, train, test):
    train, test = train.batch(range(len(train))), test.batch(range(len(test)))
    yield from anomalib(train, test)
    if args.peer:
        yield from official(args.peer, train, test)
