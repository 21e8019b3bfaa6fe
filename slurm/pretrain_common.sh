# shellcheck shell=bash
# Pre-train a model: the body of pretrain_base.sh and pretrain_large.sh, which set PROJECT, PRESET, RUN_DIR, DS_CONFIG
# and TP and `source` this file in PROJECT. "$@": further arguments of train.py.

CORPUS=${CORPUS:-data/corpus}
GRACE_S=${GRACE_S:-270}          # seconds from a signal to the end of the process; less than --signal's
MAX_FAILURES=${MAX_FAILURES:-10} # restarts of this job after failures

source slurm/common.sh
rendezvous
run_step "${PYTHON[@]}" train.py --preset "$PRESET" --corpus "$CORPUS" --run-dir "$RUN_DIR" --ds-config "$DS_CONFIG" \
    --parallel.tp "$TP" --train.grace-s "$GRACE_S" "$@"
restart_or_end "$code"
