// doctor: the NVIDIA driver, each GPU, and the ways between GPUs, judged from one snapshot.
#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ops/cli/doctor.h"

enum { OLDEST = 80 }; // compute capability of A100
static const double NVML_SECONDS = 10;

#define GIB ((double)(1LL << 30))

void doctor_ask(struct doctor *d)
{
    nvml_probe(NULL, NVML_SECONDS, d->gpus, &d->asked);
}

// ---- the driver

// No driver answers.
static void no_library(struct doctor *d)
{
    const struct host *h = &d->host;
    if (h->device_nodes)
        doctor_add(d, VERDICT_WARN, "driver",
                   h->container ? "let the container have it: NVIDIA_DRIVER_CAPABILITIES=compute,utility"
                                : "install the driver's libnvidia-ml (Debian: libnvidia-ml1) of the loaded version",
                   "NVML, which knows the GPUs' health, cannot be loaded; the GPUs themselves may work");
    else if (!h->pci_gpus)
        doctor_add(d, VERDICT_OK, "driver", NULL, "no NVIDIA GPU and no driver here: a CPU fleet needs neither");
    else if (h->container)
        doctor_add(d, VERDICT_WARN, "driver",
                   "to use them: docker run --gpus all (with the NVIDIA Container Toolkit); in Kubernetes a limit of "
                   "nvidia.com/gpu",
                   "%d NVIDIA GPU%s on this machine, but none given to this container", h->pci_gpus,
                   doctor_s(h->pci_gpus));
    else
        doctor_add(d, VERDICT_FAIL, "driver",
                   "install NVIDIA's driver (580 or newer for CUDA 13, 525 or newer for CUDA 12) and reboot",
                   "%d NVIDIA GPU%s on the PCI bus, %s%s", h->pci_gpus, doctor_s(h->pci_gpus),
                   *h->pci_driver ? "bound to the kernel driver " : "without a driver", h->pci_driver);
}

static const char *start_remedy(const struct doctor *d, int rc)
{
    switch (rc) {
    case NVML_VERSION_MISMATCH:
        return "the driver was updated under a running system: reboot; or end every GPU program and reload: rmmod "
               "nvidia_uvm nvidia_drm nvidia_modeset nvidia && modprobe nvidia";
    case NVML_DRIVER_NOT_LOADED:
        return d->host.container ? "load the driver on the host, and start the container with --gpus all"
                                 : "modprobe nvidia; if that fails, dmesg says why: often a kernel update without its "
                                   "DKMS build, or Secure Boot";
    case NVML_NO_PERMISSION:
        return "let this user open /dev/nvidia*; in a systemd unit DeviceAllow=char-nvidia*";
    case NVML_OPERATING_SYSTEM:
        return "restart the container: a systemd daemon-reload on the host took its devices away; to prevent that, "
               "\"exec-opts\": [\"native.cgroupdriver=cgroupfs\"] in Docker's daemon.json, or CDI";
    default:
        return d->host.container
                   ? "restart the container; if that does not help, see NVRM and Xid lines in the host's dmesg"
                   : "NVRM and Xid lines in dmesg say why; reload the driver, or reboot";
    }
}

static void describe_driver(struct doctor *d)
{
    const struct nvml_node *n = d->gpus;
    const bool many = n->count > NVML_MAX_GPUS;
    char cuda[48] = "", more[48] = "";
    if (many)
        snprintf(more, sizeof more, ", of which the first %d are checked", NVML_MAX_GPUS);
    if (n->cuda > 0)
        snprintf(cuda, sizeof cuda, ", runs CUDA up to %d.%d", (int)(n->cuda / 1000), (int)(n->cuda % 1000 / 10));
    doctor_add(d, many ? VERDICT_WARN : VERDICT_OK, "driver", many ? "look at the others with nvidia-smi" : NULL,
               "%s%s, %d GPU%s%s", *n->driver ? n->driver : "of unknown version", cuda, (int)n->count,
               doctor_s((long)n->count), more);
}

static void check_driver(struct doctor *d)
{
    char loaded[DOCTOR_LINE];
    const struct nvml_node *n = d->gpus;
    doctor_line(loaded, "/sys/module/nvidia/version");
    if (d->asked.code && d->asked.code != ERR_NOT_FOUND && d->asked.code != ERR_UNAVAILABLE) // hung, died
        doctor_add(
            d, VERDICT_FAIL, "driver",
            "NVRM and Xid lines in dmesg say which GPU; drain this machine and reset that GPU (nvidia-smi --gpu-reset "
            "-i N), or reboot",
            "%s", d->asked.text);
    else if (n->rc == NVML_LIBRARY_NOT_FOUND)
        no_library(d);
    else if (n->rc != NVML_SUCCESS && !d->host.device_nodes && !d->host.pci_gpus && n->rc == NVML_DRIVER_NOT_LOADED)
        doctor_add(d, VERDICT_OK, "driver", NULL,
                   "no NVIDIA GPU here, though the driver's libraries are: a CPU fleet needs neither");
    else if (n->rc != NVML_SUCCESS)
        doctor_add(d, VERDICT_FAIL, "driver", start_remedy(d, n->rc), "NVML: %s (%d)%s%s", nvml_rc_text(n->rc), n->rc,
                   *loaded ? "; the loaded module is version " : "", loaded);
    else if (n->count == 0)
        doctor_add(d, d->host.pci_gpus ? VERDICT_FAIL : VERDICT_OK, "driver",
                   d->host.pci_gpus ? "NVRM lines in dmesg say why; in a container: docker run --gpus all" : NULL,
                   "driver %s finds no GPU%s", n->driver, d->host.pci_gpus ? ", though the PCI bus has one" : "");
    else
        describe_driver(d);
}

// ---- one GPU

struct gpu {
    struct doctor *d;
    const struct nvml_device *dev;
    int index;
};

// "... -i N ..." with this GPU's number.
static const char *numbered(const struct gpu *g, const char *fix, char out[DOCTOR_TEXT])
{
    const char *at = fix ? strstr(fix, "-i N") : NULL;
    if (!at)
        return fix;
    snprintf(out, DOCTOR_TEXT, "%.*s-i %d%s", (int)(at - fix), fix, g->index, at + strlen("-i N"));
    return out;
}

// VERDICT, "clocks" for "gpu0 clocks", ...
#define SAY(g, verdict, part, fix, ...)                                                                                \
    do {                                                                                                               \
        char name_[DOCTOR_NAME], fix_[DOCTOR_TEXT];                                                                    \
        snprintf(name_, sizeof name_, "gpu%d%s%s", (g)->index, *(part) ? " " : "", part);                              \
        doctor_add((g)->d, verdict, name_, numbered(g, fix, fix_), __VA_ARGS__);                                       \
    } while (0)

// "0000:1b:00.0", as the kernel names it, of "00000000:1B:00.0".
static void kernel_bus(const struct nvml_device *dev, char out[16])
{
    size_t n = strlen(dev->bus);
    snprintf(out, 16, "%.15s", n > 12 ? dev->bus + n - 12 : dev->bus);
    for (char *c = out; *c; c++)
        *c = (char)tolower((unsigned char)*c);
}

static void check_identity(const struct gpu *g)
{
    const struct nvml_device *dev = g->dev;
    char bus[16], numa[DOCTOR_LINE], total[DOCTOR_SIZE], used[DOCTOR_SIZE], where[32] = "", capability[16] = "unknown";
    kernel_bus(dev, bus);
    doctor_line(numa, "/sys/bus/pci/devices/%s/numa_node", bus);
    if (*numa && *numa != '-')
        snprintf(where, sizeof where, ", NUMA node %.8s", numa);
    doctor_size(total, (double)dev->memory_total);
    doctor_size(used, (double)dev->memory_used);
    if (dev->capability > 0)
        snprintf(capability, sizeof capability, "%d.%d", (int)(dev->capability / 10), (int)(dev->capability % 10));
    const bool old = dev->capability > 0 && dev->capability < OLDEST;
    SAY(g, old ? VERDICT_FAIL : VERDICT_OK, "", old ? "use an A100, an RTX 30 or anything newer" : NULL,
        "%s, %s (%s in use), compute capability %s%s, %s%s, %s", dev->name, total, used, capability,
        old ? ", but 8.0 is the oldest supported" : "", dev->bus, where, dev->uuid);
}

static const char *fault_remedy(int rc)
{
    switch (rc) {
    case NVML_GPU_IS_LOST:
        return "drain this machine and reboot it (a reset does not bring the GPU back); if it happens again, reseat "
               "the GPU, check its power, or replace it";
    case NVML_RESET_REQUIRED:
        return "end every program on it, then nvidia-smi --gpu-reset -i N; if that fails, reboot";
    case NVML_INSUFFICIENT_POWER:
        return "attach its power cables";
    case NVML_NO_PERMISSION:
        return "let this user open /dev/nvidia*";
    case NVML_CORRUPTED_INFOROM:
        return "nvidia-smi -q -i N tells more; the board needs repair or replacement";
    default:
        return "NVRM and Xid lines in dmesg say why; nvidia-smi --gpu-reset -i N, or reboot";
    }
}

static void check_recovery(const struct gpu *g)
{
    static const char *const wants[] = {[NVML_RECOVERY_RESET] = "a reset",
                                        [NVML_RECOVERY_REBOOT] = "a reboot of the node",
                                        [NVML_RECOVERY_DRAIN_P2P] = "its peer-to-peer traffic to stop",
                                        [NVML_RECOVERY_DRAIN_AND_RESET] =
                                            "its peer-to-peer traffic to stop, then for a reset"};
    const int64_t action = g->dev->recovery;
    const bool known = action > 0 && action < (int64_t)(sizeof wants / sizeof *wants);
    if (action > 0)
        SAY(g, VERDICT_FAIL, "recovery",
            "drain this machine and end every program on the GPU, then nvidia-smi --gpu-reset -i N, or reboot",
            "the driver asks for %s", known ? wants[action] : "an action that nvidia-smi -q names");
}

static void check_clocks(const struct gpu *g)
{
    const struct nvml_device *dev = g->dev;
    const int64_t r = dev->reasons < 0 ? 0 : dev->reasons;
    char slowed[96] = "";
    if (dev->thermal_ns > 1000000000 || dev->brake_ns > 1000000000)
        snprintf(slowed, sizeof slowed,
                 "; since the driver was loaded, slowed for %.0f s by heat and %.0f s by the power brake",
                 (double)(dev->thermal_ns > 0 ? dev->thermal_ns : 0) / 1e9,
                 (double)(dev->brake_ns > 0 ? dev->brake_ns : 0) / 1e9);
    if (r & NVML_REASON_HW_THERMAL)
        SAY(g, VERDICT_FAIL, "clocks", "check fans, airflow, dust and the inlet temperature",
            "the hardware has halved the clocks, or worse, because of heat: %d C, %d MHz of %d%s",
            (int)dev->temperature, (int)dev->sm_mhz, (int)dev->sm_max_mhz, slowed);
    else if (r & NVML_REASON_POWER_BRAKE)
        SAY(g, VERDICT_FAIL, "clocks", "check the power supplies and the rack's power limit",
            "the power brake is on: %d MHz of %d%s", (int)dev->sm_mhz, (int)dev->sm_max_mhz, slowed);
    else if (r & NVML_REASON_HW_SLOWDOWN)
        SAY(g, VERDICT_FAIL, "clocks",
            "check power cables, power supplies and cooling; nvidia-smi -q -i N -d PERFORMANCE",
            "the hardware holds the clocks down: %d MHz of %d%s", (int)dev->sm_mhz, (int)dev->sm_max_mhz, slowed);
    else if (r & NVML_REASON_SW_THERMAL)
        SAY(g, VERDICT_WARN, "clocks", "check fans, airflow and the inlet temperature",
            "the driver has lowered the clocks because of heat: %d C, %d MHz of %d%s", (int)dev->temperature,
            (int)dev->sm_mhz, (int)dev->sm_max_mhz, slowed);
    else if (dev->sm_mhz >= 0)
        SAY(g, VERDICT_OK, "clocks", NULL, "%d MHz of %d, memory %d of %d, %d C%s%s%s%s", (int)dev->sm_mhz,
            (int)dev->sm_max_mhz, (int)dev->mem_mhz, (int)dev->mem_max_mhz, (int)dev->temperature,
            r & NVML_REASON_IDLE ? ", idle" : "", r & NVML_REASON_POWER_CAP ? ", at its power limit" : "",
            r & NVML_REASON_SET ? ", set by nvidia-smi or a program" : "", slowed);
}

static void check_power(const struct gpu *g)
{
    const struct nvml_device *dev = g->dev;
    const double limit = (double)dev->power_limit_mw / 1e3, standard = (double)dev->power_default_mw / 1e3;
    if (dev->power_limit_mw <= 0)
        return;
    const bool low = standard > 0 && limit < 0.98 * standard;
    char use[32] = "", fix[96];
    if (dev->power_mw >= 0)
        snprintf(use, sizeof use, "%.0f W, ", (double)dev->power_mw / 1e3);
    snprintf(fix, sizeof fix, "unless the limit is meant: nvidia-smi -i N -pl %.0f", standard);
    SAY(g, low ? VERDICT_WARN : VERDICT_OK, "power", low ? fix : NULL, "%slimit %.0f W%s", use, limit,
        low ? ", which is below its default" : "");
}

static void check_errors(const struct gpu *g)
{
    const struct nvml_device *dev = g->dev;
    const char *state = dev->ecc > 0 ? "on" : dev->ecc == 0 ? "off" : "unknown";
    char ever[48] = "", rows[48] = "";
    if (dev->uncorrected_ever >= 0)
        snprintf(ever, sizeof ever, ", %lld in its lifetime", (long long)dev->uncorrected_ever);
    if (dev->remapped >= 0)
        snprintf(rows, sizeof rows, ", %lld row%s remapped", (long long)dev->remapped, doctor_s((long)dev->remapped));
    const char *replace = "take the GPU out of service and have it replaced (RMA)";
    const char *reset =
        "drain the GPU, end every program on it, nvidia-smi --gpu-reset -i N (or reboot), then run doctor "
        "again";
    if (dev->remap_failed > 0)
        SAY(g, VERDICT_FAIL, "ecc", replace, "a broken row of memory could not be replaced by a spare one");
    else if (dev->remap_pending > 0 || dev->retired_pending > 0)
        SAY(g, VERDICT_FAIL, "ecc", reset, "faulty memory is waiting to be taken out of use (%s pending)",
            dev->remap_pending > 0 ? "row remapping" : "page retirement");
    else if (dev->uncorrected > 0)
        SAY(g, VERDICT_FAIL, "ecc", reset,
            "%lld uncorrectable error%s since the driver was loaded: results since then may be wrong",
            (long long)dev->uncorrected, doctor_s((long)dev->uncorrected));
    else if (dev->ecc >= 0 || dev->remapped >= 0)
        SAY(g, VERDICT_OK, "ecc", NULL, "ECC is %s%s%s%s", state,
            dev->uncorrected == 0 ? ", no uncorrectable error since the driver was loaded" : "", ever, rows);
}

static void check_modes(const struct gpu *g)
{
    const struct nvml_device *dev = g->dev;
    if (dev->persistence == 0 && !g->d->host.wsl)
        SAY(g, VERDICT_WARN, "persistence", "systemctl enable --now nvidia-persistenced, on the host",
            "persistence mode is off: the driver lets go of the GPU whenever its last program ends, and the next "
            "program waits seconds for it");
    if (dev->mig > 0)
        SAY(g, VERDICT_WARN, "MIG", "to use the whole GPU: nvidia-smi -i N -mig 0, when nothing runs on it",
            "the GPU is split into instances (MIG): a process sees one of them, with its part of the memory and no "
            "peer-to-peer");
    if (dev->compute_mode == NVML_COMPUTE_PROHIBITED)
        SAY(g, VERDICT_FAIL, "compute mode", "nvidia-smi -i N -c DEFAULT", "no program is allowed to compute on it");
    else if (dev->compute_mode == NVML_COMPUTE_EXCLUSIVE)
        SAY(g, VERDICT_OK, "compute mode", NULL, "exclusive: one process at a time, which is what a worker needs");
}

// An idle GPU lowers the generation of its link, never the width.
static void check_pcie(const struct gpu *g)
{
    const struct nvml_device *dev = g->dev;
    if (dev->pcie_gen <= 0 || dev->pcie_width <= 0)
        return;
    const bool idle = dev->utilization <= 0 || (dev->reasons > 0 && dev->reasons & NVML_REASON_IDLE);
    const bool narrow = dev->pcie_width < dev->pcie_width_max;
    const bool slot = dev->pcie_width_max > 0 && dev->pcie_width_max <= 4;
    const bool slow = dev->pcie_gen < dev->pcie_gen_max && !idle, old = dev->pcie_gen_max > 0 && dev->pcie_gen_max <= 2;
    const bool bad = narrow || slot || slow || old;
    SAY(g, bad ? VERDICT_WARN : VERDICT_OK, "pcie",
        !bad ? NULL
        : narrow || slow
            ? "reseat the GPU and its riser, and check the BIOS setting of the slot; until then loading weights is slow"
            : "put it into a slot with 16 lanes of generation 3 or newer; here loading weights and peer-to-peer are "
              "slow",
        "generation %d of %d, width x%d of x%d%s%s", (int)dev->pcie_gen, (int)dev->pcie_gen_max, (int)dev->pcie_width,
        (int)dev->pcie_width_max, dev->pcie_gen < dev->pcie_gen_max && idle ? " (idle GPUs lower the generation)" : "",
        dev->pcie_fatal > 0 ? "; it has had fatal errors" : "");
}

static bool is_ours(const struct nvml_process *p)
{
    return strncmp(p->name, "ditfleet", 8) == 0;
}

static void list_processes(const struct nvml_device *dev, char *out, size_t size)
{
    char bytes[DOCTOR_SIZE];
    size_t n = 0;
    out[0] = '\0';
    for (int64_t i = 0; i < dev->n_processes && i < NVML_MAX_PROCESSES && n < size; i++) {
        const struct nvml_process *p = &dev->processes[i];
        if (is_ours(p))
            continue;
        n += (size_t)snprintf(out + n, size - n, "%s%s (%lld)%s%s", n ? ", " : "", *p->name ? p->name : "process",
                              (long long)p->pid, p->bytes >= 0 ? " " : "",
                              p->bytes >= 0 ? doctor_size(bytes, (double)p->bytes) : "");
    }
}

static void check_processes(const struct gpu *g)
{
    const struct nvml_device *dev = g->dev;
    char list[384], used[DOCTOR_SIZE];
    int ours = 0;
    for (int64_t i = 0; i < dev->n_processes && i < NVML_MAX_PROCESSES; i++)
        ours += is_ours(&dev->processes[i]);
    list_processes(dev, list, sizeof list);
    doctor_size(used, (double)dev->memory_used);
    if (*list)
        SAY(g, VERDICT_WARN, "programs", "end them, or give this fleet's groups a memory_budget that leaves them room",
            "other programs use this GPU: %s", list);
    else if (dev->n_processes <= 0 && (double)dev->memory_used > 1.5 * GIB)
        SAY(g, VERDICT_WARN, "programs",
            g->d->host.container ? "look on the host with nvidia-smi"
                                 : "look for stuck programs: fuser -v /dev/nvidia*",
            "%s in use by programs that cannot be seen from here", used);
    else if (dev->n_processes >= 0)
        SAY(g, VERDICT_OK, "programs", NULL, ours ? "%d of ditfleet's, no others" : "none", ours);
}

static void check_links(const struct gpu *g)
{
    const struct nvml_device *dev = g->dev;
    if (dev->links > 0 && dev->links_active > 0 && dev->links_active < dev->links)
        SAY(g, VERDICT_WARN, "nvlink",
            "see nvidia-smi nvlink -s -i N, and Xid 74 in dmesg; reseat the bridge, or have the board checked",
            "%d of %d NVLinks are up", (int)dev->links_active, (int)dev->links);
}

static void check_gpu(struct doctor *d, int index)
{
    const struct gpu g = {d, &d->gpus->devices[index], index};
    void (*const checks[])(const struct gpu *) = {check_identity, check_recovery, check_clocks,
                                                  check_power,    check_errors,   check_modes,
                                                  check_pcie,     check_links,    check_processes};
    if (g.dev->fault) {
        SAY(&g, VERDICT_FAIL, "", fault_remedy(g.dev->fault), "%s%s%s (NVML %d)", g.dev->bus, *g.dev->bus ? ": " : "",
            nvml_rc_text(g.dev->fault), g.dev->fault);
        return;
    }
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
        checks[i](&g);
}

// ---- between GPUs

static const char *p2p_reason(int64_t status)
{
    static const char *const reasons[] = {"works",
                                          "the chipset does not support it",
                                          "these GPUs do not support it (GeForce boards do not)",
                                          "they are attached to different I/O hubs",
                                          "it is turned off in the driver's settings",
                                          "it is not supported here"};
    return status >= 0 && status < (int64_t)(sizeof reasons / sizeof *reasons) ? reasons[status]
                                                                               : "the driver does not say why";
}

static void check_p2p(struct doctor *d)
{
    const struct nvml_node *n = d->gpus;
    int pairs = 0, without = 0, unknown = 0, first[2] = {0, 0};
    for (int a = 0; a < n->n; a++)
        for (int b = a + 1; b < n->n; b++) {
            const struct nvml_pair *p = &n->pairs[a][b];
            pairs++;
            unknown += p->read < 0 || p->write < 0;
            if (p->read <= 0 && p->write <= 0)
                continue;
            if (!without++)
                first[0] = a, first[1] = b;
        }
    const struct nvml_pair *p = &n->pairs[first[0]][first[1]];
    const int64_t status = p->read > 0 ? p->read : p->write;
    if (without)
        doctor_add(
            d, VERDICT_WARN, "p2p",
            "groups of these GPUs would go through the host's memory, which is slower; on servers enable large BARs in "
            "the BIOS (Above 4G Decoding, Resizable BAR); to a virtual machine pass GPUs of one PCIe switch",
            "no peer-to-peer in %d of %d pairs of GPUs; the first pair, GPU %d and GPU %d: %s", without, pairs,
            first[0], first[1], p2p_reason(status));
    else
        doctor_add(d, VERDICT_OK, "p2p", NULL, "%s",
                   unknown ? "the driver does not say whether there is peer-to-peer between the GPUs"
                           : "peer-to-peer works in every pair of GPUs");
}

// An IOMMU that translates sends P2P over PCIe through the root complex, where it is slow or hangs.
static void check_iommu(struct doctor *d)
{
    char bus[16], type[DOCTOR_LINE], way[NVML_PATH_TEXT];
    kernel_bus(&d->gpus->devices[0], bus);
    doctor_line(type, "/sys/bus/pci/devices/%s/iommu_group/type", bus);
    const bool nvlink = strncmp(nvml_path(d->gpus, 0, 1, way), "NV", 2) == 0;
    if (strncmp(type, "DMA", 3) == 0 && !nvlink)
        doctor_add(d, VERDICT_WARN, "iommu", "on bare metal boot with iommu=pt, and turn off ACS on the PCIe switches",
                   "the IOMMU translates for the GPUs (%s): peer-to-peer over PCIe is slow, or makes NCCL hang", type);
}

static void check_ways(struct doctor *d)
{
    const struct nvml_node *n = d->gpus;
    char way[NVML_PATH_TEXT];
    int nvlink = 0, pairs = 0;
    for (int a = 0; a < n->n; a++)
        for (int b = a + 1; b < n->n; b++, pairs++)
            nvlink += strncmp(nvml_path(n, a, b, way), "NV", 2) == 0;
    doctor_add(d, VERDICT_OK, "topology", NULL,
               "pairs of GPUs with NVLink: %d of %d (NV4: four links; PIX, PXB: PCIe switches; PHB: host bridge; NODE: "
               "inside a NUMA node; SYS: between processors)",
               nvlink, pairs);
    check_p2p(d);
    check_iommu(d);
    doctor_add(d, VERDICT_OK, "gpudirect rdma", NULL, "%s",
               access("/sys/module/nvidia_peermem", F_OK) == 0
                   ? "nvidia_peermem is loaded"
                   : "nvidia_peermem is not loaded, which matters only to groups that span machines");
}

void doctor_gpus(struct doctor *d)
{
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    check_driver(d);
    for (int i = 0; i < d->gpus->n; i++)
        check_gpu(d, i);
    if (d->gpus->n > 1)
        check_ways(d);
    if (visible && d->gpus->n > 0)
        doctor_add(d, VERDICT_OK, "visible", NULL,
                   "CUDA_VISIBLE_DEVICES=%s: programs started from here see only these GPUs; the supervisor sets its "
                   "own for each worker",
                   visible);
}

// ---- for print and --json

void doctor_print_ways(const struct nvml_node *n)
{
    char way[NVML_PATH_TEXT];
    printf("%24s", "");
    for (int b = 0; b < n->n; b++)
        printf(" gpu%-3d", b);
    for (int a = 0; a < n->n; a++) {
        printf("\n%20sgpu%-3d", "", a);
        for (int b = 0; b < n->n; b++)
            printf(" %-6s", nvml_path(n, a, b, way));
    }
    putchar('\n');
}

json_t *doctor_ways_json(const struct nvml_node *n)
{
    char way[NVML_PATH_TEXT];
    json_t *rows = json_array();
    for (int a = 0; a < n->n; a++) {
        json_t *row = json_array();
        for (int b = 0; b < n->n; b++)
            json_array_append_new(row, json_string(nvml_path(n, a, b, way)));
        json_array_append_new(rows, row);
    }
    return rows;
}

static json_t *gpu_json(const struct nvml_device *dev)
{
    const struct {
        const char *name;
        int64_t value;
    } rows[] = {
        {"compute_capability", dev->capability},
        {"memory_total_bytes", dev->memory_total},
        {"memory_used_bytes", dev->memory_used},
        {"temperature_celsius", dev->temperature},
        {"sm_mhz", dev->sm_mhz},
        {"sm_max_mhz", dev->sm_max_mhz},
        {"memory_mhz", dev->mem_mhz},
        {"memory_max_mhz", dev->mem_max_mhz},
        {"power_milliwatts", dev->power_mw},
        {"power_limit_milliwatts", dev->power_limit_mw},
        {"clock_event_reasons", dev->reasons},
        {"ecc_uncorrected", dev->uncorrected},
        {"ecc_uncorrected_lifetime", dev->uncorrected_ever},
        {"rows_remapped", dev->remapped},
        {"rows_pending", dev->remap_pending},
        {"recovery_action", dev->recovery},
        {"persistence", dev->persistence},
        {"mig", dev->mig},
        {"pcie_generation", dev->pcie_gen},
        {"pcie_generation_max", dev->pcie_gen_max},
        {"pcie_width", dev->pcie_width},
        {"pcie_width_max", dev->pcie_width_max},
        {"pcie_replays", dev->pcie_replays},
        {"nvlinks", dev->links},
        {"nvlinks_active", dev->links_active},
        {"processes", dev->n_processes},
    };
    json_t *object = json_object();
    json_object_set_new(object, "name", json_string(dev->name));
    json_object_set_new(object, "uuid", json_string(dev->uuid));
    json_object_set_new(object, "bus", json_string(dev->bus));
    if (dev->fault)
        json_object_set_new(object, "fault", json_string(nvml_rc_text(dev->fault)));
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (rows[i].value != NVML_UNKNOWN)
            json_object_set_new(object, rows[i].name, json_integer(rows[i].value));
    return object;
}

json_t *doctor_gpus_json(const struct nvml_node *n)
{
    json_t *list = json_array();
    for (int i = 0; i < n->n; i++)
        json_array_append_new(list, gpu_json(&n->devices[i]));
    return list;
}
