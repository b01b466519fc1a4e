/* What a connection has yet to send: bytes of a device on their way through a stage, sent in order while the next ones
 * are being copied. One thread's. */
#ifndef PDKV_PULL_OUTBOX_H
#define PDKV_PULL_OUTBOX_H

#include <sys/uio.h>

#include "pull_device.h"

typedef struct pdkv_outbox {
    pdkv_stage *stage;
    size_t slot_bytes;
    int fd;
    unsigned first, count;          /* the slots in use */
    size_t bytes[PDKV_STAGE_SLOTS]; /* of each */
} pdkv_outbox;

/* Sends all parts; 0, or -1 when the connection is over. Uses up `parts`. */
int pdkv_send_parts(int fd, struct iovec *parts, size_t count);

/* Sends all parts, which lie on the device, sooner or later. 0, or -1 when connection or device are over. */
int pdkv_outbox_add(pdkv_outbox *outbox, const struct iovec *parts, size_t count);

/* Waits for the oldest slot's copies and sends it. Likewise. */
int pdkv_outbox_send(pdkv_outbox *outbox);

#endif
