// doctor --config: what the supervisor's configuration names: Redis, directories, models, threads.
#include <errno.h>
#include <libgen.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "kernels/backend.h"
#include "ops/cli/doctor.h"
#include "proto/redis.h"
#include "supervisor/supervisor.h"
#include "worker/comm/comm.h"
#include "worker/model.h"

static const double REDIS_SECONDS = 15, DISK_SECONDS = 10, MODEL_SECONDS = 60, BACKEND_SECONDS = 60;

// ---- Redis

// The value behind "name:" in the text of INFO.
static const char *info(const redisReply *reply, const char *name, char *out, size_t size)
{
    const char *at = reply && reply->str ? reply->str : "";
    const size_t length = strlen(name);
    while (at && (strncmp(at, name, length) != 0 || at[length] != ':')) {
        at = strchr(at, '\n');
        at += at ? 1 : 0;
    }
    at = at ? at + length + 1 : "";
    snprintf(out, size, "%.*s", (int)strcspn(at, "\r\n"), at);
    return out;
}

// What would lose jobs, or refuse them.
static void check_server(struct doctor *d, const redisReply *r)
{
    char version[32], policy[32], role[16], status[16];
    info(r, "redis_version", version, sizeof version);
    info(r, "maxmemory_policy", policy, sizeof policy);
    info(r, "role", role, sizeof role);
    if (*version && strtol(version, NULL, 10) < 7)
        doctor_add(d, VERDICT_FAIL, "redis version", "upgrade to Redis 7.0 or newer", "%s", version);
    if (*policy && strcmp(policy, "noeviction") != 0)
        doctor_add(d, VERDICT_FAIL, "redis policy",
                   "CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
                   "maxmemory-policy is %s: when full, Redis throws jobs away", policy);
    if (strcmp(role, "slave") == 0)
        doctor_add(d, VERDICT_FAIL, "redis role", "name the primary in [redis] url",
                   "this is a replica: it refuses writes");
    if (strcmp(info(r, "aof_last_write_status", status, sizeof status), "err") == 0)
        doctor_add(d, VERDICT_FAIL, "redis disk", "make room on its disk; its log says more",
                   "Redis could not write its append-only file: it refuses jobs");
    else if (strcmp(info(r, "rdb_last_bgsave_status", status, sizeof status), "err") == 0)
        doctor_add(d, VERDICT_WARN, "redis disk", "make room on its disk, or for its fork (vm.overcommit_memory=1)",
                   "Redis could not save its last snapshot; by default it refuses writes until it can");
}

static void check_durability(struct doctor *d, struct redis *redis, const redisReply *r)
{
    char enabled[8], fsync[16] = "";
    redisReply *answer = NULL;
    struct err unused;
    if (redis_command(redis, &answer, &unused, "CONFIG GET appendfsync") == 0 && answer->elements == 2)
        snprintf(fsync, sizeof fsync, "%.15s", answer->element[1]->str);
    if (answer)
        freeReplyObject(answer);
    if (strcmp(info(r, "aof_enabled", enabled, sizeof enabled), "0") == 0)
        doctor_add(d, VERDICT_WARN, "redis durability", "CONFIG SET appendonly yes, and the same in redis.conf",
                   "no append-only file: a crash of Redis loses every job since its last snapshot");
    else if (strcmp(fsync, "no") == 0)
        doctor_add(d, VERDICT_WARN, "redis durability", "CONFIG SET appendfsync everysec, or always",
                   "appendfsync is no: a power failure may lose half a minute of jobs");
    else
        doctor_add(d, VERDICT_OK, "redis durability", NULL, "append-only file%s%s%s", *fsync ? ", appendfsync " : "",
                   fsync, strcmp(fsync, "everysec") == 0 ? " (a power failure may lose a second)" : "");
}

static void check_room(struct doctor *d, const redisReply *r)
{
    char text[32], u[DOCTOR_SIZE], m[DOCTOR_SIZE];
    const double used = strtod(info(r, "used_memory", text, sizeof text), NULL);
    const double max = strtod(info(r, "maxmemory", text, sizeof text), NULL);
    const bool full = max > 0 && used > 0.8 * max;
    doctor_add(d, full ? VERDICT_WARN : VERDICT_OK, "redis memory",
               full ? "raise maxmemory, or shorten [queue] retention: when full, Redis refuses jobs" : NULL,
               "%s used of %s", doctor_size(u, used), max > 0 ? doctor_size(m, max) : "all that its host has");
}

static void redis_part(struct doctor *d)
{
    const struct redis_options options = {.connect_ms = 3000, .command_ms = 3000};
    struct err err = {.code = ERR_NONE};
    struct redis *redis = NULL;
    redisReply *r = NULL;
    char version[32];
    int rc = redis_open(&redis, d->conf->redis.url, &options, &err);
    rc = rc ? rc : redis_command(redis, &r, &err, "INFO");
    if (rc != 0) {
        doctor_add(d, VERDICT_FAIL, "redis",
                   rc == ERR_REFUSED ? "check the user and password in [redis] url, and that user's ACL (it needs INFO)"
                                     : "start it, or correct [redis] url",
                   "%s", err.text);
    } else {
        doctor_add(d, VERDICT_OK, "redis", NULL, "version %s answers at %s",
                   info(r, "redis_version", version, sizeof version), redis_address(redis));
        check_server(d, r);
        check_durability(d, redis, r);
        check_room(d, r);
    }
    if (r)
        freeReplyObject(r);
    redis_close(redis);
}

// ---- directories

// The directory itself, or the nearest one above it that is there.
static void existing(const char *path, char out[PATH_MAX])
{
    struct stat st;
    snprintf(out, PATH_MAX, "%s", path);
    while (stat(out, &st) != 0 && strcmp(out, "/") != 0 && strcmp(out, ".") != 0) {
        const char *up = dirname(out); // in out, or a constant
        if (up != out)
            snprintf(out, PATH_MAX, "%s", up);
    }
}

static bool is_parent(const char *parent, const char *path)
{
    char copy[PATH_MAX];
    snprintf(copy, sizeof copy, "%s", path);
    return strcmp(dirname(copy), parent) == 0;
}

// made: the supervisor makes it, but not what it lies in.
static void check_directory(struct doctor *d, const char *name, const char *path, double least, bool made)
{
    char there[PATH_MAX], left[DOCTOR_SIZE];
    struct statvfs fs;
    struct stat st;
    const int absent = stat(path, &st) != 0 ? errno : S_ISDIR(st.st_mode) ? 0 : ENOTDIR;
    existing(path, there);
    const bool writable = access(there, W_OK | X_OK) == 0;
    if (absent && (absent != ENOENT || !made || !is_parent(there, path))) {
        doctor_add(d, VERDICT_FAIL, name,
                   absent == EACCES ? "run doctor as the supervisor's user; let that user into the directories above it"
                                    : "mkdir -p, then chown it to the supervisor's user",
                   "%s: %s", path, strerror(absent));
        return;
    }
    if (statvfs(there, &fs) != 0) {
        doctor_add(d, VERDICT_FAIL, name, "check whether its file system is mounted", "%s: %s", path, strerror(errno));
        return;
    }
    const double room = (double)fs.f_bavail * (double)fs.f_frsize;
    doctor_size(left, room);
    if (!writable && absent)
        doctor_add(d, VERDICT_WARN, name,
                   "create it, owned by the supervisor's user (the systemd unit creates /run/ditfleet)",
                   "%s does not exist, and user %d may not create it", path, (int)geteuid());
    else if (!writable)
        doctor_add(d, VERDICT_FAIL, name,
                   "chown it to the supervisor's user; if it is that user's, run doctor as that user",
                   "%s: user %d may not write there", path, (int)geteuid());
    else if (room < least || (fs.f_files > 0 && fs.f_favail == 0))
        doctor_add(d, VERDICT_WARN, name, "make room", "%s: %s free%s", path, left,
                   room < least ? "" : ", but no inodes");
    else
        doctor_add(d, VERDICT_OK, name, NULL, "%s: %s, %s free", path, absent ? "can be created" : "writable", left);
}

static void directories_part(struct doctor *d)
{
    check_directory(d, "state_dir", d->conf->fleet.state_dir, 16 << 20, true);
    for (int i = 0; i < d->conf->upload.file_roots.count; i++)
        check_directory(d, "file_root", d->conf->upload.file_roots.items[i], 1LL << 30, false);
}

// ---- models

static void model_part_of(struct doctor *d)
{
    struct err err = {.code = ERR_NONE};
    struct model *m = NULL;
    char size[DOCTOR_SIZE];
    if (model_load(d->model->directory, &m, &err) != 0) {
        doctor_add(d, VERDICT_FAIL, "model",
                   "it must hold a FLUX.1 checkpoint in diffusers' format; download again what is missing", "%s@%s: %s",
                   d->model->name, d->model->version, err.text);
        return;
    }
    const double bytes = (double)model_bytes(m);
    const double memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    const bool big = d->group->device == CONF_DEVICE_CPU && bytes > memory;
    doctor_size(size, bytes);
    doctor_add(d, big ? VERDICT_WARN : VERDICT_OK, "model",
               big ? "use a machine with more memory: here every step would read the disk" : NULL,
               "%s@%s: %s: %s of weights%s", d->model->name, d->model->version, d->model->directory, size,
               big ? ", more than this machine's memory" : "");
    model_free(m);
}

static bool seen_before(const struct conf *c, int group, int model)
{
    const char *directory = c->groups[group].models[model].directory;
    for (int g = 0; g <= group; g++)
        for (int m = 0; m < (g < group ? c->groups[g].model.count : model); m++)
            if (strcmp(c->groups[g].models[m].directory, directory) == 0)
                return true;
    return false;
}

static void check_models(struct doctor *d)
{
    for (int g = 0; g < d->conf->n_groups; g++)
        for (int m = 0; m < d->conf->groups[g].model.count; m++) {
            d->group = &d->conf->groups[g];
            d->model = &d->group->models[m];
            if (!seen_before(d->conf, g, m))
                doctor_guard(d, "model", MODEL_SECONDS, model_part_of, "check whether its file system answers");
        }
}

// ---- groups

static void backend_part(struct doctor *d)
{
    const struct kernels *k;
    struct err err = {.code = ERR_NONE};
    if (backend_find("cuda", &k, &err) != 0)
        doctor_add(d, VERDICT_FAIL, "group", "set device = cpu, or see the backend above", "%s needs a GPU: %s",
                   d->group->name, err.text);
}

// A GPU that does not open is told of beside the GPU.
static void check_gpu_of(struct doctor *d)
{
    const struct conf_group *g = d->group;
    if (g->device != CONF_DEVICE_CUDA)
        return;
    int last = 0;
    for (int i = 0; i < g->n_gpus; i++)
        last = g->gpus[i] > last ? g->gpus[i] : last;
    if (d->gpus->n == 0 && !d->host.device_nodes)
        doctor_add(d, VERDICT_FAIL, "group", "set device = cpu, or see the driver above",
                   "%s needs GPU %d, but there is none", g->name, last);
    else if (d->gpus->n > 0 && last >= d->gpus->n)
        doctor_add(d, VERDICT_FAIL, "group", "set gpu to one of those above",
                   "%s needs GPU %d, but there %s %d, numbered from 0", g->name, last, d->gpus->n == 1 ? "is" : "are",
                   (int)d->gpus->n);
    else
        doctor_guard(d, "group", BACKEND_SECONDS, backend_part, "set device = cpu, or see the backend above");
}

// Whether the other nodes of a group could call this one; whether they get through only they can tell.
static void check_address(struct doctor *d)
{
    char place[COMM_TCP_PLACE];
    struct err err = {.code = ERR_NONE};
    bool spans = false;
    for (int g = 0; g < d->conf->n_groups; g++)
        spans |= d->conf->groups[g].n_nodes > 0;
    if (!spans)
        return;
    const int fd = comm_tcp_listen(d->conf->fleet.address, place, &err);
    if (fd >= 0)
        close(fd);
    doctor_add(d, fd >= 0 ? VERDICT_OK : VERDICT_FAIL, "address",
               fd >= 0 ? NULL : "set [fleet] address to this machine's on the network that the nodes share", "%s%s",
               fd >= 0 ? "other nodes' ranks can call this one at " : "", fd >= 0 ? d->conf->fleet.address : err.text);
}

static void check_threads(struct doctor *d)
{
    cpu_set_t set;
    int threads = 0;
    const int cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
    for (int g = 0; g < d->conf->n_groups; g++)
        threads += d->conf->groups[g].device == CONF_DEVICE_CUDA
                       ? d->conf->groups[g].local_ranks // it feeds the GPU
                       : d->conf->groups[g].local_ranks * conf_group_threads(&d->conf->groups[g]);
    const bool many = cpus > 0 && threads > cpus;
    if (d->conf->n_groups > 0)
        doctor_add(d, many ? VERDICT_WARN : VERDICT_OK, "threads",
                   many ? "set fewer ranks, threads or groups: so many would wait for each other" : NULL,
                   "the groups compute with %d thread%s on %d CPU%s", threads, doctor_s(threads), cpus, doctor_s(cpus));
}

void doctor_fleet(struct doctor *d)
{
    struct err err = {.code = ERR_NONE};
    struct conf *conf = NULL;
    if (conf_load(d->config, &conf, &err) != 0) {
        doctor_add(d, VERDICT_FAIL, "config",
                   err.code == ERR_INVALID ? "ditfleet-supervisor --help lists every key with its bounds"
                                           : "name the file that the supervisor reads, and let this user read it",
                   "%s", err.text);
        return;
    }
    d->conf = conf;
    if (supervisor_check(conf, &err) != 0)
        doctor_add(d, VERDICT_FAIL, "config", "correct the path, or install what it names", "%s", err.text);
    else
        doctor_add(d, VERDICT_OK, "config", NULL, "%s: node %s, %d group%s", d->config, conf->fleet.node,
                   conf->n_groups, doctor_s(conf->n_groups));
    doctor_guard(d, "redis", REDIS_SECONDS, redis_part, "check whether its host answers");
    doctor_guard(d, "state_dir", DISK_SECONDS, directories_part, "a file system hangs: see mount and dmesg");
    check_models(d);
    for (int i = 0; i < conf->n_groups; i++) {
        d->group = &conf->groups[i];
        check_gpu_of(d);
    }
    check_address(d);
    check_threads(d);
    d->conf = NULL;
    d->group = NULL;
    d->model = NULL;
    conf_free(conf);
}
