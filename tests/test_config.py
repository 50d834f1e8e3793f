"""config.py: defaults < file < command line, and errors that help."""
import io
import sys
from dataclasses import dataclass

import pytest

import config


@dataclass(frozen=True)
class Example:
    files: tuple[str, ...] = ()  # what to read
    peak_lr: float = 1e-3  # learning rate
    steps: int = 10  # updates
    name: str | None = None  # of the run
    fast: bool = False  # skip checks


def test_the_command_line_overrides_the_file_and_both_spellings_work(tmp_path):
    (tmp_path / "a.toml").write_text('peak_lr = 5e-4\nsteps = 7\nname = "from file"\n')
    options = config.load(Example, [str(tmp_path / "a.toml"), "--steps=3", "--peak-lr=2e-4", "--fast"])
    assert options == Example(peak_lr=2e-4, steps=3, name="from file", fast=True)


def test_a_true_false_option_is_set_and_unset_by_its_name_alone(tmp_path):
    assert config.load(Example, ["--fast"]).fast and not config.load(Example, ["--fast", "--no-fast"]).fast
    (tmp_path / "a.toml").write_text("fast = true\n")
    assert not config.load(Example, [str(tmp_path / "a.toml"), "--no-fast"]).fast
    for argument in ("--no-steps", "--no-fast=true", "--no-fats"):
        with pytest.raises(ValueError, match="unknown option"):
            config.load(Example, [argument])


def test_positional_words_go_to_the_named_field():
    assert config.load(Example, ["a.wav", "--steps=2", "b.wav"], positional="files").files == ("a.wav", "b.wav")
    with pytest.raises(ValueError, match="stray"):
        config.load(Example, ["a.wav"])


@pytest.mark.parametrize("argument, words", [
    ("--peek-lr=1", "did you mean --peak-lr"), ("--steps=many", "whole number"), ("--fast=perhaps", "true or false"),
    ("--steps", "needs a value")])
def test_mistakes_name_the_nearest_key_or_the_type(argument, words):
    with pytest.raises(ValueError, match=words):
        config.load(Example, [argument])


def test_an_unknown_key_in_the_file_is_an_error_too(tmp_path):
    (tmp_path / "a.toml").write_text("stepz = 7\n")
    with pytest.raises(ValueError, match="--steps"):
        config.load(Example, [str(tmp_path / "a.toml")])


def test_resolved_options_can_be_read_back(tmp_path):
    options = Example(files=("a b", 'c"d'), peak_lr=1e-5, name="x\\y", fast=True)
    (tmp_path / "a.toml").write_text(config.to_toml(options))
    assert config.load(Example, [str(tmp_path / "a.toml")]) == options


def test_help_shows_every_option_with_its_comment(capsys):
    with pytest.raises(SystemExit):
        config.load(Example, ["--help"])
    text = capsys.readouterr().out
    assert "--peak-lr" in text and "learning rate" in text and "skip checks" in text


@dataclass(frozen=True)
class Shared:
    path: str = "here"  # where it is
    size: int = 1  # how large


@dataclass(frozen=True)
class Heir(Shared):
    speed: float = 1.0  # how fast
    RENAMED = {"velocity": "speed"}


def test_shared_options_are_taken_and_shown_after_a_command_s_own():
    assert config.load(Heir, ["--path=there", "--speed=2"]) == Heir(path="there", size=1, speed=2.0)
    text = config.help_text(Heir)
    assert text.index("--speed=1.0\n        how fast") < text.index("--path=here\n        where") < text.index("--size=1")


def test_an_old_name_is_taken_and_says_the_new_one(tmp_path, capsys):
    (tmp_path / "a.toml").write_text("velocity = 3.0\n")
    assert config.load(Heir, [str(tmp_path / "a.toml")]).speed == 3.0
    assert config.load(Heir, ["--velocity=4"]).speed == 4.0
    assert capsys.readouterr().err == "--velocity is now called --speed\n" * 2
    assert "velocity" not in config.to_toml(Heir())


def test_a_base_lies_between_the_file_and_the_command_line(tmp_path):
    (tmp_path / "a.toml").write_text("steps = 7\npeak_lr = 2.0\nfast = true\n")
    options = config.load(Example, [str(tmp_path / "a.toml"), "--steps=3"], base={"steps": 5, "peak_lr": 1.0})
    assert options == Example(steps=3, peak_lr=1.0, fast=True)


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    """Not one of each state of the bar, not one of a bar that is soon done, and none on processes that print nothing."""
    def work(**options):
        with config.progress(total=4, desc="working", unit="file", **options) as bar:
            for i in range(4):
                bar.update()
                bar.set_postfix(loss=i)
        return capsys.readouterr().err.splitlines()

    assert work() == []
    monkeypatch.setattr(config, "LINE_SECONDS", 0.0)
    assert work(shown=False) == []
    lines = work()
    assert len(lines) > 4 and lines[-1].startswith("working: 4 of 4 file, ") and lines[-1].endswith(", loss=3")
    assert list(config.progress(range(3))) == [0, 1, 2] and "3 of 3 it" in capsys.readouterr().err


def test_a_terminal_shows_a_bar(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    list(config.progress(range(3), desc="working"))
    assert "working: 100%" in screen.getvalue() and "\r" in screen.getvalue()


# ---------------------------------------------------------------------------------------------- both forms, lists, files

@dataclass(frozen=True)
class Forms:
    words: tuple[str, ...] = ()  # paths
    data: tuple[str, ...] = ("pocket",)  # more paths
    seed: int = 0  # a number
    out: str = "here"  # a folder
    speed: float = 1.0  # a number with a range
    compile: str = "auto"  # auto | none | blocks
    export: str | None = None  # a file, or - alone
    fast: bool = False  # a switch
    ALONE = {"compile": "blocks", "export": "-"}
    CHOICES = {"compile": ("auto", "none", "blocks")}
    RANGES = {"speed": (config.ABOVE_0, 2), "seed": (-5, 5)}


@pytest.mark.parametrize("line, expected", [
    ("--seed 3 a", Forms(("a",), seed=3)), ("a --seed 3 b --fast c", Forms(("a", "b", "c"), seed=3, fast=True)),
    ("--seed -3 a", Forms(("a",), seed=-3)), ("--seed=-3", Forms(seed=-3)), ("--out -x", Forms(out="-x")),
    ("--fast a", Forms(("a",), fast=True)), ("--fast true", Forms(fast=True)), ("--fast false a", Forms(("a",))),
    ("--compile", Forms(compile="blocks")), ("--compile a", Forms(("a",), compile="blocks")),
    ("--compile none a", Forms(("a",), compile="none")), ("--compile --fast", Forms(compile="blocks", fast=True)),
    ("--export", Forms(export="-")), ("a --export x", Forms(("a",), export="x")), ("--export - a", Forms(("a",), export="-")),
    ("--seed 1 --seed=2", Forms(seed=2)), ("--speed=2", Forms(speed=2.0)), ("--data a,b", Forms(data=("a", "b")))])
def test_a_value_follows_an_equals_sign_or_a_space(line, expected):
    assert config.load(Forms, line.split(), positional="words") == expected


@pytest.mark.parametrize("line, words", [
    ("--seed --fast", "--seed needs a value"), ("--out", "--out needs a value"), ("--seed", "--seed needs a value"),
    ("--speed=0", "--speed=0.0: expected a number above 0 and at most 2$"), ("--seed=6", "a whole number of at least -5"),
    ("--compile=x", "expected one of auto, none, blocks"), ("a.toml b.toml", "second options file"), ("-s 3", "two hyphens")])
def test_what_cannot_be_taken_so_is_refused(line, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text("seed = 1\n")
    with pytest.raises(ValueError, match=words):
        config.load(Forms, line.split(), positional="words")


def test_a_list_that_is_given_twice_says_what_counts(capsys):
    assert config.load(Forms, ["--data=a", "--data=b"]).data == ("b",)
    assert "--data is given more than once: only b counts" in capsys.readouterr().err


def test_a_comma_in_the_name_of_a_path_that_exists_divides_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one, two", "b,c"):
        (tmp_path / name).mkdir()
    for text, expected in {"one, two": ("one, two",), "a,b,c,d": ("a", "b,c", "d"), "x,y": ("x", "y"), "x\\,y,z": ("x,y", "z"),
                           "one, two,b,c": ("one, two", "b,c"), "a,,b": ("a", "b")}.items():
        assert config.load(Forms, [f"--data={text}"]).data == expected
    assert config.load(Forms, ["x,y", "b,c"], positional="words").words == ("x,y", "b,c")  # words are never divided


def test_a_list_in_a_file_holds_exactly_its_items(tmp_path):
    (tmp_path / "a.toml").write_text('data = ["a,b", "c d", "*"]\n')
    options = config.load(Forms, [str(tmp_path / "a.toml")])
    assert options.data == ("a,b", "c d", "*")
    (tmp_path / "b.toml").write_text(config.to_toml(options))
    assert config.load(Forms, [str(tmp_path / "b.toml")]) == options


def test_an_options_file_may_stand_anywhere_and_come_from_any_editor(tmp_path):
    (tmp_path / "a b.toml").write_bytes(b"\xef\xbb\xbfseed = 4\r\nout = \"\xc3\xbcber\"\r\n")  # as Windows writes
    for argv in (["--seed=5", str(tmp_path / "a b.toml"), "w"], ["w", str(tmp_path / "a b.toml"), "--seed", "5"]):
        assert config.load(Forms, argv, positional="words") == Forms(("w",), seed=5, out="über")


def test_a_quoted_pattern_gives_the_files_that_it_matches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.wav", "a.wav", "deep/er/c.wav", "[x].wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert config.load(Forms, ["?.wav", "*.mp3"], positional="words").words == ("a.wav", "b.wav", "*.mp3")
    assert config.load(Forms, ["deep/**/*.wav", "[x].wav"], positional="words").words == ("deep/er/c.wav", "[x].wav")
    assert config.load(Forms, ["--data=?.wav,d"]).data == ("a.wav", "b.wav", "d")


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    assert config.load(Forms, ["--out=~/x", "--data=~/a,b"]) == Forms(out="/somebody/x", data=("/somebody/a", "b"))


@pytest.mark.parametrize("text, words", [
    ("peak_lr = 1e-3\npeak-lr = 2e-3\n", "peak-lr is given twice"), ("steps = 1\nsteps = 2\n", "each key once"),
    ("fast = True\n", "true and false in small letters"), ("name = true\n", "name = true: expected a number, or text in quotes"),
    ('files = ["a", true]\n', "expected a number, or text"), ('files = [["a"]]\n', "expected a number, or text"),
    ("[[train]]\nsteps = 1\n", r"has a section \[train\]")])
def test_a_mistake_in_a_file_is_said_with_its_remedy(text, words, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError, match=f"a.toml.*{words}"):
        config.load(Example, [str(tmp_path / "a.toml")])


def test_a_file_in_another_encoding_is_said(tmp_path):
    (tmp_path / "a.toml").write_text("steps = 7\n", encoding="utf-16")
    with pytest.raises(ValueError, match="a.toml is not text in UTF-8; save it as such"):
        config.load(Example, [str(tmp_path / "a.toml")])


@pytest.mark.parametrize("arguments", [["", "a.wav"], [""], ["--data=,"], ["empty.toml"], ["holed.toml"]])
def test_an_empty_name_in_a_list_is_refused(arguments, tmp_path, monkeypatch):
    """What a shell makes of a variable that is not set would be the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.toml").write_text("data = []\n")
    (tmp_path / "holed.toml").write_text('data = ["a", ""]\n')
    with pytest.raises(ValueError, match="^--data=.* is empty, perhaps by a variable"):
        config.load(Forms, arguments, positional="data")


def test_words_and_the_option_that_takes_them_add_up():
    assert config.load(Example, ["--files=a", "b", "c"], positional="files").files == ("a", "b", "c")


def test_a_space_after_a_comma_is_no_part_of_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / " c").mkdir()
    assert config.load(Forms, ["--data=a, b, c"]).data == ("a", "b", " c")


def test_an_options_file_needs_no_option():
    for arguments in (["--config=a.toml"], ["--config", "a.toml"], ["-c", "a.toml"]):
        with pytest.raises(ValueError, match="an options file is named alone"):
            config.load(Example, arguments)


@dataclass(frozen=True)
class Needy:
    kind: str = "plain"  # plain | warm | hot
    heat: float = 1.0  # of warm and hot ones
    limit: float = 0.0  # of heat
    loud: bool = False  # quiet ones have no volume
    volume: int = 3  # of loud ones
    mark: str | None = None  # on it
    ink: str = "blue"  # of the mark
    NEEDS = {"heat": "kind=warm|hot", "volume": "loud", "ink": "mark kind=plain", "limit": "heat loud=False"}


@pytest.mark.parametrize("line, said", [
    ("--heat=2", "--heat has no effect with --kind=plain"), ("--heat=2 --kind=hot", None), ("--heat=1.0", "--heat"),
    ("--volume=4", "--volume has no effect without --loud"), ("--volume=4 --loud", None), ("--loud", None),
    ("--ink=red", "--ink has no effect without --mark"), ("--ink=red --mark=x --kind=hot", "--ink has no effect with --kind=hot"),
    ("--ink=red --mark=x", None), ("--limit=3 --heat=0 --kind=hot", "--limit has no effect with --heat=0.0"),
    ("--limit=3 --loud", "--limit has no effect with --loud"), ("plain.toml", None),
    ("changed.toml", "--heat has no effect with --kind=plain"), ("changed.toml --kind=warm", None)])
def test_an_option_without_effect_is_said(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.toml").write_text(config.to_toml(Needy()))  # as a run keeps its options, all of them
    (tmp_path / "changed.toml").write_text("heat = 3.0\n")
    config.load(Needy, line.split())
    printed = capsys.readouterr().err
    assert printed.startswith(said) and printed.count("\n") == 1 if said else not printed
    monkeypatch.setenv("RANK", "1")  # one of the processes of torchrun says it
    config.load(Needy, line.split())
    assert not capsys.readouterr().err
