#include "supervisor/nvml.h"

#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "supervisor/nvml_abi.h"
#include "supervisor/probe.h"

struct nvml_api {
#define MEMBER(member, symbol, parameters) int(*member) parameters; // NOLINT(bugprone-macro-parentheses)
    NVML_FUNCTIONS(MEMBER)
#undef MEMBER
};

struct nvml {
    void *library;
    struct nvml_api api; // NULL where this driver has none
};

// An older library lacks the newer functions.
#define CALL(n, member, ...) ((n)->api.member ? (n)->api.member(__VA_ARGS__) : NVML_FUNCTION_NOT_FOUND)

const char *nvml_rc_text(int rc)
{
    static const struct {
        int rc;
        const char *text;
    } rows[] = {
        {NVML_SUCCESS, "fine"},
        {NVML_NOT_SUPPORTED, "not supported here"},
        {NVML_NO_PERMISSION, "no permission to use the driver"},
        {NVML_INSUFFICIENT_POWER, "its power cables are not properly attached"},
        {NVML_DRIVER_NOT_LOADED, "the NVIDIA kernel module is not loaded"},
        {NVML_IRQ_ISSUE, "the kernel has a problem with its interrupts"},
        {NVML_LIBRARY_NOT_FOUND, "libnvidia-ml.so.1 cannot be loaded"},
        {NVML_FUNCTION_NOT_FOUND, "the driver is too old for this question"},
        {NVML_CORRUPTED_INFOROM, "its InfoROM is corrupted"},
        {NVML_GPU_IS_LOST, "the GPU is lost: it has fallen off the bus"},
        {NVML_RESET_REQUIRED, "the GPU needs a reset before it can be used again"},
        {NVML_OPERATING_SYSTEM, "the operating system (cgroups) took the device nodes away"},
        {NVML_VERSION_MISMATCH, "the loaded kernel module has another version than the driver's libraries"},
        {NVML_GPU_NOT_FOUND, "the driver finds no GPU"},
        {NVML_UNKNOWN_ERROR, "an unknown error inside the driver"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (rows[i].rc == rc)
            return rows[i].text;
    return "an NVML error that this program does not know";
}

// ---- open and close

static void find_functions(struct nvml *n)
{
    static const struct {
        const char *symbol;
        size_t offset;
    } rows[] = {
#define ROW(member, symbol, parameters) {#symbol, offsetof(struct nvml_api, member)},
        NVML_FUNCTIONS(ROW)
#undef ROW
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        void *function = dlsym(n->library, rows[i].symbol);
        memcpy((char *)&n->api + rows[i].offset, &function, sizeof function);
    }
}

int nvml_open(const char *library, struct nvml **out, int *rc, struct err *err)
{
    *out = NULL;
    *rc = NVML_UNKNOWN_ERROR;
    struct nvml *n = calloc(1, sizeof *n);
    if (!n)
        return err_set(err, ERR_NO_MEMORY, "NVML: out of memory");
    n->library = dlopen(library ? library : "libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!n->library) {
        *rc = NVML_LIBRARY_NOT_FOUND;
        err_set(err, ERR_NOT_FOUND, "NVML cannot be loaded: %s", dlerror());
        free(n);
        return err->code;
    }
    find_functions(n);
    *rc = CALL(n, init);
    if (*rc != NVML_SUCCESS) {
        err_set(err, ERR_UNAVAILABLE, "NVML does not start: %s (%d)", nvml_rc_text(*rc), *rc);
        dlclose(n->library);
        free(n);
        return err->code;
    }
    *out = n;
    return 0;
}

void nvml_close(struct nvml *n)
{
    if (!n)
        return;
    CALL(n, shutdown);
    dlclose(n->library);
    free(n);
}

// ---- one GPU

// Errors that mean that the GPU itself is gone, and not that a question has no answer.
static bool is_fault(int rc)
{
    return rc == NVML_GPU_IS_LOST || rc == NVML_RESET_REQUIRED;
}

static void note_fault(struct nvml_device *d, int rc)
{
    if (is_fault(rc) && !d->fault)
        d->fault = rc;
}

static void keep(struct nvml_device *d, int rc, int64_t *out, int64_t value)
{
    if (rc == NVML_SUCCESS)
        *out = value;
    note_fault(d, rc);
}

static void ask_identity(struct nvml *n, nvmlDevice_t h, struct nvml_device *d)
{
    struct nvml_abi_pci pci = {0};
    int major = 0, minor = 0;
    note_fault(d, CALL(n, name, h, d->name, sizeof d->name));
    note_fault(d, CALL(n, uuid, h, d->uuid, sizeof d->uuid));
    if (CALL(n, pci, h, &pci) == NVML_SUCCESS)
        snprintf(d->bus, sizeof d->bus, "%.31s", pci.bus_id);
    int rc = CALL(n, capability, h, &major, &minor);
    keep(d, rc, &d->capability, major * 10 + minor);
}

// The questions whose answer is one number.
static void ask_numbers(struct nvml *n, nvmlDevice_t h, struct nvml_device *d)
{
    typedef int (*question)(nvmlDevice_t, unsigned *);
    const struct {
        question ask;
        int64_t *out;
    } rows[] = {
        {n->api.minor, &d->minor},
        {n->api.power, &d->power_mw},
        {n->api.power_limit, &d->power_limit_mw},
        {n->api.power_default, &d->power_default_mw},
        {n->api.retired_pending, &d->retired_pending},
        {n->api.persistence, &d->persistence},
        {n->api.compute_mode, &d->compute_mode},
        {n->api.pcie_gen, &d->pcie_gen},
        {n->api.pcie_gen_max, &d->pcie_gen_max},
        {n->api.pcie_width, &d->pcie_width},
        {n->api.pcie_width_max, &d->pcie_width_max},
        {n->api.pcie_replays, &d->pcie_replays},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        unsigned value = 0;
        int rc = rows[i].ask ? rows[i].ask(h, &value) : NVML_FUNCTION_NOT_FOUND;
        keep(d, rc, rows[i].out, value);
    }
}

static void ask_state(struct nvml *n, nvmlDevice_t h, struct nvml_device *d)
{
    unsigned value = 0, second = 0;
    unsigned long long bits = 0;
    struct nvml_abi_utilization utilization = {0};
    int rc = CALL(n, temperature, h, NVML_SENSOR_GPU, &value);
    keep(d, rc, &d->temperature, value);
    rc = CALL(n, threshold, h, NVML_THRESHOLD_SLOWDOWN, &value);
    keep(d, rc, &d->temperature_slowdown, value);
    rc = CALL(n, clock, h, NVML_CLOCK_SM, &value);
    keep(d, rc, &d->sm_mhz, value);
    rc = CALL(n, clock, h, NVML_CLOCK_MEM, &value);
    keep(d, rc, &d->mem_mhz, value);
    rc = CALL(n, clock_max, h, NVML_CLOCK_SM, &value);
    keep(d, rc, &d->sm_max_mhz, value);
    rc = CALL(n, clock_max, h, NVML_CLOCK_MEM, &value);
    keep(d, rc, &d->mem_max_mhz, value);
    rc = n->api.reasons ? n->api.reasons(h, &bits) : CALL(n, reasons_old, h, &bits);
    keep(d, rc, &d->reasons, (int64_t)bits);
    rc = CALL(n, utilization, h, &utilization);
    keep(d, rc, &d->utilization, utilization.gpu);
    rc = CALL(n, mig, h, &value, &second);
    keep(d, rc, &d->mig, value);
}

static void ask_memory(struct nvml *n, nvmlDevice_t h, struct nvml_device *d)
{
    struct nvml_abi_memory_v2 two = {.version = NVML_MEMORY_INFO_V2};
    struct nvml_abi_memory one = {0};
    unsigned value = 0, corrected = 0, pending = 0, failed = 0;
    unsigned long long errors = 0;
    int rc = CALL(n, memory_v2, h, &two);
    if (rc != NVML_SUCCESS && (rc = CALL(n, memory, h, &one)) == NVML_SUCCESS)
        two = (struct nvml_abi_memory_v2){.total = one.total, .free = one.free, .used = one.used};
    keep(d, rc, &d->memory_total, (int64_t)two.total);
    keep(d, rc, &d->memory_used, (int64_t)two.used);
    keep(d, rc, &d->memory_free, (int64_t)two.free);
    rc = CALL(n, ecc_mode, h, &value, &pending);
    keep(d, rc, &d->ecc, value);
    rc = CALL(n, ecc_errors, h, NVML_UNCORRECTED, NVML_ECC_VOLATILE, &errors);
    keep(d, rc, &d->uncorrected, (int64_t)errors);
    rc = CALL(n, ecc_errors, h, NVML_UNCORRECTED, NVML_ECC_AGGREGATE, &errors);
    keep(d, rc, &d->uncorrected_ever, (int64_t)errors);
    rc = CALL(n, remapped, h, &corrected, &value, &pending, &failed);
    keep(d, rc, &d->remapped, value);
    keep(d, rc, &d->remap_pending, pending);
    keep(d, rc, &d->remap_failed, failed);
}

static int64_t field_value(const struct nvml_abi_field *f)
{
    switch (f->type) {
    case NVML_TYPE_DOUBLE:
        return (int64_t)f->value.d;
    case NVML_TYPE_UINT:
        return f->value.u;
    case NVML_TYPE_INT:
        return f->value.i;
    default:
        return f->value.ll;
    }
}

static void ask_fields(struct nvml *n, nvmlDevice_t h, struct nvml_device *d)
{
    struct nvml_abi_field fields[] = {{.id = NVML_FIELD_PCIE_FATAL},
                                      {.id = NVML_FIELD_RECOVERY},
                                      {.id = NVML_FIELD_THERMAL_NS},
                                      {.id = NVML_FIELD_BRAKE_NS}};
    int64_t *const out[] = {&d->pcie_fatal, &d->recovery, &d->thermal_ns, &d->brake_ns};
    const int count = sizeof fields / sizeof *fields;
    const int rc = CALL(n, fields, h, count, fields);
    for (int i = 0; i < count; i++)
        keep(d, rc == NVML_SUCCESS ? fields[i].rc : rc, out[i], field_value(&fields[i]));
}

static void ask_links(struct nvml *n, nvmlDevice_t h, struct nvml_device *d)
{
    int64_t links = 0, up = 0;
    for (unsigned i = 0; i < NVML_MAX_LINKS; i++) {
        unsigned active = 0;
        int rc = CALL(n, link_state, h, i, &active);
        note_fault(d, rc);
        links += rc == NVML_SUCCESS;
        up += rc == NVML_SUCCESS && active;
    }
    d->links = links;
    d->links_active = up;
}

// The end of the program's path: names of other users' processes are not readable without rights.
static void process_name(struct nvml *n, struct nvml_process *p)
{
    char path[512] = "";
    if (CALL(n, process_name, (unsigned)p->pid, path, sizeof path) != NVML_SUCCESS)
        path[0] = '\0';
    path[strcspn(path, " ")] = '\0';
    const char *slash = strrchr(path, '/');
    snprintf(p->name, sizeof p->name, "%.63s", slash ? slash + 1 : path);
}

static void add_processes(struct nvml *n, struct nvml_device *d, int rc, const struct nvml_abi_process *list,
                          unsigned count)
{
    if (rc != NVML_SUCCESS && rc != NVML_INSUFFICIENT_SIZE) {
        note_fault(d, rc);
        return;
    }
    d->n_processes = d->n_processes < 0 ? 0 : d->n_processes;
    for (unsigned i = 0; i < count; i++) {
        bool known = false;
        for (int64_t k = 0; k < d->n_processes && k < NVML_MAX_PROCESSES; k++)
            known |= d->processes[k].pid == list[i].pid;
        if (known) // computes and draws
            continue;
        if (d->n_processes < NVML_MAX_PROCESSES && rc == NVML_SUCCESS) {
            struct nvml_process *p = &d->processes[d->n_processes];
            *p = (struct nvml_process){.pid = list[i].pid, .bytes = (int64_t)list[i].bytes};
            process_name(n, p);
        }
        d->n_processes++;
    }
}

static void ask_processes(struct nvml *n, nvmlDevice_t h, struct nvml_device *d)
{
    enum { ROOM = 128 };
    struct nvml_abi_process list[ROOM] = {0};
    unsigned count = ROOM;
    int rc = CALL(n, compute_processes, h, &count, list);
    add_processes(n, d, rc, list, count < ROOM ? count : ROOM);
    count = ROOM;
    rc = CALL(n, graphics_processes, h, &count, list);
    add_processes(n, d, rc, list, count < ROOM ? count : ROOM);
}

// The numbers lie side by side, from minor to n_processes.
static void set_unknown(struct nvml_device *d)
{
    memset(d, 0, sizeof *d);
    const size_t first = offsetof(struct nvml_device, minor);
    memset((char *)d + first, 0xff, offsetof(struct nvml_device, processes) - first); // -1 each
}

void nvml_device(struct nvml *n, unsigned index, struct nvml_device *out)
{
    nvmlDevice_t h = NULL;
    set_unknown(out);
    out->fault = CALL(n, handle, index, &h);
    if (out->fault != NVML_SUCCESS)
        return;
    void (*const asks[])(struct nvml *, nvmlDevice_t, struct nvml_device *) = {
        ask_identity, ask_numbers, ask_state, ask_memory, ask_fields, ask_links, ask_processes};
    for (size_t i = 0; i < sizeof asks / sizeof *asks && out->fault != NVML_GPU_IS_LOST; i++)
        asks[i](n, h, out);
}

// ---- two GPUs

static int64_t links_between(struct nvml *n, nvmlDevice_t a, nvmlDevice_t b)
{
    struct nvml_abi_pci other = {0}, remote = {0};
    int64_t links = 0;
    if (CALL(n, pci, b, &other) != NVML_SUCCESS)
        return 0;
    for (unsigned i = 0; i < NVML_MAX_LINKS; i++) {
        unsigned active = 0;
        if (CALL(n, link_state, a, i, &active) == NVML_SUCCESS && active &&
            CALL(n, link_remote, a, i, &remote) == NVML_SUCCESS)
            links += remote.domain == other.domain && remote.bus == other.bus && remote.device == other.device;
    }
    return links;
}

void nvml_pair(struct nvml *n, unsigned a, unsigned b, struct nvml_pair *out)
{
    nvmlDevice_t ha, hb;
    unsigned value = 0;
    *out = (struct nvml_pair){NVML_UNKNOWN, NVML_UNKNOWN, NVML_UNKNOWN, NVML_UNKNOWN, 0};
    if (CALL(n, handle, a, &ha) != NVML_SUCCESS || CALL(n, handle, b, &hb) != NVML_SUCCESS)
        return;
    if (CALL(n, ancestor, ha, hb, &value) == NVML_SUCCESS)
        out->level = value;
    int64_t *const caps[] = {[NVML_CAPS_READ] = &out->read, &out->write, &out->nvlink};
    for (int i = NVML_CAPS_READ; i <= NVML_CAPS_NVLINK; i++)
        if (CALL(n, p2p, ha, hb, i, &value) == NVML_SUCCESS)
            *caps[i] = value;
    out->links = links_between(n, ha, hb);
}

const char *nvml_path(const struct nvml_node *n, int a, int b, char out[NVML_PATH_TEXT])
{
    static const struct {
        int64_t level;
        const char *name;
    } rows[] = {{0, "PIX"}, {10, "PIX"}, {20, "PXB"}, {30, "PHB"}, {40, "NODE"}, {50, "SYS"}};
    const struct nvml_pair *p = &n->pairs[a][b];
    const int64_t links = p->links > 0 ? p->links : p->nvlink == 0 ? n->devices[a].links_active : 0;
    const char *name = a == b ? "X" : "?";
    for (size_t i = 0; i < sizeof rows / sizeof *rows && a != b; i++)
        if (rows[i].level == p->level)
            name = rows[i].name;
    if (a != b && links > 0)
        snprintf(out, NVML_PATH_TEXT, "NV%d", (int)links);
    else
        snprintf(out, NVML_PATH_TEXT, "%s", name);
    return out;
}

// ---- the node

void nvml_node(struct nvml *n, struct nvml_node *out, char *doing, int doing_size)
{
    unsigned count = 0;
    int cuda = 0;
    out->cuda = NVML_UNKNOWN;
    snprintf(doing, (size_t)doing_size, "it was asked for the driver's version");
    if (CALL(n, driver_version, out->driver, sizeof out->driver) != NVML_SUCCESS)
        out->driver[0] = '\0';
    if (CALL(n, cuda_version, &cuda) == NVML_SUCCESS)
        out->cuda = cuda;
    out->rc = CALL(n, count, &count);
    out->count = out->rc == NVML_SUCCESS ? count : 0;
    for (unsigned i = 0; i < out->count && i < NVML_MAX_GPUS; i++) {
        snprintf(doing, (size_t)doing_size, "it was asked about GPU %u", i);
        nvml_device(n, i, &out->devices[i]);
        out->n = i + 1;
    }
    for (unsigned a = 0; a < out->n; a++)
        for (unsigned b = a + 1; b < out->n; b++) {
            snprintf(doing, (size_t)doing_size, "it was asked about the path from GPU %u to GPU %u", a, b);
            nvml_pair(n, a, b, &out->pairs[a][b]);
            out->pairs[b][a] = out->pairs[a][b];
        }
}

struct probe {
    const char *library;
    struct nvml_node node;
    char doing[64];
    struct err err;
};

static void probe_body(void *arg)
{
    struct probe *p = arg;
    struct nvml *n;
    int rc = 0;
    p->node.rc = NVML_UNKNOWN_ERROR; // for a parent that finds no more than this
    snprintf(p->doing, sizeof p->doing, "it was starting");
    nvml_open(p->library, &n, &rc, &p->err);
    if (!n) {
        p->node.rc = rc;
        return;
    }
    nvml_node(n, &p->node, p->doing, sizeof p->doing);
    snprintf(p->doing, sizeof p->doing, "it was stopping");
    nvml_close(n);
}

int nvml_probe(const char *library, double seconds, struct nvml_node *out, struct err *err)
{
    struct probe *p = probe_alloc(sizeof *p);
    memset(out, 0, sizeof *out);
    if (!p)
        return err_set(err, ERR_NO_MEMORY, "NVML: out of memory");
    p->library = library;
    int rc = probe_run(probe_body, p, "NVML", seconds, err);
    *out = p->node;
    if (rc == 0 && p->err.code) {
        *err = p->err;
        rc = (int)err->code;
    } else if (rc != 0) {
        const struct err why = *err;
        err_set(err, why.code, "%.200s%s%.63s", why.text, *p->doing ? "; " : "", p->doing);
    }
    probe_free(p, sizeof *p);
    return rc;
}
