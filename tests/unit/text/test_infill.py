"""Fill in the middle: each kind of model gets the prompt it was trained on."""

import copy

import pytest
import tokenizers

from tokenmill.errors import RequestError
from tokenmill.text.infill import infill
from tokenmill.text.tokenizer import Tokenizer

BEFORE, BEHIND = "def f(x):", " return y"

FORMS = {
    "Qwen2.5-Coder and CodeGemma": (
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        "<|fim_prefix|>{before}<|fim_suffix|>{behind}<|fim_middle|>",
    ),
    "StarCoder": (
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
        "<fim_prefix>{before}<fim_suffix>{behind}<fim_middle>",
    ),
    "DeepSeek-Coder": (
        ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
        "<｜fim▁begin｜>{before}<｜fim▁hole｜>{behind}<｜fim▁end｜>",
    ),
    "Codestral": (["[PREFIX]", "[SUFFIX]"], "[SUFFIX]{behind}[PREFIX]{before}"),
}


def with_tokens(backend, tokens, **fields) -> Tokenizer:
    backend = copy.deepcopy(backend)
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in tokens])
    return Tokenizer(backend, **fields)


@pytest.mark.parametrize(("tokens", "form"), FORMS.values(), ids=FORMS)
def test_the_tokens_of_the_vocabulary_say_which_form(byte_level_backend, tokens, form):
    tokenizer = with_tokens(byte_level_backend, tokens)
    made = infill(tokenizer, BEFORE, BEHIND)
    expected = form.format(before=BEFORE, behind=BEHIND)
    assert tokenizer.decode(made.prompt_token_ids, skip_special_tokens=False) == expected
    assert sum(tokenizer.is_special(token) for token in made.prompt_token_ids) == len(tokens)


def test_code_llama_gets_no_space_before_the_suffix_and_its_own_first_token(sentencepiece_backend):
    backend = copy.deepcopy(sentencepiece_backend)
    backend.add_special_tokens(["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = infill(Tokenizer(backend, {"bos_token": "<s>"}), "ab", "cd")
    tokens = [backend.id_to_token(token) for token in made.prompt_token_ids]
    assert tokens == ["<s>", "▁<PRE>", "▁", "a", "b", "▁<SUF>", "c", "d", "▁<MID>"]
    assert [backend.id_to_token(token) for token in made.stop_token_ids] == ["▁<EOT>"]


def test_a_prompt_of_tokens_is_taken_as_it_is(byte_level_backend):
    tokenizer = with_tokens(byte_level_backend, FORMS["StarCoder"][0])
    ids = tokenizer.encode(BEFORE)
    assert infill(tokenizer, ids, BEHIND) == infill(tokenizer, BEFORE, BEHIND)


def test_the_middle_ends_with_the_tokens_that_the_model_ends_it_with(byte_level_backend):
    tokenizer = with_tokens(byte_level_backend, [*FORMS["StarCoder"][0], "<file_sep>"])
    stops = infill(tokenizer, BEFORE, BEHIND).stop_token_ids
    assert stops == [tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<file_sep>")]


def test_the_text_of_a_special_token_becomes_it_as_in_a_plain_prompt(byte_level_backend):
    tokenizer = with_tokens(byte_level_backend, FORMS["StarCoder"][0])
    made = infill(tokenizer, "a<|im_end|>", "<|im_start|>b")
    named = [tokenizer.token_id(token) for token in ("<|im_end|>", "<|im_start|>")]
    assert [token for token in made.prompt_token_ids if token in named] == named


@pytest.mark.parametrize("some", [[], ["<|fim_prefix|>", "<|fim_suffix|>"]])
def test_a_model_without_all_of_them_refuses(byte_level_backend, some):
    with pytest.raises(RequestError) as refused:
        infill(with_tokens(byte_level_backend, some), BEFORE, BEHIND)
    assert (refused.value.code, refused.value.field) == ("unsupported_parameter", "suffix")
