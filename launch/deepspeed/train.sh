#!/usr/bin/env bash
# Start a run on every host of a DeepSpeed hostfile, from any one of them:
#
#   launch/deepspeed/train.sh HOSTFILE --config run.yaml [--any_field value …]
#
# HOSTFILE has a line `host slots=GPUS` for every host. All hosts need the same environment and see the same files.
set -euo pipefail

hostfile=${1:?usage: train.sh HOSTFILE --config run.yaml [--any_field value …]}
shift

# A host that loses power leaves pdsh on its dead ssh for minutes; a missing heartbeat ends it within seconds.
export PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND:-"-o ServerAliveInterval=3 -o ServerAliveCountMax=2"}

exec deepspeed --hostfile "$hostfile" --launcher pdsh --module orpo_ds train "$@"
