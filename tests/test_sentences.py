"""What an impatient newcomer tries: each mistake is one sentence and exit code 2, asks no network and leaves nothing behind."""
import dataclasses
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
from checkpoints import download, files

ROOT = Path(config.__file__).parent
# chapters and rooms; a virtual environment may lie beside them
SOURCES = [path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]) if path.parent.name != "tests"]
COMMANDS = [str(path.relative_to(ROOT))[:-3].replace("/", ".") for path in SOURCES
            if '\nif __name__ == "__main__"' in path.read_text()]
OPTIONS = [(module, name) for module in COMMANDS
           for name in dict.fromkeys(re.findall(r"config\.load\((\w+)", (ROOT / (module.replace(".", "/") + ".py")).read_text()))]


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to stand in, with things that are easily confused."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs/mine/model").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("these are words\n")
    (tmp_path / "section.toml").write_text("[train]\nsteps = 3\n")
    (tmp_path / "listed.toml").write_text("steps = [1, 2]\n")
    (tmp_path / "typo.toml").write_text("stepz = 3\n")
    shutil.copy(ROOT / "pocket/prompt.wav", tmp_path / "a.wav")
    shutil.copytree(ROOT / "pocket/units/val", tmp_path / "units")
    monkeypatch.chdir(tmp_path)

    def asked(name, kind):
        raise AssertionError(f"--{kind}={name} asked for the network")

    monkeypatch.setattr(download, "download_repository", asked)
    return tmp_path


def said(module, arguments, monkeypatch, capsys):
    """(exit code, what stands on stderr) of a command."""
    main = importlib.import_module(module).main
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises(SystemExit) as stopped:
        config.command(lambda: main(arguments))
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize("line, words", [(line, words) for line, words in re.findall(r"^(.+?)  +# (.+)$", """
sample                                          # no prompt given
sample b c.wav                                  # no audio file at b
sample empty                                    # empty is a directory
sample text.txt                                 # as audio
sample *.wave                                   # no audio file at *.wave
sample a.wav --model=runs/none                  # --model=runs/none: no such file or folder
sample a.wav --model=runs/mien                  # did you mean runs/mine?
sample a.wav --model runs                       # no config.json in runs
sample a.wav --model=best.pt                    # --model=best.pt: no such file
sample a.wav --model=~/nowhere/at/all           # nowhere/at/all: no such file
sample a.wav --model=TWIST-350m                 # TWIST-350M
sample a.wav --model=                           # --model= is empty; leave it out for pocket
sample a.wav --tokenizer=runs/none              # --tokenizer=runs/none
sample a.wav --kmeans=km.bin                    # --kmeans=km.bin
sample a.wav --vocoder=text.txt                 # is a text, neither weights nor
sample a.wav --speaker=3                        # speaker '3': this vocoder has speakers 0 to 1
sample a.wav --layer=0                          # --layer=0: expected a whole number of at least 1
sample a.wav --chunking=whole                   # expected one of overlap, textless
sample a.wav --temperature=nan                  # --temperature=nan: expected a finite number of at least 0
sample a.wav --top-p=0                          # --top-p=0.0: expected a number above 0 and at most 1
sample a.wav --seed=99999999999999999999        # at most 4294967295
sample a.wav --seed -1                          # --seed=-1: expected a whole number of at least 0
sample a.wav --seed                             # --seed needs a value
sample a.wav --seed --resynth                   # --seed needs a value
sample a.wav -o out                             # -o: options begin with two hyphens; did you mean --out?
sample a.wav \u2013seed=3                       # options begin with two hyphens; did you mean --seed?
sample a.wav --out=text.txt --max-new-units=2   # text.txt is no folder that can be written to
eval --task=swuggy --out=text.txt/x             # text.txt is no folder that can be written to
vocoder pocket/units/val --out=text.txt         # text.txt is no folder that can be written to
bench.__main__ attention --out=text.txt         # text.txt is no folder that can be written to
sample a.wav my.toml                            # no options file at my.toml
eval swuggy                                     # stray argument 'swuggy'
eval --task=swugy                               # expected one of all, ppl, swuggy
eval --task=swuggy --data=nope                  # --data=nope: no such file or folder
eval --task=swuggy --data=text.txt              # is a text, neither weights nor units
eval --task=ppl --data=empty                    # empty
eval --task=generation --transcripts=nope       # --transcripts=nope: no such file
eval --task=ppl --versus=runs/none               # --versus=runs/none: no such file or folder
eval --task=ppl --train-data=nope               # --train-data=nope: no such folder
eval --split=dve                                # expected one of dev, test
eval --resamples=3                              # --resamples=3: expected a whole number of at least 100
vocoder                                         # no units given
vocoder nope                                    # no units at nope
hubert_units                                    # no audio found
hubert_units empty                              # no audio found in empty
hubert_units a.wav --fit=-3                     # --fit=-3: expected a whole number of at least 1
hubert_units a.wav --fit=0                      # --fit=0: expected a whole number of at least 1
hubert_units a.wav --budget=inf                 # --budget=inf: expected a finite number
hubert_units a.wav --output=x                   # did you mean --out?
hubert_units a.wav --out=text.txt               # a folder is needed there
twist --lm=runs/none                            # --lm=runs/none: no such file or folder
twist --units=99999999999                       # --units=99999999999: expected a whole number
twist --embedding=old                           # expected one of fresh, matched, truncate
train text.txt                                  # an options file ends in .toml
train section.toml                              # section.toml has a section [train]; write its keys without sections
train listed.toml                               # listed.toml: steps is a list; expected one value
train typo.toml                                 # typo.toml: unknown option --stepz; did you mean --steps?
train section.toml typo.toml                    # section
train --lr=1e-3                                 # unknown option --lr; did you mean --peak-lr?
train --learning-rate 3                         # did you mean --peak-lr?
train --batch-size=8                            # did you mean --micro-batch?
train --epochs=8                                # did you mean --steps?
train --train-data=x                            # did you mean --data
train --zzz=8                                   # unknown option --zzz (--help lists all)
train --steps = 3                               # --steps==: expected a whole number
train --data=                                   # --data= is empty; leave it out for pocket
train --data-weights=a,b                        # --data-weights=a,b: expected numbers
train --data-weights=1,2                        # --data-weights=1,2 for 1 corpora
train --prompts=                                # --prompts= is empty
train --init=runs/none                          # --init=runs/none: no such file or folder
train --out=text.txt                            # text.txt is no folder that can be written to
train --optimizer=split --dtype=float32         # --optimizer=split multiplies in bfloat16
train --compile=yes                             # expected one of auto, none, blocks
train --lm=runs/none                            # --lm=runs/none: no such file or folder
train --threads=99999999                        # --threads=99999999: expected a whole number
corpus.__main__                                 # give one shard folder
corpus.__main__ nope                            # no file at nope; check the path
corpus.__main__ units --jsonl=empty             # cannot write empty (Is a directory)
bench.__main__ nope                             # expected one of attention
bench.__main__ loader --repeats=0               # --repeats=0: expected a whole number of at least 1
pocket.stories --pairs=endng                    # no kind of pairs is called 'endng'
pocket.measure --what=all                       # expected one of text, units
pocket.measure --what=vocoder --speech=nope     # no audio file or folder at nope
pocket.measure --what=words                     # give --recogniser=
pocket.people                                   # no recordings given: python -m pocket.people --recordings=FOLDER
pocket.teacher --num-units=1,a                  # --num-units=1,a: expected whole numbers above 0, divided by commas
pocket.train_vocoder --rates=abc                # --rates=abc: expected whole numbers above 0, divided by commas
pocket.train_hubert --dtype=bf16                # expected one of float32, bfloat16
pocket.build --only=all                         # --only=all: expected one of text, text_lm
""", re.MULTILINE)])
def test_a_mistake_is_one_sentence_and_exit_code_2(line, words, here, monkeypatch, capsys):
    module, *arguments = shlex.split(line)
    before = everything(here)
    code, printed = said(module, arguments, monkeypatch, capsys)
    assert code == 2 and words in printed, printed
    assert "Traceback" not in printed and "Errno" not in printed
    assert all(": error: " in sentence for sentence in printed.splitlines() if "%|" not in sentence), printed
    assert everything(here) == before


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.\nGPU 0 has ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")], ids=str)
def test_a_want_of_memory_is_one_sentence_whose_allocator_ever_says_so(error, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stopped:
        config.command(main)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.startswith("train.py: error: out of memory: ") and printed.count("\n") == 1
    monkeypatch.setenv("TWIST_TRACEBACK", "1")
    with pytest.raises(type(error)):
        config.command(main)


@pytest.mark.parametrize("said", [
    "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
    "Failed to find C compiler. Please specify via CC environment variable."])
def test_a_machine_without_a_compiler_is_told_what_to_do_without(said, monkeypatch, capsys):
    def main():
        raise RuntimeError(said)

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        config.command(main)
    assert "no C compiler is here" in (printed := capsys.readouterr().err) and "--compile=none" in printed


def test_an_error_of_ours_is_not_taken_for_a_want_of_memory():
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        config.command(main)


def test_a_name_that_is_not_utf_8_can_be_printed(monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as a terminal's
    monkeypatch.setattr(sys, "stdout", written)
    config.command(lambda: print(chr(0xDCFF) + ".wav"))
    assert written.buffer.getvalue() == b"\\udcff.wav\n"


def test_a_reader_who_has_enough_is_no_error():
    code = "import config; config.command(lambda: [print('x' * 1000) for _ in range(1000)])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as `| head` does
    assert (process.stderr.read(), process.wait()) == (b"", 1)


@pytest.mark.parametrize("line, words", [(line, words) for line, words in re.findall(r"^(.+?)  +# (.+)$", """
train --resume                          # --init
train --checkpoint=x                    # --init
train --model_name_or_path=x            # --lm
train --per_device_train_batch_size=8   # --micro-batch
train --gradient_accumulation_steps=8   # --tokens-per-step
train --max_steps=8                     # --steps
train --save_steps=8                    # --save-interval
train --lr_scheduler_type=cosine        # --schedule
train --max_grad_norm=1                 # --clip
train --cpu                             # --device
train --no-cuda                         # --device
sample --ckpt=x                         # --model
sample --max_new_tokens=8               # --max-new-units
sample --input=a.wav                    # --prompts
eval --batch_size=8                     # --budget
hubert_units --input_dir=x              # --audio
hubert_units --n-clusters=8             # --fit
twist --model=x                         # --lm
""", re.MULTILINE)])
def test_names_of_other_projects_lead_to_ours(line, words, monkeypatch, capsys):
    module, *arguments = line.split()
    code, printed = said(module, arguments, monkeypatch, capsys)
    assert code == 2 and re.search(f"did you mean (--[a-z-]+ or )?{words}( or|[?])", printed), printed


@pytest.mark.parametrize("line, words", [(line, words) for line, words in re.findall(r"^(.+?)  +# (.+)$", """
sample.SampleConfig --resynth --temperature=1       # --temperature has no effect with --resynth
sample.SampleConfig --temperature=0 --top-k=5       # --top-k has no effect with --temperature=0.0
hubert_units.UnitsConfig --fit-frames=9             # --fit-frames has no effect without --fit
hubert_units.UnitsConfig --fit=9 --no-dedup         # --dedup has no effect with --fit=9
eval.EvalConfig --task=ppl --ties=0                 # --ties has no effect with --task=ppl
eval.EvalConfig --text-lm=x                         # --text-lm has no effect without --recognise or --transcripts
eval.EvalConfig --recognise=x --task=ppl          # --recognise has no effect with --task=ppl
eval.EvalConfig --transcripts=x --vocoder=x         # --vocoder has no effect without --recognise or --page
twist.TwistConfig --seed=3                          # --seed has no effect without --out
train.TrainConfig --vocoder=x                       # --vocoder has no effect with --sample-interval=0
train.TrainConfig --cooldown=0.5                    # --cooldown has no effect with --schedule=cosine
train.TrainConfig --init=cold --embedding=matched   # --embedding has no effect with --init=cold
corpus.__main__.CorpusConfig --num-units=9          # --num-units has no effect without --out
""", re.MULTILINE)])
def test_what_a_command_does_not_use_is_said(line, words, capsys):
    place, *arguments = line.split()
    module, _, name = place.rpartition(".")
    config.load(getattr(importlib.import_module(module), name), arguments)
    assert capsys.readouterr().err == words.strip() + "\n"


# ---------------------------------------------------------------------------------------------- every command

@pytest.mark.parametrize("module, name", OPTIONS, ids=[module for module, _ in OPTIONS])
def test_every_number_has_a_range(module, name):
    """NaN, infinity, what is negative and what no computer counts to are refused by every option, in its own name."""
    options = getattr(importlib.import_module(module), name)
    fields = {field.name: field for field in dataclasses.fields(options)}
    for table in ("RANGES", "CHOICES", "ALONE", "NEEDS"):
        assert set(config.declared(options, table)) <= set(fields), table
    needed = [need.partition("=")[::2] for needs in config.declared(options, "NEEDS").values() for need in needs.split()]
    for other, values in ((each, values) for others, values in needed for each in others.split("|")):  # and that can be given
        choices = config.declared(options, "CHOICES").get(other, ()) if values else ()  # without values: that it is set
        assert other in fields and (not choices or set(values.split("|")) <= {*choices})
    for field in fields.values():
        if {int, float} & {field.type, *getattr(field.type, "__args__", ())}:
            shown = f"--{field.name.replace('_', '-')}"
            for value in ("nan", "inf", "-inf", "-1", "1e999", "many", "9" * 400):
                with pytest.raises(ValueError, match=f"^{shown}=.*expected a"):
                    config.load(options, [shown, value])


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_helps_and_does_nothing_else(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["--help"], ["-h"], ["--whatever=3", "x", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(module).main(arguments)
        assert stopped.value.code == 0 and "--" in capsys.readouterr().out
    assert everything(tmp_path) == []


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["configs/pocket.toml", "--steps=3", "--help"]])
def test_every_launcher_helps_from_any_folder(arguments, tmp_path):
    launchers = {*ROOT.glob("scripts/*_*.sh"), ROOT / "scripts/slurm.sbatch"} - {ROOT / "scripts/gpu_acceptance.sh"}
    for script in sorted(launchers):
        shown = subprocess.run(["bash", script, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert shown.returncode == 0 and shown.stdout.startswith("Train ") and not shown.stderr, script


# ---------------------------------------------------------------------------------------------- paths and names

@pytest.mark.parametrize("name", ["./x", "../x", "/x/y", "~/x", "a/b/c", "runs/none", "units/none", "mine/none", "x.pt", "x/",
                                  "org/x.safetensors", "org/x.zip"])
def test_what_looks_like_a_path_is_not_asked_for_on_the_network(name, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "find", lambda *_: pytest.fail("asked"))
    for kind in ("lm", "model", "tokenizer", "kmeans", "vocoder"):
        with pytest.raises(FileNotFoundError, match=f"^--{kind}={re.escape(name)}: no such file or folder"):
            files.find(name, kind)


@pytest.mark.parametrize("name", ["facebook/opt-125m", "facebook/opt-1.3b", "slprl/slam", "gpt2", "TWIST-350M"])
def test_a_name_is_looked_up(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "find", lambda name, kind: tmp_path / name)
    assert files.find(name, "lm") == tmp_path / name
