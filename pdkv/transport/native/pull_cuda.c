/* Copies between an NVIDIA GPU and pinned memory, by the driver that whoever allocated the memory has loaded. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pull_device.h"

/* The driver's interface as far as it is used, so that nothing of CUDA is needed to build. */
typedef int cu_result;
typedef void *cu_handle;

enum {
    POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9,
    STREAM_NON_BLOCKING = 1,
    EVENT_BLOCKING_SYNC = 1,
    EVENT_DISABLE_TIMING = 2,
    CAPTURE_MODE_RELAXED = 2,
    ORDER_STREAM = 1,
    OUT_OF_MEMORY = 2,
    NOT_READY = 600,
    BATCH_FROM = 3, /* fewer copies are begun sooner one by one */
};

typedef struct cu_copy_attributes {
    int source_order;
    int source_location[2], target_location[2];
    unsigned flags;
} cu_copy_attributes;

#define FUNCTIONS(X) \
    X(cuInit, (unsigned)) \
    X(cuGetErrorName, (cu_result, const char **)) \
    X(cuPointerGetAttribute, (void *, int, uint64_t)) \
    X(cuDevicePrimaryCtxRetain, (cu_handle *, int)) \
    X(cuDevicePrimaryCtxRelease_v2, (int)) \
    X(cuCtxSetCurrent, (cu_handle)) \
    X(cuThreadExchangeStreamCaptureMode, (int *)) \
    X(cuMemAllocHost_v2, (void **, size_t)) \
    X(cuMemFreeHost, (void *)) \
    X(cuStreamCreate, (cu_handle *, unsigned)) \
    X(cuStreamSynchronize, (cu_handle)) \
    X(cuStreamDestroy_v2, (cu_handle)) \
    X(cuEventCreate, (cu_handle *, unsigned)) \
    X(cuEventRecord, (cu_handle, cu_handle)) \
    X(cuEventQuery, (cu_handle)) \
    X(cuEventSynchronize, (cu_handle)) \
    X(cuEventDestroy_v2, (cu_handle)) \
    X(cuMemcpyAsync, (uint64_t, uint64_t, size_t, cu_handle))

typedef struct cuda_device {
    pdkv_device device; /* first */
    void *library;
#define DECLARE(name, arguments) cu_result(*name) arguments;
    FUNCTIONS(DECLARE)
#undef DECLARE
    /* CUDA 12.8 and later; one call for all copies. The second form is CUDA 13's. NULL where there is none. */
    cu_result (*batch)(void **, void **, size_t *, size_t, cu_copy_attributes *, size_t *, size_t, size_t *, cu_handle);
    cu_result (*batch_v2)(void **, void **, size_t *, size_t, cu_copy_attributes *, size_t *, size_t, cu_handle);
    int ordinal; /* -1 until the first memory is adopted */
    cu_handle context;
} cuda_device;

typedef struct cuda_queue {
    const cuda_device *cuda;
    cu_handle stream;
    cu_handle ended[PDKV_STAGE_SLOTS];
    char *pinned;
} cuda_queue;

/* ---- the device ---- */

static const char *name_of(const pdkv_device *device, int error)
{
    const char *name = NULL;
    ((const cuda_device *)device)->cuGetErrorName(error, &name);
    return name ? name : "an error that the driver has no name for";
}

static int adopt(pdkv_device *device, uint64_t address, uint64_t length, int fd, char *error, size_t size)
{
    cuda_device *cuda = (cuda_device *)device;
    int first = -1, last = -1;
    (void)fd;
    cu_result result = cuda->cuPointerGetAttribute(&first, POINTER_ATTRIBUTE_DEVICE_ORDINAL, address);
    if (result == 0)
        result = cuda->cuPointerGetAttribute(&last, POINTER_ATTRIBUTE_DEVICE_ORDINAL, address + length - 1);
    if (result != 0) {
        snprintf(error, size, "it is no memory of a GPU: %s", name_of(device, result));
        return -1;
    }
    if (first != last || (cuda->ordinal >= 0 && cuda->ordinal != first)) {
        snprintf(error, size, "it lies on another GPU than what was registered before");
        return -1;
    }
    if (cuda->ordinal >= 0)
        return 0;
    result = cuda->cuDevicePrimaryCtxRetain(&cuda->context, first);
    if (result != 0) {
        snprintf(error, size, "the GPU gives no context: %s", name_of(device, result));
        return -1;
    }
    cuda->ordinal = first;
    return 0;
}

static void destroy(pdkv_device *device)
{
    cuda_device *cuda = (cuda_device *)device;
    if (cuda->ordinal >= 0)
        cuda->cuDevicePrimaryCtxRelease_v2(cuda->ordinal);
    dlclose(cuda->library);
    free(cuda);
}

/* ---- one thread's queue ---- */

static void close_queue(void *opaque)
{
    cuda_queue *queue = opaque;
    const cuda_device *cuda = queue->cuda;
    if (queue->stream != NULL) {
        cuda->cuStreamSynchronize(queue->stream);
        cuda->cuStreamDestroy_v2(queue->stream);
    }
    for (unsigned i = 0; i < PDKV_STAGE_SLOTS; i++)
        if (queue->ended[i] != NULL)
            cuda->cuEventDestroy_v2(queue->ended[i]);
    if (queue->pinned != NULL)
        cuda->cuMemFreeHost(queue->pinned);
    free(queue);
}

static int open_queue(pdkv_device *device, size_t bytes, void **opened, char **pinned)
{
    const cuda_device *cuda = (const cuda_device *)device;
    /* An engine thread that captures a graph meanwhile is not disturbed by what this thread allocates. */
    int capture = CAPTURE_MODE_RELAXED;
    cuda_queue *queue = calloc(1, sizeof(*queue));
    if (queue == NULL)
        return OUT_OF_MEMORY;
    queue->cuda = cuda;
    cu_result result = cuda->cuCtxSetCurrent(cuda->context);
    if (result == 0)
        result = cuda->cuThreadExchangeStreamCaptureMode(&capture);
    if (result == 0)
        result = cuda->cuStreamCreate(&queue->stream, STREAM_NON_BLOCKING);
    if (result == 0)
        result = cuda->cuMemAllocHost_v2((void **)&queue->pinned, bytes);
    for (unsigned i = 0; result == 0 && i < PDKV_STAGE_SLOTS; i++)
        result = cuda->cuEventCreate(&queue->ended[i], EVENT_BLOCKING_SYNC | EVENT_DISABLE_TIMING);
    if (result != 0) {
        close_queue(queue);
        return result;
    }
    *opened = queue;
    *pinned = queue->pinned;
    return 0;
}

static cu_result copy_batch(const cuda_queue *queue, pdkv_copy_list *list)
{
    const cuda_device *cuda = queue->cuda;
    cu_copy_attributes attributes = {.source_order = ORDER_STREAM};
    size_t all = 0, failed;
    if (cuda->batch_v2 != NULL)
        return cuda->batch_v2(list->to, list->from, list->bytes, list->count, &attributes, &all, 1, queue->stream);
    return cuda->batch(list->to, list->from, list->bytes, list->count, &attributes, &all, 1, &failed, queue->stream);
}

static cu_result copy_each(const cuda_queue *queue, const pdkv_copy_list *list)
{
    cu_result result = 0;
    for (size_t i = 0; result == 0 && i < list->count; i++)
        result = queue->cuda->cuMemcpyAsync((uint64_t)(uintptr_t)list->to[i], (uint64_t)(uintptr_t)list->from[i],
                                            list->bytes[i], queue->stream);
    return result;
}

static int post(void *opaque, unsigned slot, pdkv_copy_list *list)
{
    cuda_queue *queue = opaque;
    const cuda_device *cuda = queue->cuda;
    int batches = (cuda->batch != NULL || cuda->batch_v2 != NULL) && list->count >= BATCH_FROM;
    cu_result result = batches ? copy_batch(queue, list) : copy_each(queue, list);
    if (batches && result != 0)
        result = copy_each(queue, list); /* a driver that knows the call may still refuse it */
    return result == 0 ? cuda->cuEventRecord(queue->ended[slot], queue->stream) : result;
}

static int wait_for(void *opaque, unsigned slot)
{
    const cuda_queue *queue = opaque;
    cu_result result = queue->cuda->cuEventQuery(queue->ended[slot]); /* spares the sleep where it has ended */
    if (result == NOT_READY)
        result = queue->cuda->cuEventSynchronize(queue->ended[slot]);
    return result;
}

/* ---- loading ---- */

static const pdkv_device_kind CUDA = {adopt, destroy, name_of, open_queue, post, wait_for, close_queue};

pdkv_device *pdkv_device_cuda(char *error, size_t size)
{
    cuda_device *cuda = calloc(1, sizeof(*cuda));
    if (cuda == NULL || (cuda->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) == NULL) {
        snprintf(error, size, "%s", cuda ? dlerror() : "out of memory");
        free(cuda);
        return NULL;
    }
    const char *missing = NULL;
#define RESOLVE(name, arguments) \
    cuda->name = (cu_result(*) arguments)dlsym(cuda->library, #name); \
    if (cuda->name == NULL) \
        missing = #name;
    FUNCTIONS(RESOLVE)
#undef RESOLVE
    if (missing != NULL || cuda->cuInit(0) != 0) {
        snprintf(error, size, "libcuda.so.1 %s", missing ? "is too old" : "finds no GPU");
        dlclose(cuda->library);
        free(cuda);
        return NULL;
    }
    cuda->batch = (__typeof__(cuda->batch))dlsym(cuda->library, "cuMemcpyBatchAsync");
    cuda->batch_v2 = (__typeof__(cuda->batch_v2))dlsym(cuda->library, "cuMemcpyBatchAsync_v2");
    cuda->device.kind = &CUDA;
    cuda->ordinal = -1;
    return &cuda->device;
}
