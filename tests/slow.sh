#!/usr/bin/env bash
# The long runs: the real model at every topology it allows, a large conversion, and faults at random:
# 100 flipped bits over base, run, exports and cache, 40 kills, full disks of 10 sizes (as root, who
# may mount them), signals, ranks that fail, 2,000 steps with kills (SOAK_SEED); settings drawn at random
# (DRAWN_SEED, DRAWN). About an hour on two cores, a quarter of it the faults.
# Then the batch scripts on a real SLURM, where there is one or root may install it: tests/slurm/run.sh.
# With arguments, which go to pytest, those tests alone.
#
# FAULTS_SEED  where the faults fall (default: 11); a failure tells the one that it had. For the
#              faults alone: tests/slow.sh tests/slow/test_{flipped_bytes,kills,full_disks}.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh test
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
[ $# -eq 0 ] || exec python -m pytest -m slow "$@"
status=0
python -m pytest -m slow --ignore=tests/slurm || status=$?
bash tests/slurm/run.sh || [ $? = 77 ] || status=1
exit "$status"
