// connect.h: how the subcommands that speak to a queue find it.
#ifndef DITFLEET_CLI_CONNECT_H
#define DITFLEET_CLI_CONNECT_H

#include "ops/cli/cli.h"
#include "proto/conf.h"
#include "proto/queue.h"

struct connection {
    const char *redis, *queue, *tenant, *config; // flags; NULL: not given
    struct conf *conf;                           // of --config, or all defaults
};

// Rows of a command's table of flags; c is a struct connection.
#define CONNECTION_FLAGS(c)                                                                                            \
    {"--redis",  "URL",      "default: $DITFLEET_REDIS, else the configuration's, else redis://127.0.0.1:6379",        \
     CLI_STRING, &(c).redis, 0,                                                                                        \
     0},                                                                                                               \
        {"--queue", "NAME", "default: the configuration's, else \"default\"", CLI_STRING, &(c).queue, 0, 0},           \
    {                                                                                                                  \
        "--config", "FILE", "the supervisor's configuration, to find Redis and the supervisor by", CLI_STRING,         \
            &(c).config, 0, 0                                                                                          \
    }
#define TENANT_FLAG(c)                                                                                                 \
    {                                                                                                                  \
        "--tenant", "NAME", "whose jobs; default: \"default\"", CLI_STRING, &(c).tenant, 0, 0                          \
    }

// Reads --config and connects as a producer. What is there after a failure is freed by connection_close as well.
int connection_open(struct connection *c, struct queue **q, struct err *err);
// The same in two steps, for a command that can do without Redis.
int connection_configure(struct connection *c, struct err *err);
void connection_close(struct connection *c, struct queue *q); // q may be NULL
const char *connection_tenant(const struct connection *c);

#endif
