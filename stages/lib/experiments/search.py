"""A search: Optuna proposes points, DVC runs them, and a training that lags behind the others is asked to stop.

    ask -> trial 7: lora.r=8 -> dvc exp run --name s-1a2b3c4d -> metrics/*.json -> tell: complete, 0.131
                 <- runs/s-1a2b3c4d/live.json: validation losses so far
                 -> runs/s-1a2b3c4d/stop                      -> no experiment  -> tell: pruned

A complete trial is a DVC experiment. A pruned one is none: the training of its parameters is a longer one. It is kept
in the study with its losses, and in MLflow as a KILLED row that says so. A failed one is kept with its reason.

What is proposed for a trial depends on search.seed, the trial's number and the trials before it, on nothing of the
process that asks: a search that was killed goes on as it would have, and two drivers of one search propose different
points. With several trials at a time it also depends on which of them ended first.
"""

import difflib
import hashlib
import json
import math
import os
import socket
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from stages.lib import environment, live
from stages.lib.errors import ConfigError, ExternalError
from stages.lib.experiments import kept, running
from stages.lib.experiments.points import Point, literal, point, signatures
from stages.lib.schema.sweep import Direction, Pruning, Sampler, Search, Sweep

POLL_SECONDS = 1.0  # an evaluation takes longer
FAILURES_IN_A_ROW = 3  # without a finished trial: what is wrong is not one point

RETRY = "retry_of"  # attribute of a trial: the number of the failed one whose point it tries again

STATES = {
    "done": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "killed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Ended:
    """How a trial ended. value: of search.metric, where its point is done."""

    number: int
    value: float | None
    outcome: running.Outcome

    def __str__(self) -> str:
        """trial 7 s-1a2b3c4d done in 310 s: 0.1312, lora.r=8 train.learning_rate=0.0004"""
        ended, values = self.outcome, " ".join(self.outcome.point.overrides())
        told = ended.reason if self.value is None else f"{self.value:.4f}"
        return f"trial {self.number} {ended.point.name} {ended.status} in {ended.seconds:.0f} s: {told}, {values}"


@dataclass
class Running:
    """A trial whose point runs."""

    trial: optuna.Trial
    point: Point
    future: Future[running.Outcome]
    reported: int  # evaluations given to the study so far


class PerTrial(optuna.samplers.BaseSampler):
    """A sampler that starts anew for each trial, from a seed that follows from search.seed and the trial's number."""

    def __init__(self, kind: Sampler, seed: int) -> None:
        self.kind, self.seed = kind, seed

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        seed = int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0])
        self.sampler = _sampler(self.kind, seed)
        self.sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return self.sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self.sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)


def _sampler(kind: Sampler, seed: int) -> optuna.samplers.BaseSampler:
    if kind is Sampler.gp:
        return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.RandomSampler(seed) if kind is Sampler.random else optuna.samplers.TPESampler(seed=seed)


def _pruner(p: Pruning | None) -> optuna.pruners.BasePruner:
    if p is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.PercentilePruner(
        100 * p.keep, n_startup_trials=p.after_trials, n_warmup_steps=p.after_evaluations + 1
    )


def storage(sweep_id: str, url: str | None = None) -> BaseStorage:
    """Where the trials are kept: a journal in the user's repository, or a database for drivers on several machines.

    Raises: ExternalError, without the address, which may hold a password.
    """
    path = running.folder(sweep_id) / "study.journal"
    path.parent.mkdir(parents=True, exist_ok=True)
    if url:
        try:
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except Exception as fault:  # of SQLAlchemy, or of a database's driver
            raise ExternalError(
                f"OPTUNA_STORAGE: the database it names cannot be opened ({type(fault).__name__}), expected an address "
                "as SQLAlchemy reads it, its driver installed, and the server there."
            ) from None
    _mend(path)
    return JournalStorage(JournalFileBackend(str(path)))


def _mend(journal: Path) -> None:
    """Cut off a line that was not written to its end, with which Optuna could not read the journal again."""
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    try:
        text = journal.read_bytes() if journal.exists() else b""
        if not text.endswith(b"\n") and text:
            os.truncate(journal, text.rfind(b"\n") + 1)
    finally:
        lock.release()


def open_study(p: Sweep, state: str, url: str | None = None) -> optuna.Study:
    """The study of a search; a new one where what its trials have in common has changed, as they cannot be compared.

    Args: state: see `points.state_of`. url: see `storage`.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    s = _search(p)
    kept_in = storage(str(p.id), url)
    common = [p.fixed, p.target, s.metric, s.direction, s.space, state]
    name = f"{p.id}-{hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:8]}"
    with FileLock(running.folder(str(p.id)) / "study.opening"):
        study = optuna.create_study(
            storage=kept_in,
            sampler=PerTrial(s.sampler, s.seed),
            pruner=_pruner(s.pruning),
            study_name=name,
            direction=s.direction.value,
            load_if_exists=True,
        )
        for values in p.points:
            study.enqueue_trial({key: _told(value) for key, value in values.items()}, skip_if_exists=True)
    return study


def corners(p: Sweep, state: str) -> list[Point]:
    """Points that together have every choice, and both ends of every range: what cannot be configured shows in them."""
    domains = _search(p).space.items()
    space = {key: found if isinstance(found, list) else [found["low"], found["high"]] for key, found in domains}
    most = max(map(len, space.values()))
    return [
        point(str(p.id), {**p.fixed, **{key: found[i % len(found)] for key, found in space.items()}}, state)
        for i in range(most)
    ]


def run(
    study: optuna.Study, p: Sweep, state: str, *, workers: int = 1, retry: bool = False, lost_host: str | None = None
) -> Iterator[Ended]:
    """Run trials, so many at a time, until the study has as many as the search wants; each as it ends.

    What a driver that is gone has left is finished first. Interrupted itself, it leaves its trials to the next one.

    Args: retry: try the points again that failed. lost_host: a machine whose drivers are gone, beside this one's.
    Raises: ConfigError, when a finished point has no such metric.
    """
    s = _search(p)
    for number in failed(study) if retry else []:
        study.enqueue_trial(study.trials[number].params, user_attrs={RETRY: number})
    left = _claim_left(study, str(p.id), lost_host)
    varied = signatures([Point("", dict.fromkeys(s.space))], p.target)[""]
    common = [stage for stage, own in varied.items() if own == "{}"]  # made once, and then found in DVC's cache
    source = running.start_folder(str(p.id))
    at_work: list[Running] = []
    failures = 0
    with running.pool(workers) as threads:
        while True:
            while (
                len(at_work) < workers
                and failures < FAILURES_IN_A_ROW
                and not any(running.unfinished(_log(p, each.point), common) for each in at_work)
                and (trial := _next(study, left, s.trials))
            ):
                proposed = _proposed(trial, p, state)
                same = next((other.future for other in at_work if other.point == proposed), None)
                future = same or running.start(threads, proposed, p, source=source, workers=workers)
                reported = len(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
                at_work.append(Running(trial, proposed, future, reported))
            if not at_work:
                return
            wait({each.future for each in at_work}, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for each in list(at_work):
                is_done = each.future.done()
                if (lags := _lags(each, s)) and not is_done:
                    live.ask_to_stop(each.point.name, lags)
                if not is_done:
                    continue
                at_work.remove(each)
                ended = _tell(study, each, s)
                failures = failures + 1 if ended.outcome.status in ("failed", "killed") else 0
                yield ended


def _search(p: Sweep) -> Search:
    """Raises: ConfigError, for a sweep without, or without a name."""
    if p.search is None or p.id is None:
        raise ConfigError(
            f"sweep.search: found {p.search and 'one'}, sweep.id: found {p.id}; expected a name and what Optuna shall "
            "propose, as in conf/sweep/search_lora.yaml. `make sweep` runs the points of a grid or a list."
        )
    return p.search


def _next(study: optuna.Study, left: list[FrozenTrial], wanted: int) -> optuna.Trial | None:
    """A trial that was left, one that waits, or a new one; None where there are enough."""
    if left:
        return optuna.Trial(study, left.pop(0)._trial_id)
    trials = study.get_trials(deepcopy=False)
    waits = any(trial.state is TrialState.WAITING for trial in trials)
    if not waits and sum(RETRY not in trial.user_attrs for trial in trials) >= wanted:
        return None
    trial = study.ask()
    trial.set_user_attr("driver", _driver())
    return trial


def _proposed(trial: optuna.Trial, p: Sweep, state: str) -> Point:
    """The point of a trial. The trial remembers its name: that of the DVC experiment, and of the row in MLflow."""
    values = {key: _suggest(trial, key, domain) for key, domain in _search(p).space.items()}
    proposed = point(str(p.id), {**p.fixed, **values}, state)
    trial.set_user_attr("experiment", proposed.name)
    return proposed


def _suggest(trial: optuna.Trial, key: str, domain: Any) -> Any:
    if isinstance(domain, list):
        return {_told(value): value for value in domain}[trial.suggest_categorical(key, list(map(_told, domain)))]
    low, high, step, is_log = (domain.get(name) for name in ("low", "high", "step", "log"))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, step=step or 1, log=bool(is_log))
    return trial.suggest_float(key, low, high, step=step, log=bool(is_log))


def _told(value: Any) -> Any:
    """A choice as Optuna can keep it: lists and mappings as text."""
    return literal(value) if isinstance(value, (list, dict)) else value


def _log(p: Sweep, proposed: Point) -> Path:
    return running.folder(str(p.id)) / f"{proposed.name}.log"


def _lags(each: Running, s: Search) -> str:
    """Give the study the losses told since; why the training should end, empty where it may go on.

    Its last evaluation is not judged: what is whole is worth more than what would be saved.
    """
    told = live.heard(each.point.name) or live.Told([], 0)
    lags = ""
    for loss in told.losses[each.reported :]:
        each.reported += 1
        # a lower loss is better, whatever the direction of the metric
        value = math.nan if loss is None else loss if s.direction is Direction.minimize else -loss
        each.trial.report(value, each.reported)
        if s.pruning and each.reported < told.planned and each.trial.should_prune():
            lags = (
                f"validation loss {math.nan if loss is None else loss:.4f} at evaluation {each.reported} of "
                f"{told.planned}: so far not among the best {s.pruning.keep:.0%}"
            )
    return lags


def _tell(study: optuna.Study, each: Running, s: Search) -> Ended:
    outcome = each.future.result()
    value = _metric(each.point.name, s.metric) if outcome.status == "done" else None
    each.trial.set_user_attr("seconds", round(outcome.seconds, 1))
    each.trial.set_user_attr("reason", outcome.reason)
    study.tell(each.trial, value, STATES[outcome.status])
    return Ended(each.trial.number, value, outcome)


def _metric(name: str, metric: str) -> float:
    metrics = {key: value for found in kept.find(name).metrics.values() for key, value in found.items()}
    if metric not in metrics:
        near = difflib.get_close_matches(metric, metrics, n=3, cutoff=0.5) or sorted(metrics)
        raise ConfigError(
            f"sweep.search.metric: found {metric}, expected one that {name} has, such as {', '.join(near)}."
        )
    return metrics[metric]


def _claim_left(study: optuna.Study, sweep_id: str, lost_host: str | None) -> list[FrozenTrial]:
    """The trials that a driver which is gone has left running; they are this one's now."""
    with FileLock(running.folder(sweep_id) / "study.opening"):
        trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        left = [trial for trial in trials if _is_left(trial, lost_host)]
        for trial in left:
            optuna.Trial(study, trial._trial_id).set_user_attr("driver", _driver())
    return left


def _driver() -> list[Any]:
    """Who asks: host, repository, process, and when that started, as process numbers come again."""
    return [socket.gethostname(), str(environment.root()), os.getpid(), psutil.Process().create_time()]


def _is_left(trial: FrozenTrial, lost_host: str | None) -> bool:
    """Whether nobody will finish a running trial; of another machine's nobody here can know."""
    host, root, process, started = trial.user_attrs.get("driver", [*_driver()[:2], 0, 0.0])
    if host == lost_host:
        return True
    if [host, root] != _driver()[:2]:
        return False
    try:
        return psutil.Process(process).create_time() != started
    except psutil.NoSuchProcess:
        return True


def summary(study: optuna.Study, p: Sweep) -> str:
    """How far a search is and what is best so far, in one line."""
    s, trials = _search(p), study.get_trials(deepcopy=False)
    words = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    counts = {word: sum(trial.state is state for trial in trials) for word, state in words.items()}
    said = f"{sum(counts.values())} of {s.trials} trials ended: " + ", ".join(
        f"{n} {word}" for word, n in counts.items()
    )
    if counts["complete"]:
        best = study.best_trial
        values = " ".join(f"{key}={literal(value)}" for key, value in best.params.items())
        said += f"; best {best.user_attrs['experiment']}: {s.metric} {best.value:.4f}, {values}"
    return said


def failed(study: optuna.Study) -> list[int]:
    """Numbers of the trials that failed and whose point was not tried again."""
    trials = study.get_trials(deepcopy=False)
    again = {trial.user_attrs.get(RETRY) for trial in trials}
    return [trial.number for trial in trials if trial.state is TrialState.FAIL and trial.number not in again]


def reasons(study: optuna.Study) -> list[str]:
    """Why the trials of `failed` did, a line each."""
    found = ((number, study.trials[number].user_attrs) for number in failed(study))
    return [f"trial {number} {told.get('experiment', '')}: {told.get('reason', '')}" for number, told in found]
