"""The fidelity ladder as table, picture and page: functions of the stage's metrics."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from commands import ladder as command
from stages.lib import files, ladder_page, resident
from stages.lib.export import ladder

FIGURES = {"mib": 100.0, "bits_per_weight": 8.5, "perplexity_ratio": 1.25, "kl/mean": 0.01, "kl/p99": 0.1, "top1": 0.9}
SCORE = {"task/a<b/field_f1/delta": -0.25, "task/a<b/field_f1/low": -0.5, "task/a<b/field_f1/high": 0.0}
METRICS = {
    **{f"ladder/base/{key}": value for key, value in (FIGURES | SCORE).items()},
    **{f"ladder/tuned/{key}": value for key, value in FIGURES.items()},
    **{f"export/gguf_q8_0/{key}": value for key, value in (FIGURES | SCORE).items()},
    "export/gguf_q8_0/runtime/answers": 6,
    "export/skipped": 0,
}


def test_rungs_come_from_the_base_down_to_the_files_each_with_what_was_measured() -> None:
    found = ladder.rungs(METRICS)
    assert [rung.name for rung in found] == ["base", "tuned", "gguf_q8_0"]
    assert found[2].figures == FIGURES
    assert found[0].scores["a<b/field_f1"].low == -0.5
    assert found[1].scores == {}


def test_every_row_of_the_table_has_the_same_columns_and_no_speed() -> None:
    rows = ladder.table(ladder.rungs(METRICS))
    assert rows[2] | {"kl_mean": 0.01, "a<b/field_f1": -0.25, "a<b/field_f1/high": 0.0} == rows[2]
    assert rows[1]["a<b/field_f1"] == ""
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert not any("second" in column or "peak" in column for column in rows[0])


def test_the_picture_is_one_file_that_shows_every_rung_the_better_the_further_left() -> None:
    worse = METRICS | {"ladder/base/kl/mean": 1.0}
    drawn = ladder.picture(ladder.rungs(worse))
    picture = ElementTree.fromstring(drawn)  # a task's name may hold what is markup elsewhere
    texts = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert {"base", "base + adapter", "gguf_q8_0", "a<b"} <= set(texts)
    _, divergence, _ = ladder.panels(ladder.rungs(worse))
    base, tuned, _ = divergence.marks
    assert base is not None
    assert tuned is not None
    assert base.at > tuned.at
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("kl", [0.0, 1e-12, 50.0])
def test_no_mark_leaves_its_panel(kl: float) -> None:
    figures = FIGURES | {"kl/mean": kl, "kl/p99": 2 * kl}
    wild = METRICS | {f"ladder/base/{key}": value for key, value in figures.items()}
    marks = [mark for panel in ladder.panels(ladder.rungs(wild)) for mark in panel.marks if mark]
    assert all(0 <= value <= 1 for mark in marks for value in (mark.at, mark.low, mark.high))


def test_the_page_shows_this_machines_speeds_and_says_what_is_missing() -> None:
    measured = {"export/gguf_q8_0/tokens_per_second": 34.4, "evaluate/tuned/tokens_per_second": 141.0}
    page = ladder_page.render(METRICS, measured, name="toy", percent="95%")
    assert 'data-label="Tokens per s">34<' in page
    assert 'data-label="Tokens per s">141<' in page
    assert "No speed of base." in page
    assert "No memory of base, base + adapter, gguf_q8_0." in page
    assert "No speeds and memory: neither" in ladder_page.render(METRICS, {}, name="toy", percent="95%")


def test_make_ladder_says_when_nothing_was_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main() == 2
    assert "not found, expected the figures of an export" in capsys.readouterr().err


def test_make_ladder_draws_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"evaluate": {"confidence": 0.9}, "base_model": {"id": "maker/toy"}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("DVC_EXP_NAME", "mine")
    monkeypatch.setattr(command.config, "values", lambda: params)
    files.write_json(Path("metrics/quantize_export.json"), METRICS)
    files.write_json(Path("runs/mine/quantize_export.json"), {"export/gguf_q8_0/peak_mib": 321.0})
    assert command.main() == 0
    page = Path("runs/ladder.html").read_text()
    assert "trained toy" in page
    assert "90%" in page
    assert 'data-label="Peak MiB">321<' in page


def test_the_peak_of_memory_is_that_of_the_work_alone() -> None:
    size, peak = resident.peak_mib(lambda: len(bytearray(b"x" * 2**26)))
    assert size == 2**26
    assert peak is not None
    assert 60 < peak < 200
    assert (resident.peak_mib(lambda: None)[1] or 0) < 30
