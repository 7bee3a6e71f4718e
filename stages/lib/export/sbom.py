"""models/export/sbom.cdx.json: what the export was made from, as a CycloneDX 1.6 bill of materials.

The model, its base, its adapter and its data as components, and the packages of the project with all they need. Without
time and serial number, and sorted: equal inputs in equal environments give equal bytes.
"""

import importlib.util
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from stages.lib import files
from stages.lib.errors import ConfigError
from stages.lib.export import manifest

NAME = "sbom.cdx.json"
LIBRARY = "cyclonedx-python-lib"


def check() -> None:
    """Raises: ConfigError, when the library that writes it is not installed."""
    if importlib.util.find_spec("cyclonedx") is None:
        raise ConfigError(
            f"export.sbom: found true, but {LIBRARY} is not installed. Type .venv/bin/uv pip install -c "
            f"requirements.lock {LIBRARY}, or set export.sbom=false."
        )


def write(
    folder: Path, *, name: str, base: Mapping[str, Any], adapter: Path, splits: Path, formats: Iterable[str]
) -> None:
    """Write the bill of materials into the folder of an export.

    Args: name: of the model. base: models/base/source.json. formats: that were written.
    Raises: ConfigError, as `check` does.
    """
    check()
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.dependency import Dependency
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    licences = LicenseFactory()

    def material(kind: ComponentType, name: str, digests: Mapping[str, str], **facts: Any) -> Component:
        """A component of files. Args: digests: their sha256."""
        reference = f"{kind.value}:{name}"
        held = [
            Component(
                type=ComponentType.FILE,
                name=file,
                bom_ref=f"{reference}/{file}",
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
            )
            for file, digest in digests.items()
        ]
        return Component(type=kind, name=name, bom_ref=reference, components=held, **facts)

    def package(name: str, version: str, licence: str = "") -> Component:
        return Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=version,
            bom_ref=f"library:{name}",
            purl=PackageURL("pypi", None, name, version),
            licenses=[licences.make_from_string(licence)] if licence else [],
        )

    model = Component(type=ComponentType.MACHINE_LEARNING_MODEL, name=name, bom_ref="model")
    origin = {"version": base["revision"], "licenses": [licences.make_from_string(base["license"])]}
    inputs = [
        material(ComponentType.MACHINE_LEARNING_MODEL, base["id"], base["files"], **origin),
        material(ComponentType.MACHINE_LEARNING_MODEL, f"{name}-adapter", manifest.digests(adapter)),
        material(
            ComponentType.DATA, splits.as_posix(), manifest.digests(splits), version=f"md5:{manifest.dvc_md5(splits)}"
        ),
    ]
    found = needed(direct())
    apart = {name: version for name, version in manifest.versions(formats).items() if name not in found}
    packages = {name: package(name, one.version, _licence(one)) for name, one in found.items()}
    packages |= {name: package(name, version) for name, version in apart.items()}

    def uses(one: Component, needs: Iterable[Component]) -> Dependency:
        return Dependency(one.bom_ref, [Dependency(need.bom_ref) for need in needs])

    graph = [uses(model, [*inputs, *packages.values()])]
    for name, one in found.items():
        graph.append(uses(packages[name], [packages[need] for need in requires(one, ()) if need in found]))
    bill = Bom(components=[*inputs, *packages.values()], metadata=BomMetaData(component=model), dependencies=graph)
    written = json.loads(JsonV1Dot6(bill).output_as_string())
    del written["serialNumber"], written["metadata"]["timestamp"]
    files.write_json(folder / NAME, written)


def direct() -> list[Requirement]:
    """What the project itself needs, as pyproject.toml says; not what only its tests and extras do."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def needed(wanted: Iterable[Requirement]) -> dict[str, metadata.Distribution]:
    """The installed packages that satisfy requirements, with all they need in turn, by normalized name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [(normalized(one.name), frozenset(one.extras)) for one in wanted]
    seen = set()
    while waiting:
        seen.add(asked := waiting.pop())
        name, extras = asked
        for distribution in metadata.distributions(name=name):
            found[name] = distribution
            waiting += [need for need in requires(distribution, extras).items() if need not in seen]
            break
    return dict(sorted(found.items()))


def requires(distribution: metadata.Distribution, extras: Iterable[str]) -> dict[str, frozenset[str]]:
    """What a package needs on this machine: normalized names, with the extras asked of them."""
    environments = [{"extra": extra} for extra in ("", *extras)]
    needs: dict[str, frozenset[str]] = {}
    for one in map(Requirement, distribution.requires or []):
        if one.marker is None or any(one.marker.evaluate(environment) for environment in environments):
            name = normalized(one.name)
            needs[name] = needs.get(name, frozenset()) | one.extras
    return needs


def normalized(name: str) -> str:
    """PEP 503: `Ruamel.YAML` and `ruamel-yaml` are one package."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _licence(distribution: metadata.Distribution) -> str:
    """What a package says of its licence in a word; a whole text in that place says nothing a list can show."""
    said = distribution.metadata
    text = next((said[key] for key in ("License-Expression", "License") if key in said), "")
    return text if len(text) < 80 and "\n" not in text else ""
