#!/usr/bin/env bash
# From a base model to aligned adapters: SFT -> reward model -> PPO, and SFT -> DPO. Each stage reads the last one's folder.
#
# usage: examples/hh/recipe.sh small|hub [OUTPUT]        (OUTPUT: runs/hh)
#
# small  the packaged story model and the HH files in $DATA (../shared/data beside the checkout): two CPU cores, minutes.
#        It shows that the stages fit together; a model of this size does not learn to help.
# hub    $BASE (Qwen/Qwen2.5-0.5B) and Anthropic/hh-rlhf from the hub, on one GPU.
#
# BASE=FOLDER starts from another model; STAGES="sft reward" runs only those. Finished stages are left as they are, an
# interrupted SFT, reward model or DPO goes on where it was; an interrupted PPO begins again.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"

scale=${1:-}
out=${2:-runs/hh}
stages=${STAGES:-sft reward rankings ppo dpo}
data=${DATA:-../shared/data}
here=examples/hh/$scale
rankings=

case $scale in
  small)
    base=${BASE:-services/tether_services/demo/models/policy}
    pairs=$data/preference/hh-helpful-base.jsonl.gz
    rankings=$data/ranking/oasst-trees.jsonl
    if [[ ! -f $pairs ]]; then
      echo "error: no $pairs; set DATA to a folder that holds preference/ and ranking/, or run: $0 hub" >&2
      exit 2
    fi
    ;;
  hub)
    base=${BASE:-Qwen/Qwen2.5-0.5B}
    pairs=Anthropic/hh-rlhf:train
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

ppo_small() {
  tether demo --model "$out/sft" --reward-model "$out/reward" --prompts "$out/prompts.jsonl" --output "$out/ppo" --steps 12 \
    --set max_prompt_tokens=192 --set max_response_tokens=48 --set evaluation_count=32 --set ppo.kl_coef=0.2
}

ppo_hub() { # the services with the precision of the trainer, then the run
  tether up --engine vllm --model "$out/sft" --reward-model "$out/reward" --state-dir "$out/ppo" \
    --set generator.dtype=bfloat16 --set reference.dtype=bfloat16 --set generator.gpu_memory_utilization=0.4 &
  services=$!
  trap 'kill "$services"' EXIT
  until tether run list >/dev/null 2>&1; do kill -0 "$services" && sleep 5; done
  tether run start "hh-$(date +%s)" --config "$here/ppo.toml" --watch --set "model='$out/sft'" \
    --set "reward_model='$out/reward'" --set "prompts='$out/prompts.jsonl'"
}

wants() { [[ " $stages " == *" $1 "* ]]; }

if wants sft; then train sft "$out/sft" "base='$base'" "data.sources=['$pairs']"; fi
if wants reward; then
  train reward "$out/reward" "base='$out/sft'" "data.sources=['$pairs']" data.validation_fraction=0.1
fi
if wants rankings && [[ -n $rankings ]]; then # long answers, few prompts: cut and not dropped, a larger part measured on
  train reward "$out/reward-rankings" "base='$out/sft'" "data.sources=['$rankings']" overlong=truncate max_tokens=384 \
    data.validation_fraction=0.2
fi
if wants ppo && ! grep -qs '"state": "SUCCEEDED"' "$out"/ppo/*/report.json; then
  tether data prompts "$pairs" --tokenizer "$out/sft" --template dialogue --max-tokens 192 --output "$out/prompts.jsonl"
  "ppo_$scale"
fi
if wants dpo; then train dpo "$out/dpo" "base='$out/sft'" "data.sources=['$pairs']"; fi
