#!/usr/bin/env bash
# Installs the client libraries that tests/clients runs, once per state of their lists: the Python ones into .venv/clients,
# with `npm` as an argument also the JavaScript ones, into tests/clients/programs/node_modules. Needs what install.sh dev installs.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=tests/clients/requirements.txt
stamp=.venv/clients/.installed
if ! cmp -s "$requirements" "$stamp"; then
  echo "Installing the client libraries of the tests"
  # uv, since pip takes minutes to choose among the versions of what these want.
  eval "$(.venv/bin/python scripts/uv_settings.py)"
  .venv/bin/uv venv --quiet --clear --python .venv/bin/python .venv/clients
  .venv/bin/uv pip install --quiet --python .venv/clients/bin/python -r "$requirements"
  cp "$requirements" "$stamp"
fi

[ "${1:-}" = npm ] || exit 0
for program in node npm; do
  command -v "$program" >/dev/null ||
    { echo "The JavaScript clients need $program (Node.js 20 or newer); as root on Debian or Ubuntu: apt-get install nodejs npm" >&2; exit 1; }
done
cd tests/clients/programs
if ! cmp -s package.json node_modules/.installed; then
  echo "Installing the JavaScript client libraries of the tests"
  npm install --no-audit --no-fund --no-package-lock --loglevel=error >/dev/null
  cp package.json node_modules/.installed
fi
