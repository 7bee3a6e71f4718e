"""A chat completion as OpenAI's clients ask for one: what the adapters' server understands of it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.lib.serving.refusals import Refusal


class _Strict(BaseModel):
    """What is not known is refused: passed over in silence, it would be taken for done."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Text(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Text]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class Schema(_Strict):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class Form(_Strict):
    """response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    def schema_asked(self) -> dict[str, Any] | None:
        """What the answer is held to; None: to nothing."""
        if self.type == "json_schema" and self.json_schema is None:
            raise Refusal(400, "response_format.json_schema: not found, expected a schema.", param="response_format")
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(_Strict):
    include_usage: bool = False


class Chat(_Strict):
    """A body of POST /v1/chat/completions. What is left out is as the model was evaluated: greedy."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Form | None = None
    n: Literal[1] | None = None
    user: str | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]


def read(body: dict[str, Any]) -> Chat:
    """Raises: Refusal, naming the first field that cannot be used."""
    try:
        return Chat.model_validate(body)
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        message = first["msg"]
        if first["type"] == "extra_forbidden":
            message = "not known to the server of adapters; the server of a GGUF file may know it"
        raise Refusal(400, f"{field}: {message}.", param=field) from None
