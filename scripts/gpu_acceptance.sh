#!/usr/bin/env bash
# What runs on this GPU, what is wrong there, and how fast it is: some five minutes on one card, what finds most first.
#
#   scripts/gpu_acceptance.sh                            all stages on the GPU; results under results/acceptance
#   scripts/gpu_acceptance.sh --only=group,kernels       stages whose name holds one of these words; other results stay
#   scripts/gpu_acceptance.sh --device=cpu --out=DIR     small, on a CPU: rehearses the stages, says nothing about a GPU
#
# Each stage has its own time limit and leaves NAME.stage.json and NAME.log as soon as it ends; one that fails stops no other.
# Stages that are not timed run side by side, JOBS of them (half the cores). The table at the end: scripts/gpu_check.py table DIR.
# Ctrl-C or SIGTERM ends what runs, and leaves the results so far.

set -uo pipefail
from=$PWD
cd "$(dirname "$0")/.."
device=cuda out=results/acceptance only=
for argument in "$@"; do
    case $argument in
        --device=cuda | --device=cpu) device=${argument#*=} ;;
        --out=/*) out=${argument#*=} ;;
        --out=?*) out=$from/${argument#*=} ;;
        --only=?*) only=${argument#*=} ;;
        -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "gpu_acceptance.sh: error: $argument: expected --device=cuda or cpu, --out=DIR, --only=WORD,WORD" >&2; exit 2 ;;
    esac
done
refuse() { echo "gpu_acceptance.sh: error: $1" >&2; exit 2; }
jobs=${JOBS:-$(($(nproc) / 2 > 1 ? $(nproc) / 2 : 1))}
[[ $jobs =~ ^[1-9][0-9]{0,3}$ ]] || refuse "JOBS=$jobs: expected a whole number of at least 1"
[[ $out != *[[:space:]\'\"]* ]] || refuse "--out=$out: give a folder without spaces and quotes in its name"
said=$(python -c "import config; config.choose_device('$device')" 2>&1) || refuse "${said##*ValueError: }"  # old results stay

check="python scripts/gpu_check.py"
export TORCHINDUCTOR_COMPILE_THREADS=2  # of each of the processes that run side by side
here="--device=$device"

# ------------------------------------------------------------------------------------------------ how stages run

# write NAME LIMIT EXIT SECONDS: the result of a stage, whole or not at all
write() {
    python - "$out" "$@" <<'END'
import json, os, sys
out, name, limit, code, seconds = sys.argv[1:]
said = [line for line in open(f"{out}/{name}.log", errors="replace").read().splitlines() if line.strip()]
result = {"0": "good", "124": "too slow", "137": "too slow", "143": "stopped"}.get(code, "failed")
row = {"stage": name, "result": result, "seconds": round(float(seconds), 1), "limit": int(limit), "exit": int(code),
       "said": said[-1] if said else ""}
with open(f"{out}/{name}.stage.tmp", "w") as file:
    json.dump(row, file, indent=2)
os.replace(f"{out}/{name}.stage.tmp", f"{out}/{name}.stage.json")
END
}

# wanted NAME: whether --only names it
wanted() {
    local word
    for word in ${only//,/ }; do [[ $1 == *$word* ]] && return 0; done
    [[ -z $only ]]
}

# stage NAME LIMIT COMMANDS: a shell's commands, which stop at the first that fails
stage() {
    local name=$1 limit=$2 begin code
    wanted "$name" || return 0
    ran=yes
    rm -f "$out/$name.stage.json"
    begin=$(date +%s.%N)
    timeout -k 10 "$limit" bash -ec "$3" > "$out/$name.log" 2>&1 &
    echo $! > "$work/$name.pid"
    wait $!
    code=$?
    rm -f "$work/$name.pid"
    write "$name" "$limit" "$code" "$(python -c "import time; print(time.time() - $begin)")"
    echo "$name: exit $code"
}

# beside NAME LIMIT COMMANDS: a stage that need not be alone
beside() {
    wanted "$1" || return 0
    ran=yes
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
    stage "$@" &
}

# stop: of what runs nothing stays behind
stop() {
    trap '' INT TERM
    kill $(cat "$work"/*.pid 2> /dev/null) 2> /dev/null
    wait
    echo "gpu_acceptance.sh: stopped; what has ended: scripts/gpu_check.py table $out" >&2
    exit 130
}

# what the runs of these are compared with is left by the stage `train`
for name in recompute-full recompute-some split async-save speaking fsdp-alone; do
    [[ -n $only ]] && wanted $name && only=$only,train
done
work=$out/work ran=
mkdir -p "$out"
rm -rf "$work"
[[ -n $only ]] || rm -f "$out"/*.stage.json
mkdir -p "$work"
trap stop INT TERM

if [[ $device == cuda ]]; then
    parts=8 slow=(-m "") last=20
    tests="tests/test_attention.py tests/test_cross_entropy.py tests/test_kernels.py tests/test_optimizer.py tests/test_model.py"
    sizes="--steps=20 --tokens-per-step=8192 --block-size=256 --eval-interval=10 --save-interval=10 --eval-rows=20"
else
    jobs=${JOBS:-1} parts=2 slow=() last=04
    tests="tests/test_kernels.py"
    sizes="--steps=4 --tokens-per-step=256 --block-size=64 --eval-interval=2 --save-interval=2 --eval-rows=4 --threads=1"
fi
train="python train.py $here $sizes --init=twist --warmup=2 --packing=documents"
fresh() { echo "$train --out=$work/$1 ${*:2}; $check losses $work/whole $work/$1 --out=$work/$1"; }

# ------------------------------------------------------------------------------------------------ stages, most finds a second first

stage environment 60 "$check environment $here --out=$out; python -c 'import kernels; print(kernels.explain(\"$device\"))'"

beside group 150 "$check group $here --out=$out"
beside train 150 "$train --out=$work/whole
    cp -r $work/whole $work/resumed
    rm -r $work/resumed/step_0000$last $work/resumed/latest
    python train.py $here --init=resume --out=$work/resumed
    $check losses $work/whole $work/resumed --out=$work/resumed --within=1e-3"
beside voice 150 "python sample.py pocket/prompt.wav $here --out=$work/speech
    python hubert_units.py pocket/prompt.wav $here --out=$work/units
    python hubert_units.py pocket/prompt.wav --device=cpu --out=$work/units_cpu
    $check units $work/units $work/units_cpu --out=$work/units
    python vocoder.py $work/units $here --out=$work/speech"
# every kernel test once, divided over processes (no plugin is needed for that)
python -m pytest $tests "${slow[@]}" --collect-only 2> /dev/null | grep :: > "$work/tests"
split -n "r/$parts" "$work/tests" "$work/tests."
for part in "$work"/tests.*; do
    beside "kernels-${part##*.}" 150 "test -s $part  # an empty one would run all tests
        tr '\n' '\0' < $part | xargs -0 python -m pytest -q -m '' -p no:cacheprovider"
done
wait
beside recompute-full 120 "$(fresh full --recompute=full)"
beside recompute-some 120 "$(fresh selective --recompute=selective)"
beside split 120 "$(fresh split --optimizer=split)"
beside async-save 120 "$(fresh async --async-save)"
beside speaking 120 "$(fresh speaking --sample-interval=2 --eval-interval=1000)"
beside fsdp-alone 120 "$(fresh parts --parallel=fsdp)"
beside float32 120 "$train --dtype=float32 --out=$work/float32
    ${train/$here/--device=cpu} --dtype=float32 --out=$work/float32_cpu
    $check losses $work/float32 $work/float32_cpu --out=$work/float32 --within=2e-3"
wait

# ------------------------------------------------------------------------------------------------ speeds, each alone

bench="python -m bench"
ours=$(python -c "import transformers" 2> /dev/null || echo --ways=ours)  # the peer may not be there
if [[ $device == cuda ]]; then
    stage bench-causal-64 60 "$bench attention --cases='32 1024 12 64' --ways=ours,flash,cudnn --out=$out"
    stage bench-train 120 "$bench train $here --repeats=10 --cases=125M $ours --out=$out"
    stage bench-train-torch 120 "TWIST_KERNELS=torch $bench train $here --repeats=10 --cases=125M --ways=ours --out=$out/torch"
    stage bench-head-512 45 "$bench cross_entropy --cases='65536 768 512' --out=$out"
    stage bench-causal-128 60 "$bench attention --cases='D 128; 16 2048' --ways=ours,flash,cudnn --out=$out"
    stage bench-generate 90 "$bench generate $here --repeats=3 --cases=125M --out=$out"
    [[ -z $ours ]] && stage bench-units 90 "$bench units $here --repeats=3 --out=$out"
    stage bench-documents 60 "$bench attention --cases='documents; 16 2048 32' --ways=ours,flash,cudnn --out=$out"
    stage bench-grouped 60 "$bench attention --cases=grouped --ways=ours,flash,cudnn --out=$out"
    stage bench-alibi 60 "$bench attention --cases=ALiBi --ways=ours,flash,cudnn --out=$out"
    stage bench-head-151936 45 "$bench cross_entropy --cases='16384 2048 151936' --out=$out"
else
    stage bench-attention 60 "$bench attention $here --repeats=1 --cases=decode --out=$out"
    stage bench-head 60 "$bench cross_entropy $here --repeats=1 --cases='V 512; 512 64' --out=$out"
    stage bench-train 120 "TWIST_KERNELS=torch $bench train $here --repeats=1 --cases=pocket --ways=ours --out=$out"
fi

[[ -n $ran ]] || refuse "--only=$only: no stage has a name that holds one of these words"
echo
$check table "$out"
