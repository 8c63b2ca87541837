"""What all preparation scripts promise: whole parts whatever happened, every damaged file named, nothing foreign."""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import prepare
import pytest
import volumes
from conftest import ROOT, files_of, load_script, run_here, run_script, write_nifti
from PIL import Image
from test_camelyon16 import TUMOUR, write_annotation, write_slide
from test_liver import scan, write_btcv, write_lits
from test_oct_and_chest import P1, P9, P77, picture, write_dicom

import common

brats2021, camelyon16, lits, oct2017, resc, rsna = (load_script(f"datasets/{name}.py") for name in (
    "brats2021", "camelyon16", "lits", "oct2017", "resc", "rsna"))


# ----------------------------------------------------------------------------------------- damage, by flips and cuts
def write_volume(file):
    rng = np.random.default_rng(0)
    write_nifti(file, rng.integers(0, 900, (12, 10, 8)).astype(np.int16))


def write_picture(file):
    Image.fromarray(picture(0, (64, 48))).save(file)


def write_xml(file):
    write_annotation(file, [("_0", TUMOUR), ("_2", TUMOUR[:3])])


def write_table(file):
    file.write_text("patientId,class\n" + "".join(f"{n:032x},Normal\n" for n in range(40)))


def read_slide(file):
    """Centres and pixels of the patches."""
    centres = camelyon16.find_patches(("normal_001", (str(file), None), 0), None)
    with camelyon16.opened(file) as slide:
        return centres, [slide.read_region((x - 128, y - 128), 0, (256, 256)).tobytes() for x, y in sum(centres, [])]


FORMATS = {  # suffix: (write, read, bytes that are no payload, whether each byte is under a checksum)
    ".nii": (write_volume, lambda file: volumes.Volume(file).axial(), 352, False),
    ".nii.gz": (write_volume, lambda file: volumes.Volume(file).axial(), 10, True),
    ".png": (write_picture, prepare.read_grey, 33, True),
    ".bmp": (write_picture, prepare.read_grey, 54, False),
    ".jpeg": (write_picture, prepare.read_grey, 20, False),
    ".tiff": (write_picture, prepare.read_grey, 8, False),
    ".dcm": (lambda file: write_dicom(file, picture(0, (64, 48))), rsna.read_radiograph, 700, False),
    ".xml": (write_xml, camelyon16.read_annotation, 100, False),
    ".csv": (write_table, lambda file: prepare.read_list(file, ["patientId", "class"]), 16, False),
    ".tif": (lambda file: write_slide(file, 0), read_slide, 16, False),
}


def harmed(whole, header, rng):
    """The bytes with a few changed, in the header or anywhere, or cut off."""
    content, kind = bytearray(whole), rng.integers(3)
    if kind == 0:
        return content[: rng.integers(len(whole))]
    for _ in range(rng.integers(1, 17)):
        content[rng.integers(header if kind == 1 else len(whole))] = rng.integers(256)
    return content


def seen(content):
    return content.tobytes() if isinstance(content, np.ndarray) else repr(content)


def fuzz(suffix, folder, times, seed):
    write, read, header, checked = FORMATS[suffix]
    file = folder / f"volume-1{suffix}"
    write(file)
    whole, right = file.read_bytes(), seen(read(file))
    named = 0
    for trial in range(times):
        file.write_bytes(content := harmed(whole, header, np.random.default_rng([seed, trial])))
        try:
            found = seen(read(file))
        except common.Error as e:  # Damaged, too
            assert str(file) in str(e) and "\n" not in str(e), (trial, e)
            named += 1
        else:
            assert not checked or found == right, trial
            assert len(content) == len(whole) or found == right or suffix == ".csv", trial
    return named


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_damaged_file_is_named_or_its_content_identical_where_there_is_a_checksum(suffix, tmp_path):
    assert fuzz(suffix, tmp_path, 10, 0) >= 2


@pytest.mark.long
@pytest.mark.parametrize("suffix", FORMATS)
def test_two_hundred_damaged_files_of_each_format(suffix, tmp_path):
    fuzz(suffix, tmp_path, 200, 1)


# ------------------------------------------------------------------------------------------ what is seen is complete
def write_one(item, folder):
    case, split, label = item
    image = np.full((8, 8), int(case) + 1, np.uint8)
    return [prepare.save(folder, split, label, case, image, image > 0 if label else None, case=case)]


PARTS = {"btcv": ["train"], "lits": ["valid", "test"]}
CASES = {"btcv": [(0, "train", 0), (1, "train", 0)], "lits": [(2, "valid", 0), (3, "test", 0), (4, "test", 1)]}


def begin(root, source, workers=1):
    """A preparation of three files, ready for `map`, and its items."""
    raw = root.parent / "raw"
    raw.mkdir(exist_ok=True)
    files = [str(raw / f"{case}.nii") for case in range(5)]
    for file in files:
        Path(file).touch()
        os.utime(file, (0, 0))
    args = prepare.Args(raw=str(raw), root=str(root), workers=workers)
    preparation = prepare.Preparation(source, "liver", PARTS[source], args, files, 0.1)
    return preparation, {str(case): (str(case), split, label) for case, split, label in CASES[source]}


def make(root, source, dies=None):
    """The wait status of a process that prepares a part; `dies`: killed at its end, before its so manieth change."""
    changes = 0

    def kill(event, arguments):
        nonlocal changes
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (event == "open" and arguments[1] == "w"):
            changes += 1
            if changes > dies:
                os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                preparation, items = begin(root, source)
                rows = preparation.map(write_one, items, "writing")
                if dies is not None:
                    sys.addaudithook(kill)
                preparation.finish(sum(rows.values(), []), {case[1:]: 1 for case in CASES[source]})
            except SystemExit as e:
                os._exit(e.code)
            except BaseException:
                os._exit(77)
    return os.waitpid(pid, 0)[1]


def complete(root):
    """Whether each part that can be seen is complete; the parts."""
    seen = []
    for source, splits in PARTS.items():
        folder = root / "liver"
        there = {(folder / name).exists() for name in (*splits, f"{source}.csv", f"{source}.json")}
        assert len(there) == 1, list(folder.iterdir())
        if there == {True}:
            rows = prepare.read_list(folder / f"{source}.csv", ["image", "mask"])
            assert len(rows) == len(CASES[source]) and not prepare.lost(rows, folder)
            seen.append(source)
    return seen


@pytest.mark.parametrize("other", [
    pytest.param(False, id="alone"), pytest.param(True, id="next to another part", marks=pytest.mark.long)])
@pytest.mark.slow
def test_killed_at_any_step_of_the_end_nothing_incomplete_is_seen_and_the_next_run_ends_well(other, tmp_path):
    assert not other or make(tmp_path / "data", "btcv") == 0
    shutil.copytree(tmp_path / "data", tmp_path / "whole") if other else None
    assert make(tmp_path / "whole", "lits") == 0
    whole = files_of(tmp_path / "whole")
    for step in range(100):
        root = tmp_path / f"data{step}"
        shutil.copytree(tmp_path / "data", root) if other else None
        status = make(root, "lits", dies=step)
        assert complete(root) in (["btcv", "lits"], ["btcv"], ["lits"], [])
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert make(root, "lits") == 0 and complete(root) == ["btcv"] * other + ["lits"]
        assert files_of(root) == whole
    assert 8 < step < 60


def test_what_an_unfinished_run_kept_counts_only_with_its_images(tmp_path):
    assert make(tmp_path / "whole", "lits") == 0
    assert os.WTERMSIG(make(tmp_path / "data", "lits", dies=0))
    work = tmp_path / "data/.preparing-lits"
    (work / "part/test/Ungood/anomaly_mask/4.png").unlink()
    (work / "part/test/good/img/3.png").write_bytes(b"")
    (work / "part/valid/.tmp-9-x.png").write_bytes(b"stale")
    (work / "writing/2.json").write_text('{"2": ')
    assert make(tmp_path / "data", "lits") == 0 and files_of(tmp_path / "data") == files_of(tmp_path / "whole")
    shutil.rmtree(tmp_path / "data/liver")  # all of the output removed: made again
    assert make(tmp_path / "data", "lits") == 0 and files_of(tmp_path / "data") == files_of(tmp_path / "whole")


def test_a_finished_part_that_lost_images_or_whose_source_changed_is_not_skipped(tmp_path):
    assert make(tmp_path / "data", "lits") == 0
    with pytest.raises(SystemExit) as ended:
        begin(tmp_path / "data", "lits")
    assert ended.value.code == 0
    args, files = prepare.Args(str(tmp_path / "raw"), str(tmp_path / "data")), [str(tmp_path / "raw/3.nii")]
    with pytest.raises(common.Error, match="4 of its files are missing .e.g. 0.nii"):
        prepare.Preparation("lits", "liver", ["valid", "test"], args, files, 0.1)
    os.utime(files[0], (1, 1))
    with pytest.raises(common.Error, match="1 of its files changed .e.g. 3.nii.* and 4 .* missing"):
        prepare.Preparation("lits", "liver", ["valid", "test"], args, files, 0.1)
    shutil.rmtree(tmp_path / "data/liver/test")
    with pytest.raises(common.Error, match="lacks 3 of its images, e.g. test/good/img/3.png"):
        begin(tmp_path / "data", "lits")


def test_stale_temporary_files_of_another_script_do_no_harm(tmp_path):
    assert make(tmp_path / "data", "btcv") == 0
    (tmp_path / "data/liver/.tmp-1-btcv.csv").write_text("half of a")
    assert make(tmp_path / "data", "lits") == 0 and complete(tmp_path / "data") == ["btcv", "lits"]


def test_a_full_disk_is_one_line_and_leaves_nothing_to_be_seen(tmp_path, monkeypatch):
    def full(image, file, *rest):
        raise OSError(28, "No space left on device")

    preparation, items = begin(tmp_path / "data", "lits")
    with monkeypatch.context() as patched, pytest.raises(common.Error, match="cannot write .* No space left"):
        patched.setattr(Image.Image, "save", full)
        preparation.map(write_one, items, "writing")
    preparation.lock.close()
    assert not (tmp_path / "data/liver").exists()
    assert make(tmp_path / "data", "lits") == 0 and complete(tmp_path / "data") == ["lits"]


# -------------------------------------------------------------------------------------------------------- the workers
def dies_of_3(item, folder):
    if item[0] == "3":
        os.kill(os.getpid(), signal.SIGKILL)
    return [item[0]]


def test_a_file_that_ends_the_process_which_reads_it_is_named_and_the_others_go_on(tmp_path, capfd):
    preparation, items = begin(tmp_path / "data", "lits", workers=2)
    items["3"] = "3", str(tmp_path / "raw/3.nii")
    assert preparation.map(dies_of_3, items, "reading") == {"2": ["2"], "4": ["4"]}
    assert f"damaged: {tmp_path / 'raw/3.nii'} cannot be used (the process" in capfd.readouterr().err


def raises(item, folder):
    raise np.linalg.LinAlgError("of a kind\nthat nobody thought of")


def test_whatever_a_library_raises_is_damage_and_one_line(tmp_path, capfd):
    preparation, items = begin(tmp_path / "data", "lits")
    with pytest.raises(common.Error, match="nothing could be read"):
        preparation.map(raises, {"3": str(tmp_path / "raw/3.nii")}, "reading")
    assert capfd.readouterr().err == (f"damaged: {tmp_path / 'raw/3.nii'} cannot be used (LinAlgError: of a kind that "
                                      "nobody thought of)\n")


SLOW = """
import sys, time
sys.path[:0] = [{tests!r}]
import conftest, test_preparation

def wait(item, folder):
    time.sleep(60)

preparation, items = test_preparation.begin(test_preparation.Path({root!r}), "lits", workers=3)
print("begun", flush=True)
preparation.map(wait, items, "waiting")
"""


def alive(pids):
    def state(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "gone"

    return [pid for pid in pids if state(pid) not in ("Z", "gone")]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.slow
def test_workers_end_with_their_parent_and_a_second_run_on_the_root_is_refused(tmp_path):
    code = SLOW.format(tests=str(ROOT / "tests"), root=str(tmp_path / "data"))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert parent.stdout.readline() == b"begun\n"
        deadline, workers = time.time() + 20, []
        while len(workers) < 3 and time.time() < deadline:
            workers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        with pytest.raises(common.Error, match="cannot be locked"):
            prepare.locked(tmp_path / "data/.preparing-lits/lock")
    finally:
        parent.kill()
        parent.wait()
    while alive(workers) and time.time() < deadline:
        time.sleep(0.05)
    assert len(workers) == 3 and not alive(workers)
    prepare.locked(tmp_path / "data/.preparing-lits/lock").close()


def private_memory(item, folder):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(lines["Private_Dirty"].split()[0]) // 1024


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_holds_little_beyond_its_case_and_their_number_follows_the_memory(tmp_path, monkeypatch):
    preparation, items = begin(tmp_path / "data", "lits", workers=2)
    assert max(preparation.map(private_memory, items, "measuring").values()) < 60  # MiB
    asked = []
    assert prepare.free_memory() > 2**26
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", lambda count, *rest: asked.append(count) or 1 / 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    for gigabytes, workers in ((0.01, 1), (2.1, 2), (1000, 3)):  # three items
        monkeypatch.setattr(prepare, "free_memory", lambda: gigabytes * 2**30)  # noqa: B023
        preparation.args.workers, preparation.memory = None, 1
        with pytest.raises(ZeroDivisionError):
            preparation.map(private_memory, items, "x")
        assert asked.pop() == workers


# ----------------------------------------------------------------------- what a file is, and how it lies in the source
def cohort(raw, cases=6, shape=(24, 20, 110)):
    """BraTS2021 cases; case k is free of tumour in its first 5 - k slices of the window."""
    for k in range(cases):
        rng, name = np.random.default_rng(k), f"BraTS2021_{k:05}"
        flair, seg = rng.integers(0, 900, shape).astype(np.int16), np.zeros(shape, np.uint8)
        seg[5:9, 4:8, 60 + max(0, 5 - k) : 100] = 4
        write_nifti(raw / name / f"{name}_flair.nii", flair)
        write_nifti(raw / name / f"{name}_seg.nii", seg)
    return raw


def prepared(script, raw, root, *more):
    """The finished process, and its images without those of the source's folder in their record."""
    done = run_here(f"datasets/{script}.py", "--raw", raw, "--root", root, "--workers", 1, *more)
    return done, {file: content for file, content in files_of(root).items() if file.suffix != ".json"}


def test_links_folders_named_like_files_pairs_and_volumes_in_four_dimensions_are_read(tmp_path):
    cohort(tmp_path / "raw")
    _, expected = prepared("brats2021", tmp_path / "raw", tmp_path / "plain")
    cases = sorted((tmp_path / "raw").iterdir())
    (tmp_path / "elsewhere").mkdir()
    cases[0].rename(tmp_path / "elsewhere" / cases[0].name)
    (tmp_path / "raw/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "raw")  # round in a circle
    flairs = [case / f"{case.name}_flair.nii" for case in cases]
    (flairs[1].with_suffix(".x")).mkdir()
    flairs[1].rename(flairs[1].with_suffix(".x") / flairs[1].name)
    (flairs[1].with_suffix(".x")).rename(flairs[1])  # x.nii/x.nii
    for k, end in ((2, ".img"), (3, ".nii.gz"), (4, ".nii")):
        image = nibabel.load(flairs[k])
        voxels, kind = np.asarray(image.dataobj), nibabel.Nifti1Pair if end == ".img" else nibabel.Nifti1Image
        flairs[k].unlink()
        nibabel.save(kind(voxels[..., None] if k == 4 else voxels, image.affine), flairs[k].with_suffix(end))
    done, found = prepared("brats2021", tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 0 and found == expected and len(found) > 20


def test_parts_without_labels_and_macs_shadows_are_passed_over_and_a_case_given_twice_is_refused(tmp_path):
    raw = cohort(tmp_path / "raw")
    _, expected = prepared("brats2021", raw, tmp_path / "plain")
    case = raw / "BraTS2021_00003"
    shutil.copytree(case, raw / "__MACOSX/BraTS2021_00003")
    unlabelled = raw / "RSNA_ASNR_MICCAI_BraTS2021_ValidationData/BraTS2021_00999/BraTS2021_00999_flair.nii"
    write_nifti(unlabelled, np.zeros((24, 20, 110), np.int16))
    done, found = prepared("brats2021", raw, tmp_path / "data")
    assert done.returncode == 0 and found == expected and not done.stderr
    assert f"note: 1 volumes without label in folders of a test or validation part are skipped, e.g. {unlabelled}" \
        in done.stdout
    shutil.copytree(case, raw / "copy" / case.name)
    done, _ = prepared("brats2021", raw, tmp_path / "more")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(case / "BraTS2021_00003_flair.nii") in done.stderr and str(raw / "copy") in done.stderr


def test_btcvs_test_part_is_skipped(tmp_path):
    write_btcv(tmp_path / "raw", 1, 1)
    write_nifti(tmp_path / "raw/imagesTs/img0061.nii.gz", scan(2)[0])
    done, found = prepared("btcv", tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 0 and "img0061" in done.stdout and not any("img0061" in str(file) for file in found)


def test_labels_get_the_orientation_of_their_volume_and_how_many_disagreed_is_said(tmp_path):
    for case in range(1, 6):
        write_lits(tmp_path / "raw", case, case, axes="LPS")
    done, expected = prepared("lits", tmp_path / "raw", tmp_path / "plain")
    assert done.returncode == 0 and "orientation" not in done.stdout
    for case in (2, 3):
        file = tmp_path / f"raw/segmentations/segmentation-{case}.nii"
        voxels = np.asarray(nibabel.load(file).dataobj).copy()
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), file)
    done, found = prepared("lits", tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 0 and found == expected
    said = "note: 2 labels have the size of their volumes but another orientation; the volume's is used"
    assert said in done.stdout
    assert said in prepared("lits", tmp_path / "raw", tmp_path / "data")[0].stdout  # "nothing to do"


def test_labels_whose_voxels_were_reordered_with_their_affine_keep_it(tmp_path):
    for case in range(1, 4):
        write_lits(tmp_path / "raw", case, case, axes="LPS")
    _, expected = prepared("lits", tmp_path / "raw", tmp_path / "plain")
    for case in (1, 2):
        file = tmp_path / f"raw/segmentations/segmentation-{case}.nii"
        canonical = nibabel.as_closest_canonical(nibabel.load(file))  # RAS
        nibabel.save(nibabel.Nifti1Image(canonical.get_fdata().astype(np.uint8), canonical.affine), file)
    done, found = prepared("lits", tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 0 and found == expected and "orientation" not in done.stdout


def test_volumes_whose_header_has_no_orientation_are_counted(tmp_path):
    cohort(tmp_path / "raw", 3)
    file = tmp_path / "raw/BraTS2021_00001/BraTS2021_00001_flair.nii"
    nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(file).dataobj).copy(), None), file)
    done, _ = prepared("brats2021", tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 0 and "note: 1 volume headers give no orientation" in done.stdout


@pytest.mark.parametrize("values", [[-1000, 40], [0, 6, 14], [0, 0.4], [0, 127, 254], [-1, 6]])
def test_a_segmentation_with_other_values_than_its_labels_is_damaged(values, tmp_path):
    write_nifti(tmp_path / "a.nii", np.resize(np.float32(values), (4, 3, 2)))
    with pytest.raises(prepare.Damaged, match="a.nii has values from .* not only the labels 0 to 13"):
        volumes.Volume(tmp_path / "a.nii").labels(13)


def test_labels_stored_with_a_slope_are_whole_numbers(tmp_path):
    labels = np.resize(np.arange(14.0), (4, 3, 7))
    image = nibabel.Nifti1Image(labels, np.eye(4))
    image.header.set_data_dtype(np.int16)  # nibabel then stores 0 to 13 as -32768 to 32767
    nibabel.save(image, tmp_path / "a.nii")
    volume = volumes.Volume(tmp_path / "a.nii")
    assert set(np.unique(volume.labels(13))) == {*range(14)} != set(np.unique(volume.axial()))


def rewrite(file, change):
    image = nibabel.load(file)
    nibabel.save(nibabel.Nifti1Image(change(np.asarray(image.dataobj).copy()), image.affine), file)


def test_a_brain_case_without_image_or_tumour_or_with_both_files_exchanged_is_damaged(tmp_path):
    raw = cohort(tmp_path / "raw", 6)
    flair, seg = ([raw / f"BraTS2021_{k:05}/BraTS2021_{k:05}_{kind}.nii" for k in range(6)]
                  for kind in ("flair", "seg"))
    rewrite(flair[1], lambda voxels: voxels * 0 + 7)
    rewrite(seg[2], lambda voxels: voxels * 0)
    flair[3].rename(raw / "x")
    seg[3].rename(flair[3])
    (raw / "x").rename(seg[3])
    done, found = prepared("brats2021", raw, tmp_path / "data")
    lines = [line for line in done.stderr.splitlines() if line.startswith("damaged: ")]
    wrong = [f"{flair[1]} has the same value", f"{seg[2]} has no tumour", f"{seg[3]} has values from 0 to 899"]
    assert done.returncode == 1 and len(lines) == 3 and all(w in line for w, line in zip(wrong, lines, strict=True))
    assert not any(f"BraTS2021_0000{k}" in str(file) for file in found for k in (1, 2, 3))


def test_listed_patients_without_slices_of_their_label_are_told(tmp_path):
    raw, groups = cohort(tmp_path / "raw", 6), ["train,0", "test,0", "valid,0", "valid,1", "test,1", "test,0"]
    rows = [f"BraTS2021_{k:05},{group}\n" for k, group in enumerate(groups)]  # the last has tumour in every slice
    (tmp_path / "split.csv").write_text("case,split,label\n" + "".join(rows))
    done, _ = prepared("brats2021", raw, tmp_path / "data", "--split", tmp_path / "split.csv")
    assert "note: 1 patients without slices of the listed label are skipped, e.g. BraTS2021_00005" in done.stdout


def oct_images(raw, patient=lambda part, kind, i: 100 * (part == "test") + 10 * oct2017.CLASSES.index(kind) + i):
    for part, kinds in (("train", oct2017.CLASSES), ("test", oct2017.CLASSES)):
        for kind in kinds:
            for i in range(3):
                file = raw / part / kind / f"{kind}-{patient(part, kind, i)}-{i}.jpeg"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(sum(map(ord, part + kind)) + i)).save(file)


def test_chest_x_rays_never_enter_the_oct_benchmark(tmp_path):
    oct_images(tmp_path / "raw/CellData/OCT")
    _, expected = prepared("oct2017", tmp_path / "raw", tmp_path / "plain")
    for name in ("chest_xray/train/NORMAL/IM-0116-0001", "chest_xray/train/NORMAL/NORMAL-1049278-0001",
                 "chest_xray/test/NORMAL/NORMAL-1049278-0002", "chest_xray/train/PNEUMONIA/BACTERIA-1-1",
                 "OCT/train/NORMAL/IM-0117-0001"):
        (tmp_path / f"raw/CellData/{name}.jpeg").parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(len(name))).save(tmp_path / f"raw/CellData/{name}.jpeg")
    done, found = prepared("oct2017", tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 0 and found == expected and "note: 5 JPEG files" in done.stdout


def test_shared_patients_of_oct2017_are_told_before_an_image_is_read(tmp_path):
    oct_images(tmp_path / "raw", patient=lambda part, kind, i: 10 * oct2017.CLASSES.index(kind) + i)
    done, found = prepared("oct2017", tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 2 and not found and "3 of 15 images" in done.stderr
    assert "--leave-out-shared" in done.stderr and done.stderr.count("\n") == 1
    done, found = prepared("oct2017", tmp_path / "raw", tmp_path / "all", "--allow-duplicates")
    assert done.returncode == 0 and "both of" in done.stderr
    for i in range(2):  # two patients of train of whom test has nothing
        Image.fromarray(picture(77 + i)).save(tmp_path / f"raw/train/NORMAL/NORMAL-90{i}-1.jpeg")
    done, found = prepared("oct2017", tmp_path / "raw", tmp_path / "clean", "--leave-out-shared")
    rows = prepare.read_list(tmp_path / "clean/oct2017/oct2017.csv", ["case", "split"])
    assert done.returncode == 0 and {r["case"] for r in rows if r["split"] == "train"} == {"900", "901"}


def test_resc_below_a_folder_named_like_labels_and_a_label_folder_named_like_images(tmp_path):
    lesion = np.zeros((24, 32), np.uint8)
    lesion[3:9, 4:10] = 255
    for part, cube in (("Edema_trainingset", P1), ("Edema_validationset", P77), ("Edema_validationset", P9)):
        for k in (1, 2):
            for kind, array in (("original_images/{}.img", picture(k + len(part + cube))),
                                ("label_images/{}_labelMark", lesion * (k - 1))):
                file = tmp_path / "raw" / part / kind.format(cube) / f"{k}.bmp"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(file)
    _, expected = prepared("resc", tmp_path / "raw", tmp_path / "plain", "--allow-duplicates")
    (tmp_path / "other").mkdir()
    (tmp_path / "raw").rename(tmp_path / "other/RESC_with_labels")
    done, found = prepared("resc", tmp_path / "other", tmp_path / "data", "--allow-duplicates")
    assert done.returncode == 0 and found == expected and len(found) > 8


def test_an_image_or_a_lossy_copy_in_the_place_of_a_resc_label_is_damaged(tmp_path):
    label = np.zeros((24, 32), np.uint8)
    label[3:9, 4:10], label[9:12, 4:10], label[12:14, 4:10] = 255, 191, 128
    Image.fromarray(picture(0)).save(tmp_path / "image.bmp")
    Image.fromarray(label).save(tmp_path / "label.bmp")
    Image.fromarray(label).save(tmp_path / "lossy.bmp", "JPEG")
    image, label, lossy = (str(tmp_path / f"{name}.bmp") for name in ("image", "label", "lossy"))
    assert resc.has_lesion((image, label), None)
    for wrong in (image, lossy):
        with pytest.raises(prepare.Damaged, match=f"{wrong} has .* grey values, too many for a label"):
            resc.has_lesion((label, wrong), None)


def test_one_image_in_two_classes_is_refused(tmp_path):
    oct_images(tmp_path / "raw")
    normal, ill = (tmp_path / f"raw/test/{name}.jpeg" for name in ("NORMAL/NORMAL-100-0", "CNV/CNV-110-0"))
    shutil.copy(normal, ill)  # both are in test with seed 0
    done, found = prepared("oct2017", tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 2 and "1 images are in two splits or classes: test/good" in done.stderr
    assert done.stderr.count("\n") == 1
    done, _ = prepared("oct2017", tmp_path / "raw", tmp_path / "data", "--allow-duplicates")
    assert done.returncode == 0 and "warning: 1 images are in two splits or classes" in done.stderr


def test_a_list_of_the_users_next_to_the_manifests_does_no_harm(tmp_path):
    assert make(tmp_path / "data", "btcv") == 0
    (tmp_path / "data/liver/notes.csv").write_text("case,remark\n1,good\n")
    assert make(tmp_path / "data", "lits") == 0


# ------------------------------------------------------------------------------------------- what the sources promise
def test_valid_has_both_kinds_wherever_any_division_has():
    rng = np.random.default_rng(0)
    for seed in range(60):
        counts = {str(case): rng.integers(0, 6, 2).tolist() for case in range(rng.integers(2, 7))}
        total = np.sum(list(counts.values()), axis=0)
        sums = [np.sum([counts[c] for k, c in enumerate(counts) if mask >> k & 1], axis=0)
                for mask in range(1, 2 ** len(counts) - 1)]
        possible = any((s > 0).all() and (s < total).all() for s in sums)
        chosen = prepare.divide(counts, (1, 1), seed)
        valid = np.sum([counts[c] for c in chosen], axis=0) if chosen else np.zeros(2)
        assert (valid > 0).all() == possible and ((valid < total).all() or not chosen)


@pytest.mark.parametrize("cases, free", [(3, 3), (4, 3), (5, 3), (16, 5), (30, 29), (1251, 3), (40, 38)])
def test_a_cohort_of_any_size_gives_each_part_of_brain_both_kinds(cases, free):
    free = {f"{k:04}": list(range(60, 60 + (k < free) * (1 + k % 39))) for k in range(cases)}
    counts = Counter()
    for split, slices in brats2021.plan(free).values():
        counts.update({(split, label): len(chosen) for label, chosen in slices.items()})
    assert all(counts[part] for part in brats2021.PUBLISHED)


@pytest.mark.parametrize("script, cases, said", [("lits", 1, "1 of the cases 1 to 10"), ("brats2021", 2, "2 cases")])
def test_too_small_a_cohort_is_told_before_the_work(script, cases, said, tmp_path):
    if script == "lits":
        write_lits(tmp_path / "raw", 1, 1)
    else:
        cohort(tmp_path / "raw", cases)
    done, found = prepared(script, tmp_path / "raw", tmp_path / "data")
    assert done.returncode == 2 and said in done.stderr and not found and not (tmp_path / "data").exists()


def test_the_published_patients_of_brain_are_the_default_where_the_source_has_them():
    listed = brats2021.read_groups(brats2021.LISTS, {f"BraTS2021_{k:05}" for k in range(1700)})
    assert Counter(listed.values()) == {("train", 0): 424, ("test", 0): 162, ("valid", 0): 39}
    assert hashlib.sha256(" ".join(sorted(f"{case} {split}" for case, (split, _) in listed.items())).encode()
                          ).hexdigest()[:16] == "1cc76422c428222d"
    others = [f"BraTS2021_{k:05}" for k in range(1700) if f"BraTS2021_{k:05}" not in listed][:626]
    free = {case: [60] if case in listed else [] for case in [*listed, *others]}
    free["BraTS2021_00753"] = []  # a patient of train, whatever its rank
    planned = brats2021.plan(free, listed)
    assert {case: (split, *slices) for case, (split, slices) in planned.items() if case in listed} == listed
    assert [case for case in others if planned[case][0] == "valid"] == others[:11]
    assert Counter(split for split, _ in planned.values()) == dict(train=424, valid=50, test=777)


def test_bone_is_the_published_look(tmp_path):
    import matplotlib.pyplot as plt

    cohort(tmp_path / "raw")
    done, found = prepared("brats2021", tmp_path / "raw", tmp_path / "data", "--colormap", "bone")
    assert done.returncode == 0 and "6 of the 625 patients" not in done.stdout and "ranked instead" in done.stdout
    rows = prepare.read_list(tmp_path / "data/brain/brats2021.csv", ["case", "slice", "image", "mask"])
    for row in rows[::5]:
        name = tmp_path / f"raw/{row['case']}/{row['case']}"
        voxels, label = (np.asarray(nibabel.load(f"{name}_{kind}.nii").dataobj)[:, ::-1, int(row["slice"])]
                         for kind in ("flair", "seg"))  # LAS -> LPS, which the real ones are
        plt.imsave(tmp_path / "theirs.png", voxels, cmap="bone")
        theirs = np.asarray(Image.open(tmp_path / "theirs.png"))[..., :3]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "data/brain" / row["image"])), theirs)
        if row["mask"]:
            assert np.array_equal(np.asarray(Image.open(tmp_path / "data/brain" / row["mask"])) > 0, label > 0)


def dicom(file, array, bits=None, slope=None, intercept=0, signed=False, **how):
    import pydicom

    write_dicom(file, array, pydicom.uid.ExplicitVRLittleEndian, **how)
    dataset = pydicom.dcmread(file)
    dataset.PixelRepresentation = int(signed)
    if bits:
        dataset.BitsStored, dataset.HighBit = bits, bits - 1
    if slope is not None:
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    dataset.save_as(file, enforce_file_format=True)
    return rsna.read_radiograph(file)


def test_radiographs_use_the_range_that_their_header_names(tmp_path):
    grey, file = picture(0, (64, 48)).copy(), tmp_path / "a.dcm"
    grey[0, :2] = 0, 255
    assert np.array_equal(dicom(file, grey), grey)
    twelve = np.rint(grey.astype(float) * 4095 / 255).astype(np.uint16)
    assert np.array_equal(dicom(file, twelve, bits=12), grey)
    assert np.array_equal(dicom(file, twelve, bits=12, slope=2, intercept=-1000), grey)
    assert np.array_equal(dicom(file, twelve, bits=12, slope=-1, intercept=4095), 255 - grey)
    assert np.array_equal(dicom(file, twelve, bits=12, interpretation="MONOCHROME1"), 255 - grey)
    assert np.array_equal(dicom(file, (twelve.astype(np.int16) - 2048), bits=12, signed=True), grey)
    assert np.array_equal(dicom(file, grey // 2, bits=7), np.rint((grey // 2) * (255 / 127)))
    with pytest.raises(prepare.Damaged, match="values from 0 to 255, which do not fit the 16 bits"):
        dicom(file, grey.astype(np.uint16), bits=16)


def test_a_list_cut_off_is_named(tmp_path):
    raw = tmp_path / "raw"
    rows = [(f"{k:08x}", kind) for k, kind in enumerate(["Normal"] * 5 + ["Lung Opacity"] * 5)]
    for patient, _ in rows:
        write_dicom(raw / f"stage_2_train_images/{patient}.dcm", picture(int(patient, 16), (32, 32)))
    write_dicom(raw / "stage_2_test_images/f.dcm", picture(99, (32, 32)))
    (raw / rsna.LIST).write_text("patientId,class\n" + "".join(f"{p},{k}\n" for p, k in rows[:-1]))
    done, found = prepared("rsna", raw, tmp_path / "data")
    assert done.returncode == 1 and "does not name 1 of the .dcm files" in done.stderr and len(found) == 11
    assert "note: 1 other .dcm files are skipped" in done.stdout


# ---------------------------------------------------------------------------------------------------------- camelyon16
@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    raw = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(["normal_001", "test_001", "test_002", "test_003", "test_005"]):
        write_slide(raw / f"{name}.tif", seed)
    for name in ("test_001", "test_002"):
        write_annotation(raw / f"{name}.xml", [("_0", TUMOUR)])
    return raw


def test_no_two_patches_of_a_slide_overlap(slides):
    for seed in range(5):
        files = str(slides / "test_001.tif"), str(slides / "test_001.xml")
        centres = camelyon16.find_patches(("test_001", files, seed), None)
        assert all(centres)
        every = sum(centres, [])
        assert all(max(abs(x - u), abs(y - v)) >= 256 for k, (x, y) in enumerate(every) for u, v in every[:k])


def test_what_a_slide_that_fails_while_writing_owes_is_taken_from_others(slides, tmp_path):
    script, line = (ROOT / "datasets/camelyon16.py").read_text(), "        width, height = image.dimensions\n"
    fails = "        if 'test_003' in file:\n            raise openslide.OpenSlideError('no tile')\n"
    for before, after in (('("test", 0): 1000', '("test", 0): 4'), (line, line + fails),
                          ("__file__", repr(str(ROOT / "datasets/camelyon16.py")))):
        assert before in script
        script = script.replace(before, after)
    (tmp_path / "camelyon16.py").write_text(script)
    done = run_script(tmp_path / "camelyon16.py", "--raw", slides, "--root", tmp_path / "data", "--workers", 1)
    assert done.returncode == 1 and "no tile" in done.stderr, done.stderr
    assert "note: the patches of test_003 are taken from other slides" in done.stdout
    rows = prepare.read_list(tmp_path / "data/histo/camelyon16.csv", ["case", "split", "label"])
    counts = Counter((r["split"], r["label"]) for r in rows)
    assert counts["test", "0"] == 4 and "test_003" not in {r["case"] for r in rows}


def test_published_checksums_are_checked(slides, tmp_path):
    shutil.copytree(slides, tmp_path / "raw/images")
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in (tmp_path / "raw/images").iterdir()}
    lines = [f"{digest}  ./images/{name}" for name, digest in sums.items()]
    (tmp_path / "raw/checksums.md5").write_text("\n".join([*lines, f"{'0' * 32}  ./masks/test_005.tif"]))
    file = tmp_path / "raw/images/test_003.tif"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 255  # within a tile
    file.write_bytes(content)
    before = files_of(tmp_path / "raw")
    done, found = prepared("camelyon16", tmp_path / "raw", tmp_path / "data")
    assert files_of(tmp_path / "raw") == before  # nothing is written to the source
    named = [line for line in done.stderr.splitlines() if line.startswith("damaged: ")]
    assert done.returncode == 1 and len(named) == 1 and f"{file} has the checksum" in named[0]
    assert found and not any("test_003" in str(name) for name in found)


def test_a_slide_without_its_highest_resolution_is_damaged(slides, monkeypatch):
    for size, fits in (("0.2431", True), ("0.4862", False), ("352.8", True)):  # the last: 72 dpi, written by default
        slide = contextlib.nullcontext(SimpleNamespace(properties={"openslide.mpp-x": size}))
        monkeypatch.setattr(camelyon16.openslide, "OpenSlide", lambda file: slide)  # noqa: B023
        refused = pytest.raises(prepare.Damaged, match="x.tif has 0.49 micrometres")
        with contextlib.nullcontext() if fits else refused, camelyon16.opened("x.tif"):
            pass


def test_a_patch_listed_twice_is_refused_and_hidden_files_next_to_the_lists_change_nothing(slides, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, lines in dict(train_good="normal_001,640,512", test_good="test_001,1300,701",
                            test_bad="test_001,500,500").items():
        (lists / f"{name}.txt").write_text(lines)
    assert prepared("camelyon16", slides, tmp_path / "data", "--coords", lists)[0].returncode == 0
    (lists / ".DS_Store").write_text("x")
    done, _ = prepared("camelyon16", slides, tmp_path / "data", "--coords", lists)
    assert done.returncode == 0 and "nothing to do" in done.stdout
    (lists / "test_good.txt").write_text("test_003,500,500\nTest_001,500,500")
    done, _ = prepared("camelyon16", slides, tmp_path / "more", "--coords", lists)
    assert done.returncode == 2 and done.stderr == (
        f"error: {lists}/test_good.txt, line 2: Test_001,500,500 is also in {lists}/test_bad.txt; remove one of them\n")


# ------------------------------------------------------------------------------------------------------- all together
@pytest.mark.slow
def test_all_six_benchmarks_are_made_on_one_root_and_pass_the_check(slides, tmp_path):
    raw, rng = tmp_path / "raw", np.random.default_rng(0)
    cohort(raw / "brats2021", 12, (64, 60, 110))
    for k in range(1, 5):
        write_btcv(raw / "btcv", k, k, shape=(80, 70, 6))
        write_lits(raw / "lits", k, k + 10, shape=(80, 70, 6))
    for part, cube in (("Edema_trainingset", P1), ("Edema_validationset", P77), ("Edema_validationset", P9)):
        for k in range(6):
            label = np.zeros((64, 96), np.uint8)
            label[3:20, 4:20] = 255 * (k > 3)
            for kind, array in (("original_images/{}.img", rng.integers(0, 256, label.shape).astype(np.uint8)),
                                ("label_images/{}_labelMark", label)):
                file = raw / "resc" / part / kind.format(cube) / f"{k}.bmp"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(file)
    oct_images(raw / "oct2017")
    rows = [(f"{k:08x}", kind) for k, kind in enumerate(["Normal"] * 6 + ["Lung Opacity"] * 6)]
    for patient, _ in rows:
        write_dicom(raw / f"rsna/images/{patient}.dcm", rng.integers(0, 256, (64, 64)).astype(np.uint8))
    (raw / "rsna" / rsna.LIST).write_text("patientId,class\n" + "".join(f"{p},{k}\n" for p, k in rows))
    (raw / "camelyon16").symlink_to(slides)
    for script in ("brats2021", "lits", "btcv", "resc", "oct2017", "rsna", "camelyon16"):
        done, _ = prepared(script, raw / script, tmp_path)
        assert done.returncode == 0, done.stderr
    for name in ("brain", "liver", "resc", "oct2017", "chest", "histo"):
        done = run_here("datasets/check.py", "--data", name, "--root", tmp_path)
        assert done.returncode == 0 and "errors: none" in done.stdout, done.stdout
    shutil.rmtree(tmp_path / "liver/valid")
    done = run_here("datasets/check.py", "--data", "liver", "--root", tmp_path)
    assert "no images: 2, e.g. valid normal (made by datasets/btcv (train) and lits (valid, test))" in done.stdout
