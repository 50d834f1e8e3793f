"""One update of a large model in parts, on what memory this machine has: the plan of training/memory.py against what was held.

    random text LM of OPT-1.3B's width on disk --train.py, fsdp, 2 processes: read, warm start, one step, save, export-->
    most memory that each process held, beside the plan -> results/large_model.json

    python scripts/large_model.py                  # 1.0 billion parameters, 18 GB of memory, 24 GB of disk; some minutes
    python scripts/large_model.py --layers=4
"""
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
import twist  # noqa: E402
from checkpoints import files, pretrained  # noqa: E402
from model import TransformerConfig  # noqa: E402
from training import memory  # noqa: E402


@dataclass(frozen=True)
class LargeConfig:
    layers: int = 20  # of 50 million parameters each
    processes: int = 2  # that share the model
    rows: int = 1  # of 256 ids, in each process
    optimizer: str = "split"  # adamw | split
    work: str = "build/large_model"  # folder for the model and the run; removed at the end
    out: str = "results/large_model.json"  # what was found
    RANGES = {"layers": (1, 1000), "processes": (1, 1024), "rows": (1, config.MOST)}
    CHOICES = {"optimizer": ("adamw", "split")}


def main(argv=None):
    options = config.load(LargeConfig, argv)
    work = Path(options.work)
    files.refuse_existing(work, remedy="delete it, or give another --work")
    shape = TransformerConfig(vocab_size=50272, n_layer=options.layers, n_head=32, n_kv_head=32, n_embd=2048, head_dim=64,
                              n_inner=8192)
    fields = dataclasses.asdict(shape)
    settings, tensors = pretrained.write_lm(fields.pop("family"), fields,
                                            {name: tensor.bfloat16() for name, tensor in twist.cold_tensors(shape)})
    files.write_model(work / "lm", settings, tensors)
    del tensors
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}", "train.py",
               f"--lm={work}/lm", f"--out={work}/run", "--steps=1", "--parallel=fsdp", f"--optimizer={options.optimizer}",
               "--dtype=bfloat16", "--recompute=full", "--block-size=256", "--eval-rows=2",
               f"--tokens-per-step={256 * options.rows * options.processes}", "--threads=1", "--warmup=0"]
    began = time.perf_counter()
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        raise ValueError(f"the run failed:\n{finished.stderr[-3000:]}")
    nothing = "import torch, train; from training import logs; print(logs.memory_gb(torch.device('cpu')))"
    bare = subprocess.run([sys.executable, "-c", nothing], cwd=ROOT, capture_output=True, text=True, check=True)
    held = [float(number) for number in re.search(r"most memory held .*: (.+)", finished.stdout)[1].split(",")]
    speech = dataclasses.replace(shape, vocab_size=102)
    plan = memory.plan(speech, parallel="fsdp", shard=options.processes, micro_rows=options.rows, block_size=256,
                       dtype=torch.bfloat16, optimizer=options.optimizer, recompute="full")
    saved = sum(path.stat().st_size for path in (work / "run/step_000001").iterdir())
    result = {"command": "python scripts/large_model.py", "options": dataclasses.asdict(options), "parameters": plan.parameters,
              "planned_gb": round(plan.total / 1e9, 3), "held_gb": held, "held_before_anything_gb": round(float(bare.stdout), 3),
              "state_gb": round(saved / 1e9, 3),
              "seconds": round(time.perf_counter() - began)}
    files.write_text(options.out, json.dumps(result, indent=2) + "\n")
    shutil.rmtree(work)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    torch.set_num_threads(2)
    config.command(main)
