import pytest

from benchmarks.publish import BEGIN, END, replace_section, section
from benchmarks.results import Results


def test_only_what_is_between_the_marks_is_replaced() -> None:
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_section(readme, "new\n") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"


def test_a_readme_without_marks_is_left_alone() -> None:
    with pytest.raises(ValueError, match="benchmarks: begin"):
        replace_section("nothing here", "new")


def test_the_section_links_its_numbers_and_pictures(results: Results) -> None:
    text = section(results, "benchmarks/results/x.json", ["benchmark-throughput.svg"])
    assert "(benchmarks/results/x.json)" in text
    assert "![Throughput over the number of adapters](docs/images/benchmark-throughput.svg)" in text
