"""The house: what each room may import and what its files may be called, read from the sources; and that the
root with the three rooms that it needs, copied out, trains.

    pytest tests/test_rooms.py
"""
import ast
import graphlib
import shutil
import subprocess
import sys

import pytest

from conftest import ENV, ROOT, SMALL, metrics

AT_THE_ROOT = {"srft", "config", "model", "rollout", "reward", "data", "eval"}
BESIDE_THEM = {
    ".gitignore", ".pre-commit-config.yaml", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile",
    "README.md", "pyproject.toml", "requirements.txt", "requirements-cpu.txt", "requirements-dev.txt",
    "requirements-older.txt"}
ROOMS = {"support", "grading", "paper", "bench", "tiny", "experiments"}
OTHER_FOLDERS = {"tests", "docs", "runs", ".ci", ".github"}


def modules_of(room):
    """Name -> file of the modules in a room."""
    return {path.stem: path for path in (ROOT / room).glob("*.py") if path.stem != "__init__"}


def imported(path, loading):
    """Dotted names that a file imports; `loading`: when it is itself imported, so not those within functions.

    Of `from paper import tables` both "paper" and "paper.tables": the second may be a module.
    """
    found, nodes = set(), [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not (loading and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)
    return found


def packages(path, loading):
    """The first part of each name that a file imports: "paper" for `import paper.tables`."""
    return {name.split(".")[0] for name in imported(path, loading)}


# ----------------------------------------------------------------------------------------------------------
# Who may import whom.

@pytest.mark.parametrize("room", ["support", "grading"])
def test_what_serves_the_root_imports_none_of_it_nor_what_compares_measures_or_shows(room):
    never = AT_THE_ROOT | {"paper", "bench", "tiny", "experiments"}
    # Under pytest and in their own scripts, the modules of these two go by their bare names as well.
    never |= modules_of("bench").keys() | modules_of("experiments").keys()
    files = list((ROOT / room).glob("*.py"))
    assert len(files) > 2
    for path in files:
        assert not packages(path, loading=False) & never, path


def test_no_file_of_the_root_loads_what_compares_or_measures():
    for name, path in modules_of(".").items():
        assert not packages(path, loading=True) & {"paper", "bench", "experiments"}, name


def test_only_rollout_knows_vllm():
    knowing = set()
    for room in [".", "support", "grading", "paper", "tiny", "experiments"]:
        for path in modules_of(room).values():
            if "vllm" in packages(path, loading=False):
                knowing.add(str(path.relative_to(ROOT)))
    assert knowing == {"rollout.py"}


def test_modules_load_one_another_in_no_circle():
    modules = modules_of(".")
    for room in ["support", "grading", "paper", "tiny"]:
        for name, path in modules_of(room).items():
            modules[f"{room}.{name}"] = path
    needs = {name: imported(path, loading=True) & modules.keys() for name, path in modules.items()}
    assert needs["srft"] > {"config", "model", "support.checkpoint"}
    graphlib.TopologicalSorter(needs).prepare()              # its CycleError names the circle


# ----------------------------------------------------------------------------------------------------------
# What the files may be called.

def test_the_root_has_seven_python_files():
    assert modules_of(".").keys() == AT_THE_ROOT


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a clone")
def test_nothing_else_has_moved_into_the_root():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True)
    paths = done.stdout.splitlines()
    files = {path for path in paths if "/" not in path}
    folders = {path.split("/")[0] for path in paths if "/" in path}
    assert files - BESIDE_THEM - {f"{name}.py" for name in AT_THE_ROOT} == set()
    assert folders - ROOMS - OTHER_FOLDERS == set()


def test_no_test_module_has_the_name_of_a_module_under_test():
    # Under pytest, tests/ comes first on the path: a tests/reward.py would stand in for the root's.
    product = AT_THE_ROOT | ROOMS
    for room in ROOMS:
        product |= modules_of(room).keys()
    assert modules_of("tests").keys() & product == set()


@pytest.mark.parametrize("room", ["grading", "tiny", "bench", "experiments"])
def test_no_script_stands_in_for_a_module_that_another_one_imports(room):
    # The folder of a script comes first on its path, and pytest's has bench/ and experiments/.
    others = AT_THE_ROOT | ROOMS | sys.stdlib_module_names
    if room != "bench":
        others |= modules_of("bench").keys()
    assert modules_of(room).keys() & others == set()


def test_a_package_of_the_same_name_elsewhere_does_not_stand_in_for_a_room(tmp_path):
    for room in ("support", "grading", "bench", "paper", "tiny"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise ImportError('a stranger')")
    code = "import support.runlog, grading.oat, bench, paper.tables, tiny.task; print('OURS')"
    env = ENV | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, text=True, capture_output=True)
    assert "OURS" in done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------------
# What the root needs.

@pytest.mark.slow
def test_the_seven_files_with_support_grading_and_tiny_copied_alone_train_evaluate_and_export(tmp_path):
    copy, out = tmp_path / "copy", tmp_path / "run"
    for room in ("support", "grading", "tiny"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in AT_THE_ROOT:
        shutil.copy(ROOT / f"{name}.py", copy)
    (tmp_path / "held.jsonl").write_text('{"problem": "11+11=?\\n", "answer": "22"}\n')
    command = [sys.executable, *SMALL, "--steps", "2", "--eval_data", tmp_path / "held.jsonl", "--out", out]
    done = subprocess.run(list(map(str, command)), env=ENV | {"PYTHONPATH": str(copy)}, cwd=copy,
                          text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in metrics(out)] == [0, 1, 2] and "eval/held" in metrics(out)[-1]
    assert (out / "hf" / "model.safetensors").exists()
