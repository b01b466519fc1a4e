/* The side that is read: answers pullers that know the token, out of registered memory, without the GIL.
 *
 * Threads: every function is called by the transport's owner thread. One thread accepts; each connection has its own.
 */
#ifndef PDKV_PULL_HOST_H
#define PDKV_PULL_HOST_H

#include <stdint.h>

#include "pull.h"

typedef struct pdkv_host pdkv_host;

/* Takes over `listener`, a listening TCP or unix socket. NULL when threads, memory or descriptors are short. */
pdkv_host *pdkv_host_create(int listener, const unsigned char *token);

/* All memory lies on this device: what TCP is to carry passes through buffers of `slot_bytes`. Before the first memory. */
void pdkv_host_use_device(pdkv_host *host, pdkv_device *device, size_t slot_bytes);

/* Makes memory readable; `fd` (-1 = none) is what a unix socket's peers are handed, and stays the caller's. 0, or -1
 * when there are PDKV_MAX_MEMORIES already. */
int pdkv_host_add_memory(pdkv_host *host, uint64_t address, uint64_t length, int fd);

/* Ends all connections and waits for their threads: nothing reads the memory afterwards. */
void pdkv_host_destroy(pdkv_host *host);

#endif
