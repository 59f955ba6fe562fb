#!/usr/bin/env bash
# Both ends of the supported range, each in an environment of its own, kept in build/lanes/:
#
#   oldest  Python 3.10 (or 3.11), megatron-core 0.16.1, Transformers 4.57
#   newest  Python 3.12, the newest megatron-core 0.19 and Transformers 5, Transformer Engine
#
#   bash tests/lanes.sh [--lane oldest|newest] [--skip-missing] [pytest's arguments]
#
# Without arguments for pytest: specs, checkpoint keys, the choice of the layers' modules, the
# optimizer's kernels, and granularities and experts on ranks. Ends with each lane's time and result, and with
# status 1 if a lane failed or its Python is not here.
#
# --lane NAME          only this one
# --skip-missing       a lane whose Python is not here is no failure
# MEGATRON_MOD_WHEELS  a folder of wheels beside pip's indexes. transformer_engine_torch comes as a
#                      source that CUDA's compiler builds: without a wheel of it the newest lane runs
#                      without Transformer Engine, and says so.
# MEGATRON_MOD_TORCH   as in launch/environment.sh, for both lanes; by default the newest has the
#                      torch that its Transformer Engine was released for
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

engine=2.20.2
torch_of_engine=2.11.0

main() {
    local lanes=(oldest newest) skip_missing=
    while [ $# -gt 0 ]; do
        case $1 in
            --lane)
                [[ ${2:-} =~ ^(oldest|newest)$ ]] || fail "--lane ${2:-}: must be oldest or newest."
                lanes=("$2")
                shift 2
                ;;
            --skip-missing)
                skip_missing=1
                shift
                ;;
            *) break ;;
        esac
    done
    [ $# -gt 0 ] || set -- tests/unit/test_specs.py tests/unit/test_restore.py \
        tests/unit/test_transformer_engine.py tests/unit/test_kernels.py tests/unit/test_fp8.py \
        "tests/distributed/test_granularities.py::test_loss_and_gradients_equal_the_formula[two_ranks_deep]" \
        tests/distributed/test_distributed_optimizer.py tests/distributed/test_experts.py
    local lane summary=() status=0 began result
    for lane in "${lanes[@]}"; do
        began=$SECONDS
        # A process of its own: what it activates and exports ends with it.
        bash "${BASH_SOURCE[0]}" _run "$lane" "$@" && result=0 || result=$?
        case $result in
            0) summary+=("$lane: passed in $((SECONDS - began)) s") ;;
            "$no_python") summary+=("$lane: not run, its Python is not here") ;;
            *) summary+=("$lane: failed in $((SECONDS - began)) s") ;;
        esac
        [ "$result" = 0 ] || [ "$result:$skip_missing" = "$no_python:1" ] || status=1
        [ ! -s "build/lanes/$lane/note" ] || summary+=("        $(cat "build/lanes/$lane/note")")
    done
    printf '\n'
    printf '%s\n' "${summary[@]}"
    exit "$status"
}

no_python=69 # EX_UNAVAILABLE of sysexits.h

fail() {
    echo "error: $*" >&2
    exit 2
}

run_lane() {
    local lane=$1 python folder=build/lanes/$1
    shift
    mkdir -p "$folder"
    : >"$folder/note"
    case $lane in
        oldest)
            python=$(find_python 3.10 3.11) || missing "3.10 or 3.11"
            printf '%s\n' "megatron-core==0.16.1" "transformers>=4.57,<4.58" >"$folder/constraints.txt"
            ;;
        newest)
            python=$(find_python 3.12) || missing 3.12
            printf '%s\n' "megatron-core>=0.19,<0.20" "transformers>=5" >"$folder/constraints.txt"
            export MEGATRON_MOD_TORCH=${MEGATRON_MOD_TORCH:-torch==$torch_of_engine}
            ;;
    esac
    if [ ! -x "$folder/venv/bin/python" ]; then
        "$python" -m venv "$folder/venv"
        # The pip that an old Python brings finds no way through so many constraints.
        "$folder/venv/bin/python" -m pip install --quiet --upgrade pip
    fi
    # shellcheck source=/dev/null
    . "$folder/venv/bin/activate"
    export PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }$PWD/$folder/constraints.txt"
    . launch/environment.sh test
    [ "$lane" = oldest ] || install_engine "$folder/note"
    echo "$lane: $(python - <<'PYTHON'
import platform
from importlib.metadata import version

print("Python", platform.python_version(), *(
    f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers")
), sep=", ")
PYTHON
    )"
    export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # the environments of two checkouts stay apart
    python -m pytest "$@"
}

install_engine() {
    local wheels=${MEGATRON_MOD_WHEELS:+--find-links=$MEGATRON_MOD_WHEELS}
    # shellcheck disable=SC2086 # no word, or one
    quiet_pip install --only-binary=:all: $wheels "transformer_engine==$engine" \
        "transformer_engine_cu13==$engine" "transformer_engine_torch==$engine" 2>"$1" || true
    if python -c 'import torch, transformer_engine.pytorch' 2>"$1"; then
        echo "Transformer Engine $engine imports" >"$1"
    else
        echo "Transformer Engine was not run: $(tail -n 1 "$1")" >"$1"
    fi
}

# The first of some versions of Python that is on the PATH, or that pyenv has.
find_python() {
    local version candidate
    for version; do
        for candidate in "$(command -v "python$version")" \
            "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
            if [ -x "$candidate" ] && "$candidate" -c 'import ensurepip' 2>/dev/null; then
                echo "$candidate"
                return
            fi
        done
    done
    return 1
}

missing() {
    echo "Python $1 is neither on the PATH nor among pyenv's versions." >&2
    exit "$no_python"
}

if [ "${1:-}" = _run ]; then
    run_lane "${@:2}"
else
    main "$@"
fi
