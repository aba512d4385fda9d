#!/usr/bin/env bash
# Mine hard negatives on any number of nodes; one task is one rank, on one GPU or one CPU.
#
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --cpus-per-task 8 slurm/mine.sh \
#     pairs.jsonl --model runs/one/export --corpus corpus.jsonl --output mined.jsonl --dense-search torch
#   sbatch --ntasks 2 slurm/mine.sh pairs.jsonl --model … --output mined.jsonl             (two CPU ranks)
#
# The arguments are those of `megam3 mine`. MEGAM3_COMMAND=add-teacher-scores runs that command on the same ranks.
# A job that was killed or preempted and goes back to the queue continues: finished shards and parts are kept.
# Submit from the top of the checkout: relative paths start there. Site settings are in slurm/env.sh.
#SBATCH --job-name=megam3-mine
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=megam3-mine-%j.log
set -uo pipefail
script=mine.sh

if [ $# -lt 1 ]; then
  echo 'slurm/mine.sh: the arguments of `megam3 mine` are required: sbatch slurm/mine.sh FILE --model … --output …' >&2
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

exec srun ${srun_flags[@]+"${srun_flags[@]}"} "$python" -u -m megam3 "${MEGAM3_COMMAND:-mine}" "$@"
