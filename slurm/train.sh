#!/usr/bin/env bash
# Train any recipe on any number of nodes; one task is one rank, on one GPU or one CPU.
#
#   sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --cpus-per-task 8 slurm/train.sh RECIPE [key=value…]
#   sbatch --nodes 4 --gpus-per-node 8 slurm/train.sh RECIPE                   (a task a GPU is the default)
#   sbatch --ntasks 32 --gpus-per-task 1 slurm/train.sh RECIPE
#   sbatch --nodes 2 --ntasks-per-node 1 slurm/train.sh RECIPE                 (two CPU ranks)
#
# Before the time limit, and when the job is preempted, the run saves and the job goes back to the queue; it continues
# from that checkpoint. `scancel` saves and ends it. A rank that is killed or hangs costs a restart inside the allocation.
# Bad input, a bad recipe and values that are not finite end the job for good. docs/cluster.md says more.
# Submit from the top of the checkout: relative paths in a recipe start there. Site settings are in slurm/env.sh.
#SBATCH --job-name=megam3
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=megam3-%j.log
#SBATCH --signal=B:USR1@300
set -uo pipefail
script=train.sh

readonly REQUEUE_CODE=85  # EXIT_REQUEUE in megam3/obs/stop.py: saved, wants to be started again
readonly STOPPED_CODE=143 # EXIT_STOPPED: saved because of SIGTERM; also the code of a task that SIGTERM killed
readonly STALLED_CODE=86  # EXIT_STALLED in megam3/obs/health.py
readonly FAILED_CODE=1    # EXIT_FAILED and EXIT_LOST_PEER in megam3/train.py: a traceback, or somebody else is gone
readonly NODE_SECONDS=60  # for every node of the job to run `true`
readonly EARLY_CODE=138   # SIGUSR1 before Python had a handler for it: nothing lost, nothing saved

# A signal may come at any time: it is remembered from here on. The batch shell gets the warning alone, and srun passes
# SIGUSR1 on to every task. SIGTERM it would not pass on: it would kill the tasks at once.
step='' interrupted=0 warned=0 cancelled=0
forward() {
  interrupted=1
  [ -z "$step" ] || kill -s USR1 "$step" 2>/dev/null
}
trap 'warned=1; forward' USR1
trap 'cancelled=1; forward' TERM

if [ $# -lt 1 ]; then
  echo 'slurm/train.sh: a recipe is required: sbatch slurm/train.sh RECIPE [key=value…]' >&2
  exit 2
fi
# Slurm runs a copy of this file in a folder of its own, so its neighbours are found from where the job was submitted, or
# from where `sbatch --chdir` put it
: "${SLURM_SUBMIT_DIR:?run this with sbatch}"
[ -r slurm/start.sh ] || cd "$SLURM_SUBMIT_DIR" || exit 2
if [ ! -r slurm/start.sh ]; then
  echo "slurm/$script: no slurm/start.sh in $PWD: submit from the top of the checkout" >&2
  exit 2
fi
. slurm/start.sh

# the job's name for train.resume=never and train.resume_step, which count once for a job and not again after a requeue
export MEGAM3_JOB=${SLURM_JOB_ID:-}
# The job's name for scontrol. An array has the number of one of its tasks: called by that, scontrol puts every task of
# it back into the queue, and kills those that train.
job=${SLURM_JOB_ID:-}
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# with an arbitrary distribution rank 0 is on the first host of the given list, not of the sorted one
if [ -n "${SLURM_HOSTFILE:-}" ] && [ -r "$SLURM_HOSTFILE" ] && [ -z "${MASTER_ADDR:-}" ]; then
  read -r MASTER_ADDR <"$SLURM_HOSTFILE" && export MASTER_ADDR=${MASTER_ADDR%%[,\*]*}
fi

# Where a rank notes the code of an error that would come again. Its peers wait for it in NCCL, which does not tell them
# that it has gone; what ends them then (srun's --wait, or NCCL itself) looks like a rank that was killed.
export MEGAM3_FAULT_FILE=$PWD/.megam3-fault-${SLURM_JOB_ID:-}

# how many ranks: what was asked for, else one for each GPU
tasks=()
if [ -z "${SLURM_NTASKS_PER_NODE:-}${SLURM_NTASKS:-}" ]; then
  gpus=${SLURM_GPUS_ON_NODE:-0}
  if [ "$gpus" -gt 1 ]; then
    tasks=(--ntasks-per-node="$gpus" --ntasks=$((gpus * ${SLURM_JOB_NUM_NODES:-1})))
    if [ "${SLURM_CPUS_ON_NODE:-$gpus}" -lt "$gpus" ]; then
      say "${SLURM_CPUS_ON_NODE} cores for $gpus ranks on a node: they share them; add --cpus-per-gpu to the line of sbatch"
      tasks+=(--overcommit)
    fi
  fi
fi
# every rank's output in a file of its own, when asked for; otherwise all in the job's log, each line led by its rank
output=(--label)
if [ -n "$MEGAM3_RANK_LOGS" ]; then
  mkdir -p "$MEGAM3_RANK_LOGS" || exit 2
  output=(--output="$MEGAM3_RANK_LOGS/%j-rank%t.log" --open-mode=append)
fi

revision=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
changes=$(git status --porcelain --untracked-files=no 2>/dev/null | wc -l)
say "job ${SLURM_JOB_ID:-}, restart ${SLURM_RESTART_COUNT:-0}, nodes ${SLURM_JOB_NODELIST:-}, revision $revision, $changes changed files"

# One srun to its end; sets `code`. A trapped signal ends `wait` early, with the code of the signal; only the end of srun
# ends the loop.
run_ranks() {
  rm -f "$MEGAM3_FAULT_FILE"
  srun ${tasks[@]+"${tasks[@]}"} "${output[@]}" ${srun_flags[@]+"${srun_flags[@]}"} "$python" -u -m "$MEGAM3_MODULE" "$@" &
  step=$!
  # a signal between the last look and this line found no step to forward to
  [ "$warned$cancelled" = 00 ] || kill -s USR1 "$step" 2>/dev/null
  while true; do
    interrupted=0
    wait "$step"
    code=$?
    [ "$interrupted" -eq 1 ] || break
  done
  step=''
  # listing first makes a client of NFS ask its server again
  ls -a "$PWD" >/dev/null
  if is_restartable && [ -s "$MEGAM3_FAULT_FILE" ]; then
    read -r code <"$MEGAM3_FAULT_FILE"
  fi
  rm -f "$MEGAM3_FAULT_FILE"
}

# A task that a signal killed (128 + its number), a stall, and nothing else: a traceback or a user's error would come again.
is_restartable() {
  [ "$code" -eq "$STALLED_CODE" ] || { [ "$code" -gt 128 ] && [ "$code" -ne "$STOPPED_CODE" ]; }
}

# A node that dies takes its ranks along without a code: the others know only that somebody has gone, and their code is
# that of any failure. Slurm itself notices after SlurmdTimeout, 300 s by default, when the job would long have failed.
nodes_answer() {
  [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] || return 0
  env -u SLURM_HOSTFILE -u SLURM_DISTRIBUTION timeout "$NODE_SECONDS" srun --overlap --nodes="$SLURM_JOB_NUM_NODES" \
    --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true >/dev/null 2>&1
}

# Slurm says SIGTERM for a pre-emption as well as for scancel; the job's record tells them apart.
is_preempted() {
  [ -n "$MEGAM3_REQUEUE_ON_TERM" ] || scontrol show job "$job" 2>/dev/null | grep -q 'PreemptTime=[0-9]'
}

requeue() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MEGAM3_MAX_REQUEUES" ]; then
    say "stopped after $MEGAM3_MAX_REQUEUES restarts (MEGAM3_MAX_REQUEUES)"
    exit "$code"
  fi
  say "$1, back to the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
  scontrol requeue "$job" && exit 0
  say 'this site does not requeue jobs; submit the same line again, the run continues from its newest checkpoint'
  exit "$code"
}

failures=0
while true; do
  code=$REQUEUE_CODE
  began=$SECONDS
  [ "$warned$cancelled" != 00 ] || run_ranks "$@"
  if [ "$cancelled" -eq 1 ] || [ "$code" -eq "$STOPPED_CODE" ]; then
    [ "$code" -eq 0 ] && exit 0
    ! is_preempted || requeue 'preempted'
    say 'cancelled; the newest checkpoint is where it continues from when it is submitted again'
    exit "$STOPPED_CODE"
  fi
  [ "$code" -ne "$REQUEUE_CODE" ] || requeue 'saved'
  if [ "$warned" -eq 1 ] && { [ "$code" -eq "$EARLY_CODE" ] || is_restartable; }; then
    requeue "interrupted (code $code)"
  fi
  if [ "$code" -eq "$FAILED_CODE" ] || is_restartable; then
    nodes_answer || requeue "a node does not answer (code $code)"
  fi
  is_restartable || exit "$code"
  # an attempt that ran for a while is a new start of counting: what kills a run at once will do so again
  [ $((SECONDS - began)) -lt "$MEGAM3_RESTART_SECONDS" ] || failures=0
  failures=$((failures + 1))
  if [ "$failures" -gt "$MEGAM3_MAX_RESTARTS" ]; then
    say "the ranks ended with code $code $failures times, each within $MEGAM3_RESTART_SECONDS s (137: killed, often for memory): giving up"
    exit "$code"
  fi
  say "the ranks ended with code $code: starting them again here ($failures of $MEGAM3_MAX_RESTARTS)"
done
