"""The listening page: prompts side by side with what was made of them, to play, to look at, and to step through.

    python sample.py pocket/prompt.wav --num-samples=3 --page            # samples/index.html, beside the wavs
    python sample.py pocket/prompt.wav --page=inline                     # everything in one file, which can be sent
    python vocoder.py units.jsonl --page;  python eval.py --task=generation --page

    a prompt's clips --Page.add--> figures --Page.write--> index.html

Players and pictures need no script; clicking a unit, arrow keys and the running cursor do (listening.js).
"""
from pathlib import Path

from pages import html
from pages.clips import Clip, figure

MOST = 200  # prompts on a page: more would take a browser long to open
KEYS = ("Click a unit, or focus a picture and press <kbd>←</kbd> <kbd>→</kbd>, to hear it alone; <kbd>Enter</kbd> repeats it, "
        "<kbd>Space</kbd> plays on from there.")


class Page:
    """What is added is drawn at once, so that sound is not held. inline: `inline` has it inside the page."""

    def __init__(self, folder, inline):
        self.folder, self.inline, self.sections, self.left_out = Path(folder), inline == "inline", [], 0

    def add(self, name, clips):
        """A prompt's name and its clips, each the arguments of a Clip."""
        if len(self.sections) == MOST:
            self.left_out += 1
            return
        figures = (figure(Clip(*clip), self.folder, name, self.inline) for clip in clips)
        self.sections.append("\n".join([f'<section class="clips"><h2>{html.escape(name)}</h2>', *figures, "</section>"]))

    def write(self, title, facts=(), notes=()):
        """FOLDER/index.html; returns its path. facts: (name, value) pairs; notes: sentences, such as what was skipped.

        Another page that stands there is kept as index-1.html and so on.
        """
        notes = [*notes, *[f"{self.left_out} more are not shown"] * bool(self.left_out)]
        said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        head = [html.facts(facts), f'<ul class="notes">{said}</ul>' if said else "", f'<p class="keys">{KEYS}</p>']
        path = self.folder / "index.html"
        html.write(path, html.document(title, "\n".join([*head, *self.sections]), "listening"))
        return path
