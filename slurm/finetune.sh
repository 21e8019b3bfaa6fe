#!/usr/bin/env bash
# Fine-tune a pre-trained model on a task, on one node or several.
#
#   RUN_DIR=runs/sst2 sbatch slurm/finetune.sh ARGUMENTS OF pmlm finetune
#   RUN_DIR=runs/squad sbatch --nodes=2 slurm/finetune.sh ...        1 node is the default
#
# `pmlm finetune --help` shows the arguments. RUN_DIR is where this script counts restarts; tell the command the same
# folder by its own argument. A job that is preempted or fails is requeued by the same rule as pre-training;
# docs/operations.md has the rest.

#SBATCH --job-name=pmlm-finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8         # one task per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8           # the rank and its loader processes
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120         # this many seconds before the limit; a minute earlier it may be
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A.log

set -euo pipefail

# ----------------------------------------------------------------------------------------------------------- settings

PROJECT=${PROJECT:-$SLURM_SUBMIT_DIR} # checkout of this repository, on a file system that all nodes see
RUN_DIR=${RUN_DIR:-runs/finetune}
MAX_FAILURES=${MAX_FAILURES:-3}       # restarts after failures in the life of this job
MAX_IDLE_PREEMPTIONS=${MAX_IDLE_PREEMPTIONS:-3}
ON_STOP=${ON_STOP:-${SLURM_ARRAY_JOB_ID:+next}} # `next`: leave going on to the next job of an array or chain
ON_STOP=${ON_STOP:-requeue}

# Software: a virtual environment (VENV, default PROJECT/.venv) or an image (CONTAINER); see slurm/common.sh.
# Modules that your cluster wants are loaded here, or before sbatch, which passes the environment on.

# NCCL finds fast networks by itself. What sites have to set, in the environment or here:
#   NCCL_SOCKET_IFNAME=ib0, GLOO_SOCKET_IFNAME=ib0   which interface TCP uses, where nodes have several
#   NCCL_IB_HCA=mlx5                                 which InfiniBand adapters
#   NCCL_NET_GDR_LEVEL=PHB                           how far from a GPU an adapter may be for direct access
#   NCCL_CROSS_NIC=0                                 for rail-optimised fabrics
#   FI_PROVIDER=efa, or cxi on Slingshot             with the aws-ofi-nccl plugin on LD_LIBRARY_PATH
#   NCCL_DEBUG=INFO                                  says what was found
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# ----------------------------------------------------------------------------------------------------------------- run

cd "$PROJECT"
source slurm/common.sh
rendezvous
echo "$(date -Is) job $SLURM_JOB_ID, life ${SLURM_RESTART_COUNT:-0}, nodes $SLURM_JOB_NODELIST, rank 0 on $MASTER_ADDR"

run_step "${PYTHON[@]}" -m pmlm_dist.cli finetune "$@"
next_life "$code"
