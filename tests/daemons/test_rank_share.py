"""What each rank of a worker gets: pages, regions, threads and a device."""

import msgspec
import pytest

from pdkv.core.manifest import check_pairing
from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.model_settings import config_of
from pdkv.daemons.rank_share import ArenaOrder, cache_layout, device_of, furnish, threads_per_rank
from pdkv.daemons.sizing import choose_num_pages
from pdkv.daemons.worker_settings import worker_settings
from pdkv.errors import ConfigError
from pdkv.memory.row import RowLayout
from pdkv.schema import Incarnation, Manifest, Shard
from pdkv.transport.inproc import InprocTransport
from pdkv.verify.link_chasing_checkpoint import write_checkpoint

ORDER = ArenaOrder(num_pages=4, incarnation=Incarnation(9), fingerprint="model")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> WorkerSettings:
    directory = tmp_path_factory.mktemp("models") / "link-chasing"
    write_checkpoint(directory)
    return worker_settings("prefill", directory, 256, 0, 512)


def changed(settings: WorkerSettings, **fields: object) -> WorkerSettings:
    return msgspec.structs.replace(settings, **fields)


def manifests(settings: WorkerSettings) -> list[Manifest]:
    """Of all ranks, each furnished."""
    layout = cache_layout(settings, config_of(settings))
    made = []
    for rank in range(settings.tp_size):
        transport = InprocTransport()
        memory = furnish(settings, RowLayout.of(layout, rank, settings.tp_size), transport, ORDER)
        assert memory.probe.mismatches(Incarnation(9), 0, 0) == [], "prefill's reserved pages have their pattern"
        made.append(memory.offer.manifest)
        transport.close()
    return made


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("freq", [1, 2])
def test_ranks_hold_index_keys_of_every_layer_that_selects_and_of_no_other(
    size: int, freq: int, settings: WorkerSettings
) -> None:
    scheduled = changed(settings, tp_size=size, index_topk_freq=freq)
    config = config_of(scheduled)
    selecting = [layer for layer, selects in enumerate(config.selecting_layers) if selects]
    assert len(selecting) < sum(config.sparse_layers) or freq == 1
    for manifest in manifests(scheduled):
        index = [region for region in manifest.regions if region.name == "index_k"]
        assert [region.layer for region in index] == selecting
        assert {region.shard for region in index} == {Shard.REPLICATED}
        heads = {region.head_start for region in manifest.regions if region.name == "k"}
        assert len(heads) == max(1, config.num_kv_heads // size)
    check_pairing(manifests(scheduled), manifests(changed(scheduled, tp_size=4)))


@pytest.mark.parametrize(("total", "size", "each"), [(8, 2, 4), (1, 8, 1), (5, 2, 2), (6, 1, 6)])
def test_threads_are_shared_out(total: int, size: int, each: int, settings: WorkerSettings) -> None:
    assert threads_per_rank(changed(settings, num_threads=total, tp_size=size)) == each


def test_gpus_are_taken_in_order(settings: WorkerSettings) -> None:
    on_gpus = changed(settings, device="cuda", tp_size=2)
    assert [device_of(on_gpus, rank) for rank in range(2)] == ["cuda:0", "cuda:1"]
    assert device_of(changed(on_gpus, tp_size=1), 0) == "cuda:0"
    assert device_of(changed(settings, tp_size=2), 1) == "cpu"


def test_pages_are_as_many_on_every_rank_and_shared_memory_counts_them_all(
    settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = cache_layout(settings, config_of(settings))
    whole = RowLayout.of(layout)
    monkeypatch.setattr("pdkv.daemons.sizing.memory_available_bytes", lambda: 20 * whole.pitch)
    crowded = changed(settings, max_batch=64)
    assert choose_num_pages(crowded, whole) == 6
    half = RowLayout.of(layout, 0, 2)
    two = choose_num_pages(changed(crowded, tp_size=2), half)
    assert two * 2 * half.pitch <= 0.3 * 20 * whole.pitch < (two + 1) * 2 * half.pitch
    with pytest.raises(ConfigError, match="pages are needed"):
        choose_num_pages(changed(crowded, num_pages=2), whole)
