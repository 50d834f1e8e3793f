"""What only a GPU takes, tried without one: compiled blocks, voices on other devices, TF32, writing threads, missing packages."""
import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
import sample
import train
import twist
from conftest import TINY
from corpus.loader import Batch
from kernels import fused_cross_entropy
from model import Block, generate
from speech import audio, precision
from speech.encoder import UnitEncoder
from speech.hubert import Hubert, HubertConfig
from training import distributed, state
from training.learner import EVAL_ROWS, Learner
from vocoder import Vocoder, load_vocoder

ROOT = Path(__file__).parent.parent
DEEP = dataclasses.replace(TINY, vocab_size=22, n_layer=10)  # more blocks than torch.compile recompiles for one function
ALONE = distributed.Dist(0, 1, torch.device("cpu"))


class Ones:
    """A loader of rows of one unit."""

    T, windows = 16, 2 * EVAL_ROWS + 5

    def window(self, *numbers):
        ids = torch.ones(len(numbers), self.T, dtype=torch.int64)
        return Batch(ids, ids.clone(), None)


@pytest.fixture
def graphs(monkeypatch):
    """(options, shape of x) of every graph that blocks are compiled to; they run as they are."""
    found, compile_module = [], nn.Module.compile
    torch.compiler.reset()

    def backend(graph, inputs):
        found.append(next(tuple(tensor.shape) for tensor in inputs if tensor.ndim == 3))
        return graph.forward

    monkeypatch.setattr(Block, "compile", lambda block, **options: compile_module(block, backend=backend, **options))
    yield found
    torch.compiler.reset()


def learner(config=DEEP, **options):
    made = Learner(config, train.TrainConfig(**{"compile": "blocks", "dtype": "float32"} | options), ALONE)
    return made.fill(twist.cold_tensors(config))


# ------------------------------------------------------------------------------------------------ torch.compile

@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_two_graphs_serve_a_run_and_drawing_adds_none(recompute, graphs):
    """Validation comes first, with other rows than training; each has static shapes, its last rows filled up."""
    ours, rows = learner(recompute=recompute), Ones()
    for _ in range(2):
        ours.evaluate(rows, 0)
        for _ in range(2):
            ours.forward(rows.window(*range(4))).backward()
        ids = generate(ours.model, torch.ones(2, 4, dtype=torch.int64), 6, temperature=0)
        assert ids.shape == (2, 10)
    assert graphs == [(EVAL_ROWS, 16, 32), (4, 16, 32)]  # numbers, not symbols


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_have_the_gradients_of_eager_ones(recompute, graphs):
    batch = Batch(*torch.randint(22, (2, 3, 16), generator=torch.Generator().manual_seed(0)), None)
    results = []
    for options in ({"compile": "none"}, {"recompute": recompute}):
        ours = learner(**options)
        loss = ours.forward(batch)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in ours.model.parameters())])
    torch.testing.assert_close(results[1], results[0])
    assert len(graphs) == 1


@pytest.mark.slow
def test_learners_of_many_shapes_follow_each_other_in_one_process(graphs):
    for rows in range(1, 12):
        learner(TINY).forward(Ones().window(*range(rows))).backward()
    assert len(graphs) == 11


def test_filled_up_rows_count_nothing():
    """The mean over all windows, whatever is left for the last forward."""
    class Counting(Ones):
        def window(self, *numbers):
            ids = (torch.tensor(numbers)[:, None] + torch.arange(self.T)) % 20 + 2
            return Batch(ids, ids.roll(-1, 1), None)
    ours, rows = learner(TINY, compile="none"), Counting()
    alone = [ours.forward(rows.window(i)).item() for i in range(rows.windows)]
    assert ours.evaluate(rows, 0) == pytest.approx(sum(alone) / len(alone), abs=1e-5)


def test_the_benchmark_of_training_times_the_graph_that_training_runs(graphs, tmp_path):
    from bench import training as bench_training
    shape = bench_training.narrow(bench_training.Shape("OPT-125M", bench_training.SIZES["OPT-125M"], 0, 0))
    bench_training.write_start(shape, tmp_path / "model")
    step = bench_training.ours(shape, tmp_path / "model", True, "cpu")
    step(), step()
    timed = list(graphs)
    ours = learner(shape.config)
    ours.evaluate(Ones(), 3)
    ours.forward(bench_training.draw_batch(shape, "cpu")).backward()
    assert timed == [graphs[-1]] == [(shape.rows, shape.T, 64)]


def test_the_choice_of_kernels_does_not_end_a_graph(monkeypatch):
    """On a GPU it asks for its capability, which torch.compile cannot put into a graph."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", torch.compiler.disable(lambda *_: (9, 0)))

    def block(x):
        backend, _ = kernels.choose("attention", "cuda", x.dtype, x.shape[-1])
        return x + 1 if backend == "triton" else x - 1

    assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(torch.zeros(64)), torch.ones(64))


# ------------------------------------------------------------------------------------------------ voices

def test_voices_lie_where_the_model_does_and_run_without_its_autocast(tmp_path, monkeypatch):
    devices, states, load_voice = [], {}, sample.load_voice
    there = dataclasses.replace(ALONE, device=torch.device("cpu", 0))  # as cuda:0 would be: told apart from the default device

    def recorded(options, vocab, device="none"):
        devices.append(device)
        return load_voice(options, vocab, device)

    def watched(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **named: (
            states.setdefault(name, []).append(torch.is_autocast_enabled("cpu")), function(*arguments, **named))[1])

    monkeypatch.setattr(distributed, "setup", lambda *_: there)
    monkeypatch.setattr(sample, "load_voice", recorded)
    watched(sample, "generate"), watched(Hubert, "forward"), watched(Vocoder, "forward"), watched(Vocoder, "durations")
    train.main(["--init=twist", "--steps=1", "--tokens-per-step=64", "--block-size=64", "--eval-rows=1", "--sample-interval=1",
                "--dtype=bfloat16", "--threads=1", f"--out={tmp_path}/run"])
    assert devices == [there.device]
    assert {name: set(seen) for name, seen in states.items()} == {
        "generate": {True}, "forward": {False}, "durations": {False}}


def test_a_voice_is_moved_where_it_is_wanted_and_takes_units_from_anywhere():
    options = sample.SampleConfig()
    encoder, vocoder = sample.load_voice(options, None, torch.device("meta"))
    assert encoder.centers.device.type == vocoder.dict.weight.device.type == "meta"
    places, look_up = [], vocoder.dict.forward
    vocoder.dict.forward = lambda units: (places.append(units.device.type), look_up(units))[1]
    durations = Vocoder.durations.__wrapped__  # autocast does not know this device
    assert durations(vocoder, torch.tensor([1, 2, 3])).device.type == "meta" and places == ["meta"]  # no longer on the CPU


# ------------------------------------------------------------------------------------------------ float32 that is float32

@pytest.fixture
def switches():
    """What PyTorch's switches of precision say, as a function; they are as at the start afterwards."""
    def older(switch):
        try:
            return switch()
        except RuntimeError:  # the newer ones say something else
            return None

    def said():
        return ([part.fp32_precision for part in precision.PARTS], older(torch.get_float32_matmul_precision),
                older(lambda: torch.backends.cudnn.allow_tf32))
    parts, matmul, convolutions = said()
    yield said
    torch.set_float32_matmul_precision(matmul)
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = convolutions
    for part, before in zip(precision.PARTS, parts):
        part.fp32_precision = before


def older_switches():
    torch.set_float32_matmul_precision("medium")


def newer_switches():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def one_switch_for_all():
    torch.backends.fp32_precision = "tf32"


@pytest.fixture(scope="module")
def encoder():
    config = HubertConfig(conv_dim=(16,) * 7, conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2), n_embd=32,
                          n_layer=1, n_head=2, n_inner=64, pos_kernel=16, pos_groups=2)
    torch.manual_seed(0)
    hubert = Hubert(config).eval().requires_grad_(False)
    return UnitEncoder(hubert, torch.randn(100, 32), 1).eval()


@pytest.mark.parametrize("user", [lambda: None, older_switches, newer_switches, one_switch_for_all],
                         ids=["as PyTorch comes", "older switches", "newer switches", "one switch"])
@pytest.mark.parametrize("what", ["features", "encode", "encode_stream", "quantize", "durations", "speech"])
def test_units_and_speech_are_made_in_float32_and_what_the_user_set_stays(user, what, encoder, switches, monkeypatch):
    seen, vocoder, wav = [], load_vocoder(), torch.randn(16_000)

    def watch(*_):
        seen.append((switches(), torch.is_autocast_enabled("cpu")))

    square = torch.Tensor.square  # of the centres, in the distances
    monkeypatch.setattr(torch.Tensor, "square", lambda x: (len(x) == 100 and watch(), square(x))[1])
    for network in (vocoder.dur_predictor, vocoder.conv_pre, encoder.hubert):
        monkeypatch.setattr(network, "forward", lambda *x, forward=network.forward, **named: (watch(), forward(*x, **named))[1])
    run = {"features": lambda: encoder.features(wav), "encode": lambda: encoder.encode(wav),
           "encode_stream": lambda: encoder.encode_stream(lambda: iter([wav])),
           "quantize": lambda: encoder.quantize(torch.ones(2, 32)),
           "durations": lambda: vocoder.durations(torch.tensor([1, 2])), "speech": lambda: vocoder(torch.tensor([1, 2]))}[what]
    user()
    before = switches()
    with torch.autocast("cpu", torch.bfloat16):
        run()
    assert seen and switches()[0] == before[0]
    assert all(now == then or then is None for now, then in zip(switches(), before))
    for (parts, matmul, convolutions), autocast in seen:
        assert set(parts) <= {"ieee", "none"} and matmul == "highest" and convolutions is False and not autocast


def test_tf32_is_for_products_above_the_first_layer_and_the_distances(encoder, switches, monkeypatch):
    """On a CPU, where it changes nothing but the switches."""
    seen, matmul, linear = [], torch.Tensor.__matmul__, torch.nn.functional.linear
    monkeypatch.setattr("speech.encoder.check_precision", lambda *_: None)
    monkeypatch.setattr(encoder, "precision", "tf32")
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (seen.append(("@", a.dtype, switches())), matmul(a, b))[1])
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *more: (
        seen.append(("linear", x.dtype, switches())), linear(x, *more))[1])
    before = switches()
    encoder.encode(torch.randn(16_000))
    assert switches() == before
    found = {(name, *parts[:1], allowed) for name, dtype, (parts, _, allowed) in seen if dtype == torch.float32}
    assert found == {("@", "ieee", False), ("linear", "tf32", True)}


def test_units_are_the_same_under_autocast(encoder):
    """The distances too: rounded to bfloat16 they choose other centres for features that are exact."""
    features, wav = torch.randn(2000, 32), torch.randn(48_000)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder.quantize(features), encoder.encode(wav)
        assert not torch.equal((features @ encoder.centers.T).float(), features.double() @ encoder.centers.double().T)
    assert torch.equal(rounded[0], encoder.quantize(features)) and torch.equal(rounded[1], encoder.encode(wav))


# ------------------------------------------------------------------------------------------------ processes and threads

class Elsewhere(distributed.Dist):
    def any(self, flag):
        return bool(flag)


def test_the_thread_that_writes_states_works_with_the_gpu_of_its_process(tmp_path, monkeypatch):
    calls, ours = [], learner(TINY, compile="none")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append((device, threading.current_thread())))
    saver = state.Saver(tmp_path, 2, True, Elsewhere(0, 1, torch.device("cuda", 3)))
    saver.save(ours, {"step": 1})
    saver.settle()
    (device, thread), = calls
    assert device == torch.device("cuda", 3) and thread is not threading.main_thread()
    assert state.latest(tmp_path).name == "step_000001"


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU, there are 2"):
        distributed.setup("cuda")


# ------------------------------------------------------------------------------------------------ machines with less installed

WITHOUT_AUDIO = """
import sys
sys.modules["soundfile"] = None  # as if it were not installed
import train, bench.__main__, hubert_units, eval
from speech import audio
try:
    audio.read_wav("pocket/prompt.wav")
except ValueError as error:
    print(error)
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_training_and_the_benchmarks_need_no_audio_library(train_arguments, tmp_path):
    command = [sys.executable, "-c", WITHOUT_AUDIO, "--init=twist", *train_arguments, "--steps=1", "--eval-rows=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("audio needs the package soundfile, which does not work here")
    assert (tmp_path / "run/model").is_dir()


def test_a_library_that_does_not_load_is_named_in_a_sentence(tmp_path, monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "soundfile":
                raise OSError("sndfile library not found")
    monkeypatch.delitem(sys.modules, "soundfile")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ValueError, match="needs the package soundfile.*sndfile library not found"):
        audio.write_wav(tmp_path / "a.wav", torch.zeros(100))


@pytest.mark.parametrize("able", [True, False])
def test_gradients_of_the_head_are_added_up_with_any_pytorch(able, monkeypatch):
    """On fake CUDA tensors: where addmm cannot add 16-bit products to float32, they are widened before."""
    calls = []
    monkeypatch.setattr(fused_cross_entropy, "ADDS_IN_FLOAT32", able)
    monkeypatch.setattr(torch, "addmm", lambda total, *_, out_dtype, out: calls.append((out_dtype, out is total)))
    with FakeTensorMode():
        total = torch.empty(32, 64, device="cuda")
        fused_cross_entropy.add_product(total, *(torch.empty(shape, dtype=torch.bfloat16, device="cuda")
                                                 for shape in ((32, 128), (128, 64))))
    assert calls == [(torch.float32, True)] * able
    total, a, b = torch.ones(3, 5), torch.randn(3, 4).half(), torch.randn(4, 5).half()
    expected = total + a.float() @ b.float()
    fused_cross_entropy.add_product(total, a, b)
    torch.testing.assert_close(total, expected)


def test_is_causal_is_a_truth_value_where_lengths_are_symbols():
    """A compiler with dynamic lengths hands on a symbol, which PyTorch's attention does not take."""
    compiled = torch.compile(lambda q: kernels.attention(q, q, q), backend="eager", dynamic=True, fullgraph=True)
    for length in (5, 9):
        q = torch.randn(1, length, 2, 8)
        torch.testing.assert_close(compiled(q), kernels.attention(q, q, q))
