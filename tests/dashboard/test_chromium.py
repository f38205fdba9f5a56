"""A real browser opens the address: it shows the page, and keeps nothing that opens it again."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import HTTPError, urlopen

import pytest

from halton_meter.dashboard.server import Dashboard
from halton_meter.store import Store
from tests.support.limits import plan_limits
from tests.support.made import HOUR_NS, NOON_NS, made

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")

# A page at another port: opens the dashboard in this browser, and is asked for more once it did.
OPENER = """<!doctype html><p id="said"></p><script>
window.open("DASHBOARD");
setTimeout(async () => {
  await fetch("/later", {credentials: "include"});
  await fetch("/again/", {credentials: "include"});
  document.getElementById("said").textContent = "asked again";
}, 4000);
</script>"""


class Elsewhere(ThreadingHTTPServer):
    """Somebody else's server on 127.0.0.1: remembers the cookies that it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        self.page = b""
        self.asked: dict[str, str | None] = {}
        super().__init__(("127.0.0.1", 0), _Answer)


class _Answer(BaseHTTPRequestHandler):
    server: Elsewhere

    def do_GET(self) -> None:
        self.server.asked[self.path] = self.headers.get("Cookie")
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.page)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Dashboard, Elsewhere]]:
    store = Store(tmp_path / "home")
    limits = plan_limits(NOON_NS, "0.37", "0.40")
    store.append([made(project="atlas", conditions={"plan": "claude"}, limits=limits)])
    store.flush()
    both = Dashboard(store, lambda: NOON_NS + HOUR_NS), Elsewhere()
    threads = [threading.Thread(target=each.serve_forever, args=(0.01,)) for each in both]
    for thread in threads:
        thread.start()
    yield both
    for each, thread in zip(both, threads, strict=True):
        each.shutdown()
        thread.join()
        each.server_close()


def dom(profile: Path, url: str, *options: str) -> str:
    """What Chromium makes of a page, its scripts run."""
    assert CHROMIUM
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={profile}", *options, "--dump-dom", url],
        env={"PATH": os.environ["PATH"], "HOME": str(profile)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout


def test_the_page_opens_once_and_the_profile_holds_nothing_that_opens_it(
    servers: tuple[Dashboard, Elsewhere], tmp_path: Path
) -> None:
    page, _ = servers
    url, profile = page.new_url(), tmp_path / "profile"
    shown = dom(profile, url, "--virtual-time-budget=5000")
    assert "atlas" in shown
    assert "Claude plan" in shown
    assert "5-hour window" in shown
    assert "37 %" in shown
    assert "code=" not in shown
    assert "works once" in dom(profile, url)
    secret = page.entrance.cookie().partition("=")[2].partition(";")[0].encode()
    kept = {path: path.read_bytes() for path in profile.rglob("*") if path.is_file()}
    assert [path for path, content in kept.items() if secret in content] == []
    for address in (url, f"http://{page.authority}{page.entrance.folder}/"):
        with pytest.raises(HTTPError, match="403"):
            urlopen(address, timeout=60)


def test_no_other_port_is_sent_the_cookie(
    servers: tuple[Dashboard, Elsewhere], tmp_path: Path
) -> None:
    page, elsewhere = servers
    url = page.new_url()
    elsewhere.page = OPENER.replace("DASHBOARD", url).encode()
    opener = f"http://127.0.0.1:{elsewhere.server_port}/"
    options = ("--disable-popup-blocking", "--virtual-time-budget=20000")
    assert "asked again" in dom(tmp_path / "profile", opener, *options)
    with pytest.raises(HTTPError, match="403"):  # it was opened: the browser has its cookie
        urlopen(url, timeout=60)
    assert {path: cookie for path, cookie in elsewhere.asked.items() if cookie} == {}
    assert {"/later", "/again/"} <= elsewhere.asked.keys()
