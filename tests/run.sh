#!/usr/bin/env bash
# Prepares the environment and runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh test
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
ruff check .
ruff format --check .
mypy
# Two at a time, a file's tests in one process, which share what they set up.
exec python -m pytest -n 2 --dist loadfile "$@"
