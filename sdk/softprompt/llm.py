"""`LLM`: the engine in this process, without servers."""

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from softprompt_api.errors import InvalidArgument, SoftpromptError, Unsupported
from softprompt_api.formats import Role
from softprompt_api.params import SamplingParams
from softprompt_inference.choice import Choice
from softprompt_inference.defaults import read_defaults
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.keys import VirtualIds
from softprompt_inference.engine.lora import LoraSlots
from softprompt_inference.engine.messages import AddRequest, ModelInfo, SoftPromptPart
from softprompt_inference.engine.prompt import make_sequence
from softprompt_inference.model.runner import load_runner
from softprompt_inference.model.source import DEFAULT_MODEL, native_kernels_dir, resolve_model
from softprompt_inference.prompts import PartsPrompt, encode_parts, text_ids_of
from softprompt_inference.text import Encoded, Tokenizer

from softprompt.batch import Running, run, shown_prompt
from softprompt.composed import Composed, Message, Places, SoftPrompts
from softprompt.outputs import RequestOutput
from softprompt.prompts import ParsedPrompt, Prompt, check_each, one_each, parse_prompts
from softprompt.requests import LoRARequest, PromptAdapterRequest
from softprompt.resident import ResidentAdapters
from softprompt.tools import json_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_GIB = 2**30

Adapters = PromptAdapterRequest | Sequence[SoftPrompts] | None
Loras = LoRARequest | Sequence[LoRARequest | None] | None
_Encoded = tuple[str | None, Encoded, Places]


class LLM:
    """One base model with soft prompts and LoRAs, mixed freely in one batch. Not for several threads at once.

    Args:
        model: Hugging Face folder, .gguf file or hub id.
        enable_prompt_adapter: whether calls may name soft prompts.
        max_prompt_adapters: how many soft prompts stay loaded between calls.
        max_prompt_adapter_token: most virtual tokens of one soft prompt.
        enable_lora: whether calls may name LoRAs.
        max_loras: most LoRAs in one call; so many stay loaded between calls.
        max_lora_rank: highest rank of a LoRA.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda" or "cuda:1".
        max_model_len: longest sequence, virtual tokens included; None: the model's own limit.
        max_num_seqs: most sequences in one batch.
        max_num_batched_tokens: most tokens computed in one step; None: by device.
        kv_cache_gb: memory for the KV cache in GiB; None: planned from what is free.
        gpu_memory_utilization: share of a GPU's whole memory that weights, steps and KV cache may take together,
            where kv_cache_gb is not given; None: nine tenths of what the weights leave free.
        enable_prefix_caching: compute shared beginnings of prompts, and soft prompts, only once.
        share: share KV of soft prompts between requests; off for measuring.
        seed: makes calls without a seed of their own repeatable; None: random.
        tensor_parallel_size: 1, as scripts written for vLLM may say; a model is computed by one device.
        trust_remote_code: False, likewise; no code that comes with a model is run.

    Raises ValueError when there is no such model, and errors of softprompt_api.errors when it cannot be served.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        enable_prompt_adapter: bool = True,
        max_prompt_adapters: int = 64,
        max_prompt_adapter_token: int = 512,
        enable_lora: bool = True,
        max_loras: int = 16,
        max_lora_rank: int = 64,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        kv_cache_gb: float | None = None,
        gpu_memory_utilization: float | None = None,
        enable_prefix_caching: bool = True,
        share: bool = True,
        seed: int | None = None,
        tensor_parallel_size: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        if tensor_parallel_size != 1:
            raise Unsupported(
                f"tensor_parallel_size is {tensor_parallel_size}; a model is computed by one device",
                field="tensor_parallel_size",
            )
        if trust_remote_code:
            raise Unsupported("no code that comes with a model is run", field="trust_remote_code")
        if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
            raise InvalidArgument(
                f"gpu_memory_utilization is {gpu_memory_utilization}; it is a share, above 0 and at most 1",
                field="gpu_memory_utilization",
            )
        self._folder = folder = resolve_model(str(model), report=_log.info)
        config = EngineConfig(
            model_path=str(folder),
            device=device,
            dtype=dtype,
            kv_cache_bytes=None if kv_cache_gb is None else int(kv_cache_gb * _GIB),
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_len,
            max_num_sequences=max_num_seqs,
            max_step_tokens=max_num_batched_tokens,
            max_virtual_tokens=max_prompt_adapter_token,
            max_loras=max_loras,
            max_lora_rank=max_lora_rank,
            native_cache_dir=str(native_kernels_dir()),
            enable_prefix_caching=enable_prefix_caching,
            share=share,
        )
        self._tokenizer = Tokenizer.load(folder)
        self._defaults = read_defaults(folder)
        runner = load_runner(config, _log.info)
        self._engine = Engine(runner, config)
        self._eos_token_ids = self._tokenizer.ends_below(self.info.vocab_size)
        self._compile = runner.compile
        self._adapters = ResidentAdapters(self._engine, max_prompt_adapters)
        self._loras = ResidentAdapters(self._engine, max_loras, max_lora_rank=max_lora_rank)
        self._max_loras = max_loras
        self._enable_prompt_adapter = enable_prompt_adapter
        self._enable_lora = enable_lora
        self._random = random.Random(seed)
        self._request_ids = itertools.count()

    @property
    def info(self) -> ModelInfo:
        """The model, its limits and its memory."""
        return self._engine.info

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer, as transformers has it; the same one each time."""
        return self._transformers_tokenizer

    @cached_property
    def _transformers_tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self._folder, local_files_only=True, trust_remote_code=False
        )
        return made

    def get_default_sampling_params(self) -> SamplingParams:
        """Those of calls without any: with what the model's generation_config.json recommends."""
        return SamplingParams(**self._defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_adapter_request: Adapters = None,
        lora_request: Loras = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all in one batch; outputs in the prompts' order.

        Args:
            prompts: one or a list of: text, token ids, {"prompt": …}, {"prompt_token_ids": […]}, {"parts": […]}:
                texts, token ids and PromptAdapterRequests in order.
            sampling_params: one for all, or one for each; None: `get_default_sampling_params()`.
            prompt_adapter_request: one for all, or a list with one, several in a list, or None (no soft prompt)
                for each. They stand in front of the prompt, in order.
            lora_request: likewise; a prompt may have a soft prompt and a LoRA.
            use_tqdm: show progress on a terminal.

        Raises an error of softprompt_api.errors, before anything runs, that names the prompt which cannot be run.
        """
        encoded = [self._encode(index, prompt) for index, prompt in enumerate(parse_prompts(prompts))]
        return self._run(encoded, sampling_params, prompt_adapter_request, lora_request, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_adapter_request: Adapters = None,
        lora_request: Loras = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        use_tqdm: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, through the model's chat template.

        A message is {"role": …, "content": …}, its content a text, or a list of texts and PromptAdapterRequests;
        an assistant's may have "tool_calls", and one of the role "tool" a "tool_call_id", as over HTTP. The rest
        is as in `generate`.

        Args:
            tools: functions that may be called, {"type": "function", "function": {"name", …}}. The model is told
                of them, and its output is what it wrote: calls stand in it between <tool_call> and </tool_call>.
            chat_template_kwargs: values that the chat template reads, such as {"enable_thinking": False}.
        """
        told = [json_text(tool, what="a tool", field="tools") for tool in tools or ()]
        values = json_text(chat_template_kwargs or {}, what="chat_template_kwargs", field="chat_template_kwargs")
        encoded: list[_Encoded] = []
        for index, conversation in enumerate(_conversations(messages)):
            places = Places()
            with _naming(index):
                prompt = self._tokenizer.encode_chat(
                    [places.message(message) for message in conversation],
                    tools=told,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    chat_template_kwargs=values,
                    max_tokens=self.info.max_model_len,
                )
            encoded.append((self._tokenizer.decode(text_ids_of(prompt)), prompt, places))
        return self._run(encoded, sampling_params, prompt_adapter_request, lora_request, use_tqdm)

    def _encode(self, index: int, prompt: ParsedPrompt) -> _Encoded:
        places = Places()
        parts = [places.place(part) if isinstance(part, PromptAdapterRequest) else part for part in prompt.parts]
        with _naming(index):
            encoded = encode_parts(self._tokenizer, PartsPrompt(parts=parts), max_tokens=self.info.max_model_len)
        return prompt.text, encoded, places

    def _run(
        self,
        encoded: Sequence[_Encoded],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapters: Adapters,
        loras: Loras,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = one_each(sampling_params, len(encoded), "sampling_params")
        check_each(params, SamplingParams, "sampling_params")
        fronts: list[SoftPrompts] = one_each(adapters, len(encoded), "prompt_adapter_request")
        lora_requests = one_each(loras, len(encoded), "lora_request")
        check_each([lora for lora in lora_requests if lora is not None], LoRARequest, "lora_request")
        prompts = [
            Composed(text=text, encoded=prompt, inside=places.requests, given=given, lora=lora)
            for (text, prompt, places), given, lora in zip(encoded, fronts, lora_requests, strict=True)
        ]
        soft_prompts = [request for prompt in prompts for request in prompt.soft_prompts]
        self._check_enabled(soft_prompts, lora_requests)
        digests = self._adapters.load(soft_prompts)
        lora_digests = self._loras.load(lora for lora in lora_requests if lora is not None)
        choices = [
            self._make_choices(index, prompt, one_params, digests, lora_digests)
            for index, (prompt, one_params) in enumerate(zip(prompts, params, strict=True))
        ]
        with _progress(len(prompts), use_tqdm) as advance:
            run(self._engine, choices, advance)
        self._adapters.trim()
        self._loras.trim()
        return [
            RequestOutput(
                request_id=mine[0].request.request_id.partition("-")[0],
                prompt=prompt.text,
                prompt_token_ids=prompt.text_ids,
                outputs=[one.completion(self._tokenizer) for one in mine],
                prompt_adapter_request=prompt.given,
                lora_request=prompt.lora,
                num_cached_tokens=mine[0].choice.cached_tokens,
                prompt_logprobs=shown_prompt(mine[0], prompt.text_ids, self._tokenizer),
            )
            for prompt, mine in zip(prompts, choices, strict=True)
        ]

    def _check_enabled(
        self, requests: Sequence[PromptAdapterRequest], loras: Sequence[LoRARequest | None]
    ) -> None:
        if requests and not self._enable_prompt_adapter:
            raise InvalidArgument(
                "this LLM was made with enable_prompt_adapter=False, so it takes no prompt_adapter_request",
                field="prompt_adapter_request",
            )
        if any(loras) and not self._enable_lora:
            raise InvalidArgument(
                "this LLM was made with enable_lora=False, so it takes no lora_request", field="lora_request"
            )
        num_loras = len({request for request in loras if request is not None})
        if num_loras > self._max_loras:
            raise InvalidArgument(
                f"the call has {num_loras} LoRAs; at most {self._max_loras} run at one time (max_loras)",
                field="lora_request",
            )

    def _make_choices(
        self,
        index: int,
        prompt: Composed,
        params: SamplingParams,
        digests: Mapping[PromptAdapterRequest, str],
        lora_digests: Mapping[LoRARequest, str],
    ) -> list[Running]:
        """One choice for each of `params.n`, checked as the engine would, so that nothing runs when one cannot."""
        number = next(self._request_ids)
        seed = self._random.getrandbits(62) if params.seed is None else params.seed
        requests = [
            AddRequest(
                request_id=f"{number}-{choice}",
                prompt=prompt.parts(digests),
                params=params.of_choice(choice),
                eos_token_ids=self._eos_token_ids,
                seed=seed + choice,
                lora="" if prompt.lora is None else lora_digests[prompt.lora],
            )
            for choice in range(params.n)
        ]

        def role_of(request: PromptAdapterRequest) -> Role:
            return self._adapters.role_of(digests[request])

        with _naming(index):
            prompt.check(role_of)
            self._check(requests[0])
        return [
            Running(index=choice, request=request, choice=self._make_choice(choice, request, prompt))
            for choice, request in enumerate(requests)
        ]

    def _make_choice(self, index: int, request: AddRequest, prompt: Composed) -> Choice:
        told_ids = () if request.params.prompt_logprobs is None else prompt.text_ids
        return Choice(index, self._tokenizer.output_text(request.params), told_ids=told_ids)

    def _check(self, request: AddRequest) -> None:
        ids = VirtualIds(self.info.vocab_size)
        for digest in {part.digest for part in request.prompt if isinstance(part, SoftPromptPart)}:
            self._adapters.assign(digest, ids)
        slots = LoraSlots(1)
        if request.lora:
            slots.assign(request.lora)
        make_sequence(request, virtual_ids=ids, lora_slots=slots, max_model_len=self.info.max_model_len)
        if request.params.structured_outputs is not None:
            self._compile(request.params.structured_outputs).result()


def _conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> Sequence[Sequence[Message]]:
    if isinstance(messages, Sequence) and messages and isinstance(messages[0], Mapping):
        return [cast(Sequence[Message], messages)]
    return cast(Sequence[Sequence[Message]], messages)


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Say which prompt an error is about; the error stays of its kind."""
    try:
        yield
    except SoftpromptError as error:
        raise type(error)(
            f"prompts[{index}]: {error.message}", field=error.field, details=error.details
        ) from error


@contextmanager
def _progress(num_prompts: int, is_wanted: bool) -> Iterator[Callable[[], None]]:
    """A bar on the terminal's standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (is_wanted and console.is_terminal)) as bar:
        task = bar.add_task("prompts", total=num_prompts)
        yield lambda: bar.advance(task)
