# Site settings, sourced by the scripts in this folder. Everything here can also be set in the environment of `sbatch`; nothing of it is in Python.

# the environment that `make` or `pip install` made; modules a site needs are loaded here too, for example: module load cuda
: "${MEGAM3_VENV:=.venv}"

# times a job may start itself again before it gives up
: "${MEGAM3_MAX_REQUEUES:=100}"

# what runs on every rank
: "${MEGAM3_MODULE:=megam3.train}"

# options for srun. A rank that dies leaves the others in a collective: they are ended a minute later.
# (--kill-on-bad-exit would also end ranks that are still writing when the first one leaves to be requeued.)
: "${MEGAM3_SRUN_FLAGS:=--kill-on-bad-exit=0 --wait=60}"

# MASTER_ADDR and MASTER_PORT: only where the first node's name does not lead to the network that ranks shall use.
# NCCL_SOCKET_IFNAME and its kin belong here as well.

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
