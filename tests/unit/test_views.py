"""Views of a sweep: columns and charts of what varies, sorted by the validation loss, small enough for a tag."""

import base64
import json
import zlib

from stages.lib.experiments import views

ROWS = [
    {"lora.r": r, "train.learning_rate": rate, "seed": seed, "lora.alpha": "16", "sweep.id": r}
    for r in ("2", "8", "32")
    for rate in ("0.0001", "0.0002")
    for seed in ("1", "2")
]
MEASURES = ["val/loss", "val/loss/tuned", "test/a/field_f1/base", "test/a/field_f1/tuned"]


def test_only_parameters_that_vary_are_columns() -> None:
    assert views.varied([*ROWS, {}]) == ["seed", "train.learning_rate", "lora.r"]  # one failed before it had any


def test_the_table_is_sorted_by_the_validation_loss_and_the_first_chart_shows_it() -> None:
    state = views.of_sweep("mine", ROWS, MEASURES)
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val/loss/tuned`", True)
    assert state["compareRunCharts"][0]["metricKey"] == "val/loss"
    assert "metrics.`test/a/field_f1/base`" not in state["selectedColumns"]


def test_the_contour_lies_over_rank_and_learning_rate_and_is_left_out_where_one_axis_is_missing() -> None:
    (contour,) = [found for found in views.of_sweep("mine", ROWS, MEASURES)["compareRunCharts"] if "zaxis" in found]
    assert (contour["xaxis"]["key"], contour["yaxis"]["key"]) == ("lora.r", "train.learning_rate")
    one = [row | {"train.learning_rate": "0.0001"} for row in ROWS]
    assert not any("zaxis" in found for found in views.of_sweep("mine", one, MEASURES)["compareRunCharts"])


def test_a_packed_view_reads_back_and_fits_a_tag() -> None:
    state = views.of_sweep("mine", ROWS, [*MEASURES, *(f"test/t{i}/accuracy/tuned" for i in range(20))])
    text = views.packed(state)
    assert len(text) <= 5000
    assert json.loads(zlib.decompress(base64.b64decode(text.removeprefix("deflate;")))) == state
