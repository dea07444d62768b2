// sim.c: the simulation as a program: many seeds, one seed again, or the defects that it must find.
#include "sim.h"

#include "proto/clock.h"
#include "proto/queue_lua.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COMMANDS = 20000, BUG_COMMANDS = 6000, BUG_SEEDS = 100, TRACE = 60 };

// Each must be found. `from` stands in queue.lua once.
static const struct patch bugs[] = {
    {"finish without the fence", "function ops.finish()\n  local r, why = fenced()",
     "function ops.finish()\n  local r, why = load(argv[2], argv[3])"},
    {"an epoch reused after a failover", "r.epoch ~= tonumber(argv[4]) or r.nonce ~= argv[5] then",
     "r.epoch ~= tonumber(argv[4]) then"},
    {"reap that misses a job without a lease", "if call('ZSCORE', P .. 'lease', m) then return false end",
     "do return false end"},
    {"reap that misses a job that is not in ready",
     "    local ring = ring_key(r.pool, r.class)\n    if call('ZSCORE', ready_key(r), m)",
     "    do return false end\n    local ring = ring_key(r.pool, r.class)\n    if call('ZSCORE', ready_key(r), m)"},
    {"reap before its time", "now_text(), 'LIMIT'", "int(now() + 1000), 'LIMIT'"},
    {"admit that does not know the id", "if call('EXISTS', k) == 1 then\n    local there",
     "if false then\n    local there"},
    {"admit that deletes what it did not admit", "if out[#out] ~= 'gone' then", "if true then"},
    {"release that charges an attempt", "move(r, 'QUEUED', { 'left', 'release', 'stage', '', 'step', 0 })",
     "fail_attempt(r, 'infra', { code = 'io', message = '', retryable = true }, 0, 'release')"},
    {"release_all that takes from the living", "if incarnation == argv[3] or argv[3] == '' then", "if true then"},
    {"a fault of the fleet charged to the job", "local field, k = 'attempts_' .. cause,",
     "local field, k = 'attempts_app',"},
    {"cancel after the end", "if not FINAL[r.state] then fail_final(r, 'CANCELLED'",
     "if true then fail_final(r, 'CANCELLED'"},
    {"a held job that stays in lease", "    call('ZREM', P .. 'lease', member(r))\n    call('HDEL'", "    call('HDEL'"},
    {"a ready count that does not fall", "then add_tenant(r.tenant, 'ready', -1) end", "then end"},
    {"a backlog that does not fall", "  if from then p[from],", "  if false then p[from],"},
    {"a callback that is not put off", "if r.callback ~= '' then post_callback(r, k) end", ""},
    {"a callback settled by who lost it", "if call('HGET', P .. 'outbox_hold', argv[2]) ~= argv[3] then return end",
     ""},
};

struct options {
    uint64_t seed;
    unsigned long transitions; // 0: one seed
    unsigned long trace_from;
    bool bugs;
    const char *bug;
};

// The seed again, with what came last printed.
static void retell(struct sim_options o, unsigned long commands)
{
    struct sim_counts unused = {0};
    char why[512];
    o.trace_from = commands > TRACE ? commands - TRACE : 1;
    sim_run(&o, &unused, why);
}

static void print_counts(const struct sim_counts *n, double seconds)
{
    printf("%lu transitions, %lu commands, %.0f transitions/s\n", n->transitions, n->commands,
           (double)n->transitions / seconds);
    printf("%lu jobs; in the last histories %lu succeeded, %lu dead, %lu cancelled, %lu expired\n", n->jobs,
           n->succeeded, n->dead, n->cancelled, n->expired);
    printf(
        "%lu kills, %lu stalls, %lu jumps of the clock, %lu failovers, %lu lost requests, %lu lost replies, %lu late "
        "messages, %lu refusals, %lu jobs misplaced, %lu groups lost\n",
        n->kills, n->stalls, n->jumps, n->failovers, n->lost_requests, n->lost_replies, n->late, n->refusals,
        n->misplaced, n->groups_lost);
}

static int run_seeds(const struct options *o, const struct patch *bug)
{
    struct sim_counts n = {0};
    double start = monotonic_seconds();
    for (uint64_t seed = o->seed; seed == o->seed || n.transitions < o->transitions; seed++) {
        const struct sim_options run = {.seed = seed, .commands = COMMANDS, .patch = bug, .trace_from = o->trace_from};
        const unsigned long before = n.commands;
        char why[512];
        if (sim_run(&run, &n, why))
            continue;
        retell(run, n.commands - before);
        printf("seed %" PRIu64 ", command %lu: %s\nagain: sim --seed %" PRIu64 "\n", seed, n.commands - before, why,
               seed);
        return 1;
    }
    print_counts(&n, monotonic_seconds() - start);
    return 0;
}

static const struct patch *find_bug(const char *name)
{
    for (size_t i = 0; i < sizeof bugs / sizeof *bugs; i++)
        if (strcmp(bugs[i].name, name) == 0)
            return &bugs[i];
    return NULL;
}

static bool find(const struct patch *bug)
{
    const struct text script = {queue_lua_start, (size_t)(queue_lua_end - queue_lua_start)};
    struct sim_counts n = {0};
    size_t length;
    char *text = patch_apply(script, bug, &length), why[512];
    free(text);
    if (!text) {
        printf("NOT PLANTED  %s: the text to change is not in queue.lua, or more than once\n", bug->name);
        return false;
    }
    for (uint64_t seed = 1; seed <= BUG_SEEDS; seed++) {
        const struct sim_options run = {.seed = seed, .commands = BUG_COMMANDS, .patch = bug};
        const unsigned long before = n.commands;
        if (sim_run(&run, &n, why))
            continue;
        printf("found  %s: seed %" PRIu64 ", command %lu, after %lu transitions: %s\n", bug->name, seed,
               n.commands - before, n.transitions, why);
        return strncmp(why, "script:", 7) != 0; // a defect that cannot even run proves nothing
    }
    printf("NOT FOUND  %s in %lu transitions\n", bug->name, n.transitions);
    return false;
}

static int find_all(void)
{
    size_t found = 0, all = sizeof bugs / sizeof *bugs;
    for (size_t i = 0; i < all; i++)
        found += find(&bugs[i]);
    printf("%zu of %zu planted defects found\n", found, all);
    return found != all;
}

int main(int argc, char **argv)
{
    struct options o = {.seed = 1};
    bool usage = false;
    for (int i = 1; i < argc && argv[i]; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--bugs") == 0)
            o.bugs = true;
        else if (value && strcmp(argv[i], "--seed") == 0)
            o.seed = strtoull(argv[++i], NULL, 10);
        else if (value && strcmp(argv[i], "--transitions") == 0)
            o.transitions = strtoul(argv[++i], NULL, 10);
        else if (value && strcmp(argv[i], "--trace") == 0)
            o.trace_from = strtoul(argv[++i], NULL, 10);
        else if (value && strcmp(argv[i], "--bug") == 0)
            o.bug = argv[++i];
        else
            usage = true;
    }
    const struct patch *bug = o.bug ? find_bug(o.bug) : NULL;
    if (usage || (o.bug && !bug)) {
        fprintf(stderr,
                "usage: sim [--seed N] [--transitions N] [--bug NAME] [--trace N]   from that seed on until so many\n"
                "           transitions, or that seed alone; commands from N on are printed\n"
                "       sim --bugs   each defect that is planted must be found\n");
        return 2;
    }
    return o.bugs ? find_all() : run_seeds(&o, bug);
}
