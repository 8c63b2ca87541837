"""Shared by all tests: the repository on the path, scripts as modules, scripts as a user runs them, a small phantom."""

import fcntl
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "datasets")]
import common


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by `bash tests/run.sh quick`")
    config.addinivalue_line("markers", "long: runs in `bash tests/run.sh long` only")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "every_command_of_the_readme" not in item.name)  # the longest first
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("finished", "padim") != "padim":
            item.add_marker("slow")


def once(factory, name, make):
    """A folder that `make(folder)` fills, once for all processes of a test run. factory: tmp_path_factory."""
    base = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder = base / name
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder


def load_script(path):
    """A script of methods/ or datasets/ as a module, without running its main part."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_script(path, *arguments):
    """Run a script as a user does; the finished process, its output as text."""
    command = [sys.executable, str(ROOT / path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def run_here(path, *arguments):
    """`run_script` within this process, which saves the imports; what worker processes print is not caught."""
    out, err, argv, status = io.StringIO(), io.StringIO(), sys.argv, 0
    try:
        sys.argv = [str(ROOT / path), *map(str, arguments)]
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        status = e.code or 0
    except common.Error as e:  # what `common.command_line` makes of it
        err.write(f"error: {e}\n")
        status = 2
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def same_state(network, state):
    """Whether the network's parameters and buffers are those of `state`."""
    own = network.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)


def files_of(root):
    """{path below root: bytes} of all files, without the decoded cache."""
    found = (p for p in sorted(root.rglob("*")) if p.is_file() and ".cache" not in p.parts)
    return {p.relative_to(root): p.read_bytes() for p in found}


def write_nifti(file, array, axes="LAS", dtype=None, slope=None, inter=0.0):
    """A NIfTI file of `array`, whose axes run towards right, front and up; stored with its voxel axes along `axes`.

    slope, inter: stored as int16 that these turn back into the array's values."""
    codes = nibabel.orientations.axcodes2ornt(axes)
    affine = np.linalg.inv(nibabel.orientations.inv_ornt_aff(codes, [1, 1, 1]))
    turned = nibabel.orientations.apply_orientation(
        array, nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), codes))
    if slope is not None:
        turned, dtype = np.rint((turned - inter) / slope), np.int16
    image = nibabel.Nifti1Image(np.asarray(turned, dtype or array.dtype), affine)
    if slope is not None:
        image.header.set_slope_inter(slope, inter)
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, file)


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """The root folder of a small phantom benchmark."""
    def make(root):
        done = run_script("datasets/phantom.py", "--root", root, "--size", 64, "--train", 12, "--valid", 4, "--test", 6)
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "phantom-root", make)
