"""tests/clip.py's plumbing, with an untrained file: all checks run, and those that need training fail."""

import pytest
import torch
from conftest import run_here

import common

pytestmark = pytest.mark.slow


def test_an_untrained_clip_runs_through_all_checks_and_fails(phantom, tmp_path):
    file = tmp_path / "untrained.pt"
    torch.save(common.load_clip("tiny", "none", 64).state_dict(), file)
    done = run_here("tests/clip.py", "--clip-weights", file, "--model", "tiny", "--image-size", 64, "--root", phantom,
                    "--steps", 5)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and sum(line.startswith(("ok", "FAILED")) for line in lines) == 7, done.stderr
    assert lines[1].startswith("FAILED") and lines[-1].endswith("of 7 checks hold")
