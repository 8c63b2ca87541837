"""datasets/check.py: copies, near-duplicates, masks, patients, unreadable files, the record that runs look up."""

import csv
import io
import json
import os

import numpy as np
import pytest
from conftest import ROOT, load_script, run_here
from PIL import Image
from scipy import ndimage

import common

check = load_script("datasets/check.py")


def photo(seed, size=128, noise=4):
    """A picture with coarse and fine structure and noise: (size, size) uint8."""
    rng = np.random.default_rng(seed)
    coarse, fine = (ndimage.gaussian_filter(rng.normal(size=(size, size)), width) for width in (12, 2))
    image = 110 + 30 * coarse / coarse.std() + 12 * fine / fine.std() + noise * rng.normal(size=(size, size))
    return np.clip(image, 0, 255).astype(np.uint8)


def save(file, image, **how):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, **how)


def benchmark(base, masks=False):
    """Different pictures in all classes; masks of a square."""
    places = ["train/good", "valid/good/img", "valid/Ungood/img", "test/good/img", "test/Ungood/img"]
    for i, place in enumerate(places):
        for k in range(10 if i == 0 else 2):
            save(base / place / f"{chr(97 + k)}.png", photo(100 * i + k))
            if masks and "Ungood" in place:
                mask = np.zeros((128, 128), np.uint8)
                mask[20:50, 30:60] = 255
                save(base / place.replace("img", "anomaly_mask") / f"{chr(97 + k)}.png", mask)
    return base


def run(base, *arguments):
    """The finished check of a benchmark; its findings are lines of stdout."""
    return run_here("datasets/check.py", "--data", base, "--root", base.parent, *arguments)


def findings(done):
    return [line for line in done.stdout.splitlines() if line.startswith(("error: ", "notice: "))]


def record_of(done):
    file = next(line for line in done.stdout.splitlines() if line.startswith("record: ")).removeprefix("record: ")
    return json.loads(open(file).read())


def test_different_pictures_and_square_masks_give_no_finding_and_a_picture(tmp_path):
    done = run(benchmark(tmp_path / "b", masks=True))
    assert done.returncode == 0 and not findings(done), done.stdout
    assert "test anomalous       2" in done.stdout and "4 masks; 128x128 8-bit grey\n" in done.stdout
    assert done.stdout.endswith("b: 18 images; errors: none; notices: none\n")
    picture = Image.open(next((tmp_path / ".cache").glob("*.check.png")))
    assert picture.width == check.COLUMNS * (check.TILE + 4)
    reds = (np.asarray(picture) == (255, 0, 0)).all(axis=2).sum()
    assert reds > 4 * 80  # the outlines of the four masks


def jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def at_70_percent(image):
    small = Image.fromarray(image).resize((90, 90), Image.Resampling.BILINEAR)
    return np.asarray(small.resize((128, 128), Image.Resampling.BILINEAR))


COPIES = {
    "same": lambda image: image,
    "mirrored": lambda image: image[:, ::-1],
    "upside_down": lambda image: image[::-1],
    "turned": np.rot90,
    "jpeg": lambda image: jpeg(image, 60),
    "resized": at_70_percent,
    "dark": lambda image: (255 * (image / 255.0) ** 1.6).astype(np.uint8),
    "bright": lambda image: (255 * (image / 255.0) ** 0.6).astype(np.uint8),
    "clipped": lambda image: np.clip(image * 1.5, 0, 255).astype(np.uint8),
    "inverted": lambda image: 255 - image,
    "coloured": lambda image: np.stack([image, image // 2, image // 3], axis=2),
}


def test_copies_of_all_kinds_are_errors(tmp_path):
    base = benchmark(tmp_path / "b")
    for k, (name, copy) in enumerate(COPIES.items()):
        save(base / f"train/good/{name}.png", photo(1000 + k))
        save(base / f"test/Ungood/img/{name}_copy.png", copy(photo(1000 + k)))
    done = run(base)
    assert done.returncode == 1
    lines = findings(done)
    assert lines[0].startswith(f"error: the same picture in train and test: {len(COPIES)}, e.g. train/good/"), lines
    assert lines[1].startswith("notice: several image sizes or pixel formats: ") and len(lines) == 2
    assert f"; errors: the same picture in train and test ({len(COPIES)}); " in record_of(done)["summary"]


def test_adjacent_slices_of_a_volume_are_near_duplicates_and_no_errors(tmp_path):
    rng = np.random.default_rng(0)
    volume = ndimage.gaussian_filter(rng.normal(size=(24, 128, 128)), 1.6)
    volume = 110 + 40 * volume / volume.std() + 4 * rng.normal(size=volume.shape)
    base = benchmark(tmp_path / "b")
    for z, image in enumerate(np.clip(volume, 0, 255).astype(np.uint8)):
        save(base / ("train/good" if z % 2 else "test/Ungood/img") / f"{chr(97 + z)}_slice.png", image)
    done = run(base)
    assert done.returncode == 0 and len(findings(done)) == 1
    assert findings(done)[0].startswith("notice: near-duplicates in train and test: 12, e.g. ")
    assert 0.75 < float(findings(done)[0].split("similarity ")[1].rstrip(")")) < 0.965  # of the closest pair


def test_different_pictures_behind_the_same_grid_are_not_the_same_picture(tmp_path):
    base = benchmark(tmp_path / "b")
    for k in range(6):
        image = photo(2000 + k)
        image[::16] = image[:, ::32] = 30
        save(base / ("train/good" if k % 2 else "test/good/img") / f"{chr(97 + k)}_grid.png", image)
    assert run(base).returncode == 0


@pytest.mark.parametrize("change, line", [
    (lambda folder: (folder / "a.png").unlink(), "error: masks missing or without image: "),
    (lambda folder: save(folder / "more.png", photo(0)), "error: masks missing or without image: "),
    (lambda folder: save(folder / "a.png", np.full((128, 100), 255, np.uint8)),
     "error: masks of another size than their image: "),
    (lambda folder: save(folder / "a.png", np.zeros((128, 128), np.uint8)), "error: masks that are all black"),
    (lambda folder: save(folder / "a.png", np.eye(128, dtype=np.uint8)), "error: masks that are all black"),
    (lambda folder: save(folder / "a.png", Image.new("LA", (128, 128), (255, 0))), "error: masks that are all black"),
    (lambda folder: (folder / "a.png").write_text("no image"), "error: unreadable files: "),
    (lambda folder: save(folder / "a.png", 255 - np.eye(128, dtype=np.uint8) * 255), "notice: masks that cover more"),
    (lambda folder: save(folder / "a.png", np.eye(128, dtype=np.uint8) * 128), "notice: masks with values other than"),
])
def test_bad_masks_are_named(tmp_path, change, line):
    base = benchmark(tmp_path / "b", masks=True)
    change(base / "test/Ungood/anomaly_mask")
    done = run(base)
    assert done.returncode == line.startswith("error")
    assert any(found.startswith(line) and "test/Ungood" in found for found in findings(done)), done.stdout


def test_unreadable_images_are_errors_and_the_others_are_looked_at(tmp_path):
    base = benchmark(tmp_path / "b")
    file = base / "test/good/img/a.png"
    file.write_bytes(file.read_bytes()[:2000])
    (base / "train/good/b.png").write_text("")
    save(base / "valid/good/img/z.png", photo(3))  # of train
    save(base / "valid/good/img/flat.png", np.full((128, 128), 9, np.uint8))
    lines = findings(run(base))
    assert [line.split(":")[1].strip() for line in lines] == [
        "the same picture in train and valid", "unreadable files", "images almost without contrast"]
    assert "unreadable files: 2, e.g. " in lines[1] and "train/good/b.png is not a readable image" in lines[1]


@pytest.mark.parametrize("names, found", [
    (("BraTS2021_00003_60", "BraTS2021_00003_61"), ("error", "BraTS2021_00003")),
    (("NORMAL-123-1", "CNV-123-7"), ("error", "123")),
    (("test_001_5_6", "test_001_7_8"), ("error", "test_001")),
    (("P0077_Macular_a_1", "P0077_Macular_b_2"), ("error", "P0077")),
    (("patient7_slice1", "patient7_slice2"), ("error", "patient7")),
    (("17_3", "17_4"), ("notice", "17")),
    (("scan-12_3", "scan-13_3"), None),
    (("glioma_0003", "glioma_0004"), None),
    (("cell0001", "cell0002"), None),
])
def test_patients_are_known_by_names(names, found, tmp_path):
    files = {split: [tmp_path / f"{name}.png"] for split, name in zip(("train", "test"), names, strict=True)}
    crossing = {patient: images for patient, images in check.patients(files, tmp_path).items() if len(images) > 1}
    assert crossing == ({found: {split: images[0] for split, images in files.items()}} if found else {})


def test_one_patient_in_two_splits_is_an_error_and_a_name_that_may_be_one_a_notice(tmp_path):
    base = benchmark(tmp_path / "b")
    for k, place in enumerate(("train/good", "test/Ungood/img")):
        save(base / place / f"sub-01_slice{k}.png", photo(5000 + k))
        save(base / place / f"17_{k}.png", photo(5010 + k))
    done = run(base)
    assert done.returncode == 1 and findings(done) == [
        "error: one patient in train and test: sub-01 (sub-01_slice0.png, sub-01_slice1.png)",
        "notice: possibly one patient in train and test: 17 (17_0.png, 17_1.png)"]


def test_the_manifest_tells_patients_whatever_the_names(tmp_path):
    base = benchmark(tmp_path / "b")
    with open(base / "source.csv", "w", newline="") as f:
        csv.writer(f).writerows([("image", "case"), ("train/good/a.png", "x"), ("valid/good/img/b.png", "x"),
                                 ("test/good/img/a.png", "y")])
    done = run(base)
    assert findings(done) == ["error: one patient in train and valid: x (a.png, b.png)"] and done.returncode == 1


def test_a_manifest_saved_by_excel_is_read_and_other_csv_files_do_no_harm(tmp_path):
    base = benchmark(tmp_path / "b")
    text = "\ufeffimage,case\r\ntrain/good/a.png,x\r\nvalid/good/img/b.png,x\r\n"
    (base / "source.csv").write_text(text, encoding="utf-8", newline="")
    (base / "folder.csv").mkdir()
    (base / "link.csv").symlink_to("nowhere")
    (base / "long.csv").write_text("a" * 200000)
    assert findings(run(base)) == ["error: one patient in train and valid: x (a.png, b.png)"]


def test_a_run_finds_the_record_of_exactly_these_files(tmp_path, capsys):
    base = benchmark(tmp_path / "b", masks=True)
    args = load_script("methods/padim.py").Args(data=str(base), root=str(tmp_path), out=str(tmp_path / "out"))

    def checked():
        started = common.Run(ROOT / "methods/padim.py", args)
        os.close(started.lock)
        return started.check

    assert checked() is None
    run(base, "--limit", 1)
    assert checked() is None
    done = run(base)
    assert checked() == record_of(done) and "18 images; errors: none; notices: none" in capsys.readouterr().out
    save(base / "test/Ungood/anomaly_mask/a.png", np.full((128, 128), 255, np.uint8))
    assert checked() is None


def test_counts_stand_next_to_the_published_ones_and_sizes_are_compared(tmp_path):
    base = benchmark(tmp_path / "Brain_AD")
    save(base / "test/Ungood/img/a.png", photo(6000, 160))
    done = run_here("datasets/check.py", "--data", "brain", "--root", tmp_path)
    assert "train normal        10   published   7500" in done.stdout and done.returncode == 0
    lines = findings(done)
    assert lines[0].startswith("notice: other counts than published: 5, e.g. train normal 10 instead of 7500")
    assert lines[1].startswith("notice: several image sizes or pixel formats: 2: 128x128 8-bit grey (train normal, ")
    assert lines[1].endswith("test anomalous), 160x160 8-bit grey (test anomalous)")
    limited = run_here("datasets/check.py", "--data", "brain", "--root", tmp_path, "--limit", 1)
    assert "Brain_AD: 5 images; errors: none" in limited.stdout


def test_files_in_the_splits_that_no_run_reads_are_told(tmp_path):
    base = benchmark(tmp_path / "b")
    for name in ("train/good/a.webp", "test/overview.png", "licence.png"):
        save(base / name, photo(7000))
    assert findings(run(base)) == [
        f"notice: files not read (wrong format or not in a class folder): 2, e.g. {base / 'test/overview.png'}"]


def test_the_phantom_passes(phantom):
    done = run_here("datasets/check.py", "--root", phantom)
    assert done.returncode == 0 and not findings(done), done.stdout


@pytest.mark.parametrize("arguments, words", [
    (("--data", "nothing"), "no benchmark nothing"),
    (("--limit", -1), "--limit -1"),
])
def test_wrong_arguments_are_one_line(arguments, words, tmp_path):
    done = run_here("datasets/check.py", "--root", tmp_path, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


def test_normal_images_alone_are_no_error(tmp_path):
    for i in range(4):
        save(tmp_path / f"b/train/good/{i}.png", photo(7000 + i))
    done = run(tmp_path / "b")
    assert done.returncode == 0 and all(line.startswith("notice: no images") for line in findings(done))
