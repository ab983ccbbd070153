"""The request with the longest cached prefix first: it costs least now, and its prefix may be evicted later.

This is the cache-aware order of SGLang (arXiv 2312.07104), without its tree.
"""

from tokenmill.engine.policy import Policy, View
from tokenmill.engine.request import Request


class LongestPrefix(Policy):
    def order(self, request: Request, view: View) -> tuple[int, float]:
        return (-view.cached_tokens(request), request.source.arrival)


POLICY = LongestPrefix
