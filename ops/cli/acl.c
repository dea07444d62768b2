// ditfleet acl: the lines that make Redis users with no more rights than they need.
#include <stdlib.h>
#include <string.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"

struct acl {
    struct connection connection;
    const char *user; // NULL: as its kind, a producer as its tenant
    bool json;
};

static int acl(struct acl *a, const char *kind)
{
    char line[QUEUE_ACL_SIZE];
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    const char *tenant = connection_tenant(&a->connection);
    int i = 0;
    while (i < QUEUE_USERS && strcmp(queue_user_names[i], kind) != 0)
        i++;
    int rc = i < QUEUE_USERS ? connection_open(&a->connection, &q, &err)
                             : err_set(&err, ERR_INVALID,
                                       "there is no user %.40s; allowed: producer, worker, scaler, operator", kind);
    const char *user = a->user ? a->user : i == QUEUE_USER_PRODUCER ? tenant : kind;
    rc = rc ? rc : queue_acl(q, (enum queue_user)i, user, tenant, line, &err);
    if (rc == 0 && a->json)
        json_print(json_pack("{s:s,s:s,s:s}", "kind", kind, "user", user, "acl", line));
    else if (rc == 0)
        printf("%s\n", line);
    connection_close(&a->connection, q);
    return rc ? cli_fail(&err) : CLI_OK;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct acl a = {0};
    const struct cli_flag flags[] = {
        CONNECTION_FLAGS(a.connection),
        {"--tenant", "NAME", "producer: whose jobs; default: \"default\"", CLI_STRING, &a.connection.tenant, 0, 0},
        {"--user", "NAME", "the user's name; default: as the argument, of a producer its tenant's", CLI_STRING, &a.user,
         0, 0},
        {"--json", NULL, "print one JSON object", CLI_BOOL, &a.json, 0, 0},
    };
    const char **operands = calloc((size_t)argc, sizeof *operands);
    int n = 0;
    int code =
        operands ? cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, operands, &n) : CLI_FAILED;
    code = code < 0 ? cli_operands(self, n, 1) : code;
    code = code < 0 ? acl(&a, operands[0]) : code;
    free(operands);
    return code;
}

const struct cli_command cli_acl = {"acl", "producer | worker | scaler | operator",
                                    "print the line that makes such a user in Redis", run, false};
