"""An app that describes itself with classes, as the inferless package lets it."""

from typing import Optional

import inferless
from pydantic import BaseModel, Field


@inferless.request
class RequestObjects(BaseModel):
    prompt: str = Field(default="a horse near a beach")
    times: Optional[int] = 2  # noqa: UP045 - as apps write it


@inferless.response
class ResponseObjects(BaseModel):
    generated_result: str = Field(default="Test output")


@inferless.config()
class Config(BaseModel):
    is_streaming_output: bool = False


class InferlessPythonModel:
    def initialize(self, context=None):
        pass

    def infer(self, request: RequestObjects) -> ResponseObjects:
        return ResponseObjects(generated_result=" ".join([request.prompt] * request.times))

    def finalize(self):
        pass
