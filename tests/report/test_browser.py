"""Both pages in headless Chromium: drawn, pointed at, clicked, filtered, and read by their own text."""

import importlib.util
import json
import pathlib
import shutil

import pytest
from run_folders import write_run
from step_files import write_step
from test_run_page import HOSTILE, charts_of

from grpo_jax.config import KEYS
from grpo_jax.report.write import write_report

pytestmark = pytest.mark.browser

ROOT = pathlib.Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs" / "screenshots.py")
screenshots = importlib.util.module_from_spec(spec)
spec.loader.exec_module(screenshots)
open_page, point_at, choose = screenshots.open_page, screenshots.point_at, screenshots.choose

NUM_STEPS = 200


@pytest.fixture(scope="module")
def driver():
    with screenshots.browser() as driver:
        yield driver
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_folder):
    """A run with two saved steps, the second of which has a hostile text."""
    path = write_run(tmp_path_factory.mktemp("browser") / "run", NUM_STEPS)
    shutil.copytree(tokenizer_folder, path / "model_files")
    write_step(path, 2)
    write_step(path, 3, text=HOSTILE)
    write_report([path])
    return path


@pytest.fixture
def page(driver, run):
    screenshots.prefer(driver, "light")
    open_page(driver, run / "report.html")
    return driver


@pytest.fixture
def step(driver, run):
    open_page(driver, run / "report" / "step-000002.html")
    return driver


def find(driver, selector):
    return driver.find_elements("css selector", selector)


def chart(driver, title):
    [node] = find(driver, f'.chart[data-title="{title}"]')
    return node


def legend(node):
    """Label -> value, as the chart shows them."""
    texts = lambda name: [e.text.replace(",", "") for e in node.find_elements("css selector", f".{name}")]
    return dict(zip(texts("u-label"), texts("u-value"), strict=True))


def test_every_chart_is_drawn(page, run):
    assert {node.get_attribute("data-title") for node in find(page, ".chart")} == charts_of(
        run / "report.html"
    ).keys()
    assert all(len(node.find_elements("css selector", "canvas")) == 1 for node in find(page, ".chart"))
    assert find(page, ".state")[0].text == "finished, step 200 of 200"
    inks = page.execute_script("""return plots.map(({ctx}) =>
        ctx.getImageData(0, 0, ctx.canvas.width, ctx.canvas.height).data.some((x) => x))""")
    assert all(inks)


def test_a_curve_can_be_read_at_a_point(page):
    node = chart(page, "Reward and accuracy")
    point_at(page, node.find_element("css selector", ".u-over"), 40)
    values = legend(node)
    step = int(values["step"])
    assert 100 < step < NUM_STEPS
    assert float(values["reward/mean"]) == pytest.approx(step / (step + 100), rel=1e-4)
    other = legend(chart(page, "Entropy"))  # which shows the same step
    assert int(other["step"]) == step and float(other["actor/entropy"]) == pytest.approx(
        1 - step / (step + 100) / 2, rel=1e-4
    )


def test_stacked_bars_tell_the_seconds_of_each_phase(page):
    node = chart(page, "Seconds by phase")
    point_at(page, node.find_element("css selector", ".u-over"), 30)
    values = legend(node)
    shown = {name: float(values[name]) for name in ("gen", "update_actor", "reward", "between the phases")}
    assert shown == {"gen": 4, "update_actor": 3, "reward": 0.5, "between the phases": 0.25}


def scales(driver):
    return driver.execute_script("return plots.map(u => [u.scales.x.min, u.scales.x.max])")


def test_dragging_zooms_every_chart_and_a_double_click_goes_back(page):
    from selenium.webdriver.common.action_chains import ActionChains

    whole = [[-0.5, NUM_STEPS + 0.5]] * len(find(page, ".chart"))
    assert scales(page) == whole
    over = chart(page, "Entropy").find_element("css selector", ".u-over")
    point_at(page, over, -50)
    ActionChains(page).click_and_hold().move_by_offset(50, 0).release().perform()
    zoomed = scales(page)
    assert all(low > 20 and high < 150 for low, high in zoomed) and len({tuple(z) for z in zoomed}) == 1
    ActionChains(page).double_click(over).perform()
    assert scales(page) == whole


def test_alarms_are_on_the_time_axis(page):
    node = chart(page, "Loss")
    over = node.find_element("css selector", ".u-over")
    x = page.execute_script("return plots[hosts.findIndex(h => h[0].title === 'Loss')].valToPos(7, 'x')")
    point_at(page, over, round(x - over.size["width"] / 2))
    assert node.find_element("css selector", ".about").text == "loss-spike begins"
    [row] = find(page, ".alarms tbody tr")
    assert "<b>an odd batch</b>" in row.text  # as it was written


def test_the_configuration_can_be_filtered(page):
    shown = lambda: [row.text.split()[0] for row in find(page, ".config tbody tr") if row.is_displayed()]
    assert shown() == []  # it has the defaults alone
    choose(page, "which", "all keys")
    assert len(shown()) == len(KEYS)
    page.find_element("id", "filter").send_keys("learning_rate")
    assert "optim.learning_rate" in shown() and all("learning" in key or "sft" in key for key in shown())


def test_smoothing_and_logarithms_draw_again(page):
    box = page.find_element("id", "smooth")
    box.clear()
    box.send_keys("10\t")
    node = chart(page, "Reward and accuracy")
    point_at(page, node.find_element("css selector", ".u-over"), 40)
    step = int(legend(node)["step"])
    expected = sum(s / (s + 100) for s in range(step - 9, step + 1)) / 10
    assert float(legend(node)["reward/mean"]) == pytest.approx(expected, rel=1e-3)
    page.find_element("id", "log").click()
    assert (
        page.execute_script("return plots[hosts.findIndex(h => h[0].title === 'Entropy')].scales.y.distr")
        == 3
    )


@pytest.mark.parametrize("name", ["report.html", "report/step-000002.html"])
def test_light_and_dark(driver, run, name):
    brightness = {}
    for scheme in ("light", "dark"):
        screenshots.prefer(driver, scheme)
        open_page(driver, run / name)
        colours = driver.execute_script(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        )
        brightness[scheme] = [sum(map(int, c[4:-1].split(","))) / 765 for c in colours]
    screenshots.prefer(driver, "light")
    (light, ink), (dark, dark_ink) = brightness["light"], brightness["dark"]
    assert light > 0.9 and ink < 0.2 and dark < 0.2 and dark_ink > 0.8


def test_ten_thousand_steps_open_quickly(driver, tmp_path):
    file = write_report([write_run(tmp_path / "run", 10_000, num_completions=2)])
    assert (
        open_page(driver, file) < 4000
    )  # milliseconds; 800 alone (docs/run_page.md): other tests run beside it


def test_two_runs(driver, tmp_path):
    file = write_report(
        [write_run(tmp_path / "a", 20), write_run(tmp_path / "b", 30)], tmp_path / "both.html"
    )
    open_page(driver, file)
    node = chart(driver, "Entropy")
    point_at(driver, node.find_element("css selector", ".u-over"), 100)
    values = legend(node)
    step = int(values["step"])
    assert step > 20 and float(values["b: actor/entropy"]) == pytest.approx(
        1 - step / (step + 100) / 2, rel=1e-4
    )
    assert float(values["a: actor/entropy"]) == pytest.approx(1 - 20 / 120 / 2, rel=1e-4)  # its last one


# ---- the page of a step ----


def tip_of(driver, token):
    point_at(driver, token)
    rows = [
        [cell.text for cell in row.find_elements("css selector", "td")] for row in find(driver, "#tip tr")
    ]
    return dict(rows)


def test_the_run_links_to_its_steps_and_they_to_one_another(page):
    page.find_element("link text", "2").click()
    screenshots.wait_until_drawn(page)
    assert page.find_element("css selector", "h1").text == "Step 2"
    page.find_element("link text", "step 3 →").click()
    assert page.find_element("css selector", "h1").text == "Step 3"
    page.find_element("link text", "The run").click()
    screenshots.wait_until_drawn(page)
    assert page.find_element("css selector", "h1").text == "run"


def test_a_token_tells_its_values(step):
    second = find(step, ".group")[1].find_elements("css selector", ".completion")[1]
    token = second.find_elements("css selector", ".token")[2]
    tip = tip_of(step, token)
    assert tip["token"].endswith("(id 6)")
    del tip["token"]
    assert tip == {
        "sampler's log-probability": "-1", "trainer's log-probability": "-1.375",
        "difference, trainer less sampler": "-0.375", "ratio, and clipped": "1.5", "advantage": "1.5",
        "mask: weighs in the loss": "1", "policy version": "3", "clipped": "yes",
    }  # fmt: skip
    assert "reward 0" in second.text and "advantage 1.5" in second.text and "1 clipped" in second.text


def test_colours_follow_the_chosen_quantity(step):
    colour = lambda: [
        t.value_of_css_property("background-color") for t in find(step, ".group:nth-child(2) .token")
    ][-3:]
    by_sampler = colour()
    assert len(set(by_sampler)) == 1 and by_sampler[0].startswith("rgba(230, 60, 60")
    choose(step, "quantity", "ratio, and clipped")
    assert all(c.startswith("rgba(50, 120, 230") for c in colour())
    choose(step, "quantity", "policy version")
    older, same, newer = colour()
    assert older == same != newer


def test_groups_are_sorted_filtered_and_searched(step):
    titles = lambda: [b.text for b in find(step, ".group > b")]
    assert titles() == ["Group 0", "Group 1", "Group 2"]
    choose(step, "sort", "worst mismatch")
    assert titles() == ["Group 1", "Group 0", "Group 2"]
    choose(step, "show", "all wrong")
    assert titles() == ["Group 1", "Group 2"] and step.find_element("id", "count").text == "2 of 3 groups"
    choose(step, "show", "dropped")
    assert titles() == ["Group 2"]
    choose(step, "show", "all groups")
    step.find_element("id", "search").send_keys("what is 0")
    assert titles() == ["Group 0"]


def test_no_text_of_a_completion_is_ever_run(driver, run):
    """Where there are no tokens, the text itself is shown."""
    from grpo_jax.rollout.evaluation import write_jsonl

    record = {
        "prompt_id": "a",
        "prompt": HOSTILE[:-1],
        "ground_truth": HOSTILE[:-1],
        "completion": HOSTILE[:-1],
    }
    write_jsonl(run / "rollouts" / "step-000004.jsonl", [record | {"reward": 0.0, "num_tokens": 3}])
    write_report([run])
    for number in (3, 4):
        open_page(driver, run / "report" / f"step-{number:06d}.html")
        assert find(driver, "img, iframe, .group script") == []
        driver.execute_script("""const s = document.createElement("script");
            s.textContent = "window.hacked = 1"; document.body.append(s);""")
        assert driver.execute_script("return window.hacked") is None  # the policy forbids it
        driver.get_log("browser")  # which says so
    [body] = find(driver, ".completion .body")
    assert body.text == "</script><script>alert(1)</script><img src=x onerror=alert(2)>␀␛[31m⟨U+202E⟩"


def test_a_run_without_a_step(driver, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    open_page(driver, write_report([tmp_path]))
    assert driver.find_element("id", "empty").is_displayed()
