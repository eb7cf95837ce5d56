#!/usr/bin/env bash
# Creates the environment of benchmarks/trl_ppo.py: scripts/install_trl.sh [FOLDER], 1.5 GB, by default in .venv-trl
# TRL 1.12.0 is the last release with a PPO trainer; it gets an environment of its own because tether's recipes use a later
# one. The folder ignores itself in git. On Linux plain PyPI gives torch with CUDA libraries; TORCH names another build.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${1:-.venv-trl}"
python="${PYTHON:-python3}"
torch="${TORCH:-torch==2.13.0}"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo '*' > "$venv/.gitignore"
"$venv/bin/python" -m pip install -q "$torch"
"$venv/bin/python" -m pip install -q trl==1.12.0 transformers==5.19.0 peft==0.21.2
"$venv/bin/python" -c "from trl.experimental.ppo import PPOTrainer; import trl; print('trl', trl.__version__)"
