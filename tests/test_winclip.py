"""WinCLIP without CLIP's weights, against slow references: windows, harmonic means, memory, sentences, the K shots."""

import csv
import itertools
import json
import runpy
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script

import common

wc = load_script("methods/winclip.py")
SHORT = ["--model", "tiny", "--clip-weights", "none", "--image-size", 64, "--clip-size", 64]


def build(**changes):
    """A tiny model at 64 pixels, 4 x 4 patches: 9 windows of 2 x 2, 4 of 3 x 3; text features far from each other."""
    model = wc.build_model(wc.Args(**dict(model="tiny", clip_weights="none", image_size=64, clip_size=64) | changes))
    model.text.copy_(F.normalize(torch.randn(2, 128, generator=torch.Generator().manual_seed(1)), dim=1))
    return model


@pytest.fixture(scope="module")
def images():
    """Smooth random images (5, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear")


def window_patches(k):
    """The patches (row, column) of each window, row by row, as one would write them down."""
    corners = itertools.product(range(4 - k + 1), repeat=2)
    return [[(r + i, c + j) for i in range(k) for j in range(k)] for r, c in corners]


def slow_patch_scores(scores, k):
    """(n,) -> (4, 4): n over the sum of 1 / score, of the windows that hold a patch."""
    found = torch.zeros(4, 4)
    for r, c in itertools.product(range(4), repeat=2):
        mine = [s for s, window in zip(scores.tolist(), window_patches(k), strict=True) if (r, c) in window]
        found[r, c] = len(mine) / sum(1 / s for s in mine)
    return found


# -------------------------------------------------------------------------------------------------------------- windows
@pytest.mark.parametrize("k", wc.SCALES)
def test_windows_hold_the_class_token_and_their_patches(k):
    window = build().get_buffer(f"window{k}")
    assert window.tolist() == [[0] + [1 + 4 * r + c for r, c in patches] for patches in window_patches(k)]


def test_the_published_model_has_196_and_169_windows_of_15_x_15_patches():
    with torch.device("meta"):
        model = wc.WinCLIP(wc.Args(clip_weights="none", shots=4))
    assert model.grid == (15, 15) and model.window2.shape == (196, 5) and model.window3.shape == (169, 10)
    assert model.memory1.shape == (900, 896) and model.memory2.shape == (784, 640) and model.memory3.shape == (676, 640)


def test_a_window_feature_equals_the_image_encoder_that_sees_nothing_else(images):
    model = build()
    encoder = model.clip.visual
    with torch.inference_mode():
        whole, found = model.features(images[:2])
        image = common.normalize(images[:2], model.clip.mean, model.clip.std)
        torch.testing.assert_close(whole, model.clip.encode_image(image, normalize=True), atol=1e-5, rtol=0)
        tokens = encoder._embeds(image)
        patches = encoder.ln_post(encoder.transformer(tokens))[:, 1:]
        torch.testing.assert_close(found[1], F.normalize(patches, dim=-1), atol=1e-5, rtol=0)
        for k in wc.SCALES:
            for number, window in enumerate(window_patches(k)):
                blind = torch.full((17, 17), -torch.inf)
                blind[:, [0] + [1 + 4 * r + c for r, c in window]] = 0
                expected = encoder.ln_post(encoder.transformer(tokens, attn_mask=blind)[:, 0]) @ encoder.proj
                torch.testing.assert_close(found[k][:, number], F.normalize(expected, dim=-1), atol=1e-5, rtol=0)
            assert found[k].std(dim=1).max() > 1e-3  # windows are told apart


@pytest.mark.parametrize("k", wc.SCALES)
def test_patches_get_the_harmonic_mean_of_their_windows(k):
    model = build()
    scores = torch.rand(3, (5 - k) ** 2, generator=torch.Generator().manual_seed(0)) + 0.01
    found = model.on_patches(scores, k)
    for one, expected in zip(found, scores, strict=True):
        torch.testing.assert_close(one, slow_patch_scores(expected, k), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.on_patches(torch.full_like(scores, 0.3), k), torch.full((3, 4, 4), 0.3))


# --------------------------------------------------------------------------------------------------------------- scores
def test_zero_shot_maps_and_scores_equal_their_formulas(images):
    model = build()
    maps, scores = model.predict(images[:2])
    with torch.inference_mode():
        whole, found = model.features(images[:2])
    for i in range(2):
        def anomalous(feature):
            normal, other = (float(feature @ t) / 0.07 for t in model.text)
            return 1 / (1 + torch.tensor(normal - other).exp())

        score = anomalous(whole[i])
        assert scores[i].item() == pytest.approx(score.item(), abs=1e-5)
        scales = [slow_patch_scores(torch.stack([anomalous(z) for z in found[k][i]]), k) for k in wc.SCALES]
        expected = 3 / (1 / score + 1 / scales[0] + 1 / scales[1])
        assert expected.std() > 1e-3
        expected = F.interpolate(expected[None, None], (64, 64), mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(maps[i], expected, atol=1e-5, rtol=0)


def test_few_shot_maps_compare_with_the_nearest_of_all_positions_of_all_references(images):
    zero, model = build(), build(shots=3)
    model.set_references(images[:3])
    test = images[3:]
    maps, scores = model.predict(test)
    zero_maps, zero_scores = zero.predict(test)
    with torch.inference_mode():
        memory, found = model.features(images[:3])[1], model.features(test)[1]
    for i in range(2):
        def distances(k, i=i):
            return torch.tensor([min((1 - float(F.cosine_similarity(z, r, dim=0))) / 2
                                     for reference in memory[k] for r in reference) for z in found[k][i]])

        few = (distances(1).view(4, 4) + sum(slow_patch_scores(distances(k), k) for k in wc.SCALES)) / 3
        enlarged = F.interpolate(few[None, None], (64, 64), mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(maps[i], (zero_maps[i] + enlarged) / 2, atol=1e-5, rtol=0)
        assert scores[i].item() == pytest.approx((zero_scores[i].item() + few.max().item()) / 2, abs=1e-5)


def test_an_image_of_the_memory_is_at_no_distance_from_it(images):
    zero, model = build(), build(shots=2)
    model.set_references(images[:2])
    for known, unknown in zip(*((m / 2 - n) for m, n in ((zero.predict(i)[1], model.predict(i)[1])
                                                         for i in (images[:2], images[2:4]))), strict=True):
        assert known.item() == pytest.approx(0, abs=1e-5) and unknown < -1e-4
    assert torch.isfinite(model.predict(images[:2])[0]).all()  # scores of 0 have a harmonic mean, too


@pytest.mark.parametrize("shots", [0, 2])
def test_scores_belong_to_their_images_whatever_the_batch(shots, images):
    model = build(shots=shots)
    if shots:
        model.set_references(images[3:])
    maps, scores = model.predict(images[:3])
    assert maps.shape == (3, 64, 64) and scores.shape == (3,) and len(set(scores.tolist())) == 3
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model.predict(images[order])[1], scores[order], atol=1e-5, rtol=0)
    alone = torch.cat([model.predict(i[None])[0] for i in images[:3]])
    torch.testing.assert_close(alone, maps, atol=1e-5, rtol=0)


def test_clip_sees_its_own_size_and_maps_have_that_of_the_image(images):
    model = build()
    large = F.interpolate(images, (96, 96), mode="bilinear")
    maps, scores = model.predict(large)
    small = F.interpolate(large, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    assert maps.shape == (5, 96, 96) and torch.equal(scores, model.predict(small)[1])


# ------------------------------------------------------------------------------------------------------------ sentences
def test_each_state_weighs_the_same_however_many_findings_it_names():
    model = build()
    states = [["a normal brain"], ["a healthy brain", "a healthy head", "a healthy mass"]]
    model.set_classes([states, [["an abnormal brain"]]])
    with torch.inference_mode():
        each = {s: F.normalize(model.clip.encode_text(open_clip.tokenize([s]))[0], dim=0) for s in sum(states, [])}
    mean = (each["a normal brain"] + sum(each[s] for s in states[1]) / 3) / 2
    torch.testing.assert_close(model.text[0], mean / mean.norm(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("words", wc.WORDS)
def test_sentences_have_the_stated_numbers_and_fit_into_clip(words):
    def counts(*how):
        return [sum(map(len, states)) for states in wc.sentences(words, *how)]

    assert counts("medical", "named") == [144, 272] and counts("medical", "none") == [64, 32]
    assert counts("original", "named") == counts("original", "none") == [154, 88]
    texts = [s for how in ("medical", "original") for states in wc.sentences(words, how, "named") for x in states
             for s in x]
    assert len(set(texts)) == len(texts) and not any("{" in s or "  " in s for s in texts)
    assert (open_clip.tokenize(texts) > 0).sum(dim=1).max() <= 27
    modality, organs, findings = wc.WORDS[words]
    neutral = [s for states in wc.sentences(words, "medical", "none") for x in states for s in x]
    assert not any(f in s for s in neutral for f in findings) and all(any(o in s for o in organs) for s in neutral)


def test_sentences_read_as_stated():
    normal, anomalous = wc.sentences("brain", "medical", "named")
    assert normal[0][:3] == ["axial FLAIR MRI slice of the normal brain", "axial FLAIR MRI slice of the normal head",
                             "an axial FLAIR MRI slice of a normal brain"]
    assert "a noisy axial FLAIR MRI slice of the head with signs of edema" in anomalous[4]
    assert wc.sentences("liver", "original", "named")[1][0][:2] == ["a cropped photo of a damaged liver.",
                                                                    "a cropped photo of the damaged liver."]


@pytest.mark.parametrize("data, words", [("brain", "brain"), ("data/Brain_AD", "brain"), ("/x/Retina_RESC_AD", "resc"),
                                         ("chest-rsna/", "chest"), ("/my/images", "generic"), ("phantom", "phantom")])
def test_words_follow_the_benchmark(data, words):
    assert wc.benchmark_words(data) == words and set(wc.WORDS) == {*common.NAMES, "generic"}


# ------------------------------------------------------------------------------------------------- a run, and mistakes
def run_winclip(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["winclip.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "methods/winclip.py"), run_name="__main__")


def test_the_seed_draws_the_shots_from_the_training_images(phantom, tmp_path):
    found = {}
    for seed, shots in [(0, 4), (0, 2), (1, 4)]:
        out = tmp_path / str(shots)
        run_winclip("--root", phantom, "--out", out, "--device", "cpu", "--maps", 0, *SHORT, "--seed", seed, "--shots",
                    shots)
        folder = out / f"phantom/winclip/seed{seed}"
        found[seed, shots] = json.loads((folder / "results.json").read_text())["notes"]["references"]
        kept = torch.load(folder / "model.pt", weights_only=True)["state"]
        assert {k: len(v) for k, v in kept.items()} == dict(text=2, memory1=shots * 16, memory2=shots * 9,
                                                            memory3=shots * 4)
    assert all(len(set(v)) == shots and all(p.startswith("train/good") for p in v) for (_, shots), v in found.items())
    assert found[0, 4][:2] == found[0, 2] and set(found[0, 4]) != set(found[1, 4])


def test_a_kept_model_gives_the_same_scores_when_it_is_loaded_from_python(phantom, tmp_path, images):
    run_winclip("--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 0, *SHORT, "--shots", 2)
    folder = tmp_path / "phantom/winclip/seed0"
    kept = torch.load(folder / "model.pt", weights_only=True)
    model = wc.build_model(wc.Args(**kept["args"]))
    model.load_state_dict(kept["state"], strict=False)
    test = common.load_benchmark(wc.Args(root=str(phantom), image_size=64))[2]
    with open(folder / "scores.csv", newline="") as f:
        expected = torch.tensor([float(row["score"]) for row in csv.DictReader(f)])
    torch.testing.assert_close(model.predict(test.batch(range(len(test)), "cpu"))[1], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("arguments, notes", [
    ([], dict(words="phantom", sentences=[64, 32])),
    (["--words", "chest", "--findings", "named"], dict(words="chest", sentences=[144, 272])),
    (["--prompts", "original"], dict(words="phantom", sentences=[154, 88]))])
def test_notes_say_what_was_used_and_a_checkpoint_keeps_its_own_sentences(arguments, notes, phantom, tmp_path):
    run_winclip("--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 0, *SHORT, *arguments)
    first = json.loads((tmp_path / "phantom/winclip/seed0/results.json").read_text())
    assert first["notes"] == notes
    assert first["metrics"]["pixel_auroc"] is not None and first["parameters"]["trained"] == 0
    run_winclip("--root", phantom, "--out", tmp_path / "again", "--device", "cpu", "--maps", 0, "--checkpoint",
                tmp_path / "phantom/winclip/seed0/model.pt")
    again = json.loads((tmp_path / "again/phantom/winclip/seed0/results.json").read_text())
    assert again["metrics"] == first["metrics"] and again["notes"] == first["notes"]


@pytest.mark.parametrize("arguments, words", [(["--shots", 13], ["--shots 13", "12 normal training images"]),
                                              (["--shots", -1], ["--shots -1"]),
                                              (["--clip-size", 32], ["--clip-size 32", "3 x 3 patches"]),
                                              (["--model", "ViT-X"], ["--model ViT-X"])])
def test_arguments_that_cannot_be_end_with_one_line(arguments, words, phantom, tmp_path):
    with pytest.raises(common.Error) as error:
        run_winclip("--root", phantom, "--out", tmp_path, "--device", "cpu", *SHORT, *arguments)
    assert "\n" not in str(error.value) and all(w in str(error.value) for w in words)
