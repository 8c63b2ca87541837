#!/usr/bin/env bash
# Every method on every benchmark found under data/, five seeds, with the published settings; then the report.
#   bash run_all.sh                                                    everything (finished runs are passed over,
#                                                                      stopped ones go on from their last evaluation)
#   DATA="brain liver" METHODS="padim patchcore" SEEDS="0 1" bash run_all.sh    a part of it
#   JOBS=4 bash run_all.sh                                             four runs at a time, dealt out over the GPUs
#   bash run_all.sh --list                                             only prints the commands, one a line
#   sbatch --array=1-480 run_all.sh                                    Slurm: array task n runs line n of the list
#   bash run_all.sh ablation [--list]                                  clip_recon's variants (thesis, Figures 4.6 to 4.8, and
#                                                                      'Ours' of Tables 4.1 to 4.4): runs/ablation/<variant>/
#   bash run_all.sh setup                                              only makes .venv and installs requirements.txt
# Each benchmark is checked once, by datasets/check.py; what it says is in the report.
# Where data/ holds no benchmark it makes the phantom and runs a short demonstration there (flags: `demo` below).
# DEMO=1 runs the short budgets on any benchmark; NET="--backbone mobilenet_v2 --weights FILE" gives their weights.
# FLAGS="--device cuda:1" adds flags to every command.
# A failing run is named at the end, does not stop the rest, and makes the exit status 1.
set -u
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")}" || exit 1  # Slurm runs a copy of this script from elsewhere
export python=.venv/bin/python

setup() {
    cmp -s requirements.txt .venv/installed.txt && return
    echo "installing requirements.txt into .venv (several GB, a few minutes)" >&2
    { [ -x $python ] || python3 -m venv .venv; } && $python -m pip install -q --disable-pip-version-check \
        -r requirements.txt && cp requirements.txt .venv/installed.txt ||
        { echo "error: .venv could not be made (see above); Python 3.11 or newer with venv is needed" >&2; return 1; }
}
exec 9< requirements.txt
flock 9  # of several tasks that start at once one makes .venv, and the phantom
setup || exit 1
[ "${1:-}" = setup ] && exit 0
ablation=
[ "${1:-}" = ablation ] && ablation=variants METHODS=clip_recon && shift

demo() { # the budgets of the demonstration: untrained or ImageNet weights, whichever can be had, and few epochs
    local net="${NET:---backbone mobilenet_v2 --weights auto}" small="--image-size 128 --batch-size 8"
    case $1 in
        padim | patchcore) echo "$net" ;;
        cfa) echo "$net --image-size 128 --epochs 2" ;;
        cflow) echo "$net $small --blocks 4 --epochs 2" ;;
        csflow) echo "$net $small --hidden 64 --epochs 4" ;;
        cutpaste) echo "$net $small --epochs 30 --freeze-epochs 3" ;;
        mkd) echo "$net $small --epochs 3" ;;
        rd4ad) echo "$net $small --epochs 3" ;;
        stfpm) echo "$net --image-size 128 --batch-size 4 --lr 0.8 --epochs 2" ;;
        simplenet) echo "$net --image-size 128 --epochs 5" ;;
        utrad) echo "$net --image-size 64 --width 64 --layers 1 --batch-size 2 --lr 3e-3 --epochs 3" ;;
        clip_recon) echo "$net --model tiny --clip-weights none --image-size 128 --da-levels 0 --prompt-tokens 4 --epochs 6 \
            --lr 1e-2 --patches-per-step 32" ;;
        clip_zeroshot) echo --model tiny --clip-weights none --image-size 128 --clip-size 128 ;;
        winclip) echo --model tiny --clip-weights none --image-size 128 --clip-size 128 --shots 4 ;;
        ddpm) echo --image-size 32 --base-channels 16 --multipliers 1 1 2 --attention 8 --noise-level 100 --sample-steps 4 \
            --lr 2e-3 --batch-size 4 --epochs 2 ;;
        anogan) echo --image-size 32 --width 16 --batch-size 16 --epochs 8 --lr 1e-3 --steps 30 --search-lr 0.02 ;;
        patchsvdd) echo --image-size 96 --batch-size 2 --repeat 1 --epochs 1 --bank 2000 ;;
        deepsvdd) echo --ae-epochs 5 --ae-lr 1e-4 --ae-batch-size 20 --epochs 10 --batch-size 20 ;;
        draem) echo --textures images --image-size 64 --width 16 --epochs 3 --lr 1e-3 ;;
        fanogan) echo --image-size 32 --gan-epochs 8 --epochs 8 ;;
        ganomaly) echo --image-size 32 --features 32 --epochs 20 ;;
    esac
}

benchmarks='import common
print(*[name for name in common.NAMES if name != "phantom" and common.named_folder(name, "data")])'
: "${DATA:=$($python -c "$benchmarks")}" "${METHODS:=$(basename -s .py methods/*.py | xargs)}" "${JOBS:=1}"
if [ -z "$DATA" ]; then
    echo "no benchmark under data/ (see datasets/): a short demonstration on the phantom, one seed" >&2
    $python datasets/phantom.py >&2 || exit 1
    DATA=phantom
fi
exec 9<&-
[ "$DATA" = phantom ] && : "${SEEDS:=0}"
: "${SEEDS:=0 1 2 3 4}"

variants() { # of clip_recon, a line each
    printf -- '%s\n' --base --prompt-tokens\ {8,24,32} --layers\ {1,2,3,4,'1 2','1 2 3','2 3 4','3 4'} --da-levels\ {0,1,2,4} \
        --modules\ {prompts,adapter} '--frame bare' '--join append' '--loss layer' '--blocks first' '--da-sum saturate' \
        '--smooth-sigma 4' --adapter-reduction\ {4,1,0.25} --backbone\ resnet{18,50}
}

list() {
    local data method seed variant demo
    for data in $DATA; do
        for method in $METHODS; do
            demo=$([ "$data" = phantom ] || [ -n "${DEMO:-}" ] && demo "$method")
            while read -r variant; do
                out=${variant#--} out=${ablation:+--out runs/ablation/${out// /_}}
                for seed in $SEEDS; do # unquoted: one space between words
                    echo $python methods/$method.py --data $data --seed $seed $out $demo ${FLAGS:-} ${variant#--base}
                done
            done < <(${ablation:-echo})
        done
    done
}

one() { # runs one line of the list, and notes it in the file $failed if it fails
    read -r _ script _ data _ seed _ <<< "$1"
    local out=runs
    [[ $1 =~ --out\ ([^ ]+) ]] && out=${BASH_REMATCH[1]}
    [ -e "$out/$(basename "$data")/$(basename -s .py "$script")/seed$seed/results.json" ] && return
    [ "$gpus" -gt 1 ] && export CUDA_VISIBLE_DEVICES=$((SLOT % gpus))
    $1 || { echo "$1" >> "$failed"; return 1; }
}
export -f one
gpus=$(nvidia-smi -L 2> /dev/null | wc -l) failed=$(mktemp)
export gpus failed SLOT=0
trap 'rm -f "$failed"' EXIT
trap 'exit 130' INT
[ "$JOBS" -gt 1 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + JOBS - 1) / JOBS))}

if [ "${1:-}" = --list ]; then
    list
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    line=$(list | sed -n "${SLURM_ARRAY_TASK_ID}p")
    [ -n "$line" ] || { echo "error: the list has $(list | wc -l) lines, none $SLURM_ARRAY_TASK_ID" >&2; exit 2; }
    gpus=0 one "$line" # Slurm deals out the GPUs
else
    for data in $DATA; do $python datasets/check.py --data "$data" >&2; done # errors are shown, and the runs go on
    list | xargs -d '\n' -P "$JOBS" -I{} --process-slot-var=SLOT bash -c 'one "$1"' _ {}
    $python report.py runs || echo "$python report.py runs" >> "$failed"
    [ ! -s "$failed" ] || { echo "failed:"; cat "$failed"; exit 1; } >&2
fi
