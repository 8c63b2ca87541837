"""run_all.sh: wrong words end with one line, nothing of GNU is needed, and its exit status tells whether every run is
there."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

METHODS = sorted(p.stem for p in (ROOT / "methods").glob("*.py"))
FLAGS = "--weights none --image-size 64 --device cpu --maps 0"


@pytest.fixture(scope="module")
def copy(phantom, tmp_path_factory):
    """The project with one benchmark; flock, nproc and GNU's options of xargs fail, as on a Mac."""
    folder = tmp_path_factory.mktemp("run_all")
    left_out = shutil.ignore_patterns(".git*", ".venv", ".*_cache", ".gpu", "data", "runs", "__pycache__", "test_*")
    shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    (folder / "copy/.venv").symlink_to(sys.prefix)
    shutil.copytree(phantom / "phantom", folder / "copy/data/phantom")
    (folder / "bin").mkdir()
    xargs = f'case "$*" in *-d* | *--*) exit 1 ;; *) exec {shutil.which("xargs")} "$@" ;; esac'
    for name, body in {"flock": "exit 127", "nproc": "exit 127", "xargs": xargs}.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder / "copy"


def run_all(copy, *words, **variables):
    own = ("JOBS", "DATA", "METHODS", "SEEDS", "FLAGS", "DEMO", "NET", "SLURM_ARRAY_TASK_ID")
    known = {k: v for k, v in os.environ.items() if k not in own}
    environment = known | dict(PATH=f"{copy.parent}/bin:{os.environ['PATH']}", OMP_NUM_THREADS="1") | variables
    return subprocess.run(["bash", "run_all.sh", *words], cwd=copy, env=environment, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("words, variables, said", [
    ("--lsit", {}, "--lsit"),
    ("--list all", {}, "--list all"),
    ("ablation all", {}, "all"),
    *(("", dict(JOBS=value), f"JOBS={value}") for value in ("abc", "0", "-1", "1.5", "08", "1 2")),
    *(("", dict(SEEDS=value), "SEEDS=") for value in ("x", "-1", "0 1x")),
    *(("", dict(METHODS=value), "METHODS") for value in ("nothing", "padim *", "padim,stfpm")),
    *(("", dict(SLURM_ARRAY_TASK_ID=value), f"SLURM_ARRAY_TASK_ID={value}") for value in ("abc", "0")),
    ("", dict(DEMO="0"), "DEMO=0"),
    pytest.param("", dict(DATA="phantom", SEEDS=" "), "METHODS or SEEDS is blank", marks=pytest.mark.slow),
    pytest.param("", dict(DATA="nowhere"), "DATA: there is no benchmark nowhere", marks=pytest.mark.slow),
    pytest.param("", dict(DATA="phantom", SLURM_ARRAY_TASK_ID="22"), "the list has 21 lines", marks=pytest.mark.slow),
])
def test_wrong_words_and_variables_end_with_one_line(words, variables, said, copy):
    done = run_all(copy, *words.split(), **variables)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and said in done.stderr


@pytest.mark.slow
def test_the_list_has_every_method_with_short_budgets_on_the_phantom(copy):
    done = run_all(copy, "--list", DATA="phantom", FLAGS="--device  cuda:1")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split()[1] for line in lines] == [f"methods/{method}.py" for method in METHODS]
    assert all(line.endswith(" --device cuda:1") and "--seed 0 --" in line and "NET" not in line for line in lines)
    lines = run_all(copy, "--list", DATA="phantom", METHODS="padim", SEEDS="3 1").stdout.splitlines()
    assert [line.split("--seed ")[1][0] for line in lines] == ["3", "1"]


@pytest.mark.slow
def test_two_runs_at_once_name_their_lines_are_kept_and_a_failing_one_is_an_exit_status(copy):
    asked = dict(DATA="phantom", METHODS="padim patchcore", JOBS="2", NET="--backbone mobilenet_v2")
    done = run_all(copy, **asked, FLAGS=FLAGS)
    assert done.returncode == 0, done.stdout + done.stderr
    for method in ("padim", "patchcore"):
        assert (copy / f"runs/phantom/{method}/seed0/results.json").exists()
        assert f"phantom/{method}/seed0: {method} on phantom" in done.stdout
    asked["METHODS"] = "padim"
    assert "padim on phantom" not in run_all(copy, **asked, FLAGS=FLAGS).stdout  # finished, with these arguments
    done = run_all(copy, **asked, FLAGS=f"{FLAGS} --limit 3")
    assert done.returncode == 1 and done.stdout.count("--limit") == 1  # with other ones it is not what was asked for
    assert done.stderr.count(" methods/padim.py ") == 1


@pytest.mark.long
def test_a_finished_run_is_started_again_when_its_images_have_changed_and_says_so(copy):
    asked = dict(DATA="phantom", METHODS="padim", NET="--backbone mobilenet_v2", FLAGS=f"{FLAGS} --limit 4")
    shutil.rmtree(copy / "runs", ignore_errors=True)
    assert run_all(copy, **asked).returncode == 0
    image = next((copy / "data/phantom/test/good").rglob("*.png"))
    image.rename(copy / "kept.png")
    done = run_all(copy, **asked)
    (copy / "kept.png").rename(image)
    assert done.returncode == 1 and "holds a run with other images" in done.stdout


@pytest.mark.long
def test_it_runs_from_any_folder_and_is_not_led_astray_by_variables_of_others(copy, tmp_path):
    def listed(cwd, *command, **variables):
        known = {k: v for k, v in os.environ.items() if k not in ("METHODS", "SEEDS", "DATA", "FLAGS", "DEMO", "JOBS")}
        given = known | dict(METHODS="ddpm", SEEDS="0", DATA="phantom") | variables
        return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    lines = run_all(copy, "--list", METHODS="ddpm", SEEDS="0", DATA="phantom").stdout
    assert lines.startswith(".venv/bin/python methods/ddpm.py --data phantom --seed 0 ")
    assert listed(copy.parent, "bash", "copy/run_all.sh", "--list").stdout == lines
    others = dict(SLURM_SUBMIT_DIR=str(tmp_path), LOCK="1", DATA="Phantom")
    assert listed(copy, "bash", "run_all.sh", "--list", **others).stdout == lines
    shutil.copy(copy / "run_all.sh", tmp_path / "slurm_script")  # as sbatch does
    script = str(tmp_path / "slurm_script")
    assert listed(tmp_path, "bash", script, "--list", SLURM_SUBMIT_DIR=str(copy)).stdout == lines
    done = listed(tmp_path, "bash", script, "--list")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no common.py" in done.stderr
    done = listed(copy, "bash", "-c", "source run_all.sh --list; echo alive")
    assert done.stdout == "alive\n" and done.stderr.startswith("error: do not source")


@pytest.mark.long
def test_more_jobs_than_a_pipe_holds_do_not_wait_for_ever(copy):
    (copy / "methods/nothing.py").write_text("")
    (copy / "report.py").rename(copy / "kept.py")
    (copy / "report.py").write_text("")
    try:
        assert run_all(copy, DATA="phantom", METHODS="nothing", JOBS="99999").returncode == 0
    finally:
        (copy / "methods/nothing.py").unlink()
        (copy / "kept.py").rename(copy / "report.py")


@pytest.mark.long
def test_runs_are_dealt_out_over_the_gpus_that_were_given_and_the_user_can_name_one(copy):
    (copy / "methods/gpu.py").write_text("import os\nprint('sees', os.environ.get('CUDA_VISIBLE_DEVICES'))\n")
    asked = dict(DATA="phantom", METHODS="gpu", SEEDS="0 1 2 3", JOBS="2", CUDA_VISIBLE_DEVICES="3,MIG-a")
    try:
        out = run_all(copy, **asked).stdout
        assert {line.split()[-1] for line in out.splitlines() if "sees" in line} == {"3", "MIG-a"}
        out = run_all(copy, **asked, FLAGS="--device cuda:1").stdout
        assert {line.split()[-1] for line in out.splitlines() if "sees" in line} == {"3,MIG-a"}
        (copy.parent / "bin/nvidia-smi").write_text("#!/bin/sh\necho 0\necho 1\n")
        (copy.parent / "bin/nvidia-smi").chmod(0o755)
        out = run_all(copy, **asked | dict(CUDA_VISIBLE_DEVICES="")).stdout  # none of the two
        assert {line.split("sees")[1] for line in out.splitlines() if "sees" in line} == {" "}
    finally:
        (copy / "methods/gpu.py").unlink()
        (copy.parent / "bin/nvidia-smi").unlink(missing_ok=True)


def test_it_is_short_and_needs_nothing_of_bash_4():
    text = (ROOT / "run_all.sh").read_text()
    assert text.count("\n") <= 128
    for word in ("declare -A", "local -A", "mapfile", "readarray", "wait -n", "${EPOCH", ",,}", "^^}", "coproc", "|&",
                 "&>>", "nproc", "flock ", "xargs -"):
        assert word not in text, word
