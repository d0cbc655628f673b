"""Tasks: how the rows of a data set become prompts with options, and what they are judged by.

`task` says what a task is, `mezo` has the nine of dlzo's own, `described` reads one from a YAML
file, `known` finds them by name, `data` reads their rows, `hub` fetches public data sets.
"""

from dlzo.tasks.data import Split, check_folder, fingerprint, load_split, load_splits
from dlzo.tasks.known import absolute_task, get_task, register
from dlzo.tasks.task import Example, Field, Metric, Task, TrainingLoss, answers, label, texts

__all__ = [
    "Example",
    "Field",
    "Metric",
    "Split",
    "Task",
    "TrainingLoss",
    "absolute_task",
    "answers",
    "check_folder",
    "fingerprint",
    "get_task",
    "label",
    "load_split",
    "load_splits",
    "register",
    "texts",
]
