/* See pull_outbox.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>

#include "pull_outbox.h"

int pdkv_send_parts(int fd, struct iovec *parts, size_t count)
{
    while (count > 0) {
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return -1;
        size_t passed = (size_t)sent;
        for (; count > 0 && passed >= parts->iov_len; parts++, count--)
            passed -= parts->iov_len;
        if (count > 0) {
            parts->iov_base = (char *)parts->iov_base + passed;
            parts->iov_len -= passed;
        }
    }
    return 0;
}

int pdkv_outbox_send(pdkv_outbox *outbox)
{
    unsigned slot = outbox->first;
    struct iovec whole = {.iov_base = pdkv_stage_buffer(outbox->stage, slot), .iov_len = outbox->bytes[slot]};
    outbox->first = (slot + 1) % PDKV_STAGE_SLOTS;
    outbox->count--;
    if (pdkv_stage_wait(outbox->stage, slot) != 0)
        return -1;
    return pdkv_send_parts(outbox->fd, &whole, 1);
}

/* Begins the copies that fill one slot, from `skip` bytes into the first part on; returns how many bytes, 0 = failed. */
static size_t fill_slot(pdkv_outbox *outbox, unsigned slot, const struct iovec *parts, size_t count, size_t skip)
{
    pdkv_copy_list *list = pdkv_stage_list(outbox->stage);
    char *to = pdkv_stage_buffer(outbox->stage, slot);
    size_t filled = 0;
    list->count = 0;
    for (size_t i = 0; i < count && filled < outbox->slot_bytes; i++, skip = 0) {
        size_t left = parts[i].iov_len - skip, room = outbox->slot_bytes - filled;
        size_t bytes = left < room ? left : room;
        list->to[list->count] = to + filled;
        list->from[list->count] = (char *)parts[i].iov_base + skip;
        list->bytes[list->count++] = bytes;
        filled += bytes;
    }
    outbox->bytes[slot] = filled;
    return pdkv_stage_post(outbox->stage, slot) == 0 ? filled : 0;
}

int pdkv_outbox_add(pdkv_outbox *outbox, const struct iovec *parts, size_t count)
{
    size_t skip = 0;
    while (count > 0) {
        if (outbox->count == PDKV_STAGE_SLOTS && pdkv_outbox_send(outbox) != 0)
            return -1;
        unsigned slot = (outbox->first + outbox->count) % PDKV_STAGE_SLOTS;
        size_t filled = fill_slot(outbox, slot, parts, count, skip);
        if (filled == 0)
            return -1;
        outbox->count++;
        for (filled += skip; count > 0 && filled >= parts->iov_len; parts++, count--)
            filled -= parts->iov_len;
        skip = filled;
    }
    return 0;
}
