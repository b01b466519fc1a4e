/* See pull_landing.h. */
#include "pull_landing.h"

static void lose(pdkv_landing *landing, int error)
{
    pdkv_device *device = landing->source->puller->device;
    pdkv_lose(landing->source, "the GPU takes no bytes: %s", pdkv_device_error(device, error));
}

int pdkv_landing_open(pdkv_landing *landing, pdkv_source *source, pdkv_device *device)
{
    *landing = (pdkv_landing){.source = source};
    int error = pdkv_stage_open(device, source->puller->limits.slice_bytes, &landing->stage);
    if (error == 0)
        return 0;
    landing->stage = NULL;
    lose(landing, error);
    return -1;
}

char *pdkv_landing_place(pdkv_landing *landing)
{
    if (landing->count == PDKV_STAGE_SLOTS)
        pdkv_landing_settle(landing);
    return pdkv_stage_buffer(landing->stage, (landing->first + landing->count) % PDKV_STAGE_SLOTS);
}

void pdkv_landing_begin(pdkv_landing *landing, const pdkv_slice *slice)
{
    unsigned slot = (landing->first + landing->count++) % PDKV_STAGE_SLOTS;
    pdkv_copy_list *list = pdkv_stage_list(landing->stage);
    pdkv_slice walk = *slice;
    char *from = pdkv_stage_buffer(landing->stage, slot);
    landing->slices[slot] = *slice;
    list->count = 0;
    for (pdkv_piece piece; pdkv_next_piece(&walk, &piece); from += piece.length) {
        list->to[list->count] = piece.local;
        list->from[list->count] = from;
        list->bytes[list->count++] = piece.length;
    }
    int error = pdkv_stage_post(landing->stage, slot);
    if (error != 0)
        lose(landing, error);
}

void pdkv_landing_settle(pdkv_landing *landing)
{
    unsigned slot = landing->first;
    landing->first = (slot + 1) % PDKV_STAGE_SLOTS;
    landing->count--;
    int error = pdkv_stage_wait(landing->stage, slot);
    if (error != 0)
        lose(landing, error);
    pdkv_return_slice(landing->source, &landing->slices[slot]);
}

void pdkv_landing_close(pdkv_landing *landing)
{
    while (landing->count > 0)
        pdkv_landing_settle(landing);
    pdkv_stage_close(landing->stage);
    landing->stage = NULL;
}
