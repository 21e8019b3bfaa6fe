#!/usr/bin/env bash
# Fine-tune a pre-trained model on a task, on one node or several.
#
#   RUN_DIR=runs/sst2 sbatch slurm/finetune.sh ARGUMENTS OF pmlm finetune
#   RUN_DIR=runs/squad sbatch --nodes=2 slurm/finetune.sh ...        1 node is the default
#
# `pmlm finetune --help` shows the arguments. RUN_DIR holds the restart history; pass the same folder to the command.
# A preempted or failed job is requeued by the same rule as pre-training: docs/operations.md.

#SBATCH --job-name=pmlm-finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8         # one task per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8           # the rank and its loader processes
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120         # seconds before the limit; SLURM may send it a minute earlier
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A.log

set -euo pipefail

# ----------------------------------------------------------------------------------------------------------- settings

PROJECT=${PROJECT:-$SLURM_SUBMIT_DIR} # checkout of this repository, on a file system shared by all nodes
RUN_DIR=${RUN_DIR:-runs/finetune}
MAX_FAILURES=${MAX_FAILURES:-3}       # restarts of this job after failures

# Software: a virtual environment (VENV, default PROJECT/.venv) or an image (CONTAINER); see slurm/common.sh.
# Load your cluster's modules here, or before sbatch, which passes the environment on.

# ----------------------------------------------------------------------------------------------------------------- run

cd "$PROJECT"
source slurm/common.sh
rendezvous
run_step "${PYTHON[@]}" -m pmlm_dist.cli finetune "$@"
restart_or_end "$code"
