#!/usr/bin/env bash
# From the competition's files to the submission: 00, then 01 for each fold, then 02 and 03.
#
#   bash run.sh --exp base
#   bash run.sh --exp convnext --model convnext_large.fb_in22k_ft_in1k --epochs 3 --batch-size 8 --lr 7e-5
#   PREPARE="--folds 10" INFER="--tta none" bash run.sh --exp quick
#
# The flags are those of 01_train_fold.py; --input, --output, --exp and --size reach the scripts that need them. Flags of
# 00 or 03 alone go into PREPARE and INFER. Finished folds are left alone, so that a run that was stopped goes on.
set -euo pipefail
trap 'trap - INT; kill -INT $$' INT # Ctrl-C ends the loop even where it meets a script that is just ending well
cd "$(dirname "$0")"
python=${PYTHON:-python}

exp=base output=output folders=() size=()
flags=("$@")
while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
    --input) folders+=(--input "${2:?--input needs a folder}") && shift ;;
    --output) output=${2:?--output needs a folder} && folders+=(--output "$2") && shift ;;
    --exp) exp=${2:?--exp needs a name} && shift ;;
    --size) size=(--size "${2:?--size needs a number}") && shift ;;
    --fold) echo "run.sh: error: it trains every fold; for one, python 01_train_fold.py --fold K" >&2 && exit 2 ;;
    esac
    shift
done

"$python" 01_train_fold.py --fold 0 --print-config "${flags[@]}" >/dev/null # a mistyped flag ends it here
# shellcheck disable=SC2086 # PREPARE and INFER hold several words
"$python" 00_prepare.py "${folders[@]}" "${size[@]}" ${PREPARE:-}
folds=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["folds"])' "$output/prepared/prepared.json")
for ((fold = 0; fold < folds; fold++)); do
    "$python" 01_train_fold.py --fold "$fold" "${flags[@]}"
done
"$python" 02_oof.py "$exp" "${folders[@]}"
# shellcheck disable=SC2086
"$python" 03_infer.py "$exp" "${folders[@]}" ${INFER:-}
