"""The life of an app: requests one after the other, failures, the end. Rows K1, K11 to K16."""

from pathlib import Path

from tests.server.inferless.making import ask, make_app, worker_of

ECHO = """
    class InferlessPythonModel:
        def initialize(self):
            self.count = 0

        def infer(self, inputs, stream_output_handler):
            print("printed by the app", inputs)
            for word in inputs["TEXT"].split():
                stream_output_handler.send_streamed_output({"OUT": word})
            stream_output_handler.finalise_streamed_output()

        def finalize(self, args):
            pass
"""


async def test_outputs_come_in_order(tmp_path: Path) -> None:
    async with worker_of(make_app(tmp_path, ECHO)) as worker:
        assert await ask(worker, TEXT="a b c") == [{"OUT": "a"}, {"OUT": "b"}, {"OUT": "c"}]
