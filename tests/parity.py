"""Our figures beside a peer's on the same images: `python tests/parity.py METHOD --data FOLDER --weights FILE`.

Needs anomalib 2.7 in the same environment (no dependency of ours). Both sides get the state of one mobilenet_v2, are
fitted on the training images, and score the test images; what differs by choice is undone on our side first, as said
where it happens. Prints image AUROC of ours as published here, ours with the differences undone, and the peer's; then
the largest difference of maps and scores between the latter two, relative to the peer's largest value."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
import tyro
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common


@dataclass
class Args:
    method: Annotated[Literal["padim", "patchcore"], tyro.conf.Positional]
    """the script of methods/ to compare"""
    data: str
    """a benchmark folder"""
    weights: str
    """state dict of torchvision's mobilenet_v2"""
    image_size: int = 256
    """pixels"""
    limit: int | None = None
    """at most this many images of each split and class"""
    seed: int = 0
    """of the peer's random draws"""


def script_of(method):
    spec = importlib.util.spec_from_file_location(method, ROOT / f"methods/{method}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[method] = script
    spec.loader.exec_module(script)
    return script


def mobilenet(weights):
    net = torchvision.models.mobilenet_v2()
    net.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    return net.eval()


def score_all(predict, test):
    """Maps (N, H, W) and scores (N,) of a split, eight images at a time."""
    found = [predict(image) for image in test.batches(8)]
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def peer_scores(model, test):
    def predict(image):
        found = model(common.normalize(image))
        return found.anomaly_map.flatten(1).view(len(image), *image.shape[2:]), found.pred_score.flatten()

    return score_all(predict, test)


def padim(args, train, test):
    from anomalib.models.image.padim.torch_model import PadimModel

    script = script_of("padim")
    layers = script.LAYERS["mobilenet_v2"][0]
    torch.manual_seed(args.seed)
    peer = PadimModel(backbone=mobilenet(args.weights), layers=layers, pre_trained=False, n_features=100)
    # the peer's channel numbers run over features.3, 6, 13 (24 + 32 + 96 channels), ours over 13, 6, 3
    start = torch.tensor([128] * 24 + [96 - 24] * 32 + [-56] * 96)
    drawn = peer.idx + start[peer.idx]
    with mock.patch("torch.randperm", lambda n: drawn):
        ours = script.PaDiM("mobilenet_v2", args.weights, 100, args.image_size)
    ours.fit(train.batches(8))
    yield score_all(ours.predict, test)
    # the peer adds another 1e-5 to the covariance's diagonal, and reflects the border without repeating the edge pixel
    blur = peer.anomaly_map_generator.blur
    with mock.patch.multiple(script, EPSILON=0.01 + 1e-5, smooth=blur):
        ours.fit(train.batches(8))
        yield score_all(ours.predict, test)
    peer.train()
    for image in train.batches(8):
        peer(common.normalize(image))
    peer.fit()
    yield peer_scores(peer.eval(), test)


def patchcore(args, train, test):
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    script = script_of("patchcore")
    torch.manual_seed(args.seed)
    ours = script.PatchCore("mobilenet_v2", args.weights, 0.01, 9)
    ours.fit(train, 8, torch.device("cpu"))
    yield score_all(ours.predict, test)
    peer = PatchcoreModel(backbone=mobilenet(args.weights), layers=script.LAYERS["mobilenet_v2"], pre_trained=False)
    peer.memory_bank = ours.memory_bank.clone()  # its own coreset takes minutes; test_embedding.py checks ours
    # the peer enlarges its map by nearest neighbour, and reflects the border without repeating the edge pixel

    def interpolate(x, size, mode):
        return F.interpolate(x, size, mode="nearest") if x.shape[1] == 1 else F.interpolate(x, size, mode=mode)

    undone = SimpleNamespace(interpolate=interpolate, avg_pool2d=F.avg_pool2d)
    with mock.patch.multiple(script, F=undone, smooth=peer.anomaly_map_generator.blur):
        yield score_all(ours.predict, test)
    yield peer_scores(peer.eval(), test)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    args.root, args.predict = "data", None
    train, _, test = common.load_benchmark(args)
    sides = []
    with torch.inference_mode():
        for name, (maps, scores) in zip(("ours", "ours, undone", "peer"), globals()[args.method](args, train, test),
                                        strict=True):
            print(f"{name:<13} image AUROC {roc_auc_score(test.labels, scores):.4f}", flush=True)
            sides.append((maps, scores))
    (maps, scores), (peer_maps, peer_scores_) = sides[1:]
    for what, a, b in (("map", maps, peer_maps), ("score", scores, peer_scores_)):
        print(f"largest difference of a {what}: {float((a - b).abs().max() / b.abs().max()):.1e} relative")
