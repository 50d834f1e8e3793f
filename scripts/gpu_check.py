"""What a GPU is asked once: what is there, parts of a model in a group of one, whether two runs or two folders of units agree.

    python scripts/gpu_check.py environment --out=DIR          # versions, and the one product that every bfloat16 step needs
    python scripts/gpu_check.py group --out=DIR                # FSDP2, compile, bfloat16, ALiBi, saving; recompilations, waits
    python scripts/gpu_check.py losses RUN RUN --within=0.02   # largest difference of the losses of two run folders
    python scripts/gpu_check.py units UNITS UNITS              # two folders of shards hold the same units
    python scripts/gpu_check.py table DIR                      # what scripts/gpu_acceptance.sh left there

Rows go to DIR/NAME.json as they come. Exit code 1 if one is not as it should be. `--device=cpu` rehearses it, small.
"""
import contextlib
import csv
import importlib.metadata
import json
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).parent.parent))
import config  # noqa: E402
import twist  # noqa: E402
from checkpoints import files  # noqa: E402
from corpus.loader import Batch  # noqa: E402
from model import TransformerConfig, generate  # noqa: E402
from training import distributed, pipeline, sharding, state  # noqa: E402
from training.learner import Learner  # noqa: E402

PACKAGES = ("triton", "numpy", "safetensors", "tqdm", "soundfile", "cffi", "pytest", "hypothesis", "transformers")
SHAPES = {"cuda": (12, 768, 16, 1024), "cpu": (3, 64, 2, 64)}  # layers, width, rows, T: as OPT-125M, so that a GPU has work
UPDATES = 6
NEAR = 0.02  # nats between losses in bfloat16


@dataclass(frozen=True)
class CheckConfig:
    what: tuple[str, ...] = ()  # environment | group | losses RUN RUN | units UNITS UNITS | table DIR
    out: str = "results/acceptance"  # folder for the JSON file
    device: str = "cuda"  # cuda | cpu
    within: float = NEAR  # losses: largest difference that is well, nats


class Rows:
    """Lines of a table, printed and written as they come."""

    def __init__(self, path):
        self.path, self.rows = path, []

    def add(self, what, value, good=True):
        """good: whether it is as it should be."""
        self.rows.append({"what": what, "value": value, "good": bool(good)})
        print(f"{what}: {value}{'' if good else '   <- not as it should be'}", flush=True)
        files.write_json(self.path, {"torch": torch.__version__, "rows": self.rows})


def largest(first, second):
    """Difference of two rows of numbers; NaN if one of them is."""
    return (torch.tensor([*first]).double() - torch.tensor([*second]).double()).abs().max().item()


# ---------------------------------------------------------------------------------------------- what is there

def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment(options, rows):
    rows.add("Python", sys.version.split()[0])
    rows.add("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for package in PACKAGES:
        rows.add(package, installed(package))
    if options.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        rows.add("GPU", f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} cores, "
                        f"{card.total_memory / 1e9:.0f} GB; {torch.cuda.device_count()} of them")
    # kernels/fused_cross_entropy.py: weights' gradients of 16-bit factors added up in float32
    total, a, b = (torch.ones(64, 64, dtype=dtype, device=options.device) for dtype in (torch.float32, *[torch.bfloat16] * 2))
    able = "dtype_out" in torch.ops.aten.addmm.overloads()
    rows.add("addmm has out_dtype", able)
    if able and options.device == "cuda":  # there is no such product for CPUs
        try:
            torch.addmm(total, a / 3, b, out_dtype=torch.float32, out=total)
            expected = 1 + 64 * (a / 3).float()[0, 0].item()
            rows.add("addmm in float32", total[0, 0].item(), abs(total[0, 0].item() - expected) < 1e-4)
        except (RuntimeError, TypeError) as error:
            rows.add("addmm in float32", str(error).partition("\n")[0], False)


# ---------------------------------------------------------------------------------------------- a group of one

def make_learner(parallel, dist):
    layers, width, _, T = SHAPES[dist.device.type]
    heads = width // 64
    model_config = TransformerConfig(
        vocab_size=502, block_size=T, n_layer=layers, n_head=heads, n_kv_head=heads, n_embd=width, head_dim=64,
        n_inner=4 * width, position="alibi", mlp="gelu_tanh", embed_norm=True, family="bloom")
    options = types.SimpleNamespace(
        dtype="bfloat16", parallel=parallel, optimizer="adamw", recompute="selective", compile="blocks", shard_size=0,
        reshard=True, peak_lr=1e-3, weight_decay=0.1, beta_2=0.95, clip=1.0)
    return Learner(model_config, options, dist)


def update(learner, batch):
    """As train.py makes it; its numbers, to be read."""
    return learner.update(batch, len(batch.ids), None, learner.options.peak_lr)


def waits(learner, batch):
    """How often the host waits for the GPU in one update, as PyTorch notices it; 0 on CPUs."""
    if not learner.on_gpu:
        return 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # warns of itself, too, the first time
        try:
            update(learner, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in said)


def idle(learner, batch, updates=6):
    """Share of the time from the first kernel of some updates to the last in which none runs; None on CPUs. Each update is read
    after the next is launched, as in train.py."""
    if not learner.on_gpu:
        return None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for late, in pipeline.one_late(((update(learner, batch),) for _ in range(updates)), lambda _: False):
            late.read()
    spans = sorted((event.time_range.start, event.time_range.end) for event in profile.events()
                   if event.device_type == torch.autograd.DeviceType.CUDA)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:  # kernels of several streams overlap
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return round(1 - busy / (reached - spans[0][0]), 3)


def group(options, rows):
    """Whole, and in parts of a group of one: the same losses, no compilation after the first, saved and loaded."""
    dist = distributed.setup(options.device)
    _, _, B, T = SHAPES[dist.device.type]
    draw = torch.Generator().manual_seed(0)
    ids, more = (torch.randint(2, 502, (count, T + 1), generator=draw) for count in (B, B + 1))
    batch, validation = (Batch(found[:, :-1].contiguous(), found[:, 1:].contiguous(), None) for found in (ids, more))
    batch = batch.pinned() if dist.device.type == "cuda" else batch
    backend = {} if dist.device.type == "cuda" else {"force_backend": "aot_eager"}  # no wait for a C++ compiler
    losses = {}
    with torch.compiler.set_stance("default", **backend) if backend else contextlib.nullcontext():
        for parallel in ("auto", "fsdp"):
            counters.clear()
            learner = make_learner(parallel, dist)
            learner.fill(twist.cold_tensors(learner.config))
            with torch.no_grad():  # first, as train.py does, and with other rows
                learner.forward(validation)
            losses[parallel] = [update(learner, batch).read()[0] for _ in range(UPDATES)]
            graphs = counters["stats"]["unique_graphs"]
            rows.add(f"{learner.parallel}: graphs", graphs, graphs == 2)
            with learner.autocast():
                drawn = generate(learner.model, ids[:2, :8].to(dist.device), 16, temperature=0)
            update(learner, batch)
            rows.add(f"{learner.parallel}: graphs after drawing", counters["stats"]["unique_graphs"],
                     counters["stats"]["unique_graphs"] == graphs and drawn.shape == (2, 24))
            waited = waits(learner, batch)
            rows.add(f"{learner.parallel}: waits for the GPU in an update", waited, waited == 0)
            rows.add(f"{learner.parallel}: idle share of the GPU from update to update", idle(learner, batch))
        apart = largest(*losses.values())
        # in parts the residual stream is bfloat16, too: .0206 on an H100
        rows.add("losses, whole and in parts, differ by", round(apart, 5), apart < 2.5 * NEAR)
        rows.add("loss falls from, to", [round(losses["fsdp"][i], 4) for i in (0, -1)], losses["fsdp"][-1] < losses["fsdp"][0])
        saver = state.Saver(Path(options.out) / "group", 1, False, dist)
        saver.save(learner, {"step": 1})
        again = make_learner("fsdp", dist).fill(None)
        state.load(Path(options.out) / "group", again)
        saved, loaded = state.named(learner), state.named(again)
        same = saved.keys() == loaded.keys() and all(
            torch.equal(sharding.part(tensor), sharding.part(loaded[name])) for name, tensor in saved.items())
        rows.add("a state comes back", f"{len(saved)} tensors", same)
        after = [update(one, batch).read()[0] for one in (learner, again)]
        rows.add("and goes on with losses", after, abs(after[0] - after[1]) < 1e-3)
    distributed.leave()


# ---------------------------------------------------------------------------------------------- comparing, and the table

def losses(options, rows):
    """Two run folders of the same steps."""
    runs = []
    for folder in options.what[1:]:
        with open(Path(folder) / "log.csv", newline="") as file:
            runs.append({int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]})
    apart = largest(runs[0].values(), runs[1].values()) if runs[0].keys() == runs[1].keys() else None
    rows.add(f"{len(runs[0])} and {len(runs[1])} losses differ by", apart, apart is not None and apart <= options.within)


def units(options, rows):
    """Two folders of shards: the same bytes of units, run lengths and offsets."""
    first, second = ({path.name: path.read_bytes() for path in Path(folder).glob("*.bin")} for folder in options.what[1:])
    wrong = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    rows.add("files of units that differ", f"{len(wrong)} of {len(first)}", first and not wrong)


def table(options, rows):
    """What every stage did: its result, its time, the last line that it said."""
    found = [json.loads(path.read_text()) for path in sorted(Path(options.what[1]).glob("*.stage.json"),
                                                             key=lambda path: path.stat().st_mtime)]
    if not found:
        raise ValueError(f"{options.what[1]} holds no results of stages; scripts/gpu_acceptance.sh leaves them")
    for stage in found:
        took = f"{stage['seconds']:>6.1f} of {stage['limit']:>3} s"
        print(f"{stage['stage']:<18}  {stage['result']:<8}  {took}  {stage['said'][:90]}")
    failed = [stage["stage"] for stage in found if stage["result"] != "good"]
    print(f"{len(found) - len(failed)} of {len(found)} stages are good" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


CHECKS = {"environment": environment, "group": group, "losses": losses, "units": units, "table": table}


def main(argv=None):
    options = config.load(CheckConfig, argv, positional="what")
    name = options.what[0] if options.what else None
    if name not in CHECKS or len(options.what) != {"losses": 3, "units": 3, "table": 2}.get(name, 1):
        raise ValueError("expected environment, group, losses RUN RUN, units UNITS UNITS or table DIR")
    if name in ("environment", "group"):
        config.choose_device(options.device)
    if name == "table":
        raise SystemExit(table(options, None))
    rows = Rows(Path(options.out) / f"{name}.json")
    CHECKS[name](options, rows)
    if not all(row["good"] for row in rows.rows):
        raise SystemExit(1)


if __name__ == "__main__":
    config.command(main)
