# shellcheck shell=bash
# Sourced by the scripts a user runs: an active virtual environment, or a .venv of the
# repository's own, holding this package with the extras given as arguments.
#
#   . launch/environment.sh quickstart test
#
# MEGATRON_MOD_PYTHON  the interpreter a new .venv is made with (default: python3)
# MEGATRON_MOD_TORCH   what pip installs where torch is missing, options included, such as
#                      "torch==2.13.0 --index-url URL" (default: torch==2.13.0, and its CPU build
#                      on a machine without an NVIDIA GPU)

install_environment() {
    local root extras
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    extras=$(IFS=,; echo "$*")
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        [ -x "$root/.venv/bin/python" ] || "${MEGATRON_MOD_PYTHON:-python3}" -m venv "$root/.venv"
        # shellcheck source=/dev/null
        . "$root/.venv/bin/activate"
    fi
    # Installing again is quick when nothing is missing, and finds what has changed.
    python -c 'import torch' 2>/dev/null || install_torch
    quiet_pip install --use-pep517 --editable "${root}[$extras]"
}

install_torch() {
    local words
    if [ -n "${MEGATRON_MOD_TORCH:-}" ]; then
        read -ra words <<<"$MEGATRON_MOD_TORCH"
        quiet_pip install "${words[@]}"
    elif has_nvidia_gpu || [ "$(uname -sm)" != "Linux x86_64" ]; then
        quiet_pip install torch==2.13.0
    elif ! quiet_pip install torch==2.13.0+cpu 2>/dev/null; then
        # Only the package index of the PyTorch project has builds for the CPU alone.
        echo "No NVIDIA GPU here, and none of pip's indexes has torch==2.13.0+cpu. Installing" \
            "torch==2.13.0, which may bring several GB of CUDA libraries; to spare them stop here," \
            'and set MEGATRON_MOD_TORCH="torch==2.13.0 --index-url URL" with the URL that' \
            "PyTorch's installation page gives for the CPU." >&2
        quiet_pip install torch==2.13.0
    fi
}

has_nvidia_gpu() {
    [ -e /dev/nvidiactl ] || nvidia-smi --list-gpus >/dev/null 2>&1
}

quiet_pip() {
    python -m pip "$1" --quiet --disable-pip-version-check "${@:2}"
}

echo "Preparing the Python environment ..."
install_environment "$@"
