"""The language-model head: token_logprobs against a full log_softmax and against the chunked heads of TRL and
Liger.

    OMP_NUM_THREADS=1 python bench/logprob.py --trl_python .venv-trl/bin/python

One run is forward and backward of sum(g logp) for random g, N tokens of width D and a vocabulary of V, all
gradients taken; the entropy is computed too, without gradient, by every path that offers it.

  ours          logprobs.token_logprobs
  full          h W^T, log_softmax, gather and the entropy in plain torch; left out where its blocks exceed
                --limit_gb
  TRL           trl.kernels.ChunkedLogProbFunction as its trainers call it, with the entropy
  Liger         the log-prob function inside its GRPO loss, in torch; no entropy
  Liger Triton  LigerFusedLinearCrossEntropyLoss(reduction="none"), which needs a GPU; no entropy, no
                temperature

Each path lives in a process of its own, TRL's and Liger's in the environment of --trl_python, and reads the
same inputs from a file. A round lets each path run once, in turn; times are medians of rounds, ratios medians
of the rounds' ratios. On a CPU they are processor time, which other programs disturb less; the JSON has wall
time too. Memory is the highest peak above what the process held with its inputs in memory: of forward, or of
backward less the bytes of the two gradients. Errors are |x - exact| / |exact| (2-norms), exact from
log_softmax and autograd in float64 on the same inputs, where N V D is at most 1.5e10.

D decides what matters: the matrix products cost 2 D operations an entry of the logits, softmax a constant
number. So the whole range of N and V is run at D = 64, where a path's own passes over the logits weigh most,
and two cases at D = 896, the width of Qwen2-0.5B, where the products do: there, computing the logits a second
time makes four products of three. The inputs are such that the target's probability ranges from 1e-8 to
almost 1, as in text.
"""
import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import cached_property

import torch

from common import PeakMemory, clock, parser, save, show, start, work_clock

from support.intervals import number_in, positive

PATHS = ("ours", "full", "TRL", "Liger", "Liger Triton")
CASES = ["1024,32000,64", "1024,151936,64", "512,32000,896", "1024,151936,896", "8192,32000,64",
         "32768,32000,64", "32768,151936,64"]
OUTPUTS = ("logp", "entropy", "grad_hidden", "grad_weight")


def ours(hidden, weight, targets):
    from support.logprobs import token_logprobs
    return token_logprobs(hidden, weight, targets)


def full(hidden, weight, targets):
    log_p = torch.log_softmax((hidden @ weight.T).float(), -1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], entropy


def trl(hidden, weight, targets):
    from trl.kernels import ChunkedLogProbFunction
    found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("entropy",))
    return found[:2]


def liger(hidden, weight, targets):
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction
    return _ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, 1.0, 4096), None


def liger_triton(hidden, weight, targets):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, targets), None


FUNCTIONS = dict(zip(PATHS, (ours, full, trl, liger, liger_triton)))


def make_inputs(n, vocab, width, dtype):
    """hidden, weight, targets, g. Rows of weight have length 1, and a hidden state has its target's row in it
    0 to 25 times: the target's logit is 0 to 25 beside noise of 2, and log Z of the noise is log V + 2."""
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    targets = torch.randint(vocab, (n,), generator=generator)
    share = 25 * torch.rand(n, 1, generator=generator)
    hidden = 2 * torch.randn(n, width, generator=generator) + share * weight[targets]
    return hidden.to(dtype), weight.to(dtype), targets, torch.randn(n, generator=generator)


def forward_backward(function, hidden, weight, targets, g, phase=nullcontext):
    """One run -> the OUTPUTS. Forward and backward each run inside a context manager made by `phase`."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with phase():
        logp, entropy = function(hidden, weight, targets)
    with phase():
        (g * logp).sum().backward()
    return logp.detach(), None if entropy is None else entropy.detach(), hidden.grad, weight.grad


def exact(hidden, weight, targets, g, rows=64):
    """The OUTPUTS in float64, by plain log_softmax and autograd on a few rows at a time."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    parts = []
    for h, t, a in zip(hidden.split(rows), targets.split(rows), g.double().split(rows)):
        log_p = torch.log_softmax(h @ weight.T, -1)
        logp = log_p.gather(-1, t[:, None])[:, 0]
        (a * logp).sum().backward()
        parts.append((logp.detach(), -(log_p.exp() * log_p).sum(-1).detach()))
    return *map(torch.cat, zip(*parts)), hidden.grad, weight.grad


def errors(outputs, reference):
    """Relative error of each of the OUTPUTS; None where the path has none."""
    found = dict.fromkeys(OUTPUTS)
    for name, x, y in zip(OUTPUTS, outputs, reference):
        if x is not None:
            found[name] = ((x.double() - y).norm() / y.norm()).item()
    return found


def worker(args):
    """One path in its own process. Each line on stdin is one run, of the inputs in args.exchange/inputs.pt,
    and is answered by a line of JSON: "load" reads them first, "save" writes the OUTPUTS to outputs.pt."""
    device, inputs = start(args), None
    try:                                       # libraries and kernels are loaded before memory is measured
        small = [x.to(device) for x in make_inputs(16, 16, 16, torch.float32)]
        forward_backward(FUNCTIONS[args.worker], *small)
    except Exception as e:
        print(json.dumps({"error": " ".join(f"{type(e).__name__}: {e}".split())[:100]}), flush=True)
        return
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        if "load" in line:
            del inputs
            inputs = [x.to(device) for x in torch.load(f"{args.exchange}/inputs.pt")]
        if device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)   # what earlier runs left in malloc's lists is not this run's
        phases = [PeakMemory(device), PeakMemory(device)]            # forward, backward
        began, wall = work_clock(device), clock(device)
        outputs = forward_backward(FUNCTIONS[args.worker], *inputs, phase=iter(phases).__next__)
        seconds, wall = work_clock(device) - began, clock(device) - wall
        if "save" in line:
            torch.save([x if x is None else x.cpu() for x in outputs], f"{args.exchange}/outputs.pt")
        forward, backward = (m.before_gb + m.gb - phases[0].before_gb for m in phases)
        extra = max(forward, backward - sum(x.nbytes for x in outputs[2:]) / 1e9)
        print(json.dumps({"seconds": seconds, "wall": wall, "gb": extra}), flush=True)
        del outputs


class Worker:
    """A worker process; .error says why it cannot run, None if it can. All start side by side."""

    def __init__(self, name, python, args, folder):
        command = [python, __file__, "--worker", name, "--exchange", folder, "--threads", str(args.threads),
                   "--device", args.device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded = None

    @cached_property
    def error(self):
        return self.read().get("error")                     # the first line that it writes

    def read(self):
        """The next line of JSON; what libraries print is passed over."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.error = f"the process ended ({self.process.wait()})"               # killed for memory, perhaps
        return {"error": self.error}

    def run(self, case, save):
        """One run of this case, from inputs.pt -> {"seconds", "wall", "gb"}, or {"error"} if it did not come
        back from it."""
        self.process.stdin.write(f"{'' if self.loaded == case else 'load'} {'save' if save else ''}\n")
        self.process.stdin.flush()
        self.loaded = case
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def why_not(args, workers, name, n, vocab):
    """Why a path does not run a case; None if it does."""
    if name not in workers:
        return "no --trl_python"
    blocks = 3 * 4 * n * vocab / 1e9               # log p, and two more in the entropy and in backward
    if name == "full" and blocks > args.limit_gb:
        return f"needs {blocks:.2g} GB"
    return workers[name].error


def run_case(args, workers, case, folder):
    """{path: {seconds, ratio, against, gb, errors} or {skipped}} of one case; `ratio` is to the path
    `against`."""
    n, vocab, width = map(int, case.split(","))
    tensors = make_inputs(n, vocab, width, getattr(torch, args.dtype))
    torch.save(tensors, f"{folder}/inputs.pt")
    reference = exact(*tensors) if n * vocab * width <= 1.5e10 else None
    del tensors
    found = {name: {"skipped": why_not(args, workers, name, n, vocab)} for name in PATHS}
    able = [name for name in PATHS if not found[name]["skipped"]]
    rounds = []
    for i in range(args.rounds if n * vocab <= 1e9 else 1):
        rounds.append({})
        for name in list(able):
            check = i == 0 and reference is not None
            rounds[-1][name] = reply = workers[name].run(case, save=check)
            if "error" in reply:
                found[name] = {"skipped": reply["error"]}
                able.remove(name)
            elif check:
                found[name] = {"errors": errors(torch.load(f"{folder}/outputs.pt"), reference)}
    against = "full" if "full" in able else "ours"
    for name in able:
        runs = [r[name] for r in rounds]
        ratios = [r[name]["seconds"] / r[against]["seconds"] for r in rounds]
        found[name] = {"seconds": statistics.median(run["seconds"] for run in runs),
                       "gb": max(run["gb"] for run in runs), "against": against,
                       "ratio": statistics.median(ratios), "rounds": runs,
                       "errors": found[name].get("errors", {})}
    return {"tokens": n, "vocabulary": vocab, "width": width, "paths": found}


def sizes(text):
    """A case of the command line, "N,V,D", as it is; an error of argparse unless these are three counts."""
    if len([positive(size) for size in text.split(",")]) != 3:
        raise argparse.ArgumentTypeError(f"{text}: three counts, N,V,D")
    return text


def main(argv=None):
    p = parser(__doc__, "logprob")
    p.add_argument("--trl_python",
                   help="python of an environment with trl and liger-kernel; without it these are left out")
    p.add_argument("--cases", type=sizes, nargs="+", default=CASES, metavar="N,V,D",
                   help="tokens, vocabulary, width [%(default)s]")
    p.add_argument("--rounds", type=positive, default=3,
                   help="runs of each path; one where N V is over 1e9 [%(default)s]")
    p.add_argument("--limit_gb", type=number_in(float, "(0, inf)"), default=6.0,
                   help="leave the full path out where it needs more [%(default)s]")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                   help="of hidden states and head [%(default)s]")
    p.add_argument("--worker", choices=PATHS, help="internal: be the process of this path")
    p.add_argument("--exchange", help="internal: the folder of inputs.pt and outputs.pt of a worker")
    args = p.parse_args(argv)
    if args.worker:
        return worker(args)
    start(args)
    results, rows, workers = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in PATHS:
            if python := sys.executable if name in ("ours", "full") else args.trl_python:
                workers[name] = Worker(name, python, args, folder)
        try:
            for case in args.cases:
                results.append(run_case(args, workers, case, folder))
                of_case = table_rows(results[-1])
                rows += of_case
                print(case, *(f"{r[3]} {r[5]}" for r in of_case), sep="  ", file=sys.stderr, flush=True)
        finally:
            for w in workers.values():
                w.close()
    show(f"Head, forward and backward, {args.dtype}: seconds, ratio to full, GB beyond inputs and gradients, "
         "relative errors",
         ["N", "V", "D", "path", "runs", "s", "ratio", "GB", "log p", "H", "dh", "dW"], rows)
    save(args, results)
    return results


def table_rows(result):
    """Rows of the table, one a path."""
    rows = []
    for name, found in result["paths"].items():
        row = [f"{result['tokens']:,}", f"{result['vocabulary']:,}", result["width"], name]
        if "skipped" in found:
            row += ["", found["skipped"], "", ""]
        else:
            of = " of ours" if found["against"] == "ours" else ""
            row += [len(found["rounds"]), f"{found['seconds']:.2f}", f"{found['ratio']:.2f}{of}",
                    f"{found['gb']:.2f}"]
        for key in OUTPUTS:
            error = found.get("errors", {}).get(key)
            row.append("" if error is None else f"{error:.0e}")
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
