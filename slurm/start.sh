# What the scripts of this folder begin with, sourced from the top of the checkout: site settings, the interpreter, and
# what srun shall know. Sets `python` and `srun_flags`. Whoever sources it has set `script`, its own name for messages.

say() { echo "slurm/$script: $*" >&2; }

settings=${MEGAM3_SLURM_ENV:-slurm/env.sh}
if [ ! -r "$settings" ]; then
  say "no $settings in $PWD: MEGAM3_SLURM_ENV names the site settings"
  exit 2
fi
# unset variables are errors in these scripts, and common in what sites source: Lmod's `module`, conda's `activate`
set +u
. "$settings" || exit 2
# a site's own file need not begin with the one here: what it leaves out has the defaults
for name in MEGAM3_VENV MEGAM3_MAX_REQUEUES MEGAM3_MAX_RESTARTS MEGAM3_RANK_LOGS MEGAM3_SRUN_FLAGS MEGAM3_MODULE; do
  [ -n "${!name+set}" ] || . slurm/env.sh || exit 2
done
set -u

# words of the flags, without the shell's look for file names that match a * in them
read -r -d '' -a srun_flags <<<"$MEGAM3_SRUN_FLAGS"

python=$MEGAM3_VENV/bin/python
# in srun's container, which prepare.sh does not use, the environment is not on this side
if [ ! -x "$python" ] && { [ "$script" = prepare.sh ] || [[ $MEGAM3_SRUN_FLAGS != *--container* ]]; }; then
  say "no $python: run make once, or set MEGAM3_VENV to an environment with megam3"
  exit 2
fi

# since Slurm 22.05 srun no longer takes --cpus-per-task from the job: without this, every rank would get one core
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
