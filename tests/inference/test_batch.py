"""One message of many generations: deltas by columns, and what comes behind them."""

from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_inference.batch import Batch
from softprompt_inference.choice import Delta
from softprompt_inference.convert import write_response
from softprompt_inference.engine.messages import Finish, Logprobs
from softprompt_inference.generation import Accepted, Finished


class Tokens:
    """A vocabulary of letters."""

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def is_special(self, token_id: int) -> bool:
        return chr(token_id) == "z"


def batch() -> Batch[Accepted | Delta | Finished]:
    return Batch(lambda event, response: write_response(event, response, Tokens()))  # type: ignore[arg-type]


def delta(text: str, *, index: int = 0, logprobs: bool = False) -> Delta:
    ids = [ord(character) for character in text]
    return Delta(
        index=index,
        text=text,
        token_ids=ids,
        logprobs=[Logprobs(chosen=-1.0, top=[]) for _ in ids] if logprobs else [],
    )


def test_deltas_are_rows_of_columns() -> None:
    made = batch()
    made.add(7, delta("ab"))
    made.add(8, delta("", index=2))
    made.add(7, delta("c"))
    message = made.take()
    assert not message.events
    deltas = message.deltas
    assert (list(deltas.calls), list(deltas.indexes)) == ([7, 8, 7], [0, 2, 0])
    assert (list(deltas.texts), list(deltas.num_tokens)) == (["ab", "", "c"], [2, 0, 1])
    assert bytes(deltas.token_ids) == b"abc"


def test_what_follows_an_event_is_an_event_so_that_a_reader_of_columns_first_keeps_the_order() -> None:
    made = batch()
    made.add(1, delta("a"))
    made.add(2, Accepted(adapters=[], prompt_token_ids=[1], virtual_tokens=0))
    made.add(2, delta("b"))
    made.add(1, delta("c"))
    made.add(1, Finished(index=0, reason=Finish.STOP))
    made.end(1, pb.CallEnd())
    message = made.take()
    assert list(message.deltas.texts) == ["a", "c"], "another call's events are not in its way"
    kinds = [(event.call, event.response.WhichOneof("event")) for event in message.events]
    assert kinds == [(2, "accepted"), (2, "delta"), (1, "finished"), (1, None)]
    assert message.events[1].response.delta.text == "b"
    assert message.events[3].HasField("end")


def test_a_delta_with_logprobs_is_an_event() -> None:
    made = batch()
    made.add(1, delta("ab", logprobs=True))
    [event] = made.take().events
    assert [entry.chosen.token for entry in event.response.delta.logprobs] == ["a", "b"]


def test_its_size_is_never_less_than_the_messages() -> None:
    made = batch()
    assert made.num_bytes == 0
    for number, text in ((2**40, "é\u2028𝄞" * 50), (1, ""), (2, "x" * 1000)):
        made.add(number, delta(text))
    made.add(3, delta("y", logprobs=True))
    made.end(3, pb.CallEnd(reason="OVERLOADED", message="too many"))
    size = made.num_bytes
    assert made.take().ByteSize() <= size
    assert made.num_bytes == 0


def test_an_empty_batch_follows_the_one_that_was_taken() -> None:
    made = batch()
    made.add(1, delta("a"))
    made.take()
    assert made.take() == pb.GenerateManyResponse()
