// fake_nvml.c: libnvidia-ml.so.1 of a machine that is told in $FAKE_NVML: words, separated by commas.
//
//   gpus=N            two H100 beside each other unless it says otherwise
//   throttled hot brake   power_cap: what holds the clocks of GPU 0
//   ecc pending remap_failed retired recovery mig no_persistence prohibited x4 gen1 busy low_power old_gpu
//                     more about GPU 0
//   lost reset        GPU 0 cannot be asked; lost_later: found out by a question
//   no_p2p pcie links_down   ways between GPUs
//   driver=VERSION    such as 535.104.05, with CUDA 12.2 if older than 580
//   mismatch not_loaded no_permission no_gpus   it does not start, or finds nothing
//   hang=WHERE        init, or a GPU's number: never returns; crash
//   quiet             most questions have no answer, as in WSL2
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "supervisor/nvml.h"
#include "supervisor/nvml_abi.h"

// What follows "word" or "word=" in $FAKE_NVML; NULL: it is not there.
static const char *told(const char *word)
{
    const char *all = getenv("FAKE_NVML");
    const size_t length = strlen(word);
    for (const char *at = all; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (strncmp(at, word, length) == 0 && strchr("=,", at[length]))
            return at + length + (at[length] == '=');
    return NULL;
}

static unsigned number(nvmlDevice_t d)
{
    return (unsigned)((char *)d - (char *)NULL) - 1;
}

static bool first(nvmlDevice_t d, const char *word)
{
    return number(d) == 0 && told(word);
}

static int quiet(void)
{
    return told("quiet") ? NVML_NOT_SUPPORTED : NVML_SUCCESS;
}

static _Noreturn void hang(void)
{
    for (;;)
        pause();
}

static int text(char *out, unsigned size, const char *what)
{
    return (unsigned)snprintf(out, size, "%s", what) < size ? NVML_SUCCESS : NVML_INSUFFICIENT_SIZE;
}

static int say(unsigned *out, unsigned value)
{
    *out = value;
    return NVML_SUCCESS;
}

// ---- the system

int nvmlInit_v2(void)
{
    const char *where = told("hang");
    if (where && strncmp(where, "init", 4) == 0)
        hang();
    if (told("crash"))
        raise(SIGABRT);
    return told("mismatch")        ? NVML_VERSION_MISMATCH
           : told("not_loaded")    ? NVML_DRIVER_NOT_LOADED
           : told("no_permission") ? NVML_NO_PERMISSION
                                   : NVML_SUCCESS;
}

int nvmlShutdown(void)
{
    return NVML_SUCCESS;
}

static const char *driver(char out[32])
{
    const char *version = told("driver");
    snprintf(out, 32, "%.*s", version ? (int)strcspn(version, ",") : 31, version ? version : "580.95.05");
    return out;
}

int nvmlSystemGetDriverVersion(char *out, unsigned size)
{
    char version[32];
    return text(out, size, driver(version));
}

int nvmlSystemGetCudaDriverVersion_v2(int *out)
{
    char version[32];
    *out = atoi(driver(version)) < 580 ? 12020 : 13000;
    return NVML_SUCCESS;
}

int nvmlSystemGetProcessName(unsigned pid, char *out, unsigned size)
{
    return text(out, size, pid == 7 ? "/usr/bin/ditfleet-worker" : "/opt/venv/bin/python3 train.py");
}

int nvmlDeviceGetCount_v2(unsigned *out)
{
    const char *count = told("gpus");
    return say(out, told("no_gpus") ? 0 : count ? (unsigned)atoi(count) : 2);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *out)
{
    const char *where = told("hang");
    if (where && *where >= '0' && *where <= '9' && (unsigned)atoi(where) == index)
        hang();
    *out = (nvmlDevice_t)(void *)((char *)NULL + index + 1);
    return first(*out, "lost") ? NVML_GPU_IS_LOST : first(*out, "reset") ? NVML_RESET_REQUIRED : NVML_SUCCESS;
}

// ---- a GPU

int nvmlDeviceGetName(nvmlDevice_t d, char *out, unsigned size)
{
    return text(out, size, first(d, "old_gpu") ? "Tesla V100-SXM2-16GB" : "NVIDIA H100 80GB HBM3");
}

int nvmlDeviceGetUUID(nvmlDevice_t d, char *out, unsigned size)
{
    char uuid[64];
    snprintf(uuid, sizeof uuid, "GPU-00000000-0000-0000-0000-%012u", number(d));
    return text(out, size, uuid);
}

int nvmlDeviceGetPciInfo_v3(nvmlDevice_t d, struct nvml_abi_pci *out)
{
    *out = (struct nvml_abi_pci){.domain = 0xfffe, .bus = 0x10 + number(d)};
    snprintf(out->bus_id, sizeof out->bus_id, "0000%04X:%02X:00.0", out->domain, out->bus);
    return NVML_SUCCESS;
}

int nvmlDeviceGetMinorNumber(nvmlDevice_t d, unsigned *out)
{
    return say(out, number(d));
}

int nvmlDeviceGetCudaComputeCapability(nvmlDevice_t d, int *major, int *minor)
{
    *major = first(d, "old_gpu") ? 7 : 9;
    *minor = 0;
    return NVML_SUCCESS;
}

int nvmlDeviceGetMemoryInfo(nvmlDevice_t d, struct nvml_abi_memory *out)
{
    *out = (struct nvml_abi_memory){80ULL << 30, 79ULL << 30, 1ULL << 30};
    return d ? NVML_SUCCESS : NVML_UNKNOWN_ERROR;
}

int nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t d, struct nvml_abi_memory_v2 *out)
{
    if (out->version != NVML_MEMORY_INFO_V2)
        return 25; // version mismatch
    const unsigned long long used = first(d, "busy") ? 30ULL << 30 : 4ULL << 20;
    *out = (struct nvml_abi_memory_v2){out->version, 80ULL << 30, 600ULL << 20, (80ULL << 30) - used, used};
    return quiet();
}

int nvmlDeviceGetTemperature(nvmlDevice_t d, int sensor, unsigned *out)
{
    return sensor == NVML_SENSOR_GPU ? say(out, first(d, "hot") || first(d, "throttled") ? 92 : 35) : 2;
}

int nvmlDeviceGetTemperatureThreshold(nvmlDevice_t d, int which, unsigned *out)
{
    return d && which == NVML_THRESHOLD_SLOWDOWN ? say(out, 90) : 2;
}

int nvmlDeviceGetClockInfo(nvmlDevice_t d, int which, unsigned *out)
{
    return say(out, which == NVML_CLOCK_MEM ? 2619 : first(d, "throttled") ? 345 : 1755) ? 2 : quiet();
}

int nvmlDeviceGetMaxClockInfo(nvmlDevice_t d, int which, unsigned *out)
{
    return d ? say(out, which == NVML_CLOCK_MEM ? 2619 : 1980) : 2;
}

int nvmlDeviceGetPowerUsage(nvmlDevice_t d, unsigned *out)
{
    return d ? say(out, 71000) : 2;
}

int nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t d, unsigned *out)
{
    return say(out, first(d, "low_power") ? 350000 : 700000);
}

int nvmlDeviceGetPowerManagementDefaultLimit(nvmlDevice_t d, unsigned *out)
{
    return d ? say(out, 700000) : 2;
}

// The newer name is left to an older library: none.
int nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t d, unsigned long long *out)
{
    *out = first(d, "throttled")   ? NVML_REASON_HW_SLOWDOWN | NVML_REASON_HW_THERMAL
           : first(d, "hot")       ? NVML_REASON_SW_THERMAL
           : first(d, "brake")     ? NVML_REASON_HW_SLOWDOWN | NVML_REASON_POWER_BRAKE
           : first(d, "power_cap") ? NVML_REASON_POWER_CAP
           : first(d, "gen1")      ? 0
                                   : NVML_REASON_IDLE;
    return quiet();
}

int nvmlDeviceGetUtilizationRates(nvmlDevice_t d, struct nvml_abi_utilization *out)
{
    *out = (struct nvml_abi_utilization){first(d, "gen1") ? 97 : 0, 0};
    return quiet();
}

int nvmlDeviceGetEccMode(nvmlDevice_t d, unsigned *current, unsigned *pending)
{
    *pending = 1;
    return d ? say(current, 1) : 2;
}

int nvmlDeviceGetTotalEccErrors(nvmlDevice_t d, int type, int counter, unsigned long long *out)
{
    if (first(d, "lost_later"))
        return NVML_GPU_IS_LOST;
    *out = type != NVML_UNCORRECTED ? 1000 : first(d, "ecc") ? 3 + (unsigned)counter : 0;
    return quiet();
}

int nvmlDeviceGetRetiredPagesPendingStatus(nvmlDevice_t d, unsigned *out)
{
    return first(d, "retired") ? say(out, 1) : NVML_NOT_SUPPORTED;
}

int nvmlDeviceGetRemappedRows(nvmlDevice_t d, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                              unsigned *failed)
{
    *corrected = 0;
    *uncorrected = first(d, "pending") ? 1 : 0;
    *pending = first(d, "pending");
    *failed = first(d, "remap_failed");
    return quiet();
}

int nvmlDeviceGetPersistenceMode(nvmlDevice_t d, unsigned *out)
{
    return say(out, !first(d, "no_persistence"));
}

int nvmlDeviceGetMigMode(nvmlDevice_t d, unsigned *current, unsigned *pending)
{
    *pending = 0;
    say(current, first(d, "mig"));
    return quiet();
}

int nvmlDeviceGetComputeMode(nvmlDevice_t d, unsigned *out)
{
    return say(out, first(d, "prohibited") ? NVML_COMPUTE_PROHIBITED : 0);
}

int nvmlDeviceGetCurrPcieLinkGeneration(nvmlDevice_t d, unsigned *out)
{
    say(out, number(d) == 1 || first(d, "gen1") ? 1 : 5); // GPU 1 is idle
    return quiet();
}

int nvmlDeviceGetMaxPcieLinkGeneration(nvmlDevice_t d, unsigned *out)
{
    return d ? say(out, 5) : 2;
}

int nvmlDeviceGetCurrPcieLinkWidth(nvmlDevice_t d, unsigned *out)
{
    return say(out, first(d, "x4") ? 4 : 16);
}

int nvmlDeviceGetMaxPcieLinkWidth(nvmlDevice_t d, unsigned *out)
{
    return d ? say(out, 16) : 2;
}

int nvmlDeviceGetPcieReplayCounter(nvmlDevice_t d, unsigned *out)
{
    return d ? say(out, 0) : 2;
}

int nvmlDeviceGetFieldValues(nvmlDevice_t d, int count, struct nvml_abi_field *fields)
{
    for (int i = 0; i < count; i++) {
        struct nvml_abi_field *f = &fields[i];
        f->rc = NVML_SUCCESS;
        f->type = NVML_TYPE_UINT;
        f->value.u = 0;
        if (f->id == NVML_FIELD_RECOVERY)
            f->value.u = first(d, "recovery") ? NVML_RECOVERY_DRAIN_AND_RESET : NVML_RECOVERY_NONE;
        else if (f->id == NVML_FIELD_THERMAL_NS)
            f->type = NVML_TYPE_ULLONG, f->value.ull = first(d, "throttled") ? 90000000000ULL : 0;
        else if (f->id == NVML_FIELD_BRAKE_NS)
            f->rc = NVML_NOT_SUPPORTED;
    }
    return quiet();
}

// ---- between GPUs: eighteen links from each to the other

static bool linked(void)
{
    return !told("pcie") && !told("no_p2p") && !told("quiet");
}

int nvmlDeviceGetNvLinkState(nvmlDevice_t d, unsigned link, unsigned *active)
{
    if (!linked() || link >= 18)
        return linked() ? 2 : NVML_NOT_SUPPORTED;
    return say(active, !(first(d, "links_down") && link >= 12));
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t d, unsigned link, struct nvml_abi_pci *out)
{
    (void)link;
    return nvmlDeviceGetPciInfo_v3((nvmlDevice_t)(void *)((char *)NULL + 1 + (number(d) ^ 1)), out);
}

int nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t a, nvmlDevice_t b, unsigned *level)
{
    say(level, number(a) / 2 == number(b) / 2 ? 20 : 50);
    return quiet();
}

int nvmlDeviceGetP2PStatus(nvmlDevice_t a, nvmlDevice_t b, int caps, unsigned *status)
{
    const bool near = number(a) / 2 == number(b) / 2;
    say(status, told("no_p2p") || (caps == NVML_CAPS_NVLINK && (!linked() || !near)) ? 5 : 0);
    return quiet();
}

int nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t d, unsigned *count, struct nvml_abi_process *out)
{
    if (first(d, "busy") && *count >= 2) {
        out[0] = (struct nvml_abi_process){.pid = 4242, .bytes = 20ULL << 30};
        out[1] = (struct nvml_abi_process){.pid = 7, .bytes = 10ULL << 30};
        *count = 2;
    } else {
        *count = 0;
    }
    return quiet();
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t d, unsigned *count, struct nvml_abi_process *out)
{
    return nvmlDeviceGetComputeRunningProcesses_v3(d, count, out); // the same ones again
}
