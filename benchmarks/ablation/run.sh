#!/usr/bin/env bash
# The runs of plan.md, in order; stopped and typed again, it goes on. Usage: benchmarks/ablation/run.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:-runs/ranking}"
steps="${STEPS:-3000}" sweep_steps="${SWEEP_STEPS:-1000}" seeds="${SEEDS:-6}" prompts="${PROMPTS:-50}"
size=(--set data.frames=8 --set data.height=48 --set data.width=48 --set model.hidden_size=64)
read -ra more <<<"${MORE:-}" # further options, to try the script on a small scale

ablate() { uv run --no-sync stdit ablate "${size[@]}" "${more[@]}" "$@"; }
published=(--set objective.name=iddpm --set optimizer.name=adamw --set optimizer.decay=0.0 --set optimizer.ema=0.999
    --set sampling.steps=50)

variants=dit,seq,parallel,latte
ablate --variants $variants --vary optimizer.lr=3e-4,1e-3,3e-3 "${published[@]}" \
    --seeds 1 --steps "$sweep_steps" --prompts 0 --out "$out/sweep"
rate=$(uv run --no-sync python benchmarks/ablation/best_rate.py "$out/sweep/runs.csv")
echo "rate of the published recipe: $rate"

for match in steps parameters; do
    ablate --variants $variants "${published[@]}" --set optimizer.lr="$rate" --match $match \
        --seeds "$seeds" --steps "$steps" --prompts "$prompts" --out "$out/published-$match"
    ablate --variants $variants --match $match \
        --seeds "$seeds" --steps "$steps" --prompts "$prompts" --out "$out/demo-$match"
done
