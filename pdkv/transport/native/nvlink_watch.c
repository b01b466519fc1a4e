/* See nvlink_watch.h. */
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>

#include "nvlink_watch.h"

enum { NOT_READY = 600 };

/* Less has ended before a thread sleeps deeply. */
enum { WORTH_LOOKING = 16 << 20 };

/* A sleeping thread is woken by the driver a tenth of a millisecond late. So the end of a long read is looked for from a
 * little before it can come: by this part of its time, and so much. */
static const double EARLY = 0.04;
enum { ALWAYS_NS = 50000 };

/* But it may be there long before, for what is expected is only what was seen, and the first read may have had to wait for
 * tables to be made: so until then it is looked for at times, a 64th part of the whole apart, or this. */
enum { LOOKS = 64, LEAST_NS = 100000, MOST_NS = 500000 };

struct pdkv_watch {
    const pdkv_gpu *gpu;
    pdkv_done_queue *queue;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pdkv_awaited *first, *last; /* these and `stopped` under the lock */
    int stopped;
    double rates[2]; /* bytes a ns of the fastest reads so far, without and with tables; this and what follows is the thread's */
    int64_t last_end;
};

static void sleep_until(int64_t ns)
{
    const struct timespec until = {ns / 1000000000, ns % 1000000000};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

/* When a read is looked for, ns of the clock; `until` is 0 where it is slept for. */
typedef struct window {
    int64_t from, until; /* again and again */
    int64_t step;        /* before that */
} window;

static int await_event(const pdkv_gpu *gpu, void *event, window look)
{
    int code = NOT_READY;
    for (int64_t now = pdkv_now_ns(); code == NOT_READY && now < look.until; now = pdkv_now_ns()) {
        if (now < look.from)
            sleep_until(look.from - now < look.step ? look.from : now + look.step);
        code = gpu->query_event(event);
    }
    return code == NOT_READY ? gpu->wait_for_event(event) : code;
}

static window window_of(int64_t begun, double takes)
{
    const double step = takes / LOOKS;
    return (window){
        .from = begun + (int64_t)((1 - EARLY) * takes) - ALWAYS_NS,
        .until = begun + (int64_t)((1 + EARLY) * takes) + 4 * ALWAYS_NS,
        .step = step < LEAST_NS ? LEAST_NS : step > MOST_NS ? MOST_NS : (int64_t)step,
    };
}

static int await_all(pdkv_watch *watch, const pdkv_awaited *awaited)
{
    const pdkv_gpu *gpu = watch->gpu;
    double *rate = &watch->rates[awaited->has_tables != 0];
    const int64_t begun = awaited->begun_ns > watch->last_end ? awaited->begun_ns : watch->last_end;
    const int is_worth_it = awaited->bytes >= WORTH_LOOKING;
    window look = {0, 0, 0};
    if (is_worth_it && *rate > 0)
        look = window_of(begun, (double)awaited->bytes / *rate);
    void *popped;
    int code = gpu->push_context(gpu->context);
    if (code)
        return code;
    for (unsigned i = 0; i < awaited->num_events; i++) {
        const int bad = await_event(gpu, awaited->events[i], look);
        code = code ? code : bad;
    }
    gpu->pop_context(&popped);
    watch->last_end = pdkv_now_ns();
    if (is_worth_it && code == 0) {
        const int64_t took = watch->last_end - begun;
        const double seen = (double)awaited->bytes / (double)(took > 0 ? took : 1);
        *rate *= 1 - EARLY / 8; /* of late */
        *rate = seen > *rate ? seen : *rate;
    }
    return code;
}

static void *run(void *of)
{
    pdkv_watch *watch = of;
    prctl(PR_SET_TIMERSLACK, 1ul); /* of this thread: it would sleep 50 us too long */
    pthread_mutex_lock(&watch->lock);
    for (;;) {
        pdkv_awaited *awaited = watch->first;
        if (awaited == NULL) {
            if (watch->stopped)
                break;
            pthread_cond_wait(&watch->changed, &watch->lock);
            continue;
        }
        watch->first = awaited->next;
        pthread_mutex_unlock(&watch->lock);
        awaited->done.status = await_all(watch, awaited);
        pdkv_done_add(watch->queue, &awaited->done);
        pthread_mutex_lock(&watch->lock);
    }
    pthread_mutex_unlock(&watch->lock);
    return NULL;
}

pdkv_watch *pdkv_watch_start(const pdkv_gpu *gpu, pdkv_done_queue *queue)
{
    pdkv_watch *watch = calloc(1, sizeof(*watch));
    if (watch == NULL)
        return NULL;
    watch->gpu = gpu;
    watch->queue = queue;
    pthread_mutex_init(&watch->lock, NULL);
    pthread_cond_init(&watch->changed, NULL);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for others */
    const int failed = pthread_create(&watch->thread, NULL, run, watch);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        free(watch);
        return NULL;
    }
    return watch;
}

void pdkv_watch_add(pdkv_watch *watch, pdkv_awaited *awaited)
{
    awaited->next = NULL;
    pthread_mutex_lock(&watch->lock);
    if (watch->first == NULL)
        watch->first = awaited;
    else
        watch->last->next = awaited;
    watch->last = awaited;
    pthread_cond_signal(&watch->changed);
    pthread_mutex_unlock(&watch->lock);
}

void pdkv_watch_stop(pdkv_watch *watch)
{
    pthread_mutex_lock(&watch->lock);
    watch->stopped = 1;
    pthread_cond_signal(&watch->changed);
    pthread_mutex_unlock(&watch->lock);
}

void pdkv_watch_join(pdkv_watch *watch)
{
    pthread_join(watch->thread, NULL);
    pthread_mutex_destroy(&watch->lock);
    pthread_cond_destroy(&watch->changed);
    free(watch);
}
