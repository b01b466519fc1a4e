/* Memory that processors do not touch: how its bytes get to and from pinned host memory, in whose stead it is sent and
 * received. One table of functions for GPUs (pull_cuda.c), one for a stand-in without a GPU (pull_emulated.c).
 *
 * Threads: a device is made and told of memory by the transport's owner. Each thread that copies has a stage of its own.
 */
#ifndef PDKV_PULL_DEVICE_H
#define PDKV_PULL_DEVICE_H

#include <stddef.h>
#include <stdint.h>

#include "pull.h"

enum { PDKV_STAGE_SLOTS = 4, PDKV_STAGE_COPIES = 512 };

/* Copies of one slot, one field an array as the GPU's driver wants them. */
typedef struct pdkv_copy_list {
    size_t count;
    void *to[PDKV_STAGE_COPIES];
    void *from[PDKV_STAGE_COPIES];
    size_t bytes[PDKV_STAGE_COPIES];
} pdkv_copy_list;

/* What kinds of devices differ in. int results: 0, or an error that `name` has words for. */
typedef struct pdkv_device_kind {
    /* 0, or -1 with a reason in `error` when the range is not this device's. `fd`: of a memfd that holds it, -1 = none. */
    int (*adopt)(pdkv_device *device, uint64_t address, uint64_t length, int fd, char *error, size_t error_size);
    void (*destroy)(pdkv_device *device);
    const char *(*name)(const pdkv_device *device, int error);
    /* A queue of copies of the calling thread, and `bytes` of the host memory that they are fastest with. */
    int (*open)(pdkv_device *device, size_t bytes, void **queue, char **pinned);
    /* Begins the copies of a slot, behind those begun before, and returns. */
    int (*post)(void *queue, unsigned slot, pdkv_copy_list *list);
    /* Waits until the copies of a slot have ended. */
    int (*wait)(void *queue, unsigned slot);
    /* Waits for all copies and frees queue and host memory. */
    void (*close)(void *queue);
} pdkv_device_kind;

struct pdkv_device {
    const pdkv_device_kind *kind;
};

/* ---- a stage: one thread's buffers, and what is on its way between them and the device ---- */

typedef struct pdkv_stage pdkv_stage;

/* 0 with a stage, or an error of the device. */
int pdkv_stage_open(pdkv_device *device, size_t slot_bytes, pdkv_stage **stage);

/* The buffer of a slot, whose copies have been waited for. */
char *pdkv_stage_buffer(pdkv_stage *stage, unsigned slot);

/* Where the copies of the next post are put together. */
pdkv_copy_list *pdkv_stage_list(pdkv_stage *stage);

int pdkv_stage_post(pdkv_stage *stage, unsigned slot);
int pdkv_stage_wait(pdkv_stage *stage, unsigned slot);

/* What went wrong, in words. */
const char *pdkv_device_error(const pdkv_device *device, int error);

/* Waits for whatever is on its way: nothing is read or written for this stage afterwards. NULL is none. */
void pdkv_stage_close(pdkv_stage *stage);

#endif
