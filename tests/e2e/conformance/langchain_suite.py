"""LangChain's standard tests of chat models, as they come, of a model at $OPENAI_BASE_URL.

Run by test_langchain.py, in an environment that has `langchain-openai` and `langchain-tests`.
"""

import os
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

MODEL = os.environ["CONFORMANCE_MODEL"]


class TestSoftprompt(ChatModelIntegrationTests):
    """Inputs other than text are not declared, so their tests skip themselves."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        # So small a model says the same again for ever where nothing keeps it from that.
        talk = {"temperature": 0, "frequency_penalty": 1, "max_tokens": 400, "stream_usage": True}
        return {**talk, "timeout": 240, "max_retries": 0}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """The second answer to the same long question."""
        model = ChatOpenAI(model=MODEL, stream_usage=True, max_tokens=4)
        question = "What is the capital of France? " * 40
        for _ in range(2):
            answer = sum_of(model.stream(question)) if stream else model.invoke(question)
        return answer


def sum_of(chunks: Any) -> Any:
    """The chunks as one message."""
    first, *rest = chunks
    for chunk in rest:
        first = first + chunk
    return first
