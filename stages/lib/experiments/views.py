"""How MLflow shows a sweep: its runs table and its charts, as views that a link opens.

MLflow's page keeps a shared view as a tag of the experiment, and opens it by the tag's key in the address:
tag mlflow.sharedViewState.<key> = state  ->  #/experiments/<id>/runs?viewStateShareKey=<key>
Source: useSharedExperimentViewState and RunsChartsConfigureFields of MLflow 3.17's pages.
"""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

QUALITY = "val/loss/tuned"
"""By which the table is sorted and the charts are coloured: what every training has, whatever the task."""

SHOWN = (QUALITY, "adapter/trainable_parameters")  # with more, the parameters leave a screen of 1600 pixels
MAX_PARAMETERS = 6
MAX_MEASURES = 3
"""Of the test set's: more columns than that no screen shows."""

SHARED = "mlflow.sharedViewState."


def varied(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The parameters that are not the same in all runs that have them, by how few values they take: choices first."""
    names = {name for row in rows for name in row if name.partition(".")[0] not in ("runtime", "sweep")}
    values = {name: {row[name] for row in rows if name in row} for name in sorted(names)}
    return sorted((name for name in values if len(values[name]) > 1), key=lambda name: (len(values[name]), name))


def numeric(names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Those of some parameters whose values are all numbers: a contour has no place for words."""
    return [name for name in names if all(_is_number(row[name]) for row in rows if name in row)]


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def of_sweep(sweep_id: str, rows: Sequence[Mapping[str, str]], measures: Sequence[str]) -> dict[str, Any]:
    """The state of MLflow's runs page for a sweep.

    Args: rows: the parameters of each run. measures: names of the metrics the runs have.
    """
    changing = varied(rows)[:MAX_PARAMETERS]
    tests = [name for name in measures if name.startswith("test/") and name.endswith("/tuned")][:MAX_MEASURES]
    shown = [name for name in SHOWN if name in measures] + tests
    quality = QUALITY if QUALITY in measures else "val/loss"
    columns = [_column("params", name) for name in changing] + [_column("metrics", name) for name in shown]
    axes = _contour_axes(numeric(changing, rows))
    charts: list[dict[str, Any]] = [
        {"type": "LINE", "metricKey": "val/loss", "selectedMetricKeys": ["val/loss"], "runsCountToCompare": 100},
        {"type": "PARALLEL", "selectedParams": changing, "selectedMetrics": [quality], "showAllRuns": True},
    ]
    if axes:
        ends = {axis: {"key": name, "type": "PARAM"} for axis, name in zip(("xaxis", "yaxis"), axes, strict=True)}
        charts.append({"type": "CONTOUR", **ends, "zaxis": {"key": quality, "type": "METRIC"}})
    charts += [{"type": "BAR", "metricKey": name, "runsCountToCompare": 100} for name in (quality, *tests)]
    section = {"uuid": "sweep", "name": f"sweep {sweep_id}", "display": True, "isReordered": False}
    common = {"deleted": False, "isGenerated": False, "metricSectionId": "sweep"}
    return {
        "searchFilter": f"tags.sweep_id = '{sweep_id}'",
        "orderByKey": _column("metrics", quality),
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [section | {"deleted": False, "isGenerated": False}],
        "compareRunCharts": [{"uuid": f"chart{i}", **common, **chart} for i, chart in enumerate(charts)],
        "isAccordionReordered": True,  # with it the page adds no section for each prefix of a metric's name
        "hideEmptyCharts": True,
        "autoRefreshEnabled": False,
    }


def _contour_axes(names: Sequence[str]) -> list[str]:
    """Rank and learning rate where both vary, else the first two that do, not the seed; none of fewer than two."""
    wanted = [name for name in ("lora.r", "train.learning_rate") if name in names]
    rest = [name for name in names if name not in (*wanted, "seed")]
    found = [*wanted, *rest][:2]
    return found if len(found) == 2 else []


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def packed(state: Mapping[str, Any]) -> str:
    """A state as the page stores it: deflated, so that it fits the 5,000 characters of a tag."""
    text = json.dumps(state, separators=(",", ":"))
    return "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def share(experiment_id: str, sweep_id: str, runs: Sequence[Any]) -> str:
    """Keep the view of a sweep in MLflow, in place of the one before; returns the key that the page's address names."""
    from mlflow import MlflowClient

    measures = sorted({name for run in runs for name in run.data.metrics})
    state = of_sweep(sweep_id, [run.data.params for run in runs], measures)
    key = f"sweep-{sweep_id}"
    MlflowClient().set_experiment_tag(experiment_id, SHARED + key, packed(state))
    return key
