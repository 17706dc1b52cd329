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
        # Sorted: file systems list in any order, and every rank must number the examples alike.
        files = sorted(file for file in path.rglob("*") if _is_data(file, path, suffixes))
    if not files or files[0].suffix not in suffixes:
        raise ValueError(f"{path}: expected {', '.join(suffixes)} or a folder of such files, "
                         f"found {path.suffix or 'none inside'}")
    for file in files:
        with file.open("rb") as content:
            if content.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(f"{file}: a Git-LFS pointer, not the data itself; `git lfs pull` fetches "
                                 "that")
    return files


def _is_data(file, folder, suffixes):
    """Is this one of the folder's files of data? Nothing hidden is, nor what lies in a hidden folder: other
    programs leave such things, as ._mine.jsonl (macOS), .ipynb_checkpoints/, .cache/ (downloads)."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix in suffixes and not hidden and not file.is_dir()


def read_parquet(file):
    """The rows of a parquet file. Raises ValueError, naming the file, where it cannot be read on."""
    # Only needed here: the paper's data set comes as parquet, one's own may not.
    import pyarrow
    import pyarrow.parquet as pq
    try:
        number = 0
        with pq.ParquetFile(file) as table:
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
                row = json.loads(line)
            # Bad JSON and bad UTF-8 are ValueErrors, too many nested brackets a RecursionError.
            except (ValueError, RecursionError) as error:
                row = ValueError(f"expected one JSON object on the line: {error}")
            yield number, row


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet}
