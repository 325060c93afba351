"""Reports opened in a headless Chromium, hovered, zoomed and switched by a script."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import metrics
import report
from tests.test_report import hostile_run, passage, sequence_record, write_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--virtual-time-budget=2000", "--dump-dom"),
)
COLLECT = """
window.seenErrors = [];
addEventListener("error", (event) => seenErrors.push(String(event.message)), true);
addEventListener("securitypolicyviolation", (event) => seenErrors.push(event.violatedDirective));
console.error = (...words) => seenErrors.push(words.join(" "));
"""
SELFTEST = (Path(__file__).parent / "report_selftest.js").read_text()
# No window is as narrow as a phone, but a frame in it can be.
AROUND = """<iframe src="page.html" width="{width}" height="{height}"></iframe>
<pre id="found"></pre>
<script>
onmessage = (event) => {{ document.querySelector("#found").textContent = event.data; }};
</script>
"""
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")


def opened(page: str, size: tuple[int, int], folder: Path) -> dict:
    """Open a page with the self-test in it, and return what that found."""
    hashes = ""
    for script in (COLLECT, SELFTEST):
        # The page lets no script run but those whose digests it names.
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        hashes += f"'sha256-{digest}' "
    page = page.replace("script-src ", f"script-src {hashes}", 1)
    page = page.replace("<title>", f"<script>{COLLECT}</script><title>", 1)
    before, _, after = page.rpartition("</body>")
    path = folder / "page.html"
    path.write_text(f"{before}<script>{SELFTEST}</script></body>{after}")
    width, height = size
    around = folder / "around.html"
    around.write_text(AROUND.format(width=width, height=height))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1600,1000", around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    result = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert result, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(html.unescape(result[1]))


@pytest.fixture(scope="module", params=SIZES)
def found(request, tmp_path_factory) -> dict:
    """What came of reading the report of a run whose every text would like to be HTML."""
    folder = tmp_path_factory.mktemp(request.param)
    path = hostile_run(folder)
    sequence_record(path)
    page = report.single(metrics.read_run(path)) | {"passage": passage()}
    return opened(report.render(page), SIZES[request.param], folder) | {
        "name": path.name,
        "asked": SIZES[request.param][0],
    }


def test_the_page_opens_without_errors_or_requests(found):
    assert found["errors"] == [] and found["resources"] == []
    assert found["width"] == found["asked"]
    assert found["overflow"] <= 0
    assert found["charts"] == 5


def test_texts_of_a_run_stay_texts(found):
    assert found["title"] == found["name"] and "<img" in found["title"]
    assert found["injected"] == "undefined"
    assert any("</script><script>" in text for text in found["samples"])


def test_a_pointer_or_a_finger_shows_the_values(found):
    assert "validation loss" in found["hover"] and found["hover"].startswith("step 2,")
    assert found["tipInside"] and found["crosshairs"] == found["charts"]
    assert found["afterLeaving"] and "training loss" in found["tap"]
    assert found["readByKey"].startswith("step ")


def test_dragging_zooms_and_a_double_click_shows_all(found):
    assert found["labels"] != found["zoomed"] and found["resetEnabled"]
    assert found["afterReset"] == found["labels"]
    assert found["zoomedByKey"] != found["labels"]


def test_axes_switch(found):
    assert found["labels"][-1] == "steps"
    assert found["tokens"][-1] == "tokens" and "2M" in found["tokens"]
    assert found["time"][-1] == "training time, s" and "20" in found["time"]
    assert found["logarithmic"] != found["linear"]
    assert found["curvesWithOneHidden"] == found["curves"] - 1


def test_samples_and_tokens_are_there(found):
    assert found["samples"] != found["firstSamples"]
    assert "".join(found["passage"]) == "Ünï <b>"
    assert "nats" in found["token"] and "%" in found["token"]


@pytest.mark.parametrize("size", SIZES)
def test_a_comparison_opens_without_errors(size, tmp_path):
    paths = [write_run(tmp_path, name, evals=name == "b", data="fineweb-edu") for name in "abc"]
    # One has only begun.
    (paths[2] / "metrics.jsonl").write_text('{"kind": "val", "step": 0, "loss": 10.8}\n')
    page = report.render(report.comparison([metrics.read_run(path) for path in paths]))
    found = opened(page, SIZES[size], tmp_path)
    assert found["errors"] == [] and found["resources"] == []
    assert found["overflow"] <= 0 and found["charts"] == 5
    assert "a, training" in found["hover"]


def test_a_run_that_has_only_begun_opens_without_errors(tmp_path):
    path = write_run(tmp_path)
    (path / "metrics.jsonl").write_text('{"kind": "val", "step": 0, "loss": NaN}\n')
    found = opened(report.render(report.single(metrics.read_run(path))), (800, 600), tmp_path)
    assert found["errors"] == [] and found["hover"] == ""
