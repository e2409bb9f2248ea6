"""Pages in a real browser: filters filter, columns sort, harmful text is folded, nothing loads or overflows a phone.

Skipped where there is no Chromium, ChromeDriver or selenium (Debian: chromium, chromium-driver; PyPI: selenium).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.report_inputs import PLANTED, inputs, write
from support.study_inputs import write as write_study

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromium-driver is not installed")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-prefers-reduced-motion",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two methods with two seeds."""
    folder = tmp_path_factory.mktemp("page")
    return write(folder / "out", inputs(folder / "in", seeds=(0, 1)))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(started: Any, page: Path) -> Any:
    """The page, freshly opened on a desktop."""
    started.set_window_size(1280, 900)
    started.get(page.as_uri())
    return started


def pick(browser: Any, name: str, value: str) -> int:
    """Choose a filter's value; how many prompts fit."""
    browser.execute_script(
        "const s = document.getElementById('browser-' + arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change'))",
        name,
        value,
    )
    return int(browser.find_element("id", "browser-count").text.split()[0])


def test_filters_count_what_the_rows_hold(browser: Any) -> None:
    """By set, verdict and words: the counts are those of the synthetic rows (60 prompts in each of 7 sets)."""
    assert pick(browser, "set", "any") == 7 * 60
    assert pick(browser, "set", "advbench") == 60
    assert pick(browser, "verdict", "unsafe before, safe after") == 37  # 70% of 60 before, 8.3% after
    assert pick(browser, "verdict", "safe before, unsafe after") == 0
    assert pick(browser, "set", "benign") == 0
    assert pick(browser, "verdict", "answered before, refused after") == 16  # 30% of 60 after, 3.3% before
    assert pick(browser, "set", "any") == 16
    assert pick(browser, "verdict", "any") == 7 * 60
    browser.find_element("id", "browser-search").send_keys("prompt 59 of maths")
    assert browser.find_element("id", "browser-count").text.startswith("1 of 420 prompts")


def test_models_can_be_added_and_taken_away(browser: Any) -> None:
    """Base and both methods of the verdict stand side by side at first; each box adds or takes away a column."""
    pick(browser, "set", "maths")

    def columns() -> list[str]:
        return [h.text for h in browser.find_elements("css selector", "#browser-list .case:first-child h4")]

    assert columns() == ["base", "nspo, seed 0", "grpo_no_kl, seed 0"]
    boxes = browser.find_elements("css selector", "#browser fieldset input")
    boxes[2].click()
    boxes[3].click()
    assert columns() == ["base", "nspo, seed 0", "nspo, seed 1"]


def test_harmful_text_is_folded_until_asked_for(browser: Any) -> None:
    """Prompts and answers of harmful sets are invisible until their line is clicked; other sets are open."""
    pick(browser, "set", "advbench")
    text = browser.find_element("css selector", "#browser-list .prompt")
    assert not text.is_displayed()
    assert "unsafe" in browser.find_element("css selector", "#browser-list summary").text
    browser.find_element("css selector", "#browser-list summary").click()
    assert text.is_displayed()
    pick(browser, "set", "maths")
    assert browser.find_element("css selector", "#browser-list .prompt").is_displayed()


def test_planted_script_is_text_and_nothing_fails(browser: Any) -> None:
    """A script in prompts and answers is shown as it stands; no alert opens, the console has no error, no request."""
    pick(browser, "set", "code")
    assert PLANTED in browser.find_element("css selector", "#browser-list .prompt").text
    assert PLANTED in browser.find_element("css selector", "#browser-list .answer .text").text
    assert browser.execute_script("return document.querySelectorAll('script').length") == 2
    requests = "return performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:')).length"
    assert browser.execute_script(requests) == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_another_script_cannot_run(browser: Any) -> None:
    """Even one that got past the escaping: the content policy allows the page's own by its hash only."""
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.planted = 1'; document.body.append(s)"
    )
    assert browser.execute_script("return window.planted === undefined")
    browser.get_log("browser")  # the refusal is an error in the console, and not one of the page's


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_overflows_a_small_screen(browser: Any, width: int) -> None:
    """At the width of a phone the page does not scroll sideways, with everything unfolded; only tables do."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= width


def test_what_an_answer_changed_is_marked(browser: Any) -> None:
    """The words that the base model's answer lacks are underlined, in the browser of answers; its own never are."""
    pick(browser, "set", "maths")
    marked = browser.find_elements("css selector", "#browser-list .case:first-child .answer:nth-child(2) mark")
    assert [mark.text for mark in marked] == ["nspo"]
    assert not browser.find_elements("css selector", "#browser-list .case:first-child .answer:nth-child(1) mark")


def test_what_scrolls_is_reached_by_the_keyboard(browser: Any) -> None:
    """On a phone every table and listing that is wider than the screen takes the focus."""
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    script = """const done = arguments[0];
    requestAnimationFrame(() => setTimeout(() => done([...document.querySelectorAll('.scroll, pre')]
      .filter((box) => box.scrollWidth > box.clientWidth).map((box) => box.tabIndex))))"""
    found = browser.execute_async_script(script)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert found
    assert set(found) == {0}


@pytest.fixture(scope="module")
def study(started: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page of a study with two seeds, opened on a desktop."""
    page = write_study(tmp_path_factory.mktemp("study"), seeds=("pooled", "0", "1"))
    started.set_window_size(1280, 900)
    started.get(page.as_uri())
    return started


def variants(browser: Any) -> list[str]:
    """The names of the rows that are seen, from top to bottom."""
    return [it.text for it in browser.find_elements("css selector", ".study tbody th") if it.is_displayed()]


def test_variants_sort_and_filter(study: Any) -> None:
    """Pooled rows at first; by a column up and down, the base model on top; by a key and by a part of the name."""
    names = ["plain", 'R&D "free"', "rule-energy-0.9", "rule-energy-0.95"]
    assert variants(study) == ["base model", *names]
    head = next(it for it in study.find_elements("css selector", ".study thead button") if it.text == "KL per token")
    head.click()
    assert variants(study) == ["base model", *names]
    head.click()
    assert variants(study) == ["base model", *reversed(names)]
    labels = {it.text.partition("\n")[0]: it for it in study.find_elements("css selector", ".controls label")}
    labels["bases.rule"].find_element("css selector", "option[value=energy]").click()
    assert variants(study) == ["base model", "rule-energy-0.95", "rule-energy-0.9"]
    labels["variant"].find_element("tag name", "input").send_keys("95")
    assert variants(study) == ["base model", "rule-energy-0.95"]
    assert study.find_element("css selector", ".controls .note").text == "1 of 12 rows"
    assert [entry for entry in study.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_a_study_fits_a_phone(study: Any) -> None:
    """Only its table scrolls sideways."""
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    study.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wide = study.execute_script("return document.documentElement.scrollWidth")
    study.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 360
