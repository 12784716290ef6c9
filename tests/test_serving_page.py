"""The page of `fastrel serve --ui` in a real browser, headless Chromium, where there is one."""

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.served import Server, picture, served

webdriver = pytest.importorskip("selenium.webdriver")
pytestmark = pytest.mark.skipif(not shutil.which("chromium") or not shutil.which("chromedriver"), reason="no Chromium here")


@pytest.fixture(scope="module")
def server(vit_artefact: Path) -> Iterator[Server]:
    with served(vit_artefact, "--workers", "1", "--decoders", "1", "--threads", "1", "--batch", "1", "--ui") as running:
        yield running


@pytest.fixture
def browser(server: Server) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,800"):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    driver.get(f"http://127.0.0.1:{server.port}/")
    yield driver
    driver.quit()


def test_a_person_drops_a_picture_and_clicks_a_class(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 60)
    file = tmp_path / "noise.png"
    file.write_bytes(picture(0, (60, 60)))
    wait.until(lambda b: b.find_element(By.ID, "drop").is_displayed())
    browser.find_element(By.ID, "file").send_keys(str(file))
    wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#pictures img")) == 2)
    buttons = browser.find_elements(By.CSS_SELECTOR, "#classes button")
    assert len(buttons) == 5
    assert [one.get_attribute("aria-pressed") for one in buttons] == ["true"] + ["false"] * 4
    first = browser.find_elements(By.CSS_SELECTOR, "#pictures img")[1]
    wait.until(lambda b: first.get_property("naturalWidth") == 224)
    buttons[2].click()
    wait.until(lambda b: buttons[2].get_attribute("aria-pressed") == "true")
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#pictures img")[1] != first)
    shot = Image.open(io.BytesIO(base64.b64decode(browser.get_screenshot_as_base64())))
    shot.save(tmp_path / "page.png")
    assert shot.width >= 900
    assert browser.find_element(By.ID, "said").text == ""


def test_a_file_that_is_no_picture_is_said_to_be_none(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    file = tmp_path / "text.png"
    file.write_text("hello")
    WebDriverWait(browser, 60).until(lambda b: b.find_element(By.ID, "drop").is_displayed())
    browser.find_element(By.ID, "file").send_keys(str(file))
    said = WebDriverWait(browser, 60).until(lambda b: b.find_element(By.ID, "said").text)
    assert "not a picture" in said
