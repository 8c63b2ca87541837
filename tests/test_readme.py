"""The commands in README.md's fenced blocks, all of them and in order, in a copy of the project: on a small phantom,
with untrained weights and short budgets, without a network."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import common

METHODS = [p.stem for p in (ROOT / "methods").glob("*.py")]
NET, SMALL = "--backbone mobilenet_v2 --weights none", "--image-size 64 --limit 2"
RULES = {  # what a command needs to be quick; one that no rule matches is run as it stands
    r"^bash run_all.sh$": r"DATA=phantom METHODS=padim \g<0>",
    r"^python datasets/phantom.py$": r"\g<0> --size 64 --train 12 --valid 4 --test 6",  # as the fixture made it
    r"^python methods/patchcore.py .*": rf"\g<0> {NET} {SMALL}",
    r"^python methods/clip_recon.py .*": rf"\g<0> {NET} {SMALL} --model tiny --clip-weights none --epochs 1",
    r"(?<= )/(my|new)/images\b": r"$PWD/\1/images",
    r'^DATA="brain liver" METHODS="padim rd4ad" SEEDS="0 1"': "DATA=brain METHODS=padim SEEDS=0",
}
ENVIRONMENT = dict(DEMO="1", NET=NET, FLAGS=SMALL, https_proxy="http://localhost:9")  # run_all.sh's; no network
SBATCH = """#!/usr/bin/env bash
[[ $1 =~ ^--array=([0-9]+)-([0-9]+)$ ]] || exit 2
cp "$2" "$TMPDIR/slurm_script" # Slurm runs a copy from elsewhere
for i in $(seq "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"); do
    (cd / && SLURM_SUBMIT_DIR=$OLDPWD SLURM_ARRAY_TASK_ID=$i bash "$TMPDIR/slurm_script") > "slurm-1_$i.out" || exit
done
"""


def commands_of(text):
    """The commands in fenced blocks: lines after a `$ ` where a block has any (the others are output), else all."""
    found = []
    for block in re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S):
        lines = block.splitlines()
        found += [line[2:] for line in lines if line.startswith("$ ")] or lines
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line) for line in found) if line]


def test_commands_are_told_from_output_and_comments():
    text = "```\na b  # c\n# d\n```\nx\n```bash\n$ e --f\nout\n$ g#h\n```\n```\ni\n```\n"
    assert commands_of(text) == ["a b", "e --f", "g#h", "i"]


@pytest.fixture
def copy(phantom, tmp_path):
    """The project of a user with two benchmarks below data/ and images of his own; one quick test stands for all."""
    folder, images = tmp_path / "copy", phantom / "phantom"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        ".venv", ".git", "data", "runs", "__pycache__", ".*_cache", "slurm-*", "test_*"))
    (folder / "tests/test_quick.py").write_text("def test_quick():\n    pass\n")
    (folder / ".venv").symlink_to(sys.prefix)
    for name in ("data/phantom", "data/brain", "my/images"):
        shutil.copytree(images, folder / name)
    shutil.copytree(images / "test/Ungood/img", folder / "new/images")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    return folder


def test_every_command_of_the_readme_runs(copy, tmp_path):
    commands = commands_of((ROOT / "README.md").read_text())
    for variable, known in dict(DATA=common.NAMES, METHODS=METHODS).items():  # these are narrowed below
        names = " ".join(re.findall(rf'\b{variable}=("[^"]*"|\w+)', "\n".join(commands))).replace('"', "")
        assert names and set(names.split()) <= set(known)
    for pattern, adapted in RULES.items():
        assert any(re.search(pattern, c) for c in commands), f"no command is left for the rule {pattern}"
        commands = [re.sub(pattern, adapted, c) for c in commands]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | ENVIRONMENT
    env |= dict(PATH=f"{tmp_path}/bin:{env['PATH']}", TMPDIR=str(tmp_path), OMP_NUM_THREADS="1")
    done = subprocess.run(["bash", "-exc", "\n".join(commands)], cwd=copy, env=env, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)  # one shell, as .venv is activated once
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"  # the last line after + is the command
    runs = {str(f.parent.relative_to(copy / "runs")) for f in copy.glob("runs/*/*/*/scores.csv")}
    assert runs == {"phantom/padim/seed0", "phantom/patchcore/seed0", "phantom/stfpm/seed0", "brain/clip_recon/seed0",
                    "brain/padim/seed0", "images/patchcore/seed1", "images/padim/seed0"}


def test_the_table_of_methods_holds_every_script_with_its_length():
    rows = re.findall(r"^\| \[`(\w+)`\].*? \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert {name: int(lines) for name, lines in rows} == {
        name: len((ROOT / f"methods/{name}.py").read_text().splitlines()) for name in METHODS}
