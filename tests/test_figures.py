"""paper/figures.py: probabilities against transformers' own, pages that a browser opens, curves.

    pytest tests/test_figures.py              # -m "not slow" for those that start no process (15 s)
"""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from config import TINY
from conftest import ENV, ROOT, run, start
from data import load_examples
from paper import curves as C
from paper import figures as A
from paper import pictures as P
from support.runlog import read_rows
from tiny.task import make_tokenizer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
SCALE = ["--template", "none", "--max_prompt_tokens", 64, "--max_response_tokens", 160, "--device", "cpu"]


# ----------------------------------------------------------------------------------------------------------
# Pages.

HOSTILE = ["</span><script>document.title='owned'</script>", "\n", "", "$x_1$", "&amp;", "\"'",
           "\u00e9\u4e2d\ufffd"]


def page(scale="probability", tokens=HOSTILE, title="<b>t</b>"):
    rng = np.random.default_rng(0)
    base, tuned = (np.log(rng.uniform(0.01, 1, len(tokens))) for _ in range(2))
    return P.heatmap(tokens, base, tuned, scale, title), base, tuned


@pytest.mark.parametrize("scale", ["probability", "log"])
def test_a_page_holds_every_token_as_text_with_both_probabilities(scale):
    text, base, tuned = page(scale)
    body = text[text.index("<pre>"):]
    assert body.count("<span") == len(HOSTILE) and "<script" not in text and "<b>" not in text
    assert all(f"base {np.exp(b):.4f}, tuned {np.exp(t):.4f}" in body for b, t in zip(base, tuned))
    assert "http" not in text and "src=" not in text                      # self-contained


def test_the_darker_the_larger_the_change_blue_for_more_and_red_for_less():
    base, tuned = np.log([0.1, 0.5, 0.9, 0.5]), np.log([1.0, 0.6, 0.1, 0.5])
    text = P.heatmap(list("abcd"), base, tuned, "probability", "t")
    span = r"<span style=\"background:rgba\((\d+),(\d+),(\d+),([\d.]+)\);color:#\w+\" title"
    found = [tuple(map(float, rgba)) for rgba in re.findall(span, text)]
    (up, small, down, same) = found
    assert up[:3] == small[:3] == P.COLOURS["up"] and down[:3] == P.COLOURS["down"]
    assert [rgba[3] for rgba in found] == pytest.approx([0.9, 0.1, 0.8, 0.0])


def test_shares_count_changes_of_either_sign():
    base, tuned = np.log([0.1, 0.9, 0.5, 0.5]), np.log([0.25, 0.3, 0.55, 0.5])
    assert P.share(base, tuned, 0.1) == 0.5 and P.share(base, tuned, 0.5) == 0.25
    assert P.share(base[:0], tuned[:0], 0.1) == 0


@pytest.mark.skipif(not BROWSER, reason="no chromium or chrome on this machine")
@pytest.mark.slow
def test_a_browser_shows_the_page_and_hostile_tokens_stay_text(tmp_path):
    text, *_ = page(tokens=[*HOSTILE, "plain", "words"])
    (tmp_path / "page.html").write_text(text)

    def browse(*flags):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,600", *flags,
                   f"file://{tmp_path}/page.html"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    document = browse("--dump-dom").stdout
    assert "<title>&lt;b&gt;t&lt;/b&gt;</title>" in document
    assert document[document.index("<pre>"):].count("<span") == len(HOSTILE) + 2
    browse(f"--screenshot={tmp_path}/page.png")
    from matplotlib.image import imread
    picture = imread(tmp_path / "page.png")[..., :3]
    assert picture.shape[:2] == (600, 900) and 0.5 < (picture > 0.95).all(-1).mean() < 0.99
    red, blue = picture[..., 0] - picture[..., 2] > 0.2, picture[..., 2] - picture[..., 0] > 0.2
    assert red.sum() > 50 and blue.sum() > 50                             # tokens of both colours are on it


# ----------------------------------------------------------------------------------------------------------
# How the runs were trained.

def trained(folder, **settings):
    """A run's folder that says how it was trained."""
    write_run(folder, [{"step": 0}])
    defaults = {"template": "paper", "max_prompt_tokens": 1024, "max_response_tokens": 8192,
                "rope_theta": 40_000.0, "window": 16_384}
    (folder / "config.json").write_text(json.dumps(defaults | settings))
    return str(folder)


def settled(*arguments):
    args = A.parse(list(map(str, arguments)))
    A.take_from_runs(args)
    return {flag: getattr(args, flag) for flag in A.OF_RUNS if hasattr(args, flag)}


def test_a_figure_takes_template_limits_and_window_from_the_run_that_it_is_of(tmp_path, capsys):
    run = trained(tmp_path / "run", template="luffy", max_response_tokens=99, window=200)
    expected = {"template": "luffy", "max_prompt_tokens": 1024, "max_response_tokens": 99,
                "rope_theta": 40_000.0, "window": 200}
    for arguments in (["fig2a", "--base", TINY, "--tuned", run], ["fig2a", "--base", run, "--tuned", TINY],
                      ["fig2b", "--base", TINY, "--tuned", f"A={run}", f"B={TINY}"],
                      ["respond", "--model", run]):
        assert settled(*arguments) == expected
    assert f"--template luffy, as {run} was trained" in capsys.readouterr().out
    fig3 = settled("fig3", "--references", "a", "b", "c", "--runs", f"x={run}+{run}")
    assert fig3 == {name: value for name, value in expected.items() if name != "template"}


def test_a_flag_that_is_given_wins_over_the_run_and_without_a_run_the_defaults_stand(tmp_path):
    run = trained(tmp_path / "run", template="luffy")
    given = settled("fig2a", "--base", TINY, "--tuned", run, "--template", "none", "--rope_theta", 0,
                    "--window", 0)
    assert (given["template"], given["rope_theta"], given["window"]) == ("none", 0, 0)
    assert settled("respond", "--model", TINY) == A.OF_RUNS


def test_runs_that_were_trained_unlike_each_other_are_refused_until_the_flag_is_given(tmp_path):
    a, b = trained(tmp_path / "a"), trained(tmp_path / "b", template="none")
    command = ["fig2b", "--base", TINY, "--tuned", f"A={a}", f"B={b}"]
    with pytest.raises(ValueError, match=f"--template: .* with the same one .paper in {a}, none in"):
        settled(*command)
    assert settled(*command, "--template", "none")["template"] == "none"


def test_a_prompt_with_a_response_over_the_window_is_refused(monkeypatch):
    scorer = A.Scorer.__new__(A.Scorer)
    scorer.window, scorer.folder = 5, "out/base"
    with pytest.raises(ValueError, match="has 6 tokens, over the window of 5 tokens of out/base: lower"):
        scorer([A.M.Sequence([1, 2], [3]), A.M.Sequence([1, 2, 3, 4], [5, 6])])


def test_fig2a_shows_the_example_that_is_asked_for_by_its_id(tmp_path):
    tokenizer, examples = make_tokenizer(), load_examples("tiny:train")
    args = A.parse(["fig2a", "--base", TINY, "--tuned", TINY, "--data", "tiny:train", *map(str, SCALE)])

    def responses(source, example):
        return [tokenizer.decode(s.response) for s in A.responses(args, source, tokenizer, example)]

    assert responses("demo", examples[7].id) == [examples[7].demo + "<eos>"]
    assert responses("demo", None)[0] == examples[0].demo + "<eos>" and responses("demo", "other") == []
    rows = [{"id": f"id{k}", "prompt": [1], "response": tokenizer(str(k))["input_ids"], "logp": [0.0]}
            for k in range(3)]
    (tmp_path / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert responses(tmp_path / "base.jsonl", "id2") == ["2"]
    assert responses(tmp_path / "base.jsonl", "other") == []


@pytest.mark.slow
def test_figures_are_made_from_any_folder(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "reward/mean": 0.5}])
    environment = {name: value for name, value in ENV.items() if name != "PYTHONPATH"}
    command = [sys.executable, ROOT / "paper" / "figures.py", "fig6", f"RL={run}", "--out", "here"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "here.png").exists(), done.stderr


# ----------------------------------------------------------------------------------------------------------
# Models.

def by_transformers(folder, sequences):
    """log p of the responses' tokens by a forward of each sequence alone."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for prompt, response in sequences:
        ids = torch.tensor(prompt + response)
        with torch.no_grad():
            log_p = lm(ids[None]).logits[0].log_softmax(-1)[len(prompt) - 1:-1]
        rows.append(log_p.gather(1, ids[len(prompt):, None])[:, 0].numpy())
    return rows


@pytest.mark.slow
def test_fig2a_and_2b_show_the_probabilities_that_transformers_computes(whole_run, tmp_path):
    tokenizer, examples = make_tokenizer(), load_examples("tiny:train")
    sequences = []
    for example in examples[:9]:
        demo = tokenizer(example.demo)["input_ids"] + [tokenizer.eos_token_id]
        sequences.append((tokenizer(example.problem)["input_ids"], demo))
    before, after = by_transformers(TINY, sequences), by_transformers(whole_run / "hf", sequences)
    # Template and limits are those of the run: this command names none.
    said = run(["-m", "paper.figures", "fig2a", "--base", TINY, "--tuned", whole_run, "--data", "tiny:train",
                "--example", examples[3].id, "--out", tmp_path / "a", "--device", "cpu"])
    assert f"--template none, as {whole_run} was trained" in said
    found = json.loads((tmp_path / "a.json").read_text())
    np.testing.assert_allclose(found["logp_base"], before[3], atol=1e-4)
    np.testing.assert_allclose(found["logp_tuned"], after[3], atol=1e-4)
    assert "".join(found["tokens"]) == examples[3].demo + "<eos>" and examples[3].id in found["title"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "</html>" in (tmp_path / "a.html").read_text()

    run(["-m", "paper.figures", "fig2b", "--base", TINY, "--tuned", f"SRFT={whole_run}", "itself=" + TINY,
         "--data", "tiny:train", "--limit", 9, "--out", tmp_path / "b", *SCALE], ranks=2)
    found = json.loads((tmp_path / "b.json").read_text())
    change = np.exp(np.concatenate(after)) - np.exp(np.concatenate(before))
    assert found["SRFT"]["tokens"] == len(change)
    assert found["SRFT"]["mean |change|"] == pytest.approx(np.abs(change).mean(), rel=1e-3)
    assert found["SRFT"]["changed by more than 0.1"] == pytest.approx((np.abs(change) > 0.1).mean(), abs=2e-3)
    assert sum(found["SRFT"]["share of each bin"]) == pytest.approx(1)
    assert found["itself"]["mean |change|"] < 1e-6


@pytest.mark.slow
def test_fig3_measures_distances_of_checkpoints_to_what_respond_recorded(whole_run, tmp_path):
    file = tmp_path / "base.jsonl"
    run(["-m", "paper.figures", "respond", "--model", TINY, "--data", "tiny:heldout", "--limit", 6,
         "--out", file, *SCALE])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 6 and len({row["id"] for row in rows}) == 6
    sequences = [(row["prompt"], row["response"]) for row in rows]
    own = by_transformers(TINY, sequences)
    for row, logp in zip(rows, own):
        np.testing.assert_allclose(row["logp"], logp, atol=1e-3)
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    run(["-m", "paper.figures", "fig3", "--references", f"base={file}", f"two={tmp_path}/two.jsonl",
         f"again={file}", "--runs", f"SRFT={whole_run}", "--out", tmp_path / "c", *SCALE[2:]])
    path = json.loads((tmp_path / "c.json").read_text())["runs"]["SRFT"]
    assert [point["step"] for point in path] == [0, 4, 6] and max(path[0]["distances"]) < 1e-3
    tuned = by_transformers(whole_run / "hf", sequences)

    def distance(n):
        return np.mean([np.abs(np.exp(a) - np.exp(b)).mean() for a, b in zip(tuned[:n], own)])

    assert path[-1]["distances"] == pytest.approx([distance(6), distance(2), distance(6)], abs=1e-4)
    assert 0 < path[1]["distances"][0] != path[2]["distances"][0]


# ----------------------------------------------------------------------------------------------------------
# Curves.

def write_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_sequence_counts_its_steps_through_and_seeds_give_mean_and_range(tmp_path):
    def row(step, a):
        return {"step": step, "eval/a": a, "eval/b": a + 0.2, "reward/mean": None if step == 0 else a}

    first = write_run(tmp_path / "first", [row(0, 0.1), {"step": 1, "reward/mean": 0.7}, row(2, 0.3)])
    second = write_run(tmp_path / "second", [row(0, 0.3), row(1, 0.5)])
    assert C.read_curve(f"{first}+{second}", ["eval/a", "eval/b"]) == [
        (0, pytest.approx(0.2)), (2, pytest.approx(0.4)), (3, pytest.approx(0.6))]
    assert C.read_curve(first, ["reward/mean"]) == [(1, 0.7), (2, 0.3)]
    other = write_run(tmp_path / "other", [row(0, 0.5), row(2, 0.9), row(9, 0.0)])
    steps, mean, least, most = C.read_curves(f"{first},{other}", ["eval/a", "eval/b"])
    assert steps == [0, 2] and mean == pytest.approx([0.4, 0.7])
    assert least == pytest.approx([0.2, 0.4]) and most == pytest.approx([0.6, 1.0])


@pytest.mark.parametrize("figure", C.PANELS)
def test_every_figure_of_curves_is_drawn_also_for_runs_without_rollouts(figure, tmp_path, capsys):
    rows = []
    for step in range(4):
        rows.append({"step": step, "eval/x": step / 4, "eval_len/x": 9.0, "eval_entropy/x": 0.5,
                     "reward/mean": step / 3 if step else None})
        for term in C.TERMS:
            rows[-1][f"grad_norm/{term}"] = step / 4
    sft = [row | {"reward/mean": None} for row in rows]
    runs = [write_run(tmp_path / name, r) for name, r in (("rl", rows), ("sft", sft))]
    sequence = f"SFT->RL={runs[1]}+{runs[0]},{runs[1]}+{runs[0]}"
    A.main([figure, f"RL={runs[0]}", sequence, "--out", str(tmp_path / "f")])
    found = json.loads((tmp_path / "f.json").read_text())
    panel = found["rl_neg" if figure == "terms" else "accuracy"]
    assert panel["RL"]["mean"] == [0, 0.25, 0.5, 0.75] and panel["SFT->RL"]["step"] == [0, 1, 2, 3, 4, 5, 6]
    assert (tmp_path / "f.png").stat().st_size > 5000 and "SFT->RL" in capsys.readouterr().out


def test_a_curve_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    sft = write_run(tmp_path / "sft", [{"step": s, "eval/x": 0.5} for s in range(3)])       # has no rewards
    rl = write_run(tmp_path / "rl", [{"step": s, "eval/x": 0.5, "reward/mean": 0.5} for s in range(3)])
    drawn = []
    monkeypatch.setattr(P, "save_figure", lambda figure, file: drawn.extend(
        {line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes))
    A.main(["fig6", f"SFT={sft}", f"RL={rl}", "--out", str(tmp_path / "f")])
    reward, accuracy = drawn
    assert set(reward) == {"RL"} and reward["RL"] == accuracy["RL"] != accuracy["SFT"]


def test_a_mean_over_held_out_sets_names_them_and_takes_only_those_that_all_runs_have(
        tmp_path, capsys, monkeypatch):
    both = write_run(tmp_path / "both", [{"step": 0, "eval/a": 0.1, "eval/b": 0.5},
                                         {"step": 1, "eval/a": 0.2}])
    three = write_run(tmp_path / "three", [{"step": 0, "eval/a": 0.3, "eval/b": 0.5, "eval/c": 1.0}])
    without = write_run(tmp_path / "without", [{"step": 0, "reward/mean": 1.0}])
    titles = []
    monkeypatch.setattr(P, "save_figure", lambda figure, file: titles.extend(
        axes.get_title() for axes in figure.axes))
    A.main(["fig4", f"A={both}", f"B={three}", f"C={without}", "--out", str(tmp_path / "f")])
    found = json.loads((tmp_path / "f.json").read_text())["accuracy"]
    assert titles == ["held-out accuracy (mean of a, b)"]
    assert "left out, since not all runs have it: eval/c" in capsys.readouterr().out
    assert found["A"]["metrics"] == ["eval/a", "eval/b"] and found["A"]["mean"] == [pytest.approx(0.3)]
    assert found["B"]["mean"] == [pytest.approx(0.4)] and found["C"]["mean"] == []
    other = write_run(tmp_path / "other", [{"step": 0, "eval/d": 0.3}])
    with pytest.raises(SystemExit, match="no held-out set is in all runs .eval/a, eval/b, eval/d"):
        A.main(["fig4", f"A={both}", f"B={other}", "--out", str(tmp_path / "g")])


def test_a_figure_that_is_there_is_replaced_only_where_that_is_asked_for(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 0, "reward/mean": 0.5}])
    command = ["fig6", f"RL={run}", "--out", str(tmp_path / "f")]
    (tmp_path / "f.png").write_text("another")
    with pytest.raises(SystemExit, match="f.png: is there already; pass another --out, or --overwrite"):
        A.main(command)
    assert (tmp_path / "f.png").read_text() == "another" and not (tmp_path / "f.json").exists()
    A.main([*command, "--overwrite"])
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_panels_that_no_run_has_are_named_and_left_out_and_a_figure_without_any_is_refused(tmp_path, capsys):
    run = write_run(tmp_path / "rl", [{"step": s, "reward/mean": 0.5} for s in range(1, 4)])  # no --eval_data
    A.main(["fig6", f"RL={run}", "--out", str(tmp_path / "f")])
    said = capsys.readouterr().out
    assert "left out" in said and "--eval_data" in said and "reward 0.500" in said
    with pytest.raises(SystemExit, match="--eval_data"):
        A.main(["fig5", f"RL={run}", "--out", str(tmp_path / "g")])
    with pytest.raises(SystemExit, match="--term_gradients"):
        A.main(["terms", f"RL={run}", "--out", str(tmp_path / "g")])
    assert not (tmp_path / "g.png").exists()


@pytest.mark.parametrize("arguments, says", [
    (["fig6", "x=/no/such/run"], "/no/such/run: no metrics.jsonl"),
    (["fig6", "a=x", "a=y"], "name them LABEL=PATH"),
    (["fig2b", "--base", TINY, "--tuned", f"A={TINY}", f"B={TINY}", "--responses", "demo", "x", "y"],
     "--responses: one for all"),
    (["fig2a", "--base", TINY, "--tuned", TINY], "--data: which problems"),
    (["fig2a", "--base", TINY, "--tuned", TINY, "--data", "tiny:long"], "has a demonstration"),
])
def test_mistakes_are_one_line(arguments, says, monkeypatch):
    monkeypatch.setattr(A, "init_distributed", lambda _: (0, 1, torch.device("cpu"), None))
    with pytest.raises(SystemExit, match=re.escape(says)):
        A.main(arguments)


@pytest.mark.slow
def test_respond_ends_in_silence_on_two_ranks_and_refuses_what_exceeds_the_window_in_one_line(tmp_path):
    command = ["-m", "paper.figures", "respond", "--model", TINY, "--data", "tiny:heldout", "--limit", 5,
               "--out", tmp_path / "r.jsonl", *SCALE]
    ranks = start(command, 2)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0] and "Traceback" not in "".join(outputs), outputs
    assert (tmp_path / "r.jsonl").read_text().count("\n") == 5
    output = run([*command, "--overwrite", "--max_response_tokens", "8192"], ok=False)
    assert "over the window of 512 tokens" in output and "Traceback" not in output, output


@pytest.mark.parametrize("text", ["{", '{"prompt": [1]}\n', "[1]\n"])
def test_a_file_that_respond_did_not_write_is_refused(text, tmp_path):
    (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(ValueError, match="not a file of"):
        A.read_responses(tmp_path / "f.jsonl")


def test_a_run_that_is_not_done_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="no hf/ yet"):
        A.model_folder(write_run(tmp_path / "run", [{"step": 0}]))


def test_rows_are_read_up_to_a_torn_last_line_and_no_further_than_a_broken_one(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_rows(file) == []
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_rows(file) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 of 3 is no row"):
        read_rows(file)


ONE, TWO = b'{"step": 1}\n', b'{"step": 2}\n'


@pytest.mark.parametrize("content, steps", [
    (ONE + b"\n" + TWO, [1, 2]), (ONE + b"\r\n" + TWO, [1, 2]), (b"\xef\xbb\xbf" + ONE, [1]),
    (ONE + TWO + b"\0" * 50, [1, 2]),                                       # as a power cut leaves it
    (ONE + b'{"step": 2, "a": "\xff', [1]), (ONE + b'{"step": 2, "a": "\xe2\x80\xa8"}\n', [1, 2]),
    (ONE + b"\0" * 50 + TWO + ONE, None), (b'{"a": "\xff"}\n' + ONE, None), (b"5\n" + ONE, None),
    (b"null\n" + ONE, None), (b'{"a": 1}\n' + ONE, None), (b'{"step": "x"}\n' + ONE, None),
    (ONE + b'{"a": 1}\n', None)], ids=repr)
def test_rows_that_a_hand_or_a_power_cut_has_spoilt_are_read_or_named(tmp_path, content, steps):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(content)
    if steps is not None:
        assert [row["step"] for row in read_rows(file)] == steps
        return
    with pytest.raises(ValueError, match=f"{file}: line . of . is no row of a run .*mend or remove it"):
        read_rows(file)


def test_a_place_that_cannot_be_written_is_said_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    def curves(*_):
        """Not to be called."""
        pytest.fail("drawn")

    (tmp_path / "file").write_text("")
    monkeypatch.delenv("RANK", raising=False)        # which another test of this process may have set
    monkeypatch.setattr(A, "curves", curves)
    monkeypatch.setitem(A.FIGURES, "fig6", A.curves)
    with pytest.raises(SystemExit, match="paper/figures.py: .*file"):
        A.main(["fig6", f"--out={tmp_path / 'file' / 'deep' / 'x'}", "A=run"])
