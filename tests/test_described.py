"""Tasks of the user's own: described in YAML, or registered."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dlzo import header
from dlzo.errors import UserError
from dlzo.evaluation import evaluate
from dlzo.journal import Reader
from dlzo.sensitivity import sensitivity
from dlzo.tasks import Example, Task, get_task, label, load_split, register, texts
from dlzo.trainer import resume, train
from runs import CONFIG, TOKENIZER, result, stopping_at, write_data
from tiny import tiny_model

FIXED = """
name: headlines
prompt: "{title} ({year}) is about"
options: [" sport", " the arts"]
label: topic
"""
OF_THE_ROW = """
name: two-choices
prompt: "{question.stem}\\nAnswer:"
options: [" {a}", " {b}, or {{b}}"]
label: right
loss: gold
"""
LISTED = """
name: endings
prompt: "{start}"
options: " {choices.text}."
label: right
"""
GENERATED = """
name: capitals
prompt: "What is the capital of {country}?\\nAnswer:"
answers: capital
"""
# sst2 in ten lines of YAML and less.
SENTIMENT = """
name: sentiment
prompt: "{sentence} It was"
options: [" terrible", " great"]
label: label
"""


def write(folder, text, name="task.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def example(folder, text, row):
    task = get_task(write(folder, text))
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    return task, *load_split(task, folder, "train")


@pytest.mark.parametrize("topic", [1, "the arts", " the arts"])
def test_fixed_options_and_a_label_by_index_or_text(tmp_path, topic):
    task, found = example(tmp_path, FIXED, {"title": "Song", "year": 1999, "topic": topic})
    assert found == Example("Song (1999) is about", (" sport", " the arts"), 1)
    assert (task.name, task.loss, task.metric) == ("headlines", "options", "accuracy")
    assert get_task(tmp_path / "task.yaml").name == "headlines"


def test_options_of_the_row(tmp_path):
    row = {"question": {"stem": "Who?"}, "a": "Tom", "b": "Ann", "right": 0}
    task, found = example(tmp_path, OF_THE_ROW, row)
    assert found == Example("Who?\nAnswer:", (" Tom", " Ann, or {b}"), 0)
    assert (task.loss, task.metric) == ("gold", "accuracy")


def test_options_from_a_list_in_the_row(tmp_path):
    row = {"start": "He {ran}", "choices": {"text": ["away", "home", "it"]}, "right": 2}
    assert example(tmp_path, LISTED, row)[1] == Example("He {ran}", (" away.", " home.", " it."), 2)


@pytest.mark.parametrize("capital", ["Bern", ["Bern", "Berne"]])
def test_a_generated_answer(tmp_path, capital):
    task, found = example(tmp_path, GENERATED, {"country": "Switzerland", "capital": capital})
    answers = ("Bern", "Berne") if isinstance(capital, list) else ("Bern",)
    prompt = "What is the capital of Switzerland?\nAnswer:"
    assert found == Example(prompt, (" Bern\n",), 0, answers)
    assert (task.loss, task.metric) == ("gold", "f1")
    after_space = GENERATED.replace("Answer:", "")
    assert example(tmp_path, after_space, {"country": "C", "capital": capital})[1].options == (
        "Bern\n",
    )


@pytest.mark.parametrize("capital", ["Bern\nBerne", ["Bern", "Ber\n"]])
def test_an_answer_of_more_than_a_line_is_refused(tmp_path, capital):
    with pytest.raises(UserError, match="'capital' must be a line of text, or a list of one"):
        example(tmp_path, GENERATED, {"country": "Switzerland", "capital": capital})


def test_words_that_yaml_takes_for_values_stay_words(tmp_path):
    text = 'name: t\nprompt: "{q}? "\noptions: [Yes, No, 1, null, 2020-01-01]\nlabel: y\n'
    found = example(tmp_path, text, {"q": "Is it", "y": "No"})[1]
    assert found.options == ("Yes", "No", "1", "null", "2020-01-01") and found.gold == 1


def changed(text, **changes):
    values = {**yaml.load(text, Loader=yaml.BaseLoader), **changes}
    return yaml.safe_dump({key: value for key, value in values.items() if value is not None})


BAD = {
    "no mapping": ("- a\n- b\n", "it has no keys"),
    "empty": ("", "it has no keys"),
    "no YAML": ("name: [", r"not valid YAML \(line 1"),
    "tab": ("name: a\n\tprompt: b", "not valid YAML.*line 2"),
    "deep": ("[" * 10_000, "nested too deep"),
    "not UTF-8": (b"name: caf\xe9", "not UTF-8"),
    "control character": (b"name: \x00", "not valid YAML"),
    "large": (b"#" * (1 << 20) + b"#", "larger than 1048576 bytes"),
    "a key twice": (FIXED + "label: other\n", "a key is there twice"),
    "unknown key": (changed(FIXED, metric="f1"), "key 'metric' is not known: choose from name"),
    "no name": (changed(FIXED, name=None), "key 'name' is missing"),
    "name": (changed(FIXED, name="a/b"), "task name 'a/b': give up to 60 letters"),
    "name of ours": (changed(FIXED, name="rte"), "key 'name' is 'rte', which is taken"),
    "no prompt": (changed(FIXED, prompt=None), "key 'prompt' is missing"),
    "prompt": (changed(FIXED, prompt=["a"]), "key 'prompt' holds no text"),
    "constant prompt": (changed(FIXED, prompt="a"), "key 'prompt' has no {field}"),
    "brace": (changed(FIXED, prompt="{a} {"), "key 'prompt': .*write it twice"),
    "nameless field": (changed(FIXED, prompt="{}"), "key 'prompt': {} is no field"),
    "attribute": (changed(FIXED, prompt="{a!r}"), "key 'prompt': {a} is no field"),
    "format": (changed(FIXED, prompt="{a:>9}"), "key 'prompt': {a} is no field"),
    "index": (changed(FIXED, prompt="{a[0]}"), r"key 'prompt': {a\[0\]} is no field"),
    "no options": (changed(FIXED, options=None), "key 'options' must be a list"),
    "one option": (changed(FIXED, options=["a"]), "key 'options' must be a list of two"),
    "the same options": (changed(FIXED, options=[" a", " b", " a "]), "option ' a' is there twice"),
    "options": (changed(FIXED, options=["a", ["b"]]), r"key 'options\[1\]' holds no text"),
    "text as options": (changed(FIXED, options="a"), "key 'options' is one text"),
    "option's brace": (changed(FIXED, options=["a", "}"]), r"key 'options\[1\]': "),
    "half a pair": (SENTIMENT.replace("It was", "\\ud83d"), "key 'prompt' holds half of a"),
    "no label": (changed(FIXED, label=None), "key 'label' is missing"),
    "loss": (changed(FIXED, loss="hinge"), "loss 'hinge' of task 'headlines': choose options"),
    "both": (changed(FIXED, answers="a"), "key 'options' does not go with 'answers'"),
    "loss of answers": (changed(GENERATED, loss="gold"), "key 'loss' does not go with"),
    "answers": (changed(GENERATED, answers=["a"]), "key 'answers' holds no text"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_with_its_name_and_the_key(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=rf"(?s)^task file '{path}': .*{says}") as caught:
        get_task(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.yml.*cannot be read \(No such file"):
        get_task(str(tmp_path / "no.yml"))


ROW = {"title": "a", "year": 1, "topic": 0}
BAD_ROWS = {
    "missing": (FIXED, {"title": "a", "topic": 0}, "no field 'year', which task 'headlines'"),
    "value": (FIXED, {**ROW, "title": None}, "'title' must be a string or an integer, not null"),
    "label": (FIXED, {**ROW, "topic": True}, "'topic' must be an integer or a string, not true"),
    "too high": (FIXED, {**ROW, "topic": 2}, "'topic' must be an integer from 0 to 1 .*, not '2'"),
    "negative": (FIXED, {**ROW, "topic": -1}, "from 0 to 1"),
    "no option": (FIXED, {**ROW, "topic": "s"}, r"one option \('sport', 'the arts'\), not 's'"),
    "glued": (
        FIXED.replace('" sport"', "sport"),
        ROW,
        "option 'sport' follows .*is about' without a space: begin .* as in ' sport'",
    ),
    "no object": (OF_THE_ROW, {"question": "Who?"}, r"no field 'question\.stem'"),
    "twice": (
        OF_THE_ROW.replace(", or {{b}}", ""),
        {"question": {"stem": "?"}, "a": "A", "b": "A ", "right": 0},
        "option ' A' is there twice",
    ),
    "a label of two": (
        OF_THE_ROW.replace(", or {{b}}", ""),
        {"question": {"stem": "?"}, "a": "A", "b": " A", "right": "A"},
        "text of one option",
    ),
    "no list": (LISTED, {"start": "a", "choices": {"text": "b"}, "right": 0}, "must be a list"),
    "short list": (LISTED, {"start": "a", "choices": {"text": ["b"]}, "right": 1}, "from 0 to 0"),
    "answers": (
        GENERATED,
        {"country": "a", "capital": []},
        "'capital' must be a line of text, or a",
    ),
}


@pytest.mark.parametrize(("text", "row", "says"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_does_not_fit_is_refused_with_its_line(tmp_path, text, row, says):
    with pytest.raises(UserError, match=rf"train\.jsonl' line 1.*{says}"):
        example(tmp_path, text, row)


def test_nothing_in_a_file_is_executed(tmp_path):
    made = tmp_path / "made"
    call = f"!!python/object/apply:os.mkdir ['{made}']"
    with pytest.raises(UserError):
        get_task(write(tmp_path, f"name: {call}\n"))
    row = {**ROW, "title": "{topic} {0.__class__}"}
    assert example(tmp_path, FIXED, row)[1].prompt.startswith("{topic} {0.__class__} (1)")
    assert not made.exists()


TEXTS = st.text(max_size=8) | st.sampled_from(["{a}", "{a.b}", " x", "{", "}}", "label", "options"])
VALUES = st.recursive(
    TEXTS | st.none() | st.integers() | st.floats(),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(TEXTS, value, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["name", "prompt", "options", "label", "answers", "loss"])
FILES = (
    st.binary()
    | st.text().map(str.encode)
    | (st.dictionaries(KEYS, VALUES) | VALUES).map(yaml.safe_dump).map(str.encode)
    | st.tuples(KEYS, VALUES).map(lambda change: changed(FIXED, **dict([change])).encode())
    | st.tuples(st.integers(0, len(FIXED)), st.binary(max_size=4)).map(
        lambda cut: FIXED.encode()[: cut[0]] + cut[1] + FIXED.encode()[cut[0] :]
    )
)


@given(FILES, st.dictionaries(st.sampled_from(["title", "year", "topic", "a"]), VALUES))
def test_any_bytes_are_a_task_or_an_error_that_names_the_file(tmp_path_factory, content, row):
    folder = tmp_path_factory.getbasetemp()
    path = write(folder, content)
    (folder / "test.jsonl").write_text(json.dumps({**ROW, **row}))
    try:
        task = get_task(path)
    except UserError as error:
        assert str(error).startswith(f"task file '{path}': ")
        return
    try:
        (found,) = load_split(task, folder, "test")
    except UserError as error:
        assert "test.jsonl" in str(error)
    else:
        assert 0 <= found.gold < len(found.options)


SHORT = replace(CONFIG, steps=4, eval_every=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("task") / "data")


def test_a_described_task_gives_the_bits_of_the_same_task_of_ours(data, tmp_path, monkeypatch):
    task = write(tmp_path, SENTIMENT)
    ours = train(tiny_model(), TOKENIZER, SHORT, data, tmp_path / "ours")
    monkeypatch.chdir(tmp_path)
    config = replace(SHORT, task="task.yaml")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, config, data, "out", on_progress=stopping_at(2))
    # A path holds from any folder, and what does not change the task changes nothing.
    monkeypatch.chdir(data)
    write(tmp_path, SENTIMENT + "# Ready.\n")
    model = tiny_model()
    theirs = resume(model, TOKENIZER, tmp_path / "out")
    assert theirs["history"] == ours["history"] and theirs["task"] == "sentiment"
    assert theirs["test"] == evaluate(model, TOKENIZER, task, data)
    settings = Reader(tmp_path / "out" / "journal.zo").header.settings
    assert [settings[name] for name in ("task", "loss", "metric")] == [
        "sentiment",
        "options",
        "accuracy",
    ]
    report = sensitivity(
        tiny_model(), TOKENIZER, task, data, layers=[1], seeds=2, batches=2, batch_size=8
    )
    assert report.task == "sentiment"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (("It was", "It is"), "its data fingerprint is"),
        ((" great", " fine"), "its data fingerprint is"),
        (("name: sentiment", "name: mood"), "its task is sentiment, not mood"),
        (("label: label", "label: label\nloss: gold"), "its loss is options, not gold"),
    ],
    ids=["prompt", "option", "name", "loss"],
)
def test_a_run_is_not_resumed_with_an_edited_task(data, tmp_path, edit, says):
    out, task = tmp_path / "out", write(tmp_path, SENTIMENT)
    config = replace(SHORT, task=task)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, config, data, out, on_progress=stopping_at(2))
    before = (out / "journal.zo").read_bytes()
    write(tmp_path, SENTIMENT.replace(*edit))
    with pytest.raises(UserError, match=f"another model, task or data.*: {says}") as caught:
        resume(tiny_model(), TOKENIZER, out)
    assert "\n" not in str(caught.value) and (out / "journal.zo").read_bytes() == before
    (tmp_path / "task.yaml").unlink()
    with pytest.raises(UserError, match=r"task\.yaml.*cannot be read"):
        resume(tiny_model(), TOKENIZER, out)


def test_a_journal_from_before_losses_were_recorded_goes_on(data, tmp_path, monkeypatch):
    settings = header._settings
    known = ("loss", "metric")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            header,
            "_settings",
            lambda *a: {k: v for k, v in settings(*a).items() if k not in known},
        )
        train(tiny_model(), TOKENIZER, SHORT, data, tmp_path / "out", on_progress=stopping_at(2))
    assert "loss" not in Reader(tmp_path / "out" / "journal.zo").header.settings
    assert resume(tiny_model(), TOKENIZER, tmp_path / "out")["best"]


def refuse_empty(row):
    if not row["sentence"]:
        raise ValueError("the sentence is empty: leave out the row")
    return Example(f"{row['sentence']} It was", (" terrible", " great"), row["label"])


def test_a_registered_task_is_known_by_its_name(data, tmp_path):
    register(Task("feeling", (*texts("sentence"), label(2)), lambda row: None))
    register(Task("feeling", (*texts("sentence"), label(2)), refuse_empty))
    train(tiny_model(), TOKENIZER, SHORT, data, tmp_path / "ours")
    config = replace(SHORT, task="feeling")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, config, data, tmp_path / "out", on_progress=stopping_at(2))
    resume(tiny_model(), TOKENIZER, tmp_path / "out")
    found, ours = (result(tmp_path / name)["metrics"] for name in ("out", "ours"))
    assert found == ours | {"task": "feeling"}
    with pytest.raises(UserError, match="feeling"):
        get_task("feelings")
    (tmp_path / "train.jsonl").write_text('{"sentence": "", "label": 0}')
    with pytest.raises(UserError, match=r"train\.jsonl' line 1: the sentence is empty"):
        load_split(get_task("feeling"), tmp_path, "train")


@pytest.mark.parametrize("name", ["sst2", "mine.yaml"])
def test_a_registered_task_takes_no_name_from_ours(name):
    with pytest.raises(UserError, match=f"'{name}' is taken"):
        register(Task(name, (), refuse_empty))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "[/]"}, "task name"),
        ({"name": ""}, "task name"),
        ({"loss": "mse"}, "loss 'mse'.*options or gold"),
        ({"metric": "bleu"}, "metric 'bleu'.*accuracy or f1"),
    ],
)
def test_what_is_no_task_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        replace(Task("mine", (), refuse_empty), **change)


def test_examples_that_cannot_be_judged_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"sentence": "a", "label": 0}')
    task = Task("mine", texts("sentence"), lambda row: Example("a", (" b",), 1))
    with pytest.raises(UserError, match="line 1: the right option is 1 of 1"):
        load_split(task, tmp_path, "train")
    with pytest.raises(ValueError, match="the right option is -1 of 1"):
        Example("a", (" b",), -1)
    task = Task("mine", (), lambda row: Example("a", (" b",), 0), loss="gold", metric="f1")
    with pytest.raises(UserError, match="line 1 has no answers"):
        load_split(task, tmp_path, "train")


def test_a_number_that_is_another_option_is_refused(tmp_path):
    text = SENTIMENT.replace('[" terrible", " great"]', '[" 1", " 2", " 3"]')
    task = get_task(write(tmp_path, text))
    for stars in (1, 2):
        with pytest.raises(ValueError, match="the text of one option and the index of another"):
            task.render({"sentence": "fine", "label": stars})
    assert task.render({"sentence": "fine", "label": 0}).gold == 0
    assert task.render({"sentence": "fine", "label": "2"}).gold == 1
