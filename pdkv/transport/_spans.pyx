# cython: language_level=3, boundscheck=False, wraparound=False
"""The thin Python face of ``native/spans.h``: looks at and cuts a batch's spans without the interpreter's lock."""

include "_reads.pxi"

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uintptr_t


cdef extern from "native/reads.h" nogil:
    ctypedef struct pdkv_range:
        uint64_t address
        uint64_t length

    ctypedef struct pdkv_bounds:
        const uint64_t *far
        size_t num_far
        const pdkv_range *near
        size_t num_near

    ctypedef struct pdkv_done_queue:
        int fd

    int pdkv_done_open(pdkv_done_queue *queue)
    void pdkv_done_close(pdkv_done_queue *queue)
    void pdkv_done_add(pdkv_done_queue *queue, pdkv_done *done)
    pdkv_done *pdkv_done_take(pdkv_done_queue *queue)


cdef extern from "native/spans.h" nogil:
    ctypedef struct pdkv_survey:
        int fits
        int any_long
        int any_short
        uint64_t bytes

    pdkv_survey pdkv_survey_spans(const pdkv_spans *spans, const pdkv_bounds *bounds, int64_t long_bytes)


cdef extern from "native/nvlink_posting.h" nogil:
    enum:
        PDKV_STREAMS
        PDKV_POSTED
        PDKV_WANTS_TABLE
        PDKV_BAD_SPAN

    ctypedef struct pdkv_gpu:
        void *context
        void *kernel
        unsigned threads
        unsigned copy_flags
        int tells_failed_index

    ctypedef struct pdkv_pace:
        int64_t long_bytes
        int64_t piece_bytes
        int64_t few_bytes
        size_t first_rows
        size_t first_fragments
        size_t times
        size_t most
        unsigned blocks
        unsigned row_streams

    ctypedef struct pdkv_table:
        int64_t *numbers
        uint64_t device
        size_t capacity

    ctypedef int pdkv_posted

    ctypedef struct pdkv_posting:
        const pdkv_gpu *gpu
        const pdkv_bounds *bounds
        const int64_t *bases
        pdkv_pace pace
        pdkv_spans spans
        void *streams[2]
        unsigned used
        int life
        uint64_t bytes
        int64_t begun_ns
        pdkv_table table
        int code
        const char *call

    void pdkv_set_calls(pdkv_gpu *gpu, const uint64_t *addresses)
    void pdkv_begin(pdkv_posting *posting, pdkv_spans spans)
    int pdkv_post(pdkv_posting *posting)
    int pdkv_mark(pdkv_posting *posting, void *const *events)


cdef extern from "native/nvlink_watch.h" nogil:
    ctypedef struct pdkv_watch:
        pass

    ctypedef struct pdkv_awaited:
        pdkv_done done
        unsigned num_events
        void *events[2]
        uint64_t bytes
        int has_tables
        int64_t begun_ns

    pdkv_watch *pdkv_watch_start(const pdkv_gpu *gpu, pdkv_done_queue *queue)
    void pdkv_watch_add(pdkv_watch *watch, pdkv_awaited *awaited)
    void pdkv_watch_stop(pdkv_watch *watch)
    void pdkv_watch_join(pdkv_watch *watch)


cdef class Bounds:
    """Which memories spans may touch: a peer's by their lengths, own ones by address and length."""

    cdef pdkv_bounds bounds

    def __cinit__(self, list far, list near):
        """``near``: (address, length) each. Raises ``ValueError`` for a length that is not positive."""
        self.bounds.num_far = len(far)
        self.bounds.num_near = len(near)
        cdef uint64_t *lengths = <uint64_t *>calloc(len(far) + 1, sizeof(uint64_t))
        cdef pdkv_range *ranges = <pdkv_range *>calloc(len(near) + 1, sizeof(pdkv_range))
        self.bounds.far = lengths
        self.bounds.near = ranges
        if lengths == NULL or ranges == NULL:
            raise MemoryError
        cdef int64_t address, length
        for i, length in enumerate(far):
            if length <= 0:
                raise ValueError(f"a memory of {length} bytes")
            lengths[i] = length
        for i, (address, length) in enumerate(near):
            if length <= 0 or address <= 0:
                raise ValueError(f"a memory of {length} bytes at {address}")
            ranges[i].address = address
            ranges[i].length = length

    def __dealloc__(self):
        free(<void *>self.bounds.far)
        free(<void *>self.bounds.near)


def survey(Bounds bounds, const int64_t[::1] memory, const int64_t[::1] remote, const int64_t[::1] local,
           const int64_t[::1] length, int64_t long_bytes):
    """(all spans are within the bounds, some have at least ``long_bytes``, some have fewer, bytes of all)."""
    cdef pdkv_spans spans = spans_of(memory, remote, local, length)
    cdef pdkv_survey found
    with nogil:
        found = pdkv_survey_spans(&spans, &bounds.bounds, long_bytes)
    return found.fits != 0, found.any_long != 0, found.any_short != 0, found.bytes


cdef class Driver:
    """NVIDIA's driver as far as reads need it, by the addresses of its functions; what those are given is not checked."""

    cdef pdkv_gpu gpu

    def __init__(self, calls):
        """``calls``: ``pdkv.transport.gpu.DriverCalls``."""
        cdef uint64_t addresses[8]
        for i, address in enumerate((calls.push_context, calls.pop_context, calls.memcpy_batch, calls.memcpy_to_device,
                                     calls.launch_kernel, calls.record_event, calls.query_event,
                                     calls.wait_for_event)):
            addresses[i] = address
        pdkv_set_calls(&self.gpu, addresses)
        self.gpu.context = <void *><uintptr_t>calls.context
        self.gpu.kernel = <void *><uintptr_t>calls.kernel
        self.gpu.threads = calls.threads
        self.gpu.copy_flags = calls.copy_flags
        self.gpu.tells_failed_index = calls.tells_failed_index


cdef class Ends:
    """Reads that have ended and that nobody was told of yet. Added to by any thread, taken by its owner's."""

    cdef pdkv_done_queue queue
    cdef bint is_open

    def __init__(self):
        """Raises ``OSError`` when descriptors are short."""
        if pdkv_done_open(&self.queue) != 0:
            raise OSError("no descriptor is left")
        self.is_open = True

    def fileno(self) -> int:
        """Readable while ``take`` has something to return."""
        return self.queue.fd

    def add(self, int64_t read):
        """One that nothing waits for."""
        cdef pdkv_done *done = <pdkv_done *>calloc(1, sizeof(pdkv_done))
        if done == NULL:
            raise MemoryError
        done.read = read
        pdkv_done_add(&self.queue, done)

    def take(self) -> list:
        """(read, CUDA's result) each, oldest first."""
        cdef pdkv_done *done = pdkv_done_take(&self.queue)
        cdef pdkv_done *following
        ended = []
        while done != NULL:
            ended.append((done.read, done.status))
            following = done.next
            free(done)
            done = following
        return ended

    def close(self):
        """Nothing may add to it any more."""
        if self.is_open:
            self.is_open = False
            pdkv_done_close(&self.queue)

    def __dealloc__(self):
        if self.is_open:
            pdkv_done_close(&self.queue)


cdef class Watch:
    """A thread that waits for reads in the order in which they were added, and adds those that have ended to ``ends``."""

    cdef pdkv_watch *watch
    cdef Driver driver
    cdef Ends ends

    def __init__(self, Driver driver, Ends ends):
        """Raises ``OSError`` when the system has no thread left."""
        self.driver, self.ends = driver, ends
        self.watch = pdkv_watch_start(&driver.gpu, &ends.queue)
        if self.watch == NULL:
            raise OSError("no thread is left")

    def add(self, int64_t read, tuple events, uint64_t num_bytes, bint has_tables, int64_t begun_ns):
        """A read of so many bytes ends with the last of its events. Not after ``stop``."""
        cdef pdkv_awaited *awaited = <pdkv_awaited *>calloc(1, sizeof(pdkv_awaited))
        if awaited == NULL:
            raise MemoryError
        awaited.done.read = read
        for event in events:
            awaited.events[awaited.num_events] = <void *><uintptr_t>event
            awaited.num_events += 1
        awaited.bytes, awaited.has_tables, awaited.begun_ns = num_bytes, has_tables, begun_ns
        pdkv_watch_add(self.watch, awaited)

    def stop(self):
        """The thread ends when all reads have ended that were added."""
        if self.watch != NULL:
            pdkv_watch_stop(self.watch)

    def join(self):
        """After ``stop``, once, by any thread: waits for the end, without the interpreter's lock."""
        cdef pdkv_watch *watch = self.watch
        self.watch = NULL
        if watch != NULL:
            with nogil:
                pdkv_watch_join(watch)

    def __dealloc__(self):
        cdef pdkv_watch *watch = self.watch
        if watch != NULL:
            pdkv_watch_stop(watch)
            with nogil:
                pdkv_watch_join(watch)


cdef class Posting:
    """Puts one batch after another on two streams; see native/nvlink_posting.h. Holds what it is given, and a batch's
    arrays until the next; used by one thread."""

    cdef pdkv_posting posting
    cdef object held
    cdef Py_buffer buffers[4]
    cdef int num_buffers

    def __init__(self, Driver driver, Bounds bounds, const int64_t[::1] bases, tuple pace, tuple streams, int life):
        """``bases``: an address for every memory that a span may name. ``pace``: the fields of ``pdkv_pace``.
        ``streams``: two. ``life``: a descriptor that is readable when the peer's process has ended."""
        if bases.shape[0] < <Py_ssize_t>bounds.bounds.num_far or bases.shape[0] == 0:
            raise ValueError("a memory without address")
        self.posting.gpu = &driver.gpu
        self.posting.bounds = &bounds.bounds
        self.posting.bases = &bases[0]
        for i in range(2):
            self.posting.streams[i] = <void *><uintptr_t>streams[i]
        self.posting.life = life
        cdef pdkv_pace *own = &self.posting.pace
        (own.long_bytes, own.piece_bytes, own.few_bytes, own.first_rows, own.first_fragments, own.times, own.most,
         own.blocks, own.row_streams) = pace
        self.held = (driver, bounds, bases)

    def post(self, memory, remote, local, length) -> int:
        """Begin, and go on until it ends or wants a table: 0 = all is posted, 1 = it wants a table, 2 = a span is bad,
        3 = the driver refused, 4 = the peer's process has ended."""
        cdef pdkv_spans spans
        self._release()
        spans.memory = self._take(memory)
        spans.remote = self._take(remote)
        spans.local = self._take(local)
        spans.length = self._take(length)
        spans.count = self.buffers[0].len // 8
        for i in range(1, 4):
            if self.buffers[i].len != self.buffers[0].len:
                raise ValueError("the four arrays of a batch differ in length")
        pdkv_begin(&self.posting, spans)
        return self._go_on()

    def give(self, int64_t[::1] numbers, uint64_t device) -> int:
        """A table, [3 x n] page-locked here and as much at ``device`` on the GPU; goes on as ``post`` does."""
        self.posting.table = pdkv_table(&numbers[0], device, numbers.shape[0] // 3)
        return self._go_on()

    cdef const int64_t *_take(self, array) except? NULL:
        """Plain buffers: a memoryview of each costs as much again as all else that is done before the first launch."""
        cdef Py_buffer *buffer = &self.buffers[self.num_buffers]
        PyObject_GetBuffer(array, buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
        self.num_buffers += 1
        if buffer.itemsize != 8 or buffer.format[0] not in (c'l', c'q'):
            raise ValueError("an array of other numbers than int64")
        return <const int64_t *>buffer.buf

    cdef void _release(self):
        while self.num_buffers > 0:
            self.num_buffers -= 1
            PyBuffer_Release(&self.buffers[self.num_buffers])

    def __dealloc__(self):
        self._release()

    cdef int _go_on(self):
        cdef int ended
        with nogil:
            ended = pdkv_post(&self.posting)
        if ended != PDKV_WANTS_TABLE:
            self._release()
        return ended

    def mark(self, uint64_t first, uint64_t second) -> int:
        """Record an event on each stream that was used. CUDA's result."""
        cdef void *events[2]
        cdef int code
        events[0] = <void *><uintptr_t>first
        events[1] = <void *><uintptr_t>second
        with nogil:
            code = pdkv_mark(&self.posting, events)
        return code

    @property
    def used(self) -> int:
        """Bit n: stream n has something of the batch."""
        return self.posting.used

    @property
    def num_bytes(self) -> int:
        """Of the parts that were looked at."""
        return self.posting.bytes

    @property
    def begun_ns(self) -> int:
        """When ``post`` was called, by the monotonic clock."""
        return self.posting.begun_ns

    @property
    def refusal(self):
        """(CUDA's result, the call that it is of); after ``post``, ``give`` or ``mark`` told of one."""
        return self.posting.code, self.posting.call.decode() if self.posting.call != NULL else ""
