"""Ours beside the peers: what an operation costs, as ratios -> a table on screen and results/NAME.json.

    python bench.py memory                    # peak memory of opening a sharded checkpoint of 2 GiB
    python bench.py memory --gib=0.5          # a smaller one; needs as much free disk in the folder for temporary files
    python bench.py units                     # speech -> units, in times real time, beside transformers' HubertModel
    python bench.py hubert                    # what the parts of our HuBERT cost on a CPU, and their alternatives
    python bench.py long                      # peak memory of encoding recordings of two minutes and of an hour
    python bench.py chunking long.wav         # units of long recordings in pieces against those of the whole
    python bench.py eval                      # pairs that eval.py scores in a second, beside a loop over single sequences

memory: a LLaMA-shaped model of random weights is written in several shards; each way of opening it runs in a fresh process,
and its figure is the highest resident memory during the opening, less what the process held before, over the size of the
opened model. Pages of mapped files count: they are memory while they are mapped.

units: HuBERT base with random weights, at 25 Hz up to layer 11 and at 50 Hz up to layer 9, 500 centres; speech of 10 s alone, and
eight recordings of 1.5 to 10 s, which the peer gets as one padded batch with its attention mask. Ours and the peer's take turns;
medians. Agreement is the share of frames whose unit is that of the peer's features of each recording alone, in float32; the
difference is the largest that a padded batch makes to a frame's features, relative to their norm.

hubert: the 25 Hz network on 10 s: its front end as PyTorch's convolutions, as products of the whole recording and a second at a
time, with plain and with packed weights; the network up to layer 11 with either.

long: hubert_units.py with the pocket tokenizer on the prompt repeated in 44.1 kHz stereo FLAC, in a process of its own.

eval: 10,000 pairs of random units, as long as words (0.4 to 1 s, 9 to 22 units) and sentences (1.5 to 3.5 s, 33 to 77 units), by
the pocket speech LM on the CPU, in ten slices; of each slice the loop then scores 40 pairs, one sequence in a forward. Medians.

chunking: the pocket tokenizer on the given recordings, joined and repeated to ten minutes (default: the pocket prompt), encoded
whole and in pieces; the share of frames that get another unit, and the most that differ in any ten seconds.
"""
import functools
import importlib.util
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

import audio
import checkpoint
import config
import distributed
import hubert_units
import likelihood
import pretrained
import twist
from hubert import Hubert, HubertConfig, load_hubert
from model import Transformer, TransformerConfig


@dataclass(frozen=True)
class BenchConfig:
    what: tuple[str, ...] = ()  # memory | units | hubert | long | eval | chunking, and for chunking recordings
    out: str = "results"  # folder for the JSON file
    gib: float = 2.0  # memory: size of the model in float32
    shards: int = 4  # memory: files it is divided into
    repeats: int = 5  # units, hubert: times that each way is measured
    device: str = "cpu"  # units: cpu | cuda


# ---------------------------------------------------------------------------------------------- memory

def resident(key):
    """VmRSS (now) or VmHWM (highest so far) of this process, bytes."""
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"the system does not say {key}; bench.py memory needs Linux")


def open_all_at_once(folder):
    """The plain way, as a yardstick: every tensor read and converted, then copied into a model that was built before."""
    family, options = pretrained.lm_options(pretrained.read_settings(folder))
    model = Transformer(TransformerConfig(**options, family=family))
    held = {name: tensor.float() for name, tensor in checkpoint.read_tensors(folder).items()}
    model.load_state_dict(pretrained.ours(held, pretrained.FAMILIES[family], options, folder))
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


def bench_memory(options):
    """Rows of (stored as, opened by, GiB of the model, peak / size)."""
    rows = []
    openers = [how for how in OPENERS if how != "transformers" or importlib.util.find_spec("transformers")]
    stored = (("float32 safetensors", torch.float32, "safetensors"), ("float16 safetensors", torch.float16, "safetensors"),
              ("float16 bin", torch.float16, "bin"))
    for name, dtype, kind in tqdm(stored, desc="memory", disable=None):
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


# ---------------------------------------------------------------------------------------------- evaluation

PAIRS, SLICES, PART = 10_000, 10, 40  # pairs, divided into slices; those of each slice that the loop scores


@torch.inference_mode()
def one_by_one(model, rows):
    """The plain way, as a yardstick: mean log-likelihood of each row, a forward each."""
    scores = []
    for row in rows:
        log_probabilities = model(row[None, :-1])[0].log_softmax(-1)
        scores.append(log_probabilities.gather(1, row[1:, None]).mean().item())
    return scores


def bench_eval(options):
    """Rows of (length, pairs per second of ours and of the loop, their ratio, largest difference of a score in nats)."""
    model, vocab = twist.load_speech_lm()
    alone, rows = distributed.Dist(0, 1, torch.device("cpu")), []
    for name, (low, high) in {"words, 9 to 22 units": (9, 22), "sentences, 33 to 77 units": (33, 77)}.items():
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(low, high + 1, (2 * PAIRS,), generator=generator).tolist()
        ids = [vocab.encode(torch.randint(vocab.num_units, (n,), generator=generator), bos=True) for n in lengths]
        seconds, furthest = {"ours": [], "loop": []}, 0.0
        for part in torch.arange(2 * PAIRS).view(SLICES, -1).tolist():
            some, begin = [ids[i] for i in part], time.perf_counter()
            ours = [values.mean() for values in likelihood.log_probabilities(model, some, alone)]
            between = time.perf_counter()
            loop = one_by_one(model, some[:2 * PART])
            seconds["ours"].append((between - begin) / (PAIRS // SLICES))
            seconds["loop"].append((time.perf_counter() - between) / PART)
            furthest = max(furthest, *(abs(a - b) for a, b in zip(ours, loop)))
        a_pair = {way: statistics.median(measured) for way, measured in seconds.items()}
        rows.append({"length": name, "ours_pairs_per_second": round(1 / a_pair["ours"], 1),
                     "loop_pairs_per_second": round(1 / a_pair["loop"], 1),
                     "ours_over_loop": round(a_pair["loop"] / a_pair["ours"], 2), "difference": float(f"{furthest:.1e}")})
    return rows


BENCHMARKS = {"chunking": bench_chunking, "eval": bench_eval, "hubert": bench_hubert, "long": bench_long, "memory": bench_memory,
              "units": bench_units}


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
    rows = BENCHMARKS[options.what[0]](options)
    settings = {key: value for key, value in asdict(options).items() if key not in ("what", "out")}
    result = {"command": " ".join(["python bench.py", *(Path(word).name for word in options.what)]), "options": settings,
              "machine": machine(), "torch": torch.__version__, "rows": rows}
    checkpoint.write_json(Path(options.out) / f"{options.what[0]}.json", result)
    widths = {key: max(len(str(row[key])) for row in [*rows, {key: key}]) for key in rows[0]}
    for row in ({key: key for key in widths}, *rows):
        print("  ".join(f"{row[key]!s:<{width}}" for key, width in widths.items()))


if __name__ == "__main__":
    config.command(main)
