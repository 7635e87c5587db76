"""What an engine is started with."""

from dataclasses import dataclass

CPU_STEP_TOKENS = 512
GPU_STEP_TOKENS = 4096
# On a CPU a token of a prompt takes some 0.2 to 0.5 ms, for which all who decode wait.
CPU_MIN_PROMPT_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """What an engine can do before it is known what it loads; attributes as in EngineConfig."""

    device: str
    native_cache_dir: str | None
    num_threads: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine, checked by whoever reads them from a user.

    Attributes:
        model_path: local Hugging Face folder; "": not known yet, and told before it is loaded.
        device: "cpu", "cuda", "cuda:1", or "auto" (cuda when there is one).
        dtype: "auto" (the model's own, bfloat16 on hardware that has it), "float32", "bfloat16" or "float16".
        page_size: KV positions in one page.
        kv_cache_bytes: memory for KV pages; None: planned from what the device has free.
        gpu_memory_utilization: share of a GPU's whole memory that weights, steps and KV pages may take together;
            None: nine tenths of what the weights leave free. Unused where kv_cache_bytes is set, and on a CPU.
        max_model_len: longest sequence; None: the model's own limit.
        max_num_sequences: most sequences in one batch.
        max_step_tokens: most tokens computed in one step; None: some hundreds on a CPU, thousands on a GPU.
        max_virtual_tokens: most virtual tokens of one adapter.
        max_loras: most LoRAs on the device, and so in one batch; 0: none are taken.
        max_lora_rank: largest rank of a LoRA.
        enable_prefix_caching: find what is computed again: beginnings of prompts, and soft prompts to their last
            virtual token. Off, every request computes everything, for measuring.
        share: requests with the same soft prompts find what others have computed of them and behind them. Off,
            each computes its own, for measuring; prompts without any find their beginnings all the same.
        look_ahead: launch a step of decodes before the host knows the tokens of the step before it; None: on a GPU
            only, which computes while the host works.
        num_threads: of torch on a CPU; None: torch's own choice.
        native_cache_dir: folder for CPU kernels compiled on this machine; None: torch's operations only.
    """

    model_path: str
    device: str = "auto"
    dtype: str = "auto"
    page_size: int = 16
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    max_num_sequences: int = 256
    max_step_tokens: int | None = None
    max_virtual_tokens: int = 512
    max_loras: int = 16
    max_lora_rank: int = 64
    enable_prefix_caching: bool = True
    share: bool = True
    look_ahead: bool | None = None
    num_threads: int | None = None
    native_cache_dir: str | None = None

    def preparation(self) -> Prepare:
        """What of it can be done before the model is known."""
        return Prepare(device=self.device, native_cache_dir=self.native_cache_dir, num_threads=self.num_threads)

    def step_tokens(self, device: str) -> int:
        """Most tokens computed in one step on a device like "cpu" or "cuda:0"."""
        return self.max_step_tokens or (CPU_STEP_TOKENS if device == "cpu" else GPU_STEP_TOKENS)

    def min_prompt_tokens(self, device: str) -> int:
        """Tokens of prompts that a step takes however many sequences decode in it."""
        return CPU_MIN_PROMPT_TOKENS if device == "cpu" else self.step_tokens(device)

    def looks_ahead(self, device: str) -> bool:
        """Whether steps are launched ahead on a device like "cpu" or "cuda:0"."""
        return device != "cpu" if self.look_ahead is None else self.look_ahead
