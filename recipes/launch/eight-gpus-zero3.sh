#!/usr/bin/env bash
# Eight GPUs with base, scores, gradients and Adam's moments in pieces (DeepSpeed ZeRO-3).
# Needs: pip install 'maskft[distributed]'
#
#   recipes/launch/eight-gpus-zero3.sh recipes/paper/phi-2-full.yaml
#
# DRY_RUN=1 prints the command.
exec "$(dirname "$0")/launch.sh" 8 zero3 "$@"
