#include "proto/gather.h"

#include <stdlib.h>
#include <string.h>

#include "proto/queue_internal.h"
#include "proto/queue_lua.h"

static const char *const phases[] = {
    [GATHER_AWAY] = "away", [GATHER_OFFER] = "offer", [GATHER_RUN] = "run", [GATHER_DRAIN] = "drain"};

bool gather_same(const struct gather_node *a, const struct gather_node *b)
{
    return a->phase == b->phase && strcmp(a->mark, b->mark) == 0 && strcmp(a->terms, b->terms) == 0 &&
           strcmp(a->places, b->places) == 0 && strcmp(a->reason, b->reason) == 0;
}

static enum gather_phase phase_of(const char *name)
{
    enum gather_phase phase = GATHER_DRAIN;
    while (phase > GATHER_AWAY && strcmp(phases[phase], name) != 0)
        phase--;
    return phase;
}

static void copy(char *out, size_t size, const redisReply *r)
{
    snprintf(out, size, "%s", reply_text(r));
}

static void take_node(const redisReply *r, struct gather_node *out)
{
    out->phase = phase_of(reply_text(reply_at(r, 0)));
    copy(out->mark, sizeof out->mark, reply_at(r, 1));
    const redisReply *age = reply_at(r, 2);
    out->age_ms = age && age->type == REDIS_REPLY_INTEGER ? age->integer : -1;
    copy(out->terms, sizeof out->terms, reply_at(r, 3));
    copy(out->places, sizeof out->places, reply_at(r, 4));
    copy(out->reason, sizeof out->reason, reply_at(r, 5));
}

int gather(struct queue *q, const char *group, const char *const *names, int n_nodes, int me,
           const struct gather_node *mine, struct gather_view *out, struct err *e)
{
    struct redis_script script;
    struct args a = {.n = 0};
    redisReply *reply = NULL;
    char key[KEY_SIZE];
    const struct digits number = digits((uint64_t)me + 1);
    *out = (struct gather_view){.n_nodes = n_nodes, .nodes = calloc((size_t)n_nodes, sizeof *out->nodes)};
    if (!out->nodes)
        return err_set(e, ERR_NO_MEMORY, "no memory for the nodes of group %s", group);
    redis_script(&script, gather_lua_start, (size_t)(gather_lua_end - gather_lua_start));
    snprintf(key, sizeof key, KEY_NODES, q->prefix, group);
    const char *const texts[] = {number.text, phases[mine->phase], mine->mark, mine->terms, mine->places, mine->reason};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        args_text(&a, texts[i]);
    for (int i = 0; i < n_nodes; i++)
        args_text(&a, names[i]);
    const int rc = redis_eval(q->redis, &script, &reply, e, key, a.n, (const char **)a.value, a.length);
    if (rc == 0) {
        copy(out->formation, sizeof out->formation, reply_at(reply, 0));
        copy(out->secret, sizeof out->secret, reply_at(reply, 1));
        for (int i = 0; i < n_nodes; i++)
            take_node(reply_at(reply, (size_t)i + 2), &out->nodes[i]);
        freeReplyObject(reply);
    } else {
        gather_view_free(out);
    }
    return rc;
}

void gather_view_free(struct gather_view *v)
{
    free(v->nodes);
    *v = (struct gather_view){.n_nodes = 0};
}
