#!/usr/bin/env bash
# Train on all GPUs of this machine.
#
#   scripts/one_node.sh CONFIG [--key=value ...]      e.g. scripts/one_node.sh configs/llama-7b.toml --reshard=false
#
# What follows CONFIG goes to train.py. Repeated after an interruption, the run goes on, also with another number of GPUs.
# NPROC=4       processes, instead of one for each GPU; needed on a machine without GPUs
# DRY_RUN=1     print the command instead of running it

set -euo pipefail
source "$(dirname "$0")/launch.sh"
launch --standalone --nproc-per-node="${NPROC:-gpu}"
