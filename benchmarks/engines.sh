#!/usr/bin/env bash
# The engine figures of docs/results, on one host with two GPUs: exports run in vLLM against the student's logits, an
# 8B shape timed with 1 and 2 GPUs in bf16 and FP8, speculative decoding. Usage: benchmarks/engines.sh OUT MODEL PLAN
# More on speed, in our own engine too: benchmarks/speed.sh.
set -uo pipefail
out=$1 model=$2 plan=$3
run() { timeout 400 python3 -m ffn_fusion "$@"; }
layers() { for layer in $(seq "$1" "$2"); do printf 'A%dF%d ' "$layer" "$layer"; done; }
# Ten attentions gone and eleven FFNs fused into two: 64 sequential sublayers become 45.
ten="$(layers 0 16)A17F17+18+19+20+21+22 -F23+24+25+26+27 $(layers 28 31)"
time_it() { # NAME OPTION...
    local name=$1
    shift
    run bench --shape llama-3.1-8b --plan "$ten" --engine vllm --new-tokens 128 --repeats 7 --batch-sizes 1 --batch-sizes 32 \
        --timeout 180 --time-limit 300 --out "$out/$name" "$@"
}
mkdir -p "$out"
first() {
    export CUDA_VISIBLE_DEVICES=0
    run fuse "$model" --plan "$plan" --fit-windows 64 --out "$out/student"
    run export "$out/student" --to hf --out "$out/hf" --verify --engine vllm
    run export "$out/student" --to folded --out "$out/folded" --verify --engine vllm
    run speculate "$model" "$out/student" --out "$out/speculate-vllm" --engine vllm
    run speculate "$model" "$out/student" --out "$out/speculate-transformers"
    run speculate "$model" "$out/student" --out "$out/speculate-transformers-fp32" --dtype fp32
}
second() {
    export CUDA_VISIBLE_DEVICES=1
    time_it latency-bf16
    time_it latency-fp8 --fp8
}
first >"$out/first.log" 2>&1 &
second &
wait
time_it latency-tp2 --tensor-parallel 2
# FFN_FUSION_ENGINES says where vLLM is, as for make test-engines.
timeout 400 python3 -m pytest tests/engines/test_folders.py -k vllm >"$out/layouts.log" 2>&1
