"""UTRAD and the official gordon-chenmo/UTRAD (--peer): its networks from models.py, and from its main.py, where all
else stands in one function, the lines themselves: feature concatenation, losses and score. 128 channels instead of 512,
float64 (an untrained expected error is close to zero, and the ratio magnifies rounding), GELU and no dropout in both.
The score is written for 256 pixels there; at other sizes only what comes before is compared. Undone: |std|'s floor."""

import importlib.util
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from conftest import load_script
from torch import nn

import common

script = load_script("methods/utrad.py")
WIDTH = 128
RENAMED = {"pre_conv": "embed", "final_layer1": "recon", "final_layer2": "std"}


def between(source, start, end):
    """The lines of the peer's main function from the first that begins with `start` to the one before `end`."""
    found = re.search(rf"^[ ]*{re.escape(start)}.*?(?=^[ ]*{re.escape(end)})", source, re.MULTILINE | re.DOTALL)
    return textwrap.dedent(found[0])


def renamed(key):
    key = re.sub(r"^(encoder|decoder)\.(\d+)", r"levels.\2.\1", key)
    key = re.sub(r"^bottle_neck\.(\d+)", r"levels.\1.bottleneck", key)
    key = re.sub(r"^(position|query)_embedding\.(\d+)\.weight", r"levels.\2.\1", key)
    key = key.replace("global_position_embedding.weight", "position")
    head, dot, tail = key.partition(".")
    return RENAMED.get(head, head) + dot + tail


def without_dropout(module):
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return module


def compare(args, train, test):
    spec = importlib.util.spec_from_file_location("utrad_models", Path(args.peer) / "models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    source = (Path(args.peer) / "main.py").read_text()

    with torch.device("meta"):
        official = models.MultiLevelTransformer(SimpleNamespace(activation="gelu"))
    published = script.UTRAD("resnet18", "none", 256, 512, 4, "gelu")
    held = [p for name, p in (*published.named_parameters(), *published.named_buffers())
            if not name.startswith("backbone") and not re.search("running|batches", name)]
    yield ("parameters, without the peer's zeros", sum(p.numel() for p in held),
           sum(p.numel() for p in official.parameters()) - 512)
    del published, held

    torch.set_default_dtype(torch.float64)
    script.DROPOUT = 0.0  # read when the networks are made, and at each step
    ours = script.UTRAD("mobilenet_v2", args.weights, args.image_size, WIDTH, 4, "gelu").double()
    sides = [level.side for level in ours.levels]
    peer = models.MultiLevelTransformer(SimpleNamespace(activation="gelu"), input_dim=152, patch_size=sides,
                                        d_model=WIDTH, nhead=8, num_encoder_layers=[4] * len(sides),
                                        num_decoder_layers=[4] * len(sides), dim_feedforward=4 * WIDTH)
    peer.apply(models.weights_init_normal)
    without_dropout(peer)
    state = {renamed(k): v for k, v in peer.state_dict().items() if k != "zeros"}
    state["position"] = state["position"].view_as(ours.position)
    kept = {k: v for k, v in ours.state_dict().items() if k.startswith("backbone")}
    ours.load_state_dict(state | kept)

    lines = SimpleNamespace(
        concat=between(source, "def embedding_concat", "flag = 0"),
        losses=between(source, "loss = criterion(recon, outputs)", "(loss+loss_scale).backward()"),
        score=between(source, "batch_size, channels, width, height", "heatmap = "))
    space = dict(torch=torch, F=F, criterion=nn.MSELoss(), device=torch.device("cpu"))
    exec(lines.concat, space)
    image = train.batch(range(2)).double()
    found = list(ours.backbone(common.normalize(image)).values())
    features = ours.features(image)
    outputs = space["embedding_concat"](space["embedding_concat"](found[0], found[1]), found[2])
    yield "features", features, outputs

    ours.train()
    peer.train()
    recon, std = ours(features)
    space |= dict(zip(("recon", "std"), peer(outputs), strict=True), outputs=outputs)
    exec(lines.losses, space)
    loss_recon, loss_std = script.losses(features, recon, std)
    yield "reconstruction, training", recon, space["recon"]
    yield "expected error, training", std, space["std"]
    yield "loss, reconstruction", loss_recon, space["loss"]
    yield "loss, expected error", loss_std, space["loss_scale"]
    (loss_recon + loss_std).backward()
    (space["loss"] + space["loss_scale"]).backward()
    gradients = {renamed(k): p.grad for k, p in peer.named_parameters() if p.grad is not None}
    mine = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
    assert mine.keys() == gradients.keys(), mine.keys() ^ gradients.keys()
    groups = {}
    for key in mine:
        groups.setdefault(re.sub(r"^(levels\.\d\.\w+).*", r"\1", key) if key.startswith("l") else key.split(".")[0],
                          []).append(key)
    for group, keys in groups.items():
        yield f"gradient, {group}", *(torch.cat([g[k].flatten() for k in keys]) for g in (mine, gradients))

    if args.image_size != 256:
        return
    image = test.batch([0, len(test) - 1]).double()
    with mock.patch.object(script, "MIN_STD", 0):
        anomaly_map, score = ours.predict(image)
    peer.eval()
    found = list(ours.backbone(common.normalize(image)).values())
    outputs = space["embedding_concat"](space["embedding_concat"](found[0], found[1]), found[2])
    with torch.no_grad():
        recon, std = peer(outputs)
    space |= dict(recon=recon, std=std, outputs=outputs, ground_truth=image)
    exec(lines.score, space)
    yield "anomaly map", anomaly_map, space["score"][:, 0]
    yield "image score", score, space["score"].flatten(1).amax(1)
