"""common.py: metrics against slow references, every accepted layout and image kind, every promised error line."""

import copy
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import decisions
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, same_state
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from torchvision.models import mobilenet_v2

import common


# -------------------------------------------------------------------------------------------------------------- metrics
def blobs(seed, n=24, size=96):
    """Masks (n, size, size), half of them empty, the others with overlapping rectangles; a signal that follows them."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), bool)
    for mask in masks[n // 2 :]:
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(0, size - 20, 2)
            mask[y : y + rng.integers(2, 18), x : x + rng.integers(2, 18)] = True
    return masks, rng.normal(size=masks.shape) + masks


def sorted_reference(maps, masks):
    """Every pixel sorted, every distinct score a threshold; regions by an explicit loop."""
    overlap, regions = np.zeros(maps.shape), 0
    for i, mask in enumerate(masks):
        labelled, count = ndimage.label(mask, np.ones((3, 3)))
        for k in range(1, count + 1):
            overlap[i][labelled == k] = 1 / (labelled == k).sum()
        regions += count
    scores, truth = maps.ravel(), masks.ravel()
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), scores.size - 1)  # of each group of equal scores
    fpr = np.append(0, np.cumsum(~truth[order])[last] / (~truth).sum())
    pro = np.append(0, np.cumsum(overlap.ravel()[order])[last] / regions)
    cut = fpr <= 0.3
    x, y = np.append(fpr[cut], 0.3), np.append(pro[cut], np.interp(0.3, fpr, pro))
    predicted = scores > scores.min() / 2 + scores.max() / 2
    return dict(
        dice_valid=None,
        pixel_auroc=roc_auc_score(truth, scores),
        pixel_ap=average_precision_score(truth, scores),
        aupro=np.trapezoid(y, x) / 0.3,
        dice=2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()),
    )


def streamed(maps, masks, batch=8):
    metrics = common.PixelMetrics(maps.size)
    for start in range(0, len(maps), batch):
        metrics.update(maps[start : start + batch], masks[start : start + batch])
    return metrics.compute()


SHAPES = {
    "normal": lambda z: z,
    "heavy tail, log-normal(5)": lambda z: np.exp(5 * z),
    "negative heavy tail": lambda z: -np.exp(-3 * z),
    "probabilities near 1": lambda z: 1 / (1 + np.exp(-6 - 2 * z)),
    "large offset": lambda z: 1000 + z / 100,
    "ties": lambda z: np.round(2 * z),
    "ties with a flat background": lambda z: np.maximum(z, 0),
    "huge": lambda z: 1e30 * z,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_pixel_metrics_equal_sorting_all_pixels(shape):
    masks, signal = blobs(0)
    maps = SHAPES[shape](signal).astype(np.float32)
    assert streamed(maps, masks) == pytest.approx(sorted_reference(maps, masks), abs=1e-9)


def test_pixel_metrics_hold_where_later_images_drift_and_crowd():
    masks, signal = blobs(0, 200)  # the second half has the anomalies
    maps = (1000 + signal / 100 + 8 * (np.arange(200) >= 100)[:, None, None]).astype(np.float32)
    assert streamed(maps, masks) == pytest.approx(sorted_reference(maps, masks), abs=1e-9)


def test_the_curve_has_the_area_of_the_metrics():
    masks, signal = blobs(0)
    metrics = common.PixelMetrics(signal.size)
    metrics.update(signal, masks)
    found = metrics.compute()
    fpr, tpr, pro = (np.array([point[k] for point in decisions.curve(metrics)]) for k in ("fpr", "tpr", "pro"))
    assert (fpr[0], tpr[0], pro[0]) == (0, 0, 0) and (fpr[-1], tpr[-1], pro[-1]) == (1, 1, pytest.approx(1))
    assert np.trapezoid(tpr, fpr) == pytest.approx(found["pixel_auroc"], abs=1e-3)


def test_the_best_threshold_and_the_dice_there_are_those_of_a_search_over_all_scores():
    masks, signal = blobs(0, 6)
    maps = np.round(4 * signal).astype(np.float32)

    def dice(threshold):
        predicted = maps >= threshold
        return 2 * (predicted & masks).sum() / (predicted.sum() + masks.sum())

    valid = common.PixelMetrics(maps.size)
    valid.update(maps, masks)
    valid.compute()
    every = {float(t): dice(t) for t in np.unique(maps)}
    assert every[valid.best] == max(every.values())
    for threshold in (valid.best, 0.3, -50, 50):
        test = common.PixelMetrics(maps.size, threshold)
        test.update(maps, masks)
        assert test.compute()["dice_valid"] == pytest.approx(dice(threshold), abs=1e-12)


def test_aupro_worked_out_by_hand():
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 3, 2:] = True  # two regions, of 1 and 2 pixels; 13 normal pixels
    maps = np.zeros((1, 4, 4), np.float32)
    maps[0, 0, 0], maps[0, 1, 1], maps[0, 3, 2] = 3, 2, 1
    # thresholds 3, 2, 1, 0: (fpr, pro) = (0, 1/2), (1/13, 1/2), (1/13, 3/4), (1, 1); then a line to fpr 0.3
    at_limit = 3 / 4 + (0.3 - 1 / 13) / (1 - 1 / 13) / 4
    area = 1 / 13 / 2 + (0.3 - 1 / 13) * (3 / 4 + at_limit) / 2
    assert streamed(maps, masks)["aupro"] == pytest.approx(area / 0.3, abs=1e-12)


def test_diagonal_neighbours_are_one_region():
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True
    metrics = common.PixelMetrics(16)
    metrics.update(np.zeros((1, 4, 4)), masks)
    assert metrics.regions == [0]


def test_perfect_maps_score_one_and_constant_maps_one_half():
    masks, _ = blobs(0)
    perfect, constant = streamed(masks.astype(np.float32), masks), streamed(np.full(masks.shape, 7.0), masks)
    assert perfect == pytest.approx(dict(pixel_auroc=1, pixel_ap=1, aupro=1, dice=1, dice_valid=None), abs=1e-12)
    assert constant["pixel_auroc"] == pytest.approx(0.5)
    assert constant["aupro"] == pytest.approx(0.15)  # the diagonal's area up to 0.3, divided by 0.3


@pytest.mark.parametrize("seed", range(10))
def test_rounding_takes_no_metric_of_perfect_maps_above_one(seed):
    masks = np.random.default_rng(seed).random((3, 20, 20)) < 0.15
    assert all(value is None or value <= 1 for value in streamed(masks.astype(np.float32), masks).values())


def test_increasing_functions_and_batch_size_change_nothing():
    masks, signal = blobs(0)
    maps = signal.astype(np.float32)
    one = streamed(maps, masks, batch=8)
    for other in (streamed(4 * maps, masks), streamed(maps, masks, batch=5), streamed(maps[::-1], masks[::-1])):
        assert other == pytest.approx(one, abs=1e-9)


def test_pixel_metrics_without_anomalous_pixels_are_none():
    assert set(streamed(np.zeros((2, 4, 4)), np.zeros((2, 4, 4), bool)).values()) == {None}


@pytest.mark.parametrize("maps, masks", [
    (np.zeros((2, 4, 4)), np.zeros((2, 5, 4))), (np.zeros((4, 4)), np.zeros((4, 4))),
    (np.full((1, 4, 4), np.nan), np.zeros((1, 4, 4)))])
def test_pixel_metrics_refuse_wrong_shapes_and_values_that_are_not_finite(maps, masks):
    with pytest.raises(ValueError):
        common.PixelMetrics(1000).update(maps, masks)


def test_image_metrics_equal_values_worked_out_by_hand():
    found = common.image_metrics([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    assert found == pytest.approx(dict(image_auroc=3 / 4, image_ap=(1 + 2 / 3) / 2))
    assert common.image_metrics([1, 1], [0.1, 0.2]) == dict(image_auroc=None, image_ap=None)


# -------------------------------------------------------------------------------------------------------------- loaders
def save(path, value=100, mode="L", size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def build(base, train, valid, test, masks=None, count=2):
    """Folders for good images (and, with {cls}, anomalous ones too); masks: (valid, test) folders or None."""
    for i in range(count + 1):
        save(base / train / f"n{i}.png", 10 * i)
    for j, split in enumerate((valid, test)):
        for cls in ("good", "Ungood"):
            for i in range(count):
                save(base / split.format(cls=cls) / f"{cls}{i}.png", 50 + i)
        if masks:
            for i in range(count):
                save(base / masks[j] / f"Ungood{i}.png", 255)


LAYOUTS = {
    "plain": ("Brain", "train/good", "valid/{cls}", "test/{cls}", None),
    "img and anomaly_mask": ("Brain_AD", "train/good/img", "valid/{cls}/img", "test/{cls}/img",
                             ("valid/Ungood/anomaly_mask", "test/Ungood/anomaly_mask")),
    "img and label": ("brain", "train/good", "valid/{cls}/img", "test/{cls}/img",
                      ("valid/Ungood/label", "test/Ungood/label")),
    "liver below Train/hist_DIY": ("Liver/Train/hist_DIY", "train/good/img", "valid/img/{cls}", "test/img/{cls}",
                                   ("valid/label/Ungood", "test/label/Ungood")),
    "resc nested": ("RESC", "Train/train/good", "Val/val/{cls}", "Test/test/{cls}",
                    ("Val/val_label/Ungood", "Test/test_label/Ungood")),
    "oct2017": ("Retina_OCT2017_AD", "train/good", "val/{cls}", "test/{cls}", None),
    "chest below itself": ("chest-rsna/Chest-RSNA", "train/good", "val/{cls}", "test/{cls}", None),
    "histo": ("camelyon16_256", "train/good", "valid/{cls}", "test/{cls}", None),
}
DATA = {"liver": "liver", "resc": "resc", "oct2017": "oct2017", "chest": "chest", "histo": "histo"}


def arguments(root, data, **changed):
    given = dict(data=data, root=str(root), image_size=32, limit=None, predict=None, white=65535, holdout=0.1)
    return SimpleNamespace(**given | changed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_is_read_by_benchmark_name(layout, tmp_path):
    folder, train, valid, test, masks = LAYOUTS[layout]
    build(tmp_path / folder, train, valid, test, masks)
    save(tmp_path / folder / train / ".DS_Store.png")
    (tmp_path / folder / train / "Thumbs.db").write_text("no image")
    name = DATA.get(layout.split()[0], "brain")
    splits = common.load_benchmark(arguments(tmp_path, name))
    assert [s.labels.tolist() for s in splits] == [[0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert [s.has_masks for s in splits] == [False, bool(masks), bool(masks)]
    if masks:
        assert splits[2].masks.mean(axis=(1, 2)).tolist() == [0, 0, 1, 1]


def test_masks_of_good_images_are_skipped(tmp_path):
    build(tmp_path / "b", "train/good", "valid/{cls}/img", "test/{cls}/img",
          ("valid/Ungood/anomaly_mask", "test/Ungood/anomaly_mask"))
    save(tmp_path / "b/test/good/anomaly_mask/good0.png", 255)
    assert common.load_benchmark(arguments(tmp_path, str(tmp_path / "b")))[2].masks[:2].max() == 0


def test_mvtec_layout_has_masks_by_suffix_and_holds_out_normal_images_for_valid(tmp_path):
    for i in range(3):
        save(tmp_path / f"m/train/good/{i:03}.png")
        save(tmp_path / f"m/test/good/{i:03}.png")
        for defect in ("crack", "cut"):
            save(tmp_path / f"m/test/{defect}/{i:03}.png")
            save(tmp_path / f"m/ground_truth/{defect}/{i:03}_mask.png", 255)
    train, valid, test = common.load_benchmark(arguments(tmp_path, str(tmp_path / "m")))
    assert valid.labels.tolist() == [0] and len(train) == 2  # held out
    assert common.load_benchmark(arguments(tmp_path, str(tmp_path / "m"), holdout=0))[1] is None
    assert test.labels.sum() == 6 and test.masks.any(axis=(1, 2)).sum() == 6


@pytest.mark.parametrize("suffix, mode, value, expected", [
    ("png", "L", 51, 51), ("png", "RGB", (51, 51, 51), 51), ("png", "RGBA", (51, 51, 51, 9), 51), ("bmp", "L", 51, 51),
    ("png", "LA", (51, 9), 51), ("png", "I;16", 51 * 257, 51), ("tiff", "I;16", 51 * 257, 51), ("jpg", "L", 51, 51),
    ("png", "1", 1, 255), ("tif", "RGB", (51, 51, 51), 51)])
def test_image_kinds_decode_to_the_same_grey(suffix, mode, value, expected, tmp_path):
    save(tmp_path / f"a.{suffix}", value, mode)
    array, size = common.decode(tmp_path / f"a.{suffix}", 8)
    assert array.shape == (3, 8, 8) and size == (20, 16) and set(array.ravel().tolist()) == {expected}


def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path):
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    array, size = common.decode(tmp_path / "a.png")
    assert size == (2, 3) and np.array_equal(array[0], np.rot90(np.asarray(image), -1))


def test_an_image_with_several_pages_is_refused(tmp_path):
    pages = [Image.new("L", (8, 8), value) for value in (10, 20)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    with pytest.raises(common.Error, match="2 pages"):
        common.decode(tmp_path / "a.tiff", 8)


def test_a_mask_drawn_in_alpha_marks_its_opaque_pixels(tmp_path):
    mask = np.full((4, 4, 4), 255, np.uint8)
    mask[..., 3] = np.eye(4) * 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert np.array_equal(common.decode_mask(tmp_path / "m.png", (4, 4), 4)[0], np.eye(4))


def test_palette_and_colour_images_keep_three_channels(tmp_path):
    image = Image.new("RGB", (20, 16), (200, 100, 50))
    image.save(tmp_path / "rgb.png")
    image.quantize(4).save(tmp_path / "palette.png")
    for name in ("rgb.png", "palette.png"):
        assert common.decode(tmp_path / name, 8)[0][:, 0, 0].tolist() == [200, 100, 50]


def test_images_are_reduced_with_antialiasing_and_masks_by_nearest_neighbour(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (16, 8))
    Image.fromarray(stripes).save(tmp_path / "a.png")
    assert abs(int(common.decode(tmp_path / "a.png", 8)[0][0, 4, 4]) - 128) < 20
    mask = common.decode_mask(tmp_path / "a.png", (16, 16), 8)
    assert mask.shape == (1, 8, 8) and (mask.all() or not mask.any())


def test_mask_threshold_is_a_tenth_of_full_scale(tmp_path):
    Image.fromarray(np.array([[0, 25, 26, 255]], np.uint8)).save(tmp_path / "m.png")
    assert common.decode_mask(tmp_path / "m.png", (4, 1), 4)[0, 0].tolist() == [0, 0, 1, 1]


def test_batches_hold_grey_and_coloured_images_with_three_channels_between_0_and_1(tmp_path):
    build(tmp_path / "b", "train/good", "valid/{cls}", "test/{cls}")
    save(tmp_path / "b/train/good/z.png", (200, 100, 50), "RGB")
    train = common.load_benchmark(arguments(tmp_path, str(tmp_path / "b")))[0]
    batch = torch.cat(list(train.batches(3)))
    assert batch.shape == (4, 3, 32, 32) and batch.dtype == torch.float32
    assert batch[1].unique().tolist() == pytest.approx([10 / 255])
    assert batch[3, :, 0, 0].tolist() == pytest.approx([200 / 255, 100 / 255, 50 / 255])


def test_the_decoded_cache_is_used_again_and_notices_a_changed_file(tmp_path, monkeypatch):
    build(tmp_path / "b", "train/good", "valid/{cls}", "test/{cls}")
    ask = arguments(tmp_path, str(tmp_path / "b"))
    first = common.load_benchmark(ask)[0]
    monkeypatch.chdir(tmp_path)
    for spelling in (tmp_path / "b", "b", "../" + tmp_path.name + "/b"):
        again = common.load_benchmark(arguments(tmp_path, str(spelling)))[0]
        assert os.path.samestat(*(os.fstat(split.file.fileno()) for split in (first, again)))
    save(tmp_path / "b/train/good/n0.png", 222)
    assert common.load_benchmark(ask)[0].images[0].max() == 222 and first.images[0].max() == 0
    assert not list((tmp_path / ".cache").glob(".tmp*"))


@pytest.mark.parametrize("harm", [lambda file: file.write_bytes(file.read_bytes()[:-1]), lambda file: file.unlink(),
                                  lambda file: file.write_text("text")])
def test_a_damaged_decoded_cache_is_made_again(harm, tmp_path):
    build(tmp_path / "b", "train/good", "valid/{cls}", "test/{cls}")
    ask = arguments(tmp_path, str(tmp_path / "b"))
    before = common.load_benchmark(ask)[0].images[:].tolist()
    for file in (tmp_path / ".cache").glob("*.decoded"):
        harm(file)
    assert common.load_benchmark(ask)[0].images[:].tolist() == before


@pytest.mark.parametrize("error, status", [
    (OSError(28, "No space left on device"), 2), (BrokenPipeError(), 141), (common.Error("x"), 2)])
def test_a_full_disk_and_a_reader_that_has_gone_are_no_tracebacks(error, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["padim.py"])
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    common.command_line(load_script("methods/padim.py").Args, "")
    with pytest.raises(SystemExit) as end:
        sys.excepthook(type(error), error, None)
    assert end.value.code == status and capsys.readouterr().err.count("\n") == (status == 2)


def test_a_benchmark_named_report_is_refused(tmp_path):
    build(tmp_path / "report", "train/good", "valid/{cls}", "test/{cls}")
    with pytest.raises(common.Error, match="rename the folder"):
        args = load_script("methods/padim.py").Args(data=str(tmp_path / "report"), root=str(tmp_path))
        common.Run(ROOT / "methods/padim.py", args)


def test_a_benchmark_has_one_run_folder_however_its_name_is_written(tmp_path):
    build(tmp_path / "brain", "train/good", "valid/{cls}", "test/{cls}")
    args = load_script("methods/padim.py").Args(data="Brain", root=str(tmp_path), out=str(tmp_path / "out"))
    assert common.Run(ROOT / "methods/padim.py", args).folder == tmp_path / "out/brain/padim/seed0"


def test_a_run_is_told_what_check_py_said_of_exactly_these_files(tmp_path, capsys):
    build(tmp_path / "b", "train/good", "valid/{cls}", "test/{cls}")
    given = dict(data=str(tmp_path / "b"), root=str(tmp_path), out=str(tmp_path / "out"))
    padim = load_script("methods/padim.py")

    def said():
        run = common.Run(ROOT / "methods/padim.py", padim.Args(**given))
        os.close(run.lock)
        return run.check, capsys.readouterr().out

    check, out = said()
    assert check is None and "check.py: not run on these files" in out
    images = common.list_benchmark(arguments(tmp_path, given["data"]))[2]
    record = tmp_path / f".cache/{images}.check.json"
    record.parent.mkdir(exist_ok=True)
    for damaged in ("[", '{"summary": null}'):
        record.write_text(damaged)
        assert said()[0] is None
    record.write_text('{"summary": "1 error", "checked": "today", "findings": []}')
    check, out = said()
    assert check["summary"] == "1 error" and "check.py: 1 error" in out
    record.write_text("{")
    assert said()[0] is None
    record.write_text('{"summary": "1 error"}')
    save(tmp_path / "b/train/good/n0.png", 222)
    assert said()[0] is None


def test_links_are_followed_and_hidden_folders_are_not(tmp_path):
    build(tmp_path / "a", "train/good", "valid/{cls}", "test/{cls}")
    (tmp_path / "b").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "b" / split).symlink_to(tmp_path / "a" / split)
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        save(tmp_path / "a/train/good" / hidden / "n0.png")
    assert len(common.load_benchmark(arguments(tmp_path, str(tmp_path / "b")))[0]) == 3


def test_limit_takes_at_most_n_images_of_each_split_and_class(tmp_path):
    build(tmp_path / "b", "train/good", "valid/{cls}", "test/{cls}", count=5)
    splits = common.load_benchmark(arguments(tmp_path, str(tmp_path / "b"), limit=2))
    assert [s.labels.tolist() for s in splits] == [[0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_shuffled_batches_are_a_permutation_that_the_seed_decides(tmp_path):
    build(tmp_path / "b", "train/good", "valid/{cls}", "test/{cls}", count=9)
    train = common.load_benchmark(arguments(tmp_path, str(tmp_path / "b")))[0]

    def order(seed):
        return torch.cat([b[:, 0, 0, 0] for b in train.batches(4, shuffle=seed)]).tolist()

    assert order((0, 1)) == order((0, 1)) != order((0, 2)) and sorted(order((0, 1))) == sorted(order(None))
    assert [len(b) for b in train.batches(4, drop_last=True)] == [4, 4]
    assert [len(b) for b in train.batches(64, drop_last=True)] == [10]


# ------------------------------------------------------------------------------------------------------ frozen features
def halves(image):
    """Two 'layers' of an image, (B, 2, h, w) and (B, 3)."""
    return [image[:, :2, ::2, ::2] + 1, image.mean(dim=(2, 3))]


@pytest.mark.parametrize("budget, said", [(16, "cached"), (0, "again each epoch")])
def test_frozen_features_come_back_whole_and_in_the_order_of_the_images(budget, said, tmp_path, capsys):
    build(tmp_path / "b", "train/good", "valid/{cls}", "test/{cls}", count=9)
    train = common.load_benchmark(arguments(tmp_path, str(tmp_path / "b")))[0]
    asked, run = [], SimpleNamespace(device=torch.device("cpu"), folder=tmp_path, notes={})
    features = common.Features(lambda image: asked.append(len(image)) or halves(image), train,
                               SimpleNamespace(cache_features=budget, batch_size=4), run)
    assert said in capsys.readouterr().out
    before = sum(asked)
    for shuffle in ((0, 1), (0, 2), None):
        found = list(features.batches(4, shuffle=shuffle, drop_last=True))
        expected = [halves(image) for image in train.batches(4, shuffle=shuffle, drop_last=True)]
        assert [len(f[0]) for f in found] == [4, 4]
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert (sum(asked) > before) == (budget == 0)  # the network is asked once, or each time


# ---------------------------------------------------------------------------------------------------------- error lines
def damage_image(base):
    file = base / "test/Ungood/img/Ungood1.png"
    file.write_bytes(file.read_bytes()[:40])
    return file


def damage_kind(base):
    file = base / "train/good/n1.png"
    file.write_text("no image at all")
    return file


def remove_mask(base):
    (base / "test/Ungood/anomaly_mask/Ungood1.png").unlink()
    return base / "test/Ungood/img/Ungood1.png"


def add_second_mask(base):
    save(base / "test/Ungood/anomaly_mask/Ungood1_mask.png", 255)
    return base / "test/Ungood/anomaly_mask/Ungood1_mask.png"


def add_image_of_that_name(base):
    save(base / "test/Ungood/img/Ungood1.jpg")
    return base / "test/Ungood/img/Ungood1.jpg"


def add_class_without_masks(base):
    save(base / "test/other/img/a.png")
    return base / "test/other/img/a.png"


def empty_mask(base):
    file = base / "test/Ungood/anomaly_mask/Ungood1.png"
    save(file, 0)
    return file


def weaken_16_bit_mask(base):
    file = base / "test/Ungood/anomaly_mask/Ungood1.png"
    save(file, 128, "I;16")
    return file


def draw_mask_in_alpha(base):
    file = base / "test/Ungood/anomaly_mask/Ungood1.png"
    save(file, (0, 0, 0, 255), "RGBA")
    return file


def remove_image(base):
    (base / "test/Ungood/img/Ungood1.png").unlink()
    return base / "test/Ungood/anomaly_mask/Ungood1.png"


def change_mask_size(base):
    file = base / "test/Ungood/anomaly_mask/Ungood1.png"
    save(file, 255, size=(9, 9))
    return file


def weaken_mask(base):
    file = base / "valid/Ungood/anomaly_mask/Ungood0.png"
    save(file, 1)
    return file


def empty_test(base):
    for file in (base / "test/good/img").iterdir():
        file.unlink()
    return "test 0 normal"


def remove_train(base):
    for file in (base / "train/good").iterdir():
        file.unlink()
    return "is not a benchmark"


@pytest.mark.parametrize("harm", [
    damage_image, damage_kind, remove_mask, remove_image, add_second_mask, add_image_of_that_name,
    add_class_without_masks, change_mask_size, weaken_mask, weaken_16_bit_mask, draw_mask_in_alpha, empty_mask,
    empty_test, remove_train])
def test_bad_benchmarks_end_with_one_line_that_names_the_file(harm, tmp_path):
    build(tmp_path / "b", "train/good", "valid/{cls}/img", "test/{cls}/img",
          ("valid/Ungood/anomaly_mask", "test/Ungood/anomaly_mask"))
    named = harm(tmp_path / "b")
    with pytest.raises(common.Error) as error:
        common.load_benchmark(arguments(tmp_path, str(tmp_path / "b")))
    assert "\n" not in str(error.value) and str(named) in str(error.value)
    assert not list((tmp_path / ".cache").glob(".tmp*"))


def test_no_folder_below_a_class_changes_split_and_no_file_next_to_the_classes_counts(tmp_path):
    build(tmp_path / "b", "train/good", "valid/{cls}", "test/{cls}")
    before = {split: len(e) for split, e in common.list_benchmark(arguments(tmp_path, str(tmp_path / "b")))[1].items()}
    for place in ("train/good/site2/test/a", "train/good/site2/val/normal/b", "train/good/train/c"):
        save(tmp_path / f"b/{place}.png")
    for place in ("test/good", "train/normal"):
        save(tmp_path / f"b/{place}.png")
    after = {split: len(e) for split, e in common.list_benchmark(arguments(tmp_path, str(tmp_path / "b")))[1].items()}
    assert after == before | dict(train=before["train"] + 3)


def test_of_several_benchmarks_in_a_folder_none_is_taken_silently(tmp_path):
    for name in ("mvtec/bottle", "mvtec/cable"):
        build(tmp_path / name, "train/good", "valid/{cls}", "test/{cls}")
    with pytest.raises(common.Error, match="holds 2 benchmarks; give one of them, e.g. .*bottle"):
        common.find_benchmark(str(tmp_path / "mvtec"), tmp_path)
    build(tmp_path / "mvtec", "train/good", "valid/{cls}", "test/{cls}")  # the folder itself goes first
    assert common.find_benchmark(str(tmp_path / "mvtec"), tmp_path)[0] == tmp_path / "mvtec"


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch):
    build(tmp_path / "b", "train/good", "valid/{cls}", "test/{cls}")
    save(tmp_path / "b/train/good/closed/a.png")
    monkeypatch.setattr(common.os, "access", lambda path, mode: path.name != "closed")
    with pytest.raises(common.Error, match="good/closed cannot be read"):
        common.find_benchmark(str(tmp_path / "b"), tmp_path)


def test_a_folder_with_a_name_of_250_bytes_is_decoded(tmp_path):
    build(tmp_path / ("é" * 125), "train/good", "valid/{cls}", "test/{cls}")
    assert len(common.load_benchmark(arguments(tmp_path, str(tmp_path / ("é" * 125))))) == 3


@pytest.mark.parametrize("data, said", [("brain", "no benchmark brain"), ("nowhere", "no folder nowhere")])
def test_missing_benchmarks_are_named(data, said, tmp_path):
    with pytest.raises(common.Error, match=said):
        common.load_benchmark(arguments(tmp_path, data))


def test_a_benchmark_without_one_of_its_parts_names_the_script_that_makes_it(tmp_path):
    build(tmp_path / "liver", "train/good", "valid/{cls}", "test/{cls}")
    (tmp_path / "liver/test").rename(tmp_path / "elsewhere")
    with pytest.raises(common.Error, match="datasets/btcv .train. and lits"):
        common.load_benchmark(arguments(tmp_path, "liver"))


def test_a_full_disk_ends_with_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(common.Error, match="No space left"), common.atomic(tmp_path / "a.txt") as tmp:
        tmp.write_text("half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- weights
def test_untrained_networks_are_the_same_for_every_seed_and_say_so():
    torch.manual_seed(1)
    one = common.pretrained_network("mobilenet_v2", "none")
    torch.manual_seed(2)
    assert same_state(one, common.pretrained_network("mobilenet_v2", "none").state_dict())
    assert one.weights_used == dict(name="mobilenet_v2", weights="none", sha256=None, trained=False)


def test_a_weights_file_without_classifier_is_loaded_and_recorded(tmp_path):
    state = {k: v for k, v in mobilenet_v2().state_dict().items() if not k.startswith("classifier")}
    torch.save(state, tmp_path / "w.pth")
    net = common.pretrained_network("mobilenet_v2", str(tmp_path / "w.pth"))
    assert torch.equal(net.state_dict()["features.3.conv.0.0.weight"], state["features.3.conv.0.0.weight"])
    assert net.weights_used["trained"] and net.weights_used["sha256"] == common.sha256(tmp_path / "w.pth")


@pytest.mark.parametrize("content, said", [
    (None, "No such file"), (b"not a file of tensors", "cannot be read"), ({"a": torch.zeros(1)}, "does not fit")])
def test_wrong_weights_files_end_with_one_line(content, said, tmp_path):
    file = tmp_path / "w.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        torch.save(content, file)
    with pytest.raises(common.Error, match=said) as error:
        common.pretrained_network("mobilenet_v2", str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_without_network_imagenet_names_three_ways_out_and_auto_goes_on_untrained(tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(common.Error) as error:
        common.pretrained_network("mobilenet_v2", "imagenet")
    assert all(way in str(error.value) for way in (str(tmp_path), "--weights FILE", "--weights none"))
    assert common.pretrained_network("mobilenet_v2", "auto").weights_used["trained"] is False
    assert "random weights" in capsys.readouterr().out


def test_feature_extractors_stay_frozen_in_eval_mode_inside_a_training_model():
    model = nn.Sequential(common.feature_extractor("mobilenet_v2", ["features.3"], "none"), nn.Identity())
    before = copy.deepcopy(model[0].state_dict())
    model.train()
    with torch.no_grad():
        found = model[0](torch.rand(2, 3, 64, 64))
    assert found["features.3"].shape == (2, 24, 16, 16)
    assert not any(m.training for m in model[0].modules()) and same_state(model[0], before)
    assert not any(p.requires_grad for p in model.parameters())
    assert "features.4.conv.0.0.weight" not in model[0].state_dict()  # stops at the last layer needed


def test_normalize_gives_zero_mean_and_unit_deviation_at_imagenet_statistics():
    image = torch.tensor(common.IMAGENET_MEAN).view(1, 3, 1, 1) + torch.tensor(common.IMAGENET_STD).view(1, 3, 1, 1)
    assert common.normalize(image).flatten().tolist() == pytest.approx([1, 1, 1], abs=1e-6)


def test_every_file_of_the_repository_is_within_the_layout_of_the_design():
    allowed = {"methods", "datasets", "tests", "common.py", "report.py", "run_all.sh", "requirements.txt", "README.md",
               "LICENSE", "data", "runs"}
    root = Path(__file__).resolve().parents[1]
    assert {p.name for p in root.iterdir() if p.name[0] != "." and p.name != "__pycache__"} <= allowed


def test_twelve_bits_in_sixteen_are_noticed_and_the_flag_uses_their_whole_range(tmp_path, capsys):
    values = np.linspace(0, 4095, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    entries = [(tmp_path / "a.png", 0, None)]
    dark = common.Split("train", entries, 32, tmp_path, tmp_path / ".cache")
    assert dark.images.max() == 16 and "--white 4095" in capsys.readouterr().out
    full = common.Split("train", entries, 32, tmp_path, tmp_path / ".cache", white=4095)  # not the cache of the other
    assert full.images.max() == 255 and len(np.unique(full.images)) == 256 and not capsys.readouterr().out


def test_white_is_refused_where_pillow_has_already_cut_16_bits_to_8(tmp_path):
    pixels = np.full((9, 9), 2000, np.uint16)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in pixels)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    (tmp_path / "colour.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)  # Pillow cannot write 16-bit colour
    assert common.decode(tmp_path / "grey.png", white=4095)[0].max() == 125
    assert common.decode(tmp_path / "colour.png")[0].max() == 2000 // 256
    with pytest.raises(common.Error, match="colour.png.*--white"):
        common.decode(tmp_path / "colour.png", white=4095)


def test_without_fcntl_one_line_names_the_systems_that_work(tmp_path):
    (tmp_path / "fcntl.py").write_text("raise ImportError")
    code = (f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; sys.modules.pop('fcntl', None); "
            "import common")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "WSL" in done.stderr


def test_a_full_gpu_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), common.atomic(tmp_path / "features"):
        raise RuntimeError("CUDA out of memory")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_weights_that_a_full_disk_cuts_off_end_with_one_line(tmp_path):
    with pytest.raises(common.Error, match="No space left.*free some space"), common.atomic(tmp_path / "a.pt") as tmp:
        tmp.symlink_to("/dev/full")
        with open(tmp, "wb") as f:
            torch.save(torch.zeros(10**6), f)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_large_state_is_loaded_without_a_further_copy(tmp_path):
    code = f"""
import resource, torch, common
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
net = torch.nn.Linear(8192, 8192, bias=False)  # 256 MiB
torch.save(net.state_dict(), {str(tmp_path / "net.pt")!r})
before = peak()
common.load_state(net, common.read_state({str(tmp_path / "net.pt")!r}, "file", mmap=True), "net.pt", ())
print((peak() - before) / 2**18)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout) < 1.2  # the file's own pages


def test_values_that_are_not_finite_are_refused_wherever_they_are(tmp_path):
    net = torch.nn.Linear(3, 2)
    for value in (float("nan"), float("inf"), -float("inf")):
        state = net.state_dict() | dict(bias=torch.tensor([0.5, value]))
        with pytest.raises(common.Error, match="bias has values that are not finite"):
            common.load_state(net, state, "net.pt", ())
