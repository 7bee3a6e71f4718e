"""The data stages on Ray Data: two nodes, and a worker killed in each stage, give the bytes that one machine gives."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import rows
from stages import dedup_split, prepare, tokenize_pack
from stages.lib import config, engine, files
from stages.lib.errors import DataError, ExternalError
from stages.lib.schema.runtime import Engine, Runtime
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`ray_remote_args` is deprecated"),  # pytest takes back what engine_ray has set
]

ROWS = 25_000  # several items for every stage
OVERRIDES = {
    prepare: ["data.source=local", "data.path=rows.jsonl", "data.max_chars=16000", "data.max_rejected_fraction=0.1"],
    dedup_split: [f"dedup.contamination.benchmarks={ROOT / 'data/benchmarks'}"],
    tokenize_pack: ["pack.max_tokens=1024", "pack.max_lost_fraction=0.5"],
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two nodes with one core each."""
    from stages.lib import engine_ray  # first: it switches the usage statistics off

    del engine_ray
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes know `stages`, no tests
    node = {"num_cpus": 1, "object_store_memory": 200 << 20}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    found.add_node(**node)
    yield found
    ray.shutdown()
    found.shutdown()


def use(monkeypatch: pytest.MonkeyPatch, name: Engine, address: str | None = None) -> None:
    runtime = Runtime(
        threads=None,
        workers=2,
        engine=name,
        ray_address=address,
        log_level="info",
        tracking_uri=None,
        checkpoint_minutes=2,
    )
    monkeypatch.setattr(engine, "_runtime", runtime)


def node_of(number: int) -> tuple[int, str]:
    import ray

    time.sleep(0.2)
    return number, ray.get_runtime_context().get_node_id()


def refused(number: int) -> int:
    if number == 3:
        raise DataError("row 3 is no row")
    return number


def killed(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def killed_once(function: Callable[[Any], Any], marker: Path, driver: int, item: Any) -> Any:
    """function(item), but the first worker that comes here is killed."""
    if os.getpid() != driver:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return function(item)


def test_both_nodes_work_and_the_results_keep_the_order_of_the_items(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Engine.ray, cluster.address)
    found = list(engine.ordered_map(node_of, range(13)))
    assert [number for number, _ in found] == list(range(13))
    assert len({node for _, node in found}) == 2


def test_a_node_may_be_lost_midway(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Engine.ray, cluster.address)
    third = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
    found = []
    for number, node in engine.ordered_map(node_of, range(40)):
        found.append((number, node))
        if number == 12:
            cluster.remove_node(third)
    assert [number for number, _ in found] == list(range(40))
    assert third.node_id in {node for _, node in found}


def test_a_fault_of_the_function_comes_out_as_itself(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Engine.ray, cluster.address)
    with pytest.raises(DataError, match=r"^row 3 is no row$"):
        list(engine.ordered_map(refused, range(8)))


def test_a_node_with_other_versions_of_what_decides_the_output_is_refused(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.lib import engine_ray

    use(monkeypatch, Engine.ray, cluster.address)
    found = engine_ray.versions()
    monkeypatch.setattr(engine_ray, "versions", lambda: found | {"numpy": "0.1"})  # of the driver, not of the nodes
    with pytest.raises(ExternalError, match=rf"node .* has numpy=={found['numpy']}, expected numpy==0\.1"):
        list(engine.ordered_map(refused, range(2)))


def test_an_item_that_ends_every_worker_ends_with_a_message(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Engine.ray, cluster.address)
    with pytest.raises(ExternalError, match=r"after 3 repeats[\s\S]*memory"):
        list(engine.ordered_map(killed, range(8)))


def test_the_stages_write_the_same_bytes_as_on_one_machine_though_a_worker_is_killed_in_each(
    cluster: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.write(tmp_path / "rows.jsonl", ROWS)
    use(monkeypatch, Engine.local)
    local = outputs(tmp_path / "local", tiny_model_dir, monkeypatch)

    use(monkeypatch, Engine.ray, cluster.address)
    original = engine.ordered_map
    killed_in = set()

    def killing(function: Callable[[Any], Any], items: Iterable[Any], **more: Any) -> Iterator[Any]:
        name = getattr(function, "func", function).__name__
        marker = tmp_path / f"killed-in-{name}"
        yield from original(partial(killed_once, function, marker, os.getpid()), items, **more)
        if marker.exists():
            killed_in.add(name)

    monkeypatch.setattr(engine, "ordered_map", killing)
    assert outputs(tmp_path / "ray", tiny_model_dir, monkeypatch) == local
    assert killed_in >= {"prepared", "compared", "encoded"}  # the work of prepare, dedup_split and tokenize_pack
    assert {name.split("/")[1] for name in local} == {"prepared", "splits", "packed"}


def outputs(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Run the three stages in a folder. Returns: sha256 of every file under data/."""
    (folder / "models").mkdir(parents=True)
    (folder / "models/base").symlink_to(base)
    (folder / "conf").symlink_to(ROOT / "conf")
    (folder / "rows.jsonl").symlink_to(folder.parent / "rows.jsonl")
    monkeypatch.chdir(folder)
    for stage, overrides in OVERRIDES.items():
        stage.main(config.load(stage.Params, overrides, ROOT / "params.yaml"))
    written = sorted(path for path in Path("data").rglob("*") if path.is_file())
    return {str(path): files.sha256(path) for path in written}
