"""A lease of a real transfer, ended by an operator: the request is tried anew, and every page comes back."""

from pdkv.daemons.leases import list_leases, release_lease
from pdkv.verify.link_chasing import make_prompt
from tests.e2e.deployment import LONG, Trio, stopped_amid_transfer, token_ids, wait_until


def test_a_lease_that_is_released_costs_a_new_try_and_no_page(three: Trio) -> None:
    def idle() -> bool:
        return three.prefill.holds_nothing() and three.decode.holds_nothing()

    wait_until(idle, "nothing runs")
    admin = three.prefill.admin_url
    tries = three.router.metrics()["pdkv_router_retries_total"]
    with stopped_amid_transfer(three, (make_prompt(seed, LONG) for seed in range(930, 940)), 4) as (prompt, answer):
        (lease,) = three.prefill.leases()
        assert lease.num_pages == -(-len(prompt.token_ids) // 128)
        assert release_lease(admin, lease.transfer[:8]).lease.peer == lease.peer
        wait_until(lambda: three.prefill.leases()[0].state == "failing", "it is told, and its pages stay")
    assert token_ids(answer.result()) == list(prompt.expected(4))
    wait_until(idle, "every page is back")
    assert three.router.metrics()["pdkv_router_retries_total"] == tries + 1
    assert list_leases(admin).leases == []
