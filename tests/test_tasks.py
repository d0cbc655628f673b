from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlzo.errors import UserError
from dlzo.tasks import Example, Task, fingerprint, get_task, load_split, load_splits, texts
from rows import EXAMPLES, ROWS
from runs import write_data

SST2 = get_task("sst2")


def write(folder, text, split="train"):
    path = folder / f"{split}.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(folder, task, row):
    write(folder, json.dumps(row) + "\n")
    return load_split(get_task(task), folder, "train")


@pytest.mark.parametrize("task", ROWS)
def test_a_row_becomes_mezos_prompt(task, tmp_path):
    assert read(tmp_path, task, ROWS[task]) == [EXAMPLES[task]]


def test_training_loss_and_metric_are_mezos():
    of_gold = {task for task in ROWS if get_task(task).loss == "gold"}
    by_f1 = {task for task in ROWS if get_task(task).metric == "f1"}
    assert of_gold == {"copa", "squad", "drop"}
    assert by_f1 == {"squad", "drop"}


def test_gold_only_keeps_the_gold_option():
    example = Example("Why", (" a", " b", " c"), 1, ("b",))
    assert example.gold_only() == Example("Why", (" b",), 0, ("b",))


@pytest.mark.parametrize(
    ("field", "value", "gold"),
    [("label", 0, 1), ("label", 1, 0), ("answer", False, 1), ("answer", True, 0)],
)
def test_boolq_reads_superglues_label_and_the_hubs_answer(field, value, gold):
    row = {"passage": "Salt.", "question": "is it", field: value}
    assert get_task("boolq").render(row) == Example("Salt. Is it?\n", ("Yes", "No"), gold)


@pytest.mark.parametrize(
    ("question", "asked"),
    [("is it?", "Is it?"), ("Is it", "Is it?"), ("élan or iron", "Élan or iron?"), ("", "?")],
)
def test_boolq_question_is_a_sentence(question, asked):
    row = {"passage": "Salt.", "question": question, "label": 1}
    assert get_task("boolq").render(row).prompt == f"Salt. {asked}\n"


@pytest.mark.parametrize(
    ("premise", "relation", "prompt"),
    [
        ("He fell.", "effect", "He fell so "),
        ("He fell. ", "effect", "He fell so "),
        ("He fell..", "cause", "He fell. because "),
        ("Did he fall?", "cause", "Did he fall? because "),
    ],
)
def test_copa_joins_premise_and_choice(premise, relation, prompt):
    row = {**ROWS["copa"], "premise": premise, "question": relation}
    assert get_task("copa").render(row).prompt == prompt


@pytest.mark.parametrize(
    ("choice", "option"),
    [
        ("The ABC aired.", "the ABC aired."),
        ("I ran.", "I ran."),
        ("I", "I"),
        ("It was I.", "it was I."),
        ("Rain", "rain"),
        # As in MeZO, also where the data has a space too many.
        (" The sun", " The sun"),
    ],
)
def test_copa_choice_goes_on_in_lower_case(choice, option):
    row = {**ROWS["copa"], "choice2": choice}
    assert get_task("copa").render(row).options == ("the floor was wet.", option)


def test_load_split_keeps_the_order_and_ignores_blank_lines(tmp_path):
    rows = [{"sentence": "good\u2028film", "label": 1, "idx": 7}, {"sentence": "bad", "label": 0}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\n"
    write(tmp_path, text, "validation")
    examples = load_split(SST2, tmp_path, "validation")
    assert [(e.prompt, e.gold) for e in examples] == [
        ("good\u2028film It was", 1),
        ("bad It was", 0),
    ]


def test_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'sst3'.*sst2"):
        get_task("sst3")


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'dev'.*train, validation, test"):
        load_split(SST2, tmp_path, "dev")


def test_missing_folder_and_missing_file_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_split(SST2, tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"train\.jsonl"):
        load_split(SST2, tmp_path, "train")
    (tmp_path / "test.jsonl").mkdir()
    with pytest.raises(UserError, match=r"test\.jsonl"):
        load_split(SST2, tmp_path, "test")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_is_refused(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match="holds no examples") as caught:
        load_split(SST2, tmp_path, "train")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"sentence": "cut off', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"sentence": "cut off \\ud83d", "label": 1}', "surrogates not allowed"),
        ("[1, 2]", "not a JSON object"),
        ('{"label": 1}', "no field 'sentence'"),
        ('{"sentence": "fine"}', "no field 'label'"),
        ('{"sentence": 3, "label": 1}', "'sentence' must be a string, not 3"),
        ('{"sentence": null, "label": 1}', "'sentence' must be a string, not null"),
        ('{"sentence": "fine", "label": 2}', "from 0 to 1, not 2"),
        ('{"sentence": "fine", "label": -1}', "from 0 to 1, not -1"),
        ('{"sentence": "fine", "label": "1"}', 'from 0 to 1, not "1"'),
        ('{"sentence": "fine", "label": true}', "from 0 to 1, not true"),
        ('{"sentence": "fine", "label": 1.0}', r"from 0 to 1, not 1\.0"),
    ],
)
def test_bad_row_is_refused_with_file_and_line(tmp_path, line, says):
    path = write(tmp_path, '{"sentence": "good", "label": 1}\n\n' + line + "\n")
    with pytest.raises(UserError, match=says) as caught:
        load_split(SST2, tmp_path, "train")
    assert f"{str(path)!r} line 3" in str(caught.value)


@pytest.mark.parametrize(
    ("task", "field", "value", "says"),
    [
        ("rte", "label", -1, "'label' must be an integer from 0 to 1, not -1"),
        ("cb", "label", 3, "'label' must be an integer from 0 to 2, not 3"),
        ("cb", "hypothesis", None, "'hypothesis' must be a string, not null"),
        ("boolq", "label", 2, "'label' must be 0, 1, true or false, not 2"),
        ("boolq", "label", 1.0, "'label' must be 0, 1, true or false, not 1.0"),
        ("boolq", "label", "yes", "'label' must be 0, 1, true or false, not \"yes\""),
        ("copa", "question", "why", '\'question\' must be "cause" or "effect", not "why"'),
        ("copa", "question", [], '\'question\' must be "cause" or "effect", not []'),
        ("multirc", "answer", 3, "'answer' must be a string, not 3"),
        ("squad", "answers", {"text": []}, "'answers.text' must be a list of one string or more"),
        ("squad", "answers", {"text": "nine"}, "'answers.text' must be a list of one string"),
        ("squad", "answers", {"text": ["nine", 9]}, "'answers.text' must be a list of one string"),
        ("squad", "answers", {"spans": ["nine"]}, "no field 'answers.text'"),
        ("squad", "answers", ["nine"], "no field 'answers.text'"),
        ("drop", "answers_spans", {"spans": []}, "'answers_spans.spans' must be a list"),
    ],
)
def test_bad_field_is_refused_with_its_name(tmp_path, task, field, value, says):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        read(tmp_path, task, {**ROWS[task], field: value})
    assert "train.jsonl' line 1" in str(caught.value)


NEEDED = [
    (task, field)
    for task, row in ROWS.items()
    for field in row
    if (task, field) != ("boolq", "label")
]


@pytest.mark.parametrize(("task", "field"), NEEDED)
def test_every_field_of_a_row_is_needed(tmp_path, task, field):
    row = {name: value for name, value in ROWS[task].items() if name != field}
    with pytest.raises(UserError, match=rf"line 1 has no field '{field}\b.*'{task}'"):
        read(tmp_path, task, row)


def test_boolq_needs_one_of_two_labels(tmp_path):
    with pytest.raises(UserError, match="no field 'label' or 'answer'"):
        read(tmp_path, "boolq", {"passage": "Salt.", "question": "is it"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda value: st.lists(value) | st.dictionaries(st.text(), value),
    max_leaves=5,
)


@st.composite
def changed_rows(draw):
    """A task and one of its rows, some fields of which are lost or another value."""
    task = draw(st.sampled_from(sorted(ROWS)))
    values = JSON | st.sampled_from([0, 1, 2, True, "cause", {"text": ["9"]}, {"text": []}])
    changes = st.dictionaries(st.sampled_from(sorted(ROWS[task])), values, max_size=2)
    lost = draw(st.sets(st.sampled_from(sorted(ROWS[task])), max_size=1))
    row = {**ROWS[task], **draw(changes)}
    return task, json.dumps({name: row[name] for name in row if name not in lost})


@given(changed_rows() | st.tuples(st.sampled_from(sorted(ROWS)), st.text() | JSON.map(json.dumps)))
def test_any_line_is_an_example_or_an_error_that_names_it(tmp_path_factory, case):
    task, line = case
    folder = tmp_path_factory.getbasetemp()
    write(folder, line.encode(errors="surrogatepass") + b"\n")
    try:
        (*_, example) = load_split(get_task(task), folder, "train")
    except UserError as error:
        assert "train.jsonl" in str(error)
    else:
        assert 0 <= example.gold < len(example.options)
        assert bool(example.answers) == (get_task(task).metric == "f1")


def test_a_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path, b'\xef\xbb\xbf{"sentence": "tea", "label": 1}\r\n')
    assert load_split(SST2, tmp_path, "train")[0].prompt == "tea It was"


def test_text_that_is_not_utf8_is_refused(tmp_path):
    write(tmp_path, b'{"sentence": "tea", "label": 1}\n{"sentence": "caf\xe9", "label": 1}\n')
    with pytest.raises(UserError, match=r"train\.jsonl' line 2 is not UTF-8"):
        load_split(SST2, tmp_path, "train")


def test_a_generated_answer_has_no_options_to_train_on():
    with pytest.raises(UserError, match="give loss 'gold'"):
        Task("mine", (), lambda row: None, metric="f1")


def test_an_example_takes_texts_and_an_index():
    assert Example("a", (" b", " c"), np.int64(1)).gold == 1
    with pytest.raises(ValueError, match="options are the text ' b': give a tuple"):
        Example("a", " b", 0)
    with pytest.raises(ValueError, match="answers are the text 'Paris'"):
        Example("a", (" Paris",), 0, answers="Paris")
    with pytest.raises(TypeError):
        Example("a", (" b", " c"), 0.5)


def test_one_option_leaves_nothing_to_choose(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": "b"}\n')
    task = Task("mine", texts("a"), lambda row: Example(row["a"], (" c",), 0))
    with pytest.raises(UserError, match="line 1 has one option"):
        load_split(task, tmp_path, "train")
    load_split(replace(task, loss="gold"), tmp_path, "train")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_data_fingerprint_is_of_every_split(tmp_path, split):
    data = write_data(tmp_path / "data")
    before = fingerprint(load_splits(get_task("sst2"), data))
    rows = (data / f"{split}.jsonl").read_text().splitlines(keepends=True)
    (data / f"{split}.jsonl").write_text("".join([*rows[1:], rows[0]]))
    assert fingerprint(load_splits(get_task("sst2"), data)) != before
