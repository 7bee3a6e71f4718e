"""Files: equal bytes for equal content, nothing half-written left in place."""

from pathlib import Path

import pytest

from stages.lib import files, records


def rows(n: int) -> list[dict[str, object]]:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    return [records.make(turns, group=str(i), source="s", task="t") for i in range(n)]


def test_rows_survive_and_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        files.write_rows(tmp_path / name, rows(3), records.RECORD)
    assert files.read_rows(tmp_path / "a.parquet") == rows(3)
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
