"""How one route spells its answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.openai.generation import Choice
from softprompt_gateway.session import Delta


class Style(ABC):
    """How one route spells its answers. One instance serves one request; choices are numbered over all prompts."""

    id_prefix: str
    whole: str
    chunk: str

    @abstractmethod
    def opening(self, index: int, accepted: pb.Accepted) -> dict[str, Any] | None:
        """The first chunk of a choice, before its text."""

    def prompt(self, index: int, told: pb.PromptLogprobs) -> dict[str, Any] | None:  # noqa: ARG002
        """How likely the next tokens of a choice's prompt are, before its text."""
        return None

    @abstractmethod
    def delta(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """New text of a choice; None where nothing is to be said of it yet."""

    def held(self, index: int) -> dict[str, Any] | None:  # noqa: ARG002
        """What `delta` has not said, before the last chunk of a choice."""
        return None

    @abstractmethod
    def end(self, index: int, finished: pb.Finished) -> dict[str, Any]:
        """The last chunk of a choice."""

    @abstractmethod
    def choice(self, index: int, accepted: pb.Accepted, choice: Choice) -> dict[str, Any]:
        """A whole choice."""

    def extras(self, accepted: Sequence[pb.Accepted]) -> dict[str, Any]:  # noqa: ARG002
        """Further members of the whole answer and of the opening chunks."""
        return {}
