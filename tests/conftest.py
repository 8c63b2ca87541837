"""Shared by all tests: the repository on the path, scripts as modules, scripts as a user runs them, a small phantom."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


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


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """The root folder of a small phantom benchmark."""
    root = tmp_path_factory.mktemp("data")
    done = run_script("datasets/phantom.py", "--root", root, "--size", 64, "--train", 12, "--valid", 4, "--test", 6)
    assert done.returncode == 0, done.stderr
    return root
