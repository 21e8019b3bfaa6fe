#!/usr/bin/env bash
# Pre-train the large model: 24 layers, hidden 1024, tensor parallel within pairs of GPUs.
#
#   sbatch slurm/pretrain_large.sh                                    8 nodes are the default: sbatch --nodes=4 ...
#   CORPUS=/data/corpus sbatch slurm/pretrain_large.sh --train.seed 1   settings below by environment, train.py's after it
#   sbatch --array=1-20%1 slurm/pretrain_large.sh                     20 jobs one after another, where requeueing is not
#                                                                    allowed; those left over end when training is done
#   for i in {1..20}; do ON_STOP=next sbatch --dependency=singleton slurm/pretrain_large.sh; done      the same by dependency
#
# Before its time limit the job saves and is requeued. To end it by hand, with a checkpoint: touch RUN_DIR/STOP, or
# `scancel --signal=USR1 JOB` to save and be requeued now. docs/operations.md has the rest.

#SBATCH --job-name=pmlm-large
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8         # one task per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8           # the rank and its loader processes
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300         # this many seconds before the limit; a minute earlier it may be
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A.log

set -euo pipefail

# ----------------------------------------------------------------------------------------------------------- settings

PROJECT=${PROJECT:-$SLURM_SUBMIT_DIR} # checkout of this repository, on a file system that all nodes see
PRESET=${PRESET:-large}
CORPUS=${CORPUS:-data/corpus}
RUN_DIR=${RUN_DIR:-runs/large}
DS_CONFIG=${DS_CONFIG:-ds_configs/large.json} # batch sizes, precision, ZeRO; the batch does not depend on the nodes
TP=${TP:-2}                            # tensor-parallel size; peers should share a node
GRACE_S=${GRACE_S:-270}               # seconds from a signal to the end of the process; less than --signal's
MAX_FAILURES=${MAX_FAILURES:-10}      # restarts after failures in the life of this job
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

run_step "${PYTHON[@]}" train.py --preset "$PRESET" --corpus "$CORPUS" --run-dir "$RUN_DIR" --ds-config "$DS_CONFIG" \
    --parallel.tp "$TP" --train.grace-s "$GRACE_S" "$@"
next_life "$code"
