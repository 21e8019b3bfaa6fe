#!/usr/bin/env bash
# Prepare a corpus on many cores: raw text to shuffled shards. The result does not depend on their number.
#
#   SOURCE='texts/*.jsonl' sbatch slurm/prepare_corpus.sh
#   SOURCE='texts/*.txt.gz' OUTPUT=/data/corpus sbatch --nodes=8 slurm/prepare_corpus.sh --vocabulary vocab.txt
#
# A killed job leaves no manifest; submitted again, it resumes. A job that is complete does nothing.

#SBATCH --job-name=pmlm-corpus
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=32        # MPI ranks: one a core
#SBATCH --cpus-per-task=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A.log

set -euo pipefail

# ----------------------------------------------------------------------------------------------------------- settings

PROJECT=${PROJECT:-$SLURM_SUBMIT_DIR} # checkout of this repository, on a file system shared by all nodes
SOURCE=${SOURCE:?files or a quoted glob: .txt, .jsonl, .parquet, also .gz or .zst, or an address: docs/data.md}
OUTPUT=${OUTPUT:-data/corpus}         # on a file system shared by all nodes
VOCABULARY_SIZE=${VOCABULARY_SIZE:-30522} # of the trained vocabulary; without effect with --vocabulary

# Software: a virtual environment (VENV, default PROJECT/.venv) or an image (CONTAINER); see slurm/common.sh.
# MPIRUN starts one rank a task. The environment's own Open MPI takes nodes and tasks from SLURM. For an MPI of the site
# (with mpi4py built on it) it is usually MPIRUN='srun --mpi=pmix'.
PATH=${VENV:-$PROJECT/.venv}/bin:$PATH
MPIRUN=${MPIRUN:-mpirun --bind-to none}

# ----------------------------------------------------------------------------------------------------------------- run

cd "$PROJECT"
source slurm/common.sh
vocabulary=(--vocabulary-size "$VOCABULARY_SIZE")
if [[ " $* " == *" --vocabulary"* ]]; then vocabulary=(); fi

$MPIRUN "${PYTHON[@]}" -m pmlm_dist.cli prepare-corpus --source "$SOURCE" --output "$OUTPUT" "${vocabulary[@]}" "$@"
