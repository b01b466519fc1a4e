"""Names of full pages: the same in every process, different for whatever is different."""

import subprocess
import sys

import msgspec
import pytest

from pdkv.m3.prefix_cache import BlockNames, seed_of
from tests.layouts import make_layout

LAYOUT = make_layout(num_layers=4, num_dense=1)
TOKENS = list(range(1000, 1020))


def names(tokens: list[int], count: int, seed: bytes = b"seed") -> list[bytes]:
    return BlockNames(seed, 4).first(count, tokens)


def test_a_name_stands_for_all_tokens_up_to_its_end() -> None:
    assert len(set(names(TOKENS, 5))) == 5
    for changed in range(20):
        other = [*TOKENS[:changed], 7, *TOKENS[changed + 1 :]]
        same = [a == b for a, b in zip(names(TOKENS, 5), names(other, 5), strict=True)]
        assert same == [block < changed // 4 for block in range(5)]


def test_names_grow_with_the_sequence() -> None:
    growing = BlockNames(b"seed", 4)
    assert growing.first(0, TOKENS[:3]) == []
    assert growing.first(2, TOKENS[:9]) == names(TOKENS, 2)
    assert growing.first(5, TOKENS) == names(TOKENS, 5)
    assert growing.first(1, TOKENS) == names(TOKENS, 1)


def test_equal_blocks_at_other_places_have_other_names() -> None:
    assert len(set(names([5] * 16, 4))) == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"block_size": 64},
        {"kv_dtype": "float32"},
        {"index_dtype": "float32"},
        {"scale_convention": "unit"},
        {"index_schedule": "3, 7"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_how_state_is_stored_is_part_of_every_name(changed: dict[str, str | int]) -> None:
    seed, other = seed_of("model", LAYOUT), seed_of("model", msgspec.structs.replace(LAYOUT, **changed))
    assert seed != other
    assert seed_of("another model", LAYOUT) != seed
    assert not set(names(TOKENS, 5, seed)) & set(names(TOKENS, 5, other))


def test_another_process_gives_the_same_names() -> None:
    code = (
        "from pdkv.m3.prefix_cache import BlockNames, seed_of; from tests.layouts import make_layout;"
        "seed = seed_of('model', make_layout(num_layers=4, num_dense=1));"
        "print(b''.join(BlockNames(seed, 4).first(5, list(range(1000, 1020)))).hex())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert told == b"".join(names(TOKENS, 5, seed_of("model", LAYOUT))).hex()


def test_a_block_that_is_not_full_has_no_name() -> None:
    with pytest.raises(AssertionError, match="not full"):
        names(TOKENS[:19], 5)
