"""make ui: MLflow's pages, for this machine only: whoever reaches the port sees everything, so never publish it.

Each sweep gets a view of its own: a table with the columns that vary, and charts that begin with the validation loss.
"""

import os
import sys

from commands import sync
from stages.lib import config, tracking
from stages.lib.experiments import views


def main() -> int:
    uri = tracking.address(config.values()["runtime"]["tracking_uri"])
    experiment_id = tracking.connect(uri)
    port = os.environ.get("PORT", "5000")
    page = f"http://127.0.0.1:{port}/#/experiments/{experiment_id}/runs"
    print(f"MLflow on {page}, store {uri}; end with Ctrl-C", flush=True)
    for sweep_id, key in sweeps(experiment_id).items():
        view = f"{page}?viewStateShareKey={key}"
        print(f"  sweep {sweep_id}: table {view}\n    charts {view}&compareRunsMode=CHART", flush=True)
    server = ["mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    os.execvp(server[0], server)


def sweeps(experiment_id: str) -> dict[str, str]:
    """Sweep -> key of its view, made anew for the runs it has now."""
    grouped: dict[str, list[object]] = {}
    for run in sync.rows(experiment_id).values():
        if sweep_id := run.data.tags.get("sweep_id"):
            grouped.setdefault(sweep_id, []).append(run)
    return {sweep_id: views.share(experiment_id, sweep_id, runs) for sweep_id, runs in sorted(grouped.items())}


if __name__ == "__main__":
    sys.exit(main())
