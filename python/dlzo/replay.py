"""Weights from a journal: what was tuned, bit for bit, from the base model and recorded steps."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from transformers import PreTrainedModel

from dlzo.adapter import WEIGHTS_FILE, save_adapter
from dlzo.errors import UserError
from dlzo.files import user_path
from dlzo.header import adapter_info, fitting_target
from dlzo.journal import Reader
from dlzo.models import sole_use
from dlzo.rule import rule_in
from dlzo_kernels import release


def check_replay(
    journal: str | Path, out: str | Path, until: int | None = None
) -> tuple[Reader, int]:
    """What can be told of a replay without a model.

    Returns:
        The journal's reader, which has read to the end, and the last step to take.

    Raises:
        UserError: there is no such journal or step, or `out` holds an adapter.
    """
    reader = Reader(user_path(journal))
    if (user_path(out) / WEIGHTS_FILE).exists():
        raise UserError(f"{str(out)!r} holds an adapter: choose another folder")
    for _ in reader:
        pass
    until = reader.last if until is None else until
    if not 0 <= until <= reader.last:
        raise UserError(
            f"step {until} is not in journal {str(journal)!r}, which has {reader.last} steps"
        )
    return reader, until


def replay(
    model: PreTrainedModel, journal: str | Path, out: str | Path, *, until: int | None = None
) -> Reader:
    """Rebuilds in `model` what the run tuned and writes it as an adapter to the folder `out`.

    Args:
        model: the base model of the run.
        journal: of the run, compact or not.
        out: folder of the adapter.
        until: the last step to take, from 0; the journal's last one if None.

    Returns:
        The journal's reader: its `damage` says what a damaged tail has lost.

    Raises:
        UserError: the journal is of another model, layer, dtype or noise version, or has not so
            many steps, `out` holds an adapter or cannot be made, or the model is in training: model
            and files are as they were; or the disk is full at the end.
    """
    reader, until = check_replay(journal, out, until)
    folder = user_path(out)
    header, rule = reader.header, rule_in(reader)
    with sole_use(model), ExitStack() as stack:
        target = stack.enter_context(fitting_target(reader, model).undone_by_error())
        stack.callback(release, target.modules)  # masters take four bytes a weight
        try:
            folder.mkdir(parents=True, exist_ok=True)  # fails, if at all, before a weight moves
            rule.replay(target.modules, islice(Reader(reader.path).steps(), until))
            save_adapter(
                folder,
                target,
                base_fingerprint=header.base_fingerprint,
                info=adapter_info(header, until),
            )
        except OSError as error:
            raise UserError(f"{str(folder)!r} cannot be written: {error}") from error
    return reader
