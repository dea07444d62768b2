// nvml.h: what the driver says about the GPUs of this node: a snapshot without pointers.
//
// NVML is loaded at run time: no build needs CUDA. Nothing here changes a setting. Calls of NVML may never return on a
// broken GPU, so they belong into a process that can be killed: nvml_probe makes one; a process that watches for long
// is forked by its owner, which then uses nvml_open and nvml_device there.
#ifndef DITFLEET_SUPERVISOR_NVML_H
#define DITFLEET_SUPERVISOR_NVML_H

#include <stdint.h>

#include "proto/err.h"

enum { NVML_MAX_GPUS = 32, NVML_MAX_PROCESSES = 16 };
enum { NVML_UNKNOWN = -1 }; // of every number below: this GPU, driver or system does not tell

// NVML's own numbers.
enum nvml_rc {
    NVML_SUCCESS = 0,
    NVML_NOT_SUPPORTED = 3,
    NVML_NO_PERMISSION = 4,
    NVML_INSUFFICIENT_SIZE = 7,
    NVML_INSUFFICIENT_POWER = 8,
    NVML_DRIVER_NOT_LOADED = 9,
    NVML_IRQ_ISSUE = 11,
    NVML_LIBRARY_NOT_FOUND = 12, // also when the library itself cannot be loaded
    NVML_FUNCTION_NOT_FOUND = 13,
    NVML_CORRUPTED_INFOROM = 14,
    NVML_GPU_IS_LOST = 15,
    NVML_RESET_REQUIRED = 16,
    NVML_OPERATING_SYSTEM = 17, // cgroups took the device nodes away
    NVML_VERSION_MISMATCH = 18, // the loaded kernel module is of another version than the library
    NVML_GPU_NOT_FOUND = 28,
    NVML_UNKNOWN_ERROR = 999,
};

// Why the clocks are what they are: bits of nvml_device.reasons.
enum {
    NVML_REASON_IDLE = 0x1,
    NVML_REASON_SET = 0x2, // by an application or nvidia-smi
    NVML_REASON_POWER_CAP = 0x4,
    NVML_REASON_HW_SLOWDOWN = 0x8,
    NVML_REASON_SYNC_BOOST = 0x10,
    NVML_REASON_SW_THERMAL = 0x20,
    NVML_REASON_HW_THERMAL = 0x40,
    NVML_REASON_POWER_BRAKE = 0x80,
};

enum nvml_recovery { // what the driver asks for
    NVML_RECOVERY_NONE,
    NVML_RECOVERY_RESET,
    NVML_RECOVERY_REBOOT,
    NVML_RECOVERY_DRAIN_P2P,
    NVML_RECOVERY_DRAIN_AND_RESET,
};

enum { NVML_COMPUTE_EXCLUSIVE = 3, NVML_COMPUTE_PROHIBITED = 2 }; // nvml_device.compute_mode

struct nvml_process {
    int64_t pid;   // of the host's numbering
    int64_t bytes; // of GPU memory
    char name[64]; // program, without its path; "": not known here
};

struct nvml_device {
    int fault; // enum nvml_rc: what keeps it from being asked (lost, reset required, ...); the rest may be unknown
    char name[96], uuid[96];
    char bus[32];                                   // "00000000:1b:00.0"
    int64_t minor;                                  // of /dev/nvidiaN
    int64_t capability;                             // compute capability, tens and ones: 90
    int64_t memory_total, memory_used, memory_free; // bytes; used: by programs, where the driver tells them apart
    int64_t temperature, temperature_slowdown;      // degrees Celsius
    int64_t sm_mhz, sm_max_mhz, mem_mhz, mem_max_mhz;
    int64_t power_mw, power_limit_mw, power_default_mw;
    int64_t reasons;                               // NVML_REASON bits
    int64_t thermal_ns, brake_ns;                  // slowed by heat, by the power brake, since the driver was loaded
    int64_t utilization;                           // percent of the last moments
    int64_t ecc;                                   // 0 off, 1 on
    int64_t uncorrected, uncorrected_ever;         // memory errors: since the driver was loaded; of its life
    int64_t retired_pending;                       // 0 or 1: pages; older than A100
    int64_t remapped, remap_pending, remap_failed; // rows with uncorrectable errors; 0 or 1; 0 or 1
    int64_t recovery;                              // enum nvml_recovery
    int64_t persistence, mig;                      // 0 or 1
    int64_t compute_mode;
    int64_t pcie_gen, pcie_gen_max, pcie_width, pcie_width_max; // max: of GPU and slot together
    int64_t pcie_replays, pcie_fatal;                           // errors
    int64_t links, links_active;                                // NVLinks
    int64_t n_processes;                                        // may be more than the list holds
    struct nvml_process processes[NVML_MAX_PROCESSES];
};

// Two GPUs; the same both ways.
struct nvml_pair {
    int64_t level;       // 0 same board, 10 one PCIe switch, 20 switches, 30 host bridge, 40 NUMA node, 50 system
    int64_t read, write; // P2P: 0 works; 1 chipset, 2 GPU, 3 I/O hub, 4 turned off, 5 not supported
    int64_t nvlink;      // P2P over NVLink: the same numbers
    int64_t links;       // NVLinks that end at the other GPU; 0: none, or through switches
};

struct nvml_node {
    int rc;          // of loading and starting NVML; other than NVML_SUCCESS: nothing below is set
    char driver[80]; // "580.95.05"
    int64_t cuda;    // newest CUDA that the driver runs, 13000
    int64_t count;   // GPUs it lists; of more than NVML_MAX_GPUS the first ones are below
    int64_t n;       // devices[0, n)
    struct nvml_device devices[NVML_MAX_GPUS]; // in the order of their bus
    struct nvml_pair pairs[NVML_MAX_GPUS][NVML_MAX_GPUS];
};

struct nvml;

// Loads library (NULL: libnvidia-ml.so.1) and starts it. On failure *rc is NVML's reason, err its sentence:
// ERR_NOT_FOUND (no library), ERR_UNAVAILABLE.
int nvml_open(const char *library, struct nvml **out, int *rc, struct err *err);
void nvml_close(struct nvml *n); // NULL is fine

// A GPU that cannot be asked is no error: out->fault says it.
void nvml_device(struct nvml *n, unsigned index, struct nvml_device *out);
void nvml_pair(struct nvml *n, unsigned a, unsigned b, struct nvml_pair *out);
// Everything at once. doing[doing_size] says what goes on, "it was asked about GPU 1", for whoever kills this process.
void nvml_node(struct nvml *n, struct nvml_node *out, char *doing, int doing_size);

// The same from a child process that is given so many seconds. No other thread may run in the caller. *out is whole
// after 0, and after any failure but a timeout: then it has the GPUs that answered. ERR_TIMEOUT: it was killed, and
// what it was asking; else as nvml_open.
int nvml_probe(const char *library, double seconds, struct nvml_node *out, struct err *err);

const char *nvml_rc_text(int rc); // "the driver finds no GPU"
// The way between two GPUs as nvidia-smi writes it: NV18, PIX, PXB, PHB, NODE, SYS; "X" of one with itself.
enum { NVML_PATH_TEXT = 24 };
const char *nvml_path(const struct nvml_node *n, int a, int b, char out[NVML_PATH_TEXT]);

#endif
