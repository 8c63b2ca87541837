"""CFLOW and anomalib 2.7.0, whose state is copied into ours, its scales and offsets drawn at random (at the start they
do nothing). Undone: its permutation is put in the place of our rotation; its map compares to the likeliest vector
and the largest sum of the batch, so ours gets the first and its map is moved to start at 0."""

import anomalib.models.image.cflow.torch_model as peer_script
import torch
import torch.nn.functional as F
from conftest import load_script

import common

script = load_script("methods/cflow.py")


def peer_loss(peer, l, x, code):
    z, log_det = peer.decoders[l](x, [code])
    return -F.logsigmoid(peer_script.get_logp(x.shape[1], z, log_det) / x.shape[1]).mean()


def compare(args, train, test):
    layers = script.LAYERS["mobilenet_v2"]
    peer = peer_script.CflowModel(common.pretrained_network("mobilenet_v2", args.weights).eval(), layers, False,
                                  fiber_batch_size=256)
    ours = script.CFlow("mobilenet_v2", args.weights, args.image_size, 8, 128)
    for flow, decoder in zip(ours.flows, peer.decoders, strict=True):
        for block, theirs in zip(flow, decoder.module_list, strict=True):
            theirs.global_scale.data += torch.randn_like(theirs.global_scale)
            theirs.global_offset.data += torch.randn_like(theirs.global_offset)
            block.subnet.load_state_dict(theirs.subnet.state_dict())
            block.scale.data.copy_(theirs.global_scale[0])
            block.offset.data.copy_(theirs.global_offset[0])
            block.rotation.copy_(theirs.w_perm)
    image = train.batch(range(4))
    with torch.no_grad():
        activations = peer.encoder(common.normalize(image))
    for l, (flow, x, layer) in enumerate(zip(ours.flows, ours.features(image), layers, strict=True)):
        code, (h, w) = ours.get_buffer(f"code{l}"), ours.grids[l]
        their_code = peer_script.positional_encoding_2d(128, h, w).flatten(1).T
        their_x = activations[layer].permute(0, 2, 3, 1).flatten(0, 2)
        yield f"{layer}: features", x.flatten(0, 1), their_x
        yield f"{layer}: positional code", code, their_code
        rows = torch.randperm(len(their_x))[:256]
        loss = -F.logsigmoid(flow.log_likelihood(x.flatten(0, 1)[rows], code[rows % len(code)])).mean()
        loss.backward()
        their = peer_loss(peer, l, their_x[rows], their_code.repeat(4, 1)[rows])
        their.backward()
        yield f"{layer}: loss", loss, their
        pairs = list(zip(flow, peer.decoders[l].module_list, strict=True))
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            grads = [torch.cat([dict(b.subnet.named_parameters())[name].grad.flatten() for b in side])
                     for side in zip(*pairs, strict=True)]
            yield f"{layer}: gradient of {name}", *grads
        for name in ("scale", "offset"):
            yield (f"{layer}: gradient of {name}", torch.cat([getattr(b, name).grad for b, _ in pairs]),
                   torch.cat([getattr(b, f"global_{name}").grad[0] for _, b in pairs]))
    image = test.batch(range(len(test)))
    with torch.no_grad():
        ours.likeliest.copy_(torch.stack([m.max() for m in ours.log_likelihoods(ours.features(image))]))
        found = peer(common.normalize(image))
    anomaly_map, score = ours.predict(image)
    yield "anomaly map", anomaly_map - anomaly_map.min(), found.anomaly_map
    yield "image score", score - anomaly_map.min(), found.pred_score
