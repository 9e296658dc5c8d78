#!/bin/bash
# What a cluster reaches on 1…N nodes, within the half hour of --time: bandwidth of collectives, tokens
# to experts and back, saving and loading, and one training at constant images a GPU on 1, 2, 4 … N
# nodes. Prints it beside what `pretrain plan` said, and writes runs/site/links.json, which
# `pretrain plan` then reads.
#
#     sbatch slurm/acceptance.sh                                       2 nodes
#     sbatch --nodes=16 slurm/acceptance.sh config=configs/udit_xl_moe.yaml
#
# It needs no data: the built-in digits are enlarged until their latents have the shape of 256-pixel
# images, 4×32×32, so that every configs/*_in256.yaml and the flagship train at their true size. The
# default is U-DiT-L: it fits one node, and its kernels are those of the flagship.
#
# A part that fails ends the job and is named. After a preemption, parts that are done are kept.
# Results: runs/acceptance/JOB/report.json. To edit: --account, --partition, CONTAINER_IMAGE,
# runs/site/site.sh; see slurm/udit_xl_moe.sh. Any key=value goes to the training.
#     IMAGES=32 STEPS=60 DIGITS='--codec haar1 --size 64'       images a GPU; steps; latents of the digits
#     LINKS='--sizes 1,16,256' DISPATCH='--tokens 4096 …' CHECKPOINT='--params 2e9'    of `pretrain bench`
#SBATCH --job-name=acceptance
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# shellcheck source=slurm/lib.sh
source "${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"

RUN_DIR=${RUN_DIR:-runs/acceptance}
settings configs/udit_l_in256.yaml "$@"
NAME=$(basename "$CONFIG" .yaml)
open_job "$RUN_DIR"
OUT=$JOB_DIR/$SLURM_JOB_ID
mkdir -p "$OUT"
IMAGES=${IMAGES:-32} STEPS=${STEPS:-60}
read -ra LINKS <<<"${LINKS:-}"
read -ra DISPATCH <<<"${DISPATCH:---tokens 4096 --width 3072 --experts 64 --top-k 4}"
read -ra CHECKPOINT <<<"${CHECKPOINT:---params 2e9 --rounds 3}"
read -ra DIGITS <<<"${DIGITS:---codec haar1 --size 64}"

out_of_time() {
  [ "$RESTART" -lt 3 ] && requeue
  say "gives up after $RESTART restarts; give it more --time"
  exit 1
}
trap out_of_time USR1

part() {  # NAME COMMAND …
  say "$1"
  attend "${@:2}"
  local code=$?
  [ "$code" = 0 ] && return
  first_words
  say "failed with code $code: $1"
  exit 1
}

measure() {  # NAME OPTION …: `pretrain bench NAME` on all ranks
  [ -e "$OUT/$1.json" ] || part "$1" on_ranks "$1" -- \
    "${PYTHON[@]}" -m pretrain bench "$@" --nproc 0 --out "$OUT/$1.json"
}

train_on() {  # NODES
  local first
  first=$(IFS=,; echo "${HOSTS[*]:0:$1}")
  part "training on $1 nodes" on_ranks "train-$1nodes" \
    --nodes="$1" --ntasks="$(($1 * RANKS_PER_NODE))" --nodelist="$first" -- \
    "${PYTHON[@]}" -m pretrain train "$CONFIG" \
    data.path="$OUT/digits" data.codec=null model.num_classes=10 \
    data.global_batch="$((IMAGES * $1 * RANKS_PER_NODE))" accum=1 \
    steps="$STEPS" log.every="$((STEPS > 6 ? STEPS / 6 : 1))" log.wandb=disabled \
    sample.every=0 checkpoint.every="$STEPS" checkpoint.keep=1 \
    ${OVERRIDES[@]+"${OVERRIDES[@]}"} run_dir="$OUT/$NAME-$1nodes"
}

measure links ${LINKS[@]+"${LINKS[@]}"}
measure dispatch ${DISPATCH[@]+"${DISPATCH[@]}"}
measure checkpoint ${CHECKPOINT[@]+"${CHECKPOINT[@]}"} --dir "$OUT"
part digits alone digits -- "${PYTHON[@]}" -m pretrain data encode digits \
  --out "$OUT/digits" --overwrite "${DIGITS[@]}"
for ((n = 1; n < NODES; n *= 2)); do
  train_on "$n"
done
train_on "$NODES"
part report alone report -- "${PYTHON[@]}" -m pretrain bench site "$OUT"
