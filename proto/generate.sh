#!/usr/bin/env bash
# Generates the gRPC stubs into workers/rpc and cluster/rpc, or into the folder given as the first argument.
# The -I mapping gives the .proto files the import path of the package that holds their stubs.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
python=${PYTHON:-python}
for pair in workers/rpc:engine cluster/rpc:inference; do
  package=${pair%%:*} name=${pair##*:}
  include=$("$python" -c 'import grpc_tools, os; print(os.path.join(os.path.dirname(grpc_tools.__file__), "_proto"))')
  stage=$(mktemp -d)
  cp "proto/$name.proto" "$stage/"
  "$python" -m grpc_tools.protoc "-I$package=$stage" "-I$include" \
    "--python_out=$out" "--grpc_python_out=$out" "--mypy_out=quiet:$out" "--mypy_grpc_out=quiet:$out" "$package/$name.proto"
  rm -r "$stage"
done
