// world.c: one server, one clock, one source of chance; what goes wrong, and when everything must have come to rest.
#include "world.h"

#include "net.h"

#include "proto/queue_lua.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    LOOK_EVERY = 48,  // transitions between two looks at everything
    REST_MAX = 12000, // acts until everything must be final
    FIRST_US = 1700000000
};

static bool broken(const struct world *w)
{
    return *check_broken(w->check) != 0;
}

// ---- what is told

static bool traced(const struct world *w)
{
    return w->options->trace_from > 0 && w->counts.commands >= w->options->trace_from && !broken(w);
}

void world_trace(struct world *w, const char *format, ...)
{
    va_list args;
    if (!traced(w))
        return;
    va_start(args, format);
    printf("%8lu %10" PRId64 " ms  ", w->counts.commands, server_ms(w) - FIRST_US * INT64_C(1000));
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

static void print_bytes(struct text t, size_t most)
{
    for (size_t i = 0; i < t.length && i < most; i++)
        putchar(isprint((unsigned char)t.bytes[i]) ? t.bytes[i] : t.bytes[i] == '\n' ? ' ' : '.');
}

static void trace_command(struct world *w, size_t argc, const struct text *argv, struct text reply)
{
    if (!traced(w))
        return;
    const struct actor *a = w->depth > 0 ? w->stack[w->depth - 1] : NULL;
    printf("%8lu %10" PRId64 " ms  %*s%-12s", w->counts.commands, server_ms(w) - FIRST_US * INT64_C(1000),
           2 * (int)w->depth, "", a ? a->name : "-");
    for (size_t i = argc > 4 && argv[0].length == 7 ? 4 : 0; i < argc && i < 16; i++) {
        putchar(' ');
        print_bytes(argv[i], 32);
    }
    printf(" -> ");
    print_bytes(reply, 70);
    printf("\n");
}

// ---- the server runs a command

static void run_quietly(struct world *w, const char *op, struct buffer *out)
{
    const struct text script = {queue_lua_start, (size_t)(queue_lua_end - queue_lua_start)};
    const struct text by_name[] = {text_of("EVALSHA"), text_of(w->sha1), text_of("1"), text_of(CHECK_PREFIX),
                                   text_of(op)};
    const struct text whole[] = {text_of("EVAL"), script, text_of("1"), text_of(CHECK_PREFIX), text_of(op)};
    server_run(w->server, 5, by_name, out);
    if (out->length > 9 && memcmp(out->bytes, "-NOSCRIPT", 9) == 0) {
        out->length = 0;
        server_run(w->server, 5, whole, out);
        if (!w->functions)
            server_forget_scripts(w->server); // as if nobody had looked
    }
}

static void look_at_everything(struct world *w)
{
    struct buffer stats = {0}, pools = {0};
    store_clean(server_store(w->server));
    run_quietly(w, "stats", &stats);
    run_quietly(w, "pools", &pools);
    check_all(w->check, (struct text){stats.bytes, stats.length}, (struct text){pools.bytes, pools.length},
              server_ms(w));
    buffer_free(&stats);
    buffer_free(&pools);
}

static void run(struct world *w, size_t argc, const struct text *argv, struct buffer *reply)
{
    struct store *s = server_store(w->server);
    int64_t took = draw(w, 900);
    if (broken(w))
        return;
    w->server_us += took;
    w->monotonic_us += took;
    store_set_clock(s, w->server_us);
    store_clean(s);
    check_before(w->check, argc, argv);
    server_run(w->server, argc, argv, reply);
    const struct text answer = {reply->bytes, reply->length};
    trace_command(w, argc, argv, answer);
    w->counts.commands++;
    check_after(w->check, argc, argv, answer, server_ms(w));
    if (store_dirty(s) > 0 && ++w->counts.transitions % LOOK_EVERY == 0 && !broken(w))
        look_at_everything(w);
}

// The operator's hand, or a fault: a command that nobody sent.
static void run_words(struct world *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void run_words(struct world *w, const char *format, ...)
{
    char line[512], *save = NULL;
    struct text argv[8];
    size_t argc = 0;
    struct buffer reply = {0};
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char *word = strtok_r(line, " ", &save); word && argc < 8; word = strtok_r(NULL, " ", &save))
        argv[argc++] = text_of(word);
    run(w, argc, argv, &reply);
    buffer_free(&reply);
}

// ---- actors

struct actor *world_actor(struct world *w, const char *kind, unsigned index)
{
    for (size_t i = 0; i < w->n_actors; i++)
        if (strcmp(w->actors[i].kind, kind) == 0 && w->actors[i].index == index)
            return &w->actors[i];
    return NULL;
}

static void revive(struct world *w, struct actor *a)
{
    queue_close(a->q);
    a->q = NULL;
    a->doomed = false;
    a->stalled_until_us = 0;
    a->die(w, a);
}

static void kill_one(struct world *w, struct actor *a)
{
    if (a->busy)
        a->doomed = true; // it never learns what its call did
    else
        revive(w, a);
}

void world_kill(struct world *w, struct actor *a)
{
    world_trace(w, "%s is killed", a->name);
    w->counts.kills++;
    kill_one(w, a);
    if (strcmp(a->kind, "worker") == 0)
        kill_one(w, world_actor(w, "herald", a->index)); // a thread of it
}

static void act(struct world *w, struct actor *a)
{
    struct err e;
    a->busy = true;
    w->stack[w->depth++] = a;
    if (a->q || queue_open(&a->q, "unix:///simulated", "sim", QUEUE_NODE, NULL, &e) == 0)
        a->act(w, a);
    w->depth--;
    a->busy = false;
    if (a->doomed)
        revive(w, a);
}

static void pass_time(struct world *w, int64_t us)
{
    w->server_us += us;
    w->monotonic_us += us;
}

static void someone_acts(struct world *w)
{
    struct actor *a = &w->actors[draw(w, (unsigned)w->n_actors)];
    if (!a->busy && a->stalled_until_us <= w->monotonic_us && w->depth < DEPTH)
        act(w, a);
}

// ---- what goes wrong

static void keep_for_later(struct world *w, size_t argc, const struct text *argv)
{
    if (w->n_late == LATE)
        return;
    struct late_request *l = &w->late[w->n_late++];
    *l = (struct late_request){argc, sim_alloc(argc * sizeof *argv)};
    for (size_t i = 0; i < argc; i++)
        l->argv[i] = text_copy(argv[i]);
    w->counts.late++;
}

static void free_late(struct late_request *l)
{
    for (size_t i = 0; i < l->argc; i++)
        text_free(l->argv[i]);
    free(l->argv);
}

static void deliver_late(struct world *w)
{
    struct buffer reply = {0};
    if (w->n_late == 0)
        return;
    struct late_request *at = &w->late[draw(w, (unsigned)w->n_late)], l = *at;
    *at = w->late[--w->n_late];
    world_trace(w, "a late message arrives");
    run(w, l.argc, l.argv, &reply);
    buffer_free(&reply);
    free_late(&l);
}

static void forget_copy(struct world *w)
{
    store_copy_free(w->copy);
    free(w->check_copy);
    w->copy = NULL;
    w->check_copy = NULL;
}

static void fail_over(struct world *w)
{
    const bool empty = once_in(w, 15); // a server that lost its data
    if (!w->copy && !empty) {
        w->copy = store_copy(server_store(w->server));
        w->check_copy = check_copy(w->check);
        world_trace(w, "a replica stops following");
        return;
    }
    world_trace(w, "a failover to %s", empty ? "an empty server" : "the replica");
    w->counts.failovers++;
    store_restore(server_store(w->server), empty ? NULL : w->copy);
    check_restore(w->check, empty ? NULL : w->check_copy);
    forget_copy(w);
    server_forget_scripts(w->server);
    server_forget_functions(w->server);
    w->server_us -= draw(w, 2000000); // another machine's clock
    net_cut();
}

// An index loses a job: by hand, say. Perhaps those who would notice die just then.
static void misplace(struct world *w)
{
    const unsigned k = w->n_jobs > 0 ? w->n_jobs - 1 - draw(w, w->n_jobs < 60 ? w->n_jobs : 60) : 0;
    const char *tenant = check_tenant(k);
    char record[64], pool[16], class[16];
    if (check_state(w->check, k) == 0 || job_state_final(check_state(w->check, k)))
        return;
    snprintf(record, sizeof record, CHECK_PREFIX "job:%s:j%u", tenant, k);
    struct store *s = server_store(w->server);
    struct text p = store_field(s, text_of(record), "pool"), c = store_field(s, text_of(record), "class");
    snprintf(pool, sizeof pool, "%.*s", (int)p.length, p.bytes);
    snprintf(class, sizeof class, "%.*s", (int)c.length, c.bytes);
    world_trace(w, "job j%u is misplaced", k);
    w->counts.misplaced++;
    check_misplaced(w->check, k);
    run_words(w, "ZREM " CHECK_PREFIX "ready:%s:%s:%s %s:j%u", pool, class, tenant, tenant, k);
    run_words(w, "ZREM " CHECK_PREFIX "delayed %s:j%u", tenant, k);
    run_words(w, "ZREM " CHECK_PREFIX "lease %s:j%u", tenant, k);
    for (unsigned i = 0; i < NODES && once_in(w, 3); i++)
        world_kill(w, world_actor(w, "supervisor", i));
}

static void lose_group(struct world *w)
{
    world_trace(w, "a door loses its group");
    w->counts.groups_lost++;
    run_words(w, "XGROUP DESTROY " CHECK_PREFIX "in:%s admit", check_tenant(draw(w, CHECK_TENANTS)));
}

static void stall(struct world *w, struct actor *a)
{
    world_trace(w, "%s is stopped for a while", a->name);
    w->counts.stalls++;
    a->stalled_until_us = w->monotonic_us + draw(w, 20000000);
    if (strcmp(a->kind, "worker") == 0)
        world_actor(w, "herald", a->index)->stalled_until_us = a->stalled_until_us;
}

static void jump(struct world *w)
{
    w->counts.jumps++;
    w->server_us += (int64_t)draw(w, 30000) * 1000;
    world_trace(w, "the server's clock jumps");
}

static void trouble(struct world *w)
{
    const unsigned what = draw(w, 100);
    struct actor *a = &w->actors[draw(w, (unsigned)w->n_actors)];
    if (what < 30)
        deliver_late(w);
    else if (what < 50)
        world_kill(w, a);
    else if (what < 65)
        stall(w, a);
    else if (what < 72)
        jump(w);
    else if (what < 84)
        misplace(w);
    else if (what < 90)
        lose_group(w);
    else if (what < 97)
        fail_over(w);
}

// ---- the net's side

static bool refuse(struct world *w, struct buffer *reply)
{
    static const char *const texts[] = {"LOADING Redis is loading the dataset in memory",
                                        "READONLY You can't write against a read only replica.",
                                        "OOM command not allowed when used memory > 'maxmemory'.",
                                        "MISCONF Redis is configured to save RDB snapshots",
                                        "NOSCRIPT gone",
                                        "ERR Function not found"};
    w->counts.refusals++;
    return reply_error(reply, "%s", texts[draw(w, sizeof texts / sizeof *texts)]) == 0;
}

static bool on_request(void *arg, size_t argc, const struct text *argv, struct buffer *reply)
{
    struct world *w = arg;
    struct actor *a = w->stack[w->depth - 1];
    struct buffer unread = {0};
    if (w->calm) {
        run(w, argc, argv, reply);
        return !broken(w);
    }
    if (once_in(w, 10))
        someone_acts(w);
    if (once_in(w, 150))
        trouble(w);
    if (strcmp(a->kind, "admitter") == 0 && once_in(w, 100)) // between what was delivered and its admission
        lose_group(w);
    if (a->doomed || broken(w))
        return false;
    const unsigned fate = draw(w, 1000);
    if (fate < 10) {
        w->counts.lost_requests++;
        return false;
    }
    if (fate < 26) { // it runs later: the sender waits in vain, or sees the connection break
        keep_for_later(w, argc, argv);
        return fate < 12;
    }
    if (fate < 30)
        return refuse(w, reply);
    bool lost = fate < 45;
    run(w, argc, argv, lost ? &unread : reply);
    buffer_free(&unread);
    w->counts.lost_replies += lost;
    if (once_in(w, 10))
        someone_acts(w);
    return !lost && !a->doomed && !broken(w);
}

static bool on_reachable(void *arg)
{
    const struct world *w = arg;
    return !w->stack[w->depth - 1]->doomed && !broken(w);
}

static void on_pass(void *arg, int ms)
{
    pass_time(arg, (int64_t)ms * 1000);
}

static int64_t on_clock(void *arg)
{
    return ((struct world *)arg)->monotonic_us;
}

static uint64_t on_random(void *arg)
{
    return random_next(&((struct world *)arg)->random);
}

// ---- a run

static void begin(struct world *w)
{
    struct redis_script named;
    w->random = w->options->seed * 0x9e3779b97f4a7c15u + 1;
    w->server_us = FIRST_US * INT64_C(1000000);
    w->monotonic_us = 1000000;
    w->functions = w->options->seed % 4 != 0; // else it runs scripts alone
    w->server = server_new(w->options->patch, w->functions);
    w->check = check_new(server_store(w->server));
    redis_script(&named, queue_lua_start, (size_t)(queue_lua_end - queue_lua_start));
    memcpy(w->sha1, named.sha1, sizeof w->sha1);
    store_set_clock(server_store(w->server), w->server_us);
    actors_make(w);
}

static void end(struct world *w)
{
    for (size_t i = 0; i < w->n_actors; i++) {
        w->actors[i].doomed = true;
        revive(w, &w->actors[i]);
    }
    while (w->n_late > 0)
        free_late(&w->late[--w->n_late]);
    forget_copy(w);
    check_free(w->check);
    server_free(w->server);
}

// Nothing goes wrong any more: every job must come to its end.
static void come_to_rest(struct world *w)
{
    w->calm = true;
    world_trace(w, "nothing goes wrong any more");
    while (w->n_late > 0 && !broken(w))
        deliver_late(w);
    for (size_t i = 0; i < w->n_actors; i++)
        w->actors[i].stalled_until_us = 0;
    for (unsigned n = 0; n < REST_MAX && !check_quiet(w->check) && !broken(w); n++) {
        pass_time(w, draw(w, 60000));
        someone_acts(w);
    }
    if (broken(w))
        return;
    if (!check_quiet(w->check))
        check_fail(w->check,
                   "rest: %u jobs are not final, or a door or the outbox is not empty, though nothing went "
                   "wrong for long",
                   check_live(w->check));
    look_at_everything(w);
}

static void count(struct world *w, struct sim_counts *to)
{
    const unsigned long *from = (const unsigned long *)&w->counts;
    w->counts.jobs = w->n_jobs;
    w->counts.succeeded = check_total(w->check, DITFLEET__V1__STATE__STATE_SUCCEEDED);
    w->counts.dead = check_total(w->check, DITFLEET__V1__STATE__STATE_DEAD);
    w->counts.cancelled = check_total(w->check, DITFLEET__V1__STATE__STATE_CANCELLED);
    w->counts.expired = check_total(w->check, DITFLEET__V1__STATE__STATE_EXPIRED);
    for (size_t i = 0; i < sizeof *to / sizeof *from; i++)
        ((unsigned long *)to)[i] += from[i];
}

bool sim_run(const struct sim_options *options, struct sim_counts *counts, char why[512])
{
    struct world *w = sim_alloc(sizeof *w);
    const struct net net = {w, on_request, on_reachable, on_pass, on_clock, on_random};
    w->options = options;
    net_use(&net);
    begin(w);
    while (w->counts.commands < options->commands && !broken(w)) {
        pass_time(w, draw(w, 30000));
        if (once_in(w, 30))
            trouble(w);
        someone_acts(w);
    }
    if (!broken(w))
        come_to_rest(w);
    bool good = !broken(w);
    snprintf(why, 512, "%s", check_broken(w->check));
    count(w, counts);
    end(w);
    net_use(NULL);
    free(w);
    return good;
}
