# shellcheck shell=bash
# What differs between clusters and users, for the batch scripts beside this file. An environment
# variable of the same name wins: LAUNCHER=torchrun sbatch launch/slurm/pretrain_router.sbatch ...
#
# What sbatch itself must know (partition, account, time, nodes, GPUs) stands in the #SBATCH lines of
# each script. For all three at once sbatch reads the environment, so in a shell's profile:
#   export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my_account

# srun: one task a rank. torchrun: one torchrun a node, which starts the node's ranks.
: "${LAUNCHER:=srun}"

# The virtual environment, on a file system that all nodes have. Empty: the one that was active at
# sbatch, else .venv of the repository, else the python that is on the PATH.
: "${VENV:=}"

# Or a container (pyxis): an image as srun --container-image takes it, such as a .sqsh file, and what
# it sees beside the repository and the folder of sbatch, as /lustre/models:/lustre/models,/scratch.
: "${CONTAINER_IMAGE:=}"
: "${CONTAINER_MOUNTS:=}"

# The interpreter, in that environment.
: "${PYTHON:=python}"

# More options of srun for the ranks, such as --mpi=pmix or --network=single_node_vni.
: "${SRUN_OPTIONS:=}"

# What the nodes need to talk to one another, such as:
#   module load nccl
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
