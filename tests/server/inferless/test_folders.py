"""The shapes that apps come in: whole answers, batches, coroutines, pydantic classes; and folders that are
no apps. Rows K5, K17.
"""

import asyncio
import json
from pathlib import Path

import pytest

from server.errors import BadRequest, EngineFailed
from server.inferless.worker import AppState
from tests.server.api.raw_http import until
from tests.server.inferless.making import ECHO, TEXT, all_of, ask, make_app, running, submit, worker_of

# --- Whole answers and batches ------------------------------------------------------------------------------


async def test_K5_app_without_streaming_gets_inputs_only_and_answers_once(tmp_path: Path) -> None:
    app = """
        class InferlessPythonModel:
            def initialize(self, context=None):
                pass

            def infer(self, inputs):
                name = inputs.pop("TEXT")
                return {"generated_result": name.upper(), "scores": [0.5, 1.0], "shape": [[1, 2], [3, 4]]}
    """
    async with worker_of(make_app(tmp_path, app, TEXT)) as worker:
        assert await ask(worker, TEXT="hi") == [
            {"generated_result": "HI", "scores": [0.5, 1.0], "shape": [[1, 2], [3, 4]]}
        ]


BATCHING = """
    class InferlessPythonModel:
        def initialize(self):
            self.sizes = []

        def infer(self, batch):
            self.sizes.append(len(batch))
            for inputs in batch:
                if inputs["TEXT"].startswith("raise"):
                    raise ValueError(inputs["TEXT"])
            if any(inputs["TEXT"] == "bad" for inputs in batch):
                return [{"OUT": "too few"}]
            return [{"OUT": inputs["TEXT"], "SIZE": len(batch)} for inputs in batch]
"""


async def test_app_with_a_batch_size_gets_what_comes_within_its_window(tmp_path: Path) -> None:
    schema = TEXT + "BATCH_SIZE = 2\nBATCH_WINDOW = 60000\n"
    async with worker_of(make_app(tmp_path, BATCHING, schema)) as worker:
        runs = [submit(worker, TEXT=text) for text in ("1", "2", "3", "4")]
        answers = await asyncio.gather(*map(all_of, runs))

    assert answers == [[{"OUT": text, "SIZE": 2}] for text in ("1", "2", "3", "4")]


async def test_batch_that_does_not_fill_is_done_when_its_window_is_over(tmp_path: Path) -> None:
    schema = TEXT + "BATCH_SIZE = 8\nBATCH_WINDOW = 10\n"
    async with worker_of(make_app(tmp_path, BATCHING, schema)) as worker:
        assert await ask(worker, TEXT="alone") == [{"OUT": "alone", "SIZE": 1}]
        bad = [submit(worker, TEXT="bad") for _ in range(2)]
        for run in bad:
            with pytest.raises(EngineFailed, match="a list of 2"):
                await all_of(run)
        assert await ask(worker, TEXT="next") == [{"OUT": "next", "SIZE": 1}]


async def test_text_of_an_exception_is_not_told_to_others_in_the_batch(tmp_path: Path) -> None:
    schema = TEXT + "BATCH_SIZE = 2\nBATCH_WINDOW = 10\n"
    async with worker_of(make_app(tmp_path, BATCHING, schema)) as worker:
        with pytest.raises(EngineFailed, match="raise alone"):
            await ask(worker, TEXT="raise alone")
        for run in [submit(worker, TEXT=text) for text in ("raise secret", "other")]:
            with pytest.raises(EngineFailed, match=r"^ValueError$"):
                await all_of(run)


async def test_coroutines_are_awaited_on_one_loop_and_the_handler_can_be_awaited(tmp_path: Path) -> None:
    app = """
        import asyncio

        class InferlessPythonModel:
            async def initialize(self):
                self.loop = asyncio.get_running_loop()

            async def infer(self, inputs, stream_output_handler):
                assert asyncio.get_running_loop() is self.loop
                await stream_output_handler.send_streamed_output({"OUT": inputs["TEXT"]})
                await stream_output_handler.finalise_streamed_output()
    """
    async with worker_of(make_app(tmp_path, app)) as worker:
        assert await ask(worker, TEXT="a") == [{"OUT": "a"}]
        assert await ask(worker, TEXT="b") == [{"OUT": "b"}]


# --- Folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "schema", "says"),
    [
        ("x = 1", TEXT, "InferlessPythonModel"),
        ("class InferlessPythonModel: pass", None, "INPUT_SCHEMA"),
        ("class InferlessPythonModel: pass", "x = 1", "INPUT_SCHEMA"),
        ("import nothing_like_this", TEXT, "nothing_like_this"),
        ("def", TEXT, "SyntaxError"),
        ("class InferlessPythonModel: pass", 'INPUT_SCHEMA = {"A": {"datatype": "WORD"}}', "WORD"),
        ("class InferlessPythonModel: pass", 'INPUT_SCHEMA = {"A": {"shape": [0]}}', "shape"),
        ("class InferlessPythonModel: pass", TEXT + "BATCH_SIZE = 0", "BATCH_SIZE"),
        (
            "class InferlessPythonModel: pass",
            TEXT + "BATCH_SIZE = 2\nIS_STREAMING_OUTPUT = True",
            "BATCH_SIZE",
        ),
        ("import sys; sys.exit(5)", TEXT, "SystemExit"),
    ],
    ids=str,
)
async def test_folder_that_is_no_app_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, app: str, schema: str | None, says: str
) -> None:
    async with worker_of(make_app(tmp_path, app, schema), wait=False) as worker:
        await until(lambda: worker.state is AppState.FAILED)
    assert says in caplog.text


async def test_input_that_the_request_class_refuses_costs_only_its_request(tmp_path: Path) -> None:
    app = """
        import inferless
        from pydantic import BaseModel, Field

        @inferless.request
        class RequestObjects(BaseModel):
            number: int = Field(le=5)

        class InferlessPythonModel:
            def initialize(self):
                pass

            def infer(self, request):
                return {"OUT": request.number}
    """
    async with worker_of(make_app(tmp_path, app, None)) as worker:
        with pytest.raises(BadRequest, match="number: Input should be less than or equal to 5"):
            await ask(worker, number=6)
        assert await ask(worker, number=5) == [{"OUT": 5}]


async def test_several_apps_live_side_by_side(tmp_path: Path) -> None:
    async with running(make_app(tmp_path, ECHO, name="b"), make_app(tmp_path, ECHO, name="a")) as apps:
        assert [worker.name for worker in apps] == ["a", "b"]
        answers = await asyncio.gather(*(ask(worker, TEXT=worker.name) for worker in apps))
    assert json.dumps(answers) == '[[{"OUT": "a"}], [{"OUT": "b"}]]'


PYDANTIC = """
    import os
    from typing import List, Optional

    import inferless
    from pydantic import BaseModel, Field

    @inferless.request
    class RequestObjects(BaseModel):
        prompt: str = Field(default="a horse near a beach")
        count: Optional[int] = 2
        tags: List[str] = []

    @inferless.response
    class ResponseObjects(BaseModel):
        OUT: str = Field(default="Test output")

    @inferless.config{parentheses}
    class Config(BaseModel):
        is_streaming_output: bool = True

    class InferlessPythonModel:
        def initialize(self):
            assert os.environ["IS_STREAMING_OUTPUT"] == "True"

        def infer(self, request: RequestObjects, stream_output_handler):
            for _ in range(request.count):
                stream_output_handler.send_streamed_output(ResponseObjects(OUT=request.prompt))
"""


@pytest.mark.parametrize("parentheses", ["", "()"])
async def test_K17_pydantic_classes_describe_inputs_and_options(tmp_path: Path, parentheses: str) -> None:
    """Without the inferless package, which the test environment does not have."""
    app = PYDANTIC.replace("{parentheses}", parentheses)
    async with worker_of(make_app(tmp_path, app, None)) as worker:
        schema = worker.require_schema()
        assert schema.is_streaming
        assert [(each.name, each.datatype, each.shape, each.is_required) for each in schema.inputs] == [
            ("prompt", "BYTES", (1,), False),
            ("count", "INT64", (1,), False),
            ("tags", "BYTES", (-1,), False),
        ]
        assert await ask(worker) == [{"OUT": "a horse near a beach"}] * 2
        assert await ask(worker, prompt="mine", count=1) == [{"OUT": "mine"}]


INSTALLED = """
    # An inferless package that is installed: it keeps what it needs, and tells nobody.
    def request(cls):
        cls._json_schema = {}
        return cls

    response = request

    def config(cls=None):
        return (lambda cls: cls) if cls is None else cls

    def call(*args, **kwargs):
        raise AssertionError("not in this test")
"""


async def test_K17_installed_package_is_used_and_its_decorators_are_heard(tmp_path: Path) -> None:
    app = PYDANTIC.replace("{parentheses}", "()").replace(
        'assert os.environ["IS_STREAMING_OUTPUT"] == "True"',
        "assert inferless.call and RequestObjects._json_schema == {}",
    )
    folder = make_app(tmp_path, app, None)
    make_app(tmp_path, INSTALLED, None, name="package")
    (tmp_path / "package" / "app.py").rename(folder / "inferless.py")
    async with worker_of(folder) as worker:
        assert await ask(worker, prompt="mine", count=1) == [{"OUT": "mine"}]


async def test_marks_of_the_command_line_tool_change_nothing(tmp_path: Path) -> None:
    app = """
        import inferless

        app = inferless.Cls(gpu="T4")

        @inferless.method(gpu="T4")
        def helper():
            return "helped"

        class InferlessPythonModel:
            @app.load
            def initialize(self):
                pass

            @app.infer
            def infer(self, inputs):
                return {"OUT": helper()}

        @inferless.local_entry_point
        def main():
            pass
    """
    async with worker_of(make_app(tmp_path, app, TEXT)) as worker:
        assert await ask(worker, TEXT="") == [{"OUT": "helped"}]
