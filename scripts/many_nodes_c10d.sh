#!/usr/bin/env bash
# Train on several machines that find each other: the same command on each, in the same folder of a shared disk. When a
# process dies, the machines meet again and go on from the last state; with NNODES=2:4, so they do when a machine is lost.
#
#   NNODES=2 RDZV_ENDPOINT=node0:29500 scripts/many_nodes_c10d.sh CONFIG [--key=value ...]
#
# What follows CONFIG goes to train.py. --tokens-per-step must divide by block size x processes, for each number of machines.
# NNODES                  machines: a number, or least:most
# RDZV_ENDPOINT           name or address of one of them, and a free port there
# RDZV_ID=nanotwist       a name that the machines of one run share
# MAX_RESTARTS=3          how often to meet again before giving up
# LOCAL_ADDR              address of this machine, where the others cannot find it by its name
# NPROC=4                 processes a machine, instead of one for each GPU
# DRY_RUN=1               print the command instead of running it

set -euo pipefail
source "$(dirname "$0")/launch.sh"
need NNODES RDZV_ENDPOINT
launch --nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="${RDZV_ID:-nanotwist}" \
    ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} --max-restarts="${MAX_RESTARTS:-3}" --nproc-per-node="${NPROC:-gpu}"
