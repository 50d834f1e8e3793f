"""What a recogniser hears in generated speech: speaking, commands that fail, words and their errors, tokens of a text LM."""
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vocoder import HOP, write_folder

import eval as evaluation_command
import twist
from conftest import RECIPE, TINY, write_shards
from corpus.shards import UnitShards
from corpus.shards import write_shards as write_documents
from evaluation import accuracy, generation, speaking, transcripts
from speech.audio import read_wav, write_wav
from vocoder import load_vocoder

ROOT = Path(__file__).parent.parent
FAKE = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[-1])
said = json.loads(pathlib.Path(__file__).with_name("heard.json").read_text()).get(f"{path.parent.name}/{path.stem}", sys.argv[1])
assert path.read_bytes()[:4] == b"RIFF"
if said is None:
    print("loading\\nno speech in it", file=sys.stderr)
    raise SystemExit(3)
print(f"  {said}\\n")
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Shards of six documents, two models, a vocoder."""
    folder, vocab = tmp_path_factory.mktemp("parts"), twist.UnitVocab(20, recipe=RECIPE)
    write_shards(folder / "units", seed=1, documents=6)
    for seed in (0, 1):
        twist.save_speech_lm(twist.cold_start(TINY, vocab, seed), vocab, folder / str(seed))
    write_folder(folder / "vocoder")
    return folder


@pytest.fixture
def recogniser(tmp_path):
    """Writes a command that hears what a table says ({system/name: text, None fails}), else `other`."""
    def write(table=None, other="the dog ran"):
        (tmp_path / "my fake.py").write_text(FAKE)
        (tmp_path / "heard.json").write_text(json.dumps(table or {}))
        return shlex.join([sys.executable, str(tmp_path / "my fake.py"), other])
    return write


def evaluate(out, parts, *arguments):
    """eval.py --task=generation of six prompts -> {(subset, system, measure): row}, notes."""
    evaluation_command.main(["--task=generation", f"--data={parts}/units", f"--model={parts}/0", f"--vocoder={parts}/vocoder",
                             f"--out={out}", "--prompt-seconds=0.4", "--max-new-units=10", "--device=cpu", "--resamples=200",
                             *arguments])
    section, = json.loads((out / "result.json").read_text())["sections"]
    return {(row["subset"], row["system"], row["measure"]): row for row in section["rows"]}, " ".join(section["notes"])


# ---------------------------------------------------------------------------------------------- words

@functools.cache
def fewest(said, heard):
    """(errors, of them deletions and insertions) of the best alignment, by trying all."""
    if not said or not heard:
        return len(said) + len(heard), len(said) + len(heard)
    (a, b), (c, d), (e, f) = fewest(said[1:], heard), fewest(said, heard[1:]), fewest(said[1:], heard[1:])
    return min((a + 1, b + 1), (c + 1, d + 1), (e + (said[0] != heard[0]), f))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_word_errors_are_the_fewest_of_all_alignments(said, heard):
    substitutions, deletions, insertions = transcripts.word_errors(said, heard)
    assert (substitutions + deletions + insertions, deletions + insertions) == fewest(tuple(said), tuple(heard))
    assert deletions - insertions == len(said) - len(heard) and min(substitutions, deletions, insertions) >= 0


@pytest.mark.parametrize("said, heard, errors", [
    ("the dog ran", "the dog ran", (0, 0, 0)), ("the dog ran", "", (0, 3, 0)), ("", "a dog", (0, 0, 2)), ("", "", (0, 0, 0)),
    ("the dog ran home", "the dog home", (0, 1, 0)), ("the dog ran", "the big dog ran", (0, 0, 1)), ("a b", "b a", (2, 0, 0)),
    ("the dog ran", "a dog ran home", (1, 0, 1)), ("one two three four", "two three four five", (0, 1, 1))])
def test_word_errors_by_hand(said, heard, errors):
    assert transcripts.word_errors(said.split(), heard.split()) == errors


@pytest.mark.parametrize("text, words", [
    ("It's a Well-known “word”.", ["it's", "a", "well", "known", "word"]), ("DON’T stop, at 3!", ["don't", "stop", "at", "3"]),
    ("'quoted' o'clock _", ["quoted", "o'clock"]), ("Über ﬁne", ["über", "fine"]), ("हिन्दी, बोली", ["हिन्दी", "बोली"]),
    (" ... ", [])])
def test_what_a_word_is(text, words):
    assert transcripts.words_of(text) == words


# ---------------------------------------------------------------------------------------------- the whole task

def test_all_systems_are_spoken_heard_and_reported_and_transcripts_come_back(parts, recogniser, tmp_path, capsys):
    command = recogniser({"model/0": "the dog, the dog ran", "re-synthesis/0": "A dog ran home.", "re-synthesis/1": "The cat sat",
                          "re-synthesis/2": "x", "held-out_speech/3": ""})
    (tmp_path / "said.tsv").write_text("some/where/0.flac\tThe dog ran.\n1\tThe cat sat on it\n2.wav\t...\nnobody.wav\thello\n")
    arguments = [f"--versus={parts}/1", f"--references={tmp_path}/said.tsv"]
    rows, notes = evaluate(tmp_path / "out", parts, *arguments, f"--recognise={command}")
    assert {path.name for path in (tmp_path / "out/spoken").iterdir()} == {"held-out_speech", "model", "re-synthesis", "versus"}
    for system, bleu in (("model", (2 / 4 + 5 * 0) / 6), ("versus", 0), ("held-out speech", 0)):  # the dog, the dog ran
        assert rows["words", system, "auto_bleu_2"]["value"] == pytest.approx(bleu)
        assert rows["words", system, "GenPPL per byte"]["value"] > 1 and rows["words", system, "length_max"]["n"] == 6
    # 0: one substitution, one insertion in 3 words; 1: two deletions in 5; 2 has no word that was said
    name = "word error, against what was said", "re-synthesis"
    expected = accuracy.estimate([(np.array([2.0, 2.0]), np.array([3.0, 5.0]))], 200, 0)
    assert [rows[*name, "%"][key] for key in ("value", "low", "high", "n")] == pytest.approx(
        [50, 100 * expected.low, 100 * expected.high, 2]) and rows[*name, "%"]["low"] < 50 < rows[*name, "%"]["high"]
    for measure, value in (("% substitutions", 12.5), ("% deletions", 25), ("% insertions", 12.5), ("words", 8)):
        assert rows[*name, measure]["value"] == pytest.approx(value)
    assert "21 of 21 recordings" in notes and "a text of 3 of the 6 documents" in notes and "bootstrap over recordings" in notes
    again, _ = evaluate(tmp_path / "again", parts, *arguments, f"--transcripts={tmp_path}/out/transcripts.jsonl")
    assert again == rows and not (tmp_path / "again/spoken").exists()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.wav")}
    assert evaluate(tmp_path / "out", parts, *arguments, f"--recognise={command}")[0] == rows  # and nothing is written anew
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.wav")} == before
    assert not (tmp_path / "out/transcripts-1.jsonl").exists()
    assert "not recognised" not in capsys.readouterr().err


def test_recordings_that_are_at_hand_are_heard_too(recogniser, tmp_path):
    """With the pocket's own tokenizer and vocoder; the recogniser's errors and those of re-synthesis are told apart."""
    wav = read_wav(ROOT / "pocket/prompt.wav")
    for name in ("a", "b c"):
        write_wav(tmp_path / f"recordings/{name}.wav", wav[:20_000])
    heard = {"original/a": "every bone in her body", "original/b c": "seemed broken", "re-synthesis/a": "every bone"}
    command = recogniser(heard, "seemed soaked")
    (tmp_path / "said.tsv").write_text("a\tevery bone in her aged body\n")
    evaluation_command.main(["--task=generation", f"--data={tmp_path}/recordings", f"--out={tmp_path}/out", "--max-new-units=3",
                             "--prompt-seconds=0.5", f"--cache={tmp_path}/cache", f"--recognise={command}", "--resamples=100",
                             f"--references={tmp_path}/said.tsv", "--device=cpu"])
    section, = json.loads((tmp_path / "out/result.json").read_text())["sections"]
    rows = {(row["subset"], row["system"]): row for row in section["rows"] if row["measure"] == "%"}
    found = {key: (row["value"], row["n"]) for key, row in rows.items()}
    assert found == {("word error, against what was said", "original"): (pytest.approx(100 / 6), 1),
                     ("word error, against what was said", "re-synthesis"): (pytest.approx(400 / 6), 1),
                     ("word error, against what is heard in the original", "re-synthesis"): (pytest.approx(400 / 7), 2)}
    assert torch.equal(read_wav(tmp_path / "out/spoken/original/b c.wav"), wav[:20_000])


@pytest.mark.parametrize("dedup", [True, False])
def test_what_is_spoken_is_prompt_and_continuation_with_the_prompts_own_timing(dedup, parts, tmp_path):
    units, runs = np.array([3, 3, 5, 5, 5, 7, 7]), np.array([1, 4, 2, 1, 9, 1, 1])
    if not dedup:
        runs = np.ones_like(units)
    else:
        units[1:] = [4, 5, 6, 5, 7, 8]
    vocoder, options = load_vocoder(parts / "vocoder"), evaluation_command.EvalConfig(out=str(tmp_path))
    evaluation = SimpleNamespace(options=options, lms={"model"}, main=SimpleNamespace(vocab=SimpleNamespace(dedup=dedup)))
    sequences = {"model": [np.array([5, 9, 9, 2]) if not dedup else np.array([9, 2])], "held-out speech": [units[4:6]]}
    found = speaking.speak(evaluation, vocoder, {"x": ("x.wav", units, runs)}, sequences, 4, ["x"], False)
    model, held_out, whole = found
    assert [each.system for each in found] == ["model", "held-out speech", "re-synthesis"]
    if dedup:
        assert model.units.tolist() == [3, 4, 5, 6, 9, 2] and held_out.units.tolist() == [3, 4, 5, 6, 5, 7]
        assert model.runs.tolist() == [1, 4, 2, 1, *vocoder.durations(model.units)[4:].tolist()] and model.prompt == 4
        assert torch.equal(whole.runs, vocoder.durations(whole.units)) and whole.units.tolist() == units.tolist()
    else:  # frames: [3 3 5 5 | 5 9 9 2], the prompt ends within a unit
        assert (model.units.tolist(), model.runs.tolist(), model.prompt) == ([3, 5, 9, 2], [2, 3, 2, 1], 2)
        assert (whole.units.tolist(), whole.runs.tolist(), whole.prompt) == ([3, 5, 7], [2, 3, 2], 0)
    for each in found:
        wav = read_wav(each.path)
        assert len(wav) == each.samples == int(each.runs.sum()) * HOP
        assert each.path == tmp_path / "spoken" / each.system.replace(" ", "_") / "x.wav"
        expected = vocoder(each.units, each.runs)
        assert (wav - (expected if each is whole else speaking.faded(expected))).abs().max() < 1e-4


def test_documents_of_one_name_are_told_apart(parts, recogniser, tmp_path):
    write_documents(tmp_path / "units", RECIPE, [(f"{folder}/x.wav", np.arange(20), np.ones(20, int), 1.0) for folder in "ab"])
    evaluate(tmp_path / "out", parts, f"--data={tmp_path}/units", f"--recognise={recogniser()}")
    assert sorted(path.name for path in (tmp_path / "out/spoken/model").iterdir()) == ["x.wav", "x_2.wav"]
    rows = [json.loads(line) for line in (tmp_path / "out/transcripts.jsonl").read_text().splitlines()]
    assert [(row["system"], row["name"], row["text"]) for row in rows] == [
        (system, name, "the dog ran") for system in ("model", "held-out speech") for name in ("x", "x_2")]


# ---------------------------------------------------------------------------------------------- commands

def test_what_cannot_be_recognised_is_said_and_the_rest_goes_on(parts, recogniser, tmp_path, capsys):
    failing = {"model/0": None, "model/4": None, "held-out_speech/1": None}
    rows, notes = evaluate(tmp_path / "out", parts, f"--recognise={recogniser(failing)}")
    assert rows["words", "model", "length_mean"]["n"] == 4 and rows["words", "held-out speech", "length_mean"]["n"] == 5
    assert "9 of 12 recordings" in notes and "the other 3 could not be recognised" in notes
    said = capsys.readouterr().err
    for name in failing:
        assert f"{tmp_path}/out/spoken/{name}.wav was not recognised: exit code 3: no speech in it\n" in said
    with pytest.raises(ValueError, match="failed for each of 2 recordings; for .*model/4.wav: exit code 3: no speech in it"):
        transcripts.recognise(recogniser(failing), [tmp_path / f"out/spoken/model/{i}.wav" for i in (0, 4)])


@pytest.mark.parametrize("command, sentence", [
    ("no-such-program --x", "no program 'no-such-program' is here"), ("python 'half", "no closing quotation"),
    ("' '", "no program ' ' is here"), ("./nothing/here", "no program './nothing/here'")])
def test_a_command_that_does_not_exist_is_refused_before_the_work(command, sentence, parts, tmp_path):
    with pytest.raises(ValueError, match=f"--recognise={command}.*{sentence}"):
        evaluate(tmp_path / "out", parts, f"--recognise={command}")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="give one of them"):
        evaluate(tmp_path / "out", parts, f"--recognise={command}", "--transcripts=x.tsv")


def test_a_recogniser_that_hangs_loses_its_recording_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(transcripts, "PATIENCE", 0.5)
    (tmp_path / "hangs.sh").write_text('case "$1" in *b.wav) exec sleep 60;; esac; echo "$1"\n')
    assert transcripts.recognise(f"sh {tmp_path}/hangs.sh", ["a.wav", "b.wav"]) == ["a.wav", None]
    assert "b.wav was not recognised: nothing came within 0.5 s" in capsys.readouterr().err


def test_a_command_that_cannot_be_started_is_an_error(tmp_path):
    (tmp_path / "broken").write_bytes(b"\x7fELF and nothing more")
    (tmp_path / "broken").chmod(0o755)
    with pytest.raises(ValueError, match="broken cannot be run"):
        transcripts.recognise(f"{tmp_path}/broken", ["a.wav"])


@pytest.mark.parametrize("words, expected, name", [
    ("", ["{}"], "a b.wav"), ("--in {}", ["--in", "{}"], "it's \"{}\" $(x).wav"),
    ("--in={wav} -v", ["--in={}", "-v"], "{wav}\n;&.wav"),
    ("'a b' \"it's\"", ["a b", "it's", "{}"], "{}"), ("$HOME;ls |x", ["$HOME;ls", "|x", "{}"], "-.wav")])
def test_the_name_of_a_recording_stands_in_its_place_whatever_it_is(words, expected, name):
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {words}"
    text, why = transcripts.hear(transcripts.parse_command(command), name)
    assert json.loads(text) == [name if word == "{}" else word.replace("{}", name) for word in expected] and not why


def test_transcripts_come_in_the_order_of_the_recordings_however_many_run_at_once(tmp_path):
    command = "sh -c 'if [ $1 = 0 ]; then sleep 0.3; fi; echo $1' sh {}"
    assert transcripts.recognise(command, [str(i) for i in range(9)], workers=4) == [str(i) for i in range(9)]
    assert transcripts.recognise(command, []) == []
    assert transcripts.recognise("printf '\\377x'", ["a"]) == ["�x"]  # whatever bytes come


@pytest.mark.slow
@pytest.mark.parametrize("package", ["moonshine_voice", "pocketsphinx"])
def test_the_recipes_of_the_docs_print_a_transcript(package, tmp_path):
    pytest.importorskip(package)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL)
    (tmp_path / "hear.py").write_text(next(block for block in blocks if package in block))
    text, = transcripts.recognise(f"{sys.executable} {tmp_path}/hear.py", [ROOT / "pocket/prompt.wav"])
    assert {"every", "bone", "broken"} <= {*transcripts.words_of(text)}


# ---------------------------------------------------------------------------------------------- references

@pytest.mark.parametrize("file, content, known", [
    ("x.tsv", "a/b.flac\tone two\nc.d\tthree\n", {"b": "one two", "c.d": "three"}),
    ("x.jsonl", '{"name": "b", "text": "one two"}\n', {"b": "one two"})])
def test_references_are_found_by_the_name_of_the_file(file, content, known, tmp_path):
    (tmp_path / file).write_text("\ufeff" + content)  # as Windows' editors begin a file
    found = transcripts.read_references(tmp_path / file)
    assert {name: found[name] for name in known} == known


def test_references_that_cannot_be_meant_are_refused(parts, recogniser, tmp_path):
    path, command = tmp_path / "said.tsv", f"--recognise={recogniser()}"
    path.write_text("a/x.wav\tone\nb/x.wav\ttwo\n")
    with pytest.raises(ValueError, match="two texts of x.wav"):
        evaluate(tmp_path / "out", parts, command, f"--references={path}")
    path.write_text("x.wav\tone\n")
    write_documents(tmp_path / "units", RECIPE, [(f"{folder}/x.wav", np.arange(20), np.ones(20, int), 1.0) for folder in "ab"])
    with pytest.raises(ValueError, match="one text of x, and two documents are called so"):
        evaluate(tmp_path / "out", parts, command, f"--references={path}", f"--data={tmp_path}/units")
    with pytest.raises(ValueError, match="no text of any of the 6 documents, such as 0"):
        evaluate(tmp_path / "out", parts, command, f"--references={path}")
    with pytest.raises(FileNotFoundError, match="--references=.*none.tsv: no such file"):
        evaluate(tmp_path / "out", parts, command, f"--references={tmp_path}/none.tsv")
    (tmp_path / "x.jsonl").write_text('{"name": "a", "text": "b", "system": 3}\n')
    with pytest.raises(ValueError, match="line 1: expected name and text"):
        transcripts.read_transcripts(tmp_path / "x.jsonl")


def test_a_voice_or_a_vocoder_that_does_not_fit_is_refused_before_the_work(parts, recogniser, tmp_path):
    with pytest.raises(ValueError, match="no choice of speaker"):
        evaluate(tmp_path / "out", parts, f"--recognise={recogniser()}", "--speaker=3")
    with pytest.raises(ValueError, match="--vocoder=pocket: units of another tokenizer"):
        evaluate(tmp_path / "out", parts, f"--recognise={recogniser()}", "--vocoder=pocket")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- tokens

TEXTS = ("the dog ran home", "the cat sat on the mat, and sat", "", "zebra")


def write_text_lm(folder, bos):
    """A LLaMA of transformers with a tokenizer over the bytes of a few merges, that would begin a text by itself."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
                                        bos_token_id=0 if bos else None, eos_token_id=None)
    transformers.LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("bos", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_genppl_per_token_is_that_of_transformers(bos, parts, tmp_path):
    tokenizer = write_text_lm(tmp_path / "mine", bos)
    import transformers
    lm = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mine").eval()
    losses = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=bos).ids])
        if ids.shape[1] > 1:
            with torch.no_grad():
                losses.append(lm(ids, labels=ids).loss.item())
    (tmp_path / "said.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS)))
    arguments = [f"--transcripts={tmp_path}/said.tsv", f"--text-lm={tmp_path}/mine"]
    rows, _ = evaluate(tmp_path / "out", parts, *arguments)
    value = rows["words", "model", "GenPPL per token of mine"]["value"]
    assert value == pytest.approx(np.exp(np.mean(losses)), rel=1e-5) and len(losses) == 3
    shutil.move(tmp_path / "mine/tokenizer.json", tmp_path / "tokens.json")
    rows, _ = evaluate(tmp_path / "out", parts, *arguments, f"--text-tokenizer={tmp_path}/tokens.json")
    assert rows["words", "model", "GenPPL per token of mine"]["value"] == value


def test_a_tokenizer_that_is_missing_or_foreign_is_said(parts, tmp_path, monkeypatch):
    write_text_lm(tmp_path / "mine", True)
    (tmp_path / "said.tsv").write_text("a\tzebra\n")
    arguments = [f"--transcripts={tmp_path}/said.tsv", f"--text-lm={tmp_path}/mine"]
    with pytest.raises(ValueError, match=r"has a token 2\d\d, --text-lm=pocket has 258 rows: they do not belong together"):
        evaluate(tmp_path / "out", parts, arguments[0], "--text-lm=pocket", f"--text-tokenizer={tmp_path}/mine/tokenizer.json")
    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tokenizers" else find_spec(name, *more))
        with pytest.raises(ValueError, match="pip install tokenizers"):
            evaluate(tmp_path / "out", parts, *arguments)
    (tmp_path / "mine/tokenizer.json").write_text('{"vocab": {}}')
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        evaluate(tmp_path / "out", parts, *arguments)
    os.remove(tmp_path / "mine/tokenizer.json")
    with pytest.raises(FileNotFoundError, match="there is no .*tokenizer.json: copy .* or name it with --text-tokenizer"):
        evaluate(tmp_path / "out", parts, *arguments)
    with pytest.raises(FileNotFoundError, match="^--text-lm=.*nothing: no such file or folder"):
        evaluate(tmp_path / "out", parts, arguments[0], f"--text-lm={tmp_path}/nothing")


def test_documents_of_the_shards_are_left_as_they_are(parts):
    """prompts_of hands whole documents on, the first ones that are long enough."""
    shards = UnitShards(parts / "units")
    found, T = generation.prompts_of(shards, 3, 0.4)
    kept = [i for i in range(6) if shards.lengths[i] > T][:3]
    assert list(found) == [Path(shards.names[i]).stem for i in kept]
    assert all(np.array_equal(units, shards.document(i)[0]) for i, (_, units, _) in zip(kept, found.values()))
