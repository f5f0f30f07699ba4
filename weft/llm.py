"""`LLM`: the Python front, with the names and meanings that vLLM's users know. Knows the engine only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypedDict, TypeGuard

from weft.batching.params import SamplingParams, shown, token_ids
from weft.batching.request import Request
from weft.completion import Completion
from weft.embedding import unit
from weft.errors import InputError
from weft.launch.launcher import Launcher
from weft.model.description import pooling_of
from weft.opening import default_params, open_engine
from weft.workers import Progress


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


Prompt = str | TokensPrompt | TextPrompt


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability under the model (before temperature and penalties), its rank and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One completion. `finish_reason`: "stop", "length" or "error"; `stop_reason`: the stop text or token, if one ended
    it."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its completions. `time_to_first_token`: seconds from when the request was queued, if it got one.
    `prompt_logprobs`: of each token of the prompt, the first one's None, if they were asked for. `error`: why it could
    not be answered to its end; nothing else of the same call is concerned.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    time_to_first_token: float | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None


@dataclass(frozen=True)
class EmbeddingOutput:
    """A prompt's embedding."""

    embedding: list[float]


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """A prompt and its embedding. `error`: why there is none; nothing else of the same call is concerned."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput | None
    finished: bool
    error: str | None = None


def _one(prompts: Prompt | Sequence[Prompt]) -> TypeGuard[Prompt]:
    return isinstance(prompts, str | dict)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    return [prompts] if _one(prompts) or not isinstance(prompts, Iterable) else list(prompts)


class LLM:
    """A model, split over `tensor_parallel_size` ranks, or so many in each of `pipeline_parallel_size` sections, which
    have `layers` each, as many as each other, as given, or "auto": by their speed. layout: "auto" shares the model over
    as many ranks in whatever way is predicted to be best for what is to be `optimise`d, "latency" or "throughput", and
    says what the others would give. Also a context manager; `close()` ends the workers.

    model: directory, .gguf file, hub id (owner/repo:Q4_K_M), or None for the model in the package. dtype: what is
    computed in; weights, kv_cache_dtype: what weights, and keys and values, are kept in. overlap, wire, transport,
    link: as for weft serve. shares: relative sizes of the ranks' parts, or "auto": by their measured speed.
    reproducible: see docs/reproducible.md. num_threads: of each rank.
    max_model_len: tokens of prompt and answer. max_num_seqs, max_num_batched_tokens: limits of a batch.
    enable_prefix_caching: a prompt that begins like an earlier one is not computed again as far as they agree.
    token_interval: seconds between tokens that prompts leave to answers under way; None: throughput is all that counts.
    cores: pins the ranks to these. launcher, progress, recalibrate: see `Engine`.

    Raises `InputError` (a ValueError) for whatever the caller can change.
    """

    def __init__(
        self, model: str | Path | None = None, *, tensor_parallel_size: int | Literal["auto"] = 1,
        pipeline_parallel_size: int = 1, layers: Sequence[int] | Literal["auto"] | None = None, layout: str = "given",
        optimise: str = "latency", overlap: str = "auto", wire: str = "exact", transport: str = "auto",
        link: str = "none",
        shares: Sequence[float] | Literal["auto"] | None = None, reproducible: bool = False,
        num_threads: int | None = None, dtype: str = "float32", weights: str = "auto", kv_cache_dtype: str = "auto",
        max_model_len: int | None = None, max_num_seqs: int = 16, max_num_batched_tokens: int = 8192,
        cores: Sequence[int] | None = None, enable_prefix_caching: bool = True, token_interval: float | None = None,
        launcher: Launcher | None = None, progress: Progress | None = None, recalibrate: bool = False,
    ) -> None:  # fmt: skip
        self.engine = open_engine(
            model, ranks=tensor_parallel_size, sections=pipeline_parallel_size, layers=layers, layout=layout,
            optimise=optimise, overlap=overlap,
            wire=wire, shares=shares, reproducible=reproducible, threads=num_threads, dtype=dtype, weights=weights,
            kv=kv_cache_dtype, max_length=max_model_len, max_sequences=max_num_seqs,
            max_batch_tokens=max_num_batched_tokens, cores=cores, prefixes=enable_prefix_caching,
            token_interval=token_interval, transport=transport, link=link, launcher=launcher, progress=progress,
            recalibrate=recalibrate,
        )  # fmt: skip
        self._closed = False

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. What is closed stays so: calling this once more does nothing."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def _demand_open(self) -> None:
        if self._closed:
            raise InputError("this LLM was closed, and its workers are gone; open another one")

    def get_default_sampling_params(self, **changes: Any) -> SamplingParams:
        """What the checkpoint's `generation_config.json` proposes, with these changes."""
        return default_params(self.engine.path, **changes)

    def generate(
        self, prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Completes every prompt, in batches, and returns the outputs in the order of the prompts."""
        listed = _listed(prompts)
        requests = self._run(listed, self._wishes(sampling_params, len(listed)))
        return [self._output(prompt, request) for prompt, request in zip(listed, requests, strict=True)]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: Literal["mean", "last"] | None = None,
        dimensions: int | None = None, normalize: bool = True,
    ) -> list[EmbeddingRequestOutput]:  # fmt: skip
        """Each prompt's embedding: the mean of its tokens' last hidden states, or that of the last one; without
        `pooling` as the checkpoint says, else the mean. `dimensions`: the first so many numbers alone; `normalize`:
        to length 1."""
        width = self.engine.model.hidden
        if dimensions is not None and not 1 <= dimensions <= width:
            raise InputError(f"dimensions {shown(dimensions)} is not allowed; give a whole number from 1 to {width}")
        listed = _listed(prompts)
        wishes = [SamplingParams(max_tokens=0, pooling=pooling or pooling_of(self.engine.path))] * len(listed)
        outputs = []
        for request in self._run(listed, wishes):
            [completion] = self.engine.requests.settle(request)
            vector = completion.embedding.mean[:dimensions] if completion.embedding and not request.error else None
            made = (unit(vector) if normalize else vector).tolist() if vector is not None else None
            output = EmbeddingOutput(made) if made is not None else None
            outputs.append(EmbeddingRequestOutput(
                str(request.number), list(request.prompt), output, True, request.error or None
            ))  # fmt: skip
        return outputs

    def _run(self, prompts: Sequence[Prompt], wishes: Sequence[SamplingParams]) -> list[Request]:
        """All of them, to their end; what becomes of each is still to be settled."""
        self._demand_open()
        encoded = [self._encode(prompt) for prompt in prompts]  # all are looked at before any is run
        requests: list[Request] = []
        try:
            for ids, params in zip(encoded, wishes, strict=True):
                requests.append(self.engine.add(ids, params))
            while not self.engine.batcher.idle:
                self.engine.step()
        except BaseException:
            for request in requests:
                self._abandon(request)
            raise
        return requests

    def chat(
        self, messages: list[dict[str, str]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """The assistant's answer to `[{"role": "user", "content": ...}, ...]`, by the checkpoint's own template."""
        if self.engine.tokenizer is None:
            raise InputError(f"{self.engine.path} has no tokenizer; give prompts as prompt_token_ids")
        return self.generate({"prompt_token_ids": self.engine.tokenizer.chat(messages)}, sampling_params)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str | RequestOutput]:
        """Yields the first completion's text as it grows, by whole characters, and the whole output last."""
        self._demand_open()
        request = self.engine.add(self._encode(prompt), self._wishes(sampling_params, 1)[0])
        first, shown = request.sequences[0], 0
        try:
            while not request.finished:
                self.engine.step()
                completion = self.engine.requests.completions[first]
                if completion.settled > shown:
                    yield completion.text.text[shown : completion.settled]
                    shown = completion.settled
        except BaseException:
            self._abandon(request)
            raise
        yield self._output(prompt, request)

    def _abandon(self, request: Request) -> None:
        self.engine.forget([sequence for sequence in request.sequences if not sequence.finish_reason])
        self.engine.requests.settle(request)

    def _wishes(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:  # fmt: skip
        if given is None:
            given = self.get_default_sampling_params()
        wishes = list(given) if isinstance(given, Iterable) else [given] * count
        if not all(isinstance(each, SamplingParams) for each in wishes):
            raise InputError("sampling_params must be SamplingParams, or a list of them")
        if len(wishes) != count:
            raise InputError(f"{len(wishes)} sampling parameters for {count} prompts; give one, or one for each")
        return wishes

    def _encode(self, prompt: Prompt) -> list[int]:
        given: dict[str, Any] = dict(prompt) if isinstance(prompt, dict) else {"prompt": prompt}
        if "prompt_token_ids" in given:
            return list(token_ids(given["prompt_token_ids"], "prompt_token_ids"))
        text = given.get("prompt")
        if not isinstance(text, str):
            raise InputError(f"{shown(prompt)} is no prompt; give a text, or token ids as prompt_token_ids")
        if not text:
            raise InputError("the prompt is empty; give at least one character")
        if self.engine.tokenizer is None:
            raise InputError(f"{self.engine.path} has no tokenizer; give prompts as prompt_token_ids")
        return self.engine.tokenizer.encode(text)

    def _output(self, prompt: Prompt, request: Request) -> RequestOutput:
        completions = self.engine.requests.settle(request)
        outputs = [
            self._completion(index, completion, list(sequence.output), sequence.finish_reason)
            for index, (sequence, completion) in enumerate(zip(request.sequences, completions, strict=True))
        ]
        first = min((c.first_token for c in completions if c.first_token is not None), default=None)
        text = prompt if isinstance(prompt, str) else dict(prompt).get("prompt")
        scores = completions[0].scores
        scored = [self._logprobs(scores[at]) if at in scores else None for at in range(len(request.prompt))]
        return RequestOutput(
            str(request.number), str(text) if text is not None else None, list(request.prompt), outputs, True, first,
            scored if request.params.prompt_logprobs is not None else None, request.error or None,
        )  # fmt: skip

    def _completion(
        self, index: int, completion: Completion, tokens: list[int], reason: str | None
    ) -> CompletionOutput:
        asked = completion.sequence.request.params.logprobs is not None
        logprobs = [self._logprobs(chosen) for chosen in completion.chosen] if asked else None
        total = sum(chosen.logprob for chosen in completion.chosen) if asked else None
        return CompletionOutput(index, completion.text.text, tokens, logprobs, total, reason, completion.stop_reason)

    def _logprobs(self, chosen: Any) -> dict[int, Logprob]:
        text_of = self.engine.tokenizer.spelling.text_of if self.engine.tokenizer else (lambda token: "")
        return {token: Logprob(value, rank, text_of(token)) for token, (value, rank) in chosen.ranked().items()}
