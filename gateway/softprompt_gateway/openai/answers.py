"""What the routes of `openai.routes` answer, for the OpenAPI document."""

from typing import Any, Literal

from pydantic import BaseModel

from softprompt_gateway.documented import AnswerModel

Stopped = Literal["stop", "length"]
StoppedChat = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(AnswerModel):
    """Of the prompts' tokens."""

    cached_tokens: int
    virtual_tokens: int


class Usage(AnswerModel):
    """What a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(AnswerModel):
    """Parallel lists over tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptToken(AnswerModel):
    """How likely a token is in one place of a prompt; its rank is null where it is not among those asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


class CompletionChoice(AnswerModel):
    """One completion of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Stopped
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, PromptToken] | None] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(AnswerModel):
    """Answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionPiece(AnswerModel):
    """A piece of one completion; the last one tells why it ended."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Stopped | None
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[str, PromptToken] | None] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionChunk(AnswerModel):
    """Event of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionPiece]
    usage: Usage | None = None


class LikelyToken(AnswerModel):
    """A token that could have stood in a place."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(LikelyToken):
    """A token of the answer, with the likeliest ones in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(AnswerModel):
    """Of each token."""

    content: list[ChosenToken]
    refusal: None


class AnsweredFunction(AnswerModel):
    """The function of a call; its arguments are JSON."""

    name: str
    arguments: str


class AnsweredCall(AnswerModel):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnsweredMessage(AnswerModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(AnswerModel):
    """One answer to a conversation."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: StoppedChat
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletion(AnswerModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class FunctionPiece(AnswerModel):
    """A piece of a call's function: its name at first, then pieces of the arguments."""

    name: str | None = None
    arguments: str


class CallPiece(AnswerModel):
    """A piece of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionPiece


class MessagePiece(AnswerModel):
    """A piece of what the assistant says."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallPiece] | None = None


class ChatPiece(AnswerModel):
    """A piece of one answer; the last one tells why it ended."""

    index: int
    delta: MessagePiece
    logprobs: ChatLogprobs | None
    finish_reason: StoppedChat | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunk(AnswerModel):
    """Event of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPiece]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class ModelAdapter(AnswerModel):
    """The adapter that a model is."""

    kind: str
    version: int
    digest: str
    num_virtual_tokens: int
    rank: int
    state: Literal["ready"]


class NamedModelAdapter(ModelAdapter):
    """One of the adapters that a model is put together of."""

    name: str


class ModelCard(AnswerModel):
    """Answer of `GET /v1/models/{id_}`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    adapter: ModelAdapter | None = None
    adapters: list[NamedModelAdapter] | None = None


class ModelList(AnswerModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(AnswerModel):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    virtual_tokens: int


class Detokenized(AnswerModel):
    """Answer of `POST /detokenize`."""

    prompt: str


class ResponseAnswer(BaseModel):
    """Answer of `POST /v1/responses`; what it repeats of the request is not listed."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[dict[str, Any]]


class ResponseEvent(BaseModel):
    """An event of a streamed response; what each kind has beside these is not listed."""

    type: str
    sequence_number: int


ANSWER_MODELS = (
    ResponseAnswer,
    ResponseEvent,
    Completion,
    CompletionChunk,
    ChatCompletion,
    ChatChunk,
    ModelCard,
    ModelList,
    Tokenized,
    Detokenized,
)
