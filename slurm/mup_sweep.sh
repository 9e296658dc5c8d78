#!/bin/bash
# Trains one small model a line of a file, as a job array, then ranks them by their final loss. From the
# checkout:
#
#     sbatch --array=1-12%4 slurm/mup_sweep.sh config=configs/proxy.yaml points=sweep.txt run_dir=runs/sweep
#
# A line of the file is a trial, NAME key=value …; empty lines and lines that begin with # do not count:
#
#     lr1e-3  optim.lr=1e-3
#     lr2e-3  optim.lr=2e-3 seed=1
#
# Element 3 of the array is the third trial. Its run is run_dir/NAME, however often it is submitted: what
# is done is not repeated, the rest goes on. Each trial saves, stops and comes back like a run of its own
# (slurm/udit_xl_moe.sh). Other key=value arguments go to all trials.
#
# The first element submits a job that runs when all have ended, well or not: it prints the trials, best
# first (log: run_dir/.sweep/logs), and writes run_dir/results.json. By hand:
# python -m pretrain.cluster.sweep POINTS RUN_DIR
#
# To edit, here or on sbatch's command line:
#     --account, --partition      as your cluster wants them
#     --gpus-per-node, --nodes    of one trial; --oversubscribe and --cpus-per-task for less than a node
#     CONTAINER_IMAGE=x.sqsh, runs/site/site.sh      see slurm/udit_xl_moe.sh
#     AFTER='--partition=cpu'     options of sbatch for the last job: it needs no GPU
#SBATCH --job-name=mup_sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# shellcheck source=slurm/lib.sh
source "${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"

SCRIPT=slurm/mup_sweep.sh ARGUMENTS=("$@")
WORK=trial FILE='' REST=()
for word in "$@"; do
  case $word in
    collect) WORK=collect ;;
    points=*) FILE=${word#*=} ;;
    *) REST+=("$word") ;;
  esac
done
RUN_DIR=${RUN_DIR:-runs/mup_sweep}
settings '' ${REST[@]+"${REST[@]}"}
[ -n "$CONFIG" ] || refuse "expected config=FILE, the configuration of all trials"
SWEEP=$RUN_DIR
open_job "$SWEEP/.sweep"
PRETRAIN_CODE=$CODE  # all trials run this copy

take_points() {  # sets POINTS, a line a trial; a requeue reads what was submitted, as with the code
  local kept=$CODE/points.txt names=' ' line words word
  if [ ! -f "$kept" ]; then
    [ -f "$FILE" ] || refuse "points=$FILE: expected a file with a line NAME key=value … for each trial"
    cp "$FILE" "$kept.$SLURM_JOB_ID"
    mv "$kept.$SLURM_JOB_ID" "$kept"
  fi
  mapfile -t POINTS < <(sed 's/\r$//; s/^[[:space:]]*//; /^#/d; /^$/d' "$kept")
  for line in ${POINTS[@]+"${POINTS[@]}"}; do
    read -ra words <<<"$line"
    [[ ${words[0]} =~ ^[A-Za-z0-9_][A-Za-z0-9_.+-]*$ ]] \
      || refuse "$FILE: '$line': expected a name first, of letters, digits and _ . + -"
    for word in "${words[@]:1}"; do
      [[ $word == [!=]*=* && $word != run_dir=* ]] || refuse "$FILE: '$line': '$word' is no key=value of a trial"
    done
    [[ $names != *" ${words[0]} "* ]] || refuse "$FILE: two trials are called ${words[0]}"
    names+="${words[0]} "
  done
}

begin_trial() {  # NAME [key=value …]: leaves the job if the trial is done, or was another one
  local trial=$SWEEP/$1 point="${*:2}" asked begun
  asked=$(printf '%s\n' "$point" "${OVERRIDES[*]}" "$(sha256sum <"$CONFIG")")
  begun=$(head -n 1 "$trial/point" 2>/dev/null) || begun=$point
  [ "$begun" = "$point" ] \
    || refuse "$trial was begun with '$begun', not '$point': give the trial another name"
  after_the_array collect afterany
  if [ -e "$trial/done" ] && [ "$(cat "$trial/point")" = "$asked" ]; then
    say "$trial is done"
    exit 0
  fi
  RUN_DIR=$trial
  OVERRIDES+=("${@:2}")
  open_job "$RUN_DIR"
  echo "$asked" >"$RUN_DIR/point"
}

take_points
if [ "$WORK" = collect ]; then
  alone collect -- "${PYTHON[@]}" -m pretrain.cluster.sweep "$CODE/points.txt" "$SWEEP"
  exit
fi
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || refuse "expected a job array: sbatch --array=1-${#POINTS[@]} $SCRIPT …"
[[ $SLURM_ARRAY_TASK_ID -ge 1 && $SLURM_ARRAY_TASK_ID -le ${#POINTS[@]} ]] \
  || refuse "$FILE has ${#POINTS[@]} trials, the array asks for number $SLURM_ARRAY_TASK_ID"
read -ra POINT <<<"${POINTS[SLURM_ARRAY_TASK_ID - 1]}"
begin_trial "${POINT[@]}"
train_until_done
