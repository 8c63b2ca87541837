"""report.py on made-up run folders: tables, intervals, tests between methods, figures; methods/published.csv."""

import csv
import itertools
import json
import re
import time
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT, load_script, run_here
from PIL import Image

import common

report = load_script("report.py")
METHODS = {p.stem for p in (ROOT / "methods").glob("*.py")}


def read_rows(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


PUBLISHED = read_rows(ROOT / "methods/published.csv")
PRINTED = [r for r in PUBLISHED if r["mean"]]


def draw(seed, normal, anomalous, shift):
    """Labels and scores: normal N(0, 1), anomalous N(shift, 1)."""
    labels = np.repeat([0, 1], [normal, anomalous])
    return labels, np.random.default_rng(seed).normal(size=len(labels)) + shift * labels


def make_run(root, data, method, seed=0, shift=1.0, counts=(12, 30, 30), maps=0, curves=False, name="a", **changes):
    """A run folder as a method leaves it; counts: train, test normal, test anomalous; changes: of results.json."""
    labels, scores = draw([seed, *method.encode()], *counts[1:], shift)
    folder = root / data / method / f"seed{seed}"
    folder.mkdir(parents=True)
    paths = [f"test/{'Ungood' if label else 'good'}/{name}{i}.png" for i, label in enumerate(labels)]
    common.write_csv(folder / "scores.csv", [dict(path=p, label=int(y), score=repr(float(s)))
                                             for p, y, s in zip(paths, labels, scores, strict=True)])
    if curves:
        t = np.linspace(0, 1, 50)
        common.write_csv(folder / "curves.csv", [dict(fpr=x, tpr=x**0.2, pro=x**0.4) for x in t])
    for i in range(maps):
        (folder / "maps").mkdir(exist_ok=True)
        file = common.map_name(i * len(paths) // maps, paths[i * len(paths) // maps])
        tone = np.random.default_rng(i).integers(0, 255, (16, 48, 3), np.uint8)
        Image.fromarray(tone).save(folder / "maps" / file)
    known = common.image_metrics(labels, scores)
    results = dict(
        method=method, data=data, seed=seed, train_seconds=1.0, test_ms_per_image=2.0, args=dict(limit=None),
        metrics=known | dict(pixel_auroc=0.9, pixel_ap=None, aupro=0.7, dice=0.3, dice_valid=0.4),
        weights=[dict(name="x", trained=True)],
        counts=dict(train=dict(normal=counts[0]), test=dict(normal=counts[1], anomalous=counts[2])), changed={},
        format=common.FORMAT, check=None, epoch=None, notes={}, peak_memory_gib=dict(ram=1.5), device="cpu")
    (folder / "results.json").write_text(json.dumps(results | changes))
    return folder


def run_report(folder):
    done = run_here("report.py", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "report"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(stdout, report folder) of three methods, two benchmarks, two seeds; one method has neither maps nor curves."""
    root = tmp_path_factory.mktemp("runs")
    for data, (method, shift), seed in itertools.product(
            ("brain_mr", "x & y"), dict(padim=1.5, patch_core=0.3, deepsvdd=0.35).items(), (0, 1)):
        images_only = method == "deepsvdd"
        make_run(root, data, method, seed, shift, maps=0 if images_only else 12, curves=not images_only,
                 changed=dict(lr_1=0.5) if method == "patch_core" else {})
    return run_report(root)


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
        low, high = report.interval(labels == 1, scores[None])
        covered += low < true < high
    assert 0.92 < covered / 400 < 0.98


def test_the_interval_is_that_of_a_plain_loop_over_the_draws_with_ties_and_seeds():
    anomalous = np.random.default_rng(0).permutation(40) < 25
    scores = (np.random.default_rng(1).normal(size=(3, 40)) + 0.5 * anomalous).round(1)  # ties
    found = []
    for times, times_normal in zip(*(drawn.T.astype(int) for drawn in report.resample(25, 15)), strict=True):
        assert times.sum() == 25 and times_normal.sum() == 15
        a, b = (scores[:, c].repeat(t, axis=1) for c, t in ((anomalous, times), (~anomalous, times_normal)))
        a, b = a[:, :, None], b[:, None]
        found.append((a > b).mean() + (a == b).mean() / 2)
    assert report.interval(anomalous, scores) == pytest.approx(np.quantile(found, [0.025, 0.975]), abs=1e-6)


def test_the_interval_agrees_with_delongs_variance_and_is_quick_on_the_largest_test_set():
    labels, scores = draw(3, 781, 16413, 1.0)  # chest
    share, anomalous = report.placement(labels == 1, scores), labels == 1
    error = sum(share[c].var(ddof=1) / c.sum() for c in (anomalous, ~anomalous)) ** 0.5
    expected = share[anomalous].mean() + 1.96 * error * np.array([-1, 1])
    start = time.process_time()
    low_high = report.interval(anomalous, scores[None])
    assert low_high == pytest.approx(expected, abs=0.1 * error) and time.process_time() - start < 10


def test_no_interval_where_scores_separate_perfectly_or_a_class_has_one_image():
    for labels in ([0, 0, 1, 1], [0, 0, 0, 1]):
        assert report.interval(np.array(labels) == 1, np.array([[1.0, 2, 3, 4]])) == (None, None)
    assert report.interval(np.array([0, 0, 0, 1]) == 1, np.array([[1.0, 4, 2, 3]])) == (None, None)
    assert report.interval(np.array([0, 0, 1, 1]) == 1, np.array([[1.0, 2, 3, 4], [1, 1, 1, 1]])) == (None, None)


def test_p_values_are_small_for_different_methods_and_even_for_equal_ones():
    rng, labels, found = np.random.default_rng(0), np.repeat([0, 1], [60, 50]), []
    for _ in range(1000):
        common_part = rng.normal(size=110) + labels  # scores of the same images are correlated
        found.append(report.p_value(labels == 1, *(report.placement(labels == 1, common_part + rng.normal(size=110))
                                                   for _ in range(2))))
    assert 0.035 < np.mean(np.array(found) < 0.05) < 0.07 and 0.47 < np.mean(found) < 0.53  # uniform in [0, 1]
    labels, good = draw(1, 100, 100, 2.0)
    good, bad = (report.placement(labels == 1, s) for s in (good, draw(2, 100, 100, 0.2)[1]))
    assert report.p_value(labels == 1, good, bad) < 1e-6 and report.p_value(labels == 1, good, good) == 1


def test_holm_stops_at_the_first_that_fails():
    assert report.holm(dict(a=0.001, b=0.02, c=0.04, d=0.5)) == {"a"}
    assert report.holm(dict(a=0.001, b=0.01, c=0.02)) == {"a", "b", "c"}


def test_only_methods_with_the_same_images_are_compared(tmp_path):
    for method, name in dict(padim="a", cfa="a", mkd="other").items():
        make_run(tmp_path, "x", method, name=name)
    make_run(tmp_path, "x", "cflow", 0)
    make_run(tmp_path, "x", "cflow", 1, name="other")  # seeds that saw other images
    known = {}
    scores = {key: report.read_scores(r, known) for key, r in report.read_runs(tmp_path).items()}
    matrix, rows, left_out = report.compare("x", scores)
    assert {(r["method"], r["other"]) for r in rows} <= {("padim", "cfa"), ("cfa", "padim")} and len(rows) == 1
    assert left_out == ["cflow", "mkd"] and [len(line) for line in matrix[1]] == [4, 4]


# --------------------------------------------------------------------------------------------------------------- tables
def test_report_shows_mean_and_deviation_and_marks_what_is_not_as_published(tmp_path):
    check = dict(summary="1 error: test/good/a.png is train/good/b.png")
    for seed, auroc in enumerate((0.5, 0.6)):
        folder = make_run(tmp_path, "phantom", "padim", seed, check=check, changed=dict(backbone="mobilenet_v2"),
                          weights=[dict(name="x", trained=False)], metrics=dict(
                              image_auroc=auroc, image_ap=0.5, pixel_auroc=None, pixel_ap=None, aupro=None, dice=None,
                              dice_valid=None))
        (folder / "scores.csv").unlink()
    stdout, folder = run_report(tmp_path)
    for text in (stdout, (folder / "report.md").read_text()):
        assert "padim (u) (c)" in text and "55.00 ± 7.07" in text
        assert "--backbone mobilenet_v2" in text and "no benchmark" in text
        assert "datasets/check.py: 1 error: test/good/a.png is train/good/b.png" in text
    assert run_here("report.py", tmp_path / "nothing").returncode == 2


def test_the_best_figure_is_bold_and_marked_rows_do_not_compete():
    row = dict(marks="", seeds=1, train_seconds=1, ms=1, image_auroc_low=None, image_auroc_high=None)
    row |= {m: None for m in report.METRICS} | {f"{m}_std": None for m in report.METRICS}
    row |= {f"{m}_thesis_mean": None for m in report.METRICS}
    rows = [row | dict(method=m, image_auroc=v, marks=k) for m, v, k in
            (("a", 0.7, ""), ("b", 0.80001, ""), ("c", 0.80002, ""), ("d", 0.99, " (l)"))]
    shown = {line[0]: line[2] for line in report.table(rows, full=True)[1]}
    assert shown == {"a": "70.00", "b": "**80.00**", "c": "**80.00**", "d (l)": "99.00"}


def rows_of(folder):
    runs = report.read_runs(folder)
    return report.rows_of(runs, dict.fromkeys(runs), report.read_published())


@pytest.mark.parametrize("difference", ["none", "auto found it", "changed", "batch size", "limit", "untrained",
                                        "textures", "counts", "one seed", "benchmark"])
def test_the_thesis_figure_is_shown_only_next_to_what_was_resolved_as_published(difference, tmp_path):
    changes = dict(changed=dict(changed=dict(lr=1)), limit=dict(args=dict(limit=5)),
                   untrained=dict(changed=dict(weights="auto"), weights=[dict(name="x", trained=False)]),
                   textures=dict(notes=dict(textures=dict(source="images"))))
    changes |= {"auto found it": dict(changed=dict(weights="auto")), "batch size": dict(changed=dict(batch_size=4))}
    data, same = "phantom" if difference == "benchmark" else "OCT2017", difference in ("none", "auto found it")
    make_run(tmp_path, data, "padim", 0, counts=(26315, 242, 725 if difference == "counts" else 726),
             **changes.get(difference, {}))
    make_run(tmp_path, data, "padim", 1, counts=(26315, 242, 726),
             changed=dict(lr=1) if difference == "one seed" else {})
    row, = rows_of(tmp_path)
    assert row["image_auroc_thesis_mean"] == (pytest.approx(0.9175) if same else None)
    header, (line,) = report.table([row], full=True)
    ours = 100 * row["image_auroc"]
    assert ("Thesis (diff.)" in header) == (f"91.75 ± 0.96 ({ours - 91.75:+.2f})" in line) == same


@pytest.mark.parametrize("method", ["ddpm", "winclip", "clip_zeroshot"])
def test_rows_of_another_method_or_of_our_own_sentences_show_the_thesis_figure_without_a_difference(method, tmp_path):
    make_run(tmp_path, "oct2017", method, counts=(26315, 242, 726))
    text = (run_report(tmp_path)[1] / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| {method}"))
    assert " ± " in row and "+" not in row and "(-" not in row and "No difference for " + method in text


def test_dice_shows_the_thesis_figure_without_a_difference(tmp_path):
    make_run(tmp_path, "brain", "padim", counts=(7500, 640, 3075))
    rows = rows_of(tmp_path)
    assert rows[0]["dice_thesis_mean"] and "(" not in report.thesis_cell(rows[0], "dice")
    assert "(" in report.thesis_cell(rows[0], "image_auroc") and any("Dice:" in n for n in report.notes_of(rows)[2])


def test_variants_of_clip_recon_have_their_table_and_figure_and_the_thesis_rows(tmp_path):
    published = dict(limit=None, prompt_tokens=16, layers=[1, 2, 3, 4], backbone="clip")
    variants = dict(base={}, backbone_resnet18=dict(backbone="resnet18"), layers_1_2=dict(layers=[1, 2]))
    for variant, changed in variants.items():
        for seed in (0, 1):
            make_run(tmp_path / "ablation" / variant, "brain", "clip_recon", seed, counts=(7500, 640, 3075),
                     args=published | changed, changed=changed)
    printed, report = run_report(tmp_path)
    rows = re.findall(r"^  (base|backbone resnet18|layers 1 2)", printed, re.M)
    assert rows == [v.replace("_", " ") for v in variants]
    text = (report / "report.md").read_text()
    assert "## brain: variants of clip_recon" in text and (report / "brain_ablation.png").exists()
    rows = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert "92.74 ± 0.84" in rows["| base"] and "87.23 ± 1.34" in rows["| backbone resnet18 (c)"]  # thesis, Table 4.1
    assert "92.74" not in rows["| layers 1 2 (c)"]


def test_a_base_without_variants_yet_has_no_figure(tmp_path):
    make_run(tmp_path / "ablation/base", "brain", "clip_recon")
    printed, report = run_report(tmp_path)
    assert "variants of clip_recon" in printed and not (report / "brain_ablation.png").exists()


def test_a_suspect_thesis_figure_carries_a_question_mark_and_its_note(tmp_path):
    make_run(tmp_path, "oct2017", "clip_recon", counts=(26315, 242, 726))
    text = (run_report(tmp_path)[1] / "report.md").read_text()
    assert "98.94 ± 2.46? (" in text and "no five values up to 100" in text and "Thesis: the printed figure" in text


def test_markdown_and_latex_tables_are_balanced(written):
    blocks = re.findall(r"(?:^\|.*\n)+", (written[1] / "report.md").read_text(), re.M)
    assert len(blocks) == 6  # an overview of two metrics, and for each of two benchmarks the table and the p-values
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1
    text = (written[1] / "report.tex").read_text()
    tables = re.findall(r"\\begin{tabular}{(\w+)}\n\\toprule\n(.*?)\n\\midrule\n(.*?)\n\\bottomrule", text, re.S)
    assert len(tables) == 6
    for columns, header, body in tables:
        for line in [header, *body.splitlines()]:
            assert line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
    for part in (r"x \& y", "-{}-lr-1 0.5", r"patch\_core (c)", r"\textbf{", r"$\pm$"):
        assert part in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}") and "**" not in text
    for name in ("table", "tabular", "adjustbox"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}")


def test_signs_are_written_as_latex_wants_them():
    assert report.tex("**a_b** 5% <0.001 ± C:\\x~^{}#$&") == (
        r"\textbf{a\_b} 5\% $<$0.001 $\pm$ C:\textbackslash{}x\textasciitilde{}\textasciicircum{}\{\}\#\$\&")


# ----------------------------------------------------------------------------------------------------- page and figures
def test_the_page_is_one_file_with_closed_tags_and_links_that_lead_somewhere(written):
    class Page(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.ids, self.links, self.sources = [], set(), [], []

        def handle_starttag(self, tag, attrs):
            attrs = dict(attrs)
            self.open += [tag] * (tag not in ("meta", "img"))
            self.ids.add(attrs.get("id"))
            self.links += [v for k, v in attrs.items() if k == "href"]
            self.sources += [v for k, v in attrs.items() if k == "src"]

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    page, text = Page(), (written[1] / "index.html").read_text(encoding="utf-8")
    page.feed(text)
    assert page.open == [] and page.links and all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert len(page.sources) == 6 and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert "http" not in text and "<script" not in text and "url(" not in text and "x &amp; y" in text


def test_the_report_folder_holds_every_format_and_a_second_run_gives_the_same_bytes(written):
    _, folder = written
    names = {p.name for p in folder.iterdir()}
    assert names == {"index.html", "report.md", "report.tex", "report.csv", "pvalues.csv",
                     *(f"{d}_{k}.png" for d in ("brain_mr", "x & y") for k in ("curves", "maps", "cost"))}
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    run_report(folder.parent)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not list(folder.parent.glob(".tmp*"))


def test_the_grid_shows_the_images_that_all_methods_have_and_leaves_out_methods_without_maps(written):
    width, height = Image.open(written[1] / "brain_mr_maps.png").size
    step = report.TILE + 4
    assert (width // step, height // step) == (4, report.SHOWN + 1)  # image, ground truth, two methods


def test_runs_without_maps_and_curves_have_neither_figure(tmp_path):
    make_run(tmp_path, "x", "padim")
    _, folder = run_report(tmp_path)
    assert {p.name for p in folder.glob("*.png")} == {"x_curves.png", "x_cost.png"}  # curves: image ROC alone
    assert not (folder / "pvalues.csv").exists()


def test_roc_curves_have_the_auroc_as_their_area():
    labels, scores = draw(5, 300, 200, 1.0)
    area = np.trapezoid(report.roc(labels == 1, scores[None]), report.RATES)
    assert area == pytest.approx(common.image_metrics(labels, scores)["image_auroc"], abs=0.003)


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("file, text", [
    ("results.json", "{"),
    ("results.json", "[]"),
    ("results.json", '{"method": "padim"}'),
    ("results.json", lambda t: t.replace('"aupro": 0.7', '"aupro": 7')),
    ("results.json", lambda t: t.replace('"limit"', '"limt"')),
    ("results.json", lambda t: t.replace('"train": {"normal"', '"train": {"nrmal"')),
    ("scores.csv", "path,score\na,1\n"),
    ("scores.csv", "path,label,score\n"),
    ("scores.csv", lambda t: t.replace("\ntest/good/a1.png,0,", "\ntest/good/a1.png,")),
    ("scores.csv", lambda t: t + "test/good/b.png,0,nan\n"),
    ("scores.csv", lambda t: t + "test/good/b.png,0,9\n"),  # no longer the scores of results.json
    ("curves.csv", "fpr,tpr,pro\n0,0,0\n1,x,1\n"),
    ("curves.csv", "fpr,tpr,pro\n0,0,0\n1,1,1\n0.5,1,1\n"),
    ("maps", "no image"),
])
def test_damaged_run_folders_end_with_one_line_that_names_the_file(file, text, tmp_path):
    folder = make_run(tmp_path, "x", "padim", maps=2, curves=True)
    target = min((folder / "maps").iterdir()) if file == "maps" else folder / file
    target.write_text(text if isinstance(text, str) else text(target.read_text()))
    done = run_here("report.py", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and str(target) in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"x"}  # nothing half-written


def test_a_benchmark_that_is_called_report_is_not_replaced(tmp_path):
    folder = make_run(tmp_path, "report", "padim")
    done = run_here("report.py", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and (folder / "results.json").exists()
