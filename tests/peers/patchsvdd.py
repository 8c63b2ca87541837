"""PatchSVDD next to nuclearboy95/Anomaly-Detection-PatchSVDD-PyTorch (commit 934d623), given as --peer: its networks,
losses, embedding of patches one by one and maps run as they are, on the CPU. The peer's seeded weights go into ours, by
order; both get the patches that ours draws. The convolutions' weights are doubled, since untrained embeddings of
different patches are almost equal. Its pairs of patches are compared with ours by what they look like on average.

The search for neighbours is compared in float64: in float32 ours takes, of patches that all but coincide with the
query, one that is up to 2e-4 of the largest distance further away. Undone: nothing; its NGT, an approximate search that
is not installed, is replaced by its own k-d tree."""

import sys
from unittest import mock

import numpy as np
import torch
from conftest import load_script

import common

script = load_script("methods/patchsvdd.py")


def gradients(*networks):
    return torch.cat([p.grad.flatten() for net in networks for p in net.parameters() if p.grad is not None])


def copy(source, target):
    """Parameters have the same order on both sides, whatever their names."""
    pairs = zip(target.state_dict(), source.state_dict().values(), strict=True)
    target.load_state_dict({name: value.clone() for name, value in pairs})


def moments(first, second):
    """Of corners (n, 2) of pairs: what the mean and the deviation of both and of the moves are."""
    corners = [torch.as_tensor(np.asarray(c)).double() for c in (first, second)]
    corners.append(corners[1] - corners[0])
    return torch.cat([f(c, dim=0) for c in corners for f in (torch.mean, torch.std)])


def compare(args, train, test):
    if not args.peer:
        raise common.Error("patchsvdd is compared with the official code: give its checkout with --peer")
    sys.path.insert(0, args.peer)
    sys.modules["imageio"] = mock.MagicMock()  # reads images, which ours does here
    from codes import datasets, inspection, nearest_neighbor, utils
    from codes.networks import EncoderHier, PositionClassifier

    image, query = (split.batch(range(len(split))) for split in (train, test))
    ours = script.PatchSVDD(args.image_size)
    ours.fit_mean([image])
    pixels = [(255 * x).round().permute(0, 2, 3, 1).numpy() for x in (image, query)]
    standardized = [(x - pixels[0].mean(axis=0)) / 255 for x in pixels]
    yield "images less their mean", image - ours.mean, np.moveaxis(standardized[0], 3, 1)

    encoder, position = EncoderHier(64, 64), {k: PositionClassifier(k, 64) for k in (64, 32)}
    for name, p in encoder.named_parameters():
        p.data.mul_(2 if name.endswith("weight") else 1)
    copy(encoder.enc, ours.small)
    copy(encoder.conv1, ours.join1)
    copy(encoder.conv2, ours.join2)
    for k, classifier in ((64, ours.position64), (32, ours.position32)):
        copy(position[k], classifier)
        classifier[-1].weight.data /= classifier[-1].weight.norm(dim=0)

    drawn = {k: script.draw(image - ours.mean, k) for k in (64, 32)}
    found = ours.losses(*drawn[64], *drawn[32])
    (found[0] + found[1] + 0.9 * (found[2] + found[3])).backward()
    encoders, losses = {64: encoder, 32: encoder.enc}, []
    for k, (patches, label) in drawn.items():
        first, second, *pair = patches.chunk(4)
        losses.append((PositionClassifier.infer(position[k], encoders[k], (first, second, label)),
                       datasets.SVDD_Dataset.infer(encoders[k], pair)))
    (losses[0][0] + losses[1][0] + 0.9 * (losses[0][1] + losses[1][1])).backward()
    for i, name in enumerate(("position", "SVDD")):
        for j, k in enumerate((64, 32)):
            yield f"loss: {name}, {k} pixels", found[2 * i + j], losses[j][i]
    yield "gradients, encoder of 32", gradients(ours.small), gradients(encoder.enc)
    yield "gradients, encoder of 64", gradients(ours.join1, ours.join2), gradients(encoder.conv1, encoder.conv2)
    for k, classifier in ((64, ours.position64), (32, ours.position32)):
        yield f"gradients, position classifier {k}", gradients(classifier), gradients(position[k])
        assert position[k].fc3.weight.grad is None

    ours.fit(train, 4, "cpu", 10**9)
    maps, size = [], (args.image_size, args.image_size)
    with torch.no_grad(), mock.patch("torch.Tensor.cuda", lambda x: x):
        for k, h, bank in zip((64, 32), ours.embed(query), (ours.bank64, ours.bank32), strict=True):
            stride = script.STRIDES[k]
            normal, other = (inspection.infer(x, encoders[k], K=k, S=stride) for x in standardized)
            yield f"embeddings, {k} pixels", h.permute(0, 2, 3, 1), other
            yield f"memory bank, {k} pixels", bank, normal.reshape(-1, 64)
            distance, _ = nearest_neighbor.search_NN(other, normal.reshape(-1, 64), method="kdt")
            ours_distance = script.nearest(h.permute(0, 2, 3, 1).flatten(0, 2).double(), bank.double())
            yield f"nearest neighbours, {k} pixels", ours_distance, distance.reshape(-1)
            maps.append(utils.distribute_scores(distance.mean(axis=-1), size, K=k, S=stride))
            ours_map = script.spread(ours_distance.view(distance.shape[:3]), args.image_size, k, stride)
            yield f"map, {k} pixels", ours_map, maps[-1]
    anomaly_map, score = ours.predict(query)
    yield "map, product", anomaly_map, maps[0] * maps[1]
    yield "image score", score, (maps[0] * maps[1]).max(axis=(1, 2))

    np.random.seed(0)
    for k in (64, 32):
        for name, draw, peer_draw in (("position", script.position_corners, datasets.generate_coords_position),
                                      ("SVDD", script.jittered_corners, datasets.generate_coords_svdd)):
            peer = list(zip(*(peer_draw(256, 256, k)[:2] for _ in range(40000)), strict=True))
            apart = (moments(*draw(40000, 256, k)[:2]) - moments(*peer)).abs().max()
            assert apart < 0.02 * (256 - k), (name, k, apart)
