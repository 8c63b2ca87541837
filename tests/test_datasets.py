"""Preparation scripts on small sources in their real format."""

import csv
import shutil
from collections import Counter
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from conftest import ROOT, files_of, load_script, run_here, run_script, write_nifti
from PIL import Image

import common


def test_phantom_is_the_same_to_the_byte_and_a_second_run_does_nothing(phantom, tmp_path):
    arguments = ["--root", tmp_path, "--size", 64, "--train", 12, "--valid", 4, "--test", 6]
    assert run_here("datasets/phantom.py", *arguments).returncode == 0
    assert files_of(tmp_path) == files_of(phantom)
    again = run_here("datasets/phantom.py", *arguments)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    other = run_here("datasets/phantom.py", *arguments, "--seed", 1)
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    shutil.rmtree(tmp_path / "phantom/test/good")
    lost = run_here("datasets/phantom.py", *arguments)
    assert lost.returncode == 2 and "missing or extra images" in lost.stderr and lost.stderr.count("\n") == 1


def test_phantom_has_masks_inside_the_head_and_a_manifest(phantom):
    base = phantom / "phantom"
    entries = common.list_split(common.find_benchmark("phantom", phantom)[1], "test")
    assert [label for _, label, _ in entries] == [0] * 6 + [1] * 6
    for image, label, mask in entries:
        assert (mask is not None) == bool(label)
        if label:
            lesion = np.asarray(Image.open(mask)) > 0
            assert 0 < lesion.mean() < 0.2 and np.asarray(Image.open(image))[lesion].mean() > 20
    with open(base / "manifest.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == 12 + 8 + 12


# ------------------------------------------------------------------------------ brats2021, and what all sources share
brats2021 = load_script("datasets/brats2021.py")


def cohort(raw, cases=8, axes="LAS", shape=(24, 20, 110), **stored):
    """BraTS2021 cases in their real format, small; case k is free of tumour in its first 5 - k slices of the window."""
    for k in range(cases):
        rng = np.random.default_rng(k)
        flair, seg = rng.integers(0, 900, shape).astype(np.float32), np.zeros(shape, np.uint8)
        seg[5:9, 4:8, 60 + max(0, 5 - k) : 100] = 4
        for kind, array in (("flair", flair), ("seg", seg)):
            name = f"BraTS2021_{k:05}"
            write_nifti(raw / name / f"{name}_{kind}.nii.gz", array, axes, **(stored if kind == "flair" else {}))
    return raw


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return cohort(tmp_path_factory.mktemp("raw"))


def prepare(source, root, *more):
    return run_here("datasets/brats2021.py", "--raw", source, "--root", root, "--workers", 2, *more)


def images_of(root):
    """What was prepared, without the record, which has the times of the source's files."""
    return {file: content for file, content in files_of(root).items() if file.name != "brats2021.json"}


def one_line(done, *words):
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr and all(w in done.stderr for w in words), done.stderr


def test_the_full_brats2021_gives_the_published_patients_and_anomalous_counts():
    rng = np.random.default_rng(0)  # names, and counts of tumour-free slices that make the published ranking
    free = {f"BraTS2021_{k:05}": [] for k in rng.permutation(1251)}
    for case, count in zip(list(free)[:625], [18] * 290 + [17] * 134 + [4] * 154 + [3] * 8 + [1] * 39, strict=True):
        free[case] = list(range(60, 60 + count))
    planned, counts = brats2021.plan(free), Counter()
    for split, slices in planned.values():
        counts += Counter({(split, label): len(chosen) for label, chosen in slices.items()})
    assert len(planned) == 1251  # each patient in one split, by its being a dict
    assert Counter((s, *y) for s, y in planned.values()) == dict(zip(brats2021.GROUPS, brats2021.PATIENTS, strict=True))
    assert counts == {("train", 0): 290 * 18 + 134 * 17, ("test", 0): 640, ("valid", 0): 39, ("valid", 1): 44,
                      ("test", 1): 3075}


def test_a_brats2021_split_list_is_followed(source, tmp_path):
    rows = ["case,split,label", "BraTS2021_00002,train,0", "BraTS2021_00001,test,0", "BraTS2021_00005,test,1"]
    (tmp_path / "split.csv").write_text("\n".join(rows))
    assert prepare(source, tmp_path, "--split", tmp_path / "split.csv").returncode == 0
    with open(tmp_path / "brain/brats2021.csv", newline="") as f:
        found = {f"{r['case']},{r['split']},{r['label']}" for r in csv.DictReader(f)}
    assert found == set(rows[1:])
    for row, said in (("BraTS2021_00002,test,0", "twice"), ("BraTS2021_90000,test,0", "not in the source"),
                      ("BraTS2021_00007,train,1", "not one of")):
        (tmp_path / "split.csv").write_text("\n".join([*rows, row]))
        one_line(prepare(source, tmp_path / said, "--split", tmp_path / "split.csv"), row[:15], said)


def test_slices_are_the_right_way_up_scaled_by_their_own_range_and_lie_on_their_masks(source, tmp_path):
    assert prepare(source, tmp_path).returncode == 0
    case, z = "BraTS2021_00007", 84
    volume = np.asarray(nibabel.as_closest_canonical(nibabel.load(source / case / f"{case}_flair.nii.gz")).dataobj)
    seg = np.asarray(nibabel.as_closest_canonical(nibabel.load(source / case / f"{case}_seg.nii.gz")).dataobj)
    expected = volume[::-1, ::-1, z].T  # (y, x): front on top, the patient's right on the left
    expected = 255 * (expected - expected.min()) / (expected.max() - expected.min())
    files = {p.name: p for p in (tmp_path / "brain/test/Ungood/img").iterdir()}
    found = np.asarray(Image.open(files[f"{case}_{z}.png"]), float)
    assert found.shape == (20, 24) and np.abs(found - expected).max() <= 0.5 + 1e-3
    mask = np.asarray(Image.open(tmp_path / f"brain/test/Ungood/anomaly_mask/{case}_{z}.png"))
    assert np.array_equal(mask > 0, seg[::-1, ::-1, z].T > 0) and set(np.unique(mask)) == {0, 255}


@pytest.mark.slow
def test_neither_the_affines_signs_nor_the_stored_type_change_the_images(source, tmp_path):
    assert prepare(source, tmp_path / "a").returncode == 0
    for axes, stored in (("RPS", {}), ("LPI", dict(slope=0.5, inter=-100.0))):
        raw = cohort(tmp_path / axes, axes=axes, **stored)
        assert prepare(raw, tmp_path / f"b{axes}").returncode == 0
        assert images_of(tmp_path / f"b{axes}") == images_of(tmp_path / "a")


def test_the_same_source_gives_the_same_bytes_and_a_second_run_does_nothing(source, tmp_path):
    for root in ("a", "b"):
        assert prepare(source, tmp_path / root, "--workers", 1 + (root == "b")).returncode == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    again = prepare(source, tmp_path / "a")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    one_line(prepare(source, tmp_path / "a", "--seed", 1), "other arguments")


@pytest.mark.slow
def test_a_run_killed_half_way_is_finished_by_the_next(source, tmp_path):
    assert prepare(source, tmp_path / "whole").returncode == 0
    killed = "import os, prepare\nkeep = prepare.save\ndef save(folder, split, label, name, *rest, **columns):\n" \
        "    if name.startswith('BraTS2021_00003'): os.kill(os.getppid(), 9); os.kill(os.getpid(), 9)\n" \
        "    return keep(folder, split, label, name, *rest, **columns)\nprepare.save = save\n"
    script = (ROOT / "datasets/brats2021.py").read_text()
    (tmp_path / "brats2021.py").write_text(script.replace("import prepare\n", killed, 1).replace(
        "__file__", repr(str(ROOT / "datasets/brats2021.py"))))
    dead = run_script(tmp_path / "brats2021.py", "--raw", source, "--root", tmp_path / "cut", "--workers", 1)
    assert dead.returncode == -9 and not (tmp_path / "cut/brain").exists()
    kept = tmp_path / "cut/.preparing-brats2021/part/train/good/img/BraTS2021_00000_60.png"
    written = kept.stat().st_mtime_ns
    assert prepare(source, tmp_path / "cut").returncode == 0
    assert (tmp_path / "cut/brain/train/good/img" / kept.name).stat().st_mtime_ns == written
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def shorten(files):
    files["flair"].write_bytes(files["flair"].read_bytes()[:2000])


def remove_label(files):
    files["seg"].unlink()


def other_shape(files):
    write_nifti(files["seg"], np.zeros((24, 21, 110), np.uint8))


def not_a_number(files):
    write_nifti(files["flair"], np.full((24, 20, 110), np.nan, np.float32))


def four_dimensions(files):
    nibabel.save(nibabel.Nifti1Image(np.zeros((24, 20, 110, 2), np.float32), np.eye(4)), files["flair"])


def too_few_slices(files):
    for file in files.values():
        write_nifti(file, np.zeros((24, 20, 90), np.uint8))


@pytest.mark.parametrize("harm, said", [
    (shorten, "damaged"), (remove_label, "no segmentation"), (other_shape, "(24, 21, 110)"),
    (not_a_number, "not finite"), (four_dimensions, "dimensions"), (too_few_slices, "90 axial slices")])
def test_a_damaged_case_is_named_skipped_and_listed_and_strict_stops_there(harm, said, tmp_path):
    raw = cohort(tmp_path / "raw", 6)
    case = raw / "BraTS2021_00002"
    harm({kind: case / f"{case.name}_{kind}.nii.gz" for kind in ("flair", "seg")})
    done = prepare(raw, tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    named = [line for line in done.stderr.splitlines() if case.name in line]
    assert len(named) == 2 and all(said in line for line in named) and named[1].startswith("made without 1 damaged")
    assert not any(case.name in str(p) for p in files_of(tmp_path / "brain"))
    again = prepare(raw, tmp_path)  # nothing to do, and still without that case
    assert again.returncode == 1 and "nothing to do" in again.stdout and case.name in again.stderr
    strict = prepare(raw, tmp_path / "strict", "--strict")
    assert strict.returncode == 2 and case.name in strict.stderr and not (tmp_path / "strict/brain").exists()


@pytest.mark.slow
def test_a_replaced_file_changes_the_plan_and_leaves_nothing_of_the_earlier_one(tmp_path):
    raw = cohort(tmp_path / "raw")
    assert prepare(raw, tmp_path / "whole").returncode == 0
    file = raw / "BraTS2021_00000/BraTS2021_00000_seg.nii.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])  # the best case is missing, so that the others move up
    assert prepare(raw, tmp_path / "cut", "--strict").returncode == 2
    begun = tmp_path / "cut/.preparing-brats2021"
    assert prepare(raw, tmp_path / "without").returncode == 1
    shutil.copytree(tmp_path / "without/brain", begun / "part", dirs_exist_ok=True)
    file.write_bytes(whole)
    done = prepare(raw, tmp_path / "cut")
    assert done.returncode == 0 and "1 of its files changed" in done.stdout and file.name in done.stdout
    assert images_of(tmp_path / "cut") == images_of(tmp_path / "whole")
    one_line(prepare(raw, tmp_path / "without"), "1 of its files changed", file.name, "remove it")


def test_wrong_folders_end_with_one_line_that_says_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "raw/something").mkdir(parents=True)
    one_line(prepare(tmp_path / "nothing", tmp_path), "no folder", "BraTS2021_00000")
    one_line(prepare(tmp_path / "raw", tmp_path), "BraTS2021_00000", "something/")


def test_an_image_in_two_splits_is_an_error_that_names_both_and_a_switch_lets_it_pass(tmp_path):
    raw = cohort(tmp_path / "raw")
    for kind in ("flair", "seg"):  # the case with most tumour-free slices trains, its copy tests
        copy = raw / "BraTS2021_00001" / f"BraTS2021_00001_{kind}.nii.gz"
        copy.write_bytes((raw / "BraTS2021_00000" / f"BraTS2021_00000_{kind}.nii.gz").read_bytes())
    (tmp_path / "split.csv").write_text("case,split,label\nBraTS2021_00000,train,0\nBraTS2021_00001,test,0\n"
                                        "BraTS2021_00007,test,1\n")
    with_list = ("--split", tmp_path / "split.csv")
    one_line(prepare(raw, tmp_path, *with_list), "BraTS2021_00000_60", "BraTS2021_00001_60", "same image")
    assert not (tmp_path / "brain").exists()
    passed = prepare(raw, tmp_path, *with_list, "--allow-duplicates")
    assert passed.returncode == 0 and "warning" in passed.stderr and (tmp_path / "brain").exists()


def test_a_folder_that_cannot_be_written_ends_with_one_line(source, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(prepare(source, tmp_path / "file"), "cannot write")


def test_the_prepared_benchmark_is_found_by_name(source, tmp_path):
    assert prepare(source, tmp_path).returncode == 0
    ask = SimpleNamespace(data="brain", root=str(tmp_path), image_size=32, limit=None, predict=None,
                          white=65535, holdout=0.1)
    train, valid, test = common.load_benchmark(ask)
    assert test.has_masks and len(test) and set(test.labels) == {0, 1}
