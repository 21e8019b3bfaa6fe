# shellcheck shell=bash
# Shared by the batch scripts, which `source` it: Python, fabric, rendezvous, a job step that forwards signals, restarts.
#
# sbatch runs a copy of the script in a spool folder, so this file is found through PROJECT. #SBATCH lines stay in each
# script, because sbatch reads them there.

# ------------------------------------------------------------------------------------------------------------- Python

# PYTHON: the command that runs Python, in the container image CONTAINER if it is set, else in the environment VENV.
# CONTAINER_RUN: the command that runs an image on your cluster.
# shellcheck disable=SC2034  # used by the scripts
PYTHON=("${VENV:-$PROJECT/.venv}/bin/python")
if [[ -n ${CONTAINER:-} ]]; then
    read -ra PYTHON <<<"${CONTAINER_RUN:-apptainer exec --nv --bind $PROJECT}"
    PYTHON+=("$CONTAINER" python)
fi

# ------------------------------------------------------------------------------------------------------------- fabric

# NCCL finds fast networks by itself. Settings that some sites need, in the environment or here:
#   NCCL_SOCKET_IFNAME=ib0, GLOO_SOCKET_IFNAME=ib0   interface of TCP, on nodes with several
#   NCCL_IB_HCA=mlx5                                 InfiniBand adapters
#   NCCL_NET_GDR_LEVEL=PHB                           largest distance between a GPU and an adapter for direct access
#   NCCL_CROSS_NIC=0                                 for rail-optimized fabrics
#   FI_PROVIDER=efa, or cxi on Slingshot             with the aws-ofi-nccl plugin on LD_LIBRARY_PATH
#   NCCL_DEBUG=INFO                                  log the detected network
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --------------------------------------------------------------------------------------------------------- rendezvous

# Rank 0 is on the first node of the list. Where node names do not resolve, use SLURM's address of the node.
# The port is derived from the job id (pmlm_dist/launch_environment.py) unless MASTER_PORT is set.
rendezvous() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if ! getent hosts "$first" >/dev/null; then
        first=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    fi
    export MASTER_ADDR=${MASTER_ADDR:-$first}
    echo "$(date -Is) job $SLURM_JOB_ID, attempt ${SLURM_RESTART_COUNT:-0}, nodes $SLURM_JOB_NODELIST, rank 0 on $MASTER_ADDR"
}

# ------------------------------------------------------------------------------------------------------------ signals

# SLURM sends USR1 to this shell some time before the limit (--signal=B:USR1@N). It is forwarded to the ranks, which
# save and exit with code 75. SLURM sends TERM to shell and ranks when the job is cancelled, preempted or requeued: the
# ranks save if the time suffices, the shell waits for them and leaves the rest to SLURM.
step_pid='' usr1_received='' term_received=''
on_usr1() {
    usr1_received=yes
    echo "$(date -Is) USR1: the time limit is near"
    if [[ -n $step_pid ]]; then kill -USR1 "$step_pid" 2>/dev/null || true; fi
}
on_term() {
    term_received=yes
    echo "$(date -Is) TERM: the job is cancelled, preempted or requeued"
}
trap on_usr1 USR1
trap on_term TERM

# Run a command on all tasks of the job; its exit code in `code`. In the background, because bash runs traps during
# `wait`, but not during a command in the foreground.
# --wait: after the end of one rank the others may still write their last lines; ranks that hang then are killed.
run_step() {
    local before
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not inherit it from sbatch
    srun --mpi=none --kill-on-bad-exit=0 --wait=60 --unbuffered "$@" </dev/null &
    step_pid=$!
    [[ -z $usr1_received ]] || kill -USR1 "$step_pid" 2>/dev/null || true # it came before the step started
    while :; do
        before=$usr1_received$term_received
        wait "$step_pid" && code=0 || code=$?
        [[ $before != "$usr1_received$term_received" ]] || break # `wait` returned for the end, not for a signal
    done
    step_pid=''
}

# ----------------------------------------------------------------------------------------------------------- restarts

EXIT_BAD_CONFIGURATION=2
EXIT_PREEMPTED=75

MAX_PREEMPTIONS_WITHOUT_PROGRESS=${MAX_PREEMPTIONS_WITHOUT_PROGRESS:-3}
ON_STOP=${ON_STOP:-${SLURM_ARRAY_JOB_ID:+next}} # `next`: the next job of an array or chain resumes the run
ON_STOP=${ON_STOP:-requeue}

# After the ranks have ended with `code`: requeue the job, leave the run to the next job of the chain, or end.
# pmlm_dist/supervision/restart.py has the rule, exit_codes.py beside it the codes. In short: complete or misconfigured,
# end; preempted, restart, up to MAX_PREEMPTIONS_WITHOUT_PROGRESS times in a row without progress; failed, restart, up
# to MAX_FAILURES times, and only after progress since the last restart.
restart_or_end() {
    local code=$1 restarts
    if [[ -n $term_received ]]; then exit "$code"; fi
    # After the death of a node's daemon SLURM gives the job other nodes while this shell and its ranks still run.
    restarts=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p') || true
    if ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0})); then
        echo "$(date -Is) SLURM has restarted this job, attempt $restarts: nothing left to do for attempt ${SLURM_RESTART_COUNT:-0}"
        exit "$code"
    fi
    if [[ -n $usr1_received && $code -ne 0 && $code -ne $EXIT_BAD_CONFIGURATION ]]; then code=$EXIT_PREEMPTED; fi
    "${PYTHON[@]}" -m pmlm_dist.supervision.restart decide "$RUN_DIR" --key "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" \
        --code "$code" --max-failures "$MAX_FAILURES" \
        --max-preemptions-without-progress "$MAX_PREEMPTIONS_WITHOUT_PROGRESS" || end_chain "$code"
    if [[ $ON_STOP == next ]]; then exit 0; fi
    scontrol requeue "$SLURM_JOB_ID"
    exit "$EXIT_PREEMPTED"
}

# Cancel the pending jobs of an array: they have nothing left to do.
end_chain() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then scancel --quiet --state=PENDING "$SLURM_ARRAY_JOB_ID" || true; fi
    exit "$1"
}
