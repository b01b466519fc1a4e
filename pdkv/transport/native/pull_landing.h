/* Slices that came over a connection and are on their way from pinned memory to a device. One thread's.
 *
 * A slice goes back to its peer when its last byte is on the device, and not before: whatever starts after its batch's
 * completion sees it. */
#ifndef PDKV_PULL_LANDING_H
#define PDKV_PULL_LANDING_H

#include "pull_device.h"
#include "pull_internal.h"

typedef struct pdkv_landing {
    pdkv_source *source;
    pdkv_stage *stage;
    unsigned first, count; /* the slots in use */
    pdkv_slice slices[PDKV_STAGE_SLOTS];
} pdkv_landing;

/* Opens the stage; -1 after telling why there is none. */
int pdkv_landing_open(pdkv_landing *landing, pdkv_source *source, pdkv_device *device);

/* Where the next slice is to be received; gives an older one back where all slots are in use. */
char *pdkv_landing_place(pdkv_landing *landing);

/* Begins the copies of a slice that was received at `place`. It belongs to the landing from here on. */
void pdkv_landing_begin(pdkv_landing *landing, const pdkv_slice *slice);

/* Waits for the oldest slice and gives it back. */
void pdkv_landing_settle(pdkv_landing *landing);

/* Settles all and closes the stage. */
void pdkv_landing_close(pdkv_landing *landing);

#endif
