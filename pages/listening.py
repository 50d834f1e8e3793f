"""The listening page: prompts side by side with what was made of them, to play, to look at, and to step through.

    python sample.py pocket/prompt.wav --num-samples=3 --page            # samples/index.html, beside the wavs
    python sample.py pocket/prompt.wav --page=inline                     # everything in one file, which can be sent
    python vocoder.py units.jsonl --page;  python eval.py --task=generation --page

    {prompt: [Clip, ...]} --figure, each--> body --document--> index.html

Players and pictures need no script; clicking a unit, arrow keys and the running cursor do (listening.js).
"""
import itertools
from pathlib import Path

from pages import html
from pages.clips import Clip, figure

__all__ = ["Clip", "write"]
MOST = 200  # prompts on a page: more would take a browser long to open
KEYS = ("Click a unit, or focus a picture and press <kbd>←</kbd> <kbd>→</kbd>, to hear it alone; <kbd>Enter</kbd> repeats it, "
        "<kbd>Space</kbd> plays on from there.")


def body_of(groups, facts, notes, folder, inline):
    """HTML. groups: {name of a prompt: [Clip, ...]}; facts: (name, value) pairs; notes: sentences, such as what was skipped."""
    notes = [*notes, *[f"the first {MOST} of {len(groups)} are shown"] * (len(groups) > MOST)]
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    parts = [html.facts(facts), f'<ul class="notes">{said}</ul>' if said else "", f'<p class="keys">{KEYS}</p>']
    for name, clips in itertools.islice(groups.items(), MOST):
        parts += [f"<section><h2>{html.escape(name)}</h2>", *(figure(clip, folder, name, inline) for clip in clips), "</section>"]
    return "\n".join(parts)


def write(folder, title, groups, facts=(), notes=(), inline=False):
    """folder/index.html; returns its path. Another page that stands there is kept as index-1.html."""
    path = Path(folder) / "index.html"
    html.write(path, html.document(title, body_of(groups, facts, notes, folder, inline), "listening"))
    return path
