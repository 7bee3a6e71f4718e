"""The commands beside the pipeline: what is out of date, what differs, what a module imports."""

from pathlib import Path

import pytest

from commands.deps import closure
from commands.differences import differences
from commands.sync import up_to_date

PIPELINE = {"stages": {"split": {}, "train": {}, "merge": {}}}


def lock(r: int, *, packed: str = "a1", adapter: str = "b1") -> dict[str, object]:
    recorded = {"params.yaml": {"lora": {"r": r}}}
    return {
        "stages": {
            "split": {"outs": [{"path": "data/splits", "md5": "a1"}]},
            "train": {
                "params": recorded,
                "deps": [{"path": "data/splits", "md5": packed}],
                "outs": [{"path": "models/adapter", "md5": "b1"}],
            },
            "merge": {"deps": [{"path": "models/adapter", "md5": adapter}], "outs": []},
        }
    }


def test_a_stage_counts_as_current_when_params_and_inputs_are_those_of_the_lock() -> None:
    assert up_to_date(PIPELINE, lock(8), {"lora": {"r": 8}}) == ["split", "train", "merge"]


def test_numbers_of_an_earlier_experiment_are_not_current() -> None:
    assert up_to_date(PIPELINE, lock(8), {"lora": {"r": 16}}) == ["split"]
    assert up_to_date(PIPELINE, lock(8, adapter="old"), {"lora": {"r": 8}}) == ["split", "train"]
    assert up_to_date(PIPELINE, lock(8, packed="old"), {"lora": {"r": 8}}) == ["split"]


def test_differences_name_key_and_both_values() -> None:
    assert differences({"lora": {"r": 4}, "seed": 1}, {"lora": {"r": 16}, "seed": 1}) == [
        "lora.r: 4 in params.yaml, 16 in conf/"
    ]


def test_imports_are_followed_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stages/lib").mkdir(parents=True)
    for name, text in {
        "stages/__init__.py": "from stages.lib import environment\n",
        "stages/lib/__init__.py": "",
        "stages/lib/environment.py": "",
        "stages/lib/page.py": "import json\n",
        "stages/lib/page.html.jinja": "<html>",
        "stages/lib/other.py": "",
        "stages/train.py": "def main():\n    from stages.lib import page\n",
    }.items():
        (tmp_path / name).write_text(text)
    names = {path.as_posix() for path in closure(Path("stages/train.py"))}
    assert names >= {"stages/lib/page.py", "stages/lib/page.html.jinja", "stages/lib/environment.py", "stages/train.py"}
    assert "stages/lib/other.py" not in names
