"""A spoken prompt -> its continuation, spoken.

    prompt.wav --units--> <S> units --generate (KV cache)--> more units --vocoder (predicted durations)--> wav

    python sample.py prompt.wav                                  # the pocket models; writes samples/prompt_0.wav
    python sample.py a.wav b.flac --model=runs/pocket/model --num-samples=4 --seed=1 --out=samples
    python sample.py prompt.wav --resynth                        # encode and decode, no language model: what the vocoder can do
    python sample.py prompt.wav --num-samples=3 --page           # also samples/index.html, to hear and to see in a browser

Each file holds the first --prompt-seconds of the prompt, re-spoken by the vocoder, and the continuation in the same voice, faded
out. It is replaced only by the same sampling; any other (model, seed, prompt of the same name, ...) is written beside it:
prompt_0-2.wav.
Defaults follow TWIST's demonstration (3 s of prompt, temperature 0.8, drawn among the 50 likeliest units).
"""
import itertools
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import config
import twist
from corpus.extract import find_audio, tried
from corpus.shards import check_recipe
from hubert_units import TokenizerOptions, load_tokenizer, speech_to_units
from kernels.dtypes import DTYPES, weights_dtype
from kernels.packed import packed
from model import generate
from speech.audio import SAMPLE_RATE, read_wav
from speech.encoder import deduplicate
from speech.spoken import faded, record_of, timed, write_spoken
from vocoder import load_vocoder


@dataclass(frozen=True)
class SampleConfig(TokenizerOptions, twist.SpeechLMOptions):
    prompts: tuple[str, ...] = ()  # audio files, folders of them (searched recursively), or quoted patterns
    vocoder: str = "pocket"  # vocoder: folder or weight file, `pocket`, or a known name (mhubert-base-25hz)
    speaker: str | None = None  # number or name of the voice, where the vocoder has several
    style: str | None = None  # number or name of the speaking style, where the vocoder has several
    out: str = "samples"  # folder for the wav files, named after the prompt
    prompt_seconds: float = 3.0  # how much of the prompt the model hears; 0: all of it, or the end that its window has room for
    max_new_units: int = 150  # longest continuation, in units (the pocket voices speak 15 a second)
    temperature: float = 0.8  # 0 takes the likeliest unit each time
    top_k: int | None = 50  # draw among the k likeliest units only; none: among all
    top_p: float | None = None  # draw among the likeliest units that together reach this probability
    num_samples: int = 1  # continuations per prompt
    seed: int = 0  # the same seed gives the same continuations
    resynth: bool = False  # units of the whole prompt back to speech, without the language model
    continuation_only: bool = False  # also write the continuation without the prompt
    page: str | None = None  # also a page to listen to, index.html: beside (the wavs; --page alone) | inline (all in one file)
    ALONE = {"page": "beside"}
    CHOICES = {"page": ("beside", "inline")}
    RANGES = {"prompt_seconds": (0, 1e6), "max_new_units": (1, config.MOST), "num_samples": (1, 1000), "top_k": (1, config.MOST),
              "top_p": (config.ABOVE_0, 1), "temperature": (0, 1e6)}
    NEEDS = dict.fromkeys(("model", "dtype", "prompt_seconds", "max_new_units", "temperature", "num_samples",
                           "continuation_only"), "resynth=False") | dict.fromkeys(("top_k", "top_p", "seed"),
                                                                                  "resynth=False temperature")


HEARD = 30  # seconds of a prompt that is spoken again whole, from which the tokenizer's doubts are told
SILENT = 0.95  # share of a prompt's frames that sound like silence, from which nothing is said in it
SAMPLING, VOICE = ("model", "dtype", "seed", "temperature", "top_k", "top_p"), ("vocoder", "speaker", "style")  # told in the wavs


def listen(path, encoder, seconds, dedup, notes):
    """Units (T,), runs (T,) of a prompt; notes: gets a sentence if nearly all are silence's, or the tokenizer doubts them."""
    units, runs = speech_to_units(path, encoder, seconds, dedup)
    noise, begin = torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(0)), round((seconds or HEARD) * SAMPLE_RATE)
    silence = torch.cat([encoder.encode(level * noise) for level in (0, 1e-3)])  # as a file can hold it, and as a room has it
    if runs[torch.isin(units, silence.cpu())].sum() > SILENT * runs.sum():
        notes[path] = f"{path}: the tokenizer hears silence in it, or noise, and nothing that could be continued"
    elif encoder.certainty(encoder.features(read_wav(path)[:begin])) < encoder.least_certainty:
        notes[path] = f"{path}: music, perhaps, or another language: the tokenizer cannot follow it, expect babble"
    return units, runs


def fit_window(path, units, runs, options, slm, vocab, vocoder, notes):
    """What the model hears of a prompt: units (T,), runs (T,), and how many new units its window has room for.

    Of a prompt that fills the window these are the last units, so many that all new ones, or half a window of them, have room.
    notes: gets a sentence for each of the two ways in which the user has less than was asked for, of the first such prompt.
    """
    window = slm.config.block_size
    room = window - (vocab.bos is not None)  # for prompt and continuation
    if len(units) >= room:
        kept = room - min(options.max_new_units, room // 2)
        units, runs = units[-kept:], runs[-kept:]
        notes.setdefault("prompt", f"{path} is too long for the model's window of {window} ids: it hears the last "
                                   f"{int(runs.sum()) * vocoder.config.code_hop_size / SAMPLE_RATE:.1f} s (others likewise)")
    room -= len(units)
    if room < options.max_new_units:
        notes.setdefault("window", f"{path}: at most {room} new units, not --max-new-units={options.max_new_units}: "
                                   f"with the prompt they fill the model's window of {window} ids")
    return units, runs, room


def prompt_again(path, units, runs, options, seconds, vocoder):
    """What a page plays beside a continuation: the prompt as it was recorded, and spoken by the vocoder in its own timing."""
    original, total = read_wav(path), int(runs.sum()) * vocoder.config.code_hop_size
    original = original[:round(seconds * SAMPLE_RATE) if seconds else None]
    if len(original) > total + 2 * vocoder.config.code_hop_size:  # the model hears its end alone
        original = original[-total:]
    again = vocoder(units, runs, options.speaker, options.style).cpu()
    return {f"{Path(path).stem}_original": original, f"{Path(path).stem}_respoken": again}


def continue_prompt(path, options, encoder, vocoder, slm, vocab, write=True, heard=None, autocast=nullcontext, notes=None,
                    page=None):
    """Continuations of one prompt, spoken; returns the files and the number of new units.

    write: False where another process writes the same files: the model alone runs. heard: (units, runs) of the prompt, if it was
    encoded before. autocast: what the model, and it alone, runs in. The networks may lie on different devices. notes: see
    fit_window. page: a pages.listening.Page that shows them and the prompt, which is written, too.
    """
    notes = {} if notes is None else notes
    units, runs = heard or listen(path, encoder, options.prompt_seconds, vocab.dedup, notes)
    units, runs, room = fit_window(path, units, runs, options, slm, vocab, vocoder, notes)
    device, hop, stem = slm.wte.weight.device, vocoder.config.code_hop_size, Path(path).stem
    ids = vocab.encode(units, bos=vocab.bos is not None).to(device).repeat(options.num_samples, 1)  # (B, T)
    generator = torch.Generator(device).manual_seed(options.seed)
    with packed(slm), autocast():  # at once where that is done already
        rows = generate(slm, ids, min(options.max_new_units, room), options.temperature, options.top_k, options.top_p,
                        generator, eos=vocab.eos, banned=vocab.banned)
    wavs, said, new_units = {}, [], 0
    for i, row in enumerate(rows.cpu() if write else ()):
        spoken = vocab.decode(row)
        new_units += len(spoken) - len(units)
        said.append(timed(spoken, runs, vocoder, vocab.dedup))
        wavs[f"{stem}_{i}"] = faded(vocoder(*said[-1], options.speaker, options.style).cpu())
        if options.continuation_only:
            wavs[f"{stem}_{i}_continuation"] = wavs[f"{stem}_{i}"][int(runs.sum()) * hop:]
    record = record_of(path, options, (*SAMPLING, *VOICE), itertools.chain(*said))
    if page is None:
        return write_spoken(options.out, wavs, record), new_units
    from evaluation.likelihood import surprisal  # a page alone needs it

    prompt = (units, runs) if vocab.dedup else deduplicate(units)
    wavs |= prompt_again(path, *prompt, options, options.prompt_seconds, vocoder)
    files = write_spoken(options.out, wavs, record)
    shown = [("prompt", f"{stem}_original", *prompt), ("the prompt, spoken again from its units", f"{stem}_respoken", *prompt)]
    shown += [(f"continuation {i + 1}", f"{stem}_{i}", *spoken, len(prompt[0]), surprisal(slm, vocab, *spoken))
              for i, spoken in enumerate(said)]
    where = dict(zip(wavs, files))
    page.add(path, [(label, wavs[name], where[name], units, runs * hop / SAMPLE_RATE, *more)
                    for label, name, units, runs, *more in shown])
    return files, new_units


def hear(paths, encoder, dedup, seconds=SampleConfig.prompt_seconds):
    """Prompts, before a model continues them -> {path: (units, runs)}, and what is wrong with the others, a sentence each."""
    heard, errors = {}, []
    for path in paths:
        try:
            heard[path] = speech_to_units(path, encoder, seconds, dedup)
        except (ValueError, OSError) as error:
            errors.append(config.sentence(error))
    return heard, errors


def load_voice(options, vocab=None, device="cpu"):
    """(UnitEncoder, Vocoder) of options.tokenizer and options.vocoder; vocab: of the speech LM that stands between them.

    Raises: ValueError where their recipes differ.
    """
    device = config.beside(device)
    encoder, vocoder = load_tokenizer(options, vocab and vocab.recipe, device), load_vocoder(options.vocoder)
    but = ("dedup", "precision")  # runs are collapsed as either wants it; what is but heard may be heard with a few other units
    if vocab:
        check_recipe(encoder.recipe, vocab.expected(encoder.recipe), f"--tokenizer={options.tokenizer}, with this speech LM", but)
    if vocoder.recipe:
        check_recipe(vocoder.recipe, encoder.recipe, f"--vocoder={options.vocoder}", but)
    return encoder, vocoder.to(device)


def resynthesize(path, options, encoder, vocoder, notes, page=None):
    units, _ = listen(path, encoder, 0.0, True, notes)
    wav = vocoder(units, None, options.speaker, options.style).cpu()
    record, name = record_of(path, options, VOICE, (units, len(wav))), f"{Path(path).stem}_resynth"
    files = write_spoken(options.out, {name: wav}, record)
    if page is not None:
        timing = vocoder.durations(units).cpu() * vocoder.config.code_hop_size / SAMPLE_RATE
        page.add(path, [("recording", read_wav(path)), ("spoken again from its units", wav, files[0], units, timing)])
    return files, len(units)


def recordings(prompts):
    """Files as they are named, and those in folders; a folder without any stays, and is an error when it is read."""
    found = {prompt: tried(find_audio, [prompt]) if Path(prompt).is_dir() else [prompt] for prompt in prompts}
    return [path for prompt in prompts for path in (found[prompt] if isinstance(found[prompt], list) else [prompt])]


def main(argv=None):
    options = config.load(SampleConfig, argv, positional="prompts")
    if not options.prompts:
        raise ValueError("no prompt given: python sample.py prompt.wav")
    device, vocab = config.choose_device(options.device), None
    if not options.resynth:
        dtype, why = weights_dtype(options.dtype, device, twist.count_parameters(options.model))
        slm, vocab = twist.load_speech_lm(options.model, DTYPES[dtype], device)
        options = replace(options, dtype=dtype)
        print(why)
    encoder, vocoder = load_voice(options, vocab, device)
    vocoder.voice(options.speaker, options.style)  # a voice that does not exist is an error before the work begins
    prompts = recordings(options.prompts)
    files, units, failed, notes, begin = [], 0, [], {}, time.perf_counter()
    page = None
    if options.page:
        from pages import listening  # nothing else needs it

        page = listening.Page(options.out, options.page)
    with packed(encoder), nullcontext() if options.resynth else packed(slm):
        for path in config.progress(prompts, desc="speaking", unit="prompt"):
            try:
                written, count = (resynthesize(path, options, encoder, vocoder, notes, page) if options.resynth else
                                  continue_prompt(path, options, encoder, vocoder, slm, vocab, notes=notes, page=page))
            except (ValueError, OSError, torch.OutOfMemoryError) as error:  # the other prompts still get their continuations
                failed.append(config.sentence(error))
                print(f"sample.py: error: {failed[-1]}", file=sys.stderr)
                continue
            files, units = files + written, units + count
    seconds = time.perf_counter() - begin
    print("".join(f"{sentence}\n" for sentence in notes.values()), end="")
    if files:
        print(f"{units} units in {seconds:.1f} s, {units / seconds:.0f} units per second (encoding and vocoder included)")
        print("\n".join(map(str, dict.fromkeys(files))))  # the same prompt may have been given twice
    if page:
        told = (*VOICE, "tokenizer") if options.resynth else (*SAMPLING, "prompt_seconds", *VOICE, "tokenizer")
        title = "Prompts, spoken again" if options.resynth else "Prompts, and how the model goes on"
        print(page.write(title, [(name, getattr(options, name)) for name in told], [*notes.values(), *failed]))
    if failed:
        print(f"{len(failed)} of {len(prompts)} prompts could not be spoken")
        raise SystemExit(2)


if __name__ == "__main__":
    config.command(main)
