"""Every operation that can be measured: its name on the command line, and the file here that knows how."""

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from benchmarks.timing import Rates, Work

OPERATIONS = {
    "index_topk_decode": "benchmarks.index_topk_decode",
    "sparse_attention_decode": "benchmarks.sparse_attention_decode",
    "paged_attention_decode": "benchmarks.paged_attention_decode",
    "decode_layer": "benchmarks.decode_layer",
    "index_topk_prefill": "benchmarks.index_topk_prefill",
    "sparse_attention_prefill": "benchmarks.sparse_attention_prefill",
    "paged_attention_prefill": "benchmarks.paged_attention_prefill",
    "kv_store": "benchmarks.kv_store",
    "page_digest": "benchmarks.page_digest",
    "rms_norm": "benchmarks.rms_norm",
    "swigluoai": "benchmarks.swigluoai",
    "router_topk": "benchmarks.router_topk",
}
"""One line per operation, in the order in which they are reported."""


@dataclass(frozen=True)
class Question:
    """What to measure: the shapes of an operation that are wanted, and against whose kernels."""

    names: Sequence[str]  # parts of shape names, any of which selects a shape; empty: all shapes
    rival: bool  # also run the kernels of the vLLM package that ``rival.load`` has found


class Benchmark(Protocol):
    """What a file of this folder offers at module level."""

    TESTS: tuple[str, ...]
    """Paths of the parity tests, from the repository's root. They must be green before anything is timed."""

    def works(self, question: Question, rates: Rates) -> Iterable[Work]:
        """Shapes one after another, tensors and all; a shape's tensors may be freed once the next is asked for."""


def find(name: str) -> Benchmark:
    """The benchmark of this name; KeyError if there is none."""
    return cast(Benchmark, importlib.import_module(OPERATIONS[name]))


def wanted(question: Question, shape: str) -> bool:
    """Whether the question asks for the shape of this name."""
    return not question.names or any(part in shape for part in question.names)
