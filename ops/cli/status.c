// ditfleet status: this node's supervisor and the queue; on a terminal once a second, else one look.
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"
#include "proto/clock.h"
#include "supervisor/control.h"

struct status {
    struct connection connection;
    bool json, once;
    struct queue *q; // NULL: not reached yet
    json_t *before;  // the node at the look before, taken
    double before_at;
};

// Where and how a look is printed.
struct view {
    FILE *to;
    const json_t *before; // the node some seconds ago; NULL: not known
    double seconds;
};

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

// Of the same job in the same stage at two looks; 0: not known.
static double steps_a_second(const json_t *rank, const json_t *before, double seconds)
{
    const bool same = before && *text(rank, "job") && strcmp(text(rank, "job"), text(before, "job")) == 0 &&
                      strcmp(text(rank, "stage"), text(before, "stage")) == 0;
    return same && seconds > 0 ? (number(rank, "step") - number(before, "step")) / seconds : 0;
}

static void print_rank(const struct view *v, const json_t *rank, const json_t *before)
{
    char steps[32] = "";
    if (number(rank, "steps") > 0)
        snprintf(steps, sizeof steps, " %.0f/%.0f", number(rank, "step"), number(rank, "steps"));
    fprintf(v->to, "  rank %-2.0f pid %-7.0f %s%s", number(rank, "rank"), number(rank, "pid"), text(rank, "stage"),
            steps);
    if (*text(rank, "job"))
        fprintf(v->to, " job %s", text(rank, "job"));
    if (steps_a_second(rank, before, v->seconds) > 0)
        fprintf(v->to, ", %.1f steps/s", steps_a_second(rank, before, v->seconds));
    fprintf(v->to, ", busy %.1f s", number(rank, "busy_seconds"));
    if (number(rank, "beat_age_seconds") >= 0)
        fprintf(v->to, ", heard of %.1f s ago", number(rank, "beat_age_seconds"));
    fputc('\n', v->to);
}

static void print_group(const struct view *v, const json_t *group, const json_t *before)
{
    size_t i;
    json_t *item;
    fprintf(v->to, "group %s: %s for %.0f s, restarts %.0f, models", text(group, "name"), text(group, "state"),
            number(group, "state_seconds"), number(group, "restarts"));
    json_array_foreach(json_object_get(group, "models"), i, item) fprintf(v->to, " %s", json_string_value(item));
    fputc('\n', v->to);
    if (number(group, "next_seconds") >= 0)
        fprintf(v->to, "  next act in %.1f s\n", number(group, "next_seconds"));
    if (*text(group, "waits_for"))
        fprintf(v->to, "  waits: %s\n", text(group, "waits_for"));
    if (*text(group, "last_failure"))
        fprintf(v->to, "  last failure: %s\n", text(group, "last_failure"));
    json_array_foreach(json_object_get(group, "ranks"), i, item)
        print_rank(v, item, json_array_get(json_object_get(before, "ranks"), i));
}

static void print_node(const struct view *v, const json_t *node)
{
    size_t i;
    json_t *group;
    const json_t *redis = json_object_get(node, "redis");
    fprintf(v->to, "node %s: %s%s, pid %.0f, redis %s%s%s\n", text(node, "node"), text(node, "state"),
            json_is_true(json_object_get(node, "spot_notice")) ? " until the cloud takes it back" : "",
            number(node, "pid"), json_is_true(json_object_get(redis, "up")) ? "up" : "down",
            *text(redis, "error") ? ": " : "", text(redis, "error"));
    json_array_foreach(json_object_get(node, "groups"), i, group)
        print_group(v, group, json_array_get(json_object_get(v->before, "groups"), i));
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

static json_t *pool_json(const struct queue_pool *p)
{
    return json_pack("{s:s,s:I,s:f,s:I,s:I,s:f}", "name", p->name, "queued", (json_int_t)p->queued,
                     "queued_gpu_seconds", 1e-3 * (double)p->queued_ms, "working", (json_int_t)p->working, "delayed",
                     (json_int_t)p->delayed, "oldest_seconds", 1e-3 * (double)p->oldest_ms);
}

static int ask_queue(struct queue *q, json_t **out, struct err *err)
{
    struct queue_stats stats;
    struct queue_tenant *tenants = NULL;
    struct queue_model *models = NULL;
    struct queue_pool *pools = NULL;
    size_t n_tenants = 0, n_models = 0, n_pools = 0;
    int rc = queue_stats(q, &stats, err);
    rc = rc ? rc : queue_tenants(q, &tenants, &n_tenants, err);
    rc = rc ? rc : queue_models(q, &models, &n_models, err);
    rc = rc ? rc : queue_pools(q, &pools, &n_pools, err);
    if (rc == 0) {
        json_t *tenant_list = json_array(), *model_list = json_array(), *pool_list = json_array();
        for (size_t i = 0; i < n_pools; i++)
            json_array_append_new(pool_list, pool_json(&pools[i]));
        for (size_t i = 0; i < n_tenants; i++)
            json_array_append_new(tenant_list,
                                  json_pack("{s:s,s:f,s:I,s:I}", "name", tenants[i].name, "weight",
                                            tenants[i].limits.weight, "waiting", (json_int_t)tenants[i].waiting,
                                            "ready", (json_int_t)tenants[i].ready));
        for (size_t i = 0; i < n_models; i++)
            json_array_append_new(model_list, json_pack("{s:s,s:s,s:b,s:I}", "name", models[i].name, "version",
                                                        models[i].version, "default", (int)models[i].is_default,
                                                        "published_ms", (json_int_t)models[i].published_ms));
        *out = json_pack("{s:s,s:o,s:o,s:o,s:o}", "redis", redis_address(queue_redis(q)), "jobs", stats_json(&stats),
                         "pools", pool_list, "tenants", tenant_list, "models", model_list);
    }
    free(pools);
    free(tenants);
    free(models);
    return rc;
}

static void print_queue(const struct view *v, const json_t *queue)
{
    size_t i;
    json_t *item;
    const char *name;
    fprintf(v->to, "queue at %s:", text(queue, "redis"));
    json_object_foreach(json_object_get(queue, "jobs"), name, item)
        fprintf(v->to, " %s %" JSON_INTEGER_FORMAT, name, json_integer_value(item));
    fputc('\n', v->to);
    json_array_foreach(json_object_get(queue, "pools"), i, item)
        fprintf(v->to, "pool %s: queued %.0f (%.1f GPU-seconds, the oldest for %.1f s), working %.0f, delayed %.0f\n",
                text(item, "name"), number(item, "queued"), number(item, "queued_gpu_seconds"),
                number(item, "oldest_seconds"), number(item, "working"), number(item, "delayed"));
    json_array_foreach(json_object_get(queue, "tenants"), i, item)
        fprintf(v->to, "tenant %s: weight %g, waiting %.0f, ready %.0f\n", text(item, "name"), number(item, "weight"),
                number(item, "waiting"), number(item, "ready"));
    json_array_foreach(json_object_get(queue, "models"), i, item)
        fprintf(v->to, "model %s@%s%s\n", text(item, "name"), text(item, "version"),
                json_is_true(json_object_get(item, "default")) ? " (default)" : "");
}

// ---- both

// What cannot be reached is an error, and the rest is there. Both to free.
struct look {
    json_t *node, *queue; // NULL: the error says why
    struct err no_node, no_queue;
};

static struct look look(struct status *s)
{
    struct look l = {0};
    char path[CONTROL_PATH_BYTES];
    control_request(control_path(s->connection.conf, path), "{\"cmd\":\"status\"}", &l.node, &l.no_node);
    if (!s->q && connection_open(&s->connection, &s->q, &l.no_queue) != 0)
        return l;
    ask_queue(s->q, &l.queue, &l.no_queue);
    return l;
}

static int look_once(struct status *s)
{
    const struct look l = look(s);
    const struct view v = {.to = stdout};
    if (s->json) {
        json_print(json_pack("{s:O*,s:O*}", "node", l.node, "queue", l.queue));
    } else {
        if (l.node)
            print_node(&v, l.node);
        if (l.queue)
            print_queue(&v, l.queue);
    }
    fflush(stdout);
    int code = l.node ? CLI_OK : cli_fail(&l.no_node);
    code = l.queue ? code : cli_fail(&l.no_queue);
    json_decref(l.node);
    json_decref(l.queue);
    return code;
}

// As many lines of text as the terminal has, each as wide as it is at most, over what stands there.
static void show_screen(const char *text)
{
    struct winsize size = {.ws_row = 24, .ws_col = 80};
    ioctl(1, TIOCGWINSZ, &size);
    fputs("\x1b[H", stdout);
    for (int row = 1; *text && row < size.ws_row; row++) {
        const int length = (int)strcspn(text, "\n");
        printf("%.*s\x1b[K\n", length < size.ws_col ? length : size.ws_col, text);
        text += length + (text[length] == '\n');
    }
    fputs("\x1b[J", stdout);
    fflush(stdout);
}

static int draw_look(struct status *s)
{
    char *screen = NULL;
    size_t size;
    FILE *to = open_memstream(&screen, &size);
    if (!to)
        return CLI_FAILED;
    const double now = monotonic_seconds();
    const struct look l = look(s);
    const struct view v = {.to = to, .before = s->before, .seconds = now - s->before_at};
    if (l.node)
        print_node(&v, l.node);
    else
        fprintf(to, "node: %s\n", l.no_node.text);
    if (l.queue)
        print_queue(&v, l.queue);
    else
        fprintf(to, "queue: %s\n", l.no_queue.text);
    fclose(to);
    show_screen(screen);
    free(screen);
    json_decref(l.queue);
    json_decref(s->before);
    s->before = l.node;
    s->before_at = now;
    return CLI_OK;
}

// Until Ctrl-C, which is looked for instead of slept; on the terminal's other screen, so that the own comes back.
static int live(struct status *s)
{
    const struct timespec second = {.tv_sec = 1};
    sigset_t stop;
    int code = CLI_OK;
    sigemptyset(&stop);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGTERM);
    sigprocmask(SIG_BLOCK, &stop, NULL);
    fputs("\x1b[?1049h\x1b[H\x1b[J", stdout);
    do
        code = draw_look(s);
    while (code == CLI_OK && sigtimedwait(&stop, NULL, &second) < 0);
    fputs("\x1b[?1049l", stdout);
    fflush(stdout);
    json_decref(s->before);
    return code;
}

static int status(struct status *s)
{
    struct err err = {.code = ERR_NONE};
    int code;
    if (connection_configure(&s->connection, &err) != 0)
        code = cli_fail(&err);
    else
        code = isatty(1) && !s->json && !s->once ? live(s) : look_once(s);
    connection_close(&s->connection, s->q);
    return code;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct status s = {0};
    const struct cli_flag flags[] = {
        CONNECTION_FLAGS(s.connection),
        {"--once", NULL, "on a terminal, too: one look, and the end", CLI_BOOL, &s.once, 0, 0},
        {"--json", NULL, "print one JSON object", CLI_BOOL, &s.json, 0, 0}};
    int code = cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, NULL, NULL);
    return code < 0 ? status(&s) : code;
}

const struct cli_command cli_status = {"status", "", "this node's groups and ranks, and the queue, as they change", run,
                                       false};
