"""Takes the pictures of docs/run_page.md from a run, in headless Chromium; the tests of the pages use it too.

pip install selenium; apt-get install chromium chromium-driver
python -m grpo_jax.report WORKDIR
python docs/screenshots.py WORKDIR
"""

import contextlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent / "images"
WAIT_S = 20.0


@contextlib.contextmanager
def browser(*, width: int = 1400, height: int = 900):
    """Chromium without a window. Yields selenium's driver."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, path: Path) -> int:
    """Opens a page and waits until it is drawn. Returns the milliseconds that took by the page's own clock."""
    driver.get(path.absolute().as_uri())
    return wait_until_drawn(driver)


def wait_until_drawn(driver: Any) -> int:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if ready := driver.execute_script("return document.body && document.body.dataset.ready"):
            return int(ready)
        time.sleep(0.02)
    raise TimeoutError(f"{driver.current_url} was not drawn within {WAIT_S:g} s: {driver.get_log('browser')}")


def prefer(driver: Any, scheme: str) -> None:
    """Makes the browser prefer "light" or "dark" pages."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def choose(driver: Any, name: str, text: str) -> None:
    """Chooses an option of a list by its text. Args: name: its id."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    Select(driver.find_element(By.ID, name)).select_by_visible_text(text)


def point_at(driver: Any, element: Any, x: int = 0, y: int = 0) -> None:
    """Moves the pointer to an element's middle, or (x, y) pixels from there."""
    from selenium.webdriver.common.action_chains import ActionChains

    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(driver).move_to_element_with_offset(element, x, y).perform()


def main() -> None:
    from selenium.webdriver.common.by import By

    workdir = Path(sys.argv[1])
    steps = sorted((workdir / "report").glob("step-*.html"))
    step = steps[len(steps) // 3]
    with browser(height=1180) as driver:
        open_page(driver, workdir / "report.html")
        point_at(driver, driver.find_elements(By.CSS_SELECTOR, ".u-over")[0])
        driver.execute_script("scrollTo(0, 0)")
        driver.save_screenshot(str(IMAGES / "run_page.png"))
        prefer(driver, "dark")
        driver.execute_script("scrollTo(0, document.querySelector('[data-title^=Seconds]').offsetTop - 40)")
        time.sleep(0.3)
        driver.save_screenshot(str(IMAGES / "run_page_dark.png"))
        prefer(driver, "light")
        open_page(driver, step)
        choose(driver, "quantity", "sampler's log-probability")
        choose(driver, "show", "some right, some wrong")
        point_at(driver, driver.find_elements(By.CSS_SELECTOR, ".token")[0])
        driver.save_screenshot(str(IMAGES / "step_page.png"))


if __name__ == "__main__":
    main()
