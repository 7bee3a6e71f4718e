"""What a node of a cluster needs before it can run a point: its share, a commit that it can get, a clone of its own."""

from pathlib import Path
from typing import Any

import pytest

from stages.lib.errors import ConfigError, ExternalError
from stages.lib.experiments import cluster, kept
from stages.lib.experiments.cluster import Code, Share
from tests.conftest import git


def node(*, is_alive: bool = True, **offers: float) -> dict[str, Any]:
    return {"Alive": is_alive, "Resources": {"memory": 1.0, **offers}}


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([node(CPU=8)], 1, Share(8, 0)),
        ([node(CPU=8), node(CPU=4)], 2, Share(2, 0)),
        ([node(CPU=2)], 4, Share(1, 0)),
        ([node(CPU=64, GPU=8), node(CPU=8)], 1, Share(8, 1)),  # nodes without GPUs would train something else
        ([node(CPU=16, GPU=1), node(CPU=16, GPU=4)], 1, Share(4, 1)),
        ([node(CPU=8), node(CPU=1, is_alive=False), node()], 1, Share(8, 0)),  # a dead one, and one for the driver
    ],
)
def test_a_point_takes_one_gpu_or_its_part_of_the_smallest_node(
    nodes: list[dict[str, Any]], workers: int, expected: Share
) -> None:
    assert cluster.share(nodes, workers) == expected


def test_a_point_that_trains_in_several_processes_takes_a_gpu_for_each() -> None:
    nodes = [node(CPU=16, GPU=1), node(CPU=64, GPU=8)]
    assert cluster.share(nodes, 1, processes=4) == Share(32, 4)
    with pytest.raises(ConfigError, match=r"train\.processes: found 16, expected at most 8"):
        cluster.share(nodes, 1, processes=16)


def test_a_cluster_that_offers_nothing_is_refused() -> None:
    with pytest.raises(ExternalError, match="no node that offers a CPU"):
        cluster.share([node()], 1)


@pytest.mark.parametrize(
    ("share", "offers", "points"),
    [(Share(2, 0), {"CPU": 8.0}, 4), (Share(4, 1), {"CPU": 64.0, "GPU": 8.0}, 8), (Share(2, 0), {"CPU": 2.0}, 1)],
)
def test_a_node_divides_its_cores_among_as_many_points_as_it_has_shares(
    share: Share, offers: dict[str, float], points: int
) -> None:
    assert share.fit(node(**offers)) == points


@pytest.fixture
def pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose only commit is on its remote, and where we are."""
    git(tmp_path, "init", "-q", "--bare", "-b", "main", "remote.git")
    folder = tmp_path / "here"
    git(tmp_path, "clone", "-q", "remote.git", "here")
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (folder / "params.yaml").write_text("seed: 42\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    git(folder, "push", "-q", "origin", "main")
    monkeypatch.chdir(folder)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "A. Person")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.invalid")
    return folder


def test_the_nodes_get_the_commit_from_the_remote_in_the_name_of_who_asks(pushed: Path) -> None:
    head = git(pushed, "rev-parse", "HEAD").strip()
    assert cluster.committed() == Code(str(pushed.parent / "remote.git"), head, "A. Person", "a@example.invalid")


def test_changes_that_are_not_committed_are_refused(pushed: Path) -> None:
    (pushed / "params.yaml").write_text("seed: 43\n")
    with pytest.raises(ConfigError, match=r"not committed: params\.yaml.*git push"):
        cluster.committed()


def test_a_commit_that_is_not_pushed_is_refused(pushed: Path) -> None:
    git(pushed, "commit", "-q", "--allow-empty", "-m", "second")
    with pytest.raises(ConfigError, match=r"HEAD is on no branch of origin .*git push"):
        cluster.committed()


def test_a_repository_without_a_git_remote_is_refused(pushed: Path) -> None:
    git(pushed, "remote", "remove", "origin")
    with pytest.raises(ConfigError, match=r"git remote add origin"):
        cluster.committed()


def test_a_dvc_remote_that_only_this_machine_knows_is_refused(pushed: Path) -> None:
    (pushed / ".dvc/config.local").write_text("[core]\n    remote = mine\n")
    with pytest.raises(ConfigError, match=r"core\.remote.*dvc remote add --default"):
        cluster.check_data("evaluate")


def test_points_of_one_node_have_clones_of_their_own_and_one_cache(
    pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cluster.CLONES, str(tmp_path / "clones"))
    code = cluster.committed()
    with cluster.clone(code) as one, cluster.clone(code) as two:
        assert one != two
        assert [git(folder, "rev-parse", "HEAD").strip() for folder in (one, two)] == [code.commit] * 2
        caches = [git(folder, "config", "--file", ".dvc/config.local", "cache.dir") for folder in (one, two)]
        assert caches[0] == caches[1]
    with cluster.clone(code) as again:
        assert again == one


def test_a_clone_that_was_left_halfway_is_made_anew(
    pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cluster.CLONES, str(tmp_path / "clones"))
    code = cluster.committed()
    with cluster.clone(code) as folder:
        (folder / ".git/index.lock").touch()  # of a git that was killed
        (folder / "params.yaml").unlink()
    with cluster.clone(code) as folder:
        assert (folder / "params.yaml").read_text() == "seed: 42\n"


def test_a_node_that_cannot_reach_the_remote_says_so(
    pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cluster.CLONES, str(tmp_path / "clones"))
    code = cluster.committed()
    (tmp_path / "remote.git").rename(tmp_path / "gone.git")
    with pytest.raises(ExternalError, match=r"fetch.*Expected a node that reaches .*remote\.git"), cluster.clone(code):
        pass


def test_an_experiment_that_came_without_its_outputs_does_not_stay(
    pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = git(pushed, "rev-parse", "HEAD").strip()
    reference = f"refs/exps/{head[:2]}/{head[2:]}/one"
    git(pushed, "update-ref", reference, "HEAD")  # dvc fetches it first
    dvc = tmp_path / "bin/dvc"
    dvc.parent.mkdir()
    dvc.write_text(f"#!/bin/sh\n[ $2 = remove ] && git update-ref -d {reference}\n[ $2 != pull ]\n")
    dvc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{dvc.parent}:/usr/bin:/bin")
    assert not cluster.fetch("one")
    assert kept.references() == {}


def test_only_experiments_of_the_git_remote_count_as_there(pushed: Path) -> None:
    for name in ("one-1a2b3c4d", "two-1a2b3c4d"):
        reference = f"refs/exps/ab/{'c' * 38}/{name}"
        git(pushed, "update-ref", reference, "HEAD")
        if name.startswith("one"):
            git(pushed, "push", "-q", "origin", f"{reference}:{reference}")
    assert cluster.on_remote() == {"one-1a2b3c4d"}
