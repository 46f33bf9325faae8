"""Tasks of lm-eval: found and checked before any model is opened, then asked of two models, document by document. Needs lm-eval."""

from __future__ import annotations

import difflib
import math
import numbers
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from moestro.core.errors import InputError, MoestroError
from moestro.core.plans.compression import TaskScore
from moestro.evaluate.tasks import TaskModel, answer_tokens, check_greedy
from moestro.models.tokenizer import Tokenizer

ARGUMENTS = {"loglikelihood": 2, "loglikelihood_rolling": 1, "generate_until": 2}  # texts and settings of a request
KINDS = ("multiple_choice", *ARGUMENTS)
_SEED = 1234  # of the draw of examples, lm-eval's own
_DRAWS = 1000  # of a bootstrapped standard error
_LISTED = "lm_eval ls tasks"


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Tasks with their documents. names: as asked for. loaded: what lm-eval made of them. limit: documents of each task, None for all.

    fixed: tasks that say themselves that they take no examples, though some were asked for.
    """

    names: tuple[str, ...]
    loaded: Mapping[str, Any]
    limit: int | None
    fixed: tuple[str, ...] = ()

    @property
    def tasks(self) -> Mapping[str, Any]:
        return self.loaded["tasks"]


def find_tasks(
    names: Sequence[str],
    folder: str | Path | None = None,
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    index: bool = True,
) -> TaskSet:
    """Load tasks, groups and tags by name, with their data sets.

    Args:
        folder: of more tasks, as lm-eval describes them in YAML; Python code that they name is run.
        fewshot: examples before each question, instead of each task's own number.
        limit: ask the first documents of each task alone.
        index: False looks into the folder alone, which is sooner done where its groups are made of its own tasks.

    Raises:
        InputError: an unknown name, a task that cannot be asked of a runner or runs foreign code, a data set that cannot be had.
    """
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"there is no folder {folder}", expected="a folder of tasks (YAML)", fix="check --task-folder")
    manager = _manager(names, folder, index)
    try:
        for name in names:
            for leaf in _leaves(manager, name):
                _check_config(leaf, manager.task_index[leaf].cfg or {})
        with redirect_stdout(sys.stderr):
            random.seed(0)  # as lm-eval does it: some tasks shuffle their documents when they are loaded
            np.random.seed(_SEED)
            loaded = manager.load(list(names))
    except MoestroError:
        raise
    except Exception as error:  # lm-eval and datasets raise whatever they meet
        _refuse(names, error)
    fixed = []
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if own is None or (fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        elif fewshot:
            fixed.append(name)
    found = TaskSet(tuple(names), loaded, limit, tuple(fixed))
    _build(found)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            _foreign(name, "runs what the model writes")
        for request in task.instances:
            parts: tuple[Any, ...] = request.args
            if len(parts) != ARGUMENTS.get(request.request_type):
                _not_ours(name, request.request_type)
            if request.request_type == "generate_until":
                check_greedy(parts[1], f"the task {name}")
    return found


def longest(tasks: TaskSet, tokenizer: Tokenizer) -> int:
    """Tokens that the longest request and its answer have, or a few more."""
    most = 2
    for task in tasks.tasks.values():
        for request in task.instances:
            parts: tuple[Any, ...] = request.args
            texts = [part for part in parts if isinstance(part, str)]
            room = answer_tokens(parts[1]) if request.request_type == "generate_until" else 0
            most = max(most, len(tokenizer.encode("".join(texts))) + 2 + room)
    return most


def score(tasks: TaskSet, model: TaskModel) -> dict[str, Any]:
    """lm-eval's results of one model, with its samples. The same tasks give every model the same requests."""
    _reseed(tasks)
    with redirect_stdout(sys.stderr), without_pool():
        found = evaluate(model, tasks.loaded, limit=tasks.limit, bootstrap_iters=_DRAWS, log_samples=True)  # type: ignore[arg-type]
    assert found is not None, "this is the only process"
    return dict(found)


def paired(tasks: TaskSet, changed: Mapping[str, Any], original: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """Every metric of the tasks asked for, of two models; of a group that has a score of its own that score."""
    out = []
    for name in _shown(tasks):
        new, old = changed["results"][name], original["results"][name]
        children = (
            [task.task_name for task in tasks.loaded.get("groups", {})[name].get_all_tasks()]
            if name not in tasks.tasks
            else [name]
        )
        counts = [changed["n-samples"][child] for child in children]
        for key in (k for k in new if "," in k and not k.partition(",")[0].endswith("_stderr")):
            metric, _, kind = key.partition(",")
            lost, gained = _moved(children, metric, kind, changed["samples"], original["samples"])
            out.append(
                TaskScore(
                    task=name,
                    metric=metric if kind == "none" else f"{metric} ({kind})",
                    value=_number(new[key]),
                    reference=_number(old[key]),
                    error=_number(new.get(f"{metric}_stderr,{kind}")),
                    reference_error=_number(old.get(f"{metric}_stderr,{kind}")),
                    documents=sum(count["effective"] for count in counts),
                    limited=any(count["effective"] < count["original"] for count in counts),
                    fewshot=max(int(tasks.tasks[child].config.num_fewshot or 0) for child in children),
                    version=str(changed["versions"].get(name, "")),
                    higher_is_better=changed["higher_is_better"].get(name, {}).get(metric),
                    lost=lost,
                    gained=gained,
                )
            )
    return tuple(out)


def _moved(children: Sequence[str], metric: str, kind: str, new: Any, old: Any) -> tuple[int | None, int | None]:
    """(right to wrong, wrong to right), where each document is one or the other."""
    lost = gained = 0
    for child in children:
        values = [{s["doc_id"]: s.get(metric) for s in samples[child] if s["filter"] == kind} for samples in (new, old)]
        now, before = values
        if now.keys() != before.keys() or any(v not in (0, 1) for found in values for v in found.values()):
            return None, None
        lost += sum(bool(before[i] > now[i]) for i in now)
        gained += sum(bool(now[i] > before[i]) for i in now)
    return lost, gained


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, numbers.Real) and math.isfinite(value) else None


def _shown(tasks: TaskSet) -> list[str]:
    """The groups and tasks that a reader asked for by name; of groups without a score, and of tags, what is in them."""
    groups = tasks.loaded.get("groups", {})
    inside = {child for group in groups.values() for child in group.child_names}
    out: list[str] = []

    def visit(name: str) -> None:
        if name in tasks.tasks or groups[name].has_aggregation:
            out.append(name)
        else:
            for child in groups[name].child_names:
                visit(child)

    for name in [*groups, *tasks.tasks]:
        if name not in inside:
            visit(name)
    return out


# Finding tasks


def _manager(names: Sequence[str], folder: str | Path | None, index: bool) -> TaskManager:
    """Reading the index of lm-eval's own tasks takes seconds, so it is left out where the folder has all that is asked for."""
    if not names or not all(names):
        raise InputError("a task has no name", expected="names divided by commas", fix=f"look for one: {_LISTED}")
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
    if index and not all(name in manager.all_subtasks for name in names):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.task_index:
            unknown(name, manager.all_tasks)
    return manager


def unknown(name: str, known: Sequence[str]) -> NoReturn:
    """Raises InputError with the nearest names."""
    near = difflib.get_close_matches(name, known, 3, 0.7)
    fix = f"did you mean {' or '.join(near)}?" if near else f"look for it: {_LISTED}"
    raise InputError(f"there is no task {name!r}", expected="a task, group or tag of lm-eval or of --task-folder", fix=fix)


def _leaves(manager: TaskManager, name: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The tasks of the index in a group or tag."""
    entry = manager.task_index.get(name)
    if entry is None or name in above:
        return
    members = (entry.cfg or {}).get("task")
    if isinstance(members, list):
        for member in members:
            named = member if isinstance(member, str) else member.get("group") or member.get("task")
            if isinstance(named, str):
                yield from _leaves(manager, named, (*above, name))
    elif entry.yaml_path is None and entry.cfg is None:
        for member in sorted(entry.tags):
            yield from _leaves(manager, member, (*above, name))
    else:
        yield name


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    """What can be known before the data set is loaded. Raises InputError."""
    if (kind := config.get("output_type", "generate_until")) not in KINDS:
        _not_ours(name, str(kind))
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        _not_ours(name, "images or sound")
    if config.get("unsafe_code"):
        _foreign(name, "runs what the model writes")
    if (config.get("dataset_kwargs") or {}).get("trust_remote_code"):
        _foreign(name, "loads its data with code from the Hub")
    if config.get("process_results") is None:
        for row in config.get("metric_list") or ():
            metric = str(row.get("metric"))
            if not metric.startswith("/") and (
                row.get("hf_evaluate") or metric not in METRIC_REGISTRY
            ):  # "/": the task's own code
                _foreign(name, f"computes {metric} with code from the Hub")


def _not_ours(name: str, kind: str) -> NoReturn:
    raise InputError(
        f"the task {name} asks for {kind}", expected=f"a task of text: {', '.join(KINDS)}", fix="choose another task"
    )


def _foreign(name: str, what: str) -> NoReturn:
    raise InputError(
        f"the task {name} {what}",
        expected="a task that runs no foreign code",
        fix="run it with lm-eval itself, in a place that can be thrown away",
    )


def _refuse(names: Sequence[str], error: Exception) -> NoReturn:
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    asked = f"the task{'s' if len(names) > 1 else ''} {', '.join(names)}"
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if any(isinstance(e, ConnectionError) or type(e).__name__ in _AWAY for e in chain):
        from huggingface_hub import constants

        raise InputError(
            f"{asked}: the data set is neither in the cache nor can it be downloaded ({said})",
            expected="a data set that was downloaded before, or a connection",
            fix="unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else f"check the connection to {constants.ENDPOINT}",
        ) from error
    raise InputError(
        f"{asked} cannot be loaded: {type(error).__name__}: {said}",
        expected="a task that lm-eval can load",
        fix="check its YAML and its data: MOESTRO_LOG=debug shows where it stopped",
    ) from error


_AWAY = (
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "ConnectError",
    "ConnectTimeout",
)  # of huggingface_hub and its HTTP client


# Asking them


def _reseed(tasks: TaskSet) -> None:
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=_SEED)


def _build(tasks: TaskSet) -> None:
    """Write every request once, so that what is wrong with a task is known before a model is opened. Raises InputError."""
    _reseed(tasks)
    for name, task in tasks.tasks.items():
        try:
            with redirect_stdout(sys.stderr):
                task.build_all_requests(limit=tasks.limit, rank=0, world_size=1)
        except Exception as error:  # templates, examples and a task's own code can fail in any way
            _refuse([name], error)


@contextmanager
def without_pool() -> Iterator[None]:
    """Within, lm-eval computes bootstrapped errors in this process, not in forks of it with all that the model holds."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
