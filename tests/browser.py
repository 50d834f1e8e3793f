"""A headless Chromium for tests, driven over a pair of pipes by its DevTools protocol: nothing to install but the browser.

    with Browser() as browser:
        page = browser.open(path)
        page.wait("document.querySelector('audio').readyState > 0")

Protocol: JSON messages that end in a zero byte, commands on the browser's file descriptor 3, answers and events on 4.
"""
import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60  # seconds for an answer, on a machine that does other things, too
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--mute-audio", "--autoplay-policy=no-user-gesture-required",
         "--hide-scrollbars", "--no-first-run", "--disable-background-networking", "--remote-debugging-pipe")
KEYS = {"Enter": ("Enter", "\r"), " ": ("Space", " ")}  # those that type something: code and text


class Browser:
    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self.write = os.pipe()
        self.read, answers = os.pipe()
        line = f'exec "$@" 3<&{commands} 4>&{answers}'
        self.process = subprocess.Popen(["bash", "-c", line, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={self.profile.name}"],
                                        pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.numbers, self.rest, self.events = itertools.count(1), b"", []
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)
        self.profile.cleanup()

    def receive(self, until):
        """The next message, None after the moment `until`."""
        while b"\0" not in self.rest:
            if not select.select([self.read], [], [], max(0, until - time.monotonic()))[0]:
                return None
            if not (more := os.read(self.read, 2**20)):
                raise RuntimeError("Chromium ended")
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, session=None, **arguments):
        number, until = next(self.numbers), time.monotonic() + PATIENCE
        message = {"id": number, "method": method, "params": arguments} | ({"sessionId": session} if session else {})
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while message := self.receive(until):
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]
            self.events.append(message)
        raise TimeoutError(f"no answer to {method}")

    def open(self, path, width=1000, height=900, dark=False):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        page.go(path)
        return page


class Page:
    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def call(self, method, **arguments):
        return self.browser.call(method, self.session, **arguments)

    def go(self, path):
        self.value("window.left = true")
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        self.wait("!window.left && document.readyState === 'complete'")

    def value(self, expression):
        """What a JavaScript expression gives, promises awaited, as if the user had asked for it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression):
        """Until an expression holds; its value."""
        until = time.monotonic() + PATIENCE
        while not (value := self.value(expression)):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def press(self, key):
        code, text = KEYS.get(key, (key, key if len(key) == 1 else ""))
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, **({"text": text} if kind == "keyDown" else {}))

    def click(self, selector):
        """A real click in the middle of an element."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.value(f"{element}.getBoundingClientRect().toJSON()")
        place = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def messages(self, method):
        """Parameters of all events of that name so far."""
        self.value("0")  # what was on its way has arrived
        own = [event for event in self.browser.events if event.get("sessionId") == self.session]
        return [event["params"] for event in own if event["method"] == method]

    def addresses(self):
        """Of everything that the page asked for and its policy did not forbid."""
        failed = self.messages("Network.loadingFailed")
        forbidden = {event["requestId"] for event in failed if event.get("blockedReason") == "csp"}
        sent = self.messages("Network.requestWillBeSent")
        return [event["request"]["url"] for event in sent if event["requestId"] not in forbidden]

    def complaints(self):
        """Errors of scripts, and what the page's policy forbade."""
        return [*self.messages("Runtime.exceptionThrown"),
                *(event["entry"]["text"] for event in self.messages("Log.entryAdded") if event["entry"]["level"] == "error")]

    def shot(self, path, height=None):
        """A picture of the page, its whole length unless a height is given."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"]
        Path(path).write_bytes(base64.b64decode(data))
