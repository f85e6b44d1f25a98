#!/usr/bin/env bash
# The engine figures of docs/results, on one host with two GPUs: exports run in vLLM against the student's logits, an
# 8B shape timed with 1 and 2 GPUs in bf16 and FP8, speculative decoding. Usage: benchmarks/engines.sh OUT MODEL PLAN
set -uo pipefail
out=$1 model=$2 plan=$3
run() { timeout 400 python3 -m ffn_fusion "$@"; }
time_it() { timeout 300 python3 benchmarks/vllm_latency.py "$@" >>"$out/latency.jsonl" 2>>"$out/latency.log"; }
mkdir -p "$out"
python3 benchmarks/shapes.py "$out/shapes"
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
    for shape in parent fused; do
        time_it "$out/shapes/$shape"
        time_it "$out/shapes/$shape" --quantization fp8
    done
}
first >"$out/first.log" 2>&1 &
second &
wait
for shape in parent fused; do
    time_it "$out/shapes/$shape" --tensor-parallel 2
done
# FFN_FUSION_ENGINES says where vLLM is, as for make test-engines.
timeout 400 python3 -m pytest tests/engines/test_folders.py -k vllm >"$out/layouts.log" 2>&1
