#!/bin/sh
# Installs shardkv into .venv beside this file, if that is not done yet, and starts a cluster in the foreground.
# Needs only python3 (3.11 or newer) with its venv module. Arguments go to `shardkv cluster up`; try --help.
# With SHARDKV_PREPARE=test it installs the test extra as well and starts nothing: tests/run.sh uses that.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
venv="$here/.venv"
extra="${SHARDKV_PREPARE:-}"
stamp="$venv/.shardkv-installed${extra:+-$extra}"

fail() {
    echo "run_cluster.sh: $*" >&2
    exit 2
}

make_environment() {
    command -v python3 >/dev/null 2>&1 ||
        fail "python3 was not found. Install Python 3.11 or newer; on Debian: apt install python3 python3-venv"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$(python3 -V) is too old; shardkv needs Python 3.11 or newer."
    python3 -c 'import venv, ensurepip' 2>/dev/null ||
        fail "python3 lacks its venv module. On Debian: apt install python3-venv"
    echo "Making a Python environment in $venv ..." >&2
    python3 -m venv "$venv" || fail "The environment could not be made. Remove $venv and try again."
}

install_project() {
    "$venv/bin/python" -c 'import pip' 2>/dev/null || make_environment
    echo "Installing shardkv into $venv (once) ..." >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$here${extra:+[$extra]}" ||
        fail "The installation failed; pip says why above. Run this again when that is mended."
    echo "$wanted" | tee "$stamp" >"$venv/.shardkv-installed"
}

[ -x "$venv/bin/python" ] || make_environment
wanted="$(cksum <"$here/pyproject.toml") $here"
if [ ! -x "$venv/bin/shardkv" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    install_project
fi
[ -z "$extra" ] || exit 0
exec "$venv/bin/shardkv" cluster up "$@"
