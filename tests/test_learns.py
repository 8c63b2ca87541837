"""tests/learns.py and tests/levels.py go on where they stopped, and fail where a score is too low."""

import json

import pytest
from conftest import load_script, run_here, run_script

learns, levels = load_script("tests/learns.py"), load_script("tests/levels.py")
SCORES = [0.70, 0.72, 0.74, 0.76, 0.78]  # of seeds 0 to 4: mean 0.74, deviation 0.0316


def learned(seed, trained, untrained=0.5, **other):
    return dict(method="ganomaly", seed=seed, times=1, flags=learns.FLAGS["ganomaly"], seconds=1, commit="abc",
                untrained=dict(image_auroc=untrained), trained=dict(image_auroc=trained), losses={}) | other


def measured(who, seed, score, **other):
    return dict(name="cflow", data="some", who=who, seed=seed, flags=levels.FLAGS["cflow"],
                scores=dict(image_auroc=score)) | other


def written(tmp_path, lines):
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def five(**other):
    return [learned(seed, score, **other) for seed, score in enumerate(SCORES)]


def check(file, *more):
    """learns.py with no weights and nowhere to put a phantom: it fails if it trains."""
    return run_here("tests/learns.py", "ganomaly", "--jsonl", file, "--out", file.parent / "lines.jsonl/none", *more)


def test_a_floor_is_the_mean_of_five_seeds_less_two_deviations_of_a_run(tmp_path):
    lines = learns.read_lines(written(tmp_path, [*five(), learned(5, 0.9), learned(0, 0.1, times=4)]))
    ((name, untrained, trained, floor, others),) = learns.summary(lines, "ganomaly")
    assert (name, untrained, trained, others) == ("image_auroc", 0.5, SCORES, {5: 0.9})
    assert floor == pytest.approx(0.74 - 2 * 0.001**0.5)  # the sample variance of SCORES is 0.001


@pytest.mark.parametrize("score, status", [(0.68, 0), (0.67, 1)])  # the floor is 0.677
def test_a_seed_below_its_floor_is_an_error_and_finished_lines_are_not_trained_again(tmp_path, score, status):
    done = check(written(tmp_path, [*five(), learned(5, score)]))
    assert done.returncode == status and ("below the floor" in done.stderr) == bool(status), done.stderr


def test_a_floor_that_is_not_clearly_above_the_untrained_score_does_not_count(tmp_path):
    done = check(written(tmp_path, [*five(untrained=0.65), learned(5, 0.8, 0.65)]))
    assert done.returncode == 1 and "ganomaly does not learn" in done.stderr


def test_a_score_that_some_of_five_seeds_lack_has_no_floor_and_the_others_keep_theirs(tmp_path):
    lines = five()
    for line in lines[:4]:
        line["trained"]["aupro"], line["untrained"]["aupro"] = 0.9, 0.1
    rows = learns.summary(learns.read_lines(written(tmp_path, [*lines, learned(5, 0.8)])), "ganomaly")
    assert [(name, floor is not None, others) for name, *_, floor, others in rows] == [
        ("image_auroc", True, {5: 0.8}), ("aupro", False, {})]


def test_lines_of_another_command_and_too_few_seeds_give_no_floor(tmp_path):
    done = check(written(tmp_path, [*five()[:4], learned(4, 0.78, flags="--epochs 1"), learned(5, 0.8)]))
    assert done.returncode == 1 and "fewer than 5 seeds" in done.stderr


def test_again_trains_what_another_commit_trained(tmp_path):
    done = check(written(tmp_path, [*five(), learned(5, 0.8)]), "--again")
    assert done.returncode == 2 and "datasets/phantom.py" in done.stderr  # it began with the phantom


@pytest.mark.long
def test_a_training_adds_its_line_and_is_then_finished(phantom, tmp_path):
    (tmp_path / "phantom").symlink_to(phantom / "phantom")  # a small one, in the place of its own
    file = tmp_path / "lines.jsonl"
    command = "tests/learns.py", "ganomaly", "--seeds", 3, "--jsonl", file, "--out", tmp_path
    run_script(*command)
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["seed"] == 3 and 0 <= line["untrained"]["image_auroc"] <= 1 and len(line["losses"]["con"]) > 5
    before = file.read_text()
    run_script(*command)
    assert file.read_text() == before
    assert "| ganomaly | image AUROC |" in run_here("tests/learns.py", "--jsonl", file, "--report").stdout


@pytest.mark.parametrize("peer, status", [(0.77, 0), (0.79, 1)])
def test_a_method_is_level_if_its_mean_is_at_most_0_02_below_the_peers(tmp_path, peer, status):
    lines = [measured("ours", seed, score) for seed, score in enumerate([0.74, 0.76, 0.78])]
    lines += [measured("peer", seed, peer) for seed in range(3)] + [measured("ours", 7, 0.1)]  # without its peer
    file = written(tmp_path, lines)
    done = run_here("tests/levels.py", "cflow", "--data", "some", "--jsonl", file)
    assert done.returncode == status and ("below the peer" in done.stderr) == bool(status), done.stderr
    shown = run_here("tests/levels.py", "--jsonl", file, "--report").stdout
    assert f"| 0.760 (0.740, 0.760, 0.780) | {peer:.3f}" in shown
