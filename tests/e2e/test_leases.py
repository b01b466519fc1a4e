"""A lease of a real transfer, ended by an operator: the request is tried anew, and every page comes back."""

import os
import signal
import threading

import httpx
import pytest

from pdkv.daemons.leases import list_leases, release_lease
from pdkv.verify.link_chasing import make_prompt
from tests.e2e.deployment import LONG, Trio, ask, descendants, token_ids, wait_until


def test_a_lease_that_is_released_costs_a_new_try_and_no_page(three: Trio) -> None:
    def idle() -> bool:
        return three.prefill.holds_nothing() and three.decode.holds_nothing()

    wait_until(idle, "nothing runs")
    admin = three.prefill.admin_url
    tries = three.router.metrics()["pdkv_router_retries_total"]
    assert three.decode.popen is not None
    (engine,) = descendants(three.decode.popen.pid)
    answers: list[httpx.Response] = []
    for seed in range(930, 940):
        prompt = make_prompt(seed, LONG)
        asking = threading.Thread(target=lambda ids=prompt.token_ids: answers.append(ask(three.router.url, ids, 4)))
        asking.start()
        wait_until(lambda: list_leases(admin).leases or answers, "a lease is granted")
        os.kill(engine, signal.SIGSTOP)  # so that decode does not let go by itself meanwhile
        try:
            leases = list_leases(admin).leases
            if not leases or leases[0].state != "prefilling":
                continue  # all of it may have travelled before decode was stopped, and its release be on the way
            (lease,) = leases
            assert lease.num_pages == -(-len(prompt.token_ids) // 128)
            assert release_lease(admin, lease.transfer[:8]).lease.peer == lease.peer
            wait_until(lambda: list_leases(admin).leases[0].state == "failing", "it is told, and its pages stay")
            break
        finally:
            os.kill(engine, signal.SIGCONT)
            asking.join()
            wait_until(idle, "every page is back")
            answer = answers.pop()
    else:
        pytest.fail("no transfer lasted until decode was stopped")
    assert token_ids(answer) == list(prompt.expected(4))
    assert three.router.metrics()["pdkv_router_retries_total"] == tries + 1
    assert list_leases(admin).leases == []
