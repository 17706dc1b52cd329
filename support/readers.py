"""Files of data. A reader yields pairs: the row's number, counted from 1, and the row, or the ValueError that
reading this row raised. Every other mistake is a ValueError that names the file.

    for file in data_files(Path("data/"), split="train"):      # of a folder; of a file itself
        for number, row in READERS[file.suffix](file):
            ...

To copy: this file. It needs pyarrow, and that only for parquet.
"""
import json
import re

SUFFIXES = (".parquet", ".jsonl")
# Words in a path that tell a split, as `datasets` knows them.
SPLITS = {"train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"},
          "test": {"test", "testing", "eval", "evaluation"}}
PREFERRED = {"train": ("train",), "validation": ("validation", "test")}        # asked for -> read


def data_files(path, suffixes=SUFFIXES, split=None):
    """The files that `path` is or holds; of a folder with several splits those of `split`, by of_one_split.
    Raises FileNotFoundError or ValueError if there is none to read."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory; --data takes a parquet or JSONL file, "
                                "or a folder")
    files = [path]
    if path.is_dir():
        files = []
        for file in visible_files(path):
            if file.suffix in suffixes:
                files.append(file)
        if split:
            names = [file.relative_to(path).as_posix() for file in files]
            files = [path / name for name in of_one_split(names, split, path)]
    if not files or files[0].suffix not in suffixes:
        raise ValueError(f"{path}: expected {', '.join(suffixes)} or a folder of such files, "
                         f"found {path.suffix or 'none inside'}")
    for file in files:
        refuse_placeholder(file)
    return files


def of_one_split(names, split, source):
    """Those of the files of a data set that belong to `split`: "train", or "validation", for which "test"
    stands in where there is none. All of them, where none is named for it.

    names: their paths within `source`, a folder or a data set on the hub. What is named for no split counts
    as train. Raises ValueError where folders hold a configuration each: which one, is the user's choice.

    >>> of_one_split(["README.jsonl", "data/train-0.parquet", "data/test-0.parquet"], "validation", "mine")
    ['data/test-0.parquet']
    """
    by_split, configurations = {}, set()
    for name in names:
        found = split_of(name)
        by_split.setdefault(found or "train", []).append(name)
        if found:
            configurations.add(configuration_of(name))
    if len(configurations) > 1:
        folders = sorted({configuration_of(name) for name in names} - {"."})
        raise ValueError(f"{source}: holds several configurations, {', '.join(folders)}: name one, as "
                         f"{source}/{folders[0]}. (If they are one data set, give their files names without "
                         "`train` and `test`.)")
    for name in PREFERRED[split]:
        if name in by_split:
            return by_split[name]
    return names


def split_of(name):
    """The split that a path within a data set is named for; None for none. The file's own name counts before
    its folder's. A word is what digits, signs and blanks set apart: latest.jsonl is no test."""
    for part in reversed(name.split("/")):
        words = set(re.split(r"[^a-z]+", part.lower()))
        for split, names in SPLITS.items():
            if words & names:
                return split
    return None


def configuration_of(name):
    """The folder of a path within a data set, without the folders that are named for a split."""
    return "/".join(part for part in name.split("/")[:-1] if not split_of(part)) or "."


def visible_files(folder):
    """What a folder and its folders hold, sorted: file systems list in any order, and every rank must number
    the examples alike. Nothing hidden, nor in a hidden folder, which other programs leave: ._mine.jsonl
    (macOS), .ipynb_checkpoints/, .cache/ (downloads). ValueError: a link to a folder is among it."""
    files = []
    for file in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.is_dir() and file.is_symlink():               # data would lack, and nobody would know
            raise ValueError(f"{file}: a link to a folder, which is not followed; put the folder in its "
                             "place, or name that as the data")
        if not file.is_dir():
            files.append(file)
    return files


def refuse_placeholder(file):
    """ValueError if the file is empty, as a copy that was cut off leaves it, or is what git-lfs leaves in the
    place of one that it has not fetched."""
    with file.open("rb") as content:
        beginning = content.read(40)
    if not beginning:
        raise ValueError(f"{file}: is empty; fetch it again, or remove it")
    if beginning.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: a Git-LFS pointer, not the data itself; `git lfs pull` fetches that")


def each_name_once(pairs):
    """For json.loads(text, object_pairs_hook=each_name_once), which would keep the last of two in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"names {next(name for name in names if names.count(name) > 1)} twice")
    return found


def read_parquet(file):
    """The rows of a parquet file. Raises ValueError, naming the file, where it cannot be read on."""
    # Only needed here: the paper's data set comes as parquet, one's own may not.
    import pyarrow
    import pyarrow.parquet as pq
    try:
        number = 0
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            for name in names:
                if names.count(name) > 1:             # a row, as a dictionary, would hold the last one
                    raise ValueError(f"{file}: has two columns named {name}; rename one")
            for batch in table.iter_batches(1024):    # rows
                for row in _rows_of_batch(batch):
                    number += 1
                    yield number, row
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: not a readable parquet file ({error}); download it again") from error


def _rows_of_batch(batch):
    """The rows of a batch of parquet; a ValueError in the place of each that Python cannot hold: with text
    that is not UTF-8, or a date after the year 9999."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):               # in some row: then one at a time
        rows = []
    for place in range(len(batch)):
        try:
            rows += batch.slice(place, 1).to_pylist()
        except UnicodeDecodeError as error:
            rows.append(ValueError(f"expected text in UTF-8: {error}"))
        except (ValueError, OverflowError) as error:
            rows.append(ValueError(f"expected what Python can hold; leave out that column: {error}"))
    return rows


def read_jsonl(file):
    """The rows of a file with one JSON object a line. Empty lines are no rows, but count."""
    # Bytes, not text: a stray byte then spoils its own row only, and the row number stays right.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=each_name_once)
            # Bad JSON and bad UTF-8 are ValueErrors, too many nested brackets a RecursionError.
            except (ValueError, RecursionError) as error:
                row = ValueError(f"expected one JSON object on the line: {error}")
            yield number, row


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet}
