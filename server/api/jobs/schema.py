"""Requests of the jobs routes: TuneOS's fields and ranges, and `seed`."""

from typing import Annotated

from pydantic import ConfigDict, Field

from server.api.schema import MAX_SEED, Body

JobPrompt = Annotated[str, Field(min_length=1, max_length=8192)]
MaxNewTokens = Annotated[int, Field(ge=1, le=2048)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
JobSeed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class InferBody(Body):
    """`POST /api/jobs/{id}/infer` and `/infer/stream`"""

    prompt: JobPrompt
    max_new_tokens: MaxNewTokens | None = None
    temperature: Temperature | None = None
    seed: JobSeed | None = None


class InferQuery(InferBody):
    """The same in the query of `GET /api/jobs/{id}/infer/stream`, where numbers are text."""

    model_config = ConfigDict(strict=False)
