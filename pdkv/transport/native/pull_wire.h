/* What puller and host say to each other, over TCP and over the unix socket that hands out descriptors. One host's
 * byte order: a peer whose numbers look wrong is refused by the greeting. */
#ifndef PDKV_PULL_WIRE_H
#define PDKV_PULL_WIRE_H

#include <stdint.h>

#include "pull.h"

#define PDKV_GREETING 0x31306c6c75706b70ULL /* "pkpull01" */

enum { PDKV_WIRE_SPANS = 512 };

/* Puller to host, first. The answer is a pdkv_welcome; a host that does not know the token closes. */
typedef struct pdkv_hello {
    uint64_t greeting;
    unsigned char token[PDKV_TOKEN_SIZE];
} pdkv_hello;

/* Over the unix socket the descriptors of all memories travel with it. */
typedef struct pdkv_welcome {
    uint64_t greeting;
    uint64_t num_memories;
} pdkv_welcome;

/* A request: how many spans, then that many of them. The answer is their bytes in that order, nothing else. */
typedef struct pdkv_request {
    uint64_t num_spans;
} pdkv_request;

typedef struct pdkv_wire_span {
    uint64_t memory, offset, length;
} pdkv_wire_span;

#endif
