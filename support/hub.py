"""Models and data from the Hugging Face hub: one download a node, of the files needed, from one commit.

    folder = fetch("Qwen/Qwen2.5-Math-7B", "model", "--model")
    folder = fetch("openai/gsm8k@v1.0/main", "dataset", "--data")

A name is OWNER/NAME, OWNER/NAME@REVISION (a branch, a tag or a commit), and for data also .../FOLDER or
.../FILE within it: the hub's own way to write a place, hf://, without that word. Interrupted downloads are
taken up again, and a cache that holds all of it needs no network: that is huggingface_hub's work.

To copy: this file with support/collectives.py, support/readers.py and support/weights.py. It needs
huggingface_hub.
"""
import os
import re
from glob import escape
from pathlib import Path
from urllib.parse import unquote

from support.collectives import of_all_ranks
from support.readers import SUFFIXES, of_one_split
from support.weights import snapshot

# Some revisions have a slash of their own. In a branch's name it is written %2F.
NAME = re.compile(r"(?P<repo>[^/@]+(/[^/@]+)?)(@(?P<revision>refs/pr/\d+|refs/convert/[\w.-]+|[^/@]+))?"
                  r"(/(?P<path>.+))?")
COMMITS = {}                 # what this process has fetched: name -> commit, for the record of a run


def split_name(name):
    """OWNER/NAME@REVISION/PATH -> (repository, revision or None, path or "").

    >>> split_name("openai/gsm8k@v1.0/main")
    ('openai/gsm8k', 'v1.0', 'main')
    """
    found = NAME.fullmatch(str(name).rstrip("/"))
    if not found:
        return str(name), None, ""                     # no name that the hub could have: it will say so
    revision = found["revision"]
    return found["repo"], revision and unquote(revision), found["path"] or ""


def fetch(name, repo_type, flag, split="train"):
    """A local path for `name`: itself if it exists, else what the Hugging Face hub has under that name.

    repo_type: "model" or "dataset"; of a data set with several splits, the files of `split` alone are fetched
    (readers.of_one_split). One rank a node downloads while the others wait. Raises FileNotFoundError naming
    the flag when it cannot be had, on all ranks. A collective, once there is a group.
    """
    here = of_all_ranks(Path(name).exists())
    if all(here):
        return str(name)
    if any(here):                 # these ranks would go on alone, and hang in the next collective
        have = [rank for rank, exists in enumerate(here) if exists]
        raise FileNotFoundError(f"{flag} {name}: only ranks {have} have this path; put it on every node")
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    # Two turns: a node's first rank downloads; then the others find it in the cache.
    for my_turn in (first, not first):
        error = None
        if my_turn:
            try:
                folder = _download(name, repo_type, split, cached=not first)
            except Exception as found:                         # the hub's errors share no useful base class
                error = f"{flag} {name}: {_in_words(found)}"
        first_error = next(filter(None, of_all_ranks(error)), None)
        if first_error:
            raise FileNotFoundError(first_error)
    return folder


def _download(name, repo_type, split, cached):
    """The snapshot's folder, or the path within it that the name asks for. cached: without any network."""
    repo, revision, path = split_name(name)
    if repo_type == "model" and path:
        raise ValueError("no such local path, and on the hub a model is called OWNER/NAME or "
                         "OWNER/NAME@REVISION")
    if repo_type == "model":
        folder = snapshot(repo, revision, cached)
    else:
        folder = _data_snapshot(repo, revision, path, split, cached)
    COMMITS[str(name)] = Path(folder).name                     # the cache calls a snapshot by its commit
    return str(Path(folder) / path)


def _data_card(repo, revision, cached=False):
    """The folder of a data set's snapshot, with its README.md: enough to find the commit, and for the cache
    to note what the revision stands for and which files there are."""
    from huggingface_hub import snapshot_download
    return snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=cached,
                             allow_patterns=["README.md"])


def data_commit(repo, revision=None):
    """The commit that a data set's revision stands for."""
    return Path(_data_card(repo, revision)).name


def _data_snapshot(repo, revision, path, split, cached):
    """A folder with the files of `split` in it, at least, of those under `path`."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    folder = _data_card(repo, revision, cached)
    commit = Path(folder).name
    try:                                                       # the list that the line before has fetched
        names = [file.path for file in get_cached_repo_tree(repo, repo_type="dataset", revision=commit)]
    except CachedRepoTreeNotFoundError:                        # of an older client's cache, without network
        names = [file.relative_to(folder).as_posix() for file in Path(folder).rglob("*")]
    wanted = _wanted(names, path, split, "/".join(filter(None, (repo, path))))
    if not wanted:
        raise ValueError(f"the hub has no file of {' or '.join(SUFFIXES)} there; it has "
                         f"{', '.join(sorted(names)[:5])}")
    snapshot_download(repo, repo_type="dataset", revision=commit, local_files_only=cached,
                      allow_patterns=[escape(name) for name in wanted])
    return folder


def _wanted(names, path, split, source):
    """The files of a repository to fetch: `path` itself, or those of one split under it."""
    if path in names and path.endswith(SUFFIXES):
        return [path]
    prefix = f"{path}/" if path else ""
    within = []
    for name in names:
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name.startswith(prefix) and name.endswith(SUFFIXES) and not hidden:
            within.append(name.removeprefix(prefix))
    return [prefix + name for name in of_one_split(within, split, source)]


def way_out(error):
    """What to do about an error of the hub; "" where it tells nothing."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    # Where the hub answers with an error, the client looks into the cache, and then tells of that.
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    status = None
    for cause in causes:
        status = status or getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return ("It is gated: accept its terms on its page there, and let this machine know who you are, by "
                "`hf auth login` or a token in HF_TOKEN. ")
    if isinstance(error, RevisionNotFoundError):
        return "It has no such branch, tag or commit: check what stands behind the @. "
    if isinstance(error, RepositoryNotFoundError):           # the hub answers so for a private one, too
        return "Check its name; if it is private, run `hf auth login` or set a token in HF_TOKEN. "
    if status in (401, 403):
        return ("The hub does not let this machine read it: log in by `hf auth login`, or set a token in "
                "HF_TOKEN that may. ")
    if status == 429:
        return ("Too many requests came from this address: wait some minutes, or log in by `hf auth login`, "
                "which raises the limit. ")
    return ""


def _in_words(error):
    """What went wrong in a download, and the way out, in one line."""
    if type(error) is ValueError:                              # one of ours, in words already
        return str(error)
    first_line = (str(error).splitlines() or [""])[0][:150]
    hint = way_out(error) or ("Without network, pass local paths: --model DIR (config, tokenizer, "
                              "safetensors) and --data FILE-or-DIR.")
    return (f"no such local path, and the Hugging Face hub did not give it ({type(error).__name__}: "
            f"{first_line}). {hint.rstrip()}")
