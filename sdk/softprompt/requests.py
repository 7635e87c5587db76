"""What is asked of an `LLM` beside prompts and sampling parameters."""

from dataclasses import dataclass, field
from pathlib import Path

from softprompt_api.errors import InvalidArgument
from softprompt_api.names import check_name

_MAX_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class PromptAdapterRequest:
    """Which soft prompt a prompt runs with: `PromptAdapterRequest("tweet_adapter", 1, PATH)`.

    Within one LLM an id stands for one name and one content for good; a changed adapter needs another id.

    Attributes:
        prompt_adapter_name: 1 to 128 lower-case letters, digits, '.', '_' or '-'.
        prompt_adapter_id: a positive integer.
        prompt_adapter_local_path: PEFT folder, or a hub id where a hub is reachable.
        prompt_adapter_num_virtual_tokens: as scripts written for vLLM say it; compared with what the files say.
        prompt_adapter_task: from 0, of an adapter that was trained for several tasks; None otherwise.

    Raises InvalidArgument for a value that cannot be.
    """

    prompt_adapter_name: str
    prompt_adapter_id: int
    prompt_adapter_local_path: str | Path
    prompt_adapter_num_virtual_tokens: int | None = None
    prompt_adapter_task: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_name(self.prompt_adapter_name, field="prompt_adapter_name")
        _check_id(self.prompt_adapter_id, "prompt_adapter_id")
        _check_path(self.prompt_adapter_local_path, "prompt_adapter_local_path")
        task = self.prompt_adapter_task
        if task is not None and (isinstance(task, bool) or not isinstance(task, int) or task < 0):
            raise InvalidArgument("prompt_adapter_task must be a number from 0", field="prompt_adapter_task")

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.prompt_adapter_name

    @property
    def adapter_id(self) -> int:
        """The adapter's id."""
        return self.prompt_adapter_id

    @property
    def local_path(self) -> str:
        """Where the adapter is."""
        return str(self.prompt_adapter_local_path)

    @property
    def task(self) -> int | None:
        """The task, where the adapter has several."""
        return self.prompt_adapter_task


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """Which LoRA a prompt is computed with: `LoRARequest("my_lora", 1, PATH)`.

    Ids are as those of PromptAdapterRequest, and apart from them: LoRA 1 and soft prompt 1 are two adapters.

    Attributes:
        lora_name: 1 to 128 lower-case letters, digits, '.', '_' or '-'.
        lora_int_id: a positive integer.
        lora_path: PEFT folder, or a hub id where a hub is reachable.

    Raises InvalidArgument for a value that cannot be.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str | Path

    def __post_init__(self) -> None:
        check_name(self.lora_name, field="lora_name")
        _check_id(self.lora_int_id, "lora_int_id")
        _check_path(self.lora_path, "lora_path")

    @property
    def name(self) -> str:
        """The LoRA's name."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """The LoRA's id."""
        return self.lora_int_id

    @property
    def local_path(self) -> str:
        """Where the LoRA is."""
        return str(self.lora_path)

    @property
    def task(self) -> None:
        """None: a LoRA has no tasks."""
        return None


AdapterRequest = PromptAdapterRequest | LoRARequest


def _check_id(number: object, field: str) -> None:
    # bool is an int in Python, and True is nobody's id.
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= _MAX_ID:
        raise InvalidArgument(f"{field} must be a positive integer", field=field)


def _check_path(path: object, field: str) -> None:
    if not isinstance(path, str | Path) or not str(path):
        raise InvalidArgument(f"{field} must be a folder or a hub id", field=field)
