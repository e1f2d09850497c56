#!/usr/bin/env bash
# Eight GPUs with a copy of the model each (DDP): the fastest, where all of it fits on one.
#
#   recipes/launch/eight-gpus-ddp.sh recipes/paper/phi-2-s-mft-attn.yaml
#
# DRY_RUN=1 prints the command.
exec "$(dirname "$0")/launch.sh" 8 ddp "$@"
