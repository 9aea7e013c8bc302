"""The report in a real browser: what a model wrote does nothing, and what a reader does works.

Needs Chromium and its driver (Debian: chromium chromium-driver); skipped where they are missing, but not in CI.
"""

import csv
import itertools
import json
import os
import shutil
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flow_runs import make_flow_run
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from retort.core.images import PLACEHOLDER, PromptImage
from retort.core.rollouts import Message, Prompt
from retort.errors import visible
from retort.report import build_report
from retort.report.axes import label
from retort.train.output.thumbnails import keep

MakeRun = Callable[..., Path]
ATTACKS = (
    "<script>document.title = 'attacked'</script>",
    "<img src=x onerror=\"document.title = 'attacked'\">",
    "</script><script>document.title = 'attacked'</script>",
    "<!--<script>",
    "&lt;b&gt;",
    "\u2028]]>'\"`${document.title = 'attacked'}",
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="session")
def chromium(downloads: Path) -> Iterator[webdriver.Chrome]:
    found = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if found is None or driver is None:
        reason = "no Chromium or no chromedriver here (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; in CI these tests must run")
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture
def visit(chromium: webdriver.Chrome, tmp_path: Path) -> Iterator[Callable[..., webdriver.Chrome]]:
    """Opens the report of some runs; at the end the console must be silent."""

    def open_(*runs: Path, width: int = 1280, scheme: str = "light") -> webdriver.Chrome:
        page = build_report(runs, tmp_path / "report.html")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        chromium.get(page.as_uri())
        return chromium

    chromium.get_log("browser")
    yield open_
    assert chromium.get_log("browser") == []


def text(browser: webdriver.Chrome, selector: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, selector).text


def test_what_a_model_wrote_does_nothing(
    tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    hostile = "".join(ATTACKS)
    columns = {name: [0.5] * len(ATTACKS) for name in (*ATTACKS, "teacher_entropy")}
    run = make_run(
        tmp_path / "run", prompt=hostile, text=hostile, tokens=list(ATTACKS), columns=columns, prompt_id=hostile
    )
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"prompt": hostile, "tokens": list(ATTACKS), "who": hostile}) for row in answers]
    (run / "answers.jsonl").write_text("\n".join(lines))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"student": hostile, hostile: hostile}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 121, hostile: 1.0, f"loss/{hostile}": 0.5}) + "\n")
    results = json.loads((run / "eval.json").read_text())
    results["rows"][0] |= {"who": hostile, hostile: {"value": 1.0}}
    (run / "eval.json").write_text(json.dumps(results))

    browser = visit(run)
    assert browser.title == "eopd · run"
    assert browser.execute_script("return document.scripts.length") == 2
    assert browser.execute_script("return document.images.length") == 0
    shown = [token.get_attribute("textContent") for token in browser.find_elements(By.CSS_SELECTOR, ".tokens .t")]
    assert shown[: len(ATTACKS)] == list(ATTACKS)
    assert browser.find_element(By.CSS_SELECTOR, ".prompt").get_attribute("textContent") == hostile
    Select(browser.find_element(By.CSS_SELECTOR, "#tokens-view select")).select_by_value("held")
    for token in browser.find_elements(By.CSS_SELECTOR, ".tokens .t")[: len(ATTACKS)]:
        ActionChains(browser).move_to_element(token).perform()
    assert browser.title == "eopd · run"
    assert browser.execute_script("return document.scripts.length") == 2


def test_an_episode_is_a_conversation_whose_worst_turn_stands_out(
    tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    """Text of a model, of an environment and of a prompt is shown as it is, and does nothing."""
    hostile = "".join(ATTACKS)
    tokens, turns = [*ATTACKS, "go", " on", "stop"], [0] * len(ATTACKS) + [1, 1, 2]
    columns = {"reverse_kl": [0.25] * len(ATTACKS) + [3.0, 1.0, 0.5], hostile: [0.5] * len(tokens)}
    outcomes = [
        {"messages": [[hostile, hostile]], "reward": 0.0, "measures": {"tool_errors": 1.0}},
        {"messages": [["tool", hostile]], "reward": 0.0},
        {"messages": [["user", "won"]], "reward": 1.0, "measures": {"success": 1.0}},
    ]
    messages = [["system", "play"], ["assistant", "an expert's"], ["user", hostile]]
    episode = {"tokens": tokens, "turns": turns, "columns": columns, "outcomes": outcomes, "messages": messages}
    run = make_run(tmp_path / "run", steps=8, **episode)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    rows[1]["columns"] = {"reverse_kl": [4.0] * len(tokens)}
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    browser = visit(run, width=420)

    heads = [head.text for head in browser.find_elements(By.CSS_SELECTOR, ".bubble .head")]
    assert heads[:2] == ["system", "assistant, in the prompt: not learnt from"]
    assert heads[3] == "turn 1 · reverse KL 0.250 nats\ninvalid call"
    assert heads[5] == "turn 2 · reverse KL 2.000 nats\nfarthest from the teacher"
    assert heads[6:] == [
        "environment · tool",
        "turn 3 · reverse KL 0.500 nats · reward 1\nsuccess",
        "environment · user, not read: the episode was over",
    ]
    said = [box.get_attribute("textContent") for box in browser.find_elements(By.CSS_SELECTOR, ".bubble .said")]
    assert said == ["play", "an expert's", hostile, hostile, hostile, "won"]
    boxes = browser.find_elements(By.CSS_SELECTOR, ".bubble .tokens")
    shown = [
        [token.get_attribute("textContent") for token in box.find_elements(By.CSS_SELECTOR, ".t")] for box in boxes
    ]
    assert shown == [list(ATTACKS), ["go", " on"], ["stop"]]
    assert text(browser, ".told") == (
        "Farthest from the teacher in turn 2 (reverse KL 2.000 nats a token); invalid calls in turn 1."
    )

    # A turn's bar leads to its tokens, and the arrow keys go on into the next turn.
    bars = browser.find_elements(By.CSS_SELECTOR, ".bars button")
    assert [bar.get_attribute("class") for bar in bars] == ["bad", "worst", "good"]
    bars[1].click()
    assert f"token {len(ATTACKS) + 1} of {len(tokens)}, turn 2" in text(browser, ".details")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert f"token {len(tokens)} of {len(tokens)}, turn 3" in text(browser, ".details")
    assert browser.switch_to.active_element == boxes[2]
    orders = next(box for box in browser.find_elements(By.CSS_SELECTOR, "select") if "farthest turn" in box.text)
    Select(orders).select_by_visible_text("farthest turn first")
    assert browser.find_element(By.CSS_SELECTOR, ".block h3").text.startswith("Step 5 ")

    assert browser.title == "eopd · run"
    assert browser.execute_script("return document.scripts.length") == 2
    assert browser.execute_script("return document.images.length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 420


def test_what_was_written_before_scoring_is_read_and_does_nothing(
    tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    """A debate, closed at first: who wrote what in which round, and how sure it says to be."""
    hostile = "".join(ATTACKS)
    debate = [
        {"of": "debate", "model": "teacher", "round": 0, "text": hostile, "confidence": 80.0},
        {"of": hostile, "model": hostile, "round": 1, "text": "It is 9.", "step": 1, "cut": True},
        {"of": "debate", "model": "teacher", "round": 2, "text": ""},
    ]
    browser = visit(make_run(tmp_path / "run", steps=8, passages=debate), width=420)
    box = browser.find_element(By.CSS_SELECTOR, ".block .passages")
    assert box.text == "3 texts that were written before scoring"
    box.find_element(By.CSS_SELECTOR, "summary").send_keys(Keys.ENTER)
    heads = [head.get_attribute("textContent") for head in box.find_elements(By.CSS_SELECTOR, ".head")]
    about = f"{hostile} · {hostile} · round 2 · before turn 2 · cut at its longest length"
    assert heads == ["debate · teacher · round 1 · 80 % sure", about, "debate · teacher · round 3"]
    said = box.find_elements(By.CSS_SELECTOR, ".said")
    assert [one.get_attribute("textContent") for one in said] == [hostile, "It is 9.", "∅"]
    assert said[0].is_displayed()
    assert browser.title == "eopd · run"
    assert browser.execute_script("return document.scripts.length") == 2
    assert browser.execute_script("return document.images.length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 420


def test_units_of_two_tokenizers_are_boxed_and_told(
    tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    """The teacher's tokens are text of a model, too: hostile ones are shown and do nothing."""
    hostile = "".join(ATTACKS)
    tokens = ["The", " qu", "ick", " fox\n", "\ufffd", "</s>"]
    sizes = [1, 1, 0, len(ATTACKS), None, 1]
    units = {"teacher": {"sizes": sizes, "tokens": ["The", " quick", *ATTACKS, hostile]}, hostile: {"sizes": sizes}}
    columns = {"student_logp": [-1, -0.5, -1.5, -2, -4, -0.25], "teacher_logp": [-1.5, -3, -3, -1, 0, -0.5]}
    browser = visit(make_run(tmp_path / "run", tokens=tokens, text="".join(tokens), columns=columns, units=units))

    block = browser.find_element(By.CSS_SELECTOR, ".tokens")
    boxes = block.find_elements(By.CSS_SELECTOR, ".unit")
    assert [box.get_attribute("textContent") for box in boxes] == [" quick", " fox⏎"]
    shown = block.find_elements(By.CSS_SELECTOR, ".t")
    assert ["outside" in (one.get_attribute("class") or "") for one in shown] == [i == 4 for i in range(6)]
    assert block.get_attribute("textContent") == "".join(tokens).replace("\n", "⏎\n")

    told = {}
    for place, token in enumerate(shown):
        ActionChains(browser).move_to_element(token).perform()
        told[place] = text(browser, ".details .of-unit")
    assert told[1] == told[2]
    numbers = ("−2 nats", "−6 nats", "−4 nats")  # the unit's, on both sides, and their log-ratio
    assert told[1].startswith("Unit of 2 tokens; to the teacher 1 token:")
    assert all(number in told[1] for number in numbers), told[1]
    assert f"Unit of 1 token; to the teacher {len(ATTACKS)} tokens" in told[3]
    assert "document.title = 'attacked'" in told[3]
    assert "In no unit: the teacher says nothing about it." in told[4]
    assert browser.title == "eopd · run"
    assert browser.execute_script("return document.scripts.length") == 2
    assert browser.execute_script("return document.images.length") == 0

    shown[0].click()
    block.send_keys(Keys.ARROW_RIGHT)
    assert "token 2 of" in text(browser, ".details")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_the_window_and_follow_the_scheme(
    width: int, scheme: str, tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", seed=1, method="opd")]
    for shown in (runs[:1], runs):
        browser = visit(*shown, width=width, scheme=scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper.strip("rgb()").split(","))) < 3 * 128) == (scheme == "dark")


def test_tokens_are_shaded_read_and_ordered(
    tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    browser = visit(make_run(tmp_path / "run"))
    choose = {
        box.find_element(By.XPATH, "..").text.split("\n")[0].split(" ")[0]: Select(box)
        for box in browser.find_elements(By.CSS_SELECTOR, "#tokens-view select")
    }
    choose["Shade"].select_by_visible_text("teacher’s entropy")
    data = json.loads(browser.find_element(By.ID, "rollout-data").get_attribute("textContent") or "")
    column = next(one for one in data["columns"] if one["name"] == "teacher_entropy")
    tokens = browser.find_elements(By.CSS_SELECTOR, ".tokens .t")
    for value, token in zip(data["training"][0]["values"]["teacher_entropy"], tokens, strict=False):
        steps = min(5, int(5 * abs(value) / column["scale"] + 0.5))
        assert f"p{steps}" in (token.get_attribute("class") or "").split()

    # Pointing at a token shows its numbers; the arrow keys go on to the next, and it is said aloud.
    ActionChains(browser).move_to_element(tokens[3]).perform()
    assert "token 4 of" in text(browser, ".details")
    value = data["training"][0]["values"]["teacher_entropy"][3]
    assert f"{value} nats" in text(browser, ".details .chosen")
    tokens[3].click()
    browser.find_element(By.CSS_SELECTOR, ".tokens").send_keys(Keys.ARROW_RIGHT)
    assert "token 5 of" in text(browser, ".details")
    assert "teacher’s entropy" in (browser.find_element(By.CSS_SELECTOR, ".unseen").get_attribute("textContent") or "")

    choose["Order"].select_by_value("mean")
    means = [sum(row["values"]["teacher_entropy"]) / len(row["values"]["teacher_entropy"]) for row in data["training"]]
    first = data["training"][means.index(max(means))]
    assert browser.find_element(By.CSS_SELECTOR, ".block h3").text.startswith(f"Step {first['step']:g} ")

    choose["Show"].select_by_value("held")
    titles = [head.text.split("\n")[0] for head in browser.find_elements(By.CSS_SELECTOR, ".block h3")]
    assert [title.split(" completed")[0] for title in titles] == ["student before", "student after", "teacher"]


@pytest.mark.parametrize("name", ["constructor", "__proto__", "toString"])
def test_columns_may_be_called_like_what_every_object_has(
    name: str, tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    run = make_run(tmp_path / "run", steps=8, tokens=["a", "b"], columns={})
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    rows[0]["columns"] = {name: [0.25, 0.5]}  # the other rows lack it
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "answers.jsonl").unlink()
    browser = visit(run)
    boxes = {box.text.split("\n")[0]: Select(box) for box in browser.find_elements(By.CSS_SELECTOR, "select")}
    order = next(box for box in boxes.values() if any(one.get_attribute("value") == "mean" for one in box.options))
    order.select_by_value("mean")
    assert len(browser.find_elements(By.CSS_SELECTOR, ".block")) == len(rows)


def test_plots_are_read_with_the_keyboard(
    tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    browser = visit(make_run(tmp_path / "run"))
    plot = browser.find_element(By.CSS_SELECTOR, "svg[data-title='Reverse KL']")
    data = json.loads(plot.get_attribute("data-plot") or "")
    legend = plot.find_element(By.XPATH, "..").find_element(By.CSS_SELECTOR, ".legend b")
    plot.send_keys(Keys.ARROW_RIGHT)
    plot.send_keys(Keys.ARROW_RIGHT)
    assert legend.text == label(data["series"][0]["y"][1], "number")
    other = browser.find_element(By.CSS_SELECTOR, "svg[data-title='Length'] .axis")
    assert other.text == "step 2", "all plots over steps follow"
    plot.send_keys(Keys.ESCAPE)
    assert legend.text == label(data["series"][0]["y"][-1], "number")


def test_numbers_read_the_same_in_the_page_and_in_its_script(
    tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    browser = visit(make_run(tmp_path / "run"))
    values = [0.0, 0.5, -0.25, 1.23456, 12.345, -123.46, 1234.56, 99999.0, 1e5, 1234567.0, 9e-4, -3e-5, 1e-12, 0.001]
    for kind in ("number", "share"):
        script = "return arguments[0].map((value) => number(value, arguments[1]))"
        assert browser.execute_script(script, values, kind) == [label(value, kind) for value in values]  # type: ignore[arg-type]


def test_plots_are_saved(
    tmp_path: Path, downloads: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    runs = [make_run(tmp_path / "runs" / f"{method}-{seed}", method=method, seed=seed)
            for method in ("opd", "eopd") for seed in (0, 1)]  # fmt: skip
    browser = visit(runs[0].parent)
    figure = browser.find_element(By.CSS_SELECTOR, "svg[data-title='Reverse KL']").find_element(By.XPATH, "..")
    data: dict[str, Any] = json.loads(
        figure.find_element(By.CSS_SELECTOR, "svg[data-plot]").get_attribute("data-plot") or ""
    )
    for button in figure.find_elements(By.CSS_SELECTOR, "button"):
        button.click()
    for name in ("reverse-kl.csv", "reverse-kl.svg"):
        for _ in range(100):  # the browser writes when it likes
            if (downloads / name).exists():
                break
            time.sleep(0.1)
    with (downloads / "reverse-kl.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "eopd", "eopd low", "eopd high", "opd", "opd low", "opd high"]
    assert len(rows) == 1 + len(data["at"])
    assert [float(row[1]) for row in rows[1:]] == data["series"][0]["y"]
    assert [float(row[6]) for row in rows[1:]] == data["series"][1]["high"]
    picture = ElementTree.parse(downloads / "reverse-kl.svg").getroot()
    paths = [
        path for path in picture.iter("{http://www.w3.org/2000/svg}path") if path.get("class", "").startswith("line")
    ]
    assert len(paths) == 2
    assert all((path.get("stroke") or "").startswith("rgb") for path in paths), "needs no style sheet"
    words = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert words[-3:] == ["Reverse KL, nats per token", "eopd", "opd"], "title and legend"
    marks = list(picture.iter("{http://www.w3.org/2000/svg}line"))[-2:]
    assert [mark.get("stroke") for mark in marks] == [path.get("stroke") for path in paths], "each in its colour"


def test_everything_has_a_name_for_those_who_do_not_see_it(
    tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]
) -> None:
    browser = visit(make_run(tmp_path / "run"))
    for element in browser.find_elements(By.CSS_SELECTOR, "button, select, input, svg[role=img], [role=listbox]"):
        if element.is_displayed():
            assert element.accessible_name, element.get_attribute("outerHTML")
    assert browser.execute_script("return document.documentElement.lang") == "en"
    levels = [int(head.tag_name[1]) for head in browser.find_elements(By.CSS_SELECTOR, "h1, h2, h3")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), "no level is skipped"


def test_fifty_thousand_rollouts(tmp_path: Path, make_run: MakeRun, visit: Callable[..., webdriver.Chrome]) -> None:
    run = make_run(tmp_path / "run")
    row = json.dumps({"prompt_id": "p", "prompt": "1 2", "status": "completed", "tokens": list("abcdefgh") * 4,
                      "columns": {"teacher_entropy": [0.25] * 32, "student_entropy": [0.5] * 32}})  # fmt: skip
    with (run / "rollouts.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step // 10 + 1}, {row[1:]}\n' for step in range(50_000))
    browser = visit(run)
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    assert "of 50,000 recorded rollouts" in text(browser, "#rollouts + p")
    assert browser.find_elements(By.CSS_SELECTOR, ".tokens .t")


def test_images_stand_beside_the_tokens(
    make_run: MakeRun, visit: Callable[..., webdriver.Chrome], tmp_path: Path
) -> None:
    own = PromptImage.of(Image.new("RGB", (4, 4), "red"))
    rollout = {"prompt": "[image]What is it?", "images": [own.digest, "0" * 64], "teacher_images": [own.digest]}
    run = make_run(tmp_path / "run", steps=4, **rollout)
    keep(run, [rollout], [Prompt("seen", (Message("user", PLACEHOLDER, images=(own,)),))])
    browser = visit(run)
    seen = browser.find_elements(By.CSS_SELECTOR, ".pictures img")
    assert [one.get_attribute("alt") for one in seen] == ["image 1 of 2", "image for the teacher alone 1 of 1"]
    assert all(browser.execute_script("return arguments[0].naturalWidth", one) == 128 for one in seen)
    assert [own.text for own in browser.find_elements(By.CSS_SELECTOR, ".pictures figcaption")] == ["teacher only"]
    assert "[image 2 of 2: no thumbnail]" in browser.find_element(By.CSS_SELECTOR, ".pictures").text


@pytest.mark.parametrize("points", [False, True], ids=["images", "points"])
def test_the_samples_of_a_flow_run(points: bool, tmp_path: Path, visit: Callable[..., webdriver.Chrome]) -> None:
    """Images and points of all models are seen, in both schemes and in a narrow window; hostile texts do nothing."""
    hostile = "".join(ATTACKS)
    run = make_flow_run(tmp_path / "run", points=points, prompts=2)
    results = json.loads((run / "eval.json").read_text())
    for row in results["rows"]:
        own = results["samples"][row["who"]]
        row["samples"] = [{**one, "text": one["domain"] + hostile, "rewards": {hostile: 1.0}} for one in own]
        row |= {f"reward/{hostile}": {"value": 0.5}} | ({"who": hostile} if row["who"] == "teacher glyph" else {})
    (run / "eval.json").write_text(json.dumps(results))
    for width, scheme in ((1280, "light"), (390, "dark")):
        browser = visit(run, width=width, scheme=scheme)
        assert browser.title == "flow_opd · run"
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return document.scripts.length") == 1
        matrix = browser.find_element(By.CSS_SELECTOR, "table.matrix").get_attribute("textContent") or ""
        assert matrix.count(visible(hostile)) == 2, "a reward and a model"
        script = "return [...document.querySelectorAll('.grid-of-samples img')].map((x) => [x.naturalWidth, x.alt])"
        seen = browser.execute_script(script)
        assert [width for width, _ in seen] == [24] * (0 if points else 2 * 2 * 5)
        assert all(visible(hostile) in alt for _, alt in seen)
        script = "return [...document.querySelectorAll('.cloud-dots')].map((x) => x.getBoundingClientRect().width > 0)"
        assert browser.execute_script(script) == [True] * (2 * 3 + 3 * 2 if points else 0)
    plot = browser.find_element(By.CSS_SELECTOR, "svg[data-title='Reverse KL on held-out prompts']")
    plot.send_keys(Keys.ARROW_RIGHT)
    assert "student before 0.036" in (
        browser.find_element(By.CSS_SELECTOR, ".unseen").get_attribute("textContent") or ""
    )
    browser.find_element(By.CSS_SELECTOR, "#steps ~ details summary").send_keys(Keys.ENTER)
    script = "return [...document.querySelectorAll('.cells i')].map((x) => getComputedStyle(x).backgroundColor)"
    assert len(set(browser.execute_script(script))) == 6, "from none to the strongest shade"
    assert browser.find_element(By.CSS_SELECTOR, ".cells").is_displayed()
    levels = [int(head.tag_name[1]) for head in browser.find_elements(By.CSS_SELECTOR, "h1, h2, h3")]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), "no level is skipped"
