"""Every script of methods/ as a user runs it, on a small phantom, with untrained weights and short budgets."""

import ast
import csv
import dataclasses
import io
import json
import os
import runpy
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script, once, run_script, write_nifti
from PIL import Image

import common

METHODS = sorted(p.stem for p in (ROOT / "methods").glob("*.py"))
NET = ["--backbone", "mobilenet_v2", "--weights", "none"]
BRIEF = ["--epochs", 2, "--eval-every", 1]
SHORT = {  # the budgets of these tests
    "anogan": [*BRIEF, "--image-size", 32, "--batch-size", 4, "--width", 8, "--steps", 5],
    "cfa": [*NET, *BRIEF, "--image-size", 64],
    "cflow": [*NET, *BRIEF, "--image-size", 64, "--blocks", 2, "--batch-size", 4],
    "clip_recon": [*NET, *BRIEF, "--image-size", 64, "--model", "tiny", "--clip-weights", "none"],
    "clip_zeroshot": ["--model", "tiny", "--clip-weights", "none", "--image-size", 64, "--clip-size", 64,
                      "--batch-size", 12],
    "csflow": [*NET, *BRIEF, "--image-size", 128, "--hidden", 16, "--batch-size", 12],
    "cutpaste": [*NET, *BRIEF, "--image-size", 64, "--batch-size", 4],
    "ddpm": [*BRIEF, "--image-size", 16, "--base-channels", 8, "--multipliers", 1, 2, "--sample-steps", 2,
             "--noise-level", 20],
    "deepsvdd": [*BRIEF, "--ae-epochs", 2, "--image-size", 64],
    "draem": ["--textures", "images", "--width", 4, "--image-size", 64, "--batch-size", 2, "--epochs", 4,
              "--eval-every", 2],
    "fanogan": [*BRIEF, "--gan-epochs", 2, "--image-size", 32, "--batch-size", 4],
    "ganomaly": [*BRIEF, "--features", 8, "--image-size", 32, "--batch-size", 4],
    "mkd": [*NET, *BRIEF, "--image-size", 64, "--batch-size", 12],
    "padim": [*NET, "--image-size", 64],
    "patchcore": [*NET, "--image-size", 64, "--batch-size", 12],
    "patchsvdd": [*BRIEF, "--image-size", 80, "--batch-size", 4, "--repeat", 1],
    "rd4ad": [*NET, *BRIEF, "--image-size", 64],
    "simplenet": [*NET, *BRIEF, "--image-size", 64],
    "stfpm": [*NET, *BRIEF, "--image-size", 64, "--batch-size", 4],
    "utrad": [*NET, *BRIEF, "--image-size", 64, "--width", 64, "--layers", 1],
    "winclip": ["--model", "tiny", "--clip-weights", "none", "--image-size", 64, "--clip-size", 64, "--shots", 2],
}
report = load_script("report.py")
RANDOM = set(METHODS) - {"clip_zeroshot"}  # methods whose scores depend on the seed
IMAGE_ONLY = {"anogan", "cutpaste", "deepsvdd", "fanogan", "ganomaly"}  # methods that give no anomaly map
SHARED = {"data": str, "root": str, "out": str, "seed": int, "device": str, "image_size": int, "batch_size": int,
          "limit": int, "maps": int, "overwrite": bool, "checkpoint": str, "predict": str, "white": int,
          "holdout": float, "specificity": float, "scan_score": str, "save_maps": str}


def run_here(method, *arguments):
    """Run a script in this process (no second import of PyTorch), with the same effect as from the shell."""
    argv, state = sys.argv, torch.get_rng_state()
    sys.argv = [f"{method}.py", *map(str, arguments)]
    try:
        return runpy.run_path(str(ROOT / f"methods/{method}.py"), run_name="__main__")
    except common.Error as e:
        sys.excepthook(type(e), e, None)  # `common.command_line` has set it: one line, and exit code 2
    finally:
        sys.argv = argv
        torch.set_rng_state(state)
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", params=METHODS)
def finished(request, phantom, tmp_path_factory):
    """(method, run folder, common arguments, stdout) of a finished run."""
    method = request.param
    arguments = ["--data", "phantom", "--root", phantom, "--device", "cpu", *SHORT[method]]

    def make(out):
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as warned:
            run_here(method, *arguments, "--out", out, "--maps", 2)
        assert not warned.getvalue() or "Warning" in warned.getvalue()  # no progress bar outside a terminal
        (out / "stdout.txt").write_text(said.getvalue())

    out = once(tmp_path_factory, f"finished-{method}", make)
    return method, out / "phantom" / method / "seed0", arguments, (out / "stdout.txt").read_text()


def read_csv(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def read_scores(folder):
    return read_csv(folder / "scores.csv")


def test_a_run_leaves_complete_results(finished):
    method, folder, _, stdout = finished
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {"method", "data", "seed", "metrics", "images", "counts", "epoch", "train_seconds",
                            "test_ms_per_image", "peak_memory_gib", "parameters", "weights", "notes", "args",
                            "command", "format", "check", "changed", "decision", "versions", "device", "threads",
                            "commit", "finished"}
    assert (results["method"], results["data"], results["seed"]) == (method, "phantom", 0)
    metrics = results["metrics"]
    pixel = ["pixel_auroc", "pixel_ap", "aupro", "dice", "dice_valid"]
    decided = ["sensitivity", "specificity", "f1", "balanced_accuracy"]
    assert list(metrics) == ["image_auroc", "image_ap", *pixel, *decided, *(f"{name}_f1" for name in decided),
                             "sensitivity_at_90", "sensitivity_at_95"]
    for name, value in metrics.items():
        if method in IMAGE_ONLY and name in pixel:
            assert value is None
        else:
            assert 0 <= value <= 1, name
    assert results["counts"] == dict(train=dict(normal=12, anomalous=0), valid=dict(normal=4, anomalous=4),
                                     test=dict(normal=6, anomalous=6))
    assert "train 12 normal" in stdout and f"{metrics['image_auroc']:.4f}" in stdout
    assert {p.name for p in folder.iterdir()} <= {"results.json", "scores.csv", "model.pt", "maps", f"{method}.py",
                                                  "log.csv", "curves.csv", "lesions.csv", "browser"}
    assert ("epochs" in results["args"]) == (folder / "log.csv").exists()
    assert report.read_run(folder / "results.json", folder.parents[2])["metrics"].items() >= metrics.items()
    if metrics["aupro"] is not None:
        rows = read_csv(folder / "curves.csv")
        fpr, tpr, pro = (np.array([float(r[k]) for r in rows]) for k in ("fpr", "tpr", "pro"))
        assert np.trapezoid(tpr, fpr) == pytest.approx(metrics["pixel_auroc"], abs=0.01)
        assert pro.min() >= 0 and pro[-1] == pytest.approx(1) and fpr[-1] == 1 and (np.diff(fpr) >= 0).all()
    assert (folder / f"{method}.py").read_text() == (ROOT / f"methods/{method}.py").read_text()


def test_untrained_weights_are_marked(finished):
    _, folder, _, stdout = finished
    weights = json.loads((folder / "results.json").read_text())["weights"]
    assert not any(w["trained"] for w in weights)
    assert ("UNTRAINED" in stdout) == bool(weights)


def test_scores_give_the_reported_auroc_again(finished):
    _, folder, *_ = finished
    rows = read_scores(folder)
    labels, scores = [int(r["label"]) for r in rows], [float(r["score"]) for r in rows]
    reported = json.loads((folder / "results.json").read_text())["metrics"]["image_auroc"]
    assert len(rows) == 12 and common.image_metrics(labels, scores)["image_auroc"] == pytest.approx(reported, abs=1e-9)
    assert len(set(scores)) > 6  # images are told apart
    assert {r["path"].split("/")[1] for r in rows} == {"good", "Ungood"}


def test_pictures_show_the_image_and_its_map(finished):
    method, folder, *_ = finished
    if method in IMAGE_ONLY:
        assert not (folder / "maps").exists()
        return
    panels = [Image.open(p) for p in (folder / "maps").iterdir()]
    assert len(panels) == 2 and len({p.size for p in panels}) == 1
    assert all(np.asarray(p).std() > 0 for p in panels)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(finished, tmp_path):
    method, folder, arguments, _ = finished
    for seed in (0, 1):
        run_here(method, *arguments, "--out", tmp_path, "--maps", 0, "--seed", seed)
    again, other = (tmp_path / "phantom" / method / f"seed{seed}/scores.csv" for seed in (0, 1))
    assert again.read_bytes() == (folder / "scores.csv").read_bytes()
    assert (other.read_bytes() != again.read_bytes()) == (method in RANDOM)


class Stopped(Exception):
    pass


def test_a_run_stopped_after_an_evaluation_goes_on_and_ends_with_the_same_bytes(finished, tmp_path, monkeypatch):
    method, folder, arguments, _ = finished
    if "--epochs" not in arguments:
        return  # nothing is trained: such a run starts anew
    keep, stop = common.Run.keep, arguments[arguments.index("--epochs") + 1] // 2

    def and_stop(run, model, epoch=None, file="model.pt", **more):
        keep(run, model, epoch, file, **more)
        if file == "resume.pt" and epoch == stop and not more["first_stage"]:
            raise Stopped

    monkeypatch.setattr(common.fcntl, "flock", lambda *_: None)  # this process stops, but does not end
    arguments = [*arguments, "--eval-every", stop, "--out", tmp_path, "--maps", 0]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(common.Run, "keep", and_stop)
        run_here(method, *arguments)
    stopped = tmp_path / "phantom" / method / "seed0"
    assert not (stopped / "results.json").exists()
    torch.manual_seed(99)  # whatever the next process draws before
    run_here(method, *arguments)
    assert (stopped / "scores.csv").read_bytes() == (folder / "scores.csv").read_bytes()
    assert [row["epoch"] for row in read_csv(stopped / "log.csv")] == [r["epoch"] for r in read_csv(folder / "log.csv")]
    assert not (stopped / "resume.pt").exists()


def test_a_finished_run_is_kept_and_other_arguments_ask_for_overwrite(finished, capsys, monkeypatch):
    monkeypatch.setattr(common.fcntl, "flock", lambda *_: None)  # this process leaves, but does not end
    method, folder, arguments, _ = finished
    written = (folder / "results.json").stat().st_mtime_ns
    arguments = [*arguments, "--out", folder.parents[2], "--maps", 2]
    with pytest.raises(SystemExit) as left:
        run_here(method, *arguments)
    assert not left.value.code and "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        run_here(method, *arguments, "--image-size", 96)
    assert left.value.code == 2 and "--image-size" in (error := capsys.readouterr().err) and "--overwrite" in error
    assert (folder / "results.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_finished_run_on_another_folder_of_the_same_name_is_not_taken_for_this_one(phantom, tmp_path, capsys):
    arguments = ["--root", tmp_path, "--out", tmp_path / "runs", "--device", "cpu", "--maps", 0, *SHORT["padim"]]
    shutil.copytree(phantom / "phantom", tmp_path / "other/phantom")
    run_here("padim", *arguments, "--data", phantom / "phantom")
    with pytest.raises(SystemExit) as left:
        run_here("padim", *arguments, "--data", tmp_path / "other/phantom")
    assert left.value.code == 2 and "--data" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_do_not_work_on_one_run_folder(phantom, tmp_path, capsys):
    folder = tmp_path / "phantom/padim/seed0"
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    common.fcntl.flock(held, common.fcntl.LOCK_EX)
    arguments = ["--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 0, *SHORT["padim"]]
    with pytest.raises(SystemExit) as left:
        run_here("padim", *arguments)
    assert left.value.code == 2 and "another process is using it" in capsys.readouterr().err
    os.close(held)
    run_here("padim", *arguments)
    assert (folder / "results.json").exists()


def test_a_checkpoint_gives_the_metrics_of_its_run_without_its_arguments(finished, phantom, tmp_path):
    method, folder, *_ = finished
    run_here(method, "--checkpoint", folder / "model.pt", "--root", phantom, "--out", tmp_path, "--device", "cpu",
             "--maps", 0)
    first, second = (json.loads((f / "results.json").read_text())
                     for f in (folder, tmp_path / "phantom" / method / "seed0"))
    assert first["metrics"] == second["metrics"] and first["epoch"] == second["epoch"]


def test_predict_scores_any_folder_of_images_one_by_one_as_in_a_batch(finished, phantom, tmp_path):
    method, folder, *_ = finished
    shutil.copytree(phantom / "phantom/test/Ungood/img", tmp_path / "new/some/where")
    run_here(method, "--checkpoint", folder / "model.pt", "--predict", tmp_path / "new", "--root", tmp_path, "--out",
             tmp_path / "runs", "--device", "cpu", "--batch-size", 1)
    found, = (tmp_path / "runs").glob(f"new-*/{method}/seed0")
    assert all(0 <= float(r["percentile"]) <= 100 for r in read_scores(found))
    assert {r["decision"] for r in read_scores(found)} <= {"normal", "anomalous"}
    scores = {r["path"].split("/")[-1]: float(r["score"]) for r in read_scores(found)}
    known = {r["path"].split("/")[-1]: float(r["score"]) for r in read_scores(folder) if r["label"] == "1"}
    # untrained embeddings lie so close together that CutPaste's whitening enlarges their rounding to 1e-3
    tolerance = 5e-3 if method in ("cutpaste", "patchsvdd") else 1e-4  # its patches are almost equal, too
    assert scores == pytest.approx(known, rel=tolerance) and not (found / "results.json").exists()
    assert method in IMAGE_ONLY or len(list((found / "maps").iterdir())) == 6


def test_six_lines_load_the_model_in_python(finished, phantom):
    method, folder, *_ = finished
    script = load_script(f"methods/{method}.py")
    kept = torch.load(folder / "model.pt", weights_only=True)
    model = script.build_model(script.Args(**kept["args"]))
    model.load_state_dict(kept["state"], strict=False)  # frozen networks are not in the file
    image, _ = common.decode(phantom / "phantom/test/Ungood/img/0000.png", kept["args"]["image_size"])
    anomaly_map, score = model.eval().predict(torch.from_numpy(image.copy())[None] / 255)
    known = {r["path"]: float(r["score"]) for r in read_scores(folder)}["test/Ungood/img/0000.png"]
    assert float(score) == pytest.approx(known, rel=5e-3) and (anomaly_map is None) == (method in IMAGE_ONLY)


@pytest.mark.parametrize("axes", ["LAS", "PIR"])
@pytest.mark.slow
def test_predict_writes_the_map_of_a_nifti_volume_onto_the_volume(axes, phantom, tmp_path, monkeypatch):
    arguments = ["--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 2]
    run_here("padim", *arguments, *SHORT["padim"])
    volume = np.random.default_rng(0).uniform(0, 300, (40, 32, 6)).astype(np.float32)  # right, front, up
    write_nifti(tmp_path / "case.nii.gz", volume, axes)
    pictures = []
    monkeypatch.setattr("decisions.save_picture", lambda file, image, *rest: pictures.append(image))
    run_here("padim", *arguments, "--checkpoint", tmp_path / "phantom/padim/seed0/model.pt", "--predict",
             tmp_path / "case.nii.gz")
    folder, = tmp_path.glob("case_nii_gz-*/padim/seed0")
    scores = [float(r["score"]) for r in read_scores(folder)]  # from the lowest slice up
    source, found, mask = (nibabel.load(f) for f in (tmp_path / "case.nii.gz", *(
        folder / f"case_{what}.nii.gz" for what in ("map", "mask"))))
    assert found.shape == source.shape == mask.shape and np.array_equal(found.affine, source.affine)
    upright = np.asarray(nibabel.as_closest_canonical(found).dataobj)
    assert upright.shape == (40, 32, 6)
    assert np.argsort(upright.max(axis=(0, 1))).tolist() == np.argsort(scores).tolist()
    picture, = pictures  # of the highest slice, front on top
    highest = volume[::-1, ::-1, int(np.argmax(scores))].T
    assert np.corrcoef(picture[0].ravel(), highest.ravel())[0, 1] > 0.9999
    scan, = read_csv(folder / "scans.csv")
    assert float(scan["score"]) == max(scores) and scan["decision"] == ""  # the phantom's names tell no scans


@pytest.mark.slow
def test_predictions_never_replace_each_other_and_tell_their_input_and_checkpoint(phantom, tmp_path):
    arguments = ["--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 2]
    run_here("padim", *arguments, *SHORT["padim"])
    model, images = tmp_path / "phantom/padim/seed0/model.pt", phantom / "phantom/test/Ungood/img"
    inputs = [tmp_path / "a/x.1.png", tmp_path / "b/x.1.png", tmp_path / "a/x.2.png", tmp_path / "c"]
    for file, image in zip([*inputs[:3], *(tmp_path / "c" / n for n in ("d/e.png", "d_e.png", "d/e.jpg"))],
                           sorted(images.iterdir()), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.open(image).save(file)
    for path in inputs:
        run_here("padim", *arguments, "--checkpoint", model, "--predict", path)
    records = [json.loads(f.read_text()) for f in tmp_path.glob("*/padim/seed0/predict.json")]
    assert {r["input"] for r in records} == {str(path) for path in inputs}
    assert {r["checkpoint_sha256"] for r in records} == {common.sha256(model)}
    folder, = tmp_path.glob("c-*/padim/seed0")
    run_here("padim", *arguments, "--checkpoint", model, "--predict", tmp_path / "c", "--maps", -1)
    assert len(read_scores(folder)) == 3 == len(list((folder / "maps").iterdir()))


@pytest.mark.slow
def test_a_finished_run_says_that_its_images_changed(phantom, tmp_path, capsys):
    shutil.copytree(phantom / "phantom", tmp_path / "phantom")
    arguments = ["--root", tmp_path, "--out", tmp_path / "runs", "--device", "cpu", "--maps", 0, *SHORT["padim"]]
    run_here("padim", *arguments)
    (tmp_path / "phantom/train/good/img/0000.png").unlink()
    with pytest.raises(SystemExit) as left:
        run_here("padim", *arguments)
    assert left.value.code == 2 and "other images" in capsys.readouterr().err


@pytest.mark.slow
def test_overwrite_leaves_nothing_of_the_earlier_run(phantom, tmp_path):
    arguments = ["--root", phantom, "--out", tmp_path, "--device", "cpu", *SHORT["padim"]]
    run_here("padim", *arguments, "--maps", 2)
    folder = tmp_path / "phantom/padim/seed0"
    (folder / "resume.pt").write_text("of a killed run")
    run_here("padim", *arguments, "--maps", 0, "--overwrite")
    assert {p.name for p in folder.iterdir()} == {"results.json", "scores.csv", "model.pt", "padim.py", "curves.csv",
                                                 "lesions.csv"}


@pytest.mark.slow
def test_a_checkpoint_does_not_replace_the_scores_of_a_finished_run(phantom, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common.fcntl, "flock", lambda *_: None)  # this process leaves, but does not end
    arguments = ["--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 0]
    run_here("padim", *arguments, *SHORT["padim"])
    folder = tmp_path / "phantom/padim/seed0"
    before = (folder / "scores.csv").read_bytes()
    with pytest.raises(SystemExit):
        run_here("padim", *arguments, "--checkpoint", folder / "model.pt", "--limit", 2)
    assert "give another --out or --overwrite" in capsys.readouterr().err
    assert (folder / "scores.csv").read_bytes() == before
    run_here("padim", *arguments, "--checkpoint", folder / "model.pt", "--overwrite")
    assert (folder / "scores.csv").read_bytes() == before


@pytest.mark.slow
def test_a_wrong_data_folder_leaves_a_finished_run_as_it_is(phantom, tmp_path):
    run_here("padim", "--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 0, *SHORT["padim"])
    with pytest.raises(SystemExit):
        run_here("padim", "--root", tmp_path, "--out", tmp_path, "--device", "cpu", *SHORT["padim"])
    assert (tmp_path / "phantom/padim/seed0/results.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_each_argument_is_declared_once(method):
    tree = ast.parse((ROOT / f"methods/{method}.py").read_text())
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    names = [node.target.id for node in args.body if isinstance(node, ast.AnnAssign)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("method", METHODS)
def test_all_scripts_share_names_and_wording_of_their_arguments(method):
    script = load_script(f"methods/{method}.py")
    fields = {f.name: f for f in dataclasses.fields(script.Args)}
    expected = dict(SHARED)
    if "epochs" in fields:
        expected |= {"lr": float, "eval_every": int}
        assert fields["eval_every"].default == 10
    for name in expected:
        assert name in fields, name
    source = (ROOT / f"methods/{method}.py").read_text()
    exemplar = (ROOT / "methods/padim.py").read_text()
    for name in ("data", "root", "out", "seed", "device", "limit", "white", "holdout", "maps", "checkpoint", "predict",
                 "specificity", "scan_score", "save_maps", "weights"):
        if name in fields and not (name == "predict" and method in ("winclip", "clip_zeroshot")):
            start = exemplar.index(f"    {name}: ")
            assert exemplar[start : exemplar.index('"""\n', exemplar.index('"""', start) + 3)] in source, name
    if "backbone" in fields:
        assert "mobilenet_v2" in source
    assert "arXiv" in script.__doc__ and "Differences" in script.__doc__ or method == "clip_recon"


@pytest.mark.slow
def test_a_checkpoint_refuses_other_frozen_weights(phantom, tmp_path, capsys):
    arguments = ["--root", phantom, "--out", tmp_path, "--device", "cpu", "--maps", 0, *SHORT["padim"]]
    run_here("padim", *arguments)
    net = common.pretrained_network("mobilenet_v2", "none")
    net.features[0][0].weight.data += 1
    torch.save(net.state_dict(), tmp_path / "other.pth")
    with pytest.raises(SystemExit):
        run_here("padim", "--checkpoint", tmp_path / "phantom/padim/seed0/model.pt", *arguments[:6], "--overwrite",
                 "--weights", tmp_path / "other.pth")
    assert "trained on the frozen weights" in capsys.readouterr().err


def test_a_copied_script_takes_the_common_py_next_to_it_and_not_one_above_it(tmp_path):
    (tmp_path / "mine").mkdir()
    for file in (ROOT / "methods/padim.py", ROOT / "common.py"):
        shutil.copy(file, tmp_path / "mine")
    (tmp_path / "common.py").write_text("raise SystemExit('another common.py')")
    assert run_script(tmp_path / "mine/padim.py", "--help").returncode == 0


@pytest.mark.parametrize("method", METHODS)
def test_all_scripts_look_for_common_py_in_the_same_places(method):
    line = "sys.path.insert(1, str(Path(__file__).resolve().parents[1]))\nimport common\n"
    assert line in (ROOT / f"methods/{method}.py").read_text()


@pytest.mark.slow
def test_copying_one_script_and_common_is_enough(phantom, tmp_path):
    for name in ("methods/padim.py", "common.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    run = "--root", phantom, "--out", tmp_path / "runs"
    done = run_script(tmp_path / "methods/padim.py", *run, *SHORT["padim"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NOTE: without datasets/decisions.py") == 1
    kept = report.read_run(next(tmp_path.glob("runs/**/results.json")), tmp_path)
    assert kept["metrics"]["dice_valid"] is not None and kept["decision"]["image"] is None
    model = next(tmp_path.glob("runs/**/model.pt"))
    done = run_script(tmp_path / "methods/padim.py", *run, "--checkpoint", model, "--predict", phantom)
    assert done.returncode == 2 and "needs decisions.py, predict.py" in done.stderr and done.stderr.count("\n") == 1
