#include "ops/cli/connect.h"

#include <stdlib.h>

int connection_configure(struct connection *c, struct err *err)
{
    return c->config ? conf_load(c->config, &c->conf, err) : conf_parse("", "defaults", &c->conf, err);
}

int connection_open(struct connection *c, struct queue **q, struct err *err)
{
    const struct redis_options options = {.connect_ms = 3000};
    *q = NULL;
    if (!c->conf)
        TRY(connection_configure(c, err));
    const char *environment = getenv("DITFLEET_REDIS");
    const char *url = c->redis ? c->redis : environment && *environment ? environment : c->conf->redis.url;
    int rc = queue_open(q, url, c->queue ? c->queue : c->conf->redis.queue, QUEUE_PRODUCER, &options, err);
    if (rc == ERR_UNAVAILABLE) {
        const struct err cause = *err;
        err_set(err, rc, "%.400s; start it, or say by --redis where it is", cause.text);
    }
    return rc;
}

void connection_close(struct connection *c, struct queue *q)
{
    queue_close(q);
    conf_free(c->conf);
    c->conf = NULL;
}

const char *connection_tenant(const struct connection *c)
{
    return c->tenant ? c->tenant : "default";
}
