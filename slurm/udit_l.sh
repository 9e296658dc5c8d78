#!/bin/bash
# Trains U-DiT-L on ImageNet-256 latents (configs/udit_l_in256.yaml), and goes on by
# itself after the time limit, a preemption, a crash or a lost node, until the last step.
#
#     sbatch slurm/udit_l.sh                            1 node
#     sbatch --nodes=4 slurm/udit_l.sh steps=800000     any key of the config
#     pretrain status runs/udit_l_in256
#
# What to edit is listed in slurm/udit_xl_moe.sh: account, partition, nodes, time, container.
#SBATCH --job-name=udit_l
#SBATCH --nodes=1
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

settings configs/udit_l_in256.yaml "$@"
open_job "$RUN_DIR"
train_until_done
