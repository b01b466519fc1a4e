/* A stand-in for a GPU where there is none: memory that faults at the processor's touch, copied by a thread of its own
 * some time later, through a second mapping. What forgets to stage crashes, what forgets to wait reads stale bytes. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pull_device.h"

typedef struct window {
    uint64_t address, length;
    char *alias;
} window;

typedef struct emulated_device {
    pdkv_device device; /* first */
    unsigned delay_us;
    size_t num_windows; /* written by the owner under the lock */
    window windows[PDKV_MAX_MEMORIES];
    pthread_mutex_t lock;
} emulated_device;

typedef struct emulated_queue {
    emulated_device *device;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    uint64_t posted, ended; /* posts since the start; the oldest unfinished one lies in lists[ended % SLOTS] */
    uint64_t last[PDKV_STAGE_SLOTS]; /* the latest post of each slot, counted from 1 */
    int closing;
    char *pinned;
    pdkv_copy_list lists[PDKV_STAGE_SLOTS];
} emulated_queue;

/* ---- the device ---- */

static int adopt(pdkv_device *device, uint64_t address, uint64_t length, int fd, char *error, size_t size)
{
    emulated_device *emulated = (emulated_device *)device;
    if (emulated->num_windows == PDKV_MAX_MEMORIES) {
        snprintf(error, size, "there are %d memories already", PDKV_MAX_MEMORIES);
        return -1;
    }
    char *alias = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (alias == MAP_FAILED) {
        snprintf(error, size, "its memfd cannot be mapped: %s", strerror(errno));
        return -1;
    }
    pthread_mutex_lock(&emulated->lock);
    emulated->windows[emulated->num_windows++] = (window){address, length, alias};
    pthread_mutex_unlock(&emulated->lock);
    return 0;
}

static void destroy(pdkv_device *device)
{
    emulated_device *emulated = (emulated_device *)device;
    for (size_t i = 0; i < emulated->num_windows; i++)
        munmap(emulated->windows[i].alias, emulated->windows[i].length);
    pthread_mutex_destroy(&emulated->lock);
    free(emulated);
}

static const char *name_of(const pdkv_device *device, int error)
{
    (void)device;
    return strerror(error);
}

static char *translated(emulated_device *emulated, void *place)
{
    uint64_t address = (uint64_t)(uintptr_t)place;
    char *found = place; /* pinned memory is where it seems to be */
    pthread_mutex_lock(&emulated->lock);
    for (size_t i = 0; i < emulated->num_windows; i++) {
        const window *at = &emulated->windows[i];
        if (address >= at->address && address - at->address < at->length)
            found = at->alias + (address - at->address);
    }
    pthread_mutex_unlock(&emulated->lock);
    return found;
}

/* ---- one thread's queue ---- */

static void copy(emulated_queue *queue, const pdkv_copy_list *list)
{
    usleep(queue->device->delay_us);
    for (size_t i = 0; i < list->count; i++)
        memcpy(translated(queue->device, list->to[i]), translated(queue->device, list->from[i]), list->bytes[i]);
}

static void *run(void *argument)
{
    emulated_queue *queue = argument;
    pthread_mutex_lock(&queue->lock);
    for (;;) {
        while (queue->ended == queue->posted && !queue->closing)
            pthread_cond_wait(&queue->moved, &queue->lock);
        if (queue->ended == queue->posted)
            break;
        const pdkv_copy_list *list = &queue->lists[queue->ended % PDKV_STAGE_SLOTS];
        pthread_mutex_unlock(&queue->lock);
        copy(queue, list);
        pthread_mutex_lock(&queue->lock);
        queue->ended++;
        pthread_cond_broadcast(&queue->moved);
    }
    pthread_mutex_unlock(&queue->lock);
    return NULL;
}

static int open_queue(pdkv_device *device, size_t bytes, void **opened, char **pinned)
{
    emulated_queue *queue = calloc(1, sizeof(*queue));
    if (queue == NULL || (queue->pinned = malloc(bytes)) == NULL) {
        free(queue);
        return ENOMEM;
    }
    queue->device = (emulated_device *)device;
    pthread_mutex_init(&queue->lock, NULL);
    pthread_cond_init(&queue->moved, NULL);
    int error = pthread_create(&queue->thread, NULL, run, queue);
    if (error != 0) {
        free(queue->pinned);
        free(queue);
        return error;
    }
    *opened = queue;
    *pinned = queue->pinned;
    return 0;
}

static int post(void *opaque, unsigned slot, pdkv_copy_list *list)
{
    emulated_queue *queue = opaque;
    pthread_mutex_lock(&queue->lock);
    while (queue->posted - queue->ended == PDKV_STAGE_SLOTS)
        pthread_cond_wait(&queue->moved, &queue->lock);
    queue->lists[queue->posted++ % PDKV_STAGE_SLOTS] = *list;
    queue->last[slot] = queue->posted;
    pthread_cond_broadcast(&queue->moved);
    pthread_mutex_unlock(&queue->lock);
    return 0;
}

static int wait_for(void *opaque, unsigned slot)
{
    emulated_queue *queue = opaque;
    pthread_mutex_lock(&queue->lock);
    while (queue->ended < queue->last[slot])
        pthread_cond_wait(&queue->moved, &queue->lock);
    pthread_mutex_unlock(&queue->lock);
    return 0;
}

static void close_queue(void *opaque)
{
    emulated_queue *queue = opaque;
    pthread_mutex_lock(&queue->lock);
    queue->closing = 1;
    pthread_cond_broadcast(&queue->moved);
    pthread_mutex_unlock(&queue->lock);
    pthread_join(queue->thread, NULL);
    pthread_cond_destroy(&queue->moved);
    pthread_mutex_destroy(&queue->lock);
    free(queue->pinned);
    free(queue);
}

static const pdkv_device_kind EMULATED = {adopt, destroy, name_of, open_queue, post, wait_for, close_queue};

pdkv_device *pdkv_device_emulated(unsigned delay_us, char *error, size_t size)
{
    emulated_device *emulated = calloc(1, sizeof(*emulated));
    if (emulated == NULL) {
        snprintf(error, size, "out of memory");
        return NULL;
    }
    emulated->device.kind = &EMULATED;
    emulated->delay_us = delay_us;
    pthread_mutex_init(&emulated->lock, NULL);
    return &emulated->device;
}
