#!/usr/bin/env bash
# Train on one GPU, or on the CPU where there is none.
#
#   scripts/one_gpu.sh CONFIG [--key=value ...]       e.g. scripts/one_gpu.sh configs/opt-125m.toml --seed=1
#
# What follows CONFIG goes to train.py. Repeated after an interruption, the run goes on. CUDA_VISIBLE_DEVICES=3 picks a GPU.
# NPROC=2       processes, instead of 1
# DRY_RUN=1     print the command instead of running it

set -euo pipefail
source "$(dirname "$0")/launch.sh"
launch --standalone --nproc-per-node="${NPROC:-1}"
