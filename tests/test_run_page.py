"""The run page: what is drawn is what the log says, whatever the log, the names and the disk are like."""
import csv
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest

import train
from conftest import arguments_of_a_run
from pages import __main__ as command
from pages import charts, runs
from training import logs


@pytest.fixture(scope="module")
def trained(tiny_world, tmp_path_factory):
    """The folder of a real run of twelve steps."""
    folder = tmp_path_factory.mktemp("runs") / "real"
    train.main(["--init=twist", *arguments_of_a_run(tiny_world, folder)])
    return folder


def rows_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_log(folder, rows):
    """A run folder as train.py would leave it. rows: dicts."""
    folder.mkdir(parents=True, exist_ok=True)
    log = logs.Log(folder, 0, True)
    for row in rows:
        log.write(row)
    log.close()
    return folder


# ---------------------------------------------------------------------------------------------- reading a picture back

def number_of(text):
    return float(text.replace("k", "e3").replace("M", "e6"))


def scale(ticks, log):
    """Function place -> number, from the labelled ticks [(number, place)] alone."""
    (first, begin), (last, end) = (pick(ticks, key=lambda tick: tick[1]) for pick in (min, max))
    if log:
        return lambda place: first * (last / first) ** ((place - begin) / (end - begin))
    return lambda place: first + (last - first) * (place - begin) / (end - begin)


def read_back(svg, log_x=False, log_y=False):
    """{label: (points that the path goes through, as numbers by the ticks (N, 2); data-values (N, 2); begins (N,) bool)}."""
    root = ElementTree.fromstring(svg)
    texts = {kind: [text for text in root.iter("text") if text.get("class") == kind] for kind in ("x", "y")}
    across = scale([(number_of(text.text), float(text.get("x"))) for text in texts["x"]], log_x)
    up = scale([(number_of(text.text), float(text.get("y")) - 4) for text in texts["y"]], log_y)
    found = {}
    for path in root.iter("path"):
        if path.get("data-values"):
            steps = re.findall(r"([ML])(\S+) ([^ML]+)", path.get("d"))
            found[path.get("data-label")] = (
                np.array([(across(float(x)), up(float(y))) for _, x, y in steps]),
                np.array(path.get("data-values").split(), float).reshape(-1, 2), np.array([kind == "M" for kind, *_ in steps]))
    return found


def pictures(page):
    """[(title, whether its axes are logarithmic, svg)] of a page."""
    return [(title, kind == "logarithmic", svg) for kind, title, svg in re.findall(
        r'(?:<div class="(\w+)">)?<figure class="drawn"><figcaption>(.*?) <small>.*?(<svg.*?</svg>)', page, re.DOTALL)]


def test_what_the_curves_go_through_is_what_the_log_of_a_training_says(trained):
    page, rows = (trained / "report.html").read_text(), rows_of(trained)
    columns = {"training loss": "loss", "validation loss": "val_loss", "learning rate": "lr", "gradient norm": "grad_norm",
               "speed": "units_per_second"}
    seen = []
    for title, log, svg in pictures(page):
        for label, (through, values, _) in read_back(svg, log, log).items():
            said = [(int(row["step"]), float(row[columns[label]])) for row in rows if row[columns[label]]]
            said = [(step, value) for step, value in said if step or not log]
            np.testing.assert_allclose(values, said, rtol=1e-5)
            found, said = (np.log(points) if log else np.array(points) for points in (through, said))
            # places are rounded to 0.1 of a picture that is 392 across and 222 up, and the losses share theirs
            np.testing.assert_allclose(found[:, 0], said[:, 0], atol=1e-3 * np.ptp(said[:, 0]))
            np.testing.assert_allclose(found[:, 1], said[:, 1], atol=1e-3 * (np.ptp(said[:, 1]) + (title == "Loss")))
            seen.append((title, label, log))
    assert len(seen) == 10 and len(set(seen)) == 10  # five curves, twice


def test_a_run_says_what_it_came_to_and_its_options(trained):
    page, rows = (trained / "report.html").read_text(), rows_of(trained)
    said = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    validations = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert float(said["validation loss"]) == pytest.approx(validations[-1], abs=1e-4)
    assert float(said["lowest validation loss"]) == pytest.approx(min(validations), abs=1e-4)
    assert said["steps"] == "12" and said["peak_lr"] == "0.01" and said["init"] == "twist"
    speeds = [float(row["units_per_second"]) for row in rows[1:]]
    assert float(said["units per second (median)"].replace(",", "")) == np.median(speeds)


def test_no_report_leaves_the_page_out_and_one_that_cannot_be_written_stops_nothing(tiny_world, tmp_path, capsys):
    arguments = ["--init=cold", *arguments_of_a_run(tiny_world, tmp_path / "run"), "--steps=4", "--eval-interval=2"]
    train.main([*arguments, "--no-report"])
    assert (tmp_path / "run/model").exists() and not (tmp_path / "run/report.html").exists()
    assert "report.html" not in capsys.readouterr().out
    (tmp_path / "run/report.html").mkdir()
    train.main([*arguments, "--overwrite"])
    assert capsys.readouterr().out.count("report.html is not kept current: cannot write") == 1
    assert [row["step"] for row in rows_of(tmp_path / "run")] == ["0", "1", "2", "3", "4"]


def test_the_page_is_written_after_validations_at_the_end_and_for_a_hundredth_of_the_time(tmp_path, monkeypatch):
    clock, written = SimpleNamespace(now=100.0), []

    def write(folder):
        written.append(clock.now)
        clock.now += 2.0

    monkeypatch.setattr(runs, "write", write)
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: clock.now))
    log = logs.Log(tmp_path, 0, True, report=runs.Report(tmp_path, print))
    for step in range(1, 61):
        clock.now += 10.0
        log.write({"step": step, "loss": 1.0} | ({"val_loss": 1.0} if step % 3 == 0 else {}))
    log.close()
    assert written == [130.0, 342.0, 554.0, 706.0]  # the first validation 200 seconds after each; and the end


# ---------------------------------------------------------------------------------------------- logs of all kinds

HEAD = ",".join(logs.COLUMNS)
PLAIN = "{0},{0}.5,,0.1,1.0,100,1.0,2.0,3.0,4.0,,0.5"


@pytest.mark.parametrize("text, steps, losses", [
    ("", [], []),
    (f"{HEAD}\n", [], []),
    (f"{HEAD}\n1,1.5,,0", [], []),
    (f"{HEAD}\r\n{PLAIN.format(1)}\r\n{PLAIN.format(2)}\r\n{PLAIN.format(3)[:-3]}", [1, 2], [1.5, 2.5]),
    (f"{HEAD}\n{PLAIN.format(1)}\n{PLAIN.format(2)}", [1], [1.5]),  # whole numbers, but who knows
    (f"{HEAD}\n{PLAIN.format(1)}\n\0\0\0\n{PLAIN.format(2)}\nnonsense\n1,2\n", [1, 2], [1.5, 2.5]),
    (f"{HEAD}\n" + "\n".join(map(PLAIN.format, (1, 2, 3, 4, 2, 5))) + "\n", [1, 2, 5], [1.5, 2.5, 5.5]),
    (f"{HEAD}\n1,nan,,,,,,,,,,\n2,inf,,,,,,,,,,\nnan,1,,,,,,,,,,\n", [1, 2], [math.nan, math.inf]),
    ("step,loss,new_column\n1,2.0,3\n", [1], [2.0]),
    ("loss,lr\n1,2\n", [], []),
], ids=["empty", "head", "cut at once", "cut short", "no end", "zeros and nonsense", "resumed", "not finite", "other columns",
        "no steps"])
def test_any_log_is_read_and_drawn(text, steps, losses, tmp_path):
    (tmp_path / "log.csv").write_bytes(text.encode())
    found = runs.read(tmp_path).curves.get("loss", runs.NOTHING)
    np.testing.assert_array_equal(found[0], steps)
    np.testing.assert_array_equal(found[1], losses)
    page = runs.write(tmp_path).read_text()
    for _, _, svg in pictures(page):
        ElementTree.fromstring(svg)
        assert "nan" not in svg and "inf" not in svg


def test_a_line_breaks_where_the_loss_was_not_finite_and_a_lone_point_is_a_dot():
    y = [5, 4, math.nan, 3, math.inf, math.nan, 2, 1.5] + [1.0] * 40
    svg = charts.curves([("loss", np.arange(1, 49), y)], "step", "nats")
    _, values, begins = read_back(svg)["loss"]
    assert [*values[begins][:, 0]] == [1, 4, 7] and len(values) == 45
    dots = [path.get("d") for path in ElementTree.fromstring(svg).iter("path") if "dot" in path.get("class")]
    assert dots[0].count("M") == 1  # the third step alone: 45 points are too many to mark each


def test_thinning_keeps_the_lowest_and_the_highest_of_every_column():
    generator = np.random.default_rng(0)
    x, y = np.arange(1, 20_001), generator.normal(size=20_000)
    y[[137, 15_000]] = 50, -70
    y[4_000:6_000] = math.nan
    for log in (False, True):
        svg = charts.curves([("loss", x, y)], "step", "nats", log_x=log)
        places = [float(place) for place in re.findall(r"[ML](\S+) ", re.search(r'data-values.*? d="([^"]*)"', svg)[1])]
        values = read_back(svg, log_x=log)["loss"][1]
        assert {50, -70} <= set(values[:, 1])
        where = charts.LEFT + (charts.RIGHT - charts.LEFT) * (
            np.log(x) / np.log(20_000) if log else (x - 1) / 19_999)
        wanted = set()
        for column in range(charts.LEFT, charts.RIGHT + 1):
            inside = (where.astype(int) == column) & np.isfinite(y)
            wanted |= {float(f"{y[inside].min():.6g}"), float(f"{y[inside].max():.6g}")} if inside.any() else set()
        assert set(values[:, 1]) == wanted
        assert max(np.bincount(np.array(places).astype(int))) <= 3  # two; rounding may move one
        assert read_back(svg, log_x=log)["loss"][2].sum() == 2  # the gap


def test_a_log_of_any_length_makes_a_small_page(tmp_path):
    steps = np.arange(1, 30_001)
    noise = np.random.default_rng(0).normal(1, 0.1, (30_000, 4))
    text = "".join(f"{step},{a},{b if step % 10 == 0 else ''},{c},{d},100.0\n" for step, (a, b, c, d) in zip(steps, noise))
    (tmp_path / "log.csv").write_text(f"step,loss,val_loss,lr,grad_norm,units_per_second\n{text}")
    assert runs.write(tmp_path).stat().st_size < 500_000


# ---------------------------------------------------------------------------------------------- axes and bars

@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_round_few_and_inside(log):
    generator = np.random.default_rng(1)
    for _ in range(300):
        low = generator.uniform(-6, 6) if log else generator.normal() * 10 ** generator.uniform(-6, 6)
        high = low + 10 ** (generator.uniform(-3, 1.2) if log else generator.uniform(-6, 6))
        found = charts.ticks(low, high, log)
        assert 2 <= len(found) <= charts.MOST_TICKS + 1
        inside = [math.log10(tick) for tick in found] if log else found
        assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in inside)
        steps = np.diff(found)
        if not log:
            digit = steps[0] / 10.0 ** round(math.floor(math.log10(steps[0]) + 1e-3))
            assert np.ptp(steps) < 1e-3 * steps[0] and round(digit, 2) in (1, 2, 5)


@pytest.mark.parametrize("value, text", [(0.002, "0.002"), (5e-5, "5e-5"), (12_500, "12.5k"), (3e6, "3M"), (0, "0"),
                                         (-0.3, "-0.3"), (9000, "9000"), (1e12, "1e12")])
def test_numbers_are_written_short(value, text):
    assert charts.number(value) == text


def test_bars_are_as_high_as_their_values_and_labelled_where_there_is_room():
    counts = np.random.default_rng(0).integers(1, 1000, 500).tolist()
    root = ElementTree.fromstring(charts.bars(list(enumerate(counts)), "unit", "times"))
    heights = np.array([float(rect.get("height")) for rect in root.iter("rect")])
    np.testing.assert_allclose(heights, np.array(counts) / max(counts) * (charts.BOTTOM - charts.TOP), atol=0.051)
    assert [rect.find("title").text for rect in root.iter("rect")][7] == f"7: {counts[7]}"
    assert 5 <= len([text for text in root.iter("text") if text.get("class") == "x"]) <= 30
    pairs = ElementTree.fromstring(charts.bars([("<a>", 1, 2), ("b", 3, 0)], "what", "times", names=("one", "<two>")))
    assert [title.text for title in pairs.iter("title")] == ["<a>: 1, one", "<a>: 2, <two>", "b: 3, one", "b: 0, <two>"]
    for rows in ([], [("a", 0)]):
        ElementTree.fromstring(charts.bars(rows, "what", "times"))


def test_neighbouring_curves_differ_by_more_than_colour():
    svg = charts.curves([(f"run {i}", [1, 2], [i, i + 1]) for i in range(16)], "step", "nats")
    styles = [(path.get("class"), path.get("stroke-dasharray")) for path in ElementTree.fromstring(svg).iter("path")
              if path.get("data-label")]
    assert len(set(styles)) == 16
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in zip(styles[:4], styles[1:4]))


# ---------------------------------------------------------------------------------------------- names and addresses

class Elements(HTMLParser):
    """All elements of a page as [(name, attributes)]."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))


EVIL = '"\'><script>alert(1)</script>&amp;'


def test_names_and_options_are_text_and_nothing_leaves_the_machine(tmp_path):
    folders = [write_log(tmp_path / name, [{"step": step, "loss": 3 - step, "val_loss": 2.0} for step in (0, 1, 2)])
               for name in ("<b>x", "y&y")]
    for folder in folders:
        (folder / "config.toml").write_text(f"lm = '''{EVIL}{folder.name}'''\nsteps = 'many'\n")
        for step in (1, 2, 9):
            (folder / f"samples/step_{step:06d}").mkdir(parents=True)
            (folder / f"samples/step_{step:06d}/<img src=x> #100% ü.wav").write_bytes(b"")
    for page in (runs.write(folders[0]), runs.write(folders[0], tmp_path / "elsewhere/page.html"), runs.compare(folders)):
        text = page.read_text()
        assert "http" not in text.replace("http-equiv", "")
        assert "//" not in re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)
        elements = Elements(text).found
        assert [name for name, _ in elements if name in ("b", "img", "link", "iframe")] == []
        assert [attributes.get("id") for name, attributes in elements if name == "script"] == ["data", None]
        sounds = [unquote(attributes["src"]) for name, attributes in elements if name == "audio"]
        assert all((page.parent / sound).is_file() for sound in sounds)
        assert [re.search(r"step_(\d+)", sound)[1] for sound in sounds] == ["000002", "000001"] * (page.name != "compared.html")
        assert EVIL not in text and "<b>x" not in text and "&lt;b&gt;x" in text


# ---------------------------------------------------------------------------------------------- side by side

def test_runs_side_by_side_show_their_difference_at_equal_steps(tmp_path, capsys):
    first = {step: 3 - 0.01 * step for step in range(0, 101, 5)}
    other = {step: first[step] + 0.002 * (step - 40) for step in range(0, 101, 10)}
    other[33] = 1.0
    for name, losses, tokens in (("a", first, 64), ("b", other, 128)):
        write_log(tmp_path / name, [{"step": step, "loss": loss, "val_loss": loss + 1, "units_per_second": tokens}
                                    for step, loss in sorted(losses.items())])
        (tmp_path / name / "config.toml").write_text(f'out = "{name}"\ntokens_per_step = {tokens}\nseed = 3\ndata = ["pocket"]\n')
    command.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "compared.html")
    page = (tmp_path / "compared.html").read_text()
    titles = {(title, log): svg for title, log, svg in pictures(page)}
    wanted = [(step, 0.002 * (step - 40)) for step in range(0, 101, 10)]
    for column in ("Training", "Validation"):
        np.testing.assert_allclose(read_back(titles[f"{column} loss less that of a", False])["b"][1], wanted, atol=1e-6)
        assert {*read_back(titles[f"{column} loss", False])} == {"a", "b"}
        assert f"{column.lower()} loss: a is below b from step 50 on, by 0.1200 at step 100" in page
    options = re.search("Options that differ.*?</section>", page)[0]
    assert re.findall("<tr>(.*?)</tr>", options)[1:] == ["<td>out</td><td>a</td><td>b</td>",
                                                         "<td>tokens_per_step</td><td>64</td><td>128</td>"]
    assert "tokens_per_step differs: at equal steps the runs have seen unequally much" in page
    (tmp_path / "b/config.toml").unlink()
    command.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert (tmp_path / "compared-1.html").read_text() == page  # nothing is lost


@pytest.mark.parametrize("less, said", [
    ([], "a and b have no step in common"), ([0.5, -0.25], "b is below a from step 1 on, by 0.2500 at step 1"),
    ([0.5, 0.25], "a is below b from step 0 on, by 0.2500 at step 1"), ([-1, 0, 0], "a and b are equal from step 1 on")])
def test_which_run_is_below_and_from_where_on(less, said):
    assert runs.verdict("a", "b", np.arange(len(less)), np.array(less, float)) == said


def test_runs_of_one_name_are_called_by_their_paths(tmp_path):
    folders = [write_log(tmp_path / place / "run", [{"step": 1, "loss": 1.0}]) for place in ("one", "two")]
    assert {*read_back(pictures(runs.compare(folders).read_text())[2][2], True, True)} <= {*map(str, folders)}


@pytest.mark.parametrize("arguments, said", [
    ([], "no run given"), (["nowhere"], "nowhere: no log.csv is there"), (["a", "./a"], "a run is given twice"),
    (["a", "--out=."], "--out=. is a folder")])
def test_what_the_command_refuses(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "a", [{"step": 1, "loss": 1.0}])
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        command.main(arguments)
