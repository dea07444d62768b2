// nvml_abi.h: the part of NVML's C interface that nvml.c calls, declared here so that it builds where no CUDA is
// installed. NVIDIA keeps it stable: versioned names, numbers that are never used twice. The tests' library
// (tests/fake_nvml.c) is built from it as well.
#ifndef DITFLEET_SUPERVISOR_NVML_ABI_H
#define DITFLEET_SUPERVISOR_NVML_ABI_H

typedef struct nvmlDevice_st *nvmlDevice_t;

enum { NVML_MEMORY_INFO_V2 = 0x02000028 }; // version 2 of a struct of 40 bytes
enum { NVML_SENSOR_GPU = 0, NVML_THRESHOLD_SLOWDOWN = 1 };
enum { NVML_CLOCK_SM = 1, NVML_CLOCK_MEM = 2 };
enum { NVML_UNCORRECTED = 1, NVML_ECC_VOLATILE = 0, NVML_ECC_AGGREGATE = 1 };
enum { NVML_CAPS_READ = 0, NVML_CAPS_WRITE = 1, NVML_CAPS_NVLINK = 2 };
enum { NVML_MAX_LINKS = 36 };
enum {
    NVML_FIELD_PCIE_FATAL = 180,
    NVML_FIELD_RECOVERY = 230,
    NVML_FIELD_THERMAL_NS = 270,
    NVML_FIELD_BRAKE_NS = 271,
};
enum { NVML_TYPE_DOUBLE, NVML_TYPE_UINT, NVML_TYPE_ULONG, NVML_TYPE_ULLONG, NVML_TYPE_LLONG, NVML_TYPE_INT };

struct nvml_abi_memory {
    unsigned long long total, free, used; // used: reserved and allocated
};
struct nvml_abi_memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};
struct nvml_abi_pci {
    char bus_legacy[16];
    unsigned domain, bus, device, id, subsystem_id;
    char bus_id[32];
};
struct nvml_abi_process {
    unsigned pid;
    unsigned long long bytes; // all ones: unknown
    unsigned gpu_instance, compute_instance;
};
struct nvml_abi_utilization {
    unsigned gpu, memory; // percent
};
struct nvml_abi_field {
    unsigned id, scope;
    long long timestamp_us, latency_us;
    int type, rc;
    union {
        double d;
        int i;
        unsigned u;
        unsigned long ul;
        unsigned long long ull;
        long long ll;
    } value;
};

// F(member of struct nvml_api, exported name, parameters); all return an int, enum nvml_rc.
#define NVML_FUNCTIONS(F)                                                                                              \
    F(init, nvmlInit_v2, (void))                                                                                       \
    F(shutdown, nvmlShutdown, (void))                                                                                  \
    F(driver_version, nvmlSystemGetDriverVersion, (char *out, unsigned size))                                          \
    F(cuda_version, nvmlSystemGetCudaDriverVersion_v2, (int *out))                                                     \
    F(process_name, nvmlSystemGetProcessName, (unsigned pid, char *out, unsigned size))                                \
    F(count, nvmlDeviceGetCount_v2, (unsigned *out))                                                                   \
    F(handle, nvmlDeviceGetHandleByIndex_v2, (unsigned index, nvmlDevice_t *out))                                      \
    F(name, nvmlDeviceGetName, (nvmlDevice_t d, char *out, unsigned size))                                             \
    F(uuid, nvmlDeviceGetUUID, (nvmlDevice_t d, char *out, unsigned size))                                             \
    F(pci, nvmlDeviceGetPciInfo_v3, (nvmlDevice_t d, struct nvml_abi_pci * out))                                       \
    F(minor, nvmlDeviceGetMinorNumber, (nvmlDevice_t d, unsigned *out))                                                \
    F(capability, nvmlDeviceGetCudaComputeCapability, (nvmlDevice_t d, int *major, int *minor))                        \
    F(memory, nvmlDeviceGetMemoryInfo, (nvmlDevice_t d, struct nvml_abi_memory * out))                                 \
    F(memory_v2, nvmlDeviceGetMemoryInfo_v2, (nvmlDevice_t d, struct nvml_abi_memory_v2 * out))                        \
    F(temperature, nvmlDeviceGetTemperature, (nvmlDevice_t d, int sensor, unsigned *out))                              \
    F(threshold, nvmlDeviceGetTemperatureThreshold, (nvmlDevice_t d, int which, unsigned *out))                        \
    F(clock, nvmlDeviceGetClockInfo, (nvmlDevice_t d, int which, unsigned *out))                                       \
    F(clock_max, nvmlDeviceGetMaxClockInfo, (nvmlDevice_t d, int which, unsigned *out))                                \
    F(power, nvmlDeviceGetPowerUsage, (nvmlDevice_t d, unsigned *out))                                                 \
    F(power_limit, nvmlDeviceGetEnforcedPowerLimit, (nvmlDevice_t d, unsigned *out))                                   \
    F(power_default, nvmlDeviceGetPowerManagementDefaultLimit, (nvmlDevice_t d, unsigned *out))                        \
    F(reasons, nvmlDeviceGetCurrentClocksEventReasons, (nvmlDevice_t d, unsigned long long *out))                      \
    F(reasons_old, nvmlDeviceGetCurrentClocksThrottleReasons, (nvmlDevice_t d, unsigned long long *out))               \
    F(utilization, nvmlDeviceGetUtilizationRates, (nvmlDevice_t d, struct nvml_abi_utilization * out))                 \
    F(ecc_mode, nvmlDeviceGetEccMode, (nvmlDevice_t d, unsigned *current, unsigned *pending))                          \
    F(ecc_errors, nvmlDeviceGetTotalEccErrors, (nvmlDevice_t d, int type, int counter, unsigned long long *out))       \
    F(retired_pending, nvmlDeviceGetRetiredPagesPendingStatus, (nvmlDevice_t d, unsigned *out))                        \
    F(remapped, nvmlDeviceGetRemappedRows,                                                                             \
      (nvmlDevice_t d, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed))               \
    F(persistence, nvmlDeviceGetPersistenceMode, (nvmlDevice_t d, unsigned *out))                                      \
    F(mig, nvmlDeviceGetMigMode, (nvmlDevice_t d, unsigned *current, unsigned *pending))                               \
    F(compute_mode, nvmlDeviceGetComputeMode, (nvmlDevice_t d, unsigned *out))                                         \
    F(pcie_gen, nvmlDeviceGetCurrPcieLinkGeneration, (nvmlDevice_t d, unsigned *out))                                  \
    F(pcie_gen_max, nvmlDeviceGetMaxPcieLinkGeneration, (nvmlDevice_t d, unsigned *out))                               \
    F(pcie_width, nvmlDeviceGetCurrPcieLinkWidth, (nvmlDevice_t d, unsigned *out))                                     \
    F(pcie_width_max, nvmlDeviceGetMaxPcieLinkWidth, (nvmlDevice_t d, unsigned *out))                                  \
    F(pcie_replays, nvmlDeviceGetPcieReplayCounter, (nvmlDevice_t d, unsigned *out))                                   \
    F(fields, nvmlDeviceGetFieldValues, (nvmlDevice_t d, int count, struct nvml_abi_field *fields))                    \
    F(link_state, nvmlDeviceGetNvLinkState, (nvmlDevice_t d, unsigned link, unsigned *active))                         \
    F(link_remote, nvmlDeviceGetNvLinkRemotePciInfo_v2, (nvmlDevice_t d, unsigned link, struct nvml_abi_pci *out))     \
    F(ancestor, nvmlDeviceGetTopologyCommonAncestor, (nvmlDevice_t a, nvmlDevice_t b, unsigned *level))                \
    F(p2p, nvmlDeviceGetP2PStatus, (nvmlDevice_t a, nvmlDevice_t b, int caps, unsigned *status))                       \
    F(compute_processes, nvmlDeviceGetComputeRunningProcesses_v3,                                                      \
      (nvmlDevice_t d, unsigned *count, struct nvml_abi_process *out))                                                 \
    F(graphics_processes, nvmlDeviceGetGraphicsRunningProcesses_v3,                                                    \
      (nvmlDevice_t d, unsigned *count, struct nvml_abi_process *out))

#define NVML_PROTOTYPE(member, symbol, parameters) int symbol parameters;
NVML_FUNCTIONS(NVML_PROTOTYPE)
#undef NVML_PROTOTYPE

#endif
