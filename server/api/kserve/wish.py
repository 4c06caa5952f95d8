"""KServe v2 for our own models: the infer request, and Triton's generate extension. Bodies to drafts.

The model in the path is the base or an adapter. A request is names with values: `text_input` is the prompt,
the others are parameters; in which of the places that the two protocols know a value stands (beside
`text_input`, in `parameters`, in `inputs` as a tensor, in `sampling_parameters` as JSON) makes no difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.api.adapter_fields import adapter_wish
from server.api.defaults import first_given
from server.api.http import Exchange
from server.api.json_body import parse_object
from server.api.kserve.render import EXTRAS, KServeWriter, RenderOptions, whole_generate, whole_infer
from server.api.kserve.schema import NEUTRAL, GenerateBody, GenerateParameters, InferBody
from server.api.kserve.tensors import Tensor, read_tensors
from server.api.names import without_base
from server.api.ports import ModelCard, Tokenizer
from server.api.prompting import check_ids, check_num_prompts
from server.api.records import Accepted, Draft, FrameWriter, TextPrompt, WholeChoice
from server.api.schema import refuse_unsupported, stop_strings, validate
from server.api.shapes import shown
from server.api.state import ApiOptions
from server.errors import BadRequest, ContextTooLong
from server.types import SamplingParams

_USUAL_MAX_TOKENS = 16  # Triton's vLLM backend, and OpenAI's completions
_MAX_STOP_WORDS = 16
_LISTS = frozenset(
    ("stop", "stop_words", "bad_words", "stop_token_ids", "image", "embedding_bias_words", "lora")
)


@dataclass(frozen=True, slots=True)
class KServeWish:
    """`/infer`, `/generate`, `/generate_stream` of a model of ours."""

    model: str
    texts: tuple[str, ...]
    shape: tuple[int, ...] | None  # of the answer's tensors; None: the answer is no tensors
    parameters: GenerateParameters
    options: RenderOptions
    is_stream: bool

    def draft(self, card: ModelCard, tokenizer: Tokenizer, options: ApiOptions) -> Draft:
        asked = self.parameters
        check_num_prompts(len(self.texts), options, "text_input")  # before there is a prompt for each
        stop_token_ids = tuple(asked.stop_token_ids or ())
        check_ids(stop_token_ids, card.vocab_size, "stop_token_ids")
        if asked.end_id is not None:
            check_ids((asked.end_id,), card.vocab_size, "end_id")
            stop_token_ids = (*stop_token_ids, asked.end_id)
        name = self._adapter(card)
        return Draft(
            model=name,
            adapter=adapter_wish(asked, name, card, name_param="the model"),
            prompts=tuple(TextPrompt(text) for text in self.texts),
            sampling=_sampling(asked, card),
            max_tokens=asked.max_tokens,
            usual_max_tokens=_USUAL_MAX_TOKENS,
            min_tokens=asked.min_tokens or 0,
            stop=_stop_words(asked.stop),
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(asked.ignore_eos),
            keep_stop=bool(asked.include_stop_str_in_output),
        )

    def too_long(self, limit: int, num_prompt: int, max_tokens: int | None) -> ContextTooLong:
        asked = (
            "leave no room for an answer" if max_tokens is None else f"and max_tokens {max_tokens} exceed it"
        )
        return ContextTooLong(
            f"the context has {limit} tokens: the {num_prompt} of text_input {asked}",
            param="text_input" if max_tokens is None else "max_tokens",
        )

    def writer(self, accepted: Accepted) -> FrameWriter:
        return KServeWriter(accepted, self.options)

    def whole(self, accepted: Accepted, choices: Sequence[WholeChoice]) -> bytes:
        if self.shape is None:
            return whole_generate(accepted, choices[0], self.options)
        return whole_infer(accepted, choices, self.shape, self.options)

    def _adapter(self, card: ModelCard) -> str:
        """The model in the path, unless that is the base and a parameter names an adapter."""
        named = self.parameters.adapter
        if not named or card.is_base(named):
            return self.model
        if not card.is_base(self.model) and without_base(self.model, card) != without_base(named, card):
            raise BadRequest("the path and the parameters name two different adapters", param="lora_name")
        return named


def read_infer(body: dict[str, object], exchange: Exchange) -> KServeWish:
    """`POST /v2/models/{id}/infer`. Raises: BadRequest."""
    infer = validate(InferBody, body)
    tensors = read_tensors(infer.inputs)
    values = _joined(_values(tensors), infer.parameters or {})
    prompt = next((tensor for tensor in tensors if tensor.name == "text_input"), None)
    if prompt is None:
        raise BadRequest("inputs: there is no text_input", param="text_input")
    texts = _texts(list(prompt.elements))
    parameters = _parameters(values)
    extras, has_text = _extras(parameters), True
    if infer.outputs is not None:
        wanted = {output.name for output in infer.outputs}
        if unknown := wanted.difference(("text_output", *EXTRAS)):
            raise BadRequest(f"outputs: this model has no output {shown(min(unknown))}", param="outputs")
        extras, has_text = extras | wanted.intersection(EXTRAS), not wanted or "text_output" in wanted
    options = RenderOptions(infer.id, extras, has_text, parameters.exclude_input_in_output is False)
    return KServeWish(exchange.path_param("id"), texts, prompt.shape, parameters, options, is_stream=False)


def read_generate(body: dict[str, object], exchange: Exchange) -> KServeWish:
    """`POST /v2/models/{id}/generate`. Raises: BadRequest."""
    return _read_generate(body, exchange, is_stream=False)


def read_generate_stream(body: dict[str, object], exchange: Exchange) -> KServeWish:
    """`POST /v2/models/{id}/generate_stream`. Raises: BadRequest."""
    return _read_generate(body, exchange, is_stream=True)


def _read_generate(body: dict[str, object], exchange: Exchange, *, is_stream: bool) -> KServeWish:
    """`stream` in the body asks for what the path has settled, and is not looked at."""
    request_id, values = named_values(body)
    texts = _texts(values.get("text_input"))
    if len(texts) != 1:
        raise BadRequest("text_input: only /infer takes several prompts", param="text_input")
    parameters = _parameters(values)
    has_prompt = parameters.exclude_input_in_output is False
    if has_prompt and is_stream:
        raise BadRequest(
            "exclude_input_in_output: false is not possible in a stream", param="exclude_input_in_output"
        )
    options = RenderOptions(request_id, _extras(parameters), has_prompt=has_prompt)
    return KServeWish(exchange.path_param("id"), texts, None, parameters, options, is_stream)


def named_values(body: dict[str, object]) -> tuple[str | None, dict[str, object]]:
    """A generate request's id, and its values by name, wherever they stand. Raises: BadRequest."""
    if "inputs" in body and isinstance(body["inputs"], list):
        infer = validate(InferBody, body)
        return infer.id, _joined(_values(read_tensors(infer.inputs)), infer.parameters or {})
    generate = validate(GenerateBody, body)
    beside = {name: value for name, value in body.items() if name not in ("id", "parameters")}
    return generate.id, _joined(beside, generate.parameters or {})


def _values(tensors: Sequence[Tensor]) -> dict[str, object]:
    return {tensor.name: list(tensor.elements) for tensor in tensors}


def _joined(values: Mapping[str, object], others: Mapping[str, object]) -> dict[str, object]:
    """Raises: BadRequest for a name in both."""
    for name in values:
        if name in others:
            raise BadRequest(f"{shown(name)} is given twice", param=shown(name))
    return {**values, **others}


def _parameters(values: Mapping[str, object]) -> GenerateParameters:
    """Raises: BadRequest."""
    found = {name: value for name, value in values.items() if name != "text_input"}
    packed = found.pop("sampling_parameters", None)
    if isinstance(packed, list) and len(packed) == 1:
        packed = packed[0]
    if packed is not None:
        if not isinstance(packed, str):
            raise BadRequest("sampling_parameters must be JSON in a string", param="sampling_parameters")
        found = _joined(found, parse_object(packed.encode("utf-8")))
    for name, value in found.items():
        if isinstance(value, list) and len(value) == 1 and name not in _LISTS:
            found[name] = value[0]  # a tensor of one element
    refuse_unsupported(found, NEUTRAL)
    return validate(GenerateParameters, found)


def _texts(value: object) -> tuple[str, ...]:
    """Raises: BadRequest."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("text_input must be a string", param="text_input")
    if not texts or not all(texts):
        raise BadRequest("text_input must not be empty", param="text_input")
    return tuple(texts)


def _extras(asked: GenerateParameters) -> frozenset[str]:
    return frozenset(name for name in EXTRAS if getattr(asked, f"return_{name}"))


def _stop_words(value: object) -> tuple[str, ...]:
    """As stop_strings; TensorRT-LLM's clients write "no stop words" as [""]."""
    if value in ("", [""]):
        return ()
    return stop_strings(value, _MAX_STOP_WORDS)


def _sampling(asked: GenerateParameters, card: ModelCard) -> SamplingParams:
    """The request, then the model's generation_config, then vLLM's defaults."""
    usual = card.generation_defaults
    top_p = first_given(asked.top_p, usual.top_p, 1.0)
    return SamplingParams(
        temperature=first_given(asked.temperature, usual.temperature, 1.0),
        top_k=max(first_given(asked.top_k, usual.top_k, 0), 0),  # -1 and 0 both switch it off
        top_p=top_p or 1.0,  # 0 switches it off in TensorRT-LLM
        min_p=first_given(asked.min_p, usual.min_p, 0.0),
        repetition_penalty=first_given(asked.repetition_penalty, usual.repetition_penalty, 1.0),
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        seed=asked.seed,
    )
