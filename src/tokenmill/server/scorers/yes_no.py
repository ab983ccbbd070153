"""The probability of "yes" against "no" as the first word of a causal model's answer, from 0 to 1.

The question is the one that Qwen3-Reranker is trained on, put through the model's own chat template.

Source: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from tokenmill.errors import RequestError
from tokenmill.llm import AsyncLLM
from tokenmill.server.scoring import Ask, Pair, Question, Scorer
from tokenmill.text.chat import encode_chat
from tokenmill.text.tokenizer import Tokenizer
from tokenmill.types import RequestOutput, SamplingParams

__all__ = ["SCORER"]

_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"
_TOP = 20
"""Most likely tokens to look for the other word in, before it is asked for."""


class _YesNo:
    async def score(self, llm: AsyncLLM, pairs: Sequence[Pair], ask: Ask) -> list[float]:
        words = _words(llm.tokenizer)
        prompts = await asyncio.to_thread(lambda: [_prompt(llm.tokenizer, pair) for pair in pairs])
        outputs = await ask([Question(prompt, params=_only(words)) for prompt in prompts])
        found = [_logprobs(output, words) for output in outputs]
        # Of the two only the likelier is surely reported; where the other is not, it is asked for by itself.
        missing = [(index, word) for index, known in enumerate(found) for word in words if word not in known]
        if missing:
            more = await ask([Question(prompts[index], params=_only([word])) for index, word in missing])
            for (index, word), output in zip(missing, more, strict=True):
                found[index] |= _logprobs(output, [word])
        yes, no = words
        return [1 / (1 + math.exp(min(known[no] - known[yes], 700.0))) for known in found]


def _words(tokenizer: Tokenizer) -> list[int]:
    """The first tokens of the two words."""
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no"))
    if yes == no:
        raise RequestError(
            "unsupported_model", "The tokenizer of this model does not tell 'yes' from 'no' by their first token."
        )
    return [yes, no]


def _prompt(tokenizer: Tokenizer, pair: Pair) -> list[int]:
    query, document = pair
    question = f"<Instruct>: {_INSTRUCT}\n<Query>: {query}\n<Document>: {document}"
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
    return encode_chat(tokenizer, messages, enable_thinking=False)


def _only(words: Sequence[int]) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=list(words), logprobs=_TOP, ignore_eos=True)


def _logprobs(output: RequestOutput, words: Sequence[int]) -> dict[int, float]:
    """What is reported about `words`. Log probabilities are those of the raw logits, whatever was allowed."""
    [entry] = output.outputs[0].logprobs or []
    return {token: logprob for token, logprob in zip(entry.token_ids, entry.logprobs, strict=True) if token in words}


SCORER: Scorer = _YesNo()
