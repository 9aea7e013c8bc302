"""The page of a run whose student decides denoising steps: rewards, samples, divergences by step; hostile folders."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flow_runs import BESIDE, DECIDED, changed, lines, make_flow_run, png
from PIL import Image
from report_page import Page

from retort.cli import main
from retort.report import build_report
from retort.report.samples import LONGEST, picture_name

MakeRun = Callable[..., Path]
ATTACK = "<script>alert(1)</script>"
BEFORE, AFTER = "student before", "student after"


#: Images of a model in `images`: two of each prompt.
IMAGES = 2 * 3


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_flow_run(tmp_path / "run", prompts=3)


def shown(*runs: Path) -> Page:
    return Page(build_report(runs, runs[0].parent / "report.html"))


def table(page: Page, name: str) -> list[list[str]]:
    """The rows of the table in the region of that name, as texts of its cells."""
    region = page.raw.split(f'aria-label="{name}">')[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", region, re.DOTALL)
    return [[re.sub(r"<.*?>", " ", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def with_image(run: Path, content: bytes, name: str = "samples/" + "ab" * 32 + ".png") -> Page:
    """The page of a run of which the student's one image has these bytes."""
    if picture_name(name):
        (run / name).write_bytes(content)
    sample = {"prompt": "p", "text": "a red A", "domain": "glyph", "member": 0, "rewards": {"glyph": 1.0}}
    return shown(changed(run, AFTER, samples=[{**sample, "image": name}]))


def of_student(page: Page) -> list[str]:
    """The images of the student after the run."""
    return [str(one["src"]) for one in page.all("img") if AFTER in str(one["alt"])]


# --- what is on the page ---


def test_the_sections_of_a_flow_run(images: Path) -> None:
    page = shown(images)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["#rewards", "#result", "#samples", "#steps", "#curves", "#settings"]
    assert "Mean reward (avg@4) rose from 40.0\u202f% to 88.0\u202f%" in page.text
    assert "glyph rose from 0.42 to 0.86; the best teacher reaches 0.97." in page.text
    assert "Reverse KL to the teacher fell from 0.126 to 0.008 nats a denoising step." in page.text
    assert "24 prompts of glyphs; 4 samples each" in page.text
    assert "10" in page.text[page.text.index("Denoising steps") :][:40]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_no_words_of_text_runs(images: Path) -> None:
    page = shown(images)
    text = page.raw.split("<header>")[1].split('<h2 id="settings"')[0]
    assert not re.findall(r"tokens?\b|completions?\b|problems?\b|passages?\b", text.replace('class="tokens"', ""))
    assert 'id="rollout-data"' not in page.raw
    plots = page.plots()
    assert {
        "Reverse KL",
        "Rewards",
        "pass@k",
        "Held-out rewards",
        "Throughput",
        "How often each teacher spoke",
    } <= set(plots)
    assert not {"Length", "Reverse KL along the completion", "Truncated"} & set(plots)


def test_the_reward_matrix_has_models_down_and_rewards_by_domain_across(images: Path) -> None:
    parts, names, *rows = table(shown(images), "Rewards by model")
    assert parts[1:] == ["all prompts", "prompts of glyph", "prompts of color"]
    assert names == ["Model", *["glyph", "color"] * 3]
    assert [row[0] for row in rows] == [BEFORE, AFTER, "teacher", "teacher glyph", "teacher color"]
    assert [cell.split()[0] for cell in rows[3][1:]] == ["0.97", "0.21", "1.00", "0.17", "0.93", "0.24"]
    assert rows[0][1].split(maxsplit=1)[1].strip() == "[0.37, 0.47]"


def test_parts_may_stand_in_the_rows(images: Path) -> None:
    whole = shown(images).raw
    results = json.loads((images / "eval.json").read_text())
    for name in BESIDE:
        part = results.pop(name)
        results["rows"] = [row | ({name: part[row["who"]]} if row["who"] in part else {}) for row in results["rows"]]
    (images / "eval.json").write_text(json.dumps(results))
    assert shown(images).raw == whole


def test_samples_stand_side_by_side_by_prompt_and_model(images: Path) -> None:
    page = shown(images)
    head, *rows = table(page, "Images by prompt and model")
    assert head == ["Prompt", BEFORE, AFTER, "teacher glyph", "teacher color"]
    assert [row[0] for row in rows][:2] == ["a red A at the top glyph", "a green H at the bottom color"]
    spoken = [one["alt"] for one in page.all("img")]
    assert spoken[:3] == [
        f"sample {n} of {who}: a red A at the top" for who, n in ((BEFORE, 1), (BEFORE, 2), (AFTER, 1))
    ]
    experts = [index for index, row in enumerate(re.findall(r"<td.*?>", page.raw)) if "expert" in row]
    assert len(experts) == 3, "each prompt has one expert"
    policy = next(str(meta["content"]) for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy.endswith("; img-src data:")


def test_divergences_by_denoising_step(images: Path) -> None:
    plots = shown(images).plots()
    held_out = plots["Reverse KL on held-out prompts"]
    assert held_out["at"] == [str(step) for step in range(1, DECIDED + 1)]
    before, after = (one["y"] for one in held_out["series"])
    assert before == pytest.approx([0.09 * (0.4 + 0.25 * k) for k in range(DECIDED)])
    assert after == pytest.approx([0.006 * (0.4 + 0.25 * k) for k in range(DECIDED)])
    first, last = (one["y"] for one in plots["Reverse KL by denoising step, in training"]["series"])
    assert all(a > 3 * b for a, b in zip(first, last, strict=True))
    over = plots["Reverse KL over training"]["series"]
    assert [one["name"] for one in over] == ["step 1", "step 3", "step 5", "step 7", "step 9"]


def test_steps_may_be_counted_from_zero_and_windows_leave_some_out(images: Path) -> None:
    rows = [{"step": s, "reverse_kl/step-0": 0.5, "reverse_kl/step-2": 0.25, "own/step-1": 1.0} for s in (1, 2)]
    lines(images / "metrics.jsonl", rows)
    page = shown(changed(images, AFTER, kl_by_step=[0.1, None, {"value": 0.3}, "x"]))
    plots = page.plots()
    assert plots["Reverse KL by denoising step, in training"]["at"] == ["1", "3"]
    assert [one["name"] for one in plots["Reverse KL over training"]["series"]] == ["step 1", "step 3"]
    assert plots["own over training"]["series"][0]["y"] == [1.0, 1.0]
    assert plots["Reverse KL on held-out prompts"]["series"][1]["y"][:4] == [0.1, None, 0.3, None]


def test_recorded_trajectories_are_shaded_step_by_step(images: Path) -> None:
    head, *rows = table(shown(images), "Recorded trajectories")
    assert head == ["Training step", "Prompt", "Sample", "Reward", "Mean", "Each denoising step"]
    assert [row[0] for row in rows] == [str(step) for step in range(1, 61, 5)]
    own = json.loads((images / "rollouts.jsonl").read_text().splitlines()[0])["columns"]["reverse_kl"]
    assert float(rows[0][4]) == pytest.approx(sum(own) / len(own), abs=1e-4)
    page = shown(images)
    assert f"noise level 1: {own[0]:.3g} nats" in [cell.get("title") for cell in page.all("i")]


def test_steps_of_a_window_stand_below_those_of_others(images: Path) -> None:
    paths = [([0.9, 0.5], [0.5, -1.0]), ([0.5, 0.1], [0.25, 0.125]), ([0.9], [1.0, 2.0])]
    rows = [{"step": 1, "sigmas": sigmas, "columns": {"reverse_kl": kl}} for sigmas, kl in paths]
    lines(images / "rollouts.jsonl", rows)
    told = [str(cell["title"]) for cell in shown(images).all("i")]
    assert told[:3] == ["noise level 0.9: 0.5 nats", "noise level 0.5: -1 nats", "noise level 0.1: not decided"]
    assert told[5:8] == ["noise level 0.9: not decided", "noise level 0.5: 0.25 nats", "noise level 0.1: 0.125 nats"]
    # The third has another number of levels than of values: its steps are counted.
    assert told[13:] == ["step 1: 1 nats", "step 2: 2 nats"]


def test_points_are_scatter_plots_with_the_teachers_beneath(tmp_path: Path) -> None:
    page = shown(make_flow_run(tmp_path / "run", points=True))
    assert not page.all("img")
    figures = page.raw.split('<figure class="cloud">')[1:]
    names = re.findall(r"<h3>(.*?)</h3>", "".join(figures))[: len(figures)]
    assert names == [BEFORE, AFTER, "teacher", "teacher glyph", "teacher color"]
    dots = [re.findall(r'class="cloud-dots c(\d)([^"]*)" d="(.*?)"', one) for one in figures]
    assert [[color for color, _, _ in own] for own in dots] == [*[["6", "0", "1"]] * 2, *[["0", "1"]] * 3]
    assert dots[1][0][1] == " beneath"
    # Of two experts only what each draws for its own prompts lies beneath, not what they smear: 200 points each.
    assert dots[1][0][2].count("M") == 400
    outside = [int(found[1]) if (found := re.search(r"(\d+) of 400 points outside", one)) else 0 for one in figures]
    drawn = [sum(path.count("M") for _, css, path in own if "beneath" not in css) for own in dots]
    assert drawn == [400 - count for count in outside]
    assert "upper moon" in page.text and "lower moon" in page.text


@pytest.mark.parametrize(
    "points", [[[1.0, 2.0]], [[1e90, 1e90], [1e90, 1e90]], [[0, 0], [1e100, -1e100]], [[0, 0]] * 3]
)
def test_any_points_can_be_drawn(images: Path, points: list[list[float]]) -> None:
    samples = [{"prompt": "p", "text": "t", "point": point} for point in points]
    page = shown(changed(images, AFTER, samples=samples))
    assert "nan" not in page.raw.split('class="cloud"')[1].split("</figure>")[0]


def test_two_runs_share_what_is_the_same(tmp_path: Path) -> None:
    runs = [make_flow_run(tmp_path / "a"), make_flow_run(tmp_path / "b", method="grpo")]
    page = shown(*runs)
    rows = [row[0] for row in table(page, "Rewards by model")[2:]]
    assert rows == [BEFORE, "student after, a", "student after, b", "teacher", "teacher glyph", "teacher color"]
    head = table(page, "Images by prompt and model")[0]
    assert head == ["Prompt", *(name for name in rows if name != "teacher")]
    assert len(page.plots()["Reverse KL on held-out prompts"]["series"]) == 4


def test_seeds_are_one_experiment(tmp_path: Path) -> None:
    for seed in range(3):
        run = make_flow_run(tmp_path / "runs" / f"seed-{seed}", seed=seed)
        rewards = {"glyph": {"value": 0.8 + 0.05 * seed, "low": 0.7, "high": 0.95}}
        changed(run, AFTER, **{"reward/glyph": rewards["glyph"], "by_domain": {"glyph": rewards}})
    page = Page(build_report([tmp_path / "runs"], tmp_path / "report.html"))
    row = next(row for row in table(page, "Rewards by model") if row[0] == AFTER)
    assert [row[1].split()[0], row[3].split()[0]] == ["0.85", "0.85"]
    assert row[1].split(maxsplit=1)[1].strip() == row[3].split(maxsplit=1)[1].strip() == "[0.73, 0.97]"
    assert "Of the first seed of each." in page.text


def test_beside_a_text_run_everything_keeps_its_words(tmp_path: Path, make_run: MakeRun) -> None:
    page = shown(make_flow_run(tmp_path / "flow", prompts=3), make_run(tmp_path / "text"))
    assert "nats per token" in page.text
    assert {row["run"] for row in page.rollouts()["training"]} == {"text"}
    assert len(page.all("img")) == 4 * IMAGES


def test_a_run_without_an_evaluation_is_known_by_its_curves(images: Path) -> None:
    (images / "eval.json").unlink()
    page = shown(images)
    assert "nats per denoising step" in page.text
    assert "Reverse KL over training" in page.plots()
    assert not page.all("img")


def test_the_page_is_small(tmp_path: Path) -> None:
    """96 images of 512 pixels that are noise also when they are made small: nothing is harder to encode."""
    run = make_flow_run(tmp_path / "run", prompts=12)
    small = [Image.frombytes("RGB", (128, 128), random.Random(n).randbytes(3 * 128 * 128)) for n in range(2)]
    contents = [png(one.resize((512, 512), Image.Resampling.NEAREST)) for one in small]
    for index, path in enumerate((run / "samples").iterdir()):
        path.write_bytes(contents[index % 2])
    out = build_report([run], tmp_path / "report.html")
    page = Page(out)
    assert len(page.all("img")) == 96
    assert out.stat().st_size < 6_000_000
    for one in page.all("img")[:4]:
        assert max(_decoded(str(one["src"])).size) == LONGEST


def _decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))


def test_small_images_keep_their_pixels(images: Path) -> None:
    own = Image.effect_noise((24, 16), 60).convert("RGB")
    page = with_image(images, png(own))
    found = _decoded(of_student(page)[0])
    assert found.size == (24, 16)
    assert found.convert("RGB").tobytes() == own.tobytes()
    assert next(one for one in page.all("img") if AFTER in str(one["alt"]))["class"] == "sharp"


# --- hostile and damaged ---


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _header(width: int, height: int) -> bytes:
    return _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


_PNG = b"\x89PNG\r\n\x1a\n"
BROKEN = {
    "empty": (b"", "broken"),
    "text": (ATTACK.encode(), "broken"),
    "no PNG": (b"\xff\xd8\xff\xe0" + b"\0" * 100, "broken"),
    "cut off": (png(Image.effect_noise((64, 64), 90).convert("RGB"))[:900], "broken"),
    "huge": (_PNG + _header(100_000, 100_000) + _chunk(b"IDAT", zlib.compress(b"\0" * 1000)), "too large"),
    "no size": (_PNG + _header(0, 5) + _chunk(b"IDAT", b""), "too large"),
    "two headers": (_PNG + _header(8, 8) + _header(90_000, 90_000) + _chunk(b"IDAT", b"x"), None),
    "bad text": (_PNG + _header(8, 8) + _chunk(b"zTXt", b"a\0\0" + zlib.compress(b"0" * 10**8)), "broken"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "broken"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_left_out_with_a_word(images: Path, kind: str) -> None:
    content, why = BROKEN[kind]
    page = with_image(images, content)
    assert not of_student(page)
    assert "1 image is left out: 1 " in page.text
    assert why is None or f"1 image is left out: 1 {why}." in page.text
    assert len(page.all("img")) == 3 * IMAGES, "all others are there"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "samples/../../secret.png",
        "/etc/passwd",
        "samples/" + "AB" * 32 + ".png",
        "samples/" + "ab" * 32 + ".png\n",
        "samples/" + "ab" * 32 + ".svg",
        "thumbnails/" + "ab" * 32 + ".png",
        ["samples/" + "ab" * 32 + ".png"],
        3,
        "data:image/png;base64,AAAA",
        f'samples/"onerror="alert(1)".png{ATTACK}',
    ],
)
def test_only_files_of_the_folder_are_named(images: Path, name: Any) -> None:
    (images.parent / "secret.png").write_bytes(png(Image.new("RGB", (8, 8), "red")))
    assert picture_name(name) is None
    page = with_image(images, b"", name)
    assert not of_student(page)
    assert len(page.all("img")) == 3 * IMAGES


def test_links_out_of_the_folder_are_not_followed(images: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(Image.new("RGB", (8, 8), "red")))
    name = "cd" * 32
    (images / "samples" / f"{name}.png").symlink_to(secret)
    sample = {"prompt": "p", "text": "a red A", "member": 0, "image": f"samples/{name}.png"}
    changed(images, AFTER, samples=[sample])
    page = shown(images)
    assert not of_student(page)
    assert "1 image is left out: 1 missing." in page.text
    (images / "samples").rename(tmp_path / "elsewhere")
    (images / "samples").symlink_to(tmp_path / "elsewhere")
    assert not shown(images).all("img")


def test_without_pillow_a_line_says_what_is_missing(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    page = shown(images)
    assert not page.all("img")
    assert "24 images are left out: 24 Pillow is missing: pip install 'retort-distill[vision]'." in page.text
    assert table(page, "Rewards by model")


def test_hostile_texts_are_escaped(images: Path) -> None:
    results = json.loads((images / "eval.json").read_text())
    for row in results["rows"]:
        samples = [
            {key: ATTACK if isinstance(value, str) and key != "image" else value for key, value in one.items()}
            | {"rewards": {ATTACK: 1.0}}
            for one in results["samples"][row["who"]]
        ]
        row |= {"who": row["who"] if "student" in row["who"] else ATTACK, f"reward/{ATTACK}": {"value": 0.5}}
        row["by_domain"] = {ATTACK: {ATTACK: {"value": 0.5}}}
        row["samples"] = [*samples, {"prompt": ATTACK, "text": ATTACK, "domain": ATTACK, "point": [0.0, 1.0]}]
    (images / "eval.json").write_text(json.dumps(results))
    rollouts = [json.loads(line) for line in (images / "rollouts.jsonl").read_text().splitlines()]
    lines(images / "rollouts.jsonl", [row | {"prompt": ATTACK, "status": ATTACK} for row in rollouts])
    metrics = {"step": 1, f"{ATTACK}/step-1": 0.5, f"reward/{ATTACK}": 0.5, f"eval/reward/{ATTACK}": 0.5}
    lines(images / "metrics.jsonl", [metrics])
    config = json.loads((images / "config.json").read_text())
    config["flow"] = {"sampler": ATTACK, "steps": [ATTACK], "guidance": {ATTACK: 1}}
    (images / "config.json").write_text(json.dumps(config))
    page = shown(images)
    assert ATTACK not in page.raw
    assert page.text.count(ATTACK) > 20
    assert [script.get("type") for script in page.all("script")] == [None]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


ODD: list[Any] = [
    *(None, 3, "x", [], {}, [1, None, "x", [[]]], {"a": 1}, [{}], [{"point": [1]}], [{"point": ["a", None]}]),
    [{"point": [1e308, 2], "rewards": [1]}, {"rewards": {"a": "x", "b": 1e308, "c": 10**400}, "member": 1e99}],
    [{"prompt": {"a": 1}, "text": ["x"] * 1000, "domain": 3, "member": -1e90, "image": "samples/" + "0" * 64 + ".png"}],
    {"glyph": 3, "color": {"glyph": {"value": 10**400}}, "": {"": {"value": -1, "low": "x"}}},
    [{"value": "x"}, {"value": 1e308}, -1.0, 0, True],
]


@pytest.mark.parametrize("key", ["samples", "kl_by_step", "by_domain", "reward/glyph", "who"])
@pytest.mark.parametrize("odd", range(len(ODD)))
def test_odd_values_are_drawn_as_far_as_they_can(tmp_path: Path, key: str, odd: int) -> None:
    images = make_flow_run(tmp_path / "run", prompts=1)
    changed(images, AFTER, **{key: ODD[odd]})
    assert main(["report", str(images)]) == 0
    results = json.loads((images / "eval.json").read_text())
    (images / "eval.json").write_text(json.dumps({**results, key: ODD[odd], "rows": results["rows"][:1]}))
    page = shown(images)
    assert "nan" not in page.raw.split("<header>")[1].split("<script")[0].replace("nanm", "")


def test_long_texts_and_many_samples_keep_within_the_page(tmp_path: Path) -> None:
    run = make_flow_run(tmp_path / "run", points=True)
    long = {"prompt": "p" * 100_000, "text": "t" * 1_000_000, "domain": "d" * 10_000}
    many = [{**long, "member": n, "rewards": {f"r{k}": 0.5 for k in range(60)}, "point": [n, n % 7]} for n in range(20)]
    few = [{"prompt": str(n), "text": str(n), "member": 0, "rewards": {}, "point": [n, n % 7]} for n in range(9000)]
    changed(run, AFTER, samples=[*many, *few])
    assert build_report([run], tmp_path / "report.html").stat().st_size < 1_000_000
