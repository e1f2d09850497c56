#!/usr/bin/env bash
# One GPU. The batch of a step is a recipe's per_device_train_batch_size x gradient_accumulation_steps, so give recipes
# that were written for eight GPUs eight times the accumulation:
#
#   recipes/launch/one-gpu.sh recipes/paper/phi-2-s-mft-attn.yaml training.gradient_accumulation_steps=32
#
# DRY_RUN=1 prints the command.
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
exec "$(dirname "$0")/launch.sh" 1 none "$@"
