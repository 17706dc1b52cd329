"""A program's command line: a mistake is one line, which names the flag that was meant; --version; and the
flags of a run, read back from its folder.

    parser = Parser(prog="srft.py", description=__doc__)
    parser.parse_args(["--stepps", "3"])      # srft.py: unrecognized arguments: --stepps; is it --steps? ...

    as_words({"steps": 80, "offload": False})                       # ["--steps=80", "--no-offload"]
    flags_of_run(parser, "out/run", {"steps", "offload"}, leave={"out"})    # {"steps": 80, "offload": False}

To copy: this file; --version also takes support/versions.py.
"""
import argparse
import difflib
import json
import shlex
import sys
import textwrap
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """argparse's own, for descriptions whose lines stay as they are, and for flags that are spelled out."""

    def __init__(self, **how):
        how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | how
        super().__init__(**how)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")

    def parse_known_args(self, args=None, namespace=None):
        """Of argparse, which every parser of a subcommand calls, too."""
        args = sys.argv[1:] if args is None else list(args)
        if not self._subparsers:                        # else they may be flags of a subcommand
            self.refuse_unknown(args)
        return super().parse_known_args(args, namespace)

    def refuse_unknown(self, args):
        """Before argparse looks: it would name a required flag that is missing and not the one misspelt."""
        for word in args:
            flag = word.partition("=")[0]
            if word == "--":                            # what follows are no flags
                break
            if not flag.startswith("--") or " " in flag or flag in self._option_string_actions:
                continue
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            meant = f"; is it {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {flag}{meant}")


class ShowVersions(argparse.Action):
    """--version: what this program is and runs on; then the end."""

    def __init__(self, option_strings, dest, help="print what this is and what it runs on, then stop"):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, *_):
        from support.versions import stack
        print("\n".join(stack()))
        parser.exit()


def as_words(flags):
    """name -> value, as words of a command line."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name}={value}")           # with =, a value may be empty, or begin with a dash
    return words


def what_sets_what(brought):
    """For the end of a help text. brought: name -> the flags that it sets."""
    lines = ["what these set, unless another flag says otherwise:"]
    for name, flags in brought.items():
        words = shlex.join(as_words(flags)) or "nothing"
        lines.append(textwrap.fill(f"  {name}: {words}", subsequent_indent=" " * 6, break_on_hyphens=False))
    return "\n".join(lines)


def flags_of_run(parser, folder, flags, leave):
    """Name -> value of the flags that the config.json of a run's folder holds; {} without that file. flags:
    all that there are. leave: what else the file holds, or what is not to be taken from it.

    A folder within a run's, a file that cannot be read or is a model's, a flag that is no more, and a value
    that it cannot have end the program with one line, which says what to do: to guess would train on by other
    flags than the run's.
    """
    file = Path(folder) / "config.json"

    def refuse(message, what=file):
        parser.exit(2, f"{parser.prog}: {what}: {message}\n")

    for above in list(file.absolute().parents)[1:3]:               # of hf/, of checkpoints/step-50/
        if not (Path(folder) / "metrics.jsonl").exists() and (above / "metrics.jsonl").exists():
            refuse(f"lies within the folder of a run; to go on with that, pass --out {above}", folder)
    if not file.exists():
        return {}

    try:
        known = json.loads(file.read_text())
        taken = {name: value for name, value in known.items() if name not in leave}
    except (OSError, ValueError, AttributeError) as error:         # the last: no object, so it has no items
        refuse(f"cannot be read ({error}). Put it back as it was, or remove it and give all its flags")
    if "out" not in known:
        refuse("is no run's (a model's?); --out is the folder that a run has made, with checkpoints/ in it")
    for name, value in taken.items():
        if name not in flags:
            commit = known.get("git_commit") or "unknown"
            refuse(f"this version has no flag --{name} ({value}). Take it out of the file, and give what has "
                   f"come in its place; or go on with the version that wrote it (commit {commit})")
    parser.error = refuse                                          # for the values, which argparse checks
    return vars(parser.parse_args(as_words(taken)))


def whose_flags(folder):
    """What to say when a run is resumed: where its flags come from."""
    file = Path(folder) / "config.json"
    if file.exists():
        return f"--resume: flags that are not given are as in {file}"
    return f"--resume: there is no {file}, so all flags are those of the command line"
