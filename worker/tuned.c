#include "worker/tuned.h"

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/algo_cache.h"

enum { MOST_BYTES = 1 << 16 };

// The parameters by name, and what no machine is beyond.
static const struct parameter {
    const char *name;
    size_t at; // in struct machine
    double min, max;
} parameters[] = {
    {"products_flop_per_s", offsetof(struct machine, products), 1e6, 1e18},
    {"attention_flop_per_s", offsetof(struct machine, attention), 1e6, 1e18},
    {"rows_byte_per_s", offsetof(struct machine, rows), 1e6, 1e16},
    {"copies_byte_per_s", offsetof(struct machine, copies), 1e6, 1e16},
    {"operation_s", offsetof(struct machine, operation), 0, 1},
    {"exchange_byte_per_s", offsetof(struct machine, exchange), 1e3, 1e16},
    {"collective_s", offsetof(struct machine, collective), 0, 10},
    {"beside", offsetof(struct machine, beside), 0, 1},
};
enum { PARAMETERS = sizeof parameters / sizeof *parameters };

static double *value_of(struct machine *c, int i)
{
    return (double *)((char *)c + parameters[i].at);
}

// ---- the key

// The first line of a file of "name : value" lines that has this name.
static bool read_line(const char *path, const char *name, char *out, size_t size)
{
    char line[256];
    bool found = false;
    FILE *f = fopen(path, "re");
    while (f && !found && fgets(line, sizeof line, f)) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, name, strlen(name)) != 0 || !colon)
            continue;
        colon += 1 + strspn(colon + 1, " \t");
        snprintf(out, size, "%.*s", (int)strcspn(colon, "\n"), colon);
        found = *out != '\0';
    }
    if (f)
        fclose(f);
    return found;
}

// A group's GPUs are equal, so the first one that the driver lists speaks for all.
static bool gpu_name(char *out, size_t size)
{
    glob_t files;
    bool found = false;
    if (glob("/proc/driver/nvidia/gpus/*/information", 0, NULL, &files) == 0) {
        found = read_line(files.gl_pathv[0], "Model", out, size);
        globfree(&files);
    }
    return found;
}

void tuned_key_of(const struct kernels *k, int ranks, int threads, const struct precision *p, struct tuned_key *out)
{
    const bool cpu = k == &kernels_cpu;
    *out = (struct tuned_key){.ranks = ranks, .threads = cpu ? threads : 0};
    if (!(cpu ? read_line("/proc/cpuinfo", "model name", out->device, sizeof out->device)
              : gpu_name(out->device, sizeof out->device)))
        snprintf(out->device, sizeof out->device, "%s", cpu ? "CPU" : "GPU");
    snprintf(out->precision, sizeof out->precision, "%s", precision_name(p));
}

static json_t *key_json(const struct tuned_key *key)
{
    return json_pack("{s:s, s:s, s:i, s:i, s:s}", "ditfleet", DITFLEET_VERSION, "device", key->device, "ranks",
                     key->ranks, "threads", key->threads, "precision", key->precision);
}

// False: no folder, or a name that does not fit.
static bool path_of(const char *folder, const struct tuned_key *key, char *used, char *path, size_t size)
{
    uint64_t hash = 0xcbf29ce484222325U;
    json_t *json = key_json(key);
    char *text = json ? json_dumps(json, JSON_COMPACT | JSON_SORT_KEYS) : NULL;
    json_decref(json);
    for (const char *c = text; c && *c; c++)
        hash = (hash ^ (uint8_t)*c) * 0x100000001b3U;
    const bool whole = text != NULL;
    free(text);
    if (!whole || (folder ? snprintf(used, size, "%s", folder) >= (int)size : !algo_cache_folder(used, size)))
        return false;
    return snprintf(path, size, "%.*s/tuned-%016" PRIx64 ".json", (int)size - 64, used, hash) < (int)size - 16;
}

// ---- reading

static bool parse(const json_t *file, const struct tuned_key *key, struct machine *out)
{
    json_t *expected = key_json(key);
    const bool ours = expected && json_equal(json_object_get(file, "key"), expected);
    json_decref(expected);
    *out = (struct machine){0};
    for (int i = 0; ours && i < PARAMETERS; i++) {
        const json_t *value = json_object_get(json_object_get(file, "parameters"), parameters[i].name);
        const double x = json_number_value(value);
        if (!json_is_number(value) || !(x >= parameters[i].min && x <= parameters[i].max))
            return false;
        *value_of(out, i) = x;
    }
    return ours;
}

static bool load_one(const char *folder, const struct tuned_key *key, struct machine *out)
{
    char used[PATH_MAX], path[PATH_MAX];
    struct stat st;
    if (!path_of(folder, key, used, path, sizeof path))
        return false;
    // Not blocking: whatever lies there under that name must not hold up the process.
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return false;
    const bool sound = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (st.st_uid == geteuid() || st.st_uid == 0) &&
                       st.st_size <= MOST_BYTES;
    json_t *file = sound ? json_loadfd(fd, JSON_REJECT_DUPLICATES, NULL) : NULL;
    close(fd);
    const bool good = file && parse(file, key, out);
    json_decref(file);
    return good;
}

bool tuned_load(const char *folder, const struct tuned_key *key, struct machine *out)
{
    struct tuned_key alone = *key;
    alone.ranks = 1;
    return load_one(folder, key, out) || (key->threads == 0 && key->ranks > 1 && load_one(folder, &alone, out));
}

// ---- writing

static json_t *whole_json(const struct tuned_key *key, struct machine c)
{
    json_t *values = json_object();
    for (int i = 0; i < PARAMETERS; i++)
        json_object_set_new(values, parameters[i].name, json_real(*value_of(&c, i)));
    return json_pack("{s:o, s:o}", "key", key_json(key), "parameters", values);
}

int tuned_save(const char *folder, const struct tuned_key *key, const struct machine *c, char *path, size_t size,
               struct err *err)
{
    char used[PATH_MAX], target[PATH_MAX], name[PATH_MAX + 8];
    if (!path_of(folder, key, used, target, sizeof target))
        return err_set(err, ERR_IO, "no folder to keep what was measured: neither XDG_CACHE_HOME nor HOME is set");
    json_t *json = whole_json(key, *c);
    if (!json)
        return err_set(err, ERR_NO_MEMORY, "no memory to write what was measured");
    algo_cache_make_folder(used);
    snprintf(name, sizeof name, "%s.XXXXXX", target);
    const int fd = mkostemp(name, O_CLOEXEC);
    bool whole = fd >= 0 && json_dumpfd(json, fd, JSON_INDENT(1) | JSON_REAL_PRECISION(9)) == 0;
    if (fd >= 0 && close(fd) != 0)
        whole = false;
    json_decref(json);
    whole = whole && rename(name, target) == 0;
    const int why = errno;
    if (!whole && fd >= 0)
        unlink(name);
    if (path)
        snprintf(path, size, "%s", target);
    return whole ? 0 : err_set(err, ERR_IO, "%s: cannot be written (%s)", target, strerror(why));
}

struct machine machine_default(const struct tuned_key *key)
{
    const double threads = key->threads;
    const bool int8 = strcmp(key->precision, "int8") == 0, fp8 = strcmp(key->precision, "fp8") == 0;
    if (key->threads == 0)
        return (struct machine){.products = int8 || fp8 ? 1200e12 : 690e12,
                                .attention = int8 ? 800e12 : 660e12,
                                .rows = 2.6e12,
                                .copies = 2.9e12,
                                .operation = 2e-6,
                                .exchange = 306e9,
                                .collective = 13e-6,
                                .beside = 0.28};
    return (struct machine){.products = 100e9 * threads,
                            .attention = 60e9 * threads,
                            .rows = 15e9 * threads,
                            .copies = 30e9 * threads,
                            .operation = 1e-6,
                            .exchange = 6e9,
                            .collective = 20e-6,
                            .beside = 1};
}
