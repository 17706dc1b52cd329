"""support/startup.py: what a program prints, and where it goes, is nothing that a run may die of.

    pytest tests/test_startup.py
"""
import os
import resource
import signal
import subprocess
import sys

import pytest

from conftest import ENV, ROOT


def python(code, before=None, **how):
    """Run `import support.startup` and the code; `before` in the child, before it becomes Python."""
    return subprocess.run([sys.executable, "-c", "import support.startup\n" + code], env=ENV, cwd=ROOT,
                          text=True, preexec_fn=before, close_fds=False, **how)


def reader_gone(number):
    """File `number` becomes a pipe that nobody reads, as after `| head`."""
    def before():
        read, write = os.pipe()
        os.dup2(write, number)
        os.close(read)
    return before


def disk_full(number):
    def before():
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    return before


def reader_slow(number):
    """A full pipe that does not block, as some supervisors give."""
    def before():
        read, write = os.pipe()
        os.set_inheritable(read, True)                         # it stays open, and nobody reads
        os.set_blocking(write, False)
        os.dup2(write, number)
    return before


def closed(*numbers):
    def before():
        for number in numbers:
            os.close(number)
    return before


TALK = """
import sys, warnings
from tqdm import tqdm
for i in tqdm(range(3), mininterval=0):
    print("x" * 100_000, flush=True)
    tqdm.write("y", file=sys.stderr)
    warnings.warn(str(i))
open(FILE, "w").write("done")
"""


@pytest.mark.parametrize("where", [reader_gone, reader_slow, disk_full, closed])
@pytest.mark.parametrize("number", [1, 2])
def test_a_program_goes_on_and_ends_well_where_nobody_can_read_it(where, number, tmp_path):
    done = python(f"FILE = {str(tmp_path / 'file')!r}" + TALK, where(number))
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "done"


def test_a_signal_is_heeded_where_its_message_has_no_reader():
    """Ctrl-C in `srft.py | tee log` ends tee first."""
    code = ("import os, signal, sys\nimport torch.distributed as dist\n"
            "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
            "from support.watch import finish_step_on_signals\n"
            "received = finish_step_on_signals()\nos.kill(os.getpid(), signal.SIGINT)\n"
            "print(received, file=sys.stderr)")
    done = python(code, reader_gone(1), stderr=subprocess.PIPE)
    assert done.returncode == 0 and "[2]" in done.stderr


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_terminal_that_is_closed_asks_for_a_checkpoint_unless_nohup_says_otherwise(ignored):
    code = ("import os, signal\nimport torch.distributed as dist\n"
            "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
            "from support.watch import finish_step_on_signals\n"
            "received = finish_step_on_signals()\nos.kill(os.getpid(), signal.SIGHUP)\n"
            "print('RECEIVED', received)")
    def before():                                    # the tests themselves may run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    done = python(code, before, stdout=subprocess.PIPE)
    assert done.returncode == 0 and ("RECEIVED []" if ignored else "RECEIVED [1]") in done.stdout


def test_what_is_printed_gets_into_no_file_where_the_standard_streams_are_closed(tmp_path):
    """The next file that is opened would get the number of one of them."""
    code = (f"import os, sys\nfile = open({str(tmp_path / 'file')!r}, 'w')\nfile.write('kept')\n"
            "file.flush()\nfor number in (1, 2):\n    os.write(number, b'noise')\n"
            "print('noise', flush=True)\nprint('noise', file=sys.stderr)")
    assert python(code, closed(0, 1, 2)).returncode == 0
    assert (tmp_path / "file").read_text() == "kept"


def test_a_name_that_is_no_text_can_be_printed():
    code = "import os\nprint('to', os.fsdecode(b'out/\\xff'), chr(0x1F600))"
    done = python(code, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, "to out/\\udcff \N{GRINNING FACE}\n")


def test_output_is_still_what_was_printed_line_by_line_in_the_terminals_encoding():
    code = "import sys\nprint('é', end='')\nprint('ü', file=sys.stderr)\nprint(sys.stdout.encoding)"
    done = python(code, capture_output=True)
    assert (done.stdout, done.stderr) == ("éutf-8\n", "ü\n")


def test_a_limit_of_the_size_of_files_ends_a_log_and_not_its_run(tmp_path):
    log = (tmp_path / "log").open("w")
    done = python(f"FILE = {str(tmp_path / 'file')!r}" + TALK, stdout=log,
                  before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "done"


def test_a_rank_ends_with_its_launcher_though_it_is_still_importing():
    rank = "import support.startup; print('UP', flush=True); import time; time.sleep(60)"
    launcher = ("import subprocess, sys, time\n"
                f"subprocess.Popen([sys.executable, '-c', {rank!r}])\n"
                "time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", launcher], env=ENV | {"TORCHELASTIC_RUN_ID": "x"},
                               cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "UP\n"
    process.kill()
    assert process.communicate(timeout=20)[0] == ""              # the pipe ends: nobody holds it any more
