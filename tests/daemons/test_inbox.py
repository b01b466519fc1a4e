"""What other threads put is taken by one, in order, all of it, and no wait is longer than it was asked to be."""

import threading
import time

from pdkv.daemons.inbox import Inbox

PATIENCE_S = 60.0


def within_patience(run: threading.Thread) -> bool:
    """A thread that waits for ever is left behind."""
    run.start()
    run.join(PATIENCE_S)
    return not run.is_alive()


def test_a_wait_that_is_over_before_it_has_begun_ends() -> None:
    """``queue.SimpleQueue`` of CPython 3.11 is caught by this within some hundred tries."""

    def wait_again_and_again() -> None:
        for _ in range(20_000):
            assert Inbox[int]().take(1e-6) == []

    assert within_patience(threading.Thread(target=wait_again_and_again, daemon=True))


def test_messages_come_in_order_and_at_once() -> None:
    inbox = Inbox[int]()
    for number in range(3):
        inbox.put(number)
    assert inbox.take(PATIENCE_S) == [0, 1, 2]
    assert inbox.take(0) == []


def test_a_sleeper_is_woken() -> None:
    """Two that wait for each other in turn, so one of them sleeps at any time."""
    ours, theirs = Inbox[int](), Inbox[int]()
    num_rounds = 2_000

    def answer() -> None:
        num_answered = 0
        while num_answered < num_rounds:
            for number in theirs.take(10 * PATIENCE_S):
                ours.put(number + 1)
                num_answered += 1

    threading.Thread(target=answer, daemon=True).start()
    for number in range(num_rounds):
        theirs.put(number)
        deadline = time.monotonic() + PATIENCE_S
        while not (told := ours.take(PATIENCE_S)):
            assert time.monotonic() < deadline
        assert told == [number + 1]


def test_nothing_of_many_writers_is_lost_or_told_out_of_order() -> None:
    inbox, taken = Inbox[tuple[int, int]](), list[tuple[int, int]]()
    num_writers, num_messages = 4, 5_000

    def write(writer: int) -> None:
        for number in range(num_messages):
            inbox.put((writer, number))

    def read() -> None:
        while len(taken) < num_writers * num_messages:
            taken.extend(inbox.take(PATIENCE_S))

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(num_writers)]
    for writer in writers:
        writer.start()
    assert within_patience(threading.Thread(target=read, daemon=True))
    for number in range(num_writers):
        assert [mine for writer, mine in taken if writer == number] == list(range(num_messages))
