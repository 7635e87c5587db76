"""What a model's generation_config.json recommends is what is done where a request does not say."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.params import SamplingParams
from softprompt_inference.convert import to_params
from softprompt_inference.defaults import read_defaults


def folder_with(tmp_path: Path, **config: Any) -> Path:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    return tmp_path


def test_what_the_file_recommends_is_read_and_the_rest_of_it_is_not(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        min_p=None,
        max_new_tokens=5,
        do_sample=True,
        eos_token_id=2,
    )
    assert read_defaults(folder) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


def test_without_the_file_nothing_is_recommended(tmp_path: Path) -> None:
    assert read_defaults(tmp_path) == {}


def test_a_value_that_no_request_may_have_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_defaults(folder_with(tmp_path, temperature=7, repetition_penalty=1.1)) == {
            "repetition_penalty": 1.1
        }
    assert "temperature" in caplog.text


def test_what_a_request_says_comes_first() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    assert to_params(pb.SamplingParams(), defaults) == SamplingParams(max_tokens=None, temperature=0.6, top_k=20)
    said = pb.SamplingParams(temperature=1, top_k=-1)
    assert to_params(said, defaults) == SamplingParams(max_tokens=None, temperature=1, top_k=-1)
