"""What a program needs before it imports torch, which takes seconds: so its first import is this.

    import support.startup      # Ctrl-C is one line from now on, text is UTF-8, and no print ends a run

Importing it is all: it sets the excepthook of this process, its standard streams, its encoding where the
locale has another than UTF-8, and, under torchrun, that it ends with torchrun. It needs Python alone.
"""
import ctypes
import io
import locale
import os
import signal
import sys


def end_in_one_line(kind, error, trace, hook=sys.excepthook):
    """sys.excepthook: a Ctrl-C that nobody handles is no fault, and has no traceback."""
    seen = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__context__            # import statements make errors of their own of it
    if seen is None:
        hook(kind, error, trace)
        return
    name = os.path.basename(sys.argv[0])
    if "RANK" in os.environ:
        name += f" (rank {os.environ['RANK']})"
    sys.stdout.flush()
    # Not sys.stderr: torch's own hook, which calls this one, holds back what is written there.
    print(f"\n{name}: interrupted", file=sys.__stderr__, flush=True)
    os._exit(130)                          # as shells have it; a usual end would wait for threads


class Output(io.FileIO):
    """Where words go. That nobody reads them any more (Ctrl-C in `srft.py | tee log` ends tee first, a
    terminal is closed, a log's disk is full) is no reason to lose a run: then they are dropped."""

    def write(self, data):
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written     # None: also a full pipe that does not block


def keep_standard_streams():
    """From now on, printing raises nothing."""
    # Were one closed, the next file that is opened would get its number, and all that libraries print.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                     # gets the lowest number that is free: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)                               # None, where it was closed
        if old is not getattr(sys, f"__{name}__"):
            continue                                           # pytest and notebooks have their own
        raw = io.BufferedWriter(Output(number, "wb", closefd=False))
        # backslashreplace: a file's name may be no text, and a terminal may lack a letter.
        new = io.TextIOWrapper(raw, getattr(old, "encoding", "utf-8"), "backslashreplace",
                               line_buffering=getattr(old, "line_buffering", True),
                               write_through=getattr(old, "write_through", False))
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def die_with_launcher():
    """From now on, whatever ends torchrun ends this process, which it has started.

    Without it, the ranks of a torchrun that was killed (kill -9, out of memory) train on, unseen, while a
    scheduler starts the job again. Linux alone knows this (prctl's PR_SET_PDEATHSIG, 1). "Parent" there means
    the thread that started this process; torchrun does that from the one that waits for its ranks.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def read_text_as_utf8():
    """Under a locale of another encoding torch and vLLM die when they read sources of their own."""
    if locale.getpreferredencoding(False).lower() in ("utf-8", "utf8"):
        return
    try:
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")                     # what open() asks
    except locale.Error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: the locale's encoding is "
                 f"{locale.getpreferredencoding(False)}; set PYTHONUTF8=1 and start again")
    os.environ["PYTHONUTF8"] = "1"                                       # of processes that this one starts


die_with_launcher()                 # at once: during the imports that follow, torchrun may end, too
sys.excepthook = end_in_one_line
keep_standard_streams()
read_text_as_utf8()
