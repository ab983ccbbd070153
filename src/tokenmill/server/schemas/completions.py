"""Body of ``POST /v1/completions``.

Source: https://platform.openai.com/docs/api-reference/completions/create
"""

from __future__ import annotations

from typing import cast

from tokenmill.errors import RequestError
from tokenmill.server.schemas.request import Generation, Int, unsupported
from tokenmill.types import SamplingParams

__all__ = ["CompletionRequest"]


class CompletionRequest(Generation):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str] | list[Int] | list[list[Int]]
    suffix: str | None = None
    """What stands behind the completion, for models that can fill in the middle."""
    echo: bool = False
    logprobs: Int | None = None

    # Not supported: asked for, they are refused.
    best_of: Int | None = None

    def check(self) -> None:
        super().check()
        if self.suffix is not None and self.echo and self.logprobs is not None:
            # What the model gets is another sequence than the text that comes back.
            raise unsupported("logprobs", "An echoed prompt with a suffix has no log probabilities; leave one out.")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "best_of is not supported; ask for n completions and choose.")
        if self.prompt == []:
            raise RequestError("empty_prompt", "There is no prompt; send at least one.", "prompt")

    @property
    def only_echo(self) -> bool:
        """Whether nothing is to be generated: the prompt comes back, for its log probabilities."""
        return self.echo and self.max_tokens == 0

    def sampling_params(self) -> SamplingParams:
        """How to sample. Without a limit of its own, a completion has 16 tokens, as OpenAI's."""
        if self.only_echo:
            limit = 1
        else:
            limit = 16 if self.max_tokens is None else self.max_tokens
        of_prompt = self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs
        return self.sampling(
            max_tokens=limit, logprobs=self.logprobs, prompt_logprobs=of_prompt, structured=self.structured()
        )

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if one else self.prompt)
