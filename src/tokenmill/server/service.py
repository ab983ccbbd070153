"""What every route works with."""

from __future__ import annotations

import dataclasses
from typing import cast

from starlette.requests import Request

from tokenmill.errors import RequestError
from tokenmill.llm import AsyncLLM
from tokenmill.server.metrics import Metrics

__all__ = ["Service", "service_of"]


@dataclasses.dataclass(frozen=True)
class Service:
    """The parts that the app was built from."""

    llm: AsyncLLM
    metrics: Metrics
    model_name: str
    """Name of the model in the API."""
    created: int
    """When the server started, in seconds since 1970."""

    def check_model(self, name: str | None) -> None:
        """Refuses requests for a model that is not here. No name means the one there is.

        Raises:
            RequestError: ``model_not_found``.
        """
        if name is not None and name != self.model_name:
            raise RequestError(
                "model_not_found", f"There is no model {name!r}; this server has {self.model_name!r}.", "model"
            )


def service_of(request: Request) -> Service:
    """The service of the app that took `request`."""
    return cast(Service, request.app.state.service)
