"""Points of a sweep run by the nodes of a Ray cluster, which share nothing with this machine but git and DVC remotes.

    this machine                            a node, for each point
    the commit is pushed, its data too
    name, values, commit, address  ------>  a clone of its own at that commit: git fetch, git checkout
                                            dvc exp run --temp --pull: data comes from the DVC remote where it is needed
    dvc exp pull                   <------  dvc exp push: the commit to the git remote, outputs to the DVC remote

A point whose node is lost goes to another one.
"""

import configparser
import hashlib
import itertools
import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stages.lib import config, engine, stage, tracking
from stages.lib.errors import ConfigError, ExternalError, PipelineError
from stages.lib.experiments import kept, running
from stages.lib.experiments.points import Point
from stages.lib.experiments.running import Outcome
from stages.lib.schema.sweep import Sweep

log = logging.getLogger(__name__)

REMOTE = "origin"  # of git; DVC's is the default one of its configuration
RETRIES = 3  # of a point whose node or worker was lost
CLONES = "PIPELINE_CLONES"  # of a node: where its clones and their common cache lie
PULL = ("--pull", "--allow-missing")  # fetch what a stage that runs reads, and nothing else
DECISIVE = ("bitsandbytes", "dvc", "hydra-core", "numpy", "peft", "tokenizers", "torch", "transformers", "trl")


@dataclass(frozen=True)
class Code:
    """What the nodes run: a commit, where to get it, and in whose name they commit the experiments."""

    url: str
    commit: str
    author: str
    email: str


@dataclass(frozen=True)
class Share:
    """What one point takes of a node: Ray gives a node as many points as it has shares."""

    cpus: int
    gpus: int

    def fit(self, node: Mapping[str, Any]) -> int:
        """How many such shares a node has. node: as `ray.nodes()` lists it."""
        offer = node["Resources"]
        return max(1, int(offer["GPU"] // self.gpus if self.gpus else offer["CPU"] // self.cpus))


@dataclass(frozen=True)
class Order:
    """What a node needs to know to run points of a sweep.

    environment: how the MLflow server is reached. versions: of the packages that decide the result. share: what one
    point may take of the node.
    """

    sweep_id: str
    target: str
    code: Code
    environment: dict[str, str]
    versions: dict[str, str]
    share: Share


def run_all(points: Sequence[Point], p: Sweep, *, workers: int, address: str) -> Iterator[Outcome]:
    """Run points on a cluster; outcomes as they come, each with its experiment and outputs fetched.

    Args: workers: points at a time on a node without GPUs; of the others each GPU has one. address: host:port of the
            cluster's head.
    Raises: ConfigError, when a node could not get the code or the data from the remotes; ExternalError, when no cluster
        answers, or a node has other versions of the packages that decide the result.
    """
    running.check(workers)
    code = committed()
    check_data(p.target)
    there = {name for name in on_remote() if name in {point.name for point in points}}
    for point in points:
        if point.name in there and fetch(point.name):
            yield _recorded(Outcome(point, "done", "", Path(), 0.0), "fetched: it had been run before", str(p.id))
        else:
            there.discard(point.name)
    wanted = [point for point in points if point.name not in there]
    if wanted:
        yield from _spread(wanted, p, workers, address, code)


def _spread(points: Sequence[Point], p: Sweep, workers: int, address: str, code: Code) -> Iterator[Outcome]:
    """Give every point to Ray at once; it hands them out as nodes become free."""
    from stages.lib import engine_ray

    engine_ray.connect(address)
    import ray
    from ray.exceptions import RayError, RayTaskError

    def on_node(pickled: bytes) -> bytes:  # pickled by value: it runs before the project is imported there
        import os
        import sys

        os.environ.setdefault("PIPELINE_ENV", sys.prefix)  # the python that the node was started with
        from stages.lib.experiments import cluster

        return cluster.work(pickled)

    processes = config.values()["train"]["processes"]
    part = share(ray.nodes(), workers, max(point.values.get("train.processes", processes) for point in points))
    order = Order(str(p.id), p.target, code, _mlflow(), engine_ray.versions(DECISIVE), part)
    remote = ray.remote(max_retries=RETRIES, num_cpus=part.cpus, num_gpus=part.gpus)(on_node)
    waiting = {remote.remote(pickle.dumps((point, order))): point for point in points}
    try:
        while waiting:
            (task, *_), _ = ray.wait(list(waiting))
            point = waiting.pop(task)
            try:
                outcome, said = pickle.loads(ray.get(task))
            except RayTaskError as fault:
                raise ExternalError(f"{point.name}: {fault.cause}") from fault
            except RayError as fault:
                reason = f"its node was lost {RETRIES + 1} times: {str(fault).strip().splitlines()[0]}"
                outcome, said = Outcome(point, "killed", reason, Path(), 0.0), str(fault)
            if outcome.status == "done" and not fetch(point.name):
                reason = f"what it made is not on the remotes {REMOTE} (git) and of DVC, though it was pushed"
                outcome = replace(outcome, status="failed", reason=reason)
            yield _recorded(outcome, said, str(p.id))
    finally:
        for task in waiting:
            ray.cancel(task)


def share(nodes: Sequence[Mapping[str, Any]], workers: int, processes: int = 1) -> Share:
    """What each point takes: a GPU for each process of its training; without any in the cluster, a part of a node.

    Args: nodes: as `ray.nodes()` lists them. workers: points at a time on the smallest node, where none has a GPU.
        processes: of the training (train.processes).
    Raises: ExternalError, when no node offers anything; ConfigError, when none has as many GPUs.
    """
    offers = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not offers:
        raise ExternalError("the Ray cluster: found no node that offers a CPU, expected one: docs/cluster.md")
    most = max(int(offer.get("GPU", 0)) for offer in offers)
    if most:
        if processes > most:
            raise ConfigError(f"train.processes: found {processes}, expected at most {most}, the GPUs of a node.")
        cpus = [offer["CPU"] * processes // offer["GPU"] for offer in offers if offer.get("GPU", 0) >= processes]
        return Share(cpus=max(1, int(min(cpus))), gpus=processes)
    return Share(cpus=max(1, min(int(offer["CPU"]) for offer in offers) // workers), gpus=0)


def committed() -> Code:
    """Where the code of this repository's HEAD can be had.

    Raises: ConfigError, when HEAD is not what the working tree holds, or the git remote lacks it.
    """
    url = _git("remote", "get-url", REMOTE, fault=f"no git remote: `git remote add {REMOTE} <url>`").strip()
    if Path(url).exists():
        url = str(Path(url).resolve())
    if changed := _git("status", "--porcelain", "--untracked-files=no").splitlines():
        listed = ", ".join(line[3:] for line in changed[:5])
        raise ConfigError(
            f"not committed: {listed}. The nodes of a cluster get a commit. Expected one with all changes: commit and "
            "`git push`, or `git checkout` them."
        )
    _git("fetch", "-q", REMOTE, fault=f"the git remote {REMOTE} ({url}) does not answer")
    if not _git("branch", "--remotes", "--contains", "HEAD", "--list", f"{REMOTE}/*").strip():
        raise ConfigError(f"HEAD is on no branch of {REMOTE} ({url}), from where the nodes get it. `git push` first.")
    name, _, rest = _git("var", "GIT_COMMITTER_IDENT").partition(" <")
    return Code(url, _git("rev-parse", "HEAD").strip(), name, rest.partition(">")[0])


def check_data(target: str) -> None:
    """Raises: ConfigError, when HEAD names no DVC remote, or that lacks data that is here and leads to the target."""
    configured = configparser.ConfigParser()
    configured.read_string(_git("show", "HEAD:.dvc/config"))
    if not configured.get("core", "remote", fallback=None):
        raise ConfigError(
            "core.remote of .dvc/config as committed: found none, expected the DVC remote that all nodes reach. "
            "`dvc remote add --default <name> <url>`, commit, push."
        )
    shown = _run("dvc", "status", "--cloud", "--json", "--with-deps", target)
    states = json.loads(shown.stdout or "{}") if shown.returncode == 0 else None
    if states is None:
        raise ConfigError(
            f"the DVC remote {configured['core']['remote']} of .dvc/config does not answer: {_last(shown)}. "
            "Expected one that this machine and all nodes reach."
        )
    new = [path for path, state in states.items() if state == "new"]
    if new:
        raise ConfigError(f"not on the DVC remote: {', '.join(new[:5])}. `dvc push`, so that the nodes have them.")


def on_remote() -> set[str]:
    """Names of the experiments that the git remote has."""
    refs = _git("ls-remote", REMOTE, "refs/exps/*").split()[1::2]
    return {ref.split("/")[4] for ref in refs if ref.count("/") == 4}


def fetch(name: str) -> bool:
    """Bring an experiment here with what it made, from the git and DVC remotes; whether all of it came.

    `dvc exp pull` itself calls it a success when outputs are missing: one that was pushed halfway would pass. Where it
    fails, it may have brought the experiment without any. Neither stays here, where it would count as done.
    """
    is_pulled = _run("dvc", "exp", "pull", "-q", REMOTE, name).returncode == 0
    if name not in kept.references():
        return False
    found = kept.find(name)
    made = found.outs.items() - kept.find(found.baseline).outs.items()
    committed = kept.texts(found.revision, [path for path, _ in made])  # metrics and plots
    if is_pulled and all(stage.cached(md5) for path, md5 in made if committed[path] is None):
        return True
    _run("dvc", "exp", "remove", "-q", name)
    return False


def work(pickled: bytes) -> bytes:
    """On a node: run the point that is ordered, and push what it made.

    Returns: pickled, its outcome and what it said. What goes wrong on this node is an outcome, too.
    Raises: ExternalError, when the node has other versions than the driver: then no point can run here.
    """
    import ray

    from stages.lib import engine_ray

    point: Point
    order: Order
    point, order = pickle.loads(pickled)
    engine_ray.check_versions(order.versions)
    here = ray.get_runtime_context().get_node_id()
    at_a_time = next(order.share.fit(node) for node in ray.nodes() if node["NodeID"] == here)
    for name in ("PYTHONPATH", "DVC_ROOT", *engine.SINGLE_THREADED):  # the clone has its own code, cores and folders
        os.environ.pop(name, None)
    os.environ |= order.environment | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    try:
        with clone(order.code) as folder:
            os.chdir(folder)
            outcome = _worked(point, order, at_a_time)
    except PipelineError as fault:
        outcome = Outcome(point, "failed", str(fault), Path(), 0.0)
    said = outcome.log.read_text(errors="replace") if outcome.log.is_file() else outcome.reason
    if outcome.reason:
        outcome = replace(outcome, reason=f"on {socket.gethostname()}: {outcome.reason}")
    return pickle.dumps((outcome, said))


def _worked(point: Point, order: Order, at_a_time: int) -> Outcome:
    """In a clone at the right commit: the point is fetched if another node has done it, run otherwise, and pushed."""
    name, outcome = point.name, Outcome(point, "done", "", Path(), 0.0)
    if name not in on_remote() or not fetch(name):  # otherwise its node was lost before it could say so
        if name not in kept.references():  # otherwise it was done here before, but could not be pushed
            outcome = running.run(point, order.sweep_id, order.target, workers=at_a_time, more=PULL)
            if outcome.status != "done":
                return outcome
        _, baseline = kept.references()[name]
        done = _run("dvc", "exp", "push", "-q", "-f", REMOTE, f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}")
        if done.returncode != 0:
            raise ExternalError(
                f"it was done, but could not be pushed to {REMOTE} and the DVC remote: {_last(done)}. "
                "The same command pushes it once this node may write there."
            )
    _run("dvc", "exp", "remove", "-q", name)
    return outcome


@contextmanager
def clone(code: Code) -> Iterator[Path]:
    """A clone that no other point of this node uses meanwhile, at the commit that is ordered.

    It stays afterwards, so that the next one only fetches what is new; all clones of a node have one DVC cache.
    """
    name = hashlib.sha256(code.url.encode()).hexdigest()[:8]
    home = Path(os.environ.get(CLONES) or Path.home() / ".cache/pipeline-clones", name)
    home.mkdir(parents=True, exist_ok=True)
    with _free(home) as folder:
        try:
            _prepare(folder, home, code)
        except ExternalError:  # one that a lost worker left halfway
            shutil.rmtree(folder, ignore_errors=True)
            _prepare(folder, home, code)
        yield folder


@contextmanager
def _free(home: Path) -> Iterator[Path]:
    """The first folder that nobody has locked; locked, until the caller is done with it."""
    for number in itertools.count():
        lock = FileLock(home / f"clone-{number}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            yield home / f"clone-{number}"
        finally:
            lock.release()
        return


def _prepare(folder: Path, home: Path, code: Code) -> None:
    """Raises: ExternalError, when the remote does not give the commit."""
    folder.mkdir(exist_ok=True)
    git = ("git", "-C", str(folder))
    commands = [
        (*git, "init", "-q"),
        (*git, "config", "remote.origin.url", code.url),
        (*git, "config", "remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*"),
        (*git, "config", "user.name", code.author),
        (*git, "config", "user.email", code.email),
        (*git, "fetch", "-q", "--no-tags", REMOTE),
        (*git, "checkout", "-q", "--force", "--detach", code.commit),
        ("git", "config", "--file", str(folder / ".dvc/config.local"), "cache.dir", str(home / "cache")),
    ]
    for command in commands:
        done = _run(*command)
        if done.returncode != 0:
            raise ExternalError(f"{' '.join(command[:6])}: {_last(done)}. Expected a node that reaches {code.url}.")


def _mlflow() -> dict[str, str]:
    """The variables that say where the MLflow server is and who asks; the configuration comes with the commit."""
    if tracking.address(config.values()["runtime"]["tracking_uri"]).startswith("sqlite:"):
        log.warning("no MLflow server for all nodes is named: rows come with `make sync`, of failed points none do.")
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_TRACKING_")}


def _recorded(outcome: Outcome, said: str, sweep_id: str) -> Outcome:
    """The outcome of a point, kept where those of local ones are, with what it said as its log."""
    place = running.folder(sweep_id)
    place.mkdir(parents=True, exist_ok=True)
    outcome = replace(outcome, log=place / f"{outcome.point.name}.log")
    outcome.log.write_text(said)
    running.record(outcome, place)
    return outcome


def _git(*arguments: str, fault: str = "") -> str:
    done = _run("git", *arguments)
    if done.returncode != 0:
        raise ConfigError(f"{fault or f'git {arguments[0]}'}: {_last(done)}")
    return done.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
