import pytest
import torch
from softprompt_inference.model.transfer import Download, upload, upload_bytes


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([], torch.int64), ([3, 1], torch.int32), ([[0.5], [0.25]], torch.float64)],
)
def test_what_is_uploaded_is_on_the_device_as_it_was(
    device: torch.device, values: list[object], dtype: torch.dtype
) -> None:
    tensor = upload(values, dtype, device)
    assert (tensor.device.type, tensor.dtype) == (device.type, dtype)
    assert tensor.tolist() == values


@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize("make", [bytes, bytearray])
def test_bytes_are_uploaded_wherever_they_lie(device: torch.device, make: type, start: int) -> None:
    values = torch.arange(6).view(2, 3).float()
    data = memoryview(make(bytes(start) + values.numpy().tobytes() + b"more"))
    tensor = upload_bytes(data[start:-4], (2, 3), torch.float32, device)
    assert tensor.device.type == device.type
    assert torch.equal(tensor.cpu(), values)


def test_what_is_downloaded_is_what_the_device_held_then(device: torch.device) -> None:
    logits = torch.arange(6, device=device).view(2, 3).float()
    download = Download(logits + 1, logits.argmax(-1))
    logits.zero_()
    assert download.lists() == [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [2, 2]]


def test_nothing_can_be_downloaded_too(device: torch.device) -> None:
    assert Download(torch.zeros(0, 4, device=device)).lists() == [[]]
