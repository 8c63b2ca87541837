"""tests/gpu.py runs whole in small on a CPU, so that it is ready where there is a GPU."""

import json

import pytest
import torch
from conftest import run_script

pytestmark = pytest.mark.slow


def rows(part, file, *more):
    done = run_script("tests/gpu.py", part, *more, "--device", "cpu", "--small", "--out", file)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_right_part_finds_no_difference_on_one_device(tmp_path):
    (row,) = rows("right", tmp_path / "g.jsonl", "ganomaly")
    assert row["same"] == row["scores"] == row["auroc"] == 0 and row["again"] and row["predict"], row


@pytest.mark.long
def test_speed_is_measured_next_to_the_networks_alone_and_gives_the_hours_of_the_suite(tmp_path):
    row = rows("fast", tmp_path / "g.jsonl", "ganomaly")[0]
    assert 0.1 < row["train_share"] < 1.5 and row["bare_train"] > 0 and row["score"] > 0, row
    hours = rows("suite", tmp_path / "g.jsonl")[-1]
    assert hours["oct2017"] > 3 * hours["brain"] > 0 and hours["sum_of_five_seeds"] > 5 * hours["oct2017"]


@pytest.mark.long
def test_full_size_parts_run_in_small(tmp_path):
    found = rows("full", tmp_path / "g.jsonl")
    assert [row["what"].split(":")[0] for row in found] == ["PatchCore", "PatchCore", "PaDiM", "clip_recon"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run_script("tests/gpu.py", "right")
    assert done.returncode == 2 and done.stderr.startswith("error: no GPU") and done.stderr.count("\n") == 1
