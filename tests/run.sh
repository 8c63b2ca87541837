#!/usr/bin/env bash
# The whole test suite, on a fresh machine too: makes .venv, then lint and tests.
set -eu
cd "$(dirname "$0")/.."
bash run_all.sh setup
.venv/bin/python -m ruff check .
.venv/bin/python -m pytest -q tests "$@"
