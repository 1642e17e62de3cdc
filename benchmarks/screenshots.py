"""Pictures of the page for the docs: a served model with traffic, a release, failures, a form.

Run as `python benchmarks/screenshots.py`; writes docs/pictures/dashboard-*.png. Needs nginx,
Prometheus, Alertmanager and Debian's chromium.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from page import CHROMIUM, Page, open_page
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from marwright.archive import Run, pack_run
from marwright.archive.keys import make_key_pair
from marwright.archive.signing import sign_with_key
from marwright.client import Client, Endpoint
from marwright.errors import MarwrightError
from marwright.server.ports import Ports
from marwright.training.settings import Settings
from marwright.training.sources import load_data
from marwright.training.train import train_run

PICTURES = Path(__file__).parents[1] / "docs/pictures"
NAME = "shop"
TRAFFIC_SECONDS = 60.0
WINDOW_SECONDS = 30.0
"""After a release, until the new version's drift is compared."""
EPOCHS = 4


def main() -> None:
    """Serve, send traffic, release, and take the pictures."""
    with tempfile.TemporaryDirectory(prefix="marwright-pictures-") as name:
        folder = Path(name)
        for variable in ("RUNTIME_DIR", "STATE_HOME"):
            place = folder / variable.lower()
            place.mkdir(mode=0o700)
            os.environ[f"XDG_{variable}"] = str(place)
        os.environ["LOGNAME"] = "anna"  # who releases
        run = train_run(folder / "run", settings=Settings(epochs=EPOCHS))
        with (
            serve(folder, run) as endpoint,
            watch(folder),
            send_traffic(endpoint),
            open_page(NAME) as page,
        ):
            time.sleep(TRAFFIC_SECONDS)
            release(folder)
            time.sleep(WINDOW_SECONDS)
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                take_pictures(browser, page, run)
                browser.close()


@contextlib.contextmanager
def serve(folder: Path, run: Run) -> Iterator[Path]:
    """Serve version 1.0 of a classifier behind a gateway; yield where its endpoint stands."""
    private, public = make_key_pair(folder / "keys")
    for version, place in (("1.0", folder / "store"), ("2.0", folder)):
        packed = pack_run(run, out=place / f"cnn-{version}.mar", version=version, preflight=None)
        sign_with_key(packed.path, key=private)
    (folder / "store/marwright-policy.yaml").write_text(f"keys: [{public}]\n", encoding="utf-8")
    ports = Ports.find_free()
    deploy: dict[str, Any] = {
        "name": NAME,
        "store": "store",
        "models": [{"archive": "cnn-1.0.mar", "workers": 1}],
        "gateway": {"port": ports.inference},
        "monitoring": {
            "predictions": {"share": 100, "inputs": "whole"},
            "drift": {"window": 200, "every_seconds": 5},
            "prometheus": ports.management,
            "alertmanager": ports.metrics,
        },
        "releases": {"canary": {"slower": 5}},
    }
    (folder / "deploy.yaml").write_text(yaml.safe_dump(deploy), encoding="utf-8")
    command = [sys.executable, "-m", "marwright", "serve", "--json"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline()
        ready = [sys.executable, "-m", "marwright", "status", "--ready"]
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            time.sleep(0.5)
        yield folder / f"runtime_dir/marwright/{NAME}.json"
    finally:
        process.terminate()
        process.wait(90)
        process.stdout.close()


@contextlib.contextmanager
def watch(folder: Path) -> Iterator[None]:
    """Let the server be monitored while the block runs."""
    command = [sys.executable, "-m", "marwright", "monitor", "up", "--json"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline()
        yield
    finally:
        process.terminate()
        process.wait(90)
        process.stdout.close()


def encode(pixels: Any) -> bytes:
    """Return (3, H, W) uint8 as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def send_traffic(path: Path) -> Iterator[None]:
    """Send scans in waves, and now and then a picture that no model can read."""
    ended = threading.Event()
    scans = [encode(pixels) for pixels in load_data("digits").inputs]

    def send() -> None:
        with Client(Endpoint.read(path)) as client:
            number = 0
            while not ended.wait(0.02 if number // 300 % 2 else 0.005):
                number += 1
                body = scans[number % len(scans)]
                with contextlib.suppress(MarwrightError):
                    client.predict("cnn", body[:-30] if number % 97 == 0 else body)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def release(folder: Path) -> None:
    """Release version 2.0, as somebody does on the command line."""
    command = [sys.executable, "-m", "marwright", "release", str(folder / "cnn-2.0.mar")]
    subprocess.run(command, cwd=folder, check=True, timeout=400)


def take_pictures(browser: Browser, page: Page, run: Run) -> None:
    """Take each picture as a person would see it."""
    large, small = {"width": 1200, "height": 900}, {"width": 360, "height": 740}
    context = browser.new_context(viewport=large)  # type: ignore[arg-type]
    window = context.new_page()
    window.goto(page.address)
    window.wait_for_selector("text=It follows by itself")
    state = context.storage_state()
    take(window, "overview")
    window.goto(f"{page.url}version?model=cnn&version=2.0")
    time.sleep(3)
    take(window, "version", full=True)
    window.goto(f"{page.url}releases")
    take(window, "release")
    window.goto(f"{page.url}try?model=cnn&version=2.0")
    window.get_by_label("File: an image, or JSON").set_input_files(run.samples[3].path)
    window.get_by_role("button", name="Predict").click()
    window.wait_for_selector("#result", timeout=60_000)
    take(window, "try", full=True)
    for name, options in (
        ("phone", {"viewport": small, "device_scale_factor": 2, "is_mobile": True}),
        ("dark", {"viewport": large, "color_scheme": "dark"}),
    ):
        other = browser.new_context(storage_state=state, **options)
        window = other.new_page()
        window.goto(page.url)
        window.wait_for_selector("text=It follows by itself")
        time.sleep(3)
        take(window, name)
        other.close()


def take(window: Any, name: str, *, full: bool = False) -> None:
    """Write one picture."""
    path = PICTURES / f"dashboard-{name}.png"
    window.screenshot(path=path, full_page=full)
    with Image.open(path) as image:
        image.convert("RGB").save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
