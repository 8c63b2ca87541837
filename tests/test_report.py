"""report.py on made-up run folders: tables, intervals, tests between methods, figures, the page in a browser;
methods/published.csv."""

import csv
import fcntl
import itertools
import json
import os
import re
import shutil
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from chromium import PATH, Page
from conftest import ROOT, load_script, run_here
from made_up_runs import draw, make_run

import common

report = load_script("report.py")
METHODS = {p.stem for p in (ROOT / "methods").glob("*.py")}


def read_rows(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


PUBLISHED = read_rows(ROOT / "methods/published.csv")
PRINTED = [r for r in PUBLISHED if r["mean"]]


def run_report(folder, *flags):
    done = run_here("report.py", folder, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "report"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(stdout, report folder) of three methods, two benchmarks, two seeds; deepsvdd scores images only."""
    root = tmp_path_factory.mktemp("runs")
    for data, (method, shift), seed in itertools.product(
            ("brain_mr", "x & y"), dict(padim=1.5, patch_core=0.3, deepsvdd=0.35).items(), (0, 1)):
        maps = method != "deepsvdd"
        make_run(root, data, method, seed, shift, (12, 60, 70), curves=maps, lesions=maps, log=maps,
                 browser=maps and data == "x & y" and seed == 0,
                 changed=dict(lr_1=0.5) if method == "patch_core" else {})
    return run_report(root)


def read_all(folder):
    """(runs, scores, rows) of a folder of runs."""
    known, (runs, _) = {}, report.read_runs(folder, folder)
    scores = {key: report.read_scores(results, known) for key, results in runs.items()}
    return runs, scores, report.rows_of(runs, scores, report.read_published())


# -------------------------------------------------------------------------------------------------------- published.csv
def test_published_tables_are_whole_and_their_figures_possible():
    assert Counter(r["table"] for r in PUBLISHED) == {"3.7": 45, "3.8": 45, "3.9": 45, "3.10": 45, "3.11": 30,
                                                      "4.1": 21, "4.2": 21, "4.3": 21, "4.4": 21}
    assert len(PRINTED) == len({(r["method"], r["benchmark"], r["metric"]) for r in PUBLISHED}) - 30  # 30 are NA
    assert {r["benchmark"] for r in PUBLISHED} == set(report.IMAGES)
    assert {r["metric"] for r in PUBLISHED} == {"image_auroc", "pixel_auroc", "aupro", "dice"}
    for r in PRINTED:
        mean, std = float(r["mean"]), float(r["std"])
        assert 0 < mean < 100 and 0 < std < 10 and re.fullmatch(r"\d+\.\d\d", r["mean"])
        # of five values up to 100 with this mean, four times 100 and one below have the largest deviation (n - 1)
        assert std <= 5**0.5 * (100 - mean) or r["suspect"] == "yes", r
        assert (mean + std <= 100) or "above 100" in r["note"], r


def test_published_methods_are_our_scripts_or_named_variants():
    named = {r["method"] for r in PUBLISHED}
    variants = {"clip_recon (ResNet-18, DA)", "clip_recon (ResNet-50, DA)", "clip_recon (ViT, no DA)"}
    assert named - METHODS <= variants | {"ddpm", "winclip", "clip_zeroshot"} and len(named) == 22


def test_published_figures_that_are_printed_twice_are_suspect():
    count = Counter((r["mean"], r["std"]) for r in PRINTED)
    for r in PRINTED:
        assert (r["suspect"] == "yes") == bool(r["note"])
        if count[r["mean"], r["std"]] > 1:
            assert "digit for digit" in r["note"], r
    suspect = {(r["table"], r["method"]) for r in PRINTED if r["suspect"]}
    assert suspect >= {("3.9", "mkd"), ("3.9", "rd4ad"), ("4.3", "ddpm"), ("4.4", "ddpm"), ("4.2", "clip_recon"),
                       ("4.2", "ddpm")}


def test_published_figures_hold_what_the_thesis_is_known_to_print():
    known = {("patchcore", "brain", "image_auroc"): "91.65", ("cfa", "liver", "aupro"): "92.75",
             ("csflow", "chest", "image_auroc"): "83.20", ("patchcore", "resc", "dice"): "57.04",
             ("clip_recon", "liver", "aupro"): "69.60", ("ddpm", "liver", "image_auroc"): "90.92"}
    found = {(r["method"], r["benchmark"], r["metric"]): r["mean"] for r in PUBLISHED}
    assert {key: found[key] for key in known} == known


# -------------------------------------------------------------------------------------------------- intervals and tests
def shares(labels, *scores):
    """Placements, averaged over seeds."""
    return np.mean([report.placement(labels == 1, s) for s in scores], axis=0)


def test_the_mean_placement_of_either_class_is_the_auroc_with_ties():
    labels, scores = draw(0, 40, 25, 0.8)
    scores = scores.round(1)  # ties
    share, anomalous = report.placement(labels == 1, scores), labels == 1
    auroc = common.image_metrics(labels, scores)["image_auroc"]
    assert share[anomalous].mean() == pytest.approx(auroc) == pytest.approx(share[~anomalous].mean())


def test_the_interval_covers_the_true_auroc_in_95_of_100_draws():
    true, covered = 0.7602, 0  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for seed in range(400):
        labels, scores = draw(seed, 60, 50, 1.0)
        low, high = report.interval(labels == 1, shares(labels, scores))
        covered += low < true < high
    assert 0.92 < covered / 400 < 0.98


def test_the_interval_is_close_to_that_of_a_loop_that_computes_each_draws_auroc():
    rng, anomalous = np.random.default_rng(0), np.repeat([False, True], [60, 50])
    scores = (np.random.default_rng(1).normal(size=(3, 110)) + 0.8 * anomalous).round(1)  # ties, three seeds
    found = []
    for _ in range(2000):
        a, b = (scores[:, rng.choice(np.flatnonzero(c), c.sum())] for c in (anomalous, ~anomalous))
        a, b = a[:, :, None], b[:, None]
        found.append((a > b).mean() + (a == b).mean() / 2)
    low, high = np.quantile(found, [0.025, 0.975])
    assert report.interval(anomalous, shares(anomalous, *scores)) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_the_interval_agrees_with_delongs_variance_and_is_quick_on_the_largest_test_set():
    labels, scores = draw(3, 781, 16413, 1.0)  # chest
    share, anomalous = report.placement(labels == 1, scores), labels == 1
    error = sum(share[c].var(ddof=1) / c.sum() for c in (anomalous, ~anomalous)) ** 0.5
    expected = share[anomalous].mean() + 1.96 * error * np.array([-1, 1])
    assert report.interval(anomalous, share) == pytest.approx(expected, abs=0.2 * error)  # 3 errors of the draws
    start = time.process_time()
    report.interval(anomalous, share)  # the draws are there already
    assert time.process_time() - start < 0.5


def test_no_interval_where_scores_separate_perfectly_or_a_class_has_one_image():
    def found(labels, *scores):
        return report.interval(np.array(labels) == 1, shares(np.array(labels), *map(np.array, scores)))

    for labels in ([0, 0, 1, 1], [0, 0, 0, 1]):
        assert found(labels, [1.0, 2, 3, 4]) == (None, None)
    assert found([0, 0, 0, 1], [1.0, 4, 2, 3]) == (None, None)


def clustered(seed, patients=30, size=8):
    """Labels, patients and scores of `size` slices of each patient, which share most of their score."""
    rng, patient = np.random.default_rng(seed), np.repeat(np.arange(patients), size)
    labels = (np.arange(len(patient)) % 2).astype(int)
    own = rng.normal(size=patients)[patient]
    return labels, patient, [0.9 * own + 0.5 * rng.normal(size=len(patient)) * (1 + labels) + labels for _ in range(2)]


def test_intervals_by_patient_are_those_of_a_loop_over_drawn_patients():
    labels, patient, (scores, _) = clustered(0)
    scores = scores + 2 * np.random.default_rng(5).normal(size=30)[patient] * labels
    rng, found = np.random.default_rng(0), []
    for _ in range(1500):
        images = np.concatenate([np.flatnonzero(patient == p) for p in rng.integers(30, size=30)])
        found.append(shares(labels[images], scores[images])[labels[images] == 1].mean())
    low, high = np.quantile(found, [0.025, 0.975])
    by_patient = report.interval(labels == 1, shares(labels, scores), patient)
    assert by_patient == pytest.approx((low, high), abs=0.07 * (high - low))
    by_image = report.interval(labels == 1, shares(labels, scores))
    assert high - low > 1.3 * (by_image[1] - by_image[0])
    assert report.interval(labels == 1, shares(labels, scores), np.zeros(len(labels), int)) == (None, None)


def test_p_values_by_patient_hold_their_level_where_those_by_image_do_not():
    by_patient, by_image = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        labels, patient = np.repeat([0, 1], 120), np.repeat(np.arange(30), 8)  # a patient has one class
        pair = [shares(labels, rng.normal(size=30)[patient] + 0.3 * rng.normal(size=240) + labels) for _ in range(2)]
        by_patient.append(report.p_value(labels == 1, *pair, patient))
        by_image.append(report.p_value(labels == 1, *pair))
    assert np.mean(np.array(by_patient) < 0.05) < 0.1 and np.mean(np.array(by_image) < 0.05) > 0.3


def test_the_test_by_patient_with_one_image_each_is_delongs():
    labels, first = draw(0, 70, 60, 1.0)
    pair = shares(labels, first), shares(labels, draw(1, 70, 60, 0.7)[1])
    single = report.p_value(labels == 1, *pair, np.arange(130))
    assert single == pytest.approx(report.p_value(labels == 1, *pair), rel=0.05)


def test_patients_are_told_only_where_all_names_do():
    names = ["test/BraTS2021_00003_60.png", "a/BraTS2021_00003_7.png", "BraTS2021_1_1.png"]
    assert report.patients_of(names).tolist() == [0, 0, 1]
    assert report.patients_of(["BraTS2021_00003_60.png", "scan.png"]) is None


def test_p_values_are_small_for_different_methods_and_even_for_equal_ones():
    rng, labels, found = np.random.default_rng(0), np.repeat([0, 1], [60, 50]), []
    for _ in range(1000):
        common_part = rng.normal(size=110) + labels  # scores of the same images are correlated
        found.append(report.p_value(labels == 1, *(shares(labels, common_part + rng.normal(size=110))
                                                   for _ in range(2))))
    assert 0.035 < np.mean(np.array(found) < 0.05) < 0.07 and 0.47 < np.mean(found) < 0.53  # uniform in [0, 1]
    labels, good = draw(1, 100, 100, 2.0)
    good, bad = shares(labels, good), shares(labels, draw(2, 100, 100, 0.2)[1])
    assert report.p_value(labels == 1, good, bad) < 1e-6 and report.p_value(labels == 1, good, good) == 1


def test_holm_stops_at_the_first_that_fails():
    assert report.holm(dict(a=0.001, b=0.02, c=0.04, d=0.5)) == {"a"}
    assert report.holm(dict(a=0.001, b=0.01, c=0.02)) == {"a", "b", "c"}


def test_only_methods_with_the_same_images_are_compared(tmp_path):
    for method, name in dict(padim="a", cfa="a", mkd="other").items():
        make_run(tmp_path, "x", method, name=name)
    make_run(tmp_path, "x", "cflow", 0)
    make_run(tmp_path, "x", "cflow", 1, name="other")  # seeds that saw other images
    compared = report.compare("x", read_all(tmp_path)[1])
    assert set(compared.auroc) == {"padim", "cfa"} and len(compared.p_values) == 1
    assert compared.left_out == ["cflow", "mkd"]


# --------------------------------------------------------------------------------------------------------------- tables
def test_report_shows_mean_and_deviation_and_marks_what_is_not_as_published(tmp_path):
    check = dict(summary="1 error: test/good/a.png is train/good/b.png")
    for seed, auroc in enumerate((0.5, 0.6)):
        folder = make_run(tmp_path, "phantom", "padim", seed, check=check, changed=dict(backbone="mobilenet_v2"),
                          weights=[dict(name="x", trained=False)], metrics=dict(image_auroc=auroc, image_ap=0.5))
        (folder / "scores.csv").unlink()
    stdout, folder = run_report(tmp_path)
    for text in (stdout, (folder / "report.md").read_text()):
        assert "padim (u) (c)" in text and "55.00 ± 7.07" in text
        assert "--backbone mobilenet_v2" in text and "no benchmark" in text
        assert "datasets/check.py: 1 error: test/good/a.png is train/good/b.png" in text
    assert run_here("report.py", tmp_path / "nothing").returncode == 2


def row_of(method, auroc, marks=""):
    row = dict(method=method, marks=marks, seeds=1, image_auroc_low=None, image_auroc_high=None)
    row |= {m: None for m in report.METRICS} | {f"{m}_thesis_mean": None for m in report.METRICS}
    return row | dict(image_auroc=auroc)


def test_the_best_figure_is_bold_and_marked_rows_do_not_compete():
    rows = [row_of(m, v, k) for m, v, k in (("a", 0.7, ""), ("b", 0.80001, ""), ("c", 0.80002, ""), ("d", 0.99, "l"))]
    lines = report.table("results", rows, report.METRICS, "").lines
    assert [(str(line[0]), line[2].text, line[2].bold) for line in lines] == [
        ("a", "70.00", False), ("b", "80.00", True), ("c", "80.00", True), ("d (l)", "99.00", False)]
    lines = report.table("results", rows, report.METRICS, "", alike={"a", "c"}).lines  # what a test tells comes first
    assert [line[2].bold for line in lines] == [True, False, True, False]


def test_settings_that_all_share_and_marks_that_all_have_are_said_once(tmp_path):
    for method in ("padim", "cfa", "mkd"):
        own = dict(epochs=2) if method != "padim" else {}
        make_run(tmp_path, "x", method, changed=dict(weights="/a/long/path/net.pth") | own)
    stdout = run_report(tmp_path)[0]
    assert stdout.count("net.pth") == 1 and "all methods: --weights net.pth\n" in stdout and "/a/long" not in stdout
    assert "cfa, mkd: --epochs 2\n" in stdout and "All rows: (c)" in stdout and "padim (c)" not in stdout


@pytest.mark.parametrize("difference", ["none", "auto found it", "changed", "batch size", "limit", "untrained",
                                        "counts", "one seed", "benchmark"])
def test_the_thesis_figure_is_shown_only_next_to_what_was_resolved_as_published(difference, tmp_path):
    changes = dict(changed=dict(changed=dict(lr=1)), limit=dict(args=dict(limit=5, image_size=64)),
                   untrained=dict(changed=dict(weights="auto"), weights=[dict(name="x", trained=False)]))
    changes |= {"auto found it": dict(changed=dict(weights="auto")), "batch size": dict(changed=dict(batch_size=4))}
    data, same = "phantom" if difference == "benchmark" else "OCT2017", difference in ("none", "auto found it")
    make_run(tmp_path, data, "padim", 0, counts=(26315, 242, 725 if difference == "counts" else 726),
             **changes.get(difference, {}))
    make_run(tmp_path, data, "padim", 1, counts=(26315, 242, 726),
             changed=dict(lr=1) if difference == "one seed" else {})
    row, = read_all(tmp_path)[2]
    assert row["image_auroc_thesis_mean"] == (pytest.approx(0.9175) if same else None)
    table = report.table("results", [row], report.METRICS, "")
    ours = 100 * row["image_auroc"]
    assert ("Image AUROC: thesis (diff.)" in table.header) == same
    assert (f"91.75 ± 0.96 ({ours - 91.75:+.2f})" in [c.text for c in table.lines[0]]) == same


@pytest.mark.parametrize("method", ["ddpm", "winclip", "clip_zeroshot"])
def test_rows_of_another_method_or_of_our_own_sentences_show_the_thesis_figure_without_a_difference(method, tmp_path):
    make_run(tmp_path, "oct2017", method, counts=(26315, 242, 726))
    text = (run_report(tmp_path)[1] / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| {method}") and line.count("|") > 6)
    assert " ± " in row and "+" not in row and "(-" not in row and "No difference for " + method in text


def test_dice_shows_the_thesis_figure_without_a_difference(tmp_path):
    make_run(tmp_path, "brain", "padim", counts=(7500, 640, 3075), lesions=True)
    row, = read_all(tmp_path)[2]
    assert row["dice_thesis_mean"] and "(" not in report.thesis_cell(row, "dice").text
    assert "(" in report.thesis_cell(row, "image_auroc").text
    assert "No difference for Dice:" in (run_report(tmp_path)[1] / "report.md").read_text()


def test_variants_of_clip_recon_have_their_own_part_and_the_thesis_rows(tmp_path):
    published = dict(limit=None, image_size=240, prompt_tokens=16, layers=[1, 2, 3, 4], backbone="clip")
    variants = dict(base={}, backbone_resnet18=dict(backbone="resnet18"), layers_1_2=dict(layers=[1, 2]))
    for variant, changed in variants.items():
        for seed in (0, 1):
            make_run(tmp_path / "ablation" / variant, "brain", "clip_recon", seed, counts=(7500, 640, 3075),
                     args=published | changed, changed=changed)
    printed, folder = run_report(tmp_path)
    names = re.findall(r"^  (base|backbone resnet18|layers 1 2)", printed, re.M)
    assert names == [v.replace("_", " ") for v in variants]
    text = (folder / "report.md").read_text()
    part = text.split("## brain: variants of clip_recon")[1]
    rows = {line.split(" | ")[0]: line for line in reversed(part.splitlines())}
    assert "92.74 ± 0.84" in rows["| base"] and "87.23 ± 1.34" in rows["| backbone resnet18 (c)"]  # thesis, Table 4.1
    assert "92.74" not in rows["| layers 1 2 (c)"] and "--layers 1 2" in printed
    assert '../ablation/layers_1_2/brain/clip_recon/seed1/"' in (folder / "index.html").read_text()


def test_a_suspect_thesis_figure_carries_a_question_mark_and_its_note(tmp_path):
    make_run(tmp_path, "oct2017", "clip_recon", counts=(26315, 242, 726))
    text = (run_report(tmp_path)[1] / "report.md").read_text()
    assert "98.94 ± 2.46? (" in text and "no five values up to 100" in text and "Thesis: the printed figure" in text


def test_pro_by_size_is_the_area_under_the_mean_overlap_of_each_third(tmp_path):
    levels = [f"{0.015 * i:.3f}" for i in range(1, 21)]
    rows = [dict(path=f"{area}.png", lesion=1, area=area, overlap="")
            | {f"fpr_{x}": min(1, area * float(x)) for x in levels} for area in (1, 2, 1, 2, 3, 4)]
    common.write_csv(tmp_path / "lesions.csv", rows)
    found = report.read_lesions(tmp_path / "lesions.csv")
    line = np.linspace(0, 0.3, 21)
    expected = [np.mean([np.trapezoid(np.minimum(1, a * line), line) / 0.3 for a in areas])
                for areas in ((1, 1), (2, 2), (3, 4))]
    assert [found[name] for name in report.SIZES] == pytest.approx(expected)
    assert found["lesions"] == 6


def test_a_run_without_labels_is_reported_without_figures(tmp_path):
    file = make_run(tmp_path, "scans", "padim") / "results.json"
    results = json.loads(file.read_text())
    del results["counts"]["test"]
    file.write_text(json.dumps(results | dict(metrics={})))
    stdout, target = run_report(tmp_path)
    assert "No labelled test images" in stdout and "scans" in (target / "index.html").read_text()


@pytest.fixture
def unequal(tmp_path):
    """cfa has both seeds on a and b; padim lacks b, stfpm failed there, mkd runs, cflow stopped after epoch 7."""
    for method, data, seed in itertools.product(("cfa", "padim", "stfpm", "mkd", "cflow"), "ab", (0, 1)):
        if method == "cfa" or data == "a":
            make_run(tmp_path, data, method, seed)
    for method, seed in (("stfpm", 0), ("mkd", 0), ("cflow", 1)):
        (tmp_path / "b" / method / f"seed{seed}").mkdir(parents=True)
    make_run(tmp_path, "b", "cflow", 0)
    (tmp_path / "b/cflow/seed1/resume.pt").touch()
    common.write_csv(tmp_path / "b/cflow/seed1/log.csv", [dict(epoch=7, seconds=1)])
    make_run(tmp_path, "a", "cfa", 2)
    (tmp_path / "a/cfa/seed2").rename(tmp_path / "a/cfa/seed0_backup")  # no seed
    (tmp_path / "new_scans-0123abcd/cfa/seed0").mkdir(parents=True)  # of --predict
    return tmp_path


def test_missing_failed_running_and_unfinished_runs_are_visible(unequal):
    lock = os.open(unequal / "b/mkd/seed0", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as a run holds it
    runs, others = report.read_runs(unequal, unequal)
    os.close(lock)
    rows = read_all(unequal)[2]
    table = report.overview(rows, others, "image_auroc")
    cells = {line[0].text: [c.text for c in line[1:]] for line in table.lines}
    assert table.header == ["Method", "a", "b", "Mean rank"] and len(cells) == 5
    assert cells["padim"][1] == "missing" and cells["stfpm"][1] == "failed" and cells["mkd"][1] == "running"
    assert cells["cflow"][1].endswith("(1 of 2)") and "(of 1)" in cells["mkd"][2]
    text = run_report(unequal)[0]
    assert "cflow, seed1 unfinished after epoch 7" in text and "new_scans" not in text and len(runs["a", "cfa"]) == 2


def test_the_mean_rank_is_over_benchmarks_and_each_cell_leads_to_its_runs(tmp_path):
    for (method, shift), data in itertools.product(dict(a=2.5, b=1, c=-1).items(), "xy"):
        make_run(tmp_path, data, method, shift=shift)
    table = report.overview(read_all(tmp_path)[2], {}, "image_auroc")
    assert [(line[0].text, line[3].text) for line in table.lines] == [("a", "1.0"), ("b", "2.0"), ("c", "3.0")]
    assert table.lines[0][1].link == "../x/a/" and [line[1].shade for line in table.lines][::2] == [1, 0]


def test_the_rows_of_the_readmes_table_are_printed(tmp_path):
    make_run(tmp_path, "phantom", "padim")
    printed = run_report(tmp_path, "--table")[0]
    text = (ROOT / "README.md").read_text()
    assert printed.splitlines() == re.findall(r"^\| \w+ \| \d\d\.\d\d.*", text, re.M)  # none has been run yet
    assert not (tmp_path / "report").exists()
    make_run(tmp_path, "brain", "padim", counts=(7500, 640, 3075))
    make_run(tmp_path, "liver", "anogan", args=dict(limit=3, image_size=64))
    row = read_all(tmp_path)[2]
    auroc = {(r["data"], r["method"]): f"{100 * r['image_auroc']:.2f}" for r in row}
    lines = run_report(tmp_path, "--table")[0].splitlines()
    assert f"| padim | 79.02 | {auroc['brain', 'padim']} | 50.78 || 75.87 || 91.75 || 77.49 || 67.25 ||" in lines
    assert f"| anogan |||| {auroc['liver', 'anogan']} (l) |||||||||" in lines
    assert {line.count("|") for line in lines} == {14}


def test_markdown_and_latex_tables_are_balanced(written):
    blocks = re.findall(r"(?:^\|.*\n)+", (written[1] / "report.md").read_text(), re.M)
    names = 4 + 2 * 6  # four overviews; of each benchmark results, decisions, sizes, seeds, costs, p-values
    assert len(blocks) == names
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1
    text = (written[1] / "report.tex").read_text()
    tables = re.findall(r"\\begin{tabular}{(\w+)}\n\\toprule\n(.*?)\n\\midrule\n(.*?)\n\\bottomrule", text, re.S)
    assert len(tables) == names
    for columns, header, body in tables:
        for line in [header, *body.splitlines()]:
            assert line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
    for part in (r"x \& y", "-{}-lr-1 0.5", r"patch\_core (c)", r"\textbf{", r"$\pm$"):
        assert part in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}") and "**" not in text
    for name in ("table", "tabular", "adjustbox"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}")


def test_all_formats_hold_the_same_figures(written):
    def figures(text):
        return Counter(re.findall(r"\d+\.\d\d ± \d+\.\d\d|\d+\.\d\d to \d+\.\d\d", text.replace(r"$\pm$", "±")))

    markdown, latex, page = ((written[1] / name).read_text() for name in ("report.md", "report.tex", "index.html"))
    assert figures(markdown) == figures(latex) == figures(re.sub(r"<svg.*?</svg>", "", page, flags=re.S))
    for row in read_rows(written[1] / "report.csv"):
        low, high = 100 * float(row["image_auroc_low"]), 100 * float(row["image_auroc_high"])
        for text in (f"{100 * float(row['image_auroc']):.2f} ± {100 * float(row['image_auroc_std']):.2f}",
                     f"{low:.2f} to {high:.2f}"):
            assert text in markdown


def test_signs_are_written_as_latex_wants_them():
    assert report.tex("a_b 5% <0.001 ± C:\\x~^{}#$& --lr") == (
        r"a\_b 5\% $<$0.001 $\pm$ C:\textbackslash{}x\textasciitilde{}\textasciicircum{}\{\}\#\$\& -{}-lr")


# ----------------------------------------------------------------------------------------------------- page and figures
def test_the_page_has_closed_tags_landmarks_and_links_that_lead_somewhere(written):
    class Parser(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.ids, self.links, self.tags = [], set(), [], Counter()

        def handle_starttag(self, tag, attrs):
            attrs = dict(attrs)
            self.open += [tag] * (tag not in ("meta", "img", "input"))
            self.tags[tag] += 1
            self.ids.add(attrs.get("id"))
            self.links += [v for k, v in attrs.items() if k == "href"]

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    parser, text = Parser(), (written[1] / "index.html").read_text(encoding="utf-8")
    parser.feed(text)
    assert parser.open == [] and {"header", "nav", "main", "footer"} <= set(parser.tags)
    assert parser.tags["table"] == parser.tags["caption"] and parser.tags["figure"] == parser.tags["figcaption"]
    for link in parser.links:
        assert link[1:] in parser.ids if link[0] == "#" else (written[1] / unquote(link)).exists(), link
    assert "http" not in text and "x &amp; y" in text and "x & y" not in text
    assert all('role="img" aria-label="' in svg for svg in re.findall(r"<svg width[^>]*viewBox[^>]*>", text))


def test_every_figure_is_an_svg_of_its_own_without_variables(written):
    names = {p.name for p in written[1].glob("*.svg")}
    kinds = ("summary", "curves", "training", "differences")
    assert names == {f"{data}_{kind}.svg" for data, kind in itertools.product(("brain_mr", "x___y"), kinds)}
    for file in written[1].glob("*.svg"):
        text = file.read_text()
        ElementTree.fromstring(text)
        assert "var(" not in text
        assert file.name in (written[1] / "report.md").read_text()


def test_a_second_run_gives_the_same_bytes(written):
    _, folder = written
    names = {p.name for p in folder.iterdir() if p.suffix != ".svg"}
    assert names == {"index.html", "report.md", "report.tex", "report.csv", "pvalues.csv", "images-1.js"}
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    run_report(folder.parent)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not list(folder.parent.glob(".tmp*"))


def test_runs_without_maps_and_curves_have_neither_images_nor_pixel_figures(tmp_path):
    make_run(tmp_path, "x", "padim")
    _, folder = run_report(tmp_path)
    names = {"index.html", "report.md", "report.tex", "report.csv", "x_summary.svg", "x_curves.svg"}
    assert {p.name for p in folder.iterdir()} == names  # of the curves the image ROC alone
    assert (folder / "x_curves.svg").read_text().count('class="title"') == 1


def test_roc_curves_have_the_auroc_as_their_area():
    labels, scores = draw(5, 300, 200, 1.0)
    area = np.trapezoid(report.roc(labels == 1, report.placement(labels == 1, scores)[None]), report.RATES)
    assert area == pytest.approx(common.image_metrics(labels, scores)["image_auroc"], abs=0.003)


def test_names_on_lines_do_not_cover_each_other():
    rates = 100 * report.RATES
    lines = {f"method_{i}": (rates, 100 * report.RATES ** (0.2 + 0.01 * i)) for i in range(5)}
    places = report.name_lines(report.Frame((0, 100), (0, 100)), lines, list(lines))
    for (a, (x, y)), (b, (v, w)) in itertools.combinations(places.items(), 2):
        assert abs(y - w) > 12 or x + 6.5 * len(a) < v or v + 6.5 * len(b) < x


# ------------------------------------------------------------------------------------------------------- image browser
def test_the_images_carry_score_percentile_and_decision_as_the_run_stored_them(tmp_path):
    for method in ("padim", "deepsvdd"):
        folder = make_run(tmp_path, "x", method, browser=method == "padim")
    make_run(tmp_path, "x", "cfa", images="fedcba9876543210")  # saw other images
    runs, scores, _ = read_all(tmp_path)
    data = report.browser("x", runs, scores)
    rows, decision = read_rows(folder / "scores.csv"), json.loads((folder / "results.json").read_text())["decision"]
    method = data["methods"]["deepsvdd"]
    for i, row in enumerate(rows):
        score = float(row["score"])
        assert data["paths"][i] == row["path"] and data["labels"][i] == int(row["label"])
        assert method["scores"][i] == pytest.approx(score, rel=1e-4)
        assert method["anomalous"][i] == (score > decision["image"])
        percentile = 100 * np.mean(np.array(decision["normal_scores"]) <= score)
        assert method["percentiles"][i] == pytest.approx(percentile, abs=0.06)
    assert set(data["methods"]) == {"padim", "deepsvdd"} and method["maps"] is None
    assert (tmp_path / "report" / data["methods"]["padim"]["maps"]).resolve() == tmp_path / "x/padim/seed0/browser"
    assert (tmp_path / "report" / data["images"]).resolve() == tmp_path / "x/images-0123456789abcdef"
    assert data["masks"] == [i for i, row in enumerate(rows) if row["label"] == "1"]


@pytest.fixture(scope="module")
def page(written):
    if not PATH:
        pytest.skip("no Chromium")
    page = Page()
    page.look()
    page.open(written[1] / "index.html")
    yield page
    page.close()


WAIT = """const until = async test => {
            for (let i = 0; i < 200 && !test(); i++) await new Promise(done => setTimeout(done, 25));
            if (!test()) throw new Error("waited in vain for " + test); };
          const shown = () => [...document.querySelectorAll(".card")];
          const form = document.querySelector(".controls");
          const set = (name, value) => { form[name].value = value;
                                         form[name].dispatchEvent(new Event("input", {bubbles: true})); };
          document.querySelector(".browser").scrollIntoView();
          await until(() => shown().length);
"""


def test_a_click_on_a_columns_head_sorts_the_table_and_says_so(page):
    values = page.run("""
        const table = document.querySelector("table.results"), heads = table.tHead.rows[0].cells, found = [];
        const column = i => [...table.tBodies[0].rows].map(row => row.cells[i])
          .map(cell => cell.dataset.value ?? cell.innerText.trim());
        for (const i of [2, 2, 0]) {
          heads[i].firstElementChild.click();
          found.push([column(i), heads[i].ariaSort]);
        }
        return found""")
    (down, said), (up, _), (names, _) = values
    down, up = ([float(value) for value in column] for column in (down, up))
    assert said == "descending" and down == sorted(up, reverse=True) == up[::-1]
    assert names == ["deepsvdd", "padim", "patch_corec"]
    assert page.errors == []


def test_the_switch_shows_one_metric(page):
    assert page.run("""const [first, second] = document.querySelectorAll(".switch input"); second.click();
        const metrics = [...document.querySelectorAll(".metric")].filter(m => m.offsetHeight)
          .map(m => m.dataset.metric);
        first.click(); return metrics""") == ["pixel_auroc"]


def test_the_images_come_as_they_are_needed_the_worst_errors_first_and_can_be_filtered(page):
    assert page.run("return document.querySelectorAll('script[src]').length") == 0  # not before they are in view
    first, count, more, status = page.run(WAIT + """
        const first = shown().slice(0, 3).map(c => c.textContent), count = shown().length;
        const cards = document.querySelector(".cards");
        cards.scrollTop = cards.scrollHeight;
        await until(() => shown().length > count);
        return [first, count, shown().length, document.querySelector(".status").innerText]""")
    assert all("false" in text for text in first) and count < more <= 130 and status.startswith("130 of 130 images")
    wrong, named = page.run(WAIT + """
        set("show", "false negative");
        await until(() => shown().length); const wrong = shown().map(c => c.textContent);
        set("show", ""); set("name", "y12");
        await until(() => shown().length); const named = shown().map(c => c.textContent); set("name", "");
        return [wrong, named]""")
    assert wrong and all("false negative" in text for text in wrong)
    assert named and all("y12" in text for text in named)


def test_two_methods_are_side_by_side_with_contour_and_heat_map(page):
    kinds, width, scales = page.run(WAIT + """
        set("show", "anomalous"); set("b", "patch_core");
        await until(() => shown().length && shown()[0].querySelectorAll(".view").length === 2);
        const images = [...shown()[0].querySelectorAll("img")];
        await until(() => images.every(image => image.complete));
        const found = [images.map(i => i.className), Math.min(...images.map(i => i.naturalWidth)),
                       document.querySelectorAll(".scales .bar").length];
        set("b", ""); set("show", ""); return found""")
    assert kinds == ["", "heat", "mask"] * 2 and width > 0 and scales == 2


def test_an_image_opens_by_keyboard_and_the_arrows_go_on(page):
    page.run(WAIT + "shown()[0].focus()")
    page.press("Enter")
    first = page.run("return document.querySelector('#look[open]').innerText")
    page.press("ArrowRight")
    second = page.run("return document.querySelector('#look[open]').innerText")
    page.press("Escape")
    assert "1 of 130" in first and "2 of 130" in second and "percentile" in first and "ground truth" in first + second
    assert page.run("return document.querySelector('#look').open") is False


def test_a_methods_name_in_the_table_leads_to_its_images(page):
    assert page.run(WAIT + """const link = document.querySelector('a[data-method="patch_core"]'); link.click();
        const found = [form.a.value, link.hash]; set("a", "padim"); return found""") == ["patch_core", "#images-1"]


@pytest.mark.parametrize("width, media", [(1047, "print"), (400, "screen"), (1440, "screen")])  # 1047: A4 less margins
def test_nothing_is_wider_than_paper_or_screen(page, width, media):
    page.look(width, 1000, media)
    wide, clipped = page.run("""const edge = document.documentElement.clientWidth + 1;
        const beyond = kinds => [...document.querySelectorAll(kinds)]
          .filter(e => e.getBoundingClientRect().right > edge);
        const tables = matchMedia("print").matches ? beyond("table").length : 0;
        return [document.documentElement.scrollWidth > edge || tables > 0,
                beyond("caption, figure svg, p, h1, h2").map(e => e.tagName + e.textContent.slice(0, 40))]""")
    page.look()
    assert not wide and not clipped


def test_the_printed_page_is_a_pdf_of_a4_pages(page, tmp_path):
    page.pdf(tmp_path / "report.pdf")
    page.look()
    text = (tmp_path / "report.pdf").read_bytes()
    assert text.startswith(b"%PDF") and re.search(rb"/MediaBox \[0 0 841\.\d+ 59[45]\.\d+\]", text)


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_the_page_in_light_and_dark(page, dark):
    page.look(dark=dark)
    names = ["page", "ink", "soft", "best", "bad", "good", *(f"hue{i}" for i in range(report.HUES))]
    colours = page.run("const style = getComputedStyle(document.documentElement);"
                       f"return {names}.map(name => style.getPropertyValue('--' + name))")
    page.look()

    def luminance(colour):  # of #rrggbb (WCAG 2)
        r, g, b = (v / 12.92 if (v := byte / 255) < 0.04045 else ((v + 0.055) / 1.055) ** 2.4
                   for byte in bytes.fromhex(colour.strip()[1:]))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05

    ground, *others = map(luminance, colours)
    ratios = dict(zip(names[1:], (max(v / ground, ground / v) for v in others), strict=True))
    assert {name: ratio for name, ratio in ratios.items() if ratio < (3.5 if "hue" in name else 4.5)} == {}


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("file, text", [
    ("results.json", "{"),
    ("results.json", "[]"),
    ("results.json", '{"method": "padim"}'),
    ("results.json", lambda t: t.replace('"image_ap": 0.', '"image_ap": 7.')),
    ("results.json", lambda t: t.replace('"image_ap": 0.', '"image_ap": Infinity, "x": 0.')),
    ("results.json", lambda t: t.replace('"train_seconds": ', '"train_seconds": Infinity, "x": ')),
    ("results.json", lambda t: t.replace('"limit"', '"limt"')),
    ("results.json", lambda t: t.replace('"normal_scores"', '"scores"')),
    ("results.json", lambda t: t.replace('"train": {"normal"', '"train": {"nrmal"')),
    ("scores.csv", "path,score\na,1\n"),
    ("scores.csv", "path,label,score\n"),
    ("scores.csv", lambda t: t.replace("/x1.png,0,", "/x1.png,")),
    ("scores.csv", lambda t: t + "test/good/b.png,0,nan\n"),
    ("scores.csv", lambda t: t + "test/good/b.png,0,9\n"),  # no longer the scores of results.json
    ("curves.csv", "fpr,tpr,pro\n0,0,0\n1,x,1\n"),
    ("curves.csv", "fpr,tpr,pro\n0,0,0\n1,1,1\n0.5,1,1\n"),
    ("log.csv", "epoch,loss\n1,x\n"),
    ("lesions.csv", "path,lesion\na,1\n"),
])
def test_damaged_run_folders_end_with_one_line_that_names_the_file(file, text, tmp_path):
    folder = make_run(tmp_path, "x", "padim", curves=True, log=True, lesions=True)
    target = folder / file
    target.write_text(text if isinstance(text, str) else text(target.read_text()))
    done = run_here("report.py", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and str(target) in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"x"}  # nothing half-written


@pytest.mark.parametrize("damage", [
    lambda r: r.pop("seed"),
    lambda r: r.update(epoch="2"),
    lambda r: r["decision"].update(image="x"),
    lambda r: r["decision"].update(normal_scores={}),
    lambda r: r["counts"]["train"].update(normal="x"),
    lambda r: r.update(check=dict(summary=5)),
])
def test_values_of_another_type_end_with_one_line(damage, tmp_path):
    target = make_run(tmp_path, "x", "padim") / "results.json"
    results = json.loads(target.read_text())
    damage(results)
    target.write_text(json.dumps(results))
    done = run_here("report.py", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(target) in done.stderr, done.stderr


def test_the_main_sentence_says_that_a_marked_method_is_higher(tmp_path):
    make_run(tmp_path, "x", "padim", shift=3.0, weights=[dict(name="x", trained=False)])
    make_run(tmp_path, "x", "deepsvdd", shift=1.0)
    said = run_here("report.py", tmp_path).stdout
    assert "Of the methods without the marks (u), (l) and (f), deepsvdd has the highest image AUROC" in said


def test_a_copied_seed_is_not_another_seed_and_a_link_to_nothing_is_none(tmp_path):
    folder = make_run(tmp_path, "x", "padim")
    (folder.parent / "seed2").symlink_to(tmp_path / "nowhere")
    assert run_here("report.py", tmp_path).returncode == 0
    shutil.copytree(folder, folder.parent / "seed1")
    done = run_here("report.py", tmp_path)
    assert done.returncode == 2 and "its seed is 0; was the folder renamed or copied?" in done.stderr


def test_runs_on_other_files_are_marked_and_not_compared(tmp_path):
    for method in ("padim", "stfpm", "cfa"):
        make_run(tmp_path, "x", method, images="fedcba9876543210" if method == "cfa" else "0123456789abcdef")
    marks = {r["method"]: r["marks"] for r in read_all(tmp_path)[2]}
    assert [method for method in marks if "f" in marks[method]] == ["cfa"]


def test_a_benchmark_that_is_called_report_is_not_replaced(tmp_path):
    folder = make_run(tmp_path, "report", "padim")
    done = run_here("report.py", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and (folder / "results.json").exists()
