// The table of every configuration key, and the one reader that fills struct conf from it.
#include "proto/conf.h"

#include <arpa/inet.h>
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <ini.h>
#include <limits.h>
#include <math.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/job.h"

enum type { STRING, SECRET, INT, SECONDS, SIZE, LIST, ENUM };

// NULL when value is fine, else what is allowed.
typedef const char *check(const char *value);
static check check_name, check_redis, check_absolute, check_path_or_empty, check_host_port, check_http, check_model,
    check_listen, check_blocks, check_gpus, check_spot, check_address, check_nodes;

struct key {
    const char *section, *name;
    enum type type;
    size_t offset;              // in struct conf, or in struct conf_group for [group NAME]
    double min, max;            // of the value; of the length in bytes (each item's) for STRING and LIST
    const char *initial;        // as it would be written in a file; NULL: an empty list
    check *check;               // of a STRING, or of each item of a LIST
    const char *const *choices; // ENUM: its names in order, NULL last
    const char *doc;
};

static const char *const devices[] = {"cpu", "cuda", NULL};
static const char *const precisions[] = {"default", "fp32", "bf16", "fp16", "fp8", "int8", NULL};
static const char *const answers[] = {"no", "yes", NULL};
static const char *const weights[] = {"replicated", "sharded", NULL};
static const char *const on_errors[] = {"wait", "refuse", "allow", NULL};
static const char *const levels[] = {"debug", "info", "warn", "error", NULL};

#define AT(field) offsetof(struct conf, field)
#define IN(field) offsetof(struct conf_group, field)
static const struct key keys[] = {
    {"redis", "url", SECRET, AT(redis.url), 1, 180, "redis://127.0.0.1:6379", check_redis,
     .doc = "the Redis server: redis://[user:password@]host[:port][/db], rediss:// (TLS), unix:///path, or found by "
            "sentinels, which are asked without password: sentinel://host[:port],.../master"},
    {"redis", "queue", STRING, AT(redis.queue), 1, 64, "default", check_name,
     .doc = "name of the queue, the tag in its keys dit:{queue}:..."},
    {"fleet", "node", STRING, AT(fleet.node), 0, 64, "", check_name,
     .doc = "name of this node, unique in the fleet; empty: the host name"},
    {"fleet", "address", STRING, AT(fleet.address), 0, 46, "", check_address,
     .doc =
         "IPv4 or IPv6 address by which the other nodes reach this one, on a network of their own: what ranks say to "
         "each other there is not encrypted; needed where a group has nodes"},
    {"fleet", "state_dir", STRING, AT(fleet.state_dir), 1, 90, "/run/ditfleet", check_absolute,
     .doc = "directory of the lock file and the control socket"},
    {"fleet", "worker_program", STRING, AT(fleet.worker_program), 0, 180, "", check_path_or_empty,
     .doc = "absolute path of ditfleet-worker; empty: beside the supervisor's own program"},
    {"node", "spot_notice", STRING, AT(node.spot_notice), 1, 180, "off", check_spot,
     .doc = "who says that this machine is taken back, asked every 5 s; then it drains: ec2, gce, azure "
            "(ec2@http://host:port "
            "asks there), a URL (200: it is; 404: not), a file that appears"},
    {"queue", "lease", SECONDS, AT(queue.lease_s), 1, 3600, "30s",
     .doc = "how long a claimed job stays claimed without a beat"},
    {"queue", "max_attempts", INT, AT(queue.max_attempts), 0, 100, "0",
     .doc = "attempts that a job's own errors may use up, where the job names none; 0: as the queue has it"},
    {"queue", "retention", SECONDS, AT(queue.retention_s), 0, 90 * 86400, "0",
     .doc = "how long a finished job's record and events stay; 0: as the queue has it"},
    {"queue", "max_speed", INT, AT(queue.max_speed), 0, 1e6, "0",
     .doc =
         "GPU-seconds of price that the fastest group does in a second: a job that cannot meet its deadline even so is "
         "refused; 0: as the queue has it, which at first is 64"},
    {"queue", "max_backlog", INT, AT(queue.max_backlog_s), 0, 1e9, "0",
     .doc =
         "GPU-seconds of work that the queue takes, all tenants together; what is more is refused (overloaded); 0: as "
         "the queue has it, which at first is any number"},
    {"upload", "allow", LIST, AT(upload.allow), 1, 180, NULL, check_host_port,
     .doc = "host:port to which uploads may go although its address is loopback, private or link-local"},
    {"upload", "file_roots", LIST, AT(upload.file_roots), 1, 180, NULL, check_absolute,
     .doc = "directories below which a job may have its picture written as a file"},
    {"upload", "retries", INT, AT(upload.retries), 0, 20, "5", .doc = "further tries after an upload failed"},
    {"upload", "timeout", SECONDS, AT(upload.timeout_s), 0.1, 3600, "60s", .doc = "of one try of an upload"},
    {"callback", "secret_file", STRING, AT(callback.secret_file), 0, 180, "", check_path_or_empty,
     .doc = "absolute path of the secrets that sign callbacks, whsec_... in Base64, one a line, for others unreadable; "
            "empty: no callbacks, and jobs that ask for one are refused"},
    {"callback", "allow", LIST, AT(callback.allow), 1, 180, NULL, check_host_port,
     .doc = "host:port that may be called back although its address is loopback, private or link-local"},
    {"callback", "attempts", INT, AT(callback.attempts), 1, 100, "12", .doc = "tries of a callback in all"},
    {"callback", "backoff_min", SECONDS, AT(callback.backoff_min_s), 0.01, 3600, "5s",
     .doc = "wait after the first failed try; doubles with each further one, with jitter"},
    {"callback", "backoff_max", SECONDS, AT(callback.backoff_max_s), 0.01, 86400, "1h",
     .doc = "longest such wait, also where the receiver asks for more"},
    {"callback", "timeout", SECONDS, AT(callback.timeout_s), 0.1, 300, "10s", .doc = "of one try of a callback"},
    {"moderation", "deny_file", STRING, AT(moderation.deny_file), 0, 180, "", check_path_or_empty,
     .doc = "absolute path of what no prompt may hold, a phrase or /PCRE2 pattern/ a line; read again when it changes; "
            "empty: none"},
    {"moderation", "url", SECRET, AT(moderation.url), 0, 180, "", check_http,
     .doc = "http:// or https:// that is asked by a POST whether a prompt is allowed; empty: nobody is asked"},
    {"moderation", "allow", LIST, AT(moderation.allow), 1, 180, NULL, check_host_port,
     .doc = "host:port that may be asked although its address is loopback, private or link-local"},
    {"moderation", "timeout", SECONDS, AT(moderation.timeout_s), 0.05, 60, "2s", .doc = "of one such question"},
    {"moderation", "on_error", ENUM, AT(moderation.on_error), .initial = "wait", .choices = on_errors,
     .doc = "what becomes of a job about which there is no answer: it waits in its door and is asked about again, is "
            "refused, or is let in"},
    {"deadline", "load", SECONDS, AT(deadline.load_s), 0.1, 86400, "120s",
     .doc = "a worker without progress for so long while it starts or loads weights is hung"},
    {"deadline", "text", SECONDS, AT(deadline.text_s), 0.1, 86400, "60s", .doc = "the same, in the text encoders"},
    {"deadline", "denoise", SECONDS, AT(deadline.denoise_s), 0.1, 86400, "120s", .doc = "the same, in one step"},
    {"deadline", "decode", SECONDS, AT(deadline.decode_s), 0.1, 86400, "120s", .doc = "the same, in the VAE"},
    {"deadline", "png", SECONDS, AT(deadline.png_s), 0.1, 86400, "60s", .doc = "the same, encoding the PNG"},
    {"deadline", "upload", SECONDS, AT(deadline.upload_s), 0.1, 86400, "300s",
     .doc = "the same, while only an upload is under way; above upload.timeout"},
    {"restart", "backoff_min", SECONDS, AT(restart.backoff_min_s), 0.01, 3600, "1s",
     .doc = "wait before the first restart of a failed group; doubles with each further failure, with jitter"},
    {"restart", "backoff_max", SECONDS, AT(restart.backoff_max_s), 0.01, 86400, "60s", .doc = "longest such wait"},
    {"restart", "healthy", SECONDS, AT(restart.healthy_s), 0.01, 86400, "60s",
     .doc = "a group ready for so long starts again at backoff_min"},
    {"restart", "grace", SECONDS, AT(restart.grace_s), 0, 86400, "30s",
     .doc = "how long workers may take to finish or release their jobs when told to stop"},
    {"log", "level", ENUM, AT(log.level), .initial = "info", .choices = levels, .doc = "least level that is logged"},
    {"metrics", "listen", STRING, AT(metrics.listen), 0, 60, "", check_listen,
     .doc = "address:port on which /metrics and /healthz are served over HTTP, say 127.0.0.1:9464; empty: nowhere"},
    {"group", "device", ENUM, IN(device), .initial = "cpu", .choices = devices, .doc = "what a rank computes on"},
    {"group", "gpu", STRING, IN(gpu), 0, 180, "", check_gpus,
     .doc =
         "with device = cuda: which one, or which ones, a rank each, as nvidia-smi counts: 0,1; empty: 0. A GPU serves "
         "one group"},
    {"group", "precision", ENUM, IN(precision), .initial = "default", .choices = precisions,
     .doc = "with device = cuda: what all jobs of the group compute in; default: as the model's ditfleet.json says, "
            "else bf16"},
    {"group", "exact", ENUM, IN(exact), .initial = "no", .choices = answers,
     .doc =
         "with device = cuda: yes gives pictures the bits that one GPU gives, by Ulysses and guidance parallelism, at "
         "some cost of speed; CPU ranks are so by themselves"},
    {"group", "ranks", INT, IN(ranks), 1, 64, "1",
     .doc = "processes that make one image together; with device = cuda as many as GPUs, which need not be said"},
    {"group", "nodes", STRING, IN(nodes), 0, 180, "", check_nodes,
     .doc =
         "nodes that the group spans, in the order of its ranks, and how many each has: a:2, b:2; each node's file has "
         "this line. Rank 0's node claims the jobs. Empty: this node alone"},
    {"group", "threads", INT, IN(threads), 0, 1024, "0",
     .doc = "threads that a rank computes with; 0: cores / ranks, at least 1"},
    {"group", "model", LIST, IN(model), 1, 180, NULL, check_model,
     .doc = "name@version=directory of a model in diffusers format (relative: to this file); at least one"},
    {"group", "cfg_degree", INT, IN(cfg_degree), 0, 2, "0",
     .doc = "guidance branches apart; 0: the planner decides. With 2 a job of one branch is made as if no degree but "
            "PipeFusion's were set"},
    {"group", "ulysses_degree", INT, IN(ulysses_degree), 0, 64, "0",
     .doc = "ranks that share attention heads; 0: the planner decides"},
    {"group", "ring_degree", INT, IN(ring_degree), 0, 64, "0",
     .doc = "groups of such ranks that pass keys and values round; 0: the planner decides"},
    {"group", "pipefusion_degree", INT, IN(pipefusion_degree), 1, 64, "1",
     .doc = "stages that share the blocks (PipeFusion): pictures close to those of one rank, not equal; 1: none"},
    {"group", "num_pipeline_patch", INT, IN(num_pipeline_patch), 0, 64, "0",
     .doc = "patches that follow each other through the stages; 0: as many as stages"},
    {"group", "pipefusion_blocks", STRING, IN(pipefusion_blocks), 0, 180, "", check_blocks,
     .doc = "how many blocks each stage has, so that unequal GPUs can share a model: 2,4; empty: as even as can be"},
    {"group", "warmup_steps", INT, IN(warmup_steps), 1, 1000, "1",
     .doc = "steps that take the image whole before its patches follow each other"},
    {"group", "data_degree", INT, IN(data_degree), 0, 64, "0",
     .doc = "parts that make a job's images side by side; 0: as many as its images can be dealt to. A job whose images "
            "cannot be dealt to so many is made as if no degree were set; by stages it is refused"},
    {"group", "weights", ENUM, IN(weights), .initial = "replicated", .choices = weights,
     .doc =
         "of transformers; sharded: a rank has its part of each block's, which are gathered just ahead of use, for a "
         "model larger than a GPU; replicated: all, or with pipefusion_degree those of its stage"},
    {"group", "slab", SIZE, IN(slab_bytes), 64 * 1024, 1 << 30, "4M",
     .doc = "each rank's window in the memory that the ranks share"},
    {"group", "memory_budget", SIZE, IN(memory_budget), 0, CONF_MAX_BYTES, "0",
     .doc = "of each GPU's memory, what a rank may take for everything; 0: all that is free. Not for device = cpu"},
};
#undef AT
#undef IN
enum { KEYS = sizeof keys / sizeof *keys };

// What is known while a file is read.
struct parser {
    struct conf *conf;
    const char *name;   // of the file, for errors
    const char *text;   // what is left to read
    int line;           // of the line read last
    int (*lines)[KEYS]; // (1 + n_groups): where each key was set, 0: not yet; row 0 is every section but the groups
    struct err *err;
    int failed; // enum err_code of the first failure
};

// ---- checks of single values

static bool name_bytes(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!isalnum((unsigned char)s[i]) && !strchr("._-", s[i]))
            return false;
    return n > 0 && n <= 64;
}

static const char *check_name(const char *v)
{
    return !*v || name_bytes(v, strlen(v)) ? NULL : "1 to 64 letters, digits, '.', '_' and '-'";
}

static const char *check_redis(const char *v)
{
    const char *rest = strstr(v, "://");
    bool known = strncmp(v, "redis://", 8) == 0 || strncmp(v, "rediss://", 9) == 0 || strncmp(v, "unix:///", 8) == 0 ||
                 strncmp(v, "sentinel://", 11) == 0;
    return known && rest[3] ? NULL
                            : "redis://host[:port][/db], rediss://host[:port][/db], unix:///path or "
                              "sentinel://host[:port],.../master";
}

static const char *check_absolute(const char *v)
{
    return *v == '/' ? NULL : "an absolute path";
}

static const char *check_path_or_empty(const char *v)
{
    return !*v || *v == '/' ? NULL : "an absolute path, or nothing";
}

static const char *check_host_port(const char *v)
{
    const char *allowed = "host:port with a port from 1 to 65535 ([address]:port for IPv6)";
    const char *colon = strrchr(v, ':');
    if (!colon || colon == v || !isdigit((unsigned char)colon[1]))
        return allowed;
    char *end = NULL;
    long port = strtol(colon + 1, &end, 10);
    bool bare_ipv6 = memchr(v, ':', (size_t)(colon - v)) && !(*v == '[' && colon[-1] == ']');
    return *end || port < 1 || port > 65535 || bare_ipv6 || strpbrk(v, "/@ ") ? allowed : NULL;
}

static const char *check_http(const char *v)
{
    return !*v || strncmp(v, "http://", 7) == 0 || strncmp(v, "https://", 8) == 0
               ? NULL
               : "http://..., https://..., or nothing";
}

static const char *check_spot(const char *v)
{
    static const char *const clouds[] = {"ec2", "gce", "azure"};
    const char *at = strchr(v, '@'), *url = at ? at + 1 : v;
    const size_t n = at ? (size_t)(at - v) : strlen(v);
    bool cloud = false;
    for (size_t i = 0; i < sizeof clouds / sizeof *clouds; i++)
        cloud |= strlen(clouds[i]) == n && strncmp(v, clouds[i], n) == 0;
    const char *host = strstr(url, "://");
    const bool is_url = *url && !check_http(url) && host && host[3] && !strpbrk(url, " @");
    return strcmp(v, "off") == 0 || (*v == '/' && v[1]) || (cloud && !at) || (is_url && (cloud || !at))
               ? NULL
               : "off, ec2, gce, azure, one of these with @http://host[:port], http(s)://..., or an absolute path";
}

// An address, since a name could mean several; port 0 takes a free one, which the log tells.
static const char *check_listen(const char *v)
{
    static const char allowed[] = "address:port, say 127.0.0.1:9464, 0.0.0.0:9464 or [::]:9464; or nothing";
    unsigned char bytes[sizeof(struct in6_addr)];
    char host[64];
    const char *colon = strrchr(v, ':');
    if (!*v)
        return NULL;
    if (!colon || !isdigit((unsigned char)colon[1]) || strlen(colon) > 6)
        return allowed;
    char *end = NULL;
    const long port = strtol(colon + 1, &end, 10);
    const bool ipv6 = *v == '[' && colon > v && colon[-1] == ']';
    snprintf(host, sizeof host, "%.*s", (int)(colon - v) - 2 * ipv6, v + ipv6);
    return *end || port > 65535 || inet_pton(ipv6 ? AF_INET6 : AF_INET, host, bytes) != 1 ? allowed : NULL;
}

int conf_numbers(const char *text, long least, long greatest, short *out, int most)
{
    int n = 0;
    for (const char *at = text; *at; n++) {
        char *end = NULL;
        const long count = isdigit((unsigned char)at[*at == ' ']) ? strtol(at, &end, 10) : -1;
        if (count < least || count > greatest || n == most || (*end && (*end != ',' || !end[1])))
            return -1;
        out[n] = (short)count;
        at = *end ? end + 1 : end;
    }
    return n;
}

static const char *check_blocks(const char *v)
{
    short counts[64];
    return conf_numbers(v, 1, 1000, counts, 64) >= 0
               ? NULL
               : "1 to 64 whole numbers from 1 to 1000, one for each stage, commas between them: 2,4";
}

static const char *check_gpus(const char *v)
{
    short gpus[CONF_MAX_GPUS];
    const int n = conf_numbers(v, 0, CONF_MAX_GPUS - 1, gpus, CONF_MAX_GPUS);
    for (int i = 1; i < n; i++)
        for (int j = 0; j < i; j++)
            if (gpus[i] == gpus[j])
                return "each GPU once";
    return n >= 0 ? NULL : "whole numbers from 0 to 63, commas between them: 0,1";
}

static const char *check_address(const char *v)
{
    unsigned char bytes[sizeof(struct in6_addr)];
    return !*v || inet_pton(AF_INET, v, bytes) == 1 || inet_pton(AF_INET6, v, bytes) == 1
               ? NULL
               : "an IPv4 or IPv6 address, say 10.0.0.1 or fd00::1; or nothing";
}

// Nodes of text, which has been checked where out is not NULL: how many, -1: it is none such.
static int read_nodes(const char *text, struct conf_node *out)
{
    int n = 0, ranks = 0;
    for (const char *at = text; *at; n++) {
        at += strspn(at, " ");
        const char *colon = at + strcspn(at, ":,");
        char *end = NULL;
        const long count = *colon == ':' && isdigit((unsigned char)colon[1]) ? strtol(colon + 1, &end, 10) : 0;
        if (n == CONF_MAX_NODES || count < 1 || !name_bytes(at, (size_t)(colon - at)) || (ranks += (int)count) > 64 ||
            count > 64 || (*end && (*end != ',' || !end[1])))
            return -1;
        if (out) {
            snprintf(out[n].name, sizeof out[n].name, "%.*s", (int)(colon - at), at);
            out[n].ranks = (int)count;
        }
        at = *end ? end + 1 : end;
    }
    return n;
}

static const char *check_nodes(const char *v)
{
    const int n = read_nodes(v, NULL);
    return n == 0 || n > 1 ? NULL
                           : "two or more NODE:RANKS, commas between them, 64 ranks in all: a:2, b:2; or nothing";
}

static const char *check_model(const char *v)
{
    const char *at = strchr(v, '@'), *equals = strchr(v, '=');
    if (!at || !equals || equals < at || !name_bytes(v, (size_t)(at - v)) ||
        !name_bytes(at + 1, (size_t)(equals - at - 1)) || !equals[1])
        return "name@version=directory, name and version of letters, digits, '.', '_' and '-'";
    return NULL;
}

// ---- setting a value

static int fail_at(struct parser *p, int line, enum err_code code, const char *section, const char *key,
                   const char *what)
{
    if (p->failed)
        return p->failed;
    if (section)
        err_set(p->err, code, "%.200s:%d: [%.80s] %.40s%s%s", p->name, line, section, key, *key ? " " : "", what);
    else
        err_set(p->err, code, "%.200s:%d: %s", p->name, line, what);
    return p->failed = code;
}

static void describe(const struct key *k, char *out, size_t n)
{
    switch (k->type) {
    case STRING:
    case SECRET:
    case LIST:
        snprintf(out, n, "%s%.0f to %.0f bytes", k->type == LIST ? "a comma-separated list, each item " : "", k->min,
                 k->max);
        break;
    case INT:
        snprintf(out, n, "a whole number from %.0f to %.0f", k->min, k->max);
        break;
    case SECONDS:
        snprintf(out, n, "%gs to %gs, written like 500ms, 30s, 5m, 2h or 1d", k->min, k->max);
        break;
    case SIZE:
        snprintf(out, n, "%.0fK to %.0fK bytes, written like 64K, 4M, 1G or 1GiB", k->min / 1024, k->max / 1024);
        break;
    case ENUM:
        n -= (size_t)snprintf(out, n, "one of");
        out += strlen(out);
        for (int i = 0; k->choices[i]; i++, out += strlen(out))
            n -= (size_t)snprintf(out, n, " %s", k->choices[i]);
        break;
    }
}

struct unit {
    const char *name;
    double factor;
};
static const struct unit seconds_units[] = {{"", 1}, {"ms", 1e-3}, {"s", 1}, {"m", 60}, {"h", 3600}, {"d", 86400}, {0}};
static const struct unit size_units[] = {{"", 1},       {"K", 1024},      {"M", 1 << 20},   {"G", 1 << 30},
                                         {"KiB", 1024}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {0}};
static const struct unit no_units[] = {{"", 1}, {0}};

static bool parse_number(const char *v, const struct key *k, const struct unit *units, double *out)
{
    char *end = NULL;
    if (!isdigit((unsigned char)*v) && *v != '.') // strtod would take "inf", "nan", hexadecimal and blanks
        return false;
    if (strpbrk(v, "xXeE"))
        return false;
    double number = strtod(v, &end);
    for (; units->name; units++)
        if (strcmp(end, units->name) == 0) {
            *out = number * units->factor;
            bool whole = k->type == SECONDS || floor(*out) == *out;
            return whole && *out >= k->min && *out <= k->max;
        }
    return false;
}

bool conf_size(const char *text, int64_t *bytes)
{
    const struct key any = {.type = SIZE, .min = 0, .max = CONF_MAX_BYTES};
    double number = 0;
    if (!parse_number(text, &any, size_units, &number))
        return false;
    *bytes = (int64_t)number;
    return true;
}

static bool parse_enum(const char *v, const struct key *k, int *out)
{
    for (int i = 0; k->choices[i]; i++)
        if (strcmp(v, k->choices[i]) == 0) {
            *out = i;
            return true;
        }
    return false;
}

static int list_add(struct conf_list *list, const char *item, size_t n)
{
    char **items = realloc(list->items, sizeof *items * (size_t)(list->count + 2));
    if (!items)
        return ERR_NO_MEMORY;
    list->items = items;
    items[list->count] = strndup(item, n);
    if (!items[list->count])
        return ERR_NO_MEMORY;
    items[++list->count] = NULL;
    return 0;
}

// Says that value is wrong for k; allowed NULL: the row's bounds.
static int refuse(struct parser *p, const struct key *k, const char *section, const char *value, const char *allowed)
{
    char bounds[200], what[360];
    if (!allowed) {
        describe(k, bounds, sizeof bounds);
        allowed = bounds;
    }
    if (k->type == SECRET)
        snprintf(what, sizeof what, "has a value that is not allowed; allowed: %s", allowed);
    else
        snprintf(what, sizeof what, "= \"%.80s\" is not allowed; allowed: %s", value, allowed);
    return fail_at(p, p->line, ERR_INVALID, section, k->name, what);
}

static const char *check_text(const struct key *k, const char *v)
{
    static const char printable[] = "printable text";
    size_t n = strlen(v);
    for (const char *c = v; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            return printable;
    if ((double)n < k->min || (double)n > k->max)
        return ""; // the row's bounds
    return k->check ? k->check(v) : NULL;
}

static int set_string(struct parser *p, const struct key *k, const char *section, const char *v, char **field)
{
    const char *allowed = check_text(k, v);
    if (allowed)
        return refuse(p, k, section, v, *allowed ? allowed : NULL);
    free(*field);
    *field = strdup(v);
    return *field ? 0 : fail_at(p, p->line, ERR_NO_MEMORY, section, k->name, "out of memory");
}

static int set_list(struct parser *p, const struct key *k, const char *section, const char *v, struct conf_list *list)
{
    while (*v) {
        v += strspn(v, ", \t");
        size_t n = strcspn(v, ",");
        const char *next = v + n;
        while (n > 0 && isspace((unsigned char)v[n - 1]))
            n--;
        if (n > 0) {
            if (list_add(list, v, n))
                return fail_at(p, p->line, ERR_NO_MEMORY, section, k->name, "out of memory");
            const char *allowed = check_text(k, list->items[list->count - 1]);
            if (allowed)
                return refuse(p, k, section, list->items[list->count - 1], *allowed ? allowed : NULL);
        }
        v = next;
    }
    return 0;
}

static int set_value(struct parser *p, const struct key *k, const char *section, void *base, const char *v)
{
    void *field = (char *)base + k->offset;
    double number = 0;
    switch (k->type) {
    case STRING:
    case SECRET:
        return set_string(p, k, section, v, field);
    case LIST:
        return set_list(p, k, section, v, field);
    case ENUM:
        return parse_enum(v, k, field) ? 0 : refuse(p, k, section, v, NULL);
    case INT:
        if (!parse_number(v, k, no_units, &number))
            return refuse(p, k, section, v, NULL);
        *(int *)field = (int)number;
        return 0;
    case SIZE:
        if (!parse_number(v, k, size_units, &number))
            return refuse(p, k, section, v, NULL);
        *(int64_t *)field = (int64_t)number;
        return 0;
    case SECONDS:
        if (!parse_number(v, k, seconds_units, &number))
            return refuse(p, k, section, v, NULL);
        *(double *)field = number;
        return 0;
    }
    return ERR_INTERNAL;
}

// Fills base with the defaults of the rows of [group] or of all other sections.
static int set_defaults(struct parser *p, void *base, bool group)
{
    for (const struct key *k = keys; k < keys + KEYS; k++)
        if ((strcmp(k->section, "group") == 0) == group && k->initial)
            TRY(set_value(p, k, k->section, base, k->initial));
    return 0;
}

// ---- sections

// The index of [group NAME], made when new; -1 after a failure.
static int open_group(struct parser *p, const char *section)
{
    const char *name = section + 5 + strspn(section + 5, " \t");
    // No dot: in "node.group" the last dot parts the two.
    if (!name_bytes(name, strlen(name)) || strlen(name) > 60 || strchr(name, '.')) {
        fail_at(p, p->line, ERR_INVALID, section, "",
                "needs a name: [group NAME], 1 to 60 letters, digits, '_' and '-'");
        return -1;
    }
    struct conf *c = p->conf;
    for (int i = 0; i < c->n_groups; i++)
        if (strcmp(c->groups[i].name, name) == 0)
            return i;
    struct conf_group *groups = realloc(c->groups, sizeof *groups * (size_t)(c->n_groups + 1));
    if (groups)
        c->groups = groups;
    int(*lines)[KEYS] = realloc(p->lines, sizeof *lines * (size_t)(c->n_groups + 2));
    if (lines)
        p->lines = lines;
    char *own_name = groups && lines ? strdup(name) : NULL;
    if (!own_name) {
        fail_at(p, p->line, ERR_NO_MEMORY, section, "", "out of memory");
        return -1;
    }
    memset(lines[c->n_groups + 1], 0, sizeof *lines);
    struct conf_group *g = &groups[c->n_groups];
    *g = (struct conf_group){.name = own_name};
    c->n_groups++;
    return set_defaults(p, g, true) == 0 ? c->n_groups - 1 : -1;
}

// Whether the section exists; opens groups. An empty section is as good as one with keys.
static bool open_section(struct parser *p, const char *section)
{
    if (strncmp(section, "group", 5) == 0 && (section[5] == 0 || section[5] == ' ' || section[5] == '\t'))
        return open_group(p, section) >= 0;
    for (const struct key *k = keys; k < keys + KEYS; k++)
        if (strcmp(k->section, section) == 0)
            return true;
    char what[300] = "is no section; allowed:";
    const char *last = "";
    for (const struct key *k = keys; k < keys + KEYS; k++) {
        if (strcmp(last, k->section) != 0)
            snprintf(what + strlen(what), sizeof what - strlen(what), " [%s%s]", k->section,
                     strcmp(k->section, "group") == 0 ? " NAME" : "");
        last = k->section;
    }
    fail_at(p, p->line, ERR_INVALID, section, "", what);
    return false;
}

static void refuse_key(struct parser *p, const char *section, const char *base, const char *name)
{
    char what[400] = "is no key of this section; allowed:";
    for (const struct key *k = keys; k < keys + KEYS; k++)
        if (strcmp(k->section, base) == 0)
            snprintf(what + strlen(what), sizeof what - strlen(what), " %s", k->name);
    fail_at(p, p->line, ERR_INVALID, section, name, what);
}

// inih calls this for every "name = value". Returns 1 always: the first failure is kept in the parser.
static int take_pair(void *user, const char *section, const char *name, const char *value)
{
    struct parser *p = user;
    if (p->failed || !open_section(p, section))
        return 1;
    bool in_group = strncmp(section, "group", 5) == 0;
    int row = in_group ? open_group(p, section) + 1 : 0;
    void *base = in_group ? (void *)&p->conf->groups[row - 1] : (void *)p->conf;
    const char *kind = in_group ? "group" : section;
    for (int i = 0; i < KEYS; i++) {
        if (strcmp(keys[i].section, kind) != 0 || strcmp(keys[i].name, name) != 0)
            continue;
        if (p->lines[row][i] && keys[i].type != LIST) {
            char what[64];
            snprintf(what, sizeof what, "is set twice, first in line %d; set it once", p->lines[row][i]);
            fail_at(p, p->line, ERR_INVALID, section, name, what);
            return 1;
        }
        p->lines[row][i] = p->line;
        set_value(p, &keys[i], section, base, value);
        return 1;
    }
    refuse_key(p, section, kind, name);
    return 1;
}

// inih asks for a line, as of fgets. Counts lines, and sees what inih hides: lines it would cut, empty sections.
static char *next_line(char *out, int room, void *stream)
{
    struct parser *p = stream;
    size_t n = strcspn(p->text, "\n");
    if (!*p->text || p->failed)
        return NULL;
    p->line++;
    if (n + 2 > (size_t)room) {
        char what[80];
        snprintf(what, sizeof what, "the line is longer than %d bytes; shorten it", room - 2);
        fail_at(p, p->line, ERR_INVALID, NULL, "", what);
        return NULL;
    }
    memcpy(out, p->text, n);
    out[n] = '\n';
    out[n + 1] = 0;
    p->text += n + (p->text[n] == '\n');
    const char *start = out + strspn(out, " \t");
    char section[256] = "", bracket = 0;
    if (*start == '[' && (sscanf(start + 1, "%255[^]\n]%c", section, &bracket) != 2 || bracket != ']')) {
        fail_at(p, p->line, ERR_INVALID, NULL, "", "is neither [section] nor key = value nor a comment");
        return NULL;
    }
    if (*start == '[' && !open_section(p, section))
        return NULL;
    return out;
}

// ---- after the last line

// A relative path means: from the configuration file's directory. malloc.
static char *beside_file(const char *file, const char *path)
{
    char *out = NULL;
    const char *slash = strrchr(file, '/');
    if (*path == '/' || !slash)
        return strdup(path);
    return asprintf(&out, "%.*s/%s", (int)(slash - file), file, path) >= 0 ? out : NULL;
}

static void name_section(const struct conf_group *g, char section[80])
{
    snprintf(section, 80, "group %s", g->name);
}

static int split_models(struct parser *p, struct conf_group *g)
{
    char section[80];
    name_section(g, section);
    if (g->model.count == 0)
        return fail_at(p, p->line, ERR_INVALID, section, "model", "is missing: name@version=directory, at least one");
    g->models = calloc((size_t)g->model.count, sizeof *g->models);
    if (!g->models)
        return fail_at(p, p->line, ERR_NO_MEMORY, section, "model", "out of memory");
    for (int i = 0; i < g->model.count; i++) {
        const char *v = g->model.items[i], *at = strchr(v, '@'), *equals = strchr(v, '=');
        struct conf_model *m = &g->models[i];
        *m = (struct conf_model){strndup(v, (size_t)(at - v)), strndup(at + 1, (size_t)(equals - at - 1)),
                                 beside_file(p->conf->path, equals + 1)};
        if (!m->name || !m->version || !m->directory)
            return fail_at(p, p->line, ERR_NO_MEMORY, section, "model", "out of memory");
        for (int j = 0; j < i; j++)
            if (strcmp(g->models[j].name, m->name) == 0 && strcmp(g->models[j].version, m->version) == 0)
                return fail_at(p, p->line, ERR_INVALID, section, "model", "names the same name@version twice");
    }
    return 0;
}

// Which of the ranks are this node's.
static int place_ranks(struct parser *p, struct conf_group *g)
{
    char section[80], what[200];
    int ranks = 0;
    name_section(g, section);
    g->local_ranks = g->ranks;
    if (!*g->nodes)
        return 0;
    g->n_nodes = read_nodes(g->nodes, g->spans);
    g->my_node = -1;
    for (int i = 0; i < g->n_nodes; ranks += g->spans[i++].ranks) {
        for (int j = 0; j < i; j++)
            if (strcmp(g->spans[i].name, g->spans[j].name) == 0)
                return fail_at(p, p->line, ERR_INVALID, section, "nodes",
                               "names a node twice; give all its ranks once");
        if (strcmp(g->spans[i].name, p->conf->fleet.node) != 0)
            continue;
        g->my_node = i;
        g->first_rank = ranks;
        g->local_ranks = g->spans[i].ranks;
    }
    if (g->my_node < 0) {
        snprintf(what, sizeof what, "does not name this node, which is %.64s ([fleet] node)", p->conf->fleet.node);
        return fail_at(p, p->line, ERR_INVALID, section, "nodes", what);
    }
    if (g->ranks != 1 && g->ranks != ranks) {
        snprintf(what, sizeof what, "is %d, and nodes has %d; leave it out", g->ranks, ranks);
        return fail_at(p, p->line, ERR_INVALID, section, "ranks", what);
    }
    g->ranks = ranks;
    return *p->conf->fleet.address ? 0
                                   : fail_at(p, p->line, ERR_INVALID, "fleet", "address",
                                             "is needed: a group has nodes, and the others have to reach this one");
}

// The GPUs of a group: one for each rank, none of them another's.
static int check_gpu_ranks(struct parser *p, struct conf_group *g)
{
    char section[80], what[200];
    name_section(g, section);
    g->n_gpus = conf_numbers(*g->gpu ? g->gpu : "0", 0, CONF_MAX_GPUS - 1, g->gpus, CONF_MAX_GPUS);
    if (g->n_nodes > 0 && g->local_ranks != g->n_gpus) {
        snprintf(what, sizeof what, "names %d for the %d ranks of this node; there is one for each", g->n_gpus,
                 g->local_ranks);
        return fail_at(p, p->line, ERR_INVALID, section, "gpu", what);
    }
    if (g->n_nodes == 0 && g->ranks != 1 && g->ranks != g->n_gpus) {
        snprintf(what, sizeof what, "is %d; with device = cuda there is one for each GPU, and gpu names %d", g->ranks,
                 g->n_gpus);
        return fail_at(p, p->line, ERR_INVALID, section, "ranks", what);
    }
    if (g->n_nodes == 0)
        g->ranks = g->local_ranks = g->n_gpus;
    for (const struct conf_group *other = p->conf->groups; other < g; other++)
        for (int i = 0; i < g->n_gpus; i++)
            for (int j = 0; j < other->n_gpus; j++)
                if (g->gpus[i] == other->gpus[j]) {
                    snprintf(what, sizeof what, "%d is [group %s]'s already; give each group GPUs of its own",
                             g->gpus[i], other->name);
                    return fail_at(p, p->line, ERR_INVALID, section, "gpu", what);
                }
    return 0;
}

// What a device allows. p->line is the file's last: the values are known only now.
static int check_device(struct parser *p, struct conf_group *g)
{
    char section[80];
    name_section(g, section);
    if (g->device == CONF_DEVICE_CPU) {
        if (g->memory_budget)
            return fail_at(p, p->line, ERR_INVALID, section, "memory_budget", "is of a GPU's memory; device is cpu");
        if (g->exact)
            return fail_at(p, p->line, ERR_INVALID, section, "exact", "is for device = cuda; device is cpu");
        if (*g->gpu)
            return fail_at(p, p->line, ERR_INVALID, section, "gpu", "is for device = cuda; device is cpu");
        if (g->precision > DITFLEET__V1__PRECISION__PRECISION_FP32)
            return fail_at(p, p->line, ERR_INVALID, section, "precision",
                           "is for device = cuda; device is cpu, which computes in fp32");
        return 0;
    }
    return check_gpu_ranks(p, g);
}

static int check_weights(struct parser *p, const struct conf_group *g)
{
    char section[80];
    name_section(g, section);
    if (!g->weights)
        return 0;
    if (g->ranks == 1)
        return fail_at(p, p->line, ERR_INVALID, section, "weights", "= sharded needs ranks of 2 or more");
    if (g->pipefusion_degree > 1 || g->num_pipeline_patch > 1)
        return fail_at(p, p->line, ERR_INVALID, section, "weights",
                       "= sharded cannot be with PipeFusion, whose stages have their own blocks' weights already");
    return 0;
}

static int finish(struct parser *p)
{
    struct conf *c = p->conf;
    if (!*c->fleet.node) {
        char host[65] = "";
        if (gethostname(host, sizeof host - 1) != 0 || !name_bytes(host, strlen(host)))
            return fail_at(p, p->line, ERR_INVALID, "fleet", "node", "is needed: the host name cannot serve as one");
        free(c->fleet.node);
        c->fleet.node = strdup(host);
    }
    if (!c->fleet.node)
        return fail_at(p, p->line, ERR_NO_MEMORY, "fleet", "node", "out of memory");
    if (c->restart.backoff_max_s < c->restart.backoff_min_s)
        return fail_at(p, p->line, ERR_INVALID, "restart", "backoff_max", "is below backoff_min");
    if (c->callback.backoff_max_s < c->callback.backoff_min_s)
        return fail_at(p, p->line, ERR_INVALID, "callback", "backoff_max", "is below backoff_min");
    for (int i = 0; i < c->n_groups; i++) {
        TRY(place_ranks(p, &c->groups[i]));
        TRY(check_device(p, &c->groups[i]));
        TRY(check_weights(p, &c->groups[i]));
        TRY(split_models(p, &c->groups[i]));
    }
    return 0;
}

int conf_parse(const char *text, const char *name, struct conf **out, struct err *err)
{
    static_assert(LOG_DEBUG == 0 && LOG_ERROR == 3, "levels[] is in the order of enum log_level");
    static_assert(CONF_ON_ERROR_WAIT == 0 && CONF_ON_ERROR_ALLOW == 2, "on_errors[] is in the order of the enum");
    static_assert(DITFLEET__V1__PRECISION__PRECISION_DEFAULT == 0 && DITFLEET__V1__PRECISION__PRECISION_INT8 == 5,
                  "precisions[] is in the order of the job's");
    struct parser p = {.name = name, .text = text, .err = err};
    p.conf = calloc(1, sizeof *p.conf);
    p.lines = calloc(1, sizeof *p.lines);
    if (!p.conf || !p.lines || !(p.conf->path = strdup(name))) {
        conf_free(p.conf);
        free(p.lines);
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", name);
    }
    if (set_defaults(&p, p.conf, false) == 0) {
        int bad = ini_parse_stream(next_line, &p, take_pair, &p);
        if (bad > 0 && !p.failed)
            fail_at(&p, bad, ERR_INVALID, NULL, "", "is neither [section] nor key = value nor a comment");
    }
    if (!p.failed)
        finish(&p);
    free(p.lines);
    if (p.failed) {
        conf_free(p.conf);
        return p.failed;
    }
    *out = p.conf;
    return 0;
}

static int read_text(FILE *f, const char *path, char *text, size_t limit, struct err *err)
{
    size_t n = fread(text, 1, limit, f);
    if (ferror(f))
        return err_set(err, ERR_IO, "%s: cannot read the configuration file: %s", path, strerror(errno));
    if (n == limit || memchr(text, 0, n))
        return err_set(err, ERR_INVALID, "%s: not a configuration file: NUL bytes or more than 1 MB", path);
    text[n] = 0;
    return 0;
}

int conf_load(const char *path, struct conf **out, struct err *err)
{
    enum { LIMIT = 1 << 20 };
    FILE *f = fopen(path, "re");
    if (!f)
        return err_set(err, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: cannot open the configuration file: %s",
                       path, strerror(errno));
    char *text = malloc(LIMIT + 1), *absolute = realpath(path, NULL);
    int rc = ERR_NO_MEMORY;
    if (!text || !absolute)
        err_set(err, rc, "%s: out of memory", path);
    else if ((rc = read_text(f, path, text, LIMIT, err)) == 0)
        rc = conf_parse(text, absolute, out, err);
    fclose(f);
    free(text);
    free(absolute);
    return rc;
}

static void free_rows(void *base, bool group)
{
    for (const struct key *k = keys; k < keys + KEYS; k++) {
        if ((strcmp(k->section, "group") == 0) != group)
            continue;
        void *field = (char *)base + k->offset;
        if (k->type == STRING || k->type == SECRET)
            free(*(char **)field);
        if (k->type == LIST) {
            struct conf_list *list = field;
            for (int i = 0; i < list->count; i++)
                free(list->items[i]);
            free((void *)list->items);
        }
    }
}

void conf_free(struct conf *c)
{
    if (!c)
        return;
    for (int i = 0; i < c->n_groups; i++) {
        struct conf_group *g = &c->groups[i];
        for (int m = 0; g->models && m < g->model.count; m++) {
            free(g->models[m].name);
            free(g->models[m].version);
            free(g->models[m].directory);
        }
        free(g->models);
        free_rows(g, true);
        free(g->name);
    }
    free_rows(c, false);
    free(c->groups);
    free(c->path);
    free(c);
}

// ---- what callers ask

void conf_each_key(conf_on_key *on_key, void *arg)
{
    for (const struct key *k = keys; k < keys + KEYS; k++) {
        char bounds[200];
        describe(k, bounds, sizeof bounds);
        on_key(arg, &(struct conf_key){k->section, k->name, k->doc, bounds, k->initial ? k->initial : ""});
    }
}

struct doc {
    FILE *to;
    char section[32]; // of the row before
};

static void print_key(void *arg, const struct conf_key *k)
{
    struct doc *d = arg;
    if (strcmp(d->section, k->section) != 0)
        fprintf(d->to, "%s#[%s%s]\n", *d->section ? "\n" : "", k->section,
                strcmp(k->section, "group") == 0 ? " NAME" : "");
    snprintf(d->section, sizeof d->section, "%s", k->section);
    fprintf(d->to, "# %s.\n#   %s\n#%s = %s\n", k->doc, k->allowed, k->name, k->initial);
}

void conf_print_doc(FILE *to)
{
    struct doc d = {.to = to};
    conf_each_key(print_key, &d);
}

const struct conf_group *conf_group_find(const struct conf *c, const char *name)
{
    for (int i = 0; i < c->n_groups; i++)
        if (strcmp(c->groups[i].name, name) == 0)
            return &c->groups[i];
    return NULL;
}

int conf_group_threads(const struct conf_group *g)
{
    cpu_set_t cpus;
    if (g->threads > 0)
        return g->threads;
    int cores = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : (int)sysconf(_SC_NPROCESSORS_ONLN);
    return cores / g->local_ranks > 1 ? cores / g->local_ranks : 1;
}

const char *conf_worker_id(const struct conf *c, const char *group, char out[CONF_WORKER_ID_BYTES])
{
    const struct conf_group *g = conf_group_find(c, group);
    snprintf(out, CONF_WORKER_ID_BYTES, "%s.%s", g && g->n_nodes > 0 ? g->spans[0].name : c->fleet.node, group);
    return out;
}

static void print_value(FILE *to, const struct key *k, const void *field)
{
    const struct conf_list *list = field;
    fprintf(to, "%s.%s=", k->section, k->name);
    switch (k->type) {
    case STRING:
    case SECRET:
        fputs(*(char *const *)field, to);
        break;
    case INT:
    case ENUM:
        fprintf(to, "%d", *(const int *)field);
        break;
    case SECONDS:
        fprintf(to, "%.17g", *(const double *)field);
        break;
    case SIZE:
        fprintf(to, "%lld", (long long)*(const int64_t *)field);
        break;
    case LIST:
        for (int i = 0; i < list->count; i++)
            fprintf(to, "%s,", list->items[i]);
        break;
    }
    fputc('\n', to);
}

static bool is_among(const char *name, const char *const *names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(name, names[i]) == 0)
            return true;
    return false;
}
#define IS_AMONG(name, names) is_among(name, names, sizeof(names) / sizeof *(names))

static char *close_text(FILE *to, char **text)
{
    if (fclose(to) != 0) {
        free(*text);
        return NULL;
    }
    return *text;
}

char *conf_group_fingerprint(const struct conf *c, const struct conf_group *g)
{
    static const char *const read_by_workers[] = {"queue", "upload", "moderation", "deadline", "log"};
    char *text = NULL;
    size_t n = 0;
    FILE *to = open_memstream(&text, &n);
    if (!to)
        return NULL;
    for (const struct key *k = keys; k < keys + KEYS; k++) {
        const bool group = strcmp(k->section, "group") == 0;
        if (group || IS_AMONG(k->section, read_by_workers))
            print_value(to, k, group ? (const char *)g + k->offset : (const char *)c + k->offset);
    }
    fprintf(to, "callbacks=%d\n", *c->callback.secret_file != 0); // all that admission asks about them
    return close_text(to, &text);
}

char *conf_group_terms(const struct conf_group *g)
{
    static const char *const each_nodes_own[] = {"gpu", "ranks", "threads", "model", "slab", "memory_budget"};
    char *text = NULL;
    size_t n = 0;
    FILE *to = open_memstream(&text, &n);
    if (!to)
        return NULL;
    for (const struct key *k = keys; k < keys + KEYS; k++)
        if (strcmp(k->section, "group") == 0 && !IS_AMONG(k->name, each_nodes_own))
            print_value(to, k, (const char *)g + k->offset);
    for (int i = 0; i < g->model.count; i++)
        fprintf(to, "group.model=%s@%s\n", g->models[i].name, g->models[i].version);
    return close_text(to, &text);
}
