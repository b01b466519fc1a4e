# cython: language_level=3, boundscheck=False, wraparound=False
"""The thin Python face of ``native/spans.h``: looks at and cuts a batch's spans without the interpreter's lock."""

include "_reads.pxi"


cdef extern from "native/reads.h" nogil:
    ctypedef struct pdkv_range:
        uint64_t address
        uint64_t length

    ctypedef struct pdkv_bounds:
        const uint64_t *far
        size_t num_far
        const pdkv_range *near
        size_t num_near


cdef extern from "native/spans.h" nogil:
    ctypedef struct pdkv_survey:
        int fits
        int any_long
        int any_short
        uint64_t bytes

    ctypedef struct pdkv_cutter:
        pdkv_spans spans
        const int64_t *bases
        int64_t long_bytes
        int64_t piece_bytes
        size_t next
        int64_t done

    pdkv_survey pdkv_survey_spans(const pdkv_spans *spans, const pdkv_bounds *bounds, int64_t long_bytes)
    size_t pdkv_cut_spans(pdkv_cutter *cutter, int64_t *table, size_t capacity)


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


cdef class Cutter:
    """Cuts the spans of a batch that a survey found sound. Holds its arrays; used by one thread at a time."""

    cdef pdkv_cutter cutter
    cdef object arrays

    def __init__(self, const int64_t[::1] bases, const int64_t[::1] memory, const int64_t[::1] remote,
                 const int64_t[::1] local, const int64_t[::1] length, int64_t long_bytes, int64_t piece_bytes):
        """``bases``: an address for every memory that a span names. Spans from ``long_bytes`` on are passed over."""
        if piece_bytes <= 0 or bases.shape[0] == 0:
            raise ValueError("pieces of nothing, or a peer without memory")
        self.cutter.spans = spans_of(memory, remote, local, length)
        self.cutter.bases = &bases[0]
        self.cutter.long_bytes = long_bytes
        self.cutter.piece_bytes = piece_bytes
        self.arrays = (bases, memory, remote, local, length)

    def fill(self, int64_t[::1] table) -> int:
        """Write the next pieces, three numbers each: where to, where from, how many bytes. Returns how many; 0 = none
        is left."""
        cdef size_t made, capacity = table.shape[0] // 3
        if capacity == 0:
            return 0
        with nogil:
            made = pdkv_cut_spans(&self.cutter, &table[0], capacity)
        return made
