"""Requests: OpenAI's names, fluxc's own beside them. What is not here is refused by name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_TOKENS = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
# A parameter of OpenAI's that may be sent as long as it asks for nothing.
Zero = Annotated[float, Field(ge=0, le=0)]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Sampling(BaseModel):
    """What both kinds of request share. Tokens are drawn at temperature 1 unless another is given, as OpenAI's are."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: str | None = None
    budget: Annotated[
        float | None,
        Field(description="fluxc: largest share of routable layers that may run full attention, 0 to 1"),
    ] = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS, description="fluxc: 0 is all")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, description="fluxc")] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10, description="fluxc")] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS, description="fluxc")] | None = None
    ignore_eos: Annotated[bool, Field(description="fluxc: go on after the end of text")] | None = None

    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _stream_options_belong_to_streams(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """All stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def choices(self) -> int:
        """Answers to one prompt."""
        return self.n or 1

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with a chunk of counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampling):
    """`POST /v1/completions`: one prompt or several, as text or as token ids."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[Any]:
        """Each prompt, for the engine."""
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        return list(self.prompt) if several else [self.prompt]


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message. What OpenAI's clients send back of an answer that has none of it may stand there as null."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(BaseModel):
    """The only format of answers."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Any:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say the same thing: give one of them")
        return self
