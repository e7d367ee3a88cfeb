#!/usr/bin/env bash
# Fails, with a sentence, where the NVIDIA driver is missing or too old for the CUDA of our torch (scripts/torch_versions.env).
set -euo pipefail
. "$(dirname "$0")/torch_versions.env"
found=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n 1p) || found=
if [ -z "$found" ]; then
  echo "nvidia-smi finds no NVIDIA driver; torch $TORCH with CUDA $CUDA needs $NVIDIA_DRIVER or newer" >&2
  exit 1
fi
if [ "$(printf '%s\n' "$found" "$NVIDIA_DRIVER" | sort -V | sed -n 1p)" != "$NVIDIA_DRIVER" ]; then
  echo "The NVIDIA driver is $found, and torch $TORCH with CUDA $CUDA needs $NVIDIA_DRIVER or newer: install a newer driver (or" \
    "take an image that has it), or set TORCH_INDEX_URL to an index with torch $TORCH for an older CUDA" >&2
  exit 1
fi
