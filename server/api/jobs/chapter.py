"""What the jobs routes are documented as: the forms of their answers, and examples."""

from typing_extensions import TypedDict

from server.api.docs.operations import EVENTS, GENERATING, Answer, Chapter, Operation, Parameter, json_answer
from server.api.jobs.schema import InferBody, JobPrompt, JobSeed, MaxNewTokens, Temperature
from server.errors import PayloadTooLarge


class JobAnswer(TypedDict):
    """The whole answer."""

    response: str


class JobToken(TypedDict):
    """A piece of the answer."""

    token: str


class JobFailure(TypedDict):
    """Instead of the rest of a stream that breaks."""

    error: str


_STREAM = Answer(
    EVENTS,
    JobToken,
    "One event per token that completes text. Each has an id, by which a dropped stream is gone on with.",
    ({"token": "Hello"}, {"token": ","}, {"token": " world"}),
    end="[DONE]",
    failure=JobFailure,
)
_ABOUT = (
    "Made for `EventSource`, which comes back whenever its connection ends and says in `Last-Event-ID` what "
    "it has seen. A stream whose connection drops is paused for the resume window and gone on with after "
    "that event, for the same request with the same key; of two readers the newer wins. Whoever has seen the "
    "end, or names an event that is not known (any more), is answered 204, which makes a browser stop."
)
_LAST_EVENT = (
    Parameter("Last-Event-ID", "The event that the client saw last.", where="header"),
    Parameter("lastEventId", "The same, where the header cannot be set."),
)
_EXAMPLES: dict[str, dict[str, object]] = {
    "With the defaults": {"prompt": "Say hi"},
    "Greedy": {"prompt": "Say hi", "max_new_tokens": 300, "temperature": 0},
}
_OF_A_QUERY = tuple(kind for kind in GENERATING if kind is not PayloadTooLarge)

CHAPTER = Chapter(
    tag="Jobs",
    about="The routes of TuneOS's fine-tuning wizard. A job's id is the id of the adapter that it made; "
    "names of the base model work, too. The prompt goes into the model as it is, without a chat template; an "
    "answer that the context has no room for is shorter. A job whose adapter cannot be used is 400.",
    operations=(
        Operation(
            "POST",
            "/api/jobs/{id:path}/infer",
            "Generate",
            json_answer(JobAnswer, "The whole answer.", {"response": "Hello, world"}),
            body=InferBody,
            examples=_EXAMPLES,
            refusals=GENERATING,
            is_generation=True,
        ),
        Operation(
            "GET",
            "/api/jobs/{id:path}/infer/stream",
            "Generate, token by token",
            (_STREAM,),
            about=_ABOUT,
            parameters=(
                Parameter("prompt", "", schema=JobPrompt, is_required=True, example="Say hi"),
                Parameter("max_new_tokens", "Default: 256.", schema=MaxNewTokens),
                Parameter("temperature", "Default: 0.7; 0 is greedy.", schema=Temperature),
                Parameter("seed", "", schema=JobSeed),
                *_LAST_EVENT,
            ),
            refusals=_OF_A_QUERY,
            is_generation=True,
        ),
        Operation(
            "POST",
            "/api/jobs/{id:path}/infer/stream",
            "Generate, token by token, for prompts too long for a URL",
            (_STREAM,),
            about=_ABOUT,
            body=InferBody,
            examples=_EXAMPLES,
            parameters=_LAST_EVENT,
            refusals=GENERATING,
            is_generation=True,
        ),
    ),
    notes={
        InferBody: {
            "max_new_tokens": "Default: 256.",
            "temperature": "Default: 0.7; 0 is greedy.",
            "seed": "The same seed gives the same answer.",
        }
    },
)
