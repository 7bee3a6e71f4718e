"""Resume points: whole or not there, the last whole one is found, a run has its own, nothing is left after success."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.lib import checkpoints, files
from stages.lib.checkpoints import Checkpoints


def holding(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in ("adapter", "optimizer", "state"):
            (folder / name).write_text(f"{name} {text}")

    return write


@pytest.fixture
def points(tmp_path: Path) -> Checkpoints:
    found = Checkpoints(tmp_path)
    for step in (9, 10):
        found.save(step, holding(str(step)))
    return found


def test_the_newest_two_are_kept(points: Checkpoints) -> None:
    points.save(100, holding("100"))
    assert sorted(path.name for path in points.folder.iterdir()) == ["step-00000010", "step-00000100"]
    assert points.newest() == points.folder / "step-00000100"


@pytest.mark.parametrize("name", ["adapter", "optimizer", "state"])
@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_a_point_with_a_file_cut_changed_or_gone_is_skipped_by_name(
    points: Checkpoints, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = points.folder / "step-00000010" / name
    if harm == "gone":
        path.unlink()
    else:
        text = path.read_text()
        path.write_text(text[:-1] if harm == "cut" else text.upper())
    assert points.newest() == points.folder / "step-00000009"
    assert f"step-00000010: skipped, {name} " in caplog.text


@pytest.mark.parametrize("mark", [None, "", '{"adapter": '])
def test_a_point_without_a_readable_mark_is_skipped(points: Checkpoints, mark: str | None) -> None:
    path = points.folder / "step-00000010" / checkpoints.MARK
    path.unlink()
    if mark is not None:
        path.write_text(mark)
    assert points.newest() == points.folder / "step-00000009"


def test_a_kill_while_writing_leaves_the_point_before(points: Checkpoints) -> None:
    def killed(folder: Path) -> None:
        holding("11")(folder)
        raise KeyboardInterrupt("killed")

    with pytest.raises(KeyboardInterrupt, match="killed"):
        points.save(11, killed)
    assert points.newest() == points.folder / "step-00000010"
    points.save(11, holding("11"))
    assert points.newest() == points.folder / "step-00000011"


def test_a_full_disk_costs_a_point_and_a_warning(points: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    def full(folder: Path) -> None:
        (folder / "adapter").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    points.save(11, full)
    assert "step-00000011: not saved (OSError: [Errno 28] No space left on device)" in caplog.text
    assert sorted(path.name for path in points.folder.iterdir()) == ["step-00000009", "step-00000010"]


def test_runs_of_one_key_do_not_see_each_other_and_leave_nothing(in_tmp: Path) -> None:
    with checkpoints.claimed("key") as one, checkpoints.claimed("key") as other:
        assert one.folder != other.folder
        one.save(1, holding("one"))
        assert other.newest() is None
        one.remove()
    assert not list(checkpoints.folder().iterdir())


def test_the_farthest_point_that_a_dead_run_left_is_taken(in_tmp: Path) -> None:
    with checkpoints.claimed("key") as one, checkpoints.claimed("key") as other:
        one.save(1, holding("one"))
        other.save(2, holding("other"))
    with checkpoints.claimed("key") as third:
        assert (third.newest() or Path()).name == "step-00000002"
    with checkpoints.claimed("another key") as fourth:
        assert fourth.newest() is None


def test_points_of_runs_that_are_gone_are_swept_and_those_in_use_stay(in_tmp: Path) -> None:
    for key in ("dead", "alive"):
        with checkpoints.claimed(key) as run:
            run.save(1, holding(key))
    with checkpoints.claimed("alive") as run:
        checkpoints.sweep()
        assert run.newest()
    assert [path.name for path in checkpoints.folder().iterdir()] == ["alive"]


def test_the_key_follows_parameters_data_and_code(in_tmp: Path) -> None:
    def key(seed: int) -> str:
        return checkpoints.key("qlora_train", {"seed": seed})

    Path("data/packed/train").mkdir(parents=True)
    Path("stages").mkdir()
    found = {key(1), key(2)}
    for path in ("data/packed/train/packs.parquet", "requirements.lock", "stages/qlora_train.py"):
        Path(path).write_text("content")
        found.add(key(1))
    assert len(found) == 5
    assert key(1) in found
    files.write_json(Path("metrics.json"), {})  # nothing that the stage reads
    assert key(1) in found
