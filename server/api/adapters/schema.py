"""Bodies of the routes that load and unload adapters."""

from typing import Annotated

from pydantic import Field

from server.api.schema import Body

Name = Annotated[str, Field(min_length=1, max_length=256)]
Location = Annotated[str, Field(min_length=1, max_length=4096)]


class LoadBody(Body):
    """`POST /v1/load_lora_adapter`"""

    lora_name: Name
    lora_path: Location
    load_inplace: bool | None = None


class UnloadBody(Body):
    """`POST /v1/unload_lora_adapter`"""

    lora_name: Name


class AddBody(Body):
    """`POST /v1/adapters`"""

    name: Name
    location: Location | None = None
    path: Location | None = None
    source: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    revision: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    token: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    pin: bool | None = None
    replace: bool | None = None
