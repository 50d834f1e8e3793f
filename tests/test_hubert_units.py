"""hubert_units.py: features equal those of transformers, units are the nearest centres, bad files spoil nothing."""
import argparse
import collections
import contextlib
import csv
import dataclasses
import itertools
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hubert_units
from checkpoints import files, pretrained
from corpus.extract import begin_group, decoders, encode_files, find_audio
from corpus.shards import UnitShards, check_recipe
from hubert_units import load_unit_encoder, speech_to_units
from kernels.packed import AVAILABLE, packed
from speech import audio
from speech.audio import SAMPLE_RATE, read_wav
from speech.encoder import UnitEncoder, deduplicate
from speech.hubert import Hubert, HubertConfig, frames_of, load_hubert
from speech.kmeans import fingerprint
from training.distributed import Dist

ROOT = Path(hubert_units.__file__).parent
C, K, LAYERS = 16, 12, 3
BASE = HubertConfig(conv_dim=(8,) * 7, conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2), n_embd=C,
                    n_layer=LAYERS, n_head=4, n_inner=24, pos_kernel=16, pos_groups=4)
SLOW = dataclasses.replace(BASE, conv_dim=(8,) * 8, conv_kernel=(*BASE.conv_kernel, 2), conv_stride=(*BASE.conv_stride, 2),
                           pos_batch_norm=True)
KINDS = {"50hz": (BASE, 400, 320), "25hz": (SLOW, 720, 640)}  # config, samples that one frame sees, samples per frame
each_kind = pytest.mark.parametrize("kind", KINDS)


def noise(length, seed=0):
    return 0.3 * torch.randn(length, generator=torch.Generator().manual_seed(seed))


def perturb(tensors):
    """Every tensor away from its initial value, variances positive."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        random = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + random.abs())
        elif "weight_g" in name or "original0" in name:
            tensor.copy_(1 + 0.3 * random.abs())
        else:
            tensor.copy_(float(tensor.ndim == 1 and name.endswith("weight")) + 0.3 * random)


def write_folder(folder, config=BASE, layer=2, centers=None, metadata=None):
    """A tiny HuBERT of random weights with k-means centres, as the command takes it."""
    hubert = Hubert(config)
    perturb(hubert.state_dict())
    settings, tensors = pretrained.write_hubert(dataclasses.asdict(config), hubert.state_dict())
    files.write_model(folder, settings, tensors)
    if centers is None:
        features = hubert.eval()(noise(40_000)[None], layer)[0].detach()
        centers = features[:: len(features) // K][:K].clone()  # real frames, so that all units occur
    metadata = {"layer": str(layer)} if metadata is None else metadata
    files.write_tensors(folder / "kmeans.safetensors", {"centers": centers}, metadata)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hubert")
    return {kind: write_folder(root / kind, KINDS[kind][0]) for kind in KINDS}


# ---------------------------------------------------------------------------------------------- features

def their_model(config):
    transformers = pytest.importorskip("transformers")
    settings, _ = pretrained.write_hubert(dataclasses.asdict(config), Hubert(config).state_dict())
    for key in ("architectures", "model_type"):
        settings.pop(key)
    model = transformers.HubertModel(transformers.HubertConfig(**settings)).eval()
    perturb(model.state_dict())
    return model


def old_weight_norm_names(tensors):
    new = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    assert new + "0" in tensors and new + "1" in tensors
    new = "parametrizations.weight.original"
    return {name.replace(f"{new}0", "weight_g").replace(f"{new}1", "weight_v"): tensor for name, tensor in tensors.items()}


def wrapped(tensors):
    return {f"hubert.{name}": tensor for name, tensor in tensors.items()}


def without_spare_tensors(tensors):
    spare = ("masked_spec_embed", "encoder.pos_conv_embed.batch_norm.num_batches_tracked")
    assert any(name in tensors for name in spare)
    return {name: tensor for name, tensor in tensors.items() if name not in spare}


def compiled(tensors):
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


def in_a_trainer(tensors):
    return {f"upstream.model.{name}": tensor for name, tensor in tensors.items()}


def with_heads(tensors):
    """What CTC, classification and pretraining put beside the network, which is then called `hubert`."""
    names = ("lm_head.weight", "lm_head.bias", "projector.weight", "classifier.bias", "final_proj.weight", "layer_weights",
             "label_embs_concat")
    return {**wrapped(tensors), **{name: torch.full((3,), torch.nan) for name in names}}


@pytest.mark.parametrize("kind, change", [
    ("50hz", compiled), ("50hz", in_a_trainer), ("25hz", with_heads), ("50hz", with_heads),
    ("50hz", None), ("50hz", old_weight_norm_names), ("50hz", wrapped), ("50hz", without_spare_tensors),
    ("25hz", None), ("25hz", wrapped), ("25hz", without_spare_tensors)])
def test_features_of_every_layer_equal_those_of_transformers(kind, change, tmp_path):
    theirs = their_model(dataclasses.replace(KINDS[kind][0], n_layer=12))
    theirs.save_pretrained(tmp_path)
    if change:
        save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    hubert, wav = load_hubert(tmp_path), noise(9000)
    with torch.no_grad():
        states = theirs(wav[None], output_hidden_states=True).hidden_states
        assert len(states) == 13
        for layer, expected in enumerate(states):
            assert expected.std() > 0.3
            torch.testing.assert_close(hubert(wav[None], layer), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hubert(wav[None]), states[-1], rtol=1e-4, atol=1e-5)
        assert (states[1] - states[2]).abs().max() > 0.1  # layers can be told apart
        for layer in range(1, 13):
            encoder = UnitEncoder(hubert, torch.zeros(K, C), layer)
            torch.testing.assert_close(encoder.features(wav), states[layer][0], rtol=1e-4, atol=1e-5)


@each_kind
def test_what_is_written_is_what_transformers_opens(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_folder(tmp_path, KINDS[kind][0])
    hubert, wav = load_hubert(tmp_path), noise(9000)
    theirs, loading = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(hubert(wav[None]), theirs.eval()(wav[None]).last_hidden_state, rtol=1e-4, atol=1e-5)
    options, tensors = pretrained.read_hubert(tmp_path)
    assert HubertConfig(**options) == KINDS[kind][0]
    written = pretrained.write_hubert(options, tensors)[1]
    for name, tensor in files.read_tensors(tmp_path).items():
        if "original1" in name:  # another direction vector of the same weight
            torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=1e-7)
        else:
            torch.testing.assert_close(written[name], tensor, rtol=1e-6 if "original0" in name else 0, atol=0), name


@each_kind
def test_the_number_of_frames_is_the_published_formula(kind, folders):
    _, shortest, hop = KINDS[kind]
    encoder = load_unit_encoder(folders[kind])
    assert (encoder.hubert.receptive_field, encoder.hubert.hop, encoder.frame_rate) == (shortest, hop, SAMPLE_RATE / hop)
    for length in range(40_000):  # through the convolutions, one after the other
        frames = length
        for conv in encoder.hubert.convs:
            frames = frames_of(frames, conv.kernel, conv.stride)
        assert frames == encoder.hubert.num_frames(length) == max(0, (length - shortest) // hop + 1)
    for length in (shortest, shortest + 1, shortest + hop - 1, shortest + hop, 4001, 5119, 5120, 5121, 8000, 16_000):
        expected = (length - shortest) // hop + 1
        assert encoder.features(noise(length)).shape == (expected, C) and encoder.encode(noise(length)).shape == (expected,)


@each_kind
def test_what_is_no_recording_of_one_frame_is_refused(kind, folders):
    shortest, encoder = KINDS[kind][1], load_unit_encoder(folders[kind])
    for length in (0, 1, shortest - 1):
        with pytest.raises(ValueError, match=f"{length} samples are shorter than one frame \\({shortest} samples"):
            encoder.encode(noise(length))
    with pytest.raises(ValueError, match=r"shape \(S,\), got \(1, 8000\)"):
        encoder.features(noise(8000)[None])


# ---------------------------------------------------------------------------------------------- batches

def lengths_and_order(kind):
    shortest = KINDS[kind][1]
    return st.lists(st.integers(shortest, 20_000), min_size=2, max_size=7)


@each_kind
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data())
def test_a_padded_batch_gives_the_features_and_units_of_each_recording_alone(kind, folders, drawn):
    encoder = load_unit_encoder(folders[kind])
    wavs = [noise(length, seed) for seed, length in enumerate(drawn.draw(lengths_and_order(kind)))]
    together = encoder.features_of(wavs)  # all in one forward, however different their lengths
    for features, wav in zip(together, wavs):
        alone = encoder.features(wav)
        assert features.shape == alone.shape == (encoder.hubert.num_frames(len(wav)), C)
        torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-5)
    for units, wav in zip(encoder.units_of(wavs), wavs):
        assert torch.equal(units, encoder.encode(wav))
    order = drawn.draw(st.permutations(range(len(wavs))))
    for units, i in zip(encoder.encode_batch([wavs[i] for i in order]), order):
        assert torch.equal(units, encoder.encode(wavs[i]))


@pytest.mark.parametrize("rate", [12.5, 50])
def test_a_batch_at_another_rate_gives_what_each_recording_gives_alone(rate, folders):
    encoder = load_unit_encoder(folders["25hz"], frame_rate=rate)
    wavs = [noise(length, length) for length in (9000, 8999, 2000, 1361)]
    for together, units, wav in zip(encoder.features_of(wavs), encoder.units_of(wavs), wavs):
        torch.testing.assert_close(together, encoder.features(wav), rtol=1e-5, atol=1e-5)
        assert torch.equal(units, encoder.encode(wav))


class Operators(TorchDispatchMode):
    """Names of the operators that run inside, with their tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.seen.append((operator.overloadpacket.__name__, [x for x in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)],
                          result))
        return result


def test_the_host_reads_once_from_a_batch_and_copies_each_recording_once(folders, monkeypatch):
    encoder, wavs = load_unit_encoder(folders["25hz"]), [noise(16_000 - 10 * i, i) for i in range(6)]
    expected, reads, read_back = [encoder.encode(wav) for wav in wavs], [], torch.Tensor.to
    for name in ("cpu", "tolist", "numpy", "item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda x, *_, name=name: reads.append(name) or pytest.fail(name))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *to, **how: (
        to[0] == "cpu" and reads.append((x.dtype, how)), read_back(x, *to, **how))[1])
    files = [(f"{i}.wav", types.SimpleNamespace(result=lambda wav=wav: wav)) for i, wav in enumerate(wavs)]
    with Operators() as operators:
        finish = begin_group(files, encoder)
    assert reads == [(torch.int32, {"non_blocking": True})]
    assert not {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"} & {name for name, *_ in operators.seen}
    for wav in wavs:
        copies = [name for name, tensors, result in operators.seen
                  if any(x.data_ptr() == wav.data_ptr() for x in tensors) and result.data_ptr() != wav.data_ptr()]
        assert copies == ["copy_"]
    monkeypatch.undo()
    for (units, seconds), wav, wanted in zip(finish().values(), wavs, expected):
        assert torch.equal(units, wanted) and seconds == len(wav) / SAMPLE_RATE


def test_a_batch_comes_to_a_gpu_on_a_stream_of_its_own_and_is_waited_for_there(folders, monkeypatch):
    """The order of the calls; the device that holds nothing stands in for the GPU."""
    encoder, order = load_unit_encoder(folders["25hz"]), []
    ours, theirs = (types.SimpleNamespace(wait_stream=lambda other, name=name: order.append((name, "waits", other)))
                    for name in ("computing", "copying"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: theirs)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ours)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: order.append(stream) or contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: order.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: order.append((x.device.type, stream)))
    assert encoder.moved(noise(3)).device.type == "cpu" and not order
    encoder.centers = encoder.centers.to("meta")
    assert encoder.moved(noise(3)).device.type == "meta"
    assert order == [theirs, "pinned", ("computing", "waits", theirs), ("meta", ours)]


def test_a_group_is_on_its_way_before_the_one_before_is_waited_for(tmp_path, monkeypatch):
    order, encoder = [], types.SimpleNamespace(recipe={"kind": "hubert", "num_units": 9}, budget=0.5, checked=lambda wav: wav)

    def begin(wavs):
        order.append(f"begin {len(order)}")
        return lambda: order.append("wait") or [torch.arange(9)] * len(wavs)

    encoder.begin = begin
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", noise(8000, i).clamp(-1, 1).numpy(), 16_000)
    monkeypatch.setattr("corpus.extract.WINDOW", 2)  # the lengths of the next two are looked at meanwhile
    options = hubert_units.UnitsConfig(out=str(tmp_path / "units"))
    meta, _ = encode_files(map(str, find_audio([tmp_path])), encoder, options, Dist(0, 1, torch.device("cpu")))
    assert order == ["begin 0", "begin 1", "wait", "begin 3", "wait", "wait"] and meta["files"] == 3


@pytest.mark.parametrize("device, cores, processes, threads", [
    ("cpu", 2, 1, 2), ("cpu", 64, 1, 2), ("cuda", 16, 1, 12), ("cuda", 8, 1, 7), ("cuda", 64, 8, 7), ("cuda", 4, 4, 2)])
def test_threads_that_decode_are_as_many_as_the_machine_has_cores_for(device, cores, processes, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert decoders(0, torch.device(device)) == threads and decoders(5, torch.device(device)) == 5


# ---------------------------------------------------------------------------------------------- precision

def test_in_bfloat16_products_are_rounded_and_all_else_is_float32(folders):
    encoder, wav = load_unit_encoder(folders["25hz"], precision="bfloat16"), noise(16_000)
    with Operators() as operators:
        units = encoder.encode(wav)
    inputs = collections.defaultdict(set)
    for name, tensors, _ in operators.seen:
        inputs[name] |= {x.dtype for x in tensors if x.is_floating_point()}
    for name in ("linear", "conv1d", "scaled_dot_product_attention"):
        assert inputs[name] == {torch.bfloat16}
    assert inputs["layer_norm"] == inputs["batch_norm"] == {torch.float32}
    assert inputs["matmul"] == {torch.float64, torch.float32}  # statistics; the first convolution, the distances
    exact = load_unit_encoder(folders["25hz"])
    assert 0 < (encoder.features(wav) - exact.features(wav)).norm() < 0.02 * exact.features(wav).norm()
    assert (units == exact.encode(wav)).float().mean() > 0.8  # centres of noise lie near to each other
    assert encoder.recipe == {**exact.recipe, "precision": "bfloat16"}


def test_in_bfloat16_a_batch_is_not_encoded_again_and_gives_nearly_the_units_of_each_recording_alone(folders, monkeypatch):
    encoder = load_unit_encoder(folders["25hz"], precision="bfloat16")
    wavs = [noise(16_000 - 10 * i, i) for i in range(6)]
    monkeypatch.setattr("speech.encoder.ROUNDING", 1.0)  # in float32 a reason to encode all again
    alone, forwards, original = torch.cat([encoder.encode(wav) for wav in wavs]), [], encoder.one_forward
    monkeypatch.setattr(encoder, "one_forward", lambda batch, *rest: forwards.append(len(batch)) or original(batch, *rest))
    assert (torch.cat(encoder.encode_batch(wavs)) == alone).float().mean() > 0.95 and forwards == [6]
    encoder.precision = "float32"
    assert len(encoder.encode_batch(wavs)) == 6 and forwards == [6, 6, *[1] * 6]


def test_features_beyond_the_range_of_a_precision_cost_their_recording_alone(folders, tmp_path, monkeypatch):
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", noise(9000, i).clamp(-1, 1).numpy(), 16_000)
    forward = Hubert.forward

    def overflowing(self, wav, layer=None, lengths=None, **named):
        x = forward(self, wav, layer, lengths, **named)
        x[wav.sub(noise(9000, 1).clamp(-1, 1)).abs().amax(1) < 1e-3, 2, 0] = torch.inf
        return x

    monkeypatch.setattr(Hubert, "forward", overflowing)
    hubert_units.main([str(tmp_path), f"--tokenizer={folders['25hz']}", f"--out={tmp_path}/u", "--device=cpu",
                       "--precision=bfloat16"])
    assert failures(tmp_path / "u") == {
        "1.wav": "its features are too large for --precision=bfloat16; choose --precision=float32"}
    assert [Path(name).name for name in UnitShards(tmp_path / "u").names] == ["0.wav", "2.wav"]


@pytest.mark.parametrize("precision", ["float16", "tf32"])
def test_a_precision_of_gpus_alone_is_refused_on_a_cpu(precision, folders, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(9000).clamp(-1, 1).numpy(), 16_000)
    said = f"--precision={precision} needs a CUDA GPU.*choose --precision=float32"
    with pytest.raises(ValueError, match=said):
        hubert_units.main([str(tmp_path), f"--out={tmp_path}/u", "--device=cpu", f"--precision={precision}"])
    assert not (tmp_path / "u").exists()
    with pytest.raises(ValueError, match=said):
        load_unit_encoder(folders["25hz"], precision=precision).encode(noise(9000))
    with pytest.raises(ValueError, match="precision 'int8': expected"):
        load_unit_encoder(folders["25hz"], precision="int8")


def test_units_of_another_precision_are_not_added_and_older_folders_hold_float32(folders, tmp_path):
    arguments = [str(tmp_path), f"--tokenizer={folders['25hz']}", f"--out={tmp_path}/u", "--device=cpu"]
    soundfile.write(tmp_path / "a.wav", noise(9000).clamp(-1, 1).numpy(), 16_000)
    hubert_units.main(arguments)
    meta = files.read_json(tmp_path / "u/meta.json")
    assert meta["recipe"].pop("precision") == "float32"
    files.write_json(tmp_path / "u/meta.json", meta)
    with pytest.raises(ValueError, match="precision is float32, now bfloat16"):
        hubert_units.main([*arguments, "--precision=bfloat16"])
    (tmp_path / "u/work").mkdir()  # an extraction that was interrupted
    files.write_json(tmp_path / "u/work/recipe.json", {**meta["recipe"], "precision": "bfloat16"})
    with pytest.raises(ValueError, match="unfinished units of another recipe .precision is bfloat16, now float32"):
        hubert_units.main(arguments)
    files.write_json(tmp_path / "u/work/recipe.json", meta["recipe"])
    soundfile.write(tmp_path / "b.wav", noise(9000, 1).clamp(-1, 1).numpy(), 16_000)
    hubert_units.main(arguments)
    assert len(UnitShards(tmp_path / "u")) == 2


# ---------------------------------------------------------------------------------------------- what padding does

@each_kind
def test_naive_padding_would_change_the_features(kind, folders):
    encoder = load_unit_encoder(folders[kind])
    wav = noise(9000)
    padded = encoder.hubert(torch.nn.functional.pad(wav, (0, 9000))[None], 2)[0, :encoder.hubert.num_frames(9000)]
    assert (padded - encoder.features(wav)).norm() > 0.02 * padded.norm()  # what the masked statistics are for


@pytest.mark.parametrize("normalize", [False, True])
def test_a_normalised_waveform_is_normalised_over_its_own_samples(normalize):
    hubert = Hubert(dataclasses.replace(SLOW, normalize=normalize)).eval()
    perturb(hubert.state_dict())
    encoder = UnitEncoder(hubert, torch.zeros(K, C), 2)
    wavs = [2 + 3 * noise(length, length) for length in (9000, 16_000, 720)]
    for features, wav in zip(encoder.features_of(wavs), wavs):
        torch.testing.assert_close(features, encoder.features(wav), rtol=1e-5, atol=1e-5)


def test_a_frame_half_way_between_two_centres_is_decided_alone(folders, monkeypatch):
    encoder, wavs = load_unit_encoder(folders["25hz"]), [noise(16_000, 1), noise(15_900, 2)]
    frame = encoder.features(wavs[1])[3]
    nearest = int(encoder.quantize(frame[None]))
    encoder.centers[nearest - 1] = 2 * frame - encoder.centers[nearest]  # the frame lies in the middle of these two
    assert [(encoder.nearest(encoder.features(wav), True) < 0).sum() for wav in wavs] == [0, 1]
    forwards = []
    original = encoder.one_forward
    monkeypatch.setattr(encoder, "one_forward", lambda batch, *rest: forwards.append(len(batch)) or original(batch, *rest))
    encoder.encode_batch(wavs)
    assert forwards == [2, 1]


def test_recordings_of_like_length_share_a_forward_within_the_budget(folders):
    encoder = load_unit_encoder(folders["25hz"])
    encoder.budget = 10.0
    lengths = [16_000 * seconds for seconds in (3, 4, 3, 1, 9, 12, 1, 4)]
    groups = [[lengths[i] // 16_000 for i in group] for group in encoder.batches(lengths)]
    assert groups == [[12], [9], [4, 4], [3, 3], [1, 1]]
    assert encoder.batches([]) == []


def test_padding_is_at_most_five_percent_on_a_mix_like_librispeech(folders):
    encoder, rng = load_unit_encoder(folders["25hz"]), np.random.default_rng(0)
    encoder.budget = 960.0
    long = rng.normal(14.5, 1.2, 1400).clip(10, 17)  # most utterances of its train sets are 12 to 16 s long, the rest any
    lengths = (np.concatenate([long, rng.uniform(1.5, 13, 600)]) * 16_000).astype(int)
    groups = encoder.batches(lengths.tolist())
    padded = sum(len(group) * max(lengths[group]) for group in groups)
    assert sorted(itertools.chain(*groups)) == list(range(2000)) and len(groups) < 60
    assert 1 - lengths.sum() / padded < 0.05


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 3 GB")])
def test_when_memory_runs_out_the_budget_is_halved_and_nothing_is_lost(error, folders, monkeypatch, capsys):
    encoder, wavs = load_unit_encoder(folders["25hz"]), [noise(8000, seed) for seed in range(7)]
    expected, forward, sizes = [encoder.encode(wav) for wav in wavs], encoder.hubert.forward, []

    def small(wav, *rest, **more):
        sizes.append(len(wav))
        if len(wav) > 2:
            raise error
        return forward(wav, *rest, **more)

    monkeypatch.setattr(encoder.hubert, "forward", small)
    for units, wanted in zip(encoder.encode_batch(wavs), expected):
        assert torch.equal(units, wanted)
    assert sizes[0] == 7 and encoder.budget == pytest.approx(0.5, abs=0.6) and "out of memory" in capsys.readouterr().out
    sizes.clear()
    encoder.encode_batch(wavs)
    assert max(sizes) <= 3  # the smaller budget stays
    monkeypatch.setattr(encoder.hubert, "forward", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match="not enough memory"):
        encoder.encode(wavs[0])
    monkeypatch.setattr(encoder.hubert, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        encoder.encode(wavs[0])


def test_packed_weights_give_the_same_features(folders):
    for kind in KINDS:
        encoder, wavs = load_unit_encoder(folders[kind]), [noise(length) for length in (9000, 30_001)]
        with torch.inference_mode():
            expected = encoder.features_of(wavs)
            with packed(encoder):
                assert not AVAILABLE or "product" in vars(encoder.hubert.convs[1])
                found = encoder.features_of(wavs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- long recordings

SECOND = SAMPLE_RATE


def test_the_published_way_encodes_independent_pieces(folders, monkeypatch):
    monkeypatch.setattr("speech.encoder.CHUNKINGS", {"textless": (1, 0)})
    encoder, wav = load_unit_encoder(folders["25hz"], chunking="textless"), noise(2 * SECOND + 719)
    pieces = [encoder.features(piece) for piece in wav.split(SECOND)[:2]]  # the rest is shorter than a frame
    torch.testing.assert_close(encoder.features(wav), torch.cat(pieces), rtol=1e-5, atol=1e-5)
    assert len(encoder.features(noise(2 * SECOND + 720))) == len(torch.cat(pieces)) + 1
    assert encoder.recipe["chunking"] == "textless"


def test_the_published_way_normalises_the_whole_recording_before_it_is_cut(monkeypatch):
    """fairseq's own order: layer_norm of the waveform, then pieces, each through the network alone."""
    monkeypatch.setattr("speech.encoder.CHUNKINGS", {"textless": (1, 0)})
    hubert = Hubert(dataclasses.replace(BASE, normalize=True)).eval()
    perturb(hubert.state_dict())
    encoder = UnitEncoder(hubert, torch.randn(K, C, generator=torch.Generator().manual_seed(0)), 2, chunking="textless")
    wav = noise(3 * SECOND + 4000)
    wav[:SECOND] *= 1e-3  # a piece so quiet that the network hears its level
    plain = Hubert(BASE).eval()
    plain.load_state_dict(hubert.state_dict())
    whole = ((wav.double() - wav.double().mean()) / (wav.double().var(correction=0) + 1e-5).sqrt()).float()
    expected = torch.cat([plain(piece[None], 2)[0] for piece in whole.split(SECOND)])
    for budget in (1.0, 60.0):  # pieces one by one, or together
        encoder.budget = budget
        torch.testing.assert_close(encoder.features(wav), expected, rtol=1e-3, atol=1e-4)
    each = torch.cat([hubert(piece[None], 2)[0] for piece in wav.split(SECOND)])
    assert (each - expected).abs().max() > 0.1  # pieces that are normalised by themselves differ
    assert torch.equal(encoder.encode_stream(lambda: wav.split(3000)), encoder.encode(wav))


@each_kind
@pytest.mark.parametrize("normalize", [False, True])
def test_pieces_with_context_have_the_frames_of_the_whole_and_its_statistics(kind, normalize, monkeypatch):
    """Up to layer 0 nothing but the positional convolution looks around, and the context covers it: pieces equal the whole."""
    hubert = Hubert(dataclasses.replace(KINDS[kind][0], normalize=normalize)).eval()
    perturb(hubert.state_dict())
    encoder = UnitEncoder(hubert, torch.randn(K, C, generator=torch.Generator().manual_seed(0)), 1)
    for rows in range(hubert.config.n_layer):  # layers that do nothing but their norms: what is left is local
        hubert.layers[rows].out.weight.data.zero_()
    for length in (5 * SECOND, 5 * SECOND + 17, 6 * SECOND + 333, 9 * SECOND - 1):
        wav = 1 + noise(length, length) * torch.linspace(0.2, 2, length)  # statistics that differ from piece to piece
        with monkeypatch.context() as patch:
            whole, frames = encoder.features(wav), encoder.encode(wav)
            patch.setattr("speech.encoder.CHUNKINGS", {"overlap": (1, 0.96)})
            assert encoder.longest < length
            for budget in (1.0, 60.0):  # one piece a forward, or many
                encoder.budget = budget
                torch.testing.assert_close(encoder.features(wav), whole, rtol=1e-4, atol=2e-5)
            blocks = wav.split([1000] * 5 + [7, length - 5007])
            streamed = encoder.encode_stream(lambda blocks=blocks: blocks)
            assert (streamed == frames).float().mean() > 0.99 and len(streamed) == len(frames)
            assert torch.equal(streamed, encoder.encode(wav))


def test_attention_that_is_cut_off_changes_few_units(monkeypatch):
    encoder = load_unit_encoder("pocket")
    wav = torch.cat([audio.read_wav(ROOT / "pocket/prompt.wav")] * 4)
    whole = encoder.encode(wav)
    monkeypatch.setattr("speech.encoder.CHUNKINGS", {"overlap": (5, 2)})
    pieces = encoder.encode(wav)
    assert len(pieces) == len(whole) and 0.9 < (pieces == whole).float().mean() < 1.0


def test_zeros_around_a_recording_give_slamkits_frames(folders, monkeypatch):
    encoder = load_unit_encoder(folders["25hz"], pad=40)
    for length in (640, 641, 16_000, 16_639):
        wav = noise(length)
        assert len(encoder.encode(wav)) == length // 640
        expected = load_unit_encoder(folders["25hz"]).features(torch.nn.functional.pad(wav, (40, 40)))
        assert torch.equal(encoder.features(wav), expected)
    assert encoder.recipe["pad"] == 40
    with pytest.raises(ValueError, match="639 samples are shorter than one frame \\(640 samples"):
        encoder.encode(noise(639))
    monkeypatch.setattr("speech.encoder.CHUNKINGS", {"overlap": (1, 1)})
    wav = noise(5 * SECOND)
    assert torch.equal(encoder.encode_stream(lambda: wav.split(3000)), encoder.encode(wav))
    with pytest.raises(ValueError, match="another tokenizer \\(pad is 40, expected 0"):
        check_recipe(encoder.recipe, load_unit_encoder(folders["25hz"]).recipe, "--data")


@pytest.mark.parametrize("kind, rate, frames", [("50hz", 25, 74), ("50hz", 100, 298), ("25hz", 12.5, 37), ("25hz", 50, 148)])
def test_other_frame_rates_are_made_from_the_nearest_native_one(kind, rate, frames, folders, monkeypatch):
    encoder, native = load_unit_encoder(folders[kind], frame_rate=rate), load_unit_encoder(folders[kind])
    wav = noise(3 * SECOND)
    features, x = encoder.features(wav), native.features(wav)
    assert encoder.frame_rate == encoder.recipe["frame_rate"] == rate and len(features) == frames
    if rate < native.frame_rate:
        torch.testing.assert_close(features, (x[0::2][:frames] + x[1::2][:frames]) / 2)
    else:  # each frame becomes two, a quarter of the way to its neighbours
        torch.testing.assert_close(features[2:-1:2], 0.75 * x[1:] + 0.25 * x[:-1])
        torch.testing.assert_close(features[1:-1:2], 0.75 * x[:-1] + 0.25 * x[1:])
    monkeypatch.setattr("speech.encoder.CHUNKINGS", {"overlap": (1, 0.96)})
    assert len(encoder.features(noise(7 * SECOND + 5))) == len(load_unit_encoder(folders[kind]).features(
        noise(7 * SECOND + 5))) * rate // native.frame_rate
    with pytest.raises(ValueError, match="frame rate 30"):
        load_unit_encoder(folders[kind], frame_rate=30)


# ---------------------------------------------------------------------------------------------- fairseq checkpoints

CONV_LAYERS = {"50hz": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2", "25hz": "[(8, 10, 5)] + [(8, 3, 2)] * 4 + [(8,2,2)] * 3"}


def settings_of(kind):
    """What fairseq's model and task sections say."""
    return ({"conv_feature_layers": CONV_LAYERS[kind], "extractor_mode": "default", "layer_norm_first": False, "conv_bias": False,
             "encoder_layers": 12, "encoder_attention_heads": 4, "conv_pos": 16, "conv_pos_groups": 4, "label_rate": 25.0,
             "conv_pos_batch_norm": kind == "25hz"}, {"normalize": False, "sample_rate": 16000, "labels": ["km"]})


def fairseq_names(tensors):
    """Hugging Face's names of the tensors as fairseq has them, written out once more, independently of the code."""
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if name == "masked_spec_embed":
            new = "mask_emb"
        elif parts[0] == "feature_extractor":
            new = f"feature_extractor.conv_layers.{parts[2]}.{0 if parts[3] == 'conv' else 2}.{parts[4]}"
        elif parts[0] == "feature_projection":
            new = f"{'layer_norm' if parts[1] == 'layer_norm' else 'post_extract_proj'}.{parts[2]}"
        elif "batch_norm" in name:
            new = f"encoder.pos_conv.0.{parts[3]}"
        elif "pos_conv_embed" in name:
            plain = "encoder.pos_conv_embed.conv.weight" in tensors
            new = f"encoder.pos_conv.{1 if plain else 0}." + {
                "original0": "weight_g", "original1": "weight_v"}.get(parts[-1], parts[-1])
        elif parts[1] == "layer_norm":
            new = name
        else:
            layer, rest = parts[2], ".".join(parts[3:])
            for theirs, fairseq in (("attention.", "self_attn."), ("feed_forward.intermediate_dense.", "fc1."),
                                    ("feed_forward.output_dense.", "fc2.")):
                rest = rest.replace(theirs, fairseq)
            rest = "self_attn_" + rest if rest.startswith("layer_norm") else rest
            new = f"encoder.layers.{layer}.{rest}"
        renamed[new] = tensor
    head = {"final_proj.weight": torch.ones(4, 4), "final_proj.bias": torch.ones(4), "label_embs_concat": torch.ones(10, 4)}
    return collections.OrderedDict({**renamed, **head})


class Foreign:
    """Stands in for a class of a package that is not installed where the file is read."""

    def __init__(self, **state):
        self.__dict__.update(state)


@pytest.fixture
def fairseq_classes(monkeypatch):
    """Classes that pickle by the names of fairseq's and omegaconf's; forgotten before the file is read."""
    classes = {}
    for module, name in (("fairseq.data.dictionary", "Dictionary"), ("omegaconf.dictconfig", "DictConfig"),
                         ("omegaconf.nodes", "AnyNode"), ("omegaconf.base", "ContainerMetadata")):
        classes[name] = type(name, (Foreign,), {"__module__": module})
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            part = ".".join(parts[:i])
            if part not in sys.modules or part == module:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        setattr(sys.modules[module], name, classes[name])
    return classes


def omegaconf(section, classes):
    """A dictionary as omegaconf pickles it."""
    content = {key: classes["AnyNode"](_metadata=classes["ContainerMetadata"](key=key, optional=True), _parent=None, _val=value)
               for key, value in section.items()}
    return classes["DictConfig"](_metadata=classes["ContainerMetadata"](key=None, flags={}), _parent=None, _content=content)


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["zip", "before-torch-1.6"])
@pytest.mark.parametrize("style", ["namespace", "cfg", "cfg-of-namespaces", "omegaconf", "stripped"])
@each_kind
def test_a_fairseq_file_gives_the_features_of_the_folder_to_the_bit(kind, style, legacy, fairseq_classes, tmp_path):
    config = dataclasses.replace(KINDS[kind][0], n_layer=12)
    if style == "stripped":  # nothing says how many heads there are: the published number for the width of HuBERT base
        config = dataclasses.replace(config, n_head=12, n_embd=768, n_layer=2)
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path / "folder")
    model, task = settings_of(kind)
    saved = {"args": None, "cfg": {"model": model, "task": task, "common": {"seed": 1}},
             "model": fairseq_names(load_file(tmp_path / "folder" / "model.safetensors")),
             "task_state": {"dictionaries": [fairseq_classes["Dictionary"](symbols=["<s>", "a"], indices={"<s>": 0})]},
             "optimizer_history": [{"num_updates": 3}], "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    if style == "namespace":
        saved |= {"args": argparse.Namespace(**model, **task, arch="hubert"), "cfg": None}
    elif style == "cfg-of-namespaces":
        saved["cfg"] = {"model": argparse.Namespace(**model), "task": argparse.Namespace(**task)}
    elif style == "omegaconf":
        saved["cfg"] = omegaconf({"model": omegaconf(model, fairseq_classes), "task": omegaconf(task, fairseq_classes)},
                                 fairseq_classes)
    elif style == "stripped":
        saved = {"model": saved["model"], "task_state": saved["task_state"]}
    torch.save(saved, tmp_path / "hubert.pt", _use_new_zipfile_serialization=not legacy)
    for module in ("fairseq.data.dictionary", "omegaconf.dictconfig", "omegaconf.nodes", "omegaconf.base"):
        del sys.modules[module].__dict__[next(name for name in vars(sys.modules[module]) if name in fairseq_classes)]
    ours, wav = load_hubert(tmp_path / "hubert.pt"), noise(9000)
    assert ours.config == config == load_hubert(tmp_path / "folder").config
    folder = load_hubert(tmp_path / "folder")
    for layer in (0, 1, config.n_layer - 1, config.n_layer):
        assert torch.equal(ours(wav[None], layer), folder(wav[None], layer))
    wide = {"rtol": 1e-2, "atol": 5e-4} if style == "stripped" else {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(ours(wav[None]), theirs(wav[None]).last_hidden_state, **wide)


def fairseq_file(path, kind="50hz", model=(), task=(), tensors=None):
    """A small fairseq checkpoint; returns its tensors' names."""
    hubert = Hubert(dataclasses.replace(KINDS[kind][0], n_layer=2))
    perturb(hubert.state_dict())
    _, theirs = pretrained.write_hubert(dataclasses.asdict(hubert.config), hubert.state_dict())
    theirs = fairseq_names(theirs)
    if tensors:
        tensors(theirs)
    model_section, task_section = settings_of(kind)
    cfg = {"model": {**model_section, **dict(model)}, "task": {**task_section, **dict(task)}}
    torch.save({"cfg": cfg, "model": theirs}, path)
    return hubert


def test_heads_of_a_file_without_settings_are_those_of_a_published_width_or_refused(tmp_path, monkeypatch, capsys):
    fairseq_file(tmp_path / "hubert.pt")
    torch.save({"model": torch.load(tmp_path / "hubert.pt", weights_only=True)["model"]}, tmp_path / "hubert.pt")
    with pytest.raises(ValueError, match="no settings, and a width of 16, .*heads cannot be told; give a file with its settings"):
        load_hubert(tmp_path / "hubert.pt")
    monkeypatch.setitem(pretrained.families.HEADS_OF_WIDTH, 16, 4)
    assert load_hubert(tmp_path / "hubert.pt").config.n_head == 4
    assert "no settings: 4 attention heads" in capsys.readouterr().err


def test_the_task_of_a_fairseq_file_says_whether_waveforms_are_normalised(tmp_path):
    for normalize in (False, True):
        original = fairseq_file(tmp_path / "hubert.pt", task={"normalize": normalize})
        hubert, wav = load_hubert(tmp_path / "hubert.pt"), 3 + 5 * noise(9000)
        assert hubert.config.normalize is normalize
        same = torch.allclose(hubert(wav[None]), original.eval()(wav[None]), atol=1e-5)
        assert same != normalize


@pytest.mark.parametrize("change, words", [
    ({"model": {"extractor_mode": "layer_norm"}}, "extractor_mode = 'layer_norm'"),
    ({"model": {"layer_norm_first": True}}, "layer_norm_first"), ({"model": {"conv_bias": True}}, "conv_bias"),
    ({"task": {"sample_rate": 8000}}, "sample_rate = 8000"),
    ({"model": {"conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 5"}}, "belong to different models"),
    ({"model": {"conv_feature_layers": "__import__('os').mkdir('executed')"}}, "nothing was evaluated"),
    ({"tensors": lambda t: t.pop("post_extract_proj.bias")}, "missing .*feature_projection.projection.bias"),
    ({"tensors": lambda t: t.pop("post_extract_proj.weight")}, "no HuBERT"),
    ({"tensors": lambda t: t.pop("encoder.pos_conv.0.weight_g")}, "weight_v but no"),
    ({"tensors": lambda t: t.update({"encoder.layers.0.adapter.weight": torch.ones(2)})}, "unexpected .*adapter"),
    ({"tensors": lambda t: t.update({"encoder.layers.0.fc2.weight": torch.ones(2, 2)})}, "shape"),
    ({"tensors": lambda t: t.clear()}, "no fairseq checkpoint")])
def test_a_fairseq_file_that_the_code_would_misread_is_refused(change, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fairseq_file(tmp_path / "hubert.pt", **change)
    with pytest.raises(ValueError, match=words):
        load_hubert(tmp_path / "hubert.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text, expected", [
    ("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 3", [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 3),
    ("[(8, 2, 1)]", [(8, 2, 1)]), ("([(8,2,1)] + [(4,2,1)]) * 2", [(8, 2, 1), (4, 2, 1)] * 2)])
def test_conv_feature_layers_are_parsed(text, expected):
    assert pretrained.parse_conv_layers(text) == expected


@pytest.mark.parametrize("text", [
    "", "[]", "[(1,2)]", "[(1,2,3,4)]", "[1,2,3]", "(1,2,3)", "[(1,2,3)] * 10**9", "[(1,2,3)] * 9999", "[(1,2,-3)]",
    "[(1,2,True)]", "[(1,2,3.0)]", "[(1,2,'3')]", "[(1,2,3)] - [(1,2,3)]",
    "open('x','w')", "[x for x in [(1,2,3)]]", "[(1,2,3)][0]",
    "(lambda: [(1,2,3)])()", "[(1,2,3)] if 1 else 2", "(" * 300 + ")" * 300, "[" * 900, "1 +", "\0", None, 7, [(1, 2, 3)]])
def test_conv_feature_layers_that_are_anything_else_are_refused(text):
    with pytest.raises(ValueError, match="nothing was evaluated"):
        pretrained.parse_conv_layers(text)


# ---------------------------------------------------------------------------------------------- k-means of scikit-learn

@pytest.mark.parametrize("kind", ["KMeans", "MiniBatchKMeans"])
@pytest.mark.parametrize("compress", [0, 3, "gzip", "lzma"])
def test_units_equal_the_predictions_of_scikit_learns_kmeans(kind, compress, folders, tmp_path):
    cluster, joblib = pytest.importorskip("sklearn.cluster"), pytest.importorskip("joblib")
    own = load_unit_encoder(folders["25hz"])
    features = own.features(noise(200_000, seed=4))
    kmeans = getattr(cluster, kind)(K, n_init=1, random_state=0).fit(features.numpy())
    joblib.dump(kmeans, tmp_path / "hubert_L2_km12.bin", compress=compress)
    encoder = load_unit_encoder(folders["25hz"], kmeans=tmp_path / "hubert_L2_km12.bin")
    assert encoder.layer == 2 and encoder.num_units == K  # the layer from the file's name
    assert torch.equal(encoder.centers, torch.from_numpy(kmeans.cluster_centers_).float())
    wav = noise(100_000, seed=5)
    assert encoder.encode(wav).tolist() == kmeans.predict(encoder.features(wav).numpy()).tolist()


def test_the_k_means_file_of_a_tokenizer_is_found_beside_it(folders, tmp_path):
    joblib, cluster = pytest.importorskip("joblib"), pytest.importorskip("sklearn.cluster")
    fairseq_file(tmp_path / "mhubert_base.pt", "25hz")
    points = torch.randn(60, C, generator=torch.Generator().manual_seed(0)).numpy()
    kmeans = cluster.KMeans(4, n_init=1, random_state=0).fit(points)
    with pytest.raises(FileNotFoundError, match="no k-means centres.*--kmeans"):
        load_unit_encoder(tmp_path / "mhubert_base.pt")
    joblib.dump(kmeans, tmp_path / "mhubert_base_L1_km4.bin")
    encoder = load_unit_encoder(tmp_path / "mhubert_base.pt")
    assert (encoder.layer, encoder.num_units, encoder.frame_rate, encoder.recipe["model"]) == (1, 4, 25.0, "mhubert_base")
    for other in ("mhubert_base2_L3_km4.bin", "mhubert_base_25hz_L3_km4.bin", "mhubert_basenorm_L3_km50.bin"):
        joblib.dump(kmeans, tmp_path / other)  # of other tokenizers, whose names begin alike
    assert load_unit_encoder(tmp_path / "mhubert_base.pt").layer == 1
    joblib.dump(kmeans, tmp_path / "mhubert_base_L2_km4.bin")
    with pytest.raises(ValueError, match="2 k-means beside it .*_L1_km4.bin, .*--kmeans"):
        load_unit_encoder(tmp_path / "mhubert_base.pt")
    write_folder(tmp_path / "folder")
    (tmp_path / "folder" / "kmeans.safetensors").unlink()
    joblib.dump(kmeans, tmp_path / "folder" / "kmeans.bin")
    with pytest.raises(ValueError, match="which layer.*--layer"):
        load_unit_encoder(tmp_path / "folder")
    assert load_unit_encoder(tmp_path / "folder", layer=3).num_units == 4


@pytest.mark.parametrize("value, save", [
    ({"cluster_centers": np.ones((3, C)), "n_clusters": 3}, pickle.dump),
    ({"cluster_centers_": np.ones((3, C), "f4")}, pickle.dump), (np.ones((3, C)), pickle.dump),
    (np.ones((3, C), ">f8"), pickle.dump), ({"centers": torch.ones(3, C)}, torch.save),
    *((np.ones((3, C), dtype), lambda value, file: np.save(file, value)) for dtype in ("f4", "f8"))],
    ids=["dictionary", "state", "array", "big-endian", "tensor", "npy", "npy-float64"])
def test_centres_that_are_no_estimator_open_too(value, save, tmp_path):
    with open(tmp_path / "km.bin", "wb") as file:
        save(value, file)
    centers, said = files.read_kmeans(tmp_path / "km.bin")
    assert torch.equal(centers, torch.ones(3, C)) and centers.dtype == torch.float32 and said == {}


@pytest.mark.parametrize("write, words", [
    (lambda path: path.write_text("0.5,1.5\n2.5,3.5\n"), "table of text.*k-means centres are taken as safetensors"),
    (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'shape': (99, 9), }"), "no array of numbers"),
    (lambda path: np.save(path.open("wb"), np.array([{}, None], dtype=object)), "no array of numbers"),
    *((lambda path, shape=shape: path.write_bytes(b"\x93NUMPY\x01\x00F\x00" + (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + b", }").ljust(69) + b"\n"), "no array of numbers")
      for shape in (b"(9**9, 1", b"(1e9, 2)", b"(99999999999999999999, 2)", b"(9, 9)")),
    (lambda path: np.save(path.open("wb"), np.ones(3)), "no table of centres"),
    (lambda path: np.save(path.open("wb"), np.ones((0, 32))), "no table of centres"),
    (lambda path: np.save(path.open("wb"), np.full((2, 3), np.nan)), "6 values that are not finite")])
def test_centres_in_other_files_are_a_sentence(write, words, tmp_path):
    path = tmp_path / ("km.csv" if "text" in words else "km.npy")
    write(path)
    with pytest.raises(ValueError, match=words):
        files.read_kmeans(path)


@pytest.mark.parametrize("value", [
    {"n_clusters": 3}, [1, 2], np.ones(3), np.array([["a", "b"]]), "centres", {"cluster_centers_": "none"}])
def test_a_pickle_without_centres_says_so(value, tmp_path):
    (tmp_path / "km.bin").write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match="no table of centres"):
        files.read_kmeans(tmp_path / "km.bin")


# ---------------------------------------------------------------------------------------------- units

def test_deduplication_equals_itertools_groupby():
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 3, 50, 400):
        frames = rng.integers(0, 4, size=length)
        groups = [(int(unit), len(list(group))) for unit, group in itertools.groupby(frames.tolist())]
        for sequence in (frames, frames.tolist(), torch.from_numpy(frames)):
            units, runs = deduplicate(sequence)
            assert units.dtype == runs.dtype == torch.int64
            assert list(zip(units.tolist(), runs.tolist())) == groups
        assert torch.equal(torch.repeat_interleave(units, runs), torch.from_numpy(frames))
    assert [part.tolist() for part in deduplicate(torch.tensor([5, 5, 5, 2, 2, 5]))] == [[5, 2, 5], [3, 2, 1]]


def test_units_are_the_nearest_centres_by_brute_force_in_float64(folders):
    encoder = load_unit_encoder(folders["50hz"])
    features = encoder.features(noise(60_000, seed=1))
    distance = (features.double()[:, None] - encoder.centers.double()[None]).square().sum(2)  # (F, K)
    expected = distance.argmin(1)
    assert torch.equal(encoder.encode(noise(60_000, seed=1)), expected)
    assert len(expected.unique()) >= K // 2  # many units occur
    centers = torch.randn(200, C, generator=torch.Generator().manual_seed(2))
    points = torch.randn(3000, C, generator=torch.Generator().manual_seed(3))
    many = UnitEncoder(encoder.hubert, centers, 1)
    assert torch.equal(many.quantize(points), torch.cdist(points.double(), centers.double()).argmin(1))


def test_ties_go_to_the_lowest_index(folders):
    hubert = load_unit_encoder(folders["50hz"]).hubert
    centers = torch.zeros(4, C)
    centers[1, 0] = centers[2, 0] = 2.0
    encoder = UnitEncoder(hubert, centers, 1)
    points = torch.zeros(3, C)
    points[:, 0] = torch.tensor([-1.0, 1.0, 5.0])  # nearest: 0 and 3; all four; 1 and 2
    assert encoder.quantize(points).tolist() == [0, 0, 1]


@each_kind
def test_a_batch_gives_the_units_of_each_recording_alone(kind, folders):
    encoder = load_unit_encoder(folders[kind])
    wavs = [noise(length, seed) for seed, length in enumerate((16_000, 3000, 9999, 16_000))]
    together = encoder.encode_batch(wavs)
    assert len(together) == 4
    for units, wav in zip(together, wavs):
        assert torch.equal(units, encoder.encode(wav))
        assert units.tolist() == encoder.encode(wav.numpy()).tolist()


# ---------------------------------------------------------------------------------------------- loading

def test_the_layer_and_the_recipe_come_from_the_files(folders, tmp_path):
    encoder = load_unit_encoder(folders["25hz"])
    assert (encoder.layer, encoder.num_units, encoder.frame_rate) == (2, K, 25.0)
    assert encoder.recipe == {"kind": "hubert", "model": "25hz", "layer": 2, "num_units": K, "frame_rate": 25.0,
                              "centers": fingerprint(encoder.centers), "pad": 0, "chunking": "overlap",
                              "precision": "float32"}
    save_file({"centers": torch.ones(4, C)}, tmp_path / "other.safetensors")
    other = load_unit_encoder(str(folders["25hz"]), kmeans=str(tmp_path / "other.safetensors"), layer=1)
    assert (other.layer, other.num_units) == (1, 4) and other.recipe["centers"] != encoder.recipe["centers"]


def test_the_pocket_tokenizer_and_its_k_means_open_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = load_unit_encoder("pocket", kmeans="pocket")
    assert encoder.recipe["model"] == "pocket" and (encoder.layer, encoder.num_units, encoder.frame_rate) == (6, 200, 25.0)


def test_mistakes_in_the_k_means_file_are_named(folders, tmp_path):
    folder = folders["50hz"]

    def load(tensors=None, name="kmeans.safetensors", metadata=None, **options):
        if tensors:
            save_file(tensors, tmp_path / name, metadata=metadata)
        return load_unit_encoder(folder, kmeans=tmp_path / name, **options)

    with pytest.raises(FileNotFoundError, match="--kmeans=.*nothing.safetensors: no such file"):
        load(name="nothing.safetensors")
    with pytest.raises(ValueError, match=r"\(12, 15\) do not fit features of width 16"):
        load({"centers": torch.zeros(K, 15)}, metadata={"layer": "1"})
    with pytest.raises(ValueError, match="do not fit"):
        load({"centers": torch.zeros(C)}, metadata={"layer": "1"})
    with pytest.raises(ValueError, match="no tensor `centers`.*means"):
        load({"means": torch.zeros(K, C)}, metadata={"layer": "1"})
    with pytest.raises(ValueError, match="which layer.*--layer"):
        load({"centers": torch.zeros(K, C)})
    for layer in (0, 4, -1):
        with pytest.raises(ValueError, match=f"layer {layer}: this HuBERT has layers 1 to 3"):
            load(layer=layer)
        with pytest.raises(ValueError, match=f"layer {layer}: this HuBERT has layers 1 to 3"):
            load({"centers": torch.zeros(K, C)}, metadata={"layer": str(layer)})
    with pytest.raises(ValueError, match="kmeans.txt"):
        (tmp_path / "kmeans.txt").write_text("1 2 3")
        load(name="kmeans.txt")
    with pytest.raises(ValueError, match="damaged"):
        (tmp_path / "short.safetensors").write_bytes((folder / "kmeans.safetensors").read_bytes()[:-3])
        load(name="short.safetensors")


def test_a_folder_that_holds_no_hubert_is_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="--tokenizer="):
        load_unit_encoder(tmp_path / "nothing")
    write_folder(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(ValueError, match="safetensors file: .*config.json"):  # weights without their config
        load_unit_encoder(tmp_path / "bare" / "model.safetensors", kmeans=folders["50hz"] / "kmeans.safetensors")
    write_folder(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_unit_encoder(tmp_path / "a")
    write_folder(tmp_path / "b")
    (tmp_path / "b" / "kmeans.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no k-means centres"):
        load_unit_encoder(tmp_path / "b")
    write_folder(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load_unit_encoder(tmp_path / "c")


@pytest.mark.parametrize("change, words", [
    ({"model_type": "wav2vec2"}, "'wav2vec2', expected 'hubert'"), ({"do_stable_layer_norm": True}, "do_stable_layer_norm"),
    ({"feat_extract_norm": "layer"}, "feat_extract_norm"), ({"conv_bias": True}, "conv_bias"),
    ({"hidden_act": "relu"}, "hidden_act"),
    ({"conv_dim": None}, "conv_dim"), ({"num_hidden_layers": None}, "num_hidden_layers"), ({"num_hidden_layers": 4}, "missing"),
    ({"num_hidden_layers": 2}, "unexpected"), ({"conv_pos_batch_norm": True}, "missing"), ({"intermediate_size": 25}, "shape")])
def test_a_config_that_the_code_would_misread_is_refused(change, words, tmp_path):
    write_folder(tmp_path)
    settings = {**files.read_json(tmp_path / "config.json"), **change}
    files.write_json(tmp_path / "config.json", {key: value for key, value in settings.items() if value is not None})
    with pytest.raises(ValueError, match=words):
        load_unit_encoder(tmp_path)


@pytest.mark.parametrize("part", ["original0", "original1"])
def test_half_a_weight_norm_is_an_error_that_names_the_convolution(part, tmp_path):
    write_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"encoder.pos_conv_embed.conv.parametrizations.weight.{part}"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="pos_conv_embed.conv"):
        load_hubert(tmp_path)


# ---------------------------------------------------------------------------------------------- the command

def write_recordings(folder):
    """Good and bad files; returns their paths."""
    (folder / "sub" / "deep").mkdir(parents=True)
    good = {"a.wav": 16_000, "sub/b.flac": 8000, "sub/deep/c.wav": 44_100, "D.WAV": 22_050, "e.ogg": 16_000}
    for i, (name, rate) in enumerate(good.items()):
        samples = noise(rate // 2, seed=i).clamp(-1, 1).numpy()
        soundfile.write(folder / name, np.stack([samples, 0.5 * samples], axis=1) if name == "a.wav" else samples, rate)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is not audio")
    soundfile.write(folder / "silent.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "short.wav", np.zeros(100), 16_000)
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    (folder / "readme.txt").write_text("not taken for a recording")
    return sorted(str(folder / name) for name in good)


BAD = {"empty.wav": "as audio", "text.wav": "as audio", "silent.wav": "no samples", "short.wav": "shorter than one frame",
       "nan.wav": "NaN"}


def documents(folder):
    shards = UnitShards(folder)
    found = {name: tuple(part.tolist() for part in shards.document(i)) for i, name in enumerate(shards.names)}
    assert len(found) == len(shards)  # no recording twice
    return found


def failures(folder):
    with open(folder / "failures.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "reason"]
    return {Path(name).name: reason for name, reason in rows[1:]}


def test_the_command_writes_good_recordings_to_shards_and_lists_bad_ones(folders, tmp_path, capsys):
    good = write_recordings(tmp_path / "audio")
    out, encoder = tmp_path / "units", load_unit_encoder(folders["50hz"])
    hubert_units.main([str(tmp_path / "audio"), f"--tokenizer={folders['50hz']}", f"--out={out}", "--device=cpu"])
    assert "5 files" in capsys.readouterr().out
    found = documents(out)
    assert sorted(found) == good
    for name, (units, runs) in found.items():
        expected = deduplicate(encoder.encode(read_wav(name)))
        assert (units, runs) == tuple(part.tolist() for part in expected) and sum(runs) == 24  # half a second
    listed = failures(out)
    assert listed.keys() == BAD.keys()
    for name, words in BAD.items():
        assert words in listed[name]
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["files"], meta["failures"], meta["units"]) == (5, 5, sum(len(units) for units, _ in found.values()))
    assert meta["hours"] == pytest.approx(5 * 0.5 / 3600, rel=1e-3) and meta["recipe"] == {**encoder.recipe, "dedup": True}
    assert not [path for path in out.iterdir() if path.suffix == ".tmp"]


def test_without_deduplication_every_frame_is_a_unit(folders, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    hubert_units.main([str(tmp_path / "a.wav"), f"--tokenizer={folders['25hz']}", f"--out={tmp_path / 'units'}", "--dedup=false",
                       "--layer=1", "--device=cpu"])
    units, runs = documents(tmp_path / "units")[str(tmp_path / "a.wav")]
    assert len(units) == 24 and runs == [1] * 24
    recipe = UnitShards(tmp_path / "units").recipe
    assert (recipe["dedup"], recipe["layer"]) == (False, 1)


def test_folders_are_read_whole_and_what_is_passed_over_is_counted(tmp_path, monkeypatch, capsys):
    real = tmp_path / "set"
    taken = ["a.wav", "b.WAV", "deep/c.oga", "deep/d.Opus", "deep/er/e.aifc", "f.wave", "g.mp2", "h.snd", "i.caf", "j.rf64",
             "x.wav/k.sph"]
    other = ["notes.txt", "deep/more.TXT", "l.m4a", "deep/m.m4a", "n.raw", "README", "._a.wav", ".hidden/o.wav", "__MACOSX/p.wav"]
    for name in [*taken, *other, "../elsewhere/q.flac", "../elsewhere/r/s.flac", "../t.flac"]:
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        (real / name).touch()
    for link, target in {"deep/loop": real, "aa": real / "deep", "out": tmp_path / "elsewhere", "again": tmp_path / "elsewhere",
                         "t.flac": tmp_path / "t.flac", "gone.flac": tmp_path / "nowhere",
                         "self.flac": "self.flac", "self": "self"}.items():
        (real / link).symlink_to(target)
    os.mkfifo(real / "pipe.wav")  # would wait for ever
    expected = sorted([*taken, "again/q.flac", "again/r/s.flac", "t.flac", "gone.flac", "self.flac"])
    assert find_audio([real]) == sorted(real / name for name in expected)
    assert capsys.readouterr().err == ("passed over: 2 .m4a, 1 .raw, 2 .txt, 2 without an ending; libsndfile does not read .m4a, "
                                       "convert each: ffmpeg -i a.m4a a.wav\n")
    find_audio([real], quiet=True)
    assert not capsys.readouterr().err
    assert find_audio([real, real / "deep", tmp_path / "elsewhere", f"{real}/"]) == sorted(real / name for name in expected)
    monkeypatch.chdir(real)
    for here in ("./", "../set/.", f"../{real.name}"):
        assert sorted(os.path.relpath(file) for file in find_audio([here])) == expected
    assert sorted(map(str, find_audio(["."]))) == expected
    assert find_audio(["a.wav", "deep/../a.wav", real / "a.wav"]) == [Path("a.wav")]
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: open(path / "no/permission") if Path(path).name == "deep" else scan(path))
    assert sorted(map(str, find_audio(["."]))) == [name for name in expected if not name.startswith("deep")]
    assert "passed over: the folder deep, which cannot be read (" in capsys.readouterr().err
    (tmp_path / "film").mkdir()
    (tmp_path / "film/a.mp4").touch()
    with pytest.raises(ValueError, match=r"no audio found in .*film \(passed over: 1 .mp4; .* ffmpeg -i a.mp4 a.wav\)"):
        find_audio([tmp_path / "film"])


def test_nothing_to_encode_is_an_error_that_says_why(folders, tmp_path):
    options = [f"--tokenizer={folders['50hz']}", f"--out={tmp_path / 'units'}", "--device=cpu"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hubert_units.main([str(tmp_path / "nowhere"), *options])
    with pytest.raises(ValueError, match="no audio found"):
        hubert_units.main([str(tmp_path), *options])
    with pytest.raises(ValueError, match="no audio found"):
        hubert_units.main(options)
    (tmp_path / "bad.wav").write_text("this is not audio")
    with pytest.raises(ValueError, match="none of the 1 files.*failures.csv"):
        hubert_units.main([str(tmp_path), *options])
    assert failures(tmp_path / "units").keys() == {"bad.wav"}


@pytest.mark.slow
def test_two_processes_write_the_same_documents_as_one(folders, tmp_path):
    good = write_recordings(tmp_path / "audio")
    arguments = [str(tmp_path / "audio"), f"--tokenizer={folders['50hz']}", "--device=cpu"]
    hubert_units.main([*arguments, f"--out={tmp_path / 'one'}"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "hubert_units.py"]
    result = subprocess.run([*launcher, *arguments, f"--out={tmp_path / 'two'}"], cwd=ROOT, capture_output=True, text=True,
                            timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("5 files") == 1  # one process prints
    expected = documents(tmp_path / "one")
    assert sorted(expected) == good and documents(tmp_path / "two") == expected
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    assert failures(tmp_path / "two") == failures(tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "meta.json").read_text()) for name in ("one", "two"))
    assert two == {**one, "hours": pytest.approx(one["hours"])}


def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*"))}


def test_a_second_call_adds_what_is_new_and_another_recipe_is_refused(folders, tmp_path, capsys):
    """The shards of the second call are those of a clean run over the new files, one number on; the first ones are untouched."""
    for i, name in enumerate(("a/1", "a/2", "b/1", "b/3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / f"{name}.wav", noise(9000 + 700 * i, seed=i).clamp(-1, 1).numpy(), 16_000)
    (tmp_path / "a/2.wav").rename(tmp_path / "2.wav")
    (tmp_path / "a/2.wav").write_text("not yet audio")
    a, b, out, alone = (str(tmp_path / name) for name in ("a", "b", "u", "alone"))
    options = [f"--tokenizer={folders['25hz']}", "--device=cpu"]
    hubert_units.main([a, f"--out={out}", *options])
    first = shards_of(tmp_path / "u")
    assert failures(tmp_path / "u").keys() == {"2.wav"} and len(first) == 4
    (tmp_path / "2.wav").rename(tmp_path / "a/2.wav")  # a file that failed is tried again
    hubert_units.main([a, b, f"--out={out}", *options])
    hubert_units.main([f"{a}/2.wav", b, f"--out={alone}", *options])
    assert "4 files" in (said := capsys.readouterr().out) and "3 of the files are new" in said
    both = shards_of(tmp_path / "u")
    assert {name: both[name] for name in first} == first
    assert {name.replace("1", "0", 1): both[name] for name in both.keys() - first.keys()} == shards_of(tmp_path / "alone")
    assert UnitShards(out).names == [f"{a}/1.wav", f"{a}/2.wav", f"{b}/1.wav", f"{b}/3.wav"] and not failures(tmp_path / "u")
    hubert_units.main([b, a, f"--out={out}", *options])
    assert "4 files" in (said := capsys.readouterr().out) and "none of the files are new" in said
    assert shards_of(tmp_path / "u") == both
    with pytest.raises(ValueError, match="u holds units of another recipe .layer is 2, now 1.*another --out.*--overwrite"):
        hubert_units.main([b, f"--out={out}", "--layer=1", *options])
    assert shards_of(tmp_path / "u") == both
    hubert_units.main([b, f"--out={out}", "--layer=1", "--overwrite", *options])
    assert UnitShards(out).names == [f"{b}/1.wav", f"{b}/3.wav"] and UnitShards(out).recipe["layer"] == 1


@pytest.mark.slow
def test_two_processes_add_what_is_new(folders, tmp_path):
    arguments = [str(tmp_path / "audio"), f"--tokenizer={folders['25hz']}", "--device=cpu"]
    (tmp_path / "audio").mkdir()
    for part in ("ab", "xyz"):
        for i, name in enumerate(part):
            soundfile.write(tmp_path / f"audio/{name}.wav", noise(9000 + 900 * i).clamp(-1, 1).numpy(), 16_000)
        hubert_units.main([*arguments, f"--out={tmp_path}/one"])
        result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                                 "hubert_units.py", *arguments, f"--out={tmp_path}/two"], cwd=ROOT, capture_output=True,
                                text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    assert "5 files" in result.stdout and result.stdout.count("3 of the files are new") == 1
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two") and "00001.units.bin" in shards_of(tmp_path / "one")


def test_recordings_of_one_name_in_two_working_folders_are_both_taken(folders, tmp_path, monkeypatch):
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "1.wav", noise(9000, seed=i).clamp(-1, 1).numpy(), 16_000)
    (tmp_path / "disk/deep/u").mkdir(parents=True)
    (tmp_path / "u").symlink_to(tmp_path / "disk/deep/u")
    for folder, path, out in (("a", ".", "u"), ("b", ".", "u"), ("", "a", "u"), ("b", tmp_path / "a/1.wav", "disk/deep/u"),
                              ("b", "1.wav", "disk/deep/u"), ("a", "../a/1.wav", "u")):
        monkeypatch.chdir(tmp_path / folder)
        hubert_units.main([str(path), f"--out={tmp_path / out}", f"--tokenizer={folders['25hz']}", "--device=cpu"])
    assert UnitShards(tmp_path / "u").names == ["1.wav", str(tmp_path / "b/1.wav")]


@pytest.mark.slow
def test_two_extractions_into_one_folder_are_refused(folders, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(9000).clamp(-1, 1).numpy(), 16_000)
    arguments = [f"{tmp_path}/a.wav", f"--out={tmp_path}/u", f"--tokenizer={folders['25hz']}", "--device=cpu"]
    code = "import sys; from checkpoints import files\nwith files.locked(sys.argv[1], 'units'): print(input('held\\n'))"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "u"], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="u: another process is at work on the units there"):
        hubert_units.main(arguments)
    other.kill()
    other.communicate()
    hubert_units.main(arguments)
    assert len(UnitShards(tmp_path / "u")) == 1


def test_k_means_is_fitted_to_the_features_of_many_recordings_and_used_from_its_file(folders, tmp_path, capsys):
    cluster = pytest.importorskip("sklearn.cluster")
    write_recordings(tmp_path / "audio")
    soundfile.write(tmp_path / "audio/long.wav", noise(160_000).clamp(-1, 1).numpy(), 16_000)
    options = [f"--tokenizer={folders['25hz']}", "--layer=3", "--device=cpu"]
    hubert_units.main([str(tmp_path / "audio"), "--fit=6", "--seed=1", f"--out={tmp_path / 'km.safetensors'}", *options])
    printed = capsys.readouterr().out
    assert "6 centres of" in printed and printed.count("left out") == len(BAD) and "layer 3, 25 Hz" in printed
    with pytest.raises(ValueError, match="km.safetensors is there already; give another --out, or --overwrite"):
        hubert_units.main([str(tmp_path / "audio"), "--fit=6", f"--out={tmp_path / 'km.safetensors'}", *options])
    encoder = load_unit_encoder(folders["25hz"], kmeans=tmp_path / "km.safetensors")
    assert (encoder.layer, encoder.num_units, encoder.frame_rate) == (3, 6, 25.0)
    good = [path for path in find_audio([tmp_path / "audio"]) if path.name not in BAD]
    frames = torch.cat([encoder.features(read_wav(path)) for path in good])
    inertia = torch.cdist(frames, encoder.centers).square().min(1).values.mean().item()
    expected = cluster.KMeans(6, n_init=5, random_state=0).fit(frames.numpy()).inertia_ / len(frames)
    assert inertia < 1.08 * expected and f"{inertia:.2f}"[:3] in printed
    hubert_units.main([str(tmp_path / "audio"), f"--kmeans={tmp_path / 'km.safetensors'}", "--k=6", "--no-dedup",
                       f"--out={tmp_path / 'units'}", options[0], "--device=cpu"])
    assert UnitShards(tmp_path / "units").recipe["num_units"] == 6
    with pytest.raises(ValueError, match="has 6 centres, not 7"):
        load_unit_encoder(folders["25hz"], kmeans=tmp_path / "km.safetensors", k=7)
    hubert_units.main([str(tmp_path / "audio"), "--fit=4", f"--out={tmp_path / 'slow'}", "--frame-rate=12.5", *options])
    assert load_unit_encoder(folders["25hz"], kmeans=tmp_path / "slow/kmeans.safetensors").frame_rate == 12.5
    with pytest.raises(ValueError, match="cannot be divided into 100000"):
        hubert_units.main([str(tmp_path / "audio"), "--fit=100000", f"--out={tmp_path / 'many'}", *options])


def test_inspect_prints_what_is_in_a_folder(folders, tmp_path, capsys):
    write_recordings(tmp_path / "audio")
    hubert_units.main([str(tmp_path / "audio"), f"--tokenizer={folders['25hz']}", f"--out={tmp_path / 'units'}", "--device=cpu"])
    capsys.readouterr()
    hubert_units.main([f"--inspect={tmp_path / 'units'}"])
    printed = capsys.readouterr().out
    for words in ("bits", "per second", "median", "D.WAV"):
        assert words in printed


def test_a_finished_folder_is_not_encoded_again(folders, tmp_path, capsys, monkeypatch):
    write_recordings(tmp_path / "audio")
    arguments = [str(tmp_path / "audio"), f"--tokenizer={folders['25hz']}", f"--out={tmp_path / 'units'}", "--device=cpu"]
    hubert_units.main(arguments)
    first = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(UnitEncoder, "begin", lambda *_: pytest.fail("encoded again"))
    hubert_units.main(arguments)
    assert capsys.readouterr().out.split(";")[0] == first.split(";")[0]


def test_a_long_recording_is_read_block_by_block(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("speech.encoder.CHUNKINGS", {"overlap": (2, 1)})
    monkeypatch.setattr("corpus.extract.HELD_SECONDS", 20)
    soundfile.write(tmp_path / "long.flac", noise(30 * 16_000).clamp(-1, 1).numpy(), 16_000)
    monkeypatch.setattr("speech.audio.read_wav", lambda path: pytest.fail("held whole"))
    arguments = [f"--tokenizer={folders['25hz']}", f"--out={tmp_path / 'units'}", "--device=cpu"]
    hubert_units.main([str(tmp_path / "long.flac"), *arguments])
    monkeypatch.undo()
    monkeypatch.setattr("speech.encoder.CHUNKINGS", {"overlap": (2, 1)})
    expected = deduplicate(load_unit_encoder(folders["25hz"]).encode(read_wav(tmp_path / "long.flac")))
    assert documents(tmp_path / "units")[str(tmp_path / "long.flac")] == tuple(part.tolist() for part in expected)
    assert json.loads((tmp_path / "units" / "meta.json").read_text())["hours"] == pytest.approx(30 / 3600)


def test_the_way_of_one_recording_ends_at_the_units_of_the_command(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("speech.encoder.CHUNKINGS", {"overlap": (2, 1)})  # the last recording goes in pieces
    for name, length in (("a", 9000), ("b", 31_000), ("c", 6 * SECOND)):
        soundfile.write(tmp_path / f"{name}.wav", noise(length).clamp(-1, 1).numpy(), 16_000)
    hubert_units.main([str(tmp_path), f"--tokenizer={folders['25hz']}", f"--out={tmp_path / 'units'}", "--device=cpu"])
    encoder = load_unit_encoder(folders["25hz"])
    found = documents(tmp_path / "units")
    with packed(encoder):  # as the command does
        for path, expected in found.items():
            assert tuple(part.tolist() for part in speech_to_units(path, encoder)) == expected
    assert len(found) == 3
    units, runs = speech_to_units(tmp_path / "b.wav", encoder, seconds=1.0)
    whole = deduplicate(encoder.encode(read_wav(tmp_path / "b.wav")[:SECOND]))
    assert torch.equal(units, whole[0]) and torch.equal(runs, whole[1])
    with pytest.raises(ValueError, match="a.wav: 160 samples are shorter than one frame"):
        speech_to_units(tmp_path / "a.wav", encoder, seconds=0.01)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_recording(tmp_path):
    peaks, code = [], "import sys; from bench.units import peak_of_encoding; print(peak_of_encoding(*sys.argv[1:]))"
    for minutes in (2, 20):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", 16_000, 1) as file:
            for _ in range(minutes):
                file.write(0.1 * noise(60 * SECOND).clamp(-1, 1).numpy())
        command = [sys.executable, "-c", code, str(path), str(tmp_path / f"units{minutes}")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        peaks.append(int(result.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 80e6  # bytes


@pytest.mark.slow
def test_kills_and_broken_files_change_no_byte_of_the_shards(tmp_path):
    result = subprocess.run([sys.executable, "scripts/soak_units.py", "--files=60", "--broken=6", "--kills=2",
                             f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'soak.json'}"], cwd=ROOT, capture_output=True,
                            text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["shards_are_byte_identical"] and found["failures_are_the_broken_files"] and found["documents"] == 54
