"""What a program needs before it imports torch, which takes seconds: so its first import is this.

    import support.startup                 # Ctrl-C is one line from now on, and text is UTF-8

Importing it is all: it sets the excepthook of this process, and its encoding where the locale has another
than UTF-8. It needs Python alone.
"""
import locale
import os
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
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")                    # the terminal's encoding stays


sys.excepthook = end_in_one_line
read_text_as_utf8()
