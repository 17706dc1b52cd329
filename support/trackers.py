"""Trackers: what a run measures, on TensorBoard, wandb or trackio, each through its own library.

    check_tracker("wandb")                                  # ValueError, with the fix, if it is not installed
    tracker = Tracker("wandb", "out/run", settings, step=-1)             # resumed at step 50: step=50
    tracker.log(12, {"reward/mean": 0.4})
    tracker.show(12, [{"id": "a", "response": "..."}])      # samples as text, and the folder's curves.png
    tracker.close()

metrics.jsonl holds all that a tracker gets, so no tracker is worth a run: its library is called in a thread
of its own, for which training never waits. Whatever it raises becomes one warning, and is its end.

To copy: this file with support/disk.py, and PROJECT named anew.
"""
import importlib.util
import json
import os
import queue
import re
import threading
import uuid
import warnings
from pathlib import Path

from support.disk import write_whole

PROJECT = "srft"                    # where WANDB_PROJECT or TRACKIO_PROJECT names no other
SAMPLE = ("id", "prompt", "answer", "response", "reward", "reason")      # what is shown of one
CLOSE_SECONDS = 60


def check_tracker(name):
    """Raise ValueError if a tracker that was asked for is not installed. "auto" and "none" always are."""
    if name in TRACKERS and importlib.util.find_spec(name) is None:
        raise ValueError(f"--track {name}: it is not installed: pip install {name}, or pass --track none")


class Tracker:
    """One of TRACKERS in a thread of its own. name: auto is TensorBoard where it is installed, else none."""

    def __init__(self, name, run, settings, step):
        """run: the run's folder. settings: flag -> value. step: rows after it are about to be written again;
        -1: the run is new."""
        if name == "auto":
            name = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
        self.name, self.calls, self.over = name, queue.SimpleQueue(), name == "none"
        if not self.over:
            arguments = (TRACKERS[name], Path(run), settings, step)
            self.thread = threading.Thread(target=self._work, args=arguments, daemon=True)
            self.thread.start()

    def log(self, step, metrics):
        """Metrics of a step: name -> value; what is no number is left out."""
        if not self.over:
            numbers = {name: x for name, x in metrics.items() if isinstance(x, (int, float))}
            numbers.pop("step", None)
            self.calls.put(("log", step, numbers))

    def show(self, step, samples):
        """Samples of a step as text, and the curves as they are drawn by now."""
        if not self.over:
            self.calls.put(("show", step, [[str(row.get(name)) for name in SAMPLE] for row in samples]))

    def close(self):
        """Wait until all is sent, but not for long."""
        if self.over:
            return
        self.calls.put(("close",))
        self.thread.join(CLOSE_SECONDS)
        if self.thread.is_alive():
            self._give_up(f"not done {CLOSE_SECONDS} s after the end")

    def _work(self, kind, run, settings, step):
        try:
            tracker, call = kind(run, settings, step), "begin"
            while call != "close" and not self.over:
                call, *arguments = self.calls.get()
                getattr(tracker, call)(*arguments)
        except BaseException as error:             # a library may even try to end the process
            words = " ".join(str(error).split())[:300]                        # some have many lines
            self._give_up(f"{type(error).__name__}: {words}")
        finally:
            self.over = True                       # also where the error's own text cannot be made

    def _give_up(self, reason):
        if not self.over:
            self.over = True
            warnings.warn(f"--track {self.name}: {reason}. The run goes on without it; metrics.jsonl has all")


def run_name(run, step):
    """The name of this run in its tracker: the folder's, and letters that no other has. It is kept in the
    folder, so that a resumed run goes on under it."""
    file = run / "tracker.txt"
    if step >= 0 and file.exists():
        return file.read_text().strip()
    folder = re.sub(r"[^\w.-]", "-", run.resolve().name, flags=re.ASCII)[:64]
    name = f"{folder}-{uuid.uuid4().hex[:8]}"
    write_whole(file, name + "\n")
    return name


class TensorBoard:
    """Events beside metrics.jsonl: tensorboard --logdir out."""

    def __init__(self, run, settings, step):
        from torch.utils.tensorboard import SummaryWriter
        self.curves = run / "curves.png"
        self.writer = SummaryWriter(run, purge_step=step + 1)
        self.writer.add_text("config", self._code(json.dumps(settings, indent=2)), max(step, 0))

    def log(self, step, metrics):
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def show(self, step, samples):
        for number, sample in enumerate(samples):
            text = "\n\n".join(f"{name}\n\n{self._code(value)}" for name, value in zip(SAMPLE, sample))
            self.writer.add_text(f"samples/{number}", text, step)
        if self.curves.exists():
            from matplotlib.image import imread
            self.writer.add_image("curves", imread(self.curves)[..., :3], step, dataformats="HWC")
        self.writer.flush()

    def close(self):
        self.writer.close()

    @staticmethod
    def _code(text):
        """The text as a block of code, for TensorBoard reads Markdown."""
        return "\n".join("    " + line for line in text.splitlines())


class Wandb:
    """wandb, which sends from a process of its own and goes on trying while the network is away. With
    WANDB_MODE=offline it writes to wandb/ in the run's folder, for `wandb sync`."""

    def __init__(self, run, settings, step):
        # It asks at a terminal for an account, and waits for its server: not for ever.
        for name, seconds in (("LOGIN", 1), ("INIT", 30), ("FINISH", CLOSE_SECONDS - 10)):
            os.environ.setdefault(f"WANDB_{name}_TIMEOUT", str(seconds))
        os.environ.setdefault("WANDB_CONSOLE", "off")      # what the run prints stays where it was printed
        import wandb
        self.wandb, self.curves, name = wandb, run / "curves.png", run_name(run, step)
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), id=name, name=name, dir=run,
                              config=settings, resume="allow", allow_val_change=True)
        # By a column of our own: wandb's own steps only grow, and a resumed run goes back to its checkpoint.
        self.run.define_metric("*", step_metric="step")

    def log(self, step, metrics):
        self.run.log({**metrics, "step": step})

    def show(self, step, samples):
        shown = {"step": step, "samples": self.wandb.Table(columns=list(SAMPLE), data=samples)}
        if self.curves.exists():
            shown["curves"] = self.wandb.Image(str(self.curves))
        self.run.log(shown)

    def close(self):
        self.run.finish()


class Trackio:
    """trackio's store on this machine, or the space that TRACKIO_SPACE_ID names."""

    def __init__(self, run, settings, step):
        import trackio
        self.trackio, self.curves = trackio, run / "curves.png"
        self.run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=run_name(run, step),
                                config=settings, resume="allow", embed=False)

    def log(self, step, metrics):
        self.run.log(metrics, step=step)

    def show(self, step, samples):
        rows = [dict(zip(SAMPLE, sample)) for sample in samples]
        shown = {"samples": self.trackio.Table(data=rows)}
        if self.curves.exists():
            shown["curves"] = self.trackio.Image(str(self.curves))
        self.run.log(shown, step=step)

    def close(self):
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
