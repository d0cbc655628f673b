"""Which tasks there are, by their names."""

from __future__ import annotations

from pathlib import Path

from dlzo.errors import UserError
from dlzo.files import user_path
from dlzo.tasks import mezo
from dlzo.tasks.described import SUFFIXES, read_task
from dlzo.tasks.task import Task

_OWN = {task.name: task for task in mezo.TASKS}
_registered: dict[str, Task] = {}


def register(task: Task) -> None:
    """Makes a task known to this process by its name, in place of an earlier one of that name.

    Raises:
        UserError: it has the name of a task of dlzo's own, or that of a YAML file.
    """
    if task.name in _OWN or task.name.endswith(SUFFIXES):
        raise UserError(f"task name {task.name!r} is taken: choose another one")
    _registered[task.name] = task


def get_task(name: str | Path) -> Task:
    """The task of a name, or the one that a YAML file describes.

    Raises:
        UserError: there is no such task, or the file is not valid.
    """
    name = str(name)
    if name.endswith(SUFFIXES):
        task = read_task(name)
        if task.name in _OWN:
            raise UserError(f"task file {name!r}: key 'name' is {task.name!r}, which is taken")
        return task
    tasks = _OWN | _registered
    if name not in tasks:
        raise UserError(
            f"task {name!r} is not known: choose one of {', '.join(sorted(tasks))}, give a .yaml "
            "file that describes it, or `dlzo.tasks.register` it"
        )
    return tasks[name]


def absolute_task(name: str) -> str:
    """A task's name as it holds from any folder."""
    return str(user_path(name).resolve()) if name.endswith(SUFFIXES) else name
