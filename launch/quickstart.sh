#!/usr/bin/env bash
# From a Hugging Face model to one that skips attention, and what that is worth.
# Prepares the environment, then hands over to quickstart.py (options: --help).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case " $* " in *" --help "* | *" -h "*) exec python3 "$here/quickstart.py" --help ;; esac
. "$here/environment.sh" quickstart
exec python "$here/quickstart.py" "$@"
