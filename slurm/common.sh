# shellcheck shell=bash
# What the batch scripts share; read by them with `source`. From top to bottom: where Python is, how ranks find one
# another, one step of Slurm that hears signals, and what becomes of the job afterwards.
#
# sbatch runs a copy of a script from a folder of its own, so this file is found through PROJECT. What sites change
# (#SBATCH lines, which sbatch reads from the script alone, settings, the fabric's variables) stands in each script and
# not here, although some of it is the same: a script is read, copied and changed by itself.

# ------------------------------------------------------------------------------------------------------------- Python

# PYTHON: the command that runs Python, in the container image CONTAINER if it is set, else in the environment VENV.
# CONTAINER_RUN is what runs an image on your cluster.
# shellcheck disable=SC2034  # the scripts use it
PYTHON=("${VENV:-$PROJECT/.venv}/bin/python")
if [[ -n ${CONTAINER:-} ]]; then
    read -ra PYTHON <<<"${CONTAINER_RUN:-apptainer exec --nv --bind $PROJECT}"
    PYTHON+=("$CONTAINER" python)
fi

# --------------------------------------------------------------------------------------------------------- rendezvous

# Rank 0 is on the first node of the list. Where nodes' names do not resolve, Slurm's own address of the node is taken.
# The port follows from the job's id (pmlm_dist/launch_environment.py) unless MASTER_PORT is set.
rendezvous() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if ! getent hosts "$first" >/dev/null; then
        first=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    fi
    export MASTER_ADDR=${MASTER_ADDR:-$first}
}

# ------------------------------------------------------------------------------------------------------------ signals

# Slurm sends USR1 to this shell some time before the limit (--signal=B:USR1@N): it is passed on to the ranks, which
# save and end with code 75. It sends TERM to shell and ranks alike when the job is cancelled, preempted or requeued: the
# ranks save, if they are given the time, and the shell waits for them, but leaves what comes next to Slurm.
step='' asked='' cancelled=''
on_usr1() {
    asked=yes
    echo "$(date -Is) USR1: the time is nearly over"
    if [[ -n $step ]]; then kill -USR1 "$step" 2>/dev/null || true; fi
}
on_term() {
    cancelled=yes
    echo "$(date -Is) TERM: the job is being ended from outside"
}
trap on_usr1 USR1
trap on_term TERM

# Run a command on all tasks of the job; its exit code in `code`. In the background, because a shell hears signals
# while it waits, not while a command runs in front.
# --wait: when one rank has gone, the others may still be writing their last lines; what hangs then is killed.
run_step() {
    local before
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch by itself since 22.05
    srun --mpi=none --kill-on-bad-exit=0 --wait=60 --unbuffered "$@" </dev/null &
    step=$!
    [[ -z $asked ]] || kill -USR1 "$step" 2>/dev/null || true # it came before there was anybody to tell
    while :; do
        before=$asked$cancelled
        wait "$step" && code=0 || code=$?
        [[ $before != "$asked$cancelled" ]] || break # `wait` returned for the end, not for a signal
    done
    step=''
}

# ------------------------------------------------------------------------------------------------------- what is next

EXIT_BAD_CONFIGURATION=2
EXIT_PREEMPTED=75

# What the job does after its ranks have ended with `code`: a new life, the next job of the chain, or the end.
# The rule is pmlm_dist/supervision/restart.py's, the meaning of the codes that of exit_codes.py beside it. In short: done
# or set wrongly is the end; told to stop is a new life, unless MAX_IDLE_PREEMPTIONS lives in a row gained no step; a
# failure is a new life, at most MAX_FAILURES times, and only if steps were gained since the last one.
next_life() {
    local code=$1 restarts
    if [[ -n $cancelled ]]; then exit "$code"; fi
    # Where a node's daemon has died, Slurm gives the job other nodes while this shell and its ranks are still there.
    restarts=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p') || true
    if ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0})); then
        echo "$(date -Is) Slurm has started this job again, life $restarts: nothing is left to do for life ${SLURM_RESTART_COUNT:-0}"
        exit "$code"
    fi
    if [[ -n $asked && $code -ne 0 && $code -ne $EXIT_BAD_CONFIGURATION ]]; then code=$EXIT_PREEMPTED; fi
    "${PYTHON[@]}" -m pmlm_dist.supervision.restart decide "$RUN_DIR" --key "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" \
        --code "$code" --max-failures "$MAX_FAILURES" --max-idle-preemptions "$MAX_IDLE_PREEMPTIONS" || end_chain "$code"
    if [[ $ON_STOP == next ]]; then exit 0; fi
    scontrol requeue "$SLURM_JOB_ID"
    exit "$EXIT_PREEMPTED"
}

# The jobs of an array that have not begun have nothing left to do.
end_chain() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then scancel --quiet --state=PENDING "$SLURM_ARRAY_JOB_ID" || true; fi
    exit "$1"
}
