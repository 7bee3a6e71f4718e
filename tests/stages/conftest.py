"""The tiny model of tests/exported.py, merged and exported once for all tests that look at the result."""

from pathlib import Path

import pytest

from tests.exported import MERGE, NUMERICS, make_inputs


@pytest.fixture(scope="session")
def merged(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which merge has run. Not to be written to."""
    from stages import merge
    from tests import evaluate_settings

    folder = tmp_path_factory.mktemp("merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_inputs(tiny_model_dir)
        merge.main(merge.Params(evaluate_settings.settings(max_new_tokens=4), MERGE, NUMERICS))
    return folder


@pytest.fixture(scope="session")
def exported(merged: Path) -> Path:
    """The same after quantize_export."""
    from stages import quantize_export
    from tests.export_settings import params

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(merged)
        quantize_export.main(params())
    return merged
