"""What ``pdkv doctor`` looks at: is this machine fit to serve, and, with ``--peer``, is the way to a prefill worker?"""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path

import msgspec
import numpy as np

from pdkv.daemons.control_keys import channel_security
from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.model_settings import config_of, layout_of
from pdkv.daemons.sizing import choose_num_pages, memory_available_bytes
from pdkv.daemons.worker_settings import worker_settings
from pdkv.errors import PdkvError, TransportError
from pdkv.schema import LocalMemory, ReadBatch
from pdkv.transport import nixl_agent
from pdkv.transport.base import ReadStatus
from pdkv.transport.cuda_gpu import CudaGpu
from pdkv.transport.ucx import UcxOptions, UcxTransport
from pdkv.transport.ucx_library import HOW_TO_INSTALL, find_ucx_library

SCHEMA = "pdkv.doctor/v1"
_MAX_BATCH = 8
_SMALL_SHM_BYTES = 1 << 30
_SELF_TEST_BYTES = 16 << 20
_SELF_TEST_S = 10.0


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


class Check(msgspec.Struct, frozen=True):
    id: str
    status: Verdict
    evidence: str
    fix: str = ""


class Examination(msgspec.Struct, frozen=True):
    schema: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        return any(check.status is Verdict.FAIL for check in self.checks)


class DoctorOptions(msgspec.Struct, frozen=True):
    settings: WorkerSettings
    """As a decode worker would have them; an empty ``model_dir`` leaves out what needs a model."""
    ports: tuple[int, ...]
    """TCP ports of 127.0.0.1 that daemons would listen on."""
    peer: str | None = None
    min_gbps: float = 0.0
    """Gigabytes a second that whole rows must reach over the path to the peer."""


def doctor_settings(
    model: Path | None,
    *,
    require_transport: str | None,
    max_model_len: int,
    ucx_library: str | None,
    insecure: bool,
    control_keys: Path | None = None,
) -> WorkerSettings:
    """A decode worker's settings for looking only: nothing listens."""
    return msgspec.structs.replace(
        worker_settings("decode", model or Path(), max_model_len, 0, 512),
        model_dir=str(model) if model else "",
        name=f"doctor-{os.getpid()}",
        max_batch=_MAX_BATCH,
        num_threads=1,
        transport="auto",
        ucx_library=ucx_library,
        require_transport=require_transport,
        lease_ttl_s=10.0,
        insecure=insecure,
        control_keys=str(control_keys or ""),
        log_level="error",
    )


def examine(options: DoctorOptions) -> Examination:
    """Make every check; one that cannot be made fails, and the others go on."""
    return Examination(SCHEMA, tuple(_all_checks(options)))


def _all_checks(options: DoctorOptions) -> Iterator[Check]:
    settings = options.settings
    yield _python()
    yield _package("torch", needed=True, fix="pip install 'pdkv[engine]'")
    yield _package("triton", needed=False, fix="comes with CUDA builds of torch; not needed on CPU")
    yield from _guarded("ucx", lambda: _ucx(settings))
    yield from _guarded("ucx-self-test", lambda: _ucx_self_test(settings))
    yield from _inherited_ucx_settings()
    yield _nvlink(settings)
    yield _nixl()
    yield _memlock(settings)
    yield _shm()
    yield from _guarded("control-channel", lambda: _control_channel(settings))
    yield from (_port(port) for port in options.ports)
    if not settings.model_dir:
        yield Check("model", Verdict.SKIP, "no --model given")
    else:
        yield from _guarded("model", lambda: _model(settings))
        yield from _guarded("arena", lambda: _arena(settings))
    if options.peer is None:
        yield Check("peer", Verdict.SKIP, "no --peer given")
    else:
        peer = options.peer
        yield from _guarded("peer", lambda: _peer(peer, options))


def _guarded(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from check()
    except PdkvError as exc:
        yield Check(name, Verdict.FAIL, str(exc))


def _python() -> Check:
    told = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    return Check(
        "python", Verdict.OK if sys.version_info >= (3, 11) else Verdict.FAIL, told, "use Python 3.11 or later"
    )


def _package(name: str, *, needed: bool, fix: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name, Verdict.FAIL if needed else Verdict.SKIP, "not installed", fix)
    return Check(name, Verdict.OK, importlib.metadata.version(name))


def _ucx(settings: WorkerSettings) -> Iterator[Check]:
    library = find_ucx_library(settings.ucx_library)
    found = Path(library.path).parent.rglob("libuct_*.so*")
    modules = ", ".join(sorted({path.name.split(".")[0].removeprefix("libuct_") for path in found})) or "none"
    kind = "with" if library.has_infiniband else "without"
    told = f"{library.path} ({library.source}), {kind} InfiniBand; built in: tcp, posix, self; modules: {modules}"
    wants_rdma = settings.require_transport == "rdma"
    status = Verdict.FAIL if wants_rdma and not library.has_infiniband else Verdict.OK
    yield Check("ucx", status, told, HOW_TO_INSTALL if status is Verdict.FAIL else "")


def _ucx_self_test(settings: WorkerSettings) -> Iterator[Check]:
    """One transport reads from another in this process, and every byte is compared."""
    source = np.random.default_rng(0).integers(0, 256, _SELF_TEST_BYTES, dtype=np.uint8)
    target = np.zeros_like(source)
    options = UcxOptions(tls=settings.ucx_tls, library=settings.ucx_library)
    one, two = UcxTransport(options), UcxTransport(options)
    try:
        one.register(LocalMemory(source.ctypes.data, source.size))
        two.register(LocalMemory(target.ctypes.data, target.size))
        peer = two.connect(one.address())
        started = time.perf_counter()
        zero = np.zeros(1, dtype=np.int64)
        two.submit(peer, ReadBatch(zero, zero, zero + target.ctypes.data, zero + target.size))
        while not (ended := two.poll()):
            if time.perf_counter() - started > _SELF_TEST_S:
                raise TransportError(f"a read of this process from itself did not end within {_SELF_TEST_S:.0f} s")
            time.sleep(0.001)
        seconds = time.perf_counter() - started
        path = two.path(peer)
    finally:
        two.close()
        one.close()
    if ended[0].status is not ReadStatus.OK or not np.array_equal(source, target):
        raise TransportError(f"a read of this process from itself went wrong: {ended[0].error or 'bytes differ'}")
    told = f"{_SELF_TEST_BYTES >> 20} MiB right over {path}, {source.size / seconds / 1e9:.2f} GB/s"
    yield Check("ucx-self-test", Verdict.OK, told)


def _inherited_ucx_settings() -> Iterator[Check]:
    for name in sorted(n for n in os.environ if n.startswith("UCX_")):
        value = os.environ[name]
        narrow = name == "UCX_TLS" and not any(t in value for t in ("rc", "dc", "ud", "ib", "all", "^"))
        told = f"{name}={value} is inherited and wins over pdkv's own" + ("; it leaves out RDMA" if narrow else "")
        yield Check("ucx-environment", Verdict.WARN, told, f"unset {name} unless you mean it")


def _control_channel(settings: WorkerSettings) -> Iterator[Check]:
    """Whether its messages are encrypted, with the keys that a worker would have."""
    security = channel_security(settings.control_keys)
    if security.authenticated:
        others = len(security.accepted) - 1
        told = f"encrypted, key {security.fingerprint}" + (f" and {others} more are accepted" if others else "")
        yield Check("control-channel", Verdict.OK, told)
        return
    beyond = settings.insecure
    told = "not encrypted" + (", also beyond this machine" if beyond else ", and so on this machine only")
    fix = "pdkv keys new DIR, and --control-keys DIR on every worker"
    yield Check("control-channel", Verdict.WARN if beyond else Verdict.OK, told, fix)


def _nvlink(settings: WorkerSettings) -> Check:
    """Whether the first GPU's memory can be mapped and read by the nvlink transport."""
    try:
        gpu = CudaGpu(0)
        try:
            gpu.drop_table(gpu.make_table(1))  # builds the kernel
        finally:
            gpu.close()
    except TransportError as missing:
        needed = settings.require_transport == "cuda_ipc"
        return Check("nvlink", Verdict.FAIL if needed else Verdict.SKIP, str(missing))
    how = "copy engines and kernel" if gpu.can_copy_batches else "kernel only, a driver for CUDA 12.8 brings the rest"
    return Check("nvlink", Verdict.OK, f"GPU {gpu.uuid}: {how}")


def _nixl() -> Check:
    """Whether ``--transport nixl`` could be asked for; nothing else needs it."""
    if not nixl_agent.installed_nixl():
        fix = f"only --transport nixl needs it: {nixl_agent.HOW_TO_INSTALL}"
        return Check("nixl", Verdict.SKIP, "not installed", fix)
    try:
        package = nixl_agent.load_nixl()
    except TransportError as broken:
        return Check("nixl", Verdict.WARN, str(broken), "only --transport nixl needs it")
    return Check("nixl", Verdict.OK, f"{package.name} {package.version}, backend {nixl_agent.BACKEND}")


def _memlock(settings: WorkerSettings) -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("memlock", Verdict.OK, "unlimited")
    told = f"{soft >> 10:,} KiB may be locked"
    fix = "RDMA locks the whole arena: ulimit -l unlimited, or the capability IPC_LOCK"
    if settings.require_transport == "rdma":
        return Check("memlock", Verdict.FAIL, told, fix)
    return Check("memlock", Verdict.OK, f"{told}; enough for shared memory and TCP", "")


def _shm() -> Check:
    facts = os.statvfs("/dev/shm")
    free = facts.f_bavail * facts.f_frsize
    told = f"{free >> 20:,} MiB free in /dev/shm"
    if free < _SMALL_SHM_BYTES:
        return Check("shm", Verdict.WARN, told, "UCX's shared memory lives there; give the container 1 GiB or more")
    return Check("shm", Verdict.OK, told)


def _port(port: int) -> Check:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as exc:
            fix = "stop what listens there, or choose another port"
            return Check(f"port-{port}", Verdict.WARN, f"127.0.0.1:{port} is taken: {exc.strerror}", fix)
    return Check(f"port-{port}", Verdict.OK, f"127.0.0.1:{port} is free")


def _model(settings: WorkerSettings) -> Iterator[Check]:
    from pdkv.daemons.tokenization import TextCodec  # noqa: PLC0415 - only where a model is looked at
    from pdkv.m3.checkpoint import weight_files  # noqa: PLC0415
    from pdkv.m3.config import BLOCK_SIZE  # noqa: PLC0415

    folder = Path(settings.model_dir)
    config = config_of(settings)
    sparse, reusing = sum(config.sparse_layers), len(config.reusing_layers)
    schedule = f" ({reusing} of them reuse a selection)" if reusing else ""
    told = f"{config.num_layers} layers, {sparse} sparse{schedule}, top {config.topk_blocks} blocks, {config.dtype}"
    yield Check("model", Verdict.OK, told)
    same = config.block_size == BLOCK_SIZE
    told = f"sparse blocks of {config.block_size} tokens, pages of {BLOCK_SIZE}"
    yield Check("block-size", Verdict.OK if same else Verdict.FAIL, told, "" if same else "pages must be sparse blocks")
    files = weight_files(folder).paths
    size = sum(path.stat().st_size for path in files)
    yield Check("weights", Verdict.OK, f"{len(files)} files, {size:,} bytes")
    codec = TextCodec.load(folder)
    told = "tokenizer.json loads" if codec else "no tokenizer.json: prompts and answers are token ids only"
    yield Check("tokenizer", Verdict.OK if codec else Verdict.WARN, told)


def _arena(settings: WorkerSettings) -> Iterator[Check]:
    from pdkv.memory.row import RowLayout  # noqa: PLC0415

    layout = RowLayout.of(layout_of(settings, config_of(settings)))
    pages = choose_num_pages(settings, layout)
    size, available = pages * layout.pitch / 2**30, memory_available_bytes() / 2**30
    told = f"{pages:,} pages of {layout.pitch:,} bytes = {size:.2f} GiB of {available:.1f} GiB available"
    yield Check("arena", Verdict.OK, told)


def _peer(url: str, options: DoctorOptions) -> Iterator[Check]:
    from pdkv.daemons.survey import survey  # noqa: PLC0415 - torch

    if not options.settings.model_dir:
        yield Check("peer", Verdict.FAIL, "the handshake compares manifests, and so needs the model", "add --model DIR")
        return
    found = survey(url, options.settings)
    yield Check("peer-handshake", Verdict.OK, f"{url} (incarnation {found.incarnation}): manifests fit")
    over = f"{found.path}, {found.note}" if found.note else found.path
    yield Check("peer-probe", Verdict.OK, f"every byte of two patterned pages right over {over}")
    table = ", ".join(f"{p.span_bytes >> 10} KiB {p.gigabytes_per_s:.2f}" for p in found.sweep)
    best = max(p.gigabytes_per_s for p in found.sweep)
    slow = best < options.min_gbps
    fix = f"--min-gbps {options.min_gbps} is not reached: see the path, and UCX_* settings above" if slow else ""
    yield Check("peer-bandwidth", Verdict.FAIL if slow else Verdict.OK, f"GB/s by span size: {table}", fix)
