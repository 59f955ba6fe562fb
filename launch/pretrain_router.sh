#!/usr/bin/env bash
# Trains routers on this machine, with Router-Tuning's knobs as environment variables:
#
#   NUM_PROCESSES=4 PORT=29501 MODEL_NAME_OR_PATH=runs/hf bash launch/pretrain_router.sh
#
# Converts the model the first time, prepares the environment where the package is not installed,
# then hands over to one_node.py (all knobs and their defaults: --help).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" --help "* | *" -h "*) exec python3 "$here/one_node.py" --help ;; esac
installed="from importlib.metadata import version; version('megatron_mod'), version('torch')"
if ! python -I -c "$installed" 2>/dev/null; then
    # shellcheck disable=SC1091
    . "$here/environment.sh" quickstart
fi
exec python "$here/one_node.py" "$@"
