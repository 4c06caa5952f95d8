"""What the routes about adapters are documented as."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, WithJsonSchema
from typing_extensions import TypedDict

from server.api.adapters.changes import MAX_WAIT_S
from server.api.adapters.form import FILES
from server.api.adapters.lists import MAX_LIMIT, USUAL_LIMIT
from server.api.adapters.records import AdapterRecord
from server.api.adapters.schema import AddBody, LoadBody, UnloadBody
from server.api.docs.operations import (
    ADMINISTERING,
    JSON,
    Answer,
    Chapter,
    Operation,
    Parameter,
    json_answer,
    text_answer,
)
from server.errors import BadRequest, Forbidden, ModelNotFound, Unavailable

_ADMIN = "Asks for the key of an admin. On a server without keys it is closed to web pages from elsewhere."
_REPEATABLE = f"{_ADMIN} May be repeated: what is already so is 200."


class AdapterList(TypedDict):
    """A page of adapters, by name."""

    object: Literal["list"]
    data: list[AdapterRecord]
    first_id: str | None
    last_id: str | None
    has_more: bool
    total: int


class RemovedAdapter(TypedDict):
    """What was freed. `users` still hold its memory, and free it when they end."""

    id: str
    object: Literal["adapter"]
    deleted: Literal[True]
    revision: str | None
    freed_bytes: int
    ended: int
    users: int
    files_removed: bool


File = Annotated[str, WithJsonSchema({"type": "string", "contentMediaType": "application/octet-stream"})]

# The names of the files are the names of the fields.
UploadForm = TypedDict(
    "UploadForm",
    {
        "name": Annotated[str, Field(min_length=1, max_length=255)],
        "pin": NotRequired[Literal["true", "false"]],
        "replace": NotRequired[Literal["true", "false"]],
        "adapter_config.json": File,
        "adapter_model.safetensors": File,
        "tokenizer.json": NotRequired[File],
        "tokenizer_config.json": NotRequired[File],
        "special_tokens_map.json": NotRequired[File],
        "added_tokens.json": NotRequired[File],
        "chat_template.jinja": NotRequired[File],
        "chat_template.json": NotRequired[File],
    },
)

_RECORD: dict[str, Any] = {
    "id": "pirate",
    "object": "adapter",
    "name": "pirate",
    "revision": "5f0e2c1b7a9d4e3f8c6b1a2d3e4f5a6b",
    "rank": 16,
    "targets": ["q_proj", "v_proj"],
    "kind": "lora",
    "bytes": 1179648,
    "tier": "host",
    "pinned": False,
    "users": 0,
    "last_used": 1764000000.5,
    "loads": 1,
    "load_seconds": 0.021,
    "source": "local",
    "root": "/adapters/pirate",
    "parent": "motet",
    "created": 1764000000,
    "error": None,
}
_ID = Parameter("id", "Its name; slashes as they are or as `%2F`.", where="path", example="pirate")
_FILE_NAMES = ", ".join(f"`{name}`" for name in FILES)
_UPLOAD = f"""In JSON: where it is. `path` is a folder below `--adapters-dir`; `location` is what a source of
`--adapter-sources` takes, with `revision` and `token` where it has them; neither: what a request for this
name would find.

As a form: its files, which are checked before anybody can see the adapter. A file is known by the name of its
field or by its file name, one of {_FILE_NAMES}. Uploads are kept in `--adapters-dir` if the server may write
there, else until it exits.

The same content under the same name is 200 and changes nothing; other content needs `replace`, and requests
that run keep what they have. {_ADMIN}
"""
_REMOVE = f"""The name is unknown from now on. Requests that use it go on to their end, and the answer waits
for that up to `wait` seconds; then `force` ends those that are left, with an error in their protocol's words.

The files of an adapter that was uploaded are removed. A folder of `--adapters-dir` that somebody else has put
there stays, and is found again by the next request for its name. {_ADMIN}
"""

CHAPTER = Chapter(
    tag="Adapters",
    about="Which adapters there are; adding, removing and pinning them while the server runs. Two routes are "
    "vLLM's.",
    operations=(
        Operation(
            "GET",
            "/v1/adapters",
            "List adapters",
            json_answer(
                AdapterList,
                "A page of those that the key may use.",
                {
                    "object": "list",
                    "data": [_RECORD],
                    "first_id": "pirate",
                    "last_id": "pirate",
                    "has_more": False,
                    "total": 1,
                },
            ),
            about="Sorted by name. `total` counts all pages.",
            parameters=(
                Parameter(
                    "limit",
                    f"How many; {USUAL_LIMIT} if not given.",
                    schema=Annotated[int, Field(ge=1, le=MAX_LIMIT)],
                    example=20,
                ),
                Parameter("after", "Go on after this name: `last_id` of the page before.", example="json"),
                Parameter("prefix", "Only names that begin so.", example="pi"),
                Parameter(
                    "broken",
                    "Only those whose files could not be read the last time; `error` says why.",
                    schema=bool,
                    example=False,
                ),
                Parameter("search", "Only names that hold this, whatever the case.", example="RAT"),
            ),
            refusals=(BadRequest, Unavailable),
        ),
        Operation(
            "POST",
            "/v1/adapters",
            "Add an adapter",
            (
                Answer(JSON, AdapterRecord, "It is there.", _RECORD, status=201),
                Answer(JSON, AdapterRecord, "It was there already.", _RECORD),
            ),
            about=_UPLOAD,
            body=AddBody,
            form=UploadForm,
            examples={
                "From the adapters folder": {"name": "sailor", "path": "/adapters/sailor", "pin": True},
                "By name": {"name": "pirate"},
                "From a hub": {
                    "name": "cook",
                    "source": "hub",
                    "location": "someone/cook-lora",
                    "revision": "v2",
                    "replace": True,
                },
            },
            refusals=ADMINISTERING,
        ),
        Operation(
            "GET",
            "/v1/adapters/{id:path}",
            "Show an adapter",
            json_answer(AdapterRecord, "The adapter.", _RECORD),
            parameters=(_ID,),
            refusals=(ModelNotFound, Unavailable),
        ),
        Operation(
            "DELETE",
            "/v1/adapters/{id:path}",
            "Remove an adapter",
            json_answer(
                RemovedAdapter,
                "What that has freed.",
                {
                    "id": "pirate",
                    "object": "adapter",
                    "deleted": True,
                    "revision": "5f0e2c1b7a9d4e3f8c6b1a2d3e4f5a6b",
                    "freed_bytes": 1179648,
                    "ended": 0,
                    "users": 0,
                    "files_removed": False,
                },
            ),
            about=_REMOVE,
            parameters=(
                _ID,
                Parameter("force", "End requests that use it.", schema=bool, example=True),
                Parameter(
                    "wait",
                    "Seconds to wait for them.",
                    schema=Annotated[float, Field(ge=0, le=MAX_WAIT_S)],
                    example=10,
                ),
            ),
            refusals=(BadRequest, Forbidden, ModelNotFound, Unavailable),
        ),
        Operation(
            "POST",
            "/v1/adapters/{id:path}/pin",
            "Keep an adapter in memory",
            json_answer(AdapterRecord, "It stays.", {**_RECORD, "pinned": True}),
            about=f"Loads it if need be. {_REPEATABLE}",
            parameters=(_ID,),
            refusals=(Forbidden, ModelNotFound, Unavailable),
        ),
        Operation(
            "POST",
            "/v1/adapters/{id:path}/unpin",
            "Let an adapter go when others need its memory",
            json_answer(AdapterRecord, "It may go.", _RECORD),
            about=_REPEATABLE,
            parameters=(_ID,),
            refusals=(Forbidden, ModelNotFound, Unavailable),
        ),
        Operation(
            "POST",
            "/v1/load_lora_adapter",
            "Load an adapter",
            text_answer("It is there.", "Success: LoRA adapter 'pirate' added successfully."),
            about=_REPEATABLE,
            body=LoadBody,
            examples={"From the adapters folder": {"lora_name": "pirate", "lora_path": "/adapters/pirate"}},
            refusals=ADMINISTERING,
        ),
        Operation(
            "POST",
            "/v1/unload_lora_adapter",
            "Unload an adapter",
            text_answer("It is gone.", "Success: LoRA adapter 'pirate' removed successfully."),
            about=_REPEATABLE,
            body=UnloadBody,
            examples={"By name": {"lora_name": "pirate"}},
            refusals=ADMINISTERING,
        ),
    ),
    notes={
        AddBody: {
            "location": "What its source calls it, as `org/name` on a hub.",
            "path": "A folder below `--adapters-dir`.",
            "source": "Where its location is; if not given, that is seen from its form.",
            "revision": "A branch, tag or commit of a location on a hub.",
            "token": "For a location that not everybody may read. It is not written anywhere.",
            "pin": "Keep it in memory.",
            "replace": "Replace other content under the same name.",
        },
        LoadBody: {
            "lora_path": "A folder below `--adapters-dir`.",
            "load_inplace": "Replace other content under the same name.",
        },
    },
)
