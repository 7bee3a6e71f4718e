"""Files: equal bytes for equal content, nothing half-written left in place."""

import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from stages.lib import files, records


def rows(n: int) -> list[dict[str, object]]:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    return [records.make(turns, group=str(i), source="s", task="t") for i in range(n)]


def test_rows_survive_and_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        records.write(tmp_path / name, rows(3))
    assert records.read(tmp_path / "a.parquet") == rows(3)
    assert files.sha256(tmp_path / "a.parquet") == files.sha256(tmp_path / "b.parquet")


def test_a_fault_while_writing_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()

    def write_half() -> None:
        with files.replacing(target) as new:
            new.mkdir()
            (new / "half").touch()
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["old"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda path, text: files.write_rows(path, [{"text": text}], pa.schema([("text", pa.string())])),
        lambda path, text: files.write_json(path, {"text": text}),
        lambda path, text: files.write_jsonl(path, [{"text": text}]),
        lambda path, text: files.write_csv(path, [{"text": text}]),
    ],
    ids=["rows", "json", "jsonl", "csv"],
)
def test_a_file_that_does_not_fit_on_the_disk_leaves_the_old_one_and_no_other(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    path = tmp_path / "out"
    write(path, "old")
    before = path.read_bytes()
    with files_of_at_most(100_000), pytest.raises(OSError, match="too large"):
        write(path, random.Random(0).randbytes(300_000).hex())  # cannot be compressed to fit
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name in ("old", "new"):
        with files.replacing(target) as folder:
            folder.mkdir()
            (folder / name).touch()
    assert [path.name for path in target.iterdir()] == ["new"]


def test_numbers_no_reader_agrees_on_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})


def test_the_id_depends_on_content_alone() -> None:
    turns = [{"content": "hi", "role": "user"}, {"role": "assistant", "content": "ho"}]
    same = records.make(turns, group="other", source="elsewhere", task="t", meta={"line": 7})
    assert same["id"] == rows(1)[0]["id"]
    assert records.make(turns[:1], group="0", source="s", task="t")["id"] != same["id"]
