#!/bin/bash
# Draws pictures from a run or checkpoint and scores it, on one GPU.
#
#     sbatch slurm/sample_eval.sh from=runs/udit_xl_moe
#     sbatch slurm/sample_eval.sh from=runs/udit_xl_moe count=5000 guidance=1.5 steps=50
#
# The picture is RUN/samples/sample.png, the scores are in the job's log and in RUN/scores.json.
# To edit: --account, --partition, CONTAINER_IMAGE; see slurm/udit_xl_moe.sh.
#SBATCH --job-name=sample_eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# shellcheck source=slurm/lib.sh
source "${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"

FROM='' LABELS='' COUNT=5000 BOTH=() WEIGHTS=ema
for word in "$@"; do
  case $word in
    from=*) FROM=${word#*=} ;;
    labels=*) LABELS=${word#*=} ;;
    count=*) COUNT=${word#*=} ;;
    weights=*) WEIGHTS=${word#*=} ;;
    sampler=* | steps=* | guidance=* | seed=*) BOTH+=("--${word%%=*}" "${word#*=}") ;;
    *) refuse "argument '$word': expected from=RUN, labels, count, weights, sampler, steps, guidance or seed" ;;
  esac
done
[ -d "$FROM" ] || refuse "from=$FROM: expected a run or checkpoint directory"
RUN=${FROM%/checkpoints/step_*}
open_job "$RUN"

alone sample -- "${PYTHON[@]}" -m pretrain sample "$FROM" --weights "$WEIGHTS" \
  ${LABELS:+--labels "$LABELS"} ${BOTH[@]+"${BOTH[@]}"} || exit
alone eval -- "${PYTHON[@]}" -m pretrain eval "$FROM" --weights "$WEIGHTS" --count "$COUNT" \
  ${BOTH[@]+"${BOTH[@]}"} --out "$RUN/scores.json"
