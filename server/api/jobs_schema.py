"""Requests of the jobs routes: TuneOS's fields and ranges, and `seed`."""

from pydantic import ConfigDict, Field

from server.api.schema import MAX_SEED, Body


class InferBody(Body):
    """`POST /api/jobs/{id}/infer` and `/infer/stream`"""

    prompt: str = Field(min_length=1, max_length=8192)
    max_new_tokens: int | None = Field(None, ge=1, le=2048)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)


class InferQuery(InferBody):
    """The same in the query of `GET /api/jobs/{id}/infer/stream`, where numbers are text."""

    model_config = ConfigDict(strict=False)
