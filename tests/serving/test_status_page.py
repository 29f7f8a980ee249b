"""The status page in a real browser: numbers move, workers are shown, a lost server is shown."""

import shutil

import pytest
from conftest import require

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    require("starlette", "serve")
    from nercc_server import Server

    command = "--model own:double --input-shape 4 --workers 8"
    folder = tmp_path_factory.mktemp("page")
    server = Server(
        folder, *command.split(), "--faults", "straggler_rate=0.1, straggler_delay_s=0.2"
    )
    yield server
    server.kill()


@pytest.fixture(scope="module")
def page():
    require("playwright", "serve-test")
    from playwright.sync_api import sync_playwright

    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        # CI installs it; see .ci/run.
        require("no_such_browser", "serve-test: and Chromium, apt-get install chromium")
    with sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=path, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.trouble = []
        page.on("pageerror", lambda error: page.trouble.append(str(error)))
        yield page
        browser.close()


def test_numbers_move(server, page, tmp_path):
    from faces import ask

    page.goto(server.url)
    page.wait_for_selector("html[data-state=serving]")
    model = page.locator('[data-model="own.double"]')
    assert model.locator("[data-worker]").count() == 8

    def number(field):
        return float(model.locator(f'[data-field="{field}"]').get_attribute("data-value") or "nan")

    before = number("queries")
    for step in range(60):
        x = {"input": [[step / 60, 0.1, 0.2, 0.3]] * 2}
        assert ask("json", server, "own.double", x).is_(200)
    page.wait_for_function(
        'before => Number(document.querySelector(\'[data-model="own.double"] '
        "[data-field=queries]').dataset.value) >= before + 120",
        arg=before,
    )
    assert number("rate") > 0
    assert number("p99") > 0
    states = model.locator("[data-worker]").evaluate_all("all => all.map(w => w.dataset.state)")
    assert set(states) <= {"idle", "busy", "overdue", "starting"}
    assert page.locator("#state").inner_text() == "serving"
    picture = tmp_path / "status.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 20_000
    # Something is drawn: bars of the latency histogram with height.
    bars = model.locator(".latency svg rect").evaluate_all(
        "all => all.map(b => b.height.baseVal.value)"
    )
    assert max(bars) > 50
    assert page.trouble == []


@pytest.fixture
def shown(server, page):
    """Shows what a server would tell whose model's status is what a test makes of it."""
    status = server.http.get("/status").json()
    (model,) = status["models"]

    def show(width=1280):
        page.set_viewport_size({"width": width, "height": 900})
        page.route("**/status", lambda route: route.fulfill(json=status))
        page.goto(server.url)
        page.wait_for_selector("[data-model]")
        return page

    yield model, show
    page.unroute("**/status")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert page.trouble == []


def set_workers(model, *states):
    for number, worker in enumerate(model["workers"]):
        worker["state"] = states[number % len(states)]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_workers(model, "overdue"),
        lambda model: set_workers(model, "starting", "overdue"),
        lambda model: model["health"].update(ready=False, trouble="no answer for 4 s"),
        lambda model: model.update(health=None),
    ],
)
def test_it_is_not_green_unless_somebody_would_answer(shown, change):
    model, show = shown
    change(model)
    page = show()
    page.wait_for_selector("html[data-state=troubled]")
    assert page.locator("#state").inner_text() in ("no worker answers", "not ready")


def test_on_a_phone_workers_and_errors_come_first(shown):
    _, show = shown
    page = show(width=390)

    def top(panel):
        return page.locator(panel).bounding_box()["y"]

    assert top(".workers") < top(".errors") < top(".traffic") < top(".latency")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_lost_server_is_reported(server, page):
    server.kill()
    page.wait_for_selector("html[data-state=lost]")
    assert page.locator("#state").inner_text().startswith("no connection since")
