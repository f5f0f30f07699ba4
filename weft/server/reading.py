"""What a request's body asks for: its prompts as tokens, and everything that is checked before it is queued.

Pure work, on whatever is given: small bodies are read on the server's loop, others in a process beside it (`beside`).
Knows schemas, tokenizers and grammars; knows nothing of HTTP, of the engine or of processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any, TypeAlias

import msgspec
from pydantic import ValidationError

from weft.admission import limit_of
from weft.batching.params import SamplingParams, ThinkingLimit, shown
from weft.cache.prefixes import packed
from weft.errors import InputError
from weft.grammar import Grammars
from weft.server.anthropic import CountRequest, MessagesRequest
from weft.server.asked import Answered, Asked, Facts, Prompt, unpacked
from weft.server.chat import MOST_TOOLS_CHARACTERS, ChatRequest, DetokenizeRequest, Message, TokenizeRequest, ToolChoice
from weft.server.llamacpp import LlamaCompletion
from weft.server.ollama import LATEST, OllamaChat, OllamaGenerate, OllamaShow
from weft.server.refused import Refused, misread, unknown_model
from weft.server.responses import CONTINUED, ContinuedRequest, ResponsesRequest
from weft.server.schema import MOST_COMPLETIONS, MOST_SCORES, CompletionRequest, Sampling, StreamOptions
from weft.server.strict import no_constant
from weft.server.vectors import EmbeddingRequest, OllamaEmbed, RerankRequest, ScoreRequest, Vectors
from weft.speech.dialect import Dialect, thinks_already
from weft.speech.form import Tools, form
from weft.speech.listener import Speech
from weft.text import Tokenizer

_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")  # escapes of surrogates
# Other protocols': `chat` says it in OpenAI's terms.
Foreign: TypeAlias = MessagesRequest | OllamaChat | OllamaGenerate | ResponsesRequest | LlamaCompletion
Vectorial: TypeAlias = EmbeddingRequest | ScoreRequest | RerankRequest | OllamaEmbed
OllamaBody: TypeAlias = OllamaChat | OllamaGenerate | OllamaEmbed
Plain: TypeAlias = TokenizeRequest | DetokenizeRequest | OllamaShow  # answered without the model
Body: TypeAlias = CompletionRequest | ChatRequest | Foreign | Vectorial | Plain
BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest,
    "/v1/messages": MessagesRequest, "/v1/messages/count_tokens": CountRequest,
    "/v1/responses": ResponsesRequest, "/api/chat": OllamaChat, "/api/generate": OllamaGenerate,
    "/api/show": OllamaShow,
    "/v1/embeddings": EmbeddingRequest, "/v1/score": ScoreRequest, "/v1/rerank": RerankRequest,
    "/api/embed": OllamaEmbed,
    "/completion": LlamaCompletion, CONTINUED: ContinuedRequest,
}  # fmt: skip


def parsed(path: str, body: bytes) -> Body:
    """A body as its endpoint wants it. Raises `Refused`."""
    try:
        given = json.loads(body.decode(), parse_constant=no_constant)
    except RecursionError:
        raise Refused(400, "the body is nested too deeply to be read; send something flatter") from None
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8; send JSON in UTF-8") from None
    except ValueError as error:
        said = "a number has too many digits" if "int_max_str_digits" in str(error) else error
        raise Refused(400, f"the body is not JSON: {said}") from None
    if not isinstance(given, dict):
        raise Refused(400, f"the body must be a JSON object, not {shown(given)}")
    try:
        read = BODIES[path].model_validate(given)
    except ValidationError as error:
        raise misread(error.errors(include_url=False)) from None
    if _HALVES.search(body):  # fields that are texts are looked at already, and say which they are
        try:
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Refused(400, "the body holds half of a surrogate pair, which is no character; "
                               "send whole characters") from None  # fmt: skip
    return read


def rendered(path: str) -> bool:
    """True for endpoints whose bodies go through templates, which may take longer than any size tells."""
    return issubclass(BODIES[path], ChatRequest | Foreign)


def takes_long(body: Body) -> bool:
    """The same of any other body; and where each token's text begins takes long too."""
    echoed = isinstance(body, CompletionRequest) and body.echo
    return echoed or (isinstance(body, TokenizeRequest) and body.messages is not None)


class Reader:
    """Reads bodies for one model. `tokenizer`: None for a checkpoint without one."""

    def __init__(self, facts: Facts, tokenizer: Tokenizer | None) -> None:
        self.facts, self._given = facts, tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `InputError` if the checkpoint has none."""
        if self._given is None:
            raise InputError("this model has no tokenizer; send prompts as token ids to /v1/completions")
        return self._given

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.facts.vocabulary, frozenset(self.facts.ends), keep=0)

    def follow(self, schema: str) -> Answered:
        """Nothing, if it can be followed. Raises `InputError`."""
        self._grammars.grammar(schema)
        return Answered(b"")

    @property
    def _template(self) -> str:
        return self._given.template() if self._given is not None else ""

    @cached_property
    def _proposed(self) -> SamplingParams:
        return SamplingParams(**self.facts.proposed)

    def read(self, body: Body) -> Asked | Answered:
        """What it asks for. Raises `Refused` and `InputError`."""
        if (answer := self._without_model(body)) is not None:
            return Answered(msgspec.json.encode(answer))
        if isinstance(body, Foreign):
            return self._foreign(body)
        self._demand_model(body)
        if isinstance(body, Vectors):
            return self._vectors(body)
        assert isinstance(body, CompletionRequest | ChatRequest), "the others are answered without the model"
        return self._completion(body) if isinstance(body, CompletionRequest) else self._chat(body)

    def _without_model(self, body: Body) -> dict[str, Any] | None:
        """The answer to what needs no model; None for what does."""
        if isinstance(body, OllamaShow):
            return body.answer(self.facts.name, self.facts.length, self._template)
        if isinstance(body, OllamaBody) and body.only_loads:
            self._demand_model(body)
            return body.loaded(self.facts.name)
        if isinstance(body, TokenizeRequest | DetokenizeRequest):
            self._demand_model(body)
            return self._tokenized(body) if isinstance(body, TokenizeRequest) else self._detokenized(body)
        return None

    def _foreign(self, body: Foreign) -> Asked | Answered:
        """What another protocol asks for."""
        asked = self.read(_translated(body))
        assert isinstance(asked, Asked), "what is in other terms is answered by the model"
        if isinstance(body, CountRequest):
            return Answered(msgspec.json.encode({"input_tokens": len(unpacked(asked.prompts[0].tokens))}))
        return msgspec.structs.replace(asked, about=body.about()) if isinstance(body, ResponsesRequest) else asked

    def _demand_model(self, body: Body) -> None:
        name = (body.model or "").removesuffix(LATEST) if isinstance(body, OllamaBody) else body.model
        if name not in (None, "", self.facts.name):
            raise unknown_model(name, self.facts.name)

    def _completion(self, body: CompletionRequest) -> Asked:
        given = body.prompts()
        if len(given) * (body.n or 1) > MOST_COMPLETIONS:
            raise InputError(f"{len(given)} prompts with n {body.n} are more than {MOST_COMPLETIONS} completions")
        prompts = [self._encode(prompt) for prompt in given]
        scored = self._scored(body, prompts)
        shape = body.shape()
        more = {"logprobs": body.logprobs, "prompt_logprobs": scored, **(shape.alone() if shape else {})}
        params = body.params(self._proposed, body.max_tokens, **more)
        self._demand(prompts, params)
        if not body.echo:
            return self._asked(body, [Prompt(packed(tokens)) for tokens in prompts], params)
        return self._asked(body, list(map(self._before, given, prompts)), params, echo=True)

    def _scored(self, body: CompletionRequest, prompts: list[list[int]]) -> int | None:
        """How many of the likeliest tokens are to be known of each of a prompt's; None if nothing of them is."""
        if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
            raise InputError("max_tokens 0 leaves nothing to do; send echo true to score the prompt, or at least 1")
        alone = 0 if body.max_tokens == 0 else None  # then the prompt is scored in any case: there is nothing else
        scored = (body.logprobs if body.logprobs is not None else alone) if body.echo else None
        if body.prompt_logprobs is None:
            _demand_scores(prompts, scored)
            return scored
        if scored is not None and scored != body.prompt_logprobs:
            raise InputError(f"prompt_logprobs {body.prompt_logprobs} and, by echo, {scored}; send the same number")
        return _prompt_logprobs(body, prompts)

    def _chat(self, body: ChatRequest) -> Asked:
        if body.top_logprobs and not body.logprobs:
            raise InputError("top_logprobs wants logprobs true beside it; send that too, or leave both out")
        tools = _tools(body)
        dialect = self.tokenizer.dialect(tools is not None)
        rendered = self._rendered(body, dialect, tools is not None)
        thinking = not body.continue_final_message and thinks_already(dialect, rendered)
        tokens = self.tokenizer.conversation(rendered)
        more = self._form(body, dialect, thinking, tools) | self._limit(body, dialect, thinking)
        more |= {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
        more |= {"prompt_logprobs": _prompt_logprobs(body, [tokens])}
        speech = None
        if tools is not None or dialect.thoughts is not None or dialect.channels is not None:
            names = list(tools.schemas) if tools is not None else []
            speech = Speech(names, thinking, body.skip_special_tokens, body.continue_final_message)
            more["skip_special_tokens"] = False  # marks may be some
        params = body.params(self._proposed, body.max_completion_tokens or body.max_tokens, **more)
        self._demand([tokens], params)
        return self._asked(body, [Prompt(packed(tokens))], params, speech=speech)

    def _rendered(self, body: ChatRequest, dialect: Dialect, tools: bool) -> str:
        """The conversation by the checkpoint's template."""
        messages, options = [message.plain() for message in body.messages], dict(body.chat_template_kwargs or {})
        for message in messages:
            if "tool_call_id" in message:
                message["tool_call_id"] = dialect.call_id(message["tool_call_id"])
            for call in message.get("tool_calls", ()):
                call["id"] = dialect.call_id(call["id"])
        if body.reasoning_effort is not None:
            template = self.tokenizer.template(tools)
            if "reasoning_effort" in template:
                options.setdefault("reasoning_effort", body.reasoning_effort)
            elif body.reasoning_effort == "none" and "enable_thinking" in template:
                options.setdefault("enable_thinking", False)
        listed = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if tools else []
        if body.continue_final_message and messages[-1]["role"] != "assistant":
            raise InputError("continue_final_message goes on with an answer, and the last message is none; send one of "
                             "the assistant's last")  # fmt: skip
        if not body.add_generation_prompt and not body.continue_final_message:
            raise InputError("add_generation_prompt false leaves the assistant nothing to begin with; send "
                             "continue_final_message true to have its last message continued")  # fmt: skip
        return self.tokenizer.rendered(messages, listed, options, body.continue_final_message)

    def _form(self, body: ChatRequest, dialect: Dialect, thinking: bool, tools: Tools | None) -> dict[str, Any]:
        """The form that the answer must have, as sampling parameters."""
        shape = body.shape()
        if tools is None and (shape is None or not (dialect.thoughts or dialect.channels)):
            return dict(shape.alone()) if shape is not None else {}
        answer = shape.as_rule() if shape is not None else ""
        return {"grammar": form(dialect, self.tokenizer.special, thinking, tools, answer)}

    def _limit(self, body: ChatRequest, dialect: Dialect, thinking: bool) -> dict[str, Any]:
        """How long the answer may be thought of, as sampling parameters."""
        if body.thinking_token_budget is None or dialect.thoughts is None:
            return {}
        begin, end = dialect.thoughts
        ends = self.tokenizer.conversation(end)
        return {"thinking": ThinkingLimit(body.thinking_token_budget, "" if thinking else begin, end, tuple(ends))}

    def _vectors(self, body: Vectors) -> Asked:
        """Prompts that become vectors."""
        about, width = body.about(), self.facts.width
        if (about.get("dimensions") or 1) > width:
            raise InputError(f"dimensions {about['dimensions']} are more than this model has; give at most {width}")
        params = SamplingParams(max_tokens=0, pooling=body.pooling or self.facts.pooling)
        texts, prompts = body.texts(), list[list[int]]()
        for number, text in enumerate(texts):
            try:
                tokens = self._encode(text)[: self.facts.length if body.truncates else None]
                self._demand([tokens], params)
            except InputError as error:
                raise InputError(f"text {number}: {error}" if len(texts) > 1 else str(error)) from None
            prompts.append(tokens)
        given = {field.name: getattr(params, field.name) for field in fields(params)}
        listed = [Prompt(packed(tokens)) for tokens in prompts]
        return Asked(
            listed, given, False, False, False, False, False, False, body.priority, body.timeout, about=about
        )  # fmt: skip

    def _tokenized(self, body: TokenizeRequest) -> dict[str, Any]:
        if (body.prompt is None) == (body.messages is None):
            raise InputError("give either prompt or messages")
        tokens = self._render(body.messages) if body.messages is not None else self._encode(body.prompt or "")
        return {"count": len(tokens), "max_model_len": self.facts.length, "tokens": tokens}

    def _detokenized(self, body: DetokenizeRequest) -> dict[str, Any]:
        if body.tokens and max(body.tokens) >= self.facts.vocabulary:
            outside = next(token for token in body.tokens if token >= self.facts.vocabulary)
            raise InputError(f"token id {outside} is not in the vocabulary, 0 to {self.facts.vocabulary - 1}")
        return {"prompt": self.tokenizer.decode(body.tokens)}

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise InputError("the prompt is empty; give at least one character")
        return self.tokenizer.encode(prompt)

    def _render(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer.chat([message.plain() for message in messages])

    def _demand(self, prompts: list[list[int]], params: SamplingParams) -> None:
        """Raises `InputError` for what can't run however much memory there is."""
        for tokens in prompts:
            limit_of(tokens, params, self.facts.vocabulary, self.facts.length, 0, frozenset(self.facts.ends))

    def _before(self, given: str | list[int], tokens: list[int]) -> Prompt:
        """A prompt as it stands before its answer."""
        if self._given is None:
            return Prompt(packed(tokens), "", packed([0] * len(tokens)))
        text = given if isinstance(given, str) else self.tokenizer.decode(tokens)
        # What was given as text has no special tokens; a tokenizer may put some around it.
        stream = self.tokenizer.stream((), skip_special_tokens=isinstance(given, str))
        for token in tokens:
            stream.step(token)
        stream.end()
        return Prompt(packed(tokens), text, packed([min(offset, len(text)) for offset in stream.offsets]))

    def _asked(
        self, body: Sampling, prompts: list[Prompt], params: SamplingParams, echo: bool = False,
        speech: Speech | None = None,
    ) -> Asked:  # fmt: skip
        options = body.stream_options or StreamOptions()
        if options.asks and not body.stream:
            raise InputError("stream_options are for streams; send stream true, or leave them out")
        given = {field.name: getattr(params, field.name) for field in fields(params)}
        return Asked(
            prompts, given, params.logprobs is not None, echo, body.stream, options.include_usage,
            options.continuous_usage_stats, body.return_progress, body.priority, body.timeout, speech,
            salt=body.cache_salt or "", scored=body.prompt_logprobs is not None,
        )  # fmt: skip


def _translated(body: Foreign) -> CompletionRequest | ChatRequest:
    """In OpenAI's terms. Raises `Refused`."""
    try:
        return body.chat()
    except ValidationError as error:
        raise misread(error.errors(include_url=False)) from None


def _prompt_logprobs(body: Sampling, prompts: Sequence[list[int]]) -> int | None:
    """As they are asked for by this name. Raises `InputError`."""
    if body.prompt_logprobs is not None and body.stream:
        raise InputError("prompt_logprobs come with whole answers; leave stream out, or them")
    _demand_scores(prompts, body.prompt_logprobs)
    return body.prompt_logprobs


def _demand_scores(prompts: Sequence[list[int]], likeliest: int | None) -> None:
    """Raises `InputError` if there were too many."""
    entries = sum(map(len, prompts)) * ((likeliest or 0) + 1) if likeliest is not None else 0
    if entries > MOST_SCORES:
        raise InputError(f"{entries} log-probabilities of prompts are more than {MOST_SCORES}; send fewer prompts")


def _tools(body: ChatRequest) -> Tools | None:
    """What may be called; None for nothing. Raises `InputError`."""
    functions, choice = body.functions(), body.tool_choice
    if isinstance(choice, ToolChoice):
        name = choice.function.name
        if name not in functions:
            raise InputError(
                f"tool_choice names {name}, which is no tool here; there are {', '.join(functions) or 'none'}"
            )
        functions = {name: functions[name]}
    elif choice == "required" and not functions:
        raise InputError("tool_choice required wants tools to choose from; send some, or leave it out")
    if not functions or choice == "none":
        return None
    schemas = {name: function.schema_of_arguments() for name, function in functions.items()}
    if (size := sum(len(json.dumps(schema)) for schema in schemas.values())) > MOST_TOOLS_CHARACTERS:
        raise InputError(f"the tools' schemas have {size} characters; at most {MOST_TOOLS_CHARACTERS} are taken")
    named = isinstance(choice, ToolChoice)  # once
    return Tools(schemas, named or choice == "required", body.parallel_tool_calls is not False and not named)
