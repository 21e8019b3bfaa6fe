#!/usr/bin/env bash
# Pre-train the paper's base model: 12 layers, hidden 768, 7,680 sequences a step.
#
#   sbatch slurm/pretrain_base.sh                                      4 nodes are the default: sbatch --nodes=8 ...
#   CORPUS=/data/corpus sbatch slurm/pretrain_base.sh --train.seed 1   settings by environment, then train.py's arguments
#   sbatch --array=1-20%1 slurm/pretrain_base.sh                       a chain of 20 jobs, where requeueing is not allowed;
#                                                                    those left over are cancelled at the end
#   for i in {1..20}; do ON_STOP=next sbatch --dependency=singleton slurm/pretrain_base.sh; done      a chain by dependency
#
# Before its time limit the job saves and is requeued. To stop it with a checkpoint: touch RUN_DIR/STOP. To save and
# requeue it now: scancel --signal=USR1 JOB. More settings: slurm/pretrain_common.sh, docs/operations.md.

#SBATCH --job-name=pmlm-base
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8         # one task per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8           # the rank and its loader processes
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300         # seconds before the limit; SLURM may send it a minute earlier
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A.log

set -euo pipefail

# ----------------------------------------------------------------------------------------------------------- settings

PROJECT=${PROJECT:-$SLURM_SUBMIT_DIR} # checkout of this repository, on a file system shared by all nodes
PRESET=${PRESET:-base}
RUN_DIR=${RUN_DIR:-runs/base}
DS_CONFIG=${DS_CONFIG:-ds_configs/base.json} # batch sizes, precision, ZeRO; the batch does not depend on the nodes
TP=${TP:-1}                            # tensor-parallel size; peers should share a node

# Software: a virtual environment (VENV, default PROJECT/.venv) or an image (CONTAINER); see slurm/common.sh.
# Load your cluster's modules here, or before sbatch, which passes the environment on.

# ----------------------------------------------------------------------------------------------------------------- run

cd "$PROJECT"
source slurm/pretrain_common.sh
