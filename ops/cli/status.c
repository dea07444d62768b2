// ditfleet status: one look at this node's supervisor and at the queue.
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"
#include "supervisor/control.h"

// ---- the node, as the supervisor answers

static const char *text(const json_t *object, const char *name)
{
    const char *value = json_string_value(json_object_get(object, name));
    return value ? value : "";
}

static double number(const json_t *object, const char *name)
{
    return json_number_value(json_object_get(object, name));
}

static void print_rank(const json_t *rank)
{
    char steps[32] = "";
    if (number(rank, "steps") > 0)
        snprintf(steps, sizeof steps, " %.0f/%.0f", number(rank, "step"), number(rank, "steps"));
    printf("  rank %-2.0f pid %-7.0f %s%s", number(rank, "rank"), number(rank, "pid"), text(rank, "stage"), steps);
    if (*text(rank, "job"))
        printf(" job %s", text(rank, "job"));
    printf(", busy %.1f s", number(rank, "busy_seconds"));
    if (number(rank, "beat_age_seconds") >= 0)
        printf(", heard of %.1f s ago", number(rank, "beat_age_seconds"));
    putchar('\n');
}

static void print_group(const json_t *group)
{
    size_t i;
    json_t *item;
    printf("group %s: %s for %.0f s, restarts %.0f, models", text(group, "name"), text(group, "state"),
           number(group, "state_seconds"), number(group, "restarts"));
    json_array_foreach(json_object_get(group, "models"), i, item) printf(" %s", json_string_value(item));
    putchar('\n');
    if (number(group, "next_seconds") >= 0)
        printf("  next act in %.1f s\n", number(group, "next_seconds"));
    if (*text(group, "last_failure"))
        printf("  last failure: %s\n", text(group, "last_failure"));
    json_array_foreach(json_object_get(group, "ranks"), i, item) print_rank(item);
}

static void print_node(const json_t *node)
{
    size_t i;
    json_t *group;
    const json_t *redis = json_object_get(node, "redis");
    printf("node %s: %s%s, pid %.0f, redis %s%s%s\n", text(node, "node"), text(node, "state"),
           json_is_true(json_object_get(node, "spot_notice")) ? " until the cloud takes it back" : "",
           number(node, "pid"), json_is_true(json_object_get(redis, "up")) ? "up" : "down",
           *text(redis, "error") ? ": " : "", text(redis, "error"));
    json_array_foreach(json_object_get(node, "groups"), i, group) print_group(group);
}

// ---- the queue

static json_t *stats_json(const struct queue_stats *s)
{
    const struct {
        const char *name;
        uint64_t value;
    } rows[] = {
        {"waiting", s->waiting},       {"queued", s->queued},           {"delayed", s->delayed},
        {"leased", s->leased},         {"running", s->running},         {"uploading", s->uploading},
        {"retry_wait", s->retry_wait}, {"succeeded", s->succeeded},     {"dead", s->dead},
        {"cancelled", s->cancelled},   {"expired", s->expired},         {"refused", s->refused},
        {"retries", s->retries},       {"dead_letter", s->dead_letter}, {"backlog_ms", s->backlog_ms},
    };
    json_t *object = json_object();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        json_object_set_new(object, rows[i].name, json_integer((json_int_t)rows[i].value));
    return object;
}

static int ask_queue(struct queue *q, json_t **out, struct err *err)
{
    struct queue_stats stats;
    struct queue_tenant *tenants = NULL;
    struct queue_model *models = NULL;
    size_t n_tenants = 0, n_models = 0;
    int rc = queue_stats(q, &stats, err);
    rc = rc ? rc : queue_tenants(q, &tenants, &n_tenants, err);
    rc = rc ? rc : queue_models(q, &models, &n_models, err);
    if (rc == 0) {
        json_t *tenant_list = json_array(), *model_list = json_array();
        for (size_t i = 0; i < n_tenants; i++)
            json_array_append_new(tenant_list,
                                  json_pack("{s:s,s:f,s:I,s:I}", "name", tenants[i].name, "weight",
                                            tenants[i].limits.weight, "waiting", (json_int_t)tenants[i].waiting,
                                            "ready", (json_int_t)tenants[i].ready));
        for (size_t i = 0; i < n_models; i++)
            json_array_append_new(model_list, json_pack("{s:s,s:s,s:b,s:I}", "name", models[i].name, "version",
                                                        models[i].version, "default", (int)models[i].is_default,
                                                        "published_ms", (json_int_t)models[i].published_ms));
        *out = json_pack("{s:s,s:o,s:o,s:o}", "redis", redis_address(queue_redis(q)), "jobs", stats_json(&stats),
                         "tenants", tenant_list, "models", model_list);
    }
    free(tenants);
    free(models);
    return rc;
}

static void print_queue(const json_t *queue)
{
    size_t i;
    json_t *item;
    const char *name;
    printf("queue at %s:", text(queue, "redis"));
    json_object_foreach(json_object_get(queue, "jobs"), name, item)
        printf(" %s %" JSON_INTEGER_FORMAT, name, json_integer_value(item));
    putchar('\n');
    json_array_foreach(json_object_get(queue, "tenants"), i, item)
        printf("tenant %s: weight %g, waiting %.0f, ready %.0f\n", text(item, "name"), number(item, "weight"),
               number(item, "waiting"), number(item, "ready"));
    json_array_foreach(json_object_get(queue, "models"), i, item)
        printf("model %s@%s%s\n", text(item, "name"), text(item, "version"),
               json_is_true(json_object_get(item, "default")) ? " (default)" : "");
}

// ---- both

// What cannot be reached is said on stderr, and the rest is shown.
static int status(struct connection *c, bool as_json)
{
    struct err no_node = {.code = ERR_NONE}, no_queue = {.code = ERR_NONE};
    char path[CONTROL_PATH_BYTES];
    json_t *node = NULL, *queue = NULL, *both = json_object();
    struct queue *q = NULL;
    if (connection_configure(c, &no_queue) != 0) {
        json_decref(both);
        return cli_fail(&no_queue);
    }
    const int node_rc = control_request(control_path(c->conf, path), "{\"cmd\":\"status\"}", &node, &no_node);
    int queue_rc = connection_open(c, &q, &no_queue);
    queue_rc = queue_rc ? queue_rc : ask_queue(q, &queue, &no_queue);
    if (node && !as_json)
        print_node(node);
    if (queue && !as_json)
        print_queue(queue);
    if (node)
        json_object_set_new(both, "node", node);
    if (queue)
        json_object_set_new(both, "queue", queue);
    if (as_json)
        json_print(both);
    else
        json_decref(both);
    connection_close(c, q);
    fflush(stdout);
    const int code = node_rc ? cli_fail(&no_node) : CLI_OK;
    return queue_rc ? cli_fail(&no_queue) : code;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct connection c = {0};
    bool json = false;
    const struct cli_flag flags[] = {CONNECTION_FLAGS(c),
                                     {"--json", NULL, "print one JSON object", CLI_BOOL, &json, 0, 0}};
    int code = cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, NULL, NULL);
    return code < 0 ? status(&c, json) : code;
}

const struct cli_command cli_status = {"status", "", "this node's groups and ranks, and the queue", run, false};
