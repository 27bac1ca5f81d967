"""The page in a real browser, driven through its DevTools protocol over a pipe: nothing but the standard library."""

import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpctl import report
from dpctl.bench.result import BenchResult

NAMES = ("chromium", "chromium-browser", "google-chrome")
# What a browser says when it has something to complain about.
COMPLAINTS = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed"}
PATIENCE_S = 60.0


class Browser:
    """Headless Chromium with one empty page; `events` are what it has told since."""

    def __init__(self, program: str, profile: Path) -> None:
        asked, answered = os.pipe(), os.pipe()

        def place() -> None:
            # Chromium reads from 3 and writes to 4; whichever of ours already have these numbers move away first.
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (asked[0], answered[1])]
            for number, end in enumerate(ends, 3):
                os.dup2(end, number)

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        self.process = subprocess.Popen(
            [program, *options, f"--user-data-dir={profile}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=place,  # noqa: PLW1509  # what it calls is safe between fork and exec
        )
        os.close(asked[0])
        os.close(answered[1])
        self._to, self._from, self._rest = asked[1], answered[0], b""
        self._number, self._session = 0, None
        self.events: list[dict[str, Any]] = []
        page = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(
            self._to, json.dumps({"id": self._number, "method": method, "params": params} | session).encode() + b"\0"
        )
        while (told := self._read()).get("id") != self._number:
            self.events.append(told)
        assert "result" in told, told
        return told["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._from], [], [], PATIENCE_S)[0], "the browser does not answer"
            more = os.read(self._from, 1 << 16)
            assert more, "the browser has gone"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> None:
        """Load a page to the end."""
        self.ask("Page.navigate", url=address)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """Return what a line of JavaScript gives."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key and let it go."""
        about = {"key": key, "code": key if len(key) > 1 else "Space", "windowsVirtualKeyCode": code}
        self.ask("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **about)

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """Return what the browser has told under these names."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self) -> None:
        """End the browser: it goes when nobody holds the other ends."""
        os.close(self._to)
        os.close(self._from)
        self.process.wait(PATIENCE_S)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Return a browser; without one the test is skipped."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    found = Browser(program, tmp_path / "profile")
    yield found
    found.close()


@pytest.fixture
def opened(browser: Browser, full_result: BenchResult, out: Path) -> Browser:
    """Return the browser with the page of a full result."""
    report.write_report(full_result, out)
    browser.open((out / "report.html").as_uri())
    return browser


def test_the_browser_has_nothing_to_complain_about_and_asks_nobody(opened: Browser, out: Path) -> None:
    assert opened.value("document.querySelectorAll('svg').length") >= 7
    assert opened.told(*COMPLAINTS) == []
    asked = {told["request"]["url"] for told in opened.told("Network.requestWillBeSent")}
    assert {address for address in asked if not address.startswith("data:")} == {(out / "report.html").as_uri()}
    assert opened.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_a_request_and_a_complaint_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/a.png'><script>console.error(1); nothing.here</script>")
    browser.open(page.as_uri())
    asked = {told["request"]["url"] for told in browser.told("Network.requestWillBeSent")}
    assert "http://127.0.0.1:9/a.png" in asked
    assert len(browser.told("Runtime.exceptionThrown")) == len(browser.told("Runtime.consoleAPICalled")) == 1


CUT = "getComputedStyle(document.querySelector('.compare')).getPropertyValue('--cut')"


def test_the_slider_and_its_button_obey_the_keyboard(opened: Browser) -> None:
    assert opened.value(CUT) == "50%"
    opened.value("document.querySelector('.compare input').focus()")
    opened.press("ArrowRight", 39)
    assert opened.value(CUT) == "51%"
    opened.press("Home", 36)
    assert opened.value(CUT) == "0%"
    opened.value("document.querySelector('.compare button').focus()")
    opened.press(" ", 32, " ")
    assert opened.value(CUT) == "100%"
    opened.press(" ", 32, " ")
    assert opened.value(CUT) == "0%"


def test_the_same_sample_lies_over_the_baseline_s(opened: Browser) -> None:
    def over() -> Any:
        return opened.value("[...document.querySelector('.pair').children].map(image => image.alt)")

    assert over() == ["sample 0 of reference", "sample 0 of slim"]
    opened.value("document.querySelector('.compare select').focus()")
    opened.press("ArrowDown", 40)
    assert over() == ["sample 0 of reference", "sample 0 of reference / deepcache"]


# 680 is what A4 leaves between its margins; what scrolls on a screen is cut off there.
@pytest.mark.parametrize(("width", "media"), [(1280, "screen"), (390, "screen"), (680, "print")])
def test_nothing_is_wider_than_the_window(opened: Browser, width: int, media: str) -> None:
    opened.ask("Emulation.setEmulatedMedia", media=media)
    opened.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 800)
    seen = "html" if media == "screen" else "html, .wide"
    wide = f"[...document.querySelectorAll('{seen}')].map(element => element.scrollWidth)"
    assert max(opened.value(wide)) <= opened.value("innerWidth") == width


def test_dark_and_light_differ_and_paper_is_light(opened: Browser) -> None:
    def paper(scheme: str, media: str = "screen") -> Any:
        chosen = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.ask("Emulation.setEmulatedMedia", media=media, features=chosen)
        return opened.value("getComputedStyle(document.body).backgroundColor")

    assert paper("dark") != paper("light")
    assert paper("dark", "print") == "rgb(255, 255, 255)"
    assert opened.value("getComputedStyle(document.querySelector('.compare')).display") == "none"


def test_without_candidates_the_page_opens_too(
    make_result: Callable[..., BenchResult], out: Path, browser: Browser
) -> None:
    result = make_result()
    alone = make_result(models=result.models[:1], subjects=result.subjects[:2], quality=(), features=None)
    report.write_report(alone, out)
    browser.open((out / "report.html").as_uri())
    assert browser.told(*COMPLAINTS) == []
