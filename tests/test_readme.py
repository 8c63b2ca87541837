"""README.md does what it says: all commands of its fenced blocks, in order, and its Python run in a copy of the
project, on a small phantom, with untrained weights, without a network. Its tables are those of the code."""

import csv
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, load_script, write_nifti

import common

README = (ROOT / "README.md").read_text()
METHODS = sorted(p.stem for p in (ROOT / "methods").glob("*.py"))
NET, SMALL = "--backbone mobilenet_v2 --weights none", "--image-size 64 --limit 2"
RULES = {  # what a command needs to be quick; one that no rule matches runs unchanged
    r"^bash run_all.sh$": r"DATA=phantom METHODS=padim \g<0>",
    r'^DATA="brain liver" METHODS="padim rd4ad"': "DATA=brain METHODS=padim SEEDS=0",
    r"^JOBS=4 bash run_all.sh$": r"DATA=phantom METHODS=padim \g<0>",
    r"^sbatch .*": r'(export DATA=phantom METHODS="padim stfpm"; \g<0>)',
    r"^python datasets/phantom.py$": r"\g<0> --size 64 --train 12 --valid 4 --test 6",  # as the fixture made it
    r"^python methods/patchcore.py --data (?!knees).*": rf"\g<0> {NET} {SMALL}",
    r"^python methods/patchcore.py --data knees .*": rf"\g<0> {NET} --image-size 32",
}
ENVIRONMENT = dict(DEMO="1", NET=NET, FLAGS=SMALL, https_proxy="http://localhost:9")  # run_all.sh's; no network
SBATCH = """#!/usr/bin/env bash
[[ $1 =~ ^--array=([0-9]+)-([0-9]+)$ ]] || exit 2
cp "$2" "$TMPDIR/slurm_script" # Slurm runs a copy from elsewhere
for i in $(seq "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"); do
    (cd / && SLURM_SUBMIT_DIR=$OLDPWD SLURM_ARRAY_TASK_ID=$i bash "$TMPDIR/slurm_script") > "slurm-1_$i.out" || exit
done
"""


def blocks_of(text, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands_of(text):
    """The commands in fenced blocks: lines after a `$ ` where a block has any (the others are output), else all."""
    commands = []
    for block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if block[0] in ("", "bash"):
            lines = block[1].splitlines()
            commands += [line[2:] for line in lines if line.startswith("$ ")] or lines
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line) for line in commands) if line]


def rows_of(heading):
    """The cells of the table below a heading, without its head."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_commands_are_told_from_output_comments_and_other_languages():
    text = "```\na b  # c\n# d\n```\nx\n```bash\n$ e --f\nout\n$ g#h\n```\n```python\nk\n```\n```\ni\n```\n"
    assert commands_of(text) == ["a b", "e --f", "g#h", "i"] and blocks_of(text, "python") == ["k\n"]


@pytest.fixture
def copy(phantom, tmp_path):
    """The project of a user with two benchmarks in data/ and images of his own; one quick test stands for all."""
    folder, images = tmp_path / "copy", phantom / "phantom"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        ".git*", ".venv", ".gpu", ".*cache*", "data", "runs", "__pycache__", "slurm-*", "test_*"))
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("data/phantom", "data/brain", "my_images"):
        shutil.copytree(images, folder / name)
    shutil.copytree(images / "test/Ungood/img", folder / "new_images")
    draw = np.random.default_rng(0)
    for scan in range(72):  # 21 of the first 70 are held out
        volume = draw.normal(100, 20, (24, 24, 1)).astype(np.float32)  # right, front, up
        volume[6:18, 6:18] += 100
        if scan == 71:
            volume[8:14, 8:14] = 1000  # a lesion
        write_nifti(folder / ("healthy" if scan < 70 else "new_scans") / f"case{scan}.nii.gz", volume)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    return folder


def run(folder, *command):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | ENVIRONMENT
    env |= dict(PATH=f"{folder.parent}/bin:{env['PATH']}", TMPDIR=str(folder.parent), OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"  # bash -x: after + is the command
    return done.stdout


@pytest.mark.slow
def test_every_command_of_the_readme_and_its_python_run(copy):
    commands = commands_of(README)
    for variable, known in dict(DATA=common.NAMES, METHODS=METHODS).items():  # these are narrowed below
        names = " ".join(re.findall(rf'\b{variable}=("[^"]*"|\w+)', "\n".join(commands))).replace('"', "")
        assert names and set(names.split()) <= set(known)
    for pattern, adapted in RULES.items():
        assert any(re.search(pattern, c) for c in commands), f"no command is left for the rule {pattern}"
        commands = [re.sub(pattern, adapted, c) for c in commands]
    run(copy, "bash", "-exc", "\n".join(commands))  # one shell, as .venv is activated once
    runs = {str(f.parent.relative_to(copy / "runs")) for f in copy.glob("runs/*/*/*/scores.csv")}
    runs = {re.sub(r"-\w{8}/", "/", run) for run in runs}  # a prediction's folder ends with a hash
    assert runs == {"phantom/padim/seed0", "phantom/patchcore/seed0", "phantom/stfpm/seed0", "brain/padim/seed0",
                    "my_images/patchcore/seed0", "new_images/patchcore/seed0", "new_scans/patchcore/seed0"}
    answer, = copy.glob("runs/new_scans-*/patchcore/seed0")
    with open(answer / "scans.csv", newline="") as f:
        scans = {row["path"]: row for row in csv.DictReader(f)}
    assert max(scans, key=lambda name: float(scans[name]["score"])) == "case71"
    assert scans["case71"]["decision"] == "anomalous" and {row["slices"] for row in scans.values()} == {"1"}
    assert all((answer / f"{name}_{what}.nii.gz").exists() for name in scans for what in ("map", "mask"))

    (from_python,) = [block for block in blocks_of(README, "python") if "torch.load" in block]
    shapes = run(copy, sys.executable, "-c", from_python + "print(*maps.shape, *scores.shape)")
    assert shapes.split()[-4:] == ["1", "64", "64", "1"]


@pytest.mark.slow
def test_the_skeleton_of_a_method_is_a_method(copy):
    (skeleton,) = [block for block in blocks_of(README, "python") if "command_line" in block]
    head = (ROOT / "methods/stfpm.py").read_text().split("\nclass STFPM")[0]
    (copy / "methods/mine.py").write_text(f"{head}\n{skeleton}")
    command = [sys.executable, "methods/mine.py", "--image-size", "64", "--device", "cpu"]
    printed = run(copy, *command, "--lr", "1e-3", "--epochs", "2", "--eval-every", "1")
    losses = [float(value) for value in re.findall(r"loss (\S+)", printed)]
    assert len(losses) == 2 and losses[1] < losses[0] and "image_auroc" in printed
    model = copy / "runs/phantom/mine/seed0/model.pt"
    assert "6 images" in run(copy, *command, "--checkpoint", str(model), "--predict", "new_images")


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.encode()) <= 15_000


def test_the_table_of_methods_has_every_script():
    assert [row[0].strip("`") for row in rows_of("Methods")] == METHODS


def test_the_published_results_are_those_of_the_thesis():
    with open(ROOT / "methods/published.csv", newline="") as f:
        published = {(r["method"], r["benchmark"]): r["mean"] + "?" * bool(r["suspect"])
                     for r in csv.DictReader(f) if r["metric"] == "image_auroc"}
    benchmarks = [name for name in common.NAMES if name != "phantom"]
    rows = {row[0]: row[1::2] for row in rows_of("Results")}
    assert set(rows) == {method for method, _ in published if method in METHODS}
    for method, figures in rows.items():
        assert figures == [published[method, name] for name in benchmarks], method


def test_the_counts_of_the_benchmarks_are_those_that_are_checked():
    known = load_script("datasets/check.py").PUBLISHED
    for name, scripts, _, *counts, _ in rows_of("Benchmarks"):
        assert [int(n) for n in re.findall(r"\d+", " ".join(counts).replace(",", ""))] == list(known[name])
        assert all((ROOT / "datasets" / script).exists() for script in scripts.split(", "))


@pytest.mark.parametrize("file", ["README.md", "tests/README.md"])
def test_links_into_the_project_lead_somewhere(file):
    text = (ROOT / file).read_text()
    titles = re.findall(r"^#+ (.*)", text, re.M)
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = link.partition("#")
        assert ((ROOT / file).parent / path).exists(), link
        assert not heading or heading in headings, link
