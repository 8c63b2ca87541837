"""DRAEM next to anomalib 2.7.0, the published widths in both, from anomalib's seeded state. Undone: the segmenting
network sees (restoration, image) as in the official code, anomalib's (image, restoration), so the channels of its first
convolution change places; SSIM's border is zero as there, anomalib's is mirrored; the focal loss smooths its classes as
there, anomalib's does not; the image score is the largest mean of 21x21 pixels as there, anomalib's the largest pixel,
so the peer's map gets our windows. Repaired in the peer: its FocalLoss(alpha=1) gives normal pixels the weight 0 since
kornia 0.7 and divides by the number of classes; here without alpha and times 2. Both run in double precision: a sign
that rounding changes before a ReLU changes gradients by a percent. Batch norms take the statistics of one batch, so
that eval mode means something in an untrained network. Memory: about 4 GB at 64 pixels."""

import types
from unittest import mock

import torch
import torch.nn.functional as F
from anomalib.models.image.draem.torch_model import DraemModel
from conftest import load_script
from kornia.losses import FocalLoss, SSIMLoss

script = load_script("methods/draem.py")


def layers(*networks):
    """Convolutions and batch norms in the order in which data meets them."""
    return [m for net in networks for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.BatchNorm2d)]


def mirrored(x, weight, padding, groups):
    return F.conv2d(F.pad(x, 4 * (padding,), "reflect"), weight.to(x), groups=groups)


def compare(args, train, test):
    peer, ours = DraemModel().double(), script.DRAEM(128).double()
    mine = ours.discriminative
    interleaved = [net for pair in zip(mine.up, mine.decoder, strict=True) for net in pair]
    networks = {"restoration": (layers(ours.reconstructive), layers(peer.reconstructive_subnetwork)),
                "segmentation": (layers(mine.encoder, *interleaved, mine.head), layers(peer.discriminative_subnetwork))}
    for pair in networks.values():
        for a, b in zip(*pair, strict=True):
            a.load_state_dict(b.state_dict())
            if isinstance(a, torch.nn.BatchNorm2d):
                a.momentum = b.momentum = 1
    first, swapped = mine.encoder[0][0].weight, [3, 4, 5, 0, 1, 2]
    first.data = first.data[:, swapped]

    samples = [script.simulate(x, None) for x in train.batch(range(len(train)))]
    image, corrupted, mask = (torch.stack(part) for part in zip(*samples, strict=True))
    image, corrupted = image.double(), corrupted.double()
    recon, logits = ours(corrupted)
    with mock.patch.object(script, "F", types.SimpleNamespace(conv2d=mirrored)):
        terms = [F.mse_loss(recon, image), 1 - script.ssim(recon, image), script.focal_loss(logits, mask, smooth=0)]
    sum(terms).backward()
    peer_recon, peer_logits = peer(corrupted)
    peer_terms = [F.mse_loss(peer_recon, image), 2 * SSIMLoss(11)(peer_recon, image),
                  2 * FocalLoss(alpha=None, reduction="mean")(peer_logits, mask[:, 0].long())]
    sum(peer_terms).backward()
    first.grad = first.grad[:, swapped]
    yield "restoration", recon, peer_recon
    yield "logits", logits, peer_logits
    for name, a, b in zip(("L2 loss", "SSIM loss", "focal loss"), terms, peer_terms, strict=True):
        yield name, a, b
    for name, pair in networks.items():
        for kind in (torch.nn.Conv2d, torch.nn.BatchNorm2d):
            for what in ("weight", "bias"):
                grads = [[getattr(m, what).grad.flatten() for m in side if isinstance(m, kind)] for side in pair]
                yield f"{name}: gradients, {kind.__name__} {what}", *(torch.cat(side) for side in grads)
    image = test.batch(range(len(test))).double()
    anomaly_map, score = ours.predict(image)
    peer.eval()
    with torch.no_grad():
        found = peer(image)
    yield "anomaly map", anomaly_map, found.anomaly_map
    yield "image score", score, F.avg_pool2d(found.anomaly_map, 21, stride=1, padding=10).amax((1, 2))
