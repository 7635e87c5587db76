"""Log-probabilities are those of exact arithmetic, as far as float32 can tell them."""

import torch
from softprompt_inference.model.logprobs import measure


def test_a_large_vocabulary_is_added_up_exactly() -> None:
    logits = 3 * torch.randn(8, 49_152, generator=torch.Generator().manual_seed(0))
    ids = logits.argmax(dim=-1)
    exact = torch.log_softmax(logits.double(), dim=-1)
    measured = measure(logits, ids, num_top=3)
    # A float32 of 16 to 32 is off by 1e-6.
    torch.testing.assert_close((logits - measured.total).double(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(measured.given.double(), exact.gather(1, ids[:, None])[:, 0], rtol=0, atol=2e-6)
    torch.testing.assert_close(measured.values.double(), exact.topk(3, dim=-1).values, rtol=0, atol=2e-6)
    assert torch.equal(measured.given, measured.values[:, 0])
    assert torch.equal(measured.ids, exact.topk(3, dim=-1).indices)
