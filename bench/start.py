"""From typing a command to the first audible sample, and its parts.

    python -m bench start

Each row is the median of fresh processes: Python alone, `import torch`, what sample.py imports, `sample.py --help`, and
`sample.py pocket/prompt.wav` with its parts, which a process times that takes the same steps. Files are in the system's cache
after the first process, which `first_s` shows; a disk that is cold adds the reading of PyTorch's 0.5 GB.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time

STEPS = """
import json, time
parts, begin = {}, time.perf_counter()
def done(part):
    global begin
    parts[part], begin = time.perf_counter() - begin, time.perf_counter()
import torch; done("import torch")
import sample, twist; done("import the rest")
options = sample.SampleConfig(out=OUT)
slm, vocab = twist.load_speech_lm(); done("load the speech LM")
encoder, vocoder = sample.load_voice(options, vocab); done("load tokenizer and vocoder")
with sample.packed(encoder), sample.packed(slm):
    done("pack weights")
    heard = sample.listen("pocket/prompt.wav", encoder, options.prompt_seconds, vocab.dedup, {}); done("encode the prompt")
    sample.continue_prompt("pocket/prompt.wav", options, encoder, vocoder, slm, vocab, heard=heard)
    done("draw 150 units, speak, write")
print(json.dumps(parts))
"""


def run(arguments):
    begin = time.perf_counter()
    said = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
    return time.perf_counter() - begin, said


def bench_start(options):
    """Yields rows of (what, seconds, those of the first process, spread)."""
    with tempfile.TemporaryDirectory() as out:
        whole = {"python": ["-c", "pass"], "import torch": ["-c", "import torch"], "import sample": ["-c", "import sample"],
                 "sample.py --help": ["sample.py", "--help"], "sample.py pocket/prompt.wav": ["sample.py", "pocket/prompt.wav"]}
        for what, arguments in whole.items():
            own = [f"--out={out}"] if len(arguments) == 2 and arguments[1].endswith(".wav") else []
            seconds = [run([*arguments, *own])[0] for _ in range(options.repeats)]
            yield row(what, seconds)
        parts = [json.loads(run(["-c", f"OUT = {out!r}" + STEPS])[1]) for _ in range(options.repeats)]
        for part in parts[0]:
            yield row(f"  {part}", [found[part] for found in parts])


def row(what, seconds):
    ordered = sorted(seconds)
    return {"what": what, "s": round(statistics.median(seconds), 3), "first_s": round(seconds[0], 3),
            "spread": round((ordered[-1] - ordered[0]) / statistics.median(seconds), 2)}
