"""make estimate: what it takes the data to be, which stages it says would run, and the page of estimates."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import estimate as command
from commands.params import composed
from stages.lib import config, cost, files
from stages.lib.errors import ConfigError
from stages.lib.experiments import devices, estimate_page, foreseeing, outdated, shapes
from tests.conftest import ROOT

PACKED = {
    "train/packs": 10, "train/tokens/in": 4000, "train/tokens/trained": 1000, "train/rows/packed": 40,
    "validation/packs": 1, "validation/tokens/in": 400, "validation/tokens/trained": 100,
}  # fmt: skip
SPLIT = {
    "rows/in": 1000, "rows/train/a": 40, "split/share/train": 0.8,
    "duplicates/exact": 100, "duplicates/near": 0, "duplicates/semantic": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return config.values(path=ROOT / "params.yaml")


@pytest.fixture
def recorded(params: dict[str, Any], in_tmp: Path) -> None:
    """What a run of the default parameters leaves that an estimate reads."""
    (in_tmp / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    stages = {
        name: {"params": {"params.yaml": {section: params[section] for section in sections}}}
        for name, sections in (("base_model", ("base_model", "prompt")), ("prepare", ("data",)),
                               ("dedup_split", ("dedup", "split")), ("tokenize_pack", ("pack",)))
    }  # fmt: skip
    (in_tmp / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    for stage, metrics in (("prepare", {"rows/out/a": 1000}), ("dedup_split", SPLIT), ("tokenize_pack", PACKED)):
        files.write_json(in_tmp / f"metrics/{stage}.json", metrics)


@pytest.mark.usefixtures("recorded")
def test_tokens_of_the_same_data_are_those_that_were_packed(params: dict[str, Any]) -> None:
    found = foreseeing.data_of(params | {"lora": None, "seed": 1})
    assert found.train == cost.Tokens(10, 4000, 1000)
    assert found.known_by == "as packed"


@pytest.mark.usefixtures("recorded")
def test_tokens_of_other_data_are_assumed_and_it_says_how(params: dict[str, Any]) -> None:
    other = params | {"split": params["split"] | {"max_rows": {"train": {"a": 200}}}}
    found = foreseeing.data_of(other)
    assert (found.train.tokens, found.train.labelled) == (200 * 100, 200 * 25)
    assert found.known_by.startswith("split is not what was packed last; taken to be 200 rows of 100 tokens, 25%")
    assert foreseeing.data_of(params, rows=1000, tokens=50).train.tokens == 50_000


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"pack": {"max_tokens": 64}}, 40),  # rows are what they were; the default caps are of other tasks
        ({"dedup": {}}, 720),  # 1000 valid ones, 10% of them duplicates, 80% of these in train
        ({"split": {"max_rows": {"train": {"b": 200}}}}, 720),
        ({"split": {"max_rows": {"train": {"a": 200, "b": 200}}}}, 200),
        ({"split": {"max_rows": {"train": {"a": 9000}}}}, 720),
        ({"data": {"fraction": 0.5}, "split": {"max_rows": {}}}, 360),
        ({"data": {"fraction": 1.0}, "split": {"max_rows": {"train": {"a": 100, "b": 200}}}}, 300),
    ],
    ids=str,
)
def test_rows_of_other_data_are_those_that_the_last_run_had_by_task_as_far_as_the_caps_let_them(
    params: dict[str, Any], changes: dict[str, Any], rows: int
) -> None:
    assert f"taken to be {rows} rows" in foreseeing.data_of(params | changes).known_by


def test_without_any_packed_data_it_says_what_to_type(params: dict[str, Any], in_tmp: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenize_pack.json: not found.*dvc repro tokenize_pack"):
        foreseeing.data_of(params)


def test_a_base_of_unknown_shape_and_an_unknown_card_are_refused_with_what_there_is(in_tmp: Path) -> None:
    with pytest.raises(ConfigError, match=r"base_model.id: found nobody/nothing.*Qwen/Qwen3-8B"):
        shapes.of("nobody/nothing")
    with pytest.raises(ConfigError, match=r"device: found abacus, expected here or one of t4"):
        devices.named("abacus")


def test_a_base_that_is_not_pinned_can_be_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert command.configured(["experiment=gpu_24gb"])["base_model"]["id"] == "meta-llama/Llama-3.1-8B-Instruct"
    with pytest.raises(ConfigError, match=r"lora\.r"):
        command.configured(["lora.r=0"])


@pytest.fixture(scope="module")
def eight_billion() -> foreseeing.Params:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        values = composed(["experiment=gpu_24gb", command.UNPINNED])
    kinds = foreseeing.Params.__annotations__
    return foreseeing.Params(**{name: command.typed(kind, values[name]) for name, kind in kinds.items()})


def test_8_billion_parameters_fit_a_card_of_24_gb_and_not_one_of_8(eight_billion: foreseeing.Params) -> None:
    data = foreseeing.Data(cost.Tokens(100, 200_000, 50_000), cost.Tokens(1, 2000, 500), "")
    model = shapes.by_name(eight_billion.base_model.id)

    def verdict(name: str) -> str:
        card = devices.named(name)
        return foreseeing.foresee(model, eight_billion, data, card).verdict(card)

    assert [verdict(name) for name in ("rtx_4090", "rtx_4060")] == ["fits", "does not fit"]
    found = foreseeing.foresee(model, eight_billion, data, devices.named("rtx_4090"))
    assert (found.trainable, found.parameters, found.plan.steps) == (41_943_040, 8_030_261_248, 7)
    shown = estimate_page.text(eight_billion, found, data, devices.named("rtx_4090"), price=36.0)
    assert f"cost        {found.seconds.expected / 100:.2f}" in shown


def test_a_card_without_bfloat16_computes_in_float32(eight_billion: foreseeing.Params) -> None:
    types = [devices.resolve(eight_billion.numerics, devices.named(name)).compute_dtype for name in ("t4", "l4")]
    assert types == ["float32", "bfloat16"]


PIPELINE = {"stages": {"a": {"outs": ["A"]}, "b": {"deps": ["A"], "outs": ["B"]}, "c": {"deps": ["code"]}}}
LOCK = {
    "stages": {
        "a": {"params": {"params.yaml": {"x": 1}}, "outs": [{"path": "A", "md5": "1"}]},
        "b": {"deps": [{"path": "A", "md5": "1"}], "outs": [{"path": "B", "md5": "2"}]},
        "c": {},
    }
}


def test_it_names_the_stages_that_would_run_and_why() -> None:
    assert outdated.reasons(PIPELINE, LOCK, {"x": 1}, {}) == {}
    assert outdated.reasons(PIPELINE, LOCK, {"x": 2}, {}) == {"a": "other x", "b": "after a"}
    assert outdated.reasons(PIPELINE, LOCK, {"x": 1}, {"c": ["code modified"]}) == {"c": "code modified"}
    assert outdated.reasons(PIPELINE, {"stages": {}}, {"x": 1}, {})["c"] == "it never ran"


def test_what_dvc_says_of_code_and_data_is_put_short() -> None:
    entries = [
        {"changed deps": {"stages/a.py": "modified", "stages/b.py": "modified", "data/x": "deleted"}},
        {"changed deps": {"params.yaml": {"lora": "modified"}}},
        "changed command",
    ]
    assert outdated._phrases(entries) == ["2 files of code changed", "data/x deleted", "changed command"]


def test_errors_of_earlier_runs_are_summed_up(params: dict[str, Any], tmp_path: Path) -> None:
    for name, error in (("a", 0.1), ("b", -0.05), ("c", 0.02)):
        files.write_json(tmp_path / name / "qlora_train.json", {"estimate/memory_error": error})
    files.write_json(tmp_path / "d" / "qlora_train.json", {"wall_s": 1})
    assert estimate_page.record(tmp_path, params) == "error       memory +2% (median; -5% to +10% in 3 runs here)"


def test_the_page_of_estimates_is_what_the_code_says() -> None:
    assert (ROOT / "docs/estimates.md").read_text() == estimate_page.table(), (
        "`python -m commands.estimate --table > docs/estimates.md` writes it again"
    )


def test_published_memory_of_qlora_on_an_a100_is_met_within_a_fifth_and_time_within_the_range() -> None:
    for line in estimate_page.against(devices.named("a100_80gb")):
        published, estimated, took, expected = line[2:]
        assert float(estimated.split(" ")[0]) == pytest.approx(float(published), rel=0.21), line
        low, high = expected.split("(")[1].rstrip(")").split(" to ")
        assert float(low) - 0.1 <= float(took) <= float(high) + 0.1, line
