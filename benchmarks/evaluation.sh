#!/usr/bin/env bash
# The quality figures of docs/results: a parent, it without some attentions, and its fused and calibrated students on
# whole benchmarks. Usage: benchmarks/evaluation.sh OUT MODEL FUSE_RECORD_8 FUSE_RECORD_12 (records of an earlier fuse)
set -euo pipefail
out=$1 model=$2 eight=$3 twelve=$4
run() { python3 -m ffn_fusion "$@"; }
plan() { python3 -c 'import json, sys; from ffn_fusion.core.plan import Plan
plan = Plan.parse(json.load(open(sys.argv[1]))["result"]["plan"])
print(plan.unfused() if sys.argv[2:] else plan)' "$@"; }
mkdir -p "$out/students"
run eval --fetch-data
run fuse "$model" --plan "$(plan "$eight" unfused)" --calibrate none --out "$out/students/8-removed"
run fuse "$model" --plan "$(plan "$eight")" --fit-windows 256 --out "$out/students/8-fused"
run fuse "$model" --plan "$(plan "$twelve")" --fit-windows 256 --out "$out/students/12-fused"
# Side by side: small models leave most of a GPU idle.
score() { run eval "$model" "$out"/students/{8-removed,8-fused,12-fused} --out "$out/$1" --tasks "$2" "${@:3}"; }
score commonsense commonsense --windows 64 &
score mmlu mmlu &
score code humaneval,humaneval_instruct &
score generation agreement,niah_single@512,niah_single@2048,niah_multikey@512,vt@512 &
score ifeval ifeval &
wait
