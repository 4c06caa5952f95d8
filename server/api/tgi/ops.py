"""What LoRAX and TGI tell about themselves: `/info`, and `/startup`, which answers by generating."""

from server.api.http import Endpoint, Exchange
from server.api.ports import Service
from server.api.prompting import tokenise_prompts
from server.api.records import TextPrompt
from server.api.shapes import lorax_body, to_json
from server.api.state import ServerState
from server.api.streaming import collect, while_connected
from server.api.tgi.wish import MAX_STOP_SEQUENCES
from server.errors import ServeError
from server.types import GenerationRequest, SamplingParams, StopCriteria

_PROBE = TextPrompt("Who?", keep_last=1)  # one token, so that any context holds it and the next
_NO_STORE = (b"cache-control", b"no-store")


def info_endpoint(state: ServerState) -> Endpoint:
    """`GET /info`: LoRAX's fields, then TGI's where they are called otherwise; null where this server has
    nothing to name.
    """

    async def endpoint(exchange: Exchange) -> None:
        card, options = state.require_service().card, state.options
        await exchange.answer(
            to_json(
                {
                    "model_id": card.id,
                    "model_sha": card.sha,
                    "model_dtype": f"torch.{card.dtype}",
                    "model_device_type": card.device.partition(":")[0],
                    "model_pipeline_tag": "text-generation",
                    "max_concurrent_requests": options.max_prompts,  # beyond: 429
                    "max_best_of": options.max_choices,
                    "max_stop_sequences": MAX_STOP_SEQUENCES,
                    "max_input_length": card.max_model_len - 1,
                    "max_total_tokens": card.max_model_len,
                    # A waiting request joins in the next step, however many are running.
                    "waiting_served_ratio": 0.0,
                    "max_batch_total_tokens": card.kv_tokens,
                    "max_waiting_tokens": 0,
                    "validation_workers": options.num_workers,
                    "eager_prefill": False,
                    "version": state.version,
                    "sha": None,
                    "docker_label": None,
                    "request_logger_url": None,
                    "max_input_tokens": card.max_model_len - 1,
                    "max_client_batch_size": options.max_prompts,
                    "router": "motet",
                }
            )
        )

    return endpoint


def startup_endpoint(state: ServerState) -> Endpoint:
    """`GET /startup`: 200 once a token could be generated; 503 while loading, 500 if it fails."""

    async def endpoint(exchange: Exchange) -> None:
        service = state.require_service()
        await while_connected(exchange, _answer(service, exchange))

    return endpoint


async def _answer(service: Service, exchange: Exchange) -> None:
    try:
        has_text = await _generates(service, exchange)
    except ServeError as error:
        await exchange.answer(to_json(lorax_body(error)), status=500, headers=[_NO_STORE])
        return
    if has_text:
        await exchange.answer(to_json({"status": "ok"}), headers=[_NO_STORE])
    else:
        failed = {"error": "Empty generation", "error_type": "failed healthcheck"}
        await exchange.answer(to_json(failed), status=500, headers=[_NO_STORE])


async def _generates(service: Service, exchange: Exchange) -> bool:
    """Whether the base model makes a token that can be shown. Raises: ServeError."""
    (prompt,) = await tokenise_prompts(service, service.tokenizer, [_PROBE])
    request = GenerationRequest(
        request_id=exchange.request_id,
        prompts=(prompt.ids,),
        sampling=SamplingParams(temperature=0.0),
        stop=StopCriteria(max_tokens=1, ignore_eos=True),
        received=exchange.received,
    )
    stream = service.submit(request, None)
    try:
        (choice,) = await collect(stream, 1)
    finally:
        stream.close()
    return any(token.text for token in choice.tokens)
