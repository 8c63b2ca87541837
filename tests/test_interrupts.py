"""Killed at any moment, a run or a preparation ends by the same command as if nothing had happened; Ctrl-C leaves no
process behind and says truly where the run goes on."""

import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, files_of, once
from test_datasets import cohort
from test_methods import SHORT, read_csv, run_here

import common

FAST = [*SHORT["ganomaly"], "--epochs", 4]
METHODS = {  # one that is fitted, one that is trained, one with a first stage
    "methods/padim.py": SHORT["padim"],
    "methods/ganomaly.py": FAST,
    "methods/deepsvdd.py": [*SHORT["deepsvdd"], "--ae-epochs", 4],
}
PREPARATIONS = {
    "datasets/phantom.py": ["--size", 64, "--train", 4, "--valid", 2, "--test", 2],
    "datasets/brats2021.py": ["--raw", "{raw}", "--workers", 2],
}

IMPORTED = ["torch", "torchvision.models.feature_extraction", "torchvision.transforms.v2.functional", "sklearn.metrics",
            "scipy.ndimage", "nibabel", "tyro", "pytest"]  # what takes seconds, and writes nothing


# ------------------------------------------------------------------------------------------------------------- kill -9
def run_counted(script, arguments, last, counted):
    """The script's main part in a process of its own, which kills itself at the call number `last` of any function,
    Python's or C's; how many there were is written to the file `counted`."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.register_at_fork(after_in_child=lambda: sys.setprofile(None))  # workers are not counted
    torch.set_num_threads(1)
    sys.argv, sys.stdout = [str(ROOT / script), *map(str, arguments)], open(os.devnull, "w")  # noqa: SIM115
    sys.setprofile(count)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.setprofile(None)
        counted.write_text(str(calls))


def start(script, arguments, last, folder):
    """Exit code of `run_counted` in a process that is forked from one which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=run_counted, args=(script, arguments, last, folder / "calls"))
    process.start()
    process.join()
    return process.exitcode


def left_by(script, root):
    """What a run or a preparation leaves, comparable between two that should be equal."""
    files = {file: content for file, content in files_of(root).items() if file.name != "calls"}
    if script.startswith("datasets/"):
        return files
    folder, = root.glob("runs/phantom/*/seed0")
    kept, results = common.read_state(folder / "model.pt", "model"), json.loads((folder / "results.json").read_text())
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(folder / "log.csv")] \
        if (folder / "log.csv").exists() else []
    return [sorted(files), log, kept["epoch"], kept["notes"],
            {k: v.tolist() for k, v in kept["state"].items()}, results["metrics"], results["counts"],
            *(content for file, content in sorted(files.items())
              if file.name in ("scores.csv", "curves.csv") or "maps" in file.parts)]


def command_of(script, root, data, raw):
    if script in METHODS:
        shutil.rmtree(data / ".cache", ignore_errors=True)  # each decodes its images
        return ["--root", data, "--out", root / "runs", "--device", "cpu", "--maps", 2, *METHODS[script]]
    return ["--root", root, *(str(word).format(raw=raw) for word in PREPARATIONS[script])]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return once(tmp_path_factory, "kill-raw", lambda folder: cohort(folder, cases=4, shape=(16, 16, 110)))


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has threads")
@pytest.mark.parametrize("script, kills", [
    *(pytest.param(script, 2, marks=pytest.mark.slow) for script in ("methods/padim.py", *PREPARATIONS)),
    *(pytest.param(script, 20, marks=pytest.mark.long) for script in (*METHODS, *PREPARATIONS))])
def test_killed_at_a_random_call_the_same_command_ends_as_if_nothing_had_happened(
        script, kills, phantom, raw, tmp_path):
    whole, data = tmp_path / "whole", tmp_path / "data"
    whole.mkdir()
    shutil.copytree(phantom / "phantom", data / "phantom")
    assert start(script, command_of(script, whole, data, raw), math.inf, whole) == 0
    expected, calls = left_by(script, whole), int((whole / "calls").read_text())
    draw, killed = random.Random(f"{script} {kills}"), 0
    for k in range(kills):
        root = tmp_path / f"killed{k}"
        root.mkdir()
        command = command_of(script, root, data, raw)
        # every other one late, where the results are written
        last = draw.randrange(1, calls) if k % 2 else calls - draw.randrange(1, calls // 4)
        killed += start(script, command, last, root) == -signal.SIGKILL  # the number of calls varies a little
        assert start(script, command, math.inf, root) == 0
        found = left_by(script, root)
        assert found == expected, f"killed at call {last} of {calls}"
        shutil.rmtree(root)
    assert killed > kills / 2


# -------------------------------------------------------------------------------------------------------- first stages
class Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("method, first", [("deepsvdd", "--ae-epochs"), ("fanogan", "--gan-epochs")])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_stopped_in_its_first_stage_goes_on_there_and_ends_with_the_same_bytes(
        method, first, stop, phantom, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common.fcntl, "flock", lambda *_: None)  # this process stops, but does not end
    arguments = ["--root", phantom, "--device", "cpu", "--maps", 0, *SHORT[method], first, 3]
    run_here(method, *arguments, "--out", tmp_path / "whole")
    keep, saved = common.Run.keep, []

    def and_stop(run, *rest, **more):
        keep(run, *rest, **more)
        saved.append(rest)
        if len(saved) == stop:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(common.Run, "keep", and_stop)
        run_here(method, *arguments, "--out", tmp_path / "cut")
    capsys.readouterr()
    torch.manual_seed(99)  # whatever the next process draws before
    run_here(method, *arguments, "--out", tmp_path / "cut")
    said = capsys.readouterr().out
    assert f"resuming after epoch {stop} of the first stage" in said and f"epoch {stop}/3" not in said
    for file in ("scores.csv", "model.pt"):
        whole, cut = (tmp_path / out / "phantom" / method / "seed0" / file for out in ("whole", "cut"))
        if file == "scores.csv":
            assert whole.read_bytes() == cut.read_bytes()
        else:
            assert common.read_state(whole, "")["notes"] == common.read_state(cut, "")["notes"]
    assert {p.name for p in whole.parent.iterdir()} == {p.name for p in cut.parent.iterdir()}


# -------------------------------------------------------------------------------------------------------------- Ctrl-C
def answers_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # jobs that a shell puts into the background ignore it
    os.setsid()


def begin(command, **options):
    return subprocess.Popen(list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            cwd=ROOT, preexec_fn=answers_ctrl_c, **options)


def of_group(group):
    """Processes of a process group that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == group and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.slow
def test_ctrl_c_ends_a_run_within_3_seconds_and_it_goes_on_where_it_says(phantom, tmp_path):
    command = [sys.executable, ROOT / "methods/ganomaly.py", "--root", phantom, "--out", tmp_path, "--device", "cpu",
               *SHORT["ganomaly"], "--epochs", 100000, "--eval-every", 2]
    run, epoch = begin(command), 0
    for line in run.stdout:
        if line.startswith("epoch "):
            epoch = int(line.split("/")[0].split()[1])
            if epoch == 5:
                break
    begun = time.time()
    run.send_signal(signal.SIGINT)
    out, error = run.communicate(timeout=60)
    assert time.time() - begun < 3
    assert run.returncode == 130 and error.count("\n") == 1 and error.startswith("interrupted"), error
    assert not list(tmp_path.rglob(".tmp-*"))
    epochs = [epoch, *(int(line.split("/")[0].split()[1]) for line in out.splitlines() if line.startswith("epoch "))]
    again = begin(command)
    said = next(line for line in again.stdout if line.startswith("resuming"))
    again.kill()
    again.communicate()
    after = int("".join(c for c in said.split(",")[0] if c.isdigit()))
    assert after % 2 == 0 and after <= epochs[-1] <= after + 2  # it may be stopped just before or after it is saved
    assert f"epoch {after}" in error or "last evaluation" in error


@pytest.mark.slow
def test_ctrl_c_before_the_first_evaluation_ends_with_one_line_too(phantom, tmp_path):
    run = begin([sys.executable, ROOT / "methods/padim.py", "--root", phantom, "--out", tmp_path, "--device", "cpu",
                 *SHORT["padim"]])
    assert run.stdout.readline().startswith("padim on phantom")
    run.send_signal(signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and error.count("\n") == 1 and error.startswith("interrupted"), error


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_ends_all_processes_of_several_jobs_within_3_seconds(phantom, tmp_path):
    flags = f"--root {phantom} --out {tmp_path} --device cpu --epochs 100000"
    job = begin(["bash", "run_all.sh"], env=os.environ | dict(
        DATA=str(phantom / "phantom"), METHODS="ganomaly fanogan", SEEDS="0", JOBS="2", DEMO="1",
        FLAGS=f"{flags} --image-size 32 --batch-size 4"))
    running = set()
    for line in job.stdout:
        running |= {method for method in ("ganomaly", "fanogan") if f"{method} on phantom" in line}
        if len(running) == 2:
            break
    begun = time.time()
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does
    while of_group(job.pid) and time.time() < begun + 20:
        time.sleep(0.05)
    assert time.time() < begun + 3 and not of_group(job.pid)
    job.communicate(timeout=10)
    assert job.returncode not in (0, None)
