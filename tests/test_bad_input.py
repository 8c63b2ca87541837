"""Bad input ends in one line that says what is wrong with which file or flag, with exit code 2, and spoils nothing.

All cases run within one process, through the scripts' own main part; a few again as a user starts them."""

import csv
import dataclasses
import os
import runpy
import shutil
import struct
import sys
import zlib
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import get_type_hints

import nibabel
import numpy as np
import pytest
import torch
from annotated_types import Ge, Gt, Interval
from conftest import ROOT, load_script, once, run_script
from PIL import Image

import common

METHODS = sorted(f"methods/{p.name}" for p in (ROOT / "methods").glob("*.py"))
NET = "--backbone mobilenet_v2 --weights none --image-size 64"
CLIP = "--model tiny --clip-weights none --image-size 64"


def run_here(script, *arguments):
    """(exit code, stderr) of a script that is run in this process, an exception shown as its own hook shows it."""
    err, argv, hook, status = StringIO(), sys.argv, sys.excepthook, 0
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        sys.argv = [str(ROOT / script), *map(str, arguments)]
        with redirect_stdout(StringIO()), redirect_stderr(err):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except Exception as e:
                sys.excepthook(type(e), e, e.__traceback__)
                status = 1
    except SystemExit as e:
        status = e.code or 0
    finally:
        sys.argv, sys.excepthook = argv, hook
        torch.use_deterministic_algorithms(deterministic)
    return status, err.getvalue()


def assert_one_line(status, error, said):
    assert "Traceback" not in error, error
    assert status == 2, (status, error)
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 800, error
    for word in said.split(" & "):
        assert word in error, error


# --------------------------------------------------------------------------------------------------- numbers of methods
def beyond(kind):
    """Values out of the declared range of a number, and those that are no number."""
    limits = [part for limit in kind.__metadata__ for part in (limit if isinstance(limit, Interval) else [limit])]
    values = {limit.ge - 1 for limit in limits if isinstance(limit, Ge)}
    values |= {limit.gt for limit in limits if isinstance(limit, Gt)}
    values |= {limit.le + 1 for limit in limits if hasattr(limit, "le")}
    values |= {limit.lt for limit in limits if hasattr(limit, "lt")}
    return sorted(values) + ["nan", "inf"] * ("float" in str(kind))


def numbers():
    """Of each script; what all declare alike for PaDiM only, and for the others in the long tier."""
    cases, shared = [], get_type_hints(load_script("methods/padim.py").Args, include_extras=True)
    for script in METHODS:
        for name, kind in get_type_hints(load_script(script).Args, include_extras=True).items():
            marks = [pytest.mark.long] * (script != "methods/padim.py" and shared.get(name) == kind)
            if hasattr(kind, "__metadata__"):
                cases += [pytest.param(script, f"--{name.replace('_', '-')}", value, marks=marks)
                          for value in beyond(kind)]
    return cases


@pytest.mark.parametrize("script, flag, value", numbers())
def test_a_number_out_of_its_range_is_told_before_an_image_is_read(script, flag, value, tmp_path):
    status, error = run_here(script, flag, value, "--root", tmp_path, "--out", tmp_path / "runs")
    assert_one_line(status, error, f"{flag} {value}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", METHODS)
def test_every_number_of_a_method_has_a_declared_range(script):
    hints = get_type_hints(load_script(script).Args, include_extras=True)
    bare = {name for name, kind in hints.items() if not hasattr(kind, "__metadata__")
            and any(word in str(kind) for word in ("int", "float")) and "Literal" not in str(kind)}
    assert not bare


# ------------------------------------------------------------------------------------------------- what does not fit
# Each value is in its range; together, or with these images, they are not possible. What must be said: words & words.
COMBINATIONS = [
    ("cfa", f"{NET} --neighbors 5000 --epochs 1", "--neighbors"),
    ("cfa", f"{NET} --backbone alexnet", "--backbone alexnet"),
    ("cfa", f"{NET} --backbone nothing", "--backbone nothing"),
    ("cflow", f"{NET} --condition 6", "--condition 6"),
    ("clip_recon", f"{CLIP} --backbone nothing", "--backbone"),
    ("clip_recon", f"{CLIP} --image-size 72", "72"),
    ("clip_zeroshot", "--model nothing --clip-weights none", "--model nothing"),
    ("clip_zeroshot", "--model RN50 --clip-weights none", "--model RN50"),
    ("clip_zeroshot", "--model coca_ViT-B-32 --clip-weights none", "--model coca_ViT-B-32"),
    ("clip_zeroshot", "--model tiny --clip-size 100", "100"),
    ("clip_zeroshot", "--model tiny --clip-size 64 --clip-weights nothing", "--clip-weights nothing"),
    ("csflow", f"{NET} --image-size 16", "--image-size 16"),
    ("ddpm", "--image-size 32 --multipliers 1 2 2 2 2 2 2", "--multipliers"),
    ("ddpm", "--image-size 20 --base-channels 8 --multipliers 1 2 2 2", "--image-size 20"),
    ("ddpm", "--image-size 32 --base-channels 1 --multipliers 1 2", "--base-channels"),
    ("ddpm", "--image-size 32 --base-channels 8 --multipliers 1 2 --noise-level 1000", "--noise-level 1000"),
    ("deepsvdd", "--batch-size 1", "batch"),
    ("deepsvdd", "--ae-batch-size 1", "batch"),
    ("draem", "--textures nowhere --width 4 --image-size 64", "--textures nowhere"),
    ("draem", "--textures images --width 4 --image-size 80", "--image-size 80"),
    ("fanogan", "--image-size 40", "--image-size 40"),
    ("ganomaly", "--image-size 40", "--image-size 40"),
    ("anogan", "--image-size 40", "--image-size 40"),
    ("mkd", f"{NET} --backbone alexnet", "--backbone alexnet"),
    ("padim", f"{NET} --features 5000", "--features 5000"),
    ("padim", f"{NET} --backbone efficientnet_b0", "--backbone efficientnet_b0"),
    ("patchsvdd", "--image-size 64", "--image-size 64"),
    ("rd4ad", f"{NET} --image-size 48", "--image-size 48"),
    ("simplenet", f"{NET} --backbone vgg16", "--backbone vgg16"),
    ("stfpm", f"{NET} --backbone vgg16", "--backbone vgg16"),
    ("utrad", f"{NET} --width 6", "--width 6"),
    ("winclip", f"{CLIP} --clip-size 64 --shots 5000", "--shots 5000"),
]


@pytest.mark.parametrize("method, flags, said", COMBINATIONS, ids=lambda v: v.split()[-1] if " " in v else v)
def test_values_that_do_not_fit_each_other_are_told(method, flags, said, phantom, tmp_path):
    status, error = run_here(f"methods/{method}.py", "--root", phantom, "--out", tmp_path, "--device", "cpu",
                             *flags.split())
    assert_one_line(status, error, said)
    assert not list(tmp_path.rglob("results.json")) and not list(tmp_path.rglob(".tmp-*"))


# ---------------------------------------------------------------------------------------------------------------- files
@dataclasses.dataclass
class Place:
    """Folders of one case: a copy of the benchmark, a finished PaDiM run of it, and where its own results go."""

    folder: Path
    data: Path
    model: Path
    out: Path

    @property
    def normal(self):
        return self.data / "train/good/img/0000.png"

    @property
    def anomalous(self):
        return self.data / "test/Ungood/img/0000.png"

    @property
    def mask(self):
        return self.data / "test/Ungood/anomaly_mask/0000.png"

    def checkpoint(self, **changed):
        """Change the checkpoint's entries; one set to `...` is left out."""
        kept = torch.load(self.model, weights_only=True) | changed
        torch.save({k: v for k, v in kept.items() if v is not ...}, self.model)


@pytest.fixture(scope="module")
def trained(phantom, tmp_path_factory):
    def make(out):
        done = run_script("methods/padim.py", "--root", phantom, "--out", out, "--device", "cpu", "--maps", 0,
                          *NET.split())
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "bad-input-padim", make) / "phantom/padim/seed0"


@pytest.fixture
def place(phantom, trained, tmp_path):
    shutil.copytree(phantom / "phantom", tmp_path / "root/phantom")
    shutil.copy(trained / "model.pt", tmp_path)
    return Place(tmp_path, tmp_path / "root/phantom", tmp_path / "model.pt", tmp_path / "runs")


def grey(file, array=None, **options):
    """Write a 64 x 64 image; by default grey noise."""
    array = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8) if array is None else array
    file.unlink(missing_ok=True)
    Image.fromarray(array).save(file, **options)


def replaced(file, suffix):
    """`file` with another suffix, as a path; the file itself is removed."""
    file.unlink()
    return file.with_suffix(suffix)


def mask(values, mode=None):
    array = np.zeros((64, 64), np.uint8)
    array[20:40, 20:40] = values
    return Image.fromarray(array) if mode is None else Image.fromarray(array, mode)


def truncate(file, count=None):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if count is None else count])


def state_of(net):
    return common.pretrained_network(net, "none").state_dict()


def weights(content):
    """Saved as weights.pth: `content`, or what it returns."""
    def act(at):
        torch.save(content() if callable(content) else content, at.folder / "weights.pth")

    return act


def diverged(at):
    state = torch.load(at.model, weights_only=True)["state"]
    at.checkpoint(state={k: v * np.nan if v.is_floating_point() else v for k, v in state.items()})


def link(file, target):
    file.unlink()
    file.symlink_to(target)


def of_nans():
    state = state_of("mobilenet_v2")
    state["features.0.0.weight"][:] = np.nan
    return state


def finished(name, text):
    """The run folder holds a file of that name with that text."""
    def act(at):
        folder = at.out / "phantom/padim/seed0"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return act


def png_that_claims(file, width, height):
    """A PNG whose header names another size."""
    data = bytearray(file.read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes(data)


def pages(file):
    first = Image.fromarray(np.zeros((64, 64), np.uint8))
    first.save(replaced(file, ".tif"), save_all=True, append_images=[first])


def palette(at):
    image = Image.fromarray(np.asarray(mask(1)))
    image = image.convert("P")
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(at.mask)


def volume(file, array=None):
    array = np.random.default_rng(0).random((8, 8, 4), np.float32) if array is None else array
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), file)


RUN = ""  # PaDiM is trained on the benchmark
MODEL = "--checkpoint {at.model}"
PREDICT = "--checkpoint {at.model} --predict"
WEIGHTS = "--weights {at.folder}/weights.pth"
# (name, what is done to the files at a `Place`, PaDiM's further arguments, what must be said: words & words)
FILES = [
    ("checkpoint: missing", lambda at: at.model.unlink(), MODEL, "{at.model}"),
    ("checkpoint: empty", lambda at: at.model.write_bytes(b""), MODEL, "{at.model}"),
    ("checkpoint: truncated", lambda at: truncate(at.model), MODEL, "{at.model}"),
    ("checkpoint: ends early", lambda at: truncate(at.model, -9), MODEL, "{at.model}"),
    ("checkpoint: text", lambda at: at.model.write_text("weights"), MODEL, "{at.model}"),
    ("checkpoint: a folder", lambda at: (at.model.unlink(), at.model.mkdir()), MODEL, "{at.model}"),
    ("checkpoint: of another method", lambda at: at.checkpoint(method="patchcore"), MODEL, "{at.model} & patchcore"),
    ("checkpoint: of another format", lambda at: at.checkpoint(format=99), MODEL, "{at.model} & 99"),
    ("checkpoint: a tensor", lambda at: torch.save(torch.zeros(3), at.model), MODEL, "{at.model}"),
    ("checkpoint: a list", lambda at: torch.save([1, 2], at.model), MODEL, "{at.model}"),
    ("checkpoint: a state dict", lambda at: torch.save(state_of("mobilenet_v2"), at.model), MODEL, "{at.model}"),
    ("checkpoint: objects", lambda at: torch.save(Path("x"), at.model), MODEL, "{at.model}"),
    *((f"checkpoint: without {key}", lambda at, key=key: at.checkpoint(**{key: ...}), MODEL, "{at.model}")
      for key in ("args", "state", "weights", "epoch", "notes", "train_seconds")),
    *((f"checkpoint: {key} of another type", lambda at, key=key: at.checkpoint(**{key: 7}), MODEL, "{at.model}")
      for key in ("args", "state", "weights")),
    ("checkpoint: arguments of another type", lambda at: at.checkpoint(args=dict(image_size="64")), MODEL,
     "--image-size"),
    ("checkpoint: arguments out of range", lambda at: at.checkpoint(args=dict(image_size=-1)), MODEL, "image"),
    ("checkpoint: another shape", lambda at: at.checkpoint(state=dict(mean=torch.zeros(3, 3))), MODEL, "{at.model}"),
    ("checkpoint: state of numbers", lambda at: at.checkpoint(state=dict(mean=3)), MODEL, "{at.model}"),
    ("checkpoint: NaN", diverged, MODEL, "{at.model}"),

    ("weights: missing", lambda at: None, WEIGHTS, "weights.pth"),
    ("weights: a folder", lambda at: None, "--weights {at.folder}", "{at.folder}"),
    ("weights: empty", lambda at: (at.folder / "weights.pth").touch(), WEIGHTS, "weights.pth"),
    ("weights: a tensor", weights(torch.zeros(3)), WEIGHTS, "weights.pth"),
    ("weights: one number", weights(torch.zeros(())), WEIGHTS, "weights.pth"),
    ("weights: a list", weights([1, 2]), WEIGHTS, "weights.pth"),
    ("weights: an empty dict", weights({}), WEIGHTS, "weights.pth"),
    ("weights: None", weights(None), WEIGHTS, "weights.pth"),
    ("weights: of numbers", weights({"features.0.0.weight": 3}), WEIGHTS, "weights.pth"),
    ("weights: keys that are numbers", weights({1: 3}), WEIGHTS, "weights.pth"),
    ("weights: of another network", weights(lambda: state_of("resnet18")), WEIGHTS,
     "weights.pth"),
    ("weights: NaN", weights(of_nans), WEIGHTS, "weights.pth"),

    ("image: empty", lambda at: at.normal.write_bytes(b""), RUN, "{at.normal}"),
    ("image: truncated", lambda at: truncate(at.normal), RUN, "{at.normal}"),
    ("image: header only", lambda at: truncate(at.normal, 40), RUN, "{at.normal}"),
    ("image: text", lambda at: at.normal.write_text("image"), RUN, "{at.normal}"),
    ("image: truncated JPEG", lambda at: (grey(f := replaced(at.normal, ".jpg")), truncate(f)), RUN, "0000.jpg"),
    ("image: 32-bit float", lambda at: grey(replaced(at.normal, ".tif"), np.random.rand(64, 64).astype(np.float32)),
     RUN, "0000.tif"),
    ("image: 32-bit integers", lambda at: grey(replaced(at.normal, ".tif"), np.full((64, 64), -5, np.int32)), RUN,
     "0000.tif"),
    ("image: several pages", lambda at: pages(at.normal), RUN, "0000.tif & 2 pages"),
    ("image: too large for Pillow", lambda at: png_that_claims(at.normal, 20000, 20000), RUN,
     "{at.normal} & 400000000"),
    ("image: too large at all", lambda at: png_that_claims(at.normal, 2**30, 2**30), RUN, "{at.normal}"),
    ("image: of no pixels", lambda at: png_that_claims(at.normal, 0, 64), RUN, "{at.normal}"),
    ("image: link to nowhere", lambda at: link(at.normal, "nowhere.png"), RUN, "{at.normal}"),
    ("image: link in a circle", lambda at: link(at.normal, "0000.png"), RUN, "{at.normal}"),
    ("image: SVG named PNG", lambda at: at.normal.write_text("<svg/>"), RUN, "{at.normal}"),

    ("mask: missing", lambda at: at.mask.unlink(), RUN, "{at.anomalous}"),
    ("mask: truncated", lambda at: truncate(at.mask), RUN, "{at.mask}"),
    ("mask: all black", lambda at: mask(0).save(at.mask), RUN, "{at.mask}"),
    ("mask: zeros and ones", lambda at: mask(1).save(at.mask), RUN, "{at.mask}"),
    ("mask: 16 bit, dark", lambda at: grey(at.mask, np.asarray(mask(128)).astype(np.uint16)), RUN, "{at.mask}"),
    ("mask: another size", lambda at: mask(255).resize((32, 32)).save(at.mask), RUN, "{at.mask} & (32, 32)"),
    ("mask: opaque black", lambda at: Image.new("RGBA", (64, 64), (0, 0, 0, 255)).save(at.mask), RUN, "{at.mask}"),
    ("mask: a palette of black and nearly black", palette, RUN, "{at.mask}"),
    ("mask: several pages", lambda at: pages(at.mask), RUN, "0000.tif"),
    ("mask: 32-bit float", lambda at: grey(replaced(at.mask, ".tif"), np.asarray(mask(1)).astype(np.float32)), RUN,
     "0000.tif"),
    ("mask: two of one image", lambda at: shutil.copy(at.mask, at.mask.with_name("0000_mask.png")), RUN,
     "{at.anomalous} & {at.mask}"),
    ("mask: without image", lambda at: at.anomalous.unlink(), RUN, "{at.mask}"),
    ("mask: of two images", lambda at: grey(at.anomalous.with_suffix(".jpg")), RUN, "0000.jpg"),
    ("mask: missing on valid", lambda at: (at.data / "valid/Ungood/anomaly_mask/0000.png").unlink(), RUN, "0000.png"),

    ("layout: empty folder", lambda at: (shutil.rmtree(at.data), at.data.mkdir()), RUN, "{at.data}"),
    ("layout: no folder", lambda at: shutil.rmtree(at.data), RUN, "phantom"),
    ("layout: a file", lambda at: (shutil.rmtree(at.data), at.data.write_text("")), RUN, "phantom"),
    ("layout: --data is a file", lambda at: None, "--data {at.model}", "{at.model}"),
    ("layout: --data is not there", lambda at: None, "--data nowhere", "nowhere"),
    ("layout: --data is empty", lambda at: None, "--data=", "argument is empty"),
    ("layout: --root is not there", lambda at: None, "--root {at.folder}/nowhere", "nowhere"),
    ("layout: --root is a file", lambda at: None, "--root {at.model}", "{at.model}"),
    ("layout: no train", lambda at: shutil.rmtree(at.data / "train"), RUN, "{at.data} & train"),
    ("layout: no test", lambda at: shutil.rmtree(at.data / "test"), RUN, "{at.data} & test"),
    ("layout: no normal test images", lambda at: shutil.rmtree(at.data / "test/good"), RUN, "{at.data} & test"),
    ("layout: no anomalous test images", lambda at: shutil.rmtree(at.data / "test/Ungood"), RUN, "{at.data} & test"),
    ("layout: train/healthy", lambda at: (at.data / "train/good").rename(at.data / "train/healthy"), RUN, "{at.data}"),
    ("layout: text files only", lambda at: [p.rename(p.with_suffix(".txt")) for p in at.data.rglob("*.png")], RUN,
     "{at.data}"),
    ("layout: the cache is a file", lambda at: (at.data.parent / ".cache").write_text(""), RUN, ".cache"),

    ("out: a file", lambda at: at.out.write_text(""), RUN, "{at.out}"),
    ("out: below a file", lambda at: None, "--out {at.model}/x", "{at.model}"),
    ("out: not to be written", lambda at: None, "--out /proc/nowhere", "/proc/nowhere"),
    ("out: a name too long", lambda at: None, "--out {at.folder}/" + "x" * 300, "xxx"),
    ("out: in use", lambda at: (finished("x", "")(at), lock(at.out / "phantom/padim/seed0")), RUN, "seed0"),
    ("results.json: text", finished("results.json", "text"), RUN, "results.json"),
    ("results.json: empty", finished("results.json", ""), RUN, "results.json"),
    ("results.json: a list", finished("results.json", "[1]"), RUN, "results.json"),
    ("results.json: lacks all", finished("results.json", f'{{"format": {common.FORMAT}}}'), RUN, "results.json"),
    ("results.json: not UTF-8", finished("results.json", b"\xff\xfe"), RUN, "results.json"),
    ("results.json: a folder", finished("results.json/x", ""), RUN, "results.json"),
    ("resume.pt: empty", finished("resume.pt", ""), RUN, "resume.pt"),
    ("resume.pt: text", finished("resume.pt", "text"), RUN, "resume.pt"),
    ("resume.pt: a folder", finished("resume.pt/x", ""), RUN, "resume.pt"),
    ("resume.pt: lacks all", lambda at: (finished("resume.pt", "")(at), torch.save(
        dict(method="padim", format=common.FORMAT), at.out / "phantom/padim/seed0/resume.pt")), RUN, "resume.pt"),

    ("predict: nothing there", lambda at: None, PREDICT + " {at.folder}/nowhere", "nowhere"),
    ("predict: an empty folder", lambda at: (at.folder / "new").mkdir(), PREDICT + " {at.folder}/new",
     "{at.folder}/new"),
    ("predict: text", lambda at: (at.folder / "a.txt").write_text(""), PREDICT + " {at.folder}/a.txt", "a.txt"),
    ("predict: without checkpoint", lambda at: None, "--predict {at.normal}", "--checkpoint"),
    *((f"device: {name}", lambda at: None, f"--device {name}", f"--device {name}")
      for name in ("nonsense", "cuda:99", "meta", "cpu:x", "xla", "cuda:-1")),
    ("backbone: unknown", lambda at: None, "--backbone nothing", "--backbone nothing"),
]


# (name, what is done to the input, its name): without it the others of the same folder are scored.
PREDICTED = [
    ("an image that is none", lambda file: file.write_text("text"), "x.png"),
    ("an empty image", lambda file: file.touch(), "x.png"),
    ("a link to nowhere", lambda file: file.symlink_to("nowhere"), "x.png"),
    ("text named as a volume", lambda file: file.write_text("text"), "x.nii.gz"),
    ("an empty volume", lambda file: file.touch(), "x.nii"),
    ("a truncated volume", lambda file: (volume(file), truncate(file)), "x.nii.gz"),
    ("one slice", lambda file: volume(file, np.ones((8, 8), np.float32)), "x.nii.gz"),
    ("several volumes", lambda file: volume(file, np.ones((8, 8, 4, 2), np.float32)), "x.nii.gz"),
    ("colours", lambda file: volume(file, np.zeros((8, 8, 4), [(c, "u1") for c in "RGB"])), "x.nii.gz"),
    ("a volume of NaN", lambda file: volume(file, np.full((8, 8, 4), np.nan, np.float32)), "x.nii.gz"),
]


@pytest.mark.parametrize("act, name", [case[1:] for case in PREDICTED], ids=[case[0] for case in PREDICTED])
def test_what_predict_cannot_read_is_named_and_the_rest_is_scored(act, name, place):
    (place.folder / "new").mkdir()
    for k in range(2):
        good = place.folder / f"new/good{k}{Path(name).suffix}"
        grey(good) if name.endswith("png") else volume(good.with_suffix(".nii.gz"))
    act(place.folder / "new" / name)
    arguments = ["--root", place.folder, "--device", "cpu", "--maps", 0, "--checkpoint", place.model, "--predict"]
    for given, scored in (("new", 2 if name.endswith("png") else 8), (f"new/{name}", 0)):
        status, error = run_here("methods/padim.py", *arguments, place.folder / given, "--out", place.out / given)
        error = "".join(line for line in error.splitlines(True) if not line.startswith("note: "))
        assert status == 1 + (scored == 0 and "error: " in error) and "Traceback" not in error, error
        assert error.count("\n") == 1 and f"new/{name}" in error, error
        scores = list((place.out / given).glob("*/padim/seed0/scores.csv"))
        assert sum(len(file.read_text().splitlines()) - 1 for file in scores) == scored


def lock(folder):
    """Held as another process holds it, until the test ends."""
    held = os.open(folder, os.O_RDONLY)
    common.fcntl.flock(held, common.fcntl.LOCK_EX)


@pytest.mark.parametrize("act, flags, said", [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_a_bad_file_is_named(act, flags, said, place):
    act(place)
    before = files_of(place.folder)
    arguments = ["--root", place.data.parent, "--out", place.out, "--device", "cpu", "--maps", 0, *NET.split()]
    status, error = run_here("methods/padim.py", *arguments, *flags.format(at=place).split())
    assert_one_line(status, error, said.format(at=place))
    assert files_of(place.folder) == before


# ------------------------------------------------------------------------------------------ odd, but not bad
NAMES = ["a.b.png", ".".join("abcdefgh") + ".PNG", "space and, comma.png", 'quo"te.png', "line\nbreak.png", "-rf.png",
         "n" * 251 + ".png", "ü" * 125 + ".png", os.fsdecode(b"caf\xe9.png"), "/".join("d" * 40) + "/deep.png",
         "%s{0}.png", "same/x.png", "same/x.jpg", "same_x.png"]


def test_images_of_any_name_keep_their_scores_and_pictures(place):
    shutil.rmtree(place.data / "test/Ungood/anomaly_mask")
    shutil.rmtree(place.data / "valid/Ungood/anomaly_mask")
    for name in NAMES:
        for folder in ("train/good/img", "test/Ungood/img"):
            file = place.data / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            grey(file, format="PNG")
    arguments = ["--root", place.data.parent, "--out", place.out, "--device", "cpu", "--maps", -1, *NET.split()]
    status, error = run_here("methods/padim.py", *arguments)
    assert status == 0, error
    folder = place.out / "phantom/padim/seed0"
    with open(folder / "scores.csv", newline="", encoding="utf-8") as f:
        paths = [row["path"] for row in csv.DictReader(f)]
    assert len(set(paths)) == 12 + len(NAMES) == len(list((folder / "maps").iterdir()))
    assert run_here("methods/padim.py", "--checkpoint", folder / "model.pt", "--predict", place.data / "test/Ungood",
                    *arguments)[0] == 0
    found, = place.out.glob("Ungood-*/padim/seed0/maps")
    assert len(list(found.iterdir())) == 6 + len(NAMES)


@pytest.mark.parametrize("harm", [lambda f: f.write_bytes(b"text"), lambda f: truncate(f), lambda f: f.write_bytes(b""),
                                  lambda f: (f.unlink(), f.mkdir())], ids=["text", "truncated", "empty", "folder"])
def test_a_damaged_cache_of_decoded_images_is_made_again(harm, place):
    arguments = ["--checkpoint", place.model, "--root", place.data.parent, "--device", "cpu", "--maps", 0]
    assert run_here("methods/padim.py", *arguments, "--out", place.out / "a") == (0, "")
    for decoded in list(place.data.parent.glob(".cache/*.decoded")):
        harm(decoded)
    assert run_here("methods/padim.py", *arguments, "--out", place.out / "b") == (0, "")
    first, second = (place.out / name / "phantom/padim/seed0/scores.csv" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


# ------------------------------------------------------------------------------------------- preparation and the report
WITH_SOURCE = ["brats2021", "btcv", "camelyon16", "lits", "oct2017", "resc", "rsna"]
# (script, arguments, what must be said); {at} is the case's folder, in which `full` holds a text file.
PREPARATION = [
    *((f"datasets/{name}.py", *case) for name in WITH_SOURCE for case in (
        ("--raw {at}/nowhere", "{at}/nowhere & --raw"),
        ("--raw {at}/full/a.txt", "a.txt & --raw"),
        ("--raw {at}/empty", "{at}/empty"),
        ("--raw {at}/full", "{at}/full & a.txt"),
        ("--raw {at}/full --workers 0", "--workers 0"),
        ("--raw {at}/full --seed -1", "--seed -1"))),
    *((f"datasets/{name}.py", "--raw {at}/full --patients {at}/nowhere.csv", "{at}") for name in WITH_SOURCE[3::2]),
    *(("datasets/phantom.py", f"{flag} {value} --root {{at}}/new", flag) for flag, value in (
        ("--size", 31), ("--size", -1), ("--train", 0), ("--valid", 0), ("--test", -5), ("--seed", -1))),
    ("datasets/phantom.py", "--root {at}/full/a.txt", "a.txt"),
    ("datasets/phantom.py", "--root /proc/nowhere", "/proc/nowhere"),
    ("datasets/check.py", "--limit 0", "--limit 0"),
    ("datasets/check.py", "--data nowhere --root {at}", "nowhere"),
    ("datasets/check.py", "--data {at}/empty", "{at}/empty"),
    ("report.py", "{at}/nowhere", "{at}/nowhere"),
    ("report.py", "{at}/full/a.txt", "a.txt"),
    ("report.py", "{at}/empty", "{at}/empty"),
]


@pytest.mark.parametrize("script, flags, said", PREPARATION, ids=lambda v: v.replace("{at}/", "") if " " in v else v)
def test_bad_input_of_a_preparation_is_named(script, flags, said, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.txt").write_text("text")
    before = files_of(tmp_path)
    if "--raw" in flags:
        flags += " --root {at}/new"
    status, error = run_here(script, *flags.format(at=tmp_path).split())
    assert_one_line(status, error, said.format(at=tmp_path))
    assert files_of(tmp_path) == before


# --------------------------------------------------------------------------------------------------- the command itself
@pytest.mark.parametrize("script, flags, said", [
    ("methods/padim.py", "--seed abc", "--seed & abc"),
    ("methods/padim.py", "--nonsense 3", "--nonsense"),
    ("methods/padim.py", "--seed", "--seed"),
    ("methods/padim.py", "--seed 1.5", "--seed & 1.5"),
    ("methods/padim.py", "something", "something"),
    ("methods/ddpm.py", "--noise pink", "--noise & pink"),
    ("methods/ddpm.py", "--multipliers 1 x", "--multipliers & x"),
    ("methods/cfa.py", "--cache-features much", "--cache-features & much"),
    ("datasets/btcv.py", "", "--raw"),
    ("report.py", "a b", "b"),
])
def test_what_cannot_be_parsed_is_named(script, flags, said):
    status, error = run_here(script, *flags.split())
    assert_one_line(status, error, said)


@pytest.mark.parametrize("script, flags, said", [
    ("methods/ganomaly.py", "--lr nan", "--lr nan"),
    ("methods/padim.py", "--data nowhere --root {at}", "nowhere"),
    ("methods/padim.py", "--checkpoint {at}/model.pt", "{at}/model.pt"),
    ("methods/padim.py", "--data {at}", "{at}"),
    ("datasets/lits.py", "--raw {at}/nowhere", "{at}/nowhere"),
    ("report.py", "{at}", "{at}"),
])
def test_the_command_itself_ends_with_one_line_and_2(script, flags, said, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    done = run_script(script, *flags.format(at=tmp_path).split())
    assert_one_line(done.returncode, done.stderr, said.format(at=tmp_path))


def files_of(folder):
    """{path: its size} of all files but decoded images."""
    return {p: p.lstat().st_size for p in folder.rglob("*") if ".cache" not in p.parts and not p.is_dir()}
