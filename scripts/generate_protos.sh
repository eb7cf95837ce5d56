#!/usr/bin/env bash
# Regenerates clients/python/tether/v1 from protos/. The generator has its own environment, because the protoc that is old
# enough for the declared grpcio floor refuses the newer protobuf runtime that the services use.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
out="${1:-clients/python}"
[ -x .venv-protoc/bin/python ] || "$python" -m venv .venv-protoc
.venv-protoc/bin/python -c 'import grpc_tools, mypy_protobuf' 2>/dev/null ||
  .venv-protoc/bin/pip install -q grpcio-tools==1.76.0 mypy-protobuf==3.7.0 setuptools
rm -rf "$out/tether/v1"
mkdir -p "$out/tether/v1"
printf '"""Generated from protos/tether/v1. Never edited; `make protos` writes it."""\n' >"$out/tether/v1/__init__.py"
PATH="$PWD/.venv-protoc/bin:$PATH" .venv-protoc/bin/python -m grpc_tools.protoc -I protos \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" protos/tether/v1/*.proto
