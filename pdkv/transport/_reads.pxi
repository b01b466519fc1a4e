# What the faces of all native readers share; textually part of each.

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free


cdef extern from "native/reads.h" nogil:
    enum:
        PDKV_ERROR_SIZE

    ctypedef struct pdkv_done:
        pdkv_done *next
        int64_t read
        int status
        char error[200]

    ctypedef struct pdkv_spans:
        size_t count
        const int64_t *memory
        const int64_t *remote
        const int64_t *local
        const int64_t *length


cdef pdkv_spans spans_of(const int64_t[::1] memory, const int64_t[::1] remote, const int64_t[::1] local,
                         const int64_t[::1] length) except *:
    """The arrays, where they lie."""
    cdef Py_ssize_t count = length.shape[0]
    if memory.shape[0] != count or remote.shape[0] != count or local.shape[0] != count:
        raise ValueError("the four arrays of a batch differ in length")
    if count == 0:
        return pdkv_spans(0, NULL, NULL, NULL, NULL)
    return pdkv_spans(count, &memory[0], &remote[0], &local[0], &length[0])


cdef list told(pdkv_done *done):
    """Completions as (read, status, error), which are freed."""
    cdef pdkv_done *following
    completions = []
    while done != NULL:
        completions.append((done.read, done.status, done.error.decode(errors="replace")))
        following = done.next
        free(done)
        done = following
    return completions
