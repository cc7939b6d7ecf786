#!/usr/bin/env bash
# The runs of larger.md: dit and seq alone, four times the steps; stopped and typed again, it goes on.
# Usage: benchmarks/ablation/larger.sh [FOLDER [longer|larger [RECIPE]]]
set -euo pipefail
out="${1:-runs/ranking-larger}" part="${2:-both}" recipe="${3:-}"
run="$(dirname "$0")/run.sh"
export VARIANTS=dit,seq MATCH=steps SEEDS="${SEEDS:-4}" STEPS="${STEPS:-12000}"

if [ "$part" != larger ]; then
    for only in ${recipe:-published demo}; do RATE=3e-3 "$run" "$out/longer" "$only"; done
fi
if [ "$part" != longer ]; then
    export FRAMES="${FRAMES:-16}" PIXELS="${PIXELS:-64}" WIDTH="${WIDTH:-128}" DEPTH="${DEPTH:-6}"
    for only in ${recipe:-published demo}; do "$run" "$out/larger" "$only"; done
fi
