"""The flags of eval.py, whose defaults are the paper's protocol (Sec. 5.1, App. B).

    args = parse(["--model", "out/srft", "--benchmarks", "gsm8k"])      # argparse.Namespace

A file of their own, without torch: eval.py reads them before it imports what takes seconds.
"""
import argparse

from data import TEMPLATES
from grading import custom
from paper.benchmarks import BENCHMARKS
from paper.tables import COLUMNS
from reward import TEXTS
from support.flags import Parser, ShowVersions
from support.intervals import number_in, positive


def parse(argv=None, description=None):
    """The command line -> argparse.Namespace. Unknown flags and absurd numbers are errors."""
    parser = Parser(prog="eval.py", description=description)
    parser.add_argument("--version", action=ShowVersions)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="Hugging Face folder or hub name, or a run's folder")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models, or folders of results: by "
                      "how much B is better on the same problems, and on which")
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.reward:
        try:
            custom.read(args.reward)                     # is it there, and Python?
        except ValueError as error:
            parser.error(str(error))
    if args.grader is None:
        args.grader = "none" if args.reward else "both"
    return args


def add_flags(parser):
    """All flags that have a default."""
    def flag(name, default, help, within=None, **how):
        """A bool also gets --no-NAME; the help ends in the default. within: the interval that a number must
        lie in, as support.intervals writes it."""
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        if within:
            how["type"] = number_in(type(default), within)
        if default is not None:
            help = f"{help} [{default}]"
        parser.add_argument(f"--{name}", default=default, help=help.replace("%", "%%"), **how)

    flag("benchmarks", ",".join(COLUMNS), f"of {', '.join(BENCHMARKS)}: NAME or NAME@REVISION from the hub, "
         "NAME=PATH a local copy; or PATH, a file of one's own with problem and answer; separated by commas")
    flag("out", None, "folder of the results; default: RUN/eval, or out/eval/MODEL. With --compare: of the "
         "comparison and, in a/ and b/, of the results; default: out/compare/A-B", metavar="DIR")
    flag("template", None, "prompt template (Fig. A3, Fig. A4; Table A1); default: the run's, else paper",
         choices=tuple(TEMPLATES))
    flag("grader", None, "verifier: the paper's final one, its training one, or both (Sec. 5.1); default: "
         "both, with --reward none", choices=("oat", "math-verify", "both"))
    flag("reward", None, "a reward of one's own, as in training; with --grader, beside that verifier",
         metavar="FILE.py:FUNCTION")
    flag("samples", 0, "responses a problem; 0: 32 for AIME24 and AMC, else 1 (Sec. 5.1)", within="[0, inf)")
    flag("limit", None, "only the first problems of each benchmark", type=positive)
    flag("temperature", 0.6, "sampling temperature (App. B: 0.6); 0 is greedy", within="[0, inf)")
    flag("top_p", 1.0, "nucleus sampling; the paper is silent", within="(0, 1]")
    flag("max_tokens", 8192, "longest response (App. B: 8,192)", within="[1, inf)")
    flag("seed", 0, "of sampling and of the order of options", within="[0, 4294967295]")
    flag("rope_theta", 0.0, "RoPE theta; 0 keeps the model's own. App. B, for the base model: 40000",
         within="[0, inf)")
    flag("window", 0, "context window in tokens; 0 keeps the model's own. App. B, for the base model: 16384",
         within="[0, inf)")
    flag("grade_text", "after_think", "what is graded: after the last </think>, all, or nothing without one",
         choices=TEXTS)
    flag("strict_box", True, "Math-Verify grades the last box only, not any number it finds in the text")
    flag("score_unfinished", True, "a response cut at --max_tokens is graded like any other (public code)")
    flag("device", "auto", "auto: the GPU if torch is built for one, and an error if it cannot be used; else "
         "the CPU", choices=("auto", "cuda", "cpu"))
    flag("engine_memory", 0.9, "share of each GPU for vLLM", within="(0, 1]")
    flag("engine_sequences", 256, "responses a rank decodes at once", within="[1, inf)")
    flag("grader_workers", 0, "grading processes a rank; 0: the cores divided by the node's ranks, less "
         "one for the engine", within="[0, 4096]")
    flag("grader_deadline", 10.0, "seconds until a grading process is killed, and its reward is 0",
         within="(0, 86400]")
    flag("hang_minutes", 30.0, "stop, and name the rank that is behind, if one gets nothing done for longer",
         within="(0, 525600]")
