#!/bin/bash
# Trains the flagship, a 9.9 B U-DiT-MoE (configs/udit_xl_moe.yaml), and goes on by itself after the
# time limit, a preemption, a crash or a lost node, until the last step. From the checkout:
#
#     sbatch slurm/udit_xl_moe.sh                                2 nodes
#     sbatch --nodes=4 slurm/udit_xl_moe.sh steps=400000         any key of the config
#     sbatch slurm/udit_xl_moe.sh config=my.yaml run_dir=/fsx/x  another run
#     pretrain status runs/udit_xl_moe
#
# To edit, here or on sbatch's command line:
#     --account, --partition      as your cluster wants them
#     --nodes                     the ranks are nodes × GPUs; a resume may have another number
#     --time                      as long as the partition gives: the job requeues itself
#     CONTAINER_IMAGE=x.sqsh      runs the ranks in it (enroot, pyxis); CONTAINER_MOUNTS=from:to,…
#     runs/site/site.sh           NCCL_SOCKET_IFNAME, NCCL_IB_HCA, modules: what all jobs here need
#     LAUNCHER=torchrun           one task a node instead of one a rank
#     GPUS_PER_NODE=n             ranks a node (default: what Slurm gives); HEALTH=off; MAX_CRASHES=3
#SBATCH --job-name=udit_xl_moe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# shellcheck source=slurm/lib.sh
source "${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"

settings configs/udit_xl_moe.yaml "$@"
open_job "$RUN_DIR"
train_until_done
