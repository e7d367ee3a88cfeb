#!/usr/bin/env bash
# Tests of the CPU kernels on 64-bit ARM in emulation (on an ARM machine, `make test` runs them). As root on Debian or Ubuntu with
#     apt-get install debootstrap qemu-user-static binfmt-support g++-aarch64-linux-gnu
#     scripts/test_arm64.sh DIRECTORY [ARGUMENTS OF PYTEST]
# The first run makes a Debian of its own in DIRECTORY: some 10 minutes, 2 GB.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
mkdir -p "$1"
root=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."

if [ ! -e "$root/debian-is-here" ]; then
  debootstrap --arch=arm64 --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$root"
  # Who this machine trusts: it may have a mirror of its own.
  cp --remove-destination /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  touch "$root/debian-is-here"
fi
if [ ! -e "$root/packages-are-here" ]; then
  echo "installing torch and what the tests need, in emulation"
  # The last torch whose build for ARM on PyPI is without CUDA.
  chroot "$root" python3 -m pip install --break-system-packages --quiet --root-user-action=ignore \
      torch==2.9.1 numpy safetensors tokenizers 'transformers>=5,<6' pyyaml tqdm pytest pytest-asyncio pytest-timeout hypothesis
  touch "$root/packages-are-here"
fi

rm -rf "$root/src"
mkdir "$root/src"
git ls-files -co --exclude-standard | tar -cf - -T - | tar -xf - -C "$root/src"
version=$(python3 -c 'import runpy; print(runpy.run_path("kernels/cpu/structures.py")["INTERFACE_VERSION"])')
aarch64-linux-gnu-g++ "-DCANTATA_INTERFACE_VERSION=$version" \
  -O3 -std=gnu++17 -ffp-contract=fast -fvisibility=hidden -fno-exceptions \
  -fPIC -shared -pthread -Wno-psabi \
  -o "$root/src/kernels/cpu/_native.cpython-311-aarch64-linux-gnu.so" kernels/cpu/src/*.cpp
# Not what is for GPUs, nor what the emulation does not show.
[ $# -gt 0 ] || set -- tests/kernels --ignore tests/kernels/test_gpu_layouts.py --ignore tests/kernels/test_kv_cache_fp8.py \
  --deselect tests/kernels/test_cpu_memory.py::test_huge_pages_where_the_system_gives_them
# In a mount namespace of its own, so that nothing stays mounted.
exec unshare --mount bash -c '
  root=$1
  shift
  mount -t proc proc "$root/proc"
  mount --rbind /sys "$root/sys"
  mount --rbind /dev "$root/dev"
  exec chroot "$root" bash -c "cd /src && exec python3 -m pytest -q -p no:cacheprovider \"\$@\"" pytest "$@"
' mounts "$root" "$@"
