#!/usr/bin/env bash
# The runs of plan.md, in order; stopped and typed again, it goes on. Usage: benchmarks/ablation/run.sh [FOLDER [RECIPE]]
# With a RECIPE (published or demo) that one alone, so that two machines, or two cores, can share the work.
# larger.sh sets other variants, sizes and lengths through the variables below.
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:-runs/ranking}"
steps="${STEPS:-3000}" sweep_steps="${SWEEP_STEPS:-1000}" seeds="${SEEDS:-6}" prompts="${PROMPTS:-50}"
frames="${FRAMES:-8}" pixels="${PIXELS:-48}" width="${WIDTH:-64}" depth="${DEPTH:-4}"
size=(--set data.frames="$frames" --set data.height="$pixels" --set data.width="$pixels"
    --set model.hidden_size="$width" --set model.depth="$depth")
read -ra more <<<"${MORE:-}" # further options, to try the script on a small scale

ablate() { uv run --no-sync stdit ablate "${size[@]}" "${more[@]}" "$@"; }

# Seq is what the others' parameters are matched to, and decides on the start of those that they share. So seq and
# parallel, as large as seq, are the same runs in both tables of a recipe.
variants="${VARIANTS:-dit,seq,parallel,latte}"
read -ra ways <<<"${MATCH:-steps parameters}"

tables() { # a recipe's name and settings
    local recipe="$1" table run
    shift
    for table in "${ways[@]}"; do
        if [ "$table" = parameters ]; then
            mkdir -p "$out/$recipe-parameters"
            for run in "$out/$recipe-steps"/{seq,parallel}-seed*; do
                [ -e "$out/$recipe-parameters/$(basename "$run")" ] || cp -r "$run" "$out/$recipe-parameters/"
            done
        fi
        ablate --variants "$variants" --match "$table" "$@" \
            --seeds "$seeds" --steps "$steps" --prompts "$prompts" --out "$out/$recipe-$table"
    done
}

if [ "${2:-published}" = published ]; then
    published=(--set objective.name=iddpm --set optimizer.name=adamw --set optimizer.decay=0.5 --set sampling.steps=50)
    rate="${RATE:-}"
    if [ -z "$rate" ]; then
        ablate --variants "$variants" --vary optimizer.lr=1e-3,3e-3,1e-2 "${published[@]}" \
            --seeds 1 --steps "$sweep_steps" --prompts 0 --out "$out/sweep"
        rate=$(uv run --no-sync python benchmarks/ablation/best_rate.py "$out/sweep/runs.csv")
    fi
    echo "rate of the published recipe: $rate"
    tables published "${published[@]}" --set optimizer.lr="$rate"
fi
if [ "${2:-demo}" = demo ]; then
    tables demo
fi
