#!/usr/bin/env bash
# Several nodes under Slurm, base and training state in pieces over all their GPUs (FSDP2).
#
#   sbatch --nodes 4 --gpus-per-node 8 recipes/distributed/slurm.sh RECIPE --output runs/NAME
#
# What stands after the script's name goes to `maskft train`. Submit it from the repository. Base, data and --output
# must be on a disk that all nodes see: each process reads its share of the base and writes its share of a checkpoint
# there. A job that its time limit ended goes on from the last checkpoint (training.save_steps) when it is submitted
# again with the same --output.
#SBATCH --job-name maskft
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 32
#SBATCH --time 24:00:00
set -euo pipefail

gpus=${SLURM_GPUS_ON_NODE:-8}
# all names are read before one is taken: a pipe closed early would end the program before it with SIGPIPE
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${names[0]}
port=$((20000 + SLURM_JOB_ID % 20000)) # another for each job
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-32} / gpus))

# SLURM_NODEID is known on the node alone, so the inner shell reads it
srun --kill-on-bad-exit=1 bash -c "exec accelerate launch \
  --config_file recipes/distributed/fsdp2.yaml \
  --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * gpus)) \
  --machine_rank \$SLURM_NODEID --main_process_ip $first --main_process_port $port \
  -m maskft.cli train $(printf '%q ' "$@")"
