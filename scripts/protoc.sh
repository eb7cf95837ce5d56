#!/usr/bin/env bash
# Runs protoc on the contract with the given arguments. It has its own environment, because the protoc that is old enough
# for the declared grpcio floor refuses the newer protobuf runtime that the services use.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
[ -x .venv-protoc/bin/python ] || "$python" -m venv .venv-protoc
.venv-protoc/bin/python -c 'import grpc_tools, mypy_protobuf' 2>/dev/null ||
  .venv-protoc/bin/pip install -q grpcio-tools==1.76.0 mypy-protobuf==3.7.0 setuptools
PATH="$PWD/.venv-protoc/bin:$PATH" .venv-protoc/bin/python -m grpc_tools.protoc -I protos "$@" protos/tether/v1/*.proto
