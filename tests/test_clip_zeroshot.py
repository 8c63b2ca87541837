"""Plain CLIP without its weights, against slow references: the softmax of image and patches, sentences, a run."""

import inspect
import json
import runpy
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script

import common

zs, winclip = load_script("methods/clip_zeroshot.py"), load_script("methods/winclip.py")
SHORT = ["--model", "tiny", "--clip-weights", "none", "--image-size", 64, "--clip-size", 64]


@pytest.fixture(scope="module")
def model():
    """A tiny model at 64 pixels, 4 x 4 patches."""
    return zs.build_model(zs.Args(model="tiny", clip_weights="none", image_size=64, clip_size=64))


@pytest.fixture(scope="module")
def images():
    """Smooth random images (3, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear")


def test_the_image_score_is_clips_own_softmax_over_two_sentences(model, images):
    classes = zs.sentences("brain", "plain", "named")
    assert classes == [[["axial FLAIR MRI slice of a normal brain"]], [["axial FLAIR MRI slice of an abnormal brain"]]]
    model.set_classes(classes)
    with torch.inference_mode():
        ids = open_clip.tokenize([classes[0][0][0], classes[1][0][0]])
        logits = model.clip.get_logits(common.normalize(images, model.clip.mean, model.clip.std), ids)[0]
    expected = (100 * logits / model.clip.logit_scale.exp()).softmax(dim=1)[:, 1]  # 100: trained CLIP's scale
    torch.testing.assert_close(model.predict(images)[1], expected, atol=1e-4, rtol=0)


def test_the_map_asks_the_same_of_the_last_blocks_patches(model, images):
    model.text.copy_(F.normalize(torch.randn(2, 128, generator=torch.Generator().manual_seed(1)), dim=1))
    maps = model.predict(images)[0]
    encoder, outputs = model.clip.visual, []
    hook = encoder.transformer.resblocks[-1].register_forward_hook(lambda _, __, x: outputs.append(x))
    with torch.inference_mode():
        model.clip.encode_image(common.normalize(images, model.clip.mean, model.clip.std))
        hook.remove()
        for i in range(3):
            expected = torch.zeros(4, 4)
            for p in range(16):
                patch = encoder.ln_post(outputs[0][i, 1 + p]) @ encoder.proj
                normal, anomalous = (float(F.cosine_similarity(patch, t, dim=0)) / 0.01 for t in model.text)
                expected[p // 4, p % 4] = 1 / (1 + torch.tensor(normal - anomalous).exp())
            assert expected.std() > 0.01
            enlarged = F.interpolate(expected[None, None], (64, 64), mode="bilinear", align_corners=False)[0, 0]
            torch.testing.assert_close(maps[i], enlarged, atol=1e-4, rtol=0)


def test_scores_belong_to_their_images_whatever_the_batch(model, images):
    maps, scores = model.predict(images)
    assert maps.shape == (3, 64, 64) and scores.shape == (3,) and len(set(scores.tolist())) == 3
    assert maps.min() >= 0 and maps.max() <= 1
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model.predict(images[order])[1], scores[order], atol=1e-4, rtol=0)
    alone = torch.cat([model.predict(i[None])[0] for i in images])
    torch.testing.assert_close(alone, maps, atol=1e-4, rtol=0)


def test_clip_sees_its_own_size_and_maps_have_that_of_the_image(model, images):
    large = F.interpolate(images, (96, 96), mode="bilinear")
    maps, scores = model.predict(large)
    small = F.interpolate(large, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    assert maps.shape == (3, 96, 96) and torch.equal(scores, model.predict(small)[1])


@pytest.mark.parametrize("words", zs.WORDS)
def test_the_ensemble_is_winclips(words):
    for findings in ("named", "none"):
        assert zs.sentences(words, "ensemble", findings) == winclip.sentences(words, "medical", findings)
    assert len(zs.sentences(words, "plain", "named")) == 2
    assert zs.sentences(words, "plain", "named") == zs.sentences(words, "plain", "none")


def test_what_winclip_and_this_script_share_is_the_same():
    for name in ("encode_text", "benchmark_words"):
        assert inspect.getsource(getattr(zs, name)) == inspect.getsource(getattr(winclip, name))
    for name in ("WORDS", "NORMAL", "ANOMALOUS", "TEMPLATES"):
        assert getattr(zs, name) == getattr(winclip, name)
    assert inspect.getsource(zs.ZeroShot.set_classes) == inspect.getsource(winclip.WinCLIP.set_classes)


def run_zeroshot(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["clip_zeroshot.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "methods/clip_zeroshot.py"), run_name="__main__")


@pytest.mark.parametrize("arguments, notes", [
    ([], dict(words="phantom", sentences=[1, 1])),
    (["--prompts", "ensemble"], dict(words="phantom", sentences=[64, 32])),
    (["--prompts", "ensemble", "--findings", "named"], dict(words="phantom", sentences=[144, 272]))])
@pytest.mark.slow
def test_notes_say_what_was_used_and_nothing_is_trained(arguments, notes, phantom, tmp_path):
    run_zeroshot("--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 0, *SHORT, *arguments)
    folder = tmp_path / "phantom/clip_zeroshot/seed0"
    results = json.loads((folder / "results.json").read_text())
    assert results["notes"] == notes and results["parameters"]["trained"] == 0
    assert set(torch.load(folder / "model.pt", weights_only=True)["state"]) == {"text"}


def test_a_size_that_patches_cannot_tile_ends_with_one_line(phantom, tmp_path):
    with pytest.raises(common.Error, match="^tiny: image size 17 [^\n]*$"):
        run_zeroshot("--root", phantom, "--out", tmp_path, "--device", "cpu", *SHORT, "--clip-size", 17)


def test_a_kept_model_is_the_same_when_it_is_loaded_from_python(phantom, tmp_path, images):
    run_zeroshot("--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 0, *SHORT)
    kept = torch.load(tmp_path / "phantom/clip_zeroshot/seed0/model.pt", weights_only=True)
    loaded = zs.build_model(zs.Args(**kept["args"]))
    loaded.load_state_dict(kept["state"], strict=False)
    expected = zs.build_model(zs.Args(**kept["args"]))
    expected.set_classes(zs.sentences("phantom", "plain", "none"))
    torch.testing.assert_close(loaded.predict(images), expected.predict(images))
