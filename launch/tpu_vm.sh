#!/usr/bin/env bash
# Runs trace_jax on a Cloud TPU slice: queued resources, every worker, restart after preemption.
#
#   launch/tpu_vm.sh create NAME --zone ZONE --type v6e-64 [--spot] [--slices N] [--runtime VERSION]
#   launch/tpu_vm.sh run    NAME --zone ZONE [--type ... --keep] -- python launch/train.py CONFIG --workdir gs://...
#   launch/tpu_vm.sh logs   NAME --zone ZONE
#   launch/tpu_vm.sh stop   NAME --zone ZONE       (a preemption notice: the run saves a checkpoint and ends)
#   launch/tpu_vm.sh delete NAME --zone ZONE
#
# `run` copies the files that git tracks to every worker, installs requirements-tpu.txt once, and starts the command.
# `run --keep` stays: it creates the slice if there is none, and when the slice is preempted it creates another and
# starts the command again, which goes on from its newest checkpoint. It ends when the command has ended: with its exit
# code, but for 75 (saved and stopped by a notice that `stop` did not send), after which the command is started again.
# --project P is passed on; without it gcloud's own default holds. docs/tpu.md walks through a first run.
set -euo pipefail

readonly POLL_SECONDS="${TPU_VM_POLL_SECONDS:-60}"
readonly TAR="trace_jax.tar.gz"
readonly TRIES=10  # of a call of gcloud that may fail for a while
readonly SAVED=75  # the exit code after a saved stop (training/train.py)
readonly GRACE_SECONDS=60  # for a program that is told to stop, as on a preemption

die() { echo "error: $*" >&2; exit 1; }
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }

runtime_of() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) die "no runtime is known for --type $1; give --runtime" ;;
  esac
}

[[ $# -gt 0 && $1 != --help && $1 != -h ]] || { usage; exit 0; }
action=$1; shift
case $action in create | run | logs | stop | delete) ;; *) die "no action '$action'; there are create, run, logs, stop, delete" ;; esac
[[ $# -gt 0 && $1 != -* ]] || die "$action: give the slice a NAME first"
name=$1; shift
zone="" type="" runtime="" slices=1 spot=() project=() keep=false command=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --zone | --type | --runtime | --slices | --project)
      [[ $# -gt 1 ]] || die "$1 needs a value"
      case $1 in
        --zone) zone=$2 ;; --type) type=$2 ;; --runtime) runtime=$2 ;; --slices) slices=$2 ;;
        --project) project=("--project=$2") ;;
      esac
      shift 2 ;;
    --spot) spot=(--spot); shift ;;
    --keep) keep=true; shift ;;
    --) shift; command=("$@"); break ;;
    *) die "unknown option $1" ;;
  esac
done
[[ -n $zone ]] || die "--zone is missing, e.g. --zone us-east5-b"
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices $slices is no number of slices"
[[ -z $type || -n $runtime ]] || runtime=$(runtime_of "$type")
readonly where=("--zone=$zone" "${project[@]}")

nodes() {
  if ((slices == 1)); then echo "$name"; else seq -f "$name-%.0f" 0 $((slices - 1)); fi
}

create() {
  [[ -n $type ]] || die "create: --type is missing, e.g. --type v6e-64"
  local node=("--node-id=$name")
  ((slices == 1)) || node=("--node-count=$slices" "--node-prefix=$name")
  gcloud compute tpus queued-resources create "$name" "${where[@]}" "${node[@]}" \
    --accelerator-type="$type" --runtime-version="$runtime" "${spot[@]}"
}

# ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDED, FAILED, ...; ABSENT where gcloud says that there is no such
# resource; UNKNOWN where it says anything else: a failed call tells nothing about the slice.
state() {
  local said errors
  errors=$(mktemp)
  if said=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>"$errors"); then
    echo "$said"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm "$errors"
}

# COMMAND...: again and again, until it works or has failed TRIES times.
retried() {
  local try
  for ((try = 1; try <= TRIES; try++)); do
    "$@" && return
    ((try == TRIES)) || sleep "$POLL_SECONDS"
  done
  return 1
}

delete() { gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }

# on WORKERS SHELL_COMMAND: runs it on those workers of every slice at once; fails if one fails.
on() {
  local node waiting=() failed=0
  for node in $(nodes); do
    gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker="$1" --command="$2" &
    waiting+=($!)
  done
  for node in "${waiting[@]}"; do wait "$node" || failed=1; done
  return $failed
}

# Fails, like all that is called in it, without ending the script.
start() {
  local archive node job
  archive=$(mktemp -d)
  git -C "$(dirname "$0")/.." ls-files -z | tar -C "$(dirname "$0")/.." --null --files-from=- -czf "$archive/$TAR" || return
  for node in $(nodes); do  # a worker that has just become active may not answer yet
    retried gcloud compute tpus tpu-vm scp "$archive/$TAR" "$node:" "${where[@]}" --worker=all || return
  done
  rm -r "$archive"
  retried on all "set -e; mkdir -p trace_jax; tar -xzf $TAR -C trace_jax; cd trace_jax
    command -v python3.11 >/dev/null || { sudo apt-get -qq update; sudo apt-get -qq install -y python3.11 python3.11-venv; }
    [ -d .venv ] || python3.11 -m venv .venv
    cat requirements.txt requirements-tpu.txt | cmp -s - .venv/installed || {
      .venv/bin/pip -q install -r requirements-tpu.txt; cat requirements.txt requirements-tpu.txt > .venv/installed; }" || return
  # The exit code is kept beside the log: that is how --keep knows an end from a preemption. A program that still runs
  # here is told to stop first: two would write into one run.
  printf -v job '%q ' "${command[@]}"
  printf -v job '%q' "(exec $job) >> run.log 2>&1 & echo \$! > run.pid; wait \$!; echo \$? > run.rc"
  retried on all "cd trace_jax; old=\$(cat run.pid 2>/dev/null)
    ended() { for _ in \$(seq \$1); do [ ! -s run.rc ] || return 0; sleep 1; done; return 1; }
    if [ -n \"\$old\" ] && [ ! -s run.rc ] && [ \"\$(readlink /proc/\$old/cwd)\" = \"\$PWD\" ]; then
      kill -TERM \$old; ended $GRACE_SECONDS || { kill -KILL \$old; ended $GRACE_SECONDS; }
    fi
    rm -f run.pid run.rc run.stop
    PATH=\$PWD/.venv/bin:\$PATH setsid nohup bash -c $job < /dev/null > /dev/null 2>&1 &" || return
  echo "started on $(nodes | tr '\n' ' ')of $zone; follow it with: $0 logs $name ${where[*]/#--zone=/--zone }"
}

wait_until_active() {
  local now
  while now=$(state); [[ $now != ACTIVE ]]; do
    case $now in
      ABSENT) retried create || die "$name could not be created" ;;
      SUSPENDED | FAILED) echo "$name is $now: creating it anew" >&2; retried delete || die "$name could not be deleted" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# The exit code of the command, and "stopped" where `stop` asked for it; nothing while it runs.
exit_code() {
  gcloud compute tpus tpu-vm ssh "$(nodes | head -1)" "${where[@]}" --worker=0 \
    --command='cd trace_jax && echo $(cat run.rc run.stop 2>/dev/null)' 2>/dev/null || true
}

# Waits for the end of the command: sets `code`, and `asked` where `stop` ended it. Fails when its slice is gone.
watch_command() {
  local now
  code="" asked=""
  while now=$(state); [[ $now == ACTIVE || $now == UNKNOWN ]]; do
    read -r code asked < <(exit_code) || true
    if [[ -n $code ]]; then
      [[ $code != 0 && -z $asked ]] || return 0
      sleep "$POLL_SECONDS"  # workers that lose another to a preemption fail before the slice is seen to go
      now=$(state)
      [[ $now == ACTIVE || $now == UNKNOWN ]]
      return
    fi
    sleep "$POLL_SECONDS"
  done
  return 1
}

run() {
  ((${#command[@]})) || die "run: give the command after --, e.g. -- python launch/train.py mbeir_qwen2_5_vl_7b --workdir gs://bucket/run"
  if ! $keep; then start || die "$name: the command was not started"; return; fi
  [[ -n $type ]] || die "run --keep: --type is missing; a preempted slice is created anew"
  local code asked
  while true; do
    wait_until_active
    if ! start; then
      [[ $(state) != ACTIVE ]] || die "$name: the command was not started"
    elif ! watch_command; then
      echo "$name was preempted: the run goes on from its newest checkpoint on the next slice" >&2
    elif [[ $code == "$SAVED" && -z $asked ]]; then
      echo "the command saved and stopped: it is started again" >&2
    else
      break
    fi
  done
  echo "the command ended with $code"
  return "$code"
}

case $action in
  create) create ;;
  run) run ;;
  logs) gcloud compute tpus tpu-vm ssh "$(nodes | head -1)" "${where[@]}" --worker=0 --command='tail -n 200 -F trace_jax/run.log' ;;
  stop) on all 'cd trace_jax && echo stopped > run.stop && kill -TERM -- "$(cat run.pid)"' ;;
  delete) delete ;;
esac
