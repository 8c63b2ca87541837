#!/usr/bin/env bash
# The test suite, on a fresh machine too: makes .venv, then lint and tests, one process a core.
#   bash tests/run.sh          all but the long tests, some minutes
#   bash tests/run.sh quick    under a minute
#   bash tests/run.sh long     everything, with the full numbers of fuzzing, kills and bad inputs; up to 40 minutes
#   bash tests/run.sh --tested [quick | long]    with the exact versions of .tested-versions.txt
# What follows goes to pytest: bash tests/run.sh quick tests/test_common.py -x
set -eu
cd "$(dirname "$0")/.."
if [ "${1:-}" = --tested ]; then
    shift
    export PIP_CONSTRAINT=$PWD/.tested-versions.txt
    rm -f .venv/installed.txt # asks run_all.sh to install again
fi
case "${1:-}" in
    quick) shift; marks="not slow and not long" ;;
    long) shift; marks="" ;;
    *) marks="not long" ;;
esac
bash run_all.sh setup
.venv/bin/python -m ruff check .
# One thread each: two of PyTorch's threads next to another busy process wait for each other most of the time.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --dist worksteal -m "$marks" tests "$@"
