r"""Attacks: text in a response, or in a reference, that means to run code; and code that means to break out.

    pytest tests/test_attacks.py

Each list is there to be made longer by a line. PAYLOADS go through the Grader, as a model's answer would.
BREAKOUTS, UNANNOUNCED and LEFTOVERS run as Python code where a response is graded, as if a payload had come
through.
"""
import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import grading.worker
import reward
from grading import fence, oat
from grading.answers import REASONS
from reward import Grader

ROOT = Path(reward.__file__).resolve().parent
FILTERED, WHY_NOT = fence.call_filter()
needs_filter = pytest.mark.skipif(FILTERED is None, reason=f"no filter of system calls: {WHY_NOT}")


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as shared:
        yield shared


# ---- Text that means to be evaluated -------------------------------------------------------------

def octal(code):
    r"""The code, no letter of it, in LaTeX that becomes the text of a Python string: "id" -> "\151\144"."""
    return "".join(rf"\textbackslash{{}}{ord(char):03o}" for char in code)


TAKE_OVER = "exec('import __main__; __main__.judge = lambda *a: (\"ok\", \"forged\", [])')"
END = "exec('import os; os._exit(0)')"         # the verdict would be "killed"

PAYLOADS = [
    "ln('{octal}')", 'ln("{octal}")', "sqrt('{octal}')", "S('{octal}')", "N('{octal}')", "S ('{octal}')",
    "ln '{octal}'", "(ln)('{octal}')", "x+ln('{octal}')", "ln(b'{octal}')", '{octal}',
    "frac('{octal}')", "E('{octal}')", "ln('{octal}')-ln('{octal}')", "O('{octal}')",
    "f('{octal}')", "Q('{octal}')", "(ln('{octal}'),1)", "[ln('{octal}')]", "ｌｎ('{octal}')",
    "ln(＇{octal}＇)", "I('{octal}')",
    "ℓn('{octal}')", "S(x='{octal}')", "S[0]('{octal}')", "{code}", "({code})", "eval('{octal}')",
    "x if {code} else y", "lambda: {code}", "{{'a': {code}}}", "f'{{{code}}}'", r"\text{{{code}}}",
    r"\operatorname{{eval}}('{octal}')", r"\mathrm{{S}}('{octal}')", r"\ln('{octal}')", r"\ln{{'{octal}'}}",
    r"\ln\left('{octal}'\right)", r"x_{{{code}}}", r"\frac{{{code}}}{{2}}", "1 + {code}", "1/({code})"]


def texts_of(payload):
    """A payload with each code in place of {code} and, spelled in octal, of {octal}."""
    for code in (TAKE_OVER, END):
        yield payload.format(code=code, octal=octal(code))


@pytest.mark.parametrize("kind", [pytest.param("oat", marks=pytest.mark.slow), "math-verify"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_text_of_a_response_or_of_a_reference_runs_as_code(grader, payload, kind):
    responses, answers = [], []
    for text in texts_of(payload):
        # The reference is no integer: beside one, oat's comparison of integers would already say no.
        responses += [rf"so it is $\boxed{{{text}}}$", r"\boxed{x}", rf"\boxed{{{text}+1}}", text]
        answers += ["x", text, text, "x"]
    verdicts = grader.grade(responses, answers, kind=kind)
    assert {verdict.reason for verdict in verdicts} <= set(REASONS)
    assert not any(verdict.reward for verdict in verdicts[::4])
    after = grader.grade([r"\boxed{6}", r"\boxed{5}"], ["5", "5"], kind=kind)
    assert [verdict.reason for verdict in after] == ["wrong", "ok"]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_is_a_formula(payload):
    for text in texts_of(payload):
        assert not oat._is_formula(text) and not oat._is_formula(oat._as_text(text)), text


FORMULAS = [
    "1", "-3.50", ".5", "1_000", "2x", "x_1", "(x+1)**2", "sqrt(2)", "3sqrt(2)", "xsqrt(2)", "f(x)", "n!",
    "α+1", "xy", "2pi", "1e5", "frac(x)", "1.e", "x1(2)", ""]
NO_FORMULAS = [
    "x.y", "1..real", "x1.n", "1e1.n", "0x1.n", "1j.n", "(x).n", "a[0]", "{x}", "'x'", '"x"', "_", "__a__",
    "x__1", "a=b", "a,b", "a:b", "ab(x)", "id(x)", "id (x)", "id\t(x)", "xy1(2)", "x if y", "x or y", "ℯ",
    "ｓ", "²", "\\", "a@b", "`a`", "a;b", "a#b", "a%b", "a|b", "~a", "\0", "٣", "lambda"]


@pytest.mark.parametrize("text, formula", [*((text, True) for text in FORMULAS),
                                           *((text, False) for text in NO_FORMULAS)])
def test_a_formula_is_numbers_letters_few_functions_and_operators(text, formula):
    assert oat._is_formula(text) == formula


def test_what_sympy_evaluates_finds_no_names_but_its_own_numbers_and_letters():
    names = oat._names()
    assert names["__builtins__"] == {} and len(names) < 30
    assert {"Symbol", "Integer", "sqrt"} < names.keys() and not {"sympify", "lambdify", "eval"} & names.keys()
    assert "__builtins__" in names and names["__builtins__"] == {}


def test_whoever_asks_sympy_in_a_worker_to_evaluate_a_text_is_held_to_formulas():
    code = ("import sympy, math_verify.parser\nfrom sympy.parsing.sympy_parser import parse_expr\n"
            "from grading import oat\noat.evaluate_formulas_only()\n"
            "from sympy.parsing import sympy_parser\n"
            "askers = [sympy.sympify, sympy.S, sympy.Number, sympy.ln, sympy.nsimplify,\n"
            "          sympy_parser.parse_expr, math_verify.parser.parse_expr_cached]\n"
            "for ask in askers:\n"
            "    assert ask('33') is not None, ask\n"
            "    try:\n"
            "        ask(\"ln('1')\")\n"
            "        print('evaluated by', ask)\n"
            "    except (SyntaxError, sympy.SympifyError):\n"
            "        pass\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr


# ---- Code that means to break out ----------------------------------------------------------------

ROGUE = """
import sys
sys.path.insert(0, {root!r})
from grading import fence, warmup, worker
if {unfiltered}:
    fence.call_filter = lambda: (None, "left out by the test")
warmup.ANSWERS = warmup.ANSWERS[:1]
honest = worker.judge
def judge(item, seconds):
    if not item["response"].startswith("run "):
        return honest(item, seconds)
    try:
        exec(item["response"][4:], {{"worker": worker, "os": worker.os, "sys": sys}})
        return "ok", "ran", []
    except Exception as error:
        return "wrong", type(error).__name__, [str(error)]
worker.judge = judge
import _posixsubprocess, atexit, ctypes, gc, mmap, resource, signal, socket, threading, time    # at hand
worker.main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
"""


@contextlib.contextmanager
def rogue(folder, filtered=True, deadline_s=10.0):
    """A Grader whose children run the code of a response "run ...": as if one had broken out of a parser."""
    path = folder / f"rogue{filtered}.py"
    path.write_text(ROGUE.format(root=str(ROOT), unfiltered=not filtered))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading.worker, "__file__", str(path))
        with Grader(workers=1, deadline_s=deadline_s) as grader:
            yield grader


@pytest.fixture(scope="module", params=[pytest.param(True, marks=needs_filter), False],
                ids=["filtered", "unfiltered"])
def broken(request, tmp_path_factory):
    """The rogue Grader: with all of its fence, and without the filter of system calls."""
    with rogue(tmp_path_factory.mktemp("rogue"), request.param) as grader:
        yield grader


def run(grader, code):
    return grader.grade([f"run {code}"], ["5"])[0]


# Each must raise, or end its process. NEW is not to be made, KEPT, a file of ours, to stay as it is.
BREAKOUTS = [
    "open(NEW, 'w')", "open(NEW, 'a')", "open(KEPT, 'r+')", "open(KEPT)",
    "open('/etc/passwd')", "open('/dev/null')", "os.open(KEPT, os.O_RDONLY)", "os.open(NEW, os.O_CREAT)",
    "os.open(KEPT, os.O_TRUNC)",
    "os.listdir('/')", "os.mkdir(NEW)", "os.symlink('a', NEW)", "os.remove(KEPT)", "os.rename(KEPT, NEW)",
    "os.truncate(KEPT, 0)", "os.chmod(KEPT, 0)", "os.link(KEPT, NEW)", "os.memfd_create('x')", "os.pipe()",
    "open(f'/proc/{os.getppid()}/environ').read()", "open('/proc/self/mem', 'r+b')", "os.chdir('/tmp')",
    "os.system('touch ' + NEW)", "os.popen('touch ' + NEW)", "os.fork()", "os.forkpty()",
    "os.posix_spawn('/bin/touch', ['touch', NEW], {})", "os.execv('/bin/true', ['x'])",
    "__import__('subprocess').run(['touch', NEW])", "os.pidfd_open(os.getppid())", "os.dup(3)",
    "import socket\nsocket.socket()", "import socket\nsocket.socket().connect(('127.0.0.1', PORT))",
    "import socket\nsocket.socketpair()", "import socket\nsocket.socket(fileno=4)",
    "os.kill(os.getppid(), 0)", "os.killpg(0, 0)", "import ctypes\nctypes.CDLL(None)",
    "import ctypes\nctypes.string_at(0, 1)", "__import__('shutil').rmtree(KEPT)",
    "__import__('sqlite3').connect(NEW)", "import wave", "import gc\ngc.get_objects()", "sys._getframe()",
    "sys.setprofile(print)", "sys.settrace(print)",
    "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))",
    "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "import mmap\nmmap.mmap(-1, 100 << 30)", "bytearray(2 << 30)", "[0] * (1 << 40)"]
# What Python does not announce, so that only the filter of system calls stops it.
UNANNOUNCED = [
    "os.setsid()", "os.nice(1)", "os.write(1, b'x')", "os.umask(0)", "os.sched_setaffinity(0, {0})",
    "import signal\nsignal.pidfd_send_signal(3, 0)", "os.getpgid(os.getppid())", "os.stat('/etc/passwd')",
    "os.sendfile(3, 0, 0, 1)", "os.readlink('/proc/self/exe')", "os.mkfifo(NEW)", "os.mknod(NEW)",
    "import threading\nthreading.Thread(target=print).start()"]
RAISED = ("PermissionError", "ImportError", "MemoryError", "OSError", "RuntimeError", "")


def held(grader, tmp_path, code):
    file, kept = tmp_path / "file", tmp_path / "kept"
    kept.write_text("kept")
    with listening() as (port, connections):
        code = code.replace("NEW", repr(str(file))).replace("KEPT", repr(str(kept)))
        code = code.replace("PORT", str(port))
        verdict = run(grader, code)
    assert verdict.reward == 0 and verdict.reason in ("wrong", "killed"), verdict
    assert verdict.extracted in RAISED, verdict
    assert kept.read_text() == "kept" and not file.exists() and not connections


@contextlib.contextmanager
def listening():
    """A server on a port of this machine, and the list of who came."""
    connections = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self):
            connections.append(self.client_address)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port, connections
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("code", BREAKOUTS)
def test_code_in_a_grading_can_open_start_reach_and_watch_nothing(broken, tmp_path, code):
    held(broken, tmp_path, code)


@needs_filter
@pytest.mark.parametrize("code", UNANNOUNCED)
def test_the_kernel_refuses_what_python_does_not_announce(tmp_path_factory, tmp_path, filtered, code):
    held(filtered, tmp_path, code)


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    with rogue(tmp_path_factory.mktemp("filtered")) as grader:
        yield grader


FORK_EXEC = ("import _posixsubprocess as p\n"
             "p.fork_exec([b'/bin/sh', b'-c', b'touch NEW'], [b'/bin/sh'], True, (), None,\n"
             "            None, -1, -1, -1, -1, -1, -1, -1, 3, True, False, 0, None, None, None, -1, None,\n"
             "            False)")


def test_a_shell_that_is_started_behind_pythons_back_does_nothing(broken, tmp_path):
    file = tmp_path / "file"
    verdict = run(broken, FORK_EXEC.replace("NEW", str(file)))
    time.sleep(0.5)
    assert not file.exists() and verdict.reason in ("ok", "wrong", "killed"), verdict
    assert run(broken, "1").extracted == "ran"


@needs_filter
def test_no_process_is_started_even_by_the_call_that_python_does_not_announce(filtered, tmp_path):
    verdict = run(filtered, FORK_EXEC.replace("NEW", "x"))
    assert (verdict.reason, verdict.extracted) == ("wrong", "PermissionError"), verdict


def test_a_grading_still_computes(broken):
    code = ("import sympy, random, time\nassert sympy.factorint(12345) and time.time()\n"
            "random.Random().random(); time.process_time(); bytearray(100 << 20)")
    assert run(broken, code).extracted == "ran"


# ---- Nothing survives ----------------------------------------------------------------------------

LEFTOVERS = [
    "worker.judge = lambda *a: ('ok', 'forged', [])",
    "import grading.answers\ngrading.answers.math_verify = lambda *a: ('ok', 'forged')",
    "import math_verify\nmath_verify.verify = lambda *a, **k: True",
    "import sympy\nsympy.Basic.__eq__ = lambda *a: True", "import atexit\natexit.register(os._exit, 1)",
    "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nsignal.setitimer(signal.ITIMER_REAL, 0.1)",
    "import json\njson.dumps = lambda *a: '{}'", "worker.os.write = lambda *a: 0", "sys.stdout.close()",
    "import time\ntime.monotonic = lambda: 0.0", "os.close(3)", "os.close(0)", "sys.setrecursionlimit(50)",
    "import sys\nsys.modules.clear()", "os.write(3, b'{\"id\": 0, \"reason\": \"ok\"}\\n')",
    "os.write(3, b'{\"id\": 1, \"reason\": \"ok\", \"ms\": 1.0, \"extracted\": \"\", \"trace\": []}\\n')",
    "os.write(3, b'[' * 8000)", "os.write(3, b'\\n')", "os._exit(0)", "os.abort()",
    "import signal\nsignal.raise_signal(9)", "import signal\nsignal.raise_signal(19)"]


@pytest.mark.parametrize("code", LEFTOVERS)
def test_no_grading_leaves_anything_to_the_next(tmp_path, survivor, code):
    worker, = survivor._pool
    responses = [f"run {code}", r"\boxed{6}", r"\boxed{5}", r"\boxed{\frac{10}{2}}", r"\boxed{x}"]
    verdicts = survivor.grade(responses, ["5"] * 5)
    assert [v.reason for v in verdicts[1:]] == ["wrong", "ok", "ok", "wrong"], verdicts
    assert "forged" not in {v.extracted for v in verdicts}
    assert survivor._pool == [worker] and worker.proc.poll() is None        # and the worker lives on


@pytest.fixture(scope="module")
def survivor(tmp_path_factory):
    with rogue(tmp_path_factory.mktemp("survivor"), deadline_s=4.0) as grader:
        grader.grade(["1"], ["1"])
        yield grader


@pytest.mark.parametrize("line", [
    b"ok\n", b"[0]\n", b"7\n", b"null\n", b"\xff\xfe\n", b"[" * 4000 + b"\n", b'{"id": 0, "reason": "ok"}\n',
    b'{"id": 1, "reason": "ok", "ms": 1.0, "extracted": "", "trace": [], "fault": ""}\n',
    b'{"id": 0, "reason": "perfect", "ms": 1.0, "extracted": "", "trace": [], "fault": ""}\n',
    b'{"id": 0, "reason": ["ok"], "ms": 1.0, "extracted": "", "trace": [], "fault": ""}\n',
    b'{"id": 0, "reason": "ok", "ms": NaN, "extracted": "", "trace": [], "fault": ""}\n',
    b'{"id": 0, "reason": "ok", "ms": "1", "extracted": "", "trace": [], "fault": ""}\n',
    b'{"id": 0, "reason": "ok", "ms": 1.0, "extracted": 5, "trace": [], "fault": ""}\n',
    b'{"id": 0, "reason": "ok", "ms": 1.0, "extracted": "", "trace": [5], "fault": ""}\n',
    b'{"id": 0, "reason": "ok", "ms": 1.0, "extracted": "", "trace": 5, "fault": ""}\n',
    b'{"id": 0, "reason": "ok", "ms": 1.0, "extracted": "", "trace": [], "fault": "none"}\n',
    b'{"id": 0, "reason": "ok", "ms": 1.0, "extracted": "", "trace": []}\n'])
def test_a_reply_of_another_shape_earns_nothing_and_costs_no_worker(survivor, line):
    worker, = survivor._pool
    verdict = run(survivor, f"os.write(3, {line!r}); os._exit(0)")
    assert (verdict.reward, verdict.reason) == (0.0, "killed")
    assert survivor._pool == [worker] and run(survivor, "1").extracted == "ran"


def test_a_reply_in_the_words_of_another_kind_of_grader_earns_nothing_and_ends_no_run(survivor, capfd):
    line = (b'{"id": 0, "reason": "reward_error", "ms": 1.0, "extracted": "", "fault": "", '
            b'"trace": ["\\u001b[2J"], "error": "made up"}\n')
    verdict = run(survivor, f"os.write(3, {line!r}); os._exit(0)")
    assert (verdict.reward, verdict.reason) == (0.0, "reward_error") and capfd.readouterr().err == ""
    assert run(survivor, "1").extracted == "ran"


# ---- What a worker knows -------------------------------------------------------------------------

def test_a_worker_has_no_token_in_its_environment_and_finds_its_packages(monkeypatch):
    secrets = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "MASTER_ADDR"]
    for name in secrets:
        monkeypatch.setenv(name, "a secret")
    monkeypatch.setenv("LC_TEST", "kept")
    with Grader(workers=1) as grader:
        assert grader.grade([r"\boxed{5}"], ["5"])[0].reward == 1
        environment = Path(f"/proc/{grader._pool[0].proc.pid}/environ").read_bytes().decode()
    assert "LC_TEST=kept" in environment and "PATH=" in environment and "a secret" not in environment
    assert not any(f"{name}=" in environment for name in secrets)


def test_a_worker_forks_as_one_thread(survivor):
    assert len(os.listdir(f"/proc/{survivor._pool[0].proc.pid}/task")) == 1


def test_no_file_of_the_worker_is_open_in_a_child(broken):
    # Besides the reply (3): a write to each. Of the first three, which are /dev/null, nothing comes back.
    code = ("for file in range(4, 200):\n"
            "    try:\n        os.write(file, b'x')\n"
            "    except OSError:\n        continue\n"
            "    raise ValueError(file)\n")
    assert run(broken, code).extracted == "ran"


def test_what_the_fence_lacks_is_said_in_one_line_once_and_by_one_rank(tmp_path, monkeypatch, capfd):
    one_line = fence.UNFENCED.format("left out by the test") + "\n"
    for rank, graders, said in (("0", 2, one_line), ("1", 1, "")):
        monkeypatch.setenv("RANK", rank)
        reward._say_what_is_unfenced.cache_clear()               # as in a process of its own
        for _ in range(graders):
            with rogue(tmp_path, filtered=False) as grader:
                assert grader.grade([r"\boxed{5}"], ["5"])[0].reward == 1
        assert capfd.readouterr().err == said
    reward._say_what_is_unfenced.cache_clear()


@needs_filter
def test_nothing_is_said_where_the_fence_is_whole(capfd):
    reward._say_what_is_unfenced.cache_clear()
    with Grader(workers=1) as grader:
        assert grader.grade([r"\boxed{5}"], ["5"])[0].reward == 1
    assert capfd.readouterr().err == ""


def test_a_system_that_does_not_take_the_filter_is_graded_without_it_and_says_so(tmp_path, capfd):
    """As where CALLS lacks what another C library asks for: every reward would be 0."""
    path = tmp_path / "strict.py"
    path.write_text(ROGUE.format(root=str(ROOT), unfiltered=False).replace(
        "honest =", "fence.call_filter = lambda: (fence.Program(1, b'no filter'), '')\nhonest ="))
    reward._say_what_is_unfenced.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading.worker, "__file__", str(path))
        with Grader(workers=1) as grader:
            assert grader.grade([r"\boxed{5}"], ["5"])[0].reward == 1
    assert "the system does not take it" in capfd.readouterr().err
    reward._say_what_is_unfenced.cache_clear()


# ---- Late, stopped and orphaned ------------------------------------------------------------------

def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_child_that_hangs_is_killed_at_its_deadline_and_the_worker_goes_on(survivor):
    worker, = survivor._pool
    start = time.monotonic()
    verdicts = survivor.grade(["run while True: pass", r"\boxed{5}"], ["5"] * 2)
    assert [v.reason for v in verdicts] == ["timeout", "ok"] and 4.0 < time.monotonic() - start < 8.0
    assert survivor._pool == [worker]


@pytest.mark.slow
def test_a_child_whose_worker_is_stopped_ends_itself_at_its_cpu_limit(tmp_path):
    with rogue(tmp_path, deadline_s=1.0) as grader:
        grader.grade(["1"], ["1"])
        pid = grader._pool[0].proc.pid
        before = children(pid)                     # that grading's may still be there: its reply comes first
        grader.submit(["run while True: pass"], ["5"])
        while set(children(pid)) <= set(before):
            time.sleep(0.01)
        child = children(pid)[-1]
        os.kill(pid, signal.SIGSTOP)
        end = time.monotonic() + 30
        while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < end
            time.sleep(0.05)


LATE_IMPORTS = """
import ast, importlib.util, json, logging, sys
from grading import warmup
logging.disable(logging.CRITICAL)
warmup.ANSWERS = warmup.ANSWERS[:1]
warmup.warm_up()

def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, AttributeError, ValueError):
        return False

named = set()
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    if not name.startswith(("sympy", "latex2sympy2", "math_verify")) or not file.endswith(".py"):
        continue
    package = name.split(".") if file.endswith("__init__.py") else name.split(".")[:-1]
    for node in ast.walk(ast.parse(open(file).read())):
        if isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            named |= {base} | {f"{base}.{alias.name}" for alias in node.names}
late = [name for name in named if name.startswith("sympy.") and name not in sys.modules and there(name)]
print(json.dumps(sorted(late)))
"""
# Printers of other languages, plots, solvers that are packages of their own, ...: no comparison needs them.
NOT_NEEDED = (
    "sympy.printing", "sympy.plotting", "sympy.testing", "sympy.codegen", "sympy.vector", "sympy.categories",
    "sympy.physics.control", "sympy.parsing", "sympy.interactive", "sympy.utilities", "sympy.combinatorics",
    "sympy.logic.algorithms.minisat22_wrapper", "sympy.logic.algorithms.pycosat_wrapper",
    "sympy.logic.algorithms.z3_wrapper", "sympy.tensor.array.expressions", "sympy.assumptions.facts",
    "sympy.polys.matrices._dfm")


@pytest.mark.slow
def test_the_modules_that_sympy_loads_late_are_loaded_before_the_fence():
    """A child cannot load them: one that is missing would deny right answers."""
    done = subprocess.run([sys.executable, "-c", LATE_IMPORTS], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    missing = [name for name in json.loads(done.stdout) if not name.startswith(NOT_NEEDED)]
    assert missing == []
