#!/usr/bin/env bash
# The figures of docs/results that were made on one GPU: analysis, main job, decode times, calibration table.
# Usage: benchmarks/gpu.sh OUT MODEL TEXT_DIR HELD_OUT_DIR
set -euo pipefail
out=$1 model=$2 text=$3 held_out=$4
students=$(mktemp -d)
run() { python3 -m ffn_fusion "$@"; }
run analyze "$model" --out "$out/analysis" --windows 40 --length 1024 --batch-size 8 --device cuda
run analyze "$model" --out "$out/analysis-fp32" --windows 16 --length 1024 --batch-size 8 --device cuda --dtype fp32
for n in 8 12; do
    run search "$model" --analysis "$out/analysis" --out "$out/search-$n" --remove-attention "$n" --windows 16 \
        --candidates 29 --trials 16 --fit-windows 32 --length 1024 --device cuda
    run fuse "$model" --plan "$out/search-$n/plan.json" --out "$students/$n" --fit-windows 256 --device cuda
    cp "$students/$n/record.json" "$out/fuse-$n.json"
done
run eval "$model" "$students/8" "$students/12" --out "$out/eval" --windows 64 --device cuda
run bench "$model" "$students/8" "$students/12" --out "$out/bench" --repeats 9 --device cuda \
    --batch-sizes 1 --batch-sizes 8 --batch-sizes 32
python3 benchmarks/calibration.py --model "$model" --batch-size 16 --fit-windows 32 128 1024 --measure-windows 32 \
    --text builtin:wikipedia "$text" --held-out builtin:novels "$held_out" --device cuda --out "$out/calibration.json"
