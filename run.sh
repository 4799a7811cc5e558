#!/usr/bin/env bash
# From the competition's files to the submission: 00, then 01 for each fold, then 02 and 03.
#
#   bash run.sh --exp base
#   bash run.sh --exp convnext --model convnext_large.fb_in22k_ft_in1k --epochs 3 --batch-size 8 --lr 7e-5
#   bash run.sh --exp base --parallel --stop-after 8.5h     # a fold on each visible GPU; ends before the session does
#   PREPARE="--folds 10" INFER="--tta none" bash run.sh --exp quick
#
# The flags are those of 01_train_fold.py; --input, --output, --exp and --size reach the scripts that need them. Flags of
# 00 or 03 alone go into PREPARE and INFER. Finished folds are left alone, so that a run that was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}

jobs=() # of --parallel
end() { # Ctrl-C ends the loop even where it meets a script that is just ending well
    trap - INT TERM
    for job in "${jobs[@]}"; do kill -TERM -- "-$job" 2>/dev/null || :; done
    wait
    kill "-$1" $$
}
trap 'end INT' INT
trap 'end TERM' TERM

exp=base output=output folders=() size=() parallel='' stop_after='' flags=()
for word in "$@"; do if [[ $word == --parallel ]]; then parallel=yes; else flags+=("$word"); fi; done
set -- "${flags[@]}"
while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
    --input) folders+=(--input "${2:?--input needs a folder}") && shift ;;
    --output) output=${2:?--output needs a folder} && folders+=(--output "$2") && shift ;;
    --exp) exp=${2:?--exp needs a name} && shift ;;
    --size) size=(--size "${2:?--size needs a number}") && shift ;;
    --stop-after) stop_after=${2:?--stop-after needs a time} && shift ;;
    --fold) echo "run.sh: error: it trains every fold; for one, python 01_train_fold.py --fold K" >&2 && exit 2 ;;
    esac
    shift
done

prepare() {
    "$python" 01_train_fold.py --fold 0 --print-config "${flags[@]}" >/dev/null # a mistyped flag ends it here
    # shellcheck disable=SC2086 # PREPARE and INFER hold several words
    "$python" 00_prepare.py "${folders[@]}" "${size[@]}" ${PREPARE:-}
}
count() {
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["folds"])' "$output/prepared/prepared.json"
}
train() { # fold: with what is left of --stop-after, which counts from the start of this script
    local left=()
    if [[ $stop_after ]]; then
        left=(--stop-after "$(awk -v t="$stop_after" -v gone=$SECONDS 'BEGIN {
            seconds = t * (t ~ /h$/ ? 3600 : t ~ /m$/ ? 60 : 1) - gone; print (seconds > 1 ? seconds : 1) "s" }')")
    fi
    "$python" 01_train_fold.py "${flags[@]}" --fold "$1" "${left[@]}"
}

finish() {
    "$python" 02_oof.py "$exp" "${folders[@]}"
    # shellcheck disable=SC2086
    "$python" 03_infer.py "$exp" "${folders[@]}" ${INFER:-}
}

if [[ ${FOLDKIT_STEP:-} ]]; then # a part alone: slurm/folds.sbatch says which, "train 2" for one
    $FOLDKIT_STEP
    exit
fi
prepare
folds=$(count)
if [[ $parallel ]]; then
    visible=${CUDA_VISIBLE_DEVICES-$("$python" -c 'import torch; print(*range(torch.cuda.device_count()), sep=",")')}
    IFS=, read -ra gpus <<<"${visible:-none}"
    set -m # each job a process group of its own, so that `end` reaches all of it
    for gpu in "${!gpus[@]}"; do
        # every GPU takes each so-manieth fold; cat, since two progress bars on one terminal would be unreadable
        {
            [[ $visible ]] && export CUDA_VISIBLE_DEVICES=${gpus[gpu]}
            for ((fold = gpu; fold < folds; fold += ${#gpus[@]})); do train "$fold"; done | cat
        } &
        jobs+=($!)
    done
    status=0
    for job in "${jobs[@]}"; do wait "$job" || status=$?; done # a fold that fails doesn't end the others
    jobs=()
    ((status == 0)) || exit "$status"
else
    for ((fold = 0; fold < folds; fold++)); do train "$fold"; done
fi
finish
