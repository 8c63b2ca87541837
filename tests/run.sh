#!/usr/bin/env bash
# The whole test suite, on a fresh machine too: makes .venv, then lint and tests, one process a core.
set -eu
cd "$(dirname "$0")/.."
bash run_all.sh setup
.venv/bin/python -m ruff check .
# One thread each: two of PyTorch's threads beside another busy process wait for each other most of the time.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --dist loadgroup tests "$@"
