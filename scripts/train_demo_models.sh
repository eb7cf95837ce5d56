#!/usr/bin/env bash
# Train the two packaged demo models again with the project's own commands, about 30 minutes on one core.
#
# usage: scripts/train_demo_models.sh [DATA_FOLDER]
#
# DATA_FOLDER holds text/ and sentiment/ (the model cards name the data sets). The default is ../shared/data beside the
# checkout; where that is absent, as in a plain clone, the script says so and stops without touching the packaged models.
set -euo pipefail
cd "$(dirname "$0")/.."

data=${1:-../shared/data}
models=services/tether_services/demo/models
python=${PYTHON:-.venv/bin/python}

if [[ ! -f $data/text/tinystories-sample.txt ]]; then
  echo "error: no $data/text/tinystories-sample.txt; the packaged models are left as they are." >&2
  echo "Give the folder that holds text/ and sentiment/ as the first argument." >&2
  exit 2
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m tether_services train pretrain --config deploy/config/pretrain.toml \
  --set "output=$scratch/policy" \
  --set "data.sources=['$data/text/tinystories-sample.txt', '$data/text/bryant-stories.txt', '$data/text/burgess-busterbrown.txt', '$data/sentiment/sst-train.csv']"
cp "$scratch"/policy/*.json "$scratch"/policy/*.safetensors "$models/policy/"

# The vocabulary of the base is small: the adapter has to reach the embeddings, and words are left out against learning by heart.
"$python" -m tether_services train reward --config deploy/config/reward_model.toml \
  --set "base=$models/policy" --set base_reference=../policy --set "output=$scratch/reward" --set threads=1 \
  --set "lora.target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj', 'embed_tokens']" \
  --set "data.sources=['$data/sentiment/sst-train.csv']" --set "data.validation_sources=['$data/sentiment/sst-dev.csv']" \
  --set "demonstrations.sources=['$data/text/tinystories-sample.txt']" --set demonstration_tokens=80 \
  --set max_sentences=3 --set token_dropout=0.5 --set dropout=0.3 --set training.num_epochs=6 --set training.rows_per_step=8 \
  --set training.learning_rate=0.002 --set training.eval_every=100 --set training.checkpoint_every=100
cp "$scratch"/reward/{adapter_config,manifest,tether_reward}.json "$scratch/reward/adapter_model.safetensors" "$models/reward/"
