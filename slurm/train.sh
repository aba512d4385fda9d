#!/usr/bin/env bash
# Train any recipe on any number of nodes; one task is one rank, on one GPU or one CPU.
#
#   sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --cpus-per-task 8 slurm/train.sh RECIPE [key=value…]
#   sbatch --nodes 2 --ntasks-per-node 1 slurm/train.sh RECIPE                       (two CPU ranks)
#
# Before the time limit, and when the job is preempted, the run saves and the job goes back to the queue; it continues from that checkpoint.
# Submit from the top of the checkout: relative paths in a recipe start there. Site settings are in slurm/env.sh.
#SBATCH --job-name=megam3
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=megam3-%j.log
#SBATCH --signal=B:USR1@300
set -uo pipefail

readonly REQUEUE_CODE=85  # EXIT_REQUEUE in megam3/trainer.py

if [ $# -lt 1 ]; then
  echo 'slurm/train.sh: a recipe is required: sbatch slurm/train.sh RECIPE [key=value…]' >&2
  exit 2
fi
# Slurm runs a copy of this file in a folder of its own, so its neighbours are found from where the job was submitted
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}" || exit 2
. "${MEGAM3_SLURM_ENV:-slurm/env.sh}" || exit 2
python=$MEGAM3_VENV/bin/python
if [ ! -x "$python" ]; then
  echo "slurm/train.sh: no $python: run make once, or set MEGAM3_VENV to an environment with megam3" >&2
  exit 2
fi

# The batch shell gets the signal alone; srun passes SIGUSR1 on to every task. SIGTERM it would not pass on: it would kill the tasks at once.
step='' interrupted=0
forward() {
  interrupted=1
  [ -z "$step" ] || kill -s USR1 "$step" 2>/dev/null
}
trap forward USR1 TERM

# shellcheck disable=SC2086  # the flags are several words
srun $MEGAM3_SRUN_FLAGS "$python" -u -m "$MEGAM3_MODULE" "$@" &
step=$!
# a trapped signal ends `wait` early, with the code of the signal; only the end of srun ends the job
while true; do
  interrupted=0
  wait "$step"
  code=$?
  [ "$interrupted" -eq 1 ] || break
done

if [ "$code" -eq "$REQUEUE_CODE" ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MEGAM3_MAX_REQUEUES" ]; then
    echo "slurm/train.sh: stopped after $MEGAM3_MAX_REQUEUES restarts (MEGAM3_MAX_REQUEUES)" >&2
    exit "$code"
  fi
  echo "slurm/train.sh: saved, back to the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
