"""make ladder: draw the fidelity ladder of the last export as a page, with this machine's speeds: runs/ladder.html.

Reads metrics/quantize_export.json; speeds and memory from runs/<experiment>, where evaluate and quantize_export ran
here. Exit 0: drawn; 2: nothing was exported yet.
"""

import sys
from pathlib import Path

from stages.lib import config, environment, files, ladder_page, tracking

METRICS = Path("metrics/quantize_export.json")


def main() -> int:
    if not METRICS.is_file():
        print(f"ladder: {METRICS}: not found, expected the figures of an export. Run `dvc repro`.", file=sys.stderr)
        return 2
    params = config.values()
    runs = environment.root() / "runs"
    measured: dict[str, float] = {}
    for stage in ("evaluate", "quantize_export"):
        path = runs / tracking.key(params) / f"{stage}.json"
        measured |= files.read_json(path) if path.is_file() else {}
    metrics = files.read_json(METRICS)
    if "export/skipped" not in metrics:
        print(f"ladder: {METRICS}: holds no ladder. Run `dvc repro quantize_export`.", file=sys.stderr)
        return 2
    percent = f"{100 * params['evaluate']['confidence']:g}%"
    name = params["base_model"]["id"].split("/")[-1]
    page = runs / "ladder.html"
    page.parent.mkdir(exist_ok=True)
    page.write_text(ladder_page.render(metrics, measured, name=name, percent=percent), encoding="utf-8")
    print(f"ladder: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
