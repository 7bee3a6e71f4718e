"""Further arms are told apart by what their folders hold."""

from pathlib import Path

import pytest

from stages.lib import others
from stages.lib.errors import ConfigError, ModelError
from tests.evaluate_settings import settings


def test_another_model_is_taken_when_its_files_are_the_named_ones_and_refused_with_theirs_when_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = others.sha256(tmp_path)
    others.check({"earlier": {"path": str(tmp_path), "sha256": found}})
    with pytest.raises(ModelError, match=rf"evaluate\.others\.earlier\.sha256: found None.* have {found}"):
        others.check({"earlier": {"path": str(tmp_path), "sha256": None}})
    (tmp_path / "config.json").write_text("{ }")
    with pytest.raises(ModelError, match=r"earlier\.sha256: found"):
        others.check({"earlier": {"path": str(tmp_path), "sha256": found}})
    with pytest.raises(ModelError, match=r"none\.path: .*expected a folder with adapter_config\.json"):
        others.check({"none": {"path": str(tmp_path / "none"), "sha256": None}})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"others": {"base": {"path": "x", "sha256": None}}}, r"evaluate\.others: found \['base'\]"),
        ({"others": {"mine": {"path": "x"}}}, r"evaluate\.others: found \['mine'\].*sha256"),
        ({"max_rows": {"tunned": 3}}, r"evaluate\.max_rows: .*base, fewshot, tuned"),
        ({"max_rows": {"tuned": 0}}, r"evaluate\.max_rows: .*positive"),
        (
            {"general_text": {"tokens": 100}},
            r"general_text\.tokens: found 100, expected tokens of at least two windows",
        ),
    ],
)
def test_settings_that_cannot_be_meant_name_the_key(changes: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        settings(**changes)
