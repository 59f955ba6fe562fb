#!/usr/bin/env bash
# Everything there is to try on a machine with one GPU, in one go and without a network: the
# environment, the gpu tests, a short real training, conversion there and back, export, generation,
# and the benchmarks in a short form. Figures and versions are in OUT/gpu.json, written after every
# part; what does not fit into the time is left out and said. Exit status 0: all ran and passed.
#
#   bash tests/gpu/run.sh [--wheels DIR] [--seconds N] [--out DIR] [--hf-path DIR] [--only PART ...]
#
# --wheels   wheels to install, without their dependencies; those that were cut into
#            NAME.whl.part-* are joined first
# --seconds  for everything, installing included (default: 540)
# --out      folder for all results (default: runs/gpu)
# --hf-path  model to train (default: a random one of 25 million parameters)
# --only     parts to run, by their names in gpu.json
#
# It runs in the active virtual environment, or in one of its own that sees the packages of
# $MEGATRON_MOD_PYTHON (default: python3), torch among them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
wheels='' seconds=540 out=$root/runs/gpu rest=()
while [ $# -gt 0 ]; do
    case $1 in
    --wheels) wheels=$(cd "$2" && pwd) ;;
    --seconds) seconds=$2 ;;
    --out) out=$2 ;;
    --hf-path) rest+=(--hf-path "$(cd "$2" && pwd)") ;;
    --only) shift; rest+=(--only "$@"); break ;;
    *) sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
    esac
    shift 2
done
mkdir -p "$out"
out=$(cd "$out" && pwd)

if [ -n "${VIRTUAL_ENV:-}" ]; then
    python=$VIRTUAL_ENV/bin/python
else
    outer=${MEGATRON_MOD_PYTHON:-python3} python=$out/venv/bin/python
    [ -x "$python" ] || "$outer" -m venv --without-pip --system-site-packages "$out/venv"
    # Where python3 is in an environment itself, the new one would not see its packages.
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    outer=$("$outer" -c "$purelib") inner=$("$python" -c "$purelib")
    echo "$outer" >"$inner/outer.pth"
    # Transformer Engine looks for NVIDIA's libraries in its own environment, and takes the system's
    # cuDNN first, beside which torch does not work with its own.
    if [ -d "$outer/nvidia/cudnn" ]; then
        [ -e "$inner/nvidia" ] || ln -s "$outer/nvidia" "$inner/nvidia"
        export CUDNN_HOME=$outer/nvidia/cudnn
        export LD_LIBRARY_PATH=$CUDNN_HOME/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    fi
fi
if [ -n "$wheels" ]; then
    mkdir -p "$out/wheels"
    for first in "$wheels"/*.whl.part-*; do
        [ -e "$first" ] || continue
        name=$(basename "${first%%.part-*}")
        [ -e "$out/wheels/$name" ] || cat "$wheels/$name".part-* >"$out/wheels/$name"
    done
    found=()
    for wheel in "$wheels"/*.whl "$out/wheels"/*.whl; do
        [ -e "$wheel" ] && found+=("$wheel")
    done
    install() { "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile "$@"; }
    # One that does not fit keeps all from being installed; the first part names what is missing.
    install "${found[@]}" || for wheel in "${found[@]}"; do install "$wheel" || true; done
fi
cd "$root"
export PYTHONPATH=$root HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
exec "$python" tests/gpu/run.py --seconds $((seconds - SECONDS)) --out "$out" "${rest[@]}"
