#!/bin/bash
# Tokenise a recipe's data with an array of jobs that share the work without talking to each other:
#
#   sbatch --array=0-15 slurm/prepare.sh unified data.store_dir=/scratch/store
#
# Any task may be killed and requeued: it continues where it stopped. The task that finds all units complete finishes the store.
#SBATCH --job-name=megam3-prepare
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail
# a batch script runs from the scheduler's spool folder: its own folder is where the job was submitted from
root="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}"
if [[ -f "$root/slurm/env.sh" ]]; then source "$root/slurm/env.sh"; fi
task="${SLURM_ARRAY_TASK_ID:-0}"
first="${SLURM_ARRAY_TASK_MIN:-0}"
count="${SLURM_ARRAY_TASK_COUNT:-1}"
step="${SLURM_ARRAY_TASK_STEP:-1}"
exec megam3 prepare "$@" --shard "$(((task - first) / step))/$count" --processes "${SLURM_CPUS_PER_TASK:-1}"
