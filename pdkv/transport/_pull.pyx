# cython: language_level=3, boundscheck=False, wraparound=False
"""The thin Python face of the native puller and host: copies in, tuples out, never holds the GIL while it waits."""

cimport cython
from libc.string cimport memcpy, memset

include "_reads.pxi"

import os


cdef extern from "native/pull.h" nogil:
    enum:
        PDKV_TOKEN_SIZE
        PDKV_MAX_MEMORIES
        PDKV_HOSTNAME_SIZE

    ctypedef struct pdkv_puller:
        pass

    ctypedef struct pdkv_pull_limits:
        unsigned streams
        unsigned copies
        uint64_t slice_bytes

    ctypedef struct pdkv_far_memory:
        uint64_t length
        uint64_t inode
        int fd

    ctypedef struct pdkv_far_address:
        unsigned char token[32]
        char host[256]
        int port
        int pid

    ctypedef struct pdkv_device:
        pass

    pdkv_device *pdkv_device_cuda(char *error, size_t error_size)
    pdkv_device *pdkv_device_emulated(unsigned delay_us, char *error, size_t error_size)
    int pdkv_device_adopt(pdkv_device *device, uint64_t address, uint64_t length, int fd, char *error,
                          size_t error_size)
    int pdkv_device_try(pdkv_device *device, size_t slot_bytes, char *error, size_t error_size)
    void pdkv_device_destroy(pdkv_device *device)

    pdkv_puller *pdkv_puller_create(pdkv_pull_limits limits)
    void pdkv_puller_use_device(pdkv_puller *puller, pdkv_device *device, uint64_t slice_bytes)
    int pdkv_puller_add_destination(pdkv_puller *puller, uint64_t address, uint64_t length)
    int64_t pdkv_puller_connect(pdkv_puller *puller, const pdkv_far_address *address, const pdkv_far_memory *memories,
                                size_t num_memories)
    void pdkv_puller_close_peer(pdkv_puller *puller, int64_t peer)
    int64_t pdkv_puller_submit(pdkv_puller *puller, int64_t peer, const pdkv_spans *spans)
    pdkv_done *pdkv_puller_poll(pdkv_puller *puller)
    int pdkv_puller_fileno(const pdkv_puller *puller)
    int pdkv_puller_has_carried(pdkv_puller *puller, int64_t peer)
    void pdkv_puller_destroy(pdkv_puller *puller)


cdef extern from "native/pull_host.h" nogil:
    ctypedef struct pdkv_host:
        pass

    pdkv_host *pdkv_host_create(int listener, const unsigned char *token)
    void pdkv_host_use_device(pdkv_host *host, pdkv_device *device, size_t slot_bytes)
    int pdkv_host_add_memory(pdkv_host *host, uint64_t address, uint64_t length, int fd)
    void pdkv_host_destroy(pdkv_host *host)


TOKEN_SIZE = PDKV_TOKEN_SIZE
MAX_MEMORIES = PDKV_MAX_MEMORIES
MAX_HOST = PDKV_HOSTNAME_SIZE - 1


cdef class Device:
    """A GPU, or its stand-in, as the threads of pullers and hosts copy to and from it. Used by the owner's thread;
    lives as long as they do."""

    cdef pdkv_device *device
    cdef int owner_pid

    def __init__(self, str name, unsigned delay_us):
        """``name``: "cuda..." or "emulated", whose copies take ``delay_us`` each. Raises ``OSError``."""
        cdef char error[PDKV_ERROR_SIZE]
        error[0] = 0
        if name == "emulated":
            self.device = pdkv_device_emulated(delay_us, error, PDKV_ERROR_SIZE)
        else:
            self.device = pdkv_device_cuda(error, PDKV_ERROR_SIZE)
        if self.device == NULL:
            raise OSError(error.decode(errors="replace"))
        self.owner_pid = os.getpid()

    def adopt(self, uint64_t address, uint64_t length, int fd, size_t slot_bytes) -> None:
        """Make a range known, and try a stage with slots of ``slot_bytes``. Raises ``OSError`` with the reason."""
        cdef char error[PDKV_ERROR_SIZE]
        cdef int failed
        error[0] = 0
        with nogil:
            failed = pdkv_device_adopt(self.device, address, length, fd, error, PDKV_ERROR_SIZE)
            if not failed:
                failed = pdkv_device_try(self.device, slot_bytes, error, PDKV_ERROR_SIZE)
        if failed:
            raise OSError(error.decode(errors="replace"))

    def __dealloc__(self):
        if self.device != NULL and self.owner_pid == os.getpid():
            pdkv_device_destroy(self.device)


@cython.no_gc_clear  # its threads use the device until it is closed
cdef class Puller:
    """Reads from peers. ``close`` must be called; all calls from one thread."""

    cdef pdkv_puller *puller
    cdef Device device
    cdef int owner_pid

    def __init__(self, unsigned streams, unsigned copies, uint64_t slice_bytes):
        self.puller = pdkv_puller_create(pdkv_pull_limits(streams, copies, slice_bytes))
        if self.puller == NULL:
            raise MemoryError
        self.owner_pid = os.getpid()

    def use_device(self, Device device, uint64_t slice_bytes) -> None:
        """All destinations lie on it, and slices are as long as that. Before the first of them, and ``connect``."""
        pdkv_puller_use_device(self._alive(), device.device, slice_bytes)
        self.device = device

    def add_destination(self, uint64_t address, uint64_t length) -> None:
        if pdkv_puller_add_destination(self._alive(), address, length) != 0:
            raise MemoryError

    def connect(self, bytes token, bytes host, int port, int pid, list memories) -> int:
        """``memories``: (length, inode, fd) each. ``port`` 0 maps them: ``host`` is a socket's name then."""
        cdef pdkv_puller *puller = self._alive()
        cdef size_t count = len(memories)
        cdef pdkv_far_address address
        cdef const char *text = token
        cdef int64_t peer
        if len(token) != PDKV_TOKEN_SIZE or len(host) >= PDKV_HOSTNAME_SIZE or count > PDKV_MAX_MEMORIES:
            raise ValueError("a token, host name or list of memories has the wrong size")
        memset(&address, 0, sizeof(address))
        memcpy(address.token, text, PDKV_TOKEN_SIZE)
        text = host
        memcpy(address.host, text, len(host))
        address.port = port
        address.pid = pid
        cdef pdkv_far_memory *native = <pdkv_far_memory *>calloc(count + 1, sizeof(pdkv_far_memory))
        if native == NULL:
            raise MemoryError
        for i, (length, inode, fd) in enumerate(memories):
            native[i].length = length
            native[i].inode = inode
            native[i].fd = fd
        with nogil:
            peer = pdkv_puller_connect(puller, &address, native, count)
        free(native)
        if peer < 0:
            raise MemoryError
        return peer

    def close_peer(self, int64_t peer) -> None:
        cdef pdkv_puller *puller = self._alive()
        with nogil:
            pdkv_puller_close_peer(puller, peer)

    def submit(self, int64_t peer, const int64_t[::1] memory, const int64_t[::1] remote, const int64_t[::1] local,
               const int64_t[::1] length) -> int:
        cdef int64_t read
        cdef pdkv_puller *puller = self._alive()
        cdef pdkv_spans spans = spans_of(memory, remote, local, length)
        with nogil:
            read = pdkv_puller_submit(puller, peer, &spans)
        if read < 0:
            raise MemoryError
        return read

    def poll(self) -> list:
        return told(pdkv_puller_poll(self._alive()))

    def fileno(self) -> int:
        return pdkv_puller_fileno(self._alive())

    def has_carried(self, int64_t peer) -> bool:
        return pdkv_puller_has_carried(self._alive(), peer) != 0

    def close(self) -> None:
        cdef pdkv_puller *puller = self.puller
        self.puller = NULL
        # A forked child has the puller's memory but not its threads: leaving it alone is all it may do.
        if puller != NULL and self.owner_pid == os.getpid():
            with nogil:
                pdkv_puller_destroy(puller)

    def __dealloc__(self):
        self.close()

    cdef pdkv_puller *_alive(self) except NULL:
        if self.puller == NULL:
            raise ValueError("the transport is closed")
        return self.puller


@cython.no_gc_clear  # its threads use the device until it is closed
cdef class Host:
    """Lets peers that know the token read registered memory. ``close`` must be called; all calls from one thread."""

    cdef pdkv_host *host
    cdef Device device
    cdef int owner_pid

    def __init__(self, int listener, bytes token):
        """Takes over the descriptor ``listener``."""
        cdef const char *text = token
        if len(token) != PDKV_TOKEN_SIZE:
            raise ValueError(f"a token has {PDKV_TOKEN_SIZE} bytes")
        self.host = pdkv_host_create(listener, <const unsigned char *>text)
        if self.host == NULL:
            raise MemoryError
        self.owner_pid = os.getpid()

    def use_device(self, Device device, size_t slot_bytes) -> None:
        """All memory lies on it. Before the first memory."""
        if self.host == NULL:
            raise ValueError("the transport is closed")
        pdkv_host_use_device(self.host, device.device, slot_bytes)
        self.device = device

    def add_memory(self, uint64_t address, uint64_t length, int fd) -> None:
        """``fd`` (-1 = none) goes to peers on this host, and stays the caller's."""
        if self.host == NULL:
            raise ValueError("the transport is closed")
        if pdkv_host_add_memory(self.host, address, length, fd) != 0:
            raise ValueError(f"at most {PDKV_MAX_MEMORIES} memories can be registered")

    def close(self) -> None:
        cdef pdkv_host *host = self.host
        self.host = NULL
        if host != NULL and self.owner_pid == os.getpid():
            with nogil:
                pdkv_host_destroy(host)

    def __dealloc__(self):
        self.close()
