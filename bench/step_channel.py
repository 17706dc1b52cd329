"""How bench/step.py talks to its two workers: one JSON object a line, over stdin and stdout. Standard library only, since each
worker runs in an environment of its own."""
import json
import os
import sys
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version


class Channel:
    """The worker's end. Made before anything else is imported: libraries print to stdout, and from here on that is stderr."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **message):
        print(json.dumps(message), file=self.out, flush=True)

    def receive(self):
        """The next command, a dict. The driver closing its end is the command to leave."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)         # at once: no library may still want to say goodbye, and nothing here is worth keeping
        return json.loads(line)


class Phases:
    """Seconds by phase of one step. `with phases("generation"): ...`, or `phases.wrap(object, "method", "generation")`. A phase
    inside another is taken from the outer one, so that phases add up."""

    def __init__(self):
        self.seconds, self.inner = {}, []

    @contextmanager
    def __call__(self, name):
        start = time.monotonic()
        self.inner.append(0.0)
        try:
            yield
        finally:
            took = time.monotonic() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self.inner.pop()
            if self.inner:
                self.inner[-1] += took

    def wrap(self, owner, attribute, name):
        """Time every call of owner.attribute from now on."""
        call = getattr(owner, attribute)

        def timed(*args, **kwargs):
            with self(name):
                return call(*args, **kwargs)
        setattr(owner, attribute, timed)

    def take(self):
        """The seconds since the last take, then from zero again."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def profile(path):
    """Start a profiler of this process -> the function that ends it and writes its table of operators, slowest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    running = profiler(activities=[ProfilerActivity.CPU], acc_events=True)
    running.start()

    def stop():
        running.stop()
        with open(path, "w") as file:
            file.write(running.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60))
    return stop


def versions(*names):
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found
