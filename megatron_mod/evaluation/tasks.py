"""lm-eval tasks, from local files or its own collection, on a backend."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from megatron_mod.config.evaluation import Request
from megatron_mod.evaluation.backend import CAUSAL, TOP_K, Backend
from megatron_mod.evaluation.lm_eval_model import BackendLM

BOOTSTRAP = 100_000  # lm-eval's own; only for metrics without a formula for their error


def evaluate_tasks(
    backend: Backend, manager: TaskManager, request: Request, *, is_first_rank: bool
) -> dict:
    """lm-eval's results of the request's tasks, which ``find_tasks`` found; called by all ranks.

    A machine's first rank gets them, the others nothing.

    Raises:
        ValueError: a task whose data cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        found = simple_evaluate(
            model=BackendLM(backend),
            tasks=list(request.tasks),
            task_manager=manager,
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            apply_chat_template=request.apply_chat_template,
            bootstrap_iters=BOOTSTRAP if is_first_rank else 0,
            log_samples=False,
        )
        return found or {}
    except OSError as error:
        raise ValueError(
            f"--tasks {' '.join(request.tasks)}: data cannot be read: {error} (Nothing is "
            "downloaded; paths in a task's file are relative to the working directory.)"
        ) from error


def find_tasks(request: Request) -> TaskManager:
    """lm-eval's index, in which all tasks of the request are.

    Its own collection, which takes long to read, is left out if the files of ``include_path``
    have them all.

    Raises:
        ValueError: no such folder, an unknown task (with the nearest names), examples for a task
            that allows none, or one that generates where a selection needs the whole text.
    """
    folder = request.include_path
    if folder is not None:
        if not Path(folder).is_dir():
            raise ValueError(f"--include_path {folder}: no such folder.")
        manager = TaskManager(include_path=folder, include_defaults=False)
    if folder is None or not set(request.tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=folder)
    for name in request.tasks:
        if name not in manager.all_tasks:
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.0)
            raise ValueError(
                f"--tasks: unknown task {name!r}; did you mean {', '.join(map(repr, nearest))}?"
            )
        settings = manager.task_index[name].cfg or {}
        if request.num_fewshot and settings.get("num_fewshot") == 0:
            raise ValueError(
                f"--num_fewshot {request.num_fewshot}: the file of task {name!r} fixes 0, and "
                "lm-eval would ignore another number; change the file, or leave the option out."
            )
        if request.selection == TOP_K and (generating := generating_tasks(manager, name)):
            raise ValueError(
                f"--selection {TOP_K}: task {generating[0]!r} generates, and a text that is being "
                "generated has no later tokens to choose among; leave it out, or give --selection "
                f"{CAUSAL}."
            )
    return manager


def generating_tasks(manager: TaskManager, name: str) -> list[str]:
    """The tasks under a name, also of a group or tag, whose files say that they generate."""
    entry = manager.task_index.get(name)
    if entry is None:
        return []
    config = entry.cfg or {}
    if name in manager.all_groups or name in manager.all_tags:
        below = config.get("task") if name in manager.all_groups else entry.tags
        parts = [part for part in below or () if isinstance(part, str)]
        return [found for part in parts for found in generating_tasks(manager, part)]
    return [name] if config.get("output_type") == "generate_until" else []
