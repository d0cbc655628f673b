"""What a run has made, in a form to hand on: what it tuned, the whole model, or the journal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError

from dlzo.adapter import PEFT_FILE, WEIGHTS_FILE, load_adapter, read_config
from dlzo.errors import UserError
from dlzo.files import new_folder, user_path
from dlzo.lora import take_out
from dlzo.models import load_model, parse_dtype, quiet_transformers
from dlzo.run import JOURNAL_FILE, model_name, read_metrics, read_settings
from dlzo.target import describe

Form = Literal["adapter", "model", "journal"]
CARD_FILE = "README.md"

_CARD = """---
library_name: dlzo
base_model: {quoted_model}
tags: [dlzo, zeroth-order]
---

# {base_model}, tuned on {task}

{what}

Tuned by forward passes only: {tuned} of {base_model} ({dtype}), on {task}; method {method}, lr
{lr:g}, eps {eps:g}, batch size {batch_size}, seed {seed}. The weights are those after step {step},
which had the lowest validation loss.

{figures}

## Use

{use}
"""
_WHAT = {
    "adapter": "What was tuned, alone, as safetensors.",
    "model": "The whole model, tuned.",
    "merged": """The whole model, tuned: the LoRA adapters were added to its weights and the sums
rounded to {dtype}; the figures are those of the adapters beside the weights, unrounded.""",
    "journal": "The steps of the run, from which the tuned weights are rebuilt bit for bit.",
}
_USE = {
    "adapter": """```python
model, tokenizer = dlzo.load_model("{base_model}", dtype=torch.{dtype})
dlzo.load_adapter(model, "FOLDER OR HUB ID")
```""",
    "LoRA": """```python
model = PeftModel.from_pretrained(model, "FOLDER OR HUB ID")  # or dlzo.load_adapter
```""",
    "model": """```python
model = AutoModelForCausalLM.from_pretrained("FOLDER OR HUB ID", dtype=torch.{dtype})
```""",
    "journal": """```bash
dlzo replay {base_model} journal.zo --until {step} --out adapter
```""",
}


def export(run: str | Path, out: str | Path, form: Form = "adapter") -> None:
    """Writes the best weights of a run, finished or not, with a model card, to a new folder.

    Args:
        run: folder of the run.
        out: folder to make.
        form: "adapter": what was tuned, for `load_adapter`. "model": the whole model, by
            `save_pretrained`. "journal": the journal alone.

    Raises:
        UserError: the form is not known, the folder holds no run or no adapter, or `out` exists or
            cannot be written.
    """
    run, out = user_path(run), user_path(out)
    if form not in get_args(Form):
        raise UserError(f"form {form!r} is not known: choose one of {', '.join(get_args(Form))}")
    if out.exists():
        raise UserError(f"{str(out)!r} exists: choose another folder")
    read_settings(run)  # a replayed adapter need not have the best weights, as the card says
    config = read_config(run)
    try:
        with new_folder(out) as stage:
            if form == "adapter":
                shutil.copyfile(run / WEIGHTS_FILE, stage / WEIGHTS_FILE)
                config = read_config(stage)  # while it runs, the run may have replaced its own
                if "lora" in config:
                    shutil.copyfile(run / PEFT_FILE, stage / PEFT_FILE)
            elif form == "journal":
                shutil.copyfile(run / JOURNAL_FILE, stage / JOURNAL_FILE)
            else:
                config = _save_merged(run, stage)
            (stage / CARD_FILE).write_text(_card(config, form, run), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(out)!r} cannot be written: {error}") from error


def _save_merged(run: Path, folder: Path) -> dict[str, Any]:
    """Saves the model with what is tuned in it; the configuration of that."""
    settings = read_settings(run)
    name = model_name(settings, run, "use `load_adapter` and the model's own `save_pretrained`")
    model, tokenizer = load_model(name, dtype=parse_dtype(settings["dtype"]))
    if "lora" in (config := load_adapter(model, run)):
        take_out(model, merge=True)
    with quiet_transformers(every_bar=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return config


def _card(config: Mapping[str, Any], form: Form, run: Path) -> str:
    base = config["base_model"] or "unknown"
    if Path(base).exists():
        base = Path(base).resolve().name  # the folder that it lay in says nothing elsewhere
    quoted = json.dumps(base, ensure_ascii=False)  # YAML takes it as it is, whatever is in it
    fields = {**config, "base_model": base, "quoted_model": quoted, "tuned": describe(config)}
    lora = "lora" in config
    what = _WHAT["merged" if form == "model" and lora else form]
    use = _USE["LoRA" if form == "adapter" and lora else form]
    try:
        texts = {"what": what.format(**fields), "use": use.format(**fields)}
        return _CARD.format(**fields, **texts, figures=_figures(run))
    except KeyError as error:
        raise UserError(f"the adapter in {str(run)!r} does not say its {error}") from error


def _figures(run: Path) -> str:
    """A table of the run's evaluations."""
    metrics = read_metrics(run)
    if metrics is None:
        return "The run was not finished."
    names = list(metrics["test"])
    rows = [["", "split", *names], ["---"] * (2 + len(names))]
    for name, split, key in (
        ("untuned", "test", "zero_shot"),
        ("tuned", "test", "test"),
        ("tuned", "validation", "best"),
    ):
        # Validation generates no answers, and so has fewer figures.
        found = metrics[key]
        rows.append([name, split, *(json.dumps(found.get(figure)) for figure in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
