#!/usr/bin/env bash
# Eight GPUs with base, scores, gradients and Adam's moments in pieces (FSDP2).
#
#   recipes/launch/eight-gpus-fsdp2.sh recipes/paper/phi-2-full.yaml
#
# DRY_RUN=1 prints the command.
exec "$(dirname "$0")/launch.sh" 8 fsdp2 "$@"
