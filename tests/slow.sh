#!/usr/bin/env bash
# The long runs: the real model at every topology it allows, twenty kills, a large conversion. About
# half an hour on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh test
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
exec python -m pytest -m slow "$@"
