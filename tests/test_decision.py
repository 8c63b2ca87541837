"""From a score to a decision: thresholds, what --predict writes, training without labels."""

import csv
import json
import os
import shutil
from types import SimpleNamespace

import decisions
import numpy as np
import pytest
import torch
from conftest import ROOT, once, run_here, run_script
from matplotlib import colormaps
from PIL import Image

import common

INFERNO = colormaps["inferno"](range(256), bytes=True)[:, :3]
PADIM = ["--backbone", "mobilenet_v2", "--weights", "none", "--image-size", 64, "--batch-size", 4, "--device", "cpu"]


def rows_of(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def decided(**changed):
    n = len(changed.get("maxima") or [0, 0, 0])
    return decisions.decide({"from": "valid", "labels": [0] * n, "scores": list(range(n)), "scans": [None] * n,
                          "map_range": [0, 1], "dice": None, "maxima": None} | changed,
                         SimpleNamespace(specificity=0.95, scan_score="max"))


def decided_on(valid, model, args):
    result = common.evaluate(model, valid, args.batch_size, torch.device("cpu"))
    return decisions.decide(decisions.on_valid(model, valid, result), args)


@pytest.mark.parametrize("n, specificity, rank, reached", [
    (19, 0.95, 19, 0.95), (39, 0.95, 38, 0.95), (59, 0.95, 57, 0.95), (20, 0.95, 20, 0.95), (99, 0.9, 90, 0.9),
    (8, 0.95, 8, 8 / 9), (18, 0.95, 18, 18 / 19), (1, 0.95, 1, 0.5)])
def test_the_threshold_is_an_order_statistic_or_says_what_so_few_images_allow(n, specificity, rank, reached):
    assert decisions.at_specificity(list(range(1, n + 1)), specificity) == (rank, pytest.approx(reached))


def test_new_normal_scores_stay_below_the_threshold_as_often_as_stated():
    draw = np.random.default_rng(0)
    below = [draw.standard_t(2) <= decisions.at_specificity(sorted(draw.standard_t(2, 39)), 0.95)[0]
             for _ in range(4000)]
    assert 0.94 < np.mean(below) < 0.965


def test_the_f1_threshold_has_the_best_f1_of_all(tmp_path):
    labels, scores = np.array([0, 0, 0, 1, 1, 1, 0, 1]), np.float32([0.1, 0.4, 0.35, 0.8, 0.4, 0.3, 0.2, 0.9])
    entries = [(tmp_path / f"{i}.png", label, None) for i, label in enumerate(labels)]
    for (file, _, _), value in zip(entries, scores, strict=True):
        Image.fromarray(np.full((4, 4), round(100 * float(value)), np.uint8)).save(file)
    model = SimpleNamespace(predict=lambda image: (None, image[:, 0, 0, 0] * 2.55))
    split = common.Split("valid", entries, 4, tmp_path, tmp_path / ".cache")
    args = SimpleNamespace(batch_size=8, specificity=0.95, scan_score="max")
    threshold = decided_on(split, model, args)["image_f1"]

    def f1(t):
        return 2 * (labels[scores > t]).sum() / ((scores > t).sum() + labels.sum())

    assert f1(threshold) == max(f1(t) for t in [-1, *scores])


def test_decision_metrics_are_those_of_a_table_by_hand():
    labels, scores = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([1, 2, 3, 4, 2.5, 3.5, 5, 6.0])
    metrics = decisions.decision_metrics(labels, scores, dict(image=3.0, image_f1=4.5))
    assert metrics["sensitivity"] == 0.75 and metrics["specificity"] == 0.75
    assert metrics["f1"] == 0.75 and metrics["balanced_accuracy"] == 0.75
    assert metrics["sensitivity_f1"] == 0.5 and metrics["specificity_f1"] == 1
    assert metrics["sensitivity_at_90"] == metrics["sensitivity_at_95"] == 0.5


def test_without_masks_no_pixel_of_most_healthy_maps_is_decided_and_maps_scaled_by_themselves_are_not():
    maxima = np.sort(np.random.default_rng(0).random(200, np.float32)).tolist()
    pixel = decided(maxima=maxima)["pixel"]
    assert 0 < np.mean(np.float32(maxima) >= np.float32(pixel)) <= 0.05
    assert decided(dice=0.3, maxima=maxima)["pixel"] == 0.3
    nothing = decided()
    assert nothing["pixel"] is None and nothing["pixel_rule"].startswith("none")


def test_of_twenty_healthy_scans_that_the_threshold_has_not_seen_at_most_three_are_flagged(tmp_path):
    draw, entries = np.random.default_rng(0), []
    for scan in range(120):
        for z in range(10):
            file = tmp_path / f"scan{scan:03}_{z:03}.png"
            Image.fromarray(draw.integers(0, 200, (8, 8), np.uint8)).save(file)
            entries.append((file, 0, None))
    model = SimpleNamespace(predict=lambda image: (None, image.mean(dim=(1, 2, 3))))
    args = SimpleNamespace(batch_size=64, specificity=0.95, scan_score="max")
    valid, new = (common.Split(name, part, 8, tmp_path, tmp_path / ".cache")
                  for name, part in (("valid", entries[:1000]), ("new", entries[1000:])))
    for args.scan_score in ("max", "top5"):
        decision = decided_on(valid, model, args)
        scores = common.evaluate(model, new, 64, torch.device("cpu")).scores.reshape(20, 10)
        flagged = sum(decisions.scan_score(scan, args.scan_score) > decision["scan"] for scan in scores)
        assert flagged <= 3 and (scores.max(axis=1) > decision["image"]).sum() > 4  # a scan is not a slice
    few = common.Split("few", entries[: 19 * 10], 8, tmp_path, tmp_path / ".cache")
    assert decided_on(few, model, args)["scan"] is None


@pytest.mark.parametrize("name, patient", [
    ("BraTS2021_00003_60.png", "BraTS2021_00003"), ("NORMAL-12345-3.jpeg", "12345"), ("tumor_012_3_4.png", "tumor_012"),
    ("scan012_0001.png", "scan012"), ("train/good/scan012/0001.png", "scan012"), ("patient-7/a.png", "patient-7"),
    ("train/good/sub-01/ses-2/anat/1.png", "sub-01"), ("test/good/patient_3/scan_1/0.png", "patient_3"),
    ("train/good/0001.png", None), ("normal/12_3_4.png", None), ("IMG_0001.png", None)])
def test_names_tell_patients_where_they_do(name, patient):
    assert common.patient(name) == patient


@pytest.fixture(scope="module")
def trained(phantom, tmp_path_factory):
    """The model.pt of a PaDiM run on the phantom."""
    def make(out):
        done = run_here("methods/padim.py", "--root", phantom, "--out", out, "--maps", 0, *PADIM)
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "decision", make) / "phantom/padim/seed0/model.pt"


def predict(model, what, out, *flags, method="padim"):
    """(the finished process, its folder)."""
    done = run_here(f"methods/{method}.py", "--checkpoint", model, "--predict", what, "--out", out, "--device", "cpu",
                    *flags)
    return done, max(out.glob(f"*/{method}/seed*"), key=os.path.getmtime)


def test_one_image_alone_is_scored_decided_and_shown_as_among_others(trained, phantom, tmp_path):
    images = phantom / "phantom/test/Ungood/img"
    done, among = predict(trained, images, tmp_path / "all")
    assert done.returncode == 0 and "6 images" in done.stdout and "above the threshold" in done.stdout
    _, alone = predict(trained, images / "0002.png", tmp_path / "one")
    (row,), rows = rows_of(alone / "scores.csv"), rows_of(among / "scores.csv")
    assert float(row["score"]) == pytest.approx(float(rows[2]["score"]), rel=1e-5)
    assert (row["decision"], row["percentile"]) == (rows[2]["decision"], rows[2]["percentile"])
    for kind in ("maps", "masks"):
        first, second = (np.asarray(Image.open(sorted((f / kind).iterdir())[i]), float)
                         for f, i in ((alone, 0), (among, 2)))
        assert np.abs(first - second)[36:].mean() < 0.1  # below the title


def test_a_decision_follows_from_the_threshold_in_the_results_and_the_flag_changes_it(trained, phantom, tmp_path):
    kept = json.loads((trained.parent / "results.json").read_text())["decision"]
    _, folder = predict(trained, phantom / "phantom/test", tmp_path / "a")
    for row in rows_of(folder / "scores.csv"):
        assert (row["decision"] == "anomalous") == (float(row["score"]) > kept["image"])
        below = np.mean(np.array(kept["normal_scores"]) <= float(row["score"]))
        assert float(row["percentile"]) == pytest.approx(100 * below, abs=0.01)
    record = json.loads((folder / "predict.json").read_text())
    assert record["thresholds"]["image"] == kept["image"] and record["checkpoint_sha256"] == common.sha256(trained)
    _, low = predict(trained, phantom / "phantom/test", tmp_path / "b", "--specificity", 0.2)
    assert json.loads((low / "predict.json").read_text())["thresholds"]["image"] == kept["normal_scores"][0]


def test_a_picture_has_image_map_and_contours_where_they_are(tmp_path):
    image = np.zeros((3, 40, 80), np.uint8)
    image[:, :20, :40] = 255  # white where it is high and left
    anomaly_map, mask = np.zeros((2, 32, 32), np.float32)
    anomaly_map[16:, 16:] = 2
    mask[:16, 16:] = 1
    file = tmp_path / "maps/a.png"
    decisions.save_picture(file, image, anomaly_map, dict(map_range=(0, 2), pixel=1.5), "a$_b", mask > 0)
    panel = np.asarray(Image.open(file).convert("RGB"), int)[:, :825]  # without the colour bar
    for colour, right, low in (((0, 255, 0), False, False), ((0, 255, 255), True, True)):
        rows, columns = np.nonzero((abs(panel - colour) < 60).all(axis=2))
        assert len(rows) > 100 and np.ptp(columns) == pytest.approx(200, abs=12) == 2 * np.ptp(rows)
        assert (columns.min() > panel.shape[1] / 2) == right and (rows.min() > panel.shape[0] / 2) == low
        if not right:
            top, middle = rows.min(), columns.min()
            assert (panel[top + 5 : top + 90, middle - 180 : middle - 5] > 250).all()
            assert (panel[top + 110 : top + 190, middle - 180 : middle - 5] < 5).all()


@pytest.mark.parametrize("kind", ["npy", "tiff"])
def test_maps_and_masks_have_the_images_own_size(kind, trained, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90), np.uint8)).save(tmp_path / "wide.png")
    _, folder = predict(trained, tmp_path / "wide.png", tmp_path / "out", "--save-maps", kind)
    file, = (folder / "raw").iterdir()
    raw = np.load(file) if kind == "npy" else np.asarray(Image.open(file))
    mask, = (folder / "masks").iterdir()
    pixel = json.loads((folder / "predict.json").read_text())["thresholds"]["pixel"]
    assert raw.shape == (50, 90) and raw.dtype == np.float32
    assert np.array_equal(np.asarray(Image.open(mask)), raw >= np.float32(pixel))


def test_damaged_files_are_listed_at_the_end_and_the_rest_is_scored(trained, phantom, tmp_path):
    shutil.copytree(phantom / "phantom/test/good/img", tmp_path / "new")
    (tmp_path / "new/0001.png").write_bytes(b"no image")
    done, folder = predict(trained, tmp_path / "new", tmp_path / "out")
    assert done.returncode == 1 and "not scored: " in done.stderr and "0001.png" in done.stderr
    assert [row["path"] for row in rows_of(folder / "scores.csv")] == [f"000{i}.png" for i in (0, 2, 3, 4, 5)]
    assert "0001.png" in json.loads((folder / "predict.json").read_text())["damaged"][0]


def test_one_image_alone_scores_exactly_as_in_the_run_whatever_its_batch(tmp_path, phantom):
    run = ["--root", phantom, "--out", tmp_path, "--maps", 0, "--epochs", 1, *PADIM]
    done = run_here("methods/stfpm.py", *run)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "phantom/stfpm/seed0"
    for row in rows_of(folder / "scores.csv")[:3]:
        _, found = predict(folder / "model.pt", phantom / "phantom" / row["path"], tmp_path / "out", method="stfpm")
        assert rows_of(found / "scores.csv")[0]["score"] == row["score"]


def test_places_of_predict_that_cannot_be_used_are_one_line_and_flags_of_the_checkpoint_win_aloud(trained, phantom,
                                                                                                  tmp_path):
    image = phantom / "phantom/test/good/img/0000.png"
    shutil.copytree(image.parent, tmp_path / "new")
    for what, out, words in ((tmp_path / "none", tmp_path / "out", "does not exist"),
                             (tmp_path / "new", tmp_path / "new/out", "contains --out")):
        done = run_here("methods/padim.py", "--checkpoint", trained, "--predict", what, "--out", out)
        assert done.returncode == 2 and words in done.stderr and not out.exists(), done.stderr
    done, _ = predict(trained, image, tmp_path / "out", "--image-size", 32, "--seed", 3)
    assert "NOTE: --image-size is 64, from the checkpoint, not 32" in done.stdout
    done = run_here("methods/padim.py", "--checkpoint", trained, "--predict", "")
    assert done.returncode == 2 and "an argument is empty" in done.stderr


def test_a_checkpoint_is_not_evaluated_in_the_folder_of_an_unfinished_run(trained, phantom, tmp_path):
    folder = tmp_path / "phantom/padim/seed0"
    folder.mkdir(parents=True)
    for name in ("model.pt", "resume.pt"):
        shutil.copy(trained, folder / name)
    done = run_here("methods/padim.py", "--checkpoint", folder / "model.pt", "--root", phantom, "--out", tmp_path)
    assert done.returncode == 2 and "holds another run" in done.stderr
    assert {file.name for file in folder.iterdir()} == {"model.pt", "resume.pt"}


def test_masks_are_not_scored_and_raw_maps_need_no_pictures(trained, phantom, tmp_path):
    done, folder = predict(trained, phantom / "phantom/test", tmp_path / "out", "--maps", 0, "--save-maps", "npy")
    assert "6 masks in" in done.stdout and len(rows_of(folder / "scores.csv")) == 12, done.stderr
    assert not (folder / "maps").exists() and len(list((folder / "raw").iterdir())) == 12


def test_files_next_to_images_that_are_not_scored_are_told_whatever_their_names(trained, tmp_path):
    (tmp_path / "new").mkdir()
    for name in ("a.png", "b.webp"):
        Image.new("L", (20, 16), 99).save(tmp_path / "new" / name)
    (tmp_path / "new/IM0001").write_bytes(b"a DICOM file without suffix")
    done, folder = predict(trained, tmp_path / "new", tmp_path / "out", "--maps", 0)
    assert [row["path"] for row in rows_of(folder / "scores.csv")] == ["a.png"]
    assert "2 other files are not scored, e.g." in done.stdout and "new/IM0001" in done.stdout


def test_a_run_trained_on_data_is_not_taken_for_a_checkpoint_evaluated_on_them(trained, phantom, tmp_path):
    shutil.copytree(phantom / "phantom", tmp_path / "other")
    place = "--data", tmp_path / "other", "--root", tmp_path, "--out", tmp_path / "out", "--device", "cpu", "--maps", 0
    assert run_here("methods/padim.py", *place, "--checkpoint", trained).returncode == 0
    folder = tmp_path / "out/other/padim/seed0"
    results = json.loads((folder / "results.json").read_text())
    assert results["changed"]["checkpoint"] == str(trained)  # report.py states it
    done = run_here("methods/padim.py", *place, *PADIM)
    assert done.returncode == 2 and "holds a run with --checkpoint" in done.stderr, done.stdout


def test_a_run_keeps_the_script_that_ran_and_not_a_later_edit(phantom, tmp_path):
    text = (ROOT / "methods/padim.py").read_text()
    line = "    run = common.Run(__file__, args)\n"
    assert line in text
    text = text.replace(line, f"{line}    Path(__file__).write_text('# edited')\n")
    (tmp_path / "padim.py").write_text(text)
    shutil.copy(ROOT / "common.py", tmp_path)
    done = run_script(tmp_path / "padim.py", "--root", phantom, "--out", tmp_path / "out", "--maps", 0, *PADIM)
    assert done.returncode == 0 and (tmp_path / "padim.py").read_text() == "# edited", done.stderr
    assert (tmp_path / "out/phantom/padim/seed0/padim.py").read_text() == text


@pytest.mark.parametrize("layout", ["train/good", "."])
def test_normal_images_alone_train_a_model_that_decides(layout, phantom, tmp_path):
    shutil.copytree(phantom / "phantom/train/good/img", tmp_path / "mine" / layout)
    run = ["--data", tmp_path / "mine", "--root", tmp_path, "--out", tmp_path / "runs", "--holdout", 0.25, *PADIM]
    done = run_here("methods/padim.py", *run)
    assert done.returncode == 0, done.stderr
    assert "no test images" in done.stdout and "held out" in done.stdout and "auroc" not in done.stdout
    assert "support a specificity of only 0.75, not 0.95" in done.stdout
    folder = tmp_path / "runs/mine/padim/seed0"
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"] == {} and set(results["counts"]) == {"train", "valid"}
    assert results["counts"]["train"]["normal"] == 9 and len(results["decision"]["normal_scores"]) == 3
    assert results["decision"]["from"] == "3 training images held out" and results["decision"]["reached"] == 0.75
    _, found = predict(folder / "model.pt", phantom / "phantom/test/Ungood/img/0000.png", tmp_path / "out")
    assert rows_of(found / "scores.csv")[0]["decision"] in ("normal", "anomalous")


def test_a_trained_method_learns_without_labels_and_keeps_the_last_epoch(phantom, tmp_path):
    shutil.copytree(phantom / "phantom/train/good/img", tmp_path / "mine")
    done = run_here("methods/ganomaly.py", "--data", tmp_path / "mine", "--root", tmp_path, "--out", tmp_path / "runs",
                    "--epochs", 3, "--eval-every", 1, "--features", 8, "--image-size", 32, "--batch-size", 4,
                    "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/mine/ganomaly/seed0/results.json").read_text())["epoch"] == 3


def test_scans_are_held_out_whole_where_names_tell_them(tmp_path):
    draw = np.random.default_rng(0)
    for scan in range(6):
        for z in range(4):
            file = tmp_path / f"mine/train/good/scan{scan}/{z:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (16, 16), np.uint8)).save(file)
    args = SimpleNamespace(data=str(tmp_path / "mine"), root=str(tmp_path), image_size=16, limit=None, predict=None,
                           white=65535, holdout=0.3)
    train, valid, test = common.load_benchmark(args)
    assert test is None and len(valid) == 8 and len(train) == 16
    assert not {common.patient(p) for p in train.paths} & {common.patient(p) for p in valid.paths}


@pytest.mark.parametrize("method", ["winclip", "clip_zeroshot"])
def test_zero_shot_methods_score_a_bare_folder_in_the_users_words(method, phantom, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("normal: a scan of a healthy knee\nanomalous: a scan of a torn knee\n")
    common_flags = ["--predict", phantom / "phantom/test/good/img", "--model", "tiny", "--clip-weights", "none",
                    "--clip-size", 64, "--image-size", 64, "--device", "cpu", "--maps", 0]
    scores = []
    for i, flags in enumerate((["--organ", "knee"], ["--sentences", words])):
        done = run_here(f"methods/{method}.py", *common_flags, *flags, "--out", tmp_path / str(i))
        assert done.returncode == 0 and "UNTRAINED" in done.stdout and "not decided" in done.stdout, done.stderr
        folder, = (tmp_path / str(i)).glob(f"*/{method}/seed0")
        scores.append([float(row["score"]) for row in rows_of(folder / "scores.csv")])
        args = json.loads((folder / "predict.json").read_text())["args"]
        assert args["organ"] == "knee" if i == 0 else args["sentences"] == str(words)
        assert not (folder / "model.pt").exists()
    assert len(scores[0]) == 6 and scores[0] != scores[1]
    words.write_text("a scan\n")
    done = run_here(f"methods/{method}.py", *common_flags, "--sentences", words, "--out", tmp_path / "c")
    assert done.returncode == 2 and "--sentences" in done.stderr


def test_images_outside_0_to_1_are_refused():
    model = SimpleNamespace(predict=lambda image: (None, image.mean(dim=(1, 2, 3))))
    assert common.score(model, torch.full((2, 3, 4, 4), 0.5))[1].tolist() == [0.5, 0.5]
    for wrong in (torch.full((2, 3, 4, 4), 128.0), torch.full((2, 3, 4, 4), -0.1), torch.full((2, 1, 4, 4), 0.5),
                  torch.full((3, 4, 4), 0.5), torch.full((2, 3, 4, 4), float("nan"))):
        with pytest.raises(common.Error, match="in \\[0, 1\\]"):
            common.score(model, wrong)


def test_what_the_reports_browser_needs_is_stored_for_the_first_seed(phantom, tmp_path):
    run = ["--root", phantom, "--out", tmp_path, *PADIM]
    for seed in (0, 1):
        assert run_here("methods/padim.py", *run, "--seed", seed).returncode == 0
    folders = [tmp_path / f"phantom/padim/seed{seed}" for seed in (0, 1)]
    assert len(list((folders[0] / "browser").iterdir())) == 12 and not (folders[1] / "browser").exists()
    results = json.loads((folders[0] / "results.json").read_text())
    tile = Image.open(folders[0] / "browser/00007.png")
    assert tile.mode == "P" and tile.size == (64, 64)
    assert np.array_equal(np.array(tile.getpalette(), np.uint8).reshape(256, 3), INFERNO)
    images = tmp_path / f"phantom/images-{results['images']}"
    assert len(list(images.glob("*.jpg"))) == 12 and len(list(images.glob("*-mask.png"))) == 6
    lesions = rows_of(folders[0] / "lesions.csv")
    args = SimpleNamespace(data="phantom", root=str(phantom), image_size=64, limit=None, predict=None, white=65535,
                           holdout=0.1)
    assert sum(int(row["area"]) for row in lesions) == common.load_benchmark(args)[2].masks.sum()
    rates = np.array([[float(v) for k, v in row.items() if k.startswith("fpr_")] for row in lesions])
    assert rates.shape[1] == 20 and (np.diff(rates, axis=1) >= 0).all()
    assert rates.mean(axis=0)[-1] == pytest.approx(np.interp(0.3, *zip(*[
        (float(r["fpr"]), float(r["pro"])) for r in rows_of(folders[0] / "curves.csv")], strict=True)), abs=0.03)
    assert os.path.getsize(folders[0] / "browser/00007.png") < 8000
