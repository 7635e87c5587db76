"""Who runs, with which pages, and who gives way."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from softprompt_api.errors import InternalError
from softprompt_inference.engine.keys import VirtualIds
from softprompt_inference.engine.lora import LoraSlots
from softprompt_inference.engine.messages import AddRequest, Output
from softprompt_inference.engine.plan import PageCopy, Sampled, StepPlan
from softprompt_inference.engine.prompt import make_sequence
from softprompt_inference.engine.scheduler import Scheduler
from softprompt_inference.engine.sequence import Sequence


def sequence_of(request: AddRequest, virtual_ids: VirtualIds) -> Sequence:
    return make_sequence(request, virtual_ids=virtual_ids, lora_slots=LoraSlots(0), max_model_len=32)


class Driver:
    """A scheduler whose every token is 9, checked after every operation."""

    def __init__(self, **limits: int) -> None:
        defaults = {
            "num_pages": 16,
            "page_size": 4,
            "max_model_len": 32,
            "max_num_sequences": 8,
            "max_step_tokens": 16,
        }
        self.scheduler = Scheduler(vocab_size=50, **{**defaults, **limits})
        self.virtual_ids = VirtualIds(50)
        self.virtual_ids.assign("sha256:a", 6)
        self.virtual_ids.assign("sha256:b", 3)
        self.virtual_ids.assign("sha256:k", 6, are_key_values=True)

    def add(self, *requests: AddRequest) -> None:
        for request in requests:
            self.scheduler.add(sequence_of(request, self.virtual_ids))
            self.scheduler.check()

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        self.scheduler.check()
        return plan

    def commit(self, plan: StepPlan) -> list[Output]:
        sampled = [Sampled(token_id=9) for chunk in plan.chunks if chunk.sample is not None]
        outputs = self.scheduler.commit(plan, sampled)
        self.scheduler.check()
        return outputs

    def follow(self, plan: StepPlan) -> StepPlan | None:
        following = self.scheduler.follow(plan)
        self.scheduler.check()
        return following

    def step(self) -> tuple[list[tuple[int, int]], list[str]]:
        """(start, length) of every chunk, and the request of every output."""
        plan = self.plan()
        outputs = self.commit(plan)
        shapes = [(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks]
        return shapes, [output.request_id for output in outputs]

    def step_until_preempted(self) -> list[str]:
        """The request of every output up to the first preemption."""
        outputs: list[str] = []
        for _ in range(100):
            if self.scheduler.stats(resident_adapters=0).preemptions:
                return outputs
            outputs += self.step()[1]
        raise AssertionError("nobody gave way")

    @property
    def counts(self) -> tuple[int, int, int]:
        """Running, waiting, used pages."""
        stats = self.scheduler.stats(resident_adapters=0)
        return stats.running, stats.waiting, stats.used_pages


@pytest.fixture
def prompt(fakes) -> Callable[..., AddRequest]:
    """A request whose ids are all different from those of other requests."""

    def make(request_id: str, length: int, *, max_tokens: int | None = 4) -> AddRequest:
        return fakes.request(request_id, [int(request_id)] * length, max_tokens=max_tokens)

    return make


def test_prompts_are_cut_to_the_budget_and_decodes_come_first(prompt) -> None:
    driver = Driver(max_step_tokens=10)
    driver.add(prompt("0", 3), prompt("1", 18))
    assert driver.step() == ([(0, 3), (0, 7)], ["0"])
    assert driver.step() == ([(3, 1), (7, 9)], ["0"])
    assert driver.step() == ([(4, 1), (16, 2)], ["0", "1"])
    assert driver.step() == ([(5, 1), (18, 1)], ["0", "1"])


def test_prompts_take_a_step_for_themselves_the_less_the_more_decode_beside_those_that_wait(prompt) -> None:
    driver = Driver(max_step_tokens=12, min_prompt_tokens=3)
    driver.add(*(prompt(str(index), 1) for index in range(3)), prompt("3", 24))
    # Nobody decodes: all of a step. Then three do, and one waits: a quarter of a step. Then nobody waits.
    assert driver.step() == ([(0, 1), (0, 1), (0, 1), (0, 9)], ["0", "1", "2"])
    assert driver.step()[0] == [(1, 1), (1, 1), (1, 1), (9, 3)]
    driver.add(*(prompt(str(index), 8) for index in range(4, 7)))
    # Three decode, and four wait, one of them in its prompt.
    assert driver.step()[0] == [(2, 1), (2, 1), (2, 1), (12, 6)]
    driver.scheduler.abort("0")
    driver.scheduler.abort("1")
    assert driver.step()[0] == [(3, 1), (18, 6), (0, 3)]


def test_a_prompt_moves_on_however_many_decode(prompt) -> None:
    driver = Driver(max_step_tokens=5, min_prompt_tokens=1)
    driver.add(*(prompt(str(index), 1) for index in range(4)), prompt("4", 9))
    assert driver.step()[0] == [(0, 1), (0, 1), (0, 1), (0, 1), (0, 1)]
    assert driver.step()[0] == [(1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_a_chunk_may_end_inside_the_virtual_tokens(fakes) -> None:
    driver = Driver(max_step_tokens=4)
    driver.add(fakes.request("0", "a", [1, 2]))
    assert driver.step() == ([(0, 4)], [])
    assert driver.step() == ([(4, 4)], ["0"])


def test_no_more_run_than_allowed(prompt) -> None:
    driver = Driver(max_num_sequences=2)
    driver.add(*(prompt(str(index), 1) for index in range(3)))
    driver.step()
    assert driver.counts == (2, 1, 2)


def test_no_more_run_than_a_step_has_tokens_so_none_starves(prompt) -> None:
    driver = Driver(max_step_tokens=3)
    driver.add(*(prompt(str(index), 1) for index in range(5)))
    assert driver.step()[1] == ["0", "1", "2"]
    assert driver.step()[1] == ["0", "1", "2"]


def test_a_small_request_does_not_overtake_a_large_one_that_waits(prompt) -> None:
    driver = Driver(num_pages=8, max_step_tokens=64)
    driver.add(prompt("0", 20), prompt("1", 16), prompt("2", 1))
    assert driver.step() == ([(0, 20)], ["0"])
    assert driver.counts == (1, 2, 5)


def test_a_newcomer_leaves_a_page_for_everybody_to_grow(prompt) -> None:
    driver = Driver(num_pages=8)
    driver.add(prompt("0", 4), prompt("1", 4), prompt("2", 20))
    driver.step()
    assert driver.counts == (2, 1, 2)


def test_out_of_pages_the_youngest_gives_way_and_comes_back_with_its_output(prompt) -> None:
    driver = Driver(num_pages=8, max_model_len=32)
    driver.add(prompt("0", 15, max_tokens=17), prompt("1", 7, max_tokens=17))
    outputs = driver.step_until_preempted()
    assert driver.counts[:2] == (1, 1)
    assert 0 < outputs.count("1") < 17
    while driver.scheduler.has_work:
        outputs += driver.step()[1]
    assert (outputs.count("0"), outputs.count("1")) == (17, 17)
    assert driver.counts == (0, 0, 0)


def test_who_comes_back_computes_only_what_is_no_longer_cached(prompt) -> None:
    driver = Driver(num_pages=8)
    driver.add(prompt("0", 12, max_tokens=6), prompt("1", 11, max_tokens=18))
    num_outputs = driver.step_until_preempted().count("1")
    # "0" finished in that step; it had taken one of the four pages that "1" gave back.
    assert driver.counts == (0, 1, 0)
    assert driver.step() == ([(12, 11 + num_outputs - 12)], ["1"])
    # What it finds of its own is no hit of the prompt.
    assert driver.scheduler.stats(resident_adapters=0).cached_prompt_tokens == 0


def test_a_preempted_sequence_is_never_in_the_plan(prompt) -> None:
    driver = Driver(num_pages=8)
    driver.add(*(prompt(str(index), 3, max_tokens=20) for index in range(4)))
    while driver.scheduler.has_work:
        plan = driver.plan()
        assert len(plan.chunks) >= driver.counts[0] - 1
        assert all(len(chunk.page_ids) * 4 >= chunk.start + len(chunk.token_ids) for chunk in plan.chunks)
        driver.commit(plan)


def test_the_last_position_is_computed_even_when_all_is_cached(fakes) -> None:
    driver = Driver()
    driver.add(fakes.request("0", range(8), max_tokens=1))
    driver.step()
    driver.add(fakes.request("1", range(8), max_tokens=1))
    assert driver.step() == ([(7, 1)], ["1"])


def test_output_pages_are_found_by_the_next_turn_of_a_conversation(fakes) -> None:
    driver = Driver()
    driver.add(fakes.request("0", [1, 2, 3], max_tokens=6))
    while driver.scheduler.has_work:
        driver.step()
    driver.add(fakes.request("1", [1, 2, 3, *[9] * 6, 4, 5]))
    assert driver.step() == ([(8, 3)], ["1"])


def test_equal_prompts_that_arrive_together_are_computed_once(fakes) -> None:
    driver = Driver(max_step_tokens=64)
    driver.add(*(fakes.request(str(index), range(14)) for index in range(3)))
    assert driver.step() == ([(0, 14)], ["0"])
    assert driver.step() == ([(14, 1), (12, 2), (12, 2)], ["0", "1", "2"])


def test_nobody_waits_for_a_prefix_that_saves_little(fakes) -> None:
    driver = Driver(max_step_tokens=64)
    driver.add(fakes.request("0", range(5)), fakes.request("1", [*range(4), *[7] * 9]))
    assert driver.step() == ([(0, 5), (0, 13)], ["0", "1"])


def test_a_running_shared_page_survives_the_end_of_its_first_holder(fakes) -> None:
    driver = Driver()
    driver.add(fakes.request("0", range(9), max_tokens=3))
    driver.step()
    driver.add(fakes.request("1", range(9), max_tokens=9))
    driver.step()
    assert driver.counts == (2, 0, 4)
    driver.scheduler.abort("0")
    driver.scheduler.check()
    assert driver.counts == (1, 0, 3)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_abort_in_any_state_frees_everything(prompt, steps: int) -> None:
    driver = Driver(max_step_tokens=8)
    driver.add(prompt("0", 20))
    for _ in range(steps):
        driver.step()
    driver.scheduler.abort("0")
    driver.scheduler.abort("unknown")
    driver.scheduler.check()
    assert driver.counts == (0, 0, 0)
    assert not driver.scheduler.has_work


def test_an_abort_while_a_step_is_computed_gives_no_output(prompt) -> None:
    driver = Driver()
    driver.add(prompt("0", 3), prompt("1", 3))
    plan = driver.plan()
    driver.scheduler.abort("0")
    driver.scheduler.check()
    assert [output.request_id for output in driver.commit(plan)] == ["1"]


def test_an_id_outside_the_vocabulary_fails_only_its_request(prompt) -> None:
    driver = Driver()
    driver.add(prompt("0", 3), prompt("1", 3))
    plan = driver.plan()
    outputs = driver.scheduler.commit(plan, [Sampled(token_id=50), Sampled(token_id=49)])
    driver.scheduler.check()
    assert [output.error_reason for output in outputs] == ["INTERNAL", ""]


def warm(driver: Driver, *requests: AddRequest) -> None:
    """Run requests to their ends, one after another."""
    for request in requests:
        driver.add(request)
        while driver.scheduler.has_work:
            driver.step()


def test_a_warm_adapter_leaves_only_the_text_to_compute(fakes) -> None:
    driver = Driver()
    driver.add(fakes.request("0", "a", [1, 2, 3]))
    first = driver.plan()
    driver.commit(first)
    driver.add(fakes.request("1", "a", [7]))
    plan = driver.plan()
    newcomer = plan.chunks[1]
    assert (newcomer.start, newcomer.token_ids) == (6, [7])
    own_page = newcomer.page_ids[1]
    assert plan.copies == [PageCopy(source=first.chunks[0].page_ids[1], target=own_page, num_positions=2)]
    assert newcomer.page_ids[0] == first.chunks[0].page_ids[0]
    [_, output] = driver.commit(plan)
    assert output.cached_tokens == 6


@pytest.mark.parametrize("max_tokens", [1, 4])
def test_the_last_page_of_a_soft_prompt_outlives_its_request_full_or_not(fakes, max_tokens: int) -> None:
    driver = Driver()
    warm(driver, fakes.request("0", "a", [1], max_tokens=max_tokens))
    assert driver.counts == (0, 0, 0)
    driver.add(fakes.request("1", "a", [7]))
    assert driver.step() == ([(6, 1)], ["1"])


def test_a_soft_prompt_smaller_than_a_page_is_not_computed_again(fakes) -> None:
    driver = Driver()
    warm(driver, fakes.request("0", "b", [1], max_tokens=1))
    driver.add(fakes.request("1", "b", [7] * 6))
    assert driver.step() == ([(3, 6)], ["1"])


def test_of_virtual_tokens_alone_the_last_is_computed(fakes) -> None:
    driver = Driver()
    warm(driver, fakes.request("0", "a", max_tokens=1))
    driver.add(fakes.request("1", "a"))
    assert driver.step() == ([(5, 1)], ["1"])


def test_soft_prompts_behind_text_or_one_another_are_found_with_what_precedes_them(fakes) -> None:
    driver = Driver()
    warm(driver, fakes.request("0", [1], "b", "a", [2], max_tokens=1))
    for request_id, parts, start in [
        ("1", ([1], "b", "a", [3]), 10),
        ("2", ([1], "b", [3, 3]), 4),
        ("3", ("b", "a", [3]), 0),
        ("4", ("b", [3]), 3),
        ("5", ("b", "a", [4, 4]), 9),
        ("6", ([1], "a", [4]), 0),
    ]:
        driver.add(fakes.request(request_id, *parts, max_tokens=1))
        [[(first, _)], _] = driver.step()
        assert (request_id, first) == (request_id, start)


def test_two_ends_in_one_page_are_both_found(fakes) -> None:
    driver = Driver(page_size=8)
    warm(driver, fakes.request("0", "b", "b", [1], max_tokens=1))
    for parts, start in ((("b", [2]), 3), (("b", "b", [2]), 6)):
        driver.add(fakes.request("1", *parts, max_tokens=1))
        assert driver.step()[0] == [(start, 1)]


def test_salts_share_no_part_of_a_soft_prompt(fakes) -> None:
    driver = Driver()
    warm(driver, fakes.request("0", "b", [1], salt="x", max_tokens=1))
    driver.add(fakes.request("1", "b", [1], salt="y", max_tokens=1))
    assert driver.step()[0] == [(0, 4)]


def test_a_source_is_kept_while_the_step_is_out_even_when_its_owner_leaves(fakes) -> None:
    driver = Driver()
    driver.add(fakes.request("0", "b", [1]))
    driver.step()
    driver.add(fakes.request("1", "b", [7, 7]))
    plan = driver.plan()
    [copy] = plan.copies
    driver.scheduler.abort("0")
    driver.scheduler.check()
    # The source and both pages of the newcomer.
    assert driver.counts == (1, 0, 3)
    assert copy.source not in plan.chunks[1].page_ids
    driver.commit(plan)
    assert driver.counts == (1, 0, 2)


def test_an_abort_of_who_copies_frees_source_and_pages(fakes) -> None:
    driver = Driver()
    warm(driver, fakes.request("0", "b", [1], max_tokens=1))
    driver.add(fakes.request("1", "b", [7, 7]))
    plan = driver.plan()
    driver.scheduler.abort("1")
    driver.scheduler.check()
    assert driver.counts == (0, 0, 0)
    assert driver.commit(plan) == []
    driver.add(fakes.request("2", "b", [8]))
    assert driver.step()[0] == [(3, 1)]


def test_who_fails_takes_the_rows_it_copied_out_of_the_cache(fakes) -> None:
    driver = Driver()
    warm(driver, fakes.request("0", "b", [1], max_tokens=1))
    driver.add(fakes.request("1", "b", [7]))
    plan = driver.plan()
    assert plan.copies
    [output] = driver.scheduler.commit(plan, [Sampled(token_id=0, error="not finite")])
    driver.scheduler.check()
    assert output.error_reason == "INTERNAL"
    driver.add(fakes.request("2", "b", [8]))
    assert driver.step()[0] == [(0, 4)]


def test_a_failed_step_takes_the_rows_it_copied_out_of_the_cache(fakes) -> None:
    driver = Driver()
    warm(driver, fakes.request("0", "b", [1], max_tokens=1))
    driver.add(fakes.request("1", "b", [7]))
    assert driver.plan().copies
    driver.scheduler.fail_planned(InternalError("the model failed"))
    driver.scheduler.check()
    assert driver.counts == (0, 0, 0)
    driver.add(fakes.request("2", "b", [8]))
    assert driver.step()[0] == [(0, 4)]


def test_a_source_that_was_evicted_is_computed_again(fakes) -> None:
    driver = Driver(num_pages=8)
    warm(driver, fakes.request("0", "a", [1], max_tokens=1), fakes.request("1", [2] * 30, max_tokens=1))
    driver.add(fakes.request("2", "a", [1], max_tokens=1))
    assert driver.step()[0] == [(0, 7)]


def test_plain_text_used_longer_ago_is_evicted_before_a_soft_prompt(fakes) -> None:
    driver = Driver(num_pages=8, max_step_tokens=64)
    warm(
        driver,
        fakes.request("0", "a", [1], max_tokens=1),
        fakes.request("1", [2] * 12, max_tokens=1),
        fakes.request("2", "a", [3], max_tokens=1),
        fakes.request("3", [4] * 20, max_tokens=1),
    )
    driver.add(fakes.request("4", "a", [1], max_tokens=1))
    assert driver.step()[0] == [(6, 1)]
    driver.add(fakes.request("5", [2] * 12, max_tokens=1))
    assert driver.step()[0][0][0] < 8


def test_the_soft_prompt_of_a_running_request_is_not_evicted(fakes) -> None:
    driver = Driver(num_pages=8)
    warm(driver, fakes.request("0", "b", [1], max_tokens=1))
    driver.add(fakes.request("long", "b", [1] * 2, max_tokens=15))
    driver.step()
    driver.add(fakes.request("flood", [2] * 20, max_tokens=1))
    driver.step()
    driver.step()
    driver.add(fakes.request("1", "b", [3], max_tokens=1))
    assert (3, 1) in driver.step()[0]


def test_a_source_that_would_take_the_last_page_is_given_up(fakes) -> None:
    driver = Driver(num_pages=8, max_step_tokens=64)
    warm(driver, fakes.request("0", "b", [1], max_tokens=1))
    driver.add(fakes.request("1", "b", [7] * 28, max_tokens=1))
    assert driver.step() == ([(0, 31)], ["1"])


def test_equal_adapters_that_arrive_together_are_computed_once(fakes) -> None:
    driver = Driver(max_step_tokens=64)
    driver.add(*(fakes.request(str(index), "a", [index, index]) for index in range(3)))
    assert driver.step()[0] == [(0, 8)]
    assert driver.step()[0] == [(8, 1), (6, 2), (6, 2)]


def test_a_soft_prompt_smaller_than_a_page_is_worth_waiting_for(fakes) -> None:
    driver = Driver(max_step_tokens=64)
    driver.add(*(fakes.request(str(index), "b", [index] * 2) for index in range(3)))
    assert driver.step()[0] == [(0, 5)]
    assert driver.step()[0] == [(5, 1), (3, 2), (3, 2)]


@pytest.mark.parametrize(("max_step_tokens", "start"), [(4, 4), (5, 4), (6, 6)])
def test_of_an_aborted_request_only_what_it_computed_is_found(fakes, max_step_tokens: int, start: int) -> None:
    driver = Driver(max_step_tokens=max_step_tokens)
    driver.add(fakes.request("0", "a", [1, 2]))
    driver.step()
    driver.scheduler.abort("0")
    driver.add(fakes.request("1", "a", [7]))
    assert driver.step()[0][0][0] == start


def test_a_preempted_request_computes_none_of_its_virtual_tokens_again(fakes) -> None:
    driver = Driver(num_pages=8, max_step_tokens=64)
    driver.add(fakes.request("0", "b", [1] * 12, max_tokens=12), fakes.request("1", "b", [2] * 3, max_tokens=20))
    driver.step_until_preempted()
    while driver.scheduler.has_work:
        starts = [start for start, _ in driver.step()[0]]
        assert all(start >= 3 for start in starts)


def test_without_prefix_caching_everything_is_computed(fakes) -> None:
    driver = Driver(max_step_tokens=64, enable_prefix_caching=False)
    requests = [fakes.request(str(index), "a", range(10), max_tokens=1) for index in range(3)]
    driver.add(*requests[:2])
    assert driver.step()[0] == [(0, 16), (0, 16)]
    driver.add(requests[2])
    plan = driver.plan()
    assert plan.copies == []
    assert [output.cached_tokens for output in driver.commit(plan)] == [0]


def test_check_notices_a_source_that_is_never_given_back(fakes) -> None:
    driver = Driver()
    sequence = sequence_of(fakes.request("0", "b", [1]), driver.virtual_ids)
    driver.scheduler.add(sequence)
    driver.step()
    sequence.source_page = 15
    with pytest.raises(AssertionError):
        driver.scheduler.check()


@pytest.mark.parametrize("limits", [{"num_pages": 7}, {"max_num_sequences": 0}, {"max_step_tokens": 0}])
def test_limits_that_cannot_work_stop_the_start(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="max_"):
        Driver(**limits)


def test_check_notices_a_page_that_a_sequence_lost(prompt) -> None:
    driver = Driver()
    request = prompt("0", 9)
    sequence = sequence_of(request, driver.virtual_ids)
    driver.scheduler.add(sequence)
    driver.step()
    sequence.page_ids.pop()
    with pytest.raises(AssertionError):
        driver.scheduler.check()


def test_a_plan_follows_without_the_tokens_of_the_one_before(prompt) -> None:
    driver = Driver()
    driver.add(prompt("0", 3), prompt("1", 4))
    plan = driver.plan()
    following = driver.follow(plan)
    assert following is not None
    assert following.follows == [0, 1]
    assert [(chunk.start, len(chunk.token_ids)) for chunk in following.chunks] == [(3, 1), (4, 1)]
    assert [chunk.sample and chunk.sample.index for chunk in following.chunks] == [1, 1]
    # The second has got a page for the token to come.
    assert [len(chunk.page_ids) for chunk in following.chunks] == [1, 2]
    assert [output.request_id for output in driver.commit(plan)] == ["0", "1"]
    next_following = driver.follow(following)
    assert next_following is not None
    assert [chunk.start for chunk in next_following.chunks] == [4, 5]
    driver.commit(following)
    driver.commit(next_following)
    assert driver.step() == ([(6 - 1, 1), (7 - 1, 1)], ["0", "1"])


def test_who_is_known_to_end_does_not_follow(prompt) -> None:
    driver = Driver()
    driver.add(prompt("0", 3, max_tokens=1), prompt("1", 3, max_tokens=2), prompt("2", 3, max_tokens=3))
    plan = driver.plan()
    following = driver.follow(plan)
    assert following is not None
    assert following.follows == [1, 2]
    driver.commit(plan)
    assert driver.counts[0] == 2
    last = driver.follow(following)
    assert last is not None
    assert last.follows == [1]
    driver.commit(following)
    assert driver.follow(last) is None
    driver.commit(last)
    assert driver.counts == (0, 0, 0)


def test_nobody_follows_before_the_end_of_a_prompt(prompt) -> None:
    driver = Driver(max_step_tokens=8)
    driver.add(prompt("0", 3), prompt("1", 12))
    for expected in (None, [0, 1]):
        plan = driver.plan()
        following = driver.follow(plan)
        assert (following and following.follows) == expected
        driver.commit(plan)


def test_nobody_follows_while_somebody_could_start(prompt) -> None:
    driver = Driver()
    driver.add(prompt("0", 3))
    plan = driver.plan()
    driver.add(prompt("1", 3))
    assert driver.follow(plan) is None
    driver.commit(plan)
    assert driver.step() == ([(3, 1), (0, 3)], ["0", "1"])


@pytest.mark.parametrize("limits", [{"max_num_sequences": 1}, {"num_pages": 8}])
def test_who_cannot_start_holds_nobody_up(prompt, limits: dict[str, int]) -> None:
    driver = Driver(max_step_tokens=64, **limits)
    driver.add(prompt("0", 9, max_tokens=2), prompt("1", 30, max_tokens=2))
    plan = driver.plan()
    following = driver.follow(plan)
    assert following is not None
    driver.commit(plan)
    # Somebody ends, and that may let the other start.
    assert driver.follow(following) is None
    driver.commit(following)
    assert driver.step() == ([(0, 30)], ["1"])


def test_nobody_follows_when_somebody_is_known_to_make_room_for_who_waits(prompt) -> None:
    driver = Driver(max_num_sequences=2)
    driver.add(prompt("0", 3, max_tokens=2), prompt("1", 3, max_tokens=9), prompt("2", 3))
    plan = driver.plan()
    following = driver.follow(plan)
    assert following is not None
    driver.commit(plan)
    assert driver.follow(following) is None
    driver.commit(following)
    assert driver.step()[1] == ["1", "2"]


def test_idle_pages_that_who_waits_would_take_are_no_room_for_the_rest(fakes, prompt) -> None:
    driver = Driver(num_pages=8, max_step_tokens=64)
    warm(driver, fakes.request("0", [1] * 12, max_tokens=1))
    driver.add(prompt("2", 16, max_tokens=3), fakes.request("1", [*[1] * 12, 5], max_tokens=3))
    plan = driver.plan()
    assert driver.counts == (1, 1, 4)
    assert driver.follow(plan) is not None


def test_nobody_follows_when_pages_are_short(prompt) -> None:
    driver = Driver(num_pages=8, max_step_tokens=64)
    driver.add(prompt("0", 15, max_tokens=9), prompt("1", 11, max_tokens=9))
    plan = driver.plan()
    following = driver.follow(plan)
    assert following is not None
    driver.commit(plan)
    # Both would need a page, and there is one.
    assert driver.follow(following) is None
    assert driver.counts == (2, 0, 7)
    driver.commit(following)
    assert driver.step()[1] == ["0"]
    assert driver.counts[:2] == (1, 1)


def test_an_abort_while_two_plans_are_out_gives_no_output(prompt) -> None:
    driver = Driver()
    driver.add(prompt("0", 3), prompt("1", 3))
    plan = driver.plan()
    following = driver.follow(plan)
    assert following is not None
    driver.scheduler.abort("0")
    driver.scheduler.check()
    assert [output.request_id for output in driver.commit(plan)] == ["1"]
    last = driver.follow(following)
    assert last is not None
    assert last.follows == [1]
    assert [output.request_id for output in driver.commit(following)] == ["1"]
    driver.scheduler.abort("1")
    assert driver.follow(last) is None
    assert driver.commit(last) == []
    assert driver.counts == (0, 0, 0)


def test_a_page_is_found_only_once_its_last_token_is_known(fakes) -> None:
    driver = Driver()
    driver.add(fakes.request("0", [1, 2, 3], max_tokens=8))
    plan = driver.plan()
    following = driver.follow(plan)
    assert following is not None
    driver.commit(plan)
    newcomer = fakes.request("1", [1, 2, 3, 9, 9], max_tokens=1)
    sequence = sequence_of(newcomer, driver.virtual_ids)
    pool = driver.scheduler._pool
    assert sequence.find_prefix(4, pool.__contains__).num_pages == 0
    driver.commit(following)
    assert sequence.find_prefix(4, pool.__contains__).num_pages == 1


def test_a_failure_ends_all_who_are_in_either_plan(prompt) -> None:
    driver = Driver()
    driver.add(prompt("0", 3, max_tokens=1), prompt("1", 3))
    plan = driver.plan()
    assert driver.follow(plan) is not None
    outputs = driver.scheduler.fail_planned(InternalError("the model failed"))
    driver.scheduler.check()
    assert [output.request_id for output in outputs] == ["0", "1"]
    assert driver.counts == (0, 0, 0)
    driver.add(prompt("2", 3))
    assert driver.step()[1] == ["2"]


def test_the_step_that_starts_a_sequence_writes_what_its_adapter_gives(fakes) -> None:
    driver = Driver(max_step_tokens=2)
    driver.add(fakes.request("0", "k", [1, 2, 3]))
    plan = driver.plan()
    [write] = plan.writes
    assert (write.first_id, write.start, write.stop) == (driver.virtual_ids.ids("sha256:k").start, 0, 6)
    assert [(chunk.start, list(chunk.token_ids)) for chunk in plan.chunks] == [(6, [1, 2])]
    assert list(write.page_ids) == list(plan.chunks[0].page_ids)
    driver.commit(plan)
    plan = driver.plan()
    assert (plan.writes, [(chunk.start, list(chunk.token_ids)) for chunk in plan.chunks]) == ([], [(8, [3])])
    driver.commit(plan)
    assert driver.scheduler.stats(resident_adapters=0).computed_prompt_tokens == 3


def test_what_an_adapter_gives_is_written_only_as_far_as_it_is_not_found(fakes) -> None:
    driver = Driver()
    driver.add(fakes.request("0", "k", [1, 2, 3]))
    driver.step()
    pages = driver.counts[2]
    driver.add(fakes.request("1", "k", [4]))
    plan = driver.plan()
    assert plan.writes == []
    assert [copy.num_positions for copy in plan.copies] == [2]
    assert driver.counts[2] == pages + 1
    driver.commit(plan)


def test_without_the_copy_the_rest_of_what_an_adapter_gives_is_written(fakes) -> None:
    # The second needs all pages: it finds the full one, and has no room to hold the one it would copy from.
    driver = Driver(num_pages=8, max_num_sequences=1)
    driver.add(fakes.request("0", "k", [1, 2, 3], max_tokens=1))
    driver.step()
    driver.add(fakes.request("1", "k", [5] * 23, max_tokens=1))
    plan = driver.plan()
    assert plan.copies == []
    assert [(write.start, write.stop) for write in plan.writes] == [(4, 6)]
    driver.commit(plan)


def test_a_tenant_with_many_waiting_holds_up_no_other(fakes) -> None:
    driver = Driver(max_num_sequences=1)
    for tenant, numbers in (("a", "0123"), ("b", "45")):
        for number in numbers:
            request = fakes.request(number, [int(number)], max_tokens=1)
            driver.add(replace(request, tenant=tenant))
    outputs = [driver.step()[1] for _ in range(6)]
    assert outputs == [["0"], ["4"], ["1"], ["5"], ["2"], ["3"]]
