#!/bin/bash
# Images to latents to shards on many GPUs: a job array, one part of the images an element, then a job
# that joins the parts and checks every byte of the set. From the checkout:
#
#     sbatch --array=1-8 slurm/encode_shards.sh src=/data/imagenet out=data/in256 codec=kl vae=/data/vae size=256
#     sbatch --array=1-8%2 slurm/encode_shards.sh …          two elements at a time
#
# Any option of `pretrain data encode` as key=value; flips=true for one without a value.
#
# The first element submits the joining job, which runs when all elements have ended well. If one
# failed, it is cancelled: submit the same line again, parts that are complete are not repeated. The
# same holds for an element that is preempted or loses its node. A part that was cut off begins anew,
# so take so many parts that each fits into --time.
#
# To edit, here or on sbatch's command line:
#     --account, --partition      as your cluster wants them
#     --gpus-per-node=0           encodes on CPUs; device=cpu or device=cuda decides in any case
#     CONTAINER_IMAGE=x.sqsh, runs/site/site.sh      see slurm/udit_xl_moe.sh
#     AFTER='--partition=cpu'     options of sbatch for the joining job: it needs no GPU
#     run_dir=runs/encode_shards  logs and the copy of the code
#SBATCH --job-name=encode_shards
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# shellcheck source=slurm/lib.sh
source "${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"

SCRIPT=slurm/encode_shards.sh ARGUMENTS=("$@")
WORK=part SRC='' OUT='' RUN_DIR=${RUN_DIR:-runs/$SLURM_JOB_NAME} OPTIONS=() REPLACE=()
DEVICE=$([ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] && echo cpu || echo auto)
for word in "$@"; do
  name=${word%%=*}
  case $word in
    merge) WORK=merge ;;
    src=*) SRC=${word#*=} ;;
    out=*) OUT=${word#*=} ;;
    run_dir=*) RUN_DIR=${word#*=} ;;
    device=*) DEVICE=${word#*=} ;;
    part=*) refuse "argument '$word': the parts are the array's; submit with --array=1-N" ;;
    overwrite=true) REPLACE=(--overwrite) ;;
    *=true) OPTIONS+=("--${name//_/-}") ;;
    *=false) [ "$name" = overwrite ] || OPTIONS+=("--no-${name//_/-}") ;;
    *=*) OPTIONS+=("--${name//_/-}" "${word#*=}") ;;
    *) refuse "argument '$word': expected key=value, such as size=256" ;;
  esac
done
[ -n "$SRC" ] || refuse "expected src=IMAGES"
[ -n "$OUT" ] || refuse "expected out=DIRECTORY"

join_parts() {
  open_job "$RUN_DIR"
  alone merge -- "${PYTHON[@]}" -m pretrain data merge "$OUT" ${REPLACE[@]+"${REPLACE[@]}"} || exit
  alone verify -- "${PYTHON[@]}" -m pretrain data verify "$OUT"
  exit
}

[ "$WORK" = part ] || join_parts
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || refuse "expected a job array: sbatch --array=1-8 $SCRIPT …"
[ "$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX" = "1-$SLURM_ARRAY_TASK_COUNT" ] \
  || refuse "the array has $SLURM_ARRAY_TASK_COUNT elements from $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX: expected --array=1-N"
open_job "$RUN_DIR"
after_the_array merge afterok
alone encode -- "${PYTHON[@]}" -m pretrain data encode "$SRC" --out "$OUT" --device "$DEVICE" \
  ${OPTIONS[@]+"${OPTIONS[@]}"} ${REPLACE[@]+"${REPLACE[@]}"} \
  --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
