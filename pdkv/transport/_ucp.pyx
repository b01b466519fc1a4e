# cython: language_level=3, boundscheck=False, wraparound=False
"""The thin Python face of the native engine: copies in, tuples out, never holds the GIL while it waits."""

include "_reads.pxi"

import os


cdef extern from "native/ucx_engine.h" nogil:
    enum:
        PDKV_PATH_SIZE
        PDKV_UNWATCHED
        PDKV_ENDED

    ctypedef struct pdkv_engine:
        pass

    ctypedef struct pdkv_setting:
        const char *name
        const char *value
        int refused

    ctypedef struct pdkv_limits:
        size_t window_spans
        size_t window_bytes
        unsigned linger_us
        unsigned drain_ms

    ctypedef struct pdkv_memory:
        uint64_t address
        uint64_t length
        const void *key
        size_t key_size

    pdkv_engine *pdkv_engine_create(const char *library, pdkv_setting *settings, size_t num_settings,
                                    pdkv_limits limits, char *error, size_t error_size)
    const char *pdkv_engine_version(const pdkv_engine *engine)
    const void *pdkv_engine_address(const pdkv_engine *engine, size_t *size)
    void *pdkv_engine_register(pdkv_engine *engine, uint64_t address, uint64_t length, int on_host, size_t *key_size,
                               char *error, size_t error_size)
    int64_t pdkv_engine_connect(pdkv_engine *engine, const void *address, size_t address_size,
                                const pdkv_memory *memories, size_t num_memories, int life_fd)
    void pdkv_engine_close_peer(pdkv_engine *engine, int64_t peer)
    int64_t pdkv_engine_submit(pdkv_engine *engine, int64_t peer, const pdkv_spans *spans)
    pdkv_done *pdkv_engine_poll(pdkv_engine *engine)
    int pdkv_engine_fileno(const pdkv_engine *engine)
    void pdkv_engine_path(pdkv_engine *engine, int64_t peer, char *path, char *lanes)
    void pdkv_engine_destroy(pdkv_engine *engine)


UNWATCHED, ENDED = PDKV_UNWATCHED, PDKV_ENDED


cdef class Engine:
    """One UCX worker with its thread. ``close`` must be called; all calls from one thread."""

    cdef pdkv_engine *engine
    cdef int owner_pid
    cdef readonly str version
    cdef readonly list refused

    def __init__(self, bytes library, list settings, size_t window_spans, size_t window_bytes,
                 unsigned linger_us, unsigned drain_ms):
        cdef pdkv_limits limits
        cdef char error[PDKV_ERROR_SIZE]
        cdef size_t count = len(settings)
        cdef const char *path = library
        cdef pdkv_setting *native = <pdkv_setting *>calloc(count + 1, sizeof(pdkv_setting))
        if native == NULL:
            raise MemoryError
        limits.window_spans = window_spans
        limits.window_bytes = window_bytes
        limits.linger_us = linger_us
        limits.drain_ms = drain_ms
        for i, (name, value) in enumerate(settings):
            native[i].name = name
            native[i].value = value
        with nogil:
            self.engine = pdkv_engine_create(path, native, count, limits, error, PDKV_ERROR_SIZE)
        self.refused = [settings[i][0] for i in range(count) if native[i].refused]
        free(native)
        if self.engine == NULL:
            raise OSError(error.decode(errors="replace"))
        self.owner_pid = os.getpid()
        self.version = pdkv_engine_version(self.engine).decode()

    def address(self) -> bytes:
        cdef size_t size
        cdef const char *data = <const char *>pdkv_engine_address(self._alive(), &size)
        return data[:size]

    def register(self, uint64_t address, uint64_t length, bint on_host) -> bytes:
        cdef char error[PDKV_ERROR_SIZE]
        cdef size_t size = 0
        cdef pdkv_engine *engine = self._alive()
        cdef char *key
        error[0] = 0
        with nogil:
            key = <char *>pdkv_engine_register(engine, address, length, on_host, &size, error, PDKV_ERROR_SIZE)
        if key == NULL:
            raise OSError(error.decode(errors="replace"))
        try:
            return key[:size]
        finally:
            free(key)

    def connect(self, bytes address, list memories, int life_fd) -> int:
        cdef size_t count = len(memories)
        cdef pdkv_engine *engine = self._alive()
        cdef pdkv_memory *native = <pdkv_memory *>calloc(count + 1, sizeof(pdkv_memory))
        cdef const char *key
        cdef int64_t peer
        if native == NULL:
            raise MemoryError
        for i, (base, length, packed) in enumerate(memories):
            key = packed
            native[i].address = base
            native[i].length = length
            native[i].key = key
            native[i].key_size = len(packed)
        peer = pdkv_engine_connect(engine, <const char *>address, len(address), native, count, life_fd)
        free(native)
        if peer < 0:
            raise MemoryError
        return peer

    def close_peer(self, int64_t peer) -> None:
        pdkv_engine_close_peer(self._alive(), peer)

    def submit(self, int64_t peer, const int64_t[::1] memory, const int64_t[::1] remote, const int64_t[::1] local,
               const int64_t[::1] length) -> int:
        cdef int64_t read
        cdef pdkv_engine *engine = self._alive()
        cdef pdkv_spans spans = spans_of(memory, remote, local, length)
        with nogil:
            read = pdkv_engine_submit(engine, peer, &spans)
        if read < 0:
            raise MemoryError
        return read

    def poll(self) -> list:
        return told(pdkv_engine_poll(self._alive()))

    def fileno(self) -> int:
        return pdkv_engine_fileno(self._alive())

    def path(self, int64_t peer) -> str:
        cdef char path[PDKV_PATH_SIZE]
        cdef char lanes[PDKV_PATH_SIZE]
        pdkv_engine_path(self._alive(), peer, path, lanes)
        return path.decode(errors="replace")

    def lanes(self, int64_t peer) -> str:
        cdef char path[PDKV_PATH_SIZE]
        cdef char lanes[PDKV_PATH_SIZE]
        pdkv_engine_path(self._alive(), peer, path, lanes)
        return lanes.decode(errors="replace")

    def close(self) -> None:
        cdef pdkv_engine *engine = self.engine
        self.engine = NULL
        # A forked child has the memory of the engine but not its thread: leaving it alone is all it may do.
        if engine != NULL and self.owner_pid == os.getpid():
            with nogil:
                pdkv_engine_destroy(engine)

    def __dealloc__(self):
        self.close()

    cdef pdkv_engine *_alive(self) except NULL:
        if self.engine == NULL:
            raise ValueError("the transport is closed")
        return self.engine
