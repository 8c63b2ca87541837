"""liver from small BTCV and LiTS sources in their real format."""

import csv
from fractions import Fraction

import nibabel
import numpy as np
import pytest
from conftest import files_of, load_script, run_here, write_nifti
from PIL import Image

import common

btcv, lits = load_script("datasets/btcv.py"), load_script("datasets/lits.py")
SHAPE = 40, 32, 6  # voxels towards right, front, up
TUMOUR_SLICES = dict(zip(map(str, lits.CASES), [18, 29, 15, 244, 11, 92, 83, 81, 80, 81], strict=True))  # LiTS's own


def scan(seed, shape=SHAPE, liver=6, tumour=None):
    """HU and labels of an invented abdomen: liver on slices 1 to 4, tumour on 3 and 4, other organs around."""
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1000, 1500, shape).astype(np.int16)
    label = np.full(shape, 5 if liver == 6 else 0, np.uint8)
    label[5:30, 8:20, 1:5] = liver
    hu[5:30, 8:20, 1:5] = rng.integers(-150, 240, (25, 12, 4))
    if tumour:
        label[10:14, 9:12, 3:5] = tumour
    return hu, label


def write_lits(raw, case, seed, folders=("volume_pt1", "segmentations"), end=".nii", shape=SHAPE, **how):
    hu, label = scan(seed, shape, liver=1, tumour=2)
    # The header's slope and inter are what real exports have: stored values start at 0.
    write_nifti(raw / folders[0] / f"volume-{case}{end}", hu.astype(float), slope=1, inter=-1024, **how)
    write_nifti(raw / folders[1] / f"segmentation-{case}{end}", label, **how)


def write_btcv(raw, number, seed, end=".nii.gz", shape=SHAPE, **how):
    hu, label = scan(seed, shape)
    write_nifti(raw / f"RawData/Training/img/img{number:04}{end}", hu, **how)
    write_nifti(raw / f"RawData/Training/label/label{number:04}{end}", label, **how)


def manifest(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def slow_equalize(image):
    """Rule 3 of btcv.py, pixel by pixel."""
    values = [int(v) for v in image.ravel() if v]
    out = np.zeros(image.shape, np.uint8)
    for at, v in np.ndenumerate(image):
        if v:
            x = int(255 * Fraction(sum(w <= v for w in values), len(values)))
            out[at] = int(30 + Fraction(4, 5) * x) if 1 <= x <= 149 else x
    return out


@pytest.mark.parametrize("high", [2, 40, 256])
def test_equalisation_equals_a_slow_reference_and_leaves_the_background_0(high):
    rng = np.random.default_rng(high)
    image = rng.integers(1, high, (12, 15)).astype(np.uint8) * (rng.random((12, 15)) < 0.7)
    found = btcv.equalize(image)
    assert found.dtype == np.uint8 and np.array_equal(found, slow_equalize(image))
    assert found.max() == 255 and not found[image == 0].any() and found[image > 0].min() >= (1 if high > 2 else 255)


def test_equalisation_maps_150_and_above_to_themselves_and_what_is_below_1_to_0():
    image = np.arange(256, dtype=np.uint8)[None].repeat(2, 0)  # each value above 0 equally often: shares of v / 255
    assert np.array_equal(btcv.equalize(image)[0, 150:], np.arange(150, 256))
    assert btcv.equalize(image)[0, [0, 1, 149]].tolist() == [0, 30, 149]
    rare = np.array([[1] + [9] * 300], np.uint8)
    assert btcv.equalize(rare)[0].tolist() == [0] + [255] * 300


def test_the_window_runs_from_minus_200_to_250_hounsfield_units():
    hu = np.array([-1024, -200, -199, 25.2, 249, 250, 3000], np.float32)
    assert btcv.window(hu).tolist() == [0, 0, 1, 128, 254, 255, 255]


@pytest.mark.parametrize("axes, end", [("LPS", ".nii"), ("RAI", ".nii.gz"), ("SRP", ".nii"), ("PIL", ".nii.gz")])
def test_images_and_masks_are_equal_to_the_byte_whatever_the_affine(axes, end, tmp_path):
    write_lits(tmp_path / "plain", 3, 0)
    write_lits(tmp_path / "turned", 3, 0, ("batch 1", "batch 1"), end, axes=axes)
    rows = [lits.write_case(["3", lits.find_cases(tmp_path / kind)["3"], "test", True], tmp_path / f"out-{kind}")
            for kind in ("plain", "turned")]
    assert rows[0] == rows[1] and [(r["slice"], r["label"]) for r in rows[0]] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert files_of(tmp_path / "out-plain") == files_of(tmp_path / "out-turned")

    hu, label = scan(0, liver=1, tumour=2)
    for z in (2, 4):  # rows from front to back, columns from right to left
        image, tumour = hu[::-1, ::-1, z].T, label[::-1, ::-1, z].T
        eight_bits = np.rint((np.clip(image, -200, 250) + 200) * (255 / 450)).astype(np.uint8)
        place = tmp_path / "out-plain/test" / ("Ungood" if z == 4 else "good")
        written = np.asarray(Image.open(place / f"img/3_{z}.png"))
        assert np.array_equal(written, btcv.equalize(eight_bits * (tumour > 0)))
        if z == 4:
            mask = np.asarray(Image.open(place / "anomaly_mask/3_4.png"))
            assert np.array_equal(mask, 255 * (tumour == 2)) and np.unique(mask).tolist() == [0, 255]


def test_volumes_are_read_in_blocks_that_do_not_change_the_slices(tmp_path, monkeypatch):
    write_btcv(tmp_path, 1, 0)
    files, read = btcv.find_cases(tmp_path)["img0001"], []
    whole = list(btcv.liver_slices(files, lambda label: label == btcv.LIVER, btcv.HIGHEST, True))
    axial = btcv.prepare.Volume.axial

    def counted(volume, start, stop):
        read.append(stop - start)
        return axial(volume, start, stop)

    monkeypatch.setattr(btcv.prepare.Volume, "axial", counted)
    monkeypatch.setattr(btcv, "BLOCK", 2)
    pieces = list(btcv.liver_slices(files, lambda label: label == btcv.LIVER, btcv.HIGHEST, True))
    assert max(read) == 2 and [z for z, *_ in pieces] == [z for z, *_ in whole] == [1, 2, 3, 4]
    assert all(np.array_equal(a, b) for one, other in zip(pieces, whole, strict=True)
               for a, b in zip(one[1:], other[1:], strict=True))


def test_only_liver_is_kept_and_a_slice_without_visible_liver_is_left_out(tmp_path):
    hu, label = scan(0)
    hu[5:30, 8:20, 2] = -500  # within the liver
    write_nifti(tmp_path / "label/label0002.nii", label)
    write_nifti(tmp_path / "img/img0002.nii", hu)
    rows = btcv.write_case(["img0002", btcv.find_cases(tmp_path)["img0002"], False], tmp_path / "out")
    assert [(r["slice"], r["split"], r["label"], r["case"]) for r in rows] == [
        (z, "train", 0, "img0002") for z in (1, 3, 4)]
    for row in rows:
        image = np.asarray(Image.open(tmp_path / "out" / row["image"]))
        assert not image[label[::-1, ::-1, row["slice"]].T != 6].any() and image.any()


@pytest.mark.parametrize("hu", [lambda hu: hu + 1024, lambda hu: hu * 0, lambda hu: hu - 1100])
def test_a_case_that_shows_nothing_within_its_liver_is_damaged(hu, tmp_path):
    write_btcv(tmp_path, 1, 1)
    files = btcv.find_cases(tmp_path)["img0001"]
    assert len(btcv.write_case(["img0001", files, True], tmp_path / "out")) == 4
    write_nifti(tmp_path / "RawData/Training/img/img0001.nii.gz", hu(scan(1)[0]).astype(np.int16))
    with pytest.raises(btcv.prepare.Damaged, match="img0001.nii.gz shows liver in only 0 of 4 slices labelled in"):
        btcv.write_case(["img0001", files, True], tmp_path / "out")


def test_a_case_without_liver_is_damaged(tmp_path):
    write_btcv(tmp_path, 1, 1)
    write_nifti(tmp_path / "RawData/Training/label/label0001.nii.gz", np.full(SHAPE, 5, np.uint8))
    with pytest.raises(btcv.prepare.Damaged, match="shows liver in only 0 of 0 slices labelled in"):
        btcv.write_case(["img0001", btcv.find_cases(tmp_path)["img0001"], True], tmp_path / "out")


def test_one_number_written_in_two_ways_is_one_case(tmp_path):
    for name in ("volume-01.nii", "volume-1.nii"):
        (tmp_path / name).touch()
    with pytest.raises(common.Error, match="volume-01.nii and .*volume-1.nii are both 1 .volume."):
        lits.find_cases(tmp_path)


def test_cases_are_found_wherever_they_lie_and_unlabelled_or_foreign_scans_are_skipped(tmp_path):
    names = ["a/volume-10.nii", "b/volume-9.nii.gz", "c/segmentation-10.nii", "b/._volume-9.nii.gz", "volume-x.nii",
             "test-volume-3.nii", "segmentation-4.nii", "RawData/Training/img/img0001.nii.gz",
             "RawData/Training/label/label0001.nii.gz", "RawData/Testing/img/img0061.nii.gz"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert lits.find_cases(tmp_path) == {"9": [str(tmp_path / names[1]), None],
                                         "10": [str(tmp_path / names[0]), str(tmp_path / names[2])]}
    assert btcv.find_cases(tmp_path) == {"img0001": [str(tmp_path / names[7]), str(tmp_path / names[8])]}


def totals(counts, split_of):
    return {split: [sum(counts[c][y] for c in counts if split_of[c] == split) for y in (0, 1)]
            for split in ("valid", "test")}


def test_the_division_of_131_patients_gives_the_published_counts():
    rng = np.random.default_rng(0)
    normal, anomalous = rng.multinomial(926, [1 / 131] * 131), rng.multinomial(733, rng.dirichlet([0.5] * 131))
    counts = {str(case): [int(n), int(a)] for case, (n, a) in enumerate(zip(normal, anomalous, strict=True))}
    divisions = [lits.plan(counts, seed) for seed in (0, 0, 1)]
    for split_of in divisions:  # a patient has one split, by what `plan` returns
        assert list(split_of) == list(counts)
        assert totals(counts, split_of) == {"valid": [93, 73], "test": [833, 660]}
    assert divisions[0] == divisions[1] != divisions[2]


def test_the_division_of_the_ten_patients_comes_as_near_as_whole_patients_can():
    assert sum(TUMOUR_SLICES.values()) == 734
    normal = [70, 120, 140, 60, 130, 75, 95, 85, 70, 80]  # invented; they add up to the 925 others
    counts = {case: [n, a] for n, (case, a) in zip(normal, TUMOUR_SLICES.items(), strict=True)}
    for seed in range(3):
        found = totals(counts, lits.plan(counts, seed))
        assert found["valid"] == [95, 83] and found["test"] == [830, 651]  # case 7 alone: 12 slices too many
    small = {case: [n // 10, a // 10] for case, (n, a) in counts.items()}
    assert sum(totals(small, lits.plan(small, 0))["valid"]) < 25  # a tenth of the source, a tenth of its slices


def test_sources_with_and_without_equalisation_are_not_mixed(tmp_path):
    (tmp_path / "liver").mkdir()
    (tmp_path / "liver/btcv.json").write_text('{"arguments": {"equalize": false}}')
    btcv.check_equalize(lits.Args(raw="", root=str(tmp_path), equalize=False), "btcv")
    with pytest.raises(common.Error, match="slices of btcv made with --no-equalize"):
        btcv.check_equalize(lits.Args(raw="", root=str(tmp_path)), "btcv")


def test_btcv_makes_train_of_the_listed_patients_in_512_by_512_pixels(tmp_path):
    write_btcv(tmp_path, 1, 1, shape=(512, 512, 6))
    write_btcv(tmp_path, 2, 2)
    (tmp_path / "train.csv").write_text("case\nimg0001\n")
    made = run_here("datasets/btcv.py", "--raw", tmp_path, "--root", tmp_path, "--workers", 1, "--patients",
                      tmp_path / "train.csv")
    assert made.returncode == 0 and "published   1542" in made.stdout, made.stderr
    rows = manifest(tmp_path / "liver/btcv.csv")
    assert [r["image"] for r in rows] == [f"train/good/img/img0001_{z}.png" for z in (1, 2, 3, 4)]
    assert all(Image.open(tmp_path / "liver" / r["image"]).size == (512, 512) for r in rows)


def test_lits_divides_cases_1_to_10_and_names_and_lists_the_damaged_ones(tmp_path):
    raw = tmp_path / "raw"
    for case in range(12):
        write_lits(raw, case, case, end=".nii.gz" if case == 4 else ".nii")
    volume, label = raw / "volume_pt1", raw / "segmentations"
    (label / "segmentation-1.nii").unlink()
    write_nifti(label / "segmentation-2.nii", np.ones((40, 32, 5), np.uint8))
    nibabel.save(nibabel.Nifti1Image(np.zeros((40, 32, 6, 2), np.int16), np.eye(4)), volume / "volume-3.nii")
    packed = (volume / "volume-4.nii.gz").read_bytes()
    (volume / "volume-4.nii.gz").write_bytes(packed[: len(packed) // 2])
    hu = scan(5)[0].astype(np.float32)
    hu[6, 9, 2] = np.nan
    write_nifti(volume / "volume-5.nii", hu)
    made = run_here("datasets/lits.py", "--raw", raw, "--root", tmp_path, "--workers", 1)
    assert made.returncode == 1 and "published    833" in made.stdout, made.stderr
    damaged = [line for line in made.stderr.splitlines() if line.startswith("damaged: ")]
    expected = [("volume-1.nii", "no segmentation"), ("segmentation-2.nii", "download both again"),
                ("volume-3.nii", "4 dimensions"), ("volume-4.nii.gz", "not a readable"), ("volume-5.nii", "not finite")]
    assert len(damaged) == 5 and "made without 5 damaged" in made.stderr and "Traceback" not in made.stderr
    assert all(name in line and why in line for line, (name, why) in zip(damaged, expected, strict=True))

    rows = manifest(tmp_path / "liver/lits.csv")
    assert {r["case"] for r in rows} == {"6", "7", "8", "9", "10"} and len(rows) == 20  # neither 0 nor 11
    assert len({(r["case"], r["split"]) for r in rows}) == 5 and {r["split"] for r in rows} == {"valid", "test"}
    assert all((tmp_path / "liver" / r["image"].replace("/img/", "/anomaly_mask/")).exists() == (r["label"] == "1")
               for r in rows)
