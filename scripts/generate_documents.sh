#!/usr/bin/env bash
# Regenerates what is made from the code and the contract: docs/errors.md and the OpenAPI documents. PYTHON is an
# interpreter that has tether with its serve extra.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
descriptors="$(mktemp)"
trap 'rm -f "$descriptors"' EXIT
PYTHON="$python" ./scripts/protoc.sh --include_imports --include_source_info --descriptor_set_out="$descriptors"
"$python" -m tether_services.documents --descriptors "$descriptors" --output "${1:-.}"
