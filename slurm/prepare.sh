#!/usr/bin/env bash
# Tokenise a recipe's data with an array of jobs that share the work without talking to each other:
#
#   sbatch --array=0-15 --cpus-per-task=16 slurm/prepare.sh RECIPE data.store_dir=/scratch/store [key=value…]
#
# Any task may be killed and requeued: it continues where it stopped. The task that finds all units complete finishes the store.
# Submit from the top of the checkout: relative paths in a recipe start there. Site settings are in slurm/env.sh.
#SBATCH --job-name=megam3-prepare
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=megam3-prepare-%A-%a.log
#SBATCH --ntasks=1
set -uo pipefail
script=prepare.sh

if [ $# -lt 1 ]; then
  echo 'slurm/prepare.sh: a recipe is required: sbatch --array=0-15 slurm/prepare.sh RECIPE [key=value…]' >&2
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

# an array need not start at 0 nor count by 1: --array=8-14:2 is four tasks
task=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1}))
exec "$python" -u -m megam3 prepare "$@" --shard "$task/${SLURM_ARRAY_TASK_COUNT:-1}" --processes "${SLURM_CPUS_PER_TASK:-1}"
