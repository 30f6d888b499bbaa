"""The page: whole by itself, safe whatever the configs say, complete; and as a browser shows it."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from sglight.report.groups import tasks
from sglight.report.measures import compare
from sglight.report.page import render
from sglight.report.runs import find_runs
from tests.report.common import config, curve, results, write_run

VOID = {"meta", "link", "input", "br"}
EVIL = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Elements with their attributes, the text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f" {data}"


def quality(boundaries: int):
    return [
        (f"boundary_{i}/cosine", 10 * e, 2.0 * e, 0.1 * i + 0.05 * e)
        for i in range(boundaries)
        for e in range(5)
    ]


def stability():
    tags = {"sigma_max": 1.1, "gradient_norm": 0.5, "unheard_of": 3.0}
    values = [
        (f"stability/step_{j}/{tag}", 49, 10.0, value + j) for tag, value in tags.items() for j in range(4)
    ]
    return [*values, *(("stability/growth", 10 * e + 9, 2.0 * e, 1.0 + e) for e in range(5))]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """A sweep over two strategies and three seeds in which one job failed, with all that may be in the events."""
    folder = tmp_path_factory.mktemp("runs") / "a sweep #1"
    for seed in (1, 2, 3):
        plain = write_run(
            folder / f"{seed}-backprop", config(seed=seed), results(0.97 + seed / 1000), curve(0.97)
        )
        assert plain.is_dir()
        settings = config("dni", seed, strategy__stages=3)
        if seed == 3:
            write_run(folder / "3-dni", settings, status={"status": "failed", "reason": "UserError: no <b>"})
        else:
            more = [*quality(2), *stability()]
            write_run(
                folder / f"{seed}-dni", settings, results(0.94, speedup__theoretical=1.9), curve(0.94) + more
            )
    return folder


def page(folder: Path, by: tuple[str, ...] = (), at: Path | None = None) -> str:
    runs = find_runs([folder])
    return render(runs, [compare(task) for task in tasks(runs, by)], at or folder)


def test_the_page_needs_nothing_from_elsewhere(outputs):
    text = page(outputs)
    parsed = Page(text)
    assert not parsed.open
    for tag, attributes in parsed.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "use", "image")
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        if "href" in attributes and tag != "a":
            assert attributes["href"] == "data:,"
    assert not re.search(r"@import|url\(|https?:", text)
    (policy,) = [a["content"] for t, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_the_links_lead_to_the_runs_from_wherever_the_page_is(outputs, tmp_path):
    for at in (outputs, outputs.parent, tmp_path):
        links = [
            a["href"] for t, a in Page(page(outputs, at=at)).elements if t == "a" and a["href"][0] != "#"
        ]
        found = {os.path.normpath(at / unquote(link)) for link in links}
        assert found == {str(run.folder) for run in find_runs([outputs])}


def test_numbers_states_and_reasons_are_there(outputs):
    text = " ".join(Page(page(outputs)).text.split())
    assert "5 runs compared, 1 aside 5 finished , 1 failed" in text
    assert "97.20 % ± 0.10" in text
    assert "2 finished 1 failed" in text
    assert "UserError: no <b>" in text
    assert "Most accurate" in text and "time to target 93.06 %" in text


def test_there_is_a_chart_for_all_that_the_runs_have_logged(outputs):
    text = page(outputs)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert captions[:2] == ["Validation accuracy over batches", "Validation accuracy over wall time"]
    for caption in (
        "Training loss over wall time",
        "Cosine with the true gradient, at the end",
        "Cosine with the true gradient, boundary 1",
        "Largest singular value of a step, at the end",
        "Unheard of, at the end",
        "Growth of perturbations",
    ):
        assert caption in captions
    assert "nan" not in "".join(re.findall(r' d="(.*?)"', text)).lower()


def test_what_configs_and_errors_say_is_text_not_markup(tmp_path):
    settings = [config(EVIL, model__dynamics=EVIL, dataset__name=EVIL, model__steps=n) for n in (EVIL, 8)]
    for i, each in enumerate(settings):
        write_run(tmp_path / f"{i}-{EVIL.replace('/', '')}", each, results() | {EVIL: 1.0}, curve())
    write_run(tmp_path / "failed", config(EVIL), status={"status": EVIL, "reason": EVIL})
    text = page(tmp_path)
    parsed = Page(text)
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert "alert(1)" in parsed.text and "<script>alert" not in text
    known = {name for _, a in Page(page_of_one(tmp_path)).elements for name in a}
    assert {name for _, a in parsed.elements for name in a} <= known | {"data-value"}


def page_of_one(folder: Path) -> str:
    write_run(folder / "plain" / "a", config(), results(), curve())
    write_run(folder / "plain" / "b", config("dni"), results(), [*curve(), *quality(2), *stability()])
    return page(folder / "plain")


def test_the_best_says_who_is_as_good_within_a_deviation(tmp_path):
    accuracies = {"a": (0.95, 0.97), "b": (0.945, 0.965), "c": (0.80, 0.98)}
    for strategy, values in accuracies.items():
        for seed, acc in enumerate(values):
            write_run(tmp_path / f"{strategy}{seed}", config(strategy, seed), {"test/acc": acc})
    text = " ".join(Page(page(tmp_path)).text.split())
    # c is 7 % below a, and the root of the mean of both variances is 9.1 %.
    assert "Most accurate a 96.00 ± 1.41 % within a standard deviation: b, c" in text


@pytest.mark.parametrize("count", [0, 1])
def test_a_page_of_hardly_anything(tmp_path, count):
    write_run(tmp_path / "broken", config(), results())
    (tmp_path / "broken" / "config.yaml").write_text("")
    if count:
        write_run(tmp_path / "early", config())
    text = page(tmp_path)
    assert not Page(text).open
    assert "1 damaged" in text and ("<figure>" not in text)


def test_groups_that_are_put_together_are_marked(outputs):
    text = page(outputs, by=("model",))
    assert "also differ in strategy" in " ".join(Page(text).text.split())


def test_damaged_runs_are_listed_though_in_no_group(outputs):
    runs = find_runs([outputs])
    runs[0] = replace(runs[0], state="damaged", config={})
    text = render(runs, [compare(task) for task in tasks(runs)], outputs)
    assert runs[0].folder.name in text and "1 damaged" in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth, there = innerWidth, hidden = [];
  const root = document.querySelector("figure > svg")
  for (const text of document.querySelectorAll("figure > svg > text")) {
    const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
      hidden.push(text.textContent);
  }
  const shown = () => document.querySelectorAll("g[data-group]:not(.off)").length, before = shown();
  document.querySelector("input[data-toggles]").click();
  const first = () => document.querySelector(".comparison tbody tr").textContent.trim().split(/\\s+/)[0];
  const order = [first()];
  document.querySelector(".comparison th:nth-child(3) button").click(); order.push(first());
  document.querySelector(".comparison th:nth-child(3) button").click(); order.push(first());
  const small = parseFloat(getComputedStyle(root.querySelector("text")).fontSize)
    * root.getBoundingClientRect().width / root.viewBox.baseVal.width;
  document.title = JSON.stringify({wide, there, hidden, before, after: shown(), order, small});
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_is_cut_off_and_the_switches_work(outputs, tmp_path, width):
    """In a frame of that width: a headless window does not get as narrow as a phone."""
    inner = page(outputs).replace("</body>", MEASURE + "</body>")
    (tmp_path / "page.html").write_text(inner)
    (tmp_path / "frame.html").write_text(
        f'<iframe id="f" src="page.html" style="width:{width}px;height:3000px;border:0"></iframe><pre id="out"></pre>'
        "<script>onload = () => setTimeout(() => { out.textContent = f.contentDocument.title; }, 300)</script>"
    )
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
            "--dump-dom", (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    told = json.loads(html.unescape(re.search(r"<pre id=\"out\">(.*?)</pre>", done.stdout, re.DOTALL)[1]))
    assert told["there"] == width and told["wide"] <= width
    assert told["hidden"] == []
    assert 0 < told["after"] < told["before"]
    assert told["order"] == ["backprop", "backprop", "dni"]  # the best comes first
    assert told["small"] > 9
