"""The house: what each room may import, read from the sources.

    pytest tests/test_rooms.py
"""
import ast
import subprocess
import sys

import pytest

from conftest import ENV, ROOT

AT_THE_ROOT = {path.stem for path in ROOT.glob("*.py")}


def imported(path, loading):
    """Names of the modules that a file imports; `loading`: at its top level alone, so when it is itself imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body if loading else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("room", ["support", "grading"])
def test_what_serves_the_root_imports_none_of_it(room):
    files = list((ROOT / room).glob("*.py"))
    assert len(files) > 2 and {"srft", "config", "reward"} <= AT_THE_ROOT
    for path in files:
        assert not {name.split(".")[0] for name in imported(path, loading=False)} & (AT_THE_ROOT | {"bench"}), path


def test_no_file_of_the_root_loads_what_only_measures():
    for path in ROOT.glob("*.py"):
        assert not any(name.split(".")[0] == "bench" for name in imported(path, loading=True)), path


def test_only_rollout_knows_vllm():
    for path in [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py"), *(ROOT / "grading").glob("*.py")]:
        names = {name.split(".")[0] for name in imported(path, loading=False)}
        assert ("vllm" in names) == (path.name == "rollout.py"), path


def test_a_package_of_the_same_name_elsewhere_does_not_stand_in_for_a_room(tmp_path):
    for room in ("support", "grading", "bench"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise ImportError('a stranger')")
    code = "import support.runlog, grading.oat, bench; print('OURS')"
    done = subprocess.run([sys.executable, "-c", code], env=ENV | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}, cwd=ROOT, text=True, capture_output=True)
    assert "OURS" in done.stdout, done.stderr
