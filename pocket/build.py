"""Rebuild the whole pocket world from nothing, with one command.

    stories --> text LM ---------------------------------------------+
       |                                                             v
       +--espeak-ng--> speech --> HuBERT + k-means --> unit shards --> speech LM
                        ^   |          |                  |
    recordings --> people   |          +------------------+--> vocoder: the person who says most, and the synthesiser
                        |   v          +--held-out voices--> benchmarks
                        teacher

    apt install espeak-ng wamerican; pip install -e .[factory]
    python -m pocket.build --recordings=FOLDER                     # a day on two CPU cores
    python -m pocket.build                                         # without people: it hears and speaks as the synthesiser does
    python -m pocket.build --only=vocoder                          # one stage again

Without the extra `factory` there is no teacher, and HuBERT learns without labels (docs/own_voice.md).

Every stage is a command of this repository, printed before it runs. A stage whose result exists is skipped (delete the
result to make it again); one that was interrupted goes on from its last checkpoint. Work files go to build/, results to
pocket/.
"""
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import config
import twist
from checkpoints import files
from kernels.dtypes import hardware_bfloat16, training_dtype
from pocket.recordings import QUIET_VOICE, TABLE
from pocket.speech import TRAIN_VOICES, Espeak
from pocket.teacher import PACKAGES
from speech.audio import SAMPLE_RATE, read_wav, write_wav

ROOT = Path(__file__).parent.parent
BUILD, POCKET = ROOT / "build", ROOT / "pocket"
TEACHER, TARGETS = BUILD / "units/teacher", ("k200", "k100", "k500", "phones")  # the first makes the tokenizer
# A byte-level LLaMA: 2.7 M parameters, 258 rows (pad, begin/end, 256 bytes). Only the shape; train.py fills it. It is trained
# on 256 positions and has learnt no others: rotary positions beyond those seen give nonsense.
TEXT_LM_SHAPE = {
    "model_type": "llama", "vocab_size": 258, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 3, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "initializer_range": 0.05}
# glibc: keep large blocks instead of returning them to the system at every free; saves page faults
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
# Seeds of the stories: no story is both read by the text LM and spoken, or both trained on and validated on.
TEXT, TEXT_VAL, SPOKEN, SPOKEN_VAL, SPOKEN_VOCODER, PROMPT = 0, 5_000_000, 10_000_000, 20_000_000, 30_000_000, 40_000_000


@dataclass(frozen=True)
class BuildConfig:
    only: str | None = None  # one stage: text | text_lm | speech | people | teacher | hubert | units | vocoder | prompt |
    #                          speech_lm | benchmarks
    recordings: str = ""  # folder of recordings of people; empty: none
    voice: str = ""  # of the people, who speaks; empty: whoever says most
    stories: int = 60_000  # stories that the text LM reads (28 MB)
    spoken: int = 1300  # stories spoken for training (10.6 hours)
    text_steps: int = 4000  # updates of the text LM
    hubert_steps: int = 3000  # updates of HuBERT's first iteration without labels; the second takes a sixth more
    taught_steps: int = 24_000  # updates of HuBERT with a teacher
    vocoder_minutes: float = 60.0  # time budget of the vocoder
    speech_steps: int = 600  # updates of the bundled speech LM
    questions: int = 300  # of each benchmark
    dtype: str = "auto"  # of matrix products while training: auto | float32 | bfloat16; auto as in train.py
    threads: int = 0  # CPU threads of each stage; 0: PyTorch's choice
    RANGES = {name: (1, config.MOST) for name in (
        "stories", "spoken", "text_steps", "hubert_steps", "taught_steps", "speech_steps", "questions")} | {
        "vocoder_minutes": (config.ABOVE_0, config.LARGEST), "threads": (0, 1024)}


def run(*arguments):
    """One command of this repository, in its own process; its failure ends the build."""
    print("$ python", " ".join(map(str, arguments)), flush=True)
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True, env=os.environ | KEEP_MEMORY)


def store_half(source, target):
    """A speech or text LM folder at half precision, as most published weights are stored."""
    model, vocab = twist.load_speech_lm(source)
    twist.save_speech_lm(model, vocab, target, dtype=torch.float16)


def text(options):
    run("-m", "pocket.text", "--out=build/text/val", "--count=400", f"--first-story={TEXT_VAL}")
    run("-m", "pocket.text", "--out=build/text/train", f"--count={options.stories}", f"--first-story={TEXT}")


def train(options, out, steps, *more):
    """train.py, from its last state if it has one."""
    resume = ["--init=resume"] if (BUILD / out / "config.toml").exists() else []
    run("train.py", *more, *resume, f"--out=build/{out}", f"--steps={steps}", f"--dtype={options.dtype}",
        f"--threads={options.threads}", "--block-size=256", "--save-interval=250", "--eval-interval=250", "--log-interval=10")


def text_lm(options):
    files.write_json(BUILD / "text_lm_shape/config.json", TEXT_LM_SHAPE)
    train(options, "text_lm_run", options.text_steps, "--init=cold", "--lm=build/text_lm_shape", "--data=build/text/train",
          "--val-data=build/text/val", "--peak-lr=2e-3", "--warmup=100", "--tokens-per-step=4096")
    store_half(BUILD / "text_lm_run/model", POCKET / "text_lm")


def speech(options):
    for name, count, first in (("train", options.spoken, SPOKEN), ("val", max(9, options.spoken * 12 // 130), SPOKEN_VAL),
                               ("vocoder", max(20, options.spoken * 30 // 130), SPOKEN_VOCODER)):
        if not (BUILD / "speech" / name / "phones.tsv").exists():
            run("-m", "pocket.speech", f"--out=build/speech/{name}", f"--voices={name}", f"--count={count}",
                f"--first-story={first}")


def people(options):
    if options.recordings:
        run("-m", "pocket.people", f"--recordings={options.recordings}")
    else:
        print("people: no --recordings; the synthesiser is all that is heard")


def folders(part):
    """Where recordings lie: of people, if there are any, and of the synthesiser."""
    return ",".join(f"build/{kind}/{part}" for kind in ("people", "speech") if (BUILD / kind / part / TABLE).exists())


def teacher(options):
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        print(f"teacher: without {' and '.join(missing)} (pip install -e .[factory]) HuBERT learns without labels")
    else:
        run("-m", "pocket.teacher", f"--speech={folders('train')}", f"--threads={options.threads}")


def hubert(options):
    targets = [f"build/units/teacher/{name}" for name in TARGETS if (TEACHER / name / "meta.json").exists()]
    if targets:
        how = [f"--targets={','.join(targets)}", f"--steps={options.taught_steps}", "--width=256", "--layers=6",
               "--weight-decay=0.05"]
    else:
        how = [f"--steps-1={options.hubert_steps}", f"--steps-2={options.hubert_steps * 7 // 6}"]
    run("-m", "pocket.train_hubert", f"--speech={folders('train')}", f"--val={folders('val')}", *how,
        f"--dtype={options.dtype}", f"--threads={options.threads}")
    shutil.copytree(BUILD / "hubert", POCKET / "hubert.tmp", ignore=shutil.ignore_patterns(
        "*.pt", "log.csv", ".lock", "kmeans-k500*", "kmeans-phones*"))
    files.replace_folder(POCKET / "hubert.tmp", POCKET / "hubert")


def speaker(options):
    """Who of the people speaks: a folder of their recordings; None: nobody."""
    sizes = {voice.name: sum(path.stat().st_size for path in voice.iterdir())
             for voice in (BUILD / "people/train").glob("*/") if voice.name != QUIET_VOICE}
    if options.voice and options.voice not in sizes:
        raise ValueError(f"--voice={options.voice}: expected one of {', '.join(sorted(sizes)[:20])}")
    return options.voice or max(sizes, key=sizes.get, default=None)


def units(options):
    """Of the stories; of the voices that will speak, with pauses of both kinds."""
    for name, out in (("vocoder", "build/units/vocoder"), ("val", "pocket/units/val"), ("train", "pocket/units/train")):
        run("hubert_units.py", f"build/speech/{name}", f"--out={out}")
    if person := speaker(options):
        run("hubert_units.py", f"build/people/train/{QUIET_VOICE}", f"build/people/train/{person}", "--out=build/units/person")


def vocoder(options):
    person = speaker(options)
    voices = ["--units=build/units/person,build/units/vocoder", f"--speakers={person},espeak"] if person else [
        "--units=build/units/vocoder"]
    run("-m", "pocket.train_vocoder", *voices, "--out=pocket/vocoder", f"--minutes={options.vocoder_minutes}",
        f"--bf16={options.dtype == 'bfloat16'}", f"--threads={options.threads or 2}")


def prompt(options):
    """Spoken beginnings that nothing was trained on: story.wav of a story, prompt.wav by the person who speaks."""
    from pocket.stories import story
    samples, _ = Espeak().say(" ".join(story(PROMPT).split(". ")[:2]) + ".", *TRAIN_VOICES[0])
    write_wav(POCKET / "story.wav", samples)
    said = [read_wav(path) for path in sorted((BUILD / "people/val").glob(f"{speaker(options)}/*.flac"))]
    write_wav(POCKET / "prompt.wav", next((wav for wav in said if 4 * SAMPLE_RATE <= len(wav) <= 6 * SAMPLE_RATE), samples))


def speech_lm(options):
    train(options, "speech_lm_run", options.speech_steps, "--init=twist", "--tokens-per-step=4096", "--warmup=50")
    store_half(BUILD / "speech_lm_run/model", POCKET / "speech_lm")


def benchmarks(options):
    run("-m", "pocket.pairs", f"--first-story={SPOKEN}", f"--spoken={options.spoken}", f"--count={options.questions}")


STAGES = {  # in order; each with the file that shows it is done
    text: BUILD / "text/train/meta.json", text_lm: POCKET / "text_lm/config.json", speech: BUILD / "speech/vocoder/phones.tsv",
    people: BUILD / "people/train/phones.tsv", teacher: TEACHER / "phones/meta.json",
    hubert: POCKET / "hubert/config.json", units: POCKET / "units/train/meta.json", vocoder: POCKET / "vocoder/config.json",
    prompt: POCKET / "prompt.wav", speech_lm: POCKET / "speech_lm/config.json",
    benchmarks: POCKET / "benchmarks/mini-tstorycloze/pairs.csv"}


def main(argv=None):
    options = config.load(BuildConfig, argv)
    dtype, why = training_dtype(options.dtype, hardware_bfloat16("cpu"))
    options = dataclasses.replace(options, dtype=dtype)  # one for all stages
    print(why)
    names = {stage.__name__: stage for stage in STAGES}
    if options.only and options.only not in names:
        raise ValueError(f"--only={options.only}: expected one of {', '.join(names)}")
    for stage, result in STAGES.items():
        if options.only not in (None, stage.__name__):
            continue
        if result.exists():
            print(f"{stage.__name__}: {result.relative_to(ROOT)} exists, skipped")
        else:
            stage(options)


if __name__ == "__main__":
    config.command(main)
