"""What `import softprompt` gives, and what it costs."""

import subprocess
import sys

import pytest
import softprompt


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_every_public_name_is_there_and_the_list_is_sorted() -> None:
    assert [name for name in softprompt.__all__ if not hasattr(softprompt, name)] == []
    # Classes before functions, capitals before small letters: the order that ruff keeps.
    assert softprompt.__all__[0] == "LLM"
    assert softprompt.__all__[1:] == sorted(softprompt.__all__[1:])
    assert set(softprompt.__all__) <= set(dir(softprompt))


def test_the_seeds_names_are_public() -> None:
    assert {"LLM", "SamplingParams", "PromptAdapterRequest", "RequestOutput"} <= set(softprompt.__all__)


def test_importing_the_package_does_not_import_torch_or_grpc() -> None:
    done = run_python(
        "import softprompt, sys; softprompt.SamplingParams(); "
        "print([name for name in ('torch', 'transformers', 'grpc', 'httpx') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_llm_without_its_libraries_names_the_extra_to_install() -> None:
    done = run_python("import sys; sys.modules['torch'] = None\nfrom softprompt import LLM")
    assert done.returncode == 1
    assert "MissingExtra" in done.stderr
    assert "pip install 'softprompt[inference]'" in done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoRaRequest'"):
        softprompt.LoRaRequest  # noqa: B018
