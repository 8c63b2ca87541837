"""resc, oct2017 and rsna: the rules on lists of full size; pixels and bad files of small sources in the real format."""

import csv
import io
from collections import Counter

import numpy as np
import prepare
import pydicom
import pytest
from conftest import files_of, load_script, run_here
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG2MPML, ExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGLSLossless

import common

resc, oct2017, rsna = (load_script(f"datasets/{name}.py") for name in ("resc", "oct2017", "rsna"))


def picture(seed, shape=(24, 32)):
    """A smooth uint8 image that JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))


def write_image(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


def read(file):
    return np.asarray(Image.open(file))


def manifest(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def writes_list(file, header, rows):
    file.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return file


def run(path, *arguments):
    """(exit status, what the script printed as errors)."""
    done = run_here(path, *arguments)
    return done.returncode, done.stderr


def damaged(err):
    return [line for line in err.splitlines() if line.startswith("damaged: ")]


# -------------------------------------------------------------------------------------------------------------- divide
def test_divide_finds_the_exact_counts_where_there_are_some_and_the_nearest_otherwise():
    counts = {"a": (40, 60), "b": (5, 10), "c": (100, 28), "d": (90, 38), "e": (5, 9)}
    assert prepare.divide(counts, (45, 70), seed=0) == ["a", "b"]
    assert prepare.divide(counts, (45, 71), seed=0) == ["a", "b"]
    assert {len(prepare.divide({f"{i:03}": (1, 1) for i in range(131)}, (9, 9), seed)) for seed in range(3)} == {9}
    assert prepare.divide(counts, (45, 70), 1) == prepare.divide(dict(reversed(counts.items())), (45, 70), 1)


def test_divide_leaves_both_kinds_to_the_other_cases():
    assert prepare.divide({"a": (3, 0), "b": (2, 2)}, (2, 2), seed=0) == ["a"]
    assert prepare.divide({"a": (3, 3)}, (3, 3), seed=0) == []


# ---------------------------------------------------------------------------------------------------------------- resc
def spread(total, cases, most, rng):
    """`total` over `cases`, each from 1 to `most`."""
    counts = np.ones(cases, int)
    while counts.sum() < total:
        counts[rng.integers(cases)] += 1
        counts = counts.clip(max=most)
    return counts.tolist()


def cubes(part, normal, anomalous):
    return {f"{part}_{i}_{k}": (part, f"{part}{i}", k >= n)
            for i, (n, a) in enumerate(zip(normal, anomalous, strict=True)) for k in range(n + a)}


def resc_counts(slices, planned):
    return Counter((split, int(slices[name][2])) for name, split in planned.items())


def test_resc_of_full_size_gives_the_published_counts_where_whole_patients_can():
    rng = np.random.default_rng(0)
    normal = spread(4297, 70, 127, rng)
    slices = cubes("train", normal, [128 - n for n in normal])
    slices |= cubes("valid", [20, 25, *spread(1041, 13, 127, rng)], [40, 30, *spread(764, 13, 127, rng)])
    planned = resc.plan(slices, seed=0)
    assert resc_counts(slices, planned) == resc.PUBLISHED
    patients = {}
    for name, split in planned.items():
        patients.setdefault(slices[name][1], set()).add(split)
    assert len(patients) == 85 and all(len(splits) == 1 for splits in patients.values())


def test_resc_with_128_slices_in_every_cube_takes_the_patient_nearest_to_the_published_counts():
    normal = [63, 78, 70, 52, *[75] * 11]  # 1,088 of 1,920
    slices = cubes("train", [61] * 70, [67] * 70) | cubes("valid", normal, [128 - n for n in normal])
    planned = resc.plan(slices, seed=3)
    assert resc_counts(slices, planned) == {("train", 0): 4270, ("valid", 0): 52, ("valid", 1): 76,
                                            ("test", 0): 1036, ("test", 1): 756}
    assert {slices[name][1] for name, split in planned.items() if split == "valid"} == {"valid3"}


def test_resc_divides_as_a_list_says_and_leaves_others_out():
    slices = cubes("train", [2], [1]) | cubes("valid", [2, 2, 2], [1, 1, 1])
    planned = resc.plan(slices, fixed={"valid0": "test", "valid1": "valid"})
    assert resc_counts(slices, planned) == {("train", 0): 2, ("valid", 0): 2, ("valid", 1): 1,
                                            ("test", 0): 2, ("test", 1): 1}


def test_resc_with_one_validation_patient_is_an_error():
    with pytest.raises(common.Error, match="1 usable patients in the validation part cannot be divided"):
        resc.plan(cubes("train", [2], [1]) | cubes("valid", [2], [1]))


P1, P77, P77_LATER, P9 = (f"{name}_OD_sn161_cube_z" for name in (
    "P0001_MacularCube512x128_1-14-2014_8-43-12", "P0077_MacularCube512x128_1-15-2014_8-43-12",
    "P0077_MacularCube512x128_2-15-2014_8-43-12", "PC009_MacularCube512x128_9-17-2013_10-30-4"))


def test_resc_finds_the_slices_of_both_forms(tmp_path):
    for file in ("a/Edema_trainingset/original_images/{}.img/12.bmp",
                 "a/Edema_trainingset/label_images/{}_labelMark/12.bmp",
                 "a/Edema_validationset/original_images/{}.img/3.BMP", "a/Edema_testset/original_images/{}.img/3.bmp",
                 "b/RESC/Val/val/{}_7.png", "b/RESC/Val/val_label/{}_7.png", "b/RESC/Train/images/{}_007.png",
                 "b/RESC/Train/labels/{}_007.png", "b/RESC/Train/images/._{}_007.png", "b/RESC/Train/images/x.png"):
        file = tmp_path / file.format(P77)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = resc.find_slices(tmp_path / "a")
    assert list(found) == [f"train_{P77}_12", f"valid_{P77}_3"]
    assert found[f"train_{P77}_12"] == (
        "train", "P0077", P77, 12, str(tmp_path / f"a/Edema_trainingset/original_images/{P77}.img/12.bmp"),
        str(tmp_path / f"a/Edema_trainingset/label_images/{P77}_labelMark/12.bmp"))
    assert found[f"valid_{P77}_3"][5] is None
    flat = resc.find_slices(tmp_path / "b")
    assert [slice[:4] for slice in flat.values()] == [("train", "P0077", P77, 7), ("valid", "P0077", P77, 7)]
    assert all("label" not in slice[4] and "label" in slice[5] for slice in flat.values())


def test_resc_patient_of_a_cube():
    assert resc.patient_of("train", P77) == resc.patient_of("valid", P77_LATER) == "P0077"
    assert resc.patient_of("train", "12") == "train_12" != resc.patient_of("valid", "12")


def test_resc_writes_slices_and_masks_and_names_a_truncated_file(tmp_path):
    raw = tmp_path / "raw"
    lesion = np.zeros((24, 32), np.uint8)
    lesion[3:9, 4:10], lesion[9:12, 4:10], lesion[12:14, 4:10] = 255, 191, 128
    images = {}
    for part, cube, count in (("Edema_trainingset", P1, 2), ("Edema_validationset", P77, 2),
                              ("Edema_validationset", P77_LATER, 2), ("Edema_validationset", P9, 3)):
        for k in range(1, 5):  # the first `count` slices are without lesion
            images[f"{cube}_{k}"] = image = raw / f"{part}/original_images/{cube}.img/{k}.bmp"
            write_image(image, picture(len(images)))
            write_image(raw / f"{part}/label_images/{cube}_labelMark/{k}.bmp", lesion if k > count else lesion * 0)
    broken = images[f"{P1}_1"]
    broken.write_bytes(broken.read_bytes()[:-200])
    code, err = run("datasets/resc.py", "--raw", raw, "--root", tmp_path, "--workers", 1)
    assert code == 1 and len(damaged(err)) == 1 and f"{broken} is not a readable image" in damaged(err)[0]
    rows = manifest(tmp_path / "resc/resc.csv")
    assert Counter((r["split"], r["label"]) for r in rows) == {
        ("train", "0"): 1, ("valid", "0"): 3, ("valid", "1"): 1, ("test", "0"): 4, ("test", "1"): 4}
    assert {r["case"] for r in rows if r["split"] == "test"} == {"P0077"}
    for image, label, mask in common.list_split(common.find_benchmark("resc", tmp_path)[1], "test"):
        np.testing.assert_array_equal(read(image), read(images[image.stem]))
        assert bool(label) == (mask is not None) == (int(image.stem.rsplit("_", 1)[1]) > 2)
        if label:
            np.testing.assert_array_equal(read(mask), np.where(lesion, 255, 0))


# ------------------------------------------------------------------------------------------------------------- oct2017
def oct_images(of_test):
    """Names of full size; of_test: {patient: images} of each class."""
    images = {f"train_NORMAL-{10**6 + i // 6}-{i % 6}": ("train", "NORMAL", str(10**6 + i // 6)) for i in range(26315)}
    for kind in oct2017.CLASSES:
        for patient, count in of_test(kind).items():
            images |= {f"test_{kind}-{patient}-{k}": ("test", kind, patient) for k in range(count)}
    return images


def oct_counts(images, planned):
    return Counter((split, int(images[name][1] != "NORMAL")) for name, split in planned.items())


@pytest.mark.parametrize("of_test", [
    lambda kind: {f"{oct2017.CLASSES.index(kind)}00{i}": 1 for i in range(250)},
    lambda kind: {f"{oct2017.CLASSES.index(kind)}00{i}": 1 + i % 4 for i in range(100)},
    lambda kind: {f"5{i}": 1 for i in range(50)} | {f"{oct2017.CLASSES.index(kind)}00{i}": 2 for i in range(100)},
], ids=["an image a patient", "several images a patient", "patients with several classes"])
def test_oct2017_of_full_size_gives_the_published_counts_with_no_patient_in_two_splits(of_test):
    images = oct_images(of_test)
    assert len(images) == 27315
    planned = oct2017.plan(images, seed=0)
    assert oct_counts(images, planned) == oct2017.PUBLISHED
    assert Counter(images[name][1] for name, split in planned.items() if split == "valid") == dict.fromkeys(
        oct2017.CLASSES, 8)
    splits = {}
    for name, split in planned.items():
        splits.setdefault(images[name][2], set()).add(split)
    assert all(len(found) == 1 for found in splits.values())
    assert planned == oct2017.plan(dict(reversed(images.items())), seed=0) != oct2017.plan(images, seed=1)


def test_oct2017_keeps_a_valid_part_that_the_source_has():
    images = {f"{part}_{kind}-{i}-1": (part, kind, str(i)) for kind in oct2017.CLASSES
              for part, numbers in (("train", range(9)), ("val", range(100, 108)), ("test", range(200, 442)))
              for i in numbers if part != "train" or kind == "NORMAL"}
    assert oct_counts(images, oct2017.plan(images)) == oct2017.PUBLISHED | {("train", 0): 9}


def test_oct2017_writes_grey_pixels_unchanged_and_names_a_truncated_file(tmp_path):
    raw, seed = tmp_path / "raw/OCT2017", 0
    for kind in oct2017.CLASSES:
        for part in ("train", "test"):
            for i in range(3):
                file = raw / f"{part}/{kind}/{kind}-{(seed := seed + 1)}-{i}.jpeg"
                write_image(file, picture(seed))
    write_image(raw / "train/NORMAL/._NORMAL-9-1.jpeg", picture(0))
    file.write_bytes(file.read_bytes()[:-60])
    code, err = run("datasets/oct2017.py", "--raw", tmp_path / "raw", "--root", tmp_path, "--workers", 1)
    assert code == 1 and len(damaged(err)) == 1 and f"{file} is not a readable image" in damaged(err)[0]
    rows = manifest(tmp_path / "oct2017/oct2017.csv")
    assert Counter(r["split"] for r in rows)["train"] == 3 and len(rows) == 3 + 12 - 1
    assert {r["kind"] for r in rows if r["split"] == "valid"} | {"DRUSEN"} == set(oct2017.CLASSES)
    for row in rows:
        name = row["image"].rpartition("/")[2].removesuffix(".png")
        assert row["case"] == name.split("-")[1]
        source = read(raw / ("train" if row["split"] == "train" else "test") / row["kind"] / f"{name}.jpeg")
        np.testing.assert_array_equal(read(tmp_path / "oct2017" / row["image"]), source)


# ---------------------------------------------------------------------------------------------------------------- rsna
def write_dicom(file, array, syntax=JPEGBaseline8Bit, interpretation="MONOCHROME2", cut=0):
    """A radiograph as the source has it: 8 bit, JPEG baseline in DICOM. cut: so many bytes of the JPEG are lost."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.276.0.7230010.3.1.4.1"
    dataset.PatientID, dataset.Modality = file.stem, "CR"
    dataset.Rows, dataset.Columns = array.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation, dataset.PhotometricInterpretation = 1, 0, interpretation
    dataset.BitsAllocated = dataset.BitsStored = 8 * array.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelData = array.tobytes()
    if syntax != ExplicitVRLittleEndian:
        jpeg = io.BytesIO()
        Image.fromarray(array).save(jpeg, "JPEG", quality=95)
        dataset.PixelData = encapsulate([jpeg.getvalue()[: jpeg.tell() - cut]])
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(file, enforce_file_format=True)
    return file


def patient_ids(count):
    return [f"{n:032x}-0000" for n in np.random.default_rng(0).permutation(count)]


def test_rsna_of_full_size_gives_the_published_counts():
    kinds = ["Normal"] * 8851 + ["Lung Opacity"] * 6012 + ["No Lung Opacity / Not Normal"] * 11821
    rows = [dict(patientId=p, **{"class": k}) for p, k in zip(patient_ids(26684), kinds, strict=True)]
    rows += rows[8851 : 8851 + 3543]  # several boxes of one patient
    rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    labels = rsna.labels_of(rows)
    assert len(rows) == 30227 and len(labels) == 26684
    planned = rsna.plan(labels, seed=0)
    assert Counter((split, labels[patient]) for patient, split in planned.items()) == rsna.PUBLISHED
    assert planned == rsna.plan(dict(reversed(labels.items())), seed=0) != rsna.plan(labels, seed=1)


@pytest.mark.parametrize("rows, words", [
    ([("a", "Normal"), ("b", "Normal"), ("a", "Lung Opacity")], "a has two classes, Normal and Lung Opacity"),
    ([("a", "normal")], "a has class normal: not one of Normal, Lung Opacity"),
])
def test_rsna_patient_with_two_classes_or_an_unknown_one_is_an_error_that_names_it(rows, words):
    with pytest.raises(common.Error, match=words):
        rsna.labels_of([dict(patientId=p, **{"class": k}) for p, k in rows])


def test_rsna_too_few_patients_are_an_error():
    with pytest.raises(common.Error, match="^2 normal patients; train, valid, test need one each$"):
        rsna.plan(dict(a=0, b=0, c=1, d=1))


def test_rsna_reads_jpeg_and_raw_pixels_and_inverts_monochrome1(tmp_path):
    array = picture(0, (64, 48))
    raw = rsna.read_radiograph(write_dicom(tmp_path / "raw.dcm", array, ExplicitVRLittleEndian))
    np.testing.assert_array_equal(raw, array)
    jpeg = rsna.read_radiograph(write_dicom(tmp_path / "jpeg.dcm", array))
    assert jpeg.dtype == np.uint8 and np.abs(jpeg.astype(int) - array).max() < 12
    inverted = rsna.read_radiograph(write_dicom(tmp_path / "inverted.dcm", array, interpretation="MONOCHROME1"))
    np.testing.assert_array_equal(inverted, 255 - jpeg)


def truncated(file, array):
    write_dicom(file, array)
    file.write_bytes(file.read_bytes()[:-300])


@pytest.mark.filterwarnings("ignore:End of file reached")
def test_rsna_names_what_is_wrong_with_a_file(tmp_path):
    array = picture(0, (64, 48))
    for words, write in {
        f"JPEG-LS Lossless Image Compression ({JPEGLSLossless}), which needs .*pylibjpeg":
            lambda file: write_dicom(file, array, JPEGLSLossless),
        "MPEG2 .*, which needs to be converted": lambda file: write_dicom(file, array, MPEG2MPML),
        "no readable pixels": lambda file: truncated(file, array),
        "no readable pixels .*truncated": lambda file: write_dicom(file, array, cut=300),
        "not a readable DICOM file": lambda file: file.write_bytes(b"no DICOM"),
        "values from 0 to 250, which do not fit the 16 bits":
            lambda file: write_dicom(file, array.astype(np.uint16), ExplicitVRLittleEndian),
    }.items():
        file = tmp_path / "a.dcm"
        write(file)
        with pytest.raises(prepare.Damaged, match=words.replace("(", r"\(").replace(")", r"\)")) as error:
            rsna.read_radiograph(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_rsna_writes_the_benchmark_and_names_missing_and_truncated_files(tmp_path):
    raw, ids = tmp_path / "raw", patient_ids(16)
    kinds = ["Normal"] * 8 + ["Lung Opacity", "No Lung Opacity / Not Normal"] * 4
    for i, patient in enumerate(ids[:-1]):
        write_dicom(raw / f"stage_2_train_images/{patient}.dcm", picture(i, (64, 48)))
    write_dicom(raw / "stage_2_test_images/unknown.dcm", picture(50, (64, 48)))
    broken = raw / f"stage_2_train_images/{ids[0]}.dcm"
    broken.write_bytes(broken.read_bytes()[:-300])
    rows = list(zip(ids, kinds, strict=True))
    writes_list(raw / "stage_2_detailed_class_info.csv", "patientId,class", rows[::-1] + rows[8:10])
    writes_list(raw / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", [[ids[8], *"12341"]] * 2)
    code, err = run("datasets/rsna.py", "--raw", raw, "--root", tmp_path, "--workers", 1)
    found = damaged(err)
    assert code == 1 and len(found) == 2
    assert any(line.startswith(f"damaged: {broken} has no readable pixels") for line in found)
    assert any(line.startswith(f"damaged: {ids[-1]}.dcm is missing") for line in found)
    rows = {r["case"]: r for r in manifest(tmp_path / "chest/rsna.csv")}
    assert sorted(rows) == sorted(ids[1:-1])
    for patient, row in rows.items():
        assert row["label"] == str(int(kinds[ids.index(patient)] != "Normal"))
        np.testing.assert_array_equal(read(tmp_path / "chest" / row["image"]),
                                      rsna.read_radiograph(raw / f"stage_2_train_images/{patient}.dcm"))
    assert sum(file.suffix == ".png" for file in files_of(tmp_path / "chest")) == 14
    fixed = writes_list(tmp_path / "fixed.csv", "case,split", [(ids[1], "train"), (ids[8], "train")])
    code, err = run("datasets/rsna.py", "--raw", raw, "--root", tmp_path / "b", "--patients", fixed)
    assert code == 2 and err == f"error: {fixed}: {ids[8]} is anomalous and cannot be in train\n"


def test_list_of_patients_is_followed_and_checked(tmp_path):
    file = writes_list(tmp_path / "list.csv", "case,split", [("a", "valid"), ("b", "test")])
    assert prepare.read_split(file, {"a", "b", "c"}, ["valid", "test"]) == dict(a="valid", b="test")
    for rows, words in (([("a", "train")], "a has split train: not one of valid, test"),
                        ([("x", "test")], "x is not in the source"),
                        ([("a", "test"), ("a", "valid")], "a appears twice")):
        with pytest.raises(common.Error, match=words) as error:
            prepare.read_split(writes_list(file, "case,split", rows), {"a"}, ["valid", "test"])
        assert str(file) in str(error.value)
