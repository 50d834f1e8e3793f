"""The pages in a real browser, headless: players load, keys work, nothing leaves the machine. Skipped without a Chromium."""
import json
import shutil
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from test_listening_page import UGLY

import sample

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
