#!/usr/bin/env bash
# Every method on every benchmark found under data/, five seeds, with the published settings; then the table.
#   bash run_all.sh                                                    everything (finished runs are passed over)
#   DATA="brain liver" METHODS="padim patchcore" SEEDS="0 1" bash run_all.sh    a part of it
#   bash run_all.sh setup                                              only makes .venv and installs requirements.txt
# Where data/ holds no benchmark it makes the phantom and runs a short demonstration there (flags: `demo` below).
# A failing run is named at the end, does not stop the rest, and makes the exit status 1.
set -u
cd "$(dirname "$0")" || exit 1
python=.venv/bin/python

if ! cmp -s requirements.txt .venv/installed.txt; then
    echo "installing requirements.txt into .venv (several GB, a few minutes)"
    { [ -x $python ] || python3 -m venv .venv; } && $python -m pip install -q --disable-pip-version-check \
        -r requirements.txt && cp requirements.txt .venv/installed.txt ||
        { echo "error: .venv could not be made (see above); Python 3.11 or newer with venv is needed" >&2; exit 1; }
fi
[ "${1:-}" = setup ] && exit 0

demo() { # the budgets of the demonstration: untrained or ImageNet weights, whichever can be had, and few epochs
    local net="--backbone mobilenet_v2 --weights auto" small="--image-size 128 --batch-size 8"
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
        deepsvdd) echo --ae-epochs 5 --ae-lr 1e-4 --ae-batch-size 20 --epochs 10 --batch-size 20 ;;
        draem) echo --textures images --image-size 64 --width 16 --epochs 3 --lr 1e-3 ;;
        fanogan) echo --image-size 32 --gan-epochs 8 --epochs 8 ;;
        ganomaly) echo --image-size 32 --features 32 --epochs 20 ;;
    esac
}

benchmarks='import common, pathlib
print(*[n for n, folders in common.NAMES.items() if n != "phantom" and common._child(pathlib.Path("data"), *folders)])'
: "${DATA:=$($python -c "$benchmarks")}" "${METHODS:=$(basename -s .py methods/*.py | xargs)}"
if [ -z "$DATA" ]; then
    echo "no benchmark under data/ (see datasets/): a short demonstration on the phantom, one seed"
    $python datasets/phantom.py || exit 1
    DATA=phantom
fi
[ "$DATA" = phantom ] && : "${SEEDS:=0}"
: "${SEEDS:=0 1 2 3 4}"

failed=()
for data in $DATA; do
    for method in $METHODS; do
        for seed in $SEEDS; do
            [ -e "runs/$data/$method/seed$seed/results.json" ] && continue
            flags=$([ "$data" = phantom ] && demo "$method")
            # shellcheck disable=SC2086 # the flags are words
            $python "methods/$method.py" --data "$data" --seed "$seed" $flags || failed+=("$data/$method/seed$seed")
        done
    done
done
$python report.py runs || failed+=(report)
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
