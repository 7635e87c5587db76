import random

import pytest
from softprompt_kernels.lora_tiles import cut_tiles


@pytest.mark.parametrize("max_tokens", [1, 2, 16, 1000])
def test_every_token_with_a_slot_is_in_one_tile_of_its_slot(max_tokens: int) -> None:
    generator = random.Random(0)
    for num_tokens in (1, 15, 16, 17, 65, 200):
        slots = [generator.randrange(-1, 5) for _ in range(num_tokens)]
        order, tiles = cut_tiles(slots, max_tokens)
        seen: list[int] = []
        for slot, first, count in tiles:
            assert 1 <= count <= max_tokens
            assert first == len(seen)
            tokens = order[first : first + count]
            assert [slots[token] for token in tokens] == [slot] * count
            seen += tokens
        assert sorted(seen) == [token for token, slot in enumerate(slots) if slot >= 0]


def test_a_slot_has_no_more_tiles_than_it_needs() -> None:
    _, tiles = cut_tiles([3, 0, 3, -1, 3, 0, 3, 3], 2)
    assert tiles == [(0, 0, 2), (3, 2, 2), (3, 4, 2), (3, 6, 1)]


def test_no_token_with_a_slot_is_no_tile() -> None:
    assert cut_tiles([-1, -1], 16) == ([], [])
    assert cut_tiles([], 16) == ([], [])
