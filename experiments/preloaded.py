"""Start many short runs of the project's scripts, in processes that have torch and vLLM imported already.

    child = start(["srft.py", "--preset", "tiny"], env={"RANK": 0}, output=Path("log"))   # as Popen
    child.wait(timeout=60); child.returncode; child.send_signal(signal.SIGTERM); child.kill()

Importing them takes 11 of the 17 seconds that the shortest run takes on a CPU. Python's forkserver imports
once and forks; each child then runs its script as __main__. Everything that the environment decides at
import must be set before the first start. For machines without a GPU: CUDA does not survive a fork.
"""
import gc
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What a run imports, and what vLLM and matplotlib import only when an engine starts or a figure is drawn.
PRELOAD = ["srft", "eval", "paper.figures", "tiny.task", "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker",
           "vllm.v1.core.sched.scheduler", "vllm.v1.attention.backends.cpu_attn",
           "vllm.model_executor.layers.quantization.compressed_tensors.utils",
           "transformers.models.llama.modeling_llama", "torch.distributed.checkpoint",
           "matplotlib.figure", "matplotlib.backends.backend_agg"]
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")     # as rollout.py does, which it imports
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)
lock = threading.Lock()             # multiprocessing polls all children when one starts: one thread at a time


def _end_with_parent():
    """A thread of each child: a killed parent cannot end its children itself."""
    multiprocessing.parent_process().join()
    os._exit(1)                                     # else it would go on writing where the next run writes


def _main(argv, env, output):
    """What a forked child does: become the process that `python argv` would be."""
    gc.freeze()             # else each collection looks at all that was imported, and copies its pages
    gc.unfreeze = lambda: None      # by vLLM at its end: its collections then took a third of a short run
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = argv
    code = 0
    try:
        if argv[0] == "-c":
            exec(argv[1], {"__name__": "__main__"})
        elif argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(argv[0]).resolve().parent)
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:                      # as the interpreter does: a number, a message, or None
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


class Child:
    """A started process, with the methods of subprocess.Popen that its users need."""

    def __init__(self, argv, env, output):
        self.output = Path(output)
        argv, env = [*map(str, argv)], {key: str(value) for key, value in env.items()}
        self.process = context.Process(target=_main, args=(argv, env, str(output)))
        with lock:
            self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        with lock:
            return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout=None):
        multiprocessing.connection.wait([self.process.sentinel], timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout, output=self.text())
        return self.returncode

    def text(self):
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self.text(), None

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.process.kill()


def start(argv, env=(), output=os.devnull):
    """Run a script of the project, argv[0], or "-c" and code, or "-m" and a module, from its root, with `env`
    on top of this process's; stdout and stderr go to `output`."""
    return Child(argv, os.environ | dict(env), output)
