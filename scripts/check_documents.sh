#!/usr/bin/env bash
# Fails if docs/errors.md or an OpenAPI document differs from what the code and the contract make.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh="$(mktemp -d)"
trap 'rm -rf "$fresh"' EXIT
./scripts/generate_documents.sh "$fresh"
stale() { echo "the documents are stale: run make documents" >&2; exit 1; }
diff "$fresh/docs/errors.md" docs/errors.md || stale
folder=services/tether_services/documents/openapi
diff -r "$fresh/$folder" "$folder" || stale
