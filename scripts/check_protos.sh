#!/usr/bin/env bash
# Lints the protos and fails if the committed generated code differs from what they generate.
set -euo pipefail
cd "$(dirname "$0")/.."
buf="$(command -v buf || true)"
if [ -z "$buf" ]; then
  command -v npm >/dev/null || { echo "buf is needed to lint the protos: install it, or npm, which can bring it" >&2; exit 1; }
  npm install --silent --no-fund --no-audit --prefix .venv/buf @bufbuild/buf@1.75.0 >/dev/null
  buf="$PWD/.venv/buf/node_modules/.bin/buf"
fi
(cd protos && "$buf" lint && "$buf" build -o /dev/null)
fresh="$(mktemp -d)"
trap 'rm -rf "$fresh"' EXIT
./scripts/generate_protos.sh "$fresh" >/dev/null 2>&1
diff -r -x __pycache__ "$fresh/tether/v1" clients/python/tether/v1 ||
  { echo "the generated code is stale: run make protos" >&2; exit 1; }
