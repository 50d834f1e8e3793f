"""vocoder.py: the length is the sum of the runs, published files load in every spelling, what would be misread is refused."""
import dataclasses
import json
import math

import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

import vocoder
from checkpoints import files
from checkpoints.pretrained import fold_weight_norm
from corpus.shards import write_shards
from speech.audio import SAMPLE_RATE
from vocoder import DurationConfig, Vocoder, VocoderConfig, load_vocoder, parse_config

K, HOP = 20, 40
CONFIG = VocoderConfig(upsample_rates=(5, 4, 2), upsample_kernel_sizes=(11, 8, 4), upsample_initial_channel=16,
                       resblock_kernel_sizes=(3, 5), resblock_dilation_sizes=((1, 3), (1, 2)), num_embeddings=K, embedding_dim=8,
                       model_in_dim=8, code_hop_size=HOP, dur_predictor_params=DurationConfig(8, 6, 3, 0.5))
UNITS = torch.tensor([3, 1, 19, 0, 7, 7, 4])
RECIPE = {"kind": "hubert", "num_units": K, "layer": 2, "centers": "abc", "frame_rate": 400.0}


def table(**changes):
    """config.json as published; a change to None removes the key."""
    settings = {**dataclasses.asdict(CONFIG), "batch_size": 16, "learning_rate": 0.0002, "f0": False, "multispkr": None}
    settings |= changes
    return {key: value for key, value in settings.items() if value is not None}


def perturbed(network):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            length = name.endswith("original0")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.5 * noise.abs() if length else (parameter.ndim == 1) * 0.3 + 0.3 * noise)
        network.dict.weight.mul_(3)
    return network.eval()


def network(config=CONFIG, predictor_bias=1.0):
    """A random vocoder whose predicted durations vary."""
    net = perturbed(Vocoder(config))
    if net.dur_predictor is not None:
        net.dur_predictor.proj.weight.data.mul_(2)
        net.dur_predictor.proj.bias.data.fill_(predictor_bias)
    return net


def write_folder(folder, tensors=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(table(**changes)))
    files.write_tensors(folder / "model.safetensors", network().state_dict() if tensors is None else tensors)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("vocoder") / "tiny")


# ---------------------------------------------------------------------------------------------- speaking

@pytest.mark.parametrize("runs", [[1] * 7, [1, 2, 3, 4, 5, 6, 7], [30, 1, 1, 1, 1, 1, 2]])
def test_the_length_is_the_sum_of_the_runs_times_the_hop(folder, runs):
    voc = load_vocoder(folder)
    wav = voc(UNITS, runs)
    assert wav.shape == (sum(runs) * HOP,) and wav.dtype == torch.float32
    assert wav.abs().max() <= 1 and wav.std() > 0.05
    frames = torch.repeat_interleave(UNITS, torch.tensor(runs))
    assert torch.equal(wav, voc.decode(frames[None])[0])
    assert not torch.equal(wav, voc(UNITS.flip(0), runs))  # the units are heard


def test_predicted_durations_are_spoken_unless_runs_are_given(folder):
    voc = load_vocoder(folder)
    runs = voc.durations(UNITS)
    assert runs.dtype == torch.int64 and len(runs) == 7 and runs.min() >= 1 and len(runs.unique()) > 2
    assert torch.equal(voc(UNITS), voc(UNITS, runs)) and len(voc(UNITS)) == int(runs.sum()) * HOP
    assert torch.equal(voc(UNITS.tolist()), voc(UNITS.numpy())) and torch.equal(voc(UNITS), voc(UNITS.tolist()))


def test_durations_are_the_published_arithmetic(folder):
    voc = load_vocoder(folder)
    x, predictor = voc.dict.weight[UNITS].T.double(), voc.dur_predictor.double()
    for conv, norm in ((predictor.conv1[0], predictor.ln1), (predictor.conv2[0], predictor.ln2)):
        padded = F.pad(x, (1, 1))
        x = torch.stack([torch.einsum("ock,ck->o", conv.weight, padded[:, t:t + 3]) for t in range(len(UNITS))], dim=1)
        x = (x + conv.bias[:, None]).clamp(min=0)
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * norm.weight[:, None] + norm.bias[:, None]
    expected = (predictor.proj.weight[0] @ x + predictor.proj.bias).exp() - 1
    assert ((expected - expected.floor() - 0.5).abs() > 1e-3).all()  # no value so near a half that rounding is a toss-up
    assert load_vocoder(folder).durations(UNITS).tolist() == [max(1, round(value)) for value in expected.tolist()]


def saying(bias):
    """A vocoder whose predictor says this logarithm, whatever the unit."""
    net = network(predictor_bias=float(bias))
    net.dur_predictor.proj.weight.data.zero_()
    return net


@pytest.mark.parametrize("frames, spoken", [(-0.9, 1), (0.0, 1), (0.4, 1), (1.4, 1), (1.6, 2), (2.4, 2), (31.0, 31)])
def test_durations_are_rounded_and_at_least_one(frames, spoken):
    assert saying(math.log(1 + frames)).durations(UNITS).tolist() == [spoken] * 7


def test_durations_half_way_are_rounded_to_the_even_number():
    met = []
    for half in (n + 0.5 for n in range(48)):
        near = torch.tensor(math.log(1 + half))
        for step in range(-3, 4):  # a logarithm whose exponential is that half to the bit; not every half has one
            bias = near + step * (near - near.nextafter(torch.tensor(0.0)))
            if torch.exp(bias.expand(7))[0].item() - 1 == half:
                met.append(half)
                assert saying(bias).durations(UNITS).tolist() == [max(1, round(half))] * 7, half
                break
    for parity in (0, 1):  # up and down
        assert sum(half // 1 % 2 == parity for half in met) >= 4


def test_without_a_predictor_every_unit_is_one_frame(tmp_path):
    config = dataclasses.replace(CONFIG, dur_predictor_params=None)
    voc = load_vocoder(write_folder(tmp_path, network(config).state_dict(), dur_predictor_params=None))
    assert len(voc(UNITS)) == 7 * HOP and torch.equal(voc(UNITS), voc(UNITS, [1] * 7))


def test_no_units_are_silence_of_no_length(folder):
    voc = load_vocoder(folder)
    for empty in ([], torch.zeros(0), torch.zeros(0, dtype=torch.int64)):
        assert voc(empty).shape == (0,)


@pytest.mark.parametrize("units, runs, words", [
    ([0, 20], None, "0 to 19"), ([0, -1], None, "0 to 19"), ([1, 2], [1], "1 runs"), ([1, 2], [1, 2, 3], "3 runs"),
    ([1, 2], [1, 0], "shortest 0"), ([1, 2], [], "0 runs"), ([1.5, 2.0], None, "integers"), ([[1, 2]], None, r"\(1, 2\)"),
    ([1, 2], [1.5, 2.0], "runs: expected"), (None, None, "integers")])
def test_what_cannot_be_spoken_is_refused(folder, units, runs, words):
    with pytest.raises(ValueError, match=words):
        load_vocoder(folder)(units, runs)


# ---------------------------------------------------------------------------------------------- weight norm

def normed():
    """The network as published models are trained: weight norm on every convolution of the generator."""
    net = Vocoder(CONFIG)
    for name, module in list(net.named_modules()):
        if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)) and not name.startswith("dur_predictor"):
            weight_norm(module)  # dim 0: output channels, and INPUT channels of a transposed convolution
    return perturbed(net)


def new_names(net):
    tensors = net.state_dict()
    assert tensors["ups.0.parametrizations.weight.original0"].shape == (16, 1, 1)  # its input channels; it puts out 8
    return tensors


def old_names(net):
    new = "parametrizations.weight.original"
    return {name.replace(f"{new}0", "weight_g").replace(f"{new}1", "weight_v"): tensor for name, tensor in new_names(net).items()}


def folded_names(net):
    tensors = {name: tensor for name, tensor in net.state_dict().items() if "original" not in name}
    modules = dict(net.named_modules())
    stems = {name.split(".parametrizations")[0] for name in net.state_dict() if "original" in name}
    return {**tensors, **{f"{stem}.weight": modules[stem].weight.detach().clone() for stem in stems}}


@pytest.mark.parametrize("spelling", [new_names, old_names, folded_names])
def test_weight_norm_in_every_spelling_gives_what_torch_computes(spelling, tmp_path):
    net = normed()
    tensors = spelling(net)
    voc = load_vocoder(write_folder(tmp_path, {name: tensor.detach() for name, tensor in tensors.items()}))
    assert not any("original" in name or "weight_" in name for name in voc.state_dict())
    runs = net.durations(UNITS)
    frames = torch.repeat_interleave(UNITS, runs)[None]
    with torch.no_grad():
        expected = net.decode(frames)[0]
    assert expected.std() > 0.05
    torch.testing.assert_close(voc(UNITS, runs), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(voc.durations(UNITS), runs)
    for name, tensor in folded_names(net).items():
        torch.testing.assert_close(voc.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def weight(tensors, name):
    """A weight in float64, whatever its spelling: as it is, or g v / |v| over all but the first dimension."""
    for g, v in (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")):
        if f"{name}.{g}" in tensors:
            v = tensors[f"{name}.{v}"].double()
            return tensors[f"{name}.{g}"].double() * v / v.flatten(1).square().sum(1).sqrt()[:, None, None]
    return tensors[f"{name}.weight"].double()


def convolved(x, w, b, dilation):
    """(channels, S) through a convolution that keeps the length, tap by tap."""
    taps = w.shape[2]
    padded = F.pad(x, ((taps - 1) * dilation // 2,) * 2)
    return b[:, None] + sum(w[:, :, k] @ padded[:, k * dilation:k * dilation + x.shape[1]] for k in range(taps))


def stretched(x, w, b, rate):
    """(channels, S) through a transposed convolution: every sample is spread over `taps` places, `rate` apart."""
    taps, (_, S) = w.shape[2], x.shape
    out = torch.zeros(w.shape[1], (S - 1) * rate + taps, dtype=torch.float64)
    for k in range(taps):
        out[:, k:k + (S - 1) * rate + 1:rate] += w[:, :, k].T @ x
    cut = (taps - rate) // 2
    return b[:, None] + out[:, cut:out.shape[1] - cut]


@pytest.mark.parametrize("spelling", [new_names, old_names, folded_names])
def test_the_generator_equals_an_independent_evaluation_in_float64(spelling, tmp_path):
    tensors = {name: tensor.detach() for name, tensor in spelling(normed()).items()}
    voc = load_vocoder(write_folder(tmp_path, tensors))

    def conv(x, name, dilation=1):
        return convolved(x, weight(tensors, name), tensors[f"{name}.bias"].double(), dilation)

    def leaky(x, slope):
        return torch.where(x > 0, x, slope * x)

    x = conv(tensors["dict.weight"].double()[UNITS.repeat_interleave(2)].T, "conv_pre")
    for stage, rate in enumerate((5, 4, 2)):
        x = stretched(leaky(x, 0.1), weight(tensors, f"ups.{stage}"), tensors[f"ups.{stage}.bias"].double(), rate)
        total = 0
        for kind, dilations in enumerate(((1, 3), (1, 2))):
            y, block = x, f"resblocks.{2 * stage + kind}"
            for i, dilation in enumerate(dilations):
                inner = conv(leaky(y, 0.1), f"{block}.convs1.{i}", dilation)
                y = y + conv(leaky(inner, 0.1), f"{block}.convs2.{i}")
            total = total + y
        x = total / 2
    expected = conv(leaky(x, 0.01), "conv_post").tanh()[0]
    assert expected.shape == (14 * HOP,) and expected.std() > 0.05
    torch.testing.assert_close(voc(UNITS, [2] * 7).double(), expected, rtol=1e-4, atol=1e-5)


def test_folding_leaves_its_argument_and_other_tensors_as_they_were():
    tensors = {"a.weight_g": torch.full((2, 1, 1), 2.0), "a.weight_v": torch.tensor([3.0, 4.0]).view(1, 2, 1).repeat(2, 1, 1),
               "a.bias": torch.ones(2), "weight_graph": torch.ones(1)}
    folded = fold_weight_norm(tensors)
    assert folded.keys() == {"a.weight", "a.bias", "weight_graph"} and len(tensors) == 4
    torch.testing.assert_close(folded["a.weight"], torch.tensor([1.2, 1.6]).view(1, 2, 1).repeat(2, 1, 1))
    with pytest.raises(ValueError, match="a.weight_v but no a.weight_g"):
        fold_weight_norm({"a.weight_v": torch.ones(2, 1, 1)})


# ---------------------------------------------------------------------------------------------- published files

@pytest.mark.parametrize("weights, settings", [("g_00400000", "config.json"), ("hifigan.pt", "config.json"),
                                               ("hifigan_lj.pt", "hifigan_lj_config.json")])
def test_a_published_file_with_the_generator_key_loads(weights, settings, tmp_path):
    net = normed()
    torch.save({"generator": old_names(net)}, tmp_path / weights)
    (tmp_path / settings).write_text(json.dumps(table()))
    if settings != "config.json":
        (tmp_path / "config.json").write_text("{}")  # another model's: the file's own config goes first
    with torch.no_grad():
        expected = net.decode(torch.repeat_interleave(UNITS, net.durations(UNITS))[None])[0]
    voc = load_vocoder(tmp_path / weights)
    torch.testing.assert_close(voc(UNITS), expected, rtol=1e-4, atol=1e-5)
    assert voc.recipe is None and not voc.training and not any(parameter.requires_grad for parameter in voc.parameters())


@pytest.mark.parametrize("names, taken", [
    (["model.pt"], "model.pt"), (["g_00500000"], "g_00500000"), (["g_00400000", "g_00500000", "do_00500000"], "g_00500000"),
    (["g_9", "g_10"], "g_10"), (["hifigan_generator.pt"], "hifigan_generator.pt")])
def test_a_folder_of_a_trainers_files_opens(names, taken, tmp_path, capsys):
    for name in names:  # the others are damaged
        (tmp_path / name).write_bytes(b"\x80" if name != taken else b"")
    torch.save({"generator": {f"module.{key}": tensor for key, tensor in network().state_dict().items()}}, tmp_path / taken)
    (tmp_path / ("hifigan_config.json" if "hifigan" in taken else "config.json")).write_text(json.dumps(table()))
    assert torch.equal(load_vocoder(tmp_path)(UNITS), network()(UNITS))
    said = capsys.readouterr().err
    assert f"its generator is {taken}" in said and "module.dict.weight is taken as dict.weight" in said


def test_a_folder_of_several_generators_asks_for_one(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save({"generator": network().state_dict()}, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(table()))
    with pytest.raises(ValueError, match="holds a.pt, b.pt: name the one"):
        load_vocoder(tmp_path)
    assert len(load_vocoder(tmp_path / "b.pt")(UNITS))


def test_half_precision_storage_is_widened(tmp_path):
    halves = {name: tensor.half() for name, tensor in network().state_dict().items()}
    voc = load_vocoder(write_folder(tmp_path, halves, tokenizer=RECIPE))
    assert voc.recipe == RECIPE
    for name, tensor in voc.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, halves[name].float())


def test_the_config_may_leave_out_what_follows_from_the_rest():
    settings = table(code_hop_size=None, resblock=1)
    assert parse_config(settings) == CONFIG
    assert parse_config(json.loads(json.dumps(settings))) == CONFIG  # lists for tuples


@pytest.mark.parametrize("change, words", [
    ({"f0": True}, "asks for f0"), ({"multispkr": "from_input_file"}, "model_in_dim 8 is not .* speakers \\(200\\)"),
    ({"multistyle": "from_input_file", "num_styles": 7, "model_in_dim": 24}, "model_in_dim 24 is not .* styles \\(7\\)"),
    ({"f0_quant_num_bin": 32}, "f0_quant_num_bin"), ({"embedder_params": {"a": 1}}, "embedder_params"),
    ({"upsample_rates": [5, 4, 4]}, "multiply to 80, not code_hop_size 40"), ({"code_hop_size": 320}, "multiply to 40"),
    ({"upsample_kernel_sizes": [11, 8]}, "expected one for each"), ({"upsample_kernel_sizes": [10, 8, 4]}, "even number"),
    ({"upsample_kernel_sizes": [3, 8, 4]}, "even number"), ({"upsample_initial_channel": 12}, "halved 3 times"),
    ({"resblock": "2"}, 'resblock "2"'), ({"resblock_kernel_sizes": [3, 4]}, "odd numbers"),
    ({"resblock_kernel_sizes": [3]}, "resblock_dilation_sizes"), ({"sampling_rate": 22_050}, "22050"),
    ({"model_in_dim": 24}, "model_in_dim 24"),
    ({"dur_predictor_params": {**dataclasses.asdict(CONFIG.dur_predictor_params), "var_pred_kernel_size": 5}}, "kernel size 3"),
    ({"dur_predictor_params": {**dataclasses.asdict(CONFIG.dur_predictor_params), "encoder_embed_dim": 16}}, "embed_dim 8"),
    ({"dur_predictor_params": {"unknown": 1}}, "has unknown"), ({"upsample_rates": None}, "lacks upsample_rates"),
    ({"num_embeddings": None}, "lacks num_embeddings")])
def test_a_config_of_another_kind_of_vocoder_is_refused(change, words, tmp_path):
    write_folder(tmp_path, **change)
    with pytest.raises(ValueError, match=words):
        load_vocoder(tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda tensors: tensors.pop("conv_post.bias"), "lacks 1 tensors.*conv_post.bias"),
    (lambda tensors: tensors.pop("dur_predictor.proj.weight"), "lacks 1 tensors.*dur_predictor.proj.weight"),
    (lambda tensors: tensors.update({"spkr.weight": torch.ones(2)}), "spkr.weight of shape .2,., the network has no such tensor"),
    (lambda tensors: tensors.update({"dict.weight": torch.ones(21, 8)}), "dict.weight of shape .21, 8., expected")])
def test_weights_that_do_not_fit_are_named(change, words, tmp_path):
    tensors = dict(network().state_dict())
    change(tensors)
    write_folder(tmp_path, tensors)
    with pytest.raises(ValueError, match=words):
        load_vocoder(tmp_path)


def test_a_discriminator_file_or_a_missing_one_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(table()))
    torch.save({"mpd": {"a": torch.ones(1)}, "steps": 3}, tmp_path / "do_00400000")
    with pytest.raises(ValueError, match="not the tensors of a generator"):
        load_vocoder(tmp_path / "do_00400000")
    with pytest.raises(FileNotFoundError, match="--vocoder="):
        load_vocoder(tmp_path / "nothing.pt")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_vocoder(tmp_path / "do_00400000")


# ---------------------------------------------------------------------------------------------- several voices

MANY = dataclasses.replace(CONFIG, num_speakers=5, num_styles=3, model_in_dim=24, dur_predictor_params=None)


def write_voices(folder, config=MANY, names=True, stem=""):
    """A vocoder of five speakers and three styles, as published; returns its network and its weight file."""
    net = network(config)
    folder.mkdir(parents=True, exist_ok=True)
    settings = table(multispkr="from_input_file", multistyle="from_input_file" if config.num_styles else None,
                     num_speakers=config.num_speakers, num_styles=config.num_styles, model_in_dim=config.model_in_dim,
                     dur_predictor_params=None)
    (folder / f"{stem}config.json").write_text(json.dumps(settings))
    if names:
        (folder / f"{stem}speakers.txt").write_text("ann\nbob\ncat\ndan\neve\n")
        (folder / f"{stem}styles.txt").write_text("default\nwhisper\nlaughing\n")
    torch.save({"generator": net.state_dict()}, folder / f"{stem}generator.pt")
    return net, folder / f"{stem}generator.pt"


@pytest.mark.parametrize("stem", ["", "hifigan_expresso_"])
def test_a_voice_is_chosen_by_number_or_name(stem, tmp_path):
    net, file = write_voices(tmp_path, stem=stem)
    voc, frames = load_vocoder(file), UNITS.repeat_interleave(2)
    assert voc.speakers == ["ann", "bob", "cat", "dan", "eve"] and voc.styles == ["default", "whisper", "laughing"]
    weights = {name: tensor.double() for name, tensor in net.state_dict().items()}
    spoken, seen = {}, []
    for speaker, style in ((0, 0), (2, 0), (2, 1), (4, 2)):
        # units, speaker, style: side by side in every frame, in that order
        x = torch.cat([weights["dict.weight"][frames].T, weights["spkr.weight"][speaker][:, None].expand(-1, 14),
                       weights["style.weight"][style][:, None].expand(-1, 14)])
        first = F.conv1d(x[None], weights["conv_pre.weight"], weights["conv_pre.bias"], padding=3)
        hook = voc.conv_pre.register_forward_hook(lambda module, inputs, output: seen.append(output))
        spoken[speaker, style] = voc(UNITS, [2] * 7, speaker=speaker, style=style)
        hook.remove()
        torch.testing.assert_close(seen[-1].double(), first, rtol=1e-5, atol=1e-5)
        assert torch.equal(spoken[speaker, style], voc(UNITS, [2] * 7, speaker=voc.speakers[speaker], style=voc.styles[style]))
        assert torch.equal(spoken[speaker, style], voc(UNITS, [2] * 7, speaker=str(speaker), style=str(style)))
    assert torch.equal(spoken[0, 0], voc(UNITS, [2] * 7))  # the first is the default
    assert not torch.equal(spoken[0, 0], spoken[2, 0]) and not torch.equal(spoken[2, 0], spoken[2, 1])
    assert len(voc(UNITS)) == 7 * HOP  # without a predictor a unit is a frame


def test_a_voice_that_does_not_exist_is_named_with_the_nearest(folder, tmp_path):
    voc = load_vocoder(write_voices(tmp_path)[1])
    for speaker, words in ((5, "speaker 5: this vocoder has speakers 0 to 4"), ("-1", "speakers 0 to 4"),
                           ("anne", "'anne'.*did you mean 'ann'"), (True, "speaker True"), (1.5, "speaker 1.5")):
        with pytest.raises(ValueError, match=words):
            voc(UNITS, speaker=speaker)
    with pytest.raises(ValueError, match="style 'whispr'.*did you mean 'whisper'"):
        voc(UNITS, style="whispr")
    one = load_vocoder(folder)
    assert torch.equal(one(UNITS), one(UNITS, speaker=0))
    with pytest.raises(ValueError, match="speaker 2: this vocoder has no choice of speaker; leave it out"):
        one(UNITS, speaker=2)


def test_a_table_of_speakers_alone_and_without_names_opens(tmp_path):
    config = dataclasses.replace(MANY, num_styles=0, model_in_dim=16)
    net, file = write_voices(tmp_path, config, names=False)
    voc = load_vocoder(file)
    assert voc.config == config and voc.speakers == [] and voc.style is None
    assert not torch.equal(voc(UNITS, speaker=3), voc(UNITS, speaker=4))
    with pytest.raises(ValueError, match="no choice of style"):
        voc(UNITS, style=1)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["num_speakers"]  # the published config leaves it to the code: 200 rows
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="spkr.weight of shape"):
        load_vocoder(file)
    torch.save({"generator": network(dataclasses.replace(config, num_speakers=200)).state_dict()}, file)
    assert load_vocoder(file).config.num_speakers == 200


# ---------------------------------------------------------------------------------------------- the command

def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def test_the_command_writes_wavs_named_after_the_recordings(folder, tmp_path, capsys):
    rows = [{"units": [1, 2, 3], "duration": [2, 1, 4], "file_name": "speaker/one.flac"},
            {"units": [4, 5], "duration": [1, 1], "file_name": "other/one.flac"}, {"units": [6, 7, 8]}]
    file, out, voc = write_lines(tmp_path / "units.jsonl", rows), tmp_path / "wavs", load_vocoder(folder)
    vocoder.main([file, f"--vocoder={folder}", f"--out={out}"])
    assert sorted(path.name for path in out.iterdir()) == ["line_3.wav", "one.wav", "one_2.wav"]
    seconds = 0.0
    for name, row in zip(("one", "one_2", "line_3"), rows):
        samples, rate = soundfile.read(out / f"{name}.wav")
        expected = voc(row["units"])
        assert rate == SAMPLE_RATE and samples.shape == (len(expected),)
        torch.testing.assert_close(torch.from_numpy(samples).float(), expected, rtol=0, atol=1 / 32767)
        seconds += len(samples) / rate
    assert f"3 files, {seconds:.1f} s" in capsys.readouterr().out
    first = {path: path.read_bytes() for path in out.iterdir()}
    vocoder.main([file, f"--vocoder={folder}", f"--out={out}"])
    assert {path: path.read_bytes() for path in out.iterdir()} == first
    other = write_lines(tmp_path / "other.jsonl", [{"units": [9, 8], "file_name": "speaker/one.flac"}])
    vocoder.main([other, f"--vocoder={folder}", f"--out={out}"])
    assert {path: path.read_bytes() for path in out.iterdir() if path.name != "one-2.wav"} == first
    capsys.readouterr()
    two = write_lines(tmp_path / "two.jsonl", rows[:2])
    vocoder.main([two, f"--vocoder={folder}", f"--out={tmp_path / 'timed'}", "--use-durations"])
    assert len(soundfile.read(tmp_path / "timed" / "one.wav")[0]) == 7 * HOP
    assert len(soundfile.read(tmp_path / "timed" / "one_2.wav")[0]) == 2 * HOP
    with pytest.raises(ValueError, match="line_3 has no run lengths"):
        vocoder.main([file, f"--vocoder={folder}", f"--out={tmp_path / 'third'}", "--use-durations"])


def test_a_recording_that_cannot_be_written_costs_only_itself(folder, tmp_path, capsys):
    rows = [{"file_name": name, "units": [1, 2, 3]} for name in ("a.wav", "b" * 300 + ".wav", "c.wav")]
    (tmp_path / "units.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as stopped:
        vocoder.main([str(tmp_path / "units.jsonl"), f"--vocoder={folder}", f"--out={tmp_path / 'wavs'}"])
    assert stopped.value.code == 2 and sorted(path.name for path in (tmp_path / "wavs").iterdir()) == ["a.wav", "c.wav"]
    said = capsys.readouterr()
    assert "2 files" in said.out and said.err.count("error: cannot write") == 1 and "File name too long" in said.err


def test_the_command_speaks_a_shard_folder_of_its_own_tokenizer_only(tmp_path):
    folder = write_folder(tmp_path / "vocoder", tokenizer=RECIPE)
    for name, recipe in (("same", RECIPE), ("other", {**RECIPE, "centers": "xyz"})):
        write_shards(tmp_path / name, recipe, [("a/recording.wav", [1, 2, 3], [2, 2, 5], 1.0)])
    vocoder.main([str(tmp_path / "same"), f"--vocoder={folder}", f"--out={tmp_path / 'wavs'}", "--use-durations"])
    assert [path.name for path in (tmp_path / "wavs").iterdir()] == ["recording.wav"]
    assert len(soundfile.read(tmp_path / "wavs" / "recording.wav")[0]) == 9 * HOP
    with pytest.raises(ValueError, match="another tokenizer"):
        vocoder.main([str(tmp_path / "other"), f"--vocoder={folder}", f"--out={tmp_path / 'wavs'}"])


@pytest.mark.parametrize("line", ["not json", '{"duration": [1]}', "[1, 2]", '{"units": [1, 99]}', '{"units": "1 2"}'])
def test_a_line_that_cannot_be_spoken_is_an_error(line, folder, tmp_path):
    (tmp_path / "units.jsonl").write_text('{"units": [1]}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2|0 to 19|integers"):
        vocoder.main([str(tmp_path / "units.jsonl"), f"--vocoder={folder}", f"--out={tmp_path / 'wavs'}"])
    with pytest.raises(ValueError, match="no units given"):
        vocoder.main([f"--vocoder={folder}"])


def test_the_command_speaks_with_the_chosen_voice(tmp_path):
    net, file = write_voices(tmp_path / "vocoder")
    units = write_lines(tmp_path / "units.jsonl", [{"units": [1, 2, 3], "file_name": "one.wav"}])
    vocoder.main([units, f"--vocoder={file}", f"--out={tmp_path / 'wavs'}", "--speaker=cat", "--style=2"])
    samples, _ = soundfile.read(tmp_path / "wavs" / "one.wav")
    expected = load_vocoder(file)([1, 2, 3], speaker=2, style=2)
    torch.testing.assert_close(torch.from_numpy(samples).float(), expected, rtol=0, atol=1 / 32767)
    with pytest.raises(ValueError, match="speaker 'zoe'"):
        vocoder.main([units, f"--vocoder={file}", f"--out={tmp_path / 'wavs'}", "--speaker=zoe"])
