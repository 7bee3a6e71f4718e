"""make ui: MLflow's pages, for this machine only: whoever reaches the port sees everything, so never publish it."""

import os
import sys

from stages.lib import config, tracking


def main() -> int:
    uri = tracking.address(config.values()["runtime"]["tracking_uri"])
    experiment_id = tracking.connect(uri)
    port = os.environ.get("PORT", "5000")
    page = f"http://127.0.0.1:{port}/#/experiments/{experiment_id}/runs"
    print(f"MLflow on {page}, store {uri}; end with Ctrl-C", flush=True)
    server = ["mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    os.execvp(server[0], server)


if __name__ == "__main__":
    sys.exit(main())
