// doctor: the machine without its GPUs.
#include <ctype.h>
#include <dirent.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "ops/cli/doctor.h"

// The value behind "key : value" in a file such as /proc/cpuinfo; the first one. room: of out.
static bool value_of(const char *path, const char *key, char *out, size_t room)
{
    FILE *f = fopen(path, "re");
    char *line = NULL;
    size_t size = 0;
    bool found = false;
    out[0] = '\0';
    while (f && !found && getline(&line, &size, f) > 0) {
        const char *colon = strchr(line, ':');
        size_t length = strlen(key);
        found =
            colon && strncmp(line, key, length) == 0 && (line[length] == ':' || isspace((unsigned char)line[length]));
        if (found) {
            snprintf(out, room, "%s", colon + 1 + strspn(colon + 1, " \t"));
            out[strcspn(out, "\n")] = '\0';
        }
    }
    free(line);
    if (f)
        fclose(f);
    return found;
}

// ---- where this is

// A display or compute function of NVIDIA's: vendor 10de, class 03xx.
static void look_at_pci(struct host *h)
{
    char line[DOCTOR_LINE], path[384], target[256];
    DIR *dir = opendir("/sys/bus/pci/devices");
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (strcmp(doctor_line(line, "/sys/bus/pci/devices/%s/vendor", e->d_name), "0x10de") != 0 ||
            strncmp(doctor_line(line, "/sys/bus/pci/devices/%s/class", e->d_name), "0x03", 4) != 0)
            continue;
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver", e->d_name);
        ssize_t n = readlink(path, target, sizeof target - 1);
        target[n > 0 ? n : 0] = '\0';
        const char *slash = strrchr(target, '/'), *driver = slash ? slash + 1 : "";
        if (strcmp(driver, "vfio-pci") == 0) // a virtual machine's
            continue;
        if (!h->pci_gpus++)
            snprintf(h->pci_driver, sizeof h->pci_driver, "%.31s", driver);
    }
    if (dir)
        closedir(dir);
}

void doctor_look(struct host *h)
{
    char line[DOCTOR_LINE];
    h->container = access("/.dockerenv", F_OK) == 0 || access("/run/.containerenv", F_OK) == 0 ||
                   getenv("KUBERNETES_SERVICE_HOST") || *doctor_line(line, "/run/systemd/container");
    doctor_line(line, "/proc/version");
    h->wsl = strstr(line, "microsoft") || strstr(line, "Microsoft");
    h->device_nodes = access("/dev/nvidiactl", F_OK) == 0 || access("/dev/dxg", F_OK) == 0;
    look_at_pci(h);
}

static void check_wsl(struct doctor *d)
{
    if (d->host.wsl)
        doctor_add(
            d, VERDICT_WARN, "wsl", "serve from a Linux installation; WSL2 is for trying things out",
            "this is WSL2: NVML tells little (no processes, clocks or ECC), GPUs have no peer-to-peer, pinned memory "
            "is limited, and the driver is that of Windows");
}

// ---- processor and memory

// CPUs that the control group allows, 0: no limit.
static double quota_cpus(void)
{
    char line[DOCTOR_LINE], *end;
    double quota = strtod(doctor_line(line, "/sys/fs/cgroup/cpu.max"), &end), period = strtod(end, NULL);
    return quota > 0 && period > 0 ? quota / period : 0;
}

static int allowed_cpus(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
}

static void check_cpu(struct doctor *d)
{
    static const char path[] = "/proc/cpuinfo";
    char model[128], flags[4096];
    const int cpus = allowed_cpus();
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    const double quota = quota_cpus();
    if (!value_of(path, "model name", model, sizeof model))
        snprintf(model, sizeof model, "processor");
    value_of(path, "flags", flags, sizeof flags);
    const bool x86 = *flags, avx2 = strstr(flags, " avx2"), avx512 = strstr(flags, " avx512f");
    const char *vectors = avx512 ? ", AVX-512" : avx2 ? ", AVX2" : "";
    if (x86 && !avx2)
        doctor_add(
            d, VERDICT_WARN, "cpu",
            "build on this machine; use a processor of 2013 or newer, and in a virtual machine pass its features "
            "through (-cpu host)",
            "%s: no AVX2: the CPU backend is slow, and a build for x86-64-v3 dies of an illegal instruction", model);
    else if (quota > 0 && quota < cpus - 0.5)
        doctor_add(d, VERDICT_WARN, "cpu", "give the container more, or set threads in each [group] to what it gets",
                   "%s: %d CPUs are visible, but the control group allows the time of %.1f", model, cpus, quota);
    else
        doctor_add(d, VERDICT_OK, "cpu", NULL, "%s: %d of %ld CPU%s may be used here%s", model, cpus, online,
                   doctor_s(online), vectors);
}

static double kib_of(const char *key)
{
    char text[64];
    return value_of("/proc/meminfo", key, text, sizeof text) ? strtod(text, NULL) * 1024 : 0;
}

static void check_memory(struct doctor *d)
{
    const double total = kib_of("MemTotal"), available = kib_of("MemAvailable");
    char line[DOCTOR_LINE], a[DOCTOR_SIZE], t[DOCTOR_SIZE], l[DOCTOR_SIZE];
    const double limit = strtod(doctor_line(line, "/sys/fs/cgroup/memory.max"), NULL); // "max": 0
    const bool limited = limit > 0 && limit < total;
    const double room = limited && limit < available ? limit : available;
    doctor_size(a, available);
    doctor_size(t, total);
    doctor_size(l, limit);
    const bool little = room < (double)(2LL << 30);
    doctor_add(d, little ? VERDICT_WARN : VERDICT_OK, "memory",
               little ? "stop other programs, or add memory: weights are mapped files, which need the page cache"
                      : NULL,
               "%s available of %s%s%s", a, t, limited ? "; the control group allows " : "", limited ? l : "");
}

// ---- limits

static void check_shm(struct doctor *d)
{
    struct statvfs fs;
    char size[DOCTOR_SIZE];
    if (statvfs("/dev/shm", &fs) != 0) {
        if (d->gpus->n > 1)
            doctor_add(d, VERDICT_WARN, "/dev/shm", "mount -t tmpfs tmpfs /dev/shm",
                       "missing: NCCL between the GPUs of one machine needs it");
        return;
    }
    const double bytes = (double)fs.f_blocks * (double)fs.f_frsize;
    const bool small = bytes < (double)(1LL << 30) && d->gpus->n > 1;
    doctor_add(d, small ? VERDICT_WARN : VERDICT_OK, "/dev/shm",
               small ? "docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory; elsewhere mount -o "
                       "remount,size=8g /dev/shm"
                     : NULL,
               "%s%s", doctor_size(size, bytes),
               small ? ": NCCL between the GPUs of one machine needs 1 GiB or more" : "");
}

static const char *limit_text(char out[DOCTOR_SIZE], const struct rlimit *l)
{
    if (l->rlim_cur == RLIM_INFINITY)
        snprintf(out, DOCTOR_SIZE, "unlimited");
    else
        doctor_size(out, (double)l->rlim_cur);
    return out;
}

static void check_limits(struct doctor *d)
{
    struct rlimit locked = {RLIM_INFINITY, RLIM_INFINITY}, files = {RLIM_INFINITY, RLIM_INFINITY};
    char text[DOCTOR_SIZE];
    getrlimit(RLIMIT_MEMLOCK, &locked);
    getrlimit(RLIMIT_NOFILE, &files);
    limit_text(text, &locked);
    if (files.rlim_cur < 1024)
        doctor_add(d, VERDICT_WARN, "open files", "ulimit -n 65536, or LimitNOFILE=65536 in the unit",
                   "this process may open only %llu", (unsigned long long)files.rlim_cur);
    // One GPU pins through the driver, which asks no limit.
    const bool low = d->gpus->n > 1 && locked.rlim_cur != RLIM_INFINITY;
    doctor_add(d, low ? VERDICT_WARN : VERDICT_OK, "locked memory",
               low ? "LimitMEMLOCK=infinity in the unit (ours has it), docker run --ulimit memlock=-1, or memlock in "
                     "/etc/security/limits.conf"
                   : NULL,
               "%s%s", text, low ? ": NCCL over InfiniBand or RDMA fails where it cannot pin its buffers" : "");
}

void doctor_host(struct doctor *d)
{
    check_wsl(d);
    check_cpu(d);
    check_memory(d);
    check_shm(d);
    check_limits(d);
}
