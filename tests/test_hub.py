"""Public data sets, from folders laid out as the repositories on the hub are."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dlzo.errors import UserError
from dlzo.files import cache_dir
from dlzo.tasks import get_task, hub, load_split
from dlzo.tasks.hub import SOURCES, public_data
from rows import EXAMPLES, ROWS

datasets = pytest.importorskip("datasets", reason="the extra datasets is not installed")

# As on the hub: labels are classes, and there boolq has a boolean answer.
LABELS = {"sst2": 2, "rte": 2, "cb": 3, "wsc": 2, "copa": 2, "multirc": 2}
HUB_ROWS = {
    **ROWS,
    "boolq": {"passage": "Salt -- It dissolves.", "question": "does salt dissolve", "answer": True},
}
SIZES = {"sst2": (1700, 1100), "cb": (250, 56), "copa": (400, 100), "wsc": (554, 104)}


def write_repository(root, source, task):
    """Two splits in parquet; the train split's rows are numbered from 0, the test's from 10,000."""
    source = replace(source, path=str(root / source.path))
    folder, config = root / source.path, source.config or "default"
    features = datasets.Dataset.from_list([{**HUB_ROWS[task], "idx": 0}]).features
    if task in LABELS:
        features["label"] = datasets.ClassLabel(num_classes=LABELS[task])
    files = []
    for split, size, first in zip(
        ("train", "validation"), SIZES.get(task, (700, 20)), (0, 10_000), strict=True
    ):
        rows = [{**HUB_ROWS[task], "idx": first + i} for i in range(size)]
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
        files.append(f"  - split: {split}\n    path: {config}/{split}-*\n")
    card = folder / "README.md"
    known = card.read_text() if card.exists() else "---\nconfigs:\n---\n"
    entry = f"- config_name: {config}\n  data_files:\n{''.join(files)}---\n"
    card.write_text(known.removesuffix("---\n") + entry)
    return source


def test_the_names_are_those_of_the_hub():
    assert {task: (source.path, source.config) for task, source in SOURCES.items()} == {
        "sst2": ("nyu-mll/glue", "sst2"),
        "rte": ("aps/super_glue", "rte"),
        "cb": ("aps/super_glue", "cb"),
        "boolq": ("google/boolq", None),
        "wsc": ("aps/super_glue", "wsc.fixed"),
        "copa": ("aps/super_glue", "copa"),
        "multirc": ("aps/super_glue", "multirc"),
        "squad": ("rajpurkar/squad", None),
        "drop": ("ucinlp/drop", None),
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return {task: write_repository(root, source, task) for task, source in SOURCES.items()}


@pytest.fixture(autouse=True)
def here(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SOURCES", sources)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("DLZO_CACHE", str(tmp_path / "cache"))


def numbers(folder, split):
    return [json.loads(line)["idx"] for line in (folder / f"{split}.jsonl").open()]


@pytest.mark.parametrize("task", SOURCES)
def test_the_rows_of_the_hub_are_those_of_the_task(task):
    folder = public_data(task)
    for split in ("train", "validation", "test"):
        found = load_split(get_task(task), folder, split)
        assert Counter(found) == Counter([EXAMPLES[task]] * len(found))


@pytest.mark.parametrize(
    ("task", "sizes"),
    [
        ("sst2", (1000, 500, 1000)),
        ("cb", (150, 100, 56)),
        ("copa", (300, 100, 100)),
        ("wsc", (54, 500, 104)),
    ],
)
def test_splits_are_mezos(task, sizes):
    folder = public_data(task)
    train, validation, test = (numbers(folder, s) for s in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == sizes
    before = np.random.get_state()
    np.random.seed(0)
    drawn = np.random.permutation(SIZES[task][0])[: 1000 + sizes[1]].tolist()
    np.random.seed(0)
    judged = np.random.permutation(SIZES[task][1])[:1000] + 10_000
    np.random.set_state(before)
    assert train + validation == drawn
    assert test == judged.tolist()


def test_a_data_set_is_fetched_once(sources, monkeypatch):
    folder = public_data("rte")
    assert folder == cache_dir() / "data" / "rte"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert public_data("rte") == folder
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"pip install 'dlzo-kernels\[datasets\]'.*--data"):
        public_data("rte")
    assert not folder.exists()


def test_what_cannot_be_fetched_is_one_sentence(sources, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setitem(hub.SOURCES, "rte", hub.Source(str(tmp_path / "empty")))
    with pytest.raises(UserError, match=r"'.*empty' cannot be fetched .*--data") as caught:
        public_data("rte")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(hub.SOURCES, "rte", replace(sources["cb"], validation=250))
    with pytest.raises(UserError, match="has 250 training rows, and 250 are for validation"):
        public_data("rte")
    assert [path.name for path in (cache_dir() / "data").iterdir()] == ["rte.lock"]


@pytest.mark.parametrize("error", [RuntimeError, ConnectionError, KeyError])
def test_any_error_of_the_libraries_is_one_sentence(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error("no route\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"'.*glue' cannot be fetched .*no route.*: check the net"):
        public_data("sst2")


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DLZO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/data' cannot be written.*DLZO_CACHE"):
        public_data("rte")


def test_only_dlzos_own_tasks_have_public_data(tmp_path):
    with pytest.raises(UserError, match="'sst3' is not known"):
        public_data("sst3")
    task = tmp_path / "mine.yaml"
    task.write_text('name: mine\nprompt: "{a} "\noptions: [b, c]\nlabel: d\n')
    with pytest.raises(UserError, match=r"mine\.yaml' has no public data set.*--data"):
        public_data(str(task))
