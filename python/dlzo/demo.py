"""The demo: a model's answers on sentences of our own, before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.scoring import Scorer
from dlzo.tasks import Example, get_task, load_split

SHOWN = 10  # sentences in the table


@contextmanager
def demo_data() -> Iterator[Path]:
    """The folder of the sentiment set that the package ships, in the form of SST-2."""
    with as_file(files("dlzo") / "data" / "demo") as folder:
        yield folder


def shown_examples() -> list[Example]:
    """The test sentences that the table shows."""
    with demo_data() as folder:
        return load_split(get_task("sst2"), folder, "test")[:SHOWN]


def probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[float]:
    """The model's probability of each example's last option, among its options."""
    scorer = Scorer(model, tokenizer)
    return scorer.scores(scorer.plan(scorer.encode(examples)))[0].softmax(dim=-1)[:, -1].tolist()


def before_and_after(
    examples: Sequence[Example], before: Sequence[float], after: Sequence[float]
) -> Table:
    """Sentence by sentence: the truth, and the two probabilities of "great", wrong ones in red."""
    table = Table(title='Probability of "great" against "terrible"')
    table.add_column("test sentence")
    table.add_column("truth")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for example, *shares in zip(examples, before, after, strict=True):
        cells = [
            f"[{'green' if (share > 0.5) == bool(example.gold) else 'red'}]{share:.2f}[/]"
            for share in shares
        ]
        sentence = example.prompt.removesuffix(" It was")
        table.add_row(sentence, example.options[example.gold].strip(), *cells)
    return table
