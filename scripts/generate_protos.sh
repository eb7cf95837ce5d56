#!/usr/bin/env bash
# Regenerates clients/python/tether/v1 from protos/.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-clients/python}"
rm -rf "$out/tether/v1"
mkdir -p "$out/tether/v1"
printf '"""Generated from protos/tether/v1. Never edited; `make protos` writes it."""\n' >"$out/tether/v1/__init__.py"
./scripts/protoc.sh --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out"
