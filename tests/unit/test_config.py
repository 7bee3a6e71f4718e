"""Loading params.yaml: types, unknown keys, missing values and ranges are refused by name."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from commands.params import FAULTS, composed
from stages.lib import config
from stages.lib.errors import ConfigError
from stages.lib.schema.lora import Lora
from tests.conftest import ROOT


@dataclass
class Params:
    seed: int
    lora: Lora


GOOD = "seed: 0\nlora: {r: 8, alpha: 8, dropout: 0.0, target_modules: [q_proj, v_proj]}\ntrain: {epochs: 1}\n"


def load(folder: Path, text: str, *overrides: str) -> Params:
    path = folder / "params.yaml"
    path.write_text(text)
    return config.load(Params, overrides, path)


def test_a_stage_gets_its_sections_and_no_others(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    assert found == Params(0, Lora(8, 8.0, 0.0, ["q_proj", "v_proj"]))


def test_a_command_line_override_wins_over_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD, "lora.r=4", "seed=7") == Params(7, Lora(4, 8.0, 0.0, ["q_proj", "v_proj"]))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (GOOD, ["lora.r=abc"], "lora.r"),
        (GOOD, ["+lora.rank=4"], "rank"),
        (GOOD.replace("r: 8", "r: '???'"), [], "r"),
        (GOOD.replace("r: 8, ", ""), [], "lora.r"),
        (GOOD.replace("r: 8", "r: 0"), [], "lora.r: found 0, expected a positive rank"),
        (GOOD.replace("[q_proj, v_proj]", "'[q_proj,v_proj]'"), [], "lora.target_modules: found"),
        (GOOD.replace("alpha: 8", "alpha: 2e-4x"), [], "alpha"),
    ],
)
def test_a_bad_value_is_refused_by_name(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text, *overrides)


def test_a_missing_file_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make params"):
        config.load(Params, [], tmp_path / "params.yaml")


def test_all_faults_of_a_section_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.r: .*\n.*lora\.dropout: "):
        load(tmp_path, GOOD.replace("r: 8", "r: -1").replace("dropout: 0.0", "dropout: 2.0"))


def test_appended_keys_that_no_section_has_are_refused_together_while_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    top = r"foo: found 1, expected no such key; there are base_model, checked, data, .*"
    inside = r"lora\.new: found 2, expected no such key; there are alpha, alpha_mode, dropout, .*"
    with pytest.raises(FAULTS, match=f"{top}\n{inside}"):
        composed(["+foo=1", "+lora.new=2"])


def test_keys_that_a_table_leaves_to_the_user_may_be_appended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert composed(["+data.columns.prompt=question"])["data"]["columns"] == {"prompt": "question"}
