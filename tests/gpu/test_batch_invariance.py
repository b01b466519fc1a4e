"""Batch-invariant steps on a GPU: a request's tokens and log-probabilities are the same bits whoever else is there,
chosen greedily or drawn."""

from pdkv.m3.engine import Engine
from pdkv.m3.logprobs import TopLogprobs
from pdkv.m3.model import M3Model
from pdkv.m3.requests import CompleteRequest, EngineSettings, RequestFinished, RequestId, TokenGenerated, singly
from pdkv.m3.sampling import SamplingParams
from pdkv.verify.undivided import local_worker
from tests.gpu.models import gpu_model, small_config

PROMPTS = [tuple((number * 31 + i * 7) % 380 for i in range(700 + 90 * number)) for number in range(6)]
NUM_TOKENS = 24

WAYS = (SamplingParams(), SamplingParams(temperature=1.2, seed=6), SamplingParams(temperature=0.9, seed=-6, top_p=0.9))
"""How requests are answered, by turns."""

Told = dict[int, list[tuple[int, float, TopLogprobs]]]


def engine_of(model: M3Model) -> Engine:
    settings = EngineSettings(max_model_len=2048, max_batch=4, prefill_chunk=1024, batch_invariant=True)
    return local_worker(model, 80, settings).engine


def ask(engine: Engine, at_a_time: int, order: list[int]) -> Told:
    told: Told = {number: [] for number in order}
    waiting, running = list(order), 0
    while waiting or running:
        while waiting and running < at_a_time:
            number = waiting.pop(0)
            running += 1
            engine.submit(
                CompleteRequest(
                    id=RequestId(bytes([number])),
                    prompt=PROMPTS[number],
                    max_tokens=NUM_TOKENS - number,
                    sampling=WAYS[number % len(WAYS)],
                    ignore_eos=True,
                    num_top=number % 2,
                )
            )
        for event in singly(engine.step()):
            if isinstance(event, TokenGenerated):
                told[event.id[0]].append((event.token, event.logprob, event.top))
            elif isinstance(event, RequestFinished):
                running -= 1
    return told


def test_answers_are_the_same_bits_alone_and_in_any_company() -> None:
    engine = engine_of(gpu_model(small_config("bfloat16")))
    numbers = list(range(len(PROMPTS)))
    alone = ask(engine, 1, numbers)
    assert [len(alone[number]) for number in numbers] == [NUM_TOKENS - number for number in numbers]
    for at_a_time, order in ((4, numbers), (6, numbers[::-1]), (3, [4, 1, 5, 0, 3, 2])):
        assert ask(engine, at_a_time, order) == alone
