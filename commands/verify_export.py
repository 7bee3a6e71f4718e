"""make verify-export: hold an exported folder to its manifest.json: every file by sha256, nothing more, no code.

    python -m commands.verify_export [folder]      models/export where none is named

Exit 0: the folder is what the manifest says; 1: it is not, each fault on a line; 2: there is no manifest to hold it to.
"""

import sys
from pathlib import Path

from stages.lib.errors import DataError
from stages.lib.export import manifest

EXPORT = Path("models/export")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) > 1:
        print(f"verify-export: found {len(given)} arguments, expected one folder", file=sys.stderr)
        return 2
    folder = Path(given[0]) if given else EXPORT
    try:
        wrong = manifest.faults(folder)
        count = len(manifest.read(folder)["files"])
    except DataError as fault:
        print(f"verify-export: {fault}", file=sys.stderr)
        return 2
    for line in wrong:
        print(f"{folder}/{line}")
    print(f"{folder}: {len(wrong)} faults" if wrong else f"{folder}: {count} files, each as {manifest.NAME} says")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
