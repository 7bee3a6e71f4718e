"""The pipeline's contract with itself: dvc.yaml, the stages' parameters, their imports, conf/ and params.yaml."""

import dataclasses
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from commands.deps import code_of
from commands.differences import differences
from commands.params import composed

ROOT = Path(__file__).resolve().parents[2]
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
CONF = ROOT / "conf"
GROUPS = sorted(
    folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name not in ("experiment", "shared")
)


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", STAGES)
def test_stage_reads_exactly_the_params_it_declares(name: str) -> None:
    reads = {field.name for field in dataclasses.fields(import_module(f"stages.{name}").Params)}
    assert reads == set(STAGES[name]["params"])


@pytest.mark.parametrize("name", STAGES)
def test_stage_depends_on_the_lock_and_on_every_module_it_imports(name: str) -> None:
    deps = STAGES[name]["deps"]
    assert [dep for dep in deps if dep.startswith("stages/")] == code_of(name), "type `make deps`"
    assert "requirements.lock" in deps


@pytest.mark.parametrize("name", STAGES)
def test_stage_script_command_and_metrics_share_one_name(name: str) -> None:
    assert STAGES[name]["cmd"] == f"python -m stages.{name}"
    assert list(STAGES[name]["metrics"][0]) == [f"metrics/{name}.json"]
    assert STAGES[name]["desc"]


def test_runtime_and_sweep_sections_are_tracked_by_no_stage() -> None:
    assert not {"runtime", "sweep"} & {param for stage in STAGES.values() for param in stage["params"]}


def test_committed_params_are_the_composed_defaults() -> None:
    shown = subprocess.run(["git", "show", "HEAD:params.yaml"], capture_output=True, text=True, check=True).stdout
    assert differences(yaml.safe_load(shown), composed()) == [], "type `make params` and commit params.yaml"


@pytest.mark.parametrize(
    "choice", [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
)
def test_every_choice_composes_or_says_what_it_still_needs(choice: str) -> None:
    group, name = choice.split("=")
    values = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    needs_a_commit = values.get("source") == "hub" and values["revision"] is None
    needs_another = choice in ("data=local", "data=url", "lora=full", "lora=last_layers")
    needs_another |= choice == "data=banking77" and not (ROOT / values["path"]).exists()
    if needs_a_commit or needs_another:
        says = r"make pin|data\.(path|url): found|numerics\.quantization: found nf4"
        with pytest.raises((HydraException, OmegaConfBaseException), match=says):
            composed([choice])
    else:
        assert composed([choice])["checked"]


def test_no_tracked_configuration_reads_the_environment() -> None:
    assert not [path for path in CONF.rglob("*.yaml") if "oc.env" in path.read_text() or "hydra:" in path.read_text()]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r=abc", "lora.r"),
        ("lora.rank=4", "lora.rank"),
        ("lora.r=-3", "lora.r: found -3, expected a positive rank"),
        ("train.learning_rate=fast", "train.learning_rate"),
        ("train.scheduler=exponential", "train.scheduler"),
        ('lora.target_modules="[q_proj,v_proj]"', "without quotes around it"),
        ("split.test_fraction=0.95", "the rest is train"),
    ],
)
def test_a_config_fault_stops_at_composition_and_names_the_key(override: str, message: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        composed([override])
    chain = [str(caught.value), str(caught.value.__cause__), str(caught.value.__context__)]
    assert message in " ".join(chain)
