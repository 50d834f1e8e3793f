"""The pages in a real browser, headless: players load, keys work, nothing leaves the machine. Skipped without a Chromium."""
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from test_listening_page import UGLY

import eval as evaluate
import hubert_units
import pages.__main__ as pages
import sample
import train
from conftest import arguments_of_a_run
from speech.audio import write_wav

PROMPT = Path(__file__).parent.parent / "pocket/prompt.wav"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")]
LOADED = "[...document.querySelectorAll('audio')].every(audio => audio.readyState > 0)"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def quiet(page):
    """Nothing was fetched but what lies on the disk, and nothing went wrong."""
    assert page.complaints() == []
    return [address for address in page.addresses() if not address.startswith(("file:///", "data:", "blob:"))] == []


@pytest.fixture(scope="module", params=["beside", "inline"])
def listening_page(request, tmp_path_factory):
    """Of a prompt with an ugly name, two continuations."""
    out = tmp_path_factory.mktemp("listening page#1")
    shutil.copy(PROMPT, out / UGLY)
    sample.main([str(out / UGLY), f"--out={out}", "--num-samples=2", "--max-new-units=40", f"--page={request.param}"])
    return out / "index.html"


def test_players_load_and_play(browser, listening_page):
    page = browser.open(listening_page)
    page.wait(LOADED)
    durations = page.value("[...document.querySelectorAll('audio')].map(audio => audio.duration)")
    assert len(durations) == 4 and all(2 < seconds < 10 for seconds in durations)
    page.value("document.querySelectorAll('audio')[2].play()")
    page.wait("document.querySelectorAll('audio')[2].currentTime > 0.2")
    page.value("document.querySelectorAll('audio')[3].play()")  # one at a time
    page.wait("document.querySelectorAll('audio')[2].paused && !document.querySelectorAll('audio')[3].paused")
    assert quiet(page)


def test_the_page_in_the_repository_plays(browser):
    page = browser.open(PROMPT.parent.parent / "docs/listen/index.html")
    page.wait(LOADED)
    assert page.value("document.querySelectorAll('audio').length") == 8 and quiet(page)


def test_a_unit_is_heard_when_it_is_clicked_and_keys_step_through_them(browser, listening_page):
    page = browser.open(listening_page)
    page.wait(LOADED)
    audio, said = "document.querySelectorAll('audio')[2]", "document.querySelectorAll('output')[2].textContent"
    boxes = "document.querySelectorAll('figure')[2].querySelectorAll('rect')"
    titles = page.value(f"[...{boxes}].map(box => box.querySelector('title').textContent)")
    ends = page.value(f"[...{boxes}].map(box => (box.x.baseVal.value + box.width.baseVal.value) / 100)")
    page.click("figure:nth-of-type(3) rect:nth-of-type(7)")
    assert page.wait(said) == titles[6]
    page.wait(f"{audio}.paused && {audio}.currentTime > 0")
    assert ends[6] <= page.value(f"{audio}.currentTime") < ends[6] + 0.3  # it stops where the unit ends
    for key, index in (("ArrowRight", 7), ("ArrowRight", 8), ("ArrowLeft", 7), ("End", len(titles) - 1), ("Home", 0)):
        page.press(key)
        page.wait(f"{said} === {json.dumps(titles[index])}")
        assert page.value(f"{boxes}[{index}].classList.contains('now')")
    page.press(" ")  # goes on from there, and stops
    page.wait(f"{audio}.currentTime > {ends[3]}")
    page.press(" ")
    page.wait(f"{audio}.paused")
    assert quiet(page)


def test_a_name_that_is_a_script_stays_a_name(browser, listening_page):
    page = browser.open(listening_page)
    page.wait(LOADED)
    assert page.value("document.querySelector('h2').textContent").endswith(UGLY)
    assert page.value("document.querySelectorAll('img, script').length") == 2 and quiet(page)  # data and the page's own


@pytest.mark.parametrize("width", [360, 1000])
def test_a_page_fits_the_screen_in_light_and_dark(browser, listening_page, width):
    colours = set()
    for dark in (False, True):
        page = browser.open(listening_page, width=width, dark=dark)
        page.wait(LOADED)
        assert page.value("document.documentElement.scrollWidth") <= width  # wide pictures scroll inside their frames
        colours.add(page.value("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


def test_the_policy_of_a_page_forbids_other_scripts_and_addresses(browser, listening_page):
    page = browser.open(listening_page)
    far = "http://127.0.0.1:9/"
    page.value(f"document.body.insertAdjacentHTML('beforeend', '<img src={far} onerror=\"window.harm=1\">')")
    page.value(f"fetch('{far}').catch(() => 0)")
    page.value("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.harm = 1'}))")
    assert page.value("window.harm === undefined") and len(page.complaints()) >= 3
    assert all(address.startswith(("file:///", "data:", "blob:")) for address in page.addresses())


def test_curves_draw_from_a_real_log_and_tell_their_values(browser, tiny_world, tmp_path):
    for name, start in (("<b>twist", "twist"), ("cold", "cold")):
        train.main([f"--init={start}", *arguments_of_a_run(tiny_world, tmp_path / name)])
    pages.main([str(tmp_path / "<b>twist"), str(tmp_path / "cold"), f"--out={tmp_path / 'both.html'}"])
    for path, least in ((tmp_path / "<b>twist/report.html", 1), (tmp_path / "both.html", 2)):
        page = browser.open(path)
        curves = page.value("[...document.querySelectorAll('svg.chart path[data-values]')].filter(path => path.checkVisibility())"
                            ".map(path => [path.getTotalLength(), path.getBBox().width])")
        assert len(curves) >= 5 and all(length > 100 and width > 100 for length, width in curves[:least])
        drawn = "[...document.querySelectorAll('svg.chart')].find(svg => svg.checkVisibility())"
        page.value(f"{drawn}.focus()")
        page.press("End")
        values = page.value(f"{drawn}.querySelector('path[data-values]').dataset.values").split()
        said = page.wait(f"{drawn}.closest('figure').querySelector('output').textContent")
        assert f"{float(values[-1]):.4g}"[:5] in said and quiet(page)
        page.press("Home")
        page.wait(f"{drawn}.closest('figure').querySelector('output').textContent !== {json.dumps(said)}")
        assert page.value("document.querySelectorAll('b').length") == 0  # the name of the run is no element
        assert page.value("document.documentElement.scrollWidth") <= 1000


def test_a_place_where_a_unit_occurs_is_heard_and_ends(browser, tmp_path):
    shutil.copy(PROMPT, tmp_path / UGLY)
    hubert_units.main([str(tmp_path / UGLY), f"--out={tmp_path / 'units'}"])
    hubert_units.main([f"--inspect={tmp_path / 'units'}", "--page"])
    page = browser.open(tmp_path / "units/index.html")
    place = "document.querySelector('.units audio')"
    begin, end = page.value(f"{place}.src.split('#t=')[1].split(',').map(Number)")
    for _ in range(2):  # the second time, too
        page.value(f"{place}.play()")
        page.wait(f"{place}.paused && {place}.currentTime > {begin}")
        assert min(end, page.value(f"{place}.duration")) <= page.value(f"{place}.currentTime") < end + 0.3
    page.value("document.querySelector('figure.clip svg').focus()")
    page.press("ArrowRight")
    assert page.wait("document.querySelector('figure.clip output').textContent").startswith("unit ")
    assert page.value("document.querySelectorAll('.units img').length") > 20 and quiet(page)


@pytest.mark.parametrize("inline", [False, True])
def test_a_rating_is_stored_comes_back_and_is_counted(browser, inline, tmp_path):
    for system in ("twist", 'co"ld'):
        for i in range(4):
            (tmp_path / system).mkdir(exist_ok=True)
            noise = torch.randn(3200, generator=torch.Generator().manual_seed(i))
            write_wav(tmp_path / system / f"<script>{i}.wav", 0.1 * noise)
    systems = ",".join(f"{system}={tmp_path / system}" for system in ("twist", 'co"ld'))
    out = tmp_path / "ratings"
    pages.main(["rate", f"--systems={systems}", f"--out={out}", "--raters=2", "--per-rater=3", "--practice=1", "--catch=1",
                f"--seed={int(inline)}", *["--inline"] * inline])  # a browser keeps the answers of each study
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(out))
    assert "twist" not in (out / "rater_01.html").read_text()
    page = browser.open(out / "rater_01.html", width=400)
    page.click("#start")
    count = page.value("JSON.parse(document.getElementById('data').textContent).items.length")
    for number in range(count):
        page.press("5")  # before it was heard: no answer
        assert page.value("document.getElementById('next').disabled")
        page.press(" ")
        page.wait("!document.getElementById('answer-4').disabled")
        asked = page.value("document.getElementById('ask').hidden ? null : document.getElementById('ask').textContent")
        page.press(next((key for key in "345" if asked and f"answer {key}" in asked), "4"))
        page.wait("!document.getElementById('next').disabled")
        if number == 2:  # the browser is closed and opened again
            page.go(out / "rater_01.html")
            page.click("#start")
            assert page.value("document.getElementById('answer-4').checked") or asked
        page.press("Enter")
    page.wait("!document.getElementById('finish').hidden")
    page.click("#download")
    while not (out / "rater_01.json").exists():
        time.sleep(0.05)
    answers = json.loads((out / "rater_01.json").read_text())
    assert answers["complete"] and len(answers["answers"]) == count and quiet(page)
    assert page.value("document.documentElement.scrollWidth") <= 400
    evaluate.main(["--task=mmos", f"--data={out}", f"--out={tmp_path / 'eval'}"])
    rows = json.loads((tmp_path / "eval/result.json").read_text())["sections"][0]["rows"]
    found = {row["system"]: row["value"] for row in rows if row["measure"].startswith("opinion")}
    assert found == {"twist": 4.0, 'co"ld': 4.0}
