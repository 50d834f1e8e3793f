"""Which numbers a model computes with, on processors and GPUs that are not here; what half of them costs and saves."""
import json
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config
import eval as evaluate
import pocket.build
import sample
import train
import twist
from checkpoints import files
from conftest import RECIPE, TINY
from corpus.loader import UnitLoader
from corpus.shards import UnitShards
from evaluation import likelihood
from kernels import dtypes
from kernels import packed as packing
from kernels.packed import packed
from model import Transformer, TransformerConfig, generate
from training import learner as learners
from training.distributed import Dist

ROOT = Path(__file__).parent.parent
ALONE = Dist(0, 1, torch.device("cpu"))
VOCAB = twist.UnitVocab(58, recipe=RECIPE)
X86 = "processor\t: 0\nvendor_id\t: {}\nflags\t\t: fpu avx2 avx512f avx512bw avx512_vnni {}\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd i8mm {} svebf16x\n"
SHAPES = {"rope": {}, "alibi": dict(position="alibi", norm="layernorm", mlp="gelu", attention_bias=True, mlp_bias=True),
          "learned": dict(position="learned", norm="layernorm", mlp="relu", attention_bias=True, mlp_bias=True),
          "post": dict(position="learned", norm="layernorm", norm_order="post", embed_dim=16, mlp="relu"),
          "grouped": dict(n_kv_head=1, qk_norm=True, tie_embeddings=False)}


def make(dtype=torch.float32, **changes):
    """A random model whose norms and biases are drawn, too."""
    shape = TransformerConfig(**{**TINY.__dict__, "embed_dim": 0, **changes})
    generator = torch.Generator().manual_seed(0)
    tensors = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in twist.cold_tensors(shape)}
    return twist.build(shape, tensors.items(), dtype)


# ---------------------------------------------------------------------------------------------- the choice

@pytest.mark.parametrize("cpuinfo, limit, flag", [
    (X86.format("GenuineIntel", "amx_bf16 avx512_bf16"), "", "amx_bf16"),
    (X86.format("AuthenticAMD", "avx512_bf16"), "", "avx512_bf16"),
    (X86.format("GenuineIntel", ""), "", ""), (X86.format("GenuineIntel", "avx512_bf16x"), "", ""),
    (ARM.format("bf16"), "", "bf16"),
    (ARM.format(""), "", ""), ("", "", ""), (X86.format("AuthenticAMD", "avx512_bf16"), "AVX2", ""),
    (X86.format("AuthenticAMD", "avx512_bf16"), "avx512_core_vnni", ""),
    (X86.format("AuthenticAMD", "avx512_bf16"), "AVX512_CORE_BF16", "avx512_bf16"),
    (X86.format("AuthenticAMD", "avx512_bf16"), "DEFAULT", "avx512_bf16"),
    (X86.format("AuthenticAMD", "avx512_bf16"), "no such instructions", "avx512_bf16")])  # which oneDNN overlooks
def test_a_processor_says_by_its_flags_whether_it_multiplies_bfloat16(cpuinfo, limit, flag):
    assert dtypes.processor_bfloat16(cpuinfo, limit) == flag


@pytest.mark.parametrize("set_to, words", [
    ({"DNNL_MAX_CPU_ISA": "AVX2"}, False), ({"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "AVX2"}, False),
    ({"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, True), ({}, True)])
def test_what_onednn_is_kept_to_counts_under_its_older_name_too(set_to, words, monkeypatch):
    monkeypatch.setattr(dtypes, "processor_bfloat16", lambda cpuinfo, limit: "amx_bf16" * (limit in ("", "ALL")))
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_to.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: "")
    assert bool(dtypes.hardware_bfloat16("cpu")) == words


@pytest.mark.parametrize("asked, hardware, name, words", [
    ("auto", "avx512_bf16", "bfloat16", "hardware (avx512_bf16)"), ("auto", "", "float32", "no hardware"),
    ("float32", "amx_bf16", "float32", "asked for"), ("bfloat16", "bf16", "bfloat16", "asked for"),
    ("bfloat16", "", "bfloat16", "emulated")])
def test_training_takes_bfloat16_where_it_is_multiplied_in_hardware(asked, hardware, name, words):
    found, why = dtypes.training_dtype(asked, hardware)
    assert found == name and why.startswith(f"products in {name}: ") and words in why
    assert ("emulated" in why) == (name == "bfloat16" and not hardware)


@pytest.mark.parametrize("asked, device, hardware, free, name", [
    ("auto", "cpu", "amx_bf16", 64e9, "float32"), ("auto", "cpu", "", 64e9, "float32"), ("auto", "cpu", "", 24e9, "bfloat16"),
    ("auto", "cpu", "amx_bf16", 30e9, "bfloat16"), ("auto", "cuda", "compute capability 9.0", 80e9, "bfloat16"),
    ("auto", "cuda", "", 80e9, "float32"), ("auto", "cuda", "", 16e9, "bfloat16"), ("auto", "mps", "", 32e9, "float32"),
    ("auto", "mps", "", 16e9, "bfloat16"), ("float32", "cpu", "", 1e9, "float32"), ("float16", "cpu", "", 64e9, "float16")])
def test_seven_billion_weights_are_float32_while_that_fits_and_bfloat16_on_gpus(asked, device, hardware, free, name):
    found, why = dtypes.weights_dtype(asked, device, 6_740_000_000, free, hardware)
    assert found == name and why.startswith(f"weights in {name}: ")
    assert ("slow" in why) == (asked == "float16")


STAT = "anon 1\ninactive_file 500\n"


@pytest.mark.parametrize("groups, written, free", [
    ("", {}, float("inf")), ("0::/", {"memory.max": "max\n"}, float("inf")),
    ("0::/", {"memory.max": "8000\n", "memory.current": "3000\n", "memory.stat": STAT}, 5500),
    ("0::/", {"memory.max": "2000\n", "memory.current": "3000\n", "memory.stat": ""}, 0),
    ("4:memory:/outside/the/container", {"memory/memory.limit_in_bytes": "9000\n", "memory/memory.usage_in_bytes": "1000\n",
                                         "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 700\n"}, 8005),
    # a sandbox that shows a limit, and not all of what is used; controllers that share a tree
    ("0::/", {"memory.max": "8000\n", "memory.current": "3000\n"}, 5000), ("0::/", {"memory.max": "8000\n"}, 8000),
    ("4:cpuset,memory:/job", {"memory/job/memory.limit_in_bytes": "9000", "memory/job/memory.usage_in_bytes": "1000"}, 8000),
    ("0::/", {"memory.max": "max\n", "memory.high": "8000\n", "memory.current": "3000\n", "memory.stat": ""}, 5000),
    # a job of a batch system: the limit is on the job, above the step whose process this is
    ("0::/slurm/job_7/step_0", {"slurm/job_7/step_0/memory.max": "max", "slurm/job_7/memory.max": "8000",
                                "slurm/job_7/memory.current": "1000", "slurm/job_7/memory.stat": ""}, 7000),
    ("9:cpu:/\n4:memory:/slurm/job_7\n0::/", {"memory/memory.limit_in_bytes": str(2**63 - 4096),
                                              "memory/memory.usage_in_bytes": "1", "memory/memory.stat": "",
                                              "memory/slurm/job_7/memory.limit_in_bytes": "5000",
                                              "memory/slurm/job_7/memory.usage_in_bytes": "1000",
                                              "memory/slurm/job_7/memory.stat": "inactive_file 9"}, 4009)])
def test_a_process_has_the_memory_that_the_limits_of_its_groups_leave(groups, written, free, tmp_path):
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert dtypes.group_memory(tmp_path, groups + "\n") == free


def test_a_process_has_the_address_space_that_ulimit_leaves(tmp_path, monkeypatch):
    (tmp_path / "statm").write_text("1000 200 30 4 0 5 0\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**30, 2**30))
    page = dtypes.os.sysconf("SC_PAGE_SIZE")
    assert dtypes.address_space(tmp_path / "statm") == 2**30 - 1000 * page
    assert dtypes.address_space(tmp_path / "none") == float("inf")
    monkeypatch.setattr(dtypes, "group_memory", lambda *_: float("inf"))
    assert dtypes.free_memory("cpu") <= 2**30
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert dtypes.address_space(tmp_path / "statm") == float("inf")


def test_names_of_dtypes_that_do_not_exist_are_refused():
    for choose in (lambda: dtypes.training_dtype("half", ""), lambda: dtypes.weights_dtype("half", "cpu", 1),
                   lambda: dtypes.training_dtype("float16", "")):
        with pytest.raises(ValueError, match="--dtype=.*expected auto, float32"):
            choose()


@pytest.mark.parametrize("name, gpus, apple, found", [
    ("auto", 0, False, "cpu"), ("auto", 0, True, "cpu"), ("auto", 2, False, "cuda"), ("cpu", 2, True, "cpu"),
    ("cuda", 1, False, "cuda"),
    ("cuda:1", 2, False, "cuda:1"), ("mps", 0, True, "mps"), ("mps", 0, False, "no Apple GPU"), ("cuda", 0, False, "no GPU"),
    ("cuda:0", 0, False, "no GPU"), ("cuda:2", 2, False, "2 of them, cuda:0 to cuda:1"), ("cuda:", 1, False, "expected auto"),
    ("cuda:-1", 1, False, "expected auto"), ("cpu:0", 1, False, "expected auto"), ("xpu", 1, False, "expected auto")])
def test_a_device_is_one_that_is_here_or_a_sentence(name, gpus, apple, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    if " " not in found:
        assert config.choose_device(name) == found
        return
    with pytest.raises(ValueError, match=f"--device={name}.*{found}"):
        config.choose_device(name)


def test_tokenizer_and_vocoder_stay_on_the_cpu_beside_a_model_on_apples_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert config.beside("mps") == "cpu" and config.beside("cuda:1") == "cuda:1"
    assert config.beside(torch.device("cpu")).type == "cpu"
    with pytest.raises(ValueError, match="--device=mps is for language models"):
        config.choose_device("mps", language_model=False)


def test_one_device_is_not_for_several_processes(monkeypatch):
    from training import distributed
    monkeypatch.setattr(config, "choose_device", lambda name: name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("cuda:1", "mps"):
        with pytest.raises(ValueError, match=f"--device={name} is one device for 2 processes"):
            distributed.setup(name)


@pytest.mark.parametrize("rank, world", [("1", None), ("2", "2"), ("-1", "1")])
def test_a_process_whose_number_does_not_exist_is_told_so(rank, world, monkeypatch):
    from training import distributed
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world) if world else monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=f"RANK={rank} of WORLD_SIZE={world or 1}.*torchrun"):
        distributed.setup("cpu")


# ---------------------------------------------------------------------------------------------- who asks

@pytest.mark.parametrize("hardware, dtype", [("amx_bf16", torch.bfloat16), ("", torch.float32)])
def test_training_says_which_products_it_takes_and_why(hardware, dtype, train_arguments, monkeypatch, capsys):
    monkeypatch.setattr(learners, "hardware_bfloat16", lambda device: hardware)
    made = []
    monkeypatch.setattr(train, "Learner", lambda *arguments: made.append(learners.Learner(*arguments)) or made[-1])
    train.main(["--init=cold", *train_arguments, "--dtype=auto", "--steps=1"])
    assert made[0].dtype == dtype and made[0].autocast()._enabled == (dtype == torch.bfloat16)
    assert f"products in {str(dtype).removeprefix('torch.')}: " in capsys.readouterr().out


def test_processes_on_different_processors_take_the_same_products(monkeypatch):
    class Two(Dist):
        def any(self, flag):  # the other process has no such processor
            return True

    monkeypatch.setattr(learners, "hardware_bfloat16", lambda device: "amx_bf16")
    assert learners.Learner(TINY, train.TrainConfig(), Two(0, 1, torch.device("cpu"))).dtype == torch.float32
    assert learners.Learner(TINY, train.TrainConfig(), ALONE).dtype == torch.bfloat16


@pytest.mark.parametrize("hardware, name", [("amx_bf16", "bfloat16"), ("", "float32")])
def test_the_factory_decides_once_for_all_its_runs(hardware, name, tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(list(map(str, command))))
    monkeypatch.setattr(pocket.build, "hardware_bfloat16", lambda device: hardware)
    monkeypatch.setattr(pocket.build, "STAGES", {pocket.build.text_lm: tmp_path / "none"})
    monkeypatch.setattr(pocket.build, "BUILD", tmp_path)
    monkeypatch.setattr(pocket.build, "store_half", lambda *_: None)
    pocket.build.main([])
    command, = (command for command in commands if "train.py" in command)
    assert f"--dtype={name}" in command and capsys.readouterr().out.count(f"products in {name}: ") == 1


@pytest.mark.parametrize("free, dtype", [(10**9, torch.float32), (1000, torch.bfloat16)])
def test_sampling_takes_float32_while_it_fits_and_says_so(free, dtype, tmp_path, monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(dtypes, "free_memory", lambda device: free)
    monkeypatch.setattr(sample, "generate", lambda model, ids, *_, **__: taken.append(model.wte.weight.dtype) or ids)
    sample.main(["pocket/prompt.wav", f"--out={tmp_path}"])
    assert taken == [dtype] and f"weights in {str(dtype).removeprefix('torch.')}: float32 takes" in capsys.readouterr().out
    sample.main(["pocket/prompt.wav", f"--out={tmp_path}", "--dtype=float16"])
    assert taken[1] == torch.float16 and len(list(tmp_path.glob("*.wav"))) == 2  # what another dtype said stays
    assert {name for name in dtypes.DTYPES for file in tmp_path.iterdir() if f'"{name}"'.encode() in file.read_bytes()} == {
        str(dtype).removeprefix("torch."), "float16"}  # the wav says which it was


# ---------------------------------------------------------------------------------------------- models in half precision

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_log_likelihoods_of_rounded_weights_are_those_of_float32_nearly(shape, dtype, most):
    rows = [VOCAB.encode(torch.randint(58, (n,), generator=torch.Generator().manual_seed(n)), bos=True) for n in (5, 60, 120)]
    exact, found = (likelihood.log_probabilities(make(dtype, **SHAPES[shape]), rows, ALONE) for dtype in (torch.float32, dtype))
    for a, b in zip(exact, found):
        assert b.dtype.name == "float64" and abs(a - b).mean() < most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_and_a_seed_work_in_half_precision(dtype):
    model, ids = make(dtype), torch.tensor([[1, 5, 9]])
    found = [generate(model, ids, 20, generator=torch.Generator().manual_seed(3), banned=(0,)) for _ in range(2)]
    assert torch.equal(*found) and found[0].shape == (1, 23) and not (found[0] == 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_packed_as_they_are_or_not_at_all(dtype, monkeypatch):
    model = make(dtype)
    for able in {False, packing.BFLOAT16}:
        monkeypatch.setattr(packing, "BFLOAT16", able)
        with packed(model):
            copies = [layer.forward.args[1] for layer in model.modules() if "forward" in vars(layer)]
            assert {copy.dtype for copy in copies} == ({dtype} if able and dtype == torch.bfloat16 else set())
            assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_numbers_beyond_float16_are_a_sentence(tmp_path):
    model = make(torch.float16)
    model.h[0].mlp.down.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite in float16: .* --dtype=bfloat16"):
        likelihood.log_probabilities(model, [torch.tensor([1, 2, 3])], ALONE)
    with pytest.raises(ValueError, match="not finite in float16: .* --dtype=bfloat16"):
        generate(model, torch.tensor([[1, 2, 3]]), 4)


@pytest.mark.slow
def test_results_say_the_dtype_of_the_weights_and_label_scores_of_rounded_ones(tmp_path, capsys):
    arguments = ["--task=swuggy", "--resamples=100"]
    found = {}
    for name in ("float32", "bfloat16"):
        evaluate.main([*arguments, f"--dtype={name}", f"--out={tmp_path}/{name}"])
        found[name] = json.loads((tmp_path / name / "result.json").read_text())
        text = capsys.readouterr().out
        assert f"weights in {name}: as asked for" in text and f"weights in {name}" in found[name]["systems"]["model"]
        said = ["model (bfloat16)" in text, "logits in bfloat16" in "".join(found[name]["conventions"])]
        assert said == [name == "bfloat16"] * 2
        rows = found[name]["sections"][0]["rows"]
        assert {row["system"]: row["weights"] for row in rows} == {"model": name, "bigram": None, "unigram": None, "length": None}
        lines = (tmp_path / name / "result.csv").read_text().splitlines()
        assert lines[0].endswith(",p,weights") and all(line.endswith(f",{name}") == (",model," in line) for line in lines[1:])
        header = next(tmp_path.glob(f"{name}/swuggy*.csv")).read_text().splitlines()[0]
        assert ("model (bfloat16)_positive" in header) == (name == "bfloat16") and "unigram_positive" in header
    values = [[row["value"] for row in one["sections"][0]["rows"] if row["subset"] == "all"] for one in found.values()]
    assert values[0] == pytest.approx(values[1], abs=3)


LOADING = """
import sys, torch, twist
from bench.memory import resident
twist.load_speech_lm(dtype=torch.bfloat16)  # what libraries load when first used
before = resident("VmRSS")
for folder in sys.argv[1:]:  # most bytes so far, above those
    model, _ = twist.load_speech_lm(folder, torch.bfloat16)
    del model
    print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say a process's memory")
def test_loading_takes_the_memory_of_the_dtype_that_is_asked_for(tmp_path):
    """80 MB in float32 are 40 in bfloat16, and one of 16 files at a time is open."""
    shape = TransformerConfig(**{**TINY.__dict__, "n_embd": 512, "n_head": 4, "n_kv_head": 4, "head_dim": 128, "n_inner": 1408,
                                 "n_layer": 6, "embed_dim": 512})
    twist.save_speech_lm(twist.cold_start(shape, VOCAB), VOCAB, tmp_path / "one")
    settings, tensors = files.read_json(tmp_path / "one/config.json"), files.read_tensors(tmp_path / "one")
    size = sum(tensor.nbytes for tensor in tensors.values())
    files.write_model(tmp_path / "safetensors", settings, tensors, shard_bytes=size // 16)
    files.write_json(tmp_path / "bin/config.json", settings)
    weight_map = files.read_json(tmp_path / "safetensors/model.safetensors.index.json")["weight_map"]
    for shard in set(weight_map.values()):
        torch.save(files.read_tensors(tmp_path / "safetensors" / shard), tmp_path / "bin" / f"{shard}.bin")
    files.write_json(tmp_path / "bin/pytorch_model.bin.index.json",
                     {"weight_map": {name: f"{shard}.bin" for name, shard in weight_map.items()}})
    assert size > 75e6
    folders = [tmp_path / "safetensors", tmp_path / "bin"]
    done = subprocess.run([sys.executable, "-c", LOADING, *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(0.45 * size < int(peak) < 0.75 * size for peak in done.stdout.split()), done.stdout


# ---------------------------------------------------------------------------------------------- devices without float64

class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, f"{func} takes or gives float64"
        return result


@pytest.mark.parametrize("optimizer", ["adamw", "split"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_that_a_language_model_does_needs_float64(shape, optimizer, tiny_world):
    """Apple's GPUs have none. What is tested here on the CPU is all that runs on a model's device."""
    model = make(**SHAPES[shape])
    vocab, options = twist.UnitVocab(20), types.SimpleNamespace(**{**train.TrainConfig().__dict__, "optimizer": optimizer})
    loader = UnitLoader(UnitShards(tiny_world / "val"), vocab, 32, 2, 0, packing="documents")
    with NoFloat64():
        learner = learners.Learner(model.config, options, ALONE).fill(model.state_dict().items())
        assert all(number > 0 for number in learner.update(loader.rows(0, 0, 2), 1, None, 1e-3).read()[:2])
        assert learner.evaluate(loader, 4) > 0
        generate(model, torch.tensor([[1, 5, 9]]), 5, top_k=10, top_p=0.9, generator=torch.Generator(), eos=1, banned=(0,))
        likelihood.log_probabilities(model, [torch.arange(10)], ALONE)


def test_the_guard_sees_float64():
    with pytest.raises(AssertionError, match="float64"), NoFloat64():
        torch.zeros(3).double()
    assert isinstance(make(), Transformer)
