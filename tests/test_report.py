"""support/report.py: the page of a run, read as text, and opened in a browser.

    pytest tests/test_report.py
"""
import doctest
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from config import METHODS, Config, papers_settings, settings
from paper import figures
from support import report, runlog
from support.runlog import RunLog

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
HOSTILE = ("</script><script>document.title='owned'</script>"
           "<img src=x onerror=\"document.title='owned'\"> <!--")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """curves.png takes a second each time, and has its own tests."""
    monkeypatch.setattr(runlog, "draw_curves", str)


def sample(step, number, **other):
    return {"step": step, "id": f"id{number}", "demo": False, "prompt": f"problem {number}", "answer": "7",
            "response": f"response {step}/{number}", "reward": 0.0, "reason": "wrong", "finished": True,
            "demonstration": f"solution {number}"} | other


def metrics_of(step):
    return {"step": step, "reward/mean": step / 10, "loss/rl_pos": 1e-4 * step, "loss/rl_neg": -30.0 * step,
            "grader/timeouts": 0, "mine": 5.0}


def a_run(folder, done=4, texts=None, papers=None, eval_every=2, **flags):
    """A folder as a run leaves it: `done` steps, each with one sample of each kind."""
    log = RunLog(folder, active=True, step=-1, papers=papers)
    log.write_settings({**settings(Config(**flags)), "ranks": 2, "versions": {"torch": "2.13.0"}})
    for step in range(done + 1):
        rows = []
        if step:
            rows = [sample(step, 1, reward=1.0, reason="ok"), sample(step, 2, response=texts or "no"),
                    sample(step, 3, finished=False, reason="truncated"),
                    sample(step, 4, demo=True, demonstration=None)]
        log.write(metrics_of(step) | ({"eval/held": step / 8} if step % eval_every == 0 else {}), rows)
    log.close()
    return folder


class Page(HTMLParser):
    """What a browser makes of a page: its elements, its visible text, and the JSON of its samples."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.data, self.inside = [], [], "", (None, None)
        self.feed(text)
        self.steps = json.loads(self.data)
        self.text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = (tag, dict(attributes).get("id"))

    def handle_data(self, data):
        if self.inside == ("script", "data"):
            self.data += data
        elif self.inside[0] not in ("script", "style"):
            self.text.append(data)

    def handle_endtag(self, tag):
        self.inside = (None, None)


def read(folder):
    return Page((folder / "report.html").read_text())


# ----------------------------------------------------------------------------------------------------------
# What stands on it.

def test_a_run_leaves_a_page_that_says_what_was_run_and_how_far_it_came(tmp_path):
    page = read(a_run(tmp_path / "out", model="org/name", steps=4))
    assert "srft on org/name, 4 of 4 steps" in page.text and "torch 2.13.0" in page.text
    assert "held 0.0 % (step 0) 50.0 % (step 4) 50.0 % (step 4)" in page.text
    assert [step["step"] for step in page.steps] == [1, 2, 3, 4]
    assert page.steps[0]["rows"][0] == sample(1, 1, reward=1.0, reason="ok")


@pytest.mark.parametrize("method", METHODS)
def test_what_differs_from_the_papers_run_of_the_method_is_listed_and_nothing_else(method, tmp_path):
    papers = papers_settings(method)
    flags = {"papers": papers, "method": method, **METHODS[method].flags}
    page = read(a_run(tmp_path / "as_it_is", **flags))
    assert "run of this method Nothing." in page.text
    page = read(a_run(tmp_path / "other", **flags | {"lr": 0.5}))
    assert f"flag here paper --lr 0.5 {papers['lr']} All settings" in page.text


def test_each_loss_term_has_a_chart_of_its_own_with_a_scale_on_which_it_can_be_read(tmp_path):
    text = (a_run(tmp_path) / "report.html").read_text()
    charts = dict(re.findall(r'aria-label="([^"]+)">(.*?)</svg>', text, re.S))
    for name, top in (("loss/rl_pos", 1e-4 * 4), ("loss/rl_neg", 0.0)):
        ticks = [float(tick) for tick in re.findall(r'text-anchor="end">([^<]+)<', charts[name])]
        assert max(ticks) == pytest.approx(top) and len(ticks) >= 3
        places = re.search(r'points="([^"]+)"', charts[name])[1].split()
        heights = [float(place.split(",")[1]) for place in places]
        assert max(heights) - min(heights) > 100                          # of 190
    assert "mine" in charts                                               # which no section names
    assert "grader/timeouts" not in charts and "0 at every step: grader/timeouts." in text


@pytest.mark.parametrize("points", [[(3, 0.5)], [(0, 0.0), (9, 0.0)], [(1, -1e-9), (2, 5e12)]], ids=repr)
def test_a_chart_of_one_point_of_a_constant_or_of_extremes_stays_within_its_frame(points):
    text = report.chart("x", {"x": points})
    places = re.search(r'points="([^"]+)"', text)[1].split()
    assert len(places) == len(points) and "nan" not in text
    for place in places:
        x, y = map(float, place.split(","))
        assert 0 <= x <= report.WIDTH and 0 <= y <= report.HEIGHT


def test_a_long_curve_is_thinned_and_keeps_its_spikes():
    points = [(step, 100.0 if step == 777 else step % 2) for step in range(5000)]
    found = report.thinned(points)
    assert len(found) <= report.MOST_POINTS and (777, 100.0) in found
    assert found == sorted(found) and set(found) <= set(points)


def test_a_page_holds_a_bounded_part_of_the_samples_evenly_over_the_run_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_BYTES", 40_000)
    page = read(a_run(tmp_path, done=100, texts="x" * 1000, eval_every=50))    # about 1,800 bytes a step
    steps = [step["step"] for step in page.steps]
    gaps = {later - step for step, later in zip(steps, steps[1:])}
    assert steps[0] == 1 and steps[-1] == 100 and max(gaps) - min(gaps) <= 1
    assert 20 <= len(steps) < 26 and len(page.data) < 50_000
    assert f"{4 * len(steps)} of 400 samples, of {len(steps)} of 100 steps" in page.text
    monkeypatch.setattr(report, "MOST_BYTES", 20_000)                      # of 20 steps: less of each
    report.write_report(tmp_path, {})
    page = read(tmp_path)
    assert len(page.steps) == 20 and all(0 < len(step["rows"]) < 4 for step in page.steps)


@pytest.mark.parametrize("text", [
    '{"step": 1, "id"', "[1]\n", "[" * 100_000 + "\n", '{"id": 3}\n', "\0\0\n"], ids=lambda text: text[:9])
def test_lines_of_samples_that_a_kill_or_a_hand_has_spoilt_are_passed_over(text, tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample(1, 1)) + "\n" + text)
    found, _ = report.read_samples(tmp_path / "samples.jsonl")
    assert found == [{"step": 1, "rows": [sample(1, 1)]}]


def test_the_examples_of_the_docstrings_are_what_the_code_does():
    failed, tried = doctest.testmod(report)
    assert tried and not failed


def test_settings_that_are_no_object_are_told_in_words(tmp_path):
    (a_run(tmp_path) / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json: expected an object, found .1."):
        report.write_report(tmp_path, {})
    with pytest.raises(SystemExit, match="config.json: expected an object"):
        figures.main(["report", str(tmp_path)])


def test_a_page_without_samples_evaluations_and_settings_is_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": NaN, "eval/x": null}\n')
    report.write_report(tmp_path, {})
    page = read(tmp_path)
    assert page.steps == [] and "No evaluation yet" in page.text and "config.json is not there" in page.text


# ----------------------------------------------------------------------------------------------------------
# Safe to open, wherever it comes from.

def hostile_run(folder):
    a_run(folder, texts=HOSTILE, model=HOSTILE, data="{{samples}}")
    return folder


def test_hostile_text_stays_text_and_the_page_asks_for_nothing(tmp_path):
    hostile_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, f"eval/{HOSTILE}": 0.5, f"loss/{HOSTILE}": 0.5}) + "\n")
    report.write_report(tmp_path, papers_settings("srft"))
    page = read(tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags and page.text.count("document.title") >= 4
    assert page.steps[0]["rows"][1]["response"] == HOSTILE and "{{samples}}" in page.text
    for tag, attributes in page.elements:
        assert not {"src", "href"} & attributes.keys() and not [n for n in attributes if n.startswith("on")]
    assert "http" not in (tmp_path / "report.html").read_text().replace("http-equiv", "")


def test_text_that_is_no_unicode_does_not_keep_a_page_from_being_written(tmp_path):
    a_run(tmp_path, texts="\ud800", model="\udcff")
    assert read(tmp_path).steps[0]["rows"][1]["response"] == "\ud800"


@pytest.mark.parametrize("broken", ["read_samples", "chart", "write_whole"])
def test_a_page_that_cannot_be_written_is_a_warning_and_the_one_of_before_stays(
        broken, tmp_path, monkeypatch):
    log = RunLog(tmp_path, active=True, step=-1)
    log.write({"step": 0, "eval/a": 0.25})
    before = (tmp_path / "report.html").read_text()

    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(report, broken, fail)
    with pytest.warns(UserWarning, match="could not write .*report.html: no room"):
        log.write({"step": 1, "eval/a": 0.5})
    assert (tmp_path / "report.html").read_text() == before
    assert not list(tmp_path.glob(".*.new"))


# ----------------------------------------------------------------------------------------------------------
# When it is written.

def test_it_is_written_at_each_evaluation_and_at_the_end_and_not_otherwise(tmp_path):
    log, file = RunLog(tmp_path, active=True, step=-1), tmp_path / "report.html"
    log.write({"step": 1, "reward/mean": 0.5})
    assert not file.exists()
    log.write({"step": 2, "reward/mean": 0.5, "eval/a": 0.5})
    assert "2 steps" in read(tmp_path).text
    log.write({"step": 3, "reward/mean": 0.5})
    assert "2 steps" in read(tmp_path).text
    log.close()
    assert "3 steps" in read(tmp_path).text


def test_the_command_writes_the_page_of_a_run_that_is_there(tmp_path, capsys):
    a_run(tmp_path, method="sft", **METHODS["sft"].flags)
    (tmp_path / "report.html").unlink()
    figures.main(["report", str(tmp_path)])
    assert capsys.readouterr().out == f"wrote {tmp_path}/report.html\n"
    assert "run of this method Nothing" in read(tmp_path).text             # with SFT's own steps and rate
    with pytest.raises(SystemExit, match="no metrics.jsonl with a row"):
        figures.main(["report", str(tmp_path / "none")])


# ----------------------------------------------------------------------------------------------------------
# In a browser.

# Opens the page in a frame as wide as a telephone, works it by keyboard and mouse, and notes what is there.
VISITOR = """<!doctype html><pre id="notes"></pre>
<iframe id="frame" width="380" height="700" src="report.html"></iframe>
<script>
const notes = {}, frame = document.getElementById("frame");
frame.addEventListener("load", () => {
  const page = frame.contentDocument;
  const find = id => page.getElementById(id);
  const press = (key, at = page.body) =>
    at.dispatchEvent(new frame.contentWindow.KeyboardEvent("keydown", {key, bubbles: true}));
  const choose = name => page.querySelector(`input[value="${name}"]`).click();
  const note = name => {
    notes[name] = find("status").textContent + "|" +
      [...page.querySelectorAll("#shown h4")].map(node => node.textContent).join(",");
  };
  notes.title = page.title;
  notes.width = page.documentElement.scrollWidth;
  note("first");
  press("ArrowRight"); note("arrow right");
  press("ArrowLeft"); press("ArrowLeft"); note("arrow left");
  find("after").click(); note("button");
  press("ArrowRight", find("place")); note("slider keeps its keys");
  for (const name of ["right", "wrong", "cut off", "wrong demonstrations", "all"]) {
    choose(name);
    note(name);
  }
  notes.hostile = [...page.querySelectorAll("#shown pre")].map(node => node.textContent);
  notes.scripts = page.scripts.length;
  notes.images = page.images.length;
  const unnamed = [...page.querySelectorAll("button, input, pre")].filter(
    node => !node.getAttribute("aria-label") && !node.closest("label"));
  notes.unnamed = unnamed.length;
  const button = find("after");
  button.focus({focusVisible: true});
  notes.outline = frame.contentWindow.getComputedStyle(button).outlineWidth;
  document.getElementById("notes").textContent = JSON.stringify(notes);
});
</script>"""


@pytest.mark.skipif(not BROWSER, reason="no chromium or chrome on this machine")
@pytest.mark.slow
def test_a_browser_shows_samples_by_step_and_kind_on_a_narrow_screen_by_keyboard_and_runs_no_sample(tmp_path):
    hostile_run(tmp_path / "run")
    (tmp_path / "run" / "visitor.html").write_text(VISITOR)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
               "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/run/visitor.html"]
    document = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    notes = json.loads(html.unescape(re.search('<pre id="notes">(.*?)</pre>', document, re.S)[1]))
    everything = "4 of 4 samples|id1,id2,id3,id4"
    assert notes["first"] == notes["arrow left"] == f"step 1: {everything}"
    for name in ("arrow right", "button", "slider keeps its keys", "all"):
        assert notes[name] == f"step 2: {everything}", name
    kinds = {"right": "id1", "wrong": "id2", "cut off": "id3", "wrong demonstrations": "id4"}
    for name, shown in kinds.items():
        assert notes[name] == f"step 2: 1 of 4 samples|{shown}", name
    assert notes["hostile"].count(HOSTILE) == 1 and "solution 1" in notes["hostile"]
    assert (notes["title"], notes["scripts"], notes["images"]) == ("run", 2, 0)
    assert notes["width"] <= 380 and notes["unnamed"] == 0 and notes["outline"] == "3px"
