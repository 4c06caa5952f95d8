"""How long the first token takes: row Z7. What an engine does not need is the server's own."""

import asyncio
from collections.abc import Callable

import pytest
import torch

from benchmarks.metrics import spread
from benchmarks.proxy import first_token_s
from tests.e2e.running import RunningServer
from tests.server.api.conftest import make_state, port, service, state
from tests.server.api.fake_service import FakeService

__all__ = ["make_state", "port", "service", "state"]  # fixtures


@pytest.mark.slow
async def test_Z7_server_adds_no_more_than_5_ms_to_an_engine_that_takes_none(
    port: int, service: FakeService
) -> None:
    await asyncio.to_thread(first_token_s, port)
    took = [await asyncio.to_thread(first_token_s, port) for _ in range(200)]

    assert spread(took).p99 < 0.005
    assert len(service.requests) == 201


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_Z7_first_token_of_a_warm_model_takes_50_ms_at_the_client(
    launch: Callable[..., RunningServer],
) -> None:
    server = launch("--device", "cuda")
    address = int(server.url.rpartition(":")[2])
    first_token_s(address)
    took = spread([first_token_s(address) for _ in range(50)])

    assert took.p50 < 0.05
    assert took.p99 < 0.1
