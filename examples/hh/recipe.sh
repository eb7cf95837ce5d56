#!/usr/bin/env bash
# From a base model to aligned adapters: SFT -> reward model -> PPO, and SFT -> DPO. Each stage reads the last one's folder.
#
# usage: examples/hh/recipe.sh small|hub [OUTPUT]        (OUTPUT: runs/hh)
#
# small  the packaged story model and the HH files in $DATA (../shared/data beside the checkout): two CPU cores, minutes.
#        It shows that the stages fit together; a model of this size does not learn to help.
# hub    $BASE (Qwen/Qwen2.5-1.5B) and Anthropic/hh-rlhf from the hub: one GPU of 16 GB.
#
# BASE=FOLDER starts from another model; STAGES="sft reward" runs only those. An interrupted run goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"

scale=${1:-}
out=${2:-runs/hh}
stages=${STAGES:-sft reward rankings ppo dpo}
data=${DATA:-../shared/data}
here=examples/hh/$scale

case $scale in
  small)
    base=${BASE:-services/tether_services/demo/models/policy}
    pairs=$data/preference/hh-helpful-base.jsonl.gz
    rankings=$data/ranking/oasst-trees.jsonl
    if [[ ! -f $pairs ]]; then
      echo "error: no $pairs; set DATA to a folder that holds preference/ and ranking/, or run: $0 hub" >&2
      exit 2
    fi
    ppo=(--set total_steps=12 --set max_prompt_tokens=256 --set max_response_tokens=48 --set ppo.kl_coef=0.2)
    ;;
  hub)
    base=${BASE:-Qwen/Qwen2.5-1.5B}
    pairs=Anthropic/hh-rlhf:train
    rankings=
    ppo=(--set total_steps=200 --set prompts_per_step=64 --set max_response_tokens=128 --set trainer.learning_rate=1e-5
      --set trainer.dtype=bfloat16 --set ppo.kl_coef=0.05)
    ;;
  *)
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

train() { # STAGE FOLDER [KEY=VALUE ...]
  local stage=$1 folder=$2 settings=()
  shift 2
  for setting in "$@"; do settings+=(--set "$setting"); done
  if [[ ! -f $folder/manifest.json ]]; then
    tether train "$stage" --config "$here/$stage.toml" --resume --set "output='$folder'" "${settings[@]}"
  fi
}

wants() { [[ " $stages " == *" $1 "* ]]; }

if wants sft; then train sft "$out/sft" "base='$base'" "data.sources=['$pairs']"; fi
if wants reward; then train reward "$out/reward" "base='$out/sft'" "data.sources=['$pairs']"; fi
if wants rankings && [[ -n $rankings ]]; then
  train reward "$out/reward-rankings" "base='$out/sft'" "data.sources=['$rankings']"
fi
if wants ppo; then
  [[ -f $out/prompts.jsonl ]] || tether data prompts "$pairs" --tokenizer "$out/sft" --max-tokens 256 --output "$out/prompts.jsonl"
  tether demo --model "$out/sft" --reward-model "$out/reward" --prompts "$out/prompts.jsonl" --output "$out/ppo" "${ppo[@]}"
fi
if wants dpo; then train dpo "$out/dpo" "base='$out/sft'" "data.sources=['$pairs']"; fi
