#!/usr/bin/env bash
# Writes the stubs beside the .proto files (or under $1, which `./dev check` compares against).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here}
cd "$here"
"${PYTHON:-python}" -m grpc_tools.protoc -I . \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
  deepflow/v1/*.proto
