"""The page of `fastrel serve --ui` in a real browser, headless Chromium, where there is one."""

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastrel
from tests import tiny
from tests.served import Server, picture, served

pytestmark = pytest.mark.slow

webdriver = pytest.importorskip("selenium.webdriver")
pytestmark = pytest.mark.skipif(not shutil.which("chromium") or not shutil.which("chromedriver"), reason="no Chromium here")


OPTIONS = ("--workers", "1", "--decoders", "1", "--threads", "1", "--batch", "1", "--ui")


@pytest.fixture(scope="module")
def server(vit_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two methods, side by side."""
    loaded = fastrel.models.load("tests.tiny:vit")
    other = tmp_path_factory.mktemp("other") / "other.pt2"
    fastrel.export(
        fastrel.Explainer(tiny.vit(), "gradient_attention"), torch.randn(2, 3, 32, 32), path=other, loaded=loaded
    )
    with served(vit_artefact, str(other), *OPTIONS) as running:
        yield running


@pytest.fixture
def browser(server: Server) -> Iterator[Any]:
    yield from opened(server)


def opened(server: Server) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,800"):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    driver.get(f"http://127.0.0.1:{server.port}/")
    yield driver
    driver.quit()


def patient(browser: Any) -> Any:
    """Waits for a minute, also while what it looks at is drawn anew."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 60, ignored_exceptions=[StaleElementReferenceException])


def test_a_person_drops_a_picture_and_clicks_a_class(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    wait = patient(browser)
    file = tmp_path / "noise.png"
    file.write_bytes(picture(0, (60, 60)))
    wait.until(lambda b: b.find_element(By.ID, "drop").is_displayed())
    browser.find_element(By.ID, "file").send_keys(str(file))
    wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#pictures img")) == 3)
    captions = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#pictures figcaption")]
    assert captions == ["as the model sees it", "frozen attribution", "gradient attention"]
    buttons = browser.find_elements(By.CSS_SELECTOR, "#classes button")
    assert len(buttons) == 5
    assert [one.get_attribute("aria-pressed") for one in buttons] == ["true"] + ["false"] * 4
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#pictures img")[1].get_property("naturalWidth") == 224)
    first = browser.find_elements(By.CSS_SELECTOR, "#pictures img")[1].get_attribute("src")
    buttons[2].click()
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#classes button")[2].get_attribute("aria-pressed") == "true")
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#pictures img")[1].get_attribute("src") != first)
    shot = Image.open(io.BytesIO(base64.b64decode(browser.get_screenshot_as_base64())))
    shot.save(tmp_path / "page.png")
    assert shot.width >= 900
    shown = [one.get_attribute("src") for one in browser.find_elements(By.CSS_SELECTOR, "#pictures img")]
    browser.execute_script(
        "const o = document.getElementById('opacity'); o.value = 0.2; o.dispatchEvent(new Event('change'))"
    )
    wait.until(lambda b: [x.get_attribute("src") for x in b.find_elements(By.CSS_SELECTOR, "#pictures img")] != shown)
    assert browser.find_element(By.ID, "said").text == ""


@pytest.mark.slow
def test_a_person_writes_a_text_and_sees_its_words_coloured(tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    loaded = fastrel.models.load(str(tiny.bert_folder(tmp_path)))
    example = loaded.inputs(loaded.reader("a gripping , clever film"))
    explainer = fastrel.Explainer(loaded.model, "input_x_gradient")  # which has signs
    path = fastrel.export(explainer, **example, path=tmp_path / "bert.pt2", loaded=loaded)
    with served(path, *OPTIONS) as server:
        for browser in opened(server):
            wait = patient(browser)
            wait.until(lambda b: b.find_element(By.ID, "text").is_displayed())
            browser.find_element(By.ID, "text").send_keys("a gripping film")
            browser.find_element(By.CSS_SELECTOR, "#writing button").click()
            wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#texts .words span"))
            words = browser.find_elements(By.CSS_SELECTOR, "#texts .words span")
            assert [one.text for one in words] == ["a", "grip", "ping", "film"]
            assert browser.find_element(By.CSS_SELECTOR, "#texts .words").text == "a gripping film"
            colours = [one.value_of_css_property("background-color") for one in words]
            assert len(set(colours)) == 4
            relevance = server.explain(b"a gripping film")[1]["maps"][0]["relevance"][1:-1]
            assert ["rgba(40, 100, 220" in one for one in colours] == [r < 0 for r in relevance]
            assert browser.find_element(By.ID, "said").text == ""
            browser.save_screenshot(str(tmp_path / "text.png"))


def test_a_file_that_is_no_picture_is_said_to_be_none(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    file = tmp_path / "text.png"
    file.write_text("hello")
    WebDriverWait(browser, 60).until(lambda b: b.find_element(By.ID, "drop").is_displayed())
    browser.find_element(By.ID, "file").send_keys(str(file))
    said = WebDriverWait(browser, 60).until(lambda b: b.find_element(By.ID, "said").text)
    assert "not a picture" in said
