#!/usr/bin/env bash
# Train a recipe on GPUs of this machine. The scripts beside this one call it:
#
#   recipes/launch/launch.sh GPUS KIND RECIPE [key=value ...] [--output DIR]
#
# GPUS is a number; KIND is the name of a file in recipes/distributed (ddp, fsdp2, zero3), and "none" on one GPU.
# With DRY_RUN=1 the command is printed and not run. PYTHON names the interpreter.
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: $(basename "$0") GPUS KIND RECIPE [key=value ...] [--output DIR]" >&2
  exit 2
fi
gpus=$1 kind=$2 recipe=$3
shift 3
if [ ! -f "$recipe" ]; then
  echo "there is no recipe $recipe; those of the paper are in recipes/paper" >&2
  exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command=("${PYTHON:-python}" -m)
if [ "$kind" != none ]; then
  config=$here/../distributed/$kind.yaml
  if [ ! -f "$config" ]; then
    echo "there is no $config; KIND is ddp, fsdp2, zero3 or none" >&2
    exit 2
  fi
  command+=(accelerate.commands.launch --config_file "$config" --num_processes "$gpus" -m)
fi
command+=(maskft.cli train "$recipe" "$@")

if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
