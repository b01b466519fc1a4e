/* Opening libucp and finding its functions. */
#include "ucx_api.h"

#include <dlfcn.h>
#include <stdio.h>

int pdkv_ucx_api_load(pdkv_ucx_api *api, const char *path, char *error, size_t error_size)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == NULL) {
        snprintf(error, error_size, "%s", dlerror());
        return -1;
    }
#define PDKV_RESOLVE(name) \
    api->name = (__typeof__(&name))dlsym(library, #name); \
    if (api->name == NULL) { \
        snprintf(error, error_size, "%s has no function " #name "; UCX 1.14 or newer is needed", path); \
        dlclose(library); \
        return -1; \
    }
    PDKV_UCX_FUNCTIONS(PDKV_RESOLVE)
#undef PDKV_RESOLVE
    api->ucs_global_opts_set_value =
        (__typeof__(api->ucs_global_opts_set_value))dlsym(library, "ucs_global_opts_set_value");
    return 0;
}
