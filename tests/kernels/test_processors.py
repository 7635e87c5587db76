import pytest
import torch
from softprompt_kernels.processors import num_processors, plan_parts


@pytest.mark.parametrize(
    ("num_programs", "wanted", "most", "parts"),
    [
        # Contexts of decodes on 132 processors, by programs and tiles.
        (8, 264, 32, 32),
        (8, 264, 10, 8),
        (8, 264, 1, 1),
        (100, 264, 32, 2),
        (2048, 264, 32, 1),
        # Inputs of LoRAs, by programs and blocks.
        (3, 528, 8, 8),
        (3, 528, 16, 16),
        (96, 528, 16, 4),
        (4096, 528, 16, 1),
        (0, 528, 16, 16),
    ],
)
def test_work_is_cut_by_shapes_and_processors_alone(num_programs: int, wanted: int, most: int, parts: int) -> None:
    assert plan_parts(num_programs, wanted=wanted, most=most) == parts


def test_elsewhere_than_on_a_gpu_there_is_one_processor() -> None:
    assert num_processors(torch.device("cpu")) == 1
