from __future__ import annotations

import json

import pytest

from dlzo.errors import UserError
from dlzo.tasks import Example, get_task, load_split

SST2 = get_task("sst2")


def write(folder, text, split="train"):
    path = folder / f"{split}.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_sst2_is_mezos_prompt():
    example = SST2.render({"sentence": "a fine film ", "label": 1})
    assert example == Example("a fine film It was", (" terrible", " great"), 1)


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


def test_text_that_is_not_utf8_is_refused(tmp_path):
    write(tmp_path, b'{"sentence": "caf\xe9", "label": 1}\n')
    with pytest.raises(UserError, match=r"train\.jsonl.*cannot be read"):
        load_split(SST2, tmp_path, "train")
