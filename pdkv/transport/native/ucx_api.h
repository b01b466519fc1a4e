/* The libucp functions that the engine calls, looked up at run time so that one build runs with any UCX >= 1.14. */
#ifndef PDKV_UCX_API_H
#define PDKV_UCX_API_H

#include <stddef.h>
#include <ucp/api/ucp.h>

#define PDKV_UCX_FUNCTIONS(X) \
    X(ucp_get_version_string) \
    X(ucp_config_read) \
    X(ucp_config_modify) \
    X(ucp_config_release) \
    X(ucp_init_version) \
    X(ucp_cleanup) \
    X(ucp_worker_create) \
    X(ucp_worker_destroy) \
    X(ucp_worker_progress) \
    X(ucp_worker_arm) \
    X(ucp_worker_get_efd) \
    X(ucp_worker_query) \
    X(ucp_worker_release_address) \
    X(ucp_ep_create) \
    X(ucp_ep_close_nbx) \
    X(ucp_ep_flush_nbx) \
    X(ucp_ep_query) \
    X(ucp_ep_rkey_unpack) \
    X(ucp_rkey_destroy) \
    X(ucp_rkey_pack) \
    X(ucp_rkey_buffer_release) \
    X(ucp_mem_map) \
    X(ucp_mem_unmap) \
    X(ucp_get_nbx) \
    X(ucp_request_check_status) \
    X(ucp_request_query) \
    X(ucp_request_free) \
    X(ucs_status_string)

typedef struct pdkv_ucx_api {
#define PDKV_DECLARE(name) __typeof__(&name) name;
    PDKV_UCX_FUNCTIONS(PDKV_DECLARE)
#undef PDKV_DECLARE
    /* Sets what belongs to the process and not to a context, such as LOG_LEVEL; NULL in a UCX that hides it. */
    ucs_status_t (*ucs_global_opts_set_value)(const char *name, const char *value);
} pdkv_ucx_api;

/* Opens the libucp at `path` and fills the table. 0, or -1 with a message in `error`. The library stays loaded for the
 * life of the process: UCX starts threads and hooks that outlive a context. */
int pdkv_ucx_api_load(pdkv_ucx_api *api, const char *path, char *error, size_t error_size);

#endif
