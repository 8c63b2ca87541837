"""Scans for --predict: NIfTI volumes and DICOM series, found, read as slices, and answered in their own form."""

import gzip
import shutil

import nibabel
import numpy as np
import pydicom
import pytest
import volumes
from conftest import files_of, run_here, write_nifti
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

import common

AXIAL = [1, 0, 0, 0, 1, 0]  # columns run to the left, rows to the back


def write_slice(file, values, height=None, series="1.2.3", turn=AXIAL, **tags):
    """A CT slice with the stored `values`, `height` mm along its normal; tags: more of it, None to leave one out."""
    image = pydicom.Dataset()
    image.SpecificCharacterSet, image.PatientName, image.PatientID = "ISO_IR 192", "Møller^Åse", "p1"
    image.SOPClassUID, image.Modality = CTImageStorage, "CT"
    image.SOPInstanceUID = generate_uid(entropy_srcs=[series, file.name])
    image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = "1.2", series, "1.2.9"
    if height is not None:
        normal = np.cross(turn[:3], turn[3:])
        image.ImagePositionPatient = [f"{v:.6g}" for v in np.array([-20.0, -30.0, 5.0]) + height * normal]
        image.ImageOrientationPatient, image.PixelSpacing, image.SliceThickness = turn, [0.5, 0.75], 2
    for key, value in tags.items():
        setattr(image, key, value)
    image.set_pixel_data(np.asarray(values), tags.get("PhotometricInterpretation", "MONOCHROME2"),
                         np.asarray(values).itemsize * 8)
    for key, value in tags.items():
        setattr(image, key, value)
        if value is None:
            del image[key]
    file.parent.mkdir(parents=True, exist_ok=True)
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.save_as(file, enforce_file_format=True)
    return file


def picture(seed, shape=(10, 12)):
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)


def write_series(folder, numbers, **tags):
    """Slices `numbers`, 2 mm apart; the first pixel of a slice is its number. Names and numbers tell another order."""
    for number in numbers:
        values = picture(number)
        values[0, 0] = number
        write_slice(folder / f"{hash((number, 7)) % 10**6:06}", values, 2 * number, InstanceNumber=50 - number, **tags)
    return folder


def stored(scan):
    """The first stored pixel of each slice of a series, in the order of the scan."""
    return [pydicom.dcmread(s.file).pixel_array[0, 0] for s in scan.slices]


def one(path):
    (scan,), damaged = volumes.find_scans(path)
    assert not damaged
    return scan


# -------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("turn, upwards", [
    (AXIAL, True), ([-1, 0, 0, 0, 1, 0], False), ([1, 0, 0, 0, 0, -1], True), ([1, 0, 0, 0, 0, 1], False),
    ([0.8, 0.6, 0, -0.48, 0.64, 0.6], True)])
def test_slices_of_a_series_are_sorted_by_position_whatever_their_names_and_numbers(turn, upwards, tmp_path):
    numbers = [3, 1, 5, 2, 4]
    scan = one(write_series(tmp_path, numbers, turn=turn))
    assert stored(scan) == sorted(numbers, reverse=not upwards) and len(scan) == 5
    for i, one_slice in enumerate(scan.slices):
        np.testing.assert_array_equal(scan.slice(i), volumes.stretched(pydicom.dcmread(one_slice.file).pixel_array))


def test_slices_without_a_common_orientation_are_sorted_by_number(tmp_path):
    for number in (2, 10, 1):
        write_slice(tmp_path / f"a{number}", np.full((4, 4), number, np.uint16), -number, InstanceNumber=number)
    assert stored(one(tmp_path)) == [10, 2, 1]
    write_slice(tmp_path / "a3", np.full((4, 4), 3, np.uint16), 0, turn=[0, 1, 0, 0, 0, -1], InstanceNumber=3)
    assert stored(one(tmp_path)) == [1, 2, 3, 10]
    write_slice(tmp_path / "a3", np.full((4, 4), 3, np.uint16), InstanceNumber=3)
    assert stored(one(tmp_path)) == [1, 2, 3, 10]


@pytest.mark.parametrize("tags", [
    dict(WindowCenter=40, WindowWidth=400), dict(WindowCenter=[40, 300], WindowWidth=[80, 1500]),
    dict(WindowCenter=0.2, WindowWidth=0.5, VOILUTFunction="LINEAR_EXACT", RescaleSlope=0.001, RescaleIntercept=0),
    dict(WindowCenter=40, WindowWidth=400, VOILUTFunction="SIGMOID")])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_pixels_are_rescaled_windowed_and_inverted_as_pydicom_does(tags, kind, tmp_path):
    tags = dict(RescaleSlope=2, RescaleIntercept=-1024) | tags
    file = write_slice(tmp_path / "a", picture(0).astype(np.uint16), PhotometricInterpretation=kind, **tags)
    image = pydicom.dcmread(file)
    seen = apply_windowing(apply_modality_lut(image.pixel_array, image), image)
    black, white = (v * tags["RescaleSlope"] + tags["RescaleIntercept"] for v in (0, 65535))
    expected = np.rint((seen - black) * (255 / (white - black)))
    found = one(file).slice(0)
    assert found.dtype == np.uint8 and found.min() < 128 < found.max()
    np.testing.assert_array_equal(found, 255 - expected if kind == "MONOCHROME1" else expected)


def test_dicom_pixels_without_a_window_run_from_minimum_to_maximum(tmp_path):
    values = np.array([[-32768, 0], [16384, 32767]], np.int16)
    for name, tags in {"a": {}, "b": dict(WindowCenter=0, WindowWidth=0), "c": dict(WindowCenter=7),
                       "e": dict(WindowCenter=0, WindowWidth=1)}.items():
        assert one(write_slice(tmp_path / name, values, **tags)).slice(0).tolist() == [[0, 128], [191, 255]]
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4, 1, 8], [0, 10, 40, 50]
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "US"
    looked_up = write_slice(tmp_path / "d", np.array([[0, 1], [2, 3]], np.uint16), VOILUTSequence=[table])
    assert one(looked_up).slice(0).tolist() == [[0, 0], [64, 255]]


@pytest.mark.parametrize("axes", ["LAS", "PIR", "SAR"])
def test_nifti_slices_run_upwards_each_scaled_by_its_own_range_and_the_file_is_unpacked_once(
        axes, tmp_path, monkeypatch):
    body = np.random.default_rng(0).uniform(0, 300, (8, 6, 5)).astype(np.float32)  # right, front, up
    write_nifti(tmp_path / "v.nii.gz", body, axes)
    unpacked, opened = [], volumes._opened
    monkeypatch.setattr(volumes, "_opened", lambda file: unpacked.append(file) or opened(file))
    scan = one((tmp_path / "v.nii.gz").rename(tmp_path / "v.NII.GZ"))
    assert (scan.name, len(scan)) == ("v", 5) and not unpacked
    for z in range(5):
        np.testing.assert_array_equal(scan.slice(z), volumes.stretched(body[::-1, ::-1, z].T))
        assert not scan.blank(z)
    assert len(unpacked) == 1


def test_slices_of_one_value_are_blank(tmp_path):
    body = np.random.default_rng(0).integers(0, 300, (8, 6, 5)).astype(np.int16)
    body[:, :, [0, 3]] = 0, 7
    write_nifti(tmp_path / "v.nii", body)
    write_slice(tmp_path / "s/a", np.full((4, 4), 3, np.uint16), 0, WindowCenter=3, WindowWidth=0)
    write_slice(tmp_path / "s/b", np.arange(16, dtype=np.uint16).reshape(4, 4), 1)
    write_slice(tmp_path / "s/c", np.arange(16, dtype=np.uint16).reshape(4, 4), 2, WindowCenter=500, WindowWidth=9)
    found, _ = volumes.find_scans(tmp_path)
    assert {scan.name: [scan.blank(i) for i in range(len(scan))] for scan in found} == {
        "s": [True, False, True], "v": [True, False, False, True, False]}


def test_voxels_that_are_not_finite_are_background_and_counted_in_one_line(tmp_path, capsys):
    body = np.random.default_rng(0).uniform(5, 9, (8, 6, 4)).astype(np.float32)
    clean = body.copy()
    body[0, 0, 1], body[1, 2, 1], body[3, 3, 2], body[:, :, 3] = np.nan, np.inf, -np.inf, np.nan
    for at, z in (((0, 0), 1), ((1, 2), 1), ((3, 3), 2)):
        clean[*at, z] = body[:, :, z].min(where=np.isfinite(body[:, :, z]), initial=9)
    clean[:, :, 3] = 0
    for name, voxels in dict(a=body, b=clean).items():
        write_nifti(tmp_path / f"{name}.nii", voxels)
    (odd, plain), _ = volumes.find_scans(tmp_path)
    for z in range(4):
        np.testing.assert_array_equal(odd.slice(z), plain.slice(z)) if z else odd.slice(z)
    assert odd.blank(3) and not odd.blank(2)
    said = [line for line in capsys.readouterr().err.splitlines() if "a.nii" in line]
    assert said[0] == f"note: {tmp_path}/a.nii: 51 voxels are not finite; they count as background"


# -------------------------------------------------------------------------------------------------------------- finding
def test_a_folder_of_volumes_and_series_gives_each_of_them_a_name_of_its_own(tmp_path, capsys):
    for place in ("a.nii", "A.nii.gz", "deep/er/a.nii.gz", "deep_er/a.nii", "deep_er_A.nii", ".hidden/b.nii", 
                  "__MACOSX/b.nii", "deep/.b.nii"):
        write_nifti(tmp_path / place, picture(0, (4, 4, 3)))
    write_series(tmp_path / "patient/one", range(3))
    for series, text, numbers in (("1.4", "T1 axial", [1, 2]), ("1.5", "FLAIR", [3, 4, 5]), ("1.6", "scout", [6])):
        tags = dict(series=series, SeriesDescription=text, SeriesNumber=numbers[0])
        write_series(tmp_path / "patient/mixed", numbers, **tags)
    for name, series in (("x.dcm", "1"), ("y.DCM", "2")):  # radiographs
        write_slice(tmp_path / "chest" / name, picture(0), series=series)
    write_slice(tmp_path / "patient/one/report", picture(0), 0, SOPClassUID=pydicom.uid.BasicTextSRStorage)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "readme").write_text("short")
    found, damaged = volumes.find_scans(tmp_path)
    scout = f"patient_mixed_{hash((6, 7)) % 10**6:06}"
    assert not damaged and {scan.name: len(scan) for scan in found} == {
        "A": 3, "a-2": 3, "deep_er_a": 3, "deep_er_a-2": 3, "deep_er_A-3": 3, "patient_one": 3,
        "patient_mixed-1-T1_axial": 2, "patient_mixed-3-FLAIR": 3, scout: 1, "chest_x": 1, "chest_y": 1}
    assert [str(scan.source) for scan in found] == sorted(str(scan.source) for scan in found)
    assert {scan.source for scan in found if scan.name[:7] == "patient"} == {
        tmp_path / "patient/one", tmp_path / "patient/mixed", tmp_path / "patient/mixed" / scout[-6:]}
    assert capsys.readouterr().err == ("note: 1 files that hold no images are skipped, e.g. "
                                       f"{tmp_path}/patient/one/report\n")


def test_segmentations_next_to_scans_are_no_scans(tmp_path, capsys):
    names = ["a_seg", "sub-01_dseg", "sub-01_label-GM_probseg", "segmentation-1", "label0001", "x-labels", "x_mask2"]
    for name in ["volume-1", "T1map_of_labels_and_more", *names]:
        write_nifti(tmp_path / f"{name}.nii.gz", picture(0, (4, 4, 3)))
    found, _ = volumes.find_scans(tmp_path)
    assert [scan.name for scan in found] == ["T1map_of_labels_and_more", "volume-1"]
    assert f"note: {len(names)} files that hold no images are skipped" in capsys.readouterr().err


def test_the_same_scan_has_the_same_number_in_every_folder_and_another_scan_another(tmp_path):
    for i, name in enumerate(("a/b", "a/c", "new/a")):
        write_nifti(tmp_path / f"{name}.nii.gz", np.random.default_rng(i).random((12, 10, 3)))
    shutil.copytree(tmp_path / "a", tmp_path / "new", dirs_exist_ok=True)
    (tmp_path / "new/b.nii.gz").rename(tmp_path / "new/z.nii.gz")
    for source, to in (("a", "1"), ("new", "2"), ("new", "1")):
        done = run_here("datasets/volumes.py", "--scans", tmp_path / source, "--to", tmp_path / to)
    patients = [{common.patient(folder / "0000.png"): folder.name[15:] for folder in sorted((tmp_path / to).iterdir())}
                for to in ("1", "2")]
    assert [sorted(names.values()) for names in patients] == [["a", "b", "c"], ["a", "c", "z"]]
    assert len({*patients[0], *patients[1]}) == 3
    assert done.returncode == 1 and "z.nii.gz has the same slices as " in done.stderr
    assert done.stdout.startswith("6 slices of 2 scans")


def test_a_dicom_file_without_suffix_is_a_scan_of_its_own_and_a_folder_of_images_none(tmp_path):
    write_series(tmp_path / "series", [1, 2])
    file = sorted((tmp_path / "series").iterdir())[0]
    scan = one(file)
    assert (len(scan), scan.source, scan.name) == (1, file, file.name)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "images").mkdir()
    assert [volumes.find_scans(tmp_path / place) for place in ("a.png", "images", "missing")] == [([], [])] * 3


def group(sequence, **tags):
    """A functional group with one item."""
    outer, inner = pydicom.Dataset(), pydicom.Dataset()
    for key, value in tags.items():
        setattr(inner, key, value)
    setattr(outer, sequence, [inner])
    return outer


def test_a_file_with_many_frames_is_the_scan_that_a_series_of_the_same_slices_is(tmp_path):
    heights, groups = [6, 0, 4, 2], []
    for k, height in enumerate(heights):
        scaled = dict(RescaleSlope=2, RescaleIntercept=10 * k, WindowCenter=300 + k, WindowWidth=500)
        write_slice(tmp_path / f"series/{k}", picture(k), height, InstanceNumber=k + 1, **scaled)
        groups.append(group("PlanePositionSequence", ImagePositionPatient=[-20, -30, 5 + height]))
        groups[-1].update(group("PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=10 * k))
        groups[-1].update(group("FrameVOILUTSequence", WindowCenter=300 + k, WindowWidth=500))
    shared = group("PlaneOrientationSequence", ImageOrientationPatient=AXIAL)
    shared.update(group("PixelMeasuresSequence", PixelSpacing=[0.5, 0.75], SliceThickness=2))
    frames = np.stack([picture(k) for k in range(4)])
    write_slice(tmp_path / "frames.dcm", frames, SharedFunctionalGroupsSequence=[shared],
                PerFrameFunctionalGroupsSequence=groups, SOPClassUID=EnhancedCTImageStorage)
    series, many = one(tmp_path / "series"), one(tmp_path / "frames.dcm")
    assert len(series) == len(many) == 4 and many.name == "frames" and [s.frame for s in many.slices] == [1, 3, 2, 0]
    for i in range(4):
        assert np.array_equal(series.slice(i), many.slice(i)) and not many.blank(i)
    maps = np.random.default_rng(0).random((4, 8, 8), np.float32)
    for scan, folder in ((series, "a"), (many, "b")):
        scan.save_maps(tmp_path / folder, maps, None, 0.0)
    for first, second in zip(*(sorted((tmp_path / f).rglob("*.dcm")) for f in "ab"), strict=True):
        first, second = pydicom.dcmread(first), pydicom.dcmread(second)
        assert np.array_equal(first.pixel_array, second.pixel_array) and second.SOPClassUID == CTImageStorage
        assert all(first[key].value == second[key].value for key in (
            "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "StudyInstanceUID"))
    assert second.SourceImageSequence[0].ReferencedFrameNumber == 1


def test_files_that_cannot_be_used_are_listed_in_a_line_each_and_the_others_are_found(tmp_path):
    write_nifti(tmp_path / "good.nii.gz", picture(0, (4, 4, 3)))
    nibabel.save(nibabel.Nifti1Image(picture(0, (4, 4)), np.eye(4)), tmp_path / "flat.nii")
    (tmp_path / "empty.nii").write_bytes(b"")
    (tmp_path / "text.dcm").write_text("no DICOM")
    write_slice(tmp_path / "colour", np.zeros((4, 4, 3), np.uint8), PhotometricInterpretation="RGB")
    write_slice(tmp_path / "frames", np.zeros((5, 4, 4), np.uint8), PerFrameFunctionalGroupsSequence=[])
    write_slice(tmp_path / "place", picture(0), 3)
    broken = (tmp_path / "place").read_bytes()
    (tmp_path / "place").write_bytes(broken.replace(b"-20", b"-2x"))
    cut = write_slice(tmp_path / "cut", picture(0), 1, series="1")
    cut.write_bytes(cut.read_bytes()[:400])
    found, damaged = volumes.find_scans(tmp_path)
    assert [scan.name for scan in found] == ["good"]
    for name, words in {"flat.nii": "2 dimensions", "empty.nii": "not a readable NIfTI", "cut": "holds no pixels",
                        "colour": "holds RGB pixels", "frames": "not a readable", "text.dcm": "not a readable",
                        "place": "not a readable"}.items():
        line, = (line for line in damaged if line.startswith(f"{tmp_path / name} "))
        assert words in line and "\n" not in line
    assert len(damaged) == 7


def test_damage_that_only_the_voxels_show_is_named_when_a_slice_is_read(tmp_path):
    write_nifti(tmp_path / "v.nii.gz", picture(0, (20, 20, 9)))
    whole = bytearray((tmp_path / "v.nii.gz").read_bytes())
    whole[-6] ^= 1  # of the checksum
    (tmp_path / "v.nii.gz").write_bytes(whole)
    with gzip.open(tmp_path / "w.nii.gz", "wb") as f:
        f.write(nibabel.Nifti1Image(picture(0, (20, 20, 9)), np.eye(4)).to_bytes()[:-9])
    series = write_series(tmp_path / "s", [1])
    file, = series.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    found, damaged = volumes.find_scans(tmp_path)
    assert len(found) == 3 and not damaged
    for scan, words in zip(found, ("no readable pixels", "not a readable NIfTI|is damaged", "is cut off"), strict=True):
        for read in (scan.slice, scan.blank):
            with pytest.raises(volumes.Damaged, match=words) as error:
                read(0)
            assert str(scan.source) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_slice_with_a_damaged_header_is_named_or_found(tmp_path):
    whole, rng, named = write_slice(tmp_path / "a", picture(0), 3, WindowCenter=4, WindowWidth=9).read_bytes(), 0, 0
    for trial in range(60):
        rng, content = np.random.default_rng(trial), bytearray(whole)
        for _ in range(8):
            content[rng.integers(132, len(whole) - picture(0).nbytes)] = rng.integers(256)
        (tmp_path / "a").write_bytes(content)
        found, damaged = volumes.find_scans(tmp_path)
        try:
            for scan in found:
                scan.slice(0)
                scan.save_maps(tmp_path / "out", np.zeros((1, 4, 4), np.float32), 1.0, 0.0)
                common.remove(tmp_path / "out")
        except volumes.Damaged as e:
            damaged.append(str(e))
        assert all(str(tmp_path / "a") in line and "\n" not in line for line in damaged)
        named += len(damaged)
    assert 10 < named <= 60


# ------------------------------------------------------------------------------------------------------------ answering
def rotation(x, y, z):
    turns = [np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]) for a in (x, y, z)]
    return np.roll(turns[2], (1, 1), (0, 1)) @ np.roll(turns[1], (2, 2), (0, 1)) @ turns[0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (-1, -1, -1), (1, -1, 1)])
def test_a_map_lands_on_the_voxels_it_belongs_to_whatever_the_affine(order, signs, tmp_path):
    shape, lesion = (14, 18, 10), (3, 13, 2)
    affine = np.eye(4)
    affine[:3, :3] = rotation(0.3, -0.2, 0.25)[:, order] * signs * [0.9, 1.1, 3]
    affine[:3, 3] = 7, -40, 12
    voxels = np.random.default_rng(0).integers(1, 99, shape).astype(np.int16)
    voxels[lesion] = 5000
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "v.nii.gz")
    scan = one(tmp_path / "v.nii.gz")
    # A slice is dark but for what is bright in it; the lesion alone makes the rest of its slice black.
    z = np.argmax([(scan.slice(i) < 10).sum() for i in range(len(scan))])
    maps = np.random.default_rng(1).random((len(scan), 36, 36), np.float32) * 0.4
    maps[z] += np.asarray(Image.fromarray(scan.slice(z)).resize((36, 36), Image.Resampling.BILINEAR)) / np.float32(255)
    maps[(z + 1) % len(scan)] = np.nan
    scan.save_maps(tmp_path, maps, None, -0.5)
    found = nibabel.load(tmp_path / "v_map.nii.gz")
    values = np.asarray(found.dataobj)
    pixel = float(values[0, 0, 0])
    scan.save_maps(tmp_path, maps, pixel, -0.5)
    mask = nibabel.load(tmp_path / "v_mask.nii.gz")
    for image, dtype in ((found, np.float32), (mask, np.uint8)):
        assert image.shape == shape and image.get_data_dtype() == dtype
        np.testing.assert_allclose(image.affine, affine, rtol=1e-6)
    assert np.unravel_index(values.argmax(), shape) == lesion and values.max() > 0.5
    np.testing.assert_array_equal(np.asarray(mask.dataobj), (values >= pixel) & (values != -0.5))
    assert values.min() == -0.5 and (values == -0.5).sum() == scan.slice(0).size  # of the slice without a map


def test_without_a_threshold_of_the_pixels_there_is_no_mask(tmp_path):
    write_nifti(tmp_path / "v.nii", picture(0, (4, 4, 3)))
    write_series(tmp_path / "s", range(3))
    for scan in volumes.find_scans(tmp_path)[0]:
        scan.save_maps(tmp_path / "out", np.full((3, 8, 8), np.nan, np.float32), None, 0.0)
    assert sorted(map(str, files_of(tmp_path / "out"))) == [*(f"s_map/{i:04}.dcm" for i in range(3)), "v_map.nii.gz"]


@pytest.mark.parametrize("size, low, scale", [(10, 0.01, 0.02), (8, -3e-6, 1e-6), (16, 900.0, 1e5)])
def test_a_written_dicom_series_has_the_geometry_of_its_source_and_the_values_of_the_maps(size, low, scale, tmp_path):
    turn = [0.8, 0.6, 0, -0.48, 0.64, 0.6]
    for number in (4, 1, 3, 2):
        write_slice(tmp_path / f"s/{9 - number}", picture(number, (size, size)), 2.5 * number, turn=turn,
                    PhotometricInterpretation="MONOCHROME1", WindowCenter=40, WindowWidth=400, SeriesNumber=6,
                    RescaleSlope=2, RescaleIntercept=-5)
    scan = one(tmp_path / "s")
    maps = (np.random.default_rng(0).standard_normal((4, size, size)) * scale).astype(np.float32)
    maps[2] = np.nan
    scan.save_maps(tmp_path / "out", maps, pixel := float(maps[0, 0, 0]), low)
    whole = np.where(np.isnan(maps), np.float32(low), maps)
    for kind, expected, step in (("map", whole, np.ptp(np.append(whole, low)) / 65535), ("mask", maps >= pixel, 0)):
        files = sorted((tmp_path / f"out/s_{kind}").iterdir())
        images = [pydicom.dcmread(file) for file in files]
        assert [image.InstanceNumber for image in images] == [1, 2, 3, 4]
        assert len({image.SOPInstanceUID for image in images}) == 4
        assert {(image.SeriesDescription, image.SeriesNumber, image.PhotometricInterpretation) for image in images} == {
            (f"anomaly {kind}", dict(map=1006, mask=2006)[kind], "MONOCHROME2")}
        assert len({image.SeriesInstanceUID for image in images} - {"1.2.3"}) == 1
        for image, values, original in zip(images, expected, scan.slices, strict=True):
            source = pydicom.dcmread(original.file)
            for key in volumes.SHARED:
                assert image.get(key) == source.get(key)
            assert image.PatientName == "Møller^Åse" and image.FrameOfReferenceUID == "1.2.9"
            assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
            assert "WindowCenter" not in image and image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
            np.testing.assert_allclose(apply_modality_lut(image.pixel_array, image), values, rtol=1e-6,
                                       atol=0.51 * step)
    again, damaged = volumes.find_scans(tmp_path / "out")  # the answers are series in the same order themselves
    assert [stored.name for stored in again] == ["s_map", "s_mask"] and not damaged
    assert again[0].blank(2) and not again[0].blank(1)


def test_slices_of_several_sizes_and_values_that_break_dicom_rules_are_answered(tmp_path):
    write_slice(tmp_path / "s/a", picture(0, (6, 20)), 1)
    file = write_slice(tmp_path / "s/b", picture(1, (9, 5)), 0)
    content = file.read_bytes()
    assert content.count(b"DS\x08\x000.5\\0.75") == 1
    file.write_bytes(content.replace(b"DS\x08\x000.5\\0.75", b"DS\x28\x000.48828125000000001\\0.750000000000000001"))
    scan = one(tmp_path / "s")
    ramp = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32), (2, 64, 64))
    scan.save_maps(tmp_path, ramp, 0.5, 0.0)
    files = sorted((tmp_path / "s_map").iterdir())
    images = [pydicom.dcmread(file) for file in files]
    assert [(image.Rows, image.Columns) for image in images] == [(9, 5), (6, 20)]
    assert [float(v) for v in images[0].PixelSpacing] == [0.48828125, 0.75]
    for image in images:
        values = apply_modality_lut(image.pixel_array, image)
        assert (np.diff(values, axis=1) > 0).all() and (np.diff(values, axis=0) == 0).all()


def test_a_header_that_cannot_be_copied_to_a_map_is_named_and_no_part_of_a_series_left(tmp_path):
    write_slice(tmp_path / "s/a", picture(0), 0)
    file = write_slice(tmp_path / "s/b", picture(1), 1)
    file.write_bytes(file.read_bytes().replace(b"0.5\\0.75", b"0.\x98\\0.75"))
    with pytest.raises(volumes.Damaged, match="/s/b has a header that cannot be copied"):
        one(tmp_path / "s").save_maps(tmp_path / "out", np.zeros((2, 4, 4), np.float32), None, 0.0)
    assert not files_of(tmp_path / "out")
