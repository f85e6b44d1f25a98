#!/bin/sh
# How far healing brings a fused student back, and what each choice is worth. One GPU; parts run side by side.
# benchmarks/healing.sh OUT MODEL TEXTS [PLAN [OTHER ...]]      TEXTS: the folder that benchmarks/mix.py made
#
# ONLY="own speed main ..." picks parts: own, speed, rates, main, further, text, again, domain, unfused, plain, local, paper, tasks, ladder, ladder-tasks.
# Part own has the parent write OWN texts of 1,024 tokens, and OPENED more that go on from stretches of prose; half of what is learned
# from is then the first. Part further needs them: the main run's student goes on, mostly on them (also in a later call,
# ONLY="further tasks"). Part text has that student go on with a loss on the text as well, averages the two, and ends on prose. Part again
# writes AGAIN more texts and has the average go on, 32 windows a step, and ends on prose. Part domain learns from every other document of
# Brown and of the speeches, averages, and measures on the others.
# RATE, STEP: of all runs but those of part rates. TOKENS, MORE_TOKENS, TEXT_TOKENS, AGAIN_TOKENS, RUNG_TOKENS: of the parts main, further,
# text, again and ladder (each OTHER plan).
set -eu
out=$1 model=$2 texts=$3
# What `search --sublayers 42 --kv-bytes 13824 --trials 10` finds of SmolLM2-135M: twelve attentions removed, six blocks fewer.
plan=${4:-A0F0 A1F1 A2F2 A3F3 A4F4 A5F5 -F6 -F7 -F8 A9F9 A10F10 A11F11+12 A13F13+14+15 A16F16+17+18 A19F19 A20F20 A21F21 A22F22 A23F23 A24F24 -F25 -F26 A27F27+28 -F29}
# The same search at 46 sublayers and 16,128 bytes (nine removed), and at 50 and 18,432 (six): which keeps what?
if [ $# -gt 4 ]; then
    shift 4
else
    set -- 'A0F0 A1F1 A2F2 A3F3 A4F4 A5F5 A6F6 -F7 -F8 A9F9 A10F10 A11F11 A12F12 A13F13+14+15 A16F16+17+18 A19F19+20 A21F21 A22F22 A23F23 A24F24 -F25 A26F26 A27F27 -F28 A29F29' \
        'A0F0 A1F1 A2F2 A3F3 A4F4 A5F5 A6F6 -F7 A8F8 A9F9 A10F10 A11F11 A12F12 A13F13+14+15 A16F16+17+18 A19F19 A20F20 A21F21 A22F22 A23F23 A24F24 A25F25 A26F26 A27F27 -F28 A29F29'
fi
only=${ONLY:-own speed main further text again domain unfused plain local paper tasks ladder ladder-tasks}
rate=${RATE:-3.0e-4} step=${STEP:-16_384} tokens=${TOKENS:-100_000_000}
run() { python3 -m ffn_fusion "$@"; }
wanted() { case " $only " in *" $1 "*) true ;; *) false ;; esac; }
mkdir -p "$out/recipes" "$out/logs"

mix="  - {text: $texts/chats.jsonl, share: 3}
  - {text: $texts/prose.jsonl, share: 1}
  - {text: $texts/manuals.jsonl, share: 1}"
if wanted own; then
    mix="$mix
  - {text: $out/own/text.jsonl, share: 5}"
fi
own_mix="  - {text: $out/own/text.jsonl, share: 8}
  - {text: $texts/chats.jsonl, share: 1}
  - {text: $texts/prose.jsonl, share: 1}
  - {text: $texts/manuals.jsonl, share: 0.5}"
text_mix="  - {text: $out/own/text.jsonl, share: 4}
  - {text: $out/opened/text.jsonl, share: 1}
  - {text: $texts/prose.jsonl, share: 2}
  - {text: $texts/chats.jsonl, share: 1}
  - {text: $texts/manuals.jsonl, share: 0.25}"
again_mix="  - {text: $out/own/text.jsonl, share: 3}
  - {text: $out/own-again/text.jsonl, share: 3}
  - {text: $out/opened/text.jsonl, share: 0.5}
  - {text: $texts/prose.jsonl, share: 1.5}
  - {text: $texts/chats.jsonl, share: 1}
  - {text: $texts/manuals.jsonl, share: 0.25}"
speeches=$texts/speeches.jsonl brown=$texts/brown.jsonl
recipe() { # NAME STAGES [TEXT]: the domains are the same for all, unless it learns from half of two
    cat > "$out/recipes/$1.yaml" <<END
domains: {prose: builtin:novels, knowledge: builtin:wikipedia, maths: builtin:maths, code: builtin:code,
          chat: builtin:dialogue, speeches: $speeches, brown: $brown}
text:
${3:-$mix}
stages:
$2
END
}
kl="losses: {kl: 1}" papers="losses: {kl: 1, cosine: 1}"
stage() { # NAME TOKENS RATE [LENGTH [MORE]]
    echo "- {name: $1, tokens: $2, length: ${4:-1024}, step_tokens: $step, learning_rate: $3, ${5:-$kl}}"
}
recipe main "$(stage global "$tokens" "$rate")"
recipe further "$(stage global "${MORE_TOKENS:-110_000_000}" 4.0e-4 1024 "$kl, schedule: linear, final_rate: 0")" "$own_mix"
recipe text "$(stage text "${TEXT_TOKENS:-82_000_000}" 4.0e-4 1024 "losses: {kl: 1, lm: 0.3}, schedule: linear, final_rate: 0")" "$text_mix"
(
    step=4096 prose="  - {text: $texts/prose.jsonl}" down="warm_up: 0.1, schedule: linear, final_rate: 0"
    recipe prose "$(stage prose 98_304 1.0e-4 512 "losses: {kl: 1, lm: 0.5}, $down")" "$prose"
    for each in brown speeches; do
        awk 'NR % 2 == 1' "$texts/$each.jsonl" > "$out/$each-even.jsonl"
        awk 'NR % 2 == 0' "$texts/$each.jsonl" > "$out/$each-odd.jsonl"
    done
    (speeches=$out/speeches-odd.jsonl brown=$out/brown-odd.jsonl && recipe domain "$(stage domain 122_880 1.0e-4 1024 "losses: {kl: 1, lm: 0.3}, $down")" "  - {text: $out/brown-even.jsonl}
  - {text: $out/speeches-even.jsonl}")
    recipe again-prose "$(stage prose 122_880 1.0e-4 1024 "losses: {kl: 1, lm: 1}, $down")" "$prose"
)
(step=32_768 && recipe again "$(stage global "${AGAIN_TOKENS:-311_000_000}" 4.5e-4 1024 "$kl, schedule: linear, final_rate: 0")" "$again_mix")
recipe rung "$(stage global "${RUNG_TOKENS:-12_000_000}" "$rate")"
recipe short "$(stage global 8_000_000 "$rate")"
recipe local "$(stage local 2_000_000 "$rate" 1024 'trains: neighbours, local: true, losses: {mse: 1}')
$(stage global 6_000_000 "$rate")"
recipe paper "$(stage 1k 6_000_000 "$rate" 1024 "$papers")
$(stage 4k 2_000_000 1.0e-4 4096 "$papers")"
variants="1.0e-4,16_384 2.0e-4,16_384 4.0e-4,16_384 8.0e-4,16_384 4.0e-4,65_536"
for each in $variants; do
    (IFS=, && set -- $each && step=$2 && recipe "variant-$each" "$(stage global 3_000_000 "$1")")
done

fuse() { # NAME PLAN OPTION...
    name=$1 its=$2
    shift 2
    run fuse "$model" --plan "$its" --fit-windows 128 --batch-size 16 --out "$out/$name" "$@" > "$out/logs/$name" 2>&1
}
heal() { # NAME STUDENT RECIPE [WINDOWS]: to the end, whatever becomes of a domain
    run heal "$model" "$out/$2" --stages "$out/recipes/$3.yaml" --batch-size "${4:-16}" --check-ups 6 --patience 0 \
        --out "$out/healed-$1" > "$out/logs/healed-$1" 2>&1
}
score() { # NAME STUDENTS OPTION...: of those that are there
    name=$1 students=
    for student in $2; do
        [ -e "$student/record.json" ] && students="$students $student"
    done
    shift 2
    # shellcheck disable=SC2086
    run eval "$model" $students --windows 64 --batch-size 32 --out "$out/$name" "$@" > "$out/logs/$name" 2>&1
}
fuse fused "$plan"
own="--top-p 1 --batch-size 1024 --windows 0"
if wanted own; then
    # shellcheck disable=SC2086
    run teach "$model" --write "${OWN:-40_000}" --documents --max-new-tokens 1024 $own --out "$out/own" > "$out/logs/own" 2>&1
    # shellcheck disable=SC2086
    run teach "$model" --write "${OPENED:-5_000}" --opening 64 --text "$texts/prose.jsonl" --max-new-tokens 960 $own \
        --out "$out/opened" > "$out/logs/opened" 2>&1
fi
wanted speed && python3 benchmarks/healing.py "$model" "$out/fused" --windows 32 --steps 5 --out "$out/speed.json"
unfused=$(python3 -c 'import sys; from ffn_fusion import Plan; print(Plan.parse(sys.argv[1]).unfused())' "$plan")
wanted unfused && fuse unfused "$unfused"
wanted plain && fuse plain "$plan" --calibrate none
if wanted rates; then
    for each in $variants; do
        heal "variant-$each" fused "variant-$each" &
    done
    wait
fi
if wanted main; then heal main fused main & fi
if wanted unfused; then heal unfused unfused short & fi
if wanted plain; then (heal calibrated fused short; heal plain plain short) & fi
if wanted local; then heal local fused local & fi
if wanted paper; then heal paper fused paper & fi
if wanted ladder; then
    for other in "$@"; do
        number=$((${number:-0} + 1))
        (fuse "rung-$number" "$other" && heal "rung-$number" "rung-$number" rung) &
    done
fi
wait
if wanted further; then heal further healed-main further; fi
if wanted text; then
    heal text healed-further text
    run merge "$out/healed-further" "$out/healed-text" --out "$out/average"
    heal prose average prose
fi
if wanted again; then
    # shellcheck disable=SC2086
    run teach "$model" --write "${AGAIN:-20_000}" --documents --max-new-tokens 1024 $own --seed 4 --out "$out/own-again" > "$out/logs/own-again" 2>&1
    heal again average again 32
    heal again-prose healed-again again-prose
fi
if wanted domain; then
    heal domain healed-again domain
    run merge "$out/healed-again" "$out/healed-domain" --out "$out/average-domain"
    for each in brown speeches; do
        score "domain-$each" "$out/healed-again $out/healed-domain $out/average-domain" --text "$out/$each-odd.jsonl"
    done
fi
both_ends="$out/fused $out/healed-main $out/healed-further $out/healed-text $out/average $out/healed-prose"
both_ends="$both_ends $out/healed-again $out/healed-again-prose"
if wanted tasks; then
    score tasks "$both_ends $out/healed-unfused" --tasks commonsense &
    (score brown "$both_ends" --text "$texts/brown.jsonl" && score speeches "$both_ends" --text "$texts/speeches.jsonl") &
fi
if wanted ladder-tasks; then score ladder "$(echo "$out"/rung-* "$out"/healed-rung-*)" --tasks commonsense & fi
wait
run report "$out" --out "$out/report.html"
