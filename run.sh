#!/usr/bin/env bash
# From the competition's files to the submission: 00, then 01 for all folds, then 02 and 03.
#
#   bash run.sh --exp base
#   bash run.sh --exp convnext @recipes/convnext.args
#   bash run.sh --exp base --parallel --stop-after 8.5h     # shares the folds between the GPUs; ends before the session
#   PREPARE="--folds 10" INFER="--batch-size 8" bash run.sh --exp quick
#
# The flags are those of 01_train_fold.py. 00, 02 and 03 are told the --input, --output, --exp and --size among them; an
# @FILE must not hold --input or --output, which 01 alone would see. Flags of 00 or 03 alone go into PREPARE and INFER.
# --stop-after counts from the start of the training: leave time for 00, 02 and 03. The same command goes on after a
# stop, since finished folds are left alone. Bash 3.2, which macOS has, is enough.
# shellcheck disable=SC2086 # PREPARE and INFER hold several words
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}

jobs=() # of --parallel
end() { # Ctrl-C ends the run even where it meets a script that is just ending well
    trap - INT TERM
    for job in ${jobs[@]+"${jobs[@]}"}; do kill -TERM -- "-$job" 2>/dev/null || :; done
    wait
    kill "-$1" $$
}
trap 'end INT' INT
trap 'end TERM' TERM

output=output folders=() parallel='' flags=()
for word in "$@"; do if [[ $word == --parallel ]]; then parallel=yes; else flags+=("$word"); fi; done
set -- ${flags[@]+"${flags[@]}"}
while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
    --input) folders+=(--input "${2:?--input needs a folder}") && shift ;;
    --output) output=${2:?--output needs a folder} && folders+=(--output "$2") && shift ;;
    --fold) echo "run.sh: error: it trains every fold; for one, python 01_train_fold.py --fold K" >&2 && exit 2 ;;
    esac
    shift
done

train() { "$python" 01_train_fold.py ${flags[@]+"${flags[@]}"} --fold "$@"; }

# Asks 01 what it would do, also by an @FILE: a mistyped flag ends the run here, before any work.
config=$(train all --print-config)
json() { # a value of the JSON on stdin; of a list, a line each
    "$python" -c 'import json, sys; v = json.load(sys.stdin)[sys.argv[1]]; print(*v if isinstance(v, list) else [v], sep="\n")' "$1"
}
exps=() names=$(json exps <<<"$config") size=$(json size <<<"$config")
while IFS= read -r exp; do exps+=("$exp"); done <<<"$names"
"$python" 00_prepare.py ${folders[@]+"${folders[@]}"} --size "$size" ${PREPARE:-}
if [[ $parallel ]]; then
    folds=$(json folds <"$output/prepared/prepared.json")
    visible=${CUDA_VISIBLE_DEVICES-$("$python" -c 'import torch; print(*range(torch.cuda.device_count()), sep=",")')}
    IFS=, read -ra gpus <<<"${visible:-none}"
    set -m # each job a process group of its own, so that `end` reaches all of it
    for ((gpu = 0; gpu < ${#gpus[@]} && gpu < folds; gpu++)); do
        share=() # GPU i of n takes folds i, i + n, i + 2n …
        for ((fold = gpu; fold < folds; fold += ${#gpus[@]})); do share+=("$fold"); done
        {
            if [[ $visible ]]; then export CUDA_VISIBLE_DEVICES=${gpus[gpu]}; fi
            train "${share[@]}" | cat # two progress bars on one terminal would be unreadable
        } &
        jobs+=($!)
    done
    status=0
    for job in "${jobs[@]}"; do wait "$job" || status=$?; done # a fold that fails doesn't end the others
    jobs=()
    ((status == 0)) || exit "$status"
else
    train all
fi
"$python" 02_oof.py "${exps[@]}" ${folders[@]+"${folders[@]}"}
"$python" 03_infer.py "${exps[@]}" ${folders[@]+"${folders[@]}"} ${INFER:-}
