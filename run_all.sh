#!/usr/bin/env bash
# Run every method on every benchmark under data/ with five seeds and the published settings, then write the report.
#   bash run_all.sh                        run everything; skip finished runs and resume interrupted ones
#   DATA="brain liver" METHODS="padim patchcore" SEEDS="0 1" bash run_all.sh    run a subset
#   JOBS=4 bash run_all.sh                 four runs in parallel, spread over the GPUs (CUDA_VISIBLE_DEVICES, or all)
#   bash run_all.sh --list                 print the commands, one per line, without running them
#   sbatch --array=1-480 run_all.sh        Slurm: array task n runs command n of the list
#   bash run_all.sh ablation [--list]      variants of clip_recon (thesis, Figures 4.6 to 4.8, 'Ours' in Tables 4.1 to
#                                          4.4, and other readings of chapter 4) in runs/ablation/<variant>/
#   bash run_all.sh setup                  only create .venv and install requirements.txt in it
# Before the runs, datasets/check.py checks each benchmark once; the report includes its summary.
# If data/ has no benchmark, the script generates the phantom and runs a short demonstration (flags: methods/demo.txt).
# DEMO=1 runs this demonstration on any benchmark; NET="--backbone mobilenet_v2 --weights FILE" sets its network.
# FLAGS="--device cuda:1" adds flags to every command. Failed runs are listed at the end (exit status 1).
(return 0 2> /dev/null) && { echo "error: do not source run_all.sh; run: bash run_all.sh" >&2; return 2; }
set -fu
usage() { echo "error: $1; see the head of run_all.sh" >&2; exit 2; }
number() {
    case "$2" in "" | 0?* | *[!0-9]* | ??????????*) false ;; *) [ "$2" -ge "$3" ] ;; esac || usage "$1=$2: $3 or more"
}
self=$(cd "$(dirname "$0")" && pwd)
[ -f "$self/common.py" ] || self=${SLURM_SUBMIT_DIR:-$self} # Slurm runs a copy of this script from another folder
cd "$self" && [ -f common.py ] || usage "$self has no common.py: start run_all.sh in its own folder"
python=.venv/bin/python ablation=
[ "${1:-}" = ablation ] && ablation=variants METHODS=clip_recon && shift
case "$#${1:-}" in
    0 | 1--list | 1setup) ;;
    1--help) sed -n '2,/^set -/s/^# \{0,1\}//p' run_all.sh; exit 0 ;;
    *) usage "'$*' is unknown" ;;
esac
number DEMO "${DEMO:-1}" 1 && number SLURM_ARRAY_TASK_ID "${SLURM_ARRAY_TASK_ID:-1}" 1 && number JOBS "${JOBS:=1}" 1
: "${METHODS:=$(ls methods | sed -n 's/\.py$//p' | xargs)}"
for method in $METHODS; do [ -f "methods/$method.py" ] || usage "METHODS: there is no methods/$method.py"; done
for seed in ${SEEDS:=}; do number SEEDS "$seed" 0; done
# Lock, so that only one of several parallel tasks makes .venv and the phantom; in Python, because macOS has no flock.
if [ -z "${RUN_ALL_LOCK:-}" ]; then
    lock='import fcntl, os, sys; f = os.open("requirements.txt", os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX)
os.set_inheritable(f, True); os.environ["RUN_ALL_LOCK"] = str(f); os.execvp("bash", ["bash", *sys.argv[1:]])'
    exec python3 -c "$lock" run_all.sh ${ablation:+ablation} "$@"
fi
if ! cmp -s requirements.txt .venv/installed.txt; then
    echo "installing requirements.txt into .venv (several GB, a few minutes)" >&2
    { [ -x $python ] || python3 -m venv .venv; } && $python -m pip install -q --disable-pip-version-check \
        -r requirements.txt && cp requirements.txt .venv/installed.txt ||
        { echo "error: .venv is incomplete (see above); it needs Python 3.11+, venv, network, 8 GB disk" >&2; exit 1; }
fi
[ "${1:-}" = setup ] && exit 0
# Line 1: the benchmarks. Line 2: fingerprints of their files; runs finished on other files start again and say so.
found='import common, contextlib, sys, types
data = [name.lower() if name.lower() in common.NAMES else name for name in sys.argv[1:]] or [
    name for name in common.NAMES if name != "phantom" and common.named_folder(name, "data")]
missing = [name for name in data if not common.named_folder(name, "data")]
print(*missing or data)
with contextlib.suppress(common.Error): # an unusable benchmark; its runs will say why
    args = [types.SimpleNamespace(data=name, root="data", holdout=0) for name in data]
    print(*(common.list_benchmark(one)[2] for one in args), sep="|")
sys.exit(bool(missing))'
lines=$($python -c "$found" ${DATA:-}) || usage "DATA: there is no benchmark ${lines%%$'\n'*}"
if [ -z "$lines" ]; then
    echo "no benchmark in data/ (see datasets/); running a short demonstration on the phantom (one seed)" >&2
    $python datasets/phantom.py >&2 || exit 1
    lines=$($python -c "$found" phantom)
fi
eval "exec $RUN_ALL_LOCK<&-"
DATA=${lines%%$'\n'*} images=${lines#*$'\n'}
: "${SEEDS:=$([ "$DATA" = phantom ] && echo 0 || echo 0 1 2 3 4)}" "${NET:=--backbone mobilenet_v2 --weights auto}"

variants() { # of clip_recon, one per line
    printf -- '%s\n' --base --prompt-tokens\ {8,24,32} --layers\ {1,2,3,4,'1 2','1 2 3','2 3 4','3 4'} \
        --da-levels\ {0,1,2,4} --modules\ {prompts,adapter} '--frame bare' '--join append' '--loss layer' \
        '--blocks first' '--da-sum saturate' '--smooth-sigma 4' --adapter-reduction\ {4,1,0.25} --backbone\ resnet{18,50}
}
list() {
    local data method seed variant demo out extra
    for data in $DATA; do
        for method in $METHODS; do
            extra= && [ "$method $data" = "ddpm histo" ] && extra="--channels 3" # the only colour benchmark
            demo=$([ "$data" = phantom ] || [ -n "${DEMO:-}" ] && sed -n "s/^$method //p" methods/demo.txt)
            ${ablation:-echo} | while read -r variant; do
                out=${variant#--} out=${ablation:+--out runs/ablation/${out// /_}}
                for seed in $SEEDS; do # unquoted, so that single spaces separate the words
                    echo $python methods/$method.py --data $data --seed $seed $out $extra ${demo/NET/$NET} ${FLAGS:-} \
                        ${variant#--base}
                done
            done
        done
    done
}
one() { # slot, line: run a line of the list; if it fails, append it to $failed
    local words=($2) out=runs flags=${2#* * } name
    [ "${words[6]:-}" = --out ] && out=${words[7]}
    name=$(basename "${words[3]}")/$(basename -s .py "${words[1]}")/seed${words[5]}
    grep -qF "\"command\": \"$flags\"" "$out/$name/results.json" 2> /dev/null &&
        grep -qE "\"images\": \"($images)\"" "$out/$name/results.json" && return
    if [ ${#gpus[@]} -gt 1 ]; then export CUDA_VISIBLE_DEVICES=${gpus[$1 % ${#gpus[@]}]}; fi
    { $2 2>&1 || { echo "$2" >> "$failed"; return 1; }; } | while IFS= read -r line; do
        if [ "$JOBS" -gt 1 ]; then echo "$name: $line"; else echo "$line"; fi
    done
    return "${PIPESTATUS[0]}"
}
# Use the GPUs in CUDA_VISIBLE_DEVICES, or all GPUs. Assign none if FLAGS names a device or Slurm assigns them.
gpus=()
case " ${FLAGS:-} " in *" --device "*) ;; *)
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || IFS=', ' read -r -a gpus <<< "${CUDA_VISIBLE_DEVICES-$(
        nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | xargs)}" ;;
esac
[ "$JOBS" -gt 1 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + JOBS - 1) / JOBS))}
work=$(mktemp -d) failed=$work/failed && trap 'rm -rf "$work"' EXIT
trap 'trap - INT; kill -INT 0; exit 130' INT

[ -n "$(list)" ] || usage "METHODS or SEEDS is blank"
if [ "${1:-}" = --list ]; then list
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    line=$(list | sed -n "${SLURM_ARRAY_TASK_ID}p")
    [ -n "$line" ] || usage "the list has $(list | wc -l) lines, but no line $SLURM_ARRAY_TASK_ID"
    one 0 "$line"
else
    for data in $DATA; do $python datasets/check.py --data "$data" >&2; done # print errors and continue
    mkfifo "$work/slots" && exec 8<> "$work/slots" # a pool: each job takes a slot number and returns it
    for ((slot = 0; slot < JOBS && slot < 999; slot++)); do echo $slot >&8; done
    while read -r line; do
        read -r slot <&8
        { one "$slot" "$line" < /dev/null; echo "$slot" >&8; } &
    done < <(list)
    wait
    $python report.py runs || echo "$python report.py runs" >> "$failed"
    [ ! -s "$failed" ] || { echo "failed:"; cat "$failed"; exit 1; } >&2
fi
