#!/usr/bin/env bash
#SBATCH --job-name=maskft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#
# Several machines by Slurm, one launcher on each:
#
#   sbatch recipes/launch/slurm.sh recipes/paper/phi-2-s-mft-both.yaml training.gradient_accumulation_steps=2
#
# KIND=fsdp2 (the default), ddp or zero3. Submit from the repository's folder; data and runs must be on a file system
# that all machines share. Five minutes before the time is over Slurm sends SIGTERM: the step is finished, a checkpoint
# saved, and the same command goes on from there. DRY_RUN=1 prints the command, also without Slurm.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: sbatch slurm.sh RECIPE [key=value ...] [--output DIR]" >&2
  exit 2
fi
kind=${KIND:-fsdp2}
nodes=${SLURM_NNODES:-2} gpus=${SLURM_GPUS_ON_NODE:-8}
config=recipes/distributed/$kind.yaml
for file in "$config" "$1"; do
  if [ ! -f "$file" ]; then
    echo "there is no $file; call this from the repository's folder, with KIND ddp, fsdp2 or zero3 and a recipe" >&2
    exit 2
  fi
done
head=localhost
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  # all names are read before one is taken: a pipe closed early would end the program before it with SIGPIPE
  mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  head=${names[0]}
fi
launch=(
  "${PYTHON:-python}" -m accelerate.commands.launch --config_file "$config"
  --num_machines "$nodes" --num_processes $((nodes * gpus))
  --main_process_ip "$head" --main_process_port "${PORT:-29500}"
)

if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${launch[@]}" --machine_rank 0 -m maskft.cli train "$@"
  echo
  exit 0
fi
# the rank of a machine is known on the machine alone
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c 'exec "${@:2:$1}" --machine_rank "$SLURM_NODEID" "${@:2+$1}"' \
  launch "${#launch[@]}" "${launch[@]}" -m maskft.cli train "$@"
