#!/usr/bin/env bash
# Train on several machines whose number and order are fixed. Start this on each of them, in the same folder of a shared disk.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 scripts/many_nodes_static.sh CONFIG [--key=value ...]      on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 scripts/many_nodes_static.sh CONFIG [--key=value ...]      on node1
#
# What follows CONFIG goes to train.py. Repeated on all machines after an interruption, the run goes on.
# NNODES             machines
# NODE_RANK          of this machine, 0 to NNODES - 1
# MASTER_ADDR        name or address of machine 0, which the others can reach
# MASTER_PORT=29500  a free port there
# NPROC=4            processes a machine, instead of one for each GPU
# DRY_RUN=1          print the command instead of running it

set -euo pipefail
source "$(dirname "$0")/launch.sh"
need NNODES NODE_RANK MASTER_ADDR
launch --nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" \
    --nproc-per-node="${NPROC:-gpu}"
