"""clip_recon without CLIP's weights: its paths through open_clip, what learns and what must not, the augmentation."""

import csv
import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script, run_script
from scipy.ndimage import gaussian_filter
from torch.utils.flop_counter import FlopCounterMode

import common

cr = load_script("methods/clip_recon.py")


def build(**changes):
    """A tiny model at 64 pixels: 16 patches, 4 words each; the same one at each call."""
    torch.manual_seed(0)
    return cr.build_model(cr.Args(**dict(model="tiny", clip_weights="none", image_size=64, prompt_tokens=4,
                                         weights="none") | changes))


def step(model, image, where=slice(None)):
    """The loss of one training step, after its backward pass."""
    loss = sum(d.mean() for d in model.distances(model.image_features(image), where))
    loss.backward()
    return loss.item()


@pytest.fixture(scope="module")
def images():
    """Smooth random images (4, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (64, 64), mode="bilinear")


@pytest.fixture(scope="module")
def clip():
    """A tiny CLIP with all its token embeddings, at 64 pixels."""
    return common.load_clip("tiny", "none", 64)


def frozen_clip(**text):
    """An open_clip.CLIP with a small image encoder and this text encoder."""
    torch.manual_seed(0)
    vision = dict(image_size=32, **common.TINY_CLIP["vision_cfg"])
    return open_clip.CLIP(embed_dim=96, vision_cfg=vision, text_cfg=text).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------------- the encoders
@pytest.mark.parametrize("width, heads", [(128, 4), (640, 10)])
def test_the_text_loop_without_padding_equals_encode_text(width, heads):
    clip = frozen_clip(vocab_size=500, layers=2, width=width, heads=heads)
    words = torch.randint(1, 498, (3, 7), generator=torch.Generator().manual_seed(0))
    for count in (1, 7):
        ids = torch.zeros(3, 77, dtype=int)  # padded; the largest id, at the end of the text, is where CLIP reads
        ids[:, 0], ids[:, 1 : 1 + count], ids[:, 1 + count] = 498, words[:, :count], 499
        found = cr.text_features(clip, clip.token_embedding(ids[:, : count + 2]), [2])[0]
        torch.testing.assert_close(found, clip.encode_text(ids), atol=1e-5, rtol=0)


def test_prompts_between_start_and_end_equal_the_padded_77_at_each_depth(clip, images):
    model = build()
    seen, spoken = [], cr.text_features
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cr, "text_features", lambda *a: seen.append((a[1], spoken(*a))) or seen[-1][1])
        model.distances(model.image_features(images[:1]))
        tokens, found = seen[0]
        assert tokens.shape == (16, 4 + 2, 128)
        start, end = clip.token_embedding(torch.tensor([49406, 49407]))
        assert (tokens[:, 0] == start).all() and (tokens[:, -1] == end).all()
        padded = torch.cat([tokens, torch.randn(16, 77 - 6, 128)], dim=1) + clip.positional_embedding
        depths = clip.transformer.forward_intermediates(padded, clip.attn_mask)[1]
    assert len(found) == len(depths) == 4
    for p, x in zip(found, depths, strict=True):
        torch.testing.assert_close(p, clip.ln_final(x[:, 5]) @ clip.text_projection, atol=1e-5, rtol=0)


def test_words_are_prompt_plus_adapter_and_the_bare_frame_has_no_others(images):
    model = build(frame="bare")
    seen = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cr, "text_features", lambda clip, tokens, *_: seen.append(tokens) or [tokens[:, -1]] * 4)
        features = model.image_features(images)
        model.distances(features)
        pi = model.adapter(features[3] / features[3].norm(dim=-1, keepdim=True))
    words = seen[0].view(4, 16, 4, 128)  # (B, P, M, D)
    for b, p, m in [(0, 0, 0), (1, 7, 3), (3, 15, 2)]:
        torch.testing.assert_close(words[b, p, m], model.prompts[p, m] + pi[b, p])


def test_image_features_equal_the_normed_and_projected_block_outputs(clip, images):
    outputs = []
    hooks = [b.register_forward_hook(lambda _, __, x: outputs.append(x)) for b in clip.visual.transformer.resblocks]
    with torch.no_grad():
        found = cr.image_features(clip, images, [1, 2, 4])
        for hook in hooks:
            hook.remove()
        normalized = (images - torch.tensor(clip.mean).view(3, 1, 1)) / torch.tensor(clip.std).view(3, 1, 1)
        whole = clip.encode_image(normalized)
    expected = [clip.visual.ln_post(outputs[b - 1]) @ clip.visual.proj for b in (1, 2, 4)]
    for f, x in zip(found, expected, strict=True):
        assert f.shape == (4, 16, 128)
        torch.testing.assert_close(f, x[:, 1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(expected[2][:, 0], whole, atol=1e-5, rtol=0)  # the class token is what was left out


def test_stages_are_quarters_of_both_encoders():
    with torch.device("meta"):
        published = cr.build_model(cr.Args(clip_weights="none"))
    assert published.image_blocks == published.text_blocks == [3, 6, 9, 12]
    assert build().image_blocks == [1, 2, 3, 4] and build(layers=(2, 4)).text_blocks == [2, 4]


def test_conv_stages_are_pooled_to_one_grid_and_keep_their_cosines():
    encoder = cr.CNNEncoder("mobilenet_v2", "none", (4, 4), 128)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, raw = encoder(image), list(encoder.cnn(common.normalize(image)).values())
    assert [r.shape[1:] for r in raw] == [(24, 16, 16), (32, 8, 8), (96, 4, 4), (320, 2, 2)]
    patches = raw[0].unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean((3, 5)).flatten(2).mT  # (2, 16, 24)
    patches = patches - patches.mean(dim=2, keepdim=True)
    expected = F.cosine_similarity(patches[:, :1], patches[:, 1:], dim=-1)
    torch.testing.assert_close(F.cosine_similarity(found[0][:, :1], found[0][:, 1:], dim=-1), expected,
                               atol=1e-5, rtol=0)
    assert all(f.shape == (2, 16, 128) for f in found)
    again = cr.CNNEncoder("mobilenet_v2", "none", (4, 4), 128)
    assert torch.equal(encoder.map3, again.map3) and encoder.map3.shape == (320, 128)


# ------------------------------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize("backbone", ["clip", "mobilenet_v2"])
def test_training_moves_prompts_and_adapter_and_leaves_the_encoders_bit_identical(backbone, images):
    model = build(backbone=backbone)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"prompts", "adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias"}
    before = {n: p.clone() for n, p in trained.items()}
    encoders = [m for m in model.modules() if getattr(m, "frozen", False)]
    frozen = [{k: v.clone() for k, v in m.state_dict().items()} for m in encoders]
    assert len(encoders) == (1 if backbone == "clip" else 2)
    assert model.prompts.std().item() == pytest.approx(0.02, rel=0.05)  # the blank words at the start
    optimizer = torch.optim.AdamW(trained.values(), 1e-2)
    losses = []
    for _ in range(12):
        model.train()
        optimizer.zero_grad()
        losses.append(step(model, images))
        optimizer.step()
    for m, kept in zip(encoders, frozen, strict=True):
        assert all(torch.equal(v, kept[k]) for k, v in m.state_dict().items())
    assert not any(m.training for encoder in encoders for m in encoder.modules())
    assert all(p.grad is None for encoder in encoders for p in encoder.parameters())
    assert (model.prompts.grad.abs().amax(dim=2) > 0).all()  # every word of every location
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    assert all((p != before[n]).any() for n, p in trained.items())
    assert losses[-1] < losses[0] - 0.3


def test_a_part_of_the_locations_gives_their_distances_and_gradients_only(images):
    model, where = build(), torch.tensor([9, 2, 5])
    features = model.image_features(images)
    with torch.no_grad():
        for part, whole in zip(model.distances(features, where), model.distances(features), strict=True):
            torch.testing.assert_close(part, whole[:, where], atol=1e-6, rtol=0)
    step(model, images, where)
    moved = (model.prompts.grad != 0).flatten(1).any(dim=1).nonzero().flatten()
    assert moved.tolist() == [2, 5, 9]


@pytest.mark.parametrize("layers", [(1, 2, 3, 4), (3,)])
@pytest.mark.parametrize("backbone", ["clip", "mobilenet_v2"])
def test_the_loss_starts_near_the_number_of_layers_and_distances_lie_in_0_to_2(backbone, layers, images):
    model = build(backbone=backbone, layers=layers)
    with torch.no_grad():
        distances = model.distances(model.image_features(images))
    assert len(distances) == len(layers)
    assert sum(d.mean() for d in distances).item() == pytest.approx(len(layers), rel=0.15)  # unrelated: cosines near 0
    assert all(d.min() >= -1e-6 and d.max() <= 2 + 1e-6 for d in distances)


def test_opposite_features_are_at_distance_2_and_equal_ones_at_0(images):
    model = build(layers=(2,))
    features = model.image_features(images)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for sign, expected in ((3, 0), (-0.5, 2)):
            patch.setattr(cr, "text_features", lambda *_, sign=sign: [sign * features[1].flatten(0, 1)])
            distance = model.distances(features)[0]
            torch.testing.assert_close(distance, torch.full_like(distance, expected), atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------- other readings of the thesis
def encoder_input(model, features):
    """What the text encoder gets: (B, P, T, W); its answer has no meaning."""
    seen = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cr, "text_features", lambda clip, tokens, blocks: seen.append(tokens) or [tokens[:, -1]] * 4)
        model.distances(features)
    return seen[0].unflatten(0, (-1, 16))


def test_pi_is_added_to_each_word_or_appended_as_one_more(images):
    added, appended = build(), build(join="append")
    assert torch.equal(added.prompts, appended.prompts)
    features = added.image_features(images)
    with torch.no_grad():
        pi = added.adapter(F.normalize(features[3], dim=-1))
    sos, eot = added.clip.token_embedding.weight
    words = encoder_input(added, features)
    assert words.shape == (4, 16, 1 + 4 + 1, 128)
    torch.testing.assert_close(words[:, :, 1:5], added.prompts + pi[:, :, None])
    words = encoder_input(appended, features)
    assert words.shape == (4, 16, 1 + 4 + 1 + 1, 128)
    assert torch.equal(words[2, 7, 0], sos) and torch.equal(words[2, 7, 6], eot)
    assert torch.equal(words[:, :, 1:5], appended.prompts.expand(4, -1, -1, -1))
    torch.testing.assert_close(words[:, :, 5], pi)


@pytest.mark.parametrize("join", ["add", "append"])
@pytest.mark.parametrize("modules, parts", [("both", {"prompts", "adapter"}), ("prompts", {"prompts"}),
                                            ("adapter", {"adapter"})])
def test_modules_train_what_they_say_and_nothing_else(modules, parts, join, images):
    sizes = dict(prompts=16 * 4 * 128, adapter=128 * 8 + 8 + 8 * 128 + 128)
    model = build(modules=modules, join=join)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == sum(sizes[part] for part in parts)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(step(model, images))
        optimizer.step()
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == parts
    assert losses[-1] < losses[0]


def test_prompts_alone_are_the_same_words_for_every_image(images):
    model, both = build(modules="prompts", frame="bare"), build(frame="bare")
    assert model.adapter is None and torch.equal(model.prompts, both.prompts)
    features = model.image_features(images)
    assert torch.equal(encoder_input(model, features), model.prompts[None])
    with torch.no_grad():
        distances = model.distances(features)
        for layer in both.adapter[2].parameters():
            layer.zero_()  # pi = 0
        for ours, expected in zip(distances, both.distances(features), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_the_adapter_alone_has_the_words_that_the_seed_draws(images):
    model, both = build(modules="adapter"), build()
    assert torch.equal(model.prompts, both.prompts) and not model.prompts.requires_grad
    torch.testing.assert_close(model.predict(images), both.predict(images))


def test_a_layer_is_compared_at_each_position_or_as_one_vector():
    """Two positions of two channels: cosines 1 and 0 at the positions; (3 * 1 + 0) / (sqrt(10) * sqrt(5)) together."""
    model = build(layers=(1,))
    features = 4 * [torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cr.ClipRecon, "words", lambda *_: torch.zeros(1, 2, 1, 2))
        patch.setattr(cr, "text_features", lambda *_: [torch.tensor([[1.0, 0.0], [2.0, 0.0]])])
        torch.testing.assert_close(model.distances(features)[0], torch.tensor([[0.0, 1.0]]))
        torch.testing.assert_close(model.distances(features, whole=True)[0], torch.tensor([1 - 3 / 50**0.5]))


@pytest.mark.parametrize("modules", ["both", "prompts"])
def test_the_loss_by_layer_has_one_value_for_each_image_and_layer(modules, images):
    model = build(modules=modules)
    with torch.no_grad():
        features = model.image_features(images)
        distances = model.distances(features, torch.tensor([3, 8]), whole=True)
        assert [d.shape for d in distances] == 4 * [(4,)]
        alone = model.distances([f[2:3] for f in features], torch.tensor([3, 8]), whole=True)
    for whole, one in zip(distances, alone, strict=True):
        torch.testing.assert_close(whole[2:3], one, atol=1e-6, rtol=0)


def test_first_blocks_are_1_to_4_and_the_adapter_reads_the_last(images):
    with torch.device("meta"):
        published = cr.build_model(cr.Args(clip_weights="none", blocks="first", layers=(2, 3)))
    assert published.image_blocks == [1, 2, 3, 4, 12] and published.text_blocks == [2, 3]
    with pytest.MonkeyPatch.context() as patch:
        deep = {k: v | dict(layers=6) if isinstance(v, dict) else v for k, v in common.TINY_CLIP.items()}
        patch.setattr(common, "TINY_CLIP", deep)
        model = build(blocks="first", da_levels=0)
        last, seen = [], []
        model.clip.visual.transformer.resblocks[5].register_forward_hook(lambda _, __, x: last.append(x))
        features = model.image_features(images)
        patch.setattr(model.adapter, "forward", lambda x: seen.append(x) or torch.zeros(4, 16, 128))
        with torch.no_grad():
            distances = model.distances(features)
            expected = model.clip.visual.ln_post(last[0][:, 1:]) @ model.clip.visual.proj
            spoken = cr.text_features(model.clip, model.words(features[4], model.prompts).flatten(0, 1), [1, 2, 3, 4])
    assert len(features) == 5 and len(distances) == 4
    torch.testing.assert_close(seen[0], F.normalize(expected, dim=-1), atol=1e-5, rtol=0)
    for f, p, d in zip(features[:4], spoken, distances, strict=True):
        torch.testing.assert_close(d, 1 - F.cosine_similarity(f, p.unflatten(0, (4, 16)), dim=-1), atol=1e-5, rtol=0)


def test_the_augmentation_halves_its_sum_or_cuts_it_off():
    image = torch.tensor(IMAGE)[None, None] / 255
    low = torch.tensor(PYR_UP)
    found = cr.enhance(image, 1, "saturate")[0, 0]
    torch.testing.assert_close(found, (image[0, 0] + low).clamp(max=1), atol=1e-6, rtol=0)
    assert 0 < (found == 1).float().mean() < 1
    constant = torch.full((1, 3, 64, 64), 0.3)
    torch.testing.assert_close(cr.enhance(constant, 3, "saturate"), 2 * constant, atol=1e-6, rtol=0)


def test_the_sum_reaches_the_encoder_and_0_levels_switch_it_off(images):
    plain, saturated = build(da_levels=0), build(da_sum="saturate")
    expected = plain.predict(cr.enhance(images, 3, "saturate"))
    torch.testing.assert_close(saturated.predict(images), expected, atol=1e-5, rtol=0)
    assert torch.equal(build(da_levels=0, da_sum="saturate").predict(images)[0], plain.predict(images)[0])


def test_the_map_is_smoothed_before_its_maximum_is_taken(images):
    sharp, smooth = build().predict(images)[0], build(smooth_sigma=4).predict(images)
    expected = torch.from_numpy(gaussian_filter(sharp.numpy(), [0, 4, 4]))
    torch.testing.assert_close(smooth[0], expected, atol=1e-5, rtol=0)
    assert torch.equal(smooth[1], smooth[0].amax(dim=(1, 2))) and not torch.allclose(smooth[0], sharp, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- scoring
@pytest.mark.parametrize("backbone", ["clip", "mobilenet_v2"])
def test_scores_belong_to_their_images_whatever_the_batch(backbone, images):
    model = build(backbone=backbone)
    maps, scores = model.predict(images)
    assert maps.shape == (4, 64, 64) and torch.equal(scores, maps.amax(dim=(1, 2))) and len(set(scores.tolist())) == 4
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model.predict(images[order])[1], scores[order], atol=1e-5, rtol=0)
    alone = torch.cat([model.predict(i[None])[0] for i in images])
    torch.testing.assert_close(alone, maps, atol=1e-5, rtol=0)


def test_the_map_is_the_sum_of_the_enlarged_layers(images):
    model = build()
    with torch.no_grad():
        layers = model.distances(model.image_features(images))
        enlarged = [F.interpolate(d.view(4, 1, 4, 4), (64, 64), mode="bilinear", align_corners=False) for d in layers]
        torch.testing.assert_close(model.predict(images)[0], sum(enlarged)[:, 0], atol=1e-5, rtol=0)
        one = build(layers=(2,))  # the same prompts and adapter; it uses the second layer alone
        torch.testing.assert_close(one.predict(images)[0], enlarged[1][:, 0], atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------- augmentation
# An image of 7 x 8 values of 0 to 255, and what OpenCV 5.0.0 makes of it divided by 255 (float32): pyrDown, then pyrUp.
IMAGE = [[121, 131, 193, 243, 8, 36, 210, 242], [63, 79, 222, 108, 69, 211, 65, 104],
         [164, 140, 21, 7, 221, 192, 214, 137], [209, 84, 115, 201, 31, 77, 31, 116],
         [250, 34, 98, 103, 231, 52, 128, 67], [5, 192, 15, 71, 127, 124, 29, 251],
         [191, 246, 23, 185, 75, 138, 236, 70]]
PYR_DOWN = [[0.4424633, 0.5605392, 0.4585171, 0.549663], [0.4816789, 0.4307904, 0.4844515, 0.514997],
            [0.492065, 0.4029565, 0.4575674, 0.4076593], [0.5463235, 0.4012561, 0.4466606, 0.5085785]]
PYR_UP = [[0.4712259, 0.4901846, 0.510735, 0.4965514, 0.4823879, 0.5029987, 0.5314971, 0.5409965],
          [0.4704695, 0.4788679, 0.4884431, 0.4835746, 0.4821126, 0.5019072, 0.5247243, 0.53233],
          [0.4694389, 0.4608025, 0.4521379, 0.4606895, 0.4770673, 0.4918811, 0.5024051, 0.5059131],
          [0.4693723, 0.4518727, 0.4323903, 0.4439415, 0.4630323, 0.4661688, 0.4625384, 0.4613281],
          [0.4747176, 0.4518861, 0.4243066, 0.4328939, 0.4496627, 0.446628, 0.4369256, 0.4336914],
          [0.4899223, 0.4606503, 0.4229932, 0.4271101, 0.4466136, 0.4551165, 0.4573683, 0.4581189],
          [0.5050231, 0.4705049, 0.4245471, 0.4247463, 0.448197, 0.4719937, 0.4899711, 0.4959636]]


def test_the_pyramid_equals_opencv():
    image = torch.tensor(IMAGE)[None, None] / 255
    other = image.flip(3)  # a second channel, which must not mix with the first
    low = cr.down(torch.cat([image, other], dim=1))
    torch.testing.assert_close(low[0, 0], torch.tensor(PYR_DOWN), atol=1e-6, rtol=0)
    torch.testing.assert_close(cr.up(low, (7, 8))[0, 0], torch.tensor(PYR_UP), atol=1e-6, rtol=0)
    torch.testing.assert_close(low[:, 1:], cr.down(other), atol=1e-6, rtol=0)
    torch.testing.assert_close(cr.enhance(image, 1)[0, 0], (image[0, 0] + torch.tensor(PYR_UP)) / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [64, 57, 256])
def test_the_augmentation_keeps_constants_and_the_range(size):
    for value in (0.0, 0.3, 1.0):
        constant = torch.full((1, 3, size, size), value)
        torch.testing.assert_close(cr.enhance(constant, 3), constant, atol=1e-6, rtol=0)
    binary = torch.randint(0, 2, (2, 3, size, size), generator=torch.Generator().manual_seed(0)).float()
    for levels in (1, 2, 3):
        found = cr.enhance(binary, levels)
        assert found.shape == binary.shape and found.min() >= 0 and found.max() <= 1
        assert 0.1 < found.std() < binary.std()
    assert torch.equal(cr.enhance(binary, 0), binary)


def test_the_augmentation_halves_the_finest_detail():
    checkerboard = torch.arange(64)[:, None].add(torch.arange(64)).remainder(2).float().expand(1, 3, 64, 64)
    inside = (slice(None), slice(None), slice(16, 48), slice(16, 48))
    expected = (checkerboard + 0.5) / 2
    torch.testing.assert_close(cr.enhance(checkerboard, 3)[inside], expected[inside], atol=1e-5, rtol=0)


def test_the_augmentation_belongs_to_training_and_testing(images):
    plain, enhanced = build(da_levels=0), build()
    torch.testing.assert_close(plain.predict(cr.enhance(images, 3))[0], enhanced.predict(images)[0], atol=1e-6, rtol=0)
    assert not torch.allclose(plain.predict(images)[0], enhanced.predict(images)[0], atol=1e-3)


# ------------------------------------------------------------------------------------------------- weights and mistakes
def test_a_checkpoint_for_240_pixels_loads_at_256_with_interpolated_positions(tmp_path):
    saved = common.load_clip("tiny", "none", 240)
    torch.manual_seed(1)
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in saved.state_dict().items()}
    file = tmp_path / "clip.pt"
    torch.save(dict(state_dict=state), file)
    found = common.load_clip("tiny", str(file), 256)
    key = "visual.positional_embedding"
    assert all(torch.equal(v, state[k]) for k, v in found.state_dict().items() if k != key)
    assert found.visual.positional_embedding.shape == (1 + 256, 128)
    grid = state[key][1:].T.view(1, 128, 15, 15)
    expected = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(found.visual.positional_embedding[1:], expected[0].flatten(1).T)
    assert torch.equal(found.visual.positional_embedding[0], state[key][0])
    used = found.weights_used
    assert used["name"] == "CLIP tiny" and str(file) in used["weights"] and used["trained"]
    assert used["sha256"] == common.sha256(file)
    assert not any(p.requires_grad for p in found.parameters()) and not found.train().visual.training


def test_untrained_weights_do_not_depend_on_the_seed_nor_change_it():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = common.load_clip("tiny", "none", 64)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    again = common.load_clip("tiny", "none", 64).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in first.state_dict().items())
    assert first.weights_used["weights"] == "none" and not first.weights_used["trained"]


@pytest.mark.parametrize("damage", ["another model", "text", "our own checkpoint", "truncated"])
def test_a_file_that_does_not_fit_ends_with_one_line(damage, clip, tmp_path):
    file = tmp_path / "clip.pt"
    if damage == "another model":
        torch.save(frozen_clip(vocab_size=500, layers=2, width=96, heads=2).state_dict(), file)
    elif damage == "text":
        file.write_text("not weights")
    elif damage == "our own checkpoint":
        torch.save(dict(method="clip_recon", args={}, state={}), file)
    else:
        torch.save(clip.state_dict(), file)
        file.write_bytes(file.read_bytes()[:100000])
    with pytest.raises(common.Error) as error:
        common.load_clip("tiny", str(file), 64)
    assert "\n" not in str(error.value) and str(file) in str(error.value) and "tiny" in str(error.value)


@pytest.mark.parametrize("changes, words", [
    (dict(model="ViT-X"), ["--model ViT-X", "ViT-B-16-plus-240"]),
    (dict(model="RN50"), ["--model RN50", "ViT"]),
    (dict(model="coca_ViT-B-32"), ["--model coca_ViT-B-32", "ViT"]),
    (dict(clip_weights="laion400m_e32"), ["laion400m_e32", "none"]),  # tiny has no published weights
    (dict(model="ViT-B-16", clip_weights="laion"), ["laion", "laion400m_e32", "openai", "FILE"]),
    (dict(backbone="vgg16"), ["--backbone", "resnet18"]),
    (dict(layers=(0, 1)), ["--layers", "at most 4"]),
    (dict(layers=()), ["--layers", "1 2 3 4"]),
    (dict(prompt_tokens=76), ["--prompt-tokens", "75"]),
    (dict(prompt_tokens=75, join="append"), ["--prompt-tokens", "74"]),
    (dict(smooth_sigma=-1), ["--smooth-sigma"]),
    (dict(smooth_sigma=17), ["--smooth-sigma"]),
    (dict(patches_per_step=0), ["--patches-per-step"]),
    (dict(adapter_reduction=0.0), ["--adapter-reduction"]),
    (dict(da_levels=7), ["--da-levels", "64"]),
    (dict(da_levels=-1), ["--da-levels"]),
    (dict(image_size=17, da_levels=0), ["image size 17", "16"]),
])
def test_arguments_that_cannot_be_end_with_one_line(changes, words):
    with pytest.raises(common.Error) as error:
        common.check_ranges(cr.Args(**changes))  # as `common.command_line` does
        build(**changes)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Where open_clip keeps the weights of the default model; tiny is published like that, and there is no network."""
    entry = open_clip.get_pretrained_cfg("ViT-B-16-plus-240", common.CLIP_TAG)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: [common.CLIP_TAG])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: entry)
    monkeypatch.setenv("HOME", str(tmp_path))

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(open_clip.pretrained.urllib.request, "urlopen", no_network)
    return tmp_path / ".cache/clip" / Path(entry["url"]).name


def test_weights_that_are_not_available_end_with_the_ways_out(cache):
    with pytest.raises(common.Error) as error:
        common.load_clip("tiny", common.CLIP_TAG, 64)
    words = ["--clip-weights laion400m_e32", "no network", "FILE", "none"]
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_auto_falls_back_to_untrained_weights_with_a_warning(cache, clip, capsys):
    found = common.load_clip("tiny", "auto", 64)
    assert found.weights_used == clip.weights_used
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in clip.state_dict().items())
    assert capsys.readouterr().out.startswith("warning: no CLIP weights laion400m_e32 of tiny")


def test_published_weights_are_taken_from_the_cache(cache, clip, monkeypatch):
    cache.parent.mkdir(parents=True)
    torch.save(clip.state_dict(), cache)
    entry = open_clip.get_pretrained_cfg("tiny", common.CLIP_TAG)
    sha256 = common.sha256(cache)
    renamed = cache.with_name(f"tiny-{sha256[:8]}.pt")  # open_clip checks the end of the name
    cache.rename(renamed)
    monkeypatch.setitem(entry, "url", entry["url"].replace(cache.name, renamed.name))
    for weights in (common.CLIP_TAG, "auto"):
        used = common.load_clip("tiny", weights, 64).weights_used
        assert str(renamed) in used["weights"] and used["sha256"] == sha256 and used["trained"]


# ------------------------------------------------------------------------------------------------- a run, and its costs
@pytest.mark.slow
def test_a_run_lowers_the_loss_on_the_phantom_and_keeps_only_what_it_trained(phantom, tmp_path):
    done = run_script("methods/clip_recon.py", "--root", phantom, "--out", tmp_path, "--device", "cpu",
                      "--image-size", 64, "--model", "tiny", "--clip-weights", "none", "--epochs", 6, "--lr", 1e-2,
                      "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "phantom/clip_recon/seed0"
    with open(folder / "log.csv", newline="") as f:
        losses = [float(row["loss"]) for row in csv.DictReader(f)]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    kept = torch.load(folder / "model.pt", weights_only=True)
    assert set(kept["state"]) == {"prompts", "adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias"}
    results = json.loads((folder / "results.json").read_text())
    assert results["parameters"]["trained"] == 16 * 16 * 128 + 128 * 8 + 8 + 8 * 128 + 128
    assert [w["name"] for w in kept["weights"]] == ["CLIP tiny"] and "CLIP tiny has UNTRAINED" in done.stdout


FLAGS = ["--join", "append", "--modules", "prompts", "--loss", "layer", "--blocks", "first", "--da-sum", "saturate",
         "--smooth-sigma", 1, "--patches-per-step", 8]


@pytest.mark.parametrize("flags", [  # the backbone's is in test_methods.py, too
    FLAGS, *(pytest.param(flags, marks=pytest.mark.long)
             for flags in ([], ["--backbone", "mobilenet_v2", "--weights", "none"]))])
@pytest.mark.slow
def test_a_kept_model_gives_the_same_scores_when_it_is_loaded_from_python(flags, phantom, tmp_path):
    done = run_script("methods/clip_recon.py", "--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 0,
                      "--image-size", 64, "--model", "tiny", "--clip-weights", "none", "--epochs", 2, "--lr", 1e-2,
                      "--prompt-tokens", 4, *flags)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "phantom/clip_recon/seed0"
    kept = torch.load(folder / "model.pt", weights_only=True)
    model = cr.build_model(cr.Args(**kept["args"]))
    model.load_state_dict(kept["state"], strict=False)
    test = common.load_benchmark(cr.Args(root=str(phantom), image_size=64))[2]
    with open(folder / "scores.csv", newline="") as f:
        expected = torch.tensor([float(row["score"]) for row in csv.DictReader(f)])
    torch.testing.assert_close(model.predict(test.batch(range(len(test)), "cpu"))[1], expected, atol=1e-5, rtol=0)


def test_the_published_model_has_the_stated_parameters_and_operations():
    with torch.device("meta"):
        model, image = cr.build_model(cr.Args(clip_weights="none")), torch.empty(1, 3, 256, 256)

        def counted(work):
            with FlopCounterMode(display=False) as counter:
                result = work()
            return result, counter.get_total_flops() / 1e12

        features, image_cost = counted(lambda: model.image_features(image))
        distances, text_cost = counted(lambda: model.distances(features))
        _, backward_cost = counted(lambda: sum(d.mean() for d in distances).backward())
    assert [f.shape for f in features] == 4 * [(1, 256, 640)] and [d.shape for d in distances] == 4 * [(1, 256)]
    assert model.prompts.numel() == 2_621_440 and sum(p.numel() for p in model.adapter.parameters()) == 51_880
    assert sum(p.numel() for p in model.clip.visual.parameters()) == pytest.approx(117.24e6, rel=1e-3)
    assert sum(p.numel() for p in model.clip.parameters()) == pytest.approx((117.24 + 91.16 - 31.62) * 1e6, rel=1e-3)
    assert image_cost == pytest.approx(0.063, rel=0.1)
    assert text_cost == pytest.approx(0.54, rel=0.1)
    assert backward_cost == pytest.approx(text_cost, rel=0.1)  # input gradients only: the encoder is frozen


def test_a_block_of_the_published_text_encoder_saves_the_stated_memory():
    clip = frozen_clip(vocab_size=500, layers=3, width=640, heads=10)
    own, saved = {p.untyped_storage().data_ptr() for p in clip.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randn(8, 18, 640, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cr.text_features(clip, tokens, [3])[0].sum().backward()
    assert sum(saved.values()) / 1024 / (8 * 18) / 3 * 12 == pytest.approx(304, rel=0.35)  # KiB in 12 blocks
