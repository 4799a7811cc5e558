#!/usr/bin/env bash
# From the competition's files to the submission: 00, then 01 for all folds, then 02 and 03.
#
#   bash run.sh --exp base
#   bash run.sh --exp convnext @recipes/convnext.args
#   bash run.sh --exp base --parallel --stop-after 8.5h     # shares the folds between the GPUs; ends before the session
#   PREPARE="--folds 10" INFER="--batch-size 8" bash run.sh --exp quick
#
# The flags are those of 01_train_fold.py; 00, 02 and 03 get the --input, --output, --exp, --size and --device among them.
# Flags of 00 or 03 alone go into PREPARE and INFER. --stop-after counts from the start of 00; with --parallel, from that
# of the training: leave time for what follows. The same command goes on after a stop, since finished folds are left
# alone. kit/pipeline.py does the work, in one process.
set -euo pipefail
cd "$(dirname "$0")"
exec "${PYTHON:-python}" -m kit.pipeline "$@"
