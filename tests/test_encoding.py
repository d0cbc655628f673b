"""Options as tokens, by tokenizers of every kind in use."""

from __future__ import annotations

from importlib.resources import files
from types import SimpleNamespace

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from dlzo.calibration import calibration_tokens
from dlzo.errors import UserError
from dlzo.generation import generate
from dlzo.scoring import Scorer
from dlzo.scoring.encoding import check_tokenizer, encode
from dlzo.tasks import Example
from rows import EXAMPLES
from tiny import byte_tokenizer, tiny_model

TEXTS = [
    *(files("dlzo") / "data" / "calibration.txt").read_text().split("\n"),
    *(e.prompt + option for e in EXAMPLES.values() for option in e.options),
]


def byte_level():
    """As of GPT-2, SmolLM2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def unigram():
    """SentencePiece with a beginning of the sequence, as of Llama 2, Gemma and T5."""
    tokenizer = Tokenizer(models.Unigram())
    # SentencePiece is trained on lines, so it has no piece with a line break and more.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def byte_fallback():
    """BPE over whole texts, spaces as ▁ and rare characters as bytes, as of Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "<unk>", *pieces], show_progress=False
    )
    # Trained on words with the space in front, it is used on whole texts.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def word_piece(ends=False):
    """As of BERT's decoders; with `ends`, [CLS] in front and [SEP] behind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[CLS]", "[SEP]", "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if ends:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


KINDS = {make.__name__: make for make in (byte_level, unigram, byte_fallback, word_piece)}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def check_options(tokenizer, example):
    """The option's tokens are those of the text that reach beyond the prompt."""
    encoded = encode(tokenizer, example)
    prompt = example.prompt.strip(" ")
    for option, (sequence, targets) in zip(example.options, encoded.options, strict=True):
        text = (example.prompt + option).strip(" ")
        full = tokenizer(text, return_offsets_mapping=True)
        # A token of no character, such as a beginning of the sequence, ends at 0.
        beyond = [
            token
            for token, (_, end) in zip(full.input_ids, full.offset_mapping, strict=True)
            if end > len(prompt)
        ]
        assert list(targets) == beyond
        assert len(targets) == len(full.input_ids) - len(tokenizer(prompt).input_ids)
        assert [*encoded.sequences[sequence], targets[-1]] == full.input_ids
        decoded = tokenizer.decode(targets).strip()
        assert decoded.replace(" ", "") == option.strip().replace(" ", "")


@pytest.mark.parametrize("task", EXAMPLES)
def test_an_options_tokens_are_those_beyond_the_prompt(tokenizer, task):
    check_options(tokenizer, EXAMPLES[task])


def test_a_tokenizer_that_ends_each_text_is_refused():
    model, tokenizer = tiny_model(), word_piece(ends=True)
    says = r"puts '\[SEP\]' behind each text.*add_eos_token=False"
    with pytest.raises(UserError, match=says):
        Scorer(model, tokenizer).encode([EXAMPLES["sst2"]])
    with pytest.raises(UserError, match=says):
        generate(model, tokenizer, ["a"])


@pytest.mark.parametrize("task", EXAMPLES)
def test_smollm2s_own_tokens_are_those_beyond_the_prompt(smollm2, task):
    check_options(smollm2[1], EXAMPLES[task])


def test_where_a_has_no_token_nothing_stands_behind_it():
    def tokenizer(text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[1] if add_special_tokens else [])

    check_tokenizer(tokenizer)


def test_a_tokenizer_of_another_model_is_named() -> None:
    model = tiny_model()
    tokenizer = byte_tokenizer(*(f"word{i}" for i in range(8)))
    message = r"gives 'word7' the id 263 and the model has 260 tokens"
    scorer = Scorer(model, tokenizer)
    scorer.encode([Example("It was", (" a word3",), 0)])
    for example in (Example("word7 was", (" a",), 0), Example("It was", (" a word7",), 0)):
        with pytest.raises(UserError, match=message):
            scorer.encode([example])
    with pytest.raises(UserError, match=message):
        generate(model, tokenizer, ["It", "was word7"])
    with pytest.raises(UserError, match=message):
        calibration_tokens(model, tokenizer, ["It", "was word7"])
