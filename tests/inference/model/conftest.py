"""Tiny random models, adapters written by PEFT, and PEFT itself as the oracle."""

import contextlib
import copy
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from peft import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from softprompt_api.formats import AdapterVerifier, parse_config, read_folder
from softprompt_api.names import with_task
from softprompt_api.params import SamplingParams
from softprompt_inference.adapters.adapter import Adapter as HostAdapter
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.messages import (
    AddRequest,
    LoadAdapter,
    LoadLora,
    LoraModule,
    Output,
    SoftPromptPart,
    TextPart,
)
from softprompt_inference.model.runner import ModelRunner, load_runner
from softprompt_inference.model.source import native_kernels_dir
from softprompt_kernels import native
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 256
PAGE_SIZE = 16
LOGPROB_TOLERANCE = 1e-4
# Where the oracle's two likeliest tokens are closer than this, float32 cannot tell which is first.
WAIVED_MARGIN = 2e-4

# Large weights, so that random models have opinions: margins are healthy and every adapter changes the text.
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_WINDOW = 24
TINY_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_GQA),
    "llama_wide": transformers.LlamaConfig(**_GQA, head_dim=32),
    # Frequencies change for all positions once there is one behind the 1,026th.
    "llama_dynamic": transformers.LlamaConfig(
        **{**_GQA, "max_position_embeddings": 1026},
        head_dim=32,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "llama_widest": transformers.LlamaConfig(**_GQA, head_dim=320),
    "mistral": transformers.MistralConfig(**_GQA, sliding_window=_WINDOW),
    "qwen2": transformers.Qwen2Config(**_GQA),
    "qwen2_windows": transformers.Qwen2Config(
        **{**_GQA, "num_hidden_layers": 4},
        head_dim=32,
        use_sliding_window=True,
        sliding_window=_WINDOW,
        max_window_layers=2,
    ),
    "qwen3": transformers.Qwen3Config(**_GQA, head_dim=16),
    "gemma2": transformers.Gemma2Config(
        **{**_GQA, "num_hidden_layers": 4},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=_WINDOW,
        attn_logit_softcapping=5.0,
    ),
    "gpt2": transformers.GPT2Config(**{k: v for k, v in _COMMON.items() if k != "intermediate_size"}),
    "phi3": transformers.Phi3Config(**_GQA, sliding_window=_WINDOW),
    "opt": transformers.OPTConfig(
        **{k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "initializer_range")},
        ffn_dim=64,
        word_embed_proj_dim=32,
        init_std=0.25,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**_COMMON),
    "gpt_oss": transformers.GptOssConfig(
        **_GQA,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=_WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "hunyuan_moe": transformers.HunYuanMoEV1Config(**_GQA, head_dim=8, num_experts=4, moe_topk=2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter folder that PEFT wrote, and what our own reader made of it."""

    folder: Path
    load: LoadAdapter
    task: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA folder that PEFT wrote, and what the engine is sent of it."""

    folder: Path
    load: LoadLora


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt for an adapter (None: the base model), computed with a LoRA (None: without).

    Attributes:
        parts: in place of adapter and prompt_ids, ids and adapters in order.
        prompt_logprobs: as in SamplingParams; how likely the prompt is has an oracle of its own.
    """

    adapter: Adapter | None
    prompt_ids: tuple[int, ...]
    max_tokens: int = 12
    lora: Lora | None = None
    parts: tuple[tuple[int, ...] | Adapter, ...] = ()
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The oracle's greedy tokens, their logprobs, and how far the second choice was behind.

    Attributes:
        likeliest: by the pass that the logprobs are of.
    """

    token_ids: list[int]
    likeliest: list[int]
    logprobs: list[float]
    margins: list[float]


@contextlib.contextmanager
def _warnings_of_peft_ignored() -> Iterator[None]:
    """PEFT's warnings are not ours; what we serve runs outside of this."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Bases:
    """Models without adapters: float32, CPU, eager attention. Each is read once."""

    def __init__(self) -> None:
        self._models: dict[Path, PreTrainedModel] = {}

    def copy(self, model_path: Path) -> PreTrainedModel:
        """A copy to put adapters into; weights are those of all copies."""
        if model_path not in self._models:
            # Eager: other implementations drop Gemma's soft cap in some versions of transformers.
            self._models[model_path] = AutoModelForCausalLM.from_pretrained(
                model_path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        model = self._models[model_path]
        return copy.deepcopy(model, {id(each): each for each in (*model.parameters(), *model.buffers())})


class Oracle:
    """PEFT and transformers alone: float32, CPU, batch size one, no cache of ours."""

    def __init__(self, model_path: Path, bases: Bases) -> None:
        self._model_path = model_path
        self._bases = bases
        self._models: dict[Path | None, PreTrainedModel | PeftModel] = {}
        self._answers: dict[tuple[object, ...], Answer] = {}

    def answer(self, request: Request, guess: Sequence[int] = ()) -> Answer:
        """Greedy tokens, and their logprobs by one teacher-forced pass.

        Args:
            guess: what the tokens might be. The pass tells: those that are each the likeliest behind the ones
                before it are what is found a token at a time, and that is only done for others.
        """
        folder, lora = (each.folder if each else None for each in (request.adapter, request.lora))
        task = request.adapter.task if request.adapter else None
        parts = tuple((part.folder, part.task) if isinstance(part, Adapter) else part for part in request.parts)
        key = (folder, task, lora, request.prompt_ids, request.max_tokens, parts)
        if key not in self._answers:
            self._answers[key] = self.check(request, guess) or self._judge(request, self.greedy(request))
        return self._answers[key]

    def check(self, request: Request, guess: Sequence[int]) -> Answer | None:
        """The answer, by one pass; None: these are not the greedy tokens."""
        if len(guess) != request.max_tokens:
            return None
        answer = self._judge(request, guess)
        return answer if answer.likeliest == answer.token_ids else None

    @torch.inference_mode()
    def greedy(self, request: Request) -> list[int]:
        """Greedy tokens one after the other: by `generate`, where PEFT and transformers can."""
        if _by_parts(request):
            token_ids: list[int] = []
            while len(token_ids) < request.max_tokens:
                token_ids.append(int(self._logits(request, token_ids)[-1].argmax()))
            return token_ids
        with _warnings_of_peft_ignored():
            prompt = torch.tensor([request.prompt_ids])
            whole = self._model_of(request).generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request.max_tokens,
                min_new_tokens=request.max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **_tasks(request),
            )
        return whole[0, -request.max_tokens :].tolist()

    def _model_of(self, request: Request) -> PreTrainedModel | PeftModel:
        """The one that computes the request; adapters that are parts are put among the text by hand."""
        used = request.lora if _by_parts(request) else request.adapter or request.lora
        return self._model(used.folder if used else None)

    def _model(self, folder: Path | None) -> PreTrainedModel | PeftModel:
        if folder not in self._models:
            base = self._bases.copy(self._model_path)
            model = base if folder is None else PeftModel.from_pretrained(base, folder)
            self._models[folder] = model.eval()
        return self._models[folder]

    @torch.inference_mode()
    def _logits(self, request: Request, token_ids: Sequence[int]) -> Tensor:
        """[n + 1, vocabulary]: behind the prompt and behind each of the n tokens that follow it, by one pass."""
        with _warnings_of_peft_ignored():
            model = self._model_of(request)
            if _by_parts(request):
                logits = self._logits_of_parts(model, request, token_ids)
            else:
                ids = torch.tensor([[*request.prompt_ids, *token_ids]])
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **_tasks(request)).logits[0]
        return logits[-len(token_ids) - 1 :]

    def _logits_of_parts(
        self, model: PreTrainedModel | PeftModel, request: Request, token_ids: Sequence[int]
    ) -> Tensor:
        """PEFT computes one adapter: several, with rows put among the text's by hand.

        Keys and values stand in the cache before the pass, as PEFT puts them there.
        """
        parts = [*(request.parts or (request.adapter, request.prompt_ids)), tuple(token_ids)]
        given = parts[0].load if isinstance(parts[0], Adapter) and parts[0].load.are_key_values else None
        if given:
            del parts[0]
        embeddings = torch.cat([_embeddings(model, part) for part in parts if part])[None]
        before = {"use_cache": False} if given is None else _before(model, given, embeddings.shape[1])
        return model(inputs_embeds=embeddings, **before).logits[0]

    @torch.inference_mode()
    def prompt_logprobs(self, request: Request) -> list[float | None]:
        """How likely each token of a prompt's text is, by one pass; None where no logits are before it."""
        with _warnings_of_peft_ignored():
            model = self._model_of(request)
            if _by_parts(request):
                logits = self._logits_of_parts(model, request, ())
                tokens: list[int | None] = []
                for part in request.parts or (request.adapter, request.prompt_ids):
                    if not isinstance(part, Adapter):
                        tokens += part
                    elif not part.load.are_key_values:
                        tokens += [None] * part.load.num_virtual_tokens
                return _score(logits, tokens)
            ids = torch.tensor([request.prompt_ids])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **_tasks(request)).logits[0]
        # Kinds of virtual tokens that are embeddings have logits of their own in front.
        return _score(logits, [*[None] * (len(logits) - len(request.prompt_ids)), *request.prompt_ids])

    def _judge(self, request: Request, token_ids: Sequence[int]) -> Answer:
        logits = self._logits(request, token_ids)[:-1]
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        two = logprobs.topk(2).values
        return Answer(
            token_ids=list(token_ids),
            likeliest=logits.argmax(-1).tolist(),
            logprobs=logprobs.gather(1, torch.tensor(token_ids)[:, None]).flatten().tolist(),
            margins=(two[:, 0] - two[:, 1]).tolist(),
        )


def _by_parts(request: Request) -> bool:
    """Whether it has more adapters than PEFT computes at once."""
    return bool(request.parts or (request.adapter and request.lora))


def _tasks(request: Request) -> dict[str, Tensor]:
    if request.adapter is None or request.adapter.task is None:
        return {}
    return {"task_ids": torch.tensor([request.adapter.task])}


def _score(logits: Tensor, tokens: Sequence[int | None]) -> list[float | None]:
    """Log-probabilities of the tokens that are text, each by the logits of the position before it."""
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    return [
        float(logprobs[position - 1, token_id]) if position else None
        for position, token_id in enumerate(tokens)
        if token_id is not None
    ]


def _rows(load: LoadAdapter) -> Tensor:
    """[num_virtual_tokens, row_size] float32."""
    rows = torch.frombuffer(bytearray(load.rows), dtype=getattr(torch, load.dtype))
    return rows.view(-1, load.row_size).to(torch.float32)


def _embeddings(model: PreTrainedModel | PeftModel, part: tuple[int, ...] | Adapter) -> Tensor:
    """[n, hidden]"""
    if isinstance(part, Adapter):
        return _rows(part.load)
    return model.get_input_embeddings()(torch.tensor(part))


def _before(model: PreTrainedModel | PeftModel, given: LoadAdapter, num_tokens: int) -> dict[str, object]:
    """A fresh cache with keys and values at the positions before those of a pass."""
    config, count = model.config, given.num_virtual_tokens
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    # [layers, 2, heads, n, head dimension]
    layers = _rows(given).view(count, config.num_hidden_layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
    cache = transformers.DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys[None], values[None], number)
    return {
        "past_key_values": cache,
        "position_ids": torch.arange(count, count + num_tokens)[None],
        "attention_mask": torch.ones(1, count + num_tokens, dtype=torch.long),
    }


@dataclass(slots=True)
class Comparison:
    """What differed from the oracle, and how many tokens were too close to call."""

    problems: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_waived: int = 0

    def add(self, name: str, expected: Answer, outputs: Sequence[Output]) -> None:
        """Compare up to the first waived token: after it the texts may differ."""
        if len(outputs) != len(expected.token_ids):
            self.problems.append(f"{name}: {len(outputs)} tokens, not {len(expected.token_ids)}")
        for i, output in enumerate(outputs[: len(expected.token_ids)]):
            self.num_tokens += 1
            if output.token_id != expected.token_ids[i]:
                if expected.margins[i] < WAIVED_MARGIN:
                    self.num_waived += 1
                else:
                    self.problems.append(f"{name}: token {i} is {output.token_id}, not {expected.token_ids[i]}")
                return
            assert output.logprobs is not None
            difference = abs(output.logprobs.chosen - expected.logprobs[i])
            if not difference <= LOGPROB_TOLERANCE:
                self.problems.append(f"{name}: logprob of token {i} differs by {difference:.2g}")

    def assert_equal(self) -> None:
        """Fail on any difference, and where more than one token in fifty was too close to call."""
        assert not self.problems, self.problems[:5]
        assert self.num_waived * 50 <= self.num_tokens, f"{self.num_waived} of {self.num_tokens} tokens waived"


@dataclass
class Lab:
    """Makes models, adapters, engines and requests, and compares what comes out with the oracle."""

    folder: Path
    _bases: Bases = field(default_factory=Bases)
    _oracles: dict[Path, Oracle] = field(default_factory=dict)

    def model(self, name: str, dtype: torch.dtype = torch.float32) -> Path:
        """Folder of the tiny random model of that architecture, its weights in that dtype."""
        path = self.folder / str(dtype) / name
        if not path.exists():
            torch.manual_seed(0)
            # The model notes its dtype in its config, which others are made of too.
            config = copy.deepcopy(TINY_CONFIGS[name])
            AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(path)
        return path

    def runner(self, model_path: Path, **settings: object) -> ModelRunner:
        """A runner of 256 pages on the CPU, in float32, with native kernels where a compiler is installed."""
        return load_runner(self._config(model_path, settings), lambda _: None)

    def engine(self, model_path: Path, **settings: object) -> Engine:
        """An engine over a new runner; `settings` as in EngineConfig."""
        config = self._config(model_path, settings)
        return Engine(load_runner(config, lambda _: None), config)

    def _config(self, model_path: Path, settings: dict[str, object]) -> EngineConfig:
        defaults = {
            "device": "cpu",
            "dtype": "float32",
            "page_size": PAGE_SIZE,
            "kv_cache_bytes": 8 * 2**20,
            "native_cache_dir": str(native_kernels_dir()),
        }
        return EngineConfig(model_path=str(model_path), **{**defaults, **settings})

    def adapter(
        self, model_path: Path, kind: str, num_virtual_tokens: int, *, seed: int = 0, task: int = 1
    ) -> Adapter:
        """An adapter of random content, saved by PEFT and read by us; made once. It has three tasks or none."""
        folder = self.folder / f"{model_path.name}-{kind}-{num_virtual_tokens}-{seed}"
        if not folder.exists():
            with _warnings_of_peft_ignored():
                self._save_adapter(folder, model_path, kind, num_virtual_tokens, seed)
        return self.read_adapter(folder, task if kind == "multitask" else None)

    def _save_adapter(self, folder: Path, model_path: Path, kind: str, num_virtual_tokens: int, seed: int) -> None:
        torch.manual_seed(1000 + seed)
        base = self._bases.copy(model_path)
        model = get_peft_model(base, _peft_config(kind, num_virtual_tokens, seed, model_path))
        if kind.endswith("_from_text"):
            # What the model itself keeps of tokens: random keys and values leave a real model without an opinion.
            generator = torch.Generator().manual_seed(seed)
            token_ids = torch.randint(3, 1000, (1, num_virtual_tokens), generator=generator)
            if kind.startswith("prefix"):
                token_ids += 1000
            cache = base(token_ids, use_cache=True).past_key_values
            initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        if kind == "cpt":
            delta = model.prompt_encoder["default"].delta_embedding.weight
            delta.data = torch.randn_like(delta)
        if kind == "multitask":
            encoder = model.prompt_encoder["default"]
            for matrix in (encoder.prefix_task_cols, encoder.prefix_task_rows):
                matrix.data = torch.randn_like(matrix)
        _save(model, folder)

    def read_adapter(self, folder: Path, task: int | None = None) -> Adapter:
        """An adapter folder, through the reader that the services use."""
        files = read_folder(folder)
        spec = parse_config(files.config_json)
        data = files.tensors_path.read_bytes()
        verifier = AdapterVerifier(spec, size_bytes=len(data))
        verifier.feed(data)
        digest = with_task(verifier.finish().digest, task)
        load = HostAdapter.read(digest, spec, data, task=task).load_command()
        return Adapter(folder=folder, load=load, task=task)

    def lora(
        self,
        model_path: Path,
        *,
        targets: str | list[str] = "all-linear",
        rank: int = 8,
        seed: int = 0,
        **options: object,
    ) -> Lora:
        """A LoRA of random content, saved by PEFT; made once for each shape and seed.

        Args:
            options: of LoraConfig.
        """
        shape = hashlib.sha256(repr((targets, rank, sorted(options.items()))).encode()).hexdigest()[:12]
        folder = self.folder / f"{model_path.name}-lora-{shape}-{seed}"
        if not folder.exists():
            with _warnings_of_peft_ignored():
                torch.manual_seed(2000 + seed)
                config = LoraConfig(
                    task_type=TaskType.CAUSAL_LM,
                    target_modules=targets,
                    r=rank,
                    init_lora_weights=False,
                    **options,
                )
                _save(get_peft_model(self._bases.copy(model_path), config), folder)
        return read_lora(folder)

    def requests(
        self, adapters: Iterable[Adapter | None], *, seed: int = 0, length: int = 9, max_tokens: int = 12
    ) -> list[Request]:
        """One request for each, with prompts of unequal lengths from `length` on."""
        generator = torch.Generator().manual_seed(seed)
        return [
            Request(
                adapter=adapter,
                prompt_ids=tuple(
                    torch.randint(3, VOCAB_SIZE, (length + 3 * i % 17,), generator=generator).tolist()
                ),
                max_tokens=max_tokens,
            )
            for i, adapter in enumerate(adapters)
        ]

    def submit(self, engine: Engine, requests: Sequence[Request]) -> None:
        """Load what they need and queue them as requests "0", "1" …"""
        for i, request in enumerate(requests):
            parts = request.parts or (request.adapter, request.prompt_ids)
            prompt: list[TextPart | SoftPromptPart] = []
            for part in parts:
                if isinstance(part, Adapter):
                    engine.load_adapter(part.load)
                    prompt.append(SoftPromptPart(digest=part.load.digest))
                elif part is not None:
                    prompt.append(TextPart(token_ids=list(part)))
            lora = ""
            if request.lora is not None:
                engine.load_lora(request.lora.load)
                lora = request.lora.load.digest
            params = SamplingParams(
                max_tokens=request.max_tokens,
                temperature=0.0,
                logprobs=0,
                prompt_logprobs=request.prompt_logprobs,
            )
            engine.add(AddRequest(request_id=str(i), prompt=prompt, params=params, lora=lora))

    def serve(self, engine: Engine, requests: Sequence[Request]) -> list[list[Output]]:
        """Run the requests together to their ends; outputs of each."""
        self.submit(engine, requests)
        outputs: list[list[Output]] = [[] for _ in requests]
        while engine.has_work:
            for output in engine.step().outputs:
                assert not output.error_message, output.error_message
                outputs[int(output.request_id)].append(output)
        return outputs

    def oracle(self, model_path: Path) -> Oracle:
        """The oracle over that model."""
        return self._oracles.setdefault(model_path, Oracle(model_path, self._bases))

    def compare(
        self, model_path: Path, requests: Sequence[Request], outputs: Sequence[Sequence[Output]]
    ) -> Comparison:
        """Every request with the oracle's answer to it alone."""
        oracle = self.oracle(model_path)
        comparison = Comparison()
        for i, (request, own) in enumerate(zip(requests, outputs, strict=True)):
            guess = [output.token_id for output in own if output.token_id is not None]
            comparison.add(f"request {i}", oracle.answer(request, guess), own)
        return comparison


def _save(model: PeftModel, folder: Path) -> None:
    """Without the card for readers, which takes longer to write than the rest."""
    model.create_or_update_model_card = lambda _: None
    model.save_pretrained(folder)


def read_lora(folder: Path) -> Lora:
    """A LoRA folder of PEFT's as the engine's command: names, and rank and scale of each module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    modules = []
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        b = tensors[key.replace(".lora_A.", ".lora_B.")]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = _by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
        rank = _by_pattern(config["rank_pattern"], name, config["r"])
        assert a.shape[0] == b.shape[1] == rank
        modules.append(
            LoraModule(
                name=name,
                rank=rank,
                scale=alpha / (math.sqrt(rank) if config["use_rslora"] else rank),
                a=a.numpy().tobytes(),
                b=b.numpy().tobytes(),
            )
        )
    return Lora(folder=folder, load=LoadLora(digest=f"sha256:{folder.name}", modules=modules, dtype="float32"))


def _by_pattern(patterns: dict[str, int], name: str, default: int) -> int:
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?{key}", name)), default)


def _peft_config(kind: str, num_virtual_tokens: int, seed: int, model_path: Path) -> PeftConfig:
    match kind:
        case "prompt_tuning":
            return PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens)
        case "text_prompt":
            return PromptTuningConfig(
                task_type=TaskType.CAUSAL_LM,
                num_virtual_tokens=num_virtual_tokens,
                prompt_tuning_init=PromptTuningInit.TEXT,
                prompt_tuning_init_text=["Answer like a pirate.", "Reply in French, in one word."][seed],
                tokenizer_name_or_path=str(model_path),
            )
        case "p_tuning_mlp" | "p_tuning_lstm":
            return PromptEncoderConfig(
                task_type=TaskType.CAUSAL_LM,
                num_virtual_tokens=num_virtual_tokens,
                encoder_reparameterization_type=kind.removeprefix("p_tuning_").upper(),
                encoder_hidden_size=64,
                encoder_num_layers=2,
            )
        case "multitask":
            return MultitaskPromptTuningConfig(
                task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens, num_tasks=3, num_ranks=2
            )
        case "prefix" | "prefix_from_text":
            return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens)
        case "prefix_projected":
            return PrefixTuningConfig(
                task_type=TaskType.CAUSAL_LM,
                num_virtual_tokens=num_virtual_tokens,
                prefix_projection=True,
                encoder_hidden_size=24,
            )
        case "cartridge" | "cartridge_from_text":
            return CartridgeConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens)
        case "cpt":
            ids: Tensor = torch.randint(3, VOCAB_SIZE, (num_virtual_tokens,))
            return CPTConfig(
                task_type=TaskType.CAUSAL_LM,
                num_virtual_tokens=num_virtual_tokens,
                cpt_token_ids=ids.tolist(),
                cpt_mask=[1] * num_virtual_tokens,
                cpt_tokens_type_mask=[1, 2, 3, 4] * (num_virtual_tokens // 4) + [2] * (num_virtual_tokens % 4),
                opt_projection_epsilon=5.0,
                opt_projection_format_epsilon=5.0,
            )
    raise AssertionError(kind)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The laboratory; what it makes lasts for the session."""
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def llama(lab: Lab) -> Path:
    """Folder of a tiny Llama."""
    return lab.model("llama")


@pytest.fixture
def native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels are in use."""
    monkeypatch.setattr(native, "_library", None)
    try:
        native.load(native_kernels_dir())
    except native.CannotCompile as error:
        pytest.skip(str(error))


@pytest.fixture
def pairs(native_kernels: None) -> None:
    """Native kernels are in use that can compute layers in bfloat16."""
    if not native.supports_linear(torch.zeros(2, 2, dtype=torch.bfloat16)):
        pytest.skip("this processor does not multiply pairs of bfloat16")


@pytest.fixture
def wide(native_kernels: None) -> None:
    """Native kernels are in use that can compute layers in float32."""
    if not native.supports_wide(torch.zeros(2, 2)):
        pytest.skip("this processor has no wide vectors")
