"""The life of an app: requests one after the other, failures, the end. Rows K1, K11 to K16."""

import asyncio
import os
from pathlib import Path

import pytest

from server.errors import EngineFailed, Overloaded, PayloadTooLarge, Unavailable
from server.inferless.wire import MAX_BYTES, WINDOW
from server.inferless.worker import AppState, AppWorker
from tests.server.api.raw_http import until
from tests.server.inferless.making import (
    ECHO,
    all_of,
    ask,
    make_app,
    quick,
    submit,
    until_ready,
    worker_of,
)

# Writes down what happens to it, and does what TEXT says.
OBEDIENT = """
    import os
    from pathlib import Path

    JOURNAL = Path(__file__).parent / "journal"

    def note(line):
        with JOURNAL.open("a") as journal:
            journal.write(line + "\\n")

    class InferlessPythonModel:
        def initialize(self):
            note("initialize")

        def infer(self, inputs, stream_output_handler):
            send = stream_output_handler.send_streamed_output
            done = stream_output_handler.finalise_streamed_output
            note("infer " + inputs["TEXT"])
            for word in inputs["TEXT"].split():
                if word == "raise":
                    raise ValueError("as told")
                if word == "exit":
                    raise SystemExit(3)
                if word == "crash":
                    os._exit(9)
                if word == "forever":
                    while True:
                        send({"OUT": word})
                if word.startswith("gate="):
                    Path(word[5:]).read_text()  # until somebody writes into the pipe
                elif word == "done":
                    done()
                else:
                    send({"OUT": word})
            note("returned")

        def finalize(self, args):
            note("finalize")
"""


@pytest.fixture
def obedient(tmp_path: Path) -> Path:
    return make_app(tmp_path, OBEDIENT)


def journal(folder: Path) -> list[str]:
    return (folder / "journal").read_text().splitlines()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def gate(folder: Path, name: str = "gate") -> Path:
    """A pipe: who reads it waits for the one who opens it for writing."""
    path = folder.parent / name
    os.mkfifo(path)
    return path


async def open_gate(path: Path) -> None:
    await asyncio.to_thread(path.write_text, "")


# --- Requests -----------------------------------------------------------------------------------------------


async def test_K1_app_is_initialized_once_and_its_folder_stays_as_it_is(obedient: Path) -> None:
    before = contents(obedient)
    async with worker_of(obedient) as worker:
        assert await ask(worker, TEXT="a b") == [{"OUT": "a"}, {"OUT": "b"}]
        assert await ask(worker, TEXT="c") == [{"OUT": "c"}]

    assert journal(obedient) == [
        "initialize",
        *("infer a b", "returned", "infer c", "returned"),
        "finalize",
    ]
    after = contents(obedient)
    del after["journal"]
    assert before == after


async def test_K11_return_without_finalise_ends_the_stream_and_frees_the_worker(obedient: Path) -> None:
    async with worker_of(obedient) as worker:
        assert await ask(worker, TEXT="a") == [{"OUT": "a"}]
        assert await ask(worker, TEXT="") == []
        assert await ask(worker, TEXT="b") == [{"OUT": "b"}]


async def test_K12_finalise_twice_and_sends_after_it_do_nothing(obedient: Path) -> None:
    async with worker_of(obedient) as worker:
        assert await ask(worker, TEXT="a done b done c") == [{"OUT": "a"}]
        assert await ask(worker, TEXT="d") == [{"OUT": "d"}]
    assert journal(obedient).count("initialize") == 1


async def test_K12_finalise_ends_the_stream_at_once_even_if_infer_goes_on(obedient: Path) -> None:
    wait = gate(obedient)
    async with worker_of(obedient) as worker:
        assert await ask(worker, TEXT=f"a done gate={wait}") == [{"OUT": "a"}]
        assert "returned" not in journal(obedient)
        await open_gate(wait)
        assert await ask(worker, TEXT="b") == [{"OUT": "b"}]


async def test_K15_requests_run_one_after_the_other_in_order_of_arrival(obedient: Path) -> None:
    async with worker_of(obedient) as worker:
        runs = [submit(worker, TEXT=text) for text in ("1", "2", "3")]
        answers = await asyncio.gather(*map(all_of, runs))

    assert answers == [[{"OUT": "1"}], [{"OUT": "2"}], [{"OUT": "3"}]]
    assert journal(obedient)[1:-1] == ["infer 1", "returned", "infer 2", "returned", "infer 3", "returned"]


async def test_K16_app_blocks_when_its_reader_is_a_window_behind(tmp_path: Path) -> None:
    app = """
        class InferlessPythonModel:
            def initialize(self):
                pass

            def infer(self, inputs, handler):
                for number in range(100):
                    handler.send_streamed_output({"OUT": number})
    """
    async with worker_of(make_app(tmp_path, app)) as worker, other_worker(tmp_path) as other:
        run = submit(worker, TEXT="")
        await until(lambda: run.num_outputs == WINDOW)
        # The other app answers while this one waits for its reader.
        assert await ask(other, TEXT="free") == [{"OUT": "free"}]
        assert run.num_outputs == WINDOW

        assert [output["OUT"] for output in await all_of(run)] == list(range(100))


def other_worker(root: Path):  # type: ignore[no-untyped-def]
    return worker_of(make_app(root, ECHO, name="other"))


async def test_K14_reader_that_leaves_is_not_felt_by_the_app_nor_by_the_next_reader(obedient: Path) -> None:
    wait = gate(obedient)
    words = " ".join(f"w{i}" for i in range(3 * WINDOW))
    async with worker_of(obedient) as worker:
        run = submit(worker, TEXT=f"a gate={wait} {words}")
        assert dict(await anext(run)) == {"OUT": "a"}
        run.close()
        next_run = submit(worker, TEXT="mine")
        await open_gate(wait)

        assert await all_of(next_run) == [{"OUT": "mine"}]
    assert journal(obedient).count("returned") == 2
    assert journal(obedient).count("initialize") == 1


async def test_K14_reader_that_leaves_a_blocked_app_frees_it(obedient: Path) -> None:
    words = " ".join(f"w{i}" for i in range(3 * WINDOW))
    async with worker_of(obedient) as worker:
        run = submit(worker, TEXT=words)
        await until(lambda: run.num_outputs == WINDOW)
        run.close()

        assert await ask(worker, TEXT="b") == [{"OUT": "b"}]


async def test_reader_that_leaves_the_queue_takes_its_request_along(obedient: Path) -> None:
    wait = gate(obedient)
    async with worker_of(obedient) as worker:
        first = submit(worker, TEXT=f"gate={wait}")
        submit(worker, TEXT="left").close()
        last = submit(worker, TEXT="last")
        await open_gate(wait)
        await all_of(first)
        await all_of(last)
    assert "infer left" not in journal(obedient)


async def test_inputs_that_no_frame_can_hold_cost_only_their_request(obedient: Path) -> None:
    async with worker_of(obedient) as worker:
        with pytest.raises(PayloadTooLarge):
            await ask(worker, TEXT="x" * MAX_BYTES)
        assert await ask(worker, TEXT="b") == [{"OUT": "b"}]


async def test_queue_is_bounded(obedient: Path) -> None:
    wait = gate(obedient)
    async with worker_of(obedient, limits=quick(max_queued=2)) as worker:
        running_now = submit(worker, TEXT=f"gate={wait}")
        await until(lambda: (obedient / "journal").read_text().count("infer") == 1)
        queued = [submit(worker, TEXT="x") for _ in range(2)]
        with pytest.raises(Overloaded):
            submit(worker, TEXT="x")
        await open_gate(wait)
        for run in (running_now, *queued):
            await all_of(run)


async def test_memory_of_the_queue_is_bounded(obedient: Path) -> None:
    wait = gate(obedient)
    async with worker_of(obedient, limits=quick(max_queued_bytes=1000)) as worker:
        running_now = submit(worker, TEXT=f"gate={wait}")
        await until(lambda: (obedient / "journal").read_text().count("infer") == 1)
        queued = [submit(worker, TEXT="x " * 300) for _ in range(2)]
        with pytest.raises(Overloaded):
            submit(worker, TEXT="x")
        for run in queued:
            run.close()
        last = submit(worker, TEXT="x")
        await open_gate(wait)
        await all_of(running_now)
        assert await all_of(last) == [{"OUT": "x"}]


# --- Failures -----------------------------------------------------------------------------------------------


async def test_K13_app_that_raises_is_made_anew_before_its_next_request(obedient: Path) -> None:
    async with worker_of(obedient) as worker:
        run = submit(worker, TEXT="a raise b")
        queued = submit(worker, TEXT="next")
        assert dict(await anext(run)) == {"OUT": "a"}
        with pytest.raises(EngineFailed, match="ValueError: as told"):
            await anext(run)

        assert await all_of(queued) == [{"OUT": "next"}]
    assert journal(obedient) == [
        "initialize",
        *("infer a raise b", "finalize", "initialize"),
        *("infer next", "returned", "finalize"),
    ]


async def test_exit_in_infer_is_an_exception_like_any_other(obedient: Path) -> None:
    async with worker_of(obedient) as worker:
        with pytest.raises(EngineFailed, match="SystemExit"):
            await ask(worker, TEXT="exit")
        assert await ask(worker, TEXT="next") == [{"OUT": "next"}]


async def test_process_that_dies_in_a_request_is_replaced_for_the_queue(obedient: Path) -> None:
    async with worker_of(obedient) as worker:
        run = submit(worker, TEXT="a crash")
        queued = [submit(worker, TEXT=text) for text in ("b", "crash", "c")]
        assert dict(await anext(run)) == {"OUT": "a"}
        with pytest.raises(EngineFailed):
            await anext(run)

        assert await all_of(queued[0]) == [{"OUT": "b"}]
        with pytest.raises(EngineFailed):
            await all_of(queued[1])
        assert await all_of(queued[2]) == [{"OUT": "c"}]
    assert journal(obedient).count("initialize") == 3


async def test_process_that_dies_while_idle_is_replaced(tmp_path: Path) -> None:
    app = """
        import os, threading

        class InferlessPythonModel:
            def initialize(self):
                pass

            def infer(self, inputs, handler):
                handler.send_streamed_output({"PID": os.getpid()})
    """
    async with worker_of(make_app(tmp_path, app)) as worker:
        ((first,),) = [output.values() for output in await ask(worker, TEXT="")]
        assert isinstance(first, int)
        os.kill(first, 9)
        await until(lambda: worker.state is not AppState.READY)
        await until_ready(worker)
        ((second,),) = [output.values() for output in await ask(worker, TEXT="")]
    assert first != second


async def test_infer_that_takes_too_long_is_ended_with_its_process(obedient: Path) -> None:
    wait = gate(obedient)
    async with worker_of(obedient, limits=quick(infer_s=2.0)) as worker:
        with pytest.raises(EngineFailed):
            await ask(worker, TEXT=f"gate={wait}")
        assert await ask(worker, TEXT="next") == [{"OUT": "next"}]


FAILS_UNTIL_TOLD = """
    from pathlib import Path

    class InferlessPythonModel:
        def initialize(self):
            with Path("tries").open("a") as tries:
                tries.write("x")
            if not Path("repaired").exists():
                raise RuntimeError("no weights")

        def infer(self, inputs, handler):
            handler.send_streamed_output({"OUT": inputs["TEXT"]})
"""


async def test_app_that_cannot_start_is_refused_with_503_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_app(tmp_path, FAILS_UNTIL_TOLD)
    async with worker_of(folder, wait=False) as worker:
        await until(lambda: worker.state is AppState.FAILED)
        with pytest.raises(Unavailable) as refused:
            submit(worker, TEXT="x")
        assert refused.value.retry_after_s
        (folder / "repaired").touch()
        await until_ready(worker)
        assert await ask(worker, TEXT="x") == [{"OUT": "x"}]
    assert "no weights" in caplog.text
    assert len((folder / "tries").read_text()) >= 2


async def test_requests_that_wait_for_an_app_that_does_not_come_back_are_refused(tmp_path: Path) -> None:
    app = """
        from pathlib import Path

        class InferlessPythonModel:
            def initialize(self):
                if Path("broken").exists():
                    raise RuntimeError("no weights")

            def infer(self, inputs, handler):
                Path("broken").touch()
                raise ValueError
    """
    async with worker_of(make_app(tmp_path, app)) as worker:
        run, queued = (submit(worker, TEXT="") for _ in range(2))
        with pytest.raises(EngineFailed):
            await all_of(run)
        with pytest.raises(Unavailable):
            await all_of(queued)


async def test_initialize_that_takes_too_long_is_a_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = """
        import threading

        class InferlessPythonModel:
            def initialize(self):
                threading.Event().wait()
    """
    folder = make_app(tmp_path, app)
    async with worker_of(folder, wait=False, limits=quick(start_s=0.3)) as worker:
        await until(lambda: worker.state is AppState.FAILED)
    assert "initialize" in caplog.text


# --- The end ------------------------------------------------------------------------------------------------


async def test_stop_lets_requests_end_and_finalizes(obedient: Path) -> None:
    wait = gate(obedient)
    async with worker_of(obedient) as worker:
        run, queued = (submit(worker, TEXT=text) for text in (f"gate={wait} a", "b"))
        stopping = asyncio.create_task(worker.stop(drain_s=30))
        await until(lambda: is_refusing(worker))
        await open_gate(wait)

        assert await all_of(run) == [{"OUT": "a"}]
        assert await all_of(queued) == [{"OUT": "b"}]
        await stopping
    assert journal(obedient)[-1] == "finalize"


def is_refusing(worker: AppWorker) -> bool:
    try:
        worker.require_schema()
    except Unavailable:
        return True
    return False


async def test_stop_ends_what_does_not_end_by_itself(obedient: Path) -> None:
    """An app that never returns is discarded, told to stop, and killed."""
    wait = gate(obedient)
    async with worker_of(obedient, limits=quick(finalize_s=0.1)) as worker:
        run, queued = (submit(worker, TEXT=text) for text in (f"a gate={wait}", "b"))
        assert dict(await anext(run)) == {"OUT": "a"}
        await worker.stop(drain_s=0)

        for ended in (run, queued):
            with pytest.raises(Unavailable):
                await all_of(ended)
        assert worker.state is AppState.STOPPED


async def test_stop_does_not_wait_for_an_app_that_is_not_initialized(tmp_path: Path) -> None:
    app = """
        import threading
        from pathlib import Path

        class InferlessPythonModel:
            def initialize(self):
                Path("here").touch()
                threading.Event().wait()
    """
    folder = make_app(tmp_path, app)
    async with worker_of(folder, wait=False, limits=quick(finalize_s=600)) as worker:
        await until((folder / "here").exists)
        async with asyncio.timeout(30):
            await worker.stop(drain_s=0)


async def test_app_that_was_stopped_can_be_started_again(obedient: Path) -> None:
    async with worker_of(obedient) as worker:
        await worker.stop(drain_s=0)
        with pytest.raises(Unavailable):
            submit(worker, TEXT="x")
        worker.start()
        worker.start()
        await until_ready(worker)
        assert await ask(worker, TEXT="x") == [{"OUT": "x"}]


async def test_programs_that_an_app_has_started_end_with_it(tmp_path: Path) -> None:
    app = """
        import subprocess, sys

        class InferlessPythonModel:
            def initialize(self):
                self.helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

            def infer(self, inputs, handler):
                handler.send_streamed_output({"PID": self.helper.pid})
    """
    async with worker_of(make_app(tmp_path, app)) as worker:
        (output,) = await ask(worker, TEXT="")
        helper = output["PID"]
        assert isinstance(helper, int)
    await until(lambda: not is_running(helper))


def is_running(pid: int) -> bool:
    """Zombies are over: whoever inherited them has not looked yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# --- What an app prints, and where it runs ------------------------------------------------------------------


TALKATIVE = """
    import json, os, sys, subprocess

    class InferlessPythonModel:
        def initialize(self):
            print("loading")

        def infer(self, inputs, handler):
            print("the prompt is", inputs["TEXT"], flush=True)
            sys.stderr.write(inputs["TEXT"])
            os.write(1, b"\\x00\\x00\\x00\\x02{}")
            subprocess.run([sys.executable, "-c", "print('from a child')"])
            handler.send_streamed_output({"OUT": "fine"})
"""


async def test_prints_neither_disturb_nor_reach_our_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with worker_of(make_app(tmp_path, TALKATIVE)) as worker:
        assert await ask(worker, TEXT="xyzzy") == [{"OUT": "fine"}]
    seen = capfd.readouterr()

    assert "xyzzy" not in seen.out + seen.err + caplog.text
    assert "from a child" not in seen.out


async def test_prints_go_into_the_file_that_the_operator_names(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    async with worker_of(make_app(tmp_path, TALKATIVE), output_dir=logs) as worker:
        await ask(worker, TEXT="xyzzy")

    assert "the prompt is xyzzy" in (logs / "toy.log").read_text("utf-8", "replace")


async def test_exception_messages_stay_out_of_the_log(
    obedient: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They may quote the prompt; their type and place may be known."""
    async with worker_of(obedient) as worker:
        with pytest.raises(EngineFailed):
            await ask(worker, TEXT="raise")
        await ask(worker, TEXT="next")

    assert "as told" not in caplog.text
    assert "ValueError (app.py:" in caplog.text


async def test_app_finds_its_own_files_and_modules_even_if_ours_have_the_same_names(tmp_path: Path) -> None:
    app = """
        import json, os, sys
        import adapters
        import server

        class InferlessPythonModel:
            def initialize(self):
                self.weights = open("weights.txt").read()

            def infer(self, inputs, handler):
                handler.send_streamed_output({
                    "WORDS": [self.weights, server.WHOSE, adapters.WHOSE],
                    "URL": os.environ["MOTET_BASE_URL"],
                    "KEY": os.environ["MOTET_API_KEY"],
                    "TORCH": "torch" in sys.modules,
                })
    """
    folder = make_app(tmp_path, app)
    (folder / "weights.txt").write_text("light")
    (folder / "server.py").write_text("WHOSE = 'the app'")
    (folder / "adapters").mkdir()
    (folder / "adapters" / "__init__.py").write_text("WHOSE = 'the app, too'")
    async with worker_of(folder, base_url="http://127.0.0.1:1234", api_key="key") as worker:
        (output,) = await ask(worker, TEXT="")

    assert output == {
        "WORDS": ["light", "the app", "the app, too"],
        "URL": "http://127.0.0.1:1234",
        "KEY": "key",
        "TORCH": False,
    }
