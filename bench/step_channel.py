"""How bench/step.py talks to its two workers: one JSON object a line, over stdin and stdout. Standard library
only, since each worker runs in an environment of its own."""
import json
import os
import sys
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version


class Channel:
    """The worker's end. Made before anything else is imported: libraries print to stdout, and from here on
    that is stderr."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **message):
        print(json.dumps(message), file=self.out, flush=True)

    def receive(self):
        """The next command, a dict. The driver closing its end is the command to leave."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)         # at once: no library may still want to say goodbye, nothing is worth keeping
        return json.loads(line)


class Phases:
    """Seconds by phase of one step. `with phases("generation"): ...`, or `phases.wrap(object, "method",
    "generation")`. A phase inside another is taken from the outer one, so that phases add up. CPU seconds of
    the process are kept beside those of the clock: with one thread they are equal where nobody else uses the
    core (and no other process, like a grader, is waited for)."""

    def __init__(self):
        self.inner = []
        self.begin()

    def begin(self):
        """A step starts now."""
        self.found, self.start = {}, self._now()

    def end(self):
        """The step ends now -> {"phases": ..., "step": ...} and, in CPU seconds, {"cpu_phases": ...,
        "cpu_step": ...}. What was in no phase is "other"."""
        total = [now - start for now, start in zip(self._now(), self.start)]
        wall = {name: seconds for name, (seconds, _) in self.found.items()}
        cpu = {name: seconds for name, (_, seconds) in self.found.items()}
        wall["other"] = total[0] - sum(wall.values())
        cpu["other"] = total[1] - sum(cpu.values())
        return {"phases": wall, "step": total[0], "cpu_phases": cpu, "cpu_step": total[1]}

    def _now(self):
        return time.monotonic(), time.process_time()

    @contextmanager
    def __call__(self, name):
        start, inner = self._now(), [0.0, 0.0]
        self.inner.append(inner)
        try:
            yield
        finally:
            self.inner.pop()
            both = self.found.setdefault(name, [0.0, 0.0])
            for i, now in enumerate(self._now()):
                took = now - max(start[i], self.start[i])            # a phase may have begun before its step
                both[i] += took - inner[i]
                if self.inner:
                    self.inner[-1][i] += took

    def wrap(self, owner, attribute, name):
        """Time every call of owner.attribute from now on."""
        call = getattr(owner, attribute)

        def timed(*args, **kwargs):
            with self(name):
                return call(*args, **kwargs)
        setattr(owner, attribute, timed)


class Profile:
    """Torch's profiler over one part of one step, if the command asks for it: {"profile": [part, path]}.
    Generation makes so many events that the two parts, "generation" and the rest, "training", are looked at
    in steps of their own."""

    def __init__(self):
        self.running = None

    def begin(self, command, part):
        self.end()                                    # a part ends where the next one begins
        wanted, self.path = command.get("profile") or (None, None)
        if wanted == part:
            from torch.profiler import ProfilerActivity, profile
            self.running = profile(activities=[ProfilerActivity.CPU], acc_events=True)
            self.running.start()

    def end(self):
        if self.running:
            self.running.stop()
            operators = self.running.key_averages()
            with open(self.path, "w") as file:
                file.write(operators.table(sort_by="self_cpu_time_total", row_limit=40,
                                           max_name_column_width=60))
            self.running = None


def versions(*names):
    """{package: version} of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found
