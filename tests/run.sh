#!/usr/bin/env bash
# Prepares the environment and runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh test
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
