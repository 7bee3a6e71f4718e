"""make deps: write into dvc.yaml, for each stage, the project's modules that its script imports, directly or not.

DVC does not look into imports: a helper that is not listed could change and nothing would run again.
"""

import ast
import sys
from pathlib import Path

from ruamel.yaml import YAML

PIPELINE = Path("dvc.yaml")
CODE = "stages/"


def imported(module: Path) -> set[Path]:
    """Files of the project that a module imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == CODE.rstrip("/"):
            files |= {Path(*parts[:end]) / "__init__.py" for end in range(1, len(parts) + 1)}
            files.add(Path(*parts).with_suffix(".py"))
    return {file for file in files if file.exists()}


def closure(script: Path) -> set[Path]:
    """A script, the packages it lies in, and all that these import; files beside a module that it reads by name too.

    A module `page.py` with a template `page.html.jinja` beside it depends on the template: same stem, same folder.
    """
    found: set[Path] = set()
    waiting = {script, script.parent / "__init__.py"}
    while waiting:
        file = waiting.pop()
        found.add(file)
        if file.suffix == ".py":
            beside = {near for near in file.parent.glob(f"{file.stem}.*") if near.is_file()}
            waiting |= (imported(file) | beside) - found
    return found


def code_of(stage: str) -> list[str]:
    """The code a stage depends on, as sorted paths; empty package files are left out."""
    return sorted(path.as_posix() for path in closure(Path(CODE) / f"{stage}.py") if path.stat().st_size)


def main() -> int:
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 200, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    pipeline = yaml.load(PIPELINE)
    for name, stage in pipeline["stages"].items():
        others = [dep for dep in stage["deps"] if not str(dep).startswith(CODE)]
        stage["deps"].clear()
        stage["deps"].extend([*code_of(name), *others])
    yaml.dump(pipeline, PIPELINE)
    print(f"deps: {PIPELINE} lists what each stage imports")
    return 0


if __name__ == "__main__":
    sys.exit(main())
