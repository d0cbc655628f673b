"""One row of each task, and what MeZO makes of it."""

from __future__ import annotations

from dlzo.tasks import Example

ROWS = {
    "sst2": {"sentence": "a fine film ", "label": 1},
    "rte": {"premise": "It rained.", "hypothesis": "It was wet.", "label": 0},
    "cb": {"premise": "He may come. He said so.", "hypothesis": "he comes", "label": 2},
    "boolq": {"passage": "Salt -- It dissolves.", "question": "does salt dissolve", "label": 1},
    "wsc": {
        "text": "Ann met Joan. She smiled.",
        "span1_text": "Joan",
        "span2_text": "She",
        "label": 1,
    },
    "copa": {
        "premise": "The man fell.",
        "choice1": "The floor was wet.",
        "choice2": "I caught him.",
        "question": "cause",
        "label": 0,
    },
    "multirc": {
        "paragraph": "Tom sat.  He read. ",
        "question": "Who sat?",
        "answer": "Tom",
        "label": 1,
    },
    "squad": {
        "title": "Solar_energy",
        "context": "It took\nnine years.",
        "question": "How long did it take? ",
        "answers": {"text": ["nine years", "9"], "answer_start": [8, 8]},
    },
    "drop": {
        "passage": "Ten ran, two fell.",
        "question": " How many stood?",
        "answers_spans": {"spans": ["8", "eight"], "types": ["number", "number"]},
    },
}
EXAMPLES = {
    "sst2": Example("a fine film It was", (" terrible", " great"), 1),
    "rte": Example(
        'It rained.\nDoes this mean that "It was wet." is true? Yes or No?\n', ("Yes", "No"), 0
    ),
    "cb": Example(
        'Suppose He may come. He said so. Can we infer that "he comes"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        2,
    ),
    "boolq": Example("Salt -- It dissolves. Does salt dissolve?\n", ("Yes", "No"), 0),
    "wsc": Example(
        "Ann met Joan. She smiled.\n"
        'In the previous sentence, does the pronoun "she" refer to Joan? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "copa": Example("The man fell because ", ("the floor was wet.", "I caught him."), 0),
    "multirc": Example(
        "Tom sat.  He read. \nQuestion: Who sat?\n"
        'I found this answer "Tom". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "squad": Example(
        "Title: Solar_energy\nContext: It took\nnine years.\n"
        "Question: How long did it take?\nAnswer:",
        (" nine years\n",),
        0,
        ("nine years", "9"),
    ),
    "drop": Example(
        "Passage: Ten ran, two fell.\nQuestion: How many stood?\nAnswer:",
        (" 8\n",),
        0,
        ("8", "eight"),
    ),
}
