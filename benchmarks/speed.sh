#!/usr/bin/env bash
# Every figure on speed of docs/results: FFNs alone, shapes in our engine and in vLLM, the latency model, and the fused builtin
# model in its engines. Each figure has a time limit of its own, and what fails leaves the others alone.
#
#   benchmarks/speed.sh OUT one               on a machine with one GPU    (at most 83 minutes by its limits, 100 with MODEL)
#   benchmarks/speed.sh OUT two               on a machine with two        (at most 51 minutes)
#   benchmarks/speed.sh OUT cpu MODEL STUDENT on a CPU: torch, and llama.cpp where LLAMA_PYTHON names a Python that has it
#   benchmarks/speed.sh OUT fit               anywhere, after the others: latency model and page from all records in OUT
#
# MODEL and STUDENT behind "one" have the fused model with weights timed, too. VLLM_PYTHON names the Python that has vLLM.
# ONLY="8b ffn" runs the named parts alone: check ffn 8b modes 49b ultra vllm 49b-vllm fp8 cost repeat student draft.
set -uo pipefail
out=$1 where=$2 model=${3:-} student=${4:-}
vllm=${VLLM_PYTHON:-python3} llama=${LLAMA_PYTHON:-}
mkdir -p "$out/logs"
export TOKENIZERS_PARALLELISM=false
# NAME LIMIT ARGUMENT...: one stage into OUT/NAME, at most LIMIT seconds; a finished one is not run again. A bench begins no
# further batch size a minute before, so that its rows so far become a record.
run() {
    local name=$1 limit=$2
    shift 2
    [ "$1" = bench ] && set -- "$@" --time-limit $((limit - 60))
    echo "$(date +%H:%M:%S) $name"
    # An interrupt, so that engines are ended, too.
    timeout --signal INT --kill-after 20 "$limit" python3 -m ffn_fusion "$@" --out "$out/$name" >"$out/logs/$name" 2>&1 ||
        echo "  failed: $(tail -n 1 "$out/logs/$name")"
}
wanted() { [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $1 "* ]]; }
batches() { for batch in "$@"; do printf -- '--batch-sizes %s ' "$batch"; done; }
eight=$(batches 1 8 32 64)
bench="--repeats 9 --new-tokens 32 --prompt-lengths 128"

shapes() { # GPUS
    local gpus=$1
    # Seconds without a sign of life, after which processes are killed.
    local split="--tensor-parallel $gpus" limit="--timeout 120"
    # First what says within a minute whether all of it works here.
    wanted check && run "check-tp$gpus" 180 bench --shape llama-3.1-8b $split --compile on $limit --repeats 2 $(batches 1)
    if wanted ffn; then
        run "ffn-405b-tp$gpus" 240 ffn $split --hidden-size 16384 --width 6656 --number 24 --group 12 --tokens 1 --tokens 32 \
            --tokens 256
        run "ffn-70b-tp$gpus" 180 ffn $split --hidden-size 8192 --width 3584 --number 32 --group 8 --tokens 1 --tokens 32
        run "ffn-8b-tp$gpus" 180 ffn $split --hidden-size 4096 --width 14336 --number 12 --group 6 --tokens 1 --tokens 32
    fi
    wanted 8b && run "8b-on-tp$gpus" 300 bench --shape llama-3.1-8b $split --compile on $limit $bench $eight
    if wanted modes; then
        run "8b-tuned-tp$gpus" 240 bench --shape llama-3.1-8b $split --compile tuned $limit $bench $(batches 1)
        run "8b-off-tp$gpus" 240 bench --shape llama-3.1-8b $split $limit $bench $eight
    fi
    wanted vllm && run "8b-vllm-tp$gpus" 480 bench --shape llama-3.1-8b --engine vllm --engine-python "$vllm" $split $bench $eight
    # The parent, 141 GB in bf16, says what it would need on one GPU.
    wanted 49b && run "49b-tp$gpus" 420 bench --shape super-49b $split --compile on $limit $bench $eight
    wanted 49b-vllm && run "49b-vllm-tp$gpus" 600 bench --shape super-49b --engine vllm --engine-python "$vllm" $split $bench $eight
}

case $where in
one)
    shapes 1
    wanted ultra && run ultra-slice8 420 bench --shape ultra-253b --slice 8 --compile on $bench $(batches 1 32)
    wanted fp8 && run 8b-vllm-fp8 420 bench --shape llama-3.1-8b --engine vllm --engine-python "$vllm" --fp8 $bench $eight
    if wanted cost; then
        run 8b-cost 480 bench --shape llama-3.1-8b --compile on --repeats 5 --new-tokens 16 --prompt-lengths 128 \
            $(batches 1 2 4 8 16 32 64 128 256)
        run 8b-context 300 bench --shape llama-3.1-8b --compile on --repeats 5 --new-tokens 16 --prompt-lengths 2048 \
            --prompt-lengths 8192 $(batches 1 8)
    fi
    # Once more: are the ratios the same?
    wanted repeat && run 8b-on-again 300 bench --shape llama-3.1-8b --compile on $bench $eight
    if wanted student && [ -n "$model" ]; then
        run student-torch 300 bench "$model" "$student" --compile on $bench $eight
        run student-vllm 420 bench "$model" "$student" --engine vllm --engine-python "$vllm" $bench $eight
    fi
    wanted draft && [ -n "$model" ] && run student-draft 300 speculate "$model" "$student"
    ;;
two) shapes 2 ;;
cpu)
    run cpu-torch 900 bench "$model" "$student" --repeats 15 --new-tokens 16 --prompt-lengths 128 $(batches 1 4)
    [ -n "$llama" ] && run cpu-llama-cpp 900 bench "$model" "$student" --engine llama.cpp --engine-python "$llama" \
        --repeats 15 --new-tokens 16 --prompt-lengths 128 $(batches 1)
    ;;
fit)
    for engine in on vllm; do
        # Of finished ones: the folder of a failed one holds no record.
        found=$(ls "$out"/*b-"$engine"-tp*/record.json "$out"/49b-tp*/record.json 2>/dev/null | grep -v again)
        [ "$engine" = vllm ] && found=$(ls "$out"/*-vllm-tp*/record.json 2>/dev/null)
        # shellcheck disable=SC2086
        run "latency-$engine" 60 latency ${found//\/record.json/}
    done
    python3 -m ffn_fusion report "$out" --out "$out/report.html"
    ;;
*) echo "$where is none of one, two, cpu, fit" >&2 && exit 2 ;;
esac
for log in "$out"/logs/*; do
    echo "== $(basename "$log")"
    cat "$log"
done >"$out/summary.txt"
