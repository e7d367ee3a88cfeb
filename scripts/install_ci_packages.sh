#!/usr/bin/env bash
# Installs the Debian packages of scripts/ci_packages.txt that are missing; as root on Debian or Ubuntu. Elsewhere it names them.
set -euo pipefail
cd "$(dirname "$0")"
missing=()
for package in $(sed -e 's/#.*//' -e 's/^[^:]*://' ci_packages.txt); do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "Tests need packages that are not installed; as root: apt-get install ${missing[*]}" >&2
  exit 0
fi
echo "Installing Debian packages for the tests: ${missing[*]}"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
