"""WinCLIP next to anomalib 2.7.0, zero-shot and with 4 shots: one seeded, untrained state of ViT-B-16-plus-240 in both.
Images have 240 pixels, the peer's only size; --weights is not read. Two of each split are enough (--limit 2). The two
text features that the maps are compared with are random: those of an untrained text encoder lie so close together that
all scores would be 0.5.

Repaired: anomalib turns its windows' tokens to (tokens, windows, width) for a transformer that takes them the other way
round, so that all windows get one feature; how far it is off as released is printed. Its sentence features are averaged
as they are, ours normalised first: both means are compared."""

import time
from unittest import mock

import open_clip
import torch
import torch.nn.functional as F
from anomalib.models.image.winclip.prompting import create_prompt_ensemble
from anomalib.models.image.winclip.torch_model import WinClipModel
from conftest import load_script

import common

script = load_script("methods/winclip.py")


def timed(work):
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def compare(args, train, test):
    train, test = (F.interpolate(split.batch([0, len(split) - 1]), (240, 240), mode="bilinear")
                   for split in (train, test))
    train = torch.cat([train, train.flip(3)])  # four references of two images: the encoder is slow
    ours = script.build_model(script.Args(clip_weights="none", shots=len(train)))
    create, state = open_clip.create_model_and_transforms, ours.clip.state_dict()
    with mock.patch.object(open_clip, "create_model_and_transforms", lambda name, pretrained: create(name)):
        peer = WinClipModel().eval()
    peer.clip.load_state_dict(state)
    seen, wanted = (common.normalize(images, ours.clip.mean, ours.clip.std) for images in (train, test))

    sentences = create_prompt_ensemble("brain")
    with torch.inference_mode():
        peer.setup("brain")
        mine = torch.stack([ours.clip.encode_text(open_clip.tokenize(s)).mean(dim=0) for s in sentences])
    yield "mean of the sentences' features", mine, peer.text_embeddings
    ours.set_classes([[s] for s in sentences])
    off = 1 - F.cosine_similarity(ours.text, peer.text_embeddings).min()
    print(f"normalised before averaging or not: cosines differ from 1 by up to {off:.1e}")

    ours.text.copy_(F.normalize(torch.randn(2, 640, generator=torch.Generator().manual_seed(0))))
    peer._text_embeddings, peer.class_name = ours.text.clone(), None  # no name: else it reads the sentences again
    released = peer(wanted)
    windows = peer.encode_image(wanted)[1]
    print(f"anomalib as released: standard deviation over the windows {max(w.std(1).max() for w in windows):.1e}, "
          f"over the map {released.anomaly_map.flatten(1).std(1).max():.1e}")

    transformer = peer.clip.visual.transformer
    forward = transformer.forward

    def repaired(x, *arguments, **named):
        return forward(x.transpose(0, 1)).transpose(0, 1) if x.shape[0] in (5, 10) else forward(x, *arguments, **named)

    transformer.forward = repaired
    for shots in (0, len(train)):
        if shots:
            ours.set_references(train)
            peer.setup(reference_images=seen)
            for k, found in zip(script.SCALES, peer.visual_embeddings, strict=True):
                found = F.normalize(found.flatten(0, 1), dim=-1)
                yield f"memory of the windows of {k} x {k}", ours.get_buffer(f"memory{k}"), found
            yield "memory of the patches", ours.memory1, F.normalize(peer.patch_embeddings.flatten(0, 1), dim=-1)
        ours.shots = shots
        (anomaly_map, score), seconds = timed(lambda: ours.predict(test))
        found, theirs = timed(lambda: peer(wanted))
        name = f"{shots} shots" if shots else "zero-shot"
        print(f"{name}: CPU seconds an image {seconds / len(test):.2f}, anomalib {theirs / len(test):.2f}; "
              f"the maps' deviation over an image {found.anomaly_map.flatten(1).std(1).mean():.1e}")
        yield f"{name}: map", anomaly_map, found.anomaly_map
        yield f"{name}: map less its mean", *(m - m.mean() for m in (anomaly_map, found.anomaly_map))
        yield f"{name}: image score", score, found.pred_score
