#!/usr/bin/env bash
# From the competition's files to the submission: 00, then 01 for all folds, then 02 and 03.
#
#   bash run.sh --exp base
#   bash run.sh --exp convnext @recipes/convnext.args
#   bash run.sh --exp base --parallel --stop-after 8.5h     # shares the folds between the GPUs; ends after 8.5 hours
#   PREPARE="--folds 10" INFER="--batch-size 8" bash run.sh --exp quick
#
# The flags are those of 01_train_fold.py, which predicts the test images after each fold (--predict). 00, 02 and 03 get
# --input, --output, --exp and --size from them, 03 also --device, --amp, --compile, --workers and --deterministic.
# PREPARE and INFER hold further flags of 00 and 03. --stop-after counts from the start of 00, with --parallel from the
# start of the training: leave time for 02 and 03. After a stop the same command resumes, and leaves finished folds
# alone. kit/pipeline.py does the work, in one process.
set -euo pipefail
cd "$(dirname "$0")"
exec "${PYTHON:-python}" -m kit.pipeline "$@"
