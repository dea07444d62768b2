// ditfleet tenant: who may submit, and their share.
#include <stdlib.h>
#include <string.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"

struct tenant {
    struct connection connection;
    double weight;
    bool json;
};

static int add(const struct tenant *t, struct queue *q, const char *name, struct err *err)
{
    char acl[1024];
    TRY(queue_tenant_add(q, name, t->weight, err));
    queue_tenant_acl(q, name, acl, sizeof acl);
    if (t->json)
        json_print(json_pack("{s:s,s:f,s:s}", "name", name, "weight", t->weight, "acl", acl));
    else
        printf("%s\n", acl);
    return 0;
}

static int list(const struct tenant *t, struct queue *q, struct err *err)
{
    struct queue_tenant *tenants;
    size_t count;
    TRY(queue_tenants(q, &tenants, &count, err));
    json_t *array = json_array();
    for (size_t i = 0; i < count; i++) {
        const struct queue_tenant *x = &tenants[i];
        json_array_append_new(array, json_pack("{s:s,s:f,s:I,s:I}", "name", x->name, "weight", x->weight, "waiting",
                                               (json_int_t)x->waiting, "ready", (json_int_t)x->ready));
        if (!t->json)
            printf("%-24s weight %-6g waiting %llu, ready %llu\n", x->name, x->weight, (unsigned long long)x->waiting,
                   (unsigned long long)x->ready);
    }
    free(tenants);
    if (t->json)
        json_print(array);
    else
        json_decref(array);
    return 0;
}

// The operands are "add NAME" or "list".
static int tenant(struct tenant *t, const char *const *operands)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    int rc = connection_open(&t->connection, &q, &err);
    if (rc == 0)
        rc = strcmp(operands[0], "add") == 0 ? add(t, q, operands[1], &err) : list(t, q, &err);
    connection_close(&t->connection, q);
    return rc ? cli_fail(&err) : CLI_OK;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct tenant t = {.weight = 1};
    const struct cli_flag flags[] = {
        CONNECTION_FLAGS(t.connection),
        {"--weight", "W", "add: share of the GPUs relative to other tenants (default 1)", CLI_DOUBLE, &t.weight, 0.001,
         1000},
        {"--json", NULL, "print JSON", CLI_BOOL, &t.json, 0, 0},
    };
    const char **operands = calloc((size_t)argc, sizeof *operands);
    int n = 0;
    int code =
        operands ? cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, operands, &n) : CLI_FAILED;
    if (code < 0) {
        const bool adds = n > 0 && strcmp(operands[0], "add") == 0, lists = n > 0 && strcmp(operands[0], "list") == 0;
        code = cli_operands(self, adds || lists ? n : 0, lists ? 1 : 2);
    }
    code = code < 0 ? tenant(&t, operands) : code;
    free(operands);
    return code;
}

const struct cli_command cli_tenant = {"tenant", "add NAME | list",
                                       "register a tenant and print its ACL line; list them", run, false};
