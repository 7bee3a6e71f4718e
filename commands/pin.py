"""make pin: ask the hub once which commit a model or data set has now, and write it into its conf file.

    python -m commands.pin [choice ...]      such as qwen3_0_6b; without one, every choice that is not pinned yet

Only the line `revision:` changes; comments stay. A branch or tag named there is resolved, null means the default one.
"""

import re
import sys
from pathlib import Path

import yaml

from stages.lib.errors import PipelineError
from stages.lib.sources import hub

KINDS = {"base_model": "model", "data": "dataset"}
LINE = re.compile(r"^(?P<key>revision:[ \t]*)(?P<value>[^\s#]+)(?P<rest>.*)$", re.MULTILINE)


def unpinned(conf: Path, names: list[str]) -> list[tuple[Path, str, str | None]]:
    """(conf file, id on the hub, branch or tag or None) of every hub choice whose revision is no commit.

    Raises: SystemExit, when a name is no choice.
    """
    files = [file for section in KINDS for file in sorted((conf / section).glob("*.yaml"))]
    if strangers := sorted(set(names) - {file.stem for file in files}):
        sys.exit(f"pin: no choice {strangers[0]!r}, expected one of {', '.join(file.stem for file in files)}")
    found = []
    for file in files:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if values["source"] != "hub" or not values["id"] or (names and file.stem not in names):
            continue
        if not re.fullmatch(r"[0-9a-f]{40}", str(values["revision"])):
            found.append((file, values["id"], values["revision"]))
    return found


def write(file: Path, commit: str) -> None:
    """Put the commit where `revision:` stands, and leave every other byte alone."""
    text, count = LINE.subn(rf"\g<key>{commit}\g<rest>", file.read_text(encoding="utf-8"), count=1)
    assert count == 1, f"{file}: no line `revision: <value>`"
    file.write_text(text, encoding="utf-8")


def main() -> int:
    failed = 0
    for file, id, reference in unpinned(Path("conf"), sys.argv[1:]):
        try:
            commit = hub.resolve(id, reference, kind=KINDS[file.parent.name])
        except PipelineError as fault:
            print(f"pin: {file}: {fault}", file=sys.stderr)
            failed += 1
            continue
        write(file, commit)
        print(f"{file}: {id}@{reference or 'default branch'} is {commit}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
