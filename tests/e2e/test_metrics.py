"""Metrics of a real deployment: what the counters say is what happened, region by region."""

import pytest

from pdkv.verify.link_chasing import make_prompt
from tests.e2e.deployment import Trio, ask, token_ids, transfer_facts, wait_until

NUM_REQUESTS = 3
NUM_TOKENS = 12


def _settled(three: Trio) -> bool:
    """Both workers hold nothing, and all have counted the end of every request."""
    held = not (three.prefill.holds_nothing() and three.decode.holds_nothing())
    sides = (three.prefill, three.decode, three.router)
    return not held and not any(side.metrics()["pdkv_requests_in_flight"] for side in sides)


def _grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)}


def test_counters_say_what_happened(three: Trio) -> None:
    ask(three.router.url, make_prompt(900, 300).token_ids, 1)  # the handshake is behind it
    wait_until(lambda: _settled(three), "both are idle")
    sides = (three.prefill, three.decode, three.router)
    before = [side.metrics() for side in sides]
    prompts = [make_prompt(901 + i, 1000) for i in range(NUM_REQUESTS)]
    facts = []
    for prompt in prompts:
        answer = ask(three.router.url, prompt.token_ids, NUM_TOKENS)
        assert token_ids(answer) == list(prompt.expected(NUM_TOKENS))
        facts.append(transfer_facts(answer))
    wait_until(lambda: _settled(three), "both are idle")
    prefill, decode, router = (_grown(old, side.metrics()) for old, side in zip(before, sides, strict=True))
    path = facts[0]["path"]
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    for grown in (prefill, decode, router):
        assert grown["pdkv_requests_total{code=none,result=ok}"] == NUM_REQUESTS
        assert grown["pdkv_request_duration_seconds_count{result=ok}"] == NUM_REQUESTS
    for grown in (prefill, decode):
        assert grown["pdkv_prompt_tokens_total"] == num_prompt_tokens
        assert grown["pdkv_queue_duration_seconds_count"] == NUM_REQUESTS
    assert prefill["pdkv_prefill_duration_seconds_count"] == NUM_REQUESTS
    assert decode["pdkv_generation_tokens_total"] == NUM_REQUESTS * NUM_TOKENS
    assert decode["pdkv_time_to_first_token_seconds_count"] == NUM_REQUESTS
    assert decode["pdkv_inter_token_latency_seconds_count"] == NUM_REQUESTS * (NUM_TOKENS - 1)
    assert decode[f"pdkv_kv_transfer_duration_seconds_count{{result=ok,transport={path}}}"] == NUM_REQUESTS
    assert decode[f"pdkv_kv_transfer_descriptors_sum{{transport={path}}}"] == sum(f["num_spans"] for f in facts)
    assert decode[f"pdkv_kv_transfer_size_bytes_count{{transport={path}}}"] == NUM_REQUESTS
    num_bytes = sum(sum(f["bytes_by_region"].values()) for f in facts)
    assert decode[f"pdkv_kv_transfer_size_bytes_sum{{transport={path}}}"] == num_bytes > 0
    num_batches = decode[f"pdkv_kv_transfer_descriptors_count{{transport={path}}}"]
    assert decode[f"pdkv_kv_transfer_post_seconds_count{{transport={path}}}"] == num_batches >= NUM_REQUESTS
    assert decode[f"pdkv_kv_transfer_exposed_seconds_count{{transport={path}}}"] == NUM_REQUESTS
    exposed_s = decode.get(f"pdkv_kv_transfer_exposed_seconds_sum{{transport={path}}}", 0.0)  # all may be hidden
    assert exposed_s == pytest.approx(sum(f["exposed_s"] for f in facts))
    assert decode[f"pdkv_kv_transfer_overlap_ratio_count{{transport={path}}}"] == NUM_REQUESTS
    assert decode["pdkv_kv_granted_seconds_sum"] == pytest.approx(sum(f["granted_s"] for f in facts))
    assert decode["pdkv_kv_first_step_seconds_sum"] == pytest.approx(sum(f["first_step_s"] for f in facts))
    assert decode["pdkv_kv_watermark_to_post_seconds_count"] >= NUM_REQUESTS
    assert prefill["pdkv_kv_publish_seconds_count"] >= NUM_REQUESTS
    assert prefill["pdkv_kv_lease_age_seconds_count"] == NUM_REQUESTS
    assert router["pdkv_router_route_decisions_total{decision=pd}"] == NUM_REQUESTS
    assert not any("failures" in name or "result=error" in name for name in (*prefill, *decode, *router))


def test_bytes_by_region_keep_the_ratio_of_the_manifest(three: Trio) -> None:
    """Index keys that stay behind show as a ratio that is off, whatever the traffic."""
    ask(three.router.url, make_prompt(910, 700).token_ids, 1)
    wait_until(lambda: _settled(three), "both are idle")
    metrics = three.decode.metrics()
    regions = {str(region["name"]): int(region["bytes_per_token"]) for region in three.decode.info()["regions"]}
    moved = {
        name: sum(
            v for sample, v in metrics.items() if sample.startswith(f"pdkv_kv_transfer_bytes_total{{region={name},")
        )
        for name in ("k", "v", "k_scale", "v_scale", "index_k")
    }
    assert moved["k"] > 0
    for worker in (three.prefill, three.decode):
        told = worker.metrics()
        assert {name: told[f"pdkv_kv_region_bytes_per_token{{region={name}}}"] for name in regions} == regions
    for name, num_bytes in moved.items():
        assert num_bytes * regions["k"] == moved["k"] * regions.get(name, 0)


def test_gauges_say_what_is(three: Trio) -> None:
    ask(three.router.url, make_prompt(920, 300).token_ids, 1)
    wait_until(lambda: _settled(three), "both are idle")
    prefill, decode, router = three.prefill.metrics(), three.decode.metrics(), three.router.metrics()
    for worker in (prefill, decode):
        assert worker["pdkv_ready"] == worker["pdkv_live"] == worker["pdkv_peers"] == 1
        assert worker["pdkv_kv_blocks_total"] > 0
        assert worker["pdkv_kv_blocks_used"] == worker["pdkv_kv_cache_usage_ratio"] == 0
        assert worker["pdkv_handshakes_total{code=none,result=ok}"] >= 1  # other tests may have looked in
        assert worker["pdkv_kv_blocks_stranded"] == worker["pdkv_peer_incarnation_changes_total"] == 0
        assert 0 <= worker["pdkv_peer_silence_seconds"] < 65
        registered = [v for name, v in worker.items() if name.startswith("pdkv_kv_regions_registered")]
        assert sum(registered) == three.decode.info()["num_regions"]
    assert prefill["pdkv_kv_leases_active"] == prefill["pdkv_kv_leases_expired_total"] == 0
    assert prefill["pdkv_kv_oldest_lease_age_seconds"] == 0
    assert sum(value for name, value in decode.items() if name.startswith("pdkv_transport_selected")) == 1
    assert decode["pdkv_handshake_duration_seconds_count"] == decode["pdkv_handshakes_total{code=none,result=ok}"]
    assert router["pdkv_router_workers_ready{upstream=prefill}"] == 1
    assert router["pdkv_router_workers_ready{upstream=decode}"] == 1
    assert router["pdkv_router_circuits{state=closed,upstream=prefill}"] == 1
    assert router["pdkv_router_circuits{state=open,upstream=prefill}"] == 0
    (info,) = [name for name in decode if name.startswith("pdkv_engine_info")]
    assert f"manifest_hash={str(three.decode.info()['manifest_digest'])[:12]}" in info
