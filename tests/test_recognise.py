"""recognise.py: whatever is given to an option gets one sentence that says what it is and what to give instead."""
import json
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import corpus.__main__ as corpus
import eval as evaluation
import hubert_units
import sample
import train
import twist
import vocoder
from checkpoints import files
from corpus.shards import UnitShards, write_shards

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"
LINES = '{"units": [1, 2], "duration": [1, 1], "file_name": "a.wav"}\n'
RECIPE = {"kind": "hubert", "num_units": 9, "layer": 1, "frame_rate": 25.0, "centers": "0"}


def shards(folder):
    write_shards(folder, RECIPE, [("a.wav", np.arange(9), np.ones(9, int), 1.0)])


def adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}))
    save_file({"lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")


def several(folder):
    for name in ("checkpoint-5", "checkpoint-9"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")


FOLDERS = {  # what it is -> (how it is made, what the sentence must say); names of files are made empty
    "empty": (lambda folder: None, "is empty"),
    "lora": (adapter, "LoRA adapter of org/base.*merge"),
    "gguf": (["model-q4.gguf", "README.md"], r"GGUF.*Hugging Face folder"),
    "onnx": (["model.onnx"], "ONNX"),
    "keras": (["tf_model.h5", "tokenizer.json"], "TensorFlow.*from_tf"),
    "flax": (["flax_model.msgpack"], "Flax"),
    "meta": (["consolidated.00.pth", "params.json"], "Meta.*-hf"),
    "deepspeed": (["global_step500/mp_rank_00_model_states.pt", "zero_to_fp32.py"], "DeepSpeed.*zero_to_fp32"),
    "fsdp": (["pytorch_model_fsdp_0/__0_0.distcp"], "FSDP"),
    "diffusers": (["model_index.json", "unet/x.bin"], "diffusers"),
    "tokenizer": (["tokenizer.json", "tokenizer_config.json"], "tokenizer of text"),
    "dataset": (["data.parquet"], "data set"),
    "hub-cache": (["snapshots/0a1b/config.json", "refs/main"], "Hugging Face cache.*snapshots/0a1b"),
    "several": (several, "several models.*checkpoint-5, .*checkpoint-9"),
    "features": (["features.jsonl"], r"python -m corpus .*features.jsonl --out"),
    "other": (["a.txt", "b.py"], "holds a.txt, b.py"),
    "trainer": (["optimizer.bin", "rng_state.pth", "trainer_state.json"], "trainer's state without weights"),
    "megatron": (["latest_checkpointed_iteration.txt", "iter_0000500/mp_rank_00/model_optim_rng.pt"], "Megatron"),
    "distributed": (["step-100/__0_0.distcp"], "in parts.*join"), "zero": (["mp_rank_00_model_states.pt"], "DeepSpeed in parts"),
    "split": (["data-00000-of-00001.arrow", "state.json"], "data set"), "splits": (["train/a-0-of-1.arrow"], "data set"),
    "words": (["vocab.json", "merges.txt"], "tokenizer of text"), "lists": (["x.tsv", "x.km"], "python -m corpus X.tsv X.km"),
    "speechbrain": (["hyperparams.yaml", "generator.ckpt"], "SpeechBrain"), "half": (["do_00500000"], r"do_.*file g_"),
    "nemo": (["a.nemo"], "NeMo"), "arrays": (["a.npy", "b.npy"], "NumPy arrays"),
    "links": (lambda folder:
              (folder / "config.json").symlink_to("../blobs/0a"), r"links to files that are not there \(config.json"),
    "run": (["config.toml", "step_000100/state.json"], "run of train.py.*--init=resume"),
}
FILES = {  # name -> (its bytes, what the sentence must say)
    "model.safetensors": (LFS, "Git LFS pointer.*git lfs pull"), "pytorch_model.bin": (LFS, "Git LFS pointer"),
    "page.safetensors": (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "nothing.bin": (b"", "is empty"), "model.gguf": (b"GGUF\3\0\0\0", "GGUF"), "model.h5": (b"\x89HDF\r\n\x1a\n", "Keras"),
    "model.onnx": (b"\x08\x07", "ONNX"), "model.tar.gz": (b"\x1f\x8b\x08\0\0", "archive.*unpack"),
    "features.jsonl": (LINES.encode(), r"python -m corpus \S*features.jsonl --out"),
    "x.km": (b"1 2 3\n", "python -m corpus X.tsv X.km"),
    "centres.csv": (b"1.0,2.0\n", "k-means centres are taken as safetensors"), "table.parquet": (b"PAR1\0\0", "data set"),
    "centres.npz": (b"PK\5\6" + bytes(18), r"archive of NumPy arrays.*\.npy"),
    "quantised.txt": (b"a|1 2 3\n", r"list of units.*jsonl"), "quantised.tsv": (b"a.wav\t1 2\n", "list of units"),
    "manifest.txt": (b"{'audio': 'a.wav', 'hubert': '1 2', 'duration': 1.2}\n", "list of units"),
    "last.ckpt": (b"PK\3\4 no archive", "Lightning"),
    "said.wav": (b"RIFF\x24\0\0\0WAVEfmt ", "is a recording.*sample.py"), "said.bin": (b"fLaC\0\0\0\x22", "is a recording"),
    "pointer.zip": (LFS, "Git LFS pointer"), "page.ZIP": (b"<html>", "web page"),
}


def made(root, kind):
    what = (FOLDERS | FILES)[kind][0]
    if kind in FILES:
        (root / kind).write_bytes(what)
        return root / kind
    folder = root / kind
    folder.mkdir()
    if callable(what):
        what(folder)
    else:
        for name in what:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x" if name.endswith("jsonl") else "")
    return folder


OPTIONS = {
    "lm": lambda path: twist.load_text_lm(path), "lm of a cold start": lambda path: twist.load_lm_config(path),
    "model": lambda path: twist.load_speech_lm(path), "tokenizer": lambda path: hubert_units.load_unit_encoder(path),
    "kmeans": lambda path: hubert_units.load_unit_encoder("pocket", kmeans=path, layer=4),
    "vocoder": lambda path: vocoder.load_vocoder(path), "data": lambda path: UnitShards(path),
    "train --data": lambda path: train.shards_of("data", str(path), "train"),
}
RAW = re.compile(r"Errno|Traceback|object|NoneType|pop from|subscript|attribute|Error\b|iterable|int\(\)")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", [*FOLDERS, *FILES])
def test_what_is_no_model_or_data_is_called_by_its_name(kind, option, tmp_path):
    path, words = made(tmp_path, kind), (FOLDERS | FILES)[kind][1]
    with pytest.raises((ValueError, OSError)) as caught:
        OPTIONS[option](path)
    said = str(caught.value)
    assert "\n" not in said and not RAW.search(said), said
    assert str(path) in said or kind == "features", said
    if option == "kmeans" and kind in FOLDERS:
        words = "no k-means centres at"
    if kind == "other" and "data" in option:
        words = "no unit shards"
    assert re.search(words, said), said


@pytest.mark.parametrize("option, kind, words", [
    ("model", "vocoder", "vocoder"), ("lm", "vocoder", "vocoder"), ("lm", "tokenizer", "tokenizer"),
    ("vocoder", "lm", "model"), ("vocoder", "tokenizer", "tokenizer"), ("tokenizer", "model", "model"),
    ("tokenizer", "vocoder", "vocoder")])
def test_a_model_of_another_kind_is_said_with_its_option(option, kind, words):
    with pytest.raises(ValueError, match=f"given as --{words}"):
        OPTIONS[option](str(files.KINDS[kind]))


@pytest.mark.parametrize("name", [
    "https://huggingface.co/facebook/opt-125m", "hf://org/name", "huggingface.co/org/name/tree/main", "s3://bucket/model"])
@pytest.mark.parametrize("option", ["lm", "model", "tokenizer", "kmeans", "vocoder"])
def test_an_address_is_no_path(option, name):
    with pytest.raises(FileNotFoundError, match=f"--{option}={name} is an address: give org/name"):
        OPTIONS[option](name)


@pytest.mark.parametrize("name, words", [
    ("model.fp16.safetensors", "fp16.*name the file model.safetensors"), ("weights.pth", "weights.pth.*pytorch_model.bin"),
    ("pytorch_model_fsdp.bin", "FSDP in one piece.*pytorch_model.bin"), ("model.pt", "model.pt.*pytorch_model.bin")])
def test_weights_under_another_name_are_said(name, words, tmp_path):
    (tmp_path / "config.json").write_bytes((files.KINDS["lm"] / "config.json").read_bytes())
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=f"which holds .*{words}"):
        twist.load_text_lm(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_are_read_by_their_content_and_not_by_their_name(name, tmp_path, capsys):
    tensors = files.read_tensors(files.KINDS["lm"])
    (save_file if name.endswith("bin") else torch.save)(tensors, tmp_path / name)
    (tmp_path / "config.json").write_bytes((files.KINDS["lm"] / "config.json").read_bytes())
    assert torch.equal(twist.load_text_lm(tmp_path).wte.weight, twist.load_text_lm("pocket").wte.weight)
    assert f"{tmp_path / name} is read as" in capsys.readouterr().err


def test_centres_are_read_by_their_content_and_not_by_their_name(tmp_path):
    centers = torch.arange(6.0).view(3, 2)
    save_file({"centers": centers}, tmp_path / "km.bin")
    torch.save(centers, tmp_path / "km.safetensors")
    assert all(torch.equal(files.read_kmeans(tmp_path / name)[0], centers) for name in ("km.bin", "km.safetensors"))


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors"])
def test_a_file_of_a_hubert_is_taken_as_its_folder(name, tmp_path):
    folder = tmp_path / "hubert"
    folder.symlink_to(files.KINDS["tokenizer"])
    encoder = hubert_units.load_unit_encoder(folder / name)
    assert encoder.recipe == hubert_units.load_unit_encoder(folder).recipe


@pytest.mark.parametrize("kind, name, content, words", [
    ("tokenizer", "a.pt", b"layers = 12\nwidth = 768\n", "it is a text"), ("kmeans", "a.pt", b"Not found\n", "it is a text"),
    ("tokenizer", "hubert.pt", b"\x10\0\0\0\0\0\0\0{}" + bytes(99), "it is a safetensors file.*config.json"),
    ("kmeans", "a.pkl", pickle.dumps(torch.ones(3, 2)), "as torch.save writes it")])
def test_what_a_file_holds_in_place_of_weights_is_said(kind, name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        OPTIONS[kind](tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and not RAW.search(str(caught.value))


def test_a_config_of_a_vocoder_is_taken_as_its_folder(capsys):
    assert vocoder.load_vocoder(files.KINDS["vocoder"] / "config.json").recipe == vocoder.load_vocoder("pocket").recipe
    assert f"the vocoder is in {files.KINDS['vocoder']}" in capsys.readouterr().err


def test_a_zip_is_one_by_any_case_of_its_ending(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOTWIST_HOME", str(tmp_path / "home"))
    with zipfile.ZipFile(tmp_path / "m.ZIP", "w") as archive:
        archive.write(files.KINDS["lm"] / "config.json", "m/config.json")
    assert twist.load_lm_config(tmp_path / "m.ZIP") == twist.load_lm_config("pocket")


def test_centres_under_their_name_in_the_released_folders_are_found(tmp_path):
    torch.save(torch.ones(3, 256), tmp_path / "km.bin")
    assert OPTIONS["kmeans"](tmp_path).recipe["num_units"] == 3


def test_a_text_lm_in_place_of_a_speech_lm_is_said(tmp_path):
    with pytest.raises(ValueError, match="kind is hubert, expected bytes.*; a text LM is given as --lm"):
        sample.main([str(files.POCKET / "prompt.wav"), f"--model={files.KINDS['lm']}", f"--out={tmp_path}"])


def test_what_is_plainly_meant_is_taken_with_a_line(tmp_path, capsys):
    """A run's folder, a file of the model folder, shards beside the model; slamkit's and compiled models: see test_twist."""
    vocab = twist.UnitVocab(9)
    slm = twist.cold_start(twist.load_lm_config("pocket"), vocab)
    twist.save_speech_lm(slm, vocab, tmp_path / "run/model")
    for given in ("run", "run/model", "run/model/config.json", "run/model/model.safetensors"):
        found, _ = twist.load_speech_lm(tmp_path / given)
        assert torch.equal(found.wte.weight, slm.wte.weight)
        assert (str(tmp_path / given) in capsys.readouterr().err) == (given != "run/model")
    assert twist.load_lm_config(tmp_path / "run").n_embd == slm.config.n_embd


def test_a_folder_of_folders_of_shards_names_them(tmp_path):
    for part in ("train", "val"):
        shards(tmp_path / "units" / part)
    with pytest.raises(FileNotFoundError, match=r"folders of unit shards: name one, \S*units/train, \S*units/val"):
        UnitShards(tmp_path / "units")
    with pytest.raises(FileNotFoundError, match="no unit shards: it holds the config.json of a model"):
        UnitShards(files.KINDS["lm"])
    with pytest.raises(FileNotFoundError, match="unit shards, no model: give it as --data"):
        twist.load_speech_lm(tmp_path / "units/train")


@pytest.mark.parametrize("task", ["ppl", "swuggy", "all"])
@pytest.mark.parametrize("kind", ["features.jsonl", "x.km", "features", "lora", "empty"])
def test_what_eval_cannot_score_is_called_by_its_name(kind, task, tmp_path):
    path = made(tmp_path, kind)
    with pytest.raises((ValueError, OSError)) as caught:
        evaluation.main([f"--task={task}", f"--data={path}", f"--out={tmp_path}/out", "--device=cpu"])
    assert str(path) in str(caught.value) and re.search((FOLDERS | FILES)[kind][1], str(caught.value)), str(caught.value)


@pytest.mark.parametrize("kind", ["lm", "tokenizer", "vocoder"])
@pytest.mark.parametrize("name, content, words", [
    ("model.safetensors", LFS, "model.safetensors is a Git LFS pointer"),
    ("model.safetensors", b"", "model.safetensors is empty"),
    ("model.safetensors", b"<html><body>404", "model.safetensors is a web page"),
    ("config.json", LFS, "config.json is a Git LFS"),
    ("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}", "config.json is not valid JSON"),
    ("config.json", b"[" * 100_000, "config.json is not valid JSON"),
    ("config.json", b"[1]", "holds a list, expected a JSON object"),
    ("config.json", b"NaN", "holds a float, expected"), ("config.json", b'"llama"', "holds a str, expected")])
def test_a_stranger_within_a_model_folder_is_called_by_its_name(kind, name, content, words, tmp_path):
    for file in files.KINDS[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        OPTIONS[kind](tmp_path)


@pytest.mark.parametrize("kind", ["lm", "model", "tokenizer", "vocoder"])
@pytest.mark.parametrize("value", ["text", True, 10**400, None, *(pytest.param(value, marks=pytest.mark.slow) for value in (
    "1e-5", [1], [[1]], {"a": 1}, -(10**30), float("nan"), float("inf"), 1.5, 0))])
def test_a_value_of_any_kind_in_any_place_opens_or_is_a_sentence(kind, value, tmp_path):
    """One key after the other of a whole config.json: the network is as before, or one sentence says what is wrong."""
    for file in files.KINDS[kind].iterdir():
        (tmp_path / file.name).symlink_to(file)
    settings = files.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    opened = 0
    for key in settings:
        (tmp_path / "config.json").write_text(json.dumps({**settings, key: value}))
        try:
            OPTIONS[kind](tmp_path)
            opened += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and not RAW.search(str(error)) and len(str(error)) < 600, (key, error)
    assert opened < len(settings)


@pytest.mark.parametrize("kind", ["lm", "model", "tokenizer", "vocoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(kind, value, tmp_path):
    files.write_json(tmp_path / "config.json", files.read_json(files.KINDS[kind] / "config.json"))
    (tmp_path / "kmeans.safetensors").write_bytes(files.KINDS["kmeans"].read_bytes())
    tensors = files.read_tensors(files.KINDS[kind])
    name = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point())[-1]
    for wrong in (tensors[name].clone().fill_(value), tensors[name].to(torch.int8)):
        save_file({**tensors, name: wrong}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"{re.escape(name)} (holds .* not finite|is quantised)"):
            OPTIONS[kind](tmp_path)


def changed(kind, folder, change, settings=None, name="model.safetensors"):
    """The pocket's model of that kind with other tensors (change: {name: tensor} -> the same) and settings, in a folder."""
    folder.mkdir(exist_ok=True)
    files.write_json(folder / "config.json", {**files.read_json(files.KINDS[kind] / "config.json"), **(settings or {})})
    content = change(files.read_tensors(files.KINDS[kind]))
    torch.save(content, folder / name) if name.endswith(".bin") else save_file(content, folder / name)
    return folder


@pytest.mark.parametrize("dtype", ["int64", "int32", "bool", "complex64", "float8_e4m3fn", "uint8"])
@pytest.mark.parametrize("kind", ["lm", "tokenizer", "vocoder"])
def test_tensors_that_are_no_weights_are_refused(kind, dtype, tmp_path):
    with pytest.raises(ValueError, match=f"quantised, or no weight .torch.{dtype}.; give the model in float32"):
        OPTIONS[kind](changed(kind, tmp_path, lambda tensors: {name: x.to(getattr(torch, dtype)) for name, x in tensors.items()}))
    if dtype == "int64":
        with pytest.raises(ValueError, match="ndarray|not the tensors of a generator"):
            (tmp_path / "model.safetensors").unlink()
            OPTIONS[kind](changed(kind, tmp_path, lambda tensors: {name: x.numpy() for name, x in tensors.items()},
                                  name="pytorch_model.bin"))


@pytest.mark.parametrize("kind", ["lm", "tokenizer"])
def test_copies_of_a_model_in_one_file_are_said(kind, tmp_path):
    for online in ("", "online_model."):
        with pytest.raises(ValueError, match=r"under \['.*ema\.'.*copies of a model; save the one"):
            OPTIONS[kind](changed(kind, tmp_path, lambda tensors, online=online: {
                **{online + name: x for name, x in tensors.items()},
                **{"z_ema." + name: x.clone() for name, x in tensors.items()}}))


@pytest.mark.parametrize("added", ["qweight", "weight.absmax", "SCB", "scales", "weight_scale_inv", "weight_packed"])
def test_quantised_weights_are_known_by_their_names(added, tmp_path):
    with pytest.raises(ValueError, match=f"holds quantised weights .*{added}.; give the model in float32"):
        OPTIONS["lm"](changed("lm", tmp_path, lambda tensors: {**tensors, f"model.layers.0.mlp.up_proj.{added}": torch.ones(2)}))


def test_what_trainers_put_around_tensors_is_taken_off(tmp_path):
    expected = OPTIONS["lm"](files.KINDS["lm"]).wte.weight
    for key in ("model_state_dict", "net", "params"):
        folder = changed("lm", tmp_path, lambda tensors, key=key: {"epoch": 3, key: tensors, "optimizer": {}},
                         name="pytorch_model.bin")
        assert torch.equal(OPTIONS["lm"](folder).wte.weight, expected)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no dictionary of tensors; save the state_dict\(\) of the model"):
        OPTIONS["lm"](tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(FileNotFoundError, match="shards of weights without their .index.json"):
        OPTIONS["lm"](tmp_path / "pytorch_model-00001-of-00002.bin")


@pytest.mark.parametrize("key, value", [("conv_stride", [0] * 7), ("conv_stride", [5, 2]), ("conv_kernel", [10])])
def test_convolutions_that_cannot_be_are_said(key, value, tmp_path):
    with pytest.raises(ValueError, match="conv_dim, conv_kernel and conv_stride are .* expected as many of each"):
        OPTIONS["tokenizer"](changed("tokenizer", tmp_path, dict, {key: value}))


def test_a_header_of_centres_that_is_no_number_is_said(tmp_path):
    path = tmp_path / "kmeans.safetensors"
    for said in ({"layer": "six"}, {"layer": "3.5"}, {"layer": "3", "frame_rate": "fast"}):
        save_file({"centers": torch.ones(3, 192)}, path, metadata=said)
        with pytest.raises(ValueError, match="in its header is '(six|3.5|fast)', expected a number"):
            hubert_units.load_unit_encoder("pocket", kmeans=path)


def test_centres_in_a_dictionary_of_other_things_are_found(tmp_path):
    table = torch.randn(3, 8)
    for content in ({"kmeans": table.numpy(), "layer": 6}, {"centroids": table, "inertia": 1.0},
                    {"spk0": {"cluster_centers_": table}}, {"kmeans": {"cluster_centers_": table}}):
        torch.save(content, tmp_path / "km.pt")
        assert torch.equal(files.read_kmeans(tmp_path / "km.pt")[0], table)
    torch.save({name: {"cluster_centers_": table} for name in ("spk0", "spk1")}, tmp_path / "km.pt")
    with pytest.raises(ValueError, match="no table of centres"):
        files.read_kmeans(tmp_path / "km.pt")


def test_no_words_of_a_library_are_said_of_a_file_that_is_no_pickle(tmp_path):
    (tmp_path / "x.mat").write_bytes(b"IxF2" + bytes(99))
    with pytest.raises(ValueError, match="it is damaged, or no pickle: ValueError"):
        files.read_kmeans(tmp_path / "x.mat")


def test_voices_whose_names_are_not_utf8_open(tmp_path):
    changed("vocoder", tmp_path, dict)
    (tmp_path / "speakers.txt").write_bytes(b"Jos\xe9\n")
    assert vocoder.load_vocoder(tmp_path).speakers == ["Jos\udce9"]


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl", b"", "holds no units"), ("x.jsonl", LFS, "Git LFS pointer"), ("x.txt", b"a|1 2\n", "list of units"),
    ("x.km", b"1 2\n", "half of a fairseq list"), ("x.zip", b"PK", "is neither")])
def test_an_import_says_what_it_was_given(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    options = [f"--out={tmp_path}/u", "--num-units=9", "--frame-rate=50"]
    with pytest.raises(ValueError, match=words):
        corpus.main([str(tmp_path / name), *options])
    assert not (tmp_path / "u").exists()
    with pytest.raises(FileNotFoundError, match="no file at .*none.txt"):
        corpus.main([f"{tmp_path}/none.txt", *options])


def test_a_byte_order_mark_before_units_is_passed_over(tmp_path):
    (tmp_path / "x.jsonl").write_text("\ufeff" + LINES)
    corpus.main([f"{tmp_path}/x.jsonl", f"--out={tmp_path}/u", "--num-units=9", "--frame-rate=50"])
    assert [name for name, _, _ in UnitShards(tmp_path / "u")] == ["a.wav"]


@pytest.mark.parametrize("settings, words", [
    *(({"cfg": {"model": {"_name": name}}}, f"fairseq's {name}, expected a HuBERT")
      for name in ("wav2vec2", "data2vec_audio", "hubert_ctc")), ({"args": {"arch": "wavlm"}}, "fairseq's wavlm"),
    ({"cfg": {"task": {"normalize": "false"}}}, "normalize is 'false', expected true or false"),
    ({"cfg": {"model": {"_name": "contentvec"}}}, "is no HuBERT: a tensor is missing")])
def test_fairseq_files_of_other_networks_are_said(settings, words, tmp_path):
    torch.save({**settings, "model": {"encoder.layers.0.fc1.bias": torch.ones(2)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=words):
        OPTIONS["tokenizer"](tmp_path / "x.pt")


def test_a_wrapper_without_units_is_refused(tmp_path):
    base = files.read_json(files.KINDS["lm"] / "config.json")
    files.write_json(tmp_path / "config.json", {"model_type": "speech_language_model", "vocab_size": 2, "base_config": base})
    with pytest.raises(ValueError, match="has 2 rows: no unit is among them"):
        OPTIONS["model"](tmp_path)
