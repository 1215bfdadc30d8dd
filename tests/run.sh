#!/usr/bin/env bash
# Installs what the tests need into .venv (made when there is none) and runs them.
#   tests/run.sh                  the default run: under 3 minutes on two cores
#   tests/run.sh --long           the long battery as well
#   tests/run.sh -k scan -x       any other argument goes to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./tests/environment.sh
ensure_environment test

arguments=(-m "not long")
if [ "${1:-}" = "--long" ]; then
    shift
    arguments=()
fi
exec .venv/bin/python -m pytest "${arguments[@]}" "$@"
