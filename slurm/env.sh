# Site settings, sourced by the scripts in this folder (docs/cluster.md lists what usually has to be said). Everything here can also be set in the environment of `sbatch`;
# nothing of it is in Python. Partition, account and quality of service are options of `sbatch`, or SBATCH_PARTITION,
# SBATCH_ACCOUNT and SBATCH_QOS in your shell's profile.

# the environment that `make` or `pip install` made; modules a site needs are loaded here too, for example:
# module load cuda/12.8
: "${MEGAM3_VENV:=.venv}"

# times a job may start itself again before it gives up
: "${MEGAM3_MAX_REQUEUES:=100}"

# times the ranks are started again inside the allocation after one was killed or hung, when each attempt ended within
# so many seconds
: "${MEGAM3_MAX_RESTARTS:=3}"
: "${MEGAM3_RESTART_SECONDS:=600}"

# seconds between Slurm's warning and its kill, as in `#SBATCH --signal=B:USR1@300` of train.sh: a run whose steps are too
# long for it says so
: "${MEGAM3_WARNING_SECONDS:=300}"
export MEGAM3_WARNING_SECONDS

# a folder for one log file a rank; empty: all ranks write into the job's log, each line led by its rank
: "${MEGAM3_RANK_LOGS:=}"

# not empty: every SIGTERM means pre-emption (a site whose Slurm does not record it); scancel then needs --signal=KILL
: "${MEGAM3_REQUEUE_ON_TERM:=}"

# what runs on every rank
: "${MEGAM3_MODULE:=megam3.train}"

# options for srun. A rank that dies leaves the others in a collective: they are ended a minute later.
# (--kill-on-bad-exit would also end ranks that are still writing when the first one leaves to be requeued.)
# In a container: add what your site's plugin takes, for example --container-image=… --container-mounts=…
# Binding: --cpu-bind=cores, or --gpu-bind=closest where the site offers it.
: "${MEGAM3_SRUN_FLAGS:=--kill-on-bad-exit=0 --wait=60}"

# MASTER_ADDR and MASTER_PORT: only where the first node's name does not lead to the network that ranks shall use.
# The network itself: export NCCL_SOCKET_IFNAME=ib0 (NCCL) and GLOO_SOCKET_IFNAME=ib0 (CPU ranks).

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
