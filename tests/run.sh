#!/bin/sh
# Installs what the tests need into .venv (made when there is none) and runs them.
#   tests/run.sh                  the default run: about 9 minutes on two cores
#   tests/run.sh --long           the long battery as well
#   tests/run.sh -k scan -x       any other argument goes to pytest
# Two processes share the test files, because many tests wait for processes; -n 0 runs them in one.
set -eu
cd "$(dirname -- "$0")/.."
SHARDKV_PREPARE=test ./run_cluster.sh

if [ "${1:-}" = "--long" ]; then
    shift
    exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
fi
exec .venv/bin/python -m pytest -n 2 --dist loadfile -m "not long" "$@"
