"""The compiled module. Its functions take addresses and sizes; the modules beside it give them types and meaning."""

from typing import Any

def __getattr__(name: str) -> Any: ...
