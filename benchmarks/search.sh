#!/bin/sh
# What the search is worth: every method at -25 % and -40 % decode latency, three seeds, on held-out text.
# benchmarks/search.sh OUT MODEL      About 10 minutes on one H200; the seeds run side by side.
set -eu
out=$1 model=$2
run() { python3 -m ffn_fusion "$@"; }
sweep="--sweep 1.3333 --sweep 1.6667"
mkdir -p "$out/students" "$out/logs"

run cost "$model" --out "$out/costs"
# Space without smaller sublayers: attentions, FFNs and layers removed, and FFNs fused.
run score "$model" --out "$out/scores-no-op" --windows 8 --widths 1 --kv-heads 1024 > "$out/logs/scores-no-op" 2>&1 &
for seed in 0 1 2; do
    run score "$model" --out "$out/scores-$seed" --windows 8 --seed $seed > "$out/logs/scores-$seed" 2>&1 &
done
wait

search() { # NAME SCORES SEED OPTION...
    name=$1 scores=$2 seed=$3
    shift 3
    run search "$model" --scores "$out/$scores" --costs "$out/costs" --windows 16 --seed "$seed" $sweep \
        --out "$out/$name-$seed" "$@" > "$out/logs/$name-$seed" 2>&1
}
for seed in 0 1 2; do
    (
        search mip "scores-$seed" $seed
        search mip-sum "scores-$seed" $seed --no-interactions
        search mip-unfused "scores-$seed" $seed --no-groups
        for method in greedy random max-params shortgpt llm-drop drop-layers; do
            search $method "scores-$seed" $seed --method $method
        done
    ) &
done
search no-op scores-no-op 0 &
wait

for folder in "$out"/*-[012]; do
    [ -d "$folder/plans" ] || continue
    for number in 1 2; do
        name=$(basename "$folder")-$number
        run fuse "$model" --plan "$folder/plans/$number.json" --out "$out/students/$name" > "$out/logs/$name" 2>&1
    done
done
run eval "$model" "$out"/students/* --windows 32 --out "$out/held-out"
run report "$out" --out "$out/report.html"
