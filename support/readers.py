"""Files of data. A reader yields pairs: the row's number, counted from 1, and the row, or the ValueError that
reading this row raised. Every other mistake is a ValueError that names the file.

    for file in data_files(Path("data/")):             # of a folder all, sorted; of a file itself
        for number, row in READERS[file.suffix](file):
            ...

To copy: this file. It needs pyarrow, and that only for parquet.
"""
import json


def data_files(path, suffixes=(".parquet", ".jsonl")):
    """The files that `path` is or holds. Raises FileNotFoundError or ValueError if there is none to read."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory; --data takes a parquet or JSONL file, "
                                "or a folder")
    files = [path]
    if path.is_dir():
        files = []
        for file in visible_files(path):
            if file.suffix in suffixes:
                files.append(file)
    if not files or files[0].suffix not in suffixes:
        raise ValueError(f"{path}: expected {', '.join(suffixes)} or a folder of such files, "
                         f"found {path.suffix or 'none inside'}")
    for file in files:
        refuse_placeholder(file)
    return files


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


def read_and_left(folder, files, most=5):
    """What of a folder is read (`files`) and what is not, in words: half of the data under a name like
    b.jsonl.gz, or another split beside them, should be no surprise."""
    def words(names):
        more = f" and {len(names) - most} more" if len(names) > most else ""
        return ", ".join(names[:most]) + more

    read, left = [], []
    for file in visible_files(folder):
        names = read if file in files else left
        names.append(str(file.relative_to(folder)))
    return f"reads {words(read)}" + (f"; leaves {words(left)} alone" if left else "")


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
    """The rows of a batch of parquet; a ValueError in the place of each whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:                        # in some row: then one at a time
        rows = []
    for place in range(len(batch)):
        try:
            rows += batch.slice(place, 1).to_pylist()
        except UnicodeDecodeError as error:
            rows.append(ValueError(f"expected text in UTF-8: {error}"))
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
