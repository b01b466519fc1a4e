/* See pull_device.h. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "pull_device.h"

struct pdkv_stage {
    const pdkv_device_kind *kind;
    void *queue;
    char *buffers;
    size_t slot_bytes;
    pdkv_copy_list list;
};

int pdkv_stage_open(pdkv_device *device, size_t slot_bytes, pdkv_stage **opened)
{
    pdkv_stage *stage = calloc(1, sizeof(*stage));
    if (stage == NULL)
        return ENOMEM;
    stage->kind = device->kind;
    stage->slot_bytes = slot_bytes;
    int error = device->kind->open(device, PDKV_STAGE_SLOTS * slot_bytes, &stage->queue, &stage->buffers);
    if (error != 0) {
        free(stage);
        return error;
    }
    *opened = stage;
    return 0;
}

char *pdkv_stage_buffer(pdkv_stage *stage, unsigned slot)
{
    return stage->buffers + slot * stage->slot_bytes;
}

pdkv_copy_list *pdkv_stage_list(pdkv_stage *stage)
{
    return &stage->list;
}

int pdkv_stage_post(pdkv_stage *stage, unsigned slot)
{
    return stage->kind->post(stage->queue, slot, &stage->list);
}

int pdkv_stage_wait(pdkv_stage *stage, unsigned slot)
{
    return stage->kind->wait(stage->queue, slot);
}

void pdkv_stage_close(pdkv_stage *stage)
{
    if (stage == NULL)
        return;
    stage->kind->close(stage->queue);
    free(stage);
}

const char *pdkv_device_error(const pdkv_device *device, int error)
{
    return device->kind->name(device, error);
}

int pdkv_device_adopt(pdkv_device *device, uint64_t address, uint64_t length, int fd, char *error, size_t error_size)
{
    return device->kind->adopt(device, address, length, fd, error, error_size);
}

typedef struct trial {
    pdkv_device *device;
    size_t slot_bytes;
    int error;
} trial;

static void *run_trial(void *argument)
{
    trial *one = argument;
    pdkv_stage *stage = NULL;
    one->error = pdkv_stage_open(one->device, one->slot_bytes, &stage);
    pdkv_stage_close(stage);
    return NULL;
}

int pdkv_device_try(pdkv_device *device, size_t slot_bytes, char *error, size_t error_size)
{
    trial one = {.device = device, .slot_bytes = slot_bytes};
    pthread_t thread; /* of its own: a stage leaves marks on its thread, a current GPU for one */
    if (pthread_create(&thread, NULL, run_trial, &one) != 0) {
        snprintf(error, error_size, "no thread could be started");
        return -1;
    }
    pthread_join(thread, NULL);
    if (one.error != 0)
        snprintf(error, error_size, "no pinned buffers: %s", pdkv_device_error(device, one.error));
    return one.error == 0 ? 0 : -1;
}

void pdkv_device_destroy(pdkv_device *device)
{
    device->kind->destroy(device);
}
