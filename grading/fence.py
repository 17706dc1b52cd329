"""The fence around one grading: what the process that grades a response may still do, once it is up.

    calls, missing = call_filter()      # once, in the worker
    put_up(calls, deadline_s)           # in the child that will grade; for good, nothing takes it down again

It may compute, and write its reply. Behind the filter on what reaches `eval` (oat.py), there are three lines:

    limits    CPU time; no file can be opened, none can grow; no process can be started (unless by root)
    calls     of the kernel: whichever is not in CALLS fails with EPERM. By seccomp, so it needs the package
              pyseccomp and the system's libseccomp. Without them the run says so once, and goes on
    events    of Python: whichever is not in EVENTS raises. A few functions announce nothing, and C code never
              does, so alone it would be a fence with holes

The last two list what is allowed: whatever they have not thought of is refused. The worker limits memory.
"""
import ctypes
import errno
import math
import os
import resource
import signal
import sys
import tempfile

REPLY_FD = 3            # where the child writes its reply: the only file that it may write
UNFENCED = ("grading: the kernel's filter of system calls is missing ({}): code that broke out of a grader "
            "could call what Python does not announce, as to start a process or to send a signal.")

# What computing in Python asks of the kernel: memory, clocks, time limits by signal, randomness, its end.
CALLS = """
    brk mmap munmap mremap madvise mprotect futex
    clock_gettime clock_getres gettimeofday time times getrusage sched_yield
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack alarm setitimer getitimer restart_syscall
    getrandom getpid gettid exit exit_group
""".split()

# What sympy and Math-Verify announce. "compile" and "exec" are `eval`, with which sympy reads even a number.
EVENTS = {"compile", "exec", "builtins.id", "object.__getattr__", "object.__setattr__", "array.__new__"}


PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38       # <linux/prctl.h>
SECCOMP_MODE_FILTER = 2                                                 # <linux/seccomp.h>
LIBC = ctypes.CDLL(None, use_errno=True)


class Program(ctypes.Structure):
    """A filter as the kernel takes it: struct sock_fprog of <linux/filter.h>."""
    _fields_ = [("instructions", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def call_filter():
    """(filter of system calls, "") or, where it cannot be had, (None, why)."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:       # the second: without libseccomp
        return None, str(error)
    calls = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in CALLS:
        calls.add_rule(pyseccomp.ALLOW, name)
    calls.add_rule(pyseccomp.ALLOW, "write", pyseccomp.Arg(0, pyseccomp.EQ, REPLY_FD))
    # calls.load() would translate it anew in each child, in a quarter of the time of a short grading.
    with tempfile.TemporaryFile() as file:
        calls.export_bpf(file)
        file.seek(0)
        code = file.read()
    return Program(len(code) // 8, code), ""                    # an instruction has 8 bytes


def die_with_parent():
    """Have the kernel kill this process when its parent dies, in mid-hang too."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def put_up(calls, deadline_s):
    """Shut this process in. calls: of `call_filter`, or None. OSError: the kernel refuses to filter."""
    # Later than the deadline: it ends a grading whose worker was stopped, so that nobody kills it.
    limit(resource.RLIMIT_CPU, math.ceil(deadline_s) + 1)
    limit(resource.RLIMIT_NOFILE, 0)            # of new ones: what is open stays open
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_NPROC, 0)
    if calls is not None:
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)             # or only root may filter
        if LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(calls)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    sys.addaudithook(_forbid)


def limit(which, value):
    """Set a limit of this process, and lower the one to which it could be raised again to the same."""
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)                # whoever started the run may have set a lower one
    resource.setrlimit(which, (value, value))


def _forbid(event, args):
    """Audit hook, which Python calls before it does what `event` names."""
    if event == "import":               # whatever is needed is there; an ImportError is what callers expect
        raise ImportError(f"a grader must not import {args[0]}")
    if event not in EVENTS:
        raise PermissionError(f"a grader must not: {event}")
