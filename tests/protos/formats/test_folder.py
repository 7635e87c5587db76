"""Folders: the two files are found, and what is missing is said."""

import pytest
from softprompt_api import formats
from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import read_folder


def test_a_folder_of_peft_is_read(peft_folders):
    files = read_folder(peft_folders["prompt tuning"])
    assert '"PROMPT_TUNING"' in files.config_json
    assert files.tensors_path.name == "adapter_model.safetensors"
    assert read_folder(str(peft_folders["prompt tuning"])) == files


def test_what_is_missing_is_said(tmp_path):
    def problem(path) -> str:
        with pytest.raises(AdapterInvalid) as refused:
            read_folder(path)
        assert refused.value.field == "path"
        return refused.value.message

    assert "there is no folder" in problem(tmp_path / "nowhere")
    inner = tmp_path / "default"
    inner.mkdir()
    assert "has no adapter_config.json" in problem(tmp_path)
    config = inner / "adapter_config.json"
    config.write_text("{}")
    assert f"perhaps {inner}" in problem(tmp_path)
    assert "is a file; give the folder" in problem(config)
    assert "has no adapter_model.safetensors" in problem(inner)
    (inner / "adapter_model.bin").write_bytes(b"")
    assert "a pickle file, which is never opened" in problem(inner)
    (inner / "adapter_model.safetensors").write_bytes(b"")
    read_folder(inner)
    config.write_bytes(b"\xff")
    assert "is not UTF-8" in problem(inner)
    config.write_bytes(b" " * (formats.MAX_CONFIG_BYTES + 1))
    assert "more than" in problem(inner)


def test_the_face_is_sorted_and_whole():
    assert formats.__all__ == sorted(formats.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(formats, name) for name in formats.__all__)
