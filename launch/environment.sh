# Sourced by the scripts a user runs: an active virtual environment, or a .venv of the
# repository's own, holding this package with the extras given as arguments.
#
#   . launch/environment.sh quickstart test
#
# MEGATRON_MOD_PYTHON  the interpreter a new .venv is made with (default: python3)
# MEGATRON_MOD_TORCH   what pip installs where torch is missing (default: torch==2.13.0)

install_environment() {
    local root extras
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    extras=$(IFS=,; echo "$*")
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        [ -x "$root/.venv/bin/python" ] || "${MEGATRON_MOD_PYTHON:-python3}" -m venv "$root/.venv"
        . "$root/.venv/bin/activate"
    fi
    # Installing again is quick when nothing is missing, and finds what has changed.
    python -c 'import torch' 2>/dev/null ||
        python -m pip install --quiet --disable-pip-version-check "${MEGATRON_MOD_TORCH:-torch==2.13.0}"
    python -m pip install --quiet --disable-pip-version-check --use-pep517 --editable "$root[$extras]"
}

echo "Preparing the Python environment ..."
install_environment "$@"
