#!/usr/bin/env bash
# Start a run on every host of a DeepSpeed hostfile, from any machine that reaches them by ssh:
#
#   launch/deepspeed/train.sh HOSTFILE --config run.yaml [--any_field value …]
#
# HOSTFILE has a line `host slots=GPUS` for every host. The hosts are checked first (--no_preflight: not), a lost host
# ends the run within seconds, and the exit status is the ranks' (85: preempted and saved). docs/cluster.md says more;
# `launch/deepspeed/train.sh --help` lists the options.
set -euo pipefail

exec python -m orpo_ds launch "$@"
