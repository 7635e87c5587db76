"""What is kept of a tokenizer is what transformers makes of its files, and no other files' tokenizer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.text import Tokenizer
from softprompt_inference.text.chat import ChatMessage
from softprompt_inference.text.definition import read_definition
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which definitions are kept, empty at first."""
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


def test_what_is_kept_is_what_was_read(folder: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_definition(folder)
    assert len(list(kept.iterdir())) == 1
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", _refuse)
    assert read_definition(folder) == read


def test_a_kept_tokenizer_has_the_digest_and_ids_of_the_read_one(folder: Path) -> None:
    read, again = Tokenizer.load(folder), Tokenizer.load(folder)
    assert again.sha256 == read.sha256
    assert again.eos_token_ids == read.eos_token_ids
    assert (
        again.encode("a<|im_start|> 🦙  b")
        == AutoTokenizer.from_pretrained(folder)("a<|im_start|> 🦙  b").input_ids
    )


def test_weights_are_not_read_whatever_they_are_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a clone that git made, which has them a second time."""
    read = read_definition(folder)
    weights = folder / ".git" / "lfs" / "objects" / "c0ffee"
    weights.parent.mkdir(parents=True)
    with weights.open("wb") as file:
        file.truncate(2**27 + 1)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", _refuse)
    assert read_definition(folder) == read


def test_it_is_read_again_when_a_file_changes(folder: Path) -> None:
    read = read_definition(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ bos_token }}x"}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert read_definition(folder).chat_template == "{{ bos_token }}x" != read.chat_template


def test_it_is_read_again_when_a_template_is_added(folder: Path) -> None:
    read = read_definition(folder)
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    assert read_definition(folder).chat_template == "{{ eos_token }}" != read.chat_template


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"serialized": "x"}'])
def test_a_broken_kept_file_is_made_again(folder: Path, kept: Path, broken: str) -> None:
    read = read_definition(folder)
    [path] = kept.iterdir()
    whole = path.read_text()
    path.write_text(broken)
    assert read_definition(folder) == read
    assert path.read_text() == whole


def test_a_folder_that_cannot_be_written_is_no_hindrance(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path / "file"))
    assert read_definition(folder).special_tokens["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize("continued", [False, True])
def test_templates_are_rendered_as_transformers_renders_them(folder: Path, continued: bool) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim | tojson }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{{ strftime_now('%Y') }}"
    )
    (folder / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": 'A "question"'}, {"role": "assistant", "content": "An answer, "}]
    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
    )
    [ours] = Tokenizer.load(folder).encode_chat(
        [ChatMessage(**message) for message in messages],
        add_generation_prompt=not continued,
        continue_final_message=continued,
    )
    assert ours == theirs(text, add_special_tokens=False).input_ids


def test_a_start_that_finds_it_kept_imports_no_torch(folder: Path) -> None:
    read_definition(folder)
    program = (
        "import sys; from softprompt_inference.text import Tokenizer; "
        f"Tokenizer.load({str(folder)!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("read with transformers though it was kept")
