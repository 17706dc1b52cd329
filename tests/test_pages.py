"""The pages: what README.md and docs/ name exists, what they quote is what the sources say.

    pytest tests/test_pages.py
"""
import ast
import builtins
import json
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

from data import load_examples
from paper.benchmarks import load_benchmark

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "experiments/README.md")),
         *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
# Code of others that stands in backticks in the form name.name.
NOT_OURS = {"GRPOTrainer", "LLM"}
DATA_FILES = {"html", "json", "jsonl", "md", "png", "safetensors", "txt"}
FLAGS_OF_TORCHRUN = {"local_addr", "master_addr", "master_port", "max_restarts", "nnodes", "node_rank",
                     "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "standalone", "shutdown-timeout"}
FLAGS_OF_SBATCH = {"time"}


def page_name(page):
    return str(page.relative_to(ROOT))


def blocks(text):
    """[(language, content)] of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def spans(text):
    """What stands in single backticks, outside of fenced blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(text))]


def code(page):
    """Everything on the page that is code: spans, and blocks but for data and mathematics."""
    text = page.read_text()
    commands = [content for language, content in blocks(text) if language in ("", "python")]
    return "\n".join([*spans(text), *commands])


# ---------------------------------------------------------------------------------------------------------
# Names.

@cache
def defined(path):
    """name -> node of what a source file defines itself; of a class also Class.name. Imports do not count."""
    found = {}

    def add(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + node.name] = node
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in ast.walk(node):
                    if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                        found[prefix + target.id] = node

    add(ast.parse(path.read_text()).body, "")
    return found


def resolves(name):
    """Is `oat.equal`, `grading.oat.equal` or `model.Policy.forward` defined in some file of that name?"""
    parts = name.split(".")
    for path in SOURCES:
        module = [*path.relative_to(ROOT).parent.parts, path.stem]
        for start in range(len(module)):
            here = module[start:]
            if parts[:len(here)] == here and ".".join(parts[len(here):]) in {"", *defined(path)}:
                return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_name_on_a_page_exists(page):
    missing = []
    for span in spans(page.read_text()):
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", span):
            first, last = span.split(".")[0], span.split(".")[-1]
            if last not in {"py", *DATA_FILES} and first not in NOT_OURS and not resolves(span):
                missing.append(span)
    missing += [module for module in re.findall(r"python -m ([\w.]+)", code(page))
                if not module.startswith(("venv", "vllm.", "pytest")) and not resolves(module)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_script_on_a_page_exists(page):
    named = set(re.findall(r"(?<![\w./])[\w/]+\.(?:py|sh)\b", code(page)))
    named.discard("FILE.py")                       # of the reader
    assert not sorted(name for name in named if not (ROOT / name).exists())


@cache
def known_flags():
    """Fields of config.Config, and every text of a file that adds flags to a command line: its flags are
    among them."""
    fields = [name for name in defined(ROOT / "config.py") if name.startswith("Config.")]
    flags = {name.removeprefix("Config.") for name in fields} | FLAGS_OF_TORCHRUN | FLAGS_OF_SBATCH
    for path in SOURCES:
        source = path.read_text()
        if "add_argument" in source:
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    flags.add(node.value.removeprefix("--"))
    return flags


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_flag_on_a_page_exists(page):
    flags = {flag.removeprefix("no-") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", code(page))}
    assert not sorted(flags - known_flags())


# ---------------------------------------------------------------------------------------------------------
# Links.

def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_within_the_project_leads_somewhere(page):
    text = without_blocks(page.read_text())
    labels = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", text, re.M))
    broken = sorted(set(re.findall(r"\]\[([\w-]+)\]", text)) ^ set(labels))     # undefined, or unused
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *labels.values()]:
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            other = page.parent / file if file else page
            if not other.exists() or (anchor and anchor not in anchors(other)):
                broken.append(target)
    assert not broken


# ---------------------------------------------------------------------------------------------------------
# What is quoted.

WALKTHROUGH = (ROOT / "docs/walkthrough.md").read_text()
EXCERPTS = re.findall(r"^<!-- (\S+): (\S+) -->\n```python\n(.*?)^```$", WALKTHROUGH, re.M | re.S)


def test_every_excerpt_of_the_walkthrough_names_its_source():
    assert len(EXCERPTS) == sum(language == "python" for language, _ in blocks(WALKTHROUGH)) > 10


@pytest.mark.parametrize("file, name, excerpt", EXCERPTS, ids=[": ".join(found[:2]) for found in EXCERPTS])
def test_an_excerpt_of_the_walkthrough_is_what_its_source_says(file, name, excerpt):
    assert name in defined(ROOT / file)
    node = defined(ROOT / file)[name]
    lines = (ROOT / file).read_text().splitlines()[node.lineno - 1:node.end_lineno]
    quoted = textwrap.dedent(excerpt.rstrip("\n"))
    height = len(quoted.splitlines())
    pieces = ["\n".join(lines[i:i + height]) for i in range(len(lines) - height + 1)]
    assert quoted and quoted in [textwrap.dedent(piece) for piece in pieces]


def rows_shown(page):
    """The rows of data in the page's json blocks: several in one block, or one on several lines."""
    rows, decoder = [], json.JSONDecoder()
    for language, content in blocks(page.read_text()):
        while language == "json" and content.strip():
            row, end = decoder.raw_decode(content.strip())
            rows.append(row)
            content = content.strip()[end:]
    return rows


@pytest.mark.parametrize("page", [README, ROOT / "docs/data.md"], ids=page_name)
def test_the_rows_that_a_page_shows_are_read_with_all_their_columns(page, tmp_path):
    rows, file = rows_shown(page), tmp_path / "rows.jsonl"
    assert {"id", "problem", "answer", "solution"} in [set(row) for row in rows]
    assert {"prompt", "target", "reward_model", "extra_info"} in [set(row) for row in rows]
    for row in rows:
        file.write_text(json.dumps(row) + "\n")
        if "options" in row:
            [example] = load_benchmark(str(file), seed=0)[1]
            assert example.order is not None and example.id == row["id"]
        else:
            [example] = load_examples(file)
            assert (example.demo is not None) == ("solution" in row or "target" in row)
            assert "id" not in row or example.id == row["id"]


# ---------------------------------------------------------------------------------------------------------
# Copying one piece.

COPIED = {"group_advantage": {"torch"}, "srft_loss": {"torch"}}                   # of srft.py
FILES = {"support/logprobs.py": {"torch"}, "support/packing.py": set(),
         "support/checkpoint.py": {"torch", "numpy", "support"},
         "reward.py": {"grading"}, "rollout.py": {"torch", "transformers", "safetensors", "tqdm", "vllm"},
         "grading/oat.py": {"sympy", "pylatexenc", "math_verify", "latex2sympy2_extended"}}


def test_a_piece_needs_nothing_but_what_the_front_page_names():
    sentence = README.read_text().split("To copy one piece:")[1].split("\n\n")[0]
    assert {*COPIED, *FILES} <= set(spans(sentence))
    for name, allowed in COPIED.items():
        nodes = list(ast.walk(defined(ROOT / "srft.py")[name]))
        used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        assert not used - own - set(dir(builtins)) - allowed, name
    for name, allowed in FILES.items():
        imported = set()
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
        assert not imported - allowed - set(sys.stdlib_module_names), name


# ---------------------------------------------------------------------------------------------------------
# Form.

def test_the_front_page_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120]


@pytest.mark.parametrize("page", [*PAGES[1:], *SCRIPTS], ids=page_name)
def test_torchrun_on_one_node_does_not_ask_for_the_machines_name(page):
    # Without --local_addr it waits for minutes where nobody knows that name. (README.md: tests/test_run.py.)
    commands = page.read_text().replace("\\\n", " ").splitlines()
    for command in commands:
        if "torchrun" in command and "--nproc_per_node" in command and "--nnodes" not in command:
            assert "--local_addr=127.0.0.1" in command
