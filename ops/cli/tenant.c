// ditfleet tenant: who may submit, their share and their limits.
#include <stdlib.h>
#include <string.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"

struct tenant {
    struct connection connection;
    struct queue_limits limits; // negative: not given
    bool json;
};

static json_t *tenant_json(const struct queue_tenant *x)
{
    return json_pack("{s:s,s:f,s:f,s:f,s:f,s:I,s:I,s:f}", "name", x->name, "weight", x->limits.weight, "rate",
                     x->limits.rate, "burst", x->limits.burst_s, "max_queued", x->limits.max_queued_s, "waiting",
                     (json_int_t)x->waiting, "ready", (json_int_t)x->ready, "gpu_seconds", 1e-3 * (double)x->gpu_ms);
}

static void print_tenant(const struct queue_tenant *x)
{
    printf("%-24s weight %-6g waiting %llu, ready %llu, %.3f GPU-seconds", x->name, x->limits.weight,
           (unsigned long long)x->waiting, (unsigned long long)x->ready, 1e-3 * (double)x->gpu_ms);
    if (x->limits.max_queued_s > 0)
        printf(" of at most %g", x->limits.max_queued_s);
    if (x->limits.rate > 0)
        printf(", rate %g, burst %g", x->limits.rate, x->limits.burst_s);
    putchar('\n');
}

// The tenants, or the one of this name.
static int list(const struct tenant *t, struct queue *q, const char *name, struct err *err)
{
    struct queue_tenant *tenants;
    size_t count, found = 0;
    TRY(queue_tenants(q, &tenants, &count, err));
    json_t *array = json_array();
    for (size_t i = 0; i < count; i++) {
        if (name && strcmp(tenants[i].name, name) != 0)
            continue;
        found++;
        json_array_append_new(array, tenant_json(&tenants[i]));
        if (!t->json)
            print_tenant(&tenants[i]);
    }
    free(tenants);
    if (t->json && found)
        json_print(array);
    else
        json_decref(array);
    return found || !name ? 0 : err_set(err, ERR_NOT_FOUND, "there is no tenant %s; add it first", name);
}

static int add(struct tenant *t, struct queue *q, const char *name, struct err *err)
{
    char acl[QUEUE_ACL_SIZE];
    t->limits.weight = t->limits.weight < 0 ? 1 : t->limits.weight;
    TRY(queue_tenant_limit(q, name, &t->limits, err));
    TRY(queue_acl(q, QUEUE_USER_PRODUCER, name, name, acl, err));
    if (t->json)
        json_print(json_pack("{s:s,s:f,s:s}", "name", name, "weight", t->limits.weight, "acl", acl));
    else
        printf("%s\n", acl);
    return 0;
}

// What is not given stays.
static int set(const struct tenant *t, struct queue *q, const char *name, struct err *err)
{
    struct queue_tenant *tenants;
    size_t count;
    bool known = false;
    TRY(queue_tenants(q, &tenants, &count, err));
    for (size_t i = 0; i < count; i++)
        known |= strcmp(tenants[i].name, name) == 0;
    free(tenants);
    if (known)
        TRY(queue_tenant_limit(q, name, &t->limits, err));
    return list(t, q, name, err); // which says so where there is none
}

// The operands are "add NAME", "set NAME" or "list".
static int tenant(struct tenant *t, const char *const *operands)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    int rc = connection_open(&t->connection, &q, &err);
    if (rc == 0)
        rc = strcmp(operands[0], "add") == 0   ? add(t, q, operands[1], &err)
             : strcmp(operands[0], "set") == 0 ? set(t, q, operands[1], &err)
                                               : list(t, q, NULL, &err);
    connection_close(&t->connection, q);
    return rc ? cli_fail(&err) : CLI_OK;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct tenant t = {.limits = {-1, -1, -1, -1}};
    const struct cli_flag flags[] = {
        CONNECTION_FLAGS(t.connection),
        {"--weight", "W", "share of the GPUs relative to other tenants (new tenants: 1)", CLI_DOUBLE, &t.limits.weight,
         0.001, 1000},
        {"--rate", "R", "GPU-seconds that it may use in a second, over time; what is above waits; 0: any number",
         CLI_DOUBLE, &t.limits.rate, 0, QUEUE_LIMIT_MAX},
        {"--burst", "S", "GPU-seconds that it may use above the rate after a pause", CLI_DOUBLE, &t.limits.burst_s, 0,
         QUEUE_LIMIT_MAX},
        {"--max-queued", "S", "GPU-seconds of its jobs in the queue, in work too; what is above is refused; 0: any",
         CLI_DOUBLE, &t.limits.max_queued_s, 0, QUEUE_LIMIT_MAX},
        {"--json", NULL, "print JSON", CLI_BOOL, &t.json, 0, 0},
    };
    const char **operands = calloc((size_t)argc, sizeof *operands);
    int n = 0;
    int code =
        operands ? cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, operands, &n) : CLI_FAILED;
    if (code < 0) {
        const bool lists = n > 0 && strcmp(operands[0], "list") == 0,
                   names = n > 0 && (strcmp(operands[0], "add") == 0 || strcmp(operands[0], "set") == 0);
        code = cli_operands(self, names || lists ? n : 0, lists ? 1 : 2);
    }
    code = code < 0 ? tenant(&t, operands) : code;
    free(operands);
    return code;
}

const struct cli_command cli_tenant = {"tenant", "add NAME | set NAME | list",
                                       "register a tenant and print its ACL line; set limits; list them", run, false};
