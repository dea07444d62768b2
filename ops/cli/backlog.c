// ditfleet backlog: what waits and what is in work, a line a pool, for scripts and for whoever scales the fleet.
#include <inttypes.h>
#include <stdlib.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"

static void add(struct queue_pool *sum, const struct queue_pool *p)
{
    sum->queued += p->queued;
    sum->delayed += p->delayed;
    sum->working += p->working;
    sum->queued_ms += p->queued_ms;
    sum->delayed_ms += p->delayed_ms;
    sum->working_ms += p->working_ms;
    if (p->oldest_ms > sum->oldest_ms)
        sum->oldest_ms = p->oldest_ms;
}

// Names and numbers in turn, the same in every line: `awk '$1 == "total" {print $3}'` is what to scale on.
static void print_pool(const char *name, const struct queue_pool *p)
{
    printf("%s gpu_seconds %.3f queued %" PRIu64 " queued_gpu_seconds %.3f working %" PRIu64
           " working_gpu_seconds %.3f delayed %" PRIu64 " delayed_gpu_seconds %.3f oldest_seconds %.3f",
           name, 1e-3 * (double)(p->queued_ms + p->working_ms), p->queued, 1e-3 * (double)p->queued_ms, p->working,
           1e-3 * (double)p->working_ms, p->delayed, 1e-3 * (double)p->delayed_ms, 1e-3 * (double)p->oldest_ms);
}

static json_t *pool_json(const char *name, const struct queue_pool *p)
{
    return json_pack("{s:s,s:f,s:I,s:f,s:I,s:f,s:I,s:f,s:f}", "pool", name, "gpu_seconds",
                     1e-3 * (double)(p->queued_ms + p->working_ms), "queued", (json_int_t)p->queued,
                     "queued_gpu_seconds", 1e-3 * (double)p->queued_ms, "working", (json_int_t)p->working,
                     "working_gpu_seconds", 1e-3 * (double)p->working_ms, "delayed", (json_int_t)p->delayed,
                     "delayed_gpu_seconds", 1e-3 * (double)p->delayed_ms, "oldest_seconds",
                     1e-3 * (double)p->oldest_ms);
}

static void show(const struct queue_pool *pools, size_t n, const struct queue_stats *stats, bool as_json)
{
    struct queue_pool sum = {0};
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) {
        add(&sum, &pools[i]);
        json_array_append_new(list, pool_json(pools[i].name, &pools[i]));
        if (!as_json) {
            print_pool(pools[i].name, &pools[i]);
            putchar('\n');
        }
    }
    json_t *total = pool_json("total", &sum);
    json_object_del(total, "pool");
    json_object_set_new(total, "unadmitted", json_integer((json_int_t)stats->waiting));
    if (as_json) {
        json_print(json_pack("{s:o,s:o}", "pools", list, "total", total));
        return;
    }
    print_pool("total", &sum);
    printf(" unadmitted %" PRIu64 "\n", stats->waiting);
    json_decref(list);
    json_decref(total);
}

static int backlog(struct connection *c, bool as_json)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    struct queue_pool *pools = NULL;
    struct queue_stats stats;
    size_t n = 0;
    int rc = connection_open(c, &q, &err);
    rc = rc ? rc : queue_pools(q, &pools, &n, &err);
    rc = rc ? rc : queue_stats(q, &stats, &err);
    if (rc == 0)
        show(pools, n, &stats, as_json);
    free(pools);
    connection_close(c, q);
    return rc ? cli_fail(&err) : CLI_OK;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct connection c = {0};
    bool json = false;
    const struct cli_flag flags[] = {CONNECTION_FLAGS(c),
                                     {"--json", NULL, "print one JSON object", CLI_BOOL, &json, 0, 0}};
    int code = cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, NULL, NULL);
    return code < 0 ? backlog(&c, json) : code;
}

const struct cli_command cli_backlog = {"backlog", "", "what waits and is in work, in GPU-seconds, a line a pool", run,
                                        false};
