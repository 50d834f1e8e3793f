"""Ours beside the peers: what an operation costs, as ratios -> a table on screen and results/NAME.json.

    python bench.py memory                    # what training fits on which GPU, and the plan beside a measured run
    python bench.py opening                   # peak memory of opening a sharded checkpoint of 2 GiB
    python bench.py opening --gib=0.5         # a smaller one; needs as much free disk in the folder for temporary files
    python bench.py units                     # speech -> units, in times real time, beside transformers' HubertModel
    python bench.py hubert                    # what the parts of our HuBERT cost on a CPU, and their alternatives
    python bench.py long                      # peak memory of encoding recordings of two minutes and of an hour
    python bench.py chunking long.wav         # units of long recordings in pieces against those of the whole
    python bench.py loader                    # batches for training, beside a reader of JSON lines; 220 MB of temporary files
    python bench.py train                     # training steps, beside transformers' model in a plain loop
    python bench.py attention                 # our kernels beside PyTorch's, cuDNN's and FlexAttention; needs a CUDA GPU
    python bench.py cross_entropy             # our loss, fused with the head and alone, beside eager and compiled; needs a GPU
    python bench.py cpu                       # matrix products by oneDNN beside F.linear's, at the shapes of linear layers
    python bench.py eval                      # pairs that eval.py scores in a second, beside a loop over single sequences

memory: see bench_memory.py.

opening: a LLaMA-shaped model of random weights is written in several shards; each way of opening it runs in a fresh process,
and its figure is the highest resident memory during the opening, less what the process held before, over the size of the
opened model. Pages of mapped files count: they are memory while they are mapped.

units: HuBERT base with random weights, at 25 Hz up to layer 11 and at 50 Hz up to layer 9, 500 centres; speech of 10 s alone, and
eight recordings of 1.5 to 10 s, which the peer gets as one padded batch with its attention mask. Ours and the peer's take turns;
medians. Agreement is the share of frames whose unit is that of the peer's features of each recording alone, in float32; the
difference is the largest that a padded batch makes to a frame's features, relative to their norm.

hubert: the 25 Hz network on 10 s: its front end as PyTorch's convolutions, as products of the whole recording and a second at a
time, with plain and with packed weights; the network up to layer 11 with either.

long: hubert_units.py with the pocket tokenizer on the prompt repeated in 44.1 kHz stereo FLAC, in a process of its own.

chunking: the pocket tokenizer on the given recordings, joined and repeated to ten minutes (default: the pocket prompt), encoded
whole and in pieces; the share of frames that get another unit, and the most that differ in any ten seconds.

loader: batches of 64 windows of 1024 from four made-up shards of 12 million units, documents of 100 to 500, on one core. The peer
reads slamkit's JSON lines of the same documents in their order, makes ids and cuts windows. Taking turns; medians of 20 batches.

train: see bench_training.py. eval: see bench_scoring.py. cpu: see cpu.py; medians, taking turns.

attention, cross_entropy: see kernels/bench.py; last come geometric means over each peer and the shapes on which ours loses.
"""
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

import audio
import checkpoint
import config
import cpu
import data
import hubert_units
import pretrained
import twist
import unit_files
from bench_memory import bench_memory, resident
from bench_scoring import bench_eval
from bench_training import bench_train
from hubert import Hubert, HubertConfig, load_hubert
from kernels.bench import bench_attention, bench_cross_entropy
from loader import UnitLoader
from model import Transformer, TransformerConfig


@dataclass(frozen=True)
class BenchConfig:
    what: tuple[str, ...] = ()  # which benchmark, and for chunking recordings
    out: str = "results"  # folder for the JSON file
    gib: float = 2.0  # opening: size of the model in float32
    shards: int = 4  # opening: files it is divided into
    repeats: int = 5  # units, hubert, loader, train: times each way is measured; attention, cross_entropy: at least 20 on a GPU
    device: str | None = None  # cpu | cuda, of units and train (none: cpu), attention and cross_entropy (none: cuda)
    compile: bool = False  # train: also compiled steps on a CPU


# ---------------------------------------------------------------------------------------------- opening

def open_all_at_once(folder):
    """The plain way, as a yardstick: every tensor read and converted, then copied into a model that was built before."""
    family, options = pretrained.lm_options(pretrained.read_settings(folder))
    model = Transformer(TransformerConfig(**options, family=family))
    held = {name: tensor.float() for name, tensor in checkpoint.read_tensors(folder).items()}
    model.load_state_dict(dict(pretrained.Ours(held, pretrained.FAMILIES[family], options, folder)))
    return model


def open_with_transformers(folder):
    import transformers  # a peer, installed with the test packages; imported here because the rest runs without it
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


OPENERS = {"ours": twist.load_text_lm, "all at once": open_all_at_once, "transformers": open_with_transformers}


def measure_opening(how, folder):
    """In a process of its own: (peak bytes above what was held before, parameters)."""
    if how == "transformers":
        import transformers  # noqa: F401  its own imports are not part of the opening
    before = resident("VmRSS")
    model = OPENERS[how](folder)
    return resident("VmHWM") - before, sum(parameter.numel() for parameter in model.parameters())


def write_large_model(folder, options, dtype, kind):
    """A LLaMA-shaped checkpoint of about options.gib in float32, in shards; returns its number of parameters."""
    shape = dict(vocab_size=32_000, n_head=12, n_kv_head=12, n_embd=1536, head_dim=128, n_inner=4096, norm="rmsnorm",
                 position="rope", mlp="swiglu", attention_bias=False, mlp_bias=False, tie_embeddings=False, family="llama")
    layer = 4 * 1536**2 + 3 * 1536 * 4096
    layers = max(1, round((options.gib * 2**30 / 4 - 2 * 32_000 * 1536) / layer))
    model = Transformer(TransformerConfig(**shape, n_layer=layers)).to(dtype)
    fields = asdict(model.config)
    settings, tensors = pretrained.write_lm(fields.pop("family"), fields, model.state_dict())
    total = sum(tensor.nbytes for tensor in tensors.values())
    checkpoint.write_model(folder, settings, tensors, shard_bytes=total // options.shards + 1)
    if kind == "bin":
        index, renamed = folder / "model.safetensors.index.json", {}
        for name, shard in checkpoint.read_json(index)["weight_map"].items():
            renamed[name] = f"pytorch_{Path(shard).stem}.bin"
            if (folder / shard).exists():
                torch.save(checkpoint.read_file(folder / shard), folder / renamed[name])
                (folder / shard).unlink()
        index.unlink()
        checkpoint.write_json(folder / "pytorch_model.bin.index.json",
                              {"metadata": {"total_size": total}, "weight_map": renamed})
    return sum(parameter.numel() for parameter in model.parameters())


def bench_opening(options):
    """Rows of (stored as, opened by, GiB of the model, peak / size)."""
    rows = []
    openers = [how for how in OPENERS if how != "transformers" or importlib.util.find_spec("transformers")]
    stored = (("float32 safetensors", torch.float32, "safetensors"), ("float16 safetensors", torch.float16, "safetensors"),
              ("float16 bin", torch.float16, "bin"))
    for name, dtype, kind in tqdm(stored, desc="opening", disable=None):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder) / "model"
            parameters = write_large_model(folder, options, dtype, kind)
            for how in openers:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    peak, found = pool.submit(measure_opening, how, folder).result()
                assert found == parameters, f"{how} opened {found} parameters of {parameters}"
                rows.append({"stored": name, "opened_by": how, "gib": round(4 * parameters / 2**30, 3),
                             "peak_over_size": round(peak / (4 * parameters), 3)})
    return rows


# ---------------------------------------------------------------------------------------------- units

RAGGED_SECONDS = (10, 9.4, 8.1, 7, 5.5, 4, 2.6, 1.5)
HUBERTS = {  # name: (transformers' options besides the defaults, which are HuBERT base; layer of the units)
    "mHuBERT base, 25 Hz, layer 11": (dict(conv_dim=(512,) * 8, conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2), num_feat_extract_layers=8,
                                           conv_stride=(5, 2, 2, 2, 2, 2, 2, 2), conv_pos_batch_norm=True), 11),
    "HuBERT base, 50 Hz, layer 9": ({}, 9)}


def side_by_side(ways, repeats, device):
    """{name: function} -> {name: median seconds}, the functions taking turns; one round before the first is not counted."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, function in ways.items():
            begin = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(measured[1:]) for name, measured in seconds.items()}


def quantized(encoder, peer, wavs):
    return encoder.quantize(peer(wavs).flatten(0, 1))


def largest_difference(encoder, wavs):
    """Between features in one padded batch and alone, of any frame, relative to its norm."""
    pairs = [(together, encoder.features(wav)) for together, wav in zip(encoder.features_of(wavs), wavs)]
    return float(f"{max(((a - b).norm(dim=1) / b.norm(dim=1)).max().item() for a, b in pairs):.1e}")


@torch.inference_mode()
def bench_units(options):
    """Rows of (network, input, precision, ours and the peer in times real time, their ratio, agreement of units)."""
    import transformers  # the peer
    rows, speech = [], audio.read_wav(checkpoint.POCKET / "prompt.wav").repeat(4).to(options.device)
    inputs = {"10 s alone": [speech[:160_000]], "ragged batch of 8": [speech[:int(s * 16_000)] for s in RAGGED_SECONDS]}
    precisions = [torch.float32] + ([torch.bfloat16, torch.float16] if options.device == "cuda" else [])
    for name, (extra, layer) in HUBERTS.items():
        torch.manual_seed(0)
        theirs = transformers.HubertModel(transformers.HubertConfig(**extra)).eval()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            hubert = load_hubert(folder)
        theirs.to(options.device)

        def peer(wavs, theirs=theirs, layer=layer):
            wav, mask = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), None
            if len(wavs) > 1:
                mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(w, dtype=torch.int64) for w in wavs], batch_first=True)
            return theirs(wav, attention_mask=mask, output_hidden_states=True).hidden_states[layer]

        expected = {key: [peer([wav])[0] for wav in wavs] for key, wavs in inputs.items()}
        frames = torch.cat(expected["ragged batch of 8"])
        centers = frames[torch.randperm(len(frames))[:500]].clone()
        encoder = hubert_units.UnitEncoder(hubert, centers, layer).to(options.device).eval()
        if options.device == "cpu":
            encoder.hubert.pack()
        for key, wavs in inputs.items():
            for precision in precisions:
                with torch.autocast(options.device, precision, enabled=precision != torch.float32):
                    ways = {"ours": functools.partial(encoder.encode_batch, wavs),
                            "peer": functools.partial(quantized, encoder, peer, wavs)}
                    seconds = side_by_side(ways, options.repeats, options.device)
                    units = torch.cat(encoder.encode_batch(wavs))
                reference = torch.cat([encoder.quantize(features) for features in expected[key]])
                length = sum(map(len, wavs)) / audio.SAMPLE_RATE
                rows.append({"network": name, "input": key, "precision": str(precision).removeprefix("torch."),
                             "ours_x_real_time": round(length / seconds["ours"], 2),
                             "peer_x_real_time": round(length / seconds["peer"], 2),
                             "ours_over_peer": round(seconds["peer"] / seconds["ours"], 2),
                             "agreement": round((units == reference).float().mean().item(), 5),
                             "batch_difference": largest_difference(encoder, wavs)})
    return rows


@torch.inference_mode()
def bench_hubert(options):
    """Rows of (part, way, seconds for 10 s of audio)."""
    torch.manual_seed(0)
    plain, packed = (Hubert(HubertConfig(pos_batch_norm=True)).eval().requires_grad_(False) for _ in range(2))
    packed.load_state_dict(plain.state_dict())
    packed.pack()
    wav = audio.read_wav(checkpoint.POCKET / "prompt.wav").repeat(2)[None, :160_000]

    def convolutions():
        x = F.gelu(plain.group_norm(plain.convs[0](wav[:, None])))
        for conv in plain.convs[1:]:
            x = F.gelu(conv(x))
        return x

    def whole(network):
        return network.convolve(wav, network.first_layer(network.moments(wav)).float())

    def by_the_second(network):
        return network.front_end(wav, network.moments(wav))

    ways = {("front end", "PyTorch's convolutions"): convolutions}
    for name, network in (("plain", plain), ("packed", packed)):
        ways |= {("front end", f"whole, {name} weights"): functools.partial(whole, network),
                 ("front end", f"by the second, {name} weights"): functools.partial(by_the_second, network),
                 ("up to layer 11", f"{name} weights"): functools.partial(network, wav, 11)}
    seconds = side_by_side(ways, options.repeats, "cpu")
    return [{"part": part, "way": way, "seconds": round(seconds[part, way], 3)} for part, way in sorted(ways)]


# ---------------------------------------------------------------------------------------------- long recordings

def encode_in_process(path, out):
    """Highest resident memory of this process, bytes, after the command has encoded one recording."""
    hubert_units.main([str(path), f"--out={out}", "--device=cpu"])
    return resident("VmHWM")


def bench_long(options):
    """Rows of (minutes of audio, peak memory in MB, of the whole process)."""
    prompt, rows = audio.read_wav(checkpoint.POCKET / "prompt.wav").repeat_interleave(3).numpy(), []
    with tempfile.TemporaryDirectory() as folder:
        for minutes in (2, 60):
            path, left = Path(folder) / f"{minutes}.flac", minutes * 60 * 44_100
            with soundfile.SoundFile(path, "w", 44_100, 2) as file:
                while left:
                    part = prompt[:left]
                    file.write(part[:, None].repeat(2, axis=1))
                    left -= len(part)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                peak = pool.submit(encode_in_process, path, Path(folder) / f"units{minutes}").result()
            rows.append({"minutes": minutes, "peak_mb": round(peak / 1e6)})
    return rows


# ---------------------------------------------------------------------------------------------- chunking

WAYS = {"60 s + 5 s each side (default)": ("overlap", (60, 5)), "60 s + 10 s": ("overlap", (60, 10)),
        "60 s + 2 s": ("overlap", (60, 2)), "60 s + 0 s": ("overlap", (60, 0)), "30 s + 5 s": ("overlap", (30, 5)),
        "100 s, independent (textless)": ("textless", (100, 0))}


def bench_chunking(options):
    """Rows of (way, share of frames with another unit than in the encoding of the whole, most of them in ten seconds)."""
    wav = torch.cat([audio.read_wav(path) for path in options.what[1:] or [checkpoint.POCKET / "prompt.wav"]])
    wav, encoder, rows = wav.repeat(600 * audio.SAMPLE_RATE // len(wav) + 1), hubert_units.load_unit_encoder(), []
    saved = dict(hubert_units.CHUNKINGS)
    try:
        hubert_units.CHUNKINGS["overlap"] = (len(wav), 0)
        whole = encoder.encode(wav)
        for name, (chunking, seconds) in WAYS.items():
            hubert_units.CHUNKINGS[chunking], encoder.chunking = seconds, chunking
            units = encoder.encode(wav)
            # independent pieces lose their last frames, and those after them stand earlier; compared piece by piece
            piece = int(seconds[0] * encoder.native_rate)
            lost = 1 if chunking == "textless" else 0
            same = torch.cat([a[:piece - lost][:len(b)] == b[:len(a[:piece - lost])] for a, b in zip(
                whole.split(piece), units.split(piece - lost))])
            worst = max((~part).float().mean().item() for part in same.split(10 * int(encoder.native_rate)))
            rows.append({"way": name, "frames": len(same), "lost": len(whole) - len(units),
                         "differ": round((~same).float().mean().item(), 5), "most_in_10_s": round(worst, 4)})
    finally:
        hubert_units.CHUNKINGS.update(saved)
    return rows


# ---------------------------------------------------------------------------------------------- loader

LOADER_BATCH, LOADER_T, LOADER_SHARDS, LOADER_DOCUMENTS = 64, 1024, 4, 40_000  # documents of a shard, 300 units on average


def json_batches(path, vocab):
    """The plain way, as a yardstick: yields ids, targets (B, T) of a file of JSON lines, over and over, in its order."""
    ids, size = [], LOADER_BATCH * LOADER_T
    while True:
        with open(path) as lines:
            for line in lines:
                ids.append(vocab.bos)
                ids.extend([unit + vocab.offset for unit in json.loads(line)["units"]])
                while len(ids) > size:
                    batch, ids = torch.tensor(ids[:size + 1]), ids[size:]
                    yield batch[:-1].view(LOADER_BATCH, LOADER_T), batch[1:].view(LOADER_BATCH, LOADER_T)


def bench_loader(options):
    """Rows of (way, million units a second, over the peer's)."""
    torch.set_num_threads(1)
    rng, vocab = np.random.default_rng(0), twist.UnitVocab(500)
    recipe = {"kind": "hubert", "num_units": 500, "frame_rate": 25.0, "model": "made up"}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for shard in tqdm(range(LOADER_SHARDS), desc="writing", disable=None):
            writer = data.ShardWriter(folder / "units", recipe, shard)
            for length in rng.integers(100, 501, LOADER_DOCUMENTS):
                units = rng.integers(0, 500, length)
                writer.add(units, np.ones_like(units), "made up", length / 25)
            writer.close()
        data.merge_meta(folder / "units", LOADER_SHARDS)
        shards = data.UnitShards(folder / "units")
        with open(folder / "units.jsonl", "w") as file:
            unit_files.write_jsonl(itertools.islice(shards, 10_000), file)
        peer, ways = json_batches(folder / "units.jsonl", vocab), {}
        for packing in ("stream", "documents"):
            loader = UnitLoader(shards, vocab, LOADER_T, LOADER_BATCH, 0, packing=packing)
            ways[packing] = map(functools.partial(loader.rows, first=0, count=LOADER_BATCH), itertools.count())
        ways["JSON lines"] = peer
        for ours, theirs in zip(loader.window(*range(LOADER_BATCH)), next(peer)):  # ids, targets
            assert ours.equal(theirs), "the peer cuts other windows"

        def draw(batches):
            for _ in range(20):
                next(batches)

        seconds = side_by_side({way: functools.partial(draw, batches) for way, batches in ways.items()}, options.repeats, "cpu")
    return [{"way": way, "million_units_per_second": round(20 * LOADER_BATCH * LOADER_T / seconds[way] / 1e6, 1),
             "over_json_lines": round(seconds["JSON lines"] / seconds[way], 1)} for way in ways]


# ---------------------------------------------------------------------------------------------- products on CPUs

LINEAR = ((2048, 192, 512), (1024, 512, 2048), (1024, 2048, 512), (512, 768, 3072))  # rows, inputs C, outputs N


def products(M, C, N):
    """{(product, way): function}"""
    random = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=random) for shape in ((M, C), (N, C), (M, N)))
    packed = cpu.pack(weight)
    return {("x W^T", "F.linear"): lambda: F.linear(x, weight), ("x W^T", "oneDNN"): lambda: cpu.product(x, weight),
            ("x W^T", "oneDNN, packed"): lambda: cpu.product(x, packed),
            ("dy W", "F.linear"): lambda: dy.mm(weight), ("dy W", "oneDNN"): lambda: cpu.product(dy, weight.t()),
            ("dy^T x", "F.linear"): lambda: dy.t().mm(x), ("dy^T x", "oneDNN"): lambda: cpu.product(dy.t(), x.t())}


def bench_cpu(options):
    """Rows of (rows, C, N, product, way, GFLOP/s, over F.linear's)."""
    found = []
    for M, C, N in LINEAR:
        ways = products(M, C, N)
        seconds = side_by_side(ways, 10 * options.repeats, "cpu")
        found += [{"rows": M, "C": C, "N": N, "product": what, "way": way, "gflops": round(2e-9 * M * C * N / seconds[what, way]),
                   "over_linear": round(seconds[what, "F.linear"] / seconds[what, way], 2)} for what, way in ways]
    return found


BENCHMARKS = {"attention": bench_attention, "chunking": bench_chunking, "cpu": bench_cpu, "cross_entropy": bench_cross_entropy,
              "eval": bench_eval, "hubert": bench_hubert, "loader": bench_loader, "long": bench_long, "memory": bench_memory,
              "opening": bench_opening, "train": bench_train, "units": bench_units}
OF_GPUS = ("attention", "cross_entropy")  # measured on one; on a CPU they are only rehearsed


def machine():
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(": ")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if os.path.exists("/proc/cpuinfo") else [platform.processor()]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main(argv=None):
    options = config.load(BenchConfig, argv, positional="what")
    if not options.what or options.what[0] not in BENCHMARKS or (len(options.what) > 1 and options.what[0] != "chunking"):
        raise ValueError(f"expected one of {', '.join(BENCHMARKS)}, got {' '.join(options.what) or 'nothing'}")
    what = options.what[0]
    options = replace(options, device=options.device or ("cuda" if what in OF_GPUS else "cpu"))
    tables = BENCHMARKS[what](options)
    tables = tables if isinstance(tables, dict) else {"rows": tables}
    settings = {key: value for key, value in asdict(options).items() if key not in ("what", "out")}
    result = {"command": " ".join(["python bench.py", *(Path(word).name for word in options.what)]), "options": settings,
              "machine": machine(), "torch": torch.__version__, **tables}
    rehearsal = "_cpu" if what in OF_GPUS and options.device == "cpu" else ""  # beside the figures of a GPU, not over them
    checkpoint.write_json(Path(options.out) / f"{what}{rehearsal}.json", result)
    for name, rows in tables.items():
        print(f"{name}: {len(rows)}")
        widths = {key: max(len(str(row[key])) for row in [*rows, {key: key}]) for key in (rows[0] if rows else ())}
        for row in ({key: key for key in widths}, *rows) if rows else ():
            print("  ".join(f"{row[key]!s:<{width}}" for key, width in widths.items()))


if __name__ == "__main__":
    config.command(main)
