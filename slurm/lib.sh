# shellcheck shell=bash
# What the scripts of this folder share; sourced, never run. Shell only: what a rank does is Python's.
#
# The signal contract, whose other half is in pretrain/run.py. No signal ever enters the job step:
# Slurm signals every process of one, and torchrun's agent and helpers of a rank die of USR1.
#   1. Slurm sends USR1 to this shell alone (--signal=B:USR1@300): before the time limit, at
#      preemption, or by hand (scancel --batch --signal=USR1 JOB).
#   2. The shell writes the file RUN/stop. Rank 0 sees it, all ranks save and exit with 0.
#   3. The trainer removes `stop` after the save; `done` is there only if the run reached its last step.
#   4. No `done`: the shell requeues the job, and the same script goes on from the last checkpoint.
# A `stop` that a person made ends the job; so do scancel, wrong input, a node that fails its health
# check, and MAX_CRASHES failures (or ten stops) in a row without a new checkpoint. A crash, a lost
# node, the time limit and a preemption bring the job back.

set -uo pipefail

LIB=${BASH_SOURCE[0]}
ROOT=${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}            # the checkout
RESTART=${SLURM_RESTART_COUNT:-0}                   # unset in a job's first life
# The last element of an array has the array's own number, by which Slurm would requeue all of it.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
JOB=${JOB:-$SLURM_JOB_ID}
MAX_CRASHES=${MAX_CRASHES:-3}                       # in a row, without a new checkpoint between them
MAX_STOPS=10                                        # the same of stops
export PRETRAIN_SITE=${PRETRAIN_SITE:-runs/site}    # what is known of this cluster
ASKED=${ASKED:-0} TERMED=${TERMED:-0} INTERRUPTED=0 # set by traps
trap 'INTERRUPTED=1 ASKED=1' USR1                   # from the first line on: USR1 would end a shell
trap 'INTERRUPTED=1 TERMED=1' TERM

say() { printf '%s  job %s.%s  %s\n' "$(date '+%F %T')" "$JOB" "$RESTART" "$*"; }

refuse() {  # WHY: the input is wrong; nothing was started
  say "$*" >&2
  exit 2
}

text() {  # WORDS …: fit to stand between quotes in JSON
  tr -d '\000-\037\134' <<<"$*" | tr '"' "'"
}

of_job() { scontrol -o show job "$JOB" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }  # FIELD

# ---- what the job is asked for -------------------------------------------------------------------

settings() {  # CONFIG [key=value …]: sets CONFIG, RUN_DIR, OVERRIDES
  CONFIG=${CONFIG:-$1}
  OVERRIDES=()
  local word
  for word in "${@:2}"; do
    case $word in
      config=*) CONFIG=${word#*=} ;;
      run_dir=*) RUN_DIR=${word#*=} ;;
      *=*) OVERRIDES+=("$word") ;;
      *) refuse "argument '$word': expected key=value, such as steps=1000 or config=configs/demo.yaml" ;;
    esac
  done
  RUN_DIR=${RUN_DIR:-$(sed -n "s/^run_dir: *[\"']\{0,1\}\([^\"' #]*\).*/\1/p" "$CONFIG" 2>/dev/null)}
  RUN_DIR=${RUN_DIR:-runs/$(basename "$CONFIG" .yaml)}
}

open_job() {  # DIR: logs, code, interpreter, environment
  mkdir -p "$1/logs" || refuse "$1 cannot be made; set another run_dir"
  JOB_DIR=$(cd "$1" && pwd)
  LOGS=$JOB_DIR/logs
  take_code
  mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  NODES=${#HOSTS[@]}
  RANKS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  [[ $RANKS_PER_NODE =~ ^[1-9][0-9]*$ ]] || refuse "GPUS_PER_NODE=$RANKS_PER_NODE: expected a number of ranks a node"
  CPUS=$(fewest_cpus)
  PYTHON=("${PRETRAIN_PYTHON:-$ROOT/.venv/bin/python}")
  CONTAINER=()
  [ -z "${CONTAINER_IMAGE:-}" ] || in_container
  STEP=0
  environment
}

fewest_cpus() { tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1; }

take_code() {  # a requeue runs what was submitted, whatever happens to the checkout meanwhile
  CODE=${PRETRAIN_CODE:-$JOB_DIR/code/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
  if [ ! -d "$CODE" ]; then
    local fresh=$CODE.partial.$SLURM_JOB_ID
    [ -z "${CONFIG:-}" ] || [ -f "$CONFIG" ] || refuse "config=$CONFIG: there is no such file below $PWD"
    mkdir -p "$fresh"
    tar -C "$ROOT" -c pretrain parallel data_pipeline configs slurm pyproject.toml \
      | tar -C "$fresh" -x || refuse "the code in $ROOT cannot be copied to $CODE; submit from the checkout, or set PRETRAIN_ROOT"
    [ -z "${CONFIG:-}" ] || cp "$CONFIG" "$fresh/submitted.yaml"
    git -C "$ROOT" rev-parse HEAD >"$fresh/commit" 2>/dev/null || rm -f "$fresh/commit"
    mv -T "$fresh" "$CODE" 2>/dev/null || rm -rf "$fresh"  # why: another element of an array was first
  fi
  [ -z "${CONFIG:-}" ] || CONFIG=$CODE/submitted.yaml
  if [ "$LIB" != "$CODE/slurm/lib.sh" ]; then
    # shellcheck source=/dev/null
    source "$CODE/slurm/lib.sh"
  fi
}

in_container() {  # enroot and pyxis; options of srun alone: with sbatch this shell would be inside too
  PYTHON=("${PRETRAIN_PYTHON:-python}")
  CONTAINER=(
    --container-image="$CONTAINER_IMAGE"
    --container-mounts="$ROOT:$ROOT,$PWD:$PWD,$JOB_DIR:$JOB_DIR,$CODE:$CODE${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    --container-workdir="$PWD"
    --no-container-mount-home
  )
}

environment() {
  # What a cluster needs beyond this (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, modules) goes into site.sh.
  # shellcheck source=/dev/null
  [ ! -f "$PRETRAIN_SITE/site.sh" ] || source "$PRETRAIN_SITE/site.sh"
  export PYTHONPATH=$CODE${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONSAFEPATH=1       # or the working directory would go before the copied code
  export PYTHONUNBUFFERED=1     # the last words of a rank that dies are in its log
  export PYTHONFAULTHANDLER=1   # a crash in C says where
  export MASTER_ADDR=${HEAD_ADDRESS:-${HOSTS[0]}}
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                            # what went wrong, nothing else
  export TORCH_FR_DUMP_TEMP_FILE=$LOGS/$SLURM_JOB_ID.$RESTART-nccl-rank         # last collectives of a hang
  export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$TORCH_FR_DUMP_TEMP_FILE               # its older name
  export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-900}  # above writing it
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}  # above a save
  unset CUDA_DEVICE_MAX_CONNECTIONS  # 1, as Megatron sets it, would put FSDP's gathers behind compute
  if [ -d /opt/amazon/efa ]; then    # AWS: NCCL over EFA
    export FI_PROVIDER=efa
    export FI_EFA_SET_CUDA_SYNC_MEMOPS=0  # or NCCL's proxy and torch's streams can wait for each other
    export LD_LIBRARY_PATH=/opt/amazon/efa/lib:/opt/amazon/ofi-nccl/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  fi
}

# ---- running on the nodes ------------------------------------------------------------------------

on_ranks() {  # NAME [srun option …] -- COMMAND …: one task a rank, output of each in a file of its own
  tasks "$RANKS_PER_NODE" "$LOGS/$SLURM_JOB_ID.$RESTART-$1-rank%t.log" "${@:2}"
}

tasks() {  # TASKS_PER_NODE LOG [srun option …] -- COMMAND …
  local each=$1 log=$2 options=()
  shift 2
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  # --cpus-per-task: srun does not take it from sbatch. --kill-on-bad-exit: ranks in a NCCL collective
  # would wait for a dead one. --wait: so long after the first rank has ended, the rest is killed.
  srun --kill-on-bad-exit=1 --wait=600 \
    --nodes="$NODES" --ntasks="$((NODES * each))" --ntasks-per-node="$each" \
    --cpus-per-task="$((CPUS > each ? CPUS / each : 1))" --output="$log" \
    ${CONTAINER[@]+"${CONTAINER[@]}"} ${options[@]+"${options[@]}"} "${@:2}"
}

alone() {  # NAME -- COMMAND …: one task on the first node, output in the job's log too
  local name=$1
  shift 2
  srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="${HOSTS[0]}" \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" ${CONTAINER[@]+"${CONTAINER[@]}"} "$@" \
    > >(tee "$LOGS/$SLURM_JOB_ID.$RESTART-$name-rank0.log") 2>&1
}

attend() {  # COMMAND …: runs it so that traps are obeyed while it runs; returns its code
  # Jobs side by side, quick requeues and steps of one job must not meet on one port. A training
  # takes a second one, five above (launch.meet_elsewhere).
  export MASTER_PORT=$((20000 + SLURM_JOB_ID % 1000 * 10 + (RESTART * 3 + STEP) % 5))
  STEP=$((STEP + 1))
  "$@" &
  local pid=$! code
  while :; do
    INTERRUPTED=0
    wait "$pid"
    code=$?
    [ "$INTERRUPTED" = 1 ] || return "$code"
  done
}

# ---- the record of a run's lives -----------------------------------------------------------------

newest_step() { cat "$RUN_DIR/latest" 2>/dev/null || echo -1; }

begin_attempt() {
  ATTEMPTS=$RUN_DIR/attempts.jsonl
  close_open_attempt
  FROM=$(newest_step)
  printf '{"event":"begin","time":%s,"job":"%s","restart":%s,"nodes":"%s","node_count":%s,"ranks":%s,"gpus":%s,"from":%s}\n' \
    "$(date +%s.%3N)" "$SLURM_JOB_ID" "$RESTART" "$SLURM_JOB_NODELIST" "$NODES" \
    "$((NODES * RANKS_PER_NODE))" "$((NODES * ${SLURM_GPUS_ON_NODE:-0}))" "$FROM" >>"$ATTEMPTS"
  say "begins on $SLURM_JOB_NODELIST, $RANKS_PER_NODE ranks a node, after step $FROM"
}

end_attempt() {  # OUTCOME CODE WHY
  printf '{"event":"end","time":%s,"job":"%s","restart":%s,"from":%s,"to":%s,"outcome":"%s","code":%s,"why":"%s"}\n' \
    "$(date +%s.%3N)" "$SLURM_JOB_ID" "$RESTART" "$FROM" "$(newest_step)" "$1" "$2" "$(text "$3")" >>"$ATTEMPTS"
  say "$1 (code $2) at step $(newest_step): $3"
}

close_open_attempt() {  # its node died, or Slurm killed its shell outright: nobody wrote how it ended
  local last seen job
  last=$(tail -n 1 "$ATTEMPTS" 2>/dev/null) || return 0
  [[ $last == '{"event":"begin"'* ]] || return 0
  field() { sed -n "s/.*\"$1\":\"\{0,1\}\([^\",}]*\).*/\1/p" <<<"$last"; }
  job=$(field job)
  [ "$job" = "$SLURM_JOB_ID" ] || [ -z "$(squeue --noheader --states=running --jobs="$job" 2>/dev/null)" ] \
    || refuse "$RUN_DIR: job $job trains into it; wait for it, or set another run_dir"
  seen=$(stat -c %Y "$RUN_DIR/log.txt" "$RUN_DIR/timeline.jsonl" "$LOGS/$job.$(field restart)"-* 2>/dev/null | sort -n | tail -n 1)
  seen=$(printf '%s\n%s\n' "${seen:-0}" "$(field time)" | sort -n | tail -n 1)
  printf '{"event":"end","time":%s,"job":"%s","restart":%s,"from":%s,"to":%s,"outcome":"lost","code":-1,"why":"ended without a word","estimated":true}\n' \
    "$seen" "$job" "$(field restart)" "$(field from)" "$(newest_step)" >>"$ATTEMPTS"
}

# ---- health --------------------------------------------------------------------------------------

health_failed() {  # whether the ranks ended before the check of pretrain/cluster/health.py had passed
  [ "${HEALTH:-on}" != off ] && [ ! -e "$REPORT/passed" ]
}

blame_nodes() {  # CODE: leaves the job if there is a node to blame
  find_bad_nodes
  [ ${#BAD[@]} -gt 0 ] || return 0
  if [ ${#BAD[@]} = "$NODES" ] && [ "$NODES" -gt 1 ]; then
    end_attempt unhealthy "$1" "all nodes failed the health check, so it is what they share; not requeued"
    exit 1
  fi
  end_attempt unhealthy "$1" "${BAD[*]} failed the health check; not requeued"
  say "without them: sbatch --exclude=$(IFS=,; echo "${BAD[*]}") --nodes=$NODES $(submitted)"
  exit 1
}

# Sets BAD and says what each failed; records them for `submit --exclude-bad` unless it is all nodes.
# A rank that could not meet the others, or was killed while it started, may be the victim of one with
# a trouble of its own: it counts only where nobody has one.
find_bad_nodes() {
  local node check why own silent records=()
  BAD=()
  own=$(cat "$REPORT"/*.rank* 2>/dev/null | grep -v '^meet'$'\t')
  silent="not all of its $RANKS_PER_NODE ranks answered; see $LOGS/$SLURM_JOB_ID.$RESTART-*"
  for node in "${HOSTS[@]}"; do
    while IFS=$'\t' read -r check why; do
      [ "${BAD[*]: -1}" = "$node" ] || BAD+=("$node")
      say "$node: health check '$check' failed: $why"
      records+=("$(printf '{"time":%s,"node":"%s","check":"%s","why":"%s","job":"%s"}' \
        "$(date +%s.%3N)" "$node" "$check" "$(text "$why")" "$SLURM_JOB_ID")")
    done < <(
      if [ -n "$own" ]; then
        cat "$REPORT/$node.rank"* 2>/dev/null | grep -v '^meet'$'\t' | sort -u
      elif [ "$(find "$REPORT" -name "$node.rank*" 2>/dev/null | wc -l)" -lt "$RANKS_PER_NODE" ]; then
        printf 'start\t%s\n' "$silent"
      fi
    )
  done
  if [ -z "$own" ] && [ ${#BAD[@]} = "$NODES" ]; then
    BAD=()  # none has started: no node's fault that could be seen
  elif [ ${#BAD[@]} -lt "$NODES" ] || [ "$NODES" = 1 ]; then
    mkdir -p "$PRETRAIN_SITE"
    [ ${#BAD[@]} = 0 ] || printf '%s\n' "${records[@]}" >>"$PRETRAIN_SITE/bad_nodes.jsonl"
  fi
}

submitted() {  # the script and arguments that sbatch was given
  scontrol -o show job "$JOB" | sed -n 's/.* Command=\(.*\) WorkDir=.*/\1/p'
}

# ---- arrays --------------------------------------------------------------------------------------

# WORK DEPENDENCY: submits SCRIPT once more with the word WORK before its ARGUMENTS, in RUN_DIR, for
# when the elements have ended. AFTER has options for that job.
after_the_array() {
  local name=$SLURM_JOB_NAME-$1-$SLURM_ARRAY_JOB_ID command
  [ "$SLURM_ARRAY_TASK_ID" = "${SLURM_ARRAY_TASK_MIN:?}" ] || return 0
  # A first element that was requeued finds it waiting: it waits for this element too.
  [ -z "$(squeue --noheader --me --name="$name")" ] || return 0
  command=$(printf '%q ' bash "$CODE/$SCRIPT" "$1" "${ARGUMENTS[@]}" "run_dir=$RUN_DIR")
  (
    export PRETRAIN_CODE=$CODE
    options=(--partition="$SLURM_JOB_PARTITION" ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"})
    read -ra more <<<"${AFTER:-}"
    options+=(--dependency="$2:$SLURM_ARRAY_JOB_ID,singleton" --kill-on-invalid-dep=yes)
    conf=${SLURM_CONF:-}
    unset "${!SLURM_@}"  # or the new job takes this one's restart count and sizes for its own
    [ -z "$conf" ] || export SLURM_CONF=$conf
    sbatch --job-name="$name" --nodes=1 --ntasks-per-node=1 --cpus-per-task=4 --time=04:00:00 \
      --requeue --open-mode=append --output="$LOGS/%x.out" "${options[@]}" ${more[@]+"${more[@]}"} \
      --wrap="$command"
  ) || say "what comes after the array was not submitted; then: sbatch $SCRIPT $1 ${ARGUMENTS[*]}"
}

# ---- training, until it is done ------------------------------------------------------------------

train_until_done() {
  [[ ${LAUNCHER:=srun} =~ ^(srun|torchrun)$ ]] \
    || refuse "LAUNCHER=$LAUNCHER: expected srun (one task a rank) or torchrun (one task a node)"
  forget_old_request
  begin_attempt
  trap 'INTERRUPTED=1; ask_to_stop USR1' USR1
  trap 'INTERRUPTED=1; ask_to_stop TERM' TERM
  REPORT=$LOGS/$SLURM_JOB_ID.$RESTART-health
  local code=0 complete=no
  if [ "$ASKED$TERMED" = 00 ]; then
    attend launch
    code=$?
    [ "$code" != 0 ] || [ ! -e "$RUN_DIR/done" ] || complete=yes
  fi
  after_training "$code" "$complete"
}

launch() {
  local command=(-m pretrain train "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} "run_dir=$RUN_DIR")
  [ "${HEALTH:-on}" = off ] || command+=(--health "$REPORT")
  case $LAUNCHER in
    srun) on_ranks train -- "${PYTHON[@]}" "${command[@]}" ;;
    torchrun)  # one task a node; the agent starts the ranks and keeps their output apart
      tasks 1 "$LOGS/$SLURM_JOB_ID.$RESTART-agent-node%t.log" -- \
        "${PYTHON[@]}" -m torch.distributed.run \
        --nnodes="$NODES" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=0 --rdzv-backend=c10d \
        --rdzv-id="$SLURM_JOB_ID.$RESTART" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
        --log-dir="$LOGS/$SLURM_JOB_ID.$RESTART-train" --redirects=3 "${command[@]}" ;;
  esac
}

ask_to_stop() {  # SIGNAL
  [ "$1" != TERM ] || TERMED=1
  if [ -e "$RUN_DIR/stop" ] && ! grep -q '^slurm job' "$RUN_DIR/stop"; then
    say "$1: a person has asked for the end already"
    return
  fi
  ASKED=1
  echo "slurm job $SLURM_JOB_ID.$RESTART $1" >"$RUN_DIR/stop"
  say "$1: the ranks are asked to save and leave"
}

forget_old_request() {  # of this job's earlier life, or of a job that is gone; a person's stays
  local job
  job=$(sed -n 's/^slurm job \([0-9]*\).*/\1/p' "$RUN_DIR/stop" 2>/dev/null) || return 0
  [ -n "$job" ] || return 0
  if [ "$job" = "$SLURM_JOB_ID" ] || [ -z "$(squeue -h -j "$job" 2>/dev/null)" ]; then
    rm -f "$RUN_DIR/stop"
  fi
}

after_training() {  # CODE of the ranks, whether the run is COMPLETE. What becomes of the job
  local code=$1 why=''
  if [ "$2" = yes ]; then
    end_attempt "done" 0 "the run is complete"
    exit 0
  fi
  if [ "$TERMED" = 1 ]; then  # the ranks got TERM too, and have KillWait seconds to save
    if [ "$(of_job Reason)" != TimeLimit ]; then
      end_attempt terminated "$code" "cancelled, preempted or requeued; Slurm does what is to be done"
      exit 0
    fi
    why="the time limit, without USR1 before it"
  elif [ "$code" != 0 ]; then
    after_a_crash "$code"
  elif [ "$ASKED" = 1 ]; then
    why="Slurm asked for the nodes"
  elif [[ $(of_job PreemptTime) == [0-9]* ]]; then  # the ranks alone got TERM, and have saved
    why="preempted"
  else
    end_attempt stopped 0 "somebody asked it to stop; submit it again to go on"
    exit 0
  fi
  [ -z "$why" ] || end_attempt stopped "$code" "$why; the job is requeued"
  unless_stuck
  requeue
}

after_a_crash() {  # CODE
  local gone
  first_words
  if refused; then
    end_attempt refused 2 "the input is wrong; not requeued"
    exit 2
  fi
  gone=$(silent_nodes)
  if [ -n "$gone" ]; then
    say "$gone does not answer; Slurm requeues the job when it has found out"
    sleep "${LOST_NODE_PATIENCE:-900}"
    end_attempt lost "$1" "$gone did not answer"
  else
    if health_failed; then
      blame_nodes "$1"
    fi
    end_attempt crashed "$1" "a rank failed"
  fi
}

own_logs() {  # what the ranks of this life have said
  find "$LOGS" \( -name "$SLURM_JOB_ID.$RESTART-*rank*.log" \
    -o -path "*/$SLURM_JOB_ID.$RESTART-train/*" -name stderr.log \) "$@"
}

# Whether a rank refused the input. Its code does not tell: srun ends with 2 too where there is no
# interpreter, and with 143 when a second rank was killed meanwhile; torchrun always with 1.
# After the first step it is no input any more: a disk that was away for a moment deserves another life.
refused() {
  ! grep -qs "\"event\": *\"begin\".*\"job\": *\"$SLURM_JOB_ID\", *\"restart\": *$RESTART\b" "$RUN_DIR/timeline.jsonl" \
    && [ -n "$(own_logs -exec grep -l '^pretrain: ' {} +)" ]
}

first_words() {  # what the rank said that failed first: nobody's log was left alone for longer
  local file
  file=$(own_logs -exec grep -lE '^(Traceback|pretrain: |Fatal |.*Error)' {} + | xargs -r -d '\n' ls -tr | head -n 1)
  [ -z "$file" ] || { say "from $file:"; tail -n 15 "$file"; }
}

silent_nodes() {  # nodes on which nothing can be started any more
  local node
  for node in "${HOSTS[@]}"; do
    timeout 20 srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$node" true >/dev/null 2>&1 || echo "$node"
  done | paste -sd,
}

unless_stuck() {  # ends the job if it comes back again and again without a new checkpoint
  local now crashed idle
  now=$(newest_step)
  crashed=$(grep -cE "\"event\":\"end\".*\"job\":\"$SLURM_JOB_ID\".*\"to\":$now,\"outcome\":\"(crashed|lost)\"" "$ATTEMPTS")
  idle=$(grep -c "\"event\":\"end\".*\"job\":\"$SLURM_JOB_ID\".*\"from\":$now,\"to\":$now,\"outcome\":\"stopped\"" "$ATTEMPTS")
  if [ "$crashed" -ge "$MAX_CRASHES" ] || [ "$idle" -ge "$MAX_STOPS" ]; then
    say "gives up: it failed $crashed times and was stopped $idle times since step $now without a new checkpoint (MAX_CRASHES=$MAX_CRASHES, MAX_STOPS=$MAX_STOPS); not requeued"
    exit 1
  fi
}

requeue() {
  trap - TERM
  trap '' USR1
  say "requeued"
  scontrol requeue "$JOB" && sleep 60  # until Slurm ends this shell
  exit 75  # where scontrol is not allowed: RequeueExit=75 in slurm.conf does the same
}
