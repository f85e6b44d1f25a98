#!/usr/bin/env bash
# The figures of docs/results that were made on one GPU: calibration table, analysis, main job, decode times.
# Usage: benchmarks/gpu.sh OUT MODEL TEXT_DIR HELD_OUT_DIR
set -euo pipefail
out=$1 model=$2 text=$3 held_out=$4
run() { python3 -m ffn_fusion "$@"; }
timeout 240 python3 benchmarks/calibration.py --model "$model" --fit-windows 32 128 1024 --measure-windows 32 \
    --text builtin:wikipedia "$text" --held-out builtin:novels "$held_out" --device cuda --out "$out/calibration.json"
run analyze "$model" --out "$out/analysis" --windows 64 --length 1024 --batch-size 8 --device cuda
run analyze "$model" --out "$out/analysis-fp32" --windows 16 --length 1024 --batch-size 8 --device cuda --dtype fp32
for n in 8 12; do
    run search "$model" --analysis "$out/analysis" --out "$out/search-$n" --remove-attention "$n" --windows 16 \
        --candidates 29 --trials 16 --fit-windows 32 --length 1024 --device cuda
    run fuse "$model" --plan "$out/search-$n/plan.json" --out "/tmp/students/$n" --fit-windows 256 --device cuda
    cp "/tmp/students/$n/record.json" "$out/fuse-$n.json"
done
run eval "$model" /tmp/students/8 /tmp/students/12 --out "$out/eval" --windows 64 --device cuda
run bench "$model" /tmp/students/8 /tmp/students/12 --out "$out/bench" --batch-sizes 1 --batch-sizes 8 --batch-sizes 32 \
    --repeats 9 --device cuda
